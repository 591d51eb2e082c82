//! Checks that every subscriber gets every committed change exactly once, in commit order, by comparing with PostgreSQL itself.
//!
//! Writers run random transactions. Subscribers disconnect at random, return with the token of a random message that they kept, and
//! forget the messages after it. At the end of a round the changes of each subscriber must equal those of an independent reader of a
//! second slot, one by one, and these must add up to the contents of the tables.
//!
//! There are three exceptions, and each is reported to the subscriber and checked against its report:
//!
//! - If the disk of the change log was full, history is dropped. An older token is refused with the earliest one that works, and
//!   exactly the changes before that one are missing.
//! - If a promoted standby lacked changes, they never happened: a subscriber that got them takes them back.
//! - If a table was not published for a while, every missing change lies in a gap that the subscriber was given. The gap ends after
//!   the commit of every transaction that wrote inside it.

use super::change::Change;
use super::faults::{Fault, NOT_SENT};
use super::reference::{self, Transaction};
use super::sql::Sql;
use super::stream::{Message, Stream, metadata, optional_metadata, reason};
use super::wait::{PATIENCE, eventually, within};
use super::writer::{Habits, TENANTS, Writers, add_tenants};
use fastrand::Rng;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tonic::transport::Endpoint;
use tonic::{Code, Status};
use tuplewatch::model::lsn::{Lsn, Position};
use tuplewatch::model::snap_token::SnapToken;

const WRITERS: u64 = 8;
const SUBSCRIBERS: u64 = 6;
/// Subscribers mostly return with the token of one of this many last messages, so that a run makes progress.
const RECENT: usize = 64;
/// The size of the token and the framing of a message.
const FRAMING_BYTES_MAX: usize = 128;

/// The subscribers, and the expected state.
pub(crate) struct Oracle {
    /// Of PostgreSQL.
    uri: String,
    seed: u64,
    shared: Arc<Shared>,
    subscribers: Vec<(Subscriber, Stream)>,
    /// Commit LSN of the last transaction of the earlier rounds.
    compared: u64,
    /// The facts of each tenant at the end of the previous round.
    facts: HashMap<&'static str, BTreeSet<String>>,
    rounds: u64,
    /// The gaps that the server has logged.
    gaps: GapLog,
}

/// The beginning of each gap, by its end.
pub(crate) type GapLog = Box<dyn Fn() -> HashMap<Lsn, Lsn>>;

/// State that the subscribers of a round share.
#[derive(Default)]
struct Shared {
    /// Messages that all of them received.
    received: AtomicU64,
    /// No subscriber leaves any more.
    is_over: AtomicBool,
    /// The change log was forced to drop history.
    history_was_dropped: AtomicBool,
    /// Tokens that were refused because of that.
    refusals: AtomicU64,
    /// Messages that were taken back because a promoted standby lacks their changes.
    abandoned: AtomicU64,
    /// The number of times that a subscriber disconnected and returned.
    returns: AtomicU64,
}

/// The running round, for the code that disturbs it.
pub(crate) struct Load<'a> {
    writers: &'a Writers,
    readers: &'a [JoinHandle<(Subscriber, Stream)>],
    shared: &'a Shared,
}

/// The result of a round.
pub(crate) struct Round {
    pub(crate) transactions: usize,
    /// Summed over the subscribers.
    pub(crate) changes_compared: usize,
    pub(crate) returns: u64,
    /// Returns that were refused because the change log had dropped the next changes.
    pub(crate) refusals: u64,
    /// Messages that subscribers had to take back.
    pub(crate) abandoned: u64,
    /// Changes that subscribers did not get because they lie in a reported gap.
    pub(crate) missed: usize,
}

impl Shared {
    fn reset(&self) {
        for flag in [&self.is_over, &self.history_was_dropped] {
            flag.store(false, Ordering::Relaxed);
        }
        for count in [&self.received, &self.refusals, &self.abandoned, &self.returns] {
            count.store(0, Ordering::Relaxed);
        }
    }
}

