//! Assembles row messages into transactions. Only this module assigns positions to changes.
//!
//! PostgreSQL sends a whole transaction after its commit: Begin, which already has the commit LSN, then rows, then
//! Commit. The assembler cuts the changes of each tenant into messages of limited size. It holds little: if the open
//! transaction exceeds [`Limits::stage_bytes`], its messages so far are returned to be *staged* in the change log. They
//! become readable with the transaction's Commit. So no transaction is ever in memory as a whole.
//!
//! A row that cannot be decoded is a gap for its tenant, from the row to the end of the transaction. If even its tenant
//! cannot be read, the gap is for all tenants, and so is the gap of a TRUNCATE and of a row of a mapped table that was
//! renamed. A gap for one tenant does not affect the changes of others.
//!
//! The assembler is pure: no clock, no I/O. Each replication session has its own.

use crate::decode::mapping::{Mapping, Outcome, Plan, Undecodable};
use crate::decode::pgoutput::{self, Message as Row, RelationCache, RelationId, decode};
use crate::model::change::{Fact, Operation, TenantId, encode, envelope_bytes};
use crate::model::lsn::{CommitLsn, EndLsn, Position};
use crate::model::snap_token::TokenId;
use crate::model::transaction::{Gap, GapReason, Header, Message, MessageBuilder, Tally, Transaction};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// The prefix of logical messages that belong to tuplewatch.
pub const MESSAGE_PREFIX: &str = "tuplewatch";

/// Size limits, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A message ends before it would exceed this.
    pub message_bytes: usize,
    /// A larger single change is a gap, because gRPC clients refuse messages above 4 MiB by default.
    pub change_bytes: usize,
    /// A larger open transaction is staged.
    pub stage_bytes: usize,
}

/// The treatment of a row that cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnUndecodable {
    /// A gap for its tenant. Everything else continues.
    Gap,
    /// The stream stops, so that an operator can look first.
    Halt,
}

/// The most token ids kept of one transaction. Further tokens still resolve, by their LSN floor.
const TOKEN_IDS_MAX: usize = 65_536;
/// The most tenants with a gap in one transaction. Beyond that, the gap is for all tenants.
const GAP_TENANTS_MAX: usize = 1_000;
/// The most shared tenant ids in memory. Beyond that, the memory is cleared.
const INTERNED_MAX: usize = 100_000;

/// The reason why the stream cannot be read further. All of these errors are lasting.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The message is not valid pgoutput.
    #[error(transparent)]
    Pgoutput(#[from] pgoutput::Error),
    /// The messages come in an order that the protocol excludes.
    #[error("the replication stream is out of order: {0}")]
    OutOfOrder(&'static str),
    /// No Relation message defined the table of the row.
    #[error("a row of a table without a Relation message before it (oid {0})")]
    UnknownRelation(u32),
    /// The row cannot be decoded, and `mapping.on_undecodable` is `halt`.
    #[error(
        "a row of table {table} could not be decoded: {detail} (transaction {commit}; \
         mapping.on_undecodable is 'halt'). Repairing the row is not enough, as the WAL keeps it as it was: then \
         start once with 'gap', which gives the subscribers of its tenant a gap, so that they read their state anew"
    )]
    Halted {
        /// The table.
        table: String,
        /// The problem, without values.
        detail: String,
        /// The commit LSN of the transaction.
        commit: CommitLsn,
    },
}

/// Messages of an open transaction, to be staged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Staged {
    /// The commit LSN of their transaction.
    pub commit: CommitLsn,
    /// In order within each tenant.
    pub messages: Vec<(TenantId, Message)>,
}

/// Receives the outcome of each row step, with the number of the step in its row message.
type Visit<'a> = dyn FnMut(u64, Outcome<'_>) + 'a;

/// Assembles the transactions of one session; see the module.
#[derive(Debug)]
pub struct Assembler {
    mapping: Arc<Mapping>,
    limits: Limits,
    on_undecodable: OnUndecodable,
    relations: RelationCache<Reading>,
    /// Mapped tables whose Relation message has not come yet.
    awaited: HashMap<RelationId, String>,
    /// Shared ids, so that the id of a tenant is allocated once and not for each row.
    tenants: HashSet<TenantId>,
    open: Option<Open>,
    encoded: Vec<u8>,
}

/// The way to read rows of a relation.
#[derive(Clone, Debug)]
enum Reading {
    /// According to this plan.
    Mapped(Arc<Plan>),
    /// Ignored, because the table is not mapped.
    Unmapped,
    /// The table was mapped, and then renamed. It may be renamed back before any check notices, so its rows must not be
    /// ignored.
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
    /// The number of row steps so far.
    steps: u64,
    parts: HashMap<TenantId, MessageBuilder>,
    /// The tenants in the order of appearance, so that equal streams give equal output.
    order: Vec<TenantId>,
    /// Complete messages.
    messages: Vec<(TenantId, Message)>,
    /// The bytes in `parts` and `messages`.
    bytes: usize,
    staged: bool,
    /// Their `to` is set at the Commit.
    gaps: Vec<Gap>,
    broken: HashSet<TenantId>,
    gap_for_all: bool,
    /// Tenants that receive a last message even if all their changes are in earlier messages, or if there are none.
    closing: BTreeSet<TenantId>,
    token_ids: Vec<TokenId>,
    tallies: Vec<Tally>,
}

