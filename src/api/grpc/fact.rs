//! Conversions of tuples and attributes between their protobuf messages and [`crate::model::change`].

use super::proto;
use crate::api::encode::base_v1;
use crate::model::change::{Attribute, AttributeValue, TYPE_URL_PREFIX, Tuple};
use prost::Message;
use prost_types::Any;

impl From<Tuple<'_>> for proto::Tuple {
    fn from(tuple: Tuple<'_>) -> Self {
        Self {
            entity: Some(proto::Entity { r#type: tuple.entity_type.into(), id: tuple.entity_id.into() }),
            relation: tuple.relation.into(),
            subject: Some(proto::Subject {
                r#type: tuple.subject_type.into(),
                id: tuple.subject_id.into(),
                relation: tuple.subject_relation.into(),
            }),
        }
    }
}

impl From<Attribute<'_>> for proto::Attribute {
    fn from(attribute: Attribute<'_>) -> Self {
        let type_url = format!("{TYPE_URL_PREFIX}{}", attribute.value.message_name());
        Self {
            entity: Some(proto::Entity { r#type: attribute.entity_type.into(), id: attribute.entity_id.into() }),
            attribute: attribute.attribute.into(),
            value: Some(Any { type_url, value: base_v1::encode_data(&attribute.value) }),
        }
    }
}

/// Decodes an attribute's value.
///
/// # Errors
/// A description of the invalid form, never with contents of the value.
pub(super) fn value_of(any: &Any) -> Result<AttributeValue, &'static str> {
    fn data<M: Message + Default>(
        any: &Any,
        value: impl Fn(M) -> AttributeValue,
    ) -> Result<AttributeValue, &'static str> {
        M::decode(&*any.value).map(value).map_err(|_| "the value's bytes are not a message of its type_url")
    }
    match any.type_url.strip_prefix(TYPE_URL_PREFIX) {
        Some("StringValue") => data(any, |value: proto::StringValue| AttributeValue::String(value.data)),
        Some("IntegerValue") => data(any, |value: proto::IntegerValue| AttributeValue::Integer(value.data)),
        Some("DoubleValue") => data(any, |value: proto::DoubleValue| AttributeValue::Double(value.data)),
        Some("BooleanValue") => data(any, |value: proto::BooleanValue| AttributeValue::Boolean(value.data)),
        Some("StringArrayValue") => data(any, |value: proto::StringArrayValue| AttributeValue::StringArray(value.data)),
        Some("IntegerArrayValue") => {
            data(any, |value: proto::IntegerArrayValue| AttributeValue::IntegerArray(value.data))
        }
        Some("DoubleArrayValue") => data(any, |value: proto::DoubleArrayValue| AttributeValue::DoubleArray(value.data)),
        Some("BooleanArrayValue") => {
            data(any, |value: proto::BooleanArrayValue| AttributeValue::BooleanArray(value.data))
        }
        _ => Err("type_url must be type.googleapis.com/base.v1. and one of the eight value messages"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn all_types_of_values_round_trip() {
        use AttributeValue as V;
        let values = [
            V::String("é".into()),
            V::Integer(-7),
            V::Double(f64::NEG_INFINITY),
            V::Boolean(true),
            V::StringArray(vec!["a".into(), String::new()]),
            V::IntegerArray(vec![i32::MIN, 0, i32::MAX]),
            V::DoubleArray(vec![0.1, 0.0]),
            V::BooleanArray(vec![false, true]),
            V::String(String::new()),
            V::StringArray(vec![]),
        ];
        for value in values {
            let attribute = Attribute { entity_type: "a", entity_id: "b", attribute: "c", value: value.clone() };
            let message = proto::Attribute::from(attribute);
            assert_eq!(value_of(&message.value.unwrap()), Ok(value));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(kind in 0usize..9, value in proptest::collection::vec(any::<u8>(), 0..50)) {
            let kinds = ["String", "Integer", "Double", "Boolean", "StringArray", "IntegerArray", "DoubleArray",
                "BooleanArray", "Other"];
            let _ = value_of(&Any { type_url: format!("{TYPE_URL_PREFIX}{}Value", kinds[kind]), value });
        }
    }
}
