//! What a subscriber costs, and a message to it: for 1 to 5,000 subscribers, of one tenant and of as many.
//!
//! `cargo bench --bench fan_out [-- --quick] [--rounds N] [--case NAME]` (or `just bench fan_out`). In rounds that alternate
//! over the cases, each with a process of its own on one cluster. Every subscriber checks that it has every message once,
//! in order. They all live in one thread of this process, behind a client that costs little; but they, PostgreSQL and
//! tuplewatch share the machine, so figures compare within a run.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "it fails where it expected something, and what was measured is its output"
)]

#[path = "../tests/support"]
#[expect(dead_code, reason = "what the scenarios need besides")]
mod support {
    pub(crate) mod change;
    pub(crate) mod measure;
    pub(crate) mod postgres;
    pub(crate) mod proxy;
    pub(crate) mod raw_watch;
    pub(crate) mod report;
    pub(crate) mod server;
    pub(crate) mod sql;
    pub(crate) mod stream;
    pub(crate) mod wait;
}

use futures_util::future::join_all;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use support::measure::{Summary, cpu_time};
use support::postgres::Postgres;
use support::raw_watch::{Connection, RawStream, Windows, changes, decimal, entity_id};
use support::report::{at_least, at_most, has_flag, option, place, rounds};
use support::server::Server;
use support::sql::Sql;

const FLAGS: [(&str, &str); 1] = [("--service-watch-subscribers-max", "20000")];
/// As many as the largest case has subscribers.
const TENANTS: usize = 5_000;
/// Who writes as fast as possible.
const WRITERS: usize = 4;
/// Longer than any case takes to deliver what was committed.
const DELIVERY_MAX: Duration = Duration::from_secs(120);

/// What is committed, and how.
#[derive(Clone, Copy)]
enum Load {
    /// So many transactions a second, each durable before the next.
    Paced(u64),
    /// As many as four connections can, `synchronous_commit` off.
    Unpaced,
    /// The same while tuplewatch is suspended: what is measured begins when it goes on.
    Backlog,
}

struct Case {
    name: &'static str,
    subscribers: usize,
    connections: usize,
    /// Their tenants, which take turns. The load's, but where they are `quiet`.
    tenants: usize,
    /// The load is another tenant's, with one subscriber more.
    quiet: bool,
    load: Load,
}

const CASES: [Case; 11] = [
    case("1", 1, 1, Load::Paced(200)),
    case("100", 100, 1, Load::Paced(200)),
    case("1000", 1_000, 10, Load::Paced(200)),
    case("5000", 5_000, 50, Load::Paced(50)),
    Case { tenants: 100, ..case("100-tenants", 100, 1, Load::Paced(200)) },
    Case { tenants: 1_000, ..case("1000-tenants", 1_000, 10, Load::Paced(200)) },
    Case { tenants: 5_000, ..case("5000-tenants", 5_000, 50, Load::Paced(200)) },
    Case { quiet: true, ..case("0-quiet", 0, 0, Load::Paced(200)) },
    Case { quiet: true, tenants: 1_000, ..case("1000-quiet", 1_000, 10, Load::Paced(200)) },
    case("saturated", 1_000, 10, Load::Unpaced),
    case("backlog", 1_000, 10, Load::Backlog),
];

const fn case(name: &'static str, subscribers: usize, connections: usize, load: Load) -> Case {
    Case { name, subscribers, connections, tenants: 1, quiet: false, load }
}

/// How large it is.
struct Scale {
    rounds: usize,
    seconds: u64,
    /// At most, where nothing paces them.
    transactions_max: u64,
    only: Option<String>,
}

impl Scale {
    fn from_arguments() -> Self {
        let (seconds, transactions_max) = if has_flag("--quick") { (2, 2_000) } else { (5, 20_000) };
        Self { rounds: rounds(), seconds, transactions_max, only: option("--case") }
    }
}

/// What one round of one case came to.
#[derive(Default)]
struct Round {
    delivered_per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// Of tuplewatch, with all that a transaction costs before it is delivered.
    cpu_us_per_message: f64,
    /// Of one core.
    cpu_percent: f64,
    resident_mib: f64,
    idle_kib_per_subscriber: f64,
}

/// What is said of it, the case, how it is measured, its unit, and what it may be at most.
type Target = (&'static str, &'static str, fn(&Round) -> f64, &'static str, f64);

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(run(&Scale::from_arguments()));
}

