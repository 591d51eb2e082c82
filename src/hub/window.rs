//! The recent messages of the stream in memory, by tenant ([`super::feeds`]), and how far they are released.

mod next;

pub(super) use next::Next;

use super::feeds::{Feeds, ReaderKey};
use super::wake_batch::WakeBatch;
use super::{Item, Options, Origin, Usage, Waits};
use crate::changelog::GAPS_MAX;
use crate::model::change::TenantId;
use crate::model::lsn::{CommitLsn, EndLsn, Lsn, Position, Snapshot, Xid8};
use crate::model::scope::{Place, Scope};
use crate::model::timeline::History;
use crate::model::transaction::{Gap, Header, Message, TenantMessage, Transaction};
use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Waker;
use tokio::time::Instant;

/// Transactions that may wait for their visibility (hours of a synchronous standby that is away, at some rate).
const PENDING_MAX: usize = 1 << 20;

pub(super) struct Window {
    options: Options,
    /// Transactions with anything in memory, in stream order.
    entries: VecDeque<Entry>,
    bytes: usize,
    /// Everything after it is in memory, except transactions in `holes`.
    floor: Position,
    feeds: Feeds,
    /// Admitted and not yet visible, in stream order; the first `pending_released` of them are released.
    pending: VecDeque<Pending>,
    pending_released: usize,
    released: Lsn,
    watermark: Lsn,
    /// In stream order of their ends. Those past `released` do not count yet.
    gaps: Vec<Gap>,
    /// The source and the history that positions belong to.
    origin: Option<Origin>,
    /// Transactions that are partly in the log only, commit and end LSN, as far as they are in `entries`.
    holes: VecDeque<(CommitLsn, EndLsn)>,
    /// The first abandoned LSN of every divergence so far; a reader that has not looked since the last one checks itself against it.
    divergences: Vec<Lsn>,
    /// Those that readers are woken by.
    wake_batches: Vec<WakeBatch>,
    /// Nothing is handed out any more.
    closed: bool,
    /// Since when a transaction waits for room.
    full_since: Option<Instant>,
}

struct Entry {
    commit: CommitLsn,
    xid: Xid8,
    end: EndLsn,
    /// Of the transaction, and of the envelopes that were made of it since.
    bytes: usize,
    /// Its messages, as in a stream of all tenants. Each is in its tenant's feed, too.
    items: Vec<Arc<Item>>,
}

struct Pending {
    /// When it was admitted.
    since: Instant,
    end: Lsn,
    /// `None`: nothing has to become visible.
    xid: Option<Xid8>,
    /// The log must have it before it is released.
    on_disk: bool,
    wake: Wake,
}

enum Wake {
    Nobody,
    Tenants(Vec<TenantId>),
    Everybody,
}

/// The state of the window that a start is based on. The subscription notices a divergence that comes later.
#[derive(Clone)]
pub(super) struct Anchor {
    pub(super) watermark: Lsn,
    pub(super) released: Lsn,
    pub(super) origin: Option<Origin>,
    /// How many there were.
    pub(super) divergences: usize,
}

impl Window {
    /// A window in front of a log that ends at `tail`. Everything up to `watermark` is visible; `in_doubt` has the end LSN and the id of the
    /// transactions past that.
    pub(super) fn new(
        options: Options,
        origin: Option<Origin>,
        watermark: Lsn,
        in_doubt: &[(EndLsn, Xid8)],
        tail: Lsn,
        gaps: Vec<Gap>,
    ) -> Self {
        let in_doubt = in_doubt.iter().map(|(end, xid)| (end.0, Some(*xid)));
        let pending = in_doubt.chain(std::iter::once((tail, None))).map(|(end, xid)| Pending {
            since: Instant::now(),
            end,
            xid,
            on_disk: true,
            wake: Wake::Everybody,
        });
        Self {
            options,
            entries: VecDeque::new(),
            bytes: 0,
            floor: Position::at(tail),
            feeds: Feeds::default(),
            pending: pending.collect(),
            pending_released: 0,
            released: watermark,
            watermark,
            gaps,
            origin,
            holes: VecDeque::new(),
            divergences: Vec::new(),
            wake_batches: Vec::new(),
            closed: false,
            full_since: None,
        }
    }

    pub(super) const fn watermark(&self) -> Lsn {
        self.watermark
    }

