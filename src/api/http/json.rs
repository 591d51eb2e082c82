//! The conversion between messages and protobuf's JSON form.
//!
//! Output: field names as in `proto/`; fields that are not set are written (`"relation": ""`, `[]`), except for
//! messages; an Any as `{"@type": …, …}`; `NaN` and `Infinity` as strings. Input: the same names or their
//! lowerCamelCase forms, each of them known and set at most once (`names`). prost-reflect does all of this from the
//! descriptors of `proto/`.

use super::names;
use crate::api::grpc::proto::DESCRIPTORS;
use prost::bytes::Bytes;
use prost::{Message, Name};
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, ReflectMessage as _,
    SerializeOptions, Value,
};
use std::sync::LazyLock;
use tonic_types::pb;

/// The content type of all JSON except streams.
pub(super) const CONTENT_TYPE: &str = "application/json";

const READ: DeserializeOptions = DeserializeOptions::new().deny_unknown_fields(true);
const WRITE: SerializeOptions = SerializeOptions::new().use_proto_field_name(true).skip_default_fields(false);

/// A request that cannot be read, or an answer that cannot be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Error {
    /// The body is not JSON of this message.
    #[error("the body is no {name}: {reason}")]
    Body { name: &'static str, reason: String },
    /// A query parameter without a text field of its name, with the names of those that exist.
    #[error("{0}")]
    UnknownParameter(String),
    #[error("query parameter `{0}` is there twice")]
    RepeatedParameter(String),
    #[error("`{0}` has one value in the path or the query, and another one elsewhere")]
    Contradiction(String),
    /// The answer has no JSON form. The server's log has the reason.
    #[error("the answer cannot be written as JSON: see the server's log, or use gRPC")]
    Unwritable,
    #[error("{0} has no JSON form")]
    NoForm(String),
}

const COMPILED_IN: &str = "the descriptors are compiled in, and a test reads them";

#[expect(clippy::expect_used, reason = "compiled in")]
static MESSAGES: LazyLock<DescriptorPool> = LazyLock::new(|| DescriptorPool::decode(DESCRIPTORS).expect(COMPILED_IN));

/// The descriptors of `google.rpc`, for the details of errors.
#[expect(clippy::expect_used, reason = "compiled in")]
static ERRORS: LazyLock<DescriptorPool> =
    LazyLock::new(|| DescriptorPool::decode(tonic_types::pb::FILE_DESCRIPTOR_SET).expect(COMPILED_IN));

/// A request, while it is assembled from body, path and query.
pub(super) struct Reading {
    message: DynamicMessage,
    /// The numbers of the fields that query parameters have set.
    parameters: Vec<u32>,
}

impl Reading {
    /// Begins with the body.
    ///
    /// # Errors
    /// The first problem, and its place in the body.
    pub(super) fn body<T: Message + Name>(body: &[u8]) -> Result<Self, Error> {
        let descriptor = descriptor(&MESSAGES, &T::full_name())?;
        let parameters = Vec::new();
        if body.trim_ascii().is_empty() {
            // An empty body stands for an empty message. The service checks required fields.
            return Ok(Self { message: DynamicMessage::new(descriptor), parameters });
        }
        let mut json = serde_json::Deserializer::from_slice(body);
        let message = names::check(&descriptor, body)
            .and_then(|()| DynamicMessage::deserialize_with_options(descriptor, &mut json, &READ))
            .map_err(|error| Error::Body { name: T::NAME, reason: error.to_string() })?;
        Ok(Self { message, parameters })
    }

    /// Adds a part of the path, under the name of its field.
    ///
    /// # Errors
    /// If the body has another value for the field.
    pub(super) fn path(&mut self, name: &str, text: &str) -> Result<(), Error> {
        match text_field(&self.message.descriptor(), name) {
            Some(field) => self.set(&field, text),
            None => Ok(()),
        }
    }

    /// Adds a query parameter.
    ///
    /// # Errors
    /// If the parameter is unknown or repeated, or its field has another value elsewhere.
    pub(super) fn parameter(&mut self, name: &str, text: &str) -> Result<(), Error> {
        let descriptor = self.message.descriptor();
        let Some(field) = text_field(&descriptor, name) else {
            let fields: Vec<FieldDescriptor> = descriptor.fields().filter(is_text).collect();
            let known: Vec<&str> = fields.iter().map(FieldDescriptor::name).collect();
            return Err(Error::UnknownParameter(names::unknown("query parameter", name, &known)));
        };
        if self.parameters.contains(&field.number()) {
            return Err(Error::RepeatedParameter(field.name().to_owned()));
        }
        self.parameters.push(field.number());
        self.set(&field, text)
    }

    /// Sets a field, unless another part of the request has set it to another value.
    fn set(&mut self, field: &FieldDescriptor, text: &str) -> Result<(), Error> {
        if self.message.has_field(field) && self.message.get_field(field).as_str() != Some(text) {
            return Err(Error::Contradiction(field.name().to_owned()));
        }
        self.message.set_field(field, Value::String(text.to_owned()));
        Ok(())
    }

