//! Hazards 14 and 16 under load: a standby is promoted during writes and reads. Changes on the new history are delivered, none lost and
//! none repeated. Changes that are not on it never happened, and exactly the subscribers that got them are informed.
//!
//! [`crate::support::oracle`] compares. `timeline` has each case by itself.

use crate::support::faults::Fault;
use crate::support::oracle::{Load, Oracle, Round};
use crate::support::postgres::Postgres;
use crate::support::proxy::Proxy;
use crate::support::server::Server;
use crate::support::standby::Pair;
use crate::support::wait::eventually;
use crate::support::writer::seed;
use tuplewatch::dev_postgres::StopMode;

const MESSAGE_BYTES: usize = 1 << 20;

/// A round in which `disturb` promotes the standby.
async fn round(pair: &mut Pair, disturb: impl AsyncFnOnce(&mut Pair, &Load<'_>)) -> Round {
    let seed = seed();
    let mut oracle =
        Oracle::begin(&pair.uri(), &pair.server.endpoint(), seed, MESSAGE_BYTES, Box::new(pair.server.gap_log())).await;
    let round = oracle
        .round(&[Fault::Failover], async |load| {
            some_time(load).await;
            disturb(pair, load).await;
            pair.server.serving().await;
            some_time(load).await;
        })
        .await;
    assert!(round.transactions > 100, "too little was written to show anything: {}", round.transactions);
    assert!(!pair.server.has_logged("SLOT_MOVED") && !pair.server.has_logged("slot had moved on"));
    round
}

async fn some_time(load: &Load<'_>) {
    for _ in 0..50 {
        load.progresses().await;
    }
}

/// PostgreSQL streams a commit that the standby does not have yet, and tuplewatch does not deliver it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_synchronous_standby_has_every_delivered_change() {
    let mut pair = Pair::start().await;
    let sql = pair.primary.sql().await;
    // Not '*', because a logical walsender counts as a standby too, and ours would be the first.
    sql.run("ALTER SYSTEM SET synchronous_standby_names = 'walreceiver'").await;
    sql.run("SELECT pg_reload_conf()").await;
    drop(sql);
    let round = round(&mut pair, async |pair, _| drop(pair.fail_over(StopMode::Immediate).await)).await;
    assert_eq!(round.abandoned, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_changes_that_an_asynchronous_standby_lacks_are_abandoned() {
    let mut pair = Pair::start().await;
    let round = round(&mut pair, async |pair, load| {
        pair.separate().await;
        // A big transaction that the standby has may still be on its way to us.
        let sql = pair.primary.sql().await;
        let lsn = sql.flushed().await;
        eventually("we are past the standby's position", async || sql.confirmed_reaches(&lsn).await).await;
        drop(sql);
        some_time(load).await;
        drop(pair.fail_over(StopMode::Immediate).await);
    })
    .await;
    assert!(round.abandoned > 0, "nothing was lost");
}

/// The slot exists after the promotion, and `synchronized_standby_slots` keeps tuplewatch behind the standby.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_slot_continues_on_the_promoted_standby() {
    let mut pair = Pair::start_with_failover_slots().await;
    let round = round(&mut pair, async |pair, _| drop(pair.fail_over(StopMode::Immediate).await)).await;
    assert_eq!(round.abandoned, 0);
    let is_the_copy = "(SELECT synced AND active FROM pg_replication_slots WHERE slot_name = 'tuplewatch')";
    assert!(pair.standby.sql().await.is_true(is_the_copy).await);
}

#[tokio::test]
async fn failover_is_enabled_on_an_existing_slot_at_the_next_connection() {
    let postgres = Postgres::since(17, &[]).await;
    let sql = postgres.sql().await;
    let fails_over =
        async || sql.is_true("(SELECT failover FROM pg_replication_slots WHERE slot_name = 'tuplewatch')").await;
    let mut server = Server::serve(&postgres, &[("--replication-failover", "off")]).await;
    assert!(!fails_over().await, "failover is off");
    server.set("--replication-failover", "auto");
    server.kill_and_restart().await;
    assert!(fails_over().await);
}

/// PostgreSQL would let ALTER wait until the slot is free, and would not notice when its client is gone.
#[tokio::test]
async fn a_slot_held_by_another_node_is_not_altered() {
    let postgres = Postgres::since(17, &[]).await;
    let sql = postgres.sql().await;
    let mut first = Server::serve(&postgres, &[("--replication-failover", "off")]).await;
    let proxy = Proxy::to_postgres(&postgres.uri()).await;
    let mut second = Server::prepare_slot(&proxy.uri(&postgres.uri()), "tuplewatch", &[]).await;
    let before = proxy.accepted();
    second.start().await;
    eventually("it waits for the slot", async || second.has_logged("is active for PID")).await;
    // Each attempt makes two connections, and leaves none behind.
    eventually("it tries again", async || proxy.accepted() >= before + 12).await;
    let walsenders = "(SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'walsender') <= 2";
    eventually("there is the one that streams, and one that tries", async || sql.is_true(walsenders).await).await;
    first.terminate().await;
    first.ended().await;
    second.serving().await;
    assert!(sql.is_true("(SELECT failover FROM pg_replication_slots WHERE slot_name = 'tuplewatch')").await);
}

/// The connection outlives the process, as in `slot::a_walsender_left_by_a_dead_process_is_ended`.
#[tokio::test]
async fn a_slot_left_in_use_by_a_dead_process_is_altered() {
    let postgres = Postgres::since(17, &[]).await;
    let sql = postgres.sql().await;
    let proxy = Proxy::to_postgres(&postgres.uri()).await;
    let off = [("--replication-failover", "off")];
    // Walsenders have the application name of the node, whatever the URI sets.
    let uri = format!("{}?application_name=mine", proxy.uri(&postgres.uri()));
    let mut server = Server::prepare_slot(&uri, "tuplewatch", &off).await;
    server.start().await;
    server.serving().await;
    proxy.strand();
    server.kill_9().await;
    assert!(sql.walsender().await.is_some(), "the server has noticed");
    server.set("--replication-failover", "auto");
    server.start().await;
    server.serving().await;
    assert!(sql.is_true("(SELECT failover FROM pg_replication_slots WHERE slot_name = 'tuplewatch')").await);
}
