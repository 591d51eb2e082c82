//! Starts, stops, and restarts of PostgreSQL.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::stream::{changes, reason};
use crate::support::wait::{eventually, within};
use crate::support::writer::{Habits, Writers, add_tenants, seed};
use std::time::{Duration, Instant};
use tokio_stream::StreamExt as _;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tuplewatch::dev_postgres::StopMode;
use tuplewatch::model::snap_token::SnapToken;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_ends_streams_and_acknowledges_delivered_changes() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    let mut stream = server.watch("t1", "").await;
    // An unread stream must not delay the others.
    let _unread = server.watch("t1", "").await;
    let writers = Writers::start(&postgres.uri(), 4, seed(), Habits::default());
    let mut messages = Vec::new();
    while messages.len() < 1000 {
        messages.push(stream.next().await);
    }
    server.terminate().await;
    let began = Instant::now();
    let (rest, status) = stream.ending().await;
    assert_eq!(reason(&status), (Code::Unavailable, "SHUTTING_DOWN".into()));
    let exit = server.ended().await;
    assert_eq!(exit.code(), Some(0));
    // The grace period is 10 s, and the last acknowledgement has additional time.
    assert!(began.elapsed() < Duration::from_secs(13), "{:?}", began.elapsed());
    messages.extend(rest);

    let last = messages.pop().unwrap().token;
    let SnapToken::Position { place, .. } = last.parse().unwrap() else { panic!("a position token") };
    // The process is gone, so the acknowledgement is final. Its walsender may need a moment to apply it.
    let is_free = "EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = 'tuplewatch' AND NOT active)";
    eventually("the slot is free", async || sql.is_true(is_free).await).await;
    assert!(
        sql.confirmed_reaches(&place.position.lsn.to_string()).await,
        "what was delivered is acknowledged: {place}"
    );

    writers.stop().await;
    sql.insert("t1", "end").await;
    let state_before: Vec<Change> = changes(&messages);
    server.start().await;
    server.serving().await;
    let resumed = server.watch("t1", &last).await.up_to(&Change::created("end")).await;
    // Everything arrives once: it adds up, and every change has an effect.
    let all_but_popped = server.watch("t1", &messages.last().unwrap().token).await.up_to(&Change::created("end")).await;
    let mut state = std::collections::BTreeSet::new();
    for change in state_before.iter().chain(&changes(&all_but_popped)) {
        assert!(change.apply(&mut state), "{change:?} came twice");
    }
    assert_eq!(state, sql.facts("t1").await);
    assert!(changes(&all_but_popped).ends_with(&changes(&resumed)));
}

#[tokio::test]
async fn health_follows_the_slot() {
    use ServingStatus::{NotServing, Serving};
    let mut postgres = Postgres::start().await;
    let mut server = Server::prepare(&postgres, &[]).await;
    postgres.stop(StopMode::Fast).await;
    server.start().await;
    assert_eq!(server.health("").await, Ok(NotServing));
    assert_eq!(server.health("base.v1.Watch").await, Ok(NotServing));
    assert_eq!(server.health("another.Service").await, Err(Code::NotFound));
    let status = server.try_watch("t1", "").await.err().expect("no PostgreSQL");
    assert_eq!(reason(&status), (Code::Unavailable, "POSTGRES_UNREACHABLE".into()));

    for mode in [StopMode::Fast, StopMode::Immediate] {
        postgres.start_again().await;
        server.serving().await;
        assert_eq!(server.health("base.v1.Watch").await, Ok(Serving));
        postgres.stop(mode).await;
        eventually("health is NOT_SERVING", async || server.health("").await == Ok(NotServing)).await;
        assert_eq!(server.health("base.v1.Watch").await, Ok(NotServing));
    }
}

#[tokio::test]
async fn reflection_lists_the_services() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(server.channel().await);
    let mut responses = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let response = within("the answer", responses.next()).await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = response.message_response else { panic!("{response:?}") };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    for name in ["base.v1.Watch", "grpc.health.v1.Health"] {
        assert!(names.contains(&name), "{names:?}");
    }
}

/// The watched tables do not change, and the slot still does not keep the WAL of other tables.
#[tokio::test]
async fn idle_progress_is_acknowledged() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let (sql, _stream, token) = server.first_delivered(&postgres, "before").await;
    sql.run("CREATE TABLE busy (n int)").await;
    for _ in 0..3 {
        sql.run("INSERT INTO busy SELECT generate_series(1, 10000)").await;
        let lsn = sql.flushed().await;
        eventually("the slot advances", async || sql.confirmed_reaches(&lsn).await).await;
    }
    // An earlier token still resumes, also at a new process.
    server.kill_and_restart().await;
    sql.insert("t1", "after").await;
    server.watch("t1", &token).await.expect(Change::created("after")).await;
}

/// Streams stay open while PostgreSQL restarts, and repeat nothing.
#[tokio::test]
async fn streams_outlive_restarts_of_postgres() {
    let mut postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut stream = server.watch("t1", "").await;
    for (n, mode) in [StopMode::Fast, StopMode::Immediate, StopMode::Fast].into_iter().enumerate() {
        let sql = postgres.sql().await;
        for id in ["a", "b", "c"].map(|id| format!("{id}{n}")) {
            sql.insert("t1", &id).await;
        }
        // The changes are delivered before the stop, or after it.
        if n % 2 == 0 {
            for id in ["a", "b", "c"].map(|id| format!("{id}{n}")) {
                stream.expect(Change::created(&id)).await;
            }
        }
        drop(sql);
        let took = postgres.stop(mode).await;
        // A walsender that waits for us would delay it until its timeout.
        assert!(took < Duration::from_secs(10), "{mode:?} shutdown took {took:?} with an open stream");
        postgres.start_again().await;
        if n % 2 == 1 {
            for id in ["a", "b", "c"].map(|id| format!("{id}{n}")) {
                stream.expect(Change::created(&id)).await;
            }
        }
    }
    let sql = postgres.sql().await;
    sql.insert("t1", "last").await;
    stream.expect(Change::created("last")).await;
    assert!(!server.has_logged("panicked"));
}
