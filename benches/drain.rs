//! Measures how fast a backlog is drained: by tuplewatch to a subscriber, by `pg_recvlogical` to a file, and by the
//! bare driver.
//!
//! `cargo bench --bench drain [-- --shape NAME] [--rounds N] [--quick]`. In each round three new slots wait behind the
//! same backlog. They are drained one after the other, in a different order in each round. tuplewatch's time lasts from
//! the start of its process until one gRPC subscriber has every change *and* the slot is acknowledged. Every change is
//! compared after the clock has stopped. `--quick` uses a tenth of the rows and one round.

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

use pgwire_replication::{Lsn, ReplicationEvent};
use prost::Message as _;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use support::bare::{Bare, is_row};
use support::measure::{Summary, cpu_time};
use support::postgres::Postgres;
use support::report::{at_least, has_flag, option, place, rounds};
use support::server::Server;
use support::sql::Sql;
use support::subscriber::{Changes, Subscriber, on_own_thread};
use support::wait::eventually;
use tokio::process::Command;
use tuplewatch::api::grpc::proto::{DataChange, data_change};

/// Connections that write the backlog.
const WRITERS: usize = 2;
/// Far more time than any drain takes.
const DRAIN_MAX: Duration = Duration::from_secs(600);

#[tokio::main(worker_threads = 2)]
async fn main() {
    let only = option("--shape");
    let scale = if has_flag("--quick") { 10 } else { 1 };
    let shapes: Vec<Shape> = SHAPES.into_iter().filter(|s| only.as_ref().is_none_or(|name| name == s.name)).collect();
    assert!(!shapes.is_empty(), "--shape is one of {:?}", SHAPES.map(|shape| shape.name));
    let postgres = Postgres::durable(&[]).await;
    println!(
        "drain: rows a second from a backlog; {} round(s), {}\n\
         tuplewatch: from process start until one subscriber has all and the slot is acknowledged; cpu of its process and of \
         its walsender, user+sys",
        rounds(),
        place(&postgres),
    );
    let mut targets = Vec::new();
    for shape in shapes {
        let shape = Shape { singles: shape.singles / scale, big_rows: shape.big_rows / scale, ..shape };
        targets.extend(measure(&postgres, shape).await);
    }
    println!("\n{}", targets.join("\n"));
}

/// The content of a backlog. Counts are per writer.
#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    /// The number of small transactions.
    singles: u64,
    /// The rows of each small transaction.
    rows: u64,
    /// The number of big transactions, evenly spread among the small ones.
    bigs: u64,
    /// The rows of each big transaction.
    big_rows: u64,
    /// Whether rows are attributes instead of tuples. The second half of the attributes replaces the first.
    is_attributes: bool,
    /// The least rate relative to `pg_recvlogical`, and to the bare reader.
    targets: (Option<f64>, Option<f64>),
}

const SHAPES: [Shape; 5] = [
    Shape { name: "large", singles: 100, bigs: 10, big_rows: 50_000, targets: (Some(1.5), None), ..SINGLE },
    Shape { name: "mixed", bigs: 5, big_rows: 100_000, targets: (Some(1.0), Some(0.8)), ..SINGLE },
    SINGLE,
    Shape { name: "tens", singles: 25_000, rows: 10, targets: (None, None), ..SINGLE },
    Shape { name: "attributes", is_attributes: true, targets: (None, None), ..SINGLE },
];

const SINGLE: Shape = Shape {
    name: "single",
    singles: 100_000,
    rows: 1,
    bigs: 0,
    big_rows: 0,
    is_attributes: false,
    targets: (None, Some(0.7)),
};

impl Shape {
    /// The rows of one writer.
    const fn rows_of_writer(&self) -> u64 {
        self.singles * self.rows + self.bigs * self.big_rows
    }

    /// All rows, including the one that marks the end.
    const fn rows(&self) -> u64 {
        WRITERS as u64 * self.rows_of_writer() + 1
    }

    const fn transactions(&self) -> u64 {
        WRITERS as u64 * (self.singles + self.bigs) + 1
    }

    /// All changes. An update is a delete and a create.
    const fn changes(&self) -> u64 {
        let further = if self.is_attributes { self.rows_of_writer() / 2 } else { 0 };
        self.rows() + WRITERS as u64 * further
    }

