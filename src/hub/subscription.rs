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

/// A read of the log takes this many times as many bytes as a look into memory, because it needs a thread for a moment.
const READ_FACTOR: usize = 16;

/// Leaves out transactions that the reader's state already contains: of those that committed before `lsn`, the ones that `snapshot` sees, and
/// the reader's own. For a stream that starts *now*, that state is the reader's first read.
#[derive(Clone, Debug)]
pub struct Filter {
    /// The server's flush position at the start. Not its insert position: a visible transaction that is not flushed (with
    /// `synchronous_commit = off`) can be lost in a crash, and then another transaction gets its id and its place in the WAL.
    pub lsn: Lsn,
    /// The transactions that were visible then.
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
    /// The server abandoned everything past this LSN, and the stream has delivered something of it.
    Abandoned {
        /// The switch LSN.
        at: Lsn,
    },
    /// The log no longer has the next changes.
    TooOld {
        /// The earliest position that can still be read from.
        earliest: Position,
    },
    /// The log cannot be read.
    Log(changelog::Error),
    /// The hub was closed.
    Closed,
}

/// The activity of a subscription.
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
    /// There are messages. If they are `all`, the reader is woken when there are more.
    Found { all: bool },
    /// The subscription has moved, or begun to read the log.
    Again,
    /// There is nothing. The reader is woken when there is.
    Nothing,
}

/// The source of a subscription's last messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tier {
    /// None were delivered yet.
    None,
    Memory,
    Log,
}

/// The result of a read.
struct Read {
    batch: Batch,
    /// The horizon after the read.
    horizon: Position,
    /// The place up to which it read.
    up_to: Place,
}

/// See [`Hub`]. Dropping it gives back all it holds.
pub struct Subscription {
    hub: Hub,
    scope: Scope,
    /// Everything up to here was yielded, or does not exist.
    cursor: Place,
    /// The newest state of the reader: the last message, or its state at the start. It is behind the cursor if the cursor has moved past
    /// parts that had nothing for the reader.
    seen: Position,
    filter: Option<Filter>,
    /// Its place among the readers of its scope.
    key: ReaderKey,
    activity: Activity,
    tier: Tier,
    divergences_checked: usize,
    /// The source and the history of the last batch's positions.
    origin: Option<Origin>,
}

impl Subscription {
    /// A reader of this scope after `cursor`, whose state is at most `seen`, and whose start was decided when there had been `divergences`.
    /// Reading shows whether the log still has the changes.
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

    /// Resumes behind a gap that ended the stream: behind the gap of one tenant in a stream of all, or if the reader has decided to read the
    /// state anew.
    pub fn continue_after(&mut self, gap: &Gap) {
        self.cursor = gap.ends(&self.scope, &self.cursor);
        self.seen = self.seen.max(self.cursor.outer());
    }

    /// The source and the history of the last batch's positions, and not those to which the server has switched since.
    pub const fn origin(&self) -> Option<&Origin> {
        self.origin.as_ref()
    }

    /// Adds the next messages: at least one, and about `bytes_max` bytes if there are more; from the log, 16 times as many. Yields `true` if
    /// these are all, and then the task that polled is woken when there are more, as if it had polled once more.
    ///
    /// # Errors
    /// If the stream cannot continue from here. Every later call returns the same error.
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
                if self.hub.window().divergences() != self.divergences_checked {
                    // It may have read parts of two histories.
                    continue;
                }
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

    /// Adds the messages that were read from the log.
    fn add_read(&mut self, read: Read, messages: &mut VecDeque<Arc<Item>>) -> Result<(), End> {
        // Retention may have dropped something meanwhile.
        if self.cursor.outer() < read.horizon {
            return Err(End::TooOld { earliest: read.horizon });
        }
        if read.batch.messages.is_empty() && !read.batch.more {
            self.cursor = read.up_to;
        }
        messages.extend(read.batch.messages.into_iter().map(|message| self.hub.inner.long_items.share(message)));
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

    /// Moves past the messages from `first` on, and removes those that the reader's state already contains.
    fn take(&mut self, first: usize, messages: &mut VecDeque<Arc<Item>>) {
        let mut kept = first;
        for at in first..messages.len() {
            let Some(item) = messages.get_mut(at) else { break };
            let header = item.message.header;
            let reached = item.reached(&self.scope, &self.cursor);
            let had = self.cursor.of(&item.tenant);
            if had.lsn == header.commit.0 && item.message.first_step().is_some_and(|step| step <= had.steps) {
                // The reader has a part of the message, because another node cuts messages elsewhere.
                let Some(rest) = item.message.clone().after(had) else {
                    // The reader has all of its changes.
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

    /// Memory does not have the next messages: the reader has just begun, or it was too slow.
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

    /// [`Subscription::poll_next`] as a future. Cancel safe: messages that were not returned come again.
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
