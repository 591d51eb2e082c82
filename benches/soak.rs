//! Runs load and all kinds of faults for hours, and compares every change.
//!
//! `cargo bench --bench soak --profile dev -- --minutes 20` (or `just soak 20`). It runs rounds of about a minute, with
//! one cluster, one change log and the same subscribers throughout: see `tests/support/oracle.rs` and `faults.rs`. It
//! prints a line for each round, and a verdict. A failure prints the seed and the end of the server's log.
//! `TUPLEWATCH_SEED` repeats the random choices, `TUPLEWATCH_PG_BIN` selects the PostgreSQL, and `TUPLEWATCH_DISK`
//! names a directory on a file system that nothing else fills, if /dev/shm has less than 2 GiB free.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark fails at an unmet expectation, and prints the events before it"
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
/// The faults of a round. The time before and after them counts too.
const ROUND: Duration = Duration::from_secs(50);
/// The rarer faults that last.
const FAULTS: [Fault; 16] = [
    Kill, Kill, Kill, Terminate, Terminate, Crash, Crash, Restart, Restart, CrashBoth, Cut, Cut, Silence, FullDisk,
    Unpublish, Unpublish,
];
/// The faults that neither the process of tuplewatch nor its streams end with.
const SURVIVED: [Fault; 9] = [Crash, Crash, Restart, Restart, Cut, Cut, Silence, FullDisk, Unpublish];
/// Twice the largest size of its caches, memtables and queues. More is a leak.
const MEMORY_MIB_MAX: u64 = 512;
/// Rows are inserted and deleted for ever, as in production.
const SETTINGS: [(&str, &str); 1] = [("autovacuum", "on")];
const MESSAGE_BYTES: usize = 4 << 10;
/// Transactions of many messages, many reads from disk, and a retention that drops segments.
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
    // Dropped last, so that the server's log is printed before it.
    let _told = Failed { seed };
    let mut world = World::start(&FAULTS, &SETTINGS, &FLAGS, seed).await;
    let mut oracle =
        Oracle::begin(&world.postgres.uri(), &world.endpoint(), seed, MESSAGE_BYTES, Box::new(world.server.gap_log()))
            .await;
    let began = Instant::now();
    let (mut rounds, mut transactions, mut changes, mut returns, mut faults) = (0, 0, 0, 0, Tally::default());
    while began.elapsed() < Duration::from_secs(60 * minutes) {
        // Only in some rounds, because a process that never grows old would hide leaks.
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

/// `--minutes N`, among the arguments that cargo passes.
fn minutes() -> u64 {
    let mut args = std::env::args().skip_while(|arg| arg != "--minutes").skip(1);
    args.next().map_or(MINUTES, |minutes| minutes.parse().expect("--minutes is followed by a number"))
}

/// Prints the verdict if the run panics.
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
