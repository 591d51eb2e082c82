//! Measures the cost of a subscriber, and of a message to it, with 1 to 5,000 subscribers, of one tenant or of as many
//! tenants.
//!
//! `cargo bench --bench fan_out [-- --quick] [--rounds N] [--case NAME]` (or `just bench fan_out`). Rounds alternate
//! over the cases. Each has a process of its own, all on one cluster. Every subscriber checks that it receives every
//! message once, in order. All subscribers run in one thread of this process, with a cheap client. They share the
//! machine with PostgreSQL and tuplewatch, so figures compare only within a run. The targets are ratios to two
//! baselines of the same run: tonic's usual way to serve a stream, and a bare loop on h2 (`fan_out/baseline.rs`). Both
//! send the same messages to the same subscribers at the same rate. All three take turns, in a different order in each
//! round.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark fails at an unmet expectation, and prints its measurements"
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

/// The same allocator as tuplewatch, for the baselines.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const FLAGS: [(&str, &str); 1] = [("--service-watch-subscribers-max", "20000")];
/// As many as the largest case has subscribers.
const TENANTS: usize = 5_000;
/// Connections that write as fast as possible.
const WRITERS: usize = 4;
/// More time than any case needs to deliver the committed transactions.
const DELIVERY_MAX: Duration = Duration::from_secs(120);

/// The committed transactions, and their pace.
#[derive(Clone, Copy)]
enum Load {
    /// A number of transactions a second, each durable before the next.
    Paced(u64),
    /// As many as four connections can commit with `synchronous_commit` off.
    Unpaced,
    /// The same, while tuplewatch is suspended. The measurement begins when it resumes.
    Backlog,
}

struct Case {
    name: &'static str,
    subscribers: usize,
    connections: usize,
    /// The number of tenants of the subscribers. The load goes to the same tenants, unless they are `quiet`.
    tenants: usize,
    /// Whether the load goes to a different tenant, which has one additional subscriber.
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

/// The extent of a run.
struct Scale {
    rounds: usize,
    seconds: u64,
    /// The most transactions of an unpaced load.
    transactions_max: u64,
    only: Option<String>,
}

impl Scale {
    fn from_arguments() -> Self {
        let (seconds, transactions_max) = if has_flag("--quick") { (2, 2_000) } else { (5, 10_000) };
        Self { rounds: rounds(), seconds, transactions_max, only: option("--case") }
    }
}

/// The server of a round.
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

/// The measurements of one round of one case.
struct Round {
    written: Written,
    delivered_per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// The processor time of the server. For tuplewatch it includes the whole cost of a transaction before its
    /// delivery.
    cpu_us_per_message: f64,
    /// Relative to one core.
    cpu_percent: f64,
    resident_mib: f64,
    idle_kib_per_subscriber: f64,
}

/// The load of a round.
#[derive(Clone, Copy)]
struct Written {
    /// The start of the measurement.
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
                // tuplewatch comes first in the first round, because the others repeat its load.
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

/// Sends as many messages as tuplewatch sent in its last round of this case, at the same rate.
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

/// The process that serves the subscribers of a round.
struct Process {
    pid: u32,
    address: SocketAddr,
}

impl Process {
    /// Opens the streams of a case, runs the load, and waits until every subscriber has received everything.
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
        // Each subscriber received a gapless beginning of its sequence, so together they received everything.
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

    /// The memory after the start of all streams. The allocator returns the memory of the start only after a moment.
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

/// Delivers some messages, so that the cost of the first delivery is not attributed to a subscriber. Returns the last
/// message.
async fn warm_up(id: &str, postgres: &Postgres, server: &Server) -> Vec<u8> {
    let mut stream = Connection::open(server.address(), Windows::WIDE).await.watch("load0", "").await;
    let writer = Writer::new(postgres, id.to_owned()).await;
    let mut last = Vec::new();
    for number in 0..100 {
        // This writer's number is not among the counted ones.
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
    /// Part of each tuple, so that it differs from the tuples of other rounds.
    subject: String,
}

/// The id of an entity: the number of the writer and of its transaction, each with ten digits: `0000001234`.
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

/// Runs `insert` with ascending numbers at this rate.
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

/// Commits as many transactions as possible in this time, up to the limit.
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
    /// Baselines have nothing for quiet tenants, so those cases compare tuplewatch with itself.
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

    /// One connection for each group.
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
