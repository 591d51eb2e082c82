//! `base.v1.Data`: writes, deletes, reads, and refusals.

mod collisions;
mod freshness;

use crate::support::api::{
    Api, attribute, attribute_read, entities, fields, fresh, read_request, refusal, subjects, tuple,
};
use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::stream::reason;
use crate::support::wait::{eventually, within};
use std::collections::BTreeSet;
use tonic::Code;
use tuplewatch::api::grpc::proto::{
    Attribute, AttributeFilter, BooleanArrayValue, BooleanValue, BundleRunRequest, DoubleArrayValue, DoubleValue,
    IntegerArrayValue, IntegerValue, RelationshipDeleteRequest, RelationshipWriteRequest, StringArrayValue,
    StringValue, TenantListRequest, TupleFilter,
};
use tuplewatch::dev_postgres::StopMode;

fn fact(text: &str) -> String {
    let separator = if text.matches('#').count() == 2 { "" } else { "#" };
    format!("{text}{separator}")
}

fn created(texts: &[&str]) -> Vec<Change> {
    texts.iter().map(|text| Change::create(fact(text))).collect()
}

fn number(id: &str, name: &str, data: i32) -> Attribute {
    attribute(id, name, "IntegerValue", &IntegerValue { data })
}

/// Attributes of all eight types, with values that are difficult in JSON.
fn all_eight() -> Vec<Attribute> {
    let text = "é\"\\\n\u{7f}\u{1F600}".to_owned();
    vec![
        attribute("1", "boolean", "BooleanValue", &BooleanValue { data: true }),
        attribute("1", "booleans", "BooleanArrayValue", &BooleanArrayValue { data: vec![true, false] }),
        attribute("1", "double", "DoubleValue", &DoubleValue { data: f64::NEG_INFINITY }),
        attribute("1", "doubles", "DoubleArrayValue", &DoubleArrayValue { data: vec![f64::MAX, 5e-324, 0.1, 0.0] }),
        attribute("1", "integer", "IntegerValue", &IntegerValue { data: i32::MIN }),
        attribute("1", "integers", "IntegerArrayValue", &IntegerArrayValue { data: vec![0, i32::MAX] }),
        attribute("1", "string", "StringValue", &StringValue { data: text.clone() }),
        attribute("1", "strings", "StringArrayValue", &StringArrayValue { data: vec![text, String::new()] }),
        attribute("2", "string", "StringValue", &StringValue::default()),
        attribute("2", "strings", "StringArrayValue", &StringArrayValue::default()),
    ]
}

