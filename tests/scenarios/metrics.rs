//! Metrics, readiness, and alerts.

use crate::support::api::{Api, tuple};
use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::proxy::Proxy;
use crate::support::scrape::Scrape;
use crate::support::server::Server;
use crate::support::stream::{changes, reason};
use crate::support::wait::{eventually, within};
use reqwest::Method;
use serde_json::{Value as Json, json};
use std::path::Path;
use std::process::Stdio;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tuplewatch::dev_postgres::StopMode;

const TUPLES: &str = "tuplewatch.relation_tuples";
const ATTRIBUTES: &str = "tuplewatch.attributes";
const WATCH: [(&str, &str); 2] = [("service", "base.v1.Watch"), ("method", "Watch")];

/// Requests of Watch that ended with this code.
fn watches(scrape: &Scrape, code: &str) -> f64 {
    scrape.count("tuplewatch_grpc_requests_total", &[WATCH[0], WATCH[1], ("code", code)])
}

/// Streams over gRPC that have ended.
fn ended(scrape: &Scrape) -> f64 {
    scrape.count("tuplewatch_streams_ended_total", &[("protocol", "grpc")])
}

fn changed(scrape: &Scrape, table: &str, operation: &str) -> f64 {
    scrape.count("tuplewatch_changes_total", &[("table", table), ("operation", operation)])
}

#[tokio::test]
async fn changes_streams_and_requests_are_counted() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[("--service-watch-subscribers-max", "77")]).await;
    let sql = postgres.sql().await;
    let before = server.scrape().await;
    assert_eq!(changed(&before, TUPLES, "create"), 0.0);
    for reason in ["TRUNCATE", "UNDECODABLE_ROW", "SLOT_MOVED"] {
        assert_eq!(before.get("tuplewatch_gaps_total", &[("reason", reason)]), 0.0, "present from the start");
    }

    let mut streams = [server.watch("t1", "").await, server.watch("t1", "").await];
    let mut lines = server.lines("/v1/tenants/t1/watch", json!({})).await;
    for id in ["a", "b", "c"] {
        sql.insert("t1", id).await;
    }
    sql.insert_large("t1", 1..=4).await;
    sql.run("DELETE FROM tuplewatch.relation_tuples WHERE entity_id IN ('a', 'b')").await;
    let last = sql.flushed().await;
    for stream in &mut streams {
        for _ in 0..5 {
            stream.next().await;
        }
    }
    for _ in 0..5 {
        lines.next().await.expect("a line");
    }
    let scrape = server.scrape().await;
    assert_eq!((changed(&scrape, TUPLES, "create"), changed(&scrape, TUPLES, "delete")), (3.0, 2.0));
    assert_eq!((changed(&scrape, ATTRIBUTES, "create"), changed(&scrape, ATTRIBUTES, "delete")), (4.0, 0.0));
    assert!(scrape.get("tuplewatch_transactions_total", &[]) >= 5.0);
    for (protocol, streams) in [("grpc", 2.0), ("http", 1.0)] {
        let of = |name| scrape.get(name, &[("protocol", protocol)]);
        assert_eq!(of("tuplewatch_subscribers"), streams);
        assert_eq!(of("tuplewatch_messages_sent_total"), 5.0 * streams);
        // The attributes are about 2 kB each.
        assert!(of("tuplewatch_sent_bytes_total") > 8_000.0 * streams && of("tuplewatch_sent_bytes_total") < 64_000.0);
    }
    assert_eq!(scrape.get("tuplewatch_subscribers_limit", &[]), 77.0);
    assert_eq!(scrape.get("tuplewatch_stream_lag_bytes", &[("rank", "max")]), 0.0, "all streams are complete");
    assert!(scrape.get("tuplewatch_window_bytes", &[]) > 8_000.0);
    assert!(scrape.get("tuplewatch_log_fsync_duration_seconds_count", &[]) >= 1.0);
    assert_eq!(scrape.get("tuplewatch_session_state", &[("state", "streaming")]), 1.0);
    assert_eq!(scrape.get("tuplewatch_session_state", &[]), 1.0, "one state at a time");
    assert!(scrape.get("tuplewatch_log_disk_free_bytes", &[]) > 0.0);
    assert!(scrape.get("process_resident_memory_bytes", &[]) > 1e6 && scrape.get("process_open_fds", &[]) > 3.0);

    // The slot is queried every few seconds.
    let last_lsn: f64 = sql.value(&format!("SELECT '{last}'::pg_lsn - '0/0'")).await.parse().unwrap();
    eventually("the slot was looked at once all is acknowledged", async || {
        let scrape = server.scrape().await;
        let lsn = |of: &str| scrape.find(&format!("tuplewatch_{of}_lsn_bytes"), &[]).unwrap_or_default();
        let (acknowledged, durable, received) = (lsn("acknowledged"), lsn("durable"), lsn("received"));
        assert!(acknowledged <= durable && durable <= received, "{acknowledged} {durable} {received}");
        acknowledged >= last_lsn && lsn("server") >= last_lsn && lsn("released") >= last_lsn
    })
    .await;
    let scrape = server.scrape().await;
    assert_eq!(scrape.get("tuplewatch_lag_seconds", &[]), 0.0);
    assert!(scrape.get("tuplewatch_slot_retained_wal_bytes", &[]) > 0.0);
    assert_eq!(scrape.get("tuplewatch_slot_active", &[]), 1.0);
    assert_eq!(scrape.get("tuplewatch_slot_wal_status", &[("status", "reserved")]), 1.0);
    assert_eq!(scrape.find("tuplewatch_slot_safe_wal_bytes", &[]), None, "there is no limit");

    // How requests and streams end.
    assert_eq!(server.try_watch("nobody", "").await.err().map(|status| status.code()), Some(Code::NotFound));
    assert_eq!(server.health("").await, Ok(ServingStatus::Serving));
    let mut api = Api::of(&server).await;
    api.write("t1", &["document:1#viewer@user:ada"]).await;
    let refused = api.try_write_all("t1", vec![tuple("document:1#viewer@user:"); 1], vec![]).await;
    assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument);
    let [gone, _kept] = streams;
    drop(gone);
    eventually("the stream is gone", async || {
        let scrape = server.scrape().await;
        let is_gone = scrape.get("tuplewatch_subscribers", &[("protocol", "grpc")]) == 1.0;
        is_gone && watches(&scrape, "CANCELLED") == 1.0 && ended(&scrape) == 1.0
    })
    .await;
    let scrape = server.scrape().await;
    assert_eq!((watches(&scrape, "NOT_FOUND"), watches(&scrape, "CANCELLED"), watches(&scrape, "OK")), (1.0, 1.0, 0.0));
    let gone = [("protocol", "grpc"), ("reason", "CLIENT_GONE")];
    assert_eq!(scrape.get("tuplewatch_streams_ended_total", &gone), 1.0);
    let writes = |code| {
        let labels = [("service", "base.v1.Data"), ("method", "Write"), ("code", code)];
        scrape.get("tuplewatch_grpc_requests_total", &labels)
    };
    assert_eq!((writes("OK"), writes("INVALID_ARGUMENT")), (1.0, 1.0));
    assert!(scrape.get("tuplewatch_grpc_requests_total", &[("method", "Check"), ("code", "OK")]) >= 1.0);
    assert!(scrape.get("tuplewatch_http_requests_total", &[("code", "200")]) >= 3.0);
    check_metrics(&scrape.text).await;
}

