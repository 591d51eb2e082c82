//! The next action of a reader: which messages it takes from memory, or why it takes none.

use super::Window;
use crate::hub::Item;
use crate::hub::feeds::ReaderKey;
use crate::model::lsn::{CommitLsn, Lsn, Position};
use crate::model::scope::{Place, Scope};
use crate::model::transaction::Gap;
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;

/// The next action of a reader.
pub(in crate::hub) enum Next {
    /// Take the messages that were added. They are whole: the first may begin before the reader's place. If they are `all`, there is
    /// nothing else for now: wait to be woken, as with `Wait`.
    Messages { all: bool },
    /// Read the log up to here: memory begins `behind` the reader, or lacks a transaction that was too large for it.
    Disk { up_to: Place, behind: bool },
    /// The scope has nothing up to here: move there.
    Skip { to: Place },
    /// An abandoned part of history, which had nothing for the scope, was passed: move back to here.
    Back { to: Lsn },
    /// Wait to be woken: see [`Window::wait`].
    Wait,
    /// History is not continuous here.
    Gap(Gap),
    /// The server abandoned everything past here, and the reader has something of it.
    Abandoned { at: Lsn },
    /// The window was closed.
    Closed,
}

impl Window {
    /// The next action for a reader at `cursor` whose state is at most `seen`. `checked` counts the divergences that it knows of.
    pub(in crate::hub) fn next(
        &mut self,
        key: ReaderKey,
        cursor: &Place,
        seen: Position,
        checked: &mut usize,
        bytes_max: usize,
        messages: &mut VecDeque<Arc<Item>>,
    ) -> Next {
        if self.closed {
            return Next::Closed;
        }
        self.feeds.asks(key, cursor.position.lsn);
        let mut back = None;
        for at in self.divergences.iter().skip(*checked) {
            if seen > Position::at(*at) {
                return Next::Abandoned { at: *at };
            }
            if cursor.outer() > Position::at(*at) {
                back = Some(back.map_or(*at, |back: Lsn| back.min(*at)));
            }
        }
        *checked = self.divergences.len();
        if let Some(to) = back {
            return Next::Back { to };
        }

        let feed = self.feeds.read_by(key);
        let gap = self.gap_ahead(&feed.scope, cursor);
        let limit = match gap {
            Some(gap) if gap.is_due(&feed.scope, cursor) => return Next::Gap(self.whole(gap).clone()),
            Some(gap) => gap.begins(&feed.scope, cursor),
            None if cursor.outer() >= Position::at(self.released) => return Next::Wait,
            None => Place::at(self.released),
        };
        // In the feed of all tenants everything after the window's floor is in memory, except holes.
        let floor = if feed.scope == Scope::All { feed.floor.max(self.floor) } else { feed.floor };
        if floor > cursor.outer() {
            return Next::Disk { up_to: limit, behind: true };
        }
        // The first transaction that is partly in the log only: nothing behind it may be taken from memory before it.
        let passed = self.holes.partition_point(|(_, end)| Position::after(*end) <= cursor.outer());
        let hole = self.holes.get(passed).filter(|(commit, _)| Position::at(commit.0) < limit.outer());

        let found = messages.len();
        let mut taking = Taking {
            limit: &limit,
            hole: hole.map(|(commit, _)| *commit),
            bytes_left: bytes_max.max(1),
            all: gap.is_none() && hole.is_none(),
            messages,
        };
        if feed.scope == Scope::All {
            let items = self.items_from(cursor);
            let _ = items
                .filter(|item| item.message.order() > cursor.of(&item.tenant))
                .try_for_each(|item| taking.offer(item));
        } else {
            let mut items = feed.messages.range(feed.first_after(cursor.position)..);
            let _ = items.try_for_each(|item| taking.offer(item));
        }
        let all = taking.all;
        match (messages.len() == found, hole) {
            (false, _) => Next::Messages { all },
            (true, Some((_, end))) if limit.outer() >= Position::after(*end) => {
                Next::Disk { up_to: Place::after(*end), behind: false }
            }
            (true, Some(_)) => Next::Disk { up_to: limit, behind: false },
            (true, None) => Next::Skip { to: limit },
        }
    }

    /// The items of all tenants from `cursor` on. The first ones may be before it.
    fn items_from(&self, cursor: &Place) -> impl Iterator<Item = &Arc<Item>> {
        let first = self.entries.partition_point(|entry| entry.commit.0 < cursor.position.lsn);
        let begun = self.entries.get(first).filter(|entry| entry.commit.0 == cursor.position.lsn);
        let begun = begun.map_or(&[][..], |entry| entry.items.as_slice());
        let passed =
            cursor.within.as_ref().map_or(0, |(tenant, _)| begun.partition_point(|item| item.tenant < *tenant));
        let rest = self.entries.range(first + usize::from(!begun.is_empty())..).flat_map(|entry| &entry.items);
        begun.iter().skip(passed).chain(rest)
    }

    /// The next gap that a reader at `cursor` has to report, and that is released.
    fn gap_ahead(&self, scope: &Scope, cursor: &Place) -> Option<&Gap> {
        let released = Position::at(self.released);
        // Gaps that end at or before the place are passed. Few gaps lie ahead.
        let passed = self.gaps.partition_point(|gap| gap.to <= cursor.outer());
        let ahead = self.gaps.iter().skip(passed).take_while(|gap| gap.to <= released);
        let mut ahead = ahead.filter(|gap| gap.concerns(scope) && !gap.is_passed(scope, cursor));
        let first = ahead.next()?;
        if *scope != Scope::All {
            return Some(first);
        }
        // Inside a transaction they come in the order of the tenants, and then that of all.
        let order = |gap: &&Gap| (gap.tenant.is_none(), gap.tenant.clone());
        ahead.take_while(|gap| gap.to == first.to).chain([first]).min_by_key(order)
    }

    /// The gap to report: for an open one the later gap that covers it, once that is released.
    fn whole<'a>(&'a self, gap: &'a Gap) -> &'a Gap {
        let released = |later: &&Gap| later.to <= Position::at(self.released);
        self.gaps.iter().rev().filter(released).find(|later| gap.is_open() && later.covers(gap)).unwrap_or(gap)
    }
}

/// Takes messages for a reader, in stream order.
struct Taking<'a> {
    limit: &'a Place,
    /// The commit LSN of a transaction that memory does not have. Nothing behind it may be taken before it.
    hole: Option<CommitLsn>,
    bytes_left: usize,
    /// Whether there is nothing else for now.
    all: bool,
    messages: &'a mut VecDeque<Arc<Item>>,
}

impl Taking<'_> {
    /// Takes the message, or breaks in front of it.
    fn offer(&mut self, item: &Arc<Item>) -> ControlFlow<()> {
        let message = &item.message;
        let is_within = message.is_before(self.limit.of(&item.tenant));
        if self.bytes_left == 0 || !is_within || self.hole.is_some_and(|hole| message.header.commit >= hole) {
            // The reader is woken for a message that is not released yet, so it need not look again.
            self.all &= !is_within;
            return ControlFlow::Break(());
        }
        self.bytes_left = self.bytes_left.saturating_sub(message.changes.len().max(1));
        self.messages.push_back(item.clone());
        ControlFlow::Continue(())
    }
}
