//! The list of segments, in stream order. Each segment is a keyspace, and the last one is active: appends go there.
//!
//! Retention drops the oldest segment as a whole, and a new active segment begins when the old one has its share of
//! size or age. A segment contains everything of its part of the stream: messages, token ids and the index of
//! transactions (see [`record`] for the keys). So a search by id asks each segment, and a read of the stream skips the
//! segments before its start.

use super::super::{Error, TransactionOutcome};
use super::page::{self, Indexed, Malformed, MessagePage, Messages, TransactionPage, XidPage};
use super::record::{self, Horizon, XidsPrefix};
use super::stored::{META_SEGMENTS, pair, unpair};
use super::{Unreadable, poisoned, segment_options};
use crate::model::change::TenantId;
use crate::model::lsn::{CommitLsn, EndLsn, Lsn, Position, Xid8};
use bytes::Bytes;
use fjall::{Database, Keyspace, OwnedWriteBatch as WriteBatch};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

/// Cheap to clone. A reader works on its own clone, and a deleted segment stays readable through that clone.
#[derive(Clone)]
pub(super) struct Segments(Arc<[Segment]>);

#[derive(Clone)]
pub(super) struct Segment {
    id: u64,
    /// Every element of this segment is at or after this position.
    first: Position,
    pub(super) created_unix_seconds: u64,
    pub(super) keyspace: Keyspace,
}

/// End LSN and id of transactions, by commit LSN.
pub(super) type Transactions = BTreeMap<CommitLsn, (EndLsn, Xid8)>;

#[derive(Serialize, Deserialize)]
struct StoredSegment {
    id: u64,
    first: (u64, u64),
    created_unix_seconds: u64,
}

fn name(id: u64) -> String {
    format!("segment-{id:016x}")
}

impl Segments {
    /// Opens the stored list, or begins a first segment. Deletes segments that are not in the list: a crash interrupted
    /// their deletion.
    pub(super) fn open(db: &Database, meta: &Keyspace, damaged: &dyn Fn(String) -> Error) -> Result<Self, Error> {
        let read = |error: fjall::Error| damaged(error.to_string());
        let stored: Vec<StoredSegment> = match meta.get(META_SEGMENTS).map_err(read)? {
            Some(json) => serde_json::from_slice(&json).map_err(|error| damaged(error.to_string()))?,
            None => Vec::new(),
        };
        for existing in db.list_keyspace_names() {
            let listed = stored.iter().any(|segment| name(segment.id) == *existing);
            if existing.starts_with("segment-") && !listed {
                let keyspace = db.keyspace(&existing, segment_options).map_err(read)?;
                db.delete_keyspace(keyspace).map_err(read)?;
            }
        }
        let mut segments = Vec::new();
        for segment in stored {
            let name = name(segment.id);
            if !db.keyspace_exists(&name) {
                return Err(damaged(format!("{name} is missing")));
            }
            segments.push(Segment {
                id: segment.id,
                first: unpair(segment.first),
                created_unix_seconds: segment.created_unix_seconds,
                keyspace: db.keyspace(&name, segment_options).map_err(read)?,
            });
        }
        if !segments.is_empty() {
            return Ok(Self(segments.into()));
        }
        let first = Segment {
            id: 0,
            first: Position::ZERO,
            created_unix_seconds: unix_now(),
            keyspace: db.keyspace(&name(0), segment_options).map_err(read)?,
        };
        let segments = Self([first].into());
        let mut batch = db.batch();
        segments.store(&mut batch, meta)?;
        batch.commit().map_err(poisoned)?;
        Ok(segments)
    }

    pub(super) fn store(&self, batch: &mut WriteBatch, meta: &Keyspace) -> Result<(), Error> {
        let stored: Vec<_> = self
            .0
            .iter()
            .map(|segment| StoredSegment {
                id: segment.id,
                first: pair(segment.first),
                created_unix_seconds: segment.created_unix_seconds,
            })
            .collect();
        let json = serde_json::to_vec(&stored).map_err(poisoned)?;
        batch.insert(meta, META_SEGMENTS, json);
        Ok(())
    }

