//! Pages: the encoding of the elements that one append stores under one key.
//!
//! A transaction of one row costs a key-value store much more in keys than in bytes. So an append writes one page of
//! messages for each tenant, one page of transactions, and one page for each 256 transaction ids, until a page exceeds
//! [`BYTES_MAX`]. Elements are in commit order. LSNs, ids and times are stored as distances from the element before,
//! and in the first element from zero. All numbers are varints.
//!
//! An element of a page of messages:
//!
//! | field | form |
//! | --- | --- |
//! | commit LSN | distance |
//! | xid8 | zigzag of the distance |
//! | commit timestamp, in microseconds | zigzag of the distance |
//! | end LSN minus commit LSN; 0 if this is not the tenant's last message of the transaction | |
//! | last row step | |
//! | length of steps, length of changes | |
//! | steps, changes | that many bytes each |
//!
//! An element of a page of transactions:
//!
//! | field | form |
//! | --- | --- |
//! | commit LSN | distance |
//! | end LSN minus commit LSN | |
//! | xid8 | zigzag of the distance |
//! | number of tenants; 0 if each tenant has its own key | |
//! | each tenant | 0, length, bytes; a tenant that occurred before in the page: its number there, from 1 | |
//!
//! An element of a page of ids:
//!
//! | field | form |
//! | --- | --- |
//! | lowest byte of the xid8 | 1 byte |
//! | commit LSN | distance |
//! | end LSN minus commit LSN | |

use crate::model::change::TenantId;
use crate::model::lsn::{CommitLsn, CommitTime, EndLsn, Lsn, Position, Xid8};
use crate::model::transaction::{Header, Message};
use bytes::Bytes;
use prost::encoding::{decode_varint, encode_varint};
use std::collections::HashMap;

/// The size in bytes above which a page takes no more elements. It is large enough that the key does not matter, and
/// small enough that skipping to an element inside is cheap. Tests have pages of few elements.
pub(super) const BYTES_MAX: usize = if cfg!(test) { 160 } else { 16 << 10 };

/// A page that cannot be decoded.
#[derive(Debug, thiserror::Error)]
#[error("a page of {0} does not decode")]
pub(super) struct Malformed(pub(super) &'static str);

fn write_signed(value: i64, out: &mut Vec<u8>) {
    encode_varint(((value << 1) ^ (value >> 63)) as u64, out);
}

/// Removes a varint from the front.
fn number(bytes: &mut &[u8]) -> Option<u64> {
    decode_varint(bytes).ok()
}

fn signed(bytes: &mut &[u8]) -> Option<i64> {
    let value = number(bytes)?;
    Some((value >> 1) as i64 ^ -((value & 1) as i64))
}

const fn distance(commit: CommitLsn, before: CommitLsn) -> u64 {
    commit.0.0.wrapping_sub(before.0.0)
}

const fn further(before: CommitLsn, distance: u64) -> CommitLsn {
    CommitLsn(Lsn(before.0.0.wrapping_add(distance)))
}

/// The length of a commit record in bytes.
const fn length(commit: CommitLsn, end: EndLsn) -> u64 {
    end.0.0.saturating_sub(commit.0.0)
}

fn end_of(commit: CommitLsn, length: u64) -> Option<EndLsn> {
    Some(EndLsn(Lsn(commit.0.0.checked_add(length)?)))
}

/// Removes this many bytes from the front.
fn take<'a>(bytes: &mut &'a [u8], length: u64) -> Option<&'a [u8]> {
    let (front, rest) = bytes.split_at_checked(usize::try_from(length).ok()?)?;
    *bytes = rest;
    Some(front)
}

/// The predecessor of the first element: its distances are the values themselves.
const FIRST: Header = Header { commit: CommitLsn(Lsn::ZERO), xid: Xid8(0), commit_time: CommitTime(0) };

/// A page of messages of one tenant, while it is written.
pub(super) struct MessagePage {
    bytes: Vec<u8>,
    before: Header,
    last: Position,
}

impl MessagePage {
    pub(super) const fn new() -> Self {
        Self { bytes: Vec::new(), before: FIRST, last: Position::ZERO }
    }

    /// Adds a message, which must follow the others in the stream.
    pub(super) fn push(&mut self, message: &Message) {
        let Header { commit, xid, commit_time } = message.header;
        let (before, out) = (self.before, &mut self.bytes);
        out.reserve(32 + message.steps.len() + message.changes.len());
        encode_varint(distance(commit, before.commit), out);
        write_signed(xid.0.wrapping_sub(before.xid.0) as i64, out);
        write_signed(commit_time.0.wrapping_sub(before.commit_time.0), out);
        encode_varint(message.end.map_or(0, |end| length(commit, end)), out);
        encode_varint(message.last_step, out);
        encode_varint(message.steps.len() as u64, out);
        encode_varint(message.changes.len() as u64, out);
        out.extend_from_slice(&message.steps);
        out.extend_from_slice(&message.changes);
        self.before = message.header;
        self.last = message.order();
    }

    pub(super) const fn is_full(&self) -> bool {
        self.bytes.len() >= BYTES_MAX
    }

