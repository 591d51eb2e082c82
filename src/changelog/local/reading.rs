//! Reading messages back: those of one tenant, or of all tenants in the order of their transactions.
//!
//! Messages lie by tenant, so one tenant's are read in a row. For all tenants the index has the transactions in order, with the tenants of
//! each: a read walks along the index, and keeps the current page of each tenant that it meets, so that it looks for each page once. The
//! tenants of a transaction that has many of them, or was staged, are rarely met again: their pages are not kept.

use super::super::Batch;
use super::Unreadable;
use super::page::{Indexed, Messages};
use super::record;
use super::segments::{Segment, Segments};
use crate::model::change::TenantId;
use crate::model::lsn::{CommitLsn, Position};
use crate::model::scope::Place;
use crate::model::transaction::{Message, TenantMessage};
use bytes::Bytes;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// One tenant's messages after `after` and up to `up_to`, at least one and then about `bytes_max` bytes.
pub(super) fn one(
    segments: &Segments,
    tenant: &TenantId,
    after: Position,
    up_to: Position,
    bytes_max: usize,
) -> Result<Batch, Unreadable> {
    let mut batch = Bounded::new(bytes_max);
    for segment in segments.since(after) {
        let pages = record::messages_key(tenant, after)..record::behind_tenant(tenant);
        for item in segment.keyspace.range(pages) {
            for message in Messages::of(Bytes::from(item.value()?)) {
                let message = message?;
                if !message.is_before(up_to) {
                    return Ok(batch.messages);
                }
                let Some(message) = message.after(after) else { continue };
                if !batch.push(tenant, message) {
                    return Ok(batch.messages);
                }
            }
        }
    }
    Ok(batch.messages)
}

/// The same for all tenants. `gaps_end_at` has the places where gaps end, in order.
pub(super) fn all(
    segments: &Segments,
    after: &Place,
    up_to: &Place,
    gaps_end_at: &[Position],
    bytes_max: usize,
) -> Result<Batch, Unreadable> {
    let mut batch = Bounded::new(bytes_max);
    let mut tenants = Tenants { segments, open: HashMap::new() };
    let first = CommitLsn(after.position.lsn);
    for segment in segments.since(after.position) {
        for item in segment.transaction_pages(first) {
            let (_, transactions) = item?;
            for transaction in transactions.into_iter().filter(|transaction| transaction.commit >= first) {
                if up_to.outer() <= Position::at(transaction.commit.0) {
                    return Ok(batch.messages);
                }
                let from = if transaction.commit == first { after.clone() } else { Place::at(transaction.commit.0) };
                if !tenants.read(&transaction, segment, &from, up_to, &mut batch)? {
                    return Ok(batch.messages);
                }
                let end = Position::after(transaction.end);
                if gaps_end_at.binary_search(&end).is_err()
                    && let Some(last) = batch.messages.messages.last_mut()
                    && last.message.header.commit == transaction.commit
                {
                    last.ends_transaction = Some(transaction.end);
                }
            }
        }
    }
    Ok(batch.messages)
}

/// A message counts at least this many bytes: it takes some also without changes.
const MESSAGE_BYTES_MIN: usize = 64;

/// The message with bytes of its own.
fn copied(message: Message) -> Message {
    let [steps, changes] = [&message.steps, &message.changes].map(|bytes| Bytes::copy_from_slice(bytes));
    Message { steps, changes, ..message }
}

/// A batch up to its limit.
struct Bounded {
    messages: Batch,
    bytes: usize,
    bytes_max: usize,
}

impl Bounded {
    fn new(bytes_max: usize) -> Self {
        Self { messages: Batch::default(), bytes: 0, bytes_max }
    }

    /// Adds the message, unless the batch is full.
    fn push(&mut self, tenant: &TenantId, message: Message) -> bool {
        if self.bytes >= self.bytes_max {
            self.messages.more = true;
            return false;
        }
        self.bytes += message.changes.len().max(MESSAGE_BYTES_MIN);
        self.messages.messages.push(TenantMessage { tenant: tenant.clone(), message, ends_transaction: None });
        true
    }
}

