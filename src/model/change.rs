//! What changed: tuples and attributes, and their bytes on the wire.
//!
//! A change is encoded once, here, straight from the borrowed columns of a row into its protobuf form
//! (`base.v1.DataChange`, as an element of `DataChanges.tuple_changes`). From then on it is only copied: into the change
//! log, into the memory window, to every subscriber.

use bytes::BufMut;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};
use std::fmt;
use std::sync::Arc;

/// A tenant's id. Cheap to clone; the bytes are PostgreSQL's text, at most [`TenantId::BYTES_MAX`] of them.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(Arc<str>);

/// The text cannot be a tenant id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TenantIdError {
    /// Nothing in it.
    #[error("the tenant id is empty")]
    Empty,
    /// Longer than the limit.
    #[error("the tenant id has {0} bytes; at most {max} are allowed", max = TenantId::BYTES_MAX)]
    TooLong(usize),
    /// A NUL byte, which PostgreSQL text cannot hold.
    #[error("the tenant id contains a NUL character")]
    Nul,
}

impl TenantId {
    /// Longest tenant id, in bytes.
    pub const BYTES_MAX: usize = 512;

    /// Takes any text that a `text` column can hold.
    ///
    /// # Errors
    /// Where it is empty, too long, or has a NUL.
    pub fn new(text: &str) -> Result<Self, TenantIdError> {
        match text.len() {
            0 => Err(TenantIdError::Empty),
            n if n > Self::BYTES_MAX => Err(TenantIdError::TooLong(n)),
            _ if text.contains('\0') => Err(TenantIdError::Nul),
            _ => Ok(Self(text.into())),
        }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::borrow::Borrow<str> for TenantId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What happened to a fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// It holds from now on.
    Create,
    /// It no longer holds.
    Delete,
}

/// A relation tuple: the subject has the relation to the entity. In the order of the `tuples` preset's primary key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the fields are the words of the model")]
pub struct Tuple<'a> {
    pub entity_type: &'a str,
    pub entity_id: &'a str,
    pub relation: &'a str,
    pub subject_type: &'a str,
    pub subject_id: &'a str,
    /// Empty for a direct subject.
    pub subject_relation: &'a str,
}

/// An attribute of an entity.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the fields are the words of the model")]
pub struct Attribute<'a> {
    pub entity_type: &'a str,
    pub entity_id: &'a str,
    pub attribute: &'a str,
    pub value: AttributeValue,
}

/// The value of an attribute: one of the eight `base.v1.*Value` messages.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the variants are the messages' names")]
pub enum AttributeValue {
    String(String),
    Integer(i32),
    Double(f64),
    Boolean(bool),
    StringArray(Vec<String>),
    IntegerArray(Vec<i32>),
    DoubleArray(Vec<f64>),
    BooleanArray(Vec<bool>),
}

/// What a change is about.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the variants are their contents")]
pub enum Fact<'a> {
    Tuple(Tuple<'a>),
    Attribute(Attribute<'a>),
}

/// Field numbers of `proto/base/v1/base.proto`.
mod field {
    pub(super) const CHANGES_SNAP_TOKEN: u32 = 1;
    pub(super) const CHANGES_TUPLE_CHANGES: u32 = 2;
    pub(super) const RESPONSE_CHANGES: u32 = 1;
    pub(super) const CHANGE_OPERATION: u32 = 1;
    pub(super) const CHANGE_TUPLE: u32 = 2;
    pub(super) const CHANGE_ATTRIBUTE: u32 = 3;
    pub(super) const TUPLE_ENTITY: u32 = 1;
    pub(super) const TUPLE_RELATION: u32 = 2;
    pub(super) const TUPLE_SUBJECT: u32 = 3;
    pub(super) const ATTRIBUTE_ENTITY: u32 = 1;
    pub(super) const ATTRIBUTE_NAME: u32 = 2;
    pub(super) const ATTRIBUTE_VALUE: u32 = 3;
    pub(super) const TYPE: u32 = 1;
    pub(super) const ID: u32 = 2;
    pub(super) const SUBJECT_RELATION: u32 = 3;
    pub(super) const ANY_TYPE_URL: u32 = 1;
    pub(super) const ANY_VALUE: u32 = 2;
    pub(super) const DATA: u32 = 1;
}

/// Type URLs of attribute values begin with this.
pub const TYPE_URL_PREFIX: &str = "type.googleapis.com/base.v1.";

/// Bytes of a length-delimited field with a one-byte key (all field numbers here are below 16).
fn len_field(content_bytes: usize) -> usize {
    1 + encoded_len_varint(content_bytes as u64) + content_bytes
}

/// Bytes of a string field; proto3 leaves an empty one out.
fn len_str(text: &str) -> usize {
    if text.is_empty() { 0 } else { len_field(text.len()) }
}

fn put_len(number: u32, content_bytes: usize, out: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, out);
    encode_varint(content_bytes as u64, out);
}