#[tokio::test]
async fn a_write_is_streamed_and_its_token_starts_right_after_it() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut api = Api::of(&server).await;
    let mut stream = server.watch("t1", "").await;

    // A repeated tuple is written once, and `...` means no relation.
    let texts =
        ["d:1#viewer@user:ada", "d:1#viewer@group:ops#member", "d:1#viewer@user:ada", "d:1#viewer@user:ada#..."];
    let first = api.write("t1", &texts).await;
    assert_eq!(stream.next().await.changes, created(&["d:1#viewer@group:ops#member", "d:1#viewer@user:ada"]));

    // An existing tuple is no change, and the token is still valid.
    let nothing = api.write("t1", &["d:1#viewer@user:ada"]).await;
    let empty = api.write("t1", &[]).await;
    let second = api.write("t1", &["d:1#viewer@user:ada", "d:2#viewer@user:ada"]).await;
    let expected = created(&["d:2#viewer@user:ada"]);
    assert_eq!(stream.next().await.changes, expected);
    for token in [first, nothing, empty] {
        assert_eq!(server.watch("t1", &token).await.next().await.changes, expected);
    }

    // The first of two values counts, and an equal value is no change.
    let token = api.write_attributes("t1", vec![number("1", "size", 1), number("1", "size", 2)]).await;
    stream.expect(Change::create("document:1$size=IntegerValue:1")).await;
    api.write_attributes("t1", vec![number("1", "size", 1)]).await;
    api.write_attributes("t1", vec![number("1", "size", 3)]).await;
    let changes = [Change::delete("document:1$size=IntegerValue:1"), Change::create("document:1$size=IntegerValue:3")];
    assert_eq!(stream.next().await.changes, changes);
    assert_eq!(server.watch("t1", &token).await.next().await.changes, changes);
    assert_eq!(server.watch("t1", &second).await.next().await.changes[0].fact, changes[0].fact);

    // Tuples and attributes are one transaction.
    let request = vec![tuple("d:3#viewer@user:ada")];
    api.try_write_all("t1", request, vec![number("3", "size", 3)]).await.unwrap();
    let changes = stream.next().await.changes;
    assert_eq!(
        changes,
        [created(&["d:3#viewer@user:ada"]), vec![Change::create("document:3$size=IntegerValue:3")]].concat()
    );

    let entity = entities("d", &["3"]);
    let filter = TupleFilter { entity, ..Default::default() };
    let before_delete = api.write("t1", &[]).await;
    let attributes = AttributeFilter { entity: entities("", &["3"]), attributes: vec![] };
    let deleted = api.try_delete("t1", filter, attributes).await.unwrap();
    let changes: Vec<Change> = changes.into_iter().map(|change| Change::delete(change.fact)).collect();
    assert_eq!(stream.next().await.changes, changes);
    assert_eq!(server.watch("t1", &before_delete).await.next().await.changes, changes);
    // The older methods, for tuples alone.
    let request =
        RelationshipWriteRequest { tenant_id: "t1".into(), metadata: None, tuples: vec![tuple("d:4#viewer@user:ada")] };
    api.data.write_relationships(request).await.unwrap();
    assert_eq!(stream.next().await.changes, created(&["d:4#viewer@user:ada"]));
    assert_eq!(server.watch("t1", &deleted).await.next().await.changes, created(&["d:4#viewer@user:ada"]));
    let filter = Some(TupleFilter { entity: entities("d", &["4"]), ..Default::default() });
    api.data.delete_relationships(RelationshipDeleteRequest { tenant_id: "t1".into(), filter }).await.unwrap();
    stream.expect(Change::delete(fact("d:4#viewer@user:ada"))).await;
}

#[tokio::test]
async fn all_types_of_attributes_are_read_as_written() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut api = Api::of(&server).await;
    let token = api.write_attributes("t1", all_eight()).await;
    let read = api.try_read_attributes(attribute_read("t1", AttributeFilter::default(), &token)).await.unwrap();
    assert_eq!(read.attributes, all_eight());
    assert_eq!(read.continuous_token, "");
    let not_a_number = attribute("1", "double", "DoubleValue", &DoubleValue { data: f64::NAN });
    let token = api.write_attributes("t1", vec![not_a_number]).await;
    let filter = AttributeFilter { entity: entities("document", &["1"]), attributes: vec!["double".into()] };
    let read = api.try_read_attributes(attribute_read("t1", filter, &token)).await.unwrap();
    let value = read.attributes[0].value.as_ref().unwrap();
    let value: DoubleValue = prost::Message::decode(&*value.value).unwrap();
    assert!(value.data.is_nan());
}

