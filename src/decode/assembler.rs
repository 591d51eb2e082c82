//! Row messages → transactions: the one place where changes get their positions.
//!
//! PostgreSQL sends a transaction whole, after its commit: Begin (which already has the commit LSN), rows, Commit. The assembler cuts the
//! changes of each tenant into messages below a size. It holds little: when the open transaction passes [`Limits::stage_bytes`], its messages
//! so far are handed over to be *staged* in the change log, where they become readable with the transaction's Commit. A transaction is never
//! in memory whole.
//!
//! A row that cannot be decoded is a gap for its tenant, from there to the end of the transaction. It is a gap for all tenants if not even its
//! tenant can be read, and so is a TRUNCATE. Changes of other tenants are not affected. A row of a mapped table that was renamed is such a row.
//!
//! Pure: no clock, no I/O. Belongs to one replication session.

use crate::decode::mapping::{Mapping, Outcome, Plan, Undecodable};
use crate::decode::pgoutput::{self, Message as Row, RelationCache, RelationId, decode};
use crate::model::change::{Fact, Operation, TenantId, encode, envelope_bytes};
use crate::model::lsn::{CommitLsn, EndLsn, Position};
use crate::model::snap_token::TokenId;
use crate::model::transaction::{Gap, GapReason, Header, Message, MessageBuilder, Tally, Transaction};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// Prefix of the logical messages that belong to tuplewatch.
pub const MESSAGE_PREFIX: &str = "tuplewatch";

/// Sizes, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A message is cut before it grows past this.
    pub message_bytes: usize,
    /// A single change above this is a gap: gRPC clients refuse larger messages by default (4 MiB).
    pub change_bytes: usize,
    /// An open transaction above this is staged.
    pub stage_bytes: usize,
}

/// What happens on a row that cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnUndecodable {
    /// A gap for its tenant; everything else goes on.
    Gap,
    /// Stop, so that somebody looks first.
    Halt,
}

/// Token ids kept of one transaction. Those beyond still resolve, by their LSN floor.
const TOKEN_IDS_MAX: usize = 65_536;
/// Tenants broken in one transaction; with more, it is a gap for all.
const GAP_TENANTS_MAX: usize = 1_000;
/// Tenants whose ids are kept to be shared; with more, the memory starts anew.
const INTERNED_MAX: usize = 100_000;

/// Why the stream cannot be read on. All of these are lasting.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not pgoutput as we know it.
    #[error(transparent)]
    Pgoutput(#[from] pgoutput::Error),
    /// Messages in an order that the protocol does not have.
    #[error("the replication stream is out of order: {0}")]
    OutOfOrder(&'static str),
    /// A row of a table that no Relation message defined.
    #[error("a row of a table that was not described first (oid {0})")]
    UnknownRelation(u32),
    /// As configured: `mapping.on_undecodable: halt`.
    #[error(
        "a row of table {table} could not be decoded: {detail} (transaction {commit}; \
         mapping.on_undecodable is 'halt'). Repairing the row is not enough, as the WAL keeps it as it was: then start once \
         with 'gap', which tells the subscribers of its tenant to read their state anew"
    )]
    Halted {
        /// The table.
        table: String,
        /// What was wrong, without values.
        detail: String,
        /// Commit LSN of the transaction.
        commit: CommitLsn,
    },
}

/// Messages of an open transaction, to be staged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Staged {
    /// Commit LSN of the transaction that they are part of.
    pub commit: CommitLsn,
    /// In order for each tenant.
    pub messages: Vec<(TenantId, Message)>,
}

/// Takes what each step of a row message says.
type Visit<'a> = dyn FnMut(u64, Outcome<'_>) + 'a;

/// See the module.
#[derive(Debug)]
pub struct Assembler {
    mapping: Arc<Mapping>,
    limits: Limits,
    on_undecodable: OnUndecodable,
    relations: RelationCache<Reading>,
    /// Mapped tables whose rows have not come yet.
    awaited: HashMap<RelationId, String>,
    /// Shared ids, so that a tenant's is allocated once and not once a row.
    tenants: HashSet<TenantId>,
    open: Option<Open>,
    encoded: Vec<u8>,
}

/// How rows of a relation are read.
#[derive(Clone, Debug)]
enum Reading {
    /// By this plan.
    As(Arc<Plan>),
    /// Not at all: it is not mapped.
    Not,
    /// It was mapped, and then got another name. It may get the old one back before any check notices, so its rows are not
    /// passed over in silence.
    Renamed { from: String, to: Arc<str> },
}

impl Reading {
    fn renamed(from: &str, to: &str) -> GapReason {
        GapReason::Undecodable { table: to.to_owned(), detail: format!("the table was {from} before it was renamed") }
    }
}

