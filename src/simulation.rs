//! The engine between a scripted server and a faulty disk, on a paused clock. It dies at every step in turn and restarts, and its
//! subscribers must have received the committed changes.
//!
//! ```text
//!  server (script) ─▶ Session ─▶ LogAndHub ─┬─▶ recorder ─▶ disk (torn, lost, lying)
//!                                           └─▶ hub ◀─ releaser      │
//!                                                └─▶ readers ◀───────┘
//! ```
//!
//! Everything between server and disk is production code. It runs as one task whose parts are polled in an order that the seed chooses.
//! So a run depends on its seed alone, and a failing seed fails again: `TUPLEWATCH_SEED=<seed> cargo test --lib simulation`.
//! `TUPLEWATCH_SEEDS=<count>` tries that many.
//!
//! A step is a point at which the process can die: a received event, an appended entry, the beginning or the end of a sync, a snapshot, an
//! acknowledgement, a connection. Checked at every step: acknowledged ≤ synced, and nothing is delivered before it is visible. Checked at
//! the end: every reader has its tenant's changes in commit order, once, from its start to the last, except for reported gaps; and there
//! are no gaps if only crashes happened.

mod disk;
mod reader;
mod server;
mod world;

use crate::app::log_and_hub::{LogAndHub, record_watermark};
use crate::changelog::recorder;
use crate::decode::assembler::{Limits, OnUndecodable};
use crate::decode::mapping::{Mapping, TUPLES_PRESET};
use crate::hub::{self, Hub, releaser};
use crate::model::diagnostic::CommandLine;
use crate::postgres::slot::AckDelay;
use crate::replication::{Options, Session};
use disk::Disk;
use fastrand::Rng;
use reader::{Reader, Start};
use server::{Fault, LAST, Server, TENANTS};
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::watch;
use world::World;

/// By the paused clock. Only a run that hangs takes this long.
const RUN_MAX: Duration = Duration::from_secs(600);
/// Lives of the process in one run. After the last planned crash there are no more.
const LIVES_MAX: usize = 60;
/// After a failed sync, or a fatal error, the process is started again.
const RESTART_AFTER: Duration = Duration::from_millis(100);

fn options(ack_delay: AckDelay) -> Options {
    static MAPPING: OnceLock<Arc<Mapping>> = OnceLock::new();
    let mapping =
        MAPPING.get_or_init(|| Arc::new(Mapping::new(crate::yaml::from_str(TUPLES_PRESET).unwrap()).unwrap()));
    Options {
        slot: "slot".into(),
        publication: "publication".into(),
        mapping: mapping.clone(),
        // A change takes about 40 bytes: messages of some, and now and then a transaction that is staged.
        limits: Limits { message_bytes: 100, change_bytes: 4096, stage_bytes: 250 },
        on_undecodable: OnUndecodable::Gap,
        ack_delay,
        commands: CommandLine::default(),
        failover: true,
        connections_max: 4,
    }
}

/// Polls all its parts whenever one of them is woken, in an order that the seed chooses. Slow parts are left out for a while.
struct Parts<'a> {
    parts: Vec<Pin<Box<dyn Future<Output = ()> + 'a>>>,
    order: Rng,
}

impl Future for Parts<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let mut order: Vec<usize> = (0..this.parts.len()).collect();
        this.order.shuffle(&mut order);
        for n in order {
            if this.parts[n].as_mut().poll(context).is_ready() {
                // Parts do not end, but for those that end the run.
                return Poll::Ready(());
            }
        }
        Poll::Pending
    }
}

/// Lets `work` run only in turns, with pauses between them: a thread that waits for its disk.
async fn slowly(work: impl Future<Output = ()>, mut random: Rng) {
    let mut work = Box::pin(work);
    loop {
        let turn = std::future::poll_fn(|context| Poll::Ready(work.as_mut().poll(context)));
        if turn.await.is_ready() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(random.u64(0..40))).await;
    }
}

/// One run, from an empty log to the last change.
struct Run {
    seed: u64,
    fault: Fault,
    /// Unacknowledged transactions are sent again after each loss of a connection.
    ack_delay: AckDelay,
    world: World,
    disk: Disk,
    server: Server,
    readers: Vec<Arc<Mutex<Reader>>>,
    /// The disk may lie at the next crash.
    may_lie: bool,
}

