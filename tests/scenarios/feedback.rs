//! PostgreSQL and tuplewatch must know that the other one lives, even while one of them has nothing to send or no time to read.
//!
//! PostgreSQL ends a session after `wal_sender_timeout` without a message, and sends everything unacknowledged again to the next one. So
//! a slow consumer could never make progress. In the other direction, a silently lost connection looks like an idle one. tuplewatch sets
//! the timeout to 20 s. Here a proxy changes it to 2 s, so that the tests do not take minutes.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::proxy::Proxy;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::changes;
use crate::support::wait::eventually;
use std::time::{Duration, Instant};
use tonic_health::pb::health_check_response::ServingStatus;
use tuplewatch::dev_postgres::StopMode;

/// The `wal_sender_timeout` that the proxy puts in place of tuplewatch's.
const TIMEOUT: Duration = Duration::from_secs(2);

fn created(id: &str) -> Change {
    Change::created(id)
}

/// A server behind a proxy that sets [`TIMEOUT`].
async fn impatient(postgres: &Postgres) -> (Proxy, Server) {
    let (asked, instead) = ("wal_sender_timeout\x0020s", "wal_sender_timeout\x002s ");
    let proxy = Proxy::to_postgres_rewriting(&postgres.uri(), asked, instead).await;
    let server = Server::serve_through(&proxy, postgres).await;
    (proxy, server)
}

/// `count` tuples with long ids, in one transaction. Some 250 bytes each in the stream.
async fn insert_many(sql: &Sql, name: &str, count: usize) {
    let long = "x".repeat(100);
    sql.run(&format!(
        "INSERT INTO tuplewatch.relation_tuples \
         SELECT 't1', 'document', '{name}.{long}.' || n, 'viewer', 'user', '{long}', '' FROM generate_series(1, {count}) n"
    ))
    .await;
}

/// Waits longer than the timeouts of both sides.
async fn hold() {
    tokio::time::sleep(3 * TIMEOUT).await;
}

/// A session that does not read, because it waits for an answer on its other connection.
#[tokio::test]
async fn a_stalled_session_keeps_its_walsender() {
    let mut postgres = Postgres::start().await;
    let (_proxy, server) = impatient(&postgres).await;
    let (sql, mut stream, _) = server.first_delivered(&postgres, "before").await;
    let walsender = sql.walsender().await.expect("a session");

    let holder = postgres.sql().await;
    stall(&sql, &holder).await;
    insert_many(&sql, "stalled", 20_000).await;
    sql.insert("t1", "after").await;
    hold().await;
    // It must not read meanwhile, or this would show nothing.
    stream.expect_silence().await;
    assert_eq!(sql.walsender().await.as_ref(), Some(&walsender), "the server has not timed out");
    holder.run("ROLLBACK").await;
    let messages = stream.up_to(&created("after")).await;
    assert_eq!(changes(&messages).len(), 20_001);
    let lsn = sql.flushed().await;
    eventually("it is acknowledged", async || sql.confirmed_reaches(&lsn).await).await;
    assert_eq!(sql.walsender().await, Some(walsender), "the same session");

    // It does not delay a shutdown either.
    stall(&sql, &holder).await;
    insert_many(&sql, "shutdown", 20_000).await;
    sql.insert("t1", "last").await;
    let took = postgres.stop(StopMode::Fast).await;
    assert!(took < Duration::from_secs(10), "the shutdown took {took:?}");
    postgres.start_again().await;
    assert_eq!(changes(&stream.up_to(&created("last")).await).len(), 20_001);
    stream.expect_silence().await;
}

/// Locks a catalog that the session reads every few seconds, and waits until the session waits for it.
async fn stall(sql: &Sql, holder: &Sql) {
    holder.run("BEGIN; LOCK TABLE pg_catalog.pg_publication IN ACCESS EXCLUSIVE MODE").await;
    let waits = "EXISTS (SELECT FROM pg_stat_activity WHERE application_name LIKE 'tuplewatch%' \
                 AND wait_event_type = 'Lock')";
    eventually("the session waits", async || sql.is_true(waits).await).await;
}

/// A keepalive request is queued behind earlier data for longer than the server waits for the reply.
#[tokio::test]
async fn a_big_transaction_on_a_slow_link_arrives_in_one_session() {
    const ROWS: usize = 60_000;
    let postgres = Postgres::start().await;
    let (proxy, server) = impatient(&postgres).await;
    let (sql, mut stream, _) = server.first_delivered(&postgres, "before").await;
    let walsender = sql.walsender().await.expect("a session");

    proxy.slow_down(2 << 20);
    let began = Instant::now();
    insert_many(&sql, "big", ROWS).await;
    sql.insert("t1", "after").await;
    let lsn = sql.flushed().await;
    assert_eq!(changes(&stream.up_to(&created("after")).await).len(), ROWS + 1);
    assert!(began.elapsed() > 2 * TIMEOUT, "that was too fast to show anything: {:?}", began.elapsed());
    eventually("it is acknowledged", async || sql.confirmed_reaches(&lsn).await).await;
    assert_eq!(sql.walsender().await, Some(walsender), "the same session");
}

