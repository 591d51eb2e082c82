//! The check of the names in a request: each must be known, and occur once.
//!
//! An unknown name is probably a misspelled one. A client that writes `snaptoken` would start now instead of resuming,
//! and one that writes `tuple` would write nothing, each with status 200. So an unknown name is an error, which
//! suggests the nearest known name. The known names are all names that Permify's API has for the call, even if they
//! have no effect here, in both spellings of protobuf's JSON form (`snap_token`, `snapToken`).
//!
//! This check covers names, and values that must be objects or lists, because it knows their place in the request. The
//! library that reads the values checks everything else about them (`json`).

use crate::config::nearest;
use prost_reflect::{FieldDescriptor, Kind, MessageDescriptor};
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;

/// The length at which an unknown name is cut in an error.
const SHOWN_CHARS_MAX: usize = 64;

/// The field with this name, in either spelling.
pub(super) fn field(message: &MessageDescriptor, name: &str) -> Option<FieldDescriptor> {
    message.get_field_by_name(name).or_else(|| message.get_field_by_json_name(name))
}

/// Formats `unknown {what} …`, with the name that was probably meant, or with all known names.
pub(super) fn unknown(what: &str, name: &str, known: &[&str]) -> String {
    let shown: String = name.chars().take(SHOWN_CHARS_MAX).collect();
    // `SnapToken` or `ID` differ only in their case.
    let hint = match (nearest(&name.to_lowercase(), known.iter().copied()), known) {
        (Some(name), _) => format!("did you mean `{name}`?"),
        (None, []) => "no name is valid here".to_owned(),
        (None, known) => format!("known here: {}", known.join(", ")),
    };
    format!("unknown {what} `{shown}`: {hint}")
}

/// Checks the names in a JSON body.
///
/// # Errors
/// If the body is not JSON. Otherwise the first name that is unknown or repeated, or the first value that should be an
/// object or a list but is not.
pub(super) fn check(message: &MessageDescriptor, body: &[u8]) -> Result<(), serde_json::Error> {
    let mut json = serde_json::Deserializer::from_slice(body);
    Object { message, path: &Path::Body, is_optional: false }.deserialize(&mut json)?;
    json.end()
}

/// A place in the body. It is formatted only for errors.
enum Path<'a> {
    Body,
    Field(&'a Path<'a>, &'a str),
    Item(&'a Path<'a>, usize),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Body => f.write_str("the body"),
            Self::Field(Self::Body, name) => f.write_str(name),
            Self::Field(parent, name) => write!(f, "{parent}.{name}"),
            Self::Item(list, n) => write!(f, "{list}[{n}]"),
        }
    }
}

impl Path<'_> {
    fn unknown<E: Error>(&self, name: &str, message: &MessageDescriptor) -> E {
        let fields: Vec<FieldDescriptor> = message.fields().collect();
        let known: Vec<&str> = fields.iter().map(FieldDescriptor::name).collect();
        let what = match self {
            Self::Body => "field".to_owned(),
            path => format!("field of {path}"),
        };
        E::custom(unknown(&what, name, &known))
    }

    fn repeated<E: Error>(&self, name: &str) -> E {
        E::custom(format_args!("`{}` is there twice", Path::Field(self, name)))
    }
}

/// A message. Null stands for an absent message if one may be absent.
struct Object<'a> {
    message: &'a MessageDescriptor,
    path: &'a Path<'a>,
    is_optional: bool,
}

