//! Measures the time from the acknowledgement of a commit to the receipt of its change, through tuplewatch and through
//! the bare driver.
//!
//! `cargo bench --bench latency [-- --rounds N] [--quick]`. One connection commits single-row transactions at a fixed
//! rate, without waiting for their delivery. A gRPC subscriber of tuplewatch and a bare reader of a second slot receive
//! them at the same time, each on a thread of its own. Each round runs once with the default, which releases only
//! visible transactions, and once with `service.watch.before_visible`. PostgreSQL streams a commit before it
//! acknowledges it, so times may be negative. The difference between tuplewatch and the bare reader is compared with a
//! round trip to PostgreSQL: the time of a `SELECT pg_current_snapshot()`, which a third thread measures throughout.
//! `--quick` is one round of 3 s.

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
    pub(crate) mod bare;
    pub(crate) mod change;
    pub(crate) mod measure;
    pub(crate) mod port;
    pub(crate) mod postgres;
    pub(crate) mod proxy;
    pub(crate) mod report;
    pub(crate) mod server;
    pub(crate) mod sql;
    pub(crate) mod stream;
    pub(crate) mod subscriber;
    pub(crate) mod wait;
}

use pgwire_replication::{ReplicationConfig, ReplicationEvent};
use prost::Message as _;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use support::bare::{Bare, is_row};
use support::measure::Summary;
use support::postgres::Postgres;
use support::report::{at_most, has_flag, place, rounds};
use support::server::Server;
use support::sql::Sql;
use support::subscriber::{Subscriber, on_own_thread};
use support::wait::eventually;
use tokio::sync::oneshot;
use tokio::time::MissedTickBehavior;
use tuplewatch::api::grpc::proto::{DataChange, data_change};
use tuplewatch::decode::pgoutput;

const RATE: usize = 500;
/// The interval of round trips.
const ASK_EVERY: Duration = Duration::from_millis(10);
const SECONDS: usize = 20;
/// The start of each run, which is not counted: caches fill, and connections are new.
const WARM_UP_SECONDS: usize = 1;
const SLOT: &str = "bench_bare";
const BEFORE_VISIBLE: &str = "--service-watch-before-visible";
/// The longest wait for the last change after the last commit.
const ARRIVES_WITHIN: Duration = Duration::from_secs(30);

#[tokio::main(worker_threads = 2)]
async fn main() {
    let seconds = if has_flag("--quick") { 3 } else { SECONDS };
    let postgres = Postgres::durable(&[]).await;
    let sql = postgres.sql().await;
    let mut server = Server::prepare(&postgres, &[]).await;
    println!(
        "latency: commit acknowledged to change received, in ms; {RATE} transactions a second for {seconds} s, \
         {} round(s), {}\n  \
         round  published        tuplewatch p50     p99     max        bare p50     p99     max     tuplewatch - bare p50     p99  \
         round trip p50     p99",
        rounds(),
        place(&postgres),
    );
    let mut modes = [Mode::new("when visible", "false"), Mode::new("at once", "true")];
    for round in 0..rounds() {
        // In turns, so that neither always follows the other.
        for turn in 0..2 {
            let mode = &mut modes[(round + turn) % 2];
            server.set(BEFORE_VISIBLE, mode.before_visible);
            sql.run("CHECKPOINT").await;
            mode.add(round, run(&postgres, &mut server, &sql, &format!("{round}-{turn}"), RATE * seconds).await);
        }
    }
    println!();
    let median = |rounds: &[f64]| Summary::of(rounds).median;
    for mode in &modes {
        let [p50, p99] = mode.added.each_ref().map(|rounds| median(rounds));
        println!("published {}: tuplewatch - bare: p50 {p50:.2} ms, p99 {p99:.2} ms", mode.name);
    }
    println!();
    let ratio = |mode: usize, quantile: usize| median(&modes[mode].ratios[quantile]);
    println!("{}", at_most("p50 above the bare reader's, in round trips", ratio(0, 0), 3.0, " ×"));
    println!("{}", at_most("p99 above the bare reader's, in round trips", ratio(0, 1), 3.0, " ×"));
    println!("{}", at_most("p50 above it, in round trips, before_visible", ratio(1, 0), 2.0, " ×"));
}