    pub(super) const fn released(&self) -> Lsn {
        self.released
    }

    pub(super) const fn origin(&self) -> Option<&Origin> {
        self.origin.as_ref()
    }

    pub(super) fn begin_at(&mut self, origin: Origin, lsn: Lsn) {
        assert!(self.entries.is_empty(), "a log begins before anything is admitted");
        self.origin = Some(origin);
        self.pending.clear();
        self.pending_released = 0;
        self.floor = Position::at(lsn);
        self.released = lsn;
        self.watermark = lsn;
        self.feeds.iter_mut().for_each(|feed| feed.floor = Position::at(lsn));
    }

    /// Takes a transaction, unless there is no room that the log (which has everything up to `appended`) could make.
    ///
    /// `items` are its messages, from [`items_of`]; they are left where there is no room.
    pub(super) fn admit(&mut self, transaction: &Transaction, items: &mut Vec<Arc<Item>>, appended: Lsn) -> bool {
        let bytes = transaction.bytes();
        if !self.make_room(bytes, appended) {
            self.full_since.get_or_insert_with(Instant::now);
            return false;
        }
        self.full_since = None;
        let items = std::mem::take(items);
        for item in &items {
            self.feeds.of_tenant_or_new(&item.tenant, self.floor).messages.push_back(item.clone());
        }
        let everybody = transaction.staged || transaction.gaps.iter().any(|gap| gap.tenant.is_none());
        let wake = if everybody {
            Wake::Everybody
        } else {
            let broken = transaction.gaps.iter().filter_map(|gap| gap.tenant.clone());
            let mut woken: Vec<TenantId> = items.iter().map(|item| item.tenant.clone()).chain(broken).collect();
            woken.dedup();
            Wake::Tenants(woken)
        };
        self.pending.push_back(Pending {
            since: Instant::now(),
            end: transaction.end.0,
            xid: Some(transaction.header.xid),
            on_disk: transaction.staged,
            wake,
        });
        self.add_gaps(&transaction.gaps);
        if transaction.has_changes() {
            self.bytes += bytes;
            if transaction.staged {
                self.holes.push_back((transaction.header.commit, transaction.end));
            }
            let Header { commit, xid, .. } = transaction.header;
            self.entries.push_back(Entry { commit, xid, end: transaction.end, bytes, items });
        }
        true
    }

    fn make_room(&mut self, bytes: usize, appended: Lsn) -> bool {
        if self.pending.len() >= PENDING_MAX {
            return false;
        }
        while self.bytes + bytes > self.options.window_bytes && !self.entries.is_empty() {
            if !self.evict_oldest(appended) {
                return false;
            }
        }
        true
    }

    /// Counts an envelope of this message, and evicts older transactions if they take its room. `false`: there is no room, and the envelope
    /// must not be kept. The envelope of a message that is not in the window is not counted: its readers hold it.
    pub(super) fn reserve(&mut self, item: &Item, bytes: usize, appended: Lsn) -> bool {
        if !item.is_in_window() {
            return true;
        }
        let commit = item.message.header.commit;
        let is_older = |entry: &Entry| entry.commit < commit;
        // Nothing is evicted in vain.
        let missing = (self.bytes + bytes).saturating_sub(self.options.window_bytes);
        let (mut freed, mut count) = (0, 0);
        for entry in self.entries.iter().take_while(|entry| is_older(entry) && entry.end.0 <= appended) {
            if freed >= missing {
                break;
            }
            freed += entry.bytes;
            count += 1;
        }
        if freed < missing {
            return false;
        }
        for _ in 0..count {
            self.evict_oldest(appended);
        }
        let at = self.entries.partition_point(is_older);
        let Some(entry) = self.entries.get_mut(at) else { return false };
        entry.bytes += bytes;
        self.bytes += bytes;
        true
    }

