//! Hazard 16: the server continues on another timeline, because a standby was promoted or a backup was recovered to a point in time.
//! Changes of the old timeline after the switch never happened on the new one. They are cut from the log, streams that passed the switch
//! end, and tokens from after it are refused for ever, even when the new timeline is longer. Everything from before the switch continues.
//!
//! Standbys are copies of a stopped primary with its replication slots. A base backup has no slots, and neither have the copies that are
//! recovered here.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::standby::Pair;
use crate::support::stream::{metadata, reason};
use crate::support::wait::eventually;
use tonic::Code;
use tuplewatch::dev_postgres::StopMode;
use tuplewatch::model::lsn::Xid8;
use tuplewatch::model::snap_token::SnapToken;

/// Permify's token of the transaction that inserted this row of t1.
async fn id_token(sql: &Sql, id: &str) -> String {
    let statement =
        format!("SELECT xmin FROM tuplewatch.relation_tuples WHERE tenant_id = 't1' AND entity_id = '{id}'");
    SnapToken::Xid(Xid8(sql.value(&statement).await.parse().unwrap())).to_string()
}

/// Writes until the WAL is past this token's position, so that only its timeline shows that it is foreign.
async fn write_past(sql: &Sql, token: &str) {
    let SnapToken::Position { place, .. } = token.parse().unwrap() else { panic!("a position token") };
    let condition = format!("pg_current_wal_flush_lsn() > '{}'", place.position.lsn);
    while !sql.is_true(&condition).await {
        sql.run("SELECT pg_logical_emit_message(true, 'other', repeat('x', 100000))").await;
    }
}

