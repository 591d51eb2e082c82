//! The list of segments: each a keyspace, in stream order, the last one active.

use super::super::record::{self, Horizon};
use super::super::{Error, Trace};
use super::stored::{META_SEGMENTS, pair, unpair};
use super::{poisoned, segment_options};
use crate::change::TenantId;
use crate::lsn::{Lsn, Position, Xid8};
use crate::transaction::Message;
use bytes::Bytes;
use fjall::{Database, Keyspace, OwnedWriteBatch as WriteBatch};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Cheap to clone: readers take the list as it is, and keep deleted segments readable for themselves.
#[derive(Clone)]
pub(super) struct Segments(Arc<[Segment]>);

#[derive(Clone)]
pub(super) struct Segment {
    id: u64,
    /// Nothing in here stands before this.
    first: Position,
    pub(super) created_unix_seconds: u64,
    pub(super) keyspace: Keyspace,
}

/// End LSN and id by commit LSN.
pub(super) type Transactions = BTreeMap<Lsn, (Lsn, Xid8)>;

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
    /// The stored list, or a first segment. Segments that are not on the list were being dropped, and go now.
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
        batch.commit().map_err(|error| poisoned(&error))?;
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
        let json = serde_json::to_vec(&stored).map_err(|error| Error::Poisoned(error.to_string()))?;
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

    /// With a new active segment behind the others.
    pub(super) fn rolled(&self, db: &Database, first: Position, now_unix_seconds: u64) -> Result<Self, Error> {
        let id = self.active().id + 1;
        let keyspace = db.keyspace(&name(id), segment_options).map_err(|error| poisoned(&error))?;
        let new = Segment { id, first, created_unix_seconds: now_unix_seconds, keyspace };
        Ok(Self(self.0.iter().cloned().chain([new]).collect()))
    }

    /// The oldest and the rest; `None` where there is only the active one.
    pub(super) fn without_oldest(&self) -> Option<(Segment, Self)> {
        let (oldest, rest) = self.0.split_first()?;
        (!rest.is_empty()).then(|| (oldest.clone(), Self(rest.into())))
    }

    /// When the oldest was begun.
    pub(super) fn oldest_created_unix_seconds(&self) -> u64 {
        self.0.first().map_or(0, |oldest| oldest.created_unix_seconds)
    }

    /// When the oldest stopped being written to; `None` where there is only the active one.
    pub(super) fn oldest_ended_unix_seconds(&self) -> Option<u64> {
        self.0.get(1).map(|second| second.created_unix_seconds)
    }

    /// Those that can hold something after this position, oldest first.
    pub(super) fn since(&self, after: Position) -> impl Iterator<Item = &Segment> {
        // A segment can hold something only if the next one does not begin at or before the position.
        let skipped = self.0.iter().skip(1).take_while(|next| next.first <= after).count();
        self.0.iter().skip(skipped)
    }

    pub(super) fn newest_first(&self) -> impl Iterator<Item = &Segment> {
        self.0.iter().rev()
    }

    /// Removes messages at or after `commit` that the predicate picks, and token ids that point past `commit`.
    pub(super) fn remove(
        &self,
        batch: &mut WriteBatch,
        commit: Lsn,
        pick: &dyn Fn(Position, &Message) -> bool,
    ) -> fjall::Result<()> {
        for segment in self.since(Position::at(commit)) {
            segment.each_message(commit, Lsn(u64::MAX), &mut |key, order, message| {
                if pick(order, message) {
                    batch.remove(&segment.keyspace, key);
                }
            })?;
            for item in segment.keyspace.prefix(record::TOKENS) {
                let (key, value) = item.into_inner()?;
                if record::read_lsn(&value).is_some_and(|end| end > commit) {
                    batch.remove(&segment.keyspace, key);
                }
            }
        }
        Ok(())
    }

    /// Removes what these transactions are found by.
    pub(super) fn remove_index(&self, batch: &mut WriteBatch, transactions: &Transactions) {
        let Some((first, _)) = transactions.first_key_value() else { return };
        for segment in self.since(Position::at(*first)) {
            for (commit, (_, xid)) in transactions {
                batch.remove(&segment.keyspace, record::transaction_key(*commit));
                batch.remove(&segment.keyspace, record::xid_key(*xid));
            }
        }
    }

    /// Transactions with changes that committed at or after `from`.
    pub(super) fn transactions_since(&self, from: Lsn) -> fjall::Result<Transactions> {
        let mut found = Transactions::new();
        for segment in self.since(Position::at(from)) {
            for item in segment.keyspace.range(record::transaction_key(from)..=record::transaction_key(Lsn(u64::MAX))) {
                let (key, value) = item.into_inner()?;
                let commit = record::read_transaction_key(&key);
                if let (Some(commit), Some((end, xid))) = (commit, record::read_pair(&value)) {
                    found.insert(commit, (Lsn(end), Xid8(xid)));
                }
            }
        }
        Ok(found)
    }

    /// Those that end past `at`: those before it, too, whose commit record crosses it.
    pub(super) fn transactions_ending_past(&self, at: Lsn) -> fjall::Result<Transactions> {
        /// Far above the size of any commit record.
        const COMMIT_RECORD_BYTES_MAX: u64 = 64 << 20;
        let mut found = self.transactions_since(Lsn(at.0.saturating_sub(COMMIT_RECORD_BYTES_MAX)))?;
        found.retain(|_, (end, _)| *end > at);
        Ok(found)
    }

    /// The last transaction with changes that committed before `commit`.
    pub(super) fn transaction_before(&self, commit: Lsn) -> fjall::Result<Option<Xid8>> {
        let before = record::transaction_key(Lsn::ZERO)..record::transaction_key(commit);
        for segment in self.newest_first() {
            if let Some(item) = segment.keyspace.range(before.clone()).next_back() {
                return Ok(record::read_pair(&item.value()?).map(|(_, xid)| Xid8(xid)));
            }
        }
        Ok(None)
    }

    /// The transaction with this id.
    pub(super) fn find(&self, xid: Xid8) -> fjall::Result<Option<Trace>> {
        for segment in self.newest_first() {
            if let Some(value) = segment.keyspace.get(record::xid_key(xid))? {
                let found = record::read_pair(&value);
                return Ok(found.map(|(commit, end)| Trace::Committed { commit: Lsn(commit), end: Lsn(end) }));
            }
        }
        Ok(None)
    }

    /// The transaction with the largest id below, and its commit LSN. Ids are not in the order of segments.
    pub(super) fn largest_below(&self, xid: Xid8) -> fjall::Result<Option<(Xid8, Lsn)>> {
        let below = record::xid_key(Xid8(0))..record::xid_key(xid);
        let mut largest = None;
        for segment in self.0.iter() {
            let Some(item) = segment.keyspace.range(below.clone()).next_back() else { continue };
            let (key, value) = item.into_inner()?;
            let commit = record::read_pair(&value).map(|(commit, _)| Lsn(commit));
            largest = largest.max(record::read_xid_key(&key).zip(commit));
        }
        Ok(largest)
    }
}

