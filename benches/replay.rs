//! Measures late returns: one subscriber that is far behind, one of a small tenant, and 500 at once.
//!
//! `cargo bench --bench replay [-- --quick] [--rounds N] [--changes N]` (or `just bench replay`). The log holds 10 M
//! changes of 1,000 tenants, and a tenth as many of one large tenant in between; transactions have 1,000 rows. Rounds
//! alternate over the cases. tuplewatch is restarted for each case, with a window of 1 MiB, so that it reads from its
//! files; the system's page cache stays warm. Every subscriber checks that it receives every change once, in order. A
//! subscriber that is far behind could read its state anew instead, so that is measured too: `COPY` of the same
//! tenant's rows.

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

use futures_util::stream::StreamExt as _;
use std::time::{Duration, Instant};
use support::measure::{Summary, cpu_time};
use support::postgres::Postgres;
use support::raw_watch::{Connection, Windows, changes, decimal, entity_id};
use support::report::{at_least, has_flag, number, place, rounds};
use support::server::Server;

const SETTINGS: [(&str, &str); 2] = [
    ("autovacuum", "on"),
    // The log is the subject, so its creation may be fast and unsafe.
    ("synchronous_commit", "off"),
];
const FLAGS: [(&str, &str); 2] = [("--changelog-memory-window", "1MiB"), ("--changelog-retention-size", "100GiB")];
const CHANGES: u64 = 10_000_000;
const QUICK: u64 = 200_000;
const TENANTS: u64 = 1_000;
const ROWS_A_TRANSACTION: u64 = 1_000;
const LARGE: &str = "large";
/// The number of subscribers that return at once, and of their connections.
const MANY: u64 = 500;
const CONNECTIONS: u64 = 10;
/// More time than any replay takes.
const REPLAY_MAX: Duration = Duration::from_secs(600);

/// The size of a run.
struct Scale {
    rounds: usize,
    /// The changes of a small tenant, and of the large one. Both are whole transactions.
    small: u64,
    large: u64,
}

impl Scale {
    fn from_arguments() -> Self {
        let changes = number("--changes").unwrap_or(if has_flag("--quick") { QUICK } else { CHANGES });
        // A small log has smaller transactions, but not fewer tenants.
        let large = changes / 10;
        let small = (changes - large) / TENANTS;
        Self { rounds: rounds(), small, large }
    }

    const fn all(&self) -> u64 {
        self.small * TENANTS + self.large
    }
}

/// The measurements of the rounds.
#[derive(Default)]
struct Figures {
    /// The changes a second of the subscriber that is far behind, and the time to its first message.
    far_behind: Vec<f64>,
    first_ms: Vec<f64>,
    cpu_us_per_change: Vec<f64>,
    /// The rows a second by COPY, and the factor by which the subscriber is faster.
    copy: Vec<f64>,
    to_copy: Vec<f64>,
    small_ms: Vec<f64>,
    /// All subscribers together, in changes a second; and the time of the slowest.
    many: Vec<f64>,
    slowest_s: Vec<f64>,
    peak_mib: Vec<f64>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let scale = Scale::from_arguments();
    let postgres = Postgres::durable(&SETTINGS).await;
    let place = place(&postgres);
    println!(
        "Replay from a log of {} changes: {TENANTS} tenants of {}, and one of {}. {} rounds, alternating, each with a new \
         process\nand a window of 1 MiB; the page cache is warm. {place}, shared with the subscribers.",
        scale.all(),
        scale.small,
        scale.large,
        scale.rounds,
    );
    let mut server = Server::prepare(&postgres, &FLAGS).await;
    let token = write(&scale, &postgres, &mut server).await;
    let mut figures = Figures::default();
    for round in 0..scale.rounds as u64 {
        far_behind(&scale, &mut server, &token, &mut figures).await;
        copy(&scale, &postgres, &mut figures).await;
        // Another tenant in each round.
        small(&scale, &mut server, &token, round % TENANTS, &mut figures).await;
        many(&scale, &mut server, &token, &mut figures).await;
    }
    tell(&scale, &figures);
}