#[tokio::test]
async fn reconnects_gaps_and_decode_errors_are_counted_once() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let (sql, mut stream, _) = server.first_delivered(&postgres, "before").await;
    sql.run("ALTER TABLE tuplewatch.attributes DROP CONSTRAINT attributes_value_form").await;

    let walsender = sql.walsender().await.expect("a session");
    sql.run(&format!("SELECT pg_terminate_backend({})", walsender.0)).await;
    eventually("another session", async || sql.walsender().await.is_some_and(|now| now != walsender)).await;
    sql.insert("t1", "after").await;
    stream.expect(Change::created("after")).await;
    let scrape = server.scrape().await;
    assert_eq!(scrape.get("tuplewatch_reconnects_total", &[]), 1.0);
    let failures = scrape.get("tuplewatch_session_failures_total", &[("kind", "transient")]);
    assert!(failures >= 1.0);
    assert_eq!(scrape.get("tuplewatch_session_failures_total", &[("kind", "definite")]), 0.0);
    assert_eq!(changed(&scrape, TUPLES, "create"), 2.0, "none is counted twice");
    // A line for each change of state. The reader of the log may be behind.
    eventually("both sessions are in the log", async || server.times_logged("\"streaming\"") == 2).await;
    let logged = server.times_logged("the replication session ended, reconnecting");
    assert!((1..=failures as usize).contains(&logged), "{logged} times, of {failures} failures");

    sql.run(r#"INSERT INTO tuplewatch.attributes VALUES ('t1', 'document', 'd', 'x', '{"@type": "other.Value"}')"#)
        .await;
    let (messages, status) = stream.ending().await;
    assert_eq!((changes(&messages), reason(&status).0), (vec![], Code::Aborted));
    let mut stream = server.watch("t1", "").await;
    sql.run("TRUNCATE tuplewatch.relation_tuples").await;
    let (messages, status) = stream.ending().await;
    assert_eq!((changes(&messages), reason(&status).0), (vec![], Code::Aborted));
    // A stream is counted when the server has finished it, which may be after its client has.
    eventually("both are counted", async || {
        let scrape = server.scrape().await;
        watches(&scrape, "ABORTED") == 2.0 && ended(&scrape) == 2.0
    })
    .await;
    let scrape = server.scrape().await;
    for reason in ["UNDECODABLE_ROW", "TRUNCATE"] {
        assert_eq!(scrape.get("tuplewatch_gaps_total", &[("reason", reason)]), 1.0);
        let ended = [("protocol", "grpc"), ("reason", reason)];
        assert_eq!(scrape.get("tuplewatch_streams_ended_total", &ended), 1.0);
    }
    assert_eq!(scrape.get("tuplewatch_decode_errors_total", &[("table", ATTRIBUTES)]), 1.0);
    assert_eq!(watches(&scrape, "ABORTED"), 2.0);
}

