//! The replication session: it reads transactions from the slot, delivers them, and acknowledges them when they are
//! durable.
//!
//! ```text
//!   connect ─▶ checks before ─▶ START_REPLICATION ─▶ checks after ─▶ stream ─▶ (lost) ─▶ back off ─▶ connect …
//!              source, history,                       slot not past    │
//!              WAL reaches us                         our log          └▶ receiver ─▶ Sink: change log and hub
//! ```
//!
//! Invariants:
//!
//! - *acknowledged ≤ durable ≤ received*, and further back by the delay of [`ack_delay`]. Until the checks have passed,
//!   the session reports `0/0` to the server, which PostgreSQL reads as "nothing to report".
//! - Idle progress is also a log record, at most one a second, and synced before it is acknowledged.
//! - A reconnect within the process continues after the last transaction that was delivered in full. It drops the
//!   transactions that the slot sends again, so no subscriber receives a change twice.
//! - Every reason for incomplete history is a gap in the stream. The session never silently restarts at the head.
//!
//! Errors are *transient* (back off and reconnect), *definite* (nothing arrives until somebody repairs something:
//! logged once, retried slowly), or *fatal* (the process must end: this log does not belong to this database). See
//! [`Error`].
//!
//! This room does not know the hub. It reads the slot through a contract ([`upstream`]), which [`upstream::walsender`]
//! implements with [`crate::postgres::connection`].

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

/// The options of a session.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// The name of the slot. Each tuplewatch has its own slot.
    pub(crate) slot: String,
    pub(crate) publication: String,
    pub(crate) mapping: Arc<Mapping>,
    /// The limits of messages, and of data in memory.
    pub(crate) limits: Limits,
    /// The treatment of rows that cannot be decoded.
    pub(crate) on_undecodable: OnUndecodable,
    /// The delay of acknowledgements.
    pub(crate) ack_delay: AckDelay,
    /// The form of commands in messages.
    pub(crate) commands: CommandLine,
    /// Whether standbys should keep a copy of the slot, if PostgreSQL supports it (from 17 on).
    pub(crate) failover: bool,
    /// The most SQL connections of this process, including those of Data and Tenancy.
    pub(crate) connections_max: usize,
}

/// The sink for received entries: the change log and the hub, joined by `app`.
pub(crate) trait Sink: Send + Sync {
    /// Delivers one entry, in stream order. Waits while there is no room for it. After a cancelled call the entry may
    /// have reached the log, but no subscriber.
    fn deliver(&self, entry: Entry) -> impl Future<Output = Result<(), Closed>> + Send;

    /// Waits until all delivered entries are durable, and returns the state of the log.
    fn checkpoint(&self) -> impl Future<Output = Result<State, Closed>> + Send;

    /// Returns end LSN and id of the transactions with changes in the log that committed at or after `from`, in stream
    /// order.
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
    /// The last session failed for a temporary reason, which was logged.
    Retrying,
    /// The last session failed for a reason that somebody has to repair, which was logged.
    Failed,
}

/// The waits between attempts. They grow, and have jitter so that many processes do not reconnect together.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    const MIN: Duration = Duration::from_millis(100);
    const MAX: Duration = Duration::from_secs(10);
    /// A repair takes longer than seconds.
    const DEFINITE: Duration = Duration::from_secs(15);

    /// Returns the wait after a failed attempt.
    pub(crate) fn after(&mut self, error: &Error) -> Duration {
        let base = match error {
            Error::Definite(_) => Self::DEFINITE,
            _ => Self::MAX.min(Self::MIN * 2u32.saturating_pow(self.failures.min(10))),
        };
        self.failures = self.failures.saturating_add(1);
        base.mul_f64(0.8 + 0.4 * fastrand::f64())
    }

    /// Starts anew after a successful attempt.
    pub(crate) const fn reset(&mut self) {
        self.failures = 0;
    }
}