impl Load<'_> {
    /// Waits until another transaction is committed and another message received.
    pub(crate) async fn progresses(&self) {
        let received = || self.shared.received.load(Ordering::Relaxed);
        let (committed_before, received_before) = (self.writers.committed(), received());
        eventually("the load makes progress", async || {
            assert!(!self.readers.iter().any(JoinHandle::is_finished), "a subscriber failed");
            self.writers.committed() > committed_before && received() > received_before
        })
        .await;
    }

    /// Waits until subscribers have returned this many times in this round.
    pub(crate) async fn until_returned(&self, least: u64) {
        let returns = || self.shared.returns.load(Ordering::Relaxed);
        eventually("subscribers have come back", async || {
            assert!(!self.readers.iter().any(JoinHandle::is_finished), "a subscriber failed");
            returns() >= least
        })
        .await;
    }

    /// For the rest of this round the change log may have dropped the changes after a token.
    pub(crate) fn allow_dropped_history(&self) {
        self.shared.history_was_dropped.store(true, Ordering::Relaxed);
    }
}

impl Oracle {
    /// Prepares the database at this URI, and opens streams at this address. To be called before anything is written.
    pub(crate) async fn begin(uri: &str, endpoint: &Endpoint, seed: u64, message_bytes: usize, gaps: GapLog) -> Self {
        let sql = Sql::connect(uri).await;
        add_tenants(&sql).await;
        reference::begin(&sql).await;
        let shared = Arc::new(Shared::default());
        let mut subscribers = Vec::new();
        for n in 0..SUBSCRIBERS {
            let tenant = TENANTS[usize::try_from(n).unwrap() % TENANTS.len()];
            // Half of them start now, half after a transaction.
            let token = if n % 2 == 0 { String::new() } else { sql.value("SELECT tuplewatch.snap_token()").await };
            let stream = within("a stream", Stream::open(endpoint, tenant, &token)).await.unwrap();
            let subscriber = Subscriber {
                endpoint: endpoint.clone(),
                tenant,
                // A stream that started now, and got a gap before its first message, resumes from here.
                start_token: stream.start_token().to_owned(),
                first_token: token,
                random: Rng::with_seed(seed.wrapping_add(100 + n)),
                faults: &[],
                message_bytes,
                shared: shared.clone(),
                kept: Vec::new(),
                gaps: Vec::new(),
                reported: BTreeSet::new(),
            };
            subscribers.push((subscriber, stream));
        }
        Self { uri: uri.to_owned(), seed, shared, subscribers, compared: 0, facts: HashMap::new(), rounds: 0, gaps }
    }

    /// Runs writers and subscribers while `disturb` inflicts faults of this list. Then the subscribers catch up, and everything is
    /// compared. The same subscribers continue in the next round.
    pub(crate) async fn round(&mut self, faults: &'static [Fault], disturb: impl AsyncFnOnce(&Load<'_>)) -> Round {
        self.shared.reset();
        let last = Change::tuple("end", &self.rounds.to_string(), "end", "end", "end", "");
        let last = Change::create(last);
        let read = |(subscriber, stream)| {
            let subscriber = Subscriber { faults, ..subscriber };
            tokio::spawn(subscriber.run(stream, last.clone()))
        };
        let readers: Vec<_> = self.subscribers.drain(..).map(read).collect();
        let habits = Habits { is_big: true, is_patient: faults.iter().any(|fault| fault.ends_postgres()) };
        let writers = Writers::start(&self.uri, WRITERS, self.seed.wrapping_add(1000 * self.rounds), habits);
        disturb(&Load { writers: &writers, readers: &readers, shared: &self.shared }).await;
        writers.stop().await;

        let sql = Sql::connect(&self.uri).await;
        let rows = TENANTS.map(|tenant| format!("('{tenant}', 'end', '{}', 'end', 'end', 'end')", self.rounds));
        sql.run(&format!("INSERT INTO tuplewatch.relation_tuples VALUES {}", rows.join(", "))).await;
        self.shared.is_over.store(true, Ordering::Relaxed);
        self.rounds += 1;

        let transactions = reference::consume(&sql, self.compared).await;
        self.compared = transactions.last().expect("the last change").commit_lsn;
        for tenant in TENANTS {
            let facts = self.facts.entry(tenant).or_default();
            for (_, change) in of_tenant(&transactions, tenant) {
                assert!(change.apply(facts), "tenant {tenant}: {change:?} changes nothing");
            }
            assert_eq!(facts, &sql.facts(tenant).await, "tenant {tenant}: the changes add up to something else");
        }
        let (mut changes_compared, mut missed) = (0, 0);
        for reader in readers {
            let (mut subscriber, stream) = within("every subscriber is complete", reader).await.unwrap();
            let (compared, not_sent) = subscriber.check(&of_tenant(&transactions, subscriber.tenant), &(self.gaps)());
            changes_compared += compared;
            missed += not_sent;
            subscriber.keep_position();
            self.subscribers.push((subscriber, stream));
        }
        Round {
            transactions: transactions.len(),
            changes_compared,
            returns: self.shared.returns.load(Ordering::Relaxed),
            refusals: self.shared.refusals.load(Ordering::Relaxed),
            abandoned: self.shared.abandoned.load(Ordering::Relaxed),
            missed,
        }
    }
}

