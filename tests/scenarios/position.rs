//! The slot, the change log and the WAL do not always agree on the position.
//!
//! The slot may be behind its acknowledgements, because PostgreSQL saves its position only at checkpoints, and must be behind incomplete
//! transactions. When storage is rolled back, the WAL may end before the log on the same timeline. PostgreSQL then accepts a start past
//! its end, and silently skips the changes that are written next.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::proxy::Proxy;
use crate::support::server::Server;
use crate::support::stream::{changes, reason};
use crate::support::wait::eventually;
use std::time::{Duration, Instant};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tuplewatch::dev_postgres::StopMode;

const CONFIRMED: &str = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = 'tuplewatch'";

fn created(id: &str) -> Change {
    Change::created(id)
}

/// Writes, stops PostgreSQL, and restores its data from before. Returns the last token of the undone changes.
async fn roll_back(postgres: &mut Postgres, server: &Server) -> String {
    let (sql, mut stream, _) = server.first_delivered(postgres, "before").await;
    drop(sql);
    postgres.stop(StopMode::Fast).await;
    postgres.save();
    postgres.start_again().await;

    let sql = postgres.sql().await;
    // So much that a few rows after the rollback do not reach this position.
    sql.run("SELECT pg_logical_emit_message(true, 'other', repeat('x', 1 << 20))").await;
    sql.insert("t1", "undone").await;
    let token = stream.expect(created("undone")).await.token;
    sql.until_recorded("tuplewatch").await;
    drop(sql);
    postgres.stop(StopMode::Fast).await;
    postgres.put_back();
    token
}

const ROLLED_BACK: &str = "storage was rolled back";

#[tokio::test]
async fn rolled_back_storage_is_an_error_until_the_log_is_reset() {
    let mut postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let token = roll_back(&mut postgres, &server).await;
    let mut streams = vec![server.watch("t1", &token).await];
    postgres.start_again().await;
    let sql = postgres.sql().await;
    let noticed = Instant::now();
    server.until_logged(ROLLED_BACK).await;
    // A little more than the longest backoff.
    assert!(noticed.elapsed() < Duration::from_secs(15), "{:?}", noticed.elapsed());
    assert!(server.has_logged("--reset-log"), "and the remedy");

    sql.insert("t1", "after").await;
    for process in 1..=2 {
        eventually("it is logged", async || server.times_logged(ROLLED_BACK) == process).await;
        assert_eq!(server.health("").await, Ok(ServingStatus::NotServing));
        assert!(sql.walsender().await.is_none());
        // Neither open or resumed streams, nor new ones, get anything.
        streams.push(server.watch("t1", &token).await);
        streams.extend(server.try_watch("t1", "").await);
        for stream in &mut streams {
            stream.expect_silence().await;
        }
        streams.clear();
        server.kill_9().await;
        if process == 1 {
            server.start().await;
        }
    }

    server.start_with(&["--reset-log"]).await;
    server.serving().await;
    let status = server.try_watch("t1", &token).await.err().expect("a token of what was undone");
    assert_eq!(reason(&status), (Code::FailedPrecondition, "SNAP_TOKEN_BEYOND_HISTORY".into()));
    let mut stream = server.watch("t1", "").await;
    assert_eq!(sql.facts("t1").await, ["before", "after"].map(Change::viewer).into());
    sql.insert("t1", "anew").await;
    stream.expect(created("anew")).await;
}

/// The end of the WAL shows nothing then, and a start there would skip the changes below it.
#[tokio::test]
async fn rolled_back_storage_that_outgrew_the_log_is_no_silent_gap() {
    let mut postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let token = roll_back(&mut postgres, &server).await;
    server.kill_9().await;
    postgres.start_again().await;
    let sql = postgres.sql().await;
    sql.insert("t1", "below").await;
    sql.run("SELECT pg_logical_emit_message(true, 'other', repeat('x', 2 << 20))").await;
    server.start().await;
    // The stream may open before the rollback is noticed. Nothing of the new history may arrive in either case.
    let mut streams = Vec::from_iter(server.try_watch("t1", &token).await);
    sql.insert("t1", "after").await;
    server.until_logged(ROLLED_BACK).await;
    streams.extend(server.try_watch("t1", &token).await);
    for stream in &mut streams {
        stream.expect_silence().await;
    }
}

/// Rows of the big transaction: some 15 MiB of stream, several times what is staged at once.
const ROWS: usize = 60_000;

