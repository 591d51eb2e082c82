//! Every committed change, exactly once, in commit order, to everybody: against what PostgreSQL itself says was committed.
//!
//! Writers run random transactions, while subscribers disconnect at random and come back with a random token of a message
//! that they kept, forgetting what came after it. What each of them has in the end must be, change by change, what an
//! independent reading of a second slot has, and add up to what is in the tables.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::reference;
use crate::support::server::Server;
use crate::support::stream::{Message, Stream};
use crate::support::wait::{PATIENCE, eventually, within};
use crate::support::writer::{Habits, TENANTS, Writers, add_tenants, seed};
use fastrand::Rng;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tonic::transport::Endpoint;
use tonic::{Code, Status};
use tuplewatch::dev_postgres::StopMode;

const WRITERS: u64 = 8;
const SUBSCRIBERS: u64 = 6;
/// Tokens to come back with are mostly among those of the last messages, so that a run gets on.
const RECENT: usize = 64;

/// Small messages, a small window: transactions in many messages, and much reading from disk.
const TIGHT: [(&str, &str); 2] = [("--service-watch-message-size-max", "1KiB"), ("--changelog-memory-window", "1MiB")];
/// What a message has besides its changes: the token and the framing.
const FRAMING_BYTES_MAX: usize = 128;