/// The moment of release, and its measurements.
struct Mode {
    name: &'static str,
    before_visible: &'static str,
    /// The differences between tuplewatch's and the bare reader's p50 and p99, in each round.
    added: [Vec<f64>; 2],
    /// The same in round trips: relative to their p50, and to their p99.
    ratios: [Vec<f64>; 2],
}

impl Mode {
    fn new(name: &'static str, before_visible: &'static str) -> Self {
        Self { name, before_visible, added: Default::default(), ratios: Default::default() }
    }

    fn add(&mut self, round: usize, run: Run) {
        let [[a, b, c], [d, e, f], [g, h, _]] = [run.tuplewatch, run.bare, run.round_trips].map(figures);
        for (quantile, (added, round_trip)) in [(a - d, g), (b - e, h)].into_iter().enumerate() {
            self.added[quantile].push(added);
            self.ratios[quantile].push(added / round_trip);
        }
        println!(
            "  {:>5}  {:<12}  {a:>17.2}  {b:>6.2}  {c:>6.2}  {d:>14.2}  {e:>6.2}  {f:>6.2}  {:>24.2}  {:>6.2}  {g:>14.2}  {h:>6.2}",
            round + 1,
            self.name,
            a - d,
            b - e,
        );
    }
}

/// Milliseconds from the acknowledgement to the receipt.
struct Run {
    tuplewatch: Vec<f64>,
    bare: Vec<f64>,
    /// Milliseconds from the query to its answer.
    round_trips: Vec<f64>,
}

/// The p50, the p99 and the maximum.
fn figures(mut times_ms: Vec<f64>) -> [f64; 3] {
    times_ms.sort_by(f64::total_cmp);
    [0.5, 0.99, 1.0].map(|share| times_ms[((times_ms.len() - 1) as f64 * share).round() as usize])
}

/// Runs a number of transactions with ids `{name}-{number}`.
async fn run(postgres: &Postgres, server: &mut Server, sql: &Sql, name: &str, count: usize) -> Run {
    sql.run(&format!("SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput')")).await;
    server.start().await;
    server.serving().await;
    let (subscribed, is_subscribed) = oneshot::channel();
    let (started, is_started) = oneshot::channel();
    let (address, uri, prefix) = (server.address(), postgres.uri(), format!("{name}-"));
    let tuplewatch = {
        let prefix = prefix.clone();
        tokio::spawn(on_own_thread(move || receive(address, subscribed, prefix, count)))
    };
    let bare = {
        let (config, prefix) = (postgres.replication_config(SLOT), prefix.clone());
        tokio::spawn(on_own_thread(move || read(config, started, prefix, count)))
    };
    is_subscribed.await.expect("a stream");
    is_started.await.expect("a stream");
    let asked = {
        let uri = uri.clone();
        tokio::spawn(on_own_thread(move || ask(uri, count)))
    };
    let acknowledged = tokio::spawn(on_own_thread(move || commit(uri, prefix, count))).await.unwrap();
    let round_trips = asked.await.unwrap();
    let arrived = async { (tuplewatch.await.unwrap(), bare.await.unwrap()) };
    let (tuplewatch, bare) = tokio::time::timeout(ARRIVES_WITHIN, arrived).await.expect("all changes arrive");
    server.terminate().await;
    assert!(server.ended().await.success(), "a stop that was asked for is no failure");
    let free = "NOT EXISTS (SELECT FROM pg_replication_slots WHERE active)";
    eventually("the slots are free", async || sql.is_true(free).await).await;
    // Its last acknowledgement may have been lost, and the next run must not receive old changes.
    sql.run(&format!("SELECT pg_drop_replication_slot('{SLOT}')")).await;
    let since = |received: Vec<Instant>| {
        let times = acknowledged.iter().zip(received).skip(WARM_UP_SECONDS * RATE);
        times.map(|(acknowledged, received)| millis(*acknowledged, received)).collect()
    };
    Run { tuplewatch: since(tuplewatch), bare: since(bare), round_trips }
}

