//! A committed transaction as tuplewatch handles it: messages per tenant, and gaps.
//!
//! ```text
//!  commit LSN                                                              end LSN
//!  │ row 0       row 1       row 2       row 3                             │
//!  │ steps 1,2   steps 3,4   steps 5,6   steps 7,8                         │
//!  ├───────────────────────┬───────────────────────────────────────────────┤
//!  │ message of tenant a   │ message of tenant a, its last one             │
//!  │ reached: commit + 4   │ reached: end + 0                              │
//! ```

use crate::model::change::{Changes, TenantId, split_first};
use crate::model::lsn::{CommitLsn, CommitTime, EndLsn, Lsn, Position, Xid8};
use crate::model::scope::{Place, Scope};
use crate::model::snap_token::TokenId;
use bytes::Bytes;
use prost::encoding::{decode_varint, encode_varint};
use std::fmt;
use std::sync::Arc;

/// The common properties of all parts of a transaction, known from its first message on (pgoutput's Begin).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The LSN at which its commit record starts.
    pub commit: CommitLsn,
    /// Its id.
    pub xid: Xid8,
    /// The time of its commit, by the server's clock.
    pub commit_time: CommitTime,
}

/// Changes of one tenant from one transaction, in the order they were made. They become one message of a stream. The
/// last message of a transaction may have no changes: it then only reports the transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The transaction.
    pub header: Header,
    /// The end LSN of the transaction, set on the tenant's last message; `None` on earlier messages.
    pub end: Option<EndLsn>,
    /// The row steps of the transaction up to and including the last change here.
    pub last_step: u64,
    /// The row step of each change: a list of varints, each the distance to the one before (the first to zero).
    pub steps: Bytes,
    /// The changes, encoded: see [`crate::model::change`].
    pub changes: Bytes,
}

impl Message {
    /// The place of the message in the stream. A reader at position `p` has received it exactly if `order() <= p`.
    pub fn order(&self) -> Position {
        match self.end {
            // After all steps, even if there are none, and before its end LSN, which is at most the next commit LSN.
            Some(_) => Position::inside(self.header.commit, Place::WHOLE),
            None => Position::inside(self.header.commit, self.last_step),
        }
    }

    /// The position of a reader that has received this message, which is also the position in its token.
    pub fn reached(&self) -> Position {
        match self.end {
            Some(end) => Position::after(end),
            None => Position::inside(self.header.commit, self.last_step),
        }
    }

    /// Whether the whole message lies before this position.
    pub fn is_before(&self, position: Position) -> bool {
        // The last message of a transaction is ordered below its end LSN, and the position may be that end LSN.
        self.reached() <= position || (position.lsn == self.header.commit.0 && self.order() <= position)
    }

    /// The row step of the first change; `None` if there are no changes.
    pub fn first_step(&self) -> Option<u64> {
        decode_varint(&mut &self.steps[..]).ok()
    }

    /// The part of the message that a reader at `position` has not received yet: all, some changes (if another node cut
    /// its messages elsewhere), or nothing.
    pub fn after(mut self, position: Position) -> Option<Self> {
        if self.order() <= position {
            return None;
        }
        // A message without changes reports the end of the transaction.
        if position.lsn != self.header.commit.0 || position.steps == 0 || self.changes.is_empty() {
            return Some(self);
        }
        let mut steps: &[u8] = &self.steps;
        let mut changes: &[u8] = &self.changes;
        let mut step = 0;
        loop {
            let mut rest = steps;
            let Ok(distance) = decode_varint(&mut rest) else { break };
            let Some(next) = u64::checked_add(step, distance) else { break };
            if next > position.steps {
                break;
            }
            let Some((_, behind)) = split_first(changes) else { break };
            (step, steps, changes) = (next, rest, behind);
        }
        if changes.is_empty() {
            return None;
        }
        if step > 0 {
            // The first distance must count from zero again.
            let mut rest = steps;
            let distance = decode_varint(&mut rest).unwrap_or(0);
            let mut from_zero = Vec::with_capacity(steps.len() + 9);
            encode_varint(step.saturating_add(distance), &mut from_zero);
            from_zero.extend_from_slice(rest);
            self.changes = self.changes.slice_ref(changes);
            self.steps = from_zero.into();
        }
        Some(self)
    }
}

