//! The steps of `setup` and `teardown`, as SQL.

use std::fmt;

use crate::postgres::catalog::literal;
use crate::postgres::publication::LOOK_AT_ONCE;
use crate::postgres::slot;
use crate::postgres::transactions::{Locks, Watched};

/// The longest wait for the lock of a table. Ordinary transactions end sooner, and writers can tolerate the wait.
pub(super) const LOCK_TIMEOUT_SECONDS: u64 = 5;

/// A step to do, or a step that was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// Its effect in the imperative: "create publication …".
    pub explanation: String,
    pub sql: String,
    pub(super) kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Part of the transaction. Waits for no lock.
    Definition,
    /// Part of the transaction. Waits for readers and writers of these tables.
    Alteration(Watched),
    /// Part of the transaction. Waits for writers of these tables.
    Addition(Watched),
    /// Runs alone, after the transaction has committed.
    Alone,
    /// Runs alone, and creates the slot.
    Slot { failover: bool },
}

impl Step {
    pub(super) fn new(explanation: impl Into<String>, sql: String, kind: Kind) -> Self {
        Self { explanation: explanation.into(), sql, kind }
    }

    pub(super) fn drop_slot(slot: &str) -> Self {
        let sql = format!("SELECT pg_drop_replication_slot({});", literal(slot));
        Self::new(format!("drop replication slot {slot}"), sql, Kind::Alone)
    }

    pub(super) fn create_slot(slot: &str, failover: bool) -> Self {
        let sql = format!("SELECT {};", slot::creation(&literal(slot), failover));
        Self::new(format!("create replication slot {slot}"), sql, Kind::Slot { failover })
    }

    /// Runs after the transaction, whose effects must be visible to the notified tuplewatch.
    pub(super) fn look_at_once() -> Self {
        Self::new("notify a running tuplewatch", LOOK_AT_ONCE.to_owned(), Kind::Alone)
    }

    /// Whether the step is part of the transaction. Slots cannot be.
    pub(crate) const fn is_transactional(&self) -> bool {
        !matches!(self.kind, Kind::Alone | Kind::Slot { .. })
    }

    /// The tables that the step locks, and the locks of other transactions that it waits for.
    pub(super) fn waits_for(&self) -> Option<(&Watched, Locks)> {
        match &self.kind {
            Kind::Alteration(tables) => Some((tables, Locks::All)),
            Kind::Addition(tables) => Some((tables, Locks::NotReading)),
            Kind::Definition | Kind::Alone | Kind::Slot { .. } => None,
        }
    }
}

/// Begins the transaction, also in sessions that are read only by default.
pub(super) fn begin() -> String {
    format!("BEGIN READ WRITE;\nSET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s';")
}

/// The steps as SQL with comments, for pasting into psql.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Script<'a>(pub &'a [Step]);

impl fmt::Display for Script<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut steps = self.0.iter().peekable();
        let mut is_open = false;
        while let Some(step) = steps.next() {
            if step.is_transactional() && !std::mem::replace(&mut is_open, true) {
                writeln!(f, "{}\n", begin())?;
            }
            writeln!(f, "-- {}\n{}\n", step.explanation, step.sql.trim_end())?;
            if is_open && steps.peek().is_none_or(|next| !next.is_transactional()) {
                is_open = false;
                writeln!(f, "COMMIT;\n")?;
            }
        }
        Ok(())
    }
}
