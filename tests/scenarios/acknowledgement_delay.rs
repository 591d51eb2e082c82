//! A node that lost its disk gets the unacknowledged changes again, and tokens from that time resume.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::{metadata, reason};
use crate::support::wait::eventually;
use std::time::Duration;
use tonic::Code;
use tuplewatch::dev_postgres::StopMode;

const FLAGS: [(&str, &str); 2] =
    [("--replication-acknowledgement-delay-age", "1h"), ("--replication-acknowledgement-delay-size", "8MiB")];

/// Writes this much WAL without changes for tuplewatch.
async fn write_mib(sql: &Sql, mib: usize) {
    for _ in 0..10 * mib {
        sql.run("SELECT pg_logical_emit_message(false, 'other', repeat('x', 104858))").await;
    }
}

#[tokio::test]
async fn a_node_that_lost_its_log_gets_unacknowledged_changes_again() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &FLAGS).await;
    let (sql, mut stream, early) = server.first_delivered(&postgres, "early").await;
    let after_early = sql.flushed().await;
    write_mib(&sql, 9).await;
    eventually("the excess over the size is acknowledged", async || sql.confirmed_reaches(&after_early).await).await;

    sql.insert("t1", "one").await;
    let one = stream.expect(Change::created("one")).await.token;
    sql.run("BEGIN").await;
    let written = sql.value("SELECT tuplewatch.snap_token()").await;
    sql.insert("t1", "two").await;
    sql.run("COMMIT").await;
    stream.expect(Change::created("two")).await;
    sql.insert("t1", "three").await;
    let three = stream.expect(Change::created("three")).await.token;

    server.kill_9().await;
    std::fs::remove_dir_all(server.changelog()).unwrap();
    sql.insert("t1", "four").await;
    server.start().await;
    server.serving().await;
    server.until_logged("the change log begins where the slot is").await;

    // Tokens of unacknowledged changes resume.
    for (token, rest) in [(&one, &["two", "three", "four"][..]), (&written, &["three", "four"]), (&three, &["four"])] {
        let mut stream = server.watch("t1", token).await;
        for id in rest {
            stream.expect(Change::created(id)).await;
        }
    }
    // An older token is refused with the earliest one that works.
    let status = server.try_watch("t1", &early).await.err().expect("refused");
    assert_eq!(reason(&status), (Code::OutOfRange, "SNAP_TOKEN_TOO_OLD".into()));
    let mut stream = server.watch("t1", &metadata(&status, "earliest_snap_token")).await;
    for id in ["one", "two", "three", "four"] {
        stream.expect(Change::created(id)).await;
    }
}

/// The delay survives an orderly stop too, because a failed upgrade begins with one.
#[tokio::test]
async fn a_stop_keeps_the_delay_and_age_ends_it_without_traffic() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &FLAGS).await;
    let (sql, _, token) = server.first_delivered(&postgres, "early").await;
    let delivered = sql.flushed().await;
    sql.insert("t1", "late").await;
    server.terminate().await;
    assert!(server.ended().await.success());
    assert!(!sql.confirmed_reaches(&delivered).await);

    server.set("--replication-acknowledgement-delay-age", "1s");
    server.start().await;
    eventually("the old position is acknowledged", async || sql.confirmed_reaches(&delivered).await).await;
    // The repeated changes are not delivered again.
    let mut stream = server.watch("t1", &token).await;
    stream.expect(Change::created("late")).await;
    stream.expect_silence().await;
}

/// A shutdown of PostgreSQL waits until everything is acknowledged, which the delay prevents.
#[tokio::test]
async fn the_delay_does_not_hold_up_a_shutdown_of_postgresql() {
    let mut postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &FLAGS).await;
    let (sql, mut stream, _) = server.first_delivered(&postgres, "before").await;
    drop(sql);
    let took = postgres.stop(StopMode::Fast).await;
    assert!(took < Duration::from_secs(4), "the shutdown took {took:?}");
    postgres.start_again().await;
    server.serving().await;
    postgres.sql().await.insert("t1", "after").await;
    stream.expect(Change::created("after")).await;
}
