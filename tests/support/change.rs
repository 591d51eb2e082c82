//! Changes that can be compared, printed and applied to a state.

use prost::Message as _;
use serde_json::Value as Json;
use std::collections::BTreeSet;
use tuplewatch::api::grpc::proto::{self, DataChange, data_change};

/// The beginning or the end of a fact.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Change {
    pub(crate) is_create: bool,
    pub(crate) fact: String,
}

impl Change {
    pub(crate) fn create(fact: impl Into<String>) -> Self {
        Self { is_create: true, fact: fact.into() }
    }

    pub(crate) fn delete(fact: impl Into<String>) -> Self {
        Self { is_create: false, fact: fact.into() }
    }

    /// The text of a tuple. Neither types nor ids can contain a `#`.
    pub(crate) fn tuple(
        entity_type: &str,
        entity_id: &str,
        relation: &str,
        subject_type: &str,
        subject_id: &str,
        subject_relation: &str,
    ) -> String {
        format!("{entity_type}:{entity_id}#{relation}@{subject_type}:{subject_id}#{subject_relation}")
    }

    /// The text of the tuple that [`super::sql::Sql::insert`] inserts.
    pub(crate) fn viewer(id: &str) -> String {
        Self::tuple("document", id, "viewer", "user", "u", "")
    }

    /// The creation of the tuple that [`super::sql::Sql::insert`] inserts.
    pub(crate) fn created(id: &str) -> Self {
        Self::create(Self::viewer(id))
    }

    /// The text of an attribute, from its JSON in the table.
    pub(crate) fn attribute(entity_type: &str, entity_id: &str, attribute: &str, json: &str) -> String {
        let json: Json = serde_json::from_str(json).unwrap();
        let kind = json["@type"].as_str().unwrap().rsplit('.').next().unwrap();
        format!("{entity_type}:{entity_id}${attribute}={kind}:{}", json["data"])
    }

    /// The number of an attribute that [`super::sql::Sql::insert_large`] inserted.
    pub(crate) fn large_number(&self) -> u64 {
        let number = self.fact.strip_prefix("large:").and_then(|rest| rest.split('$').next());
        number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no large attribute: {self:?}"))
    }

    pub(crate) fn decode(change: DataChange) -> Self {
        let is_create = match change.operation() {
            data_change::Operation::Create => true,
            data_change::Operation::Delete => false,
            data_change::Operation::Unspecified => panic!("a change without an operation: {change:?}"),
        };
        let fact = match change.r#type.expect("a change of something") {
            data_change::Type::Tuple(tuple) => {
                let (entity, subject) = (tuple.entity.unwrap(), tuple.subject.unwrap());
                Self::tuple(
                    &entity.r#type,
                    &entity.id,
                    &tuple.relation,
                    &subject.r#type,
                    &subject.id,
                    &subject.relation,
                )
            }
            data_change::Type::Attribute(attribute) => {
                let entity = attribute.entity.unwrap();
                let value = attribute.value.unwrap();
                let (kind, data) = value_of(&value);
                format!("{}:{}${}={kind}:{data}", entity.r#type, entity.id, attribute.attribute)
            }
        };
        Self { is_create, fact }
    }

    /// Applies it. Returns whether it changed the state: a created fact was absent, or a deleted one present.
    pub(crate) fn apply(&self, state: &mut BTreeSet<String>) -> bool {
        if self.is_create { state.insert(self.fact.clone()) } else { state.remove(&self.fact) }
    }
}

fn value_of(any: &prost_types::Any) -> (&str, Json) {
    let kind = any.type_url.strip_prefix("type.googleapis.com/base.v1.").expect("a value of base.v1");
    let data = match kind {
        "StringValue" => proto::StringValue::decode(&*any.value).unwrap().data.into(),
        "IntegerValue" => proto::IntegerValue::decode(&*any.value).unwrap().data.into(),
        "DoubleValue" => proto::DoubleValue::decode(&*any.value).unwrap().data.into(),
        "BooleanValue" => proto::BooleanValue::decode(&*any.value).unwrap().data.into(),
        "StringArrayValue" => proto::StringArrayValue::decode(&*any.value).unwrap().data.into(),
        "IntegerArrayValue" => proto::IntegerArrayValue::decode(&*any.value).unwrap().data.into(),
        "DoubleArrayValue" => proto::DoubleArrayValue::decode(&*any.value).unwrap().data.into(),
        "BooleanArrayValue" => proto::BooleanArrayValue::decode(&*any.value).unwrap().data.into(),
        other => panic!("a value of an unexpected kind: {other}"),
    };
    (kind, data)
}