/// A subscriber that resumes from far behind, and one that does not read.
#[tokio::test]
async fn replays_and_slow_subscribers_are_counted_separately() {
    const LAST: u64 = 6_000;
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[("--changelog-memory-window", "1MiB")]).await;
    let (sql, mut unread, token) = server.first_delivered(&postgres, "before").await;
    let mut reader = server.watch("t1", "").await;
    let (mut read, mut written) = (0, 0);
    while written < LAST {
        sql.insert_large("t1", written + 1..=written + 200).await;
        written += 200;
        while read < written {
            read += reader.next().await.changes.len() as u64;
        }
    }
    let scrape = server.scrape().await;
    assert_eq!(scrape.get("tuplewatch_streams_behind", &[]), 1.0);
    assert_eq!(scrape.get("tuplewatch_stream_lag_bytes", &[("rank", "p50")]), 0.0);
    assert!(scrape.get("tuplewatch_stream_lag_bytes", &[("rank", "max")]) > 8e6);
    assert!(scrape.get("tuplewatch_window_bytes", &[]) <= scrape.get("tuplewatch_window_limit_bytes", &[]));
    assert_eq!(scrape.get("tuplewatch_replays_total", &[]), 0.0);
    assert_eq!(scrape.get("tuplewatch_slow_subscribers_total", &[]), 0.0, "it has not read it yet");

    let mut returned = server.watch("t1", &token).await;
    for stream in [&mut unread, &mut returned] {
        let mut had = 0;
        while had < LAST {
            had += stream.next().await.changes.len() as u64;
        }
    }
    let scrape = server.scrape().await;
    assert_eq!(scrape.get("tuplewatch_replays_total", &[]), 1.0);
    assert_eq!(scrape.get("tuplewatch_slow_subscribers_total", &[]), 1.0);
    eventually("no stream is behind", async || {
        server.scrape().await.get("tuplewatch_stream_lag_bytes", &[("rank", "max")]) == 0.0
    })
    .await;
    assert!(
        server.scrape().await.get("tuplewatch_log_bytes", &[]) + scrape.get("tuplewatch_log_journal_bytes", &[]) > 8e6
    );
}

async fn ready(server: &Server) -> (u16, Json) {
    server.ask(Method::GET, "/readyz", "").await
}

async fn until_ready(server: &Server) {
    eventually("ready", async || ready(server).await == (200, json!({"status": "READY"}))).await;
}

async fn until_unready(server: &Server, expected: &str) {
    let is_as_expected = |(status, body): (u16, Json)| {
        let reason = body["reason"].as_str().unwrap_or_default();
        assert!(status != 503 || body["status"] == "NOT_READY", "{body}");
        status == 503 && reason.contains(expected)
    };
    eventually(&format!("not ready: {expected}"), async || is_as_expected(ready(server).await)).await;
    // It is still alive.
    assert_eq!(server.ask(Method::GET, "/healthz", "").await.0, 200);
}