    pub(super) fn active(&self) -> &Segment {
        let active = self.0.last();
        #[expect(clippy::expect_used, reason = "an invariant of this type")]
        active.expect("a log always has an active segment")
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.0.iter().map(Segment::bytes).sum()
    }

    /// Returns the list with a new active segment at its end.
    pub(super) fn rolled(&self, db: &Database, first: Position, now_unix_seconds: u64) -> Result<Self, Error> {
        let id = self.active().id + 1;
        let keyspace = db.keyspace(&name(id), segment_options).map_err(poisoned)?;
        let new = Segment { id, first, created_unix_seconds: now_unix_seconds, keyspace };
        Ok(Self(self.0.iter().cloned().chain([new]).collect()))
    }

    /// Returns the oldest segment and the rest. `None` if there is only the active segment.
    pub(super) fn without_oldest(&self) -> Option<(Segment, Self)> {
        let (oldest, rest) = self.0.split_first()?;
        (!rest.is_empty()).then(|| (oldest.clone(), Self(rest.into())))
    }

    /// The time at which the oldest segment began.
    pub(super) fn oldest_created_unix_seconds(&self) -> u64 {
        self.0.first().map_or(0, |oldest| oldest.created_unix_seconds)
    }

    /// The time of the last append to the oldest segment. `None` if there is only the active segment.
    pub(super) fn oldest_ended_unix_seconds(&self) -> Option<u64> {
        self.0.get(1).map(|second| second.created_unix_seconds)
    }

    /// The segments that may contain elements after this position, oldest first.
    pub(super) fn since(&self, after: Position) -> impl Iterator<Item = &Segment> {
        // If the next segment begins at or before the position, everything in this one is older.
        let skipped = self.0.iter().skip(1).take_while(|next| next.first <= after).count();
        self.0.iter().skip(skipped)
    }

    pub(super) fn newest_first(&self) -> impl Iterator<Item = &Segment> {
        self.0.iter().rev()
    }

    /// Removes the messages of the transactions that `pick` selects by commit LSN, and the token ids of transactions
    /// that end after `from`. All selected transactions commit at or after `from`.
    pub(super) fn remove(
        &self,
        batch: &mut WriteBatch,
        from: Lsn,
        pick: &dyn Fn(CommitLsn) -> bool,
    ) -> Result<(), Unreadable> {
        for segment in self.since(Position::at(from)) {
            segment.remove_messages(batch, from, pick)?;
            for item in segment.keyspace.prefix(record::TOKENS_PREFIX) {
                let (key, value) = item.into_inner()?;
                if record::read_lsn(&value).is_some_and(|end| end > from) {
                    batch.remove(&segment.keyspace, key);
                }
            }
            for item in segment.keyspace.range(record::tenants_prefix(CommitLsn(from))..record::TENANTS_END.to_vec()) {
                let key = item.key()?;
                if record::read_tenant_key(&key).is_none_or(|(commit, _)| pick(commit)) {
                    batch.remove(&segment.keyspace, key);
                }
            }
        }
        Ok(())
    }

    /// Removes the index entries of these transactions.
    pub(super) fn remove_index(&self, batch: &mut WriteBatch, abandoned: &Transactions) -> Result<(), Unreadable> {
        let Some((first, _)) = abandoned.first_key_value() else { return Ok(()) };
        let buckets: BTreeSet<_> = abandoned.values().map(|(_, xid)| record::xids_prefix(*xid)).collect();
        for segment in self.since(Position::at(first.0)) {
            for item in segment.transaction_pages(*first) {
                let (key, mut transactions) = item?;
                transactions.retain(|transaction| !abandoned.contains_key(&transaction.commit));
                let mut page = TransactionPage::default();
                transactions.iter().for_each(|transaction| page.push(transaction));
                let rest = page.finish().map(|(last, bytes)| (record::transactions_key(last), bytes));
                segment.replace(batch, &key, rest);
            }
            for bucket in &buckets {
                for item in segment.xid_pages(*bucket) {
                    let (key, mut xids) = item?;
                    xids.retain(|(_, commit, _)| !abandoned.contains_key(commit));
                    let mut page = XidPage::default();
                    xids.iter().for_each(|(xid, commit, end)| page.push(*xid, *commit, *end));
                    let rest = page.finish().map(|(last, bytes)| (record::xids_key(*bucket, last), bytes));
                    segment.replace(batch, &key, rest);
                }
            }
        }
        Ok(())
    }