    /// Returns the request.
    ///
    /// # Errors
    /// If the parts do not form a request.
    pub(super) fn finish<T: Message + Name + Default>(self) -> Result<T, Error> {
        let message = self.message.transcode_to();
        message.map_err(|error| Error::Body { name: T::NAME, reason: error.to_string() })
    }
}

fn text_field(descriptor: &MessageDescriptor, name: &str) -> Option<FieldDescriptor> {
    names::field(descriptor, name).filter(is_text)
}

fn is_text(field: &FieldDescriptor) -> bool {
    field.kind() == Kind::String && !field.is_list()
}

/// Writes a message as JSON.
///
/// # Errors
/// If the message contains an Any whose type is not in `proto/`.
pub(super) fn write<T: Message + Name>(message: &T) -> Result<String, Error> {
    to_json(&decode(&descriptor(&MESSAGES, &T::full_name())?, Bytes::from(message.encode_to_vec()))?)
}

/// Writes a `google.rpc.Status` as `{code, message, details}`. It leaves out all details if the type of one is not in
/// `google.rpc`.
pub(super) fn write_status(status: &pb::Status) -> String {
    let json = |status: &pb::Status| {
        to_json(&decode(&descriptor(&ERRORS, "google.rpc.Status")?, Bytes::from(status.encode_to_vec()))?)
    };
    let plain = || json(&pb::Status { details: Vec::new(), ..status.clone() });
    json(status).or_else(|_| plain()).unwrap_or_default()
}

fn descriptor(pool: &DescriptorPool, name: &str) -> Result<MessageDescriptor, Error> {
    let missing = || Error::NoForm(name.to_owned());
    pool.get_message_by_name(name).ok_or_else(missing)
}

fn decode(descriptor: &MessageDescriptor, encoded: Bytes) -> Result<DynamicMessage, Error> {
    DynamicMessage::decode(descriptor.clone(), encoded).map_err(|error| unwritable(descriptor, &error))
}

fn to_json(message: &DynamicMessage) -> Result<String, Error> {
    let mut json = Vec::new();
    message
        .serialize_with_options(&mut serde_json::Serializer::new(&mut json), &WRITE)
        .map_err(|error| unwritable(&message.descriptor(), &error))?;
    String::from_utf8(json).map_err(|error| unwritable(&message.descriptor(), &error))
}

