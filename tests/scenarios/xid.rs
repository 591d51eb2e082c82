//! Transaction ids and LSNs at the ends of their ranges, and reused ids.
//!
//! pgoutput carries 32 of the 64 bits of a transaction id. PostgreSQL is asked about visible transactions, and about the transaction of a
//! token, by the full id. A wrongly widened id would never be visible, and would block all later transactions. Not even the full id is
//! unique: a transaction that is lost in a crash leaves its id to another one.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::reference;
use crate::support::reset_wal::reset_wal;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::changes;
use crate::support::wait::eventually;
use crate::support::writer::{TENANTS, add_tenants};
use std::collections::HashMap;
use tokio::process::Command;
use tuplewatch::dev_postgres::StopMode;
use tuplewatch::model::lsn::Lsn;
use tuplewatch::model::snap_token::SnapToken;

/// The first xid8 with an upper half of 1.
const EPOCH: u64 = 1 << 32;
/// Ids on a page of pg_xact.
const XIDS_PER_PAGE: u64 = 32_768;

async fn next_xid(sql: &Sql) -> u64 {
    sql.value("SELECT pg_snapshot_xmax(pg_current_snapshot())").await.parse().unwrap()
}

/// The token of the transaction that writes this, and its id.
async fn insert_with_token(sql: &Sql, tenant: &str, id: &str) -> (String, u64) {
    sql.run("BEGIN").await;
    sql.insert(tenant, id).await;
    let token = sql.value("SELECT tuplewatch.snap_token()").await;
    let xid = sql.value("SELECT pg_current_xact_id()").await.parse().unwrap();
    sql.run("COMMIT").await;
    (token, xid)
}

/// A cluster whose next transaction ids are `left` below the boundary.
async fn near_the_end_of_the_epoch(settings: &[(&str, &str)], left: u64) -> Postgres {
    let mut postgres = Postgres::with(settings).await;
    // Old ids are then unused, as in a cluster that reached this point by itself.
    for database in ["postgres", "template1"] {
        Sql::connect(&postgres.uri_of(database)).await.run("VACUUM (FREEZE)").await;
    }
    postgres.stop(StopMode::Fast).await;
    reset_wal(&postgres.pgdata(), Some(EPOCH - XIDS_PER_PAGE), None);
    postgres.start_again().await;
    let sql = postgres.sql().await;
    let count = XIDS_PER_PAGE - left;
    sql.run(&format!("DO $$ BEGIN FOR n IN 1..{count} LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$"))
        .await;
    let next = next_xid(&sql).await;
    assert!((EPOCH - left - 10..EPOCH).contains(&next), "{next}");
    postgres
}

