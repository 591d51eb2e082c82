//! Turns the events of the slot into entries of the change log, in order.
//!
//! The receiver does no I/O: the session, or a test, passes events to it. It drops transactions that were received
//! before, turns keepalives into progress, and inserts the gap that a check found at its place in the stream.

use crate::changelog::Entry;
use crate::decode::assembler::{self, Assembler, MESSAGE_PREFIX};
use crate::decode::pgoutput::RelationId;
use crate::model::lsn::{EndLsn, Lsn, Position, Xid8};
use crate::model::transaction::{Gap, Header, Transaction};
use crate::postgres::connection::Event;
use crate::postgres::publication::CHECK_REQUEST;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// The error after which the stream cannot be read any further. All of these errors last.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Assembler(#[from] assembler::Error),
    /// The server has another history than the log.
    #[error(
        "the change log has a transaction that ends at {at}, and the server no longer has it, on the same timeline: its storage \
         was rolled back, and the log holds changes that never happened there. As it has been written to since, start the log \
         anew with --reset-log, and have every subscriber drop its token: it would be taken for one of the new history"
    )]
    Rewritten { at: EndLsn },
}

/// A gap that a check found, until the stream reaches its end.
#[derive(Clone, Debug)]
struct PendingGap {
    gap: Gap,
    /// The entries that are recorded with the gap.
    then: Vec<Entry>,
}

/// The receiver of one session.
#[derive(Debug)]
pub(crate) struct Receiver {
    assembler: Assembler,
    /// Everything up to this end LSN was turned into entries.
    received: Lsn,
    /// The reference from which 32-bit transaction ids are widened.
    xid: Xid8,
    /// Whether the open transaction was received before.
    skipping: bool,
    /// The position of an idle server, beyond `received`.
    idle: Option<Lsn>,
    pending: Option<PendingGap>,
    /// End LSN and id of the transactions in the log that the slot must send again.
    recorded: VecDeque<(EndLsn, Xid8)>,
    out: VecDeque<Entry>,
    check_requested: bool,
}

impl Receiver {
    /// Creates a receiver for a session whose slot begins at or before `received`. `xid` is the server's next
    /// transaction id at the time.
    pub(crate) fn new(assembler: Assembler, received: Lsn, xid: Xid8) -> Self {
        let (pending, recorded, out) = (None, VecDeque::new(), VecDeque::new());
        let (skipping, idle, check_requested) = (false, None, false);
        Self { assembler, received, xid, skipping, idle, pending, recorded, out, check_requested }
    }

    /// Expects these transactions of the log again, in stream order. If one does not arrive, the server's storage was
    /// rolled back, and the WAL that the server has written since then is not the WAL that was received.
    pub(crate) fn expect(&mut self, recorded: Vec<(EndLsn, Xid8)>) {
        let received = self.received;
        self.recorded = recorded.into_iter().filter(|(end, _)| end.0 <= received).collect();
    }

    /// Passes on the mapped tables that exist; see [`Assembler::await_tables`].
    pub(crate) fn await_tables(&mut self, tables: HashMap<RelationId, String>) {
        self.assembler.await_tables(tables);
    }

    /// The end LSN up to which everything was turned into entries.
    pub(crate) const fn received(&self) -> Lsn {
        self.received
    }

    /// Whether a gap waits for the stream to reach its end.
    pub(crate) const fn has_pending_gap(&self) -> bool {
        self.pending.is_some()
    }

    /// Queues a gap in the history. Its end is ahead of everything received, and the gap and then the entries of `then`
    /// follow when the stream reaches it. There may be only one such gap at a time.
    pub(crate) fn interrupt(&mut self, gap: Gap, then: Vec<Entry>) {
        assert!(self.pending.is_none(), "the session waits for one gap before it finds the next");
        let from = gap.from.min(Position::at(self.received));
        self.pending = Some(PendingGap { gap: Gap { from, ..gap }, then });
    }

    /// Whether a message in the stream has requested a check of the publication since the last call.
    pub(crate) const fn take_check_request(&mut self) -> bool {
        std::mem::replace(&mut self.check_requested, false)
    }

