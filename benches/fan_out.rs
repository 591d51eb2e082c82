//! What a subscriber costs, and a message to it: for 1 to 5,000 subscribers, of one tenant and of as many.
//!
//! `cargo bench --bench fan_out [-- --quick] [--rounds N] [--case NAME]` (or `just bench fan_out`). In rounds that alternate
//! over the cases, each with a process of its own on one cluster. Every subscriber checks that it has every message once,
//! in order. They all live in one thread of this process, behind a client that costs little; but they, PostgreSQL and
//! tuplewatch share the machine, so figures compare within a run, and targets are ratios to two baselines of the same run:
//! tonic's usual way to serve a stream, and a bare loop on h2 (`fan_out/baseline.rs`). Both send the same subscribers the
//! same messages at the same rate. All three take turns, each round in another order.

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
    pub(crate) mod port;
    pub(crate) mod postgres;
    pub(crate) mod proxy;
    pub(crate) mod raw_watch;
    pub(crate) mod report;
    pub(crate) mod server;
    pub(crate) mod sql;
    pub(crate) mod stream;
    pub(crate) mod wait;
}

#[path = "fan_out/baseline.rs"]
mod baseline;
#[path = "fan_out/results.rs"]
mod results;
#[path = "fan_out/subscribers.rs"]
mod subscribers;

use baseline::{Baseline, Way};
use futures_util::future::join_all;
use results::Results;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use subscribers::{Fleet, Shared, Subscriber};
use support::measure::cpu_time;
use support::postgres::Postgres;
use support::raw_watch::{Connection, Windows};
use support::report::{has_flag, option, place, rounds};
use support::server::Server;
use support::sql::Sql;

/// The baselines have tuplewatch's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
        let (seconds, transactions_max) = if has_flag("--quick") { (2, 2_000) } else { (5, 10_000) };
        Self { rounds: rounds(), seconds, transactions_max, only: option("--case") }
    }
}

/// Who serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Contender {
    Tuplewatch,
    Baseline(Way),
}

use Contender::Tuplewatch;
const TONIC: Contender = Contender::Baseline(Way::Broadcast);
const H2: Contender = Contender::Baseline(Way::BareH2);

impl Contender {
    const fn name(self) -> &'static str {
        match self {
            Tuplewatch => "tuplewatch",
            TONIC => "tonic's way",
            H2 => "bare h2",
        }
    }
}

/// What one round of one case came to.
struct Round {
    written: Written,
    delivered_per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// Of who serves. Of tuplewatch, with all that a transaction costs before it is delivered.
    cpu_us_per_message: f64,
    /// Of one core.
    cpu_percent: f64,
    resident_mib: f64,
    idle_kib_per_subscriber: f64,
}

/// The load that came.
#[derive(Clone, Copy)]
struct Written {
    /// When what is measured began.
    began_ns: u64,
    transactions: u64,
    per_second: f64,
}

fn main() {
    if baseline::serve_if_asked() {
        return;
    }
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
    start(&mut server).await;
    let sample = warm_up("sample", &postgres, &server).await;
    stop(&mut server).await;
    let mut results = Results::default();
    for round in 0..scale.rounds {
        for case in &cases {
            let id = format!("{}-{round}", case.name);
            for turn in 0..case.contenders().len() {
                // tuplewatch first in the first round: the others have the load that it had.
                let contender = case.contenders()[(round + turn) % case.contenders().len()];
                let measured = match contender {
                    Tuplewatch => round_of_tuplewatch(case, scale, &id, &postgres, &mut server).await,
                    Contender::Baseline(way) => {
                        round_of_baseline(case, way, results.last_written(case), &id, &sample).await
                    }
                };
                results.add(case, contender, measured);
            }
        }
    }
    results.tell(&cases);
}

async fn start(server: &mut Server) {
    server.start().await;
    server.serving().await;
}

async fn stop(server: &mut Server) {
    server.terminate().await;
    server.ended().await;
}

async fn round_of_tuplewatch(case: &Case, scale: &Scale, id: &str, postgres: &Postgres, server: &mut Server) -> Round {
    start(server).await;
    warm_up(id, postgres, server).await;
    let transactions_max = match case.load {
        Load::Paced(rate) => rate * scale.seconds,
        Load::Unpaced | Load::Backlog => scale.transactions_max,
    };
    let process = Process { pid: server.pid(), address: server.address() };
    let round = process.measure(case, transactions_max, id, async |shared| match case.load {
        Load::Paced(rate) => {
            let tenants: Vec<String> = (0..case.load_tenants()).map(|n| format!("load{n}")).collect();
            let writer = Writer::new(postgres, id.to_owned()).await;
            let insert = async |number: u64| writer.insert(&tenants[number as usize % tenants.len()], 0, number).await;
            paced(rate as f64, transactions_max, id, shared, insert).await
        }
        Load::Unpaced => unpaced(scale, Duration::from_secs(scale.seconds), id, postgres, shared).await,
        Load::Backlog => {
            server.suspend().await;
            let written = unpaced(scale, DELIVERY_MAX, id, postgres, shared).await;
            let began_ns = shared.now();
            server.resume().await;
            Written { began_ns, ..written }
        }
    });
    let round = round.await;
    stop(server).await;
    round
}

