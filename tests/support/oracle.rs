//! Every committed change, exactly once, in commit order, to everybody: against what PostgreSQL itself says was committed.
//!
//! Writers run random transactions, while subscribers disconnect at random and come back with a random token of a message
//! that they kept, forgetting what came after it. What each of them has at the end of a round must be, change by change,
//! what an independent reading of a second slot has; and that must add up to what is in the tables.
//!
//! Three exceptions are told, and held to what was told. Where the disk of the change log was full, history is given up, and a
//! token from before is refused with the earliest one that works. Then exactly the changes before that one are missing. Where
//! a standby was promoted that lacked something, that never was: whoever had some of it takes it back. And where a table was not
//! published for a while, every change that somebody did not get lies in a gap that this subscriber was told of, and the gap ends
//! behind the commit of every transaction that wrote inside it.

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
/// Tokens to come back with are mostly among those of the last messages, so that a run gets on.
const RECENT: usize = 64;
/// What a message has besides its changes: the token and the framing.
const FRAMING_BYTES_MAX: usize = 128;

/// The subscribers, and what is known to be right.
pub(crate) struct Oracle {
    /// PostgreSQL's own.
    uri: String,
    seed: u64,
    shared: Arc<Shared>,
    subscribers: Vec<(Subscriber, Stream)>,
    /// Commit LSN of the last transaction of the rounds before.
    compared: u64,
    /// What held for each tenant at the end of the round before.
    facts: HashMap<&'static str, BTreeSet<String>>,
    rounds: u64,
    /// Where each gap begins that the server has logged, by where it ends.
    gaps: GapLog,
}

/// The interval of each gap, by its end.
pub(crate) type GapLog = Box<dyn Fn() -> HashMap<Lsn, Lsn>>;

/// What the subscribers of a round have in common.
#[derive(Default)]
struct Shared {
    /// Messages of all of them.
    received: AtomicU64,
    /// Nobody leaves any more.
    is_over: AtomicBool,
    /// The change log was made to give up history.
    history_was_dropped: AtomicBool,
    /// Times that a subscriber was told so.
    refusals: AtomicU64,
    /// Messages that were taken back, since a promoted standby lacks what they tell of.
    abandoned: AtomicU64,
    /// How often somebody disconnected and came back.
    returns: AtomicU64,
}

/// A round that is being run, for whoever disturbs it.
pub(crate) struct Load<'a> {
    writers: &'a Writers,
    readers: &'a [JoinHandle<(Subscriber, Stream)>],
    shared: &'a Shared,
}

/// What came of a round.
pub(crate) struct Round {
    pub(crate) transactions: usize,
    /// Summed over the subscribers.
    pub(crate) changes_compared: usize,
    pub(crate) returns: u64,
    /// Returns that were refused, since the change log had given up what came next.
    pub(crate) refusals: u64,
    /// Messages that subscribers had to take back.
    pub(crate) abandoned: u64,
    /// Changes that subscribers did not get, and were told so.
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
    /// Waits until we are in the midst of things: somebody writes, and somebody receives.
    pub(crate) async fn goes_on(&self) {
        let received = || self.shared.received.load(Ordering::Relaxed);
        let (committed_before, received_before) = (self.writers.committed(), received());
        eventually("the load goes on", async || {
            assert!(!self.readers.iter().any(JoinHandle::is_finished), "a subscriber failed");
            self.writers.committed() > committed_before && received() > received_before
        })
        .await;
    }

    /// Waits until subscribers have come back so often in this round.
    pub(crate) async fn has_returned(&self, least: u64) {
        let returns = || self.shared.returns.load(Ordering::Relaxed);
        eventually("subscribers have come back", async || {
            assert!(!self.readers.iter().any(JoinHandle::is_finished), "a subscriber failed");
            returns() >= least
        })
        .await;
    }

    /// From now on, and for this round, the change log may have less than a subscriber asks for.
    pub(crate) fn history_is_dropped(&self) {
        self.shared.history_was_dropped.store(true, Ordering::Relaxed);
    }
}

impl Oracle {
    /// Of the database that this URI leads to, and subscribers of the nodes at this address. To be called before anything is
    /// written.
    pub(crate) async fn begin(uri: &str, endpoint: &Endpoint, seed: u64, message_bytes: usize, gaps: GapLog) -> Self {
        let sql = Sql::connect(uri).await;
        add_tenants(&sql).await;
        reference::begin(&sql).await;
        let shared = Arc::new(Shared::default());
        let mut subscribers = Vec::new();
        for n in 0..SUBSCRIBERS {
            let tenant = TENANTS[usize::try_from(n).unwrap() % TENANTS.len()];
            // Some start now, some after a transaction.
            let token = if n % 2 == 0 { String::new() } else { sql.value("SELECT tuplewatch.snap_token()").await };
            let stream = within("a stream", Stream::open(endpoint, tenant, &token)).await.unwrap();
            let subscriber = Subscriber {
                endpoint: endpoint.clone(),
                tenant,
                // Who starts now, and is told of a gap before the first message, goes on from where that was.
                start_token: stream.start_token().to_owned(),
                first_token: token,
                random: Rng::with_seed(seed.wrapping_add(100 + n)),
                faults: &[],
                message_bytes,
                shared: shared.clone(),
                kept: Vec::new(),
                gaps: Vec::new(),
                told: BTreeSet::new(),
            };
            subscribers.push((subscriber, stream));
        }
        Self { uri: uri.to_owned(), seed, shared, subscribers, compared: 0, facts: HashMap::new(), rounds: 0, gaps }
    }

