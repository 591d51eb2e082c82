//! The effect of each entry on the log: on the state in memory, and on the batch that is written to disk.
//!
//! [`Memory`] is the copy of the keyspace `meta` that answers questions about the state. [`Written`] gathers the
//! entries of one append into pages, and commits them in one atomic batch together with the new state. Entries are
//! applied in stream order. Messages and transactions that the log already contains are ignored, because the slot sends
//! unacknowledged transactions again.

use super::super::{Entry, Error, GAPS_MAX};
use super::page::{Indexed, MessagePage, TransactionPage, XidPage};
use super::record::{self, XidsPrefix};
use super::segments::Segment;
use super::stored::{META_STATE, META_TAIL, Stored, meta_abandoned, meta_gap, pair, unpair, write_gap, write_origin};
use super::{LocalLog, poisoned};
use crate::model::change::TenantId;
use crate::model::lsn::{CommitLsn, Lsn, Position};
use crate::model::transaction::{Gap, Header, Message, Transaction};
use fjall::OwnedWriteBatch as WriteBatch;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// The copy of `meta` in memory.
pub(super) struct Memory {
    pub(super) stored: Stored,
    pub(super) tail: Lsn,
    pub(super) gaps: Vec<Gap>,
}

impl Memory {
    /// Applies one entry to the state in memory and to the batch.
    pub(super) fn apply(&mut self, entry: &Entry, log: &LocalLog, written: &mut Written<'_>) -> Result<(), Error> {
        match entry {
            Entry::Adopt(origin) => {
                self.stored.origin = Some(write_origin(origin));
                self.stored.watermark = origin.lsn.0;
                self.tail = origin.lsn;
            }
            // The slot sends unacknowledged transactions again. These messages are already in the log, and must not
            // count as open.
            Entry::Staged(staged) if staged.commit.0 < self.tail => {}
            Entry::Staged(staged) => {
                let steps = staged.messages.iter().map(|(_, message)| message.last_step).max().unwrap_or(0);
                self.stored.staged = Some((staged.commit.0.0, steps));
                written.put_messages(&staged.messages);
                written.put_tenants(staged.commit, &tenants(&staged.messages));
            }
            Entry::Discard => {
                if let Some((commit, _)) = self.stored.staged.take() {
                    let is_open = |other: CommitLsn| other.0 == Lsn(commit);
                    let batch = &mut written.batch;
                    log.segments().remove(batch, Lsn(commit), &is_open).map_err(poisoned)?;
                }
            }
            // The slot sent the transaction again.
            Entry::Transaction(transaction) if transaction.end.0 <= self.tail => self.stored.staged = None,
            Entry::Transaction(transaction) => {
                written.put_messages(&transaction.messages);
                written.put_index(transaction);
                for gap in &transaction.gaps {
                    self.add_gap(gap.clone(), log, &mut written.batch)?;
                }
                self.stored.staged = None;
                self.tail = transaction.end.0;
            }
            Entry::Progress(lsn) => self.tail = self.tail.max(*lsn),
            Entry::Gap(gap) => {
                self.tail = self.tail.max(gap.to.lsn);
                self.add_gap(gap.clone(), log, &mut written.batch)?;
            }
            Entry::Diverge { at, history } => {
                let batch = &mut written.batch;
                let segments = log.segments();
                let abandoned = segments.transactions_ending_past(*at).map_err(poisoned)?;
                let is_past = |commit: CommitLsn| commit.0 >= *at || abandoned.contains_key(&commit);
                let first = abandoned.first_key_value().map_or(*at, |(commit, _)| (*at).min(commit.0));
                segments.remove(batch, first, &is_past).map_err(poisoned)?;
                segments.remove_index(batch, &abandoned).map_err(poisoned)?;
                for (_, xid) in abandoned.values() {
                    batch.insert(&log.meta, meta_abandoned(*xid), []);
                }
                for gap in self.gaps.extract_if(.., |gap| gap.to > Position::at(*at)).collect::<Vec<_>>() {
                    batch.remove(&log.meta, meta_gap(&gap));
                    if let Some(rest) = gap.up_to(*at) {
                        self.add_gap(rest, log, batch)?;
                    }
                }
                self.tail = self.tail.min(*at);
                self.stored.watermark = self.stored.watermark.min(at.0);
                // A check after the switch applied to the old history.
                if let Some((_, verified)) = &mut self.stored.verified {
                    *verified = (*verified).min(at.0);
                }
                if let Some(origin) = &mut self.stored.origin {
                    origin.timelines =
                        history.timelines().map(|timeline| (timeline.number, timeline.begin.0)).collect();
                }
            }
            Entry::Verified(verified) => self.stored.verified = Some((verified.fingerprint.clone(), verified.at.0)),
            Entry::Mapping(fingerprint) => self.stored.mapping = Some(*fingerprint),
            Entry::Watermark(lsn) => self.stored.watermark = lsn.0.min(self.tail.0),
        }
        Ok(())
    }

    /// Everything that is appended from now on is after this position.
    pub(super) fn frontier(&self) -> Position {
        self.stored.staged.map_or(Position::at(self.tail), unpair)
    }

