//! The subscribers of a round, for any server. Each checks that it receives every message once, in order.

use crate::support::raw_watch::{Connection, RawStream, Windows, changes, decimal, entity_id};
use crate::{Case, DELIVERY_MAX, NUMBERS_A_WRITER, WRITERS};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// The shared counters of the subscribers.
pub(crate) struct Shared {
    epoch: Instant,
    /// The time at which the commit of a number was acknowledged, or its publication requested; 0 before that.
    pub(crate) committed_ns: Vec<AtomicU64>,
    pub(crate) open: AtomicU64,
    pub(crate) delivered: AtomicU64,
    pub(crate) last_ns: AtomicU64,
    pub(crate) latencies: Histogram,
    pub(crate) failed: AtomicBool,
}

impl Shared {
    pub(crate) fn new(transactions_max: u64) -> Self {
        Self {
            epoch: Instant::now(),
            committed_ns: (0..transactions_max).map(|_| AtomicU64::new(0)).collect(),
            open: AtomicU64::new(0),
            delivered: AtomicU64::new(0),
            last_ns: AtomicU64::new(0),
            latencies: Histogram::default(),
            failed: AtomicBool::new(false),
        }
    }

    pub(crate) fn now(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    pub(crate) async fn until(&self, what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + DELIVERY_MAX;
        while !condition() {
            assert!(!self.failed.load(Relaxed), "a subscriber failed before {what}");
            let delivered = self.delivered.load(Relaxed);
            assert!(Instant::now() < deadline, "not within {DELIVERY_MAX:?}: {what}; {delivered} messages came");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A histogram of latencies, to within 3 %.
pub(crate) struct Histogram(Vec<AtomicU64>);

/// As a power of two, buckets of equal width for each doubling.
const PRECISION: u32 = 5;

impl Default for Histogram {
    fn default() -> Self {
        Self((0..64 << PRECISION).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Histogram {
    fn add(&self, ns: u64, count: u64) {
        let doublings = ns.max(1).ilog2().saturating_sub(PRECISION);
        let bucket = (u64::from(doublings) << PRECISION) + (ns >> doublings);
        self.0[bucket as usize].fetch_add(count, Relaxed);
    }

    /// The value below which `share` of the values lie.
    pub(crate) fn quantile(&self, share: f64) -> Duration {
        let counts: Vec<u64> = self.0.iter().map(|count| count.load(Relaxed)).collect();
        let wanted = counts.iter().sum::<u64>() as f64 * share;
        let mut below = 0;
        let reaches = |count: &u64| {
            below += count;
            below as f64 >= wanted
        };
        let bucket = counts.iter().position(reaches).unwrap() as u64;
        let doublings = (bucket >> PRECISION).saturating_sub(1);
        Duration::from_nanos((bucket - (doublings << PRECISION)) << doublings)
    }
}

/// All subscribers of a round, and their thread.
pub(crate) struct Fleet {
    stop: tokio::sync::oneshot::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl Fleet {
    pub(crate) fn launch(case: &Case, address: SocketAddr, shared: &Arc<Shared>) -> Self {
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (groups, shared) = (case.groups(), shared.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut subscribers = tokio::task::JoinSet::new();
                for group in groups {
                    let connection = Connection::open(address, Windows::WIDE).await;
                    for subscriber in group {
                        subscribers.spawn(subscriber.follow(connection.clone(), shared.clone()));
                    }
                }
                tokio::select! {
                    _ = stopped => {}
                    // A subscriber ends only after a failure, which it has reported.
                    _ = subscribers.join_next() => shared.failed.store(true, Relaxed),
                }
            });
        });
        Self { stop, thread }
    }

    pub(crate) fn land(self) {
        let _ = self.stop.send(());
        self.thread.join().unwrap();
    }
}

pub(crate) struct Subscriber {
    pub(crate) tenant: String,
    /// The next expected number of each writer.
    pub(crate) next: [u64; WRITERS],
    pub(crate) step: u64,
}

impl Subscriber {
    async fn follow(mut self, connection: Connection, shared: Arc<Shared>) {
        let mut stream: RawStream = connection.watch(&self.tenant, "").await;
        shared.open.fetch_add(1, Relaxed);
        loop {
            let mut received = 0;
            // The time of the first message that a frame completes. Messages in the same frame arrive together.
            let mut now = None;
            let read = stream.read(|message| {
                let now = *now.get_or_insert_with(|| shared.now());
                changes(message, |change| self.check(change, now, &shared));
                received += 1;
            });
            read.await.unwrap_or_else(|error| panic!("the connection of {} failed: {error}", self.tenant));
            if let Some(now) = now {
                shared.last_ns.fetch_max(now, Relaxed);
                shared.delivered.fetch_add(received, Relaxed);
            }
        }
    }

    fn check(&mut self, change: &[u8], now: u64, shared: &Shared) {
        let id = decimal(entity_id(change));
        let (writer, number) = ((id / NUMBERS_A_WRITER) as usize, id % NUMBERS_A_WRITER);
        assert_eq!(number, self.next[writer], "{}: what came from writer {writer}, and what was due", self.tenant);
        self.next[writer] += self.step;
        // 0 if the message arrives before the writer knows of the commit.
        let committed = shared.committed_ns[number as usize].load(Relaxed);
        shared.latencies.add(if committed == 0 { 0 } else { now.saturating_sub(committed) }, 1);
    }
}