/// The value of a `repeated` field: null, or a list.
struct List<'a> {
    kind: &'a Kind,
    path: &'a Path<'a>,
}

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to be an object", self.path)
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        if self.is_optional { Ok(()) } else { Err(E::invalid_type(serde::de::Unexpected::Unit, &self)) }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        if self.message.full_name() == "google.protobuf.Any" {
            return self.visit_any(map);
        }
        let mut seen = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            let field = field(self.message, &name).ok_or_else(|| self.path.unknown(&name, self.message))?;
            if seen.contains(&field.number()) {
                return Err(self.path.repeated(&name));
            }
            seen.push(field.number());
            let (kind, path) = (field.kind(), &Path::Field(self.path, field.name()));
            match &kind {
                _ if field.is_list() => map.next_value_seed(List { kind: &kind, path })?,
                // The keys of a map are data of the caller.
                Kind::Message(message) if !field.is_map() => {
                    map.next_value_seed(Object { message, path, is_optional: true })?;
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

impl Object<'_> {
    /// Checks an Any: its `@type` determines its fields, in whatever order they are.
    fn visit_any<'de, A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        const TYPE: &str = "@type";
        let (mut names, mut url) = (Vec::new(), None);
        while let Some(name) = map.next_key::<String>()? {
            if names.contains(&name) || name == TYPE && url.is_some() {
                return Err(self.path.repeated(&name));
            }
            if name == TYPE {
                url = Some(map.next_value::<String>()?);
            } else {
                map.next_value::<IgnoredAny>()?;
                names.push(name);
            }
        }
        let Some(url) = url else {
            return Err(A::Error::custom(format_args!("{} has no `{TYPE}`", self.path)));
        };
        // If the type is unknown, or has its own JSON form, the library checks the value.
        let kind = url.rsplit('/').next().and_then(|name| self.message.parent_pool().get_message_by_name(name));
        let Some(kind) = kind.filter(|kind| kind.package_name() != "google.protobuf") else { return Ok(()) };
        match names.iter().find(|name| field(&kind, name).is_none()) {
            Some(name) => Err(self.path.unknown(name, &kind)),
            None => Ok(()),
        }
    }
}