    fn add_gap(&mut self, gap: Gap, log: &LocalLog, batch: &mut WriteBatch) -> Result<(), Error> {
        let json = serde_json::to_vec(&write_gap(&gap)).map_err(poisoned)?;
        batch.insert(&log.meta, meta_gap(&gap), json);
        self.gaps.push(gap);
        if self.gaps.len() > GAPS_MAX {
            // The open gap stays until a later gap covers it, because the session needs it.
            let oldest = self.gaps.remove(usize::from(self.gaps.first().is_some_and(Gap::is_open)));
            batch.remove(&log.meta, meta_gap(&oldest));
            self.stored.gaps_floor = pair(unpair(self.stored.gaps_floor).max(oldest.to));
        }
        Ok(())
    }
}

/// The most tenants that the index entry of a transaction contains. With more tenants, each has its own key.
const TENANTS_IN_PAGE_MAX: usize = 64;

/// The entries of one batch, while they are gathered into pages.
pub(super) struct Written<'a> {
    pub(super) batch: WriteBatch,
    active: &'a Segment,
    /// The current page of each tenant.
    messages: HashMap<TenantId, MessagePage>,
    transactions: TransactionPage,
    /// The current page of each key prefix.
    xids: BTreeMap<XidsPrefix, XidPage>,
    tail_before: Lsn,
    /// Whether the state changed in more than the tail.
    pub(super) rare: bool,
}

impl<'a> Written<'a> {
    pub(super) fn new(log: &LocalLog, memory: &Memory, active: &'a Segment) -> Self {
        Self {
            batch: log.db.batch(),
            active,
            messages: HashMap::new(),
            transactions: TransactionPage::default(),
            xids: BTreeMap::new(),
            tail_before: memory.tail,
            rare: false,
        }
    }

    pub(super) fn commit(mut self, log: &LocalLog, memory: &Memory) -> Result<(), Error> {
        for (tenant, page) in std::mem::take(&mut self.messages) {
            self.finish_messages(&tenant, page);
        }
        self.finish_transactions();
        for (prefix, page) in std::mem::take(&mut self.xids) {
            if let Some((last, bytes)) = page.finish() {
                self.batch.insert(&self.active.keyspace, record::xids_key(prefix, last), bytes);
            }
        }
        if self.rare {
            let json = serde_json::to_vec(&memory.stored).map_err(poisoned)?;
            self.batch.insert(&log.meta, META_STATE, json);
        }
        if memory.tail != self.tail_before {
            self.batch.insert(&log.meta, META_TAIL, record::write_lsn(memory.tail));
        }
        self.batch.commit().map_err(poisoned)
    }

    fn put_messages(&mut self, messages: &[(TenantId, Message)]) {
        for (tenant, message) in messages {
            let page = match self.messages.get_mut(tenant) {
                Some(page) => page,
                None => self.messages.entry(tenant.clone()).or_insert_with(MessagePage::new),
            };
            page.push(message);
            if page.is_full() {
                let page = std::mem::replace(page, MessagePage::new());
                self.finish_messages(tenant, page);
            }
        }
    }

    fn finish_messages(&mut self, tenant: &TenantId, page: MessagePage) {
        if let Some((last, bytes)) = page.finish() {
            self.batch.insert(&self.active.keyspace, record::messages_key(tenant, last), bytes);
        }
    }

    /// Writes the index entries of a transaction: its token ids, and if it has changes, its place, its id and its
    /// tenants.
    fn put_index(&mut self, transaction: &Transaction) {
        let Header { commit, xid, .. } = transaction.header;
        let end = transaction.end;
        for id in &transaction.token_ids {
            self.batch.insert(&self.active.keyspace, record::token_key(*id), record::write_lsn(end.0));
        }
        if !transaction.has_changes() {
            return;
        }
        let mut tenants = tenants(&transaction.messages);
        if transaction.staged || tenants.len() > TENANTS_IN_PAGE_MAX {
            self.put_tenants(commit, &tenants);
            tenants.clear();
        }
        let tenants = tenants.into_iter().cloned().collect();
        self.transactions.push(&Indexed { commit, end, xid, tenants });
        if self.transactions.is_full() {
            self.finish_transactions();
        }
        self.xids.entry(record::xids_prefix(xid)).or_default().push(xid, commit, end);
    }

    fn put_tenants(&mut self, commit: CommitLsn, tenants: &BTreeSet<&TenantId>) {
        for tenant in tenants {
            self.batch.insert(&self.active.keyspace, record::tenant_key(commit, tenant), []);
        }
    }

    fn finish_transactions(&mut self) {
        if let Some((last, bytes)) = std::mem::take(&mut self.transactions).finish() {
            self.batch.insert(&self.active.keyspace, record::transactions_key(last), bytes);
        }
    }
}

/// The tenants of these messages, in the order of their bytes.
fn tenants(messages: &[(TenantId, Message)]) -> BTreeSet<&TenantId> {
    messages.iter().map(|(tenant, _)| tenant).collect()
}
