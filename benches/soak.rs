//! Hours of load and of everything that can go wrong, with every change compared.
//!
//! `cargo bench --bench soak --profile dev -- --minutes 20` (or `just soak 20`). In rounds of about a minute, with one
//! cluster, one change log and the same subscribers throughout: see `tests/support/oracle.rs` and `faults.rs`. A line for
//! each round, and a verdict; where it fails, the seed and the end of the server's log. `TUPLEWATCH_SEED` repeats the random
//! choices, `TUPLEWATCH_PG_BIN` chooses the PostgreSQL, `TUPLEWATCH_DISK` names a directory on a file system that nobody else
//! fills, where /dev/shm is not one with 2 GiB free.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "it fails where it expected something, and tells what led to it"
)]

#[path = "../tests/support"]
#[expect(dead_code, reason = "what the scenarios need besides")]
mod support {
    pub(crate) mod change;
    pub(crate) mod faults;
    pub(crate) mod oracle;
    pub(crate) mod port;
    pub(crate) mod postgres;
    pub(crate) mod proxy;
    pub(crate) mod reference;
    pub(crate) mod server;
    pub(crate) mod sql;
    pub(crate) mod stream;
    pub(crate) mod wait;
    pub(crate) mod writer;
}

use std::time::{Duration, Instant};
use support::faults::Fault::{Crash, CrashBoth, Cut, FullDisk, Kill, Restart, Silence, Terminate, Unpublish};
use support::faults::{Fault, Tally, World};
use support::oracle::Oracle;
use support::writer::seed;

const MINUTES: u64 = 20;
/// Faults of a round; what comes before and after takes its time too.
const ROUND: Duration = Duration::from_secs(50);
/// What lasts, more rarely.
const FAULTS: [Fault; 16] = [
    Kill, Kill, Kill, Terminate, Terminate, Crash, Crash, Restart, Restart, CrashBoth, Cut, Cut, Silence, FullDisk,
    Unpublish, Unpublish,
];
/// Those that tuplewatch survives as a process, and its streams with it.
const SURVIVED: [Fault; 9] = [Crash, Crash, Restart, Restart, Cut, Cut, Silence, FullDisk, Unpublish];
/// Twice what its caches, memtables and queues come to at their most: more is a leak.
const MEMORY_MIB_MAX: u64 = 512;
/// As in production, rows come and go for ever.
const SETTINGS: [(&str, &str); 1] = [("autovacuum", "on")];
const MESSAGE_BYTES: usize = 4 << 10;
/// Transactions in many messages, much reading from disk, and a retention that has something to do.
const FLAGS: [(&str, &str); 4] = [
    ("--service-watch-message-size-max", "4KiB"),
    ("--changelog-memory-window", "1MiB"),
    ("--changelog-retention-age", "5m"),
    ("--changelog-retention-size", "256MiB"),
];

#[tokio::main(worker_threads = 2)]
async fn main() {
    let minutes = minutes();
    let seed = seed();
    // Dropped last: the server's log comes before it.
    let _told = Failed { seed };
    let mut world = World::start(&FAULTS, &SETTINGS, &FLAGS, seed).await;
    let mut oracle =
        Oracle::begin(&world.postgres.uri(), &world.endpoint(), seed, MESSAGE_BYTES, Box::new(world.server.gap_log()))
            .await;
    let began = Instant::now();
    let (mut rounds, mut transactions, mut changes, mut returns, mut faults) = (0, 0, 0, 0, Tally::default());
    while began.elapsed() < Duration::from_secs(60 * minutes) {
        // By turns: a process that never grows old would hide what it gathers.
        let choice: &[Fault] = if rounds % 4 < 2 { &FAULTS } else { &SURVIVED };
        let mut tally = Tally::default();
        let round = oracle.round(choice, async |load| tally = world.disturb(choice, load, ROUND, 0).await).await;
        rounds += 1;
        transactions += round.transactions;
        changes += round.changes_compared;
        returns += round.returns;
        faults.add(&tally);
        let memory_mib = world.server.memory_kib("VmRSS") / 1024;
        println!(
            "{:>6.1?} round {rounds}: {} transactions, {} changes compared, {} returns ({} to history that was given up); \
             {tally}; {memory_mib} MiB",
            began.elapsed(),
            round.transactions,
            round.changes_compared,
            round.returns,
            round.refusals,
        );
        assert!(memory_mib < MEMORY_MIB_MAX, "tuplewatch takes {memory_mib} MiB");
    }
    world.server.terminate().await;
    assert!(world.server.ended().await.success(), "a stop that was asked for is no failure");
    println!(
        "ok: {rounds} rounds, {transactions} transactions, {changes} changes compared, {returns} returns; {faults}; seed {seed}"
    );
}

/// `--minutes N`, among what cargo passes.
fn minutes() -> u64 {
    let mut args = std::env::args().skip_while(|arg| arg != "--minutes").skip(1);
    args.next().map_or(MINUTES, |minutes| minutes.parse().expect("--minutes is followed by a number"))
}

/// Gives the verdict where there is no other.
struct Failed {
    seed: u64,
}

impl Drop for Failed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("FAILED: TUPLEWATCH_SEED={} repeats the random choices", self.seed);
        }
    }
}
