//! [`crate::support::oracle`] with each kind of fault. `benches/soak.rs` has all of them together, for hours.

use crate::support::faults::Fault::{self, Crash, CrashBoth, Kill, KillOneOfTwo, Unpublish};
use crate::support::faults::World;
use crate::support::oracle::Oracle;
use crate::support::writer::seed;
use std::time::Duration;

/// Small messages and a small window, so that transactions have many messages, and much is read from disk.
const TIGHT: [(&str, &str); 2] = [("--service-watch-message-size-max", "1KiB"), ("--changelog-memory-window", "1MiB")];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_gets_everything() {
    run(&[], 1 << 20, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_gets_everything_in_small_messages_from_disk() {
    run(&TIGHT, 1 << 10, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_gets_everything_while_tuplewatch_is_killed() {
    run(&TIGHT, 1 << 10, &[Kill]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_gets_everything_while_postgres_crashes() {
    run(&TIGHT, 1 << 10, &[Crash]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_gets_everything_while_both_crash() {
    run(&[], 1 << 20, &[Kill, Crash, CrashBoth]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_gets_everything_outside_gaps_while_the_publication_changes() {
    let missed = run(&TIGHT, 1 << 10, &[Unpublish]).await;
    assert!(missed > 0, "nothing was written while it was not published");
}

/// A subscriber that loses one node continues at the other with its token. Each node delays its acknowledgements a little, so that some
/// changes are sent again after a restart. They must reach nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_gets_everything_while_one_of_two_nodes_is_killed() {
    let hold_back =
        [("--replication-acknowledgement-delay-age", "2s"), ("--replication-acknowledgement-delay-size", "4MiB")];
    run(&[&TIGHT[..], &hold_back].concat(), 1 << 10, &[KillOneOfTwo]).await;
}

/// The least number of returns in each run, even on a slow machine.
const RETURNS_MIN: u64 = 30;

async fn run(flags: &[(&str, &str)], message_bytes: usize, faults: &'static [Fault]) -> usize {
    let seed = seed();
    let mut world = World::start(faults, &[], flags, seed).await;
    let mut oracle =
        Oracle::begin(&world.postgres.uri(), &world.endpoint(), seed, message_bytes, Box::new(world.server.gap_log()))
            .await;
    let round = oracle
        .round(faults, async |load| {
            let tally = world.disturb(faults, load, Duration::from_secs(12), 3).await;
            eprintln!("faults: {tally}");
            load.until_returned(RETURNS_MIN).await;
        })
        .await;
    assert!(round.transactions > 300, "too little was written to show anything: {}", round.transactions);
    assert!(round.returns >= RETURNS_MIN, "too few came back to show anything: {}", round.returns);
    world.server.terminate().await;
    assert!(world.server.ended().await.success());
    round.missed
}