    /// Returns the transactions with changes that committed at or after `from`.
    pub(super) fn transactions_since(&self, from: Lsn) -> Result<Transactions, Unreadable> {
        let mut found = Transactions::new();
        for segment in self.since(Position::at(from)) {
            for item in segment.transaction_pages(CommitLsn(from)) {
                let (_, transactions) = item?;
                let since = transactions.into_iter().filter(|transaction| transaction.commit.0 >= from);
                found.extend(since.map(|transaction| (transaction.commit, (transaction.end, transaction.xid))));
            }
        }
        Ok(found)
    }

    /// Returns the transactions that end after `at`. Their commit records may begin before it.
    pub(super) fn transactions_ending_past(&self, at: Lsn) -> Result<Transactions, Unreadable> {
        /// Far more than the size of any commit record.
        const COMMIT_RECORD_BYTES_MAX: u64 = 64 << 20;
        let mut found = self.transactions_since(Lsn(at.0.saturating_sub(COMMIT_RECORD_BYTES_MAX)))?;
        found.retain(|_, (end, _)| end.0 > at);
        Ok(found)
    }

    /// Returns the last transaction with changes that committed before `commit`.
    pub(super) fn transaction_before(&self, commit: CommitLsn) -> Result<Option<Xid8>, Unreadable> {
        for segment in self.newest_first() {
            // The answer is in the page that could contain `commit`, or, if that page begins at or after `commit`, in
            // the page before.
            let around = segment.transaction_pages(commit).next().transpose()?.map(|(_, page)| page);
            let before = record::TRANSACTIONS_PREFIX.to_vec()..record::transactions_key(commit);
            let last_before = match segment.keyspace.range(before).next_back() {
                Some(item) => page::transactions(&item.value()?)?,
                None => Vec::new(),
            };
            let mut candidates = last_before.into_iter().chain(around.unwrap_or_default()).rev();
            if let Some(found) = candidates.find(|transaction| transaction.commit < commit) {
                return Ok(Some(found.xid));
            }
        }
        Ok(None)
    }