/// A message, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantMessage {
    /// Whose it is.
    pub tenant: TenantId,
    /// The message.
    pub message: Message,
    /// The end LSN of its transaction, where a stream of all tenants has the whole of it with this message. `None` in a transaction with
    /// gaps, and where the message was read for one tenant.
    pub ends_transaction: Option<EndLsn>,
}

impl TenantMessage {
    /// Where a stream of this scope stands that comes from `place` and has had this message.
    pub fn reached(&self, scope: &Scope, place: &Place) -> Place {
        match (scope, self.ends_transaction) {
            (Scope::Tenant(_), _) => self.message.reached().into(),
            (Scope::All, Some(end)) => Place::after(end),
            (Scope::All, None) => {
                let commit = self.message.header.commit.0;
                let from = if place.position.lsn == commit { place.position } else { Position::at(commit) };
                let steps = if self.message.end.is_some() { Place::WHOLE } else { self.message.last_step };
                Place::inside(from, self.tenant.clone(), steps)
            }
        }
    }
}

/// Collects changes of one tenant into a [`Message`].
#[derive(Debug, Default)]
pub struct MessageBuilder {
    steps: Vec<u8>,
    changes: Vec<u8>,
    last_step: u64,
    envelope_bytes: usize,
}

impl MessageBuilder {
    /// Adds an encoded change. `step` must not be below that of the change before; the changes of one half of a row
    /// share a step. `envelope_bytes` is its size in the largest envelope.
    pub fn push(&mut self, step: u64, encoded: &[u8], envelope_bytes: usize) {
        assert!(step >= self.last_step, "row steps do not go back");
        encode_varint(step - self.last_step, &mut self.steps);
        self.last_step = step;
        self.changes.extend_from_slice(encoded);
        self.envelope_bytes += envelope_bytes;
    }

    /// Whether another change would make the message larger than `bytes_max` in the largest envelope, and may begin the
    /// next message. Changes of one row step stay together, because a token counts whole row steps.
    pub const fn is_full(&self, step: u64, envelope_bytes: usize, bytes_max: usize) -> bool {
        !self.steps.is_empty() && step > self.last_step && self.envelope_bytes + envelope_bytes > bytes_max
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Completes the message. `end` is set on the tenant's last message of the transaction.
    pub fn finish(self, header: Header, end: Option<EndLsn>) -> Message {
        Message { header, end, last_step: self.last_step, steps: self.steps.into(), changes: self.changes.into() }
    }
}

/// The reason of a gap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GapReason {
    /// A watched table was truncated. The stream does not contain the removed rows.
    Truncate {
        /// The table, with its schema.
        table: String,
    },
    /// A row could not be turned into changes.
    Undecodable {
        /// The table, with its schema.
        table: String,
        /// The problem; never the row's values.
        detail: String,
    },
    /// The replication slot was advanced by another process, or recreated.
    SlotMoved,
    /// Publication, tables or replica identities differ from the last check.
    SchemaChanged {
        /// The difference.
        detail: String,
    },
    /// The configured mapping differs from the one that the log was written with.
    MappingChanged,
    /// The server continued on another timeline, which does not contain changes that were read past the switch.
    TimelineDiverged,
}

impl GapReason {
    /// The codes of all reasons.
    pub const CODES: [&'static str; 6] =
        ["TRUNCATE", "UNDECODABLE_ROW", "SLOT_MOVED", "SCHEMA_CHANGED", "MAPPING_CHANGED", "TIMELINE_DIVERGED"];

    /// A stable name for machines: `ErrorInfo.reason`.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Truncate { .. } => "TRUNCATE",
            Self::Undecodable { .. } => "UNDECODABLE_ROW",
            Self::SlotMoved => "SLOT_MOVED",
            Self::SchemaChanged { .. } => "SCHEMA_CHANGED",
            Self::MappingChanged => "MAPPING_CHANGED",
            Self::TimelineDiverged => "TIMELINE_DIVERGED",
        }
    }

    /// The variable part, for storage beside [`GapReason::code`].
    pub fn details(&self) -> (&str, &str) {
        match self {
            Self::Truncate { table } => (table, ""),
            Self::Undecodable { table, detail } => (table, detail),
            Self::SchemaChanged { detail } => ("", detail),
            Self::SlotMoved | Self::MappingChanged | Self::TimelineDiverged => ("", ""),
        }
    }

    /// The inverse of [`GapReason::code`] with [`GapReason::details`].
    pub fn from_code(code: &str, table: &str, detail: &str) -> Option<Self> {
        let (table, detail) = (table.to_owned(), detail.to_owned());
        Some(match code {
            "TRUNCATE" => Self::Truncate { table },
            "UNDECODABLE_ROW" => Self::Undecodable { table, detail },
            "SLOT_MOVED" => Self::SlotMoved,
            "SCHEMA_CHANGED" => Self::SchemaChanged { detail },
            "MAPPING_CHANGED" => Self::MappingChanged,
            "TIMELINE_DIVERGED" => Self::TimelineDiverged,
            _ => return None,
        })
    }
}