    /// Lets everybody write and read while `disturb` runs, which inflicts no other than these faults; then everybody catches up, and all is compared. The same
    /// subscribers go on in the next round.
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
            let (mut subscriber, stream) = within("everybody has everything", reader).await.unwrap();
            let (compared, not_sent) = subscriber.check(&of_tenant(&transactions, subscriber.tenant), &(self.gaps)());
            changes_compared += compared;
            missed += not_sent;
            subscriber.let_go();
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
    /// What this round began with.
    first_token: String,
    /// Where its first stream started.
    start_token: String,
    random: Rng,
    /// What may happen in this round.
    faults: &'static [Fault],
    message_bytes: usize,
    shared: Arc<Shared>,
    kept: Vec<Message>,
    gaps: Vec<Gap>,
    /// The ends of all gaps that it was told of.
    told: BTreeSet<Lsn>,
}

/// Where it was told that changes are missing.
#[derive(Debug)]
struct Gap {
    /// How many messages were kept before.
    kept_before: usize,
    /// From where on there are all again.
    to: Position,
    /// Whether it was told of history that was given up, and of nothing behind that: then all that was kept before is whole.
    is_dropped: bool,
    /// Up to where history was given up, if it was.
    dropped_to: Lsn,
}

/// Why it reads no further.
enum Stopped {
    /// It has the last change of all.
    Done,
    /// It left, or lost its stream.
    Left,
    /// It was told of a gap, with the token behind it where that is known.
    Gap(Option<String>),
}

