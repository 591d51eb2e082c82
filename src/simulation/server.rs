//! A scripted PostgreSQL: it commits transactions over time, has one slot, and can fail.
//!
//! It sends pgoutput, and keeps the promises of PostgreSQL. Commits reach the stream before they are visible. In a crash the slot forgets
//! the acknowledgements since its last checkpoint.

use super::disk::Disk;
use super::world::World;
use crate::changelog::State;
use crate::decode::pgoutput::RelationId;
use crate::hub::primary::{Primary, PrimaryState, TransactionStatus, Unreachable};
use crate::hub::releaser::Snapshots;
use crate::model::change::TenantId;
use crate::model::lsn::{CommitLsn, CommitTime, EndLsn, Lsn, Position, Snapshot, Xid8};
use crate::model::snap_token::{SnapToken, TokenId};
use crate::model::timeline::{History, Source, Timeline};
use crate::postgres::connection::Event;
use crate::postgres::publication::Published;
use crate::postgres::transactions::Writer;
use crate::replication::Error;
use crate::replication::upstream::{Link, Server as Identity, Started, Upstream};
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

pub(super) const SOURCE: Source = Source { system_identifier: 7, database_oid: 5 };
pub(super) const TENANTS: [&str; 2] = ["a", "b"];
/// How ids begin after which a reader has seen enough.
pub(super) const LAST: &str = "last";
/// The position at the beginning.
pub(super) const ORIGIN: Lsn = Lsn(1_000);

const RELATION: u32 = 42;
const FIRST_XID: u64 = (7 << 32) - 3;
/// PostgreSQL pings at half of `wal_sender_timeout`.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(10);
/// A walsender reports its position as soon as it has nothing to send.
const CAUGHT_UP_AFTER: Duration = Duration::from_millis(20);

/// The fault of a run, besides crashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Nothing,
    /// Another program reads the slot up to its end.
    SlotMoved,
    /// The disk of the change log confirms a sync that it has not done.
    LyingDisk,
    /// A watched table is taken out of the publication and put in again.
    Unpublished,
    /// A standby that lacks the last commits is promoted.
    Failover,
}

/// A committed transaction.
#[derive(Clone, Debug)]
pub(super) struct Committed {
    pub(super) commit: Lsn,
    pub(super) end: Lsn,
    pub(super) xid: Xid8,
    /// Tenant and id of the created facts, in order.
    pub(super) changes: Vec<Row>,
    token: Option<TokenId>,
    /// Not sent: its table was not published.
    hidden: bool,
    visible_at: Instant,
}

impl Committed {
    fn is_visible(&self) -> bool {
        Instant::now() >= self.visible_at
    }
}

