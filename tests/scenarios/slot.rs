//! The slot has changed: it was moved, recreated, invalidated or dropped, or another program holds it.
//!
//! PostgreSQL does not report the first two. START_REPLICATION from before the slot's position silently starts at that position, and
//! skips the transactions in between. So they must become gaps for every tenant. A lost slot is an error that somebody has to repair, and
//! retries do not help. Only one program may read a slot: a node that waits for it must not push another one away, and must not wait for
//! a walsender of its own dead process.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::proxy::Proxy;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::{Stream, changes, metadata, reason};
use crate::support::wait::{eventually, within};
use std::time::{Duration, Instant};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

const CREATE: &str = "SELECT pg_create_logical_replication_slot('tuplewatch', 'pgoutput')";
const DROP: &str = "SELECT pg_drop_replication_slot('tuplewatch')";
/// The printed remedy.
const REMEDY: &str = "tuplewatch setup --recreate-slot";

fn created(id: &str) -> Change {
    Change::created(id)
}

/// The stream must end with this gap, after exactly these changes. Returns the token after the gap.
async fn gaps(stream: &mut Stream, before: &[&str]) -> String {
    let (messages, status) = stream.ending().await;
    let before: Vec<Change> = before.iter().map(|id| created(id)).collect();
    assert_eq!(changes(&messages), before, "what was before the gap, and nothing of what was lost or comes later");
    assert_eq!(reason(&status), (Code::Aborted, "SLOT_MOVED".into()), "{status:?}");
    metadata(&status, "next_snap_token")
}

/// Waits until the slot is not active.
async fn is_free(sql: &Sql) {
    eventually("the slot is free", async || sql.walsender().await.is_none()).await;
}

/// Ends the session on the server's side, while its client does not notice.
async fn disconnect(sql: &Sql) {
    sql.rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'tuplewatch%'").await;
    is_free(sql).await;
}

/// Writes until the slot is invalidated. The slot must not be active.
async fn lose(sql: &Sql) {
    let is_lost = "EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = 'tuplewatch' AND wal_status = 'lost')";
    eventually("the slot is lost", async || {
        sql.run("SELECT pg_logical_emit_message(true, 'other', 'x')").await;
        sql.run("SELECT pg_switch_wal()").await;
        sql.run("CHECKPOINT").await;
        sql.is_true(is_lost).await
    })
    .await;
}

async fn is_not_serving(server: &Server) -> bool {
    server.health("").await == Ok(ServingStatus::NotServing)
}

/// The slot is advanced, or dropped and created again.
#[tokio::test]
async fn a_slot_moved_during_downtime_is_a_gap_for_every_tenant() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    sql.run("INSERT INTO tuplewatch.tenants (id, name) VALUES ('quiet', '')").await;
    let mut stream = server.watch("t1", "").await;
    // A token from before everything.
    let start = async || {
        sql.run("BEGIN").await;
        let token = sql.value("SELECT tuplewatch.snap_token()").await;
        sql.run("COMMIT").await;
        token
    };
    let advance = "SELECT pg_replication_slot_advance('tuplewatch', pg_current_wal_insert_lsn())";
    for (n, somebody) in [&[advance][..], &[DROP, CREATE]].into_iter().enumerate() {
        let early = start().await;
        let before = format!("before{n}");
        sql.insert("t1", &before).await;
        let token = stream.expect(created(&before)).await.token;
        // Otherwise it would lie in the gap, because the slot does not send it again.
        sql.until_recorded("tuplewatch").await;
        server.kill_9().await;
        is_free(&sql).await;
        sql.insert("t1", &format!("lost{n}")).await;
        for statement in somebody {
            sql.run(statement).await;
        }
        let after = format!("after{n}");
        sql.insert("t1", &after).await;
        server.start().await;
        server.serving().await;

        // Every earlier token gets the gap, at every attempt.
        for _ in ["in this process", "in the next"] {
            let next = gaps(&mut server.watch("t1", &token).await, &[]).await;
            gaps(&mut server.watch("t1", &early).await, &[&before]).await;
            gaps(&mut server.watch("quiet", &early).await, &[]).await;
            stream = server.watch("t1", &next).await;
            stream.expect(created(&after)).await;
            server.kill_and_restart().await;
        }
        assert_eq!(
            server.times_logged("a gap in the stream: the replication slot had moved on"),
            n + 1,
            "logged once each"
        );
        stream = server.watch("t1", "").await;
    }
}

#[tokio::test]
async fn a_slot_recreated_during_a_disconnect_is_a_gap_for_open_streams() {
    let postgres = Postgres::start().await;
    let proxy = Proxy::to_postgres(&postgres.uri()).await;
    let server = Server::serve_through(&proxy, &postgres).await;
    let (sql, mut stream, token) = server.first_delivered(&postgres, "before").await;

    proxy.silence();
    disconnect(&sql).await;
    sql.run(DROP).await;
    sql.insert("t1", "lost").await;
    sql.run(CREATE).await;
    sql.insert("t1", "after").await;
    proxy.cut();

    let next = gaps(&mut stream, &[]).await;
    assert_eq!(gaps(&mut server.watch("t1", &token).await, &[]).await, next);
    server.watch("t1", &next).await.expect(created("after")).await;
    let lsn = sql.flushed().await;
    eventually("acknowledgement continues", async || sql.confirmed_reaches(&lsn).await).await;
}