#[tokio::test]
async fn a_backlog_across_the_epoch_boundary_is_complete_and_in_order() {
    const LEFT: u64 = 600;
    let postgres = near_the_end_of_the_epoch(&[("max_prepared_transactions", "2")], LEFT).await;
    let mut server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    reference::begin(&sql).await;
    let mut first = HashMap::new();
    for tenant in TENANTS {
        let mut stream = server.watch(tenant, "").await;
        sql.insert(tenant, "first").await;
        first.insert(tenant, stream.expect(Change::created("first")).await.token);
    }
    server.terminate().await;
    assert!(server.ended().await.success());

    // Open from before the boundary until after it: a plain transaction, one with subtransactions, and a prepared one.
    let (open, nested) = (postgres.sql().await, postgres.sql().await);
    open.run("BEGIN").await;
    open.insert("t1", "open").await;
    nested.run("BEGIN").await;
    nested.insert("t2", "nested").await;
    sql.run("BEGIN").await;
    sql.insert("t3", "prepared").await;
    sql.run("PREPARE TRANSACTION 'p'").await;
    let mut tokens = Vec::new();
    let mut n = 0;
    while next_xid(&sql).await < EPOCH + 100 {
        let tenant = TENANTS[n % TENANTS.len()];
        let id = format!("d{n}");
        if n % 50 == 0 {
            nested.run("SAVEPOINT s").await;
            nested.insert("t2", &format!("nested{n}")).await;
            nested.run("RELEASE SAVEPOINT s").await;
            let (token, xid) = insert_with_token(&sql, tenant, &id).await;
            tokens.push((tenant, id, token, xid));
        } else {
            sql.insert(tenant, &id).await;
        }
        n += 1;
    }
    open.insert("t1", "open2").await;
    let open_token = open.value("SELECT tuplewatch.snap_token()").await;
    open.run("COMMIT").await;
    nested.run("COMMIT").await;
    sql.run("COMMIT PREPARED 'p'").await;
    let (last, xid) = insert_with_token(&sql, "t1", "last").await;
    tokens.push(("t1", "last".into(), last, xid));
    assert!(tokens[0].3 < EPOCH && xid > EPOCH, "of both sides: {tokens:?}");

    server.start().await;
    server.serving().await;
    let mut ends = Vec::new();
    for tenant in TENANTS {
        ends.push(server.watch(tenant, &first[tenant]).await);
        sql.insert(tenant, "end").await;
    }
    let transactions = reference::read(&sql).await;
    let expected = |tenant: &str, after: &Change| -> Vec<Change> {
        let all = reference::of_tenant(&transactions, tenant);
        let at = all.iter().position(|change| change == after).unwrap();
        all[at + 1..].to_vec()
    };
    // Everything arrives: an id that is never visible would block it.
    for (stream, tenant) in ends.iter_mut().zip(TENANTS) {
        let messages = stream.up_to(&Change::created("end")).await;
        assert_eq!(changes(&messages), expected(tenant, &Change::created("first")));
    }
    for (tenant, id, token, _) in &tokens {
        let messages = server.watch(tenant, token).await.up_to(&Change::created("end")).await;
        assert_eq!(changes(&messages), expected(tenant, &Change::created(id)));
    }
    let messages = server.watch("t1", &open_token).await.up_to(&Change::created("end")).await;
    assert_eq!(changes(&messages), expected("t1", &Change::created("open2")));
    // A start now, with a snapshot that has ids of the new epoch.
    let mut now = server.watch("t1", "").await;
    sql.insert("t1", "now").await;
    now.expect(Change::created("now")).await;
}

/// The boundary is crossed while everything runs.
#[tokio::test]
async fn a_stream_crosses_the_epoch_boundary() {
    let postgres = near_the_end_of_the_epoch(&[], 100).await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let mut stream = server.watch("t1", "").await;
    let open = postgres.sql().await;
    open.run("BEGIN").await;
    open.insert("t1", "open").await;
    let mut n = 0;
    while next_xid(&sql).await < EPOCH + 50 {
        let (token, xid) = insert_with_token(&sql, "t1", &format!("d{n}")).await;
        stream.expect(Change::created(&format!("d{n}"))).await;
        // Tokens are resolved, and streams start, on both sides of the boundary and across it.
        if n % 10 == 0 || xid.abs_diff(EPOCH) < 5 {
            let (mut after, mut now) = (server.watch("t1", &token).await, server.watch("t1", "").await);
            sql.insert("t1", &format!("next{n}")).await;
            for stream in [&mut stream, &mut after, &mut now] {
                stream.expect(Change::created(&format!("next{n}"))).await;
            }
        }
        n += 1;
    }
    open.run("COMMIT").await;
    stream.expect(Change::created("open")).await;
}

/// From now on WAL is flushed only for commits that wait for it. (An immediate stop of PostgreSQL kills the walwriter after five seconds.)
async fn stop_walwriter(sql: &Sql) {
    let walwriter = sql.value("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'").await;
    let status = Command::new("kill").args(["-STOP", &walwriter]).status().await.unwrap();
    assert!(status.success());
}

/// Commits a visible transaction that the next crash loses, together with some WAL before it. Returns its token and its id.
async fn insert_to_be_lost(sql: &Sql, id: &str) -> (String, u64) {
    stop_walwriter(sql).await;
    sql.run("SET synchronous_commit = off").await;
    sql.run("SELECT pg_logical_emit_message(false, 'padding', repeat('x', 2000))").await;
    let (token, xid) = insert_with_token(sql, "t1", id).await;
    assert!(sql.is_true("pg_current_wal_lsn() < pg_current_wal_insert_lsn()").await, "it is in memory alone");
    (token, xid)
}