/// Fills the log, and stops the server. Returns the token from before.
async fn write(scale: &Scale, postgres: &Postgres, server: &mut Server) -> String {
    let sql = postgres.sql().await;
    sql.run(&format!(
        "INSERT INTO tuplewatch.tenants (id, name) SELECT 'small' || n, '' FROM generate_series(0, {TENANTS} - 1) n \
             UNION ALL SELECT '{LARGE}', ''"
    ))
    .await;
    server.start().await;
    server.serving().await;
    let token = Connection::open(server.address(), Windows::WIDE).await.watch(LARGE, "").await.start_token;

    let began = Instant::now();
    let insert = async |tenant: &str, from: u64, to: u64| {
        sql.run(&format!(
            "INSERT INTO tuplewatch.relation_tuples SELECT '{tenant}', 'document', lpad(n::text, 10, '0'), 'viewer', 'user', \
                 'user-' || n, '' FROM generate_series({from}, {to} - 1) n"
        ))
        .await;
    };
    // In turns, so that no tenant's changes are adjacent.
    let steps = scale.small.div_ceil(ROWS_A_TRANSACTION);
    let (mut turn, turns) = (0, steps * TENANTS);
    for step in 0..steps {
        let from = step * ROWS_A_TRANSACTION;
        for tenant in 0..TENANTS {
            insert(&format!("small{tenant}"), from, (from + ROWS_A_TRANSACTION).min(scale.small)).await;
            let large = |turn| (scale.large * turn / turns) / ROWS_A_TRANSACTION * ROWS_A_TRANSACTION;
            turn += 1;
            // The last turn includes the remainder.
            let to = if turn == turns { scale.large } else { large(turn) };
            if to > large(turn - 1) {
                insert(LARGE, large(turn - 1), to).await;
            }
        }
    }
    // Also flushes the commits before, which would otherwise come after the restart.
    sql.run("BEGIN; SET LOCAL synchronous_commit = on; SELECT pg_logical_emit_message(true, 'end', ''); COMMIT").await;
    let flushed = sql.flushed().await;
    let written = began.elapsed();
    let deadline = Instant::now() + REPLAY_MAX;
    while !sql.confirmed_reaches(&flushed).await {
        assert!(Instant::now() < deadline, "the log has everything");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!(
        "Written in {:.0} s, and in the log {:.1} s later, with {} MiB on disk.",
        written.as_secs_f64(),
        (began.elapsed() - written).as_secs_f64(),
        size_mib(&server.changelog()),
    );
    stop(server).await;
    token
}

fn size_mib(path: &std::path::Path) -> u64 {
    fn bytes(path: &std::path::Path) -> u64 {
        let metadata = std::fs::symlink_metadata(path).map_or(0, |metadata| metadata.len());
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        metadata + entries.map(|entry| bytes(&entry.path())).sum::<u64>()
    }
    bytes(path) >> 20
}

async fn start(server: &mut Server) -> Connection {
    server.start().await;
    server.serving().await;
    Connection::open(server.address(), Windows::WIDE).await
}

async fn stop(server: &mut Server) {
    server.terminate().await;
    server.ended().await;
}

/// Follows a tenant from this token until a number of changes has arrived. Returns the time of the first message.
async fn replay(connection: &Connection, tenant: &str, token: &str, count: u64) -> Instant {
    let mut first = None;
    let work = async {
        let mut stream = connection.watch(tenant, token).await;
        let mut due = 0;
        while due < count {
            let read = stream.read(|message| {
                first.get_or_insert_with(Instant::now);
                changes(message, |change| {
                    let number = decimal(entity_id(change));
                    assert_eq!(number, due, "{tenant}: what came, and what was due");
                    due += 1;
                });
            });
            read.await.unwrap_or_else(|error| panic!("the connection of {tenant} failed: {error}"));
        }
        assert_eq!(due, count, "{tenant}: more came than was written");
    };
    let in_time = tokio::time::timeout(REPLAY_MAX, work).await;
    in_time.unwrap_or_else(|_| panic!("{tenant} did not have everything within {REPLAY_MAX:?}"));
    first.unwrap()
}

async fn far_behind(scale: &Scale, server: &mut Server, token: &str, figures: &mut Figures) {
    let connection = start(server).await;
    let (began, cpu) = (Instant::now(), cpu_time(server.pid()));
    let first = replay(&connection, LARGE, token, scale.large).await;
    let seconds = began.elapsed().as_secs_f64();
    let cpu = cpu_time(server.pid()) - cpu;
    figures.far_behind.push(scale.large as f64 / seconds);
    figures.first_ms.push((first - began).as_secs_f64() * 1e3);
    figures.cpu_us_per_change.push(cpu.as_secs_f64() * 1e6 / scale.large as f64);
    stop(server).await;
}

/// Reads the rows of the tenant from its table.
async fn copy(scale: &Scale, postgres: &Postgres, figures: &mut Figures) {
    let sql = postgres.sql().await;
    let began = Instant::now();
    let statement = format!("COPY (SELECT * FROM tuplewatch.relation_tuples WHERE tenant_id = '{LARGE}') TO STDOUT");
    let rows = sql.copy_out(statement.as_str()).await.unwrap();
    // COPY returns each row by itself.
    let count = rows.fold(0, async |count, row| count + row.map(|_| 1).unwrap()).await;
    let seconds = began.elapsed().as_secs_f64();
    assert_eq!(count, scale.large, "rows of {LARGE}");
    let per_second = count as f64 / seconds;
    figures.copy.push(per_second);
    figures.to_copy.push(figures.far_behind.last().unwrap() / per_second);
}

async fn small(scale: &Scale, server: &mut Server, token: &str, tenant: u64, figures: &mut Figures) {
    let connection = start(server).await;
    let began = Instant::now();
    replay(&connection, &format!("small{tenant}"), token, scale.small).await;
    figures.small_ms.push(began.elapsed().as_secs_f64() * 1e3);
    stop(server).await;
}

async fn many(scale: &Scale, server: &mut Server, token: &str, figures: &mut Figures) {
    let mut connections = vec![start(server).await];
    while (connections.len() as u64) < CONNECTIONS {
        connections.push(Connection::open(server.address(), Windows::WIDE).await);
    }
    let began = Instant::now();
    let mut subscribers = tokio::task::JoinSet::new();
    for tenant in 0..MANY {
        let connection = connections[(tenant % CONNECTIONS) as usize].clone();
        let (token, count) = (token.to_owned(), scale.small);
        subscribers.spawn(async move {
            replay(&connection, &format!("small{tenant}"), &token, count).await;
        });
    }
    // The last to end is the slowest.
    subscribers.join_all().await;
    let seconds = began.elapsed().as_secs_f64();
    figures.many.push((scale.small * MANY) as f64 / seconds);
    figures.slowest_s.push(seconds);
    figures.peak_mib.push(server.memory_kib("VmHWM") as f64 / 1024.0);
    stop(server).await;
}

fn tell(scale: &Scale, figures: &Figures) {
    let (far_behind, small_ms) = (Summary::of(&figures.far_behind), Summary::of(&figures.small_ms));
    let line = |what: &str, figure: String| println!("{what:<58}{figure}");
    println!();
    line(&format!("{} changes behind: changes a second", scale.large), format!("{far_behind:.0}"));
    line("  first message after, ms", format!("{:.1}", Summary::of(&figures.first_ms)));
    line("  rows a second of a COPY instead", format!("{:.0}", Summary::of(&figures.copy)));
    line("  CPU of tuplewatch a change, µs", format!("{:.2}", Summary::of(&figures.cpu_us_per_change)));
    line(&format!("a tenant of {} changes: ms until all are there", scale.small), format!("{small_ms:.1}"));
    line(
        &format!("{MANY} tenants at once: changes a second, all together"),
        format!("{:.0}", Summary::of(&figures.many)),
    );
    line("  the slowest of them, s", format!("{:.2}", Summary::of(&figures.slowest_s)));
    line("  resident memory at the most, MiB", format!("{:.0}", Summary::of(&figures.peak_mib)));
    // There is no request for a full scan, so this extrapolates the rate of the first case to the whole log.
    let scan_ms = scale.all() as f64 * 1e3 / far_behind.median;
    let share = scale.all() as f64 / scale.small as f64;
    println!(
        "\nA scan of the whole log would take {:.1} s, computed: all {} changes at the rate of the first case.\n\
         The small tenant has a {share:.0}th of the changes, and took a {:.0}th of that time.\n",
        scan_ms / 1e3,
        scale.all(),
        scan_ms / small_ms.median,
    );
    println!("{}", at_least("far behind, to COPY", Summary::of(&figures.to_copy).median, 2.0, " ×"));
    // In proportion, except for the time to open a stream.
    println!("{}", at_least("a scan of everything, to a small tenant", scan_ms / small_ms.median, 100.0, " ×"));
}