#[tokio::test]
async fn filters_select_the_same_rows_in_reads_and_deletes() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut api = Api::of(&server).await;
    api.create_tenant("t2").await.unwrap();
    let all = [
        "d:1#editor@user:ada",
        "d:1#viewer@group:ops#member",
        "d:1#viewer@user:ada",
        "d:1#viewer@user:bob",
        "d:2#viewer@group:ops",
        "d:2#viewer@group:ops#member",
        "folder:1#viewer@user:ada",
    ];
    api.write("t2", &all).await;

    let filter = |entity, relation: &str, subject| TupleFilter { entity, relation: relation.into(), subject };
    let cases = [
        (filter(None, "", None), vec![0, 1, 2, 3, 4, 5, 6]),
        (filter(entities("d", &[]), "", None), vec![0, 1, 2, 3, 4, 5]),
        (filter(entities("", &["1"]), "", None), vec![0, 1, 2, 3, 6]),
        (filter(entities("d", &["1", "2", "9"]), "editor", None), vec![0]),
        (filter(None, "viewer", subjects("user", &["ada", "bob"], "")), vec![2, 3, 6]),
        (filter(None, "", subjects("group", &[], "")), vec![1, 4, 5]),
        (filter(None, "", subjects("group", &[], "member")), vec![1, 5]),
        (filter(None, "", subjects("group", &[], "...")), vec![4]),
        (filter(None, "", subjects("", &["ada"], "")), vec![0, 2, 6]),
        (filter(entities("nothing of this form!", &[]), "", None), vec![]),
    ];
    for (filter, picked) in cases {
        let picked: Vec<&str> = picked.into_iter().map(|n| all[n]).collect();
        assert_eq!(api.read("t2", filter.clone(), 2).await, picked, "{filter:?}");
        if filter != TupleFilter::default() {
            api.write("t1", &all).await;
            api.try_delete("t1", filter.clone(), AttributeFilter::default()).await.unwrap();
            let left: Vec<String> = all.iter().filter(|text| !picked.contains(text)).map(ToString::to_string).collect();
            assert_eq!(api.read("t1", TupleFilter::default(), 0).await, left, "{filter:?}");
        }
    }

    let attributes = |ids: &[&str], names: &[&str]| AttributeFilter {
        entity: entities("document", ids),
        attributes: names.iter().map(ToString::to_string).collect(),
    };
    for id in ["1", "2"] {
        api.write_attributes("t2", vec![number(id, "a", 1), number(id, "b", 2)]).await;
    }
    let mut read = async |filter| {
        let read = api.try_read_attributes(attribute_read("t2", filter, "")).await.unwrap().attributes;
        let name = |attribute: Attribute| format!("{}{}", attribute.entity.unwrap().id, attribute.attribute);
        read.into_iter().map(name).collect::<Vec<_>>()
    };
    assert_eq!(read(attributes(&[], &[])).await, ["1a", "1b", "2a", "2b"]);
    assert_eq!(read(attributes(&["2"], &[])).await, ["2a", "2b"]);
    assert_eq!(read(attributes(&[], &["b"])).await, ["1b", "2b"]);
    assert_eq!(read(attributes(&["1"], &["b", "c"])).await, ["1b"]);
    // An empty filter of the one kind leaves that kind alone.
    api.try_delete("t2", TupleFilter::default(), attributes(&["1"], &["a"])).await.unwrap();
    let read = api.try_read_attributes(attribute_read("t2", AttributeFilter::default(), "")).await.unwrap();
    assert_eq!(read.attributes.len(), 3);
    assert_eq!(api.read("t2", TupleFilter::default(), 0).await, all);
}

