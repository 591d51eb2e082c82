//! Random values in every field of a request, over gRPC and HTTP. Each request is answered, or refused with its mistake. None is an
//! internal error, and none ends the server.

use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::wait::within;
use crate::support::writer::seed;
use fastrand::Rng;
use prost_reflect::{DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MapKey, Value};
use reqwest::Method;
use std::collections::HashMap;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tuplewatch::api::grpc::proto;
use tuplewatch::api::grpc::proto::data_client::DataClient;
use tuplewatch::api::grpc::proto::tenancy_client::TenancyClient;
use tuplewatch::api::grpc::proto::watch_client::WatchClient;

/// The number of requests of each kind. Half of the texts are valid, so that some requests reach the tables.
const EACH: usize = 60;
/// The statuses of errors by the caller. Any other status is a fault of ours or of PostgreSQL.
const REFUSALS: [Code; 7] = [
    Code::InvalidArgument,
    Code::NotFound,
    Code::AlreadyExists,
    Code::FailedPrecondition,
    Code::OutOfRange,
    Code::Unimplemented,
    Code::Aborted,
];

/// A method of gRPC, and its method and path over HTTP. `{}` in the path is the tenant.
const METHODS: [(&str, &str, Method, &str); 11] = [
    ("Write", "DataWriteRequest", Method::POST, "/v1/tenants/{}/data/write"),
    ("WriteRelationships", "RelationshipWriteRequest", Method::POST, "/v1/tenants/{}/relationships/write"),
    ("ReadRelationships", "RelationshipReadRequest", Method::POST, "/v1/tenants/{}/data/relationships/read"),
    ("ReadAttributes", "AttributeReadRequest", Method::POST, "/v1/tenants/{}/data/attributes/read"),
    ("Delete", "DataDeleteRequest", Method::POST, "/v1/tenants/{}/data/delete"),
    ("DeleteRelationships", "RelationshipDeleteRequest", Method::POST, "/v1/tenants/{}/relationships/delete"),
    ("RunBundle", "BundleRunRequest", Method::POST, "/v1/tenants/{}/data/run-bundle"),
    ("CreateTenant", "TenantCreateRequest", Method::POST, "/v1/tenants/create"),
    ("ListTenants", "TenantListRequest", Method::POST, "/v1/tenants/list"),
    ("DeleteTenant", "TenantDeleteRequest", Method::DELETE, "/v1/tenants/{}"),
    ("Watch", "WatchRequest", Method::POST, "/v1/tenants/{}/watch"),
];

fn any_text(random: &mut Rng, name: &str) -> String {
    if random.bool() {
        let good = match name {
            "tenant_id" => "t1",
            "snap_token" | "continuous_token" => "",
            _ => "viewer",
        };
        return good.to_owned();
    }
    match random.u8(..9) {
        0 => String::new(),
        1 => "*".to_owned(),
        2 => "...".to_owned(),
        3 => "a\0b".to_owned(),
        4 => "' OR 1=1; --".to_owned(),
        5 => "x".repeat(random.usize(60..2_000)),
        6 => "MgMAAAAAAAA=".to_owned(),
        7 => "type.googleapis.com/base.v1.StringValue".to_owned(),
        _ => (0..random.usize(..20)).map(|_| random.char(..)).collect(),
    }
}

fn any_value(random: &mut Rng, field: &FieldDescriptor, depth: usize) -> Value {
    match field.kind() {
        Kind::String => Value::String(any_text(random, field.name())),
        Kind::Uint32 => Value::U32([0, 1, 7, u32::MAX][random.usize(..4)]),
        Kind::Bytes => Value::Bytes((0..random.usize(..9)).map(|_| random.u8(..)).collect()),
        Kind::Message(message) => {
            let mut made = DynamicMessage::new(message.clone());
            for field in message.fields() {
                // Some fields are left out.
                if depth < 6 && random.u8(..8) > 0 {
                    set_any(random, &mut made, &field, depth + 1);
                }
            }
            Value::Message(made)
        }
        other => panic!("no request has a field of kind {other:?}"),
    }
}