impl Run {
    fn new(seed: u64, crashes: BTreeSet<u64>) -> Self {
        let mut random = Rng::with_seed(seed);
        let fault = match random.u8(..10) {
            0 => Fault::SlotMoved,
            1 => Fault::LyingDisk,
            2 => Fault::Unpublished,
            3 => Fault::Failover,
            _ => Fault::Nothing,
        };
        let world = World::new(random.u64(..), crashes);
        let disk = Disk::new(world.clone());
        let server = Server::new(world.clone(), disk.clone());
        let starts = [Start::First, Start::Now, Start::Transaction];
        let readers = starts.into_iter().enumerate().map(|(n, start)| {
            // The token of a transaction that a failover loses resolves to its floor.
            let start = if fault == Fault::Failover && start == Start::Transaction { Start::First } else { start };
            let tenant = TENANTS[random.usize(..TENANTS.len())];
            // A check notices an incomplete publication some seconds later. After a lost connection, unacknowledged transactions are sent
            // again first, which takes longer.
            let last = format!("{LAST}{:03}", if fault == Fault::Unpublished { 8 } else { 0 });
            Arc::new(Mutex::new(Reader::new(tenant, start, last, seed.wrapping_add(n as u64))))
        });
        let readers = readers.collect();
        let may_lie = fault == Fault::LyingDisk;
        let ack_delay = AckDelay {
            age: Duration::from_millis(if random.u8(..3) == 0 { random.u64(1..100) } else { 0 }),
            size_bytes: random.u64(50..1000),
        };
        Self { seed, fault, ack_delay, world, disk, server, readers, may_lie }
    }

    /// The number of steps, or the failure.
    fn run(mut self) -> Result<Ran, String> {
        fastrand::seed(self.seed);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let world = self.world.clone();
        let ran = runtime.block_on(async { tokio::time::timeout(RUN_MAX, self.lives()).await });
        let result = match (world.violation(), ran) {
            (Some(violation), _) => Err(violation),
            (None, Err(_)) => Err("it hangs".to_owned()),
            (None, Ok(result)) => result,
        };
        result.map_err(|what| format!("{what}\n{}", world.trace()))
    }

    async fn lives(&mut self) -> Result<Ran, String> {
        let (server, random) = (self.server.clone(), Rng::with_seed(self.seed));
        let mut writing = Box::pin(write(server, self.disk.clone(), self.fault, random));
        for life in 0..LIVES_MAX {
            let everybody_done = self.live(life, &mut writing).await;
            if let Some(violation) = self.world.violation() {
                return Err(violation);
            }
            if everybody_done {
                return self.check();
            }
            let lies = std::mem::take(&mut self.may_lie) && !self.world.once_in(3);
            self.disk.crash(lies);
            self.world.note(format!("--- life {} ends", life + 1));
            // The rest continues without it.
            tokio::select! {
                biased;
                _ = &mut writing => {}
                () = tokio::time::sleep(RESTART_AFTER) => {}
            }
            self.world.revive();
        }
        Err("too many lives".into())
    }

    /// Runs from the start of the process to its death. Returns whether every reader was complete before.
    async fn live(&self, life: usize, writing: &mut Pin<Box<impl Future<Output = Infallible>>>) -> bool {
        let log = Arc::new(self.disk.clone());
        let (recorder, handle) = recorder::new(log.clone());
        let hub_options = hub::Options { window_bytes: 1500, before_visible: false };
        let hub = Hub::new(log, handle.appended(), hub_options).unwrap();
        let joined = LogAndHub { recorder: handle.clone(), hub: hub.clone() };
        let session = Session::new(options(self.ack_delay), self.server.clone(), joined);
        let (stop, stopped) = watch::channel(false);

        let mut random = Rng::with_seed(self.seed.wrapping_add(1000 * life as u64));
        let recording = async {
            // The process ends; another one is started.
            let _ = recorder.run().await;
        };
        let mut parts: Vec<Pin<Box<dyn Future<Output = ()> + '_>>> = vec![
            Box::pin(async {
                let _ = session.run(stopped).await;
            }),
            Box::pin(releaser::run(hub.clone(), self.server.clone())),
            Box::pin(record_watermark(hub.watch_watermark(), handle)),
            Box::pin(self.world.died()),
            Box::pin(async {
                writing.await;
            }),
        ];
        if random.u8(..4) == 0 {
            parts.push(Box::pin(slowly(recording, random.fork())));
        } else {
            parts.push(Box::pin(recording));
        }
        for reader in &self.readers {
            let reading = reader::read(self.world.clone(), self.server.clone(), hub.clone(), reader.clone());
            parts.push(Box::pin(async {
                reading.await;
                std::future::pending::<()>().await;
            }));
        }
        // In the end the process is stopped in good order.
        parts.push(Box::pin(async {
            self.world.all_done(self.readers.len()).await;
            stop.send_replace(true);
            std::future::pending::<()>().await;
        }));
        Parts { parts, order: random }.await;
        !self.world.is_dead() && self.readers.iter().all(|reader| reader.lock().unwrap().is_done)
    }

    fn check(&self) -> Result<Ran, String> {
        let committed = self.server.committed();
        let mut changes = 0;
        for reader in &self.readers {
            let reader = reader.lock().unwrap();
            changes += reader.check(&committed)?;
            if self.fault == Fault::Nothing && reader.was_told_of_gaps() {
                return Err("a reader was told of a gap, and nothing is missing".into());
            }
        }
        Ok(Ran { steps: self.world.steps(), changes, trace: self.world.whole_trace() })
    }
}

struct Ran {
    steps: u64,
    changes: usize,
    trace: Vec<String>,
}