async fn run(scale: &Scale) {
    let postgres = Postgres::durable(&[("autovacuum", "on")]).await;
    let sql = postgres.sql().await;
    let place = place(&postgres);
    println!(
        "Fan-out: one tuple a transaction, to N subscribers. Rounds: {} of {} s, alternating.\n\
         {place}, shared with the subscribers; fsync is on. Figures: median (least to most).",
        scale.rounds, scale.seconds,
    );
    let mut server = Server::prepare(&postgres, &FLAGS).await;
    sql.run(&format!(
        "INSERT INTO tuplewatch.tenants (id, name) \
         SELECT kind || n, '' FROM generate_series(0, {TENANTS} - 1) n, unnest(ARRAY['load', 'quiet']) kind"
    ))
    .await;
    let chosen = |case: &&Case| scale.only.as_ref().is_none_or(|only| only == case.name);
    let cases: Vec<&Case> = CASES.iter().filter(chosen).collect();
    assert!(!cases.is_empty(), "--case is one of {:?}", CASES.map(|case| case.name));
    let mut results: BTreeMap<&str, Vec<Round>> = BTreeMap::new();
    for round in 0..scale.rounds {
        for case in &cases {
            let id = format!("{}-{round}", case.name);
            results.entry(case.name).or_default().push(one_round(case, scale, &id, &postgres, &mut server).await);
        }
    }
    tell(&cases, &results);
}

async fn one_round(case: &Case, scale: &Scale, id: &str, postgres: &Postgres, server: &mut Server) -> Round {
    server.start().await;
    server.serving().await;
    warm_up(id, postgres, server).await;
    let base_kib = server.memory_kib("VmRSS");
    let transactions_max = match case.load {
        Load::Paced(rate) => rate * scale.seconds,
        Load::Unpaced | Load::Backlog => scale.transactions_max,
    };
    let shared = Arc::new(Shared::new(transactions_max));
    let fleet = Fleet::launch(case, server.address(), &shared);
    shared.until("every stream is open", || shared.open.load(Relaxed) == case.streams()).await;
    let idle_kib = idle_kib(server).await.saturating_sub(base_kib);

    let cpu_before = cpu_time(server.pid());
    let mut began = shared.now();
    let transactions = match case.load {
        Load::Paced(rate) => paced(case, rate, transactions_max, id, postgres, &shared).await,
        Load::Unpaced => unpaced(scale, Duration::from_secs(scale.seconds), id, postgres).await,
        Load::Backlog => {
            server.suspend().await;
            let transactions = unpaced(scale, DELIVERY_MAX, id, postgres).await;
            began = shared.now();
            server.resume().await;
            transactions
        }
    };
    let expected = transactions * case.subscribers_a_transaction();
    shared.until("everything is delivered", || shared.delivered.load(Relaxed) >= expected).await;
    let cpu = cpu_time(server.pid()) - cpu_before;
    let resident_mib = server.memory_kib("VmRSS") as f64 / 1024.0;
    fleet.land();
    // Each subscriber has had a beginning of its sequence, without a gap: so all together have had all of it.
    assert_eq!((shared.delivered.load(Relaxed), shared.failed.load(Relaxed)), (expected, false), "{id}: delivered");
    server.terminate().await;
    server.ended().await;

    let seconds = Duration::from_nanos(shared.last_ns.load(Relaxed) - began).as_secs_f64();
    Round {
        delivered_per_second: expected as f64 / seconds,
        p50_ms: shared.latencies.quantile(0.5).as_secs_f64() * 1e3,
        p99_ms: shared.latencies.quantile(0.99).as_secs_f64() * 1e3,
        cpu_us_per_message: cpu.as_secs_f64() * 1e6 / expected as f64,
        cpu_percent: cpu.as_secs_f64() * 1e2 / seconds,
        resident_mib,
        idle_kib_per_subscriber: idle_kib as f64 / case.streams() as f64,
    }
}

