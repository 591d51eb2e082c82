//! A `WatchResponse` in protobuf's JSON form, as a line:
//!
//! ```text
//!  {"result":{"changes":{"snap_token":"…","data_changes":[…]}}}
//!            └──────────────── the JSON text ────────────────┘
//! ```
//!
//! The line is written straight from the changes, because a decoded message would take several times their memory. A
//! test compares it with the output of prost-reflect. Server-Sent Events, and the first version of the API with its own
//! name for the list, are made of slices of the same line, so memory holds one line only.

use crate::api::encode::{Encoder, Malformed};
use crate::hub::EnvelopeForm;
use crate::model::change::{AttributeValue, ChangeView, Changes, FactView, Operation, TYPE_URL_PREFIX, Tuple};
use crate::model::transaction::Message;
use bytes::Bytes;
use serde::Serialize;

pub(crate) const LINE: Encoder = Encoder { form: EnvelopeForm::BaseV1Json, encode };

const BEFORE_JSON: &str = "{\"result\":";
const BEFORE_TOKEN: &str = "{\"changes\":{\"snap_token\":\"";
const BEFORE_NAME: &str = "\",\"";
/// The name of the list of changes.
const NAME: &str = "data_changes";
const BEFORE_LIST: &str = "\":[";
const AFTER_LIST: &str = "]}}";
const AFTER_JSON: &str = "}\n";

/// The approximate size of a tuple's JSON, as a multiple of its protobuf.
const GROWTH: usize = 4;

fn encode(message: &Message, snap_token: &str) -> Result<Bytes, Malformed> {
    let mut line = Vec::with_capacity(GROWTH * message.changes.len() + 128);
    // A token contains no characters that JSON escapes.
    for part in [BEFORE_JSON, BEFORE_TOKEN, snap_token, BEFORE_NAME, NAME, BEFORE_LIST] {
        line.extend_from_slice(part.as_bytes());
    }
    for (n, element) in Changes::of(&message.changes).enumerate() {
        if n > 0 {
            line.push(b',');
        }
        put_change(&ChangeView::read(element).ok_or(Malformed)?, &mut line)?;
    }
    line.extend_from_slice(AFTER_LIST.as_bytes());
    line.extend_from_slice(AFTER_JSON.as_bytes());
    // Envelopes are kept, so they have no spare capacity.
    Ok(line.into_boxed_slice().into())
}

fn put_change(change: &ChangeView<'_>, out: &mut Vec<u8>) -> Result<(), Malformed> {
    let operation = match change.operation {
        Operation::Create => "OPERATION_CREATE",
        Operation::Delete => "OPERATION_DELETE",
    };
    put("{\"operation\":", operation, out)?;
    match change.fact {
        FactView::Tuple(Tuple { entity_type, entity_id, relation, subject_type, subject_id, subject_relation }) => {
            put(",\"tuple\":{\"entity\":{\"type\":", entity_type, out)?;
            put(",\"id\":", entity_id, out)?;
            put("},\"relation\":", relation, out)?;
            put(",\"subject\":{\"type\":", subject_type, out)?;
            put(",\"id\":", subject_id, out)?;
            put(",\"relation\":", subject_relation, out)?;
        }
        FactView::Attribute { entity_type, entity_id, attribute, value } => {
            let value = value.read().ok_or(Malformed)?;
            put(",\"attribute\":{\"entity\":{\"type\":", entity_type, out)?;
            put(",\"id\":", entity_id, out)?;
            put("},\"attribute\":", attribute, out)?;
            put(",\"value\":{\"@type\":", &format!("{TYPE_URL_PREFIX}{}", value.message_name()), out)?;
            put_data(&value, out)?;
        }
    }
    out.extend_from_slice(b"}}}");
    Ok(())
}

fn put_data(value: &AttributeValue, out: &mut Vec<u8>) -> Result<(), Malformed> {
    const DATA: &str = ",\"data\":";
    match value {
        AttributeValue::String(data) => put(DATA, data, out),
        AttributeValue::Integer(data) => put(DATA, data, out),
        AttributeValue::Double(data) => put(DATA, &double(*data), out),
        AttributeValue::Boolean(data) => put(DATA, data, out),
        AttributeValue::StringArray(data) => put(DATA, data, out),
        AttributeValue::IntegerArray(data) => put(DATA, data, out),
        AttributeValue::DoubleArray(data) => put(DATA, &data.iter().copied().map(double).collect::<Vec<_>>(), out),
        AttributeValue::BooleanArray(data) => put(DATA, data, out),
    }
}

/// A JSON number, or the string that stands for a number that JSON lacks.
#[derive(Serialize)]
#[serde(untagged)]
enum Double {
    Number(f64),
    Name(&'static str),
}

fn double(value: f64) -> Double {
    match value {
        f64::INFINITY => Double::Name("Infinity"),
        f64::NEG_INFINITY => Double::Name("-Infinity"),
        value if value.is_nan() => Double::Name("NaN"),
        value => Double::Number(value),
    }
}

fn put(before: &str, value: &(impl Serialize + ?Sized), out: &mut Vec<u8>) -> Result<(), Malformed> {
    out.extend_from_slice(before.as_bytes());
    // No value that is written here can fail.
    serde_json::to_writer(out, value).map_err(|_| Malformed)
}

/// An encoded line, and access to its parts.
#[derive(Debug)]
pub(crate) struct Line(Bytes);

impl Line {
    /// Wraps a line that [`LINE`] has encoded.
    pub(crate) const fn new(encoded: Bytes) -> Self {
        Self(encoded)
    }

