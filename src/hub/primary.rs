//! What the hub asks the primary, as a contract: `app` answers with SQL, and tests with a script.

use crate::model::lsn::{Lsn, Snapshot, Xid8};
use crate::model::scope::Scope;
use std::sync::Arc;

/// What the primary says, in one statement.
#[derive(Clone, Debug)]
pub struct PrimaryState {
    /// `pg_current_wal_flush_lsn()`.
    pub flush_lsn: Lsn,
    /// `pg_current_snapshot()`, taken before `flush_lsn` was read.
    pub snapshot: Arc<Snapshot>,
    /// Whether the scope exists that was asked for. That of all tenants does.
    pub scope_exists: bool,
}

/// What became of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransactionStatus {
    /// It runs.
    InProgress,
    /// It is over, or so old that nobody knows.
    Over,
    /// Its id was not handed out yet.
    Unassigned,
}

/// PostgreSQL does not answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unreachable(pub String);

/// What the start of a subscription may ask the primary.
pub trait Primary: Send + Sync {
    /// Positions, a snapshot, and whether the scope exists; as of a moment after the call.
    fn look(&self, scope: &Scope) -> impl Future<Output = Result<PrimaryState, Unreachable>> + Send;

    /// `pg_xact_status`.
    fn transaction_status(&self, xid: Xid8) -> impl Future<Output = Result<TransactionStatus, Unreachable>> + Send;

    /// Writes a transaction that everything committed before the call precedes in the stream; a position that it follows.
    fn mark(&self) -> impl Future<Output = Result<Lsn, Unreachable>> + Send;
}