/// The transaction between its Begin and its Commit.
#[derive(Debug)]
struct Open {
    header: Header,
    /// Row steps so far.
    steps: u64,
    parts: HashMap<TenantId, MessageBuilder>,
    /// In order of appearance, so that the same stream always makes the same output.
    order: Vec<TenantId>,
    /// Messages that are complete.
    messages: Vec<(TenantId, Message)>,
    /// Bytes in `parts` and `messages`.
    bytes: usize,
    staged: bool,
    /// `to` is filled in at the Commit.
    gaps: Vec<Gap>,
    broken: HashSet<TenantId>,
    gap_for_all: bool,
    /// Who gets a last message even where all changes are in messages before it, or where there are none.
    closing: BTreeSet<TenantId>,
    token_ids: Vec<TokenId>,
    tallies: Vec<Tally>,
}

impl Assembler {
    /// An assembler for a new session.
    pub fn new(mapping: Arc<Mapping>, limits: Limits, on_undecodable: OnUndecodable) -> Self {
        Self {
            mapping,
            limits,
            on_undecodable,
            relations: RelationCache::default(),
            awaited: HashMap::new(),
            tenants: HashSet::new(),
            open: None,
            encoded: Vec::new(),
        }
    }

    /// Mapped tables by their oid: should one of them come under another name first, it was renamed.
    pub fn await_tables(&mut self, tables: HashMap<RelationId, String>) {
        self.awaited = tables;
    }

    /// Whether a transaction has begun and not ended.
    pub const fn in_transaction(&self) -> bool {
        self.open.is_some()
    }

    /// pgoutput's Begin.
    ///
    /// # Errors
    /// Inside a transaction.
    pub fn begin(&mut self, header: Header) -> Result<(), Error> {
        if self.open.is_some() {
            return Err(Error::OutOfOrder("Begin inside a transaction"));
        }
        self.open = Some(Open {
            header,
            steps: 0,
            parts: HashMap::new(),
            order: Vec::new(),
            messages: Vec::new(),
            bytes: 0,
            staged: false,
            gaps: Vec::new(),
            broken: HashSet::new(),
            gap_for_all: false,
            closing: BTreeSet::new(),
            token_ids: Vec::new(),
            tallies: Vec::new(),
        });
        Ok(())
    }

    /// Any message that is neither Begin, Commit nor logical. What comes back is to be staged before anything else.
    ///
    /// # Errors
    /// Where it is not pgoutput, not in order, or is to halt on.
    pub fn change(&mut self, bytes: &[u8]) -> Result<Option<Staged>, Error> {
        match decode(bytes)? {
            Row::Type | Row::Origin => return Ok(None),
            Row::Relation(relation) => {
                let before = match self.relations.get(relation.id) {
                    Some(Reading::As(plan)) => Some(&**plan.table()),
                    Some(Reading::Renamed { from, .. }) => Some(from.as_str()),
                    Some(Reading::Not) | None => self.awaited.get(&relation.id).map(String::as_str),
                };
                let reading = match (self.mapping.plan(&relation), before) {
                    (Some(plan), _) => Reading::As(Arc::new(plan)),
                    (None, None) => Reading::Not,
                    (None, Some(from)) => Reading::Renamed { from: from.to_owned(), to: relation.to_string().into() },
                };
                self.relations.define(relation.id, reading);
                return Ok(None);
            }
            Row::Insert { relation, new } => self.row(relation, &|plan, visit| plan.insert(new, visit))?,
            Row::Update { relation, old, new } => self.row(relation, &|plan, visit| plan.update(old, new, visit))?,
            Row::Delete { relation, old } => self.row(relation, &|plan, visit| plan.delete(old, visit))?,
            Row::Truncate { relations } => {
                for relation in relations {
                    self.truncate(relation)?;
                }
            }
        }
        let open = self.open.as_mut().ok_or(Error::OutOfOrder("a row outside a transaction"))?;
        if open.bytes < self.limits.stage_bytes {
            return Ok(None);
        }
        Ok(Some(open.stage(self.mapping.tells_transactions())))
    }

    /// A transactional logical message. Those of others are ignored, and so are those outside transactions.
    pub fn logical_message(&mut self, prefix: &str, content: &[u8]) {
        if prefix == MESSAGE_PREFIX
            && let Some(open) = &mut self.open
            && let Ok(id) = <[u8; 16]>::try_from(content)
            && open.token_ids.len() < TOKEN_IDS_MAX
        {
            open.token_ids.push(TokenId(id));
        }
    }