fn put_str(number: u32, text: &str, out: &mut Vec<u8>) {
    if !text.is_empty() {
        put_len(number, text.len(), out);
        out.put_slice(text.as_bytes());
    }
}

fn put_entity(number: u32, kind: &str, id: &str, out: &mut Vec<u8>) {
    put_len(number, len_str(kind) + len_str(id), out);
    put_str(field::TYPE, kind, out);
    put_str(field::ID, id, out);
}

/// Appends one element of `DataChanges.tuple_changes`: key, length, `DataChange`.
pub fn encode(operation: Operation, fact: &Fact<'_>, out: &mut Vec<u8>) {
    /// Key and value of `DataChange.operation`.
    const OPERATION_BYTES: usize = 2;
    let operation: u64 = match operation {
        Operation::Create => 1,
        Operation::Delete => 2,
    };
    let start = |number: u32, fact_bytes: usize, out: &mut Vec<u8>| {
        put_len(field::CHANGES_TUPLE_CHANGES, OPERATION_BYTES + len_field(fact_bytes), out);
        encode_key(field::CHANGE_OPERATION, WireType::Varint, out);
        encode_varint(operation, out);
        put_len(number, fact_bytes, out);
    };
    match fact {
        Fact::Tuple(tuple) => {
            let entity = len_str(tuple.entity_type) + len_str(tuple.entity_id);
            let subject = len_str(tuple.subject_type) + len_str(tuple.subject_id) + len_str(tuple.subject_relation);
            start(field::CHANGE_TUPLE, len_field(entity) + len_str(tuple.relation) + len_field(subject), out);
            put_entity(field::TUPLE_ENTITY, tuple.entity_type, tuple.entity_id, out);
            put_str(field::TUPLE_RELATION, tuple.relation, out);
            put_len(field::TUPLE_SUBJECT, subject, out);
            put_str(field::TYPE, tuple.subject_type, out);
            put_str(field::ID, tuple.subject_id, out);
            put_str(field::SUBJECT_RELATION, tuple.subject_relation, out);
        }
        Fact::Attribute(attribute) => {
            let entity = len_str(attribute.entity_type) + len_str(attribute.entity_id);
            let name = attribute.value.message_name();
            let data = attribute.value.encode_data();
            let url_bytes = TYPE_URL_PREFIX.len() + name.len();
            let any = len_field(url_bytes) + if data.is_empty() { 0 } else { len_field(data.len()) };
            start(field::CHANGE_ATTRIBUTE, len_field(entity) + len_str(attribute.attribute) + len_field(any), out);
            put_entity(field::ATTRIBUTE_ENTITY, attribute.entity_type, attribute.entity_id, out);
            put_str(field::ATTRIBUTE_NAME, attribute.attribute, out);
            put_len(field::ATTRIBUTE_VALUE, any, out);
            put_len(field::ANY_TYPE_URL, url_bytes, out);
            out.put_slice(TYPE_URL_PREFIX.as_bytes());
            out.put_slice(name.as_bytes());
            if !data.is_empty() {
                put_len(field::ANY_VALUE, data.len(), out);
                out.put_slice(&data);
            }
        }
    }
}