#[tokio::test]
async fn a_transaction_is_not_acknowledged_before_it_is_complete() {
    let postgres = Postgres::start().await;
    let proxy = Proxy::to_postgres(&postgres.uri()).await;
    let mut server = Server::serve_through(&proxy, &postgres).await;
    let (sql, mut stream, token) = server.first_delivered(&postgres, "first").await;

    // So that it takes a few seconds.
    proxy.slow_down(3 << 20);
    let other = postgres.sql().await;
    sql.run("BEGIN").await;
    let long = "x".repeat(100);
    sql.run(&format!(
        "INSERT INTO tuplewatch.relation_tuples \
         SELECT 't1', 'document', '{long}' || n, 'viewer', 'user', '{long}', '' FROM generate_series(1, {ROWS}) n"
    ))
    .await;
    // It is written between rows of the big one, and commits before it.
    other.insert("t1", "small").await;
    stream.expect(created("small")).await;
    sql.insert("t1", "last").await;
    sql.run("COMMIT").await;
    let end = sql.flushed().await;
    for _ in 0..2 {
        // More than what is staged at once, twice.
        let received = proxy.returned_bytes() + (9 << 20);
        eventually("a good part of it is received", async || {
            assert!(!sql.confirmed_reaches(&end).await, "acknowledged before it was whole");
            proxy.returned_bytes() >= received
        })
        .await;
        server.kill_9().await;
        assert!(!sql.confirmed_reaches(&end).await, "acknowledged before it was whole");
        server.start().await;
        server.serving().await;
    }
    proxy.slow_down(0);
    let messages = server.watch("t1", &token).await.up_to(&created("last")).await;
    let all = changes(&messages);
    assert_eq!(all.len(), 1 + ROWS + 1);
    assert_eq!(all[0], created("small"));
    let facts = sql.facts("t1").await;
    let mut once: Vec<&str> = all.iter().map(|change| change.fact.as_str()).collect();
    once.sort_unstable();
    once.dedup();
    assert_eq!(once.len() + 1, facts.len(), "each of them once");
    eventually("now it is acknowledged", async || sql.confirmed_reaches(&end).await).await;
}

#[tokio::test]
async fn changes_sent_again_after_a_crash_reach_nobody() {
    let mut postgres = Postgres::start().await;
    let proxy = Proxy::to_postgres(&postgres.uri()).await;
    let mut server = Server::serve_through(&proxy, &postgres).await;
    let mut stream = server.watch("t1", "").await;
    let mut token = String::new();

    for round in ["server", "both"] {
        // PostgreSQL may have saved the position for another reason. Then it is tried again.
        let mut has_gone_back = false;
        for attempt in 0..5 {
            let sql = postgres.sql().await;
            for n in 0..5 {
                let id = format!("{round}{attempt}.{n}");
                sql.insert("t1", &id).await;
                let message = stream.expect(created(&id)).await;
                if token.is_empty() {
                    token = message.token;
                }
            }
            let lsn = sql.flushed().await;
            eventually("all of it is acknowledged", async || sql.confirmed_reaches(&lsn).await).await;
            drop(sql);
            if round == "both" {
                server.kill_9().await;
            }
            postgres.stop(StopMode::Immediate).await;
            proxy.silence();
            postgres.start_again().await;
            let sql = postgres.sql().await;
            has_gone_back = !sql.confirmed_reaches(&lsn).await;
            let confirmed = sql.value(CONFIRMED).await;
            eprintln!("acknowledged {lsn}; the slot has {confirmed} after the crash");
            proxy.cut();
            if round == "both" {
                server.start().await;
            }
            server.serving().await;
            let id = format!("{round}{attempt}.after");
            sql.insert("t1", &id).await;
            if round == "both" {
                // Everything after the very first token, once.
                let messages = server.watch("t1", &token).await.up_to(&created(&id)).await;
                let mut facts: Vec<String> = changes(&messages).into_iter().map(|change| change.fact).collect();
                let count = facts.len();
                facts.sort();
                facts.dedup();
                assert_eq!((facts.len(), count), (count, sql.facts("t1").await.len() - 1), "each once");
                stream = server.watch("t1", &messages.last().unwrap().token).await;
            } else {
                // The next message is not a repeated one.
                stream.expect(created(&id)).await;
            }
            if has_gone_back {
                break;
            }
        }
        assert!(has_gone_back, "{round}: the slot's position was never older, so nothing was shown");
    }
    assert!(!server.has_logged("moved on without"), "no gap");
}