#[derive(Clone, Copy, Default)]
struct Chaos {
    kills_server: bool,
    crashes_postgres: bool,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_gets_everything() {
    run(&[], 1 << 20, Chaos::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_gets_everything_in_small_messages_from_disk() {
    run(&TIGHT, 1 << 10, Chaos::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_gets_everything_while_tuplewatch_is_killed() {
    run(&TIGHT, 1 << 10, Chaos { kills_server: true, ..Chaos::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_gets_everything_while_postgres_crashes() {
    run(&TIGHT, 1 << 10, Chaos { crashes_postgres: true, ..Chaos::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_gets_everything_while_both_crash() {
    run(&[], 1 << 20, Chaos { kills_server: true, crashes_postgres: true }).await;
}

async fn run(flags: &[(&str, &str)], message_bytes: usize, chaos: Chaos) {
    let seed = seed();
    let mut postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, flags).await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    reference::begin(&sql).await;

    let received = Arc::new(AtomicU64::new(0));
    let is_over = Arc::new(AtomicBool::new(false));
    let mut subscribers = Vec::new();
    for n in 0..SUBSCRIBERS {
        let tenant = TENANTS[usize::try_from(n).unwrap() % TENANTS.len()];
        // Some start now, some after a transaction.
        let token = if n % 2 == 0 { String::new() } else { sql.value("SELECT tuplewatch.snap_token()").await };
        let stream = server.watch(tenant, &token).await;
        let subscriber = Subscriber {
            endpoint: server.endpoint(),
            tenant,
            first_token: token,
            random: Rng::with_seed(seed.wrapping_add(100 + n)),
            chaos,
            message_bytes,
            received: received.clone(),
            is_over: is_over.clone(),
            kept: Vec::new(),
            returns: 0,
        };
        subscribers.push(tokio::spawn(subscriber.run(stream)));
    }

    let habits = Habits { is_big: true, is_patient: chaos.crashes_postgres };
    let writers = Writers::start(&postgres.uri(), WRITERS, seed, habits);
    disturb(&mut postgres, &mut server, chaos, seed, &received, &writers).await;
    let committed = writers.stop().await;
    drop(sql);

    let sql = postgres.sql().await;
    let last = TENANTS.map(|tenant| format!("('{tenant}', 'end', 'end', 'end', 'end', 'end')")).join(", ");
    sql.run(&format!("INSERT INTO tuplewatch.relation_tuples VALUES {last}")).await;
    is_over.store(true, Ordering::Relaxed);

    let transactions = reference::read(&sql).await;
    eprintln!("{committed} committed, {} according to the slot", transactions.len());
    assert!(transactions.len() > 300, "too little was written to show anything: {}", transactions.len());
    let mut returns = 0;
    for subscriber in subscribers {
        let subscriber = within("everybody has everything", subscriber).await.unwrap();
        returns += subscriber.returns;
        subscriber.check(&reference::of_tenant(&transactions, subscriber.tenant), &sql.facts(subscriber.tenant).await);
    }
    assert!(returns >= 5 * SUBSCRIBERS, "too few came back to show anything: {returns}");
    server.terminate().await;
    assert!(server.ended().await.success());
}

/// The load, and what goes wrong meanwhile.
async fn disturb(
    postgres: &mut Postgres,
    server: &mut Server,
    chaos: Chaos,
    seed: u64,
    received: &AtomicU64,
    writers: &Writers,
) {
    const LOAD: Duration = Duration::from_secs(12);
    let mut random = Rng::with_seed(seed.wrapping_add(1000));
    let began = Instant::now();
    let (mut kills, mut crashes) = (0, 0);
    while began.elapsed() < LOAD || (chaos.kills_server && kills < 5) || (chaos.crashes_postgres && crashes < 3) {
        assert!(began.elapsed() < 3 * PATIENCE, "{kills} kills and {crashes} crashes took too long");
        // In the midst of things: somebody writes, and somebody receives.
        let (committed_before, received_before) = (writers.committed(), received.load(Ordering::Relaxed));
        eventually("the load goes on", async || {
            writers.committed() > committed_before && received.load(Ordering::Relaxed) > received_before
        })
        .await;
        tokio::time::sleep(Duration::from_millis(random.u64(200..1200))).await;
        let crashes_postgres = chaos.crashes_postgres && (!chaos.kills_server || random.u8(..3) == 0);
        if crashes_postgres {
            postgres.stop(StopMode::Immediate).await;
            if chaos.kills_server && random.bool() {
                server.kill_9().await;
                postgres.start_again().await;
                server.start().await;
                kills += 1;
            } else {
                postgres.start_again().await;
            }
            crashes += 1;
        } else if chaos.kills_server {
            server.kill_9().await;
            server.start().await;
            kills += 1;
        }
    }
    eprintln!("{kills} kills of tuplewatch, {crashes} crashes of PostgreSQL");
}

struct Subscriber {
    endpoint: Endpoint,
    tenant: &'static str,
    first_token: String,
    random: Rng,
    chaos: Chaos,
    message_bytes: usize,
    /// Messages of all subscribers together.
    received: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
    kept: Vec<Message>,
    /// How often it disconnected and came back.
    returns: u64,
}

impl Subscriber {
    async fn run(mut self, first: Stream) -> Self {
        let last = Change::create(Change::tuple("end", "end", "end", "end", "end", ""));
        let mut stream = first;
        loop {
            let patience = self.random.usize(1..300);
            if self.read(&mut stream, patience, &last).await {
                return self;
            }
            drop(stream);
            self.forget();
            self.returns += 1;
            stream = self.come_back().await;
        }
    }

    /// Keeps some messages; whether the last change of all was among them.
    async fn read(&mut self, stream: &mut Stream, count: usize, last: &Change) -> bool {
        let mut read = 0;
        // Near the end nobody leaves any more.
        while read < count || self.is_over.load(Ordering::Relaxed) {
            let next = match tokio::time::timeout(Duration::from_millis(500), stream.try_next()).await {
                Ok(next) => next,
                // Nothing new: as good a moment to leave as any. (Or the end came meanwhile.)
                Err(_) => {
                    read += count;
                    continue;
                }
            };
            match next {
                Ok(message) => {
                    let is_alone = message.changes.len() == 1;
                    let bytes = message.bytes;
                    assert!(is_alone || bytes <= self.message_bytes + FRAMING_BYTES_MAX, "a message of {bytes} bytes");
                    let is_last = message.changes.contains(last);
                    self.kept.push(message);
                    self.received.fetch_add(1, Ordering::Relaxed);
                    read += 1;
                    if is_last {
                        return true;
                    }
                }
                Err(status) => {
                    // Streams survive what happens to PostgreSQL.
                    assert!(self.chaos.kills_server && is_lost_connection(&status), "{}: {status:?}", self.tenant);
                    return false;
                }
            }
        }
        false
    }

    /// Chooses a message to go on behind, and forgets what came after it.
    fn forget(&mut self) {
        // Who started now must come back with a token to have everything.
        let least = usize::from(self.first_token.is_empty()).min(self.kept.len());
        let from = if self.random.u8(..20) == 0 { least } else { self.kept.len().saturating_sub(RECENT).max(least) };
        let keep = self.random.usize(from..=self.kept.len());
        self.kept.truncate(keep);
    }

    async fn come_back(&mut self) -> Stream {
        let deadline = Instant::now() + PATIENCE;
        let token = self.kept.last().map_or(&self.first_token, |message| &message.token);
        assert!(!token.is_empty(), "a subscriber of {} got nothing before its first stream ended", self.tenant);
        loop {
            let status = match within("a stream", Stream::open(&self.endpoint, self.tenant, token)).await {
                Ok(stream) => return stream,
                Err(status) => status,
            };
            let may_fail = self.chaos.kills_server || self.chaos.crashes_postgres;
            assert!(may_fail && is_lost_connection(&status), "{}: {status:?}", self.tenant);
            assert!(Instant::now() < deadline, "cannot come back: {status:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Change by change what was committed, and in sum what there is.
    fn check(&self, expected: &[Change], rows: &BTreeSet<String>) {
        let had = self.kept.iter().enumerate().flat_map(|(n, message)| message.changes.iter().map(move |c| (n, c)));
        let had: Vec<(usize, &Change)> = had.collect();
        let differs = (0..had.len().max(expected.len())).find(|n| had.get(*n).map(|(_, c)| *c) != expected.get(*n));
        if let Some(n) = differs {
            let around = n.saturating_sub(5)..n + 10;
            let had_around: Vec<_> = had.iter().skip(around.start).take(around.len()).collect();
            let expected_around: Vec<_> = expected.iter().skip(around.start).take(around.len()).collect();
            panic!(
                "tenant {}: {} changes instead of {}; change {n} differs\n  got {had_around:#?}\n  expected {expected_around:#?}\n  \
                 message before: {:?}",
                self.tenant,
                had.len(),
                expected.len(),
                had.get(n.saturating_sub(1)).map(|(message, _)| &self.kept[*message].token),
            );
        }
        let mut state = BTreeSet::new();
        for (_, change) in had {
            assert!(change.apply(&mut state), "tenant {}: {change:?} changes nothing", self.tenant);
        }
        assert_eq!(&state, rows, "tenant {}: the changes add up to something else", self.tenant);
    }
}

/// What a client sees when its server is killed, or is not ready yet.
fn is_lost_connection(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::Unknown | Code::Cancelled => true,
        Code::Internal => status.message().contains("h2"),
        _ => false,
    }
}
