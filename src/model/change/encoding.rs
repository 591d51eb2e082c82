//! The bytes of a change: an element of `tuplewatch.v1.Changes.changes` (`proto/tuplewatch/v1/watch.proto`).
//!
//! | message | fields |
//! | --- | --- |
//! | `Changes` | 2: `Change`, repeated |
//! | `Change` | 1: operation (1 created, 2 deleted), 2: `Tuple` or 4: `Attribute` |
//! | `Tuple` | 1: entity (1 type, 2 id), 2: relation, 3: subject (1 type, 2 id, 3 relation) |
//! | `Attribute` | 1: entity, 2: attribute, 3: `Value` |
//! | `Value` | 1 string, 2 boolean, 3 integer, 4 double, 5 strings, 6 booleans, 7 integers, 8 doubles (each list: 1, repeated) |
//!
//! **The change of a tuple has the same bytes in `base.v1.DataChanges`**, which uses the same field numbers. An
//! attribute has another field number there, and a differently packed value. So an envelope of `base.v1` copies tuples
//! and transcodes attributes.
//!
//! The encoder is hand-written, because it runs for every row: each string is copied once, from the row to its final
//! place.

use super::{Attribute, AttributeValue, Fact, Operation, Tuple};
use crate::model::protobuf::{field_len, put_head, put_text, text_len};
use bytes::BufMut as _;
use prost::encoding::{self, WireType, decode_key, decode_varint, encode_key, encode_varint};

const CHANGES: u32 = 2;
const OPERATION: u32 = 1;
const TUPLE: u32 = 2;
const ATTRIBUTE: u32 = 4;
const ENTITY: u32 = 1;
/// The relation of a tuple, or the name of an attribute.
const RELATION: u32 = 2;
/// The subject of a tuple, or the value of an attribute.
const SUBJECT: u32 = 3;
const TYPE: u32 = 1;
const ID: u32 = 2;
const SUBJECT_RELATION: u32 = 3;
const VALUES: u32 = 1;

fn put_entity(kind: &str, id: &str, out: &mut Vec<u8>) {
    put_head(ENTITY, text_len(kind) + text_len(id), out);
    put_text(TYPE, kind, out);
    put_text(ID, id, out);
}

/// Appends one element of `Changes.changes`: key, length, `Change`.
pub fn encode(operation: Operation, fact: &Fact<'_>, out: &mut Vec<u8>) {
    match fact {
        Fact::Tuple(tuple) => put_tuple(operation, tuple, out),
        Fact::Attribute(attribute) => put_attribute(operation, attribute, out),
    }
}

/// `base.v1` adds the type of a value: a URL of up to 45 bytes with its field keys and lengths.
const ATTRIBUTE_EXTRA_BYTES: usize = 64;

/// The largest size of an encoded change in any version of the API, in bytes.
pub const fn envelope_bytes(fact: &Fact<'_>, encoded: &[u8]) -> usize {
    match fact {
        Fact::Tuple(_) => encoded.len(),
        Fact::Attribute(_) => encoded.len() + ATTRIBUTE_EXTRA_BYTES,
    }
}

/// Writes everything before the fact's own fields.
fn put_change(operation: Operation, fact: u32, fact_bytes: usize, out: &mut Vec<u8>) {
    /// The key and the value of the operation.
    const OPERATION_BYTES: usize = 2;
    put_head(CHANGES, OPERATION_BYTES + field_len(fact_bytes), out);
    encode_key(OPERATION, WireType::Varint, out);
    encode_varint(operation.number(), out);
    put_head(fact, fact_bytes, out);
}

fn put_tuple(operation: Operation, tuple: &Tuple<'_>, out: &mut Vec<u8>) {
    let entity_bytes = text_len(tuple.entity_type) + text_len(tuple.entity_id);
    let subject_bytes = text_len(tuple.subject_type) + text_len(tuple.subject_id) + text_len(tuple.subject_relation);
    let tuple_bytes = field_len(entity_bytes) + text_len(tuple.relation) + field_len(subject_bytes);
    put_change(operation, TUPLE, tuple_bytes, out);
    put_entity(tuple.entity_type, tuple.entity_id, out);
    put_text(RELATION, tuple.relation, out);
    put_head(SUBJECT, subject_bytes, out);
    put_text(TYPE, tuple.subject_type, out);
    put_text(ID, tuple.subject_id, out);
    put_text(SUBJECT_RELATION, tuple.subject_relation, out);
}

