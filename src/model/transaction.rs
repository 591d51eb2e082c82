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
use crate::model::snap_token::TokenId;
use bytes::Bytes;
use prost::encoding::{decode_varint, encode_varint};
use std::fmt;
use std::sync::Arc;

/// What all parts of one transaction have in common, known from its first message on (pgoutput's Begin).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Where its commit record starts.
    pub commit: CommitLsn,
    /// Its id.
    pub xid: Xid8,
    /// When it committed, by the clock of the server.
    pub commit_time: CommitTime,
}

/// Changes of one tenant from one transaction, in the order they were made: what becomes one message of a stream. The last one
/// may have none, where the transaction itself is what is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The transaction.
    pub header: Header,
    /// Its end LSN, on the tenant's last message of the transaction; `None` before that.
    pub end: Option<EndLsn>,
    /// Row steps of the transaction up to and including the last change here.
    pub last_step: u64,
    /// The row step of each change: a list of varints, each the distance to the one before (the first to zero).
    pub steps: Bytes,
    /// The changes, encoded: see [`crate::model::change`].
    pub changes: Bytes,
}

impl Message {
    /// Where this message stands in the stream. A reader at position `p` has had it exactly if `order() <= p`.
    pub fn order(&self) -> Position {
        match self.end {
            // Behind all steps, also where there are none; in front of its end LSN, that of the next commit at the least.
            Some(_) => Position::inside(self.header.commit, u64::MAX),
            None => Position::inside(self.header.commit, self.last_step),
        }
    }

    /// Where a reader is that has had this message: the position in its token.
    pub fn reached(&self) -> Position {
        match self.end {
            Some(end) => Position::after(end),
            None => Position::inside(self.header.commit, self.last_step),
        }
    }

    /// The row step of the first change; `None` where there are no changes.
    pub fn first_step(&self) -> Option<u64> {
        decode_varint(&mut &self.steps[..]).ok()
    }

    /// What of this message a reader at `position` has not had yet: all, a part (where another node cut its messages
    /// elsewhere), or nothing.
    pub fn after(mut self, position: Position) -> Option<Self> {
        if self.order() <= position {
            return None;
        }
        // One without changes tells of the end of the transaction.
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
            // The first distance counts from zero again.
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

/// Collects changes of one tenant into a [`Message`].
#[derive(Debug, Default)]
pub struct MessageBuilder {
    steps: Vec<u8>,
    changes: Vec<u8>,
    last_step: u64,
    envelope_bytes: usize,
}

impl MessageBuilder {
    /// Adds an encoded change. `step` is not below that of the change before: what one half of a row gives has one step.
    /// `envelope_bytes` is what it takes in the envelope that is largest, in bytes.
    pub fn push(&mut self, step: u64, encoded: &[u8], envelope_bytes: usize) {
        assert!(step >= self.last_step, "row steps do not go back");
        encode_varint(step - self.last_step, &mut self.steps);
        self.last_step = step;
        self.changes.extend_from_slice(encoded);
        self.envelope_bytes += envelope_bytes;
    }

    /// Whether another change would make it larger than this, in bytes of the largest envelope, and may as well begin the next
    /// message. Changes of one row step stay together: a token says how many row steps a reader has had, and nothing smaller.
    pub const fn is_full(&self, step: u64, envelope_bytes: usize, bytes_max: usize) -> bool {
        !self.steps.is_empty() && step > self.last_step && self.envelope_bytes + envelope_bytes > bytes_max
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// The message; `end` where it is the tenant's last of the transaction.
    pub fn finish(self, header: Header, end: Option<EndLsn>) -> Message {
        Message { header, end, last_step: self.last_step, steps: self.steps.into(), changes: self.changes.into() }
    }
}

/// Why history is not continuous at a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GapReason {
    /// A watched table was truncated: the rows that went are not in the stream.
    Truncate {
        /// The table, with its schema.
        table: String,
    },
    /// A row could not be turned into changes.
    Undecodable {
        /// The table, with its schema.
        table: String,
        /// What was wrong with it; never the row's values.
        detail: String,
    },
    /// The replication slot had moved on without us, or was recreated.
    SlotMoved,
    /// Publication, tables or replica identities are not what they were when last checked.
    SchemaChanged {
        /// What is different.
        detail: String,
    },
    /// The mapping in the configuration is another one than the log was written with.
    MappingChanged,
    /// The server went on along another timeline, and what was read past the switch never happened there.
    TimelineDiverged,
}

impl GapReason {
    /// Of all reasons that there are.
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

/// History is not continuous: changes between `from` (exclusive) and `to` may be missing.
///
/// Whoever is before `from` gets everything up to it and then the gap; whoever is in between gets the gap at once; and
/// `to` is where one goes on, after reading the state anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Only this tenant's, or everybody's.
    pub tenant: Option<TenantId>,
    /// Complete up to and including here.
    pub from: Position,
    /// Complete again from here on, unless it is still open.
    pub to: Position,
    /// Why.
    pub reason: GapReason,
    /// Transactions that may have written inside the gap, and were still running when it was recorded. Where there are any, the
    /// gap is *open*: what they wrote may be missing at their commit, behind `to`. Another gap, which covers this one, is
    /// recorded when they have ended.
    pub writers: Vec<Xid8>,
}

impl Gap {
    /// Whether its end is not known yet.
    pub const fn is_open(&self) -> bool {
        !self.writers.is_empty()
    }

    /// Whether `other` lies inside this one, for every tenant that it concerns.
    pub fn covers(&self, other: &Self) -> bool {
        (self.tenant.is_none() || self.tenant == other.tenant) && self.from <= other.from && other.to <= self.to
    }

    /// The open gap among these, which are in stream order, that no later one covers.
    pub fn last_open(gaps: &[Self]) -> Option<&Self> {
        let (at, open) = gaps.iter().enumerate().rfind(|(_, gap)| gap.is_open())?;
        let later = gaps.get(at + 1..).unwrap_or_default();
        (!later.iter().any(|gap| gap.covers(open))).then_some(open)
    }

    /// What remains of it when everything past `at` is abandoned; `None` where it lay there altogether.
    pub fn up_to(self, at: Lsn) -> Option<Self> {
        let to = self.to.min(Position::at(at));
        (self.from < to).then_some(Self { to, ..self })
    }

    /// Whether it concerns this tenant.
    pub fn concerns(&self, tenant: &TenantId) -> bool {
        self.tenant.as_ref().is_none_or(|own| own == tenant)
    }
}

/// A committed transaction, complete except for messages that were staged before its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// Commit LSN, id, time.
    pub header: Header,
    /// Its end LSN.
    pub end: EndLsn,
    /// In order for each tenant. Those staged before are not here.
    pub messages: Vec<(TenantId, Message)>,
    /// Whether messages of it were staged before, of whichever tenants.
    pub staged: bool,
    /// Gaps inside it.
    pub gaps: Vec<Gap>,
    /// Ids of transaction tokens that were handed out inside it.
    pub token_ids: Vec<TokenId>,
    /// What its rows came to, those of staged messages included. Not kept in the change log.
    pub tallies: Vec<Tally>,
}

/// How many changes the rows of one table came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tally {
    /// The table, with its schema.
    pub table: Arc<str>,
    /// Facts that hold from then on.
    pub created: u64,
    /// Facts that no longer hold.
    pub deleted: u64,
    /// Rows that could not be turned into changes.
    pub undecodable: u64,
}