/// A whole `base.v1.WatchResponse` around already encoded `changes`.
pub fn encode_watch_response(snap_token: &str, changes: &[u8]) -> Vec<u8> {
    let inner = len_str(snap_token) + changes.len();
    let mut out = Vec::with_capacity(len_field(inner));
    put_len(field::RESPONSE_CHANGES, inner, &mut out);
    put_str(field::CHANGES_SNAP_TOKEN, snap_token, &mut out);
    out.put_slice(changes);
    out
}

/// Splits the first element off encoded changes: its bytes with key and length. `None` at the end, or where the bytes are
/// not what [`encode`] wrote.
pub fn split_first(changes: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut rest = changes;
    let (number, wire_type) = prost::encoding::decode_key(&mut rest).ok()?;
    if number != field::CHANGES_TUPLE_CHANGES || wire_type != WireType::LengthDelimited {
        return None;
    }
    let content = usize::try_from(prost::encoding::decode_varint(&mut rest).ok()?).ok()?;
    let head_bytes = changes.len() - rest.len();
    changes.split_at_checked(head_bytes.checked_add(content)?)
}

impl AttributeValue {
    /// Name of the `base.v1` message that carries it.
    pub const fn message_name(&self) -> &'static str {
        match self {
            Self::String(_) => "StringValue",
            Self::Integer(_) => "IntegerValue",
            Self::Double(_) => "DoubleValue",
            Self::Boolean(_) => "BooleanValue",
            Self::StringArray(_) => "StringArrayValue",
            Self::IntegerArray(_) => "IntegerArrayValue",
            Self::DoubleArray(_) => "DoubleArrayValue",
            Self::BooleanArray(_) => "BooleanArrayValue",
        }
    }

    /// The message's own bytes: field 1, left out where it has its default.
    pub fn encode_data(&self) -> Vec<u8> {
        use prost::encoding as p;
        let mut out = Vec::new();
        let number = field::DATA;
        match self {
            Self::String(value) if !value.is_empty() => p::string::encode(number, value, &mut out),
            Self::Integer(value) if *value != 0 => p::int32::encode(number, value, &mut out),
            // Negative zero is not the default.
            Self::Double(value) if value.to_bits() != 0 => p::double::encode(number, value, &mut out),
            Self::Boolean(value) if *value => p::bool::encode(number, value, &mut out),
            Self::String(_) | Self::Integer(_) | Self::Double(_) | Self::Boolean(_) => {}
            Self::StringArray(values) => p::string::encode_repeated(number, values, &mut out),
            Self::IntegerArray(values) => p::int32::encode_packed(number, values, &mut out),
            Self::DoubleArray(values) => p::double::encode_packed(number, values, &mut out),
            Self::BooleanArray(values) => p::bool::encode_packed(number, values, &mut out),
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use prost::Message as _;

    /// The generated types are the oracle: what we write must decode to what they would say, and be the same bytes.
    mod proto {
        #![allow(missing_docs, clippy::all, unreachable_pub)]
        include!("../api/grpc/proto/base.v1.rs");
    }

    fn any_of<M: prost::Message>(name: &str, message: &M) -> prost_types::Any {
        prost_types::Any { type_url: format!("{TYPE_URL_PREFIX}{name}"), value: message.encode_to_vec() }
    }

    fn any_value(value: &AttributeValue) -> prost_types::Any {
        let name = value.message_name();
        match value.clone() {
            AttributeValue::String(data) => any_of(name, &proto::StringValue { data }),
            AttributeValue::Integer(data) => any_of(name, &proto::IntegerValue { data }),
            AttributeValue::Double(data) => any_of(name, &proto::DoubleValue { data }),
            AttributeValue::Boolean(data) => any_of(name, &proto::BooleanValue { data }),
            AttributeValue::StringArray(data) => any_of(name, &proto::StringArrayValue { data }),
            AttributeValue::IntegerArray(data) => any_of(name, &proto::IntegerArrayValue { data }),
            AttributeValue::DoubleArray(data) => any_of(name, &proto::DoubleArrayValue { data }),
            AttributeValue::BooleanArray(data) => any_of(name, &proto::BooleanArrayValue { data }),
        }
    }

    fn values() -> impl Strategy<Value = AttributeValue> {
        prop_oneof![
            ".*".prop_map(AttributeValue::String),
            any::<i32>().prop_map(AttributeValue::Integer),
            // prost takes negative zero for the default and loses its sign; we do not.
            any::<f64>().prop_map(|value| AttributeValue::Double(if value == 0.0 { 0.0 } else { value })),
            any::<bool>().prop_map(AttributeValue::Boolean),
            proptest::collection::vec(".*", 0..4).prop_map(AttributeValue::StringArray),
            proptest::collection::vec(any::<i32>(), 0..4).prop_map(AttributeValue::IntegerArray),
            proptest::collection::vec(any::<f64>(), 0..4).prop_map(AttributeValue::DoubleArray),
            proptest::collection::vec(any::<bool>(), 0..4).prop_map(AttributeValue::BooleanArray),
        ]
    }

    fn response(operation: Operation, kind: proto::data_change::Type) -> Vec<u8> {
        let operation = match operation {
            Operation::Create => proto::data_change::Operation::Create,
            Operation::Delete => proto::data_change::Operation::Delete,
        };
        let change = proto::DataChange { operation: operation.into(), r#type: Some(kind) };
        let changes = proto::DataChanges { snap_token: "token".into(), tuple_changes: vec![change.clone(), change] };
        proto::WatchResponse { changes: Some(changes) }.encode_to_vec()
    }

    fn ours(operation: Operation, fact: &Fact<'_>) -> Vec<u8> {
        let mut changes = Vec::new();
        encode(operation, fact, &mut changes);
        encode(operation, fact, &mut changes);
        let (first, rest) = split_first(&changes).unwrap();
        assert_eq!(first, rest);
        assert_eq!(split_first(&[]), None);
        encode_watch_response("token", &changes)
    }

    proptest! {
        #[test]
        fn tuples_encode_as_generated(columns in proptest::array::uniform6(".{0,200}"), create in any::<bool>()) {
            let [entity_type, entity_id, relation, subject_type, subject_id, subject_relation] = &columns;
            let operation = if create { Operation::Create } else { Operation::Delete };
            let fact = Fact::Tuple(Tuple { entity_type, entity_id, relation, subject_type, subject_id, subject_relation });
            let expected = response(operation, proto::data_change::Type::Tuple(proto::Tuple {
                entity: Some(proto::Entity { r#type: entity_type.clone(), id: entity_id.clone() }),
                relation: relation.clone(),
                subject: Some(proto::Subject {
                    r#type: subject_type.clone(), id: subject_id.clone(), relation: subject_relation.clone(),
                }),
            }));
            prop_assert_eq!(ours(operation, &fact), expected);
        }

        #[test]
        fn attributes_encode_as_generated(columns in proptest::array::uniform3(".{0,200}"), value in values()) {
            let [entity_type, entity_id, attribute] = &columns;
            let fact = Fact::Attribute(Attribute { entity_type, entity_id, attribute, value: value.clone() });
            let expected = response(Operation::Create, proto::data_change::Type::Attribute(proto::Attribute {
                entity: Some(proto::Entity { r#type: entity_type.clone(), id: entity_id.clone() }),
                attribute: attribute.clone(),
                value: Some(any_value(&value)),
            }));
            prop_assert_eq!(ours(Operation::Create, &fact), expected);
        }

        #[test]
        fn splitting_arbitrary_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = split_first(&bytes);
        }
    }

    #[test]
    fn tenant_ids() {
        assert!(TenantId::new("t1").is_ok());
        assert_eq!(TenantId::new(""), Err(TenantIdError::Empty));
        assert_eq!(TenantId::new("a\0b"), Err(TenantIdError::Nul));
        assert_eq!(TenantId::new(&"x".repeat(513)), Err(TenantIdError::TooLong(513)));
    }
}
