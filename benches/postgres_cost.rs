//! Measures tuplewatch's cost for PostgreSQL, and checks that subscribers add none.
//!
//! `cargo bench --bench postgres_cost [-- --rounds N] [--quick]`. Transactions are written at a fixed rate, with 1, 100
//! and 1,000 subscribers in turn. It counts the statements of tuplewatch's role (with `pg_stat_statements`; the writer
//! has another role), the processor time of its backends and of its walsender, and the walsenders. Every subscriber
//! must receive every change. `--quick` is one round of 3 s for each number of subscribers.

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
    pub(crate) mod report;
    pub(crate) mod server;
    pub(crate) mod sql;
    pub(crate) mod stream;
    pub(crate) mod subscriber;
    pub(crate) mod wait;
}

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;
use support::measure::{Summary, cpu_time};
use support::postgres::Postgres;
use support::report::{at_most, has_flag, place, rounds};
use support::server::Server;
use support::sql::Sql;
use support::subscriber::{Subscriber, on_own_thread};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

const SUBSCRIBERS: [usize; 3] = [1, 100, 1_000];
const RATE: usize = 200;
const SECONDS: usize = 10;
const STREAMS_PER_CONNECTION: usize = 100;
/// The longest wait for the last change after the last commit.
const ARRIVES_WITHIN: Duration = Duration::from_secs(60);

#[tokio::main(worker_threads = 2)]
async fn main() {
    let seconds = if has_flag("--quick") { 3 } else { SECONDS };
    let mut postgres = Postgres::durable(&[]).await;
    let available = "EXISTS (SELECT FROM pg_available_extensions WHERE name = 'pg_stat_statements')";
    let has_extension = postgres.sql().await.is_true(available).await;
    assert!(has_extension, "this PostgreSQL has no pg_stat_statements: install its contrib package");
    postgres.stop_and_set(&[("shared_preload_libraries", "pg_stat_statements")]).await;
    postgres.start_again().await;
    postgres.sql().await.run("CREATE EXTENSION pg_stat_statements; CREATE ROLE observer SUPERUSER LOGIN").await;
    // The writer and this benchmark use this role, so everything else under the other role belongs to tuplewatch.
    let uri = postgres.uri().replacen("//postgres@", "//observer@", 1);
    let sql = Sql::connect(&uri).await;
    let server = Server::serve(&postgres, &[]).await;
    println!(
        "postgres_cost: {RATE} transactions a second for {seconds} s with each number of subscribers, {} round(s), {}\n  \
         round  subscribers  transactions/s  statements/s  of these snapshots  snapshots/transaction  backends cpu  walsender cpu  \
         tuplewatch cpu  walsenders",
        rounds(),
        place(&postgres),
    );
    let mut all: [Vec<Cost>; 3] = Default::default();
    for round in 0..rounds() {
        for turn in 0..SUBSCRIBERS.len() {
            let choice = (round + turn) % SUBSCRIBERS.len();
            let cost = measure(&server, &sql, &uri, SUBSCRIBERS[choice], seconds).await;
            cost.print(round + 1, SUBSCRIBERS[choice]);
            all[choice].push(cost);
        }
    }
    println!();
    for line in verdict(&all) {
        println!("{line}");
    }
}

/// The counts during the load.
struct Cost {
    seconds: f64,
    transactions: usize,
    statements: f64,
    /// The statements that decide whether a batch is visible.
    snapshots: f64,
    backends_cpu: Duration,
    walsender_cpu: Duration,
    tuplewatch_cpu: Duration,
    walsenders: f64,
}

impl Cost {
    fn statements_per_second(&self) -> f64 {
        self.statements / self.seconds
    }

    fn snapshots_per_transaction(&self) -> f64 {
        self.snapshots / self.transactions as f64
    }

    /// Processor time, in milliseconds a second.
    fn per_second_ms(&self, cpu: Duration) -> f64 {
        cpu.as_secs_f64() * 1e3 / self.seconds
    }

    fn print(&self, round: usize, subscribers: usize) {
        println!(
            "  {round:>5}  {subscribers:>11}  {:>14.1}  {:>12.1}  {:>18.1}  {:>21.2}  {:>7.1} ms/s  {:>8.1} ms/s  {:>9.1} ms/s  {:>10}",
            self.transactions as f64 / self.seconds,
            self.statements_per_second(),
            self.snapshots / self.seconds,
            self.snapshots_per_transaction(),
            self.per_second_ms(self.backends_cpu),
            self.per_second_ms(self.walsender_cpu),
            self.per_second_ms(self.tuplewatch_cpu),
            self.walsenders,
        );
    }
}

