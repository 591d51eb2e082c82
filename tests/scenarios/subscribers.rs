//! Subscribers that are slow, many, gone, or have unusual tokens (hazards 35 to 40).
//!
//! A subscriber is a foreign program. Whatever it does, the others get their changes, the slot is read, and its resources are freed.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::proxy::Proxy;
use crate::support::reference;
use crate::support::server::Server;
use crate::support::stream::{Message, Stream, changes, metadata, reason};
use crate::support::wait::{eventually, within};
use crate::support::writer::{TENANTS, add_tenants, seed};
use fastrand::Rng;
use futures_util::future::join_all;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tonic::transport::Endpoint;
use tonic::{Code, Status};
use tuplewatch::model::lsn::{Lsn, Position, Xid8};
use tuplewatch::model::snap_token::{SnapToken, TokenId};
use tuplewatch::model::timeline::{SourceId, TimelineId};

fn endpoint(proxy: &Proxy) -> Endpoint {
    Endpoint::from_shared(format!("http://{}", proxy.address())).unwrap()
}

/// A text that differs from a token by typical mistakes.
fn mutated(random: &mut Rng, good: &str) -> String {
    let mut text: Vec<char> = good.chars().collect();
    for _ in 0..random.usize(1..4) {
        let at = random.usize(..=text.len());
        let any = [random.alphanumeric(), random.char(..), '=', '-', '+'][random.usize(..5)];
        match random.u8(..7) {
            0 => text.truncate(at),
            1 => drop(text.drain(..at)),
            2 => text.insert(at, any),
            3 if at < text.len() => drop(text.remove(at)),
            4 if at < text.len() => text[at] = any,
            5 if at < text.len() => text[at] = if any.is_ascii() { text[at].to_ascii_uppercase() } else { any },
            _ => text.extend(good.chars().take(at)),
        }
    }
    text.into_iter().collect()
}

/// The expected result of a token.
enum Fate {
    Refused(Code, &'static str),
    /// Everything that committed at or after this LSN is delivered.
    Follows(Lsn),
}

/// Makes well-formed tokens of every kind, with positions before, inside and after the history.
struct Forger {
    random: Rng,
    source: SourceId,
    timeline: TimelineId,
    /// The beginning of the log.
    origin: Lsn,
    /// Commit LSNs, in order.
    commits: Vec<Lsn>,
}

impl Forger {
    fn forge(&mut self) -> (SnapToken, Fate) {
        let last = self.commits.last().unwrap().0;
        let lsn = match self.random.u8(..8) {
            0 => [0, 1, u64::MAX, i64::MAX.cast_unsigned()][self.random.usize(..4)],
            1 => self.random.u64(..self.origin.0),
            // Far beyond the end of this test.
            2 => self.random.u64(last + (1 << 40)..),
            3 | 4 => self.commits[self.random.usize(..self.commits.len())].0,
            _ => self.random.u64(self.origin.0..=last),
        };
        let is_foreign = self.random.u8(..8) == 0;
        let source = if is_foreign { SourceId(self.random.u64(..).to_be_bytes()) } else { self.source };
        let commit_time = tuplewatch::model::lsn::CommitTime(self.random.i64(..));
        if self.random.u8(..4) == 0 {
            let id = TokenId(self.random.u128(..).to_be_bytes());
            let xid = [0, 1, 2, 3, 700, u64::from(u32::MAX), 1 << 32, u64::MAX, self.random.u64(..)];
            let xid = Xid8(xid[self.random.usize(..xid.len())]);
            let token = SnapToken::Transaction { source, id, xid, floor: Lsn(lsn) };
            return (token, self.fate(is_foreign, false, lsn, 0));
        }
        let is_abandoned = self.random.u8(..8) == 0;
        let timeline = if is_abandoned { TimelineId(self.random.u64(..).to_be_bytes()) } else { self.timeline };
        let steps = [0, 0, u64::MAX][self.random.usize(..3)];
        let place = Position { lsn: Lsn(lsn), steps }.into();
        let token = SnapToken::Position { source, timeline, place, commit_time };
        (token, self.fate(is_foreign, is_abandoned, lsn, steps))
    }