/// External events: transactions, other WAL, crashes of the server, and the fault of the run.
async fn write(server: Server, disk: Disk, fault: Fault, mut random: Rng) -> Infallible {
    let pause = |random: &mut Rng| tokio::time::sleep(Duration::from_millis(random.u64(0..60)));
    let count = random.usize(3..8);
    let fault_at = random.usize(1..count);
    let mut writers_end_after = None;
    for n in 0..count {
        pause(&mut random).await;
        // Immediately, while the gap waits for them, or long after it was reported.
        if writers_end_after == Some(0) {
            tokio::time::sleep(Duration::from_millis(random.u64(0..12_000))).await;
            server.commit_writers();
        }
        writers_end_after = writers_end_after.and_then(|count: usize| count.checked_sub(1));
        if n == fault_at {
            // A fault before the first check of a new log cannot be detected.
            while fault != Fault::Nothing && !disk.is_verified() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            match fault {
                Fault::Nothing | Fault::LyingDisk => {}
                Fault::SlotMoved => server.move_slot(),
                Fault::Failover => server.fail_over(),
                Fault::Unpublished => {
                    // Both between two checks, or not.
                    tokio::time::sleep(Duration::from_millis(random.u64(0..7_000))).await;
                    server.publish(false);
                    let hidden = |what: &str, n: u8| vec![("a", format!("{what}{n}")), ("b", format!("{what}{n}"))];
                    for n in 0..random.u8(..3) {
                        server.commit(hidden("hidden", n));
                    }
                    for n in 0..random.u8(..3) {
                        server.write(hidden("late", n));
                    }
                    tokio::time::sleep(Duration::from_millis(random.u64(0..7_000))).await;
                    server.publish(true);
                    writers_end_after = Some(random.usize(..count));
                }
            }
        }
        // Most are small, and some are staged.
        let length = if random.u8(..5) == 0 { random.usize(6..16) } else { random.usize(0..4) };
        let one = random.bool().then(|| TENANTS[random.usize(..TENANTS.len())]);
        let tenant = |random: &mut Rng| one.unwrap_or_else(|| TENANTS[random.usize(..TENANTS.len())]);
        server.commit((0..length).map(|row| (tenant(&mut random), format!("{n}.{row}"))).collect());
        match random.u8(..12) {
            0 => server.write_wal(),
            1 => server.crash(),
            2..6 => server.checkpoint(),
            _ => {}
        }
    }
    if random.bool() {
        server.write_wal();
        tokio::time::sleep(Duration::from_millis(1_500)).await;
    }
    server.commit_writers();
    // More than one, for readers that start after one.
    for n in 0.. {
        server.commit(TENANTS.map(|tenant| (tenant, format!("{LAST}{n:03}"))).into());
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
    std::future::pending().await
}

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Runs a seed without a crash, and then with one at every step in turn, and sometimes a second one soon after.
fn try_seed(seed: u64) -> (u64, usize) {
    let fail = |what: String, crashes: &BTreeSet<u64>| -> Ran {
        panic!(
            "to repeat: TUPLEWATCH_SEED={seed} cargo test --lib simulation\nseed {seed}, crashes at {crashes:?}: {what}"
        )
    };
    let none = BTreeSet::new();
    let steps = Run::new(seed, none.clone()).run().unwrap_or_else(|what| fail(what, &none)).steps;
    let mut changes = 0;
    for crash in 1..=steps {
        let mut random = Rng::with_seed(seed.wrapping_mul(31).wrapping_add(crash));
        let mut crashes = BTreeSet::from([crash]);
        if random.bool() {
            crashes.insert(crash + random.u64(1..40));
        }
        changes += Run::new(seed, crashes.clone()).run().unwrap_or_else(|what| fail(what, &crashes)).changes;
    }
    (steps, changes)
}

#[test]
fn a_death_at_any_step_loses_and_repeats_nothing() {
    let seeds: Vec<u64> = match env("TUPLEWATCH_SEED") {
        Some(seed) => vec![seed],
        None => {
            let first = fastrand::u64(..);
            (0..env("TUPLEWATCH_SEEDS").unwrap_or(2_000)).map(|n| first.wrapping_add(n)).collect()
        }
    };
    let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let totals: Vec<(u64, usize)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                let seeds = seeds.iter().skip(worker).step_by(threads);
                scope.spawn(move || seeds.map(|seed| try_seed(*seed)).collect::<Vec<_>>())
            })
            .collect();
        let joined = workers.into_iter().map(|worker| match worker.join() {
            Ok(totals) => totals,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        joined.flatten().collect()
    });
    let runs: u64 = totals.iter().map(|(steps, _)| steps + 1).sum();
    let changes: usize = totals.iter().map(|(_, changes)| changes).sum();
    eprintln!("{} seeds, {runs} runs, {changes} changes delivered", seeds.len());
    assert!(changes > 0, "nothing was delivered");
}

/// Without which a seed that is printed would be worth nothing.
#[test]
fn a_seed_repeats_its_run() {
    for seed in 0..40 {
        let crashes = BTreeSet::from([10 + seed]);
        let traces = [(), ()].map(|()| Run::new(seed, crashes.clone()).run().map(|ran| ran.trace));
        let [first, second] = traces;
        assert_eq!(first, second, "seed {seed}");
    }
}
