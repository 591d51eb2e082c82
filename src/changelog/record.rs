//! The bytes of the log.
//!
//! Keys of a segment, so that a tenant's messages lie together in stream order:
//!
//! | kind | bytes |
//! | --- | --- |
//! | message | `0x01`, tenant, `0x00`, commit LSN (8, big endian), last step (8, big endian; all ones on the last message) |
//! | token id | `0x02`, id (16) |
//! | transaction with changes | `0x03`, commit LSN (8, big endian) |
//! | id of a transaction with changes | `0x04`, xid8 (8, big endian) |
//!
//! Value of a message (numbers are varints unless a size is given):
//!
//! | what | bytes |
//! | --- | --- |
//! | flags: 1 = the tenant's last of the transaction | 1 |
//! | commit timestamp, big endian | 8 |
//! | xid8 | varint |
//! | end LSN minus commit LSN, 0 where not the last | varint |
//! | last step | varint |
//! | length of steps | varint |
//! | steps | that many |
//! | changes | the rest |
//!
//! The value of a token id is the transaction's end LSN (8, big endian); of a transaction its end LSN and its xid8; of an id
//! the transaction's commit LSN and its end LSN. The value of a tenant's horizon, in `meta`, is a [`Horizon`]'s fields in order, 8
//! bytes each, big endian.

use crate::change::TenantId;
use crate::lsn::{CommitTime, Lsn, Position, Xid8};
use crate::snap_token::TokenId;
use crate::transaction::{Header, Message};
use bytes::Bytes;
use prost::encoding::{decode_varint, encode_varint};

const MESSAGE: u8 = 1;
const TOKEN: u8 = 2;
const TRANSACTION: u8 = 3;
const XID: u8 = 4;
const FLAG_LAST: u8 = 1;

/// What all keys of a tenant's messages begin with.
pub(super) fn tenant_prefix(tenant: &TenantId) -> Vec<u8> {
    let mut key = Vec::with_capacity(tenant.as_str().len() + 18);
    key.push(MESSAGE);
    key.extend_from_slice(tenant.as_str().as_bytes());
    key.push(0);
    key
}

/// The key of a tenant's message at this place in the stream.
pub(super) fn message_key(tenant: &TenantId, order: Position) -> Vec<u8> {
    let mut key = tenant_prefix(tenant);
    key.extend_from_slice(&order.lsn.0.to_be_bytes());
    key.extend_from_slice(&order.steps.to_be_bytes());
    key
}

/// The smallest key above all of a tenant's messages.
pub(super) fn behind_tenant(tenant: &TenantId) -> Vec<u8> {
    let mut key = tenant_prefix(tenant);
    if let Some(last) = key.last_mut() {
        *last = 1;
    }
    key
}

/// The smallest key of any message, and the smallest above all of them.
pub(super) const MESSAGES: ([u8; 1], [u8; 1]) = ([MESSAGE], [TOKEN]);

/// Tenant and place of a message's key.
pub(super) fn read_message_key(key: &[u8]) -> Option<(TenantId, Position)> {
    let (rest, steps) = key.split_last_chunk::<8>()?;
    let (rest, commit) = rest.split_last_chunk::<8>()?;
    let (kind, tenant) = rest.split_first()?;
    let (nul, tenant) = tenant.split_last()?;
    if *kind != MESSAGE || *nul != 0 {
        return None;
    }
    let tenant = TenantId::new(std::str::from_utf8(tenant).ok()?).ok()?;
    Some((tenant, Position { lsn: Lsn(u64::from_be_bytes(*commit)), steps: u64::from_be_bytes(*steps) }))
}

pub(super) fn token_key(id: TokenId) -> Vec<u8> {
    let mut key = vec![TOKEN];
    key.extend_from_slice(&id.0);
    key
}

pub(super) fn transaction_key(commit: Lsn) -> Vec<u8> {
    let mut key = vec![TRANSACTION];
    key.extend_from_slice(&commit.0.to_be_bytes());
    key
}

/// The commit LSN in the key of a transaction.
pub(super) fn read_transaction_key(key: &[u8]) -> Option<Lsn> {
    key.strip_prefix(&[TRANSACTION]).and_then(read_lsn)
}

pub(super) fn xid_key(xid: Xid8) -> Vec<u8> {
    let mut key = vec![XID];
    key.extend_from_slice(&xid.0.to_be_bytes());
    key
}

pub(super) fn read_xid_key(key: &[u8]) -> Option<Xid8> {
    let xid = key.strip_prefix(&[XID])?;
    Some(Xid8(u64::from_be_bytes(xid.try_into().ok()?)))
}

/// The value of a transaction, and of an id.
pub(super) fn write_pair(first: u64, second: u64) -> Vec<u8> {
    [first.to_be_bytes(), second.to_be_bytes()].concat()
}

pub(super) fn read_pair(bytes: &[u8]) -> Option<(u64, u64)> {
    let (first, second) = bytes.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*first), u64::from_be_bytes(second.try_into().ok()?)))
}