    /// pgoutput's Commit.
    ///
    /// # Errors
    /// Where it is not that of the open transaction.
    pub fn commit(&mut self, commit: CommitLsn, end: EndLsn) -> Result<Transaction, Error> {
        let mut open = self.open.take().ok_or(Error::OutOfOrder("Commit outside a transaction"))?;
        if open.header.commit != commit {
            return Err(Error::OutOfOrder("Commit of another transaction than the one that began"));
        }
        for tenant in std::mem::take(&mut open.order) {
            if let Some(part) = open.parts.remove(&tenant).filter(|part| !part.is_empty()) {
                open.closing.remove(&tenant);
                let message = part.finish(open.header, Some(end));
                open.messages.push((tenant, message));
            }
        }
        for tenant in std::mem::take(&mut open.closing) {
            // Where history gaps, the gap is what ends it.
            if !open.gap_for_all && !open.broken.contains(&tenant) {
                open.messages.push((tenant, MessageBuilder::default().finish(open.header, Some(end))));
            }
        }
        for gap in &mut open.gaps {
            gap.to = Position::after(end);
        }
        Ok(Transaction {
            header: open.header,
            end,
            messages: open.messages,
            staged: open.staged,
            gaps: open.gaps,
            token_ids: open.token_ids,
            tallies: open.tallies,
        })
    }

    fn row(&mut self, relation: RelationId, read: &dyn Fn(&Plan, &mut Visit<'_>)) -> Result<(), Error> {
        let open = self.open.as_mut().ok_or(Error::OutOfOrder("a row outside a transaction"))?;
        let reading = self.relations.get(relation).ok_or(Error::UnknownRelation(relation.0))?;
        let before = open.steps;
        open.steps += 2;
        let plan = match reading {
            Reading::Not => return Ok(()),
            _ if open.gap_for_all => return Ok(()),
            Reading::As(plan) => plan,
            Reading::Renamed { from, to } => {
                let reason = Reading::renamed(from, to);
                open.tally(to).undecodable += 1;
                open.interrupt(None, before, reason.clone());
                return halt_on(self.on_undecodable, Some(reason), open.header.commit);
            }
        };

        let mut row = RowOutcomes {
            open,
            tenants: &mut self.tenants,
            encoded: &mut self.encoded,
            limits: self.limits,
            steps_before: before,
            table: plan.table(),
            created: 0,
            deleted: 0,
            undecodable: None,
        };
        read(plan, &mut |step, outcome| row.take(step, outcome));
        let RowOutcomes { created, deleted, undecodable, .. } = row;
        let tally = open.tally(plan.table());
        tally.created += created;
        tally.deleted += deleted;
        tally.undecodable += u64::from(undecodable.is_some());
        halt_on(self.on_undecodable, undecodable, open.header.commit)
    }

    fn truncate(&mut self, relation: RelationId) -> Result<(), Error> {
        let open = self.open.as_mut().ok_or(Error::OutOfOrder("TRUNCATE outside a transaction"))?;
        let table = match self.relations.get(relation).ok_or(Error::UnknownRelation(relation.0))? {
            Reading::Not => return Ok(()),
            Reading::As(plan) if !plan.has_facts() => return Ok(()),
            Reading::As(plan) => plan.table().to_string(),
            Reading::Renamed { to, .. } => to.to_string(),
        };
        open.interrupt(None, open.steps, GapReason::Truncate { table });
        Ok(())
    }
}

/// Adds the outcomes of one row message to the open transaction.
struct RowOutcomes<'a> {
    open: &'a mut Open,
    tenants: &'a mut HashSet<TenantId>,
    /// Scratch space.
    encoded: &'a mut Vec<u8>,
    limits: Limits,
    /// Row steps of the transaction before this message.
    steps_before: u64,
    table: &'a Arc<str>,
    created: u64,
    deleted: u64,
    /// The first that was found.
    undecodable: Option<GapReason>,
}

impl RowOutcomes<'_> {
    /// Takes the outcome of a step, which counts from 1.
    fn take(&mut self, step: u64, outcome: Outcome<'_>) {
        let taken = match outcome {
            Outcome::Change { tenant, operation, fact } => self.change(step, tenant, operation, &fact),
            Outcome::Transaction { tenant } => self.transaction(tenant),
            Outcome::Undecodable(undecodable) => Err(undecodable),
        };
        let Err(Undecodable { tenant, detail }) = taken else { return };
        let tenant = tenant.and_then(|tenant| intern(self.tenants, &tenant).ok());
        let reason = GapReason::Undecodable { table: self.table.to_string(), detail };
        self.open.interrupt(tenant, self.steps_before + step - 1, reason.clone());
        self.undecodable.get_or_insert(reason);
    }

    fn change(&mut self, step: u64, tenant: &str, operation: Operation, fact: &Fact<'_>) -> Result<(), Undecodable> {
        self.encoded.clear();
        encode(operation, fact, self.encoded);
        let bytes = envelope_bytes(fact, self.encoded);
        let id = self.tenant(tenant)?;
        if bytes > self.limits.change_bytes {
            let detail = format!("a change of {bytes} bytes; at most {} are possible", self.limits.change_bytes);
            return Err(Undecodable { tenant: Some(id.as_str().to_owned()), detail });
        }
        let is_added = self.open.add(&id, self.steps_before + step, self.encoded, bytes, self.limits.message_bytes);
        match operation {
            Operation::Create => self.created += u64::from(is_added),
            Operation::Delete => self.deleted += u64::from(is_added),
        }
        Ok(())
    }

    fn transaction(&mut self, tenant: &str) -> Result<(), Undecodable> {
        let id = self.tenant(tenant)?;
        self.open.closing.insert(id);
        Ok(())
    }

    fn tenant(&mut self, text: &str) -> Result<TenantId, Undecodable> {
        intern(self.tenants, text).map_err(|error| Undecodable { tenant: None, detail: error.to_string() })
    }
}

