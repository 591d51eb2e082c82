//! The keys of a segment, and the encoding of small values.
//!
//! | kind | key | value |
//! | --- | --- | --- |
//! | messages of a tenant | `0x01`, tenant, `0x00`, order of the last one: commit LSN (8), row step (8; all ones on the tenant's last message of the transaction) | [`page`](super::page) |
//! | token id | `0x02`, id (16) | end LSN of its transaction (8) |
//! | transactions with changes | `0x03`, commit LSN of the last one (8) | [`page`](super::page) |
//! | ids of those transactions | `0x04`, xid8 without its lowest byte (7), commit LSN of the last one (8) | [`page`](super::page) |
//! | a tenant of a staged transaction, or of one with many tenants | `0x05`, commit LSN (8), tenant | nothing |
//! | reserved: the annotations of a transaction | `0x06`, commit LSN (8) | |
//! | reserved: time index | `0x07`, time in microseconds (8) | |
//! | reserved: tenant events | `0x08`, commit LSN (8), tenant | |
//!
//! Numbers are big endian, so that keys sort like the stream. A page has the key of its last element, so a scan from a
//! place in the stream begins with the first page that may contain elements after that place.
//!
//! A tenant's horizon, in `meta`, consists of the fields of [`Horizon`] in order, 8 bytes for each number.

use crate::model::change::TenantId;
use crate::model::lsn::{CommitLsn, EndLsn, Lsn, Position, Xid8};
use crate::model::snap_token::TokenId;

const MESSAGES: u8 = 1;
const TOKEN: u8 = 2;
const TRANSACTIONS: u8 = 3;
const XIDS: u8 = 4;
const TENANT: u8 = 5;

/// The prefix of all keys of messages.
pub(super) const MESSAGES_PREFIX: [u8; 1] = [MESSAGES];
/// The prefix of all keys of token ids.
pub(super) const TOKENS_PREFIX: [u8; 1] = [TOKEN];
/// The prefix of all keys of pages of transactions.
pub(super) const TRANSACTIONS_PREFIX: [u8; 1] = [TRANSACTIONS];

/// The prefix of all keys of a tenant's messages.
pub(super) fn tenant_prefix(tenant: &TenantId) -> Vec<u8> {
    let mut key = Vec::with_capacity(tenant.as_str().len() + 18);
    key.push(MESSAGES);
    key.extend_from_slice(tenant.as_str().as_bytes());
    key.push(0);
    key
}

/// The key of the page whose last message is at this place.
pub(super) fn messages_key(tenant: &TenantId, last: Position) -> Vec<u8> {
    let mut key = tenant_prefix(tenant);
    key.extend_from_slice(&last.lsn.0.to_be_bytes());
    key.extend_from_slice(&last.steps.to_be_bytes());
    key
}

/// The smallest key after all messages of a tenant.
pub(super) fn behind_tenant(tenant: &TenantId) -> Vec<u8> {
    let mut key = tenant_prefix(tenant);
    if let Some(last) = key.last_mut() {
        *last = 1;
    }
    key
}