fn put_attribute(operation: Operation, attribute: &Attribute<'_>, out: &mut Vec<u8>) {
    let value = encode_value(&attribute.value);
    let entity_bytes = text_len(attribute.entity_type) + text_len(attribute.entity_id);
    let attribute_bytes = field_len(entity_bytes) + text_len(attribute.attribute) + field_len(value.len());
    put_change(operation, ATTRIBUTE, attribute_bytes, out);
    put_entity(attribute.entity_type, attribute.entity_id, out);
    put_text(RELATION, attribute.attribute, out);
    put_head(SUBJECT, value.len(), out);
    out.put_slice(&value);
}

/// Encodes a `Value`. It is a oneof, in which default values are written too.
fn encode_value(value: &AttributeValue) -> Vec<u8> {
    let (mut out, mut list) = (Vec::new(), Vec::new());
    let number = match value {
        AttributeValue::String(value) => {
            encoding::string::encode(1, value, &mut out);
            return out;
        }
        AttributeValue::Boolean(value) => {
            encoding::bool::encode(2, value, &mut out);
            return out;
        }
        AttributeValue::Integer(value) => {
            encoding::int64::encode(3, &i64::from(*value), &mut out);
            return out;
        }
        AttributeValue::Double(value) => {
            encoding::double::encode(4, value, &mut out);
            return out;
        }
        AttributeValue::StringArray(values) => {
            encoding::string::encode_repeated(VALUES, values, &mut list);
            5
        }
        AttributeValue::BooleanArray(values) => {
            encoding::bool::encode_packed(VALUES, values, &mut list);
            6
        }
        AttributeValue::IntegerArray(values) => {
            let values: Vec<i64> = values.iter().copied().map(i64::from).collect();
            encoding::int64::encode_packed(VALUES, &values, &mut list);
            7
        }
        AttributeValue::DoubleArray(values) => {
            encoding::double::encode_packed(VALUES, values, &mut list);
            8
        }
    };
    put_head(number, list.len(), &mut out);
    out.put_slice(&list);
    out
}

impl Operation {
    /// The number of the operation in both schemas.
    pub const fn number(self) -> u64 {
        match self {
            Self::Create => 1,
            Self::Delete => 2,
        }
    }

    const fn from_number(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::Create),
            2 => Some(Self::Delete),
            _ => None,
        }
    }
}

/// The content of a field.
#[derive(Clone, Copy, Debug)]
enum Content<'a> {
    Varint(u64),
    /// The bits of a double.
    Fixed(u64),
    Bytes(&'a [u8]),
}

impl<'a> Content<'a> {
    const fn bytes(self) -> Option<&'a [u8]> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            Self::Varint(_) | Self::Fixed(_) => None,
        }
    }

    fn text(self) -> Option<&'a str> {
        std::str::from_utf8(self.bytes()?).ok()
    }
}

/// Splits a field off the front of a message.
fn take_field<'a>(message: &mut &'a [u8]) -> Option<(u32, Content<'a>)> {
    let (number, wire_type) = decode_key(message).ok()?;
    let content = match wire_type {
        WireType::Varint => Content::Varint(decode_varint(message).ok()?),
        WireType::SixtyFourBit => {
            let (bits, rest) = message.split_first_chunk::<8>()?;
            *message = rest;
            Content::Fixed(u64::from_le_bytes(*bits))
        }
        WireType::LengthDelimited => {
            let length = usize::try_from(decode_varint(message).ok()?).ok()?;
            let (bytes, rest) = message.split_at_checked(length)?;
            *message = rest;
            Content::Bytes(bytes)
        }
        WireType::ThirtyTwoBit | WireType::StartGroup | WireType::EndGroup => return None,
    };
    Some((number, content))
}

/// Calls `field` for each field of a message. `None` if the message is malformed, or if `field` refuses one.
fn each_field<'a>(mut message: &'a [u8], mut field: impl FnMut(u32, Content<'a>) -> Option<()>) -> Option<()> {
    while !message.is_empty() {
        let (number, content) = take_field(&mut message)?;
        field(number, content)?;
    }
    Some(())
}