/// An error where what cannot be decoded is to stop the stream.
fn halt_on(on_undecodable: OnUndecodable, reason: Option<GapReason>, commit: CommitLsn) -> Result<(), Error> {
    match (on_undecodable, reason) {
        (OnUndecodable::Halt, Some(GapReason::Undecodable { table, detail })) => {
            Err(Error::Halted { table, detail, commit })
        }
        _ => Ok(()),
    }
}

/// The shared id for this text.
fn intern(tenants: &mut HashSet<TenantId>, text: &str) -> Result<TenantId, crate::model::change::TenantIdError> {
    if let Some(known) = tenants.get(text) {
        return Ok(known.clone());
    }
    if tenants.len() >= INTERNED_MAX {
        tenants.clear();
    }
    let tenant = TenantId::new(text)?;
    tenants.insert(tenant.clone());
    Ok(tenant)
}

impl Open {
    /// Whether the tenant is told of it.
    fn add(
        &mut self,
        tenant: &TenantId,
        step: u64,
        encoded: &[u8],
        envelope_bytes: usize,
        message_bytes: usize,
    ) -> bool {
        if !self.broken.is_empty() && self.broken.contains(tenant) {
            return false;
        }
        let part = match self.parts.get_mut(tenant) {
            Some(part) => part,
            None => {
                self.order.push(tenant.clone());
                self.parts.entry(tenant.clone()).or_default()
            }
        };
        if part.is_full(step, envelope_bytes, message_bytes) {
            let full = std::mem::take(part);
            self.messages.push((tenant.clone(), full.finish(self.header, None)));
        }
        part.push(step, encoded, envelope_bytes);
        self.bytes += encoded.len();
        true
    }

    /// That of this table, which is mostly that of the row before.
    fn tally(&mut self, table: &Arc<str>) -> &mut Tally {
        let known = self.tallies.iter().rposition(|tally| Arc::ptr_eq(&tally.table, table));
        let at = known.unwrap_or_else(|| {
            self.tallies.push(Tally::new(table.clone()));
            self.tallies.len() - 1
        });
        #[expect(clippy::indexing_slicing, reason = "found or added just now")]
        &mut self.tallies[at]
    }

    /// A gap for one tenant or all, after `steps`, up to the end of the transaction.
    fn interrupt(&mut self, tenant: Option<TenantId>, steps: u64, reason: GapReason) {
        let tenant = tenant.filter(|tenant| self.broken.len() < GAP_TENANTS_MAX || self.broken.contains(tenant));
        match &tenant {
            _ if self.gap_for_all => return,
            Some(tenant) if !self.broken.insert(tenant.clone()) => return,
            Some(tenant) => {
                if let Some(part) = self.parts.remove(tenant).filter(|part| !part.is_empty()) {
                    self.messages.push((tenant.clone(), part.finish(self.header, None)));
                }
                self.order.retain(|other| other != tenant);
            }
            None => {
                self.gap_for_all = true;
                self.flush();
            }
        }
        let from = Position::inside(self.header.commit, steps);
        self.gaps.push(Gap { tenant, from, to: from, reason, writers: Vec::new() });
    }

    /// Makes messages of all that is in parts.
    fn flush(&mut self) {
        for tenant in std::mem::take(&mut self.order) {
            if let Some(part) = self.parts.remove(&tenant).filter(|part| !part.is_empty()) {
                self.messages.push((tenant, part.finish(self.header, None)));
            }
        }
    }

    /// Hands out all that there is. Where transactions are `told`, whoever has a part in this one is told of its end, too.
    fn stage(&mut self, told: bool) -> Staged {
        if told {
            self.closing.extend(self.order.iter().cloned());
        }
        self.flush();
        self.staged = true;
        self.bytes = 0;
        Staged { commit: self.header.commit, messages: std::mem::take(&mut self.messages) }
    }
}

#[cfg(test)]
mod tests;