fn set_any(random: &mut Rng, message: &mut DynamicMessage, field: &FieldDescriptor, depth: usize) {
    let value = if field.is_map() {
        let entry = (MapKey::String(any_text(random, "key")), Value::String(any_text(random, "value")));
        Value::Map(HashMap::from([entry]))
    } else if field.is_list() {
        Value::List((0..random.usize(..4)).map(|_| any_value(random, field, depth)).collect())
    } else {
        any_value(random, field, depth)
    };
    message.set_field(field, value);
}

/// The answer over gRPC.
async fn call(channel: Channel, method: &str, message: &DynamicMessage) -> Result<(), Status> {
    let mut data = DataClient::new(channel.clone());
    let mut tenancy = TenancyClient::new(channel.clone());
    let mut watch = WatchClient::new(channel);
    macro_rules! ask {
        ($client:ident . $method:ident as $request:ty) => {{
            let request: $request = message.transcode_to().unwrap();
            within("an answer", $client.$method(request)).await.map(drop)
        }};
    }
    match method {
        "Write" => ask!(data.write as proto::DataWriteRequest),
        "WriteRelationships" => ask!(data.write_relationships as proto::RelationshipWriteRequest),
        "ReadRelationships" => ask!(data.read_relationships as proto::RelationshipReadRequest),
        "ReadAttributes" => ask!(data.read_attributes as proto::AttributeReadRequest),
        "Delete" => ask!(data.delete as proto::DataDeleteRequest),
        "DeleteRelationships" => ask!(data.delete_relationships as proto::RelationshipDeleteRequest),
        "RunBundle" => ask!(data.run_bundle as proto::BundleRunRequest),
        "CreateTenant" => ask!(tenancy.create as proto::TenantCreateRequest),
        "ListTenants" => ask!(tenancy.list as proto::TenantListRequest),
        "DeleteTenant" => ask!(tenancy.delete as proto::TenantDeleteRequest),
        "Watch" => ask!(watch.watch as proto::WatchRequest),
        other => panic!("no method {other}"),
    }
}

/// The path with this tenant. Every byte is escaped, so that it stays one segment.
fn path(pattern: &str, message: &DynamicMessage) -> String {
    let tenant = message.get_field_by_name("tenant_id").or_else(|| message.get_field_by_name("id"));
    let tenant = tenant.and_then(|tenant| tenant.as_str().map(str::to_owned)).unwrap_or_default();
    let escaped: String = tenant.bytes().map(|byte| format!("%{byte:02x}")).collect();
    pattern.replace("{}", &escaped)
}

#[tokio::test]
async fn every_random_request_is_answered_or_refused() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut random = Rng::with_seed(seed());
    let pool = DescriptorPool::decode(proto::DESCRIPTORS).unwrap();
    let (channel, client) = (server.channel().await, reqwest::Client::new());
    let mut answered = 0;
    for (method, request, verb, pattern) in METHODS {
        let descriptor = pool.get_message_by_name(&format!("base.v1.{request}")).unwrap();
        for _ in 0..EACH {
            let mut message = DynamicMessage::new(descriptor.clone());
            for field in descriptor.fields() {
                set_any(&mut random, &mut message, &field, 0);
            }
            match call(channel.clone(), method, &message).await {
                Ok(()) => answered += 1,
                Err(status) => assert!(REFUSALS.contains(&status.code()), "{method} of {message:?}: {status:?}"),
            }
            // An Any of an unknown type has no JSON form.
            let Ok(json) = serde_json::to_vec(&message) else { continue };
            let sent = client.request(verb.clone(), server.url(&path(pattern, &message))).body(json).send();
            let status = within("an answer", sent).await.unwrap().status().as_u16();
            assert!([200, 400, 404, 405, 409, 501].contains(&status), "{method} of {message:?}: {status}");
        }
    }
    assert!(answered > EACH, "nearly nothing was good: {answered}");
    assert!(!server.has_logged("panicked"));
    server.watch("t1", "").await;
}