/// Negative if it was received first.
fn millis(acknowledged: Instant, received: Instant) -> f64 {
    let after = received.saturating_duration_since(acknowledged).as_secs_f64();
    (after - acknowledged.saturating_duration_since(received).as_secs_f64()) * 1e3
}

/// Commits at the fixed rate. Returns the time of each acknowledgement.
async fn commit(uri: String, prefix: String, count: usize) -> Vec<Instant> {
    let sql = std::sync::Arc::new(Sql::connect(&uri).await);
    let insert = "INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'document', $1, 'viewer', 'user', 'u', '')";
    let insert = sql.prepare(insert).await.unwrap();
    let mut interval = tokio::time::interval(Duration::from_secs(1) / RATE as u32);
    interval.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut commits = Vec::with_capacity(count);
    for number in 0..count {
        interval.tick().await;
        let (sql, insert, id) = (sql.clone(), insert.clone(), format!("{prefix}{number}"));
        // Sent at once, even if earlier commits are not answered yet.
        commits.push(tokio::spawn(async move {
            sql.execute(&insert, &[&id]).await.unwrap();
            Instant::now()
        }));
    }
    let mut acknowledged = Vec::with_capacity(count);
    for commit in commits {
        acknowledged.push(commit.await.unwrap());
    }
    acknowledged
}

/// Queries a snapshot repeatedly while the transactions are written. Returns the milliseconds of each query.
async fn ask(uri: String, count: usize) -> Vec<f64> {
    let sql = Sql::connect(&uri).await;
    let snapshot = sql.prepare("SELECT pg_current_snapshot()::text").await.unwrap();
    let mut interval = tokio::time::interval(ASK_EVERY);
    let mut round_trips = Vec::new();
    let (began, lasts) = (Instant::now(), Duration::from_secs(1) * count as u32 / RATE as u32);
    while began.elapsed() < lasts {
        interval.tick().await;
        let asked = Instant::now();
        sql.query_one(&snapshot, &[]).await.unwrap();
        if asked - began >= Duration::from_secs(WARM_UP_SECONDS as u64) {
            round_trips.push(millis(asked, Instant::now()));
        }
    }
    round_trips
}

/// Subscribes to tuplewatch. Returns the time at which each transaction was received.
async fn receive(address: SocketAddr, subscribed: oneshot::Sender<()>, prefix: String, count: usize) -> Vec<Instant> {
    let mut subscriber = Subscriber::open(Subscriber::connect(address).await, "t1", "").await;
    subscribed.send(()).unwrap();
    let mut received = Vec::with_capacity(count);
    let mut changes = Vec::with_capacity(count);
    while changes.len() < count {
        let message = subscriber.next().await;
        received.resize(received.len() + message.tuple_changes.len(), Instant::now());
        changes.extend(message.tuple_changes);
    }
    for (number, change) in changes.into_iter().enumerate() {
        let Some(data_change::Type::Tuple(tuple)) = DataChange::decode(change).unwrap().r#type else {
            panic!("a tuple is due")
        };
        assert_eq!(tuple.entity.unwrap().id, format!("{prefix}{number}"), "what tuplewatch sent");
    }
    received
}

/// Reads the second slot. Returns the time at which the commit of each transaction was received.
async fn read(config: ReplicationConfig, started: oneshot::Sender<()>, prefix: String, count: usize) -> Vec<Instant> {
    let mut bare = Bare::start(config).await;
    started.send(()).unwrap();
    let mut received = Vec::with_capacity(count);
    let mut rows = Vec::with_capacity(count);
    while received.len() < count {
        match bare.next().await {
            event @ ReplicationEvent::XLogData { .. } if !is_row(&event) => {}
            ReplicationEvent::XLogData { data, .. } => rows.push(data),
            ReplicationEvent::Commit { .. } => received.resize(rows.len(), Instant::now()),
            _ => {}
        }
    }
    bare.close().await;
    for (number, row) in rows.iter().enumerate() {
        let pgoutput::Message::Insert { new, .. } = pgoutput::decode(row).unwrap() else { panic!("an Insert is due") };
        let id = format!("{prefix}{number}");
        assert_eq!(new.values().nth(2), Some(pgoutput::Value::Text(&id)), "what the bare reader had");
    }
    received
}