/// Splits the first element off encoded changes, with its key and length. `None` at the end, or if [`encode`] did not
/// write the bytes.
pub fn split_first(changes: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut rest = changes;
    let (number, content) = take_field(&mut rest)?;
    content.bytes().filter(|_| number == CHANGES)?;
    changes.split_at_checked(changes.len() - rest.len())
}

/// An encoded change, read without copying.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChangeView<'a> {
    /// The kind of the change.
    pub operation: Operation,
    /// The fact.
    pub fact: FactView<'a>,
}

/// The fact of an encoded change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FactView<'a> {
    /// A relation tuple.
    Tuple(Tuple<'a>),
    /// An attribute of an entity.
    #[expect(missing_docs, reason = "the fields are the words of the model")]
    Attribute { entity_type: &'a str, entity_id: &'a str, attribute: &'a str, value: ValueView<'a> },
}

/// The encoded value of an attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValueView<'a>(&'a [u8]);

impl<'a> ChangeView<'a> {
    /// Reads an element from [`split_first`] or [`Changes`]. `None` if [`encode`] did not write it.
    pub fn read(element: &'a [u8]) -> Option<Self> {
        let (mut operation, mut fact) = (None, None);
        each_field(content(element)?, |number, content| {
            match (number, content) {
                (OPERATION, Content::Varint(number)) => operation = Operation::from_number(number),
                (TUPLE, Content::Bytes(tuple)) => fact = Some(FactView::Tuple(read_tuple(tuple)?)),
                (ATTRIBUTE, Content::Bytes(attribute)) => fact = Some(read_attribute(attribute)?),
                _ => {}
            }
            Some(())
        })?;
        Some(Self { operation: operation?, fact: fact? })
    }
}

/// The content of an element, without its key and length.
fn content(mut element: &[u8]) -> Option<&[u8]> {
    take_field(&mut element)?.1.bytes()
}

fn read_entity(entity: &[u8]) -> Option<(&str, &str)> {
    let (mut kind, mut id) = ("", "");
    each_field(entity, |number, content| {
        match number {
            TYPE => kind = content.text()?,
            ID => id = content.text()?,
            _ => {}
        }
        Some(())
    })?;
    Some((kind, id))
}

fn read_tuple(tuple: &[u8]) -> Option<Tuple<'_>> {
    let (mut entity, mut relation, mut subject, mut subject_relation) = (("", ""), "", ("", ""), "");
    each_field(tuple, |number, content| {
        match number {
            ENTITY => entity = read_entity(content.bytes()?)?,
            RELATION => relation = content.text()?,
            SUBJECT => {
                subject = read_entity(content.bytes()?)?;
                each_field(content.bytes()?, |number, content| {
                    if number == SUBJECT_RELATION {
                        subject_relation = content.text()?;
                    }
                    Some(())
                })?;
            }
            _ => {}
        }
        Some(())
    })?;
    let ((entity_type, entity_id), (subject_type, subject_id)) = (entity, subject);
    Some(Tuple { entity_type, entity_id, relation, subject_type, subject_id, subject_relation })
}

fn read_attribute(encoded: &[u8]) -> Option<FactView<'_>> {
    let (mut entity, mut attribute, mut value) = (("", ""), "", None);
    each_field(encoded, |number, content| {
        match number {
            ENTITY => entity = read_entity(content.bytes()?)?,
            RELATION => attribute = content.text()?,
            SUBJECT => value = content.bytes(),
            _ => {}
        }
        Some(())
    })?;
    let (entity_type, entity_id) = entity;
    Some(FactView::Attribute { entity_type, entity_id, attribute, value: ValueView(value?) })
}