fn unwritable(descriptor: &MessageDescriptor, error: &dyn std::error::Error) -> Error {
    tracing::error!("{} cannot be written as JSON: {error}", descriptor.full_name());
    Error::Unwritable
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::grpc::proto::{
        Attribute, AttributeReadResponse, DataWriteRequest, RelationshipReadRequest, Tenant, TenantCreateResponse,
        WatchRequest,
    };
    use serde_json::{Value as Json, json};

    const TYPE: &str = "type.googleapis.com/base.v1.";

    fn written<T: Message + Name>(message: &T) -> Json {
        serde_json::from_str(&write(message).unwrap()).unwrap()
    }

    fn read<T: Message + Name + Default>(body: &[u8]) -> Result<T, Error> {
        Reading::body::<T>(body)?.finish()
    }

    /// Converts an attribute from JSON and back, and checks that it is unchanged.
    fn value(kind: &str, data: &Json) -> Result<Json, Error> {
        let value = json!({"@type": format!("{TYPE}{kind}"), "data": data});
        let request = json!({"attributes": [{"entity": {"type": "a", "id": "1"}, "attribute": "x", "value": value}]});
        let request: DataWriteRequest = read(request.to_string().as_bytes())?;
        let response = AttributeReadResponse { attributes: request.attributes, continuous_token: String::new() };
        Ok(written(&response)["attributes"][0]["value"].take())
    }

    #[test]
    fn values_of_all_types_round_trip() {
        for (kind, data) in [
            ("StringValue", json!("text")),
            ("StringValue", json!("")),
            ("IntegerValue", json!(-2_147_483_648)),
            ("IntegerValue", json!(0)),
            ("DoubleValue", json!(1.5)),
            ("DoubleValue", json!("NaN")),
            ("DoubleValue", json!("Infinity")),
            ("DoubleValue", json!("-Infinity")),
            ("BooleanValue", json!(true)),
            ("BooleanValue", json!(false)),
            ("StringArrayValue", json!(["a", ""])),
            ("IntegerArrayValue", json!([1, 0])),
            ("DoubleArrayValue", json!([0.5, "NaN"])),
            ("BooleanArrayValue", json!([])),
        ] {
            let expected = json!({"@type": format!("{TYPE}{kind}"), "data": data});
            assert_eq!(value(kind, &data).unwrap(), expected, "{kind}");
        }
        for (kind, data, expected) in [
            ("IntegerValue", json!("7"), json!(7)),
            ("IntegerValue", json!(7.0), json!(7)),
            ("DoubleValue", json!(1), json!(1.0)),
        ] {
            assert_eq!(value(kind, &data).unwrap()["data"], expected, "{kind} of {data}");
        }
    }

    #[test]
    fn invalid_values_are_refused() {
        for (kind, data) in [
            ("IntegerValue", json!(2_147_483_648_i64)),
            ("IntegerValue", json!(1.5)),
            ("IntegerValue", json!("x")),
            ("BooleanValue", json!("true")),
            ("StringValue", json!(1)),
            ("StringArrayValue", json!("a")),
            ("UnknownValue", json!("a")),
        ] {
            assert!(matches!(value(kind, &data), Err(Error::Body { .. })), "{kind} of {data}");
        }
    }

    #[test]
    fn names_are_accepted_in_both_forms() {
        for body in [
            json!({"tenant_id": "t1", "page_size": 5, "metadata": {"snap_token": "s"}, "filter": null}),
            json!({"tenantId": "t1", "pageSize": "5", "metadata": {"snapToken": "s"}}),
        ] {
            let request: RelationshipReadRequest = read(body.to_string().as_bytes()).unwrap();
            assert_eq!((request.tenant_id.as_str(), request.page_size), ("t1", 5));
            assert_eq!(request.metadata.unwrap().snap_token, "s");
            assert_eq!(request.filter, None);
        }
    }

    /// Assembles a request from these parts.
    fn put_together(body: &str, path: &[(&str, &str)], query: &[(&str, &str)]) -> Result<WatchRequest, Error> {
        let mut reading = Reading::body::<WatchRequest>(body.as_bytes())?;
        path.iter().try_for_each(|(name, text)| reading.path(name, text))?;
        query.iter().try_for_each(|(name, text)| reading.parameter(name, text))?;
        reading.finish()
    }

    #[test]
    fn path_query_and_body_must_agree() {
        let tenant = [("tenant_id", "t1")];
        for (body, path, query) in [
            ("", &tenant[..], &[("snap_token", "s")][..]),
            (" \n", &tenant, &[("snapToken", "s")]),
            ("{\"tenant_id\": \"t1\"}", &tenant, &[("snap_token", "s"), ("tenant_id", "t1")]),
            ("{\"tenantId\": \"\", \"snap_token\": \"s\"}", &tenant, &[]),
            ("{\"tenant_id\": \"t1\", \"snap_token\": \"s\"}", &[], &[("snap_token", "s")]),
        ] {
            let expected = WatchRequest { tenant_id: "t1".into(), snap_token: "s".into() };
            assert_eq!(put_together(body, path, query).unwrap(), expected, "{body:?} {query:?}");
        }
        let elsewhere = "has one value in the path or the query, and another one elsewhere";
        for (body, query, says) in [
            ("{\"tenant_id\": \"t2\"}", &[][..], elsewhere),
            ("{\"snap_token\": \"s\"}", &[("snap_token", "other")], elsewhere),
            ("", &[("tenantId", "t2")], elsewhere),
            ("", &[("snap_token", "s"), ("snapToken", "s")], "query parameter `snap_token` is there twice"),
            ("", &[("snaptoken", "s")], "unknown query parameter `snaptoken`: did you mean `snap_token`?"),
            ("", &[("token", "s")], "unknown query parameter `token`: known here: tenant_id, snap_token"),
        ] {
            let refused = put_together(body, &tenant, query).unwrap_err();
            assert!(refused.to_string().contains(says), "{body:?} {query:?}: {refused}");
        }
    }

    #[test]
    fn malformed_json_is_refused() {
        let deep = format!("{{\"x\": {}", "[".repeat(100_000));
        let any = |depth| {
            format!("{{\"@type\": \"type.googleapis.com/google.protobuf.Any\", \"value\": {}", "{".repeat(depth))
        };
        let deep_any = format!("{{\"attributes\": [{{\"value\": {}", any(1).repeat(1000));
        for body in [
            "{",
            "[]",
            "null",
            "1",
            "\"a\"",
            "{} {}",
            "{\"tuples\": {}}",
            "{\"tuples\": [1]}",
            "\u{feff}{}",
            &deep,
            &deep_any,
        ] {
            let refused = read::<DataWriteRequest>(body.as_bytes()).unwrap_err();
            assert!(matches!(refused, Error::Body { name: "DataWriteRequest", .. }), "{refused}");
        }
        assert!(read::<DataWriteRequest>(b"{\"tenant_id\": \"\xff\"}").is_err());
    }

    #[test]
    fn timestamps_are_written_as_text() {
        let created_at = Some(prost_types::Timestamp { seconds: 0, nanos: 5_000_000 });
        let tenant = Some(Tenant { id: "t1".into(), name: "é".into(), created_at });
        let expected = json!({"tenant": {"id": "t1", "name": "é", "created_at": "1970-01-01T00:00:00.005Z"}});
        assert_eq!(written(&TenantCreateResponse { tenant }), expected);
    }

    #[test]
    fn a_value_of_an_unknown_type_is_no_panic() {
        let value = Some(prost_types::Any { type_url: "example.com/x.Y".into(), value: vec![1] });
        let attributes = vec![Attribute { entity: None, attribute: "x".into(), value }];
        let response = AttributeReadResponse { attributes, continuous_token: String::new() };
        assert_eq!(write(&response), Err(Error::Unwritable));
    }
}
