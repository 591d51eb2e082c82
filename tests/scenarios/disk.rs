//! The disk of the change log fills up (hazard 20).
//!
//! The log is a copy, and others often use the same disk. So the oldest history is dropped before the disk is full. If none is left to
//! drop, the session releases the slot, because a walsender that waits for an impossible acknowledgement would delay every shutdown of
//! PostgreSQL. Nothing is lost, because PostgreSQL keeps the WAL meanwhile.

use crate::support::change::Change;
use crate::support::disk::Disk;
use crate::support::postgres::Postgres;
use crate::support::reference;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::{Message, Stream, changes, metadata, reason};
use crate::support::wait::{eventually, within};
use crate::support::writer::{Habits, Writers, add_tenants, seed};
use std::time::Duration;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tuplewatch::dev_postgres::StopMode;

const MIB: u64 = 1 << 20;

/// Logged when there is no history left to drop.
const FULL: &str = "the disk of the change log is full up to changelog.disk_reserve";

/// Whether the slot is active.
async fn is_read(sql: &Sql) -> bool {
    sql.is_true("(SELECT active FROM pg_replication_slots WHERE slot_name = 'tuplewatch')").await
}

/// The number of segments of the log.
fn segments(server: &Server) -> usize {
    std::fs::read_dir(server.changelog().join("data/keyspaces")).unwrap().count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_oldest_history_is_dropped_to_keep_the_reserve() {
    let postgres = Postgres::start().await;
    let mut disk = Disk::new().await;
    // Segments of 8 MiB. The window is small, so that dropped history is not in memory either.
    let flags = [("--changelog-retention-size", "128MiB"), ("--changelog-memory-window", "1MiB")];
    let mut server = disk.serve(&postgres, &flags).await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    let mut live = server.watch("t2", "").await;
    let mut reader = server.watch("t1", "").await;
    sql.insert("t1", "first").await;
    let mut tokens = vec![reader.expect(Change::created("first")).await.token];
    // More than a write buffer each, so that some data is on disk.
    const BATCH: u64 = 12_000;
    for n in 0..3 {
        let before = segments(&server);
        sql.insert_large("t1", n * BATCH + 1..=(n + 1) * BATCH).await;
        tokens.push(last_of(&mut reader, (n + 1) * BATCH).await.token);
        eventually("the log begins another segment", async || segments(&server) > before).await;
    }
    drop(reader);

    // The journals are removed first, which loses nothing, then only the oldest segment.
    eventually("the oldest segment is dropped", async || {
        disk.leave_below_reserve(4 * MIB);
        server.try_watch("t1", &tokens[0]).await.is_err()
    })
    .await;
    let status = server.try_watch("t1", &tokens[0]).await.err().unwrap();
    assert_eq!(reason(&status), (Code::OutOfRange, "SNAP_TOKEN_TOO_OLD".into()));
    let earliest = metadata(&status, "earliest_snap_token");
    for is_same_process in [true, false] {
        // All other history is there.
        for (after, token) in [(1, &tokens[1]), (2, &tokens[2])] {
            let messages = numbered(&mut server.watch("t1", token).await, 3 * BATCH).await;
            assert!(messages.into_iter().eq(after * BATCH + 1..=3 * BATCH), "whole after batch {after}");
        }
        let rest = numbered(&mut server.watch("t1", &earliest).await, 3 * BATCH).await;
        let first = rest[0];
        assert!(first <= BATCH + 1, "from {first}");
        assert!(rest.into_iter().eq(first..=3 * BATCH), "whole after the earliest token");
        // Delivery continues.
        assert!(!server.has_logged("is full"));
        assert!(is_read(&sql).await);
        sql.insert("t2", if is_same_process { "still" } else { "again" }).await;
        if is_same_process {
            live.expect(Change::created("still")).await;
            server.kill_and_restart().await;
        }
    }
}

/// Reads up to the attribute with this number.
async fn last_of(stream: &mut Stream, number: u64) -> Message {
    loop {
        let message = stream.next().await;
        if message.changes.last().unwrap().large_number() == number {
            return message;
        }
    }
}

/// The numbers of the attributes up to this one.
async fn numbered(stream: &mut Stream, last: u64) -> Vec<u64> {
    let mut numbers = Vec::new();
    while numbers.last() != Some(&last) {
        numbers.extend(stream.next().await.changes.iter().map(Change::large_number));
    }
    numbers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_releases_the_slot_and_loses_nothing() {
    let mut postgres = Postgres::start().await;
    let mut disk = Disk::new().await;
    let mut server = disk.serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    reference::begin(&sql).await;
    let mut stream = server.watch("t1", "").await;
    let mut received: Vec<Message> = Vec::new();
    let is_patient = Habits { is_patient: true, ..Habits::default() };
    let writers = Writers::start(&postgres.uri(), 2, seed(), is_patient);
    while received.len() < 100 {
        received.push(stream.next().await);
    }

    // Far more than the whole log.
    eventually("the slot is released", async || {
        disk.leave_below_reserve(200 * MIB);
        !is_read(&sql).await
    })
    .await;
    server.not_ready("disk_full", "the disk of the change log is full").await;
    server.until_logged(FULL).await;
    let before = writers.committed();
    eventually("more is written", async || writers.committed() > before + 50).await;
    // Received changes are delivered. The stream stays open, and a new one opens.
    drain(&mut stream, &mut received).await;
    let mut now = server.watch("t1", "").await;
    now.expect_silence().await;
    // A shutdown of PostgreSQL is not delayed, and a restart changes nothing.
    drop(sql);
    let took = postgres.stop(StopMode::Fast).await;
    assert!(took < Duration::from_secs(5), "a fast shutdown took {took:?}");
    postgres.start_again().await;
    let sql = postgres.sql().await;
    assert!(!is_read(&sql).await);
    drain(&mut stream, &mut received).await;
    assert_eq!(server.times_logged(FULL), 1, "logged once");
    assert_eq!(server.health("").await, Ok(ServingStatus::NotServing));

    disk.give_room();
    server.serving().await;
    assert!(is_read(&sql).await);
    server.until_logged("has room again").await;
    let more = received.len() + 100;
    while received.len() < more {
        received.push(stream.next().await);
    }
    now.next().await;

    // Once more, and now the process ends while the disk is full: first killed, then terminated.
    eventually("the slot is released", async || {
        disk.leave_below_reserve(200 * MIB);
        !is_read(&sql).await
    })
    .await;
    eventually("the full disk is logged again", async || server.times_logged(FULL) == 2).await;
    drain(&mut stream, &mut received).await;
    server.kill_9().await;
    for times in [3, 4] {
        server.start().await;
        eventually("the full disk is logged", async || server.times_logged(FULL) == times).await;
        assert_eq!(server.health("").await, Ok(ServingStatus::NotServing));
        assert!(!is_read(&sql).await);
        // It resumes at once, or later if the stream was ahead of the log, which needs PostgreSQL.
        match server.try_watch("t1", &received.last().unwrap().token).await {
            Ok(mut stream) => drain(&mut stream, &mut received).await,
            Err(status) => assert_eq!(reason(&status), (Code::Unavailable, "POSTGRES_UNREACHABLE".into())),
        }
        if times == 3 {
            server.terminate().await;
            let exit = within("it does not wait for room", server.ended()).await;
            assert_eq!(exit.code(), Some(0));
        }
    }
    disk.give_room();
    server.serving().await;
    let mut stream = server.watch("t1", &received.last().unwrap().token).await;
    writers.stop().await;
    let last = Change::created("end");
    sql.insert("t1", "end").await;
    received.extend(stream.up_to(&last).await);
    let transactions = reference::read(&sql).await;
    let expected = reference::of_tenant(&transactions, "t1");
    assert!(changes(&received) == expected, "everything once: {} of {}", changes(&received).len(), expected.len());
    assert!(!server.has_logged("panicked"));
}

/// Reads the messages that have arrived.
async fn drain(stream: &mut Stream, received: &mut Vec<Message>) {
    while let Ok(next) = tokio::time::timeout(Duration::from_millis(200), stream.try_next()).await {
        received.push(next.expect("the stream stays open"));
    }
}