impl ValueView<'_> {
    /// The decoded value. `None` if [`encode`] did not write it.
    pub fn read(self) -> Option<AttributeValue> {
        let mut rest = self.0;
        Some(match take_field(&mut rest)? {
            (1, content) => AttributeValue::String(content.text()?.to_owned()),
            (2, Content::Varint(value)) => AttributeValue::Boolean(value != 0),
            (3, Content::Varint(value)) => AttributeValue::Integer(integer(value)?),
            (4, Content::Fixed(bits)) => AttributeValue::Double(f64::from_bits(bits)),
            (5, Content::Bytes(list)) => {
                let mut values = Vec::new();
                each_field(list, |_, content| {
                    values.push(content.text()?.to_owned());
                    Some(())
                })?;
                AttributeValue::StringArray(values)
            }
            (6, Content::Bytes(list)) => AttributeValue::BooleanArray(packed(list, |list| Some(varint(list)? != 0))?),
            (7, Content::Bytes(list)) => AttributeValue::IntegerArray(packed(list, |list| integer(varint(list)?))?),
            (8, Content::Bytes(list)) => AttributeValue::DoubleArray(packed(list, |list| {
                let (bits, rest) = list.split_first_chunk::<8>()?;
                *list = rest;
                Some(f64::from_le_bytes(*bits))
            })?),
            _ => return None,
        })
    }
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    decode_varint(bytes).ok()
}

/// An integer of 32 bits, because the same log also serves `base.v1`.
fn integer(varint: u64) -> Option<i32> {
    i32::try_from(varint.cast_signed()).ok()
}

/// The elements of a list, which has one packed field, or none if it is empty.
fn packed<T>(mut list: &[u8], take: impl Fn(&mut &[u8]) -> Option<T>) -> Option<Vec<T>> {
    let mut values = Vec::new();
    if !list.is_empty() {
        let (_, content) = take_field(&mut list)?;
        let mut elements = content.bytes()?;
        while !elements.is_empty() {
            values.push(take(&mut elements)?);
        }
    }
    Some(values)
}

/// Iterates over encoded changes: each as its bytes with key and length. Ends at bytes that [`encode`] did not write.
#[derive(Clone, Copy, Debug)]
pub struct Changes<'a>(&'a [u8]);

impl<'a> Changes<'a> {
    /// The changes of a message.
    pub const fn of(changes: &'a [u8]) -> Self {
        Self(changes)
    }

    /// Whether any change is of an attribute.
    pub fn have_attributes(self) -> bool {
        self.into_iter().any(is_attribute)
    }

    /// The largest size of the changes in any version of the API, in bytes.
    pub fn envelope_bytes(self) -> usize {
        self.0.len() + ATTRIBUTE_EXTRA_BYTES * self.into_iter().filter(|element| is_attribute(element)).count()
    }
}

/// Whether the element is an attribute. Reads only the first fields.
fn is_attribute(element: &[u8]) -> bool {
    let fact = || {
        let mut fields = content(element)?;
        take_field(&mut fields)?;
        Some(decode_key(&mut fields).ok()?.0)
    };
    fact() == Some(ATTRIBUTE)
}