impl Subscriber {
    /// Until it has the last change of the round.
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
                // The same gap is told to whoever asks, until it has an end.
                Stopped::Gap(None) => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    self.token()
                }
                Stopped::Gap(Some(next)) => {
                    self.told.insert(position(&next).lsn);
                    self.add_gap(position(&next), false);
                    next
                }
            };
            drop(stream);
            self.shared.returns.fetch_add(1, Ordering::Relaxed);
            stream = self.come_back(token).await;
        }
    }

    /// Keeps some messages.
    async fn read(&mut self, stream: &mut Stream, count: usize, last: &Change) -> Stopped {
        let mut read = 0;
        // Near the end nobody leaves any more.
        while read < count || self.shared.is_over.load(Ordering::Relaxed) {
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
                    // Streams survive what happens to PostgreSQL, to the way there, and to the disk.
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

    /// Chooses a message to go on behind, and forgets what came after it.
    fn forget(&mut self) {
        // Who started now must come back with a token to have everything.
        let least = usize::from(self.first_token.is_empty()).min(self.kept.len());
        let from = if self.random.u8(..20) == 0 { least } else { self.kept.len().saturating_sub(RECENT).max(least) };
        let keep = self.random.usize(from..=self.kept.len());
        self.kept.truncate(keep);
        // With nothing kept behind a gap, the token is one from before it.
        self.gaps.retain(|gap| gap.kept_before < keep);
    }

    /// Behind what it has kept.
    fn token(&self) -> String {
        let first = if self.first_token.is_empty() { &self.start_token } else { &self.first_token };
        self.kept.last().map_or(first, |message| &message.token).clone()
    }

    /// Behind what it has kept there is nothing up to here.
    fn add_gap(&mut self, to: Position, is_dropped: bool) {
        let kept_before = self.kept.len();
        // More may have gone since the last time that we asked, and the next gap may come right behind it.
        let before = self.gaps.iter().filter(|gap| gap.kept_before == kept_before).map(|gap| gap.dropped_to).max();
        let dropped_to = if is_dropped { Some(to.lsn) } else { before };
        self.gaps.retain(|gap| gap.kept_before < kept_before);
        self.gaps.push(Gap { kept_before, to, is_dropped, dropped_to: dropped_to.unwrap_or_default() });
    }

    async fn come_back(&mut self, mut token: String) -> Stream {
        // PostgreSQL may be needed for it, and out of reach for as long as several faults take together.
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
                // Where the histories part it does not say: perhaps behind the message before.
                self.take_back(self.kept.len().checked_sub(1).expect("what a round begins with is of both histories"));
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

    fn is_abandoned(&self, status: &Status, told: (Code, &str)) -> bool {
        self.faults.contains(&Fault::Failover) && reason(status) == (told.0, told.1.to_owned())
    }

    /// What a standby lacked that was promoted.
    fn take_back(&mut self, keep: usize) {
        let abandoned = u64::try_from(self.kept.len() - keep).unwrap();
        self.shared.abandoned.fetch_add(abandoned, Ordering::Relaxed);
        self.kept.truncate(keep);
    }

    /// Change by change what was committed, but for what was told to be gone. How many were compared, and how many were missing.
    fn check(&self, expected: &[(u64, &Change)], logged: &HashMap<Lsn, Lsn>) -> (usize, usize) {
        let mut had = self.kept.iter().flat_map(|message| &message.changes);
        let sent = had.find(|change| change.fact.starts_with(NOT_SENT));
        assert_eq!(sent, None, "tenant {}: a row of an unpublished table was sent, so no gap was needed", self.tenant);
        let bounds = self.gaps.iter().map(|gap| gap.kept_before);
        let ends = bounds.clone().chain([self.kept.len()]);
        let (mut next, mut missed) = (0, 0);
        for (n, (begin, end)) in [0].into_iter().chain(bounds).zip(ends).enumerate() {
            let messages = &self.kept[begin..end];
            let had: Vec<&Change> = messages.iter().flat_map(|message| &message.changes).collect();
            if let Some(before) = n.checked_sub(1).map(|n| &self.gaps[n]) {
                let first = self.after_gap(before.to, next, &had, expected);
                if !before.is_dropped {
                    let gone = expected[next..first].partition_point(|(commit, _)| *commit <= before.dropped_to.0);
                    missed += self.not_sent(before, &expected[next + gone..first], logged);
                }
                next = first;
            }
            for (at, change) in had.iter().enumerate() {
                // What was sent before a gap was noticed is in order, and may lack what the gap is about.
                let behind = self.gaps.get(n).filter(|gap| !gap.is_dropped || self.faults.contains(&Fault::Unpublish));
                if let Some(behind) = behind {
                    let found = expected[next..].iter().position(|(_, expected)| expected == change);
                    let Some(passed) = found else { self.fail(&had, at, expected, next) };
                    missed += self.not_sent(behind, &expected[next..next + passed], logged);
                    next += passed;
                } else if expected.get(next).map(|(_, expected)| expected) != Some(change) {
                    self.fail(&had, at, expected, next);
                }
                next += 1;
            }
        }
        if next != expected.len() {
            self.fail(&[], 0, expected, next);
        }
        (self.kept.iter().map(|message| message.changes.len()).sum(), missed)
    }

    /// That all of these lie in gaps that it was told of; how many there are. Where history was given up, that is told of
    /// everything before.
    fn not_sent(&self, behind: &Gap, changes: &[(u64, &Change)], logged: &HashMap<Lsn, Lsn>) -> usize {
        let is_told = |to: &Lsn| self.told.contains(to) || *to <= behind.dropped_to;
        let gaps: Vec<(Lsn, Lsn)> =
            logged.iter().filter(|(to, _)| is_told(to)).map(|(to, from)| (*from, *to)).collect();
        for (commit_lsn, change) in changes {
            let commit = Lsn(*commit_lsn);
            assert!(
                gaps.iter().any(|(from, to)| *from <= commit && commit < *to),
                "tenant {}: {change:?} of {commit} was not sent, and lies in none of the gaps that were told: {gaps:?}",
                self.tenant,
            );
        }
        changes.len()
    }

    /// Which change comes first behind a gap that ends at a position.
    fn after_gap(&self, to: Position, next: usize, had: &[&Change], expected: &[(u64, &Change)]) -> usize {
        let first_at = expected.partition_point(|(commit_lsn, _)| *commit_lsn < to.lsn.0);
        let first_past = expected.partition_point(|(commit_lsn, _)| *commit_lsn <= to.lsn.0);
        assert!(next <= first_past, "tenant {}: sent back to {to}, behind what it had", self.tenant);
        // Inside a transaction rows are counted, which may be of other tenants: any of its changes may be the first.
        let last = if to.steps == 0 { first_at } else { first_past };
        let begins_here = |at: &usize| expected[*at..].iter().map(|(_, change)| change).zip(had).all(|(a, b)| a == b);
        (first_at..=last).find(begins_here).unwrap_or(last)
    }

    fn fail(&self, had: &[&Change], had_at: usize, expected: &[(u64, &Change)], expected_at: usize) -> ! {
        let had: Vec<_> = had.iter().enumerate().skip(had_at.saturating_sub(5)).take(15).collect();
        let around: Vec<_> = expected.iter().enumerate().skip(expected_at.saturating_sub(5)).take(15).collect();
        panic!(
            "tenant {}: change {expected_at} of {} differs\n  got {had:#?}\n  expected {around:#?}\n  gaps {:?}\n  from '{}'",
            self.tenant,
            expected.len(),
            self.gaps,
            self.first_token,
        );
    }

    /// Keeps only where it is, for the next round.
    fn let_go(&mut self) {
        self.first_token = self.kept.pop().expect("the last message").token;
        self.kept = Vec::new();
        self.gaps.clear();
        self.told.clear();
    }
}

fn position(token: &str) -> Position {
    match token.parse() {
        Ok(SnapToken::Position { place, .. }) => place.position,
        other => panic!("not the token of a position: {other:?}"),
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