/// The tenants that a read has met, each with the page that it is in.
struct Tenants<'a> {
    segments: &'a Segments,
    open: HashMap<TenantId, OpenPage>,
}

struct OpenPage {
    rest: Messages,
    /// Read from the page, and not taken yet.
    next: Option<Message>,
    /// The order of the last message of the page.
    last: Position,
}

impl Tenants<'_> {
    /// Adds the messages of one transaction, whose index is in `indexed_in`, from `from` on. `false`: the batch is full, or `up_to` reached.
    fn read(
        &mut self,
        transaction: &Indexed,
        indexed_in: &Segment,
        from: &Place,
        up_to: &Place,
        batch: &mut Bounded,
    ) -> Result<bool, Unreadable> {
        // The one that was begun, and then those above it.
        let mut tenant = match &from.within {
            Some((tenant, _)) => Some(tenant.clone()),
            None => self.tenant_above(transaction, indexed_in, None)?,
        };
        while let Some(this) = tenant {
            let had = from.of(&this);
            while let Some(message) = self.take(&this, transaction.commit, had)? {
                if !message.is_before(up_to.of(&this)) {
                    return Ok(false);
                }
                let is_last = message.end.is_some();
                // Copied, because a slice would keep a whole block in memory for one message of its tenant.
                if let Some(message) = message.after(had).map(copied)
                    && !batch.push(&this, message)
                {
                    return Ok(false);
                }
                if is_last {
                    break;
                }
            }
            if transaction.tenants.is_empty() {
                self.open.remove(&this);
            }
            tenant = self.tenant_above(transaction, indexed_in, Some(&this))?;
        }
        Ok(true)
    }

    /// The next tenant, in order, that has changes in the transaction.
    fn tenant_above(
        &self,
        transaction: &Indexed,
        indexed_in: &Segment,
        below: Option<&TenantId>,
    ) -> Result<Option<TenantId>, Unreadable> {
        if !transaction.tenants.is_empty() {
            return Ok(transaction.tenants.iter().find(|tenant| below.is_none_or(|below| *tenant > below)).cloned());
        }
        // Each has a key, in the segment that was the active one when its messages came: up to that of the transaction's end.
        let mut lowest: Option<TenantId> = None;
        for segment in self.segments.since(Position::at(transaction.commit.0)) {
            if let Some(tenant) = segment.tenant_above(transaction.commit, below)?
                && lowest.as_ref().is_none_or(|lowest| tenant < *lowest)
            {
                lowest = Some(tenant);
            }
            if segment.is(indexed_in) {
                break;
            }
        }
        Ok(lowest)
    }

    /// The tenant's next message of the transaction that commits here, behind `had`.
    fn take(&mut self, tenant: &TenantId, commit: CommitLsn, had: Position) -> Result<Option<Message>, Unreadable> {
        let open = match self.open.entry(tenant.clone()) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(none) => match OpenPage::behind(self.segments, tenant, had)? {
                Some(open) => none.insert(open),
                None => return Ok(None),
            },
        };
        loop {
            let next = match open.next.take() {
                Some(next) => Some(next),
                None => open.rest.next().transpose()?,
            };
            match next {
                Some(message) if message.header.commit == commit => return Ok(Some(message)),
                Some(message) if message.header.commit > commit => {
                    open.next = Some(message);
                    return Ok(None);
                }
                Some(_) => {}
                None => match OpenPage::behind(self.segments, tenant, open.last)? {
                    Some(behind) => *open = behind,
                    None => return Ok(None),
                },
            }
        }
    }
}

impl OpenPage {
    /// The tenant's first page that has something behind this place.
    fn behind(segments: &Segments, tenant: &TenantId, place: Position) -> Result<Option<Self>, Unreadable> {
        for segment in segments.since(place) {
            if let Some((last, page)) = segment.page_behind(tenant, place)? {
                return Ok(Some(Self { rest: Messages::of(page), next: None, last }));
            }
        }
        Ok(None)
    }
}