impl<'de> DeserializeSeed<'de> for List<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for List<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to be a list", self.path)
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        for n in 0.. {
            let path = &Path::Item(self.path, n);
            let item = match self.kind {
                Kind::Message(message) => items.next_element_seed(Object { message, path, is_optional: false })?,
                _ => items.next_element::<IgnoredAny>()?.map(drop),
            };
            if item.is_none() {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::grpc::proto::DESCRIPTORS;
    use prost_reflect::DescriptorPool;

    fn checked(message: &str, body: &str) -> Result<(), String> {
        let pool = DescriptorPool::decode(DESCRIPTORS).unwrap();
        let message = pool.get_message_by_name(&format!("base.v1.{message}")).unwrap();
        check(&message, body.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn unknown_names_suggest_known_ones() {
        for (message, body, says) in [
            ("WatchRequest", r#"{"snaptoken": "x"}"#, "unknown field `snaptoken`: did you mean `snap_token`?"),
            ("WatchRequest", r#"{"SnapToken": "x"}"#, "unknown field `SnapToken`: did you mean `snap_token`?"),
            ("WatchRequest", r#"{"SNAP_TOKEN": "x"}"#, "unknown field `SNAP_TOKEN`: did you mean `snap_token`?"),
            ("WatchRequest", r#"{"snap-token": "x"}"#, "unknown field `snap-token`: did you mean `snap_token`?"),
            ("WatchRequest", r#"{" snap_token": "x"}"#, "unknown field ` snap_token`: did you mean `snap_token`?"),
            ("WatchRequest", r#"{"after": null}"#, "unknown field `after`: known here: tenant_id, snap_token"),
            ("WatchRequest", r#"{"": 1}"#, "unknown field ``: known here"),
            ("DataWriteRequest", r#"{"tuple": []}"#, "unknown field `tuple`: did you mean `tuples`?"),
            (
                "DataWriteRequest",
                r#"{"tuples": [{"entity": {}}, {"entitty": {}}]}"#,
                "unknown field of tuples[1] `entitty`: did you mean `entity`?",
            ),
            (
                "DataWriteRequest",
                r#"{"tuples": [{"subject": {"ID": "1"}}]}"#,
                "unknown field of tuples[0].subject `ID`: did you mean `id`?",
            ),
            (
                "DataWriteRequest",
                r#"{"metadata": {"snap_token": ""}}"#,
                "unknown field of metadata `snap_token`: known here: schema_version",
            ),
            (
                "DataDeleteRequest",
                r#"{"tuple_filter": {"entity": {"id": ["1"]}}}"#,
                "unknown field of tuple_filter.entity `id`: known here: type, ids",
            ),
            (
                "DataWriteRequest",
                r#"{"attributes": [{"value": {"dat": 1, "@type": "type.googleapis.com/base.v1.IntegerValue"}}]}"#,
                "unknown field of attributes[0].value `dat`: did you mean `data`?",
            ),
        ] {
            let refused = checked(message, body).unwrap_err();
            assert!(refused.starts_with(says), "{body}: {refused}");
        }
        let long = format!("{{\"{}\": 1}}", "x".repeat(1 << 20));
        assert!(checked("WatchRequest", &long).unwrap_err().len() < 200);
    }

    #[test]
    fn repeated_names_and_wrong_shapes_are_refused() {
        for (message, body, says) in [
            ("WatchRequest", r#"{"snap_token": "a", "snap_token": "a"}"#, "`snap_token` is there twice"),
            ("WatchRequest", r#"{"snap_token": "a", "snapToken": "b"}"#, "`snapToken` is there twice"),
            ("WatchRequest", r#"{"snap_token": null, "snap_token": "b"}"#, "`snap_token` is there twice"),
            (
                "DataWriteRequest",
                r#"{"tuples": [{"entity": {"id": "1", "id": "2"}}]}"#,
                "`tuples[0].entity.id` is there twice",
            ),
            (
                "DataWriteRequest",
                r#"{"attributes": [{"value": {"@type": "a", "@type": "b"}}]}"#,
                "`attributes[0].value.@type` is there twice",
            ),
            (
                "DataWriteRequest",
                r#"{"attributes": [{"value": {"data": 1, "data": 1}}]}"#,
                "`attributes[0].value.data` is there twice",
            ),
            ("DataWriteRequest", r#"{"attributes": [{"value": {"data": 1}}]}"#, "attributes[0].value has no `@type`"),
            ("WatchRequest", "[]", "invalid type: sequence, expected the body to be an object"),
            ("WatchRequest", "null", "invalid type: null, expected the body to be an object"),
            ("DataWriteRequest", r#"{"tuples": {"entity": {}}}"#, "invalid type: map, expected tuples to be a list"),
            ("DataWriteRequest", r#"{"tuples": [[]]}"#, "invalid type: sequence, expected tuples[0] to be an object"),
            ("DataWriteRequest", r#"{"tuples": [null]}"#, "invalid type: null, expected tuples[0] to be an object"),
            (
                "DataWriteRequest",
                r#"{"tuples": [{"entity": "document:1"}]}"#,
                "invalid type: string \"document:1\", expected tuples[0].entity to be an object",
            ),
            ("WatchRequest", "{} {}", "trailing characters"),
            ("WatchRequest", "{}x", "trailing characters"),
            ("WatchRequest", "{", "EOF"),
        ] {
            let refused = checked(message, body).unwrap_err();
            assert!(refused.starts_with(says), "{body}: {refused}");
        }
    }

    #[test]
    fn every_known_name_is_accepted() {
        for (message, body) in [
            ("WatchRequest", "{}"),
            ("WatchRequest", r#" {"tenantId": "t1", "snap_token": null} "#),
            ("DataWriteRequest", r#"{"metadata": null, "tuples": null, "attributes": [{"value": null}]}"#),
            ("DataWriteRequest", r#"{"metadata": {"schemaVersion": ""}, "tuples": [{"entity": null, "subject": {}}]}"#),
            ("AttributeReadRequest", r#"{"filter": {"entity": {"ids": ["1"]}, "attributes": []}, "pageSize": 1}"#),
            ("BundleRunRequest", r#"{"name": "b", "arguments": {"any": "name", "Any": "name"}}"#),
        ] {
            checked(message, body).unwrap_or_else(|error| panic!("{body}: {error}"));
        }
    }
}
