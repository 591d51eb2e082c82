//! `base.v1.WatchResponse`: one `DataChanges` with a snap token and the changes of a message (`proto/base/v1/base.proto`).
//!
//! Changes of tuples are copied unchanged. Changes of attributes are transcoded: field 3 instead of 4, and the value in
//! an Any. The response is sent as a [`mod@frame`] of gRPC or as a [`mod@line`] of JSON.

pub(crate) mod frame;
pub(crate) mod line;

use super::Malformed;
use crate::model::change::{AttributeValue, ChangeView, Changes, FactView, TYPE_URL_PREFIX};
use crate::model::protobuf::{field_len, put_bytes, put_head, put_text, text_len};
use bytes::BufMut as _;
use prost::encoding::{WireType, encode_key, encode_varint};

const RESPONSE_CHANGES: u32 = 1;
const SNAP_TOKEN: u32 = 1;
const TUPLE_CHANGES: u32 = 2;
const OPERATION: u32 = 1;
const ATTRIBUTE: u32 = 3;
const ATTRIBUTE_ENTITY: u32 = 1;
const ATTRIBUTE_NAME: u32 = 2;
const ATTRIBUTE_VALUE: u32 = 3;
const ENTITY_TYPE: u32 = 1;
const ENTITY_ID: u32 = 2;
const ANY_TYPE_URL: u32 = 1;
const ANY_VALUE: u32 = 2;
const DATA: u32 = 1;

/// Encodes the whole response.
///
/// # Errors
/// If an attribute among the changes cannot be decoded.
pub fn response(snap_token: &str, changes: &[u8]) -> Result<Vec<u8>, Malformed> {
    let mut out = Vec::new();
    put_response(snap_token, changes, &mut out)?;
    Ok(out)
}

/// Appends the whole response to `out`.
fn put_response(snap_token: &str, changes: &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
    let transcoded = Changes::of(changes).have_attributes().then(|| transcoded(changes)).transpose()?;
    let changes = transcoded.as_deref().unwrap_or(changes);
    let inner = text_len(snap_token) + changes.len();
    out.reserve_exact(field_len(inner));
    put_head(RESPONSE_CHANGES, inner, out);
    put_text(SNAP_TOKEN, snap_token, out);
    out.put_slice(changes);
    Ok(())
}

fn transcoded(changes: &[u8]) -> Result<Vec<u8>, Malformed> {
    let mut out = Vec::with_capacity(2 * changes.len());
    for element in Changes::of(changes) {
        let ChangeView { operation, fact } = ChangeView::read(element).ok_or(Malformed)?;
        match fact {
            FactView::Tuple(_) => out.put_slice(element),
            FactView::Attribute { entity_type, entity_id, attribute, value } => {
                let value = value.read().ok_or(Malformed)?;
                let (mut entity, mut any, mut fact, mut change) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
                put_text(ENTITY_TYPE, entity_type, &mut entity);
                put_text(ENTITY_ID, entity_id, &mut entity);
                put_text(ANY_TYPE_URL, &format!("{TYPE_URL_PREFIX}{}", value.message_name()), &mut any);
                let data = encode_data(&value);
                if !data.is_empty() {
                    put_bytes(ANY_VALUE, &data, &mut any);
                }
                put_bytes(ATTRIBUTE_ENTITY, &entity, &mut fact);
                put_text(ATTRIBUTE_NAME, attribute, &mut fact);
                put_bytes(ATTRIBUTE_VALUE, &any, &mut fact);
                encode_key(OPERATION, WireType::Varint, &mut change);
                encode_varint(operation.number(), &mut change);
                put_bytes(ATTRIBUTE, &fact, &mut change);
                put_bytes(TUPLE_CHANGES, &change, &mut out);
            }
        }
    }
    Ok(out)
}

/// Encodes the message in the Any: field 1, which is omitted if it has the default value.
pub(in crate::api) fn encode_data(value: &AttributeValue) -> Vec<u8> {
    use prost::encoding as p;
    let mut out = Vec::new();
    match value {
        AttributeValue::String(value) if !value.is_empty() => p::string::encode(DATA, value, &mut out),
        AttributeValue::Integer(value) if *value != 0 => p::int32::encode(DATA, value, &mut out),
        // Negative zero is not the default value.
        AttributeValue::Double(value) if value.to_bits() != 0 => p::double::encode(DATA, value, &mut out),
        AttributeValue::Boolean(value) if *value => p::bool::encode(DATA, value, &mut out),
        AttributeValue::String(_)
        | AttributeValue::Integer(_)
        | AttributeValue::Double(_)
        | AttributeValue::Boolean(_) => {}
        AttributeValue::StringArray(values) => p::string::encode_repeated(DATA, values, &mut out),
        AttributeValue::IntegerArray(values) => p::int32::encode_packed(DATA, values, &mut out),
        AttributeValue::DoubleArray(values) => p::double::encode_packed(DATA, values, &mut out),
        AttributeValue::BooleanArray(values) => p::bool::encode_packed(DATA, values, &mut out),
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::grpc::proto;
    use crate::model::change::values;
    use crate::model::change::{Attribute, Fact, Operation, Tuple, encode, envelope_bytes};
    use proptest::prelude::*;
    use prost::Message as _;

    /// prost treats negative zero as the default value, and loses its sign.
    fn without_negative_zero(value: AttributeValue) -> AttributeValue {
        match value {
            AttributeValue::Double(value) => AttributeValue::Double(value + 0.0),
            value => value,
        }
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

    fn expected(operation: Operation, kind: proto::data_change::Type) -> Vec<u8> {
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
        response("token", &changes).unwrap()
    }

    proptest! {
        #[test]
        fn tuples_encode_as_generated(columns in proptest::array::uniform6(".{0,200}"), create in any::<bool>()) {
            let [entity_type, entity_id, relation, subject_type, subject_id, subject_relation] = &columns;
            let operation = if create { Operation::Create } else { Operation::Delete };
            let fact = Fact::Tuple(Tuple { entity_type, entity_id, relation, subject_type, subject_id, subject_relation });
            let expected = expected(operation, proto::data_change::Type::Tuple(proto::Tuple {
                entity: Some(proto::Entity { r#type: entity_type.clone(), id: entity_id.clone() }),
                relation: relation.clone(),
                subject: Some(proto::Subject {
                    r#type: subject_type.clone(), id: subject_id.clone(), relation: subject_relation.clone(),
                }),
            }));
            prop_assert_eq!(ours(operation, &fact), expected);
        }

        #[test]
        fn attributes_encode_as_generated(columns in proptest::array::uniform3(".{0,200}"), value in values().prop_map(without_negative_zero)) {
            let [entity_type, entity_id, attribute] = &columns;
            let fact = Fact::Attribute(Attribute { entity_type, entity_id, attribute, value: value.clone() });
            let expected = expected(Operation::Create, proto::data_change::Type::Attribute(proto::Attribute {
                entity: Some(proto::Entity { r#type: entity_type.clone(), id: entity_id.clone() }),
                attribute: attribute.clone(),
                value: Some(any_value(&value)),
            }));
            prop_assert_eq!(ours(Operation::Create, &fact), expected);
            let mut encoded = Vec::new();
            encode(Operation::Create, &fact, &mut encoded);
            prop_assert!(transcoded(&encoded).unwrap().len() <= envelope_bytes(&fact, &encoded), "no limit is passed");
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = response("", &bytes);
        }
    }
}