impl fmt::Display for GapReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncate { table } => write!(f, "table {table} was truncated"),
            Self::Undecodable { table, detail } => write!(f, "a row of table {table} could not be decoded: {detail}"),
            Self::SlotMoved => {
                write!(f, "the replication slot had moved on without this log (dropped, recreated or advanced)")
            }
            Self::SchemaChanged { detail } => write!(f, "what is published changed: {detail}"),
            Self::MappingChanged => write!(f, "the mapping of tables to changes was changed"),
            Self::TimelineDiverged => {
                write!(f, "the server went on along another timeline; changes received past the switch were abandoned")
            }
        }
    }
}

/// An interval of history that may lack changes: after `from` (exclusive), up to `to` (inclusive).
///
/// A reader before `from` receives everything up to it and then the gap. A reader inside receives the gap at once.
/// After reading its state anew, a reader continues at `to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The only affected tenant, and then inside one transaction; `None` affects all.
    pub tenant: Option<TenantId>,
    /// History is complete up to and including this position.
    pub from: Position,
    /// History is complete again after this position, unless the gap is still open.
    pub to: Position,
    /// The reason.
    pub reason: GapReason,
    /// Transactions that may have written inside the gap and were still running when it was recorded. If there are any,
    /// the gap is *open*: their changes may be missing at their commit, behind `to`. When they have ended, another gap
    /// is recorded that covers this one.
    pub writers: Vec<Xid8>,
}

impl Gap {
    /// Whether the end of the gap is not known yet.
    pub const fn is_open(&self) -> bool {
        !self.writers.is_empty()
    }

    /// Whether `other` lies inside this gap, for every tenant that it affects.
    pub fn covers(&self, other: &Self) -> bool {
        (self.tenant.is_none() || self.tenant == other.tenant) && self.from <= other.from && other.to <= self.to
    }

    /// The open gap in this list, in stream order, that no later gap covers.
    pub fn last_open(gaps: &[Self]) -> Option<&Self> {
        let (at, open) = gaps.iter().enumerate().rfind(|(_, gap)| gap.is_open())?;
        let later = gaps.get(at + 1..).unwrap_or_default();
        (!later.iter().any(|gap| gap.covers(open))).then_some(open)
    }

    /// The part of the gap that remains when everything past `at` is abandoned; `None` if nothing remains.
    pub fn up_to(self, at: Lsn) -> Option<Self> {
        let to = self.to.min(Position::at(at));
        (self.from < to).then_some(Self { to, ..self })
    }

    /// Whether the gap affects streams of this scope.
    pub fn concerns(&self, scope: &Scope) -> bool {
        self.tenant.as_ref().is_none_or(|own| scope.includes(own))
    }

    /// The place of a stream that has delivered everything before the gap and reports the gap next. `place` is an earlier place of it.
    pub fn begins(&self, scope: &Scope, place: &Place) -> Place {
        match (scope, &self.tenant) {
            (Scope::All, Some(tenant)) => {
                let from =
                    if place.position.lsn == self.from.lsn { place.position } else { Position::at(self.from.lsn) };
                Place::inside(from, tenant.clone(), self.from.steps.max(from.steps))
            }
            // Inside a transaction the gap of all comes after all tenants, because no tenant has changes behind it.
            (Scope::All, None) if self.from.steps > 0 => Position { steps: Place::WHOLE, ..self.from }.into(),
            _ => self.from.into(),
        }
    }