    /// The whole line, with its line end.
    pub(crate) fn whole(self) -> Bytes {
        self.0
    }

    /// The JSON text of the response.
    pub(crate) fn json(&self) -> Bytes {
        self.0.slice(BEFORE_JSON.len()..self.0.len() - AFTER_JSON.len())
    }

    /// The snap token of the message.
    pub(crate) fn snap_token(&self) -> Bytes {
        self.0.slice(BEFORE_JSON.len() + BEFORE_TOKEN.len()..self.end_of_token())
    }

    /// The parts before and after the name of the list of changes.
    pub(crate) fn around_name(&self) -> (Bytes, Bytes) {
        let name = self.end_of_token() + BEFORE_NAME.len();
        (self.0.slice(..name), self.0.slice(name + NAME.len()..))
    }

    fn end_of_token(&self) -> usize {
        let begin = BEFORE_JSON.len() + BEFORE_TOKEN.len();
        begin + self.0.iter().skip(begin).position(|byte| *byte == b'"').unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::encode::base_v1::response;
    use crate::api::grpc::proto::DESCRIPTORS;
    use crate::model::change::{Attribute, Fact, encode as encode_change, values};
    use crate::model::lsn::{CommitLsn, CommitTime, EndLsn, Lsn, Xid8};
    use crate::model::transaction::{Header, MessageBuilder};
    use proptest::prelude::*;
    use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
    use std::sync::LazyLock;

    fn message(changes: &[u8]) -> Message {
        let header = Header { commit: CommitLsn(Lsn(1)), xid: Xid8(1), commit_time: CommitTime(0) };
        let mut builder = MessageBuilder::default();
        builder.push(1, changes, changes.len());
        builder.finish(header, Some(EndLsn(Lsn(2))))
    }

    fn line(changes: &[u8]) -> Line {
        Line::new(encode(&message(changes), "to-ken").unwrap())
    }

    /// The `WatchResponse` of these changes in protobuf's JSON form.
    fn expected(changes: &[u8]) -> String {
        static MESSAGES: LazyLock<DescriptorPool> = LazyLock::new(|| DescriptorPool::decode(DESCRIPTORS).unwrap());
        let response = response("to-ken", changes).unwrap();
        let descriptor = MESSAGES.get_message_by_name("base.v1.WatchResponse").unwrap();
        let decoded = DynamicMessage::decode(descriptor, response.as_slice()).unwrap();
        let options = SerializeOptions::new().use_proto_field_name(true).skip_default_fields(false);
        let mut json = Vec::new();
        decoded.serialize_with_options(&mut serde_json::Serializer::new(&mut json), &options).unwrap();
        String::from_utf8(json).unwrap().replacen("\"tuple_changes\":", "\"data_changes\":", 1)
    }

    fn check(changes: &[u8]) {
        let (line, expected) = (line(changes), expected(changes));
        assert_eq!(line.json(), expected);
        assert_eq!(line.snap_token(), "to-ken");
        let (before, behind) = line.around_name();
        let whole = format!("{{\"result\":{expected}}}\n");
        assert_eq!([&*before, b"data_changes", &*behind].concat(), whole.as_bytes());
        assert_eq!(line.whole(), whole);
    }

    #[test]
    fn a_message_may_have_no_changes() {
        check(b"");
    }

    #[test]
    fn what_is_no_change_is_refused() {
        for changes in [&b"\x12\x00"[..], b"\x12\x02\x08\x01", b"\x12\x02\x08\x07"] {
            assert_eq!(encode(&message(changes), "t"), Err(Malformed));
        }
    }

    proptest! {
        #[test]
        fn tuples_are_written_as_protobuf_does(columns in proptest::array::uniform6(any::<String>()), create in any::<bool>()) {
            let [entity_type, entity_id, relation, subject_type, subject_id, subject_relation] = &columns;
            let operation = if create { Operation::Create } else { Operation::Delete };
            let fact = Fact::Tuple(Tuple { entity_type, entity_id, relation, subject_type, subject_id, subject_relation });
            let mut changes = Vec::new();
            encode_change(operation, &fact, &mut changes);
            encode_change(operation, &fact, &mut changes);
            check(&changes);
        }

        #[test]
        fn attributes_are_written_as_protobuf_does(columns in proptest::array::uniform3(".{0,20}"), value in values()) {
            let [entity_type, entity_id, attribute] = &columns;
            let fact = Fact::Attribute(Attribute { entity_type, entity_id, attribute, value });
            let mut changes = Vec::new();
            encode_change(Operation::Create, &fact, &mut changes);
            check(&changes);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = encode(&message(&bytes), "");
        }
    }
}
