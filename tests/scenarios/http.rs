//! Watch over HTTP: JSON lines, and the `EventSource` of a browser.

mod names;
mod python_client;
mod sharing;

use crate::support::http::{EventSource, Seen, reason};
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::wait::eventually;
use crate::support::writer::seed;
use reqwest::Method;
use serde_json::{Value as Json, json};
use std::time::Instant;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tuplewatch::dev_postgres::StopMode;

/// The change that [`crate::support::sql::Sql::insert`] causes.
fn created(id: &str) -> Json {
    let subject = json!({"type": "user", "id": "u", "relation": ""});
    let tuple = json!({"entity": {"type": "document", "id": id}, "relation": "viewer", "subject": subject});
    json!([{"operation": "OPERATION_CREATE", "tuple": tuple}])
}

/// The document of the one change of an event.
fn document(data: &Json) -> &str {
    data["changes"]["data_changes"][0]["tuple"]["entity"]["id"].as_str().unwrap_or_else(|| panic!("{data}"))
}

#[tokio::test]
async fn changes_arrive_as_json_lines() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let mut newer = server.lines("/v1/tenants/t1/watch", json!({})).await;
    let mut first = server.lines("/v1/watch/watch", json!({"tenant_id": "t1"})).await;
    // The headers are here, so the start is fixed.
    sql.insert("t1", "a").await;
    sql.run(
        "INSERT INTO tuplewatch.attributes VALUES ('t1', 'document', 'a', 'score', \
         '{\"@type\": \"type.googleapis.com/base.v1.DoubleArrayValue\", \"data\": [0.5, -1]}')",
    )
    .await;

    let value = json!({"@type": "type.googleapis.com/base.v1.DoubleArrayValue", "data": [0.5, -1.0]});
    let attribute = json!({"entity": {"type": "document", "id": "a"}, "attribute": "score", "value": value});
    let attribute = json!([{"operation": "OPERATION_CREATE", "attribute": attribute}]);
    let mut tokens = Vec::new();
    for expected in [created("a"), attribute.clone()] {
        let line = newer.next().await.unwrap();
        let token = line["result"]["changes"]["snap_token"].as_str().unwrap().to_owned();
        assert_eq!(line, json!({"result": {"changes": {"snap_token": token, "data_changes": expected}}}));
        let line = first.next().await.unwrap();
        assert_eq!(line, json!({"result": {"changes": {"snap_token": token, "tuple_changes": expected}}}));
        tokens.push(token);
    }

    // Both names of the field, and the start of the first stream.
    for (token, expected) in [
        (json!({"snap_token": tokens[0]}), &attribute),
        (json!({"snapToken": newer.headers["snap-token"].to_str().unwrap()}), &created("a")),
    ] {
        let mut resumed = server.lines("/v1/tenants/t1/watch", token).await;
        assert_eq!(resumed.next().await.unwrap()["result"]["changes"]["data_changes"], *expected);
    }
}

/// It reconnects by itself after every fault, and the page sees everything once and in order.
#[tokio::test]
async fn an_event_source_misses_nothing() {
    const CHANGES: usize = 60;
    let mut postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let mut source = EventSource::new(server.url("/v1/tenants/t1/watch"));
    assert_eq!(source.next().await, Seen::Open);
    let sql = postgres.sql().await;
    sql.insert("t1", "0").await;
    let Seen::Message { data, .. } = source.next().await else { panic!("a message") };
    assert_eq!(document(&data), "0");

    // Changes before its first message are not lost either.
    let mut late = EventSource::new(server.url("/v1/tenants/t1/watch?snap_token="));
    assert_eq!(late.next().await, Seen::Open);
    late.has_id().await;
    for n in 1..CHANGES {
        match n % 20 {
            5 => server.kill_9().await,
            7 => {
                server.start().await;
                server.serving().await;
            }
            15 => {
                postgres.stop(StopMode::Immediate).await;
                postgres.start_again().await;
            }
            _ => {}
        }
        postgres.sql().await.insert("t1", &n.to_string()).await;
    }
    for source in [&mut source, &mut late] {
        let (mut expected, mut last_id) = (1, String::new());
        while expected < CHANGES {
            match source.next().await {
                Seen::Message { id, data } => {
                    assert_eq!(document(&data), expected.to_string());
                    assert_eq!(data["changes"]["snap_token"], id);
                    assert_ne!(id, last_id);
                    (expected, last_id) = (expected + 1, id);
                }
                Seen::Open => {}
                // PostgreSQL is not available yet, and it reconnects.
                Seen::Error(error) => assert_eq!(error["code"], 14, "{error}"),
                Seen::Closed(status) => panic!("it gave up after {status}"),
            }
        }
    }
}

