//! The questions of the hub to the primary, as a contract: `app` answers with SQL, and tests with a script.

use crate::model::lsn::{Lsn, Snapshot, Xid8};
use crate::model::scope::{Place, Scope};
use std::error::Error;
use std::sync::Arc;

/// The state of the primary, from one statement.
#[derive(Clone, Debug)]
pub struct PrimaryState {
    /// `pg_current_wal_flush_lsn()`.
    pub flush_lsn: Lsn,
    /// `pg_current_snapshot()`, taken before `flush_lsn` was read.
    pub snapshot: Arc<Snapshot>,
    /// Whether the requested scope exists. That of all tenants always does.
    pub scope_exists: bool,
}

/// The state of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransactionStatus {
    /// It is still running.
    InProgress,
    /// It has ended, or is so old that PostgreSQL no longer knows.
    Over,
    /// Its id was not handed out yet.
    Unassigned,
}

/// Why an answer that depends on the primary cannot be given now. Callers get the text: it names no host and no role.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Unreachable {
    /// PostgreSQL was not reached yet, or is not read for want of room on the disk.
    #[error("no session with PostgreSQL was established yet: the log of tuplewatch says why")]
    NoSession,
    /// The stream did not get that far in time.
    #[error("the stream did not reach {0} in time, try again")]
    Behind(Place),
    /// The primary was asked and did not answer.
    #[error(transparent)]
    Unanswered(Arc<dyn Error + Send + Sync>),
}

impl Unreachable {
    /// For an answer that failed with `cause`.
    pub fn unanswered(cause: impl Error + Send + Sync + 'static) -> Self {
        Self::Unanswered(Arc::new(cause))
    }
}

/// The questions that the start of a subscription needs answered.
pub trait Primary: Send + Sync {
    /// Positions, a snapshot, and whether the scope exists; as of a moment after the call.
    fn look(&self, scope: &Scope) -> impl Future<Output = Result<PrimaryState, Unreachable>> + Send;

    /// `pg_xact_status`.
    fn transaction_status(&self, xid: Xid8) -> impl Future<Output = Result<TransactionStatus, Unreachable>> + Send;

    /// Writes a transaction that everything committed before the call precedes in the stream; a position that it follows.
    fn mark(&self) -> impl Future<Output = Result<Lsn, Unreachable>> + Send;
}