    /// The place at which a stream continues after it has reported the gap at `place`.
    pub fn ends(&self, scope: &Scope, place: &Place) -> Place {
        match (scope, &self.tenant) {
            // The gap ends with its transaction, but the changes of the tenants above are still to come.
            (Scope::All, Some(tenant)) => Place::inside(place.position, tenant.clone(), Place::WHOLE),
            _ => self.to.into(),
        }
    }

    /// Whether a stream of this scope reports the gap at `place`: everything before the gap was delivered, and the gap was not reported.
    pub fn is_due(&self, scope: &Scope, place: &Place) -> bool {
        match (scope, &self.tenant, &place.within) {
            (Scope::All, Some(tenant), Some((within, steps))) => {
                self.from.lsn == place.position.lsn && tenant == within && self.from.steps <= *steps
            }
            (Scope::All, Some(_), None) => false,
            (Scope::All, None, Some(_)) => self.from <= Position::at(place.position.lsn),
            (_, _, _) => self.from <= place.position,
        }
    }

    /// Whether `place` is behind the gap, for a stream of this scope.
    pub fn is_passed(&self, scope: &Scope, place: &Place) -> bool {
        let lsn = place.position.lsn;
        match &self.tenant {
            // The gap ends with its transaction, whose end LSN the place may not know.
            Some(tenant) if lsn == self.from.lsn => place.of(tenant).steps == Place::WHOLE,
            Some(_) if *scope == Scope::All => lsn > self.from.lsn,
            _ => self.to <= place.outer(),
        }
    }
}

/// A committed transaction, complete except for messages that were staged earlier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// Commit LSN, id, time.
    pub header: Header,
    /// Its end LSN.
    pub end: EndLsn,
    /// In order within each tenant, without the messages that were staged earlier.
    pub messages: Vec<(TenantId, Message)>,
    /// Whether messages of any tenant were staged earlier.
    pub staged: bool,
    /// Gaps inside it.
    pub gaps: Vec<Gap>,
    /// The ids of transaction tokens that were created inside it.
    pub token_ids: Vec<TokenId>,
    /// The changes of its rows by table, including staged ones. The change log does not store them.
    pub tallies: Vec<Tally>,
}

/// The number of changes from the rows of one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tally {
    /// The table, with its schema.
    pub table: Arc<str>,
    /// Facts that began to hold.
    pub created: u64,
    /// Facts that ceased to hold.
    pub deleted: u64,
    /// Rows that could not be turned into changes.
    pub undecodable: u64,
}

impl Tally {
    /// A tally without changes.
    pub const fn new(table: Arc<str>) -> Self {
        Self { table, created: 0, deleted: 0, undecodable: 0 }
    }
}

/// Memory for each message of a transaction in a window, beside its bytes: the item, its envelopes' slots, and its places in a feed and in the
/// list of transactions; some of a feed.
pub const MESSAGE_OVERHEAD_BYTES: usize = 400;

impl Transaction {
    /// The position after the whole transaction.
    pub const fn reached(&self) -> Position {
        Position::after(self.end)
    }

    /// Whether it has messages, staged or not.
    pub const fn has_changes(&self) -> bool {
        self.staged || !self.messages.is_empty()
    }

    /// Its approximate size in memory, in bytes.
    pub fn bytes(&self) -> usize {
        // The stored changes, and the response that is made from them.
        let bytes = |m: &Message| {
            m.changes.len() + Changes::of(&m.changes).envelope_bytes() + m.steps.len() + MESSAGE_OVERHEAD_BYTES
        };
        let messages: usize = self.messages.iter().map(|(_, message)| bytes(message)).sum();
        messages + MESSAGE_OVERHEAD_BYTES * (1 + self.gaps.len() + self.token_ids.len())
    }
}