/// Tenant, and an id that is written once.
pub(super) type Row = (&'static str, String);

/// Cheap to clone.
#[derive(Clone)]
pub(super) struct Server {
    world: World,
    disk: Disk,
    inner: Arc<Mutex<Inner>>,
    /// Changes when there is data to send, or when the connection is lost.
    changed: watch::Sender<u64>,
}

struct Inner {
    history: History,
    committed: Vec<Committed>,
    /// Lost in a failover after they were visible.
    abandoned: Vec<Xid8>,
    /// Whether SQL gets an answer: it goes to the server that the session found.
    answers: bool,
    next_xid: u64,
    wal_end: Lsn,
    /// The slot's confirmed flush.
    confirmed: Lsn,
    /// The acknowledged position that survives a crash of the server.
    confirmed_on_disk: Lsn,
    /// Which link has the slot; a later one takes it.
    holder: u64,
    /// Open transactions, and which of their rows will not be sent.
    writers: Vec<(Xid8, Vec<Row>)>,
    /// Changes with the publication.
    publication: u64,
    is_hidden: bool,
}

impl Server {
    pub(super) fn new(world: World, disk: Disk) -> Self {
        let inner = Inner {
            history: History::first(),
            committed: Vec::new(),
            abandoned: Vec::new(),
            answers: true,
            next_xid: FIRST_XID,
            wal_end: ORIGIN,
            confirmed: ORIGIN,
            confirmed_on_disk: ORIGIN,
            holder: 0,
            writers: Vec::new(),
            publication: 1,
            is_hidden: false,
        };
        Self { world, disk, inner: Arc::new(Mutex::new(inner)), changed: watch::Sender::new(0) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    fn tell(&self) {
        self.changed.send_modify(|changes| *changes += 1);
    }

    pub(super) fn confirmed(&self) -> Lsn {
        self.inner().confirmed
    }

    /// The transactions, in commit order.
    pub(super) fn committed(&self) -> Vec<Committed> {
        self.inner().committed.clone()
    }

    /// Whether a SELECT sees the rows of this transaction.
    pub(super) fn is_visible(&self, xid: Xid8) -> bool {
        let inner = self.inner();
        let is_committed = inner.committed.iter().any(|transaction| transaction.xid == xid && transaction.is_visible());
        is_committed || inner.abandoned.contains(&xid)
    }

    /// Commits a transaction with these changes.
    pub(super) fn commit(&self, changes: Vec<Row>) -> Committed {
        let mut inner = self.inner();
        let (xid, hidden) = (Xid8(inner.next_xid), inner.is_hidden);
        inner.next_xid += 1;
        drop(inner);
        self.commit_as(xid, changes, hidden)
    }

    /// Begins a transaction that writes these changes, and stays open.
    pub(super) fn write(&self, changes: Vec<Row>) {
        let mut inner = self.inner();
        assert!(inner.is_hidden, "what is sent of a transaction is all of it or nothing, here");
        let xid = Xid8(inner.next_xid);
        inner.next_xid += 1;
        inner.writers.push((xid, changes));
        self.world.note(format!("xid {} writes what is not published, and stays open", xid.0));
    }

    /// Commits all that is open, however long ago it was written.
    pub(super) fn commit_writers(&self) {
        let writers = self.inner().writers.clone();
        for (xid, changes) in writers {
            self.commit_as(xid, changes, true);
            // Only now, as PostgreSQL does.
            self.inner().writers.retain(|(writer, _)| *writer != xid);
        }
    }

    fn commit_as(&self, xid: Xid8, changes: Vec<Row>, hidden: bool) -> Committed {
        let has_token = self.world.once_in(3) || self.inner().committed.is_empty();
        // The end LSN of one transaction may be the commit LSN of the next.
        let gap = self.world.below(2) * self.world.below(40);
        let visible_at = Instant::now() + Duration::from_millis(self.world.below(2) * self.world.below(40));
        let transaction = {
            let mut inner = self.inner();
            let commit = Lsn(inner.wal_end.0 + gap);
            let end = Lsn(commit.0 + 50);
            inner.wal_end = end;
            let token = has_token.then(|| TokenId(u128::from(xid.0).to_be_bytes()));
            let transaction = Committed { commit, end, xid, changes, token, hidden, visible_at };
            inner.committed.push(transaction.clone());
            transaction
        };
        self.world.note(format!(
            "committed {}..{} xid {} with {} changes{}",
            transaction.commit,
            transaction.end,
            transaction.xid.0,
            transaction.changes.len(),
            if transaction.hidden { ", not published" } else { "" }
        ));
        self.tell();
        transaction
    }

    /// Everything else that is written to the WAL.
    pub(super) fn write_wal(&self) {
        let length = self.world.below(100);
        let mut inner = self.inner();
        inner.wal_end = Lsn(inner.wal_end.0 + length);
    }

    /// All connections end; the slot is as it was at the last checkpoint.
    pub(super) fn crash(&self) {
        self.world.note("the server crashes".into());
        let mut inner = self.inner();
        inner.confirmed = inner.confirmed_on_disk;
        inner.holder += 1;
        // Rolled back.
        inner.writers.clear();
        drop(inner);
        self.tell();
    }

    pub(super) fn checkpoint(&self) {
        let mut inner = self.inner();
        inner.confirmed_on_disk = inner.confirmed;
    }

    /// Another program reads the slot up to its end.
    pub(super) fn move_slot(&self) {
        let mut inner = self.inner();
        inner.confirmed = inner.wal_end;
        inner.confirmed_on_disk = inner.wal_end;
        inner.holder += 1;
        self.world.note(format!("somebody moves the slot to {}", inner.wal_end));
        drop(inner);
        self.tell();
    }

    /// Rows from now on are not published, or are published again.
    pub(super) fn publish(&self, is_published: bool) {
        let mut inner = self.inner();
        inner.is_hidden = !is_published;
        inner.publication += 1;
        self.world.note(format!("the table is published: {is_published}"));
    }

    /// A standby that lacks the last commits takes over.
    pub(super) fn fail_over(&self) {
        let lost = usize::try_from(self.world.below(4)).unwrap();
        let mut inner = self.inner();
        let kept = inner.committed.len().saturating_sub(lost);
        let switch = match inner.committed.get(kept) {
            Some(first_lost) => first_lost.commit,
            None => inner.wal_end,
        };
        let lost_now: Vec<Committed> = inner.committed.drain(kept..).collect();
        inner.abandoned.extend(lost_now.iter().filter(|transaction| transaction.is_visible()).map(|t| t.xid));
        inner.answers = false;
        inner.wal_end = switch;
        let history = vec![Timeline { id: 1, begin: Lsn::ZERO }, Timeline { id: 2, begin: switch }];
        inner.history = History::from_timelines(history).unwrap();
        inner.confirmed = inner.confirmed.min(switch);
        inner.confirmed_on_disk = inner.confirmed;
        inner.holder += 1;
        self.world.note(format!("a standby is promoted at {switch}; {lost} commits are lost"));
        drop(inner);
        self.tell();
    }

    /// The token of a transaction that asked for one.
    pub(super) fn transaction_token(&self, transaction: &Committed) -> Option<String> {
        let floor = Lsn(transaction.commit.0 - 1);
        let token =
            SnapToken::Transaction { source: SOURCE.hash(), id: transaction.token?, xid: transaction.xid, floor };
        Some(token.to_string())
    }

    /// The token of the beginning.
    pub(super) fn first_token(&self) -> String {
        let timeline = Timeline { id: 1, begin: Lsn::ZERO }.hash();
        let (position, commit_time) = (Position::at(ORIGIN), CommitTime(0));
        SnapToken::Position { source: SOURCE.hash(), timeline, position, commit_time }.to_string()
    }

    fn snapshot(&self) -> Snapshot {
        let inner = self.inner();
        let running: Vec<String> = inner
            .committed
            .iter()
            .filter(|t| !t.is_visible())
            .map(|transaction| transaction.xid)
            .chain(inner.writers.iter().map(|(xid, _)| *xid))
            .map(|xid| xid.0.to_string())
            .collect();
        format!("{FIRST_XID}:{}:{}", inner.next_xid, running.join(",")).parse().unwrap()
    }
}

impl Snapshots for Server {
    type Error = Unreachable;

    async fn take(&mut self) -> Result<Snapshot, Unreachable> {
        if !self.world.step(|| "snapshot".into()) || self.world.once_in(20) || !self.inner().answers {
            return Err(Unreachable("not now".into()));
        }
        Ok(self.snapshot())
    }
}

/// Answers one reader at its start, and keeps the answers.
pub(super) struct Asked<'a> {
    pub(super) server: &'a Server,
    pub(super) snapshot: Mutex<Option<Arc<Snapshot>>>,
}

impl Primary for Asked<'_> {
    async fn look(&self, _: &TenantId) -> Result<PrimaryState, Unreachable> {
        if !self.server.inner().answers {
            return Err(Unreachable("not now".into()));
        }
        let snapshot = Arc::new(self.server.snapshot());
        *self.snapshot.lock().unwrap() = Some(snapshot.clone());
        let inner = self.server.inner();
        Ok(PrimaryState { flush_lsn: inner.wal_end, snapshot, tenant_exists: true })
    }

    async fn transaction_status(&self, _: Xid8) -> Result<TransactionStatus, Unreachable> {
        Ok(TransactionStatus::Over)
    }

    async fn mark(&self) -> Result<Lsn, Unreachable> {
        if !self.server.inner().answers {
            return Err(Unreachable("not now".into()));
        }
        Ok(self.server.commit(Vec::new()).commit)
    }
}

impl Upstream for Server {
    type Link = ServerLink;

    async fn connect(&self, _: &State) -> Result<ServerLink, Error> {
        if !self.world.step(|| "connect".into()) || self.world.once_in(10) {
            return Err(Error::Transient("connection refused".into()));
        }
        let mut inner = self.inner();
        inner.holder += 1;
        let identity = Identity { source: SOURCE, history: inner.history.clone(), wal_end: inner.wal_end };
        Ok(ServerLink {
            server: self.clone(),
            identity,
            number: inner.holder,
            sent: Lsn::ZERO,
            is_described: false,
            queue: VecDeque::new(),
            told: Lsn::ZERO,
            sent_at: Instant::now(),
        })
    }
}

pub(super) struct ServerLink {
    server: Server,
    identity: Identity,
    number: u64,
    /// Every transaction that commits before is sent, or not wanted.
    sent: Lsn,
    is_described: bool,
    queue: VecDeque<Event>,
    /// The WAL end of the last keepalive.
    told: Lsn,
    /// When anything was sent last.
    sent_at: Instant,
}

impl ServerLink {
    fn check(&self) -> Result<(), Error> {
        if self.server.inner().holder != self.number {
            return Err(Error::Transient("the connection was lost".into()));
        }
        Ok(())
    }

    /// The events of the next transaction, if there is one.
    fn fill(&mut self) -> bool {
        let next = self.server.inner().committed.iter().find(|transaction| transaction.commit >= self.sent).cloned();
        let Some(transaction) = next else { return false };
        self.sent = transaction.end;
        let commit_time = CommitTime(i64::try_from(transaction.end.0).unwrap());
        let xid = transaction.xid.0 as u32;
        self.queue.push_back(Event::Begin { commit: CommitLsn(transaction.commit), xid, commit_time });
        let changes: &[(&str, String)] = if transaction.hidden { &[] } else { &transaction.changes };
        for (tenant, id) in changes {
            if !std::mem::replace(&mut self.is_described, true) {
                self.queue.push_back(Event::Change(relation()));
            }
            self.queue.push_back(Event::Change(insert(tenant, id)));
            if self.server.world.once_in(8) {
                // In the middle of a transaction this is no statement about it.
                self.queue.push_back(Event::KeepAlive { wal_end: transaction.end });
            }
        }
        if let Some(TokenId(id)) = transaction.token {
            let content = Bytes::copy_from_slice(&id);
            self.queue.push_back(Event::Message { prefix: "tuplewatch".into(), content });
        }
        self.queue.push_back(Event::Commit { commit: CommitLsn(transaction.commit), end: EndLsn(transaction.end) });
        true
    }
}

impl Link for ServerLink {
    fn server(&self) -> &Identity {
        &self.identity
    }

    async fn start(&mut self) -> Result<Started, Error> {
        self.check()?;
        if !self.server.world.step(|| "start".into()) {
            return Err(Error::Transient("dead".into()));
        }
        let inner = self.server.inner();
        self.sent = inner.confirmed;
        Ok(Started { confirmed: inner.confirmed, xid: Xid8(inner.next_xid) })
    }

    fn announce(&self) {
        self.server.inner().answers = true;
    }

    async fn next(&mut self, events: &mut Vec<Event>) -> Result<(), Error> {
        let mut changed = self.server.changed.subscribe();
        loop {
            changed.mark_unchanged();
            self.check()?;
            if self.queue.is_empty() {
                self.fill();
            }
            if let Some(event) = self.queue.front().cloned() {
                if !self.server.world.step(|| format!("event {}", describe(&event))) {
                    std::future::pending::<()>().await;
                }
                if self.server.world.once_in(80) {
                    self.server.world.note("the connection breaks".into());
                    return Err(Error::Transient("connection reset".into()));
                }
                self.queue.pop_front();
                self.sent_at = Instant::now();
                events.push(event);
                return Ok(());
            }
            // Nothing is left to send, so everything up to here was sent.
            let wal_end = self.server.inner().wal_end;
            let silence = if self.told < wal_end { CAUGHT_UP_AFTER } else { KEEPALIVE_EVERY };
            if self.sent_at.elapsed() >= silence {
                self.told = wal_end;
                self.sent_at = Instant::now();
                events.push(Event::KeepAlive { wal_end });
                return Ok(());
            }
            let _ = tokio::time::timeout_at(self.sent_at + silence, changed.changed()).await;
        }
    }

    fn acknowledge(&self, lsn: Lsn) {
        let synced = self.server.disk.synced_tail();
        let mut inner = self.server.inner();
        if self.server.world.is_dead() || inner.holder != self.number || lsn <= inner.confirmed {
            return;
        }
        if lsn > synced {
            drop(inner);
            return self.server.world.violate(format!("acknowledged {lsn}, and only {synced} is on disk"));
        }
        inner.confirmed = lsn;
        drop(inner);
        self.server.world.step(|| format!("acknowledge {lsn}"));
    }

    fn lost(&self) -> impl Future<Output = Error> + Send + 'static {
        std::future::pending()
    }

    async fn check_alive(&self) -> Result<(), Error> {
        self.check()
    }

    async fn check_fit(&self) -> Result<(), Error> {
        self.check()
    }

    async fn published(&self) -> Result<Published, Error> {
        self.check()?;
        let inner = self.server.inner();
        let fingerprint = Some(format!("publication\tversion\t{}\n", inner.publication));
        Ok(Published { fingerprint, lsn: inner.wal_end, tables: HashMap::new() })
    }

    async fn writers(&self, _: &[RelationId]) -> Result<Vec<Xid8>, Error> {
        self.check()?;
        Ok(self.server.inner().writers.iter().map(|(xid, _)| *xid).collect())
    }

    async fn running(&self, of: &[Xid8]) -> Result<Vec<Writer>, Error> {
        self.check()?;
        let inner = self.server.inner();
        let running = inner.writers.iter().filter(|(xid, _)| of.contains(xid));
        Ok(running.map(|(xid, _)| Writer { xid: *xid, description: xid.to_string() }).collect())
    }

    async fn mark(&self) -> Result<Lsn, Error> {
        self.check()?;
        Ok(self.server.commit(Vec::new()).end)
    }

    async fn confirmed(&self) -> Result<Lsn, Error> {
        self.check()?;
        Ok(self.server.confirmed())
    }

    async fn close(self) {}
}

