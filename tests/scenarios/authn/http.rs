//! Authentication over HTTP: access, refusals, and the end of a stream.

use super::{CLAIMS, INVALID, MISSING, is_sentence, serve};
use crate::support::http::{EventSource, Lines, Seen, reason};
use crate::support::issuer::{Issuer, Key};
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::wait::within;
use jsonwebtoken::get_current_timestamp;
use reqwest::header::HeaderMap;
use reqwest::{Method, Response};
use serde_json::{Value as Json, json};

const WATCH: &str = "/v1/tenants/t1/watch";
const READ: &str = "/v1/tenants/t1/data/relationships/read";

async fn body(response: Response) -> Json {
    serde_json::from_slice(&within("the rest of the answer", response.bytes()).await.unwrap()).unwrap()
}

/// Reads, and receives a change from a stream.
async fn gets_in(server: &Server, sql: &Sql, authorization: &str, what: &str) {
    assert_eq!(server.post_as(authorization, READ).await.status(), 200, "{what}");
    let mut lines = Lines::of(server.post_as(authorization, WATCH).await);
    let id = fastrand::u64(..).to_string();
    sql.insert("t1", &id).await;
    let line = lines.next().await.unwrap();
    assert_eq!(line["result"]["changes"]["data_changes"][0]["tuple"]["entity"]["id"], id, "{what}: {line}");
}

/// Every request is refused with this status and reason. Returns the last message.
async fn refused(server: &Server, authorization: &str, http: u16, expected: (u64, &str), what: &str) -> String {
    let mut message = String::new();
    for path in [READ, WATCH] {
        let response = server.post_as(authorization, path).await;
        assert_eq!(response.status(), http, "{what} at {path}");
        let challenge = response.headers().get("www-authenticate").map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(challenge.as_deref(), (http == 401).then_some("Bearer"), "{what} at {path}");
        let error = body(response).await;
        assert_eq!(reason(&error), expected, "{what} at {path}: {error}");
        error["message"].as_str().unwrap().clone_into(&mut message);
    }
    let mut source = EventSource::new(server.url(WATCH)).authorized(authorization);
    assert_eq!(source.next().await, Seen::Closed(http), "{what}");
    message
}

/// Every request is refused as unauthenticated with this name.
async fn unauthenticated(server: &Server, authorization: &str, name: &str, what: &str) {
    let expected = (16, name.trim_start_matches("ERROR_CODE_"));
    let message = refused(server, authorization, 401, expected, what).await;
    assert!(is_sentence(&message, name), "{what}: {message}");
}

#[tokio::test]
async fn a_key_gives_access_to_its_tenants_only() {
    let postgres = Postgres::start().await;
    let keys = "[hush-all, {key: hush-t1, tenants: [t1]}, {key: hush-t2, tenants: [t2]}]";
    let flags = [("--authn-enabled", "true"), ("--authn-preshared-keys", keys)];
    let server = Server::serve(&postgres, &flags).await;
    let sql = postgres.sql().await;
    for authorization in ["Bearer hush-all", "bearer  hush-t1"] {
        gets_in(&server, &sql, authorization, authorization).await;
    }
    for (authorization, name) in [
        ("", MISSING),
        ("Basic hush-all", MISSING),
        ("Bearer hush", "ERROR_CODE_UNAUTHENTICATED"),
        ("Bearer hush-all2", "ERROR_CODE_UNAUTHENTICATED"),
    ] {
        unauthenticated(&server, authorization, name, authorization).await;
    }
    let message = refused(&server, "Bearer hush-t2", 403, (7, "TENANT_FORBIDDEN"), "another's tenant").await;
    assert!(message.contains("'t1'"), "{message}");

    // Without a key, known and unknown paths look the same.
    assert_eq!(server.post_as("", "/v1/nothing").await.status(), 401);
    assert_eq!(server.post_as("Bearer hush-t2", "/v1/nothing").await.status(), 404);
    assert_eq!(server.ask(Method::GET, "/healthz", "").await, (200, json!({"status": "ALIVE"})));
    assert!(!server.has_logged("hush"));
}