impl<'a> Iterator for Changes<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (first, rest) = split_first(self.0)?;
        self.0 = rest;
        Some(first)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn values() -> impl Strategy<Value = AttributeValue> {
        prop_oneof![
            ".*".prop_map(AttributeValue::String),
            any::<i32>().prop_map(AttributeValue::Integer),
            proptest::num::f64::ANY.prop_map(AttributeValue::Double),
            any::<bool>().prop_map(AttributeValue::Boolean),
            proptest::collection::vec(".*", 0..4).prop_map(AttributeValue::StringArray),
            proptest::collection::vec(any::<i32>(), 0..4).prop_map(AttributeValue::IntegerArray),
            proptest::collection::vec(proptest::num::f64::ANY, 0..4).prop_map(AttributeValue::DoubleArray),
            proptest::collection::vec(any::<bool>(), 0..4).prop_map(AttributeValue::BooleanArray),
        ]
    }

    /// The element as text, decoded with `proto/tuplewatch/v1/watch.proto`.
    fn by_descriptor(element: &[u8]) -> String {
        static POOL: std::sync::LazyLock<prost_reflect::DescriptorPool> = std::sync::LazyLock::new(|| {
            let files = protox::compile(["tuplewatch/v1/watch.proto"], [concat!(env!("CARGO_MANIFEST_DIR"), "/proto")]);
            prost_reflect::DescriptorPool::from_file_descriptor_set(files.unwrap()).unwrap()
        });
        let changes = POOL.get_message_by_name("tuplewatch.v1.Changes").unwrap();
        let decoded = prost_reflect::DynamicMessage::decode(changes, element).unwrap();
        assert_eq!(decoded.unknown_fields().count(), 0);
        let list = decoded.get_field_by_name("changes").unwrap().into_owned();
        let [change] = list.as_list().unwrap() else { panic!("{list:?}") };
        change.as_message().unwrap().to_string()
    }

    proptest! {
        #[test]
        fn a_tuple_round_trips(columns in proptest::array::uniform6(".{0,200}"), create in any::<bool>()) {
            let [entity_type, entity_id, relation, subject_type, subject_id, subject_relation] = &columns;
            let operation = if create { Operation::Create } else { Operation::Delete };
            let tuple = Tuple { entity_type, entity_id, relation, subject_type, subject_id, subject_relation };
            let mut changes = Vec::new();
            encode(operation, &Fact::Tuple(tuple), &mut changes);
            encode(operation, &Fact::Tuple(tuple), &mut changes);
            let (first, rest) = split_first(&changes).unwrap();
            prop_assert_eq!(first, rest);
            prop_assert_eq!(split_first(&[]), None);
            prop_assert!(!Changes::of(&changes).have_attributes());
            prop_assert_eq!(ChangeView::read(first), Some(ChangeView { operation, fact: FactView::Tuple(tuple) }));
        }

        #[test]
        fn an_attribute_round_trips(columns in proptest::array::uniform3(".{0,200}"), written in values()) {
            let [entity_type, entity_id, attribute] = &columns;
            let fact = Fact::Attribute(Attribute { entity_type, entity_id, attribute, value: written.clone() });
            let mut changes = Vec::new();
            encode(Operation::Create, &fact, &mut changes);
            prop_assert!(Changes::of(&changes).have_attributes());
            let view = ChangeView::read(&changes).unwrap();
            let FactView::Attribute { value, .. } = view.fact else { panic!("{view:?}") };
            prop_assert_eq!(format!("{:?}", value.read()), format!("{:?}", Some(&written)), "NaN is not itself");
            let expected = FactView::Attribute { entity_type, entity_id, attribute, value };
            prop_assert_eq!(view, ChangeView { operation: Operation::Create, fact: expected });
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = ChangeView::read(&bytes);
            let _ = ValueView(&bytes).read();
            let _ = Changes::of(&bytes).have_attributes();
        }
    }

    #[test]
    fn the_field_numbers_match_the_schema() {
        let check = |operation, fact: Fact<'_>, expected: &str| {
            let mut element = Vec::new();
            encode(operation, &fact, &mut element);
            assert_eq!(by_descriptor(&element), expected);
        };
        let tuple = Tuple {
            entity_type: "doc",
            entity_id: "1",
            relation: "viewer",
            subject_type: "group",
            subject_id: "2",
            subject_relation: "member",
        };
        check(
            Operation::Delete,
            Fact::Tuple(tuple),
            r#"operation:OPERATION_DELETE,tuple{entity{type:"doc",id:"1"},relation:"viewer",subject{type:"group",id:"2",relation:"member"}}"#,
        );
        use AttributeValue as V;
        for (value, expected) in [
            (V::String(String::new()), r#"string_value:"""#),
            (V::Boolean(false), "boolean_value:false"),
            (V::Integer(-7), "integer_value:-7"),
            (V::Double(0.0), "double_value:0.0"),
            (V::StringArray(vec!["a".into(), String::new()]), r#"string_values{values:["a",""]}"#),
            (V::BooleanArray(vec![true, false]), "boolean_values{values:[true,false]}"),
            (V::IntegerArray(vec![i32::MIN]), "integer_values{values:[-2147483648]}"),
            (V::DoubleArray(vec![]), "double_values{}"),
        ] {
            let fact = Fact::Attribute(Attribute { entity_type: "doc", entity_id: "1", attribute: "public", value });
            let expected = format!(
                r#"operation:OPERATION_CREATE,attribute{{entity{{type:"doc",id:"1"}},attribute:"public",value{{{expected}}}}}"#
            );
            check(Operation::Create, fact, &expected);
        }
    }
}