/// The newest of a tenant's messages that retention dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Horizon {
    /// Where it stood.
    pub(super) position: Position,
    /// The id of its transaction.
    pub(super) xid: Xid8,
    /// The end LSN of its transaction.
    pub(super) end: Lsn,
}

pub(super) fn write_horizon(horizon: &Horizon) -> Vec<u8> {
    [write_position(horizon.position), write_pair(horizon.xid.0, horizon.end.0)].concat()
}

pub(super) fn read_horizon(bytes: &[u8]) -> Option<Horizon> {
    let (position, rest) = bytes.split_at_checked(16)?;
    let (xid, end) = read_pair(rest)?;
    Some(Horizon { position: read_position(position)?, xid: Xid8(xid), end: Lsn(end) })
}

/// The smallest key of any token.
pub(super) const TOKENS: [u8; 1] = [TOKEN];

pub(super) fn write_message(message: &Message) -> Vec<u8> {
    let mut out = Vec::with_capacity(40 + message.steps.len() + message.changes.len());
    out.push(if message.end.is_some() { FLAG_LAST } else { 0 });
    out.extend_from_slice(&message.header.commit_time.0.to_be_bytes());
    encode_varint(message.header.xid.0, &mut out);
    encode_varint(message.end.map_or(0, |end| end.0.saturating_sub(message.header.commit.0)), &mut out);
    encode_varint(message.last_step, &mut out);
    encode_varint(message.steps.len() as u64, &mut out);
    out.extend_from_slice(&message.steps);
    out.extend_from_slice(&message.changes);
    out
}

/// The inverse of [`write_message`]; `commit` is in the key.
pub(super) fn read_message(commit: Lsn, value: &Bytes) -> Option<Message> {
    let mut rest: &[u8] = value;
    let (flags, tail) = rest.split_first()?;
    let (time, tail) = tail.split_first_chunk::<8>()?;
    rest = tail;
    let xid = Xid8(decode_varint(&mut rest).ok()?);
    let length = decode_varint(&mut rest).ok()?;
    let last_step = decode_varint(&mut rest).ok()?;
    let steps_bytes = usize::try_from(decode_varint(&mut rest).ok()?).ok()?;
    let (steps, changes) = rest.split_at_checked(steps_bytes)?;
    let end = if flags & FLAG_LAST == 0 { None } else { Some(Lsn(commit.0.checked_add(length)?)) };
    Some(Message {
        header: Header { commit, xid, commit_time: CommitTime(i64::from_be_bytes(*time)) },
        end,
        last_step,
        steps: value.slice_ref(steps),
        changes: value.slice_ref(changes),
    })
}

pub(super) fn write_position(position: Position) -> Vec<u8> {
    write_pair(position.lsn.0, position.steps)
}

pub(super) fn read_position(bytes: &[u8]) -> Option<Position> {
    read_pair(bytes).map(|(lsn, steps)| Position { lsn: Lsn(lsn), steps })
}

pub(super) fn write_lsn(lsn: Lsn) -> Vec<u8> {
    lsn.0.to_be_bytes().to_vec()
}

pub(super) fn read_lsn(bytes: &[u8]) -> Option<Lsn> {
    Some(Lsn(u64::from_be_bytes(bytes.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn messages_round_trip(
            (commit, length, xid, time) in any::<(u32, u32, u64, i64)>(),
            last in any::<bool>(),
            last_step in any::<u64>(),
            steps in proptest::collection::vec(any::<u8>(), 0..20),
            changes in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let commit = Lsn(commit.into());
            let message = Message {
                header: Header { commit, xid: Xid8(xid), commit_time: CommitTime(time) },
                end: last.then(|| Lsn(commit.0 + u64::from(length))),
                last_step,
                steps: steps.into(),
                changes: changes.into(),
            };
            prop_assert_eq!(read_message(commit, &write_message(&message).into()), Some(message));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = read_message_key(&bytes);
            let _ = read_message(Lsn(5), &bytes.clone().into());
            let _ = read_position(&bytes);
        }

        #[test]
        fn keys_sort_as_the_stream(a in any::<(u64, u64)>(), b in any::<(u64, u64)>(), tenant in "[a-z]{1,3}") {
            let tenant = TenantId::new(&tenant).unwrap();
            let [a, b] = [a, b].map(|(lsn, steps)| Position { lsn: Lsn(lsn), steps });
            prop_assert_eq!(message_key(&tenant, a).cmp(&message_key(&tenant, b)), a.cmp(&b));
            prop_assert_eq!(read_message_key(&message_key(&tenant, a)), Some((tenant.clone(), a)));
            prop_assert!(message_key(&tenant, Position::MAX) < behind_tenant(&tenant));
        }
    }

    #[test]
    fn a_tenant_is_no_prefix_of_another() {
        let [short, long] = ["t1", "t10"].map(|t| TenantId::new(t).unwrap());
        assert!(behind_tenant(&short) < message_key(&long, Position::ZERO));
    }
}