/// The counted gaps with the reason TIMELINE_DIVERGED.
async fn gaps(pair: &Pair) -> f64 {
    pair.server.scrape().await.get("tuplewatch_gaps_total", &[("reason", "TIMELINE_DIVERGED")])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_without_loss_continues_every_stream() {
    let mut pair = Pair::start().await;
    let sql = pair.primary.sql().await;
    let mut stream = pair.server.watch("t1", "").await;
    sql.insert("t1", "before").await;
    let token = stream.expect(Change::created("before")).await.token;
    sql.insert("t1", "last").await;
    let last = stream.expect(Change::created("last")).await.token;
    pair.in_step().await;

    let sql = pair.fail_over(StopMode::Fast).await;
    pair.server.serving().await;
    sql.insert("t1", "after").await;
    let after = stream.expect(Change::created("after")).await.token;
    let mut new = pair.server.watch("t2", "").await;
    sql.insert("t2", "after").await;
    new.expect(Change::created("after")).await;
    assert_eq!(gaps(&pair).await, 0.0, "no stream has lost anything");

    for process in 0..2 {
        pair.server.watch("t1", &last).await.expect(Change::created("after")).await;
        let mut resumed = pair.server.watch("t1", &token).await;
        resumed.expect(Change::created("last")).await;
        resumed.expect(Change::created("after")).await;
        if process == 0 {
            pair.server.kill_9().await;
            pair.server.start().await;
            pair.server.serving().await;
        }
    }
    sql.insert("t1", "end").await;
    pair.server.watch("t1", &after).await.expect(Change::created("end")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_that_a_promoted_standby_lacks_are_abandoned() {
    let mut pair = Pair::start().await;
    let sql = pair.primary.sql().await;
    let mut stream = pair.server.watch("t1", "").await;
    let mut unharmed = pair.server.watch("t2", "").await;
    sql.insert("t1", "kept").await;
    sql.insert("t2", "kept").await;
    let kept = stream.expect(Change::created("kept")).await.token;
    unharmed.expect(Change::created("kept")).await;
    pair.in_step().await;
    pair.separate().await;
    for id in ["lost", "lost too"] {
        sql.insert("t1", &id.replace(' ', "_")).await;
    }
    stream.expect(Change::created("lost")).await;
    let lost = stream.expect(Change::created("lost_too")).await.token;
    let kept_id = id_token(&sql, "kept").await;
    let lost_ids = [id_token(&sql, "lost").await, id_token(&sql, "lost_too").await];
    // A start now from abandoned state: its reader is as wrong as a stream that delivered the changes.
    let mut read = pair.server.watch("t3", "").await;

    let sql = pair.fail_over(StopMode::Immediate).await;
    let (messages, status) = stream.ending().await;
    assert!(messages.is_empty(), "{messages:?}");
    assert_eq!(reason(&status), (Code::Aborted, "TIMELINE_DIVERGED".into()));
    let next = metadata(&status, "next_snap_token");
    let (_, status) = read.ending().await;
    assert_eq!(reason(&status), (Code::Aborted, "TIMELINE_DIVERGED".into()));
    pair.server.serving().await;
    assert_eq!(gaps(&pair).await, 1.0);
    sql.insert("t1", "new").await;
    sql.insert("t2", "new").await;
    // This stream never delivered an abandoned change.
    unharmed.expect(Change::created("new")).await;
    write_past(&sql, &lost).await;

    for process in 0..2 {
        for token in [&kept, &kept_id, &next] {
            pair.server.watch("t1", token).await.expect(Change::created("new")).await;
        }
        // Other transactions may have their ids by now.
        for token in lost_ids.iter().chain([&lost]) {
            let status = pair.server.try_watch("t1", token).await.err().expect("refused");
            assert_eq!(reason(&status), (Code::FailedPrecondition, "ABANDONED_SNAP_TOKEN".into()));
        }
        if process == 0 {
            pair.server.kill_9().await;
            pair.server.start().await;
            pair.server.serving().await;
        }
    }
}

/// It is the first in the list, answers, and is not in recovery, but its history ended with the promotion.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_primary_that_comes_back_is_not_followed() {
    let mut pair = Pair::start().await;
    pair.in_step().await;
    let sql = pair.fail_over(StopMode::Fast).await;
    pair.server.serving().await;
    let mut stream = pair.server.watch("t1", "").await;
    sql.insert("t1", "new").await;
    let token = stream.expect(Change::created("new")).await.token;

    pair.server.kill_9().await;
    pair.primary.start_again().await;
    pair.primary.sql().await.insert("t1", "astray").await;
    pair.server.start().await;
    let mut stream = pair.server.watch("t1", &token).await;
    sql.insert("t1", "after").await;
    stream.expect(Change::created("after")).await;
    let left_behind = "was left behind";
    assert!(!pair.server.has_logged(left_behind));

    pair.standby.stop(StopMode::Fast).await;
    eventually("the log names the old primary", async || pair.server.has_logged(left_behind)).await;
    pair.standby.start_again().await;
    pair.standby.sql().await.insert("t1", "end").await;
    stream.expect(Change::created("end")).await;
}

/// A copy of a primary that was recovered up to a restore point.
async fn recover(copy: &mut Postgres, primary: &Postgres, restore_point: &str) -> Sql {
    let archive = primary.pgdata().join("pg_wal");
    let command = format!("cp {}/%f %p", archive.display());
    copy.stop_and_set(&[
        ("restore_command", &command),
        ("recovery_target_name", restore_point),
        ("recovery_target_action", "promote"),
    ])
    .await;
    copy.put_signal("recovery.signal");
    copy.start_again().await;
    let sql = copy.sql().await;
    eventually("the recovery ends", async || sql.is_true("NOT pg_is_in_recovery()").await).await;
    sql
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_point_in_time_recovery_abandons_later_changes() {
    let mut primary = Postgres::start().await;
    let mut server = Server::prepare(&primary, &[]).await;
    primary.stop(StopMode::Fast).await;
    let mut copies = [primary.copy().await, primary.copy().await];
    for copy in &copies {
        std::fs::remove_dir_all(copy.pgdata().join("pg_replslot/tuplewatch")).unwrap();
    }
    primary.start_again().await;
    server.start().await;
    server.serving().await;

    let sql = primary.sql().await;
    let mut stream = server.watch("t1", "").await;
    sql.insert("t1", "kept").await;
    let kept = stream.expect(Change::created("kept")).await.token;
    sql.run("SELECT pg_create_restore_point('earlier')").await;
    sql.insert("t1", "kept_by_the_other").await;
    sql.run("SELECT pg_create_restore_point('later')").await;
    sql.insert("t1", "mistake").await;
    stream.expect(Change::created("kept_by_the_other")).await;
    let mistake = stream.expect(Change::created("mistake")).await.token;
    // The mistake is in its log.
    server.terminate().await;
    server.ended().await;
    drop(sql);
    primary.stop(StopMode::Fast).await;

    // The slot is missing: serve reports it, setup creates one, and every stream gets the gap.
    let [one, two] = &mut copies;
    let sql = recover(one, &primary, "earlier").await;
    server.point_to(&one.uri());
    server.refuses_to_start("replication slot tuplewatch: does not exist").await;
    server.setup(&[]).await;
    server.start().await;
    server.serving().await;
    let status = server.try_watch("t1", &mistake).await.err().expect("refused");
    assert_eq!(reason(&status), (Code::FailedPrecondition, "ABANDONED_SNAP_TOKEN".into()));
    let (_, status) = server.watch("t1", &kept).await.ending().await;
    assert_eq!(reason(&status), (Code::Aborted, "SLOT_MOVED".into()));
    let mut stream = server.watch("t1", &metadata(&status, "next_snap_token")).await;
    sql.insert("t1", "of_one").await;
    let of_one = stream.expect(Change::created("of_one")).await.token;

    // Another recovery of the same backup is on a timeline with number 2 too, but on a different one.
    let sql = recover(two, &primary, "later").await;
    let other = Server::serve(two, &[]).await;
    assert_eq!(sql.value("SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)").await, "00000002");
    let mut stream = other.watch("t1", "").await;
    sql.insert("t1", "of_two").await;
    let of_two = stream.expect(Change::created("of_two")).await.token;
    for (server, sql, token) in [(&server, one.sql().await, &of_two), (&other, two.sql().await, &of_one)] {
        write_past(&sql, token).await;
        let status = server.try_watch("t1", token).await.err().expect("refused");
        assert_eq!(reason(&status), (Code::FailedPrecondition, "ABANDONED_SNAP_TOKEN".into()));
    }

    // A log of one recovery is not accepted as a log of the other.
    server.kill_9().await;
    drop(other);
    server.point_to(&two.uri());
    server.start().await;
    server.serving().await;
    for token in [&mistake, &of_one] {
        let status = server.try_watch("t1", token).await.err().expect("refused");
        assert_eq!(reason(&status), (Code::FailedPrecondition, "ABANDONED_SNAP_TOKEN".into()));
    }
    let (_, status) = server.watch("t1", &kept).await.ending().await;
    assert_eq!(status.code(), Code::Aborted);
    sql.insert("t1", "last").await;
    let next = server.watch("t1", &metadata(&status, "next_snap_token")).await.next().await;
    assert!(next.changes.iter().all(|change| change.is_create), "{next:?}");
}
