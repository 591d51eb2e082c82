//! [`crate::support::oracle`], with a fault of each kind in turn. `benches/soak.rs` has all of them at once, for hours.

use crate::support::faults::Fault::{self, Crash, CrashBoth, Kill};
use crate::support::faults::World;
use crate::support::oracle::Oracle;
use crate::support::writer::seed;
use std::time::Duration;

/// Small messages, a small window: transactions in many messages, and much reading from disk.
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

async fn run(flags: &[(&str, &str)], message_bytes: usize, faults: &'static [Fault]) {
    let seed = seed();
    let mut world = World::start(faults, &[], flags, seed).await;
    let mut oracle = Oracle::begin(&world, seed, message_bytes).await;
    let round = oracle
        .round(faults, async |load| {
            let tally = world.disturb(faults, load, Duration::from_secs(12), 3).await;
            eprintln!("faults: {tally}");
        })
        .await;
    assert!(round.transactions > 300, "too little was written to show anything: {}", round.transactions);
    assert!(round.returns >= 30, "too few came back to show anything: {}", round.returns);
    world.server.terminate().await;
    assert!(world.server.ended().await.success());
}
