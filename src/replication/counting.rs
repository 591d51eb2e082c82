//! Counts delivered entries: transactions, changes by table, and gaps.
//!
//! The assembler does not count, because it is pure, and because it sees transactions again after a reconnect. A
//! transaction carries the tallies of its rows, and is counted once, as a whole.

use crate::changelog::Entry;
use crate::metrics::{Table, metrics};
use crate::model::transaction::{GapReason, Tally};
use std::sync::Arc;

/// The number of tables whose counters are cached. Beyond it, the cache starts anew.
const TABLES_MAX: usize = 256;

/// The counters of a session.
#[derive(Debug)]
pub(super) struct Counting {
    /// The counters by table name. The assembler shares one name among all tallies of a table. Tables are mostly few.
    tables: Vec<(Arc<str>, Table)>,
}

impl Counting {
    /// Creates counters for these tables. Other tables may follow.
    pub(super) fn new(tables: impl Iterator<Item = String>) -> Self {
        // Initialized at zero, so that `rate()` sees the first increment.
        for code in GapReason::CODES {
            metrics().gaps(code);
        }
        tables.for_each(|table| drop(metrics().table(&table)));
        Self { tables: Vec::new() }
    }

    /// Counts an entry that has reached the log and the hub.
    pub(super) fn count(&mut self, entry: &Entry) {
        match entry {
            Entry::Transaction(transaction) => {
                metrics().transactions.inc();
                for tally in &transaction.tallies {
                    self.count_rows(tally);
                }
                for gap in &transaction.gaps {
                    metrics().gaps(gap.reason.code()).inc();
                }
            }
            Entry::Gap(gap) => metrics().gaps(gap.reason.code()).inc(),
            _ => {}
        }
    }

    fn count_rows(&mut self, tally: &Tally) {
        let table = self.table(&tally.table);
        table.created.inc_by(tally.created);
        table.deleted.inc_by(tally.deleted);
        table.decode_errors.inc_by(tally.undecodable);
    }

    fn table(&mut self, name: &Arc<str>) -> &Table {
        let known = self.tables.iter().position(|(known, _)| Arc::ptr_eq(known, name));
        let at = known.unwrap_or_else(|| {
            if self.tables.len() >= TABLES_MAX {
                self.tables.clear();
            }
            self.tables.push((name.clone(), metrics().table(name)));
            self.tables.len() - 1
        });
        #[expect(clippy::indexing_slicing, reason = "the index was found or added above")]
        &self.tables[at].1
    }
}