    fn fate(&self, is_foreign: bool, is_abandoned: bool, lsn: u64, steps: u64) -> Fate {
        let last = self.commits.last().unwrap().0;
        match () {
            () if is_foreign => Fate::Refused(Code::FailedPrecondition, "FOREIGN_SNAP_TOKEN"),
            () if is_abandoned => Fate::Refused(Code::FailedPrecondition, "ABANDONED_SNAP_TOKEN"),
            () if lsn > last => Fate::Refused(Code::FailedPrecondition, "SNAP_TOKEN_BEYOND_HISTORY"),
            () if lsn < self.origin.0 => Fate::Refused(Code::OutOfRange, "SNAP_TOKEN_TOO_OLD"),
            // After the whole transaction that committed there.
            () if steps > 0 => Fate::Follows(Lsn(lsn + 1)),
            () => Fate::Follows(Lsn(lsn)),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_forged_token_gets_its_status() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[("--service-watch-message-size-max", "1KiB")]).await;
    let sql = postgres.sql().await;
    reference::begin(&sql).await;
    let channel = server.channel().await;
    // On the same connection as all that follows.
    let mut stream = Stream::open_on(channel.clone(), "t1", "").await.unwrap();
    for n in 0..20 {
        sql.run("BEGIN").await;
        for m in 0..=n % 3 {
            sql.insert("t1", &format!("{n}-{m}")).await;
        }
        sql.run("COMMIT").await;
    }
    sql.insert("t1", "end").await;
    let end = Change::created("end");
    let messages = stream.up_to(&end).await;
    let good = messages[0].token.clone();
    let SnapToken::Position { source, timeline, .. } = good.parse().unwrap() else { panic!("a position token") };
    let transactions = reference::read(&sql).await;
    let commits = transactions.iter().map(|transaction| Lsn(transaction.commit_lsn)).collect();
    let SnapToken::Position { place: origin, .. } =
        metadata(&refusal(&channel, &position(source, timeline)).await, "earliest_snap_token").parse().unwrap()
    else {
        panic!("a position token")
    };

    let seed = seed();
    let mut random = Rng::with_seed(seed);
    let mut mutations = vec!["A".repeat(1 << 20), "\u{0}".into(), " ".into(), format!(" {good}"), format!("{good}\n")];
    mutations.extend((0..300).map(|n| mutated(&mut random, &messages[n % messages.len()].token)));
    mutations.extend((0..100).map(|_| (0..random.usize(1..200)).map(|_| random.char(..)).collect()));
    for text in mutations {
        // An unchanged text, or one in the other alphabet, is still the token.
        let same = text.replace('+', "-").replace('/', "_");
        if text.is_empty() || messages.iter().any(|message| message.token == same) {
            continue;
        }
        let status = refusal(&channel, &text).await;
        assert_eq!(reason(&status), (Code::InvalidArgument, "INVALID_SNAP_TOKEN".into()), "{text:?} of {good}");
        assert!(status.message().len() < 200, "{}", status.message());
    }

    let mut forger = Forger { random, source, timeline, origin: origin.position.lsn, commits };
    let mut followed = 0;
    for _ in 0..300 {
        let (token, fate) = forger.forge();
        match fate {
            Fate::Refused(code, expected) => {
                let status = refusal(&channel, &token.to_string()).await;
                assert_eq!(reason(&status), (code, expected.to_owned()), "{token:?} {}", status.message());
            }
            Fate::Follows(lsn) => {
                let expected: Vec<Change> = transactions
                    .iter()
                    .filter(|transaction| transaction.commit_lsn >= lsn.0)
                    .flat_map(|transaction| transaction.changes.iter().map(|(_, change)| change.clone()))
                    .collect();
                let opened = Stream::open_on(channel.clone(), "t1", &token.to_string()).await;
                let mut resumed = opened.unwrap_or_else(|status| panic!("{token:?}: {status:?}"));
                // After the last change there is nothing to wait for.
                if !expected.is_empty() {
                    assert_eq!(changes(&resumed.up_to(&end).await), expected, "{token:?}");
                }
                followed += 1;
            }
        }
    }
    assert!(followed > 50, "too few were accepted to show anything: {followed}");
    sql.insert("t1", "after").await;
    stream.expect(Change::created("after")).await;
    assert!(!server.has_logged("panicked") && !server.has_logged("ERROR"));
}

/// A position before everything.
fn position(source: SourceId, timeline: TimelineId) -> String {
    let commit_time = tuplewatch::model::lsn::CommitTime(0);
    SnapToken::Position { source, timeline, place: Position::ZERO.into(), commit_time }.to_string()
}

async fn refusal(channel: &tonic::transport::Channel, token: &str) -> Status {
    match within("an answer", Stream::open_on(channel.clone(), "t1", token)).await {
        Ok(_) => panic!("accepted: {token:?}"),
        Err(status) => status,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscribers_that_never_read_delay_nobody() {
    const UNREAD: usize = 10;
    const BATCH: u64 = 5_000;
    const LAST: u64 = 6 * BATCH;
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[("--changelog-memory-window", "8MiB")]).await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    let mut unread = join_all((0..UNREAD).map(|_| server.watch("t1", ""))).await;
    let mut readers = [server.watch("t1", "").await, server.watch("t2", "").await];
    let before = server.memory_kib("VmRSS");
    // About 60 MiB, for clients with windows of 2 MiB each.
    for first in (1..=LAST).step_by(usize::try_from(BATCH).unwrap()) {
        sql.insert_large("t1", first..=first + BATCH - 1).await;
        while readers[0].next().await.changes.last().unwrap().large_number() != first + BATCH - 1 {}
    }
    // All unread streams are full now, and delivery does not wait for them.
    let mut longest = Duration::ZERO;
    for n in 0..50 {
        for (stream, tenant) in readers.iter_mut().zip(["t1", "t2"]) {
            let id = n.to_string();
            sql.insert(tenant, &id).await;
            let began = Instant::now();
            stream.expect(Change::created(&id)).await;
            longest = longest.max(began.elapsed());
        }
    }
    let grown = (server.memory_kib("VmHWM") - before) >> 10;
    eprintln!("longest delivery {longest:?}, memory grew by {grown} MiB");
    assert!(longest < Duration::from_secs(2), "{longest:?}");
    assert!(grown < 200, "memory grew by {grown} MiB");

    // They are read now, and have missed nothing.
    let expected: Vec<Change> = (0..50).map(|n| Change::created(&n.to_string())).collect();
    for stream in &mut unread {
        let mut next = 1;
        while next <= LAST {
            for change in stream.next().await.changes {
                assert_eq!(change.large_number(), next);
                next += 1;
            }
        }
        assert_eq!(changes(&stream.up_to(expected.last().unwrap()).await), expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_subscribers_resume_at_once() {
    const SUBSCRIBERS: usize = 1_000;
    const CONNECTIONS: usize = 20;
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    let mut history: HashMap<&str, Vec<Message>> = HashMap::new();
    let streams = join_all(TENANTS.map(|tenant| server.watch(tenant, ""))).await;
    for (mut stream, tenant) in streams.into_iter().zip(TENANTS) {
        sql.run(&format!(
            "DO $$ BEGIN FOR n IN 1..300 LOOP \
                 INSERT INTO tuplewatch.relation_tuples VALUES ('{tenant}', 'document', n, 'viewer', 'user', 'u'); COMMIT; \
             END LOOP; END $$"
        ))
        .await;
        history.insert(tenant, stream.up_to(&Change::created("300")).await);
    }
    let history = Arc::new(history);

    server.kill_9().await;
    server.start().await;
    let began = Instant::now();
    let mut random = Rng::with_seed(seed());
    let channels = join_all((0..CONNECTIONS).map(|_| server.channel())).await;
    let subscribers: Vec<_> = (0..SUBSCRIBERS)
        .map(|n| {
            let (tenant, channel) = (TENANTS[n % TENANTS.len()], channels[n % CONNECTIONS].clone());
            let (history, at) = (history.clone(), random.usize(..300));
            tokio::spawn(async move {
                let messages = &history[tenant];
                let mut stream = Stream::open_on(channel, tenant, &messages[at].token).await.unwrap();
                let rest = stream.up_to(&Change::created("end")).await;
                let expected = changes(&messages[at + 1..]).into_iter().chain([Change::created("end")]);
                assert!(changes(&rest).into_iter().eq(expected), "exactly what comes after message {at} of {tenant}");
            })
        })
        .collect();
    for tenant in TENANTS {
        sql.insert(tenant, "end").await;
    }
    for subscriber in subscribers {
        within("a subscriber has the rest", subscriber).await.unwrap();
    }
    let took = began.elapsed();
    eprintln!("{SUBSCRIBERS} had the rest after {took:?}: VmHWM {} MiB", server.memory_kib("VmHWM") >> 10);
    assert!(took < Duration::from_secs(30), "{took:?}");
}

/// Writes more than the window of a client, so that the server has to wait in the middle.
async fn open_and_fill(proxy: &Proxy, postgres: &Postgres) -> Stream {
    let stream = Stream::open(&endpoint(proxy), "t1", "").await.unwrap();
    postgres.sql().await.insert_large("t1", 1..=10_000).await;
    eventually("it has begun", async || proxy.returned_bytes() > 1 << 20).await;
    stream
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_place_of_a_vanished_client_is_freed() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[("--service-watch-subscribers-max", "2")]).await;
    let (quiet, stuck) = (Proxy::to(server.address()).await, Proxy::to(server.address()).await);
    let _quiet = Stream::open(&endpoint(&quiet), "t1", "").await.unwrap();
    let _stuck = open_and_fill(&stuck, &postgres).await;
    quiet.silence();
    stuck.silence();
    let began = Instant::now();
    let status = server.try_watch("t1", "").await.err().expect("both places are taken");
    assert_eq!(reason(&status), (Code::ResourceExhausted, "TOO_MANY_SUBSCRIBERS".into()));
    let mut streams = Vec::new();
    eventually("both places are free", async || {
        match server.try_watch("t1", "").await {
            Ok(stream) => streams.push(stream),
            Err(status) => assert_eq!(reason(&status), (Code::ResourceExhausted, "TOO_MANY_SUBSCRIBERS".into())),
        }
        streams.len() == 2
    })
    .await;
    let took = began.elapsed();
    assert!(took < Duration::from_secs(40), "reclaimed after {took:?}");
    postgres.sql().await.insert("t1", "new").await;
    for stream in &mut streams {
        stream.expect(Change::created("new")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_does_not_wait_for_unresponsive_clients() {
    const GRACE: Duration = Duration::from_secs(3);
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[("--shutdown-grace-period", "3s")]).await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    let (quiet, stuck) = (Proxy::to(server.address()).await, Proxy::to(server.address()).await);
    let _quiet = Stream::open(&endpoint(&quiet), "t1", "").await.unwrap();
    let _unread = server.watch("t1", "").await;
    let _stuck = open_and_fill(&stuck, &postgres).await;
    let mut streams = Vec::new();
    for _ in 0..4 {
        let channel = server.channel().await;
        let opened = join_all((0..100).map(|n| Stream::open_on(channel.clone(), TENANTS[n % 4], "")));
        streams.extend(within("streams", opened).await.into_iter().map(Result::unwrap));
    }
    quiet.silence();
    stuck.silence();

    let began = Instant::now();
    server.terminate().await;
    let endings = join_all(streams.iter_mut().map(Stream::ending)).await;
    let ended = began.elapsed();
    for (messages, status) in endings {
        assert!(messages.is_empty());
        assert_eq!(reason(&status), (Code::Unavailable, "SHUTTING_DOWN".into()));
    }
    assert!(ended < GRACE, "a client that reads is informed at once, and not after {ended:?}");
    let exit = server.ended().await;
    let took = began.elapsed();
    assert_eq!(exit.code(), Some(0));
    // The last acknowledgement has additional time, and the machine may be busy.
    assert!(took < GRACE + Duration::from_secs(3), "{took:?}");
    assert!(server.has_logged("streams were still open at the end of shutdown.grace_period"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pings_keep_an_idle_connection_open() {
    /// A frame's header and its payload.
    const PING_BYTES: u64 = 9 + 8;
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let proxy = Proxy::to(server.address()).await;
    let mut stream = Stream::open(&endpoint(&proxy), "t1", "").await.unwrap();
    sql.insert("t1", "before").await;
    stream.expect(Change::created("before")).await;
    stream.expect_silence().await;
    let before = proxy.returned_bytes();
    let began = Instant::now();
    eventually("something arrives", async || proxy.returned_bytes() > before).await;
    let idle = began.elapsed();
    // Middleboxes forget connections that are silent for a minute, some earlier.
    assert!(idle < Duration::from_secs(25), "after {idle:?}");
    assert_eq!(proxy.returned_bytes() - before, PING_BYTES);
    stream.expect_silence().await;
    sql.insert("t1", "after").await;
    stream.expect(Change::created("after")).await;
}