/// The server has invalidated the slot, or the slot is missing. The remedy is to recreate it.
#[tokio::test]
async fn a_lost_slot_is_a_lasting_error() {
    let postgres = Postgres::with(&[("max_slot_wal_keep_size", "1MB")]).await;
    check_lost(&postgres, lose, "is lost").await;
}

#[tokio::test]
async fn a_slot_past_its_idle_timeout_is_a_lasting_error() {
    let postgres = Postgres::start().await;
    if postgres.major() < 18 {
        // Without this timeout the slot stays valid.
        let sql = postgres.sql().await;
        assert!(sql.simple_query("SHOW idle_replication_slot_timeout").await.is_err());
        return;
    }
    check_lost(&postgres, idle, "is lost (idle_timeout)").await;
}

#[tokio::test]
async fn a_missing_slot_is_a_lasting_error() {
    let postgres = Postgres::start().await;
    check_lost(&postgres, async |sql: &Sql| sql.run(DROP).await, "does not exist").await;
}

/// Waits until the slot is invalidated by its idle timeout. The slot must not be active.
async fn idle(sql: &Sql) {
    // The unit was minutes in the betas of version 18, which would round this to zero.
    sql.run("ALTER SYSTEM SET idle_replication_slot_timeout = '1s'").await;
    sql.run("SELECT pg_reload_conf()").await;
    let reason = "COALESCE((SELECT invalidation_reason FROM pg_replication_slots WHERE slot_name = 'tuplewatch'), '')";
    eventually("the slot is invalidated", async || {
        sql.run("CHECKPOINT").await;
        sql.value(&format!("SELECT {reason}")).await == "idle_timeout"
    })
    .await;
    sql.run("ALTER SYSTEM RESET idle_replication_slot_timeout").await;
    sql.run("SELECT pg_reload_conf()").await;
}

/// Calls `lose` while the slot is not active: once while tuplewatch is disconnected, and once while it is down.
async fn check_lost(postgres: &Postgres, lose: impl AsyncFn(&Sql), expected: &str) {
    let proxy = Proxy::to_postgres(&postgres.uri()).await;
    let mut server = Server::serve_through(&proxy, postgres).await;
    let (sql, mut stream, token) = server.first_delivered(postgres, "before").await;

    proxy.silence();
    disconnect(&sql).await;
    sql.insert("t1", "lost").await;
    lose(&sql).await;
    proxy.cut();
    let noticed = Instant::now();
    server.until_logged(expected).await;
    assert!(noticed.elapsed() < Duration::from_secs(10), "{:?}", noticed.elapsed());
    server.until_logged(REMEDY).await;
    assert!(is_not_serving(&server).await);
    // Lasting errors are retried every 15 s or so. A transient one would be retried a dozen times in this time.
    let before = proxy.accepted();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(proxy.accepted() - before <= 4, "{} connections", proxy.accepted() - before);
    assert_eq!(server.times_logged("until this is repaired"), 1, "logged once");
    assert!(is_not_serving(&server).await);

    // The remedy. The process notices it by itself.
    server.setup(&["--recreate-slot"]).await;
    sql.insert("t1", "after").await;
    let next = gaps(&mut stream, &[]).await;
    server.serving().await;
    let mut stream = server.watch("t1", &next).await;
    let last = stream.expect(created("after")).await.token;
    gaps(&mut server.watch("t1", &token).await, &[]).await;

    // A new process is refused with the same words.
    server.terminate().await;
    assert!(server.ended().await.success());
    is_free(&sql).await;
    sql.insert("t1", "lost2").await;
    lose(&sql).await;
    server.refuses_to_start(expected).await;
    server.refuses_to_start(REMEDY).await;
    server.setup(&["--recreate-slot"]).await;
    sql.insert("t1", "after2").await;
    server.start().await;
    let next = gaps(&mut server.watch("t1", &last).await, &[]).await;
    server.watch("t1", &next).await.expect(created("after2")).await;
}

/// The holder of the slot is left alone, and logged once.
async fn waits_for(server: &Server, proxy: &Proxy, sql: &Sql) {
    let holder = sql.walsender().await.expect("somebody who holds the slot");
    let pid = format!(" {}", holder.0);
    eventually("the holder of the slot is logged", async || server.times_logged(&pid) > 0).await;
    // Each attempt makes two connections.
    let before = proxy.accepted();
    eventually("it tries several times more", async || proxy.accepted() >= before + 6).await;
    assert!(server.times_logged(&pid) <= 2, "logged once by the session, and once by the slot's monitor");
    assert!(is_not_serving(server).await);
    assert_eq!(sql.walsender().await, Some(holder), "the holder keeps the slot");
}

/// Attempts are at most 12 s apart.
const TAKEN_OVER_WITHIN: Duration = Duration::from_secs(14);