    /// Takes idle progress, or a gap.
    pub(super) fn admit_mark(&mut self, lsn: Lsn, gap: Option<Gap>) {
        let wake = match &gap {
            None => Wake::Nobody,
            Some(Gap { tenant: Some(tenant), .. }) => Wake::Tenants(vec![tenant.clone()]),
            Some(_) => Wake::Everybody,
        };
        self.add_gaps(gap.as_slice());
        let unreleased = self.pending.len() > self.pending_released;
        match self.pending.back_mut() {
            // Progress upon progress is one mark, so that an idle stream does not fill the queue.
            Some(last)
                if unreleased && last.xid.is_none() && matches!((&last.wake, &wake), (Wake::Nobody, Wake::Nobody)) =>
            {
                last.end = last.end.max(lsn);
            }
            _ => self.pending.push_back(Pending { since: Instant::now(), end: lsn, xid: None, on_disk: false, wake }),
        }
    }

    /// Keeps as many gaps as the log does. A reader from before a forgotten one is sent to the log, which refuses it.
    fn add_gaps(&mut self, gaps: &[Gap]) {
        self.gaps.extend(gaps.iter().cloned());
        while self.gaps.len() > GAPS_MAX {
            let to = self.gaps.remove(0).to;
            self.feeds.iter_mut().for_each(|feed| feed.floor = feed.floor.max(to));
        }
    }

    /// Forgets the oldest transaction, if the log has it.
    fn evict_oldest(&mut self, appended: Lsn) -> bool {
        let Some(entry) = self.entries.pop_front_if(|entry| entry.end.0 <= appended) else { return false };
        self.bytes -= entry.bytes;
        self.floor = Position::after(entry.end);
        for item in &entry.items {
            let Some(feed) = self.feeds.of_tenant(&item.tenant) else { continue };
            if let Some(item) = feed.messages.pop_front() {
                item.leave_window();
                assert!(item.message.header.commit == entry.commit, "feeds and entries are in the same order");
                feed.floor = feed.floor.max(item.message.reached());
            }
            self.feeds.tidy(&Scope::Tenant(item.tenant.clone()));
        }
        if self.holes.pop_front_if(|(_, end)| *end <= entry.end).is_some() {
            self.feeds.iter_mut().for_each(|feed| feed.floor = feed.floor.max(Position::after(entry.end)));
        }
        true
    }

    /// The id of the last transaction in memory that committed before `commit`.
    pub(super) fn transaction_before(&self, commit: CommitLsn) -> Option<Xid8> {
        let before = self.entries.partition_point(|entry| entry.commit < commit);
        self.entries.get(before.checked_sub(1)?).map(|entry| entry.xid)
    }

    /// Whether something waits to be released or seen.
    pub(super) fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// How much waits.
    pub(super) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Whether the first waiting transaction needs a snapshot.
    pub(super) fn needs_snapshot(&self) -> bool {
        self.pending.front().is_some_and(|first| first.xid.is_some())
    }

    /// Releases in stream order every transaction that it can. `appended` is the end LSN up to which the log can be read.
    pub(super) fn advance(&mut self, snapshot: Option<&Snapshot>, appended: Lsn) {
        let seen = |item: &Pending| item.xid.is_none_or(|xid| snapshot.is_some_and(|snapshot| snapshot.sees(xid)));
        while let Some(item) = self.pending.get_mut(self.pending_released) {
            let readable = !item.on_disk || item.end <= appended;
            if !readable || !(self.options.before_visible || seen(item)) {
                break;
            }
            let wake = std::mem::replace(&mut item.wake, Wake::Nobody);
            let before = self.released;
            self.released = before.max(item.end);
            self.pending_released += 1;
            match wake {
                Wake::Nobody => {}
                Wake::Everybody => self.wake_everybody(before),
                Wake::Tenants(tenants) if tenants.is_empty() => {}
                Wake::Tenants(tenants) => {
                    for tenant in &tenants {
                        if let Some(feed) = self.feeds.of_tenant(tenant) {
                            feed.wake(before);
                        }
                    }
                    if let Some(feed) = self.feeds.get_mut(&Scope::All) {
                        feed.wake(before);
                    }
                }
            }
        }
        self.wake_batches.iter().for_each(WakeBatch::wake);
        while self.pending_released > 0
            && let Some(item) = self.pending.pop_front_if(|item| seen(item))
        {
            self.pending_released -= 1;
            self.watermark = self.watermark.max(item.end);
        }
    }

    /// See [`Feed::wake`](super::feeds::Feed::wake).
    fn wake_everybody(&mut self, had: Lsn) {
        self.feeds.iter_mut().for_each(|feed| feed.wake(had));
        self.wake_batches.iter().for_each(WakeBatch::wake);
    }