impl Tally {
    /// Of a table without any.
    pub const fn new(table: Arc<str>) -> Self {
        Self { table, created: 0, deleted: 0, undecodable: 0 }
    }
}

impl Transaction {
    /// The position after the whole of it.
    pub const fn reached(&self) -> Position {
        Position::after(self.end)
    }

    /// Whether it has messages, handed on before or not.
    pub const fn has_changes(&self) -> bool {
        self.staged || !self.messages.is_empty()
    }

    /// Memory it takes, roughly, in bytes.
    pub fn bytes(&self) -> usize {
        /// Per message: the struct, the tenant's id, the bookkeeping of a window.
        const OVERHEAD: usize = 256;
        // The changes as they are, and in the response that is made of them.
        let bytes = |m: &Message| m.changes.len() + Changes::of(&m.changes).envelope_bytes() + m.steps.len() + OVERHEAD;
        let messages: usize = self.messages.iter().map(|(_, message)| bytes(message)).sum();
        messages + OVERHEAD * (1 + self.gaps.len() + self.token_ids.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::change::{Fact, Operation, Tuple, encode};

    fn message(steps: &[u64], end: Option<u64>) -> Message {
        let header = Header { commit: CommitLsn(Lsn(100)), xid: Xid8(7), commit_time: CommitTime(0) };
        let mut builder = MessageBuilder::default();
        for step in steps {
            let id = step.to_string();
            let fact = Fact::Tuple(Tuple {
                entity_type: "doc",
                entity_id: &id,
                relation: "viewer",
                subject_type: "user",
                subject_id: "1",
                subject_relation: "",
            });
            let mut encoded = Vec::new();
            encode(Operation::Create, &fact, &mut encoded);
            builder.push(*step, &encoded, encoded.len());
        }
        builder.finish(header, end.map(|end| EndLsn(Lsn(end))))
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
    fn changes_of_one_row_step_are_delivered_together() {
        let rest = |position| message(&[2, 4, 4, 6], Some(200)).after(position);
        assert_eq!(rest(Position::inside(CommitLsn(Lsn(100)), 3)), Some(message(&[4, 4, 6], Some(200))));
        assert_eq!(rest(Position::inside(CommitLsn(Lsn(100)), 4)), Some(message(&[6], Some(200))));
        assert_eq!(rest(Position::inside(CommitLsn(Lsn(100)), 6)), None);
    }

    #[test]
    fn a_reader_gets_the_changes_after_its_position() {
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