/// Decodes the key of a page of messages into the tenant and the place of the last message.
pub(super) fn read_messages_key(key: &[u8]) -> Option<(TenantId, Position)> {
    let (rest, steps) = key.split_last_chunk::<8>()?;
    let (rest, commit) = rest.split_last_chunk::<8>()?;
    let (kind, tenant) = rest.split_first()?;
    let (nul, tenant) = tenant.split_last()?;
    if *kind != MESSAGES || *nul != 0 {
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

/// The key of the page whose last transaction has this commit LSN.
pub(super) fn transactions_key(last: CommitLsn) -> Vec<u8> {
    let mut key = vec![TRANSACTIONS];
    key.extend_from_slice(&last.0.0.to_be_bytes());
    key
}

/// The prefix of the keys of all pages that may contain a given id.
pub(super) type XidsPrefix = [u8; 8];

pub(super) const fn xids_prefix(xid: Xid8) -> XidsPrefix {
    let [a, b, c, d, e, f, g, _] = xid.0.to_be_bytes();
    [XIDS, a, b, c, d, e, f, g]
}

/// The key of the page of ids whose last transaction, in commit order, has this commit LSN.
pub(super) fn xids_key(prefix: XidsPrefix, last: CommitLsn) -> Vec<u8> {
    let mut key = prefix.to_vec();
    key.extend_from_slice(&last.0.0.to_be_bytes());
    key
}

/// The prefix of all keys of pages of ids.
pub(super) const XIDS_PREFIX: [u8; 1] = [XIDS];

/// The smallest id that the page with this key may contain.
pub(super) fn read_xids_key(key: &[u8]) -> Option<Xid8> {
    let (bucket, _) = key.strip_prefix(&XIDS_PREFIX)?.split_first_chunk::<7>()?;
    let [a, b, c, d, e, f, g] = *bucket;
    Some(Xid8(u64::from_be_bytes([a, b, c, d, e, f, g, 0])))
}

/// The prefix of the keys of all tenants of a transaction.
pub(super) fn tenants_prefix(commit: CommitLsn) -> Vec<u8> {
    let mut key = vec![TENANT];
    key.extend_from_slice(&commit.0.0.to_be_bytes());
    key
}

/// The key that records that the transaction has changes of this tenant.
pub(super) fn tenant_key(commit: CommitLsn, tenant: &TenantId) -> Vec<u8> {
    let mut key = tenants_prefix(commit);
    key.extend_from_slice(tenant.as_str().as_bytes());
    key
}

/// The smallest key after all tenants of transactions.
pub(super) const TENANTS_END: [u8; 1] = [TENANT + 1];

/// Decodes the key of a tenant of a transaction.
pub(super) fn read_tenant_key(key: &[u8]) -> Option<(CommitLsn, TenantId)> {
    let (commit, tenant) = key.strip_prefix(&[TENANT])?.split_first_chunk::<8>()?;
    let tenant = TenantId::new(std::str::from_utf8(tenant).ok()?).ok()?;
    Some((CommitLsn(Lsn(u64::from_be_bytes(*commit))), tenant))
}

/// The newest message of a scope that retention dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Horizon {
    /// The place of the message.
    pub(super) position: Position,
    /// The id of its transaction.
    pub(super) xid: Xid8,
    /// The end LSN of its transaction. Zero if the transaction continues in a later segment.
    pub(super) end: EndLsn,
}

pub(super) fn write_horizon(horizon: &Horizon) -> Vec<u8> {
    [write_position(horizon.position), write_pair(horizon.xid.0, horizon.end.0.0)].concat()
}

pub(super) fn read_horizon(bytes: &[u8]) -> Option<Horizon> {
    let (position, rest) = bytes.split_at_checked(16)?;
    let (xid, end) = read_pair(rest)?;
    Some(Horizon { position: read_position(position)?, xid: Xid8(xid), end: EndLsn(Lsn(end)) })
}

fn write_pair(first: u64, second: u64) -> Vec<u8> {
    [first.to_be_bytes(), second.to_be_bytes()].concat()
}

fn read_pair(bytes: &[u8]) -> Option<(u64, u64)> {
    let (first, second) = bytes.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*first), u64::from_be_bytes(second.try_into().ok()?)))
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
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = read_messages_key(&bytes);
            let _ = read_xids_key(&bytes);
            let _ = read_tenant_key(&bytes);
            let _ = read_horizon(&bytes);
        }

        #[test]
        fn keys_sort_as_the_stream(a in any::<(u64, u64)>(), b in any::<(u64, u64)>(), tenant in "[a-z]{1,3}") {
            let tenant = TenantId::new(&tenant).unwrap();
            let [a, b] = [a, b].map(|(lsn, steps)| Position { lsn: Lsn(lsn), steps });
            prop_assert_eq!(messages_key(&tenant, a).cmp(&messages_key(&tenant, b)), a.cmp(&b));
            prop_assert_eq!(read_messages_key(&messages_key(&tenant, a)), Some((tenant.clone(), a)));
            prop_assert!(messages_key(&tenant, Position::MAX) < behind_tenant(&tenant));
            prop_assert_eq!(read_tenant_key(&tenant_key(CommitLsn(a.lsn), &tenant)), Some((CommitLsn(a.lsn), tenant)));
            let (low, high) = (a.lsn.0.min(b.lsn.0), a.lsn.0.max(b.lsn.0));
            prop_assert!(xids_prefix(Xid8(low)) <= xids_prefix(Xid8(high)));
            prop_assert_eq!(read_xids_key(&xids_key(xids_prefix(Xid8(high)), CommitLsn(a.lsn))), Some(Xid8(high & !0xFF)));
        }
    }

    #[test]
    fn no_tenants_key_is_a_prefix_of_anothers() {
        let [short, long] = ["t1", "t10"].map(|t| TenantId::new(t).unwrap());
        assert!(behind_tenant(&short) < messages_key(&long, Position::ZERO));
    }
}
