//! What an entry does to the log: in memory, and in the batch that takes it to the disk.

use super::super::{BREAKS_MAX, Entry, Error, record};
use super::segments::Segment;
use super::stored::{
    META_STATE, META_TAIL, Stored, meta_abandoned, meta_break, pair, unpair, write_break, write_origin,
};
use super::{FjallLog, poisoned};
use crate::change::TenantId;
use crate::lsn::{Lsn, Position};
use crate::transaction::{Break, Header, Message, Transaction};
use fjall::OwnedWriteBatch as WriteBatch;

/// What is kept in memory of `meta`.
pub(super) struct Memory {
    pub(super) stored: Stored,
    pub(super) tail: Lsn,
    pub(super) breaks: Vec<Break>,
}

impl Memory {
    /// Applies one entry to `batch` and to the memory of it.
    pub(super) fn apply(
        &mut self,
        entry: &Entry,
        log: &FjallLog,
        active: &Segment,
        batch: &mut WriteBatch,
    ) -> Result<(), Error> {
        match entry {
            Entry::Adopt(origin) => {
                self.stored.origin = Some(write_origin(origin));
                self.stored.visible = origin.lsn.0;
                self.tail = origin.lsn;
            }
            // Delivered once more, because it was not known to have arrived; what is there must not be taken for open.
            Entry::Staged(staged) if staged.commit < self.tail => {}
            Entry::Staged(staged) => {
                let steps = staged.messages.iter().map(|(_, message)| message.last_step).max().unwrap_or(0);
                self.stored.staged = Some((staged.commit.0, steps));
                put_messages(&staged.messages, active, batch);
            }
            Entry::Discard => {
                if let Some((commit, _)) = self.stored.staged.take() {
                    let open = |position: Position, _: &Message| position.lsn == Lsn(commit);
                    log.segments().remove(batch, Lsn(commit), &open).map_err(|error| poisoned(&error))?;
                }
            }
            // Delivered once more, because it was not known to have arrived.
            Entry::Transaction(transaction) if transaction.end <= self.tail => self.stored.staged = None,
            Entry::Transaction(transaction) => {
                put_messages(&transaction.messages, active, batch);
                put_index(transaction, active, batch);
                for gap in &transaction.breaks {
                    self.add_break(gap.clone(), log, batch)?;
                }
                self.stored.staged = None;
                self.tail = transaction.end;
            }
            Entry::Progress(lsn) => self.tail = self.tail.max(*lsn),
            Entry::Break(gap) => {
                self.tail = self.tail.max(gap.to.lsn);
                self.add_break(gap.clone(), log, batch)?;
            }
            Entry::Diverge { at, history } => {
                let segments = log.segments();
                let abandoned = segments.transactions_ending_past(*at).map_err(|error| poisoned(&error))?;
                let past =
                    |position: Position, _: &Message| position.lsn >= *at || abandoned.contains_key(&position.lsn);
                let first = abandoned.first_key_value().map_or(*at, |(commit, _)| *at.min(commit));
                segments.remove(batch, first, &past).map_err(|error| poisoned(&error))?;
                segments.remove_index(batch, &abandoned);
                for (_, xid) in abandoned.values() {
                    batch.insert(&log.meta, meta_abandoned(*xid), []);
                }
                for gap in self.breaks.extract_if(.., |gap| gap.to > Position::at(*at)).collect::<Vec<_>>() {
                    batch.remove(&log.meta, meta_break(&gap));
                    if let Some(rest) = gap.up_to(*at) {
                        self.add_break(rest, log, batch)?;
                    }
                }
                self.tail = self.tail.min(*at);
                self.stored.visible = self.stored.visible.min(at.0);
                // What was verified past it was verified of another history.
                if let Some((_, verified)) = &mut self.stored.verified {
                    *verified = (*verified).min(at.0);
                }
                if let Some(origin) = &mut self.stored.origin {
                    origin.timelines = history.timelines().map(|timeline| (timeline.id, timeline.begin.0)).collect();
                }
            }
            Entry::Verified(verified) => self.stored.verified = Some((verified.fingerprint.clone(), verified.at.0)),
            Entry::Mapping(fingerprint) => self.stored.mapping = Some(*fingerprint),
            Entry::Visible(lsn) => self.stored.visible = lsn.0.min(self.tail.0),
        }
        Ok(())
    }

    /// What is appended from now on stands behind this.
    pub(super) fn frontier(&self) -> Position {
        self.stored.staged.map_or(Position::at(self.tail), unpair)
    }

    fn add_break(&mut self, gap: Break, log: &FjallLog, batch: &mut WriteBatch) -> Result<(), Error> {
        let json = serde_json::to_vec(&write_break(&gap)).map_err(|error| Error::Poisoned(error.to_string()))?;
        batch.insert(&log.meta, meta_break(&gap), json);
        self.breaks.push(gap);
        if self.breaks.len() > BREAKS_MAX {
            // The session has to know of the open one until it is covered.
            let oldest = self.breaks.remove(usize::from(self.breaks.first().is_some_and(Break::is_open)));
            batch.remove(&log.meta, meta_break(&oldest));
            self.stored.breaks_floor = pair(unpair(self.stored.breaks_floor).max(oldest.to));
        }
        Ok(())
    }
}

/// Entries on their way to the disk together.
pub(super) struct Written {
    pub(super) batch: WriteBatch,
    tail_before: Lsn,
    /// More than the tail changed.
    pub(super) rare: bool,
}

impl Written {
    pub(super) fn new(log: &FjallLog, memory: &Memory) -> Self {
        Self { batch: log.db.batch(), tail_before: memory.tail, rare: false }
    }

    pub(super) fn commit(mut self, log: &FjallLog, memory: &Memory) -> Result<(), Error> {
        if self.rare {
            let json = serde_json::to_vec(&memory.stored).map_err(|error| Error::Poisoned(error.to_string()))?;
            self.batch.insert(&log.meta, META_STATE, json);
        }
        if memory.tail != self.tail_before {
            self.batch.insert(&log.meta, META_TAIL, record::write_lsn(memory.tail));
        }
        self.batch.commit().map_err(|error| poisoned(&error))
    }
}

fn put_messages(messages: &[(TenantId, Message)], active: &Segment, batch: &mut WriteBatch) {
    for (tenant, message) in messages {
        let key = record::message_key(tenant, message.order());
        batch.insert(&active.keyspace, key, record::write_message(message));
    }
}

/// What a transaction is found by: ids of tokens; and where it has changes, its place and its id.
fn put_index(transaction: &Transaction, active: &Segment, batch: &mut WriteBatch) {
    let Header { commit, xid, .. } = transaction.header;
    let end = transaction.end;
    for id in &transaction.token_ids {
        batch.insert(&active.keyspace, record::token_key(*id), record::write_lsn(end));
    }
    if transaction.has_changes() {
        batch.insert(&active.keyspace, record::transaction_key(commit), record::write_pair(end.0, xid.0));
        batch.insert(&active.keyspace, record::xid_key(xid), record::write_pair(commit.0, end.0));
    }
}
