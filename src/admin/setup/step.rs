//! What there is to do, as SQL.

use std::fmt;

use crate::postgres::catalog::literal;
use crate::postgres::publication::LOOK_AT_ONCE;
use crate::postgres::slot;
use crate::postgres::transactions::{Locks, Watched};

/// For a table's lock. Ordinary transactions are over by then, and writers can bear to wait as long.
pub(super) const LOCK_TIMEOUT_SECONDS: u64 = 5;

/// Something to do, or done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What it does, as an order: "create publication …".
    pub explanation: String,
    /// How.
    pub sql: String,
    pub(super) kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Part of the one transaction, and waits for nobody.
    Definition,
    /// Part of it too, and waits for readers and writers of these tables.
    Alteration(Watched),
    /// Part of it too, and waits for writers of these tables.
    Addition(Watched),
    /// By itself, once the transaction has committed.
    Alone,
    /// The same; the slot is created.
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

    /// Not part of the transaction: whoever hears of that one must already see what it did.
    pub(super) fn look_at_once() -> Self {
        Self::new("have a running tuplewatch look at it", LOOK_AT_ONCE.to_owned(), Kind::Alone)
    }

    /// Whether it is part of the transaction. Slots do not take part in any.
    pub const fn is_transactional(&self) -> bool {
        !matches!(self.kind, Kind::Alone | Kind::Slot { .. })
    }

    /// The tables that it locks, and the locks for which that waits.
    pub(super) fn waits_for(&self) -> Option<(&Watched, Locks)> {
        match &self.kind {
            Kind::Alteration(tables) => Some((tables, Locks::All)),
            Kind::Addition(tables) => Some((tables, Locks::NotReading)),
            Kind::Definition | Kind::Alone | Kind::Slot { .. } => None,
        }
    }
}

/// Begins the transaction, also where sessions are read only by default.
pub(super) fn begin() -> String {
    format!("BEGIN READ WRITE;\nSET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s';")
}

/// Steps as SQL with comments, to be pasted into psql.
#[derive(Clone, Copy, Debug)]
pub struct Script<'a>(pub &'a [Step]);

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