    /// Takes one event. [`Receiver::pop`] returns the resulting entries.
    ///
    /// # Errors
    /// If the stream cannot be read any further. The error lasts.
    pub(crate) fn take(&mut self, event: Event) -> Result<(), Error> {
        match event {
            Event::Begin { commit, xid, commit_time } => {
                self.expect_nothing_before(commit.0)?;
                // A gap precedes the first transaction after it.
                self.gap_up_to(commit.0);
                self.xid = self.xid.widen(xid);
                self.skipping = commit.0 < self.received;
                self.assembler.begin(Header { commit, xid: self.xid, commit_time })?;
            }
            Event::Change(bytes) => {
                if let Some(staged) = self.assembler.change(&bytes)?
                    && !self.skipping
                {
                    self.out.push_back(Entry::Staged(Arc::new(staged)));
                }
            }
            Event::Message { prefix, content } => {
                self.check_requested |= prefix == MESSAGE_PREFIX && *content == *CHECK_REQUEST;
                self.assembler.logical_message(&prefix, &content);
            }
            Event::Commit { commit, end } => {
                let transaction = self.assembler.commit(commit, end)?;
                if self.skipping {
                    self.check_off(&transaction)?;
                } else if self.gap_up_to(end.0) {
                    // This is the marker of the gap. The gap includes it, so no reader passes it without seeing the
                    // gap.
                    self.out.extend(transaction.staged.then_some(Entry::Discard));
                } else {
                    self.received = end.0;
                    self.out.push_back(Entry::Transaction(Arc::new(transaction)));
                }
                self.skipping = false;
            }
            Event::KeepAlive { wal_end } => {
                if !self.assembler.in_transaction() {
                    self.expect_nothing_before(wal_end)?;
                    self.idle = self.idle.max(Some(wal_end));
                }
            }
        }
        self.idle = self.idle.filter(|idle| *idle > self.received);
        Ok(())
    }

    /// Returns the next entry to deliver.
    pub(crate) fn pop(&mut self) -> Option<Entry> {
        self.out.pop_front()
    }

    /// Whether the server is ahead of the received position without any changes in between.
    pub(crate) fn is_idle_ahead(&self) -> bool {
        self.idle.is_some() && !self.assembler.in_transaction()
    }

    /// Turns idle progress into an entry. Call it at most once a second.
    pub(crate) fn advance(&mut self) {
        if self.assembler.in_transaction() {
            return;
        }
        if let Some(idle) = self.idle.take() {
            let _ = self.gap_up_to(idle);
            self.received = self.received.max(idle);
            self.out.push_back(Entry::Progress(idle));
        }
    }

    /// Queues the pending gap if the stream has reached the gap's end. Returns whether it has.
    fn gap_up_to(&mut self, lsn: Lsn) -> bool {
        let Some(pending) = self.pending.take_if(|pending| pending.gap.to <= Position::at(lsn)) else { return false };
        self.received = self.received.max(pending.gap.to.lsn);
        self.out.push_back(Entry::Gap(pending.gap));
        self.out.extend(pending.then);
        true
    }

    /// Checks a repeated transaction against the log. It is the same transaction if the server still has the history of
    /// the log.
    fn check_off(&mut self, transaction: &Transaction) -> Result<(), Error> {
        let known = |(end, xid): &mut (EndLsn, Xid8)| *end == transaction.end && *xid == transaction.header.xid;
        if self.recorded.pop_front_if(known).is_none()
            && self.recorded.front().is_some_and(|(end, _)| *end <= transaction.end)
        {
            return Err(Error::Rewritten { at: transaction.end });
        }
        Ok(())
    }

    /// Checks that no expected transaction ends at or before this LSN, because it would have arrived already.
    fn expect_nothing_before(&self, lsn: Lsn) -> Result<(), Error> {
        match self.recorded.front() {
            Some((end, _)) if end.0 <= lsn => Err(Error::Rewritten { at: *end }),
            _ => Ok(()),
        }
    }