impl Segment {
    /// On disk. What is still in memory is not counted: a memtable at the most.
    pub(super) fn bytes(&self) -> u64 {
        self.keyspace.disk_space()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.keyspace.first_key_value().is_none()
    }

    /// Every tenant with messages here, and what is to be kept of them.
    pub(super) fn horizons(&self) -> impl Iterator<Item = fjall::Result<(TenantId, Horizon)>> + '_ {
        self.tenants().map(|item| {
            let (tenant, position) = item?;
            let transaction = self.keyspace.get(record::transaction_key(position.lsn))?;
            // Without one the transaction goes on in the next segment, where it is found.
            let (end, xid) = transaction.and_then(|value| record::read_pair(&value)).unwrap_or_default();
            Ok((tenant, Horizon { position, xid: Xid8(xid), end: Lsn(end) }))
        })
    }

    /// Every tenant with messages here, and its newest position: two seeks a tenant, whatever the number of messages.
    fn tenants(&self) -> impl Iterator<Item = fjall::Result<(TenantId, Position)>> + '_ {
        let (start, end) = record::MESSAGES;
        let mut from = start.to_vec();
        std::iter::from_fn(move || {
            let first = match self.keyspace.range(from.clone()..end.to_vec()).next()?.key() {
                Ok(key) => key,
                Err(error) => return Some(Err(error)),
            };
            // Keys in this range were written by us; what does not read as one is damage that checksums would have found.
            let (tenant, first) = record::read_message_key(&first)?;
            from = record::behind_tenant(&tenant);
            let newest = match self.keyspace.prefix(record::tenant_prefix(&tenant)).next_back().map(fjall::Guard::key) {
                Some(Ok(key)) => record::read_message_key(&key).map_or(first, |(_, newest)| newest),
                Some(Err(error)) => return Some(Err(error)),
                None => first,
            };
            Some(Ok((tenant, newest)))
        })
    }

    /// Visits every message with a commit LSN in this range: key, place, message.
    fn each_message(
        &self,
        from: Lsn,
        to: Lsn,
        visit: &mut dyn FnMut(fjall::Slice, Position, &Message),
    ) -> fjall::Result<()> {
        for item in self.tenants() {
            let (tenant, newest) = item?;
            if newest.lsn < from {
                continue;
            }
            let range =
                record::message_key(&tenant, Position::at(from))..record::message_key(&tenant, Position::at(to));
            for item in self.keyspace.range(range) {
                let (key, value) = item.into_inner()?;
                let order = record::read_message_key(&key).map(|(_, order)| order);
                let message = order.and_then(|order| record::read_message(order.lsn, &Bytes::from(value)));
                if let (Some(order), Some(message)) = (order, message) {
                    visit(key, order, &message);
                }
            }
        }
        Ok(())
    }
}

fn unix_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |now| now.as_secs())
}