    /// Returns the place of the last message, and the value. `None` if the page is empty.
    pub(super) fn finish(self) -> Option<(Position, Vec<u8>)> {
        (!self.bytes.is_empty()).then_some((self.last, self.bytes))
    }
}

/// An iterator over the messages of a page. It ends after the first message that cannot be decoded.
pub(super) struct Messages {
    rest: Bytes,
    before: Header,
}

impl Messages {
    pub(super) const fn of(page: Bytes) -> Self {
        Self { rest: page, before: FIRST }
    }

    fn read(&mut self) -> Option<Message> {
        let mut rest: &[u8] = &self.rest;
        let commit = further(self.before.commit, number(&mut rest)?);
        let xid = Xid8(self.before.xid.0.wrapping_add_signed(signed(&mut rest)?));
        let commit_time = CommitTime(self.before.commit_time.0.wrapping_add(signed(&mut rest)?));
        let end = match number(&mut rest)? {
            0 => None,
            length => Some(end_of(commit, length)?),
        };
        let last_step = number(&mut rest)?;
        let (steps_bytes, changes_bytes) = (number(&mut rest)?, number(&mut rest)?);
        let steps = take(&mut rest, steps_bytes)?;
        let changes = take(&mut rest, changes_bytes)?;
        let header = Header { commit, xid, commit_time };
        let (steps, changes) = (self.rest.slice_ref(steps), self.rest.slice_ref(changes));
        self.before = header;
        self.rest = self.rest.slice_ref(rest);
        Some(Message { header, end, last_step, steps, changes })
    }
}

impl Iterator for Messages {
    type Item = Result<Message, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let message = self.read();
        if message.is_none() {
            self.rest.clear();
        }
        Some(message.ok_or(Malformed("messages")))
    }
}

/// The index entry of a transaction with changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Indexed {
    pub(super) commit: CommitLsn,
    pub(super) end: EndLsn,
    pub(super) xid: Xid8,
    /// The tenants with changes in the transaction. Empty if each of them has its own key.
    pub(super) tenants: Vec<TenantId>,
}

/// A page of transactions, while it is written.
#[derive(Default)]
pub(super) struct TransactionPage {
    bytes: Vec<u8>,
    last: CommitLsn,
    last_xid: u64,
    tenants: HashMap<TenantId, u64>,
}

impl TransactionPage {
    /// Adds a transaction, which must follow the others in the stream.
    pub(super) fn push(&mut self, transaction: &Indexed) {
        let Indexed { commit, end, xid, tenants } = transaction;
        let out = &mut self.bytes;
        encode_varint(distance(*commit, self.last), out);
        encode_varint(length(*commit, *end), out);
        write_signed(xid.0.wrapping_sub(self.last_xid) as i64, out);
        encode_varint(tenants.len() as u64, out);
        for tenant in tenants {
            if let Some(known) = self.tenants.get(tenant) {
                encode_varint(*known, out);
                continue;
            }
            encode_varint(0, out);
            encode_varint(tenant.as_str().len() as u64, out);
            out.extend_from_slice(tenant.as_str().as_bytes());
            self.tenants.insert(tenant.clone(), self.tenants.len() as u64 + 1);
        }
        (self.last, self.last_xid) = (*commit, xid.0);
    }

    pub(super) const fn is_full(&self) -> bool {
        self.bytes.len() >= BYTES_MAX
    }

    /// Returns the commit LSN of the last transaction, and the value. `None` if the page is empty.
    pub(super) fn finish(self) -> Option<(CommitLsn, Vec<u8>)> {
        (!self.bytes.is_empty()).then_some((self.last, self.bytes))
    }
}

/// Decodes a page of transactions.
pub(super) fn transactions(page: &[u8]) -> Result<Vec<Indexed>, Malformed> {
    let (mut rest, mut tenants, mut found) = (page, Vec::new(), Vec::new());
    let (mut commit, mut xid) = (CommitLsn::default(), Xid8(0));
    while !rest.is_empty() {
        let indexed = transaction(&mut rest, commit, xid, &mut tenants).ok_or(Malformed("transactions"))?;
        (commit, xid) = (indexed.commit, indexed.xid);
        found.push(indexed);
    }
    Ok(found)
}

/// Decodes the next transaction. `commit` and `xid` are those of the transaction before, and `known` the tenants of the
/// page so far.
fn transaction(rest: &mut &[u8], commit: CommitLsn, xid: Xid8, known: &mut Vec<TenantId>) -> Option<Indexed> {
    let commit = further(commit, number(rest)?);
    let end = end_of(commit, number(rest)?)?;
    let xid = Xid8(xid.0.wrapping_add_signed(signed(rest)?));
    let mut tenants = Vec::new();
    for _ in 0..number(rest)? {
        tenants.push(match number(rest)?.checked_sub(1) {
            Some(before) => known.get(usize::try_from(before).ok()?)?.clone(),
            None => {
                let length = number(rest)?;
                let tenant = TenantId::new(std::str::from_utf8(take(rest, length)?).ok()?).ok()?;
                known.push(tenant.clone());
                tenant
            }
        });
    }
    Some(Indexed { commit, end, xid, tenants })
}