#[tokio::test]
async fn a_slot_held_by_another_node_is_taken_over_when_free() {
    let postgres = Postgres::start().await;
    let mut first = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let proxy = Proxy::to_postgres(&postgres.uri()).await;
    let mut second = Server::prepare_slot(&proxy.uri(&postgres.uri()), "tuplewatch", &[]).await;
    let mut stream = first.watch("t1", "").await;
    sql.insert("t1", "before").await;
    let token = stream.expect(created("before")).await.token;

    second.start().await;
    waits_for(&second, &proxy, &sql).await;
    sql.insert("t1", "undisturbed").await;
    stream.expect(created("undisturbed")).await;
    first.terminate().await;
    assert!(first.ended().await.success());
    let since = Instant::now();
    second.serving().await;
    assert!(since.elapsed() < TAKEN_OVER_WITHIN, "{:?}", since.elapsed());

    // Each node has its own log, so the changes that the second reads are missing in the log of the first.
    let mut taken_over = second.watch("t1", "").await;
    sql.insert("t1", "elsewhere").await;
    taken_over.expect(created("elsewhere")).await;
    sql.until_recorded("tuplewatch").await;
    second.kill_9().await;
    first.start().await;
    let next = gaps(&mut first.watch("t1", &token).await, &["undisturbed"]).await;
    first.serving().await;
    sql.insert("t1", "after").await;
    first.watch("t1", &next).await.expect(created("after")).await;
}

/// Any other client, whatever its application name.
#[tokio::test]
async fn a_slot_held_by_another_program_is_taken_over_when_free() {
    let postgres = Postgres::start().await;
    let proxy = Proxy::to_postgres(&postgres.uri()).await;
    let server = Server::serve_through(&proxy, &postgres).await;
    let (sql, mut stream, token) = server.first_delivered(&postgres, "before").await;
    let lsn = sql.flushed().await;
    eventually("the delivered change is acknowledged", async || sql.confirmed_reaches(&lsn).await).await;

    proxy.silence();
    disconnect(&sql).await;
    let mut stranger = postgres.stranger("tuplewatch").await;
    sql.insert("t1", "meanwhile").await;
    // It reads, and acknowledges nothing.
    within("the stranger reads", stranger.recv()).await.unwrap();
    proxy.cut();
    waits_for(&server, &proxy, &sql).await;
    stream.expect_silence().await;
    stranger.abort();
    is_free(&sql).await;
    let since = Instant::now();
    server.serving().await;
    assert!(since.elapsed() < TAKEN_OVER_WITHIN, "{:?}", since.elapsed());
    stream.expect(created("meanwhile")).await;
    server.watch("t1", &token).await.expect(created("meanwhile")).await;
}

/// The connection outlives the process, for example because a machine vanished. The server would wait for `wal_sender_timeout`.
#[tokio::test]
async fn a_walsender_left_by_a_dead_process_is_ended() {
    let postgres = Postgres::start().await;
    let proxy = Proxy::to_postgres(&postgres.uri()).await;
    let mut server = Server::serve_through(&proxy, &postgres).await;
    let (sql, _stream, token) = server.first_delivered(&postgres, "before").await;

    proxy.strand();
    server.kill_9().await;
    sql.insert("t1", "meanwhile").await;
    let (left_behind, _) = sql.walsender().await.expect("the server has not noticed");
    server.start().await;
    let since = Instant::now();
    server.serving().await;
    // Its process may live a moment longer than its hold on the slot. Nobody else would have ended it by then.
    let is_gone = format!("NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {left_behind})");
    eventually("the walsender is gone", async || sql.is_true(&is_gone).await).await;
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    server.watch("t1", &token).await.expect(created("meanwhile")).await;
}

/// Warnings before the slot is lost, or the disk of the primary is full.
#[tokio::test]
async fn threats_to_the_slot_are_logged() {
    const WITHIN: Duration = Duration::from_secs(10);
    let postgres = Postgres::with(&[("max_slot_wal_keep_size", "512MB")]).await;
    let flags = [("--replication-warn-retained-wal", "32MiB"), ("--replication-warn-safe-wal-size", "1GiB")];
    let server = Server::serve(&postgres, &flags).await;
    let began = Instant::now();
    server.until_logged("replication.warn.safe_wal_size").await;
    assert!(began.elapsed() < WITHIN, "{:?}", began.elapsed());

    // An open transaction keeps the restart LSN of the slot, whatever is acknowledged.
    let (open, sql) = (postgres.sql().await, postgres.sql().await);
    open.run("BEGIN; SELECT pg_current_xact_id()").await;
    assert!(!server.has_logged("replication.warn.retained_wal"));
    sql.run("CREATE TABLE busy AS SELECT n, repeat('x', 500) FROM generate_series(1, 100000) n").await;
    let written = Instant::now();
    server.until_logged("replication.warn.retained_wal").await;
    assert!(written.elapsed() < WITHIN, "{:?}", written.elapsed());
    open.run("COMMIT").await;
    eventually("it is over", async || {
        sql.run("CHECKPOINT").await;
        server.has_logged("keeps less WAL again")
    })
    .await;
    assert_eq!(server.times_logged("replication.warn.retained_wal"), 1, "logged once");
    server.serving().await;
}