#[tokio::test]
async fn a_lost_transactions_token_does_not_match_a_reused_xid() {
    let mut postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    sql.insert("t1", "before").await;
    let (token, lost_xid) = insert_to_be_lost(&sql, "lost").await;
    assert!(sql.facts("t1").await.contains(&Change::viewer("lost")), "it had committed");
    // A marker of tuplewatch must not use its id.
    server.kill_9().await;
    postgres.stop(StopMode::Immediate).await;
    postgres.start_again().await;
    let sql = postgres.sql().await;
    assert!(!sql.facts("t1").await.contains(&Change::viewer("lost")), "and is gone");

    let mut expected = Vec::new();
    use_ids_up_to(lost_xid, &sql, async |id| expected.push(Change::created(&id))).await;
    server.start().await;
    server.serving().await;
    sql.insert("t1", "last").await;
    expected.push(Change::created("last"));
    // Its floor must lie in WAL that survives, because the later commits are at the positions of the lost WAL.
    let messages = server.watch("t1", &token).await.up_to(&Change::created("last")).await;
    assert_eq!(changes(&messages), expected);
}

/// Inserts until the transaction with this id has committed. Calls `each` with every inserted id.
async fn use_ids_up_to(last: u64, sql: &Sql, mut each: impl AsyncFnMut(String)) {
    for n in 0.. {
        sql.run("BEGIN").await;
        sql.insert("t1", &format!("stranger{n}")).await;
        let xid: u64 = sql.value("SELECT pg_current_xact_id()").await.parse().unwrap();
        sql.run("COMMIT").await;
        assert!(xid <= last, "the id of the lost transaction is used again");
        each(format!("stranger{n}")).await;
        if xid == last {
            return;
        }
    }
}

/// A start now reads a state that contains the lost transaction. The later one with its id is not in that state.
#[tokio::test]
async fn a_start_before_a_crash_gets_the_transaction_with_a_reused_xid() {
    let mut postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    sql.insert("t1", "before").await;
    let (_, lost_xid) = insert_to_be_lost(&sql, "lost").await;
    let mut now = server.watch("t1", "").await;
    postgres.stop(StopMode::Immediate).await;
    postgres.start_again().await;
    let sql = postgres.sql().await;
    assert!(!sql.facts("t1").await.contains(&Change::viewer("lost")), "gone");
    use_ids_up_to(lost_xid, &sql, async |id| drop(now.expect(Change::created(&id)).await)).await;
}

/// 2 GiB below the end of all LSNs, which are unsigned.
#[tokio::test]
async fn lsns_near_the_end_of_their_range_work() {
    const HIGH: u64 = 0xFFFF_FFFF_8000_0000;
    let mut postgres = Postgres::start().await;
    postgres.stop(StopMode::Fast).await;
    reset_wal(&postgres.pgdata(), None, Some(HIGH));
    postgres.start_again().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let lsn: Lsn = sql.flushed().await.parse().unwrap();
    assert!(lsn.0 >= HIGH, "{lsn}");

    let mut stream = server.watch("t1", "").await;
    let (transaction, _) = insert_with_token(&sql, "t1", "a").await;
    let position = stream.expect(Change::created("a")).await.token;
    let SnapToken::Position { place: at, .. } = position.parse().unwrap() else { panic!("a position token") };
    assert!(at.position.lsn.0 > HIGH, "{at}");
    sql.insert("t1", "b").await;
    stream.expect(Change::created("b")).await;
    for stop in [None, Some(StopMode::Fast), Some(StopMode::Immediate)] {
        for token in [&transaction, &position] {
            server.watch("t1", token).await.expect(Change::created("b")).await;
        }
        server.kill_9().await;
        if let Some(mode) = stop {
            postgres.stop(mode).await;
            postgres.start_again().await;
        }
        server.start().await;
        server.serving().await;
    }
    let sql = postgres.sql().await;
    let mut stream = server.watch("t1", "").await;
    sql.insert("t1", "c").await;
    stream.expect(Change::created("c")).await;
    let lsn = sql.flushed().await;
    eventually("the slot advances", async || sql.confirmed_reaches(&lsn).await).await;
}