/// A page of ids that differ only in the lowest byte, while it is written.
#[derive(Default)]
pub(super) struct XidPage {
    bytes: Vec<u8>,
    last: CommitLsn,
}

impl XidPage {
    /// Adds a transaction, which must follow the others in the stream.
    pub(super) fn push(&mut self, xid: Xid8, commit: CommitLsn, end: EndLsn) {
        self.bytes.push((xid.0 & 0xFF) as u8);
        encode_varint(distance(commit, self.last), &mut self.bytes);
        encode_varint(length(commit, end), &mut self.bytes);
        self.last = commit;
    }

    /// Returns the commit LSN of the last transaction, and the value. `None` if the page is empty.
    pub(super) fn finish(self) -> Option<(CommitLsn, Vec<u8>)> {
        (!self.bytes.is_empty()).then_some((self.last, self.bytes))
    }
}

/// Decodes a page of ids into id, commit LSN and end LSN. `first` is the smallest id that the page may contain.
pub(super) fn xids(first: Xid8, page: &[u8]) -> Result<Vec<(Xid8, CommitLsn, EndLsn)>, Malformed> {
    fn read(rest: &mut &[u8], first: Xid8, before: CommitLsn) -> Option<(Xid8, CommitLsn, EndLsn)> {
        let low = *take(rest, 1)?.first()?;
        let commit = further(before, number(rest)?);
        Some((Xid8(first.0 | u64::from(low)), commit, end_of(commit, number(rest)?)?))
    }
    let (mut rest, mut commit, mut found) = (page, CommitLsn::default(), Vec::new());
    while !rest.is_empty() {
        let next = read(&mut rest, first, commit).ok_or(Malformed("transaction ids"))?;
        commit = next.1;
        found.push(next);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn messages() -> impl Strategy<Value = Vec<Message>> {
        let places = (1u64..1 << 40, 0u64..1 << 30, any::<u64>(), any::<i64>(), any::<bool>(), any::<u64>());
        let message = (places, vec(any::<u8>(), 0..20), vec(any::<u8>(), 0..200)).prop_map(
            |((distance, length, xid, time, last, last_step), steps, changes)| Message {
                header: Header { commit: CommitLsn(Lsn(distance)), xid: Xid8(xid), commit_time: CommitTime(time) },
                end: last.then_some(EndLsn(Lsn(length + 1))),
                last_step,
                steps: steps.into(),
                changes: changes.into(),
            },
        );
        vec(message, 1..8).prop_map(|mut messages| {
            let mut commit = 0;
            for message in &mut messages {
                commit += message.header.commit.0.0;
                message.header.commit = CommitLsn(Lsn(commit));
                message.end = message.end.map(|length| EndLsn(Lsn(commit + length.0.0)));
            }
            messages
        })
    }

    fn indexed() -> impl Strategy<Value = Vec<Indexed>> {
        let one = (1u64..1 << 40, 0u64..1 << 30, any::<u64>(), vec("[a-d]{1,2}", 0..4));
        vec(one, 1..8).prop_map(|all| {
            let mut commit = 0;
            let build = |(distance, length, xid, tenants): (u64, u64, u64, Vec<String>)| {
                commit += distance;
                let tenants = tenants.iter().map(|tenant| TenantId::new(tenant).unwrap()).collect();
                Indexed { commit: CommitLsn(Lsn(commit)), end: EndLsn(Lsn(commit + length)), xid: Xid8(xid), tenants }
            };
            all.into_iter().map(build).collect()
        })
    }

    proptest! {
        #[test]
        fn messages_round_trip(messages in messages()) {
            let mut page = MessagePage::new();
            messages.iter().for_each(|message| page.push(message));
            let (last, bytes) = page.finish().unwrap();
            prop_assert_eq!(last, messages.last().unwrap().order());
            let read: Vec<_> = Messages::of(bytes.into()).map(Result::unwrap).collect();
            prop_assert_eq!(read, messages);
        }

        #[test]
        fn transactions_and_their_ids_round_trip(written in indexed()) {
            let (mut page, mut ids) = (TransactionPage::default(), XidPage::default());
            for transaction in &written {
                page.push(transaction);
                ids.push(transaction.xid, transaction.commit, transaction.end);
            }
            let last = written.last().unwrap().commit;
            let (at, bytes) = page.finish().unwrap();
            prop_assert_eq!((at, transactions(&bytes).unwrap()), (last, written.clone()));
            let (at, bytes) = ids.finish().unwrap();
            let expected: Vec<_> = written.iter().map(|t| (Xid8(0x700 | t.xid.0 & 0xFF), t.commit, t.end)).collect();
            prop_assert_eq!((at, xids(Xid8(0x700), &bytes).unwrap()), (last, expected));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..64)) {
            let _ = transactions(&bytes);
            let _ = xids(Xid8(0), &bytes);
            Messages::of(bytes.into()).for_each(drop);
        }
    }
}