    /// Returns the end of the transaction with this commit LSN, if the index contains it.
    pub(super) fn end_of(&self, commit: CommitLsn) -> Result<Option<EndLsn>, Unreadable> {
        for segment in self.since(Position::at(commit.0)) {
            if let Some(end) = segment.end_of(commit)? {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    /// Finds a transaction by its id.
    pub(super) fn find(&self, xid: Xid8) -> Result<Option<TransactionOutcome>, Unreadable> {
        for segment in self.newest_first() {
            for item in segment.xid_pages(record::xids_prefix(xid)) {
                let (_, xids) = item?;
                if let Some((_, commit, end)) = xids.into_iter().find(|(other, ..)| *other == xid) {
                    return Ok(Some(TransactionOutcome::Committed { commit, end }));
                }
            }
        }
        Ok(None)
    }

    /// Returns the transaction with the largest id below `xid`, and its commit LSN. It may be in any segment, because
    /// ids are not in commit order.
    pub(super) fn largest_below(&self, xid: Xid8) -> Result<Option<(Xid8, CommitLsn)>, Unreadable> {
        let mut largest = None;
        for segment in self.0.iter() {
            let own_bucket = record::xids_prefix(xid);
            let mut here = segment.largest_in(own_bucket, xid)?;
            if here.is_none() {
                let lower = record::XIDS_PREFIX.to_vec()..own_bucket.to_vec();
                if let Some(item) = segment.keyspace.range(lower).next_back() {
                    let first = record::read_xids_key(&item.key()?).ok_or(Malformed("transaction ids"))?;
                    here = segment.largest_in(record::xids_prefix(first), xid)?;
                }
            }
            largest = largest.max(here);
        }
        Ok(largest)
    }
}

impl Segment {
    /// The bytes on disk. Data that is still in memory, at most a memtable, does not count.
    pub(super) fn bytes(&self) -> u64 {
        self.keyspace.disk_space()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.keyspace.first_key_value().is_none()
    }

    /// Every tenant with messages in this segment, with the horizon to store for it.
    pub(super) fn horizons(&self) -> impl Iterator<Item = Result<(TenantId, Horizon), Unreadable>> + '_ {
        self.tenants().map(|item| {
            let (tenant, position) = item?;
            let page =
                self.keyspace.get(record::messages_key(&tenant, position))?.unwrap_or_else(|| fjall::Slice::new(&[]));
            let last = Messages::of(Bytes::from(page)).last().transpose()?.ok_or(Malformed("messages"))?;
            let end = match last.end {
                Some(end) => end,
                // All messages of the tenant in this segment were staged before the transaction's end.
                None => self.end_of(CommitLsn(position.lsn))?.unwrap_or_default(),
            };
            Ok((tenant, Horizon { position, xid: last.header.xid, end }))
        })
    }

    /// Returns the end of the transaction with this commit LSN, if the index of this segment contains it.
    pub(super) fn end_of(&self, commit: CommitLsn) -> Result<Option<EndLsn>, Unreadable> {
        let Some((_, page)) = self.transaction_pages(commit).next().transpose()? else { return Ok(None) };
        Ok(page.into_iter().find(|transaction| transaction.commit == commit).map(|transaction| transaction.end))
    }

    /// Every tenant with messages in this segment, and the place of its newest message. It costs two seeks a tenant,
    /// whatever the number of messages.
    fn tenants(&self) -> impl Iterator<Item = Result<(TenantId, Position), Unreadable>> + '_ {
        fn place(key: Option<fjall::Guard>) -> Result<Option<(TenantId, Position)>, Unreadable> {
            let Some(key) = key else { return Ok(None) };
            Ok(Some(record::read_messages_key(&key.key()?).ok_or(Malformed("messages"))?))
        }
        let mut from = record::MESSAGES_PREFIX.to_vec();
        std::iter::from_fn(move || {
            let next = || {
                let first = place(self.keyspace.range(from.clone()..record::TOKENS_PREFIX.to_vec()).next())?;
                let Some((tenant, _)) = first else { return Ok(None) };
                place(self.keyspace.prefix(record::tenant_prefix(&tenant)).next_back())
            };
            let newest = next().transpose()?;
            match &newest {
                Ok((tenant, _)) => from = record::behind_tenant(tenant),
                Err(_) => from = record::TOKENS_PREFIX.to_vec(),
            }
            Some(newest)
        })
    }

    fn remove_messages(
        &self,
        batch: &mut WriteBatch,
        from: Lsn,
        pick: &dyn Fn(CommitLsn) -> bool,
    ) -> Result<(), Unreadable> {
        for item in self.tenants() {
            let (tenant, newest) = item?;
            if newest.lsn < from {
                continue;
            }
            let pages = record::messages_key(&tenant, Position::at(from))..record::behind_tenant(&tenant);
            for item in self.keyspace.range(pages) {
                let (key, value) = item.into_inner()?;
                let mut page = MessagePage::new();
                for message in Messages::of(Bytes::from(value)) {
                    let message = message?;
                    if !pick(message.header.commit) {
                        page.push(&message);
                    }
                }
                let rest = page.finish().map(|(last, bytes)| (record::messages_key(&tenant, last), bytes));
                self.replace(batch, &key, rest);
            }
        }
        Ok(())
    }

    /// Replaces a page by its remaining elements.
    fn replace(&self, batch: &mut WriteBatch, key: &[u8], rest: Option<(Vec<u8>, Vec<u8>)>) {
        // In one batch, a removal and an insertion of the same key have no defined order.
        if rest.as_ref().is_none_or(|(new, _)| new != key) {
            batch.remove(&self.keyspace, key);
        }
        if let Some((key, value)) = rest {
            batch.insert(&self.keyspace, key, value);
        }
    }

    pub(super) fn is(&self, other: &Self) -> bool {
        self.id == other.id
    }

    /// Returns the tenant's first page of messages that ends after `place`, and the place of its last message.
    pub(super) fn page_behind(
        &self,
        tenant: &TenantId,
        place: Position,
    ) -> Result<Option<(Position, Bytes)>, Unreadable> {
        let pages =
            (Bound::Excluded(record::messages_key(tenant, place)), Bound::Excluded(record::behind_tenant(tenant)));
        let Some(item) = self.keyspace.range(pages).next() else { return Ok(None) };
        let (key, page) = item.into_inner()?;
        let (_, last) = record::read_messages_key(&key).ok_or(Malformed("messages"))?;
        Ok(Some((last, Bytes::from(page))))
    }

    /// Returns the lowest tenant above `below` that has its own key for the transaction with this commit LSN.
    pub(super) fn tenant_above(
        &self,
        commit: CommitLsn,
        below: Option<&TenantId>,
    ) -> Result<Option<TenantId>, Unreadable> {
        let from = match below {
            Some(below) => Bound::Excluded(record::tenant_key(commit, below)),
            None => Bound::Included(record::tenants_prefix(commit)),
        };
        let behind = Bound::Excluded(record::tenants_prefix(CommitLsn(Lsn(commit.0.0.saturating_add(1)))));
        let Some(item) = self.keyspace.range((from, behind)).next() else { return Ok(None) };
        let (_, tenant) = record::read_tenant_key(&item.key()?).ok_or(Malformed("tenants of a transaction"))?;
        Ok(Some(tenant))
    }

    /// Keys and contents of the pages that may contain transactions with a commit LSN of at least `from`.
    pub(super) fn transaction_pages(
        &self,
        from: CommitLsn,
    ) -> impl Iterator<Item = Result<(fjall::Slice, Vec<Indexed>), Unreadable>> + use<> {
        let pages = record::transactions_key(from)..record::XIDS_PREFIX.to_vec();
        self.keyspace.range(pages).map(|item| {
            let (key, value) = item.into_inner()?;
            let transactions = page::transactions(&value)?;
            Ok((key, transactions))
        })
    }

    /// Keys and contents of the pages of ids with this key prefix.
    #[expect(clippy::type_complexity, reason = "a key and the contents of its page")]
    fn xid_pages(
        &self,
        prefix: XidsPrefix,
    ) -> impl Iterator<Item = Result<(fjall::Slice, Vec<(Xid8, CommitLsn, EndLsn)>), Unreadable>> + use<> {
        self.keyspace.prefix(prefix).map(|item| {
            let (key, value) = item.into_inner()?;
            let first = record::read_xids_key(&key).ok_or(Malformed("transaction ids"))?;
            let xids = page::xids(first, &value)?;
            Ok((key, xids))
        })
    }

    /// Returns the largest id below `xid` in the pages with this key prefix, and its commit LSN.
    fn largest_in(&self, prefix: XidsPrefix, xid: Xid8) -> Result<Option<(Xid8, CommitLsn)>, Unreadable> {
        let mut largest = None;
        for item in self.xid_pages(prefix) {
            let (_, xids) = item?;
            let below = xids.into_iter().filter(|(other, ..)| *other < xid);
            largest = largest.max(below.map(|(xid, commit, _)| (xid, commit)).max());
        }
        Ok(largest)
    }
}

fn unix_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |now| now.as_secs())
}