#[tokio::test]
async fn each_page_continues_after_the_previous_one() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut api = Api::of(&server).await;
    let texts: BTreeSet<String> = (0..120).map(|n| format!("d:{n}#viewer@user:Ada{}", n % 7)).collect();
    api.write("t1", &texts.iter().map(String::as_str).collect::<Vec<_>>()).await;
    for (page_size, expected) in [(0, 50), (1, 1), (50, 50), (119, 119), (120, 120), (100_000, 120)] {
        let mut request = read_request("t1", TupleFilter::default());
        request.page_size = page_size;
        let page = api.try_read(request).await.unwrap();
        assert_eq!((page.tuples.len(), page.continuous_token.is_empty()), (expected, expected == 120));
    }
    for page_size in [7, 60, 119] {
        assert!(api.read("t1", TupleFilter::default(), page_size).await.iter().eq(&texts), "{page_size}");
    }

    // Writes in between do not shift the pages.
    let mut request = read_request("t1", TupleFilter::default());
    request.page_size = 60;
    let first = api.try_read(request.clone()).await.unwrap();
    api.write("t1", &["a:1#viewer@user:ada", "z:1#viewer@user:ada"]).await;
    let filter = TupleFilter { entity: entities("d", &["0"]), ..Default::default() };
    api.try_delete("t1", filter, AttributeFilter::default()).await.unwrap();
    request.continuous_token = first.continuous_token.clone();
    let second = api.try_read(request.clone()).await.unwrap();
    let both: Vec<String> = first.tuples.iter().chain(&second.tuples).map(crate::support::api::text).collect();
    assert!(both.iter().eq(&texts));
    assert!(!second.continuous_token.is_empty(), "there is one more by now");

    let invalid = (Code::InvalidArgument, "ERROR_CODE_INVALID_CONTINUOUS_TOKEN".to_owned());
    for token in ["x", "%", "W10", "e30", &first.continuous_token[1..], &"A".repeat(10_000)] {
        request.continuous_token = token.into();
        assert_eq!(refusal(api.try_read(request.clone()).await), invalid, "{token}");
    }
    // A token of another method.
    let mut attributes = attribute_read("t1", AttributeFilter::default(), "");
    attributes.continuous_token = first.continuous_token;
    assert_eq!(refusal(api.try_read_attributes(attributes).await), invalid);

    // Large values: gRPC clients refuse messages above 4 MiB.
    let noise = StringValue { data: "x".repeat(700_000) };
    for id in ["1", "2", "3", "4", "5", "6", "7"] {
        api.write_attributes("t1", vec![attribute(id, "noise", "StringValue", &noise)]).await;
    }
    let mut request = attribute_read("t1", AttributeFilter::default(), "");
    let mut count = 0;
    loop {
        let page = api.try_read_attributes(request.clone()).await.unwrap();
        assert!(!page.attributes.is_empty());
        count += page.attributes.len();
        if page.continuous_token.is_empty() {
            break;
        }
        request.continuous_token = page.continuous_token;
    }
    assert_eq!(count, 7);
}

