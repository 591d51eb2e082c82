//! One reader of one tenant's changes, over memory and disk.

use super::window::Next;
use super::{Hub, Item, Origin};
use crate::change::TenantId;
use crate::changelog;
use crate::lsn::{Lsn, Position, Snapshot, Xid8};
use crate::transaction::Break;
use std::sync::Arc;
use tokio::sync::watch;

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
    /// History is not continuous: read the state anew and go on from `Break::to`.
    Broken(Break),
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
}

/// See [`Hub`]. Dropping it gives back all it holds.
pub struct Subscription {
    hub: Hub,
    tenant: TenantId,
    /// Everything up to here was yielded, or does not exist.
    cursor: Position,
    /// The newest that the reader has: what was yielded last, or the state that it had at the start. Behind the cursor, where
    /// there was nothing for it.
    seen: Position,
    filter: Option<Filter>,
    /// Woken when something of the tenant is published.
    wake: watch::Receiver<()>,
    divergences_checked: usize,
    /// What the positions of the last batch belong to.
    origin: Option<Origin>,
}

impl Subscription {
    /// A reader of this tenant's changes after `cursor`, who has a state of no later than `seen`; decided on when there had
    /// been `divergences`. Whether the log still has them is found out by reading.
    pub(super) fn new(
        hub: Hub,
        tenant: TenantId,
        cursor: Position,
        seen: Position,
        filter: Option<Filter>,
        divergences: usize,
    ) -> Self {
        let wake = hub.window().join(&tenant);
        Self { hub, tenant, cursor, seen, filter, wake, divergences_checked: divergences, origin: None }
    }

    /// Whose changes these are.
    pub const fn tenant(&self) -> &TenantId {
        &self.tenant
    }

    /// Everything up to here was yielded, or does not exist.
    pub const fn position(&self) -> Position {
        self.cursor
    }

    /// What the positions of the last batch belong to: not what the server went on to since.
    pub const fn origin(&self) -> Option<&Origin> {
        self.origin.as_ref()
    }

    /// The next messages: at least one, and about `bytes_max` bytes where there are more. Waits for them.
    ///
    /// Cancel safe: what was not returned comes again.
    ///
    /// # Errors
    /// Where there is no continuing from here; the same again on every later call.
    pub async fn next(&mut self, bytes_max: usize) -> Result<Vec<Arc<Item>>, End> {
        loop {
            // Before looking, so that what is published after the look wakes us.
            self.wake.mark_unchanged();
            let next = {
                let window = self.hub.window();
                self.origin = window.origin().cloned();
                window.next(&self.tenant, self.cursor, self.seen, &mut self.divergences_checked, bytes_max)
            };
            let messages = match next {
                Next::Messages(messages) => messages,
                Next::Disk { up_to } => self.read_log(up_to, bytes_max).await?,
                Next::Skip { to } | Next::Back { to } => {
                    self.cursor = to;
                    continue;
                }
                Next::Wait => {
                    // The sender lives in the feed, which lives as long as it has a reader.
                    let _ = self.wake.changed().await;
                    continue;
                }
                Next::Broken(gap) => return Err(End::Broken(gap)),
                Next::Abandoned { at } => return Err(End::Abandoned { at }),
            };
            let messages = self.take(messages);
            if !messages.is_empty() {
                return Ok(messages);
            }
        }
    }

    /// Moves past the messages, and leaves out what is not for this reader.
    fn take(&mut self, messages: Vec<Arc<Item>>) -> Vec<Arc<Item>> {
        let mut taken = Vec::with_capacity(messages.len());
        for item in messages {
            let (header, reached) = (item.message.header, item.message.reached());
            let had = |step| self.cursor.lsn == header.commit && step <= self.cursor.steps;
            let begins_before = item.message.first_step().is_some_and(had);
            // Shared as it is, but where another node cut its messages elsewhere.
            let rest = if begins_before { item.message.clone().after(self.cursor).map(Item::new) } else { Some(item) };
            // Cut elsewhere than what was had: nothing of it is left.
            let Some(rest) = rest else {
                self.cursor = self.cursor.max(reached);
                continue;
            };
            self.cursor = rest.message.reached();
            match &self.filter {
                Some(filter) if header.commit >= filter.lsn => self.filter = None,
                Some(filter) if filter.leaves_out(header.xid) => continue,
                _ => {}
            }
            taken.push(rest);
            self.seen = self.seen.max(self.cursor);
        }
        taken
    }

    async fn read_log(&mut self, up_to: Position, bytes_max: usize) -> Result<Vec<Arc<Item>>, End> {
        // What the log does not have yet is in memory, or not published.
        let mut appended = self.hub.inner.appended.clone();
        let up_to = up_to.min(Position::at(*appended.borrow_and_update()));
        if up_to <= self.cursor {
            // Not there yet: look again when it is, or when something else is to be told.
            tokio::select! {
                biased;
                _ = appended.changed() => {}
                _ = self.wake.changed() => {}
            }
            return Ok(Vec::new());
        }
        let (tenant, cursor) = (self.tenant.clone(), self.cursor);
        let (batch, horizon) = self
            .hub
            .on_disk(move |log| {
                let batch = log.read(&tenant, cursor, up_to, bytes_max)?;
                // Afterwards: retention may have gone by while we read.
                Ok((batch, log.horizon(&tenant)?))
            })
            .await
            .map_err(End::Log)?;
        if cursor < horizon {
            return Err(End::TooOld { earliest: horizon });
        }
        if batch.messages.is_empty() && !batch.more {
            self.cursor = self.cursor.max(up_to);
        }
        Ok(batch.messages.into_iter().map(Item::new).collect())
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.hub.window().leave(&self.tenant);
    }
}
