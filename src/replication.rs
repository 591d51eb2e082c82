//! The replication session: from the slot to transactions, and acknowledgements back.
//!
//! ```text
//!   connect ─▶ checks before ─▶ START_REPLICATION ─▶ checks after ─▶ stream ─▶ (lost) ─▶ back off ─▶ connect …
//!              source, history,                       slot not past    │
//!              WAL reaches us                         our log          └▶ receiver ─▶ Sink: change log and hub
//! ```
//!
//! Invariants:
//!
//! - *acknowledged ≤ durable ≤ received*, and further back by the delay of [`ack_delay`]. Until the checks have passed, the session
//!   reports `0/0` to the server, which PostgreSQL takes for "nothing to report".
//! - Idle progress is a log record too, at most one a second, synced before it is acknowledged.
//! - A reconnect within the process continues after the last transaction that was delivered in full, and drops the transactions
//!   that the slot sends again, so that no subscriber gets a change twice.
//! - Every reason for incomplete history is a gap in the stream. The session never silently restarts at the head.
//!
//! Errors are *transient* (back off and reconnect), *definite* (nothing will flow until somebody repairs something: logged
//! once, retried slowly), or *fatal* (the process must end: this log does not belong to this database). See [`Error`].
//!
//! This room does not know the hub. It reads the slot through a contract ([`upstream`]); the connection is [`crate::postgres::connection`].

mod ack_delay;
mod counting;
mod error;
mod gap;
mod gap_log;
mod receiver;
mod session;
pub(crate) mod upstream;

pub(crate) use error::{Definite, Error, Fatal, Transient};
pub(crate) use session::Session;

use crate::changelog::{DiskSpace, Entry, State, recorder::Closed};
use crate::decode::assembler::{Limits, OnUndecodable};
use crate::decode::mapping::Mapping;
use crate::model::diagnostic::CommandLine;
use crate::model::lsn::{EndLsn, Lsn, Xid8};
use crate::postgres::slot::AckDelay;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// What a session reads, and how.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// The slot's name; each tuplewatch has its own.
    pub(crate) slot: String,
    pub(crate) publication: String,
    pub(crate) mapping: Arc<Mapping>,
    /// Sizes of messages and of what is held in memory.
    pub(crate) limits: Limits,
    /// What to do with rows that do not decode.
    pub(crate) on_undecodable: OnUndecodable,
    /// How late the slot is acknowledged.
    pub(crate) ack_delay: AckDelay,
    /// How messages write commands.
    pub(crate) commands: CommandLine,
    /// Whether the slot is to be one that standbys keep a copy of, where PostgreSQL can (17).
    pub(crate) failover: bool,
    /// SQL connections that this process may have, those of Data and Tenancy included.
    pub(crate) connections_max: usize,
}

/// The sink for received entries: the change log and the hub, joined by `app`.
pub(crate) trait Sink: Send + Sync {
    /// Takes one entry, in stream order. Waits while there is no room for it. After a cancelled call, the entry may or may not
    /// have reached the log, and has not reached a subscriber.
    fn deliver(&self, entry: Entry) -> impl Future<Output = Result<(), Closed>> + Send;

    /// The state of the log, once everything that was delivered is durable.
    fn checkpoint(&self) -> impl Future<Output = Result<State, Closed>> + Send;

    /// End LSN and id of the transactions with changes that are in the log and committed at or after `from`, in stream order.
    fn recorded_since(&self, from: Lsn) -> impl Future<Output = Result<Vec<(EndLsn, Xid8)>, Error>> + Send;

    /// The end LSN up to which the log survives a crash.
    fn durable(&self) -> watch::Receiver<Lsn>;

    /// Whether the log's disk has room.
    fn room(&self) -> watch::Receiver<DiskSpace>;
}

/// The state of the session, for health, logs and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Connecting,
    Streaming,
    /// The last session failed for a reason that may pass. The log has it.
    Retrying,
    /// The last session failed for a reason that somebody has to repair. The log has it.
    Failed,
}

/// Waits between attempts: growing, with jitter so that many processes do not come back as one.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    const MIN: Duration = Duration::from_millis(100);
    const MAX: Duration = Duration::from_secs(10);
    /// A repair takes longer than seconds.
    const DEFINITE: Duration = Duration::from_secs(15);

    /// How long to wait after an attempt that failed.
    pub(crate) fn after(&mut self, error: &Error) -> Duration {
        let base = match error {
            Error::Definite(_) => Self::DEFINITE,
            _ => Self::MAX.min(Self::MIN * 2u32.saturating_pow(self.failures.min(10))),
        };
        self.failures = self.failures.saturating_add(1);
        base.mul_f64(0.8 + 0.4 * fastrand::f64())
    }

    /// Starts anew after an attempt that succeeded.
    pub(crate) const fn reset(&mut self) {
        self.failures = 0;
    }
}