#[tokio::test]
async fn a_cors_preflight_needs_no_credentials() {
    const ORIGIN: &str = "https://a.example";
    let postgres = Postgres::start().await;
    let flags = [
        ("--authn-enabled", "true"),
        ("--authn-preshared-keys", "hush"),
        ("--server-http-cors-allowed-origins", ORIGIN),
    ];
    let server = Server::serve(&postgres, &flags).await;
    let client = reqwest::Client::new();
    let preflight = client.request(Method::OPTIONS, server.url(WATCH)).header("origin", ORIGIN);
    let preflight = preflight.header("access-control-request-method", "POST");
    let preflight = preflight.header("access-control-request-headers", "authorization");
    let answer = within("an answer", preflight.send()).await.unwrap();
    let header = |headers: &HeaderMap, name: &str| headers[name].to_str().unwrap().to_owned();
    assert_eq!(answer.status(), 200);
    assert_eq!(header(answer.headers(), "access-control-allow-origin"), ORIGIN);
    assert!(header(answer.headers(), "access-control-allow-headers").contains("authorization"));

    // The page may read the reason of a refusal.
    let request = client.post(server.url(WATCH)).header("origin", ORIGIN);
    let answer = within("an answer", request.send()).await.unwrap();
    assert_eq!(answer.status(), 401);
    assert_eq!(header(answer.headers(), "access-control-allow-origin"), ORIGIN);
}

#[tokio::test]
async fn valid_jwts_are_accepted_and_others_refused() {
    let postgres = Postgres::start().await;
    let key = Key::ec("key");
    let issuer = Issuer::start(&[&key]).await;
    let server = serve(&postgres, &issuer, &[]).await;
    let sql = postgres.sql().await;
    let bearer = |other| format!("Bearer {}", key.sign(&issuer.claims(&other)));
    gets_in(&server, &sql, &bearer(json!({})), "a good one").await;
    for (what, other, name) in [
        ("expired", json!({"exp": get_current_timestamp() - 1}), INVALID),
        ("for others", json!({"aud": "others"}), "ERROR_CODE_INVALID_AUDIENCE"),
        ("for nobody", json!({"aud": null}), CLAIMS),
    ] {
        unauthenticated(&server, &bearer(other), name, what).await;
    }
    unauthenticated(&server, "", MISSING, "nothing").await;
}

#[tokio::test]
async fn a_stream_ends_when_its_token_expires() {
    let postgres = Postgres::start().await;
    let key = Key::ec("key");
    let issuer = Issuer::start(&[&key]).await;
    let server = serve(&postgres, &issuer, &[]).await;
    let sql = postgres.sql().await;
    let exp = get_current_timestamp() + 5;
    let bearer = |other| format!("Bearer {}", key.sign(&issuer.claims(&other)));
    let short = bearer(json!({"exp": exp}));
    let mut lines = Lines::of(server.post_as(&short, WATCH).await);
    let mut source = EventSource::new(server.url(WATCH)).authorized(&short);
    assert_eq!(source.next().await, Seen::Open);
    sql.insert("t1", "before").await;
    let line = lines.next().await.unwrap();
    let Seen::Message { id, .. } = source.next().await else { panic!("a message") };
    assert_eq!(line["result"]["changes"]["snap_token"], id);

    let expired = (16, "CREDENTIALS_EXPIRED");
    assert_eq!(reason(&lines.next().await.unwrap()["error"]), expired);
    assert!(get_current_timestamp() >= exp, "not before its time");
    assert_eq!(lines.next().await, None);
    let Seen::Error(error) = source.next().await else { panic!("an error") };
    assert_eq!(reason(&error), expired);
    // It reconnects with the expired token, and is refused for good.
    assert_eq!(source.next().await, Seen::Closed(401));

    // A new token resumes with exactly the rest.
    sql.insert("t1", "after").await;
    let resume = format!("{WATCH}?snap_token={id}");
    let mut source = EventSource::new(server.url(&resume)).authorized(&bearer(json!({})));
    assert_eq!(source.next().await, Seen::Open);
    let Seen::Message { data, .. } = source.next().await else { panic!("a message") };
    assert_eq!(data["changes"]["data_changes"][0]["tuple"]["entity"]["id"], "after");
}