/// What it has once it has given back what starting so many streams took: the allocator waits for a moment before it does.
async fn idle_kib(server: &Server) -> u64 {
    const UNCHANGED_FOR: Duration = Duration::from_secs(3);
    let (mut least, mut since) = (u64::MAX, Instant::now());
    while since.elapsed() < UNCHANGED_FOR {
        let now = server.memory_kib("VmRSS");
        if now < least {
            (least, since) = (now, Instant::now());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    least
}

/// What a process takes once it has delivered anything at all is no subscriber's.
async fn warm_up(id: &str, postgres: &Postgres, server: &Server) {
    let mut stream = Connection::open(server.address(), Windows::WIDE).await.watch("load0", "").await;
    let writer = Writer::new(postgres, format!("warm-up-{id}")).await;
    for number in 0..100 {
        writer.insert("load0", 0, number).await;
        let mut received = 0;
        while received == 0 {
            stream.read(|_| received += 1).await.unwrap();
        }
    }
}

/// Inserts numbered tuples.
struct Writer {
    sql: Sql,
    statement: tokio_postgres::Statement,
    /// In each tuple, which makes it differ from those of other rounds.
    subject: String,
}

/// An entity id is the number of the writer and that of its transaction, in ten digits: `0000001234`.
const NUMBERS_A_WRITER: u64 = 1_000_000_000;

impl Writer {
    async fn new(postgres: &Postgres, subject: String) -> Self {
        let sql = postgres.sql().await;
        let insert = "INSERT INTO tuplewatch.relation_tuples \
                          (tenant_id, entity_type, entity_id, relation, subject_type, subject_id) \
                      VALUES ($1, 'document', $2, 'viewer', 'user', $3)";
        let statement = sql.prepare(insert).await.unwrap();
        Self { sql, statement, subject }
    }

    async fn insert(&self, tenant: &str, writer: usize, number: u64) {
        let id = format!("{:010}", writer as u64 * NUMBERS_A_WRITER + number);
        self.sql.execute(&self.statement, &[&tenant, &id, &self.subject]).await.unwrap();
    }
}

async fn paced(case: &Case, rate: u64, count: u64, id: &str, postgres: &Postgres, shared: &Shared) -> u64 {
    let tenants: Vec<String> = (0..case.load_tenants()).map(|n| format!("load{n}")).collect();
    let writer = Writer::new(postgres, id.to_owned()).await;
    let began = tokio::time::Instant::now();
    for number in 0..count {
        tokio::time::sleep_until(began + Duration::from_secs(1).mul_f64(number as f64 / rate as f64)).await;
        writer.insert(&tenants[number as usize % tenants.len()], 0, number).await;
        shared.committed_ns[number as usize].store(shared.now(), Relaxed);
    }
    let took = began.elapsed().as_secs_f64();
    if count as f64 / took < rate as f64 * 0.95 {
        eprintln!("{id}: PostgreSQL committed {:.0} transactions a second, not {rate}", count as f64 / took);
    }
    count
}

/// As many as come about in this time, and at most the most that there should be.
async fn unpaced(scale: &Scale, time_max: Duration, id: &str, postgres: &Postgres) -> u64 {
    let began = Instant::now();
    let each = scale.transactions_max / WRITERS as u64;
    let write = async |writer| {
        let inserts = Writer::new(postgres, id.to_owned()).await;
        inserts.sql.run("SET synchronous_commit = off").await;
        let mut number = 0;
        while number < each && began.elapsed() < time_max {
            inserts.insert("load0", writer, number).await;
            number += 1;
        }
        number
    };
    join_all((0..WRITERS).map(write)).await.into_iter().sum()
}

impl Case {
    const fn load_tenants(&self) -> usize {
        if self.quiet { 1 } else { self.tenants }
    }

    const fn subscribers_a_transaction(&self) -> u64 {
        if self.quiet { 1 } else { (self.subscribers / self.tenants) as u64 }
    }

    const fn streams(&self) -> u64 {
        (self.subscribers + self.quiet as usize) as u64
    }

    /// A connection for each group.
    fn groups(&self) -> Vec<Vec<Subscriber>> {
        let mut groups: Vec<Vec<Subscriber>> = Vec::new();
        groups.resize_with(self.connections, Vec::new);
        for n in 0..self.subscribers {
            let tenant = n % self.tenants;
            let kind = if self.quiet { "quiet" } else { "load" };
            let subscriber = Subscriber {
                tenant: format!("{kind}{tenant}"),
                next: [tenant as u64, 0, 0, 0],
                step: self.load_tenants() as u64,
            };
            groups[n % self.connections].push(subscriber);
        }
        if self.quiet {
            groups.push(vec![Subscriber { tenant: "load0".to_owned(), next: [0; WRITERS], step: 1 }]);
        }
        groups
    }
}

/// What subscribers tell while they are at work.
struct Shared {
    epoch: Instant,
    /// When the commit of a number was acknowledged; 0 where that is yet to come.
    committed_ns: Vec<AtomicU64>,
    open: AtomicU64,
    delivered: AtomicU64,
    last_ns: AtomicU64,
    latencies: Histogram,
    failed: AtomicBool,
}

impl Shared {
    fn new(transactions_max: u64) -> Self {
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

    fn now(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    async fn until(&self, what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + DELIVERY_MAX;
        while !condition() {
            assert!(!self.failed.load(Relaxed), "a subscriber failed before {what}");
            let delivered = self.delivered.load(Relaxed);
            assert!(Instant::now() < deadline, "not within {DELIVERY_MAX:?}: {what}; {delivered} messages came");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Latencies, to within 3 %.
struct Histogram(Vec<AtomicU64>);

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
    fn quantile(&self, share: f64) -> Duration {
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
struct Fleet {
    stop: tokio::sync::oneshot::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl Fleet {
    fn launch(case: &Case, address: SocketAddr, shared: &Arc<Shared>) -> Self {
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
                    // They only ever end by failing, and have said why.
                    _ = subscribers.join_next() => shared.failed.store(true, Relaxed),
                }
            });
        });
        Self { stop, thread }
    }

    fn land(self) {
        let _ = self.stop.send(());
        self.thread.join().unwrap();
    }
}

struct Subscriber {
    tenant: String,
    /// The number that is due, by writer.
    next: [u64; WRITERS],
    step: u64,
}

impl Subscriber {
    async fn follow(mut self, connection: Connection, shared: Arc<Shared>) {
        let mut stream: RawStream = connection.watch(&self.tenant, "").await;
        shared.open.fetch_add(1, Relaxed);
        loop {
            let mut received = 0;
            // Of the first message that a frame completes; those with it have come together.
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
        // It may come before its writer has heard of the commit: 0 then.
        let committed = shared.committed_ns[number as usize].load(Relaxed);
        shared.latencies.add(if committed == 0 { 0 } else { now.saturating_sub(committed) }, 1);
    }
}

fn tell(cases: &[&Case], results: &BTreeMap<&str, Vec<Round>>) {
    let summary =
        |case: &Case, of: fn(&Round) -> f64| Summary::of(&results[case.name].iter().map(of).collect::<Vec<_>>());
    println!(
        "\n{:<14}{:>12}  {:<14}{:>34}{:>28}{:>28}",
        "case", "subscribers", "load", "delivered/s", "p50 ms", "p99 ms"
    );
    for case in cases {
        let (load, paced) = match case.load {
            Load::Paced(rate) => (format!("{rate}/s"), true),
            Load::Unpaced => ("4 writers".to_owned(), false),
            Load::Backlog => ("a backlog".to_owned(), false),
        };
        // Where nothing paces the load, latency is only the length of the queue.
        let latency = |of: fn(&Round) -> f64| if paced { format!("{:.2}", summary(case, of)) } else { "-".to_owned() };
        println!(
            "{:<14}{:>12}  {:<14}{:>34}{:>28}{:>28}",
            case.name,
            case.streams(),
            load,
            format!("{:.0}", summary(case, |round| round.delivered_per_second)),
            latency(|round| round.p50_ms),
            latency(|round| round.p99_ms),
        );
    }
    println!(
        "\n{:<14}{:>28}{:>28}{:>28}{:>28}",
        "case", "CPU µs/message", "CPU % of a core", "resident MiB", "KiB/idle subscriber"
    );
    for case in cases {
        let idle = summary(case, |round| round.idle_kib_per_subscriber);
        println!(
            "{:<14}{:>28}{:>28}{:>28}{:>28}",
            case.name,
            format!("{:.2}", summary(case, |round| round.cpu_us_per_message)),
            format!("{:.1}", summary(case, |round| round.cpu_percent)),
            format!("{:.1}", summary(case, |round| round.resident_mib)),
            if case.streams() < 100 { "-".to_owned() } else { format!("{idle:.1}") },
        );
    }
    println!();
    let median = |name: &str, of: fn(&Round) -> f64| {
        let case = cases.iter().find(|case| case.name == name)?;
        Some(summary(case, of).median)
    };
    let targets: [Target; 5] = [
        ("1,000 × 200, CPU a message", "1000", |round| round.cpu_us_per_message, " µs", 1.5),
        ("1,000 × 200, p99", "1000", |round| round.p99_ms, " ms", 5.0),
        ("5,000 × 50, CPU a message", "5000", |round| round.cpu_us_per_message, " µs", 1.5),
        ("5,000 × 50, p99", "5000", |round| round.p99_ms, " ms", 20.0),
        ("resident per idle subscriber", "5000", |round| round.idle_kib_per_subscriber, " KiB", 4.0),
    ];
    for (what, name, of, unit, limit) in targets {
        if let Some(value) = median(name, of) {
            println!("{}", at_most(what, value, limit, unit));
        }
    }
    for name in ["saturated", "backlog"] {
        if let Some(value) = median(name, |round| round.delivered_per_second / 1e6) {
            println!("{}", at_least(name, value, 2.0, " M/s"));
        }
    }
    // A message, as PostgreSQL may commit fewer than are due in one of the two.
    let cpu = |name| median(name, |round| round.cpu_us_per_message);
    if let (Some(without), Some(with)) = (cpu("0-quiet"), cpu("1000-quiet")) {
        // A tenth is what rounds differ by.
        println!("{}", at_most("CPU with 1,000 quiet subscribers, to that without", with / without, 1.1, " ×"));
    }
}