fn verdict(all: &[Vec<Cost>; 3]) -> Vec<String> {
    let median = |choice: usize, figure: &dyn Fn(&Cost) -> f64| {
        Summary::of(&all[choice].iter().map(figure).collect::<Vec<_>>()).median
    };
    let further = (SUBSCRIBERS[2] - SUBSCRIBERS[0]) as f64;
    let per_subscriber = |figure: &dyn Fn(&Cost) -> f64| (median(2, figure) - median(0, figure)) / further;
    let backends_cpu_us = |cost: &Cost| cost.per_second_ms(cost.backends_cpu) * 1e3;
    vec![
        format!("backends' cpu for each further subscriber: {:.2} µs a second", per_subscriber(&backends_cpu_us)),
        // Less than one in a hundred seconds, because periodic statements may fall into one run and not into the other.
        at_most(
            "statements a second for each further subscriber",
            per_subscriber(&Cost::statements_per_second),
            0.01,
            "",
        ),
        at_most("snapshots a transaction, 1 subscriber", median(0, &Cost::snapshots_per_transaction), 1.0, ""),
        at_most("snapshots a transaction, 1,000 subscribers", median(2, &Cost::snapshots_per_transaction), 1.0, ""),
        at_most("walsenders", all.iter().flatten().map(|cost| cost.walsenders).fold(0.0, f64::max), 1.0, ""),
    ]
}

/// Runs the load with this number of subscribers.
async fn measure(server: &Server, sql: &Sql, uri: &str, subscribers: usize, seconds: usize) -> Cost {
    let transactions = RATE * seconds;
    let (subscribed, are_subscribed) = oneshot::channel();
    let address = server.address();
    let received = tokio::spawn(on_own_thread(move || receive(address, subscribed, subscribers, transactions)));
    are_subscribed.await.expect("all streams");
    // The queries of their start do not belong to the steady state.
    sql.run("CHECKPOINT; SELECT pg_stat_statements_reset()").await;
    let before = Cpu::of(server, sql).await;
    let began = std::time::Instant::now();
    commit(uri, transactions).await;
    tokio::time::timeout(ARRIVES_WITHIN, received).await.expect("all changes arrive").unwrap();
    let seconds = began.elapsed().as_secs_f64();
    let after = Cpu::of(server, sql).await;
    let count = "SELECT coalesce(sum(calls), 0) FROM pg_stat_statements WHERE userid = 'postgres'::regrole";
    let statements = sql.value(count).await.parse().unwrap();
    let snapshots = sql.value(&format!("{count} AND query LIKE '%pg_current_snapshot%'")).await.parse().unwrap();
    let senders = sql.value("SELECT count(*) FROM pg_stat_replication").await.parse().unwrap();
    Cost {
        seconds,
        transactions,
        statements,
        snapshots,
        backends_cpu: since(&after.backends, &before.backends),
        walsender_cpu: since(&after.walsenders, &before.walsenders),
        tuplewatch_cpu: after.tuplewatch - before.tuplewatch,
        walsenders: senders,
    }
}

/// The processor time so far of each PostgreSQL process, by its id.
struct Cpu {
    backends: HashMap<u32, Duration>,
    walsenders: HashMap<u32, Duration>,
    tuplewatch: Duration,
}

impl Cpu {
    async fn of(server: &Server, sql: &Sql) -> Self {
        let of = async |backend_type| {
            let statement = format!(
                "SELECT pid FROM pg_stat_activity WHERE usename = 'postgres' AND backend_type = '{backend_type}'"
            );
            let pids = sql.rows(&statement).await.into_iter().map(|row| row[0].parse().unwrap());
            pids.map(|pid| (pid, cpu_time_of_one_thread(pid))).collect()
        };
        Self {
            backends: of("client backend").await,
            walsenders: of("walsender").await,
            tuplewatch: cpu_time(server.pid()),
        }
    }
}

/// The processor time in between. A new process began at zero.
fn since(after: &HashMap<u32, Duration>, before: &HashMap<u32, Duration>) -> Duration {
    after.iter().map(|(pid, cpu)| *cpu - before.get(pid).copied().unwrap_or_default()).sum()
}

/// Like [`cpu_time`], but in nanoseconds, and only of the first thread. A backend has only one.
fn cpu_time_of_one_thread(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
    Duration::from_nanos(stat.split_whitespace().next().unwrap().parse().unwrap())
}

/// Commits at the fixed rate.
async fn commit(uri: &str, count: usize) {
    let sql = Sql::connect(uri).await;
    let run = fastrand::u32(..);
    let mut interval = tokio::time::interval(Duration::from_secs(1) / RATE as u32);
    for number in 0..count {
        interval.tick().await;
        sql.insert("t1", &format!("{run}-{number}")).await;
    }
}

/// Subscribers that each receive a number of changes, in messages with distinct tokens.
async fn receive(address: SocketAddr, subscribed: oneshot::Sender<()>, subscribers: usize, changes: usize) {
    let mut streams = Vec::with_capacity(subscribers);
    let mut channel = None;
    for number in 0..subscribers {
        if number % STREAMS_PER_CONNECTION == 0 {
            channel = Some(Subscriber::connect(address).await);
        }
        streams.push(Subscriber::open(channel.clone().unwrap(), "t1", "").await);
    }
    subscribed.send(()).unwrap();
    let mut all = JoinSet::new();
    for mut stream in streams {
        all.spawn(async move {
            let (mut received, mut last) = (0, stream.start_token.clone());
            while received < changes {
                let message = stream.next().await;
                assert_ne!(message.snap_token, last, "every message has a token of its own");
                received += message.tuple_changes.len();
                last = message.snap_token;
            }
            assert_eq!(received, changes, "changes that one subscriber had");
        });
    }
    while let Some(ended) = all.join_next().await {
        ended.unwrap();
    }
}