#[cfg(test)]
impl Message {
    /// A message that creates a tuple at each of these row steps, whose entity has the step as its id.
    pub(crate) fn of_tuples(header: Header, steps: impl IntoIterator<Item = u64>, end: Option<u64>) -> Self {
        use crate::model::change::{Fact, Operation, Tuple, encode};
        let mut builder = MessageBuilder::default();
        for step in steps {
            let fact = Fact::Tuple(Tuple {
                entity_type: "doc",
                entity_id: &step.to_string(),
                relation: "viewer",
                subject_type: "user",
                subject_id: "1",
                subject_relation: "",
            });
            let mut encoded = Vec::new();
            encode(Operation::Create, &fact, &mut encoded);
            builder.push(step, &encoded, encoded.len());
        }
        builder.finish(header, end.map(|end| EndLsn(Lsn(end))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(steps: &[u64], end: Option<u64>) -> Message {
        let header = Header { commit: CommitLsn(Lsn(100)), xid: Xid8(7), commit_time: CommitTime(0) };
        Message::of_tuples(header, steps.iter().copied(), end)
    }

    #[test]
    fn a_message_is_not_cut_inside_a_row_step() {
        let mut builder = MessageBuilder::default();
        assert!(!builder.is_full(4, 1_000, 10), "what is larger than a message has one of its own");
        builder.push(4, b"one", 3);
        assert!(!builder.is_full(4, 1_000, 10) && !builder.is_full(5, 7, 10) && builder.is_full(5, 8, 10));
        builder.push(4, b"two", 8);
        assert!(builder.is_full(5, 1, 10) && !builder.is_full(4, 1, 10));
        let message =
            builder.finish(Header { commit: CommitLsn(Lsn(100)), xid: Xid8(7), commit_time: CommitTime(0) }, None);
        assert_eq!((message.last_step, &*message.steps, &*message.changes), (4, &[4, 0][..], &b"onetwo"[..]));
    }

    #[test]
    fn changes_of_one_row_step_stay_together() {
        let rest = |position| message(&[2, 4, 4, 6], Some(200)).after(position);
        assert_eq!(rest(Position::inside(CommitLsn(Lsn(100)), 3)), Some(message(&[4, 4, 6], Some(200))));
        assert_eq!(rest(Position::inside(CommitLsn(Lsn(100)), 4)), Some(message(&[6], Some(200))));
        assert_eq!(rest(Position::inside(CommitLsn(Lsn(100)), 6)), None);
    }

    #[test]
    fn a_reader_gets_the_rest_of_a_message() {
        let check = |position: Position, expected: &[u64]| {
            let rest = message(&[2, 3, 4, 300], Some(200)).after(position);
            let expected = (!expected.is_empty()).then(|| message(expected, Some(200)));
            assert_eq!(rest, expected, "{position}");
        };
        check(Position::ZERO, &[2, 3, 4, 300]);
        check(Position::at(Lsn(100)), &[2, 3, 4, 300]);
        check(Position::inside(CommitLsn(Lsn(100)), 1), &[2, 3, 4, 300]);
        check(Position::inside(CommitLsn(Lsn(100)), 2), &[3, 4, 300]);
        check(Position::inside(CommitLsn(Lsn(100)), 4), &[300]);
        check(Position::inside(CommitLsn(Lsn(100)), 299), &[300]);
        check(Position::inside(CommitLsn(Lsn(100)), 300), &[]);
        check(Position::at(Lsn(101)), &[]);
        check(Position::at(Lsn(200)), &[]);
    }

    #[test]
    fn inner_messages_resume_inside() {
        let inner = message(&[2, 4], None);
        assert_eq!(inner.reached(), Position::inside(CommitLsn(Lsn(100)), 4));
        assert_eq!(inner.clone().after(inner.reached()), None);
        let last = message(&[6], Some(200));
        assert!(inner.order() < last.order());
        assert_eq!(last.clone().after(inner.reached()), Some(last.clone()));
        assert_eq!(last.reached(), Position::at(Lsn(200)));
    }

    #[test]
    fn a_gap_reason_survives_storage() {
        for reason in [
            GapReason::Truncate { table: "a.b".into() },
            GapReason::Undecodable { table: "a.b".into(), detail: "x".into() },
            GapReason::SlotMoved,
            GapReason::SchemaChanged { detail: "y".into() },
            GapReason::MappingChanged,
            GapReason::TimelineDiverged,
        ] {
            let (table, detail) = reason.details();
            assert_eq!(GapReason::from_code(reason.code(), table, detail), Some(reason.clone()));
            assert!(GapReason::CODES.contains(&reason.code()), "{reason:?}");
        }
    }
}