/// PostgreSQL neither sends nor reads during some phases of decoding, here during the unpublished rows of a rewritten table. Right after,
/// it checks when it last heard from us. A client that only answers requests would be disconnected then, would have to start again, and
/// would never make progress.
#[tokio::test]
async fn a_transaction_that_decodes_slowly_arrives_in_one_session() {
    let postgres = Postgres::start().await;
    let (_proxy, mut server) = impatient(&postgres).await;
    // It must not read the probes.
    server.terminate().await;
    server.ended().await;
    let sql = postgres.sql().await;
    let rows = rows_to_decode_for(2 * TIMEOUT, &sql).await;
    sql.run("SELECT pg_replication_slot_advance('tuplewatch', pg_current_wal_insert_lsn())").await;
    server.start_with(&["--reset-log"]).await;
    server.serving().await;
    let mut stream = server.watch("t1", "").await;
    sql.insert("t1", "before").await;
    stream.expect(created("before")).await;
    let walsender = sql.walsender().await.expect("a session");

    sql.run(REWRITE).await;
    sql.insert("t1", "after").await;
    let began = Instant::now();
    // After a reconnect it would not come as far as this.
    stream.expect(created("after")).await;
    eprintln!("{rows} rows were decoded within {:?}", began.elapsed());
    assert_eq!(sql.walsender().await, Some(walsender), "the same session");
}

const REWRITE: &str = "ALTER TABLE unwatched ALTER COLUMN n TYPE bigint USING n + 1";

/// Fills an unwatched table with so many rows that its rewrite takes at least this long to decode on this machine. Returns their number.
async fn rows_to_decode_for(least: Duration, sql: &Sql) -> usize {
    sql.run("CREATE TABLE unwatched (n bigint)").await;
    let mut rows = 250_000;
    loop {
        sql.run(&format!("INSERT INTO unwatched SELECT generate_series(1, {rows})")).await;
        sql.run("SELECT pg_create_logical_replication_slot('probe', 'pgoutput')").await;
        sql.run(REWRITE).await;
        let began = Instant::now();
        let decode = "SELECT count(*) FROM pg_logical_slot_peek_binary_changes('probe', NULL, NULL, \
                      'proto_version', '1', 'publication_names', 'tuplewatch')";
        sql.value(decode).await;
        sql.run("SELECT pg_drop_replication_slot('probe')").await;
        if began.elapsed() > least {
            return rows;
        }
        sql.run("TRUNCATE unwatched").await;
        // A large transaction takes more than its share, because the server writes it to disk.
        rows *= 2;
    }
}

/// A machine that slept, or a process that was stopped.
#[tokio::test]
async fn a_suspended_process_recovers_and_delays_no_shutdown() {
    let mut postgres = Postgres::start().await;
    let (_proxy, server) = impatient(&postgres).await;
    let (sql, mut stream, _) = server.first_delivered(&postgres, "before").await;

    server.suspend().await;
    sql.insert("t1", "meanwhile").await;
    let since = Instant::now();
    // This also shows that the proxy sets the timeout.
    eventually("the server gives up on it", async || sql.walsender().await.is_none()).await;
    assert!(since.elapsed() < 3 * TIMEOUT, "{:?}", since.elapsed());
    server.resume().await;
    stream.expect(created("meanwhile")).await;
    sql.insert("t1", "after").await;
    stream.expect(created("after")).await;
    server.serving().await;
    assert_eq!(server.times_logged("reconnecting"), 1, "one new session");

    server.suspend().await;
    sql.insert("t1", "last").await;
    drop(sql);
    let took = postgres.stop(StopMode::Fast).await;
    assert!(took < Duration::from_secs(10), "the shutdown took {took:?}");
    server.resume().await;
    postgres.start_again().await;
    stream.expect(created("last")).await;
    stream.expect_silence().await;
}

/// The limit for noticing that the other end is gone.
const NOTICED_WITHIN: Duration = Duration::from_secs(30);

#[tokio::test]
async fn silently_lost_connections_are_detected() {
    let postgres = Postgres::start().await;
    let proxy = Proxy::to_postgres(&postgres.uri()).await;
    let server = Server::serve_through(&proxy, &postgres).await;
    let (sql, mut stream, _) = server.first_delivered(&postgres, "before").await;

    proxy.silence();
    sql.insert("t1", "meanwhile").await;
    let since = Instant::now();
    let is_noticed = async || server.health("").await == Ok(ServingStatus::NotServing);
    eventually("health is NOT_SERVING", is_noticed).await;
    assert!(since.elapsed() < NOTICED_WITHIN, "{:?}", since.elapsed());
    stream.expect_silence().await;
    // Delayed data arrives late and is ignored.
    proxy.restore();
    server.serving().await;
    sql.insert("t1", "after").await;
    stream.expect(created("meanwhile")).await;
    stream.expect(created("after")).await;
    stream.expect_silence().await;
}

/// A firewall forgets the connections. The server keeps its end, and with it the slot, until it notices too.
#[tokio::test]
async fn connections_forgotten_by_a_firewall_are_replaced() {
    let postgres = Postgres::start().await;
    let proxy = Proxy::to_postgres(&postgres.uri()).await;
    let server = Server::serve_through(&proxy, &postgres).await;
    let (sql, mut stream, _) = server.first_delivered(&postgres, "before").await;
    let walsender = sql.walsender().await.expect("a session");

    proxy.strand();
    let since = Instant::now();
    sql.insert("t1", "meanwhile").await;
    stream.expect(created("meanwhile")).await;
    assert!(since.elapsed() < NOTICED_WITHIN, "{:?}", since.elapsed());
    assert_ne!(sql.walsender().await, Some(walsender), "another session");
    server.serving().await;
    // Late data of the old connections is ignored.
    proxy.restore();
    sql.insert("t1", "after").await;
    stream.expect(created("after")).await;
    stream.expect_silence().await;
}