#[tokio::test]
async fn a_node_is_ready_while_it_streams_and_is_not_far_behind() {
    let mut postgres = Postgres::start().await;
    let mut server = Server::prepare(&postgres, &[("--server-http-ready-lag-max", "1s")]).await;
    postgres.stop(StopMode::Fast).await;
    server.start().await;
    until_unready(&server, "the slot does not stream").await;
    postgres.start_again().await;
    until_ready(&server).await;

    // The session waits for a lock, and keeps its connection, so only the lag shows it.
    let (sql, holder) = (postgres.sql().await, postgres.sql().await);
    holder.run("BEGIN; LOCK TABLE pg_catalog.pg_publication IN ACCESS EXCLUSIVE MODE").await;
    sql.until_waiting(1).await;
    sql.insert("t1", "behind").await;
    until_unready(&server, "(server.http.ready_lag_max)").await;
    let scrape = server.scrape().await;
    assert!(scrape.get("tuplewatch_lag_seconds", &[]) >= 1.0 && scrape.get("tuplewatch_lag_bytes", &[]) > 0.0);
    assert_eq!(scrape.get("tuplewatch_session_state", &[("state", "streaming")]), 1.0);
    holder.run("ROLLBACK").await;
    until_ready(&server).await;

    postgres.stop(StopMode::Fast).await;
    until_unready(&server, "the slot does not stream").await;
}

/// Even with hours of WAL to read, the lag in seconds begins at zero.
#[tokio::test]
async fn a_node_that_catches_up_after_its_start_is_not_ready() {
    let postgres = Postgres::start().await;
    let proxy = Proxy::to_postgres(&postgres.uri()).await;
    let mut server = Server::serve_through(&proxy, &postgres).await;
    until_ready(&server).await;
    server.terminate().await;
    server.ended().await;
    postgres.sql().await.insert_large("t1", 1..=4000).await;
    proxy.slow_down(4 << 20);
    server.start().await;
    until_unready(&server, "of unknown age").await;
    assert_eq!(server.scrape().await.get("tuplewatch_session_state", &[("state", "streaming")]), 1.0);
    proxy.slow_down(0);
    until_ready(&server).await;
}

#[tokio::test]
async fn metrics_need_credentials_by_default_and_probes_do_not() {
    let postgres = Postgres::start().await;
    let flags = [("--authn-enabled", "true"), ("--authn-preshared-keys", "hush"), ("--server-rate-limit", "1")];
    let mut server = Server::serve(&postgres, &flags).await;
    until_ready(&server).await;
    assert_eq!(server.ask(Method::GET, "/metrics", "").await.0, 401);
    for _ in 0..20 {
        let request = reqwest::Client::new().get(server.url("/metrics")).header("authorization", "Bearer hush");
        assert_eq!(within("an answer", request.send()).await.unwrap().status(), 200, "scrapes are not limited");
        assert_eq!(ready(&server).await.0, 200);
    }
    server.set("--authn-exempt-metrics", "true");
    server.kill_and_restart().await;
    server.scrape().await;
}

/// Runs `promtool` in the directory of the rules. Fails with its output.
async fn promtool(arguments: &[&str], input: &str) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("docker/prometheus");
    let mut command = Command::new("promtool");
    command.args(arguments).current_dir(directory).kill_on_drop(true);
    let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut process = spawned.unwrap_or_else(|error| panic!("promtool: {error} (./requirements test installs it)"));
    process.stdin.take().unwrap().write_all(input.as_bytes()).await.unwrap();
    let output = within("promtool", process.wait_with_output()).await.unwrap();
    let logged = [output.stdout, output.stderr].map(|logged| String::from_utf8_lossy(&logged).into_owned()).concat();
    assert!(output.status.success(), "promtool {arguments:?}: {logged}\n{input}");
}

/// Checks that Prometheus accepts the metrics, with their names and units.
async fn check_metrics(text: &str) {
    promtool(&["check", "metrics"], text).await;
}

#[tokio::test]
async fn prometheus_accepts_the_rules_and_the_configuration() {
    promtool(&["check", "rules", "alerts.yml"], "").await;
    promtool(&["check", "config", "prometheus.yml"], "").await;
    promtool(&["test", "rules", "alerts_test.yml"], "").await;
}

/// Every query of the dashboard, as a rule, so that Prometheus parses it.
#[tokio::test]
async fn prometheus_accepts_every_query_of_the_dashboard() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docker/grafana/tuplewatch.json");
    let dashboard: Json = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let queries: Vec<_> = targets.map(|target| target["expr"].as_str().unwrap()).collect();
    assert!(queries.len() > 30, "{queries:?}");
    let rules = queries.iter().zip(1..).map(|(query, n)| {
        let expr = query.replace("$__rate_interval", "5m").replace("$instance", ".*");
        json!({"record": format!("query:{n}"), "expr": expr})
    });
    // JSON is YAML.
    let rules = json!({"groups": [{"name": "dashboard", "rules": rules.collect::<Vec<_>>()}]});
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), rules.to_string()).unwrap();
    promtool(&["check", "rules", file.path().to_str().unwrap()], "").await;
}