    /// The statement of one writer in one round. It commits inside, because that makes many transactions in little
    /// time.
    fn statement(&self, round: usize, writer: usize) -> String {
        let Self { singles, rows, bigs, big_rows, .. } = self;
        let every = singles / (*bigs).max(1);
        let id = format!("'{}-{round}-{writer}-'", self.name);
        let insert = |rows: u64| {
            format!(
                "INSERT INTO tuplewatch.relation_tuples \
                 SELECT 't1', 'document', {id} || m, 'viewer', 'user', 'user-' || m % 1000, '' \
                   FROM generate_series(n + 1, n + {rows}) m; n := n + {rows}; COMMIT;"
            )
        };
        let body = if self.is_attributes {
            let half = singles / 2;
            format!(
                "INSERT INTO tuplewatch.attributes VALUES ('t1', 'document', {id} || (k - 1) % {half} + 1, 'size', \
                 jsonb_build_object('@type', 'type.googleapis.com/base.v1.IntegerValue', 'data', (k - 1) / {half})) \
                 ON CONFLICT (tenant_id, entity_type, entity_id, attribute) DO UPDATE SET value = excluded.value; COMMIT;"
            )
        } else {
            format!("{} IF {bigs} > 0 AND k % {every} = 0 THEN {} END IF;", insert(*rows), insert(*big_rows))
        };
        format!("DO $$ DECLARE n bigint := 0; BEGIN FOR k IN 1..{singles} LOOP {body} END LOOP; END $$")
    }

    /// Whether the writer's change with this index is a create, and the number in its id.
    const fn expected(&self, index: u64) -> (bool, u64) {
        let half = self.singles / 2;
        if self.is_attributes && index >= half {
            let further = index - half;
            (further % 2 == 1, further / 2 + 1)
        } else {
            (true, index + 1)
        }
    }
}

/// The measurements of tuplewatch in one round.
struct Served {
    took: Duration,
    /// The time until the subscriber had everything.
    delivered: Duration,
    cpu: Duration,
    walsender_cpu: Duration,
    /// Bytes written to disk for each byte of changes.
    write_amplification: f64,
}

/// Runs and prints all rounds of one shape. Returns the lines about its targets.
async fn measure(postgres: &Postgres, shape: Shape) -> Vec<String> {
    println!("\n{}: {} rows in {} transactions", shape.name, shape.rows(), shape.transactions());
    println!(
        "  round  pg_recvlogical  bare reader  tuplewatch  /pg_recvlogical  /bare  last ack   cpu/row  walsender/row  \
         written/byte"
    );
    let mut columns: [Vec<f64>; 9] = Default::default();
    for round in 0..rounds() {
        let (recvlogical, bare, served) = round_of(postgres, shape, round).await;
        let rate = |took: Duration| shape.rows() as f64 / took.as_secs_f64();
        let micros_per_row = |cpu: Duration| cpu.as_secs_f64() * 1e6 / shape.rows() as f64;
        let figures = [
            rate(recvlogical),
            rate(bare),
            rate(served.took),
            recvlogical.as_secs_f64() / served.took.as_secs_f64(),
            bare.as_secs_f64() / served.took.as_secs_f64(),
            (served.took - served.delivered).as_secs_f64() * 1e3,
            micros_per_row(served.cpu),
            micros_per_row(served.walsender_cpu),
            served.write_amplification,
        ];
        print_line(&format!("{}", round + 1), &figures);
        columns.iter_mut().zip(figures).for_each(|(column, figure)| column.push(figure));
    }
    let summaries = columns.map(|column| Summary::of(&column));
    for (name, value) in [("median", summaries.map(|s| s.median)), ("min", summaries.map(|s| s.min))] {
        print_line(name, &value);
    }
    print_line("max", &summaries.map(|s| s.max));
    let line = |what: &str, summary: Summary, limit: f64| {
        at_least(&format!("drain {}, tuplewatch / {what}, median", shape.name), summary.median, limit, " ×")
    };
    let (recvlogical, bare) = shape.targets;
    let recvlogical = recvlogical.map(|limit| line("pg_recvlogical", summaries[3], limit));
    recvlogical.into_iter().chain(bare.map(|limit| line("bare reader", summaries[4], limit))).collect()
}