fn describe(event: &Event) -> String {
    match event {
        Event::Begin { commit, .. } => format!("begin {commit}"),
        Event::Change(_) => "change".into(),
        Event::Message { .. } => "message".into(),
        Event::Commit { end, .. } => format!("commit, end {end}"),
        Event::KeepAlive { wal_end } => format!("keepalive {wal_end}"),
    }
}

const COLUMNS: [&str; 7] =
    ["tenant_id", "entity_type", "entity_id", "relation", "subject_type", "subject_id", "subject_relation"];

/// pgoutput's Relation: the table of the preset `tuples`.
fn relation() -> Bytes {
    let mut bytes = vec![b'R'];
    bytes.extend(RELATION.to_be_bytes());
    for name in ["tuplewatch", "relation_tuples"] {
        bytes.extend(name.as_bytes());
        bytes.push(0);
    }
    bytes.push(b'd');
    bytes.extend(7u16.to_be_bytes());
    for name in COLUMNS {
        bytes.push(1);
        bytes.extend(name.as_bytes());
        bytes.push(0);
        bytes.extend(25u32.to_be_bytes());
        bytes.extend((-1i32).to_be_bytes());
    }
    bytes.into()
}

/// pgoutput's Insert.
fn insert(tenant: &str, id: &str) -> Bytes {
    let mut bytes = vec![b'I'];
    bytes.extend(RELATION.to_be_bytes());
    bytes.push(b'N');
    bytes.extend(7u16.to_be_bytes());
    for value in [tenant, "document", id, "viewer", "user", "u", ""] {
        bytes.push(b't');
        bytes.extend(u32::try_from(value.len()).unwrap().to_be_bytes());
        bytes.extend(value.as_bytes());
    }
    bytes.into()
}
