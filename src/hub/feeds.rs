//! The messages of each tenant in memory, and the readers of each scope.
//!
//! A *feed* has the readers of one scope. The feed of a tenant also has the tenant's messages; the messages of all tenants are the window's
//! own. A feed is complete from its floor on: a reader at or past the floor needs no disk, however long it slept. A tenant without a feed has
//! no messages in memory, and is complete from the window's floor on.

use super::Item;
use super::wake_batch::WakeBatch;
use crate::model::change::TenantId;
use crate::model::lsn::{Lsn, Position};
use crate::model::scope::Scope;
use slab::Slab;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::task::Waker;

/// All feeds. A feed keeps its index while it has a reader, and the reader finds it by that.
#[derive(Default)]
pub(super) struct Feeds {
    feeds: Slab<Feed>,
    by_tenant: HashMap<TenantId, usize>,
    of_all: Option<usize>,
}

pub(super) struct Feed {
    pub(super) scope: Scope,
    /// Of a tenant; empty in the feed of all.
    pub(super) messages: VecDeque<Arc<Item>>,
    pub(super) floor: Position,
    readers: Slab<Reader>,
}

/// A subscription, while it exists.
struct Reader {
    /// `None`: it is woken at once.
    wake_batch: Option<WakeBatch>,
    /// While it waits.
    waker: Option<Waker>,
    /// It has everything before, as far as it is known here.
    has: Lsn,
}

/// A reader's place: that of the feed, and its own in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReaderKey {
    feed: usize,
    reader: usize,
}

impl Feeds {
    pub(super) fn get(&self, scope: &Scope) -> Option<&Feed> {
        self.index(scope).and_then(|at| self.feeds.get(at))
    }

    pub(super) fn get_mut(&mut self, scope: &Scope) -> Option<&mut Feed> {
        self.index(scope).and_then(|at| self.feeds.get_mut(at))
    }

    /// The feed of this tenant, if it has one.
    pub(super) fn of_tenant(&mut self, tenant: &TenantId) -> Option<&mut Feed> {
        self.by_tenant.get(tenant).and_then(|at| self.feeds.get_mut(*at))
    }

    /// The feed of this tenant; a new one is complete from `floor` on.
    pub(super) fn of_tenant_or_new(&mut self, tenant: &TenantId, floor: Position) -> &mut Feed {
        let at = match self.by_tenant.get(tenant) {
            Some(at) => *at,
            None => self.add(Scope::Tenant(tenant.clone()), floor),
        };
        self.at_mut(at)
    }

    fn index(&self, scope: &Scope) -> Option<usize> {
        match scope {
            Scope::Tenant(tenant) => self.by_tenant.get(tenant).copied(),
            Scope::All => self.of_all,
        }
    }

    fn add(&mut self, scope: Scope, floor: Position) -> usize {
        let feed = Feed { scope: scope.clone(), messages: VecDeque::new(), floor, readers: Slab::new() };
        let at = self.feeds.insert(feed);
        match scope {
            Scope::Tenant(tenant) => drop(self.by_tenant.insert(tenant, at)),
            Scope::All => self.of_all = Some(at),
        }
        at
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Feed> {
        self.feeds.iter_mut().map(|(_, feed)| feed)
    }

    /// Forgets the feed of this scope if nothing is in it and nobody reads it.
    pub(super) fn tidy(&mut self, scope: &Scope) {
        let Some(at) = self.index(scope) else { return };
        if self.feeds.get(at).is_some_and(|feed| feed.messages.is_empty() && feed.readers.is_empty()) {
            self.feeds.remove(at);
            match scope {
                Scope::Tenant(tenant) => drop(self.by_tenant.remove(tenant)),
                Scope::All => self.of_all = None,
            }
        }
    }

    /// Registers a reader that has everything before `has`, to be woken with this batch, if any. A new feed is complete from `floor`
    /// on.
    pub(super) fn join(
        &mut self,
        scope: &Scope,
        has: Lsn,
        floor: Position,
        wake_batch: Option<WakeBatch>,
    ) -> ReaderKey {
        let feed = self.index(scope).unwrap_or_else(|| self.add(scope.clone(), floor));
        ReaderKey { feed, reader: self.at_mut(feed).readers.insert(Reader { wake_batch, waker: None, has }) }
    }

    /// The feed that this reader reads.
    #[expect(clippy::indexing_slicing, reason = "a feed stays where it is while it has a reader")]
    pub(super) fn read_by(&self, key: ReaderKey) -> &Feed {
        &self.feeds[key.feed]
    }

    #[expect(clippy::indexing_slicing, reason = "only for places that are known to be taken: see above")]
    fn at_mut(&mut self, at: usize) -> &mut Feed {
        &mut self.feeds[at]
    }

    /// The reader asks for what comes after this LSN.
    pub(super) fn asks(&mut self, key: ReaderKey, has: Lsn) {
        if let Some(reader) = self.at_mut(key.feed).readers.get_mut(key.reader) {
            reader.has = has;
        }
    }

    /// The distance of each reader from `released`, in bytes of WAL. A waiting reader has zero.
    pub(super) fn lags(&self, released: Lsn) -> Vec<u64> {
        let readers = self.feeds.iter().flat_map(|(_, feed)| feed.readers.iter());
        let lag = |reader: &Reader| if reader.waker.is_some() { 0 } else { released.0.saturating_sub(reader.has.0) };
        readers.map(|(_, reader)| lag(reader)).collect()
    }

    /// Wakes the reader once when there may be something new for it.
    pub(super) fn wait(&mut self, key: ReaderKey, waker: &Waker) {
        let Some(reader) = self.at_mut(key.feed).readers.get_mut(key.reader) else { return };
        match &mut reader.waker {
            Some(known) => known.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
    }

    pub(super) fn leave(&mut self, key: ReaderKey) {
        let feed = self.at_mut(key.feed);
        feed.readers.try_remove(key.reader);
        let scope = feed.scope.clone();
        self.tidy(&scope);
    }
}

impl Feed {
    /// Wakes the waiting readers, which have everything before `had`.
    pub(super) fn wake(&mut self, had: Lsn) {
        for (_, reader) in &mut self.readers {
            let Some(waker) = reader.waker.take() else { continue };
            reader.has = reader.has.max(had);
            match &reader.wake_batch {
                Some(wake_batch) => wake_batch.add(waker),
                None => waker.wake(),
            }
        }
    }

    /// The index of the first message that is not wholly at or before `cursor`. A reader that keeps up finds it among the last messages,
    /// without a search through all of memory.
    pub(super) fn first_after(&self, cursor: Position) -> usize {
        const LAST: usize = 8;
        let is_after = |item: &Arc<Item>| item.message.order() > cursor;
        let after = self.messages.iter().rev().take(LAST).take_while(|item| is_after(item)).count();
        if after < LAST {
            return self.messages.len() - after;
        }
        self.messages.partition_point(|item| !is_after(item))
    }
}