/// As many messages as tuplewatch sent in its last round of this case, at the same rate.
async fn round_of_baseline(case: &Case, way: Way, as_written: Written, id: &str, sample: &[u8]) -> Round {
    let Written { transactions, per_second, .. } = as_written;
    let mut baseline = Baseline::start(way, case.tenants, transactions, sample).await;
    let process = Process { pid: baseline.pid(), address: baseline.address };
    process
        .measure(case, transactions, id, async |shared| match case.load {
            Load::Paced(rate) => {
                paced(rate as f64, transactions, id, shared, async |_| baseline.publish(1).await).await
            }
            Load::Unpaced => paced(per_second, transactions, id, shared, async |_| baseline.publish(1).await).await,
            Load::Backlog => {
                let began_ns = shared.now();
                baseline.publish(transactions).await;
                Written { began_ns, ..as_written }
            }
        })
        .await
}

/// Who serves the subscribers of a round.
struct Process {
    pid: u32,
    address: SocketAddr,
}

impl Process {
    /// Opens the streams of a case, has the load come, and waits until every subscriber has all of it.
    async fn measure(
        &self,
        case: &Case,
        transactions_max: u64,
        id: &str,
        load: impl AsyncFnOnce(&Shared) -> Written,
    ) -> Round {
        let base_kib = self.resident_kib();
        let shared = Arc::new(Shared::new(transactions_max));
        let fleet = Fleet::launch(case, self.address, &shared);
        shared.until("every stream is open", || shared.open.load(Relaxed) == case.streams()).await;
        let idle_kib = self.idle_kib().await.saturating_sub(base_kib);

        let cpu_before = cpu_time(self.pid);
        let written = load(&shared).await;
        let expected = written.transactions * case.subscribers_a_transaction();
        shared.until("everything is delivered", || shared.delivered.load(Relaxed) >= expected).await;
        let cpu = cpu_time(self.pid) - cpu_before;
        let resident_mib = self.resident_kib() as f64 / 1024.0;
        fleet.land();
        // Each subscriber has had a beginning of its sequence, without a gap: so all together have had all of it.
        assert_eq!((shared.delivered.load(Relaxed), shared.failed.load(Relaxed)), (expected, false), "{id}: delivered");

        let seconds = Duration::from_nanos(shared.last_ns.load(Relaxed) - written.began_ns).as_secs_f64();
        Round {
            written,
            delivered_per_second: expected as f64 / seconds,
            p50_ms: shared.latencies.quantile(0.5).as_secs_f64() * 1e3,
            p99_ms: shared.latencies.quantile(0.99).as_secs_f64() * 1e3,
            cpu_us_per_message: cpu.as_secs_f64() * 1e6 / expected as f64,
            cpu_percent: cpu.as_secs_f64() * 1e2 / seconds,
            resident_mib,
            idle_kib_per_subscriber: idle_kib as f64 / case.streams() as f64,
        }
    }

    fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        resident.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// What it has once it has given back what starting so many streams took: the allocator waits for a moment before it does.
    async fn idle_kib(&self) -> u64 {
        const UNCHANGED_FOR: Duration = Duration::from_secs(3);
        let (mut least, mut since) = (u64::MAX, Instant::now());
        while since.elapsed() < UNCHANGED_FOR {
            let now = self.resident_kib();
            if now < least {
                (least, since) = (now, Instant::now());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        least
    }
}

/// What a process takes once it has delivered anything at all is no subscriber's. Returns the last message that it sent.
async fn warm_up(id: &str, postgres: &Postgres, server: &Server) -> Vec<u8> {
    let mut stream = Connection::open(server.address(), Windows::WIDE).await.watch("load0", "").await;
    let writer = Writer::new(postgres, id.to_owned()).await;
    let mut last = Vec::new();
    for number in 0..100 {
        // None of those that are counted.
        writer.insert("load0", WRITERS, number).await;
        last.clear();
        while last.is_empty() {
            stream.read(|message| last = message.to_vec()).await.unwrap();
        }
    }
    last
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

/// Has the numbers come at this rate, one after the other.
async fn paced(rate: f64, count: u64, id: &str, shared: &Shared, mut write: impl AsyncFnMut(u64)) -> Written {
    let (began, began_ns) = (tokio::time::Instant::now(), shared.now());
    for number in 0..count {
        tokio::time::sleep_until(began + Duration::from_secs(1).mul_f64(number as f64 / rate)).await;
        write(number).await;
        shared.committed_ns[number as usize].store(shared.now(), Relaxed);
    }
    let per_second = count as f64 / began.elapsed().as_secs_f64();
    if per_second < rate * 0.95 {
        eprintln!("{id}: {per_second:.0} transactions a second came, not {rate:.0}");
    }
    Written { began_ns, transactions: count, per_second }
}

/// As many as come about in this time, and at most the most that there should be.
async fn unpaced(scale: &Scale, time_max: Duration, id: &str, postgres: &Postgres, shared: &Shared) -> Written {
    let (began, began_ns) = (Instant::now(), shared.now());
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
    let transactions: u64 = join_all((0..WRITERS).map(write)).await.into_iter().sum();
    Written { began_ns, transactions, per_second: transactions as f64 / began.elapsed().as_secs_f64() }
}

impl Case {
    /// A baseline has nothing to say of tenants that are quiet: these cases compare tuplewatch with itself.
    const fn contenders(&self) -> &'static [Contender] {
        if self.quiet { &[Tuplewatch] } else { &[Tuplewatch, TONIC, H2] }
    }

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
