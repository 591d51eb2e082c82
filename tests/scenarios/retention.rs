//! Retention, for busy and quiet tenants (hazard 41).
//!
//! Busy tenants fill the log. A tenant without recent changes has missed nothing, and resumes however much history of the others is
//! dropped. A token is too old only if changes of its tenant were dropped.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::{Stream, metadata, reason};
use crate::support::wait::eventually;
use crate::support::writer::add_tenants;
use std::time::{Duration, Instant};
use tonic::{Code, Status};

fn assert_too_old(status: &Status) {
    assert_eq!(reason(status), (Code::OutOfRange, "SNAP_TOKEN_TOO_OLD".into()), "{status:?}");
}

/// Tenants with one change or none, from before the others got busy, and their tokens.
struct Quiet {
    /// The token from before its only change.
    before_change: String,
    after_change: String,
    never_any_change: String,
}

impl Quiet {
    async fn begin(server: &Server, sql: &Sql) -> Self {
        let before_change = sql.value("SELECT tuplewatch.snap_token()").await;
        let mut stream = server.watch("t2", &before_change).await;
        sql.insert("t2", "only").await;
        let after_change = stream.expect(Change::created("only")).await.token;
        Self { before_change, after_change: after_change.clone(), never_any_change: after_change }
    }

    /// Checks that the tokens resume. To be called when the history from that time is dropped. Inserts the last of `ids`; earlier calls
    /// have inserted the others.
    async fn check(&self, server: &Server, sql: &Sql, ids: &[&str]) {
        let mut streams = [
            server.watch("t2", &self.after_change).await,
            server.watch("t3", &self.never_any_change).await,
            // Resolves to its floor, because its transaction is forgotten.
            server.watch("t3", &self.before_change).await,
        ];
        for tenant in ["t2", "t3"] {
            sql.insert(tenant, ids.last().unwrap()).await;
        }
        for stream in &mut streams {
            for id in ids {
                stream.expect(Change::created(id)).await;
            }
        }
    }
}

/// The numbers of all attributes up to `last`, or until the stream ends with a status.
async fn numbers(stream: &mut Stream, last: u64) -> (Vec<u64>, Option<Status>) {
    let mut numbers = Vec::new();
    while numbers.last() != Some(&last) {
        match stream.try_next().await {
            Ok(message) => numbers.extend(message.changes.iter().map(Change::large_number)),
            Err(status) => return (numbers, Some(status)),
        }
    }
    (numbers, None)
}

/// The numbers after the earliest token, up to `last`. The earliest token changes as long as retention drops history.
async fn from_earliest(server: &Server, too_old: &str, last: u64) -> Vec<u64> {
    let mut found = Vec::new();
    eventually("the earliest token is not too old itself", async || {
        let status = server.try_watch("t1", too_old).await.err().expect("it stays too old");
        assert_too_old(&status);
        let earliest = metadata(&status, "earliest_snap_token");
        let ending;
        (found, ending) = match server.try_watch("t1", &earliest).await {
            Ok(mut stream) => numbers(&mut stream, last).await,
            Err(status) => (Vec::new(), Some(status)),
        };
        ending.iter().for_each(assert_too_old);
        ending.is_none()
    })
    .await;
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retention_by_size_expires_only_tokens_of_busy_tenants() {
    let flags = [("--changelog-retention-size", "64MiB"), ("--changelog-memory-window", "1MiB")];
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &flags).await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    let quiet = Quiet::begin(&server, &sql).await;
    let mut busy = server.watch("t1", "").await;
    // Connected before everything, and not reading.
    let mut behind = server.watch("t1", "").await;
    sql.insert_large("t1", 1..=1).await;
    let token = busy.next().await.token;

    const BATCH: u64 = 10_000;
    let mut last = 1;
    let status = loop {
        sql.insert_large("t1", last + 1..=last + BATCH).await;
        last += BATCH;
        // A delivered change is in the log.
        while busy.next().await.changes.last().unwrap().large_number() != last {}
        if let Err(status) = server.try_watch("t1", &token).await {
            break status;
        }
        assert!(last < 50 * BATCH, "the log grows and grows");
    };
    assert_too_old(&status);

    // The slow stream gets a continuous beginning, and a status at its end.
    let (had, status) = numbers(&mut behind, last).await;
    let status = status.expect("what comes next is gone");
    assert_too_old(&status);
    let had_last = had.len() as u64;
    assert!(had_last > 0 && had.into_iter().eq(1..=had_last), "whole up to there");
    for is_same_process in [true, false] {
        let rest = from_earliest(&server, &token, last).await;
        let first = rest[0];
        assert!(first > had_last && first < last, "from {first}, of {last}");
        assert!(rest.into_iter().eq(first..=last), "whole after the earliest token");
        quiet.check(&server, &sql, if is_same_process { &["again"] } else { &["again", "still"] }).await;
        if is_same_process {
            // The change after this token is dropped. For the other tenants nothing followed it.
            assert_too_old(&server.try_watch("t2", &quiet.before_change).await.err().unwrap());
            server.kill_and_restart().await;
        }
    }
}

/// Nothing is dropped before its time, and everything soon after. The shortest retention that the configuration allows is a minute.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retention_by_age_expires_only_tokens_of_busy_tenants() {
    const AGE: Duration = Duration::from_secs(60);
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[("--changelog-retention-age", "60s")]).await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    let quiet = Quiet::begin(&server, &sql).await;
    let mut busy = server.watch("t1", "").await;
    sql.insert_large("t1", 1..=1).await;
    let token = busy.next().await.token;
    sql.insert_large("t1", 2..=2).await;
    busy.next().await;
    let began = Instant::now();

    let mut last = 2;
    let status = loop {
        // The log is never idle.
        tokio::time::sleep(Duration::from_millis(250)).await;
        last += 1;
        sql.insert_large("t1", last..=last).await;
        if let Err(status) = server.try_watch("t1", &token).await {
            break status;
        }
        assert!(began.elapsed() < 2 * AGE, "kept for {:?}", began.elapsed());
    };
    let kept = began.elapsed();
    // A segment lasts a sixteenth of the time, and retention runs every 5 s. Times are stored in whole seconds.
    let least = AGE - Duration::from_secs(1);
    assert!((least..AGE + AGE / 3).contains(&kept), "kept for {kept:?}");
    assert_too_old(&status);
    let rest = from_earliest(&server, &token, last).await;
    let first = rest[0];
    assert!(first > 2 && rest.into_iter().eq(first..=last), "whole after the earliest token, {first}");
    let (all, _) = numbers(&mut busy, last).await;
    assert!(all.into_iter().eq(3..=last), "the stream that was read has everything");
    assert_too_old(&server.try_watch("t2", &quiet.before_change).await.err().unwrap());
    quiet.check(&server, &sql, &["later"]).await;
}