/// One tenant's changes, with the commit LSNs of their transactions.
fn of_tenant<'a>(transactions: &'a [Transaction], tenant: &str) -> Vec<(u64, &'a Change)> {
    let of = |transaction: &'a Transaction| {
        let own = transaction.changes.iter().filter(move |(owner, _)| owner == tenant);
        own.map(|(_, change)| (transaction.commit_lsn, change))
    };
    transactions.iter().flat_map(of).collect()
}

struct Subscriber {
    endpoint: Endpoint,
    tenant: &'static str,
    /// The token at the beginning of this round.
    first_token: String,
    /// The start of its first stream.
    start_token: String,
    random: Rng,
    /// The faults that may happen in this round.
    faults: &'static [Fault],
    message_bytes: usize,
    shared: Arc<Shared>,
    kept: Vec<Message>,
    gaps: Vec<Gap>,
    /// The ends of all gaps that were reported to it.
    reported: BTreeSet<Lsn>,
}

/// A place where changes are reported to be missing.
#[derive(Debug)]
struct Gap {
    /// The number of messages that were kept before it.
    kept_before: usize,
    /// From here on nothing is missing.
    to: Position,
    /// Whether the latest report was of dropped history. Then the messages that were kept before are complete.
    is_dropped: bool,
    /// History is dropped up to here, if it was.
    dropped_to: Lsn,
}

/// Why a subscriber stopped reading.
enum Stopped {
    /// It has the last change of the round.
    Done,
    /// It left, or lost its stream.
    Left,
    /// It got a gap, with the token after it if that is known.
    Gap(Option<String>),
}