#[tokio::test]
async fn invalid_requests_are_refused_with_their_field_names() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[("--database-max-data-per-write", "3")]).await;
    let mut api = Api::of(&server).await;
    let sql = postgres.sql().await;
    let long = |n| "a".repeat(n);
    let tuples = [
        ("d:1#viewer@user:a b", "subject.id"),
        ("d:1#viewer@user:", "subject.id"),
        (&format!("d:{}#viewer@user:a", long(129)), "entity.id"),
        ("d:**#viewer@user:a", "entity.id"),
        ("d:é#viewer@user:a", "entity.id"),
        ("d1:1#viewer@user:a", "entity.type"),
        ("d:1#viewer-of@user:a", "relation"),
        ("d:1#@user:a", "relation"),
        (&format!("d:1#{}@user:a", long(65)), "relation"),
        ("d:1#viewer@:a", "subject.type"),
        ("d:1#viewer@group:a#1", "subject.relation"),
    ];
    for (text, field) in tuples {
        let refused = api.try_write("t1", &["d:1#viewer@user:a", text]).await;
        assert_eq!(fields(refused), [format!("tuples[1].{field}")], "{text}");
    }
    for text in [format!("d:{}#{}@*:*", long(128), long(64)).replace("@*", "@user"), "d:*#a_B@u:a-_@.:+0".to_owned()] {
        api.write("t1", &[&text]).await;
    }
    let mut bad_value = number("1", "size", 1);
    for (kind, value) in [("IntegerValue", vec![0xff]), ("OtherValue", vec![]), ("StringValue", vec![10, 1, 0xff])] {
        let url = format!("type.googleapis.com/base.v1.{kind}");
        bad_value.value = Some(prost_types::Any { type_url: url, value });
        assert_eq!(fields(api.try_write_all("t1", vec![], vec![bad_value.clone()]).await), ["attributes[0].value"]);
    }
    let nul = attribute("1", "name", "StringValue", &StringValue { data: "a\0b".into() });
    assert_eq!(fields(api.try_write_all("t1", vec![], vec![nul]).await), ["attributes[0].value"]);
    let large = attribute("1", "name", "StringValue", &StringValue { data: "x".repeat((4 << 20) - 4_000) });
    assert_eq!(fields(api.try_write_all("t1", vec![], vec![large]).await), ["attributes[0].value"]);
    let nothing = vec![Attribute::default()];
    let expected = ["attributes[0].attribute", "attributes[0].entity"];
    assert_eq!(fields(api.try_write_all("t1", vec![], nothing).await), expected);
    assert_eq!(
        fields(api.try_write_all("t1", vec![Default::default()], vec![]).await),
        ["tuples[0].entity", "tuples[0].subject"]
    );

    let equal = (Code::InvalidArgument, "ERROR_CODE_ENTITY_AND_SUBJECT_CANNOT_BE_EQUAL".to_owned());
    assert_eq!(refusal(api.try_write("t1", &["d:1#member@d:1#member"]).await), equal);
    api.write("t1", &["d:1#member@d:1#parent"]).await;
    let too_much = (Code::InvalidArgument, "ERROR_CODE_MAX_DATA_PER_WRITE_EXCEEDED".to_owned());
    let many = ["d:1#a@u:1", "d:1#a@u:2", "d:1#a@u:3", "d:1#a@u:4"];
    assert_eq!(refusal(api.try_write("t1", &many).await), too_much);
    api.write("t1", &[many[0], many[0], many[1], many[2]]).await;

    let unknown = (Code::NotFound, "ERROR_CODE_TENANT_NOT_FOUND".to_owned());
    assert_eq!(refusal(api.try_write("nobody", &["d:1#viewer@user:a"]).await), unknown);
    assert_eq!(refusal(api.try_read(fresh("nobody", "")).await), unknown);
    let filter = TupleFilter { relation: "a".into(), ..Default::default() };
    assert_eq!(refusal(api.try_delete("nobody", filter, AttributeFilter::default()).await), unknown);
    for tenant in ["", "a b", "a\0", &long(129)] {
        assert_eq!(fields(api.try_write(tenant, &["d:1#viewer@user:a"]).await), ["tenant_id"]);
    }
    let nothing = api.try_delete("t1", TupleFilter::default(), AttributeFilter::default()).await;
    assert_eq!(fields(nothing), ["tuple_filter"]);
    let request = RelationshipDeleteRequest { tenant_id: "t1".into(), filter: None };
    assert_eq!(fields(api.data.delete_relationships(request).await), ["filter"]);
    let request = RelationshipWriteRequest { tenant_id: "t1".into(), ..Default::default() };
    assert_eq!(fields(api.data.write_relationships(request).await), ["tuples"]);
    let filter = TupleFilter { entity: entities("d", &["\0"]), ..Default::default() };
    assert_eq!(fields(api.try_read(read_request("t1", filter)).await), ["filter"]);
    let bundle = BundleRunRequest { tenant_id: "t1".into(), ..Default::default() };
    let status = api.data.run_bundle(bundle).await.unwrap_err();
    assert_eq!(reason(&status), (Code::Unimplemented, "NOT_IMPLEMENTED".into()));
    // Only the accepted requests have written.
    assert_eq!(sql.facts("t1").await.len(), 6);
}