fn print_line(
    name: &str,
    [recvlogical, bare, served, to_recvlogical, to_bare, ack, cpu, walsender, written]: &[f64; 9],
) {
    println!(
        "  {name:>6}  {recvlogical:>12.0}/s  {bare:>9.0}/s  {served:>8.0}/s  {to_recvlogical:>14.2}×  {to_bare:>4.2}×  \
         {ack:>5.0} ms  {cpu:>5.2} µs  {walsender:>10.2} µs  {written:>12.2}"
    );
}

const RECVLOGICAL: &str = "bench_recvlogical";
const BARE: &str = "bench_bare";

/// Creates the slots and the backlog, and drains it three times.
async fn round_of(postgres: &Postgres, shape: Shape, round: usize) -> (Duration, Duration, Served) {
    let sql = postgres.sql().await;
    let mut server = Server::prepare(postgres, &[]).await;
    let token = token_before(&mut server).await;
    for slot in [RECVLOGICAL, BARE] {
        sql.run(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')")).await;
    }
    let end = write(postgres, shape, round).await;
    let (mut recvlogical, mut bare, mut served) = (None, None, None);
    for turn in 0..3 {
        // Without a checkpoint, this drain would also pay for writes of the one before.
        sql.run("CHECKPOINT").await;
        match (round + turn) % 3 {
            0 => recvlogical = Some(drain_to_file(postgres, &sql, &end).await),
            1 => bare = Some(drain_bare(postgres, shape, &end).await),
            _ => served = Some(drain_to_subscriber(&mut server, &sql, shape, round, &token, &end).await),
        }
    }
    let free = "NOT EXISTS (SELECT FROM pg_replication_slots WHERE active)";
    eventually("the slots are free", async || sql.is_true(free).await).await;
    sql.run("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots").await;
    (recvlogical.unwrap(), bare.unwrap(), served.unwrap())
}

/// A token from before the backlog. The server is stopped when this returns.
async fn token_before(server: &mut Server) -> String {
    server.start().await;
    server.serving().await;
    let subscriber = Subscriber::open(Subscriber::connect(server.address()).await, "t1", "").await;
    let token = subscriber.start_token.clone();
    drop(subscriber);
    server.terminate().await;
    assert!(server.ended().await.success(), "a stop that was asked for is no failure");
    token
}

/// Writes the backlog; returns the end LSN of its last transaction.
async fn write(postgres: &Postgres, shape: Shape, round: usize) -> String {
    let writer = async |writer| {
        let sql = postgres.sql().await;
        sql.run("SET synchronous_commit = off").await;
        sql.run(&shape.statement(round, writer)).await;
    };
    tokio::join!(writer(0), writer(1));
    let sql = postgres.sql().await;
    // The flush position below is then that of the commit, and not a later one.
    sql.run("CHECKPOINT").await;
    sql.insert("t1", &format!("{}-{round}-end", shape.name)).await;
    sql.flushed().await
}

async fn drain_to_file(postgres: &Postgres, sql: &Sql, end: &str) -> Duration {
    let directory = tempfile::tempdir().unwrap();
    let began = Instant::now();
    let status = Command::new(postgres.installation().bin_dir().join("pg_recvlogical"))
        .args(["--dbname", &postgres.uri(), "--slot", RECVLOGICAL, "--start", "--no-loop", "--endpos", end])
        .args(["-o", "proto_version=1", "-o", "publication_names=tuplewatch", "-o", "messages=true", "--file"])
        .arg(directory.path().join("changes"))
        .kill_on_drop(true)
        .status();
    let status = tokio::time::timeout(DRAIN_MAX, status).await.expect("pg_recvlogical ends").unwrap();
    let took = began.elapsed();
    assert!(status.success(), "pg_recvlogical: {status}");
    assert!(confirmed_reaches(sql, RECVLOGICAL, end).await, "pg_recvlogical ended before the backlog did");
    took
}

async fn confirmed_reaches(sql: &Sql, slot: &str, end: &str) -> bool {
    let confirmed = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name =";
    sql.is_true(&format!("({confirmed} '{slot}') >= '{end}'")).await
}

async fn drain_bare(postgres: &Postgres, shape: Shape, end: &str) -> Duration {
    let config = postgres.replication_config(BARE);
    let end: Lsn = end.parse().unwrap();
    let read = async move {
        let began = Instant::now();
        let mut bare = Bare::start(config).await;
        let mut rows = 0;
        loop {
            let event = bare.next().await;
            rows += u64::from(is_row(&event));
            if matches!(event, ReplicationEvent::Commit { end_lsn, .. } if end_lsn >= end) {
                break;
            }
        }
        let took = began.elapsed();
        bare.close().await;
        (took, rows)
    };
    // On a runtime of one thread, like tuplewatch's session: the driver and its reader do not wake each other's
    // threads.
    let read = tokio::task::spawn_blocking(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(tokio::time::timeout(DRAIN_MAX, read)).expect("the reader ends")
    });
    let (took, rows) = read.await.unwrap();
    assert_eq!(rows, shape.rows(), "rows that the bare reader had");
    took
}

