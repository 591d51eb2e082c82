//! One reader of the changes of a scope, over memory and disk.

use super::feeds::ReaderKey;
use super::window::Next;
use super::{Hub, Item, Origin};
use crate::changelog::{self, Batch};
use crate::metrics::metrics;
use crate::model::lsn::{Lsn, Position, Snapshot, Xid8};
use crate::model::scope::{Place, Scope};
use crate::model::transaction::Gap;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::sync::watch;

/// How much more is read from the log at a time than is taken from memory: a read takes a thread for a moment.
const READ_FACTOR: usize = 16;

/// Leaves out what a reader has already: of what committed before `lsn`, what is visible in `snapshot`, and what is its own.
/// For one that starts *now*, that is its own first read.
#[derive(Clone, Debug)]
pub struct Filter {
    /// The server's flush position at the start, and not its insert position: what is visible and not flushed (by
    /// `synchronous_commit = off`) can go in a crash, and then its id and its place in the WAL are another transaction's.
    pub lsn: Lsn,
    /// What was visible then.
    pub snapshot: Arc<Snapshot>,
    /// The transaction that the reader made itself, whether it is visible in the snapshot or not.
    pub own: Option<Xid8>,
}

impl Filter {
    fn leaves_out(&self, xid: Xid8) -> bool {
        self.own == Some(xid) || self.snapshot.sees(xid)
    }
}

/// Why a subscription cannot go on.
#[derive(Debug)]
pub enum End {
    /// History is not continuous: the state has to be read anew. [`Subscription::continue_after`] resumes behind it.
    Gap(Gap),
    /// What was received past this LSN was abandoned by the server.
    Abandoned {
        /// The switch LSN.
        at: Lsn,
    },
    /// The log no longer has what comes next.
    TooOld {
        /// From where it can still be read.
        earliest: Position,
    },
    /// The log cannot be read.
    Log(changelog::Error),
    /// The hub was closed.
    Closed,
}

/// What a subscription is doing.
enum Activity {
    /// It looks into memory when it is polled.
    Looking,
    /// It reads the log.
    Reading(Pin<Box<dyn Future<Output = Result<Read, changelog::Error>> + Send>>),
    /// It waits for the log to be appended to, and looks again then.
    AwaitingAppend(#[expect(dead_code, reason = "kept because it wakes")] Pin<Box<dyn Future<Output = ()> + Send>>),
}

/// The result of a look into memory.
enum Looked {
    /// There are messages. Where they are `all`, the reader is woken when there are more.
    Found { all: bool },
    /// The subscription has moved, or begun to read the log.
    Again,
    /// There is nothing. The reader is woken when there is.
    Nothing,
}

/// Where a subscription had its last messages from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tier {
    /// It has not had any.
    None,
    Memory,
    Log,
}

/// What came of a read.
struct Read {
    batch: Batch,
    /// As it was afterwards.
    horizon: Position,
    /// Where it ended.
    up_to: Place,
}

/// See [`Hub`]. Dropping it gives back all it holds.
pub struct Subscription {
    hub: Hub,
    scope: Scope,
    /// Everything up to here was yielded, or does not exist.
    cursor: Place,
    /// The newest that the reader has: what was yielded last, or the state that it had at the start. Behind the cursor, where
    /// there was nothing for it.
    seen: Position,
    filter: Option<Filter>,
    /// Its place among those that wait for the tenant.
    key: ReaderKey,
    activity: Activity,
    tier: Tier,
    divergences_checked: usize,
    /// What the positions of the last batch belong to.
    origin: Option<Origin>,
}

impl Subscription {
    /// A reader of this scope after `cursor`, whose state is at most `seen`; decided on when there had been `divergences`. Whether the log
    /// still has the changes is found out by reading.
    pub(super) fn new(
        hub: Hub,
        scope: Scope,
        cursor: Place,
        seen: Position,
        filter: Option<Filter>,
        divergences: usize,
    ) -> Self {
        let key = hub.window().join(&scope, &cursor, hub.wake_batch.clone());
        Self {
            hub,
            scope,
            cursor,
            seen,
            filter,
            key,
            activity: Activity::Looking,
            tier: Tier::None,
            divergences_checked: divergences,
            origin: None,
        }
    }