impl Assembler {
    /// Creates an assembler for a new session.
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

    /// Sets the mapped tables, by oid. If the first Relation message of one has another name, the table was renamed.
    pub fn await_tables(&mut self, tables: HashMap<RelationId, String>) {
        self.awaited = tables;
    }

    /// Whether a transaction is open.
    pub const fn in_transaction(&self) -> bool {
        self.open.is_some()
    }

    /// Handles pgoutput's Begin.
    ///
    /// # Errors
    /// A transaction is already open.
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

    /// Handles any other message than Begin, Commit and logical messages. The returned messages must be staged before
    /// any other entry.
    ///
    /// # Errors
    /// The message is malformed or out of order, or its row cannot be decoded and the assembler is configured to halt.
    pub fn change(&mut self, bytes: &[u8]) -> Result<Option<Staged>, Error> {
        match decode(bytes)? {
            Row::Type | Row::Origin => return Ok(None),
            Row::Relation(relation) => {
                let before = match self.relations.get(relation.id) {
                    Some(Reading::Mapped(plan)) => Some(&**plan.table()),
                    Some(Reading::Renamed { from, .. }) => Some(from.as_str()),
                    Some(Reading::Unmapped) | None => self.awaited.get(&relation.id).map(String::as_str),
                };
                let reading = match (self.mapping.plan(&relation), before) {
                    (Some(plan), _) => Reading::Mapped(Arc::new(plan)),
                    (None, None) => Reading::Unmapped,
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

    /// Handles a transactional logical message. Those of other programs, and those outside of transactions, are
    /// ignored.
    pub fn logical_message(&mut self, prefix: &str, content: &[u8]) {
        if prefix == MESSAGE_PREFIX
            && let Some(open) = &mut self.open
            && let Ok(id) = <[u8; 16]>::try_from(content)
            && open.token_ids.len() < TOKEN_IDS_MAX
        {
            open.token_ids.push(TokenId(id));
        }
    }

    /// Handles pgoutput's Commit.
    ///
    /// # Errors
    /// It does not belong to the open transaction.
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
            // For a tenant with a gap, the gap ends its part of the transaction.
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
            Reading::Unmapped => return Ok(()),
            _ if open.gap_for_all => return Ok(()),
            Reading::Mapped(plan) => plan,
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
            Reading::Unmapped => return Ok(()),
            Reading::Mapped(plan) if !plan.has_facts() => return Ok(()),
            Reading::Mapped(plan) => plan.table().to_string(),
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
    /// The row steps of the transaction before this message.
    steps_before: u64,
    table: &'a Arc<str>,
    created: u64,
    deleted: u64,
    /// The first undecodable outcome.
    undecodable: Option<GapReason>,
}

impl RowOutcomes<'_> {
    /// Adds the outcome of a step. Steps count from 1.
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
            let detail = format!("a change of {bytes} bytes, which exceeds the limit of {}", self.limits.change_bytes);
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

/// An error if an undecodable row must stop the stream.
fn halt_on(on_undecodable: OnUndecodable, reason: Option<GapReason>, commit: CommitLsn) -> Result<(), Error> {
    match (on_undecodable, reason) {
        (OnUndecodable::Halt, Some(GapReason::Undecodable { table, detail })) => {
            Err(Error::Halted { table, detail, commit })
        }
        _ => Ok(()),
    }
}

/// The shared id with this text.
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
    /// Adds a change. Returns whether it will be delivered, which is not the case behind a gap.
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

    /// The tally of this table, usually the same as for the row before.
    fn tally(&mut self, table: &Arc<str>) -> &mut Tally {
        let known = self.tallies.iter().rposition(|tally| Arc::ptr_eq(&tally.table, table));
        let at = known.unwrap_or_else(|| {
            self.tallies.push(Tally::new(table.clone()));
            self.tallies.len() - 1
        });
        #[expect(clippy::indexing_slicing, reason = "found or added just now")]
        &mut self.tallies[at]
    }

    /// Adds a gap after `steps`, up to the end of the transaction, for one tenant or for all.
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

    /// Turns all parts into messages.
    fn flush(&mut self) {
        for tenant in std::mem::take(&mut self.order) {
            if let Some(part) = self.parts.remove(&tenant).filter(|part| !part.is_empty()) {
                self.messages.push((tenant, part.finish(self.header, None)));
            }
        }
    }

    /// Returns all messages so far. If the mapping `reports_transactions`, each tenant with a part also receives a last
    /// message at the Commit.
    fn stage(&mut self, reports_transactions: bool) -> Staged {
        if reports_transactions {
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