impl Subscriber {
    /// Runs until it has the last change of the round.
    async fn run(mut self, first: Stream, last: Change) -> (Self, Stream) {
        let mut stream = first;
        loop {
            let patience = self.random.usize(1..300);
            let stopped = self.read(&mut stream, patience, &last).await;
            let token = match stopped {
                Stopped::Done => return (self, stream),
                Stopped::Left => {
                    self.forget();
                    self.token()
                }
                // Every attempt gets the same gap until the gap has an end.
                Stopped::Gap(None) => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    self.token()
                }
                Stopped::Gap(Some(next)) => {
                    self.reported.insert(position(&next).lsn);
                    self.add_gap(position(&next), false);
                    next
                }
            };
            drop(stream);
            self.shared.returns.fetch_add(1, Ordering::Relaxed);
            stream = self.reconnect(token).await;
        }
    }

    /// Reads and keeps some messages.
    async fn read(&mut self, stream: &mut Stream, count: usize, last: &Change) -> Stopped {
        let mut read = 0;
        // Near the end no subscriber leaves.
        while read < count || self.shared.is_over.load(Ordering::Relaxed) {
            let next = match tokio::time::timeout(Duration::from_millis(500), stream.try_next()).await {
                Ok(next) => next,
                // No new message: a good moment to leave, unless the round is over by now.
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
                    self.shared.received.fetch_add(1, Ordering::Relaxed);
                    read += 1;
                    if is_last {
                        return Stopped::Done;
                    }
                }
                Err(status) if self.is_gap(&status) => {
                    return Stopped::Gap(optional_metadata(&status, "next_snap_token"));
                }
                Err(status) if self.is_abandoned(&status, (Code::Aborted, "TIMELINE_DIVERGED")) => {
                    let parted = position(&metadata(&status, "next_snap_token"));
                    self.take_back(self.kept.partition_point(|message| position(&message.token) <= parted));
                    return Stopped::Left;
                }
                Err(status) => {
                    // Streams survive faults of PostgreSQL, of the network and of the disk.
                    let may_end = self.faults.iter().any(|fault| fault.ends_tuplewatch());
                    assert!(
                        (may_end && is_lost_connection(&status)) || self.is_dropped_history(&status),
                        "{}: {status:?}",
                        self.tenant
                    );
                    return Stopped::Left;
                }
            }
        }
        Stopped::Left
    }

    /// Chooses a message to resume after, and forgets the later ones.
    fn forget(&mut self) {
        // After a start now, only the token of a message gives everything.
        let least = usize::from(self.first_token.is_empty()).min(self.kept.len());
        let from = if self.random.u8(..20) == 0 { least } else { self.kept.len().saturating_sub(RECENT).max(least) };
        let keep = self.random.usize(from..=self.kept.len());
        self.kept.truncate(keep);
        // Without a message after a gap, the token is from before the gap.
        self.gaps.retain(|gap| gap.kept_before < keep);
    }

    /// The token after the kept messages.
    fn token(&self) -> String {
        let first = if self.first_token.is_empty() { &self.start_token } else { &self.first_token };
        self.kept.last().map_or(first, |message| &message.token).clone()
    }

    /// Nothing between the kept messages and this position is delivered.
    fn add_gap(&mut self, to: Position, is_dropped: bool) {
        let kept_before = self.kept.len();
        // More history may have been dropped since, and the next gap may follow immediately.
        let before = self.gaps.iter().filter(|gap| gap.kept_before == kept_before).map(|gap| gap.dropped_to).max();
        let dropped_to = if is_dropped { Some(to.lsn) } else { before };
        self.gaps.retain(|gap| gap.kept_before < kept_before);
        self.gaps.push(Gap { kept_before, to, is_dropped, dropped_to: dropped_to.unwrap_or_default() });
    }

    async fn reconnect(&mut self, mut token: String) -> Stream {
        // It may need PostgreSQL, which several faults together can keep away for long.
        let deadline = Instant::now() + 2 * PATIENCE;
        loop {
            let status = match within("a stream", Stream::open(&self.endpoint, self.tenant, &token)).await {
                Ok(stream) => return stream,
                Err(status) => status,
            };
            if self.is_dropped_history(&status) {
                token = metadata(&status, "earliest_snap_token");
                self.add_gap(position(&token), true);
                self.shared.refusals.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            if self.is_abandoned(&status, (Code::FailedPrecondition, "ABANDONED_SNAP_TOKEN")) {
                // The refusal does not name the point of divergence. It may be just before the last message.
                self.take_back(
                    self.kept.len().checked_sub(1).expect("the token at the beginning of a round is on both histories"),
                );
                token = self.token();
                continue;
            }
            assert!(!self.faults.is_empty() && is_lost_connection(&status), "{}: {status:?}", self.tenant);
            assert!(Instant::now() < deadline, "cannot come back: {status:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn is_dropped_history(&self, status: &Status) -> bool {
        self.shared.history_was_dropped.load(Ordering::Relaxed)
            && reason(status) == (Code::OutOfRange, "SNAP_TOKEN_TOO_OLD".to_owned())
    }

    fn is_gap(&self, status: &Status) -> bool {
        self.faults.contains(&Fault::Unpublish) && reason(status) == (Code::Aborted, "SCHEMA_CHANGED".to_owned())
    }

    fn is_abandoned(&self, status: &Status, expected: (Code, &str)) -> bool {
        self.faults.contains(&Fault::Failover) && reason(status) == (expected.0, expected.1.to_owned())
    }

    /// Takes back the messages that a promoted standby lacks.
    fn take_back(&mut self, keep: usize) {
        let abandoned = u64::try_from(self.kept.len() - keep).unwrap();
        self.shared.abandoned.fetch_add(abandoned, Ordering::Relaxed);
        self.kept.truncate(keep);
    }

    /// Compares with the committed changes, except for those that are reported to be missing. Returns the number of changes that were
    /// compared, and of those that were missing.
    fn check(&self, expected: &[(u64, &Change)], logged: &HashMap<Lsn, Lsn>) -> (usize, usize) {
        let mut got = self.kept.iter().flat_map(|message| &message.changes);
        let sent = got.find(|change| change.fact.starts_with(NOT_SENT));
        assert_eq!(sent, None, "tenant {}: a row of an unpublished table was sent, so no gap was needed", self.tenant);
        let bounds = self.gaps.iter().map(|gap| gap.kept_before);
        let ends = bounds.clone().chain([self.kept.len()]);
        let (mut next, mut missed) = (0, 0);
        for (n, (begin, end)) in [0].into_iter().chain(bounds).zip(ends).enumerate() {
            let messages = &self.kept[begin..end];
            let got: Vec<&Change> = messages.iter().flat_map(|message| &message.changes).collect();
            if let Some(before) = n.checked_sub(1).map(|n| &self.gaps[n]) {
                let first = self.after_gap(before.to, next, &got, expected);
                if !before.is_dropped {
                    let gone = expected[next..first].partition_point(|(commit, _)| *commit <= before.dropped_to.0);
                    missed += self.not_sent(before, &expected[next + gone..first], logged);
                }
                next = first;
            }
            for (at, change) in got.iter().enumerate() {
                // The messages before a gap are in order, and may lack changes inside the gap.
                let behind = self.gaps.get(n).filter(|gap| !gap.is_dropped || self.faults.contains(&Fault::Unpublish));
                if let Some(behind) = behind {
                    let found = expected[next..].iter().position(|(_, expected)| expected == change);
                    let Some(passed) = found else { self.fail(&got, at, expected, next) };
                    missed += self.not_sent(behind, &expected[next..next + passed], logged);
                    next += passed;
                } else if expected.get(next).map(|(_, expected)| expected) != Some(change) {
                    self.fail(&got, at, expected, next);
                }
                next += 1;
            }
        }
        if next != expected.len() {
            self.fail(&[], 0, expected, next);
        }
        (self.kept.iter().map(|message| message.changes.len()).sum(), missed)
    }

    /// Checks that all of these lie in gaps that were reported. Returns their number. Dropped history reports everything before it.
    fn not_sent(&self, behind: &Gap, changes: &[(u64, &Change)], logged: &HashMap<Lsn, Lsn>) -> usize {
        let is_reported = |to: &Lsn| self.reported.contains(to) || *to <= behind.dropped_to;
        let gaps: Vec<(Lsn, Lsn)> =
            logged.iter().filter(|(to, _)| is_reported(to)).map(|(to, from)| (*from, *to)).collect();
        for (commit_lsn, change) in changes {
            let commit = Lsn(*commit_lsn);
            assert!(
                gaps.iter().any(|(from, to)| *from <= commit && commit < *to),
                "tenant {}: {change:?} of {commit} was not sent, and lies in none of the reported gaps: {gaps:?}",
                self.tenant,
            );
        }
        changes.len()
    }

    /// The index of the first change after a gap that ends at this position.
    fn after_gap(&self, to: Position, next: usize, got: &[&Change], expected: &[(u64, &Change)]) -> usize {
        let first_at = expected.partition_point(|(commit_lsn, _)| *commit_lsn < to.lsn.0);
        let first_past = expected.partition_point(|(commit_lsn, _)| *commit_lsn <= to.lsn.0);
        assert!(next <= first_past, "tenant {}: sent back to {to}, before what it already has", self.tenant);
        // A position inside a transaction counts rows of all tenants, so any change of the transaction may be the first.
        let last = if to.steps == 0 { first_at } else { first_past };
        let begins_here = |at: &usize| expected[*at..].iter().map(|(_, change)| change).zip(got).all(|(a, b)| a == b);
        (first_at..=last).find(begins_here).unwrap_or(last)
    }

    fn fail(&self, got: &[&Change], got_at: usize, expected: &[(u64, &Change)], expected_at: usize) -> ! {
        let got: Vec<_> = got.iter().enumerate().skip(got_at.saturating_sub(5)).take(15).collect();
        let around: Vec<_> = expected.iter().enumerate().skip(expected_at.saturating_sub(5)).take(15).collect();
        panic!(
            "tenant {}: change {expected_at} of {} differs\n  got {got:#?}\n  expected {around:#?}\n  gaps {:?}\n  from '{}'",
            self.tenant,
            expected.len(),
            self.gaps,
            self.first_token,
        );
    }

    /// Keeps only its position, for the next round.
    fn keep_position(&mut self) {
        self.first_token = self.kept.pop().expect("the last message").token;
        self.kept = Vec::new();
        self.gaps.clear();
        self.reported.clear();
    }
}

fn position(token: &str) -> Position {
    match token.parse() {
        Ok(SnapToken::Position { place, .. }) => place.position,
        other => panic!("not the token of a position: {other:?}"),
    }
}

/// Whether a client gets this status when its server is killed or not ready yet.
fn is_lost_connection(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::Unknown | Code::Cancelled => true,
        Code::Internal => status.message().contains("h2"),
        _ => false,
    }
}