    /// Queues an entry after everything received so far.
    pub(crate) fn record(&mut self, entry: Entry) {
        self.out.push_back(entry);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::assembler::{Limits, OnUndecodable};
    use crate::decode::mapping::{Mapping, Spec};
    use crate::model::lsn::{CommitLsn, CommitTime};
    use crate::model::transaction::GapReason;

    fn receiver(received: u64) -> Receiver {
        let spec: Spec = crate::yaml::from_str(crate::decode::mapping::TUPLES_PRESET).unwrap();
        let limits = Limits { message_bytes: 1 << 20, change_bytes: 4 << 20, stage_bytes: 4 << 20 };
        let assembler = Assembler::new(Arc::new(Mapping::new(spec).unwrap()), limits, OnUndecodable::Gap);
        Receiver::new(assembler, Lsn(received), Xid8(1000))
    }

    fn transaction(receiver: &mut Receiver, commit: u64) {
        let commit = CommitLsn(Lsn(commit));
        receiver.take(Event::Begin { commit, xid: 1001, commit_time: CommitTime(0) }).unwrap();
        receiver.take(Event::KeepAlive { wal_end: Lsn(commit.0.0 + 5) }).unwrap();
        receiver.take(Event::Commit { commit, end: EndLsn(Lsn(commit.0.0 + 10)) }).unwrap();
    }

    fn out(receiver: &mut Receiver) -> Vec<String> {
        std::iter::from_fn(|| receiver.pop())
            .map(|entry| match entry {
                Entry::Transaction(t) => format!("transaction {}", t.end.0.0),
                Entry::Progress(lsn) => format!("progress {}", lsn.0),
                Entry::Gap(gap) => format!("gap {}..{}", gap.from.lsn.0, gap.to.lsn.0),
                Entry::Verified(_) => "verified".into(),
                Entry::Mapping(_) => "mapping".into(),
                other => format!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn received_transactions_are_dropped_the_second_time() {
        let mut receiver = receiver(300);
        transaction(&mut receiver, 280);
        assert!(out(&mut receiver).is_empty());
        // The commit LSN equals the last received end LSN.
        transaction(&mut receiver, 300);
        assert_eq!(out(&mut receiver), ["transaction 310"]);
        assert_eq!(receiver.received(), Lsn(310));
    }

    #[test]
    fn logged_transactions_must_be_sent_again() {
        let check = |recorded: &[(u64, u64)], commits: &[u64], expected: Option<u64>| {
            let mut receiver = receiver(300);
            receiver.expect(recorded.iter().map(|(end, xid)| (EndLsn(Lsn(*end)), Xid8(*xid))).collect());
            let events = commits.iter().flat_map(|commit| {
                let commit = CommitLsn(Lsn(*commit));
                let begin = Event::Begin { commit, xid: 1001, commit_time: CommitTime(0) };
                [begin, Event::Commit { commit, end: EndLsn(Lsn(commit.0.0 + 10)) }]
            });
            let last = Event::KeepAlive { wal_end: Lsn(400) };
            let failed = events.chain([last]).find_map(|event| receiver.take(event).err());
            assert_eq!(failed, expected.map(|at| Error::Rewritten { at: EndLsn(Lsn(at)) }), "{recorded:?} {commits:?}");
        };
        check(&[], &[100, 200], None);
        check(&[(110, 1001), (210, 1001)], &[100, 200, 300], None);
        // A transaction without changes is not in the log.
        check(&[(210, 1001)], &[100, 200], None);
        check(&[(210, 1001)], &[100], Some(210));
        check(&[(210, 1001)], &[100, 300], Some(210));
        check(&[(210, 999)], &[200], Some(210));
        // This transaction ends after the received position.
        check(&[(310, 1001)], &[200], None);
    }

    #[test]
    fn idle_progress_is_made_only_forward_and_outside_transactions() {
        let mut receiver = receiver(300);
        receiver.take(Event::Begin { commit: CommitLsn(Lsn(400)), xid: 1, commit_time: CommitTime(0) }).unwrap();
        receiver.take(Event::KeepAlive { wal_end: Lsn(500) }).unwrap();
        assert!(!receiver.is_idle_ahead());
        receiver.take(Event::Commit { commit: CommitLsn(Lsn(400)), end: EndLsn(Lsn(410)) }).unwrap();
        receiver.take(Event::KeepAlive { wal_end: Lsn(405) }).unwrap();
        assert!(!receiver.is_idle_ahead());
        receiver.take(Event::KeepAlive { wal_end: Lsn(600) }).unwrap();
        assert!(receiver.is_idle_ahead());
        receiver.advance();
        receiver.advance();
        assert_eq!(out(&mut receiver), ["transaction 410", "progress 600"]);
    }

    #[test]
    fn a_gap_precedes_the_first_transaction_after_it() {
        let gap = |from, to| Gap {
            tenant: None,
            from: Position::at(Lsn(from)),
            to: Position::at(Lsn(to)),
            reason: GapReason::MappingChanged,
            writers: Vec::new(),
        };
        let mut receiver = receiver(300);
        receiver.interrupt(gap(250, 420), vec![Entry::Mapping([0; 32])]);
        transaction(&mut receiver, 400);
        transaction(&mut receiver, 420);
        assert_eq!(out(&mut receiver), ["transaction 410", "gap 250..420", "mapping", "transaction 430"]);
        receiver.interrupt(gap(425, 500), vec![]);
        receiver.take(Event::KeepAlive { wal_end: Lsn(490) }).unwrap();
        receiver.advance();
        receiver.take(Event::KeepAlive { wal_end: Lsn(500) }).unwrap();
        receiver.advance();
        assert_eq!(out(&mut receiver), ["progress 490", "gap 425..500", "progress 500"]);
        // The marker itself is the last message of an idle server.
        receiver.interrupt(gap(500, 610), vec![]);
        transaction(&mut receiver, 600);
        assert_eq!(out(&mut receiver), ["gap 500..610"]);
    }
}
