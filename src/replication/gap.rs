//! The gap of a changed publication or mapping, from the check that notices the change to the end of the gap.
//!
//! PostgreSQL decides for each row whether to send it, by the publication at the time when the row was written, and
//! sends a transaction when it commits. So a transaction that wrote to a table while the table was not published, and
//! that is still open when the table is published again, commits *later*, without these rows. Therefore the gap ends
//! only after every transaction that may have been writing when the change was noticed: every holder of a writer's lock
//! on a mapped table. A transaction that takes such a lock later writes under the publication that the check has seen.
//!
//! ```text
//!  noticed ──▶ all writers have ended ──▶ marker ──▶ the gap, with its end
//!     │                                                     ▲ recorded again, with its end
//!     └──▶ a writer stays for WRITERS_MAX ──▶ marker ──▶ the gap, open ──▶ all writers have ended ──▶ marker
//! ```
//!
//! The stream continues meanwhile. An open gap is in the change log ([`Gap::writers`]), so that a restart does not forget it.

use super::Error;
use super::upstream::Link;
use crate::changelog::{Entry, Verified};
use crate::model::lsn::{Lsn, Position, Xid8};
use crate::model::transaction::{Gap, GapReason};
use crate::postgres::transactions::NAMED_MAX;
use crate::postgres::transactions::Writer;
use crate::replication::receiver::Receiver;
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::time::Instant;

/// The time for which a gap waits for writers before it is recorded as open. Together with the interval of the checks,
/// subscribers receive the gap within 10 s.
const WRITERS_MAX: Duration = Duration::from_secs(3);
/// The interval at which the server is asked whether writers have ended.
pub(super) const WRITERS_EVERY: Duration = Duration::from_millis(250);

/// A gap without an end, or one that is not recorded. It belongs to one session.
#[derive(Debug)]
pub(super) struct UnsettledGap {
    /// The stream is complete up to this position, inclusive.
    from: Position,
    reason: GapReason,
    /// The writers that were running when they were last asked for.
    writers: BTreeSet<Xid8>,
    /// The new state, until it is recorded together with the gap.
    found: Option<Found>,
    noticed: Instant,
}

/// The state that later checks compare with.
#[derive(Clone, Debug)]
struct Found {
    mapping: [u8; 32],
    published: String,
}

impl UnsettledGap {
    /// A gap that begins because a check found another publication or mapping than the recorded one, while these
    /// transactions were writing.
    pub(super) fn noticed(
        from: Lsn,
        reason: GapReason,
        mapping: [u8; 32],
        published: String,
        writers: Vec<Xid8>,
    ) -> Self {
        let found = Some(Found { mapping, published });
        Self {
            from: Position::at(from),
            reason,
            writers: writers.into_iter().collect(),
            found,
            noticed: Instant::now(),
        }
    }

    /// A gap that an earlier session recorded as open.
    pub(super) fn recorded(gap: &Gap) -> Self {
        let writers = gap.writers.iter().copied().collect();
        Self { from: gap.from, reason: gap.reason.clone(), writers, found: None, noticed: Instant::now() }
    }

    /// Merges this gap with an earlier one that has not ended.
    pub(super) fn with(mut self, earlier: Option<Self>) -> Self {
        if let Some(earlier) = earlier {
            self.from = self.from.min(earlier.from);
            self.writers.extend(earlier.writers);
        }
        self
    }

    /// Whether a check has found this publication, and it is not recorded yet.
    pub(super) fn has_found(&self, published: &str) -> bool {
        self.found.as_ref().is_some_and(|found| found.published == published)
    }

    /// Whether the gap has to be recorded before the publication counts as verified.
    pub(super) const fn is_unrecorded(&self) -> bool {
        self.found.is_some()
    }

    /// Checks which writers are still running, and passes the gap to `receiver` when it is due. Returns the rest of the
    /// gap, if there is one.
    pub(super) async fn await_outcome(
        mut self,
        link: &impl Link,
        receiver: &mut Receiver,
    ) -> Result<Option<Self>, Error> {
        let running = if self.writers.is_empty() {
            Vec::new()
        } else {
            link.running(&self.writers.iter().copied().collect::<Vec<_>>()).await?
        };
        self.writers = running.iter().map(|writer| writer.xid).collect();
        let is_due = self.writers.is_empty() || (self.is_unrecorded() && self.noticed.elapsed() >= WRITERS_MAX);
        if !is_due {
            return Ok(Some(self));
        }
        if !self.writers.is_empty() {
            tracing::warn!(
                "{}: the gap stays open until these transactions have ended, as they may commit rows that PostgreSQL does not \
                 send: {}. Subscribers get the gap now, and once more when it ends, with the token to continue from",
                self.reason,
                describe(&running)
            );
        }
        // The marker is after everything that the ended writers wrote.
        let to = link.mark().await?;
        let gap = Gap {
            tenant: None,
            from: self.from,
            to: Position::at(to),
            reason: self.reason.clone(),
            writers: self.writers.iter().copied().collect(),
        };
        let then = self.found.take().map_or_else(Vec::new, |Found { mapping, published }| {
            vec![Entry::Mapping(mapping), Entry::Verified(Verified { fingerprint: published, at: to })]
        });
        receiver.interrupt(gap, then);
        Ok((!self.writers.is_empty()).then_some(self))
    }
}

/// Formats the transactions for people.
fn describe(running: &[Writer]) -> String {
    let mut named: Vec<&str> = running.iter().map(|writer| writer.description.as_str()).collect();
    // A transaction with savepoints has several ids.
    named.sort_unstable();
    named.dedup();
    let more = named.len().saturating_sub(NAMED_MAX);
    named.truncate(NAMED_MAX);
    let more = if more == 0 { String::new() } else { format!("; and {more} more") };
    format!("{}{more}", named.join("; "))
}