/// The page decides whether to continue after a gap, so the source must not reconnect by itself.
#[tokio::test]
async fn an_event_source_stops_at_a_gap() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let mut source = EventSource::new(server.url("/v1/tenants/t1/watch"));
    assert_eq!(source.next().await, Seen::Open);
    sql.run("TRUNCATE tuplewatch.relation_tuples").await;
    let Seen::Error(error) = source.next().await else { panic!("an error") };
    assert_eq!(reason(&error).0, 10, "{error}");
    let next = error["details"][0]["metadata"]["next_snap_token"].as_str().unwrap();
    assert_eq!(source.next().await, Seen::Closed(204));

    sql.insert("t1", "after").await;
    let mut source = EventSource::new(server.url(&format!("/v1/tenants/t1/watch?snap_token={next}")));
    assert_eq!(source.next().await, Seen::Open);
    let Seen::Message { data, .. } = source.next().await else { panic!("a message") };
    assert_eq!(document(&data), "after");

    for (path, status) in [("/v1/tenants/t1/watch?snap_token=x", 400), ("/v1/tenants/nowhere/watch", 404)] {
        assert_eq!(EventSource::new(server.url(path)).next().await, Seen::Closed(status), "{path}");
    }
}

#[tokio::test]
async fn refusals_have_a_status_and_a_reason() {
    let postgres = Postgres::start().await;
    let flags = [("--server-http-body-size-max", "1KiB"), ("--server-http-cors-allowed-origins", "https://a.example")];
    let mut server = Server::serve(&postgres, &flags).await;
    let watch = "/v1/tenants/t1/watch";
    assert_eq!(server.ask(Method::GET, "/healthz", "").await, (200, json!({"status": "ALIVE"})));
    for (method, path, body, status, code, expected) in [
        (Method::POST, watch, "{", 400, 3, ""),
        (Method::POST, watch, r#"{"snap_token": "x"}"#, 400, 3, "INVALID_SNAP_TOKEN"),
        (Method::POST, "/v1/tenants/no%2Bwhere/watch", "", 404, 5, "TENANT_NOT_FOUND"),
        (Method::POST, "/v1/tenants/no%20where/watch", "", 400, 3, "INVALID_TENANT"),
        (Method::POST, "/v1/watch/watch", "{}", 400, 3, "INVALID_TENANT"),
        (Method::POST, "/v1/watch/watch", r#"{"tenant_id": "nowhere"}"#, 404, 5, "TENANT_NOT_FOUND"),
        (Method::DELETE, watch, "", 405, 12, ""),
        (Method::GET, "/v1/nothing", "", 404, 5, ""),
    ] {
        let (found, error) = server.ask(method.clone(), path, body).await;
        assert_eq!((found, reason(&error)), (status, (code, expected)), "{method} {path}: {error}");
    }
    let (status, error) = server.ask(Method::POST, watch, " ".repeat(1025)).await;
    assert_eq!((status, reason(&error).0), (413, 8));

    let preflight = reqwest::Client::new().request(Method::OPTIONS, server.url(watch));
    let preflight = preflight.header("origin", "https://a.example").header("access-control-request-method", "POST");
    let headers = preflight.send().await.unwrap().headers().clone();
    assert_eq!(headers["access-control-allow-origin"], "https://a.example");

    server.terminate().await;
    server.ended().await;
    server.set("--service-watch-enabled", "false");
    server.start().await;
    let (status, error) = server.ask(Method::POST, watch, "{}").await;
    assert_eq!((status, reason(&error)), (501, (12, "WATCH_DISABLED")));
}

/// No request causes a status of 500 or ends the server.
#[tokio::test]
async fn no_request_causes_an_internal_error() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut random = fastrand::Rng::with_seed(seed());
    let client = reqwest::Client::new();
    let good = server.lines("/v1/tenants/t1/watch", json!({})).await.headers["snap-token"].to_str().unwrap().to_owned();
    for _ in 0..300 {
        let any = |random: &mut fastrand::Rng| {
            let text: String = (0..random.usize(..12)).map(|_| random.char(..)).collect();
            let values = [
                json!(null),
                json!(text),
                json!(random.i64(..)),
                json!(good),
                json!(["t1"]),
                json!({"a": {}}),
                json!("t1"),
            ];
            values[random.usize(..values.len())].clone()
        };
        let body =
            json!({"tenant_id": any(&mut random), "snap_token": any(&mut random), "x": any(&mut random)}).to_string();
        let body =
            body.as_bytes()[..if random.u8(..4) == 0 { random.usize(..body.len()) } else { body.len() }].to_vec();
        let token: String = any(&mut random).to_string().bytes().map(|byte| format!("%{byte:02x}")).collect();
        let request = match random.u8(..3) {
            0 => client.post(server.url("/v1/watch/watch")).body(body),
            1 => client.post(server.url("/v1/tenants/t1/watch")).body(body),
            _ => client.get(server.url(&format!("/v1/tenants/t1/watch?snap_token={token}"))),
        };
        let last = ["", "x", "ended", &good][random.usize(..4)];
        let status = request.header("last-event-id", last).send().await.unwrap().status().as_u16();
        assert!([200, 204, 400, 404].contains(&status), "{status}");
    }
    assert!(!server.has_logged("panicked"));
}

#[tokio::test]
async fn streams_end_in_order_at_a_shutdown() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let mut lines = server.lines("/v1/tenants/t1/watch", json!({})).await;
    let mut source = EventSource::new(server.url("/v1/tenants/t1/watch"));
    assert_eq!(source.next().await, Seen::Open);
    // An idle connection, and a silent one, must not delay the shutdown.
    let idle = reqwest::Client::new();
    assert!(idle.get(server.url("/healthz")).send().await.unwrap().bytes().await.is_ok());
    let _mute = TcpStream::connect(server.http_address()).await.unwrap();
    sql.insert("t1", "last").await;
    assert_eq!(lines.next().await.unwrap()["result"]["changes"]["data_changes"], created("last"));
    assert!(matches!(source.next().await, Seen::Message { .. }));

    let began = Instant::now();
    server.terminate().await;
    assert_eq!(reason(&lines.next().await.unwrap()["error"]), (14, "SHUTTING_DOWN"));
    assert_eq!(lines.next().await, None);
    let Seen::Error(error) = source.next().await else { panic!("an error") };
    assert_eq!(reason(&error), (14, "SHUTTING_DOWN"));
    assert_eq!(server.ended().await.code(), Some(0));
    assert!(began.elapsed().as_secs() < 9, "it should not wait for the grace period: {:?}", began.elapsed());
    // It reconnects to the next process.
    server.start().await;
    server.serving().await;
    sql.insert("t1", "next").await;
    assert_eq!(source.next().await, Seen::Open);
    let Seen::Message { data, .. } = source.next().await else { panic!("a message") };
    assert_eq!(document(&data), "next");
}