#[tokio::test]
async fn custom_tables_are_neither_written_nor_read() {
    let postgres = Postgres::start().await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("mapping.yaml");
    let mapping = "
tables:
  - table: tuplewatch.relation_tuples
    tenant: tenant_id
    tuple: {entity_type: entity_type, entity_id: entity_id, relation: relation, subject_type: subject_type,
            subject_id: subject_id, subject_relation: subject_relation}";
    std::fs::write(&file, mapping).unwrap();
    Server::prepare(&postgres, &[]).await;
    let server = Server::serve(&postgres, &[("--mapping-file", file.to_str().unwrap())]).await;
    let mut api = Api::of(&server).await;
    let not_ours = (Code::Unimplemented, "NOT_IMPLEMENTED".to_owned());
    let filter = TupleFilter { relation: "a".into(), ..Default::default() };
    let mut refusals = vec![
        api.try_write("t1", &["d:1#viewer@user:a"]).await.unwrap_err(),
        api.try_read(fresh("t1", "")).await.unwrap_err(),
        api.try_delete("t1", filter, AttributeFilter::default()).await.unwrap_err(),
        api.create_tenant("t2").await.unwrap_err(),
        api.delete_tenant("t1").await.unwrap_err(),
    ];
    refusals.push(api.tenancy.list(TenantListRequest::default()).await.unwrap_err());
    for status in refusals {
        assert_eq!(reason(&status), not_ours);
        assert!(status.message().contains("the program that owns them"), "{status:?}");
    }
}

#[tokio::test]
async fn health_and_reflection_list_the_services() {
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let names = ["base.v1.Data", "base.v1.Tenancy"];
    for name in names {
        eventually(name, async || server.health(name).await == Ok(ServingStatus::Serving)).await;
    }
    let message_request = Some(MessageRequest::ListServices(String::new()));
    let request = ServerReflectionRequest { host: String::new(), message_request };
    let mut client = ServerReflectionClient::new(server.channel().await);
    let mut responses = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let response = within("the services", responses.message()).await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = response.message_response else { panic!("{response:?}") };
    let listed: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.iter().all(|name| listed.contains(name)), "{listed:?}");
}

#[tokio::test]
async fn reflection_serves_v1alpha_clients() {
    use tonic_reflection::pb::v1alpha::ServerReflectionRequest;
    use tonic_reflection::pb::v1alpha::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1alpha::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1alpha::server_reflection_response::MessageResponse;
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut client = ServerReflectionClient::new(server.channel().await);
    // The requests of grpcurl: the list of services, and the file of one.
    let asks = [MessageRequest::ListServices("*".into()), MessageRequest::FileContainingSymbol("base.v1.Watch".into())];
    let asks = asks.map(|ask| ServerReflectionRequest { host: String::new(), message_request: Some(ask) });
    let mut responses = client.server_reflection_info(tokio_stream::iter(asks)).await.unwrap().into_inner();
    let mut next = async || within("an answer", responses.message()).await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = next().await else { panic!("a list") };
    let listed: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    for name in ["base.v1.Watch", "base.v1.Data", "base.v1.Tenancy", "grpc.health.v1.Health"] {
        assert!(listed.contains(&name), "{name} is not in {listed:?}");
    }
    let Some(MessageResponse::FileDescriptorResponse(files)) = next().await else { panic!("a file") };
    assert!(!files.file_descriptor_proto.is_empty());
}

#[tokio::test]
async fn calls_fail_without_postgresql_and_work_again_afterwards() {
    let mut postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut api = Api::of(&server).await;
    api.write("t1", &["d:1#viewer@user:a"]).await;
    postgres.stop(StopMode::Immediate).await;
    let unreachable = (Code::Unavailable, "ERROR_CODE_DATASTORE".to_owned());
    assert_eq!(refusal(api.try_write("t1", &["d:2#viewer@user:a"]).await), unreachable);
    assert_eq!(refusal(api.try_read(fresh("t1", "")).await), unreachable);
    postgres.start_again().await;
    eventually("a write", async || api.try_write("t1", &["d:3#viewer@user:a"]).await.is_ok()).await;
    assert_eq!(api.read("t1", TupleFilter::default(), 0).await, ["d:1#viewer@user:a", "d:3#viewer@user:a"]);
}