    /// Whose changes these are.
    pub const fn scope(&self) -> &Scope {
        &self.scope
    }

    /// Everything up to here was yielded, or does not exist.
    pub const fn place(&self) -> &Place {
        &self.cursor
    }

    /// Resumes behind a gap that ended it: in a stream of all tenants behind one of a single tenant, or where the reader has decided to
    /// read the state anew.
    pub fn continue_after(&mut self, gap: &Gap) {
        self.cursor = gap.ends(&self.scope, &self.cursor);
        self.seen = self.seen.max(self.cursor.outer());
    }

    /// What the positions of the last batch belong to: not what the server went on to since.
    pub const fn origin(&self) -> Option<&Origin> {
        self.origin.as_ref()
    }

    /// Adds the next messages: at least one, and about `bytes_max` bytes where there are more; from the log, 16 times as many.
    /// Yields `true` where that is all there is, and who polled is woken when there is more: as if it had polled once more.
    ///
    /// # Errors
    /// Where there is no continuing from here; the same again on every later call.
    pub fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        bytes_max: usize,
        messages: &mut VecDeque<Arc<Item>>,
    ) -> Poll<Result<bool, End>> {
        let had = messages.len();
        loop {
            let all = if let Activity::Reading(reading) = &mut self.activity {
                let read = ready!(reading.as_mut().poll(cx));
                self.activity = Activity::Looking;
                self.add_read(read.map_err(End::Log)?, messages)?;
                false
            } else {
                match self.look(cx, bytes_max, messages)? {
                    Looked::Found { all } => all,
                    Looked::Again => continue,
                    Looked::Nothing => return Poll::Pending,
                }
            };
            self.take(had, messages);
            if messages.len() > had {
                return Poll::Ready(Ok(all));
            }
        }
    }

    /// Adds what was read from the log.
    fn add_read(&mut self, read: Read, messages: &mut VecDeque<Arc<Item>>) -> Result<(), End> {
        // Retention may have dropped something meanwhile.
        if self.cursor.outer() < read.horizon {
            return Err(End::TooOld { earliest: read.horizon });
        }
        if read.batch.messages.is_empty() && !read.batch.more {
            self.cursor = read.up_to;
        }
        messages.extend(read.batch.messages.into_iter().map(Item::new));
        Ok(())
    }

    /// Looks into memory, and adds the messages that it has.
    fn look(
        &mut self,
        cx: &mut Context<'_>,
        bytes_max: usize,
        messages: &mut VecDeque<Arc<Item>>,
    ) -> Result<Looked, End> {
        self.activity = Activity::Looking;
        let mut window = self.hub.window();
        if self.origin.as_ref().map(|(_, history)| Arc::as_ptr(history))
            != window.origin().map(|(_, history)| Arc::as_ptr(history))
        {
            self.origin = window.origin().cloned();
        }
        let (cursor, seen, checked) = (&self.cursor, self.seen, &mut self.divergences_checked);
        match window.next(self.key, cursor, seen, checked, bytes_max, messages) {
            Next::Messages { all } => {
                if all {
                    window.wait(self.key, cx.waker());
                }
                self.tier = Tier::Memory;
                Ok(Looked::Found { all })
            }
            Next::Disk { up_to: limit, behind } => {
                // Messages that the log does not have yet are in memory, or not released.
                let mut appended = self.hub.inner.appended.clone();
                let up_to = limit.clone().min_at(*appended.borrow_and_update());
                if up_to == limit || up_to.position > self.cursor.outer() {
                    drop(window);
                    if behind {
                        self.count_log_reader();
                    }
                    self.activity = self.read_log(up_to, bytes_max);
                    return Ok(Looked::Again);
                }
                window.wait(self.key, cx.waker());
                drop(window);
                Ok(self.await_append(cx, appended))
            }
            Next::Skip { to } => {
                self.cursor = to;
                Ok(Looked::Again)
            }
            Next::Back { to } => {
                self.cursor = Place::at(to);
                Ok(Looked::Again)
            }
            Next::Wait => {
                window.wait(self.key, cx.waker());
                self.tier = Tier::Memory;
                Ok(Looked::Nothing)
            }
            Next::Gap(gap) => Err(End::Gap(gap)),
            Next::Abandoned { at } => Err(End::Abandoned { at }),
            Next::Closed => Err(End::Closed),
        }
    }

    /// Has the reader woken when the log has been appended to.
    fn await_append(&mut self, cx: &mut Context<'_>, mut appended: watch::Receiver<Lsn>) -> Looked {
        let mut append = Box::pin(async move {
            if appended.changed().await.is_err() {
                // The log is gone, and the process with it.
                std::future::pending::<()>().await;
            }
        });
        if append.as_mut().poll(cx).is_ready() {
            return Looked::Again;
        }
        self.activity = Activity::AwaitingAppend(append);
        Looked::Nothing
    }

    /// Moves past the messages from `first` on, and leaves out what is not for this reader.
    fn take(&mut self, first: usize, messages: &mut VecDeque<Arc<Item>>) {
        let mut kept = first;
        for at in first..messages.len() {
            let Some(item) = messages.get_mut(at) else { break };
            let header = item.message.header;
            let reached = item.reached(&self.scope, &self.cursor);
            let had = self.cursor.of(&item.tenant);
            if had.lsn == header.commit.0 && item.message.first_step().is_some_and(|step| step <= had.steps) {
                // Shared as it is, but where another node cut its messages elsewhere.
                let Some(rest) = item.message.clone().after(had) else {
                    // Nothing of it is left.
                    self.cursor = reached;
                    continue;
                };
                *item = item.cut(rest);
            }
            self.cursor = reached;
            match &self.filter {
                Some(filter) if header.commit.0 >= filter.lsn => self.filter = None,
                Some(filter) if filter.leaves_out(header.xid) => continue,
                _ => {}
            }
            self.seen = self.seen.max(self.cursor.outer());
            messages.swap(kept, at);
            kept += 1;
        }
        messages.truncate(kept);
    }

    /// Memory no longer has what comes next: it never had it for this reader, or the reader was too slow.
    fn count_log_reader(&mut self) {
        match std::mem::replace(&mut self.tier, Tier::Log) {
            Tier::None => metrics().replays.inc(),
            Tier::Memory => metrics().slow_subscribers.inc(),
            Tier::Log => {}
        }
    }

    fn read_log(&self, up_to: Place, bytes_max: usize) -> Activity {
        let (hub, scope, cursor) = (self.hub.clone(), self.scope.clone(), self.cursor.clone());
        let bytes_max = bytes_max.saturating_mul(READ_FACTOR).max(1);
        let read = move |log: &dyn changelog::ChangeLog| {
            let batch = log.read(&scope, &cursor, &up_to, bytes_max)?;
            Ok(Read { batch, horizon: log.horizon(&scope)?, up_to })
        };
        Activity::Reading(Box::pin(async move { hub.on_disk(read).await }))
    }

    /// [`Subscription::poll_next`] to be awaited. Cancel safe: what was not returned comes again.
    ///
    /// # Errors
    /// As there.
    pub async fn next(&mut self, bytes_max: usize) -> Result<VecDeque<Arc<Item>>, End> {
        let mut messages = VecDeque::new();
        std::future::poll_fn(|cx| self.poll_next(cx, bytes_max, &mut messages)).await?;
        Ok(messages)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.hub.window().leave(self.key);
    }
}
