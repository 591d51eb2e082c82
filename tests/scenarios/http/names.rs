//! Unknown names and ambiguous requests are refused, and change nothing.

use super::{created, document};
use crate::support::http::{EventSource, Seen, reason};
use crate::support::permify::{Permify, Tables, write, xid_of};
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::wait::within;
use reqwest::Method;
use serde_json::{Value as Json, json};

const WATCH: &str = "/v1/tenants/t1/watch";

/// The request is refused as invalid, with this text in the message.
async fn refused(server: &Server, method: Method, path: &str, body: &str, expected: &str) {
    let (status, error) = server.ask(method.clone(), path, body.to_owned()).await;
    assert_eq!((status, reason(&error).0), (400, 3), "{method} {path} {body}: {error}");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains(expected), "{method} {path} {body}: {message}");
}

fn tuple(id: &str) -> Json {
    json!({"entity": {"type": "document", "id": id}, "relation": "viewer", "subject": {"type": "user", "id": "u"}})
}

#[tokio::test]
async fn an_unknown_name_is_refused_with_the_nearest_known_one() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    sql.insert("t1", "kept").await;
    let before = sql.facts("t1").await;
    for (path, body, expected) in [
        (WATCH, json!({"snaptoken": "x"}), "unknown field `snaptoken`: did you mean `snap_token`?"),
        (WATCH, json!({"SnapToken": "x"}), "did you mean `snap_token`?"),
        ("/v1/watch/watch", json!({"tenant": "t1"}), "unknown field `tenant`: known here: tenant_id, snap_token"),
        ("/v1/tenants/t1/data/write", json!({"tuple": [tuple("1")]}), "did you mean `tuples`?"),
        ("/v1/tenants/t1/data/write", json!({"tuples": [tuple("1")], "attribute": []}), "did you mean `attributes`?"),
        (
            "/v1/tenants/t1/data/write",
            json!({"tuples": [{"entity": {"type": "document", "idd": "1"}}]}),
            "unknown field of tuples[0].entity `idd`: did you mean `id`?",
        ),
        ("/v1/tenants/t1/data/write", json!({"metadata": {"schemaversion": "x"}}), "did you mean `schema_version`?"),
        (
            "/v1/tenants/t1/data/delete",
            json!({"tuple_filter": {"entity": {"type": "document", "idss": ["nobody"]}}}),
            "unknown field of tuple_filter.entity `idss`: did you mean `ids`?",
        ),
        ("/v1/tenants/t1/relationships/delete", json!({"filters": {"relation": "viewer"}}), "did you mean `filter`?"),
        (
            "/v1/tenants/t1/data/relationships/read",
            json!({"metadata": {"snapToken": "", "depth": 3}}),
            "unknown field of metadata `depth`: known here: snap_token",
        ),
        ("/v1/tenants/t1/data/attributes/read", json!({"pagesize": 1}), "did you mean `page_size`?"),
        ("/v1/tenants/list", json!({"continuoustoken": ""}), "did you mean `continuous_token`?"),
        ("/v1/tenants/create", json!({"id": "t9", "names": "n"}), "did you mean `name`?"),
    ] {
        refused(&server, Method::POST, path, &body.to_string(), expected).await;
    }
    for (method, path, body, expected) in [
        (
            Method::GET,
            "/v1/tenants/t1/watch?snaptoken=x",
            "",
            "unknown query parameter `snaptoken`: did you mean `snap_token`?",
        ),
        (Method::GET, "/v1/tenants/t1/watch?snap_token=&since=1", "", "unknown query parameter `since`: known here"),
        (Method::GET, "/v1/tenants/t1/watch?snap_token=&snap_token=", "", "`snap_token` is there twice"),
        (Method::GET, "/v1/tenants/t1/watch?tenant_id=t2", "", "`tenant_id` has one value in the path or the query"),
        (Method::POST, "/v1/tenants/t1/watch?snap_token=x", "{}", "POST takes no query parameters"),
        (Method::POST, "/v1/tenants/list?page_size=1", "", "POST takes no query parameters"),
        (Method::DELETE, "/v1/tenants/t1?dry_run=true", "", "DELETE takes no query parameters"),
        (Method::DELETE, "/v1/tenants/t1", r#"{"force": false}"#, "unknown field `force`: known here: id"),
        (Method::DELETE, "/v1/tenants/t1", r#"{"id": "t2"}"#, "`id` has one value in the path"),
        (Method::POST, "/v1/tenants/t1/data/write", r#"{"tenant_id": "t2"}"#, "`tenant_id` has one value in the path"),
    ] {
        refused(&server, method, path, body, expected).await;
    }
    assert_eq!(sql.facts("t1").await, before);
    assert!(sql.is_true("NOT EXISTS (SELECT FROM tuplewatch.tenants WHERE id = 't9')").await);
    assert!(sql.is_true("EXISTS (SELECT FROM tuplewatch.tenants WHERE id = 't1')").await);
}

#[tokio::test]
async fn an_ambiguous_or_malformed_body_is_refused() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let write = "/v1/tenants/t1/data/write";
    let one = tuple("1");
    for (path, body, expected) in [
        (WATCH, r#"{"snap_token": "", "snap_token": ""}"#.to_owned(), "`snap_token` is there twice"),
        (WATCH, r#"{"snap_token": "", "snapToken": ""}"#.to_owned(), "`snapToken` is there twice"),
        (write, format!(r#"{{"tuples": [{one}], "tuples": []}}"#), "`tuples` is there twice"),
        (write, format!(r#"{{"tuples": {one}}}"#), "expected tuples to be a list"),
        (write, r#"{"tuples": [null]}"#.to_owned(), "expected tuples[0] to be an object"),
        (write, r#"{"tuples": ["document:1#viewer@user:u"]}"#.to_owned(), "expected tuples[0] to be an object"),
        (write, format!("[{one}]"), "expected the body to be an object"),
        (write, "null".to_owned(), "expected the body to be an object"),
        (write, format!(r#"{{"tuples": [{one}]}} {{}}"#), "trailing characters"),
        (write, format!(r#"{{"tuples": [{one}]"#), "EOF"),
        (write, "tuples=1&attributes=2".to_owned(), "the body is no DataWriteRequest"),
        (
            write,
            r#"{"attributes": [{"value": {"@type": "type.googleapis.com/base.v1.StringValue", "value": "x"}}]}"#
                .to_owned(),
            "unknown field of attributes[0].value `value`: known here: data",
        ),
    ] {
        refused(&server, Method::POST, path, &body, expected).await;
    }
    assert!(postgres.sql().await.facts("t1").await.is_empty());

    // As in Permify's gateway, null means an absent field, and the content type is ignored.
    let body = format!(r#"{{"tuples": [{one}], "attributes": null, "metadata": null}}"#);
    let request =
        reqwest::Client::new().post(server.url(write)).header("content-type", "application/x-www-form-urlencoded");
    assert_eq!(within("an answer", request.body(body).send()).await.unwrap().status(), 200);
    assert_eq!(postgres.sql().await.facts("t1").await.len(), 1);

    // Unknown paths are refused in JSON, and wrong methods with the allowed ones.
    for path in ["/v1/tenants/t1/watches", "/v1/tenants/t1/watch/", "/v2/tenants/t1/watch", "/v1/tenants/t1/data"] {
        let (status, error) = server.ask(Method::POST, path, "{}").await;
        assert_eq!((status, reason(&error).0), (404, 5), "{path}");
    }
    for (method, path, allow) in
        [(Method::PUT, WATCH, "GET"), (Method::GET, write, "POST"), (Method::PATCH, "/v1/tenants/t1", "DELETE")]
    {
        let answer = reqwest::Client::new().request(method, server.url(path)).send();
        let answer = within("an answer", answer).await.unwrap();
        assert_eq!(answer.status(), 405, "{path}");
        assert!(answer.headers()["allow"].to_str().unwrap().contains(allow), "{path}: {answer:?}");
        assert_eq!(answer.headers()["content-type"], "application/json");
    }
}

/// The first change after this token, which is put into the query unchanged.
async fn first_after(server: &Server, token: &str) -> String {
    let mut source = EventSource::new(server.url(&format!("{WATCH}?snap_token={token}")));
    assert_eq!(source.next().await, Seen::Open, "{token}");
    let Seen::Message { data, .. } = source.next().await else { panic!("a message") };
    document(&data).to_owned()
}

#[tokio::test]
async fn a_plus_in_the_query_is_not_a_space() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let mut stream = server.watch("t1", "").await;
    // In the standard alphabet of base64, which is accepted too, some tokens contain a plus.
    let mut n = 0;
    let token = loop {
        sql.insert("t1", &n.to_string()).await;
        let token = stream.next().await.token;
        n += 1;
        if token.contains('-') {
            break token.replace('-', "+").replace('_', "/");
        }
    };
    sql.insert("t1", "next").await;
    for token in [token.clone(), token.replace('+', "%20"), token.replace('+', "%2B"), token.replace('+', "%2b")] {
        assert_eq!(first_after(&server, &token).await, "next", "{token}");
    }
}

async fn insert(sql: &Sql, id: &str) -> String {
    let values = format!("('document', '{id}', 'viewer', 'user', 'u', '')");
    let columns = "entity_type, entity_id, relation, subject_type, subject_id, subject_relation";
    write(sql, "t1", &[format!("INSERT INTO relation_tuples ({columns}) VALUES {values}")]).await.token()
}

#[tokio::test]
async fn a_plus_in_permifys_token_is_not_a_space() {
    let postgres = Postgres::start().await;
    let permify = Permify::create(&postgres, "public", Tables::New).await;
    let server = permify.serve(&postgres, &[]).await;
    let sql = permify.sql().await;
    let mut n = 0;
    let token = loop {
        let token = insert(&sql, &n.to_string()).await;
        n += 1;
        if token.contains('+') {
            break token;
        }
        assert!(n <= 256, "of 256 numbers, four have it: {}", xid_of(&token));
    };
    insert(&sql, "next").await;
    for token in [token.clone(), token.replace('+', "%2B").replace('=', "%3D")] {
        assert_eq!(first_after(&server, &token).await, "next", "{token}");
    }
}

#[tokio::test]
async fn last_event_id_overrides_the_query_of_an_event_source_only() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let (sql, mut stream, first) = server.first_delivered(&postgres, "first").await;
    sql.insert("t1", "second").await;
    let second = stream.next().await.token;
    sql.insert("t1", "third").await;
    let url = server.url(&format!("{WATCH}?snap_token={first}"));
    let get = reqwest::Client::new().get(url).header("last-event-id", &second);
    let mut response = within("an answer", get.send()).await.unwrap();
    let mut received = String::new();
    while !received.contains("data: ") {
        let chunk = within("an event", response.chunk()).await.unwrap().unwrap();
        received.push_str(std::str::from_utf8(&chunk).unwrap());
    }
    assert!(received.contains("third") && !received.contains("second"), "{received}");

    let post = reqwest::Client::new().post(server.url(WATCH)).header("last-event-id", &second).body("{}");
    let response = within("an answer", post.send()).await.unwrap();
    assert_eq!(response.status(), 400);
    let mut lines = server.lines(WATCH, json!({"snap_token": second})).await;
    assert_eq!(lines.next().await.unwrap()["result"]["changes"]["data_changes"], created("third"));
}

const MAPPING: &str = "
tables:
  - table: shop.tuples
    tenant: company
    tuple: {entity_type: a, entity_id: b, relation: c, subject_type: d, subject_id: e, subject_relation: f}
";

#[tokio::test]
async fn presets_restrict_tenant_ids_and_custom_mappings_do_not() {
    let postgres = Postgres::start().await;
    let permify = Permify::create(&postgres, "public", Tables::New).await;
    let long = "x".repeat(129);
    let ids = ["a b", "ä", "**", "a/b", "a%b", "a\nb", "a,b", long.as_str()];
    let escaped = |id: &str| id.bytes().map(|byte| format!("%{byte:02x}")).collect::<String>();
    for preset in ["tuples", "permify"] {
        let mut server = match preset {
            "tuples" => Server::serve(&postgres, &[]).await,
            _ => permify.serve(&postgres, &[]).await,
        };
        for id in ids {
            let status = server.try_watch(id, "").await.err().unwrap_or_else(|| panic!("{preset}: {id} is watched"));
            assert_eq!(status.code(), tonic::Code::InvalidArgument, "{preset}: {id}: {status:?}");
            for method in [Method::GET, Method::POST] {
                let (status, error) =
                    server.ask(method.clone(), &format!("/v1/tenants/{}/watch", escaped(id)), "").await;
                assert_eq!((status, reason(&error)), (400, (3, "INVALID_TENANT")), "{preset}: {method} {id}: {error}");
            }
        }
        for id in ["*", "a-b_c@d.e:f+g"] {
            let status = server.try_watch(id, "").await.err().unwrap();
            assert_eq!(status.code(), tonic::Code::NotFound, "{preset}: {id}: {status:?}");
        }
        if preset == "tuples" {
            for id in ids {
                let tenant = escaped(id);
                for path in
                    ["data/write", "data/delete", "data/relationships/read", "data/attributes/read", "data/run-bundle"]
                {
                    refused(&server, Method::POST, &format!("/v1/tenants/{tenant}/{path}"), "{}", "VALIDATION").await;
                }
                refused(&server, Method::DELETE, &format!("/v1/tenants/{tenant}"), "", "VALIDATION").await;
                refused(&server, Method::POST, "/v1/tenants/create", &json!({"id": id}).to_string(), "VALIDATION")
                    .await;
            }
        }
        server.terminate().await;
        server.ended().await;
    }

    let sql = postgres.sql().await;
    sql.run("CREATE SCHEMA shop; CREATE TABLE shop.tuples (company text, a text, b text, c text, d text, e text, f text, PRIMARY KEY (company, b))").await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("mapping.yaml");
    std::fs::write(&file, MAPPING).unwrap();
    let flags = [("--mapping-file", file.to_str().unwrap())];
    let mut server = Server::prepare_slot(
        &postgres.uri(),
        "other",
        &[&flags[..], &[("--replication-publication", "other")]].concat(),
    )
    .await;
    server.start().await;
    server.serving().await;
    let mut lines = server.lines("/v1/tenants/a%20b%2f%c3%a4/watch", json!({})).await;
    sql.run("INSERT INTO shop.tuples VALUES ('a b/ä', 'document', '1', 'viewer', 'user', 'u', '')").await;
    assert_eq!(lines.next().await.unwrap()["result"]["changes"]["data_changes"], created("1"));
}