/// It costs a bounded amount of memory, and delays no other client.
#[tokio::test]
async fn a_client_that_does_not_read_delays_nobody() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[("--changelog-memory-window", "4MiB")]).await;
    let sql = postgres.sql().await;
    let mut stuck = TcpStream::connect(server.http_address()).await.unwrap();
    stuck.write_all(b"POST /v1/tenants/t1/watch HTTP/1.1\r\nhost: t\r\ncontent-length: 0\r\n\r\n").await.unwrap();
    let mut begin = [0; 12];
    stuck.read_exact(&mut begin).await.unwrap();
    assert_eq!(&begin, b"HTTP/1.1 200");
    let mut lines = server.lines("/v1/tenants/t1/watch", json!({})).await;
    let before_kib = server.memory_kib("VmRSS");
    for n in 0..20 {
        sql.insert_large("t1", n * 1000 + 1..=(n + 1) * 1000).await;
    }
    sql.insert("t1", "end").await;
    while lines.next().await.unwrap()["result"]["changes"]["data_changes"] != created("end") {}
    // 40 MB were sent. A debug build and the buffers of the log need some memory too.
    let after_kib = server.memory_kib("VmRSS");
    assert!(after_kib < before_kib + (96 << 10), "{before_kib} KiB became {after_kib} KiB");
    drop(stuck);
    eventually("the server answers", async || server.ask(Method::GET, "/healthz", "").await.0 == 200).await;
}