    /// Ends all reading.
    pub(super) fn close(&mut self) {
        self.closed = true;
        self.wake_everybody(self.released);
    }

    /// Adds the readers of one more thread, which are woken together.
    pub(super) fn add_wake_batch(&mut self, wake_batch: WakeBatch) {
        self.wake_batches.push(wake_batch);
    }

    /// Forgets everything past `at`.
    pub(super) fn diverge(&mut self, at: Lsn, history: Arc<History>) {
        self.origin = self.origin.take().map(|(source, _)| (source, history));
        self.holes.retain(|(_, end)| end.0 <= at);
        // A commit record can cross the switch.
        let mut first = at;
        while let Some(entry) = self.entries.pop_back_if(|entry| entry.end.0 > at) {
            first = first.min(entry.commit.0);
            self.bytes -= entry.bytes;
            for item in &entry.items {
                item.leave_window();
                if let Some(feed) = self.feeds.of_tenant(&item.tenant) {
                    feed.messages.pop_back();
                }
            }
        }
        self.pending.retain(|item| item.end <= at);
        self.pending_released = self.pending_released.min(self.pending.len());
        self.gaps = std::mem::take(&mut self.gaps).into_iter().filter_map(|gap| gap.up_to(at)).collect();
        self.released = self.released.min(at);
        self.watermark = self.watermark.min(at);
        let floor = Position::at(at);
        self.floor = self.floor.min(floor);
        self.feeds.iter_mut().for_each(|feed| feed.floor = feed.floor.min(floor));
        self.divergences.push(first);
        self.wake_everybody(at);
    }

    /// The bytes that it holds and may hold, and its readers.
    pub(super) fn usage(&self) -> Usage {
        Usage {
            bytes: self.bytes,
            bytes_max: self.options.window_bytes,
            pending: self.pending.len(),
            released: self.released,
            lags: self.feeds.lags(self.released),
        }
    }

    /// Since when something waits.
    pub(super) fn waits(&self) -> Waits {
        let unreleased = self.pending.range(self.pending_released..).find(|item| item.xid.is_some());
        Waits { unreleased_since: unreleased.map(|item| item.since), full_since: self.full_since }
    }

    /// The state that a start is based on.
    pub(super) fn anchor(&self) -> Anchor {
        Anchor {
            watermark: self.watermark,
            released: self.released,
            origin: self.origin.clone(),
            divergences: self.divergences.len(),
        }
    }

    /// Registers a reader at `cursor`, to be woken with this batch, if any.
    pub(super) fn join(&mut self, scope: &Scope, cursor: &Place, wake_batch: Option<WakeBatch>) -> ReaderKey {
        self.feeds.join(scope, cursor.position.lsn, self.floor, wake_batch)
    }

    /// Wakes the reader once when there may be something new for it.
    pub(super) fn wait(&mut self, key: ReaderKey, waker: &Waker) {
        self.feeds.wait(key, waker);
    }

    pub(super) fn leave(&mut self, key: ReaderKey) {
        self.feeds.leave(key);
    }

    /// How many divergences there were so far.
    pub(super) const fn divergences(&self) -> usize {
        self.divergences.len()
    }

    /// Whether anything of this tenant is in memory.
    pub(super) fn knows(&self, tenant: &TenantId) -> bool {
        self.feeds.get(&Scope::Tenant(tenant.clone())).is_some_and(|feed| !feed.messages.is_empty())
    }
}

/// The messages of a transaction as in a stream of all tenants.
pub(super) fn items_of(transaction: &Transaction) -> Vec<Arc<Item>> {
    let mut messages: Vec<&(TenantId, Message)> = transaction.messages.iter().collect();
    messages.sort_by(|(a, _), (b, _)| a.cmp(b));
    let last = messages.len().saturating_sub(1);
    // Staged messages are not here: a stream of all tenants reads such a transaction from the log.
    let end = (transaction.gaps.is_empty() && !transaction.staged).then_some(transaction.end);
    let item = |(n, (tenant, message)): (usize, &(TenantId, Message))| {
        let ends_transaction = end.filter(|_| n == last);
        Item::in_window(TenantMessage { tenant: tenant.clone(), message: message.clone(), ends_transaction })
    };
    messages.into_iter().enumerate().map(item).collect()
}