async fn drain_to_subscriber(
    server: &mut Server,
    sql: &Sql,
    shape: Shape,
    round: usize,
    token: &str,
    end: &str,
) -> Served {
    let began = Instant::now();
    server.start().await;
    let (address, token) = (server.address(), token.to_owned());
    let receive = on_own_thread(move || receive(address, token, shape.changes()));
    let messages = tokio::time::timeout(DRAIN_MAX, receive).await.expect("all changes arrive");
    let delivered = began.elapsed();
    eventually("the slot is acknowledged", async || sql.confirmed_reaches(end).await).await;
    let took = began.elapsed();
    let cpu = cpu_time(server.pid());
    let (walsender, _) = sql.walsender().await.expect("a walsender");
    let walsender_cpu = cpu_time(walsender.parse().unwrap());
    let written = written_bytes(server.pid());
    server.terminate().await;
    assert!(server.ended().await.success(), "a stop that was asked for is no failure");
    let bytes: usize = messages.iter().flat_map(|message| &message.tuple_changes).map(bytes::Bytes::len).sum();
    verify(shape, round, &messages);
    Served { took, delivered, cpu, walsender_cpu, write_amplification: written as f64 / bytes as f64 }
}

async fn receive(address: SocketAddr, token: String, changes: u64) -> Vec<Changes> {
    let mut subscriber = Subscriber::open(Subscriber::connect(address).await, "t1", &token).await;
    let (mut messages, mut received) = (Vec::new(), 0);
    while received < changes {
        let message = subscriber.next().await;
        received += message.tuple_changes.len() as u64;
        messages.push(message);
    }
    messages
}

/// Fails if a change is missing, duplicated or out of order, or if a token comes twice.
fn verify(shape: Shape, round: usize, messages: &[Changes]) {
    let tokens: HashSet<&str> = messages.iter().map(|message| &*message.snap_token).collect();
    assert_eq!(tokens.len(), messages.len(), "every message has a token of its own");
    let prefix = format!("{}-{round}-", shape.name);
    let mut next = [0u64; WRITERS];
    let mut ended = false;
    for change in messages.iter().flat_map(|message| &message.tuple_changes) {
        assert!(!ended, "nothing comes after the end");
        let change = DataChange::decode(change.clone()).unwrap();
        let is_create = change.operation() == data_change::Operation::Create;
        let entity = match change.r#type.unwrap() {
            data_change::Type::Tuple(tuple) => tuple.entity.unwrap(),
            data_change::Type::Attribute(attribute) => attribute.entity.unwrap(),
        };
        let rest = entity.id.strip_prefix(&prefix).unwrap_or_else(|| panic!("of another round: {}", entity.id));
        let Some((writer, number)) = rest.split_once('-') else {
            assert_eq!(rest, "end");
            ended = true;
            continue;
        };
        let (writer, number): (usize, u64) = (writer.parse().unwrap(), number.parse().unwrap());
        assert_eq!((is_create, number), shape.expected(next[writer]), "change {} of {writer}", next[writer]);
        next[writer] += 1;
    }
    let all = (shape.changes() - 1) / WRITERS as u64;
    assert!(ended && next == [all; WRITERS], "changes that arrived: {next:?} of {all} each");
}

/// The bytes that a process has written to disk: `write_bytes` in proc(5)'s io.
fn written_bytes(pid: u32) -> u64 {
    let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: ")).unwrap();
    line.parse().unwrap()
}
