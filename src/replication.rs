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
//! - *acknowledged ≤ durable ≤ received*, and further back by the delay of [`ack_delay`]. The server is told `0/0`, which PostgreSQL
//!   takes for "nothing to report", until the checks have passed.
//! - Idle progress is a log record too, at most one a second, synced before it is acknowledged.
//! - A reconnect within the process goes on behind the last transaction that was handed on whole, and drops what comes
//!   again, so that nobody is sent anything twice.
//! - Whatever makes history incomplete is a gap in the stream. The session never silently restarts at the head.
//!
//! Errors are *transient* (back off and reconnect), *definite* (nothing will flow until somebody repairs something: said
//! once, retried slowly), or *fatal* (the process must end: this log does not belong to this database).
//!
//! This room does not know the hub. It reads the slot through a contract ([`upstream`]); the connection is [`crate::postgres::connection`].

mod ack_delay;
mod counting;
mod gap;
mod gap_log;
mod receiver;
mod session;
pub mod upstream;

pub use receiver::Receiver;
pub use session::Session;

use crate::changelog::{DiskSpace, Entry, State, recorder::Closed};
use crate::decode::assembler::{Limits, OnUndecodable};
use crate::decode::mapping::Mapping;
use crate::model::diagnostic::CommandLine;
use crate::model::lsn::{EndLsn, Lsn, Xid8};
use crate::model::timeline::Source;
use crate::postgres::slot::AckDelay;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// What a session needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// The slot; one per tuplewatch.
    pub slot: String,
    /// The publication.
    pub publication: String,
    /// Rows → changes.
    pub mapping: Arc<Mapping>,
    /// Sizes of messages and of what is held in memory.
    pub limits: Limits,
    /// What to do with rows that do not decode.
    pub on_undecodable: OnUndecodable,
    /// What the slot is not told of yet.
    pub ack_delay: AckDelay,
    /// How messages write commands.
    pub commands: CommandLine,
    /// Whether the slot is to be one that standbys keep a copy of, where PostgreSQL can (17).
    pub failover: bool,
    /// SQL connections that this process may have, those of Data and Tenancy included.
    pub connections_max: usize,
}

/// Where what a session receives goes: the change log and the hub, joined by `app`.
pub trait Sink: Send + Sync {
    /// Hands on one entry, in stream order. Waits while there is no room for it. When it is cancelled, the entry may or may
    /// not have reached the log, and has not reached a subscriber.
    fn deliver(&self, entry: Entry) -> impl Future<Output = Result<(), Closed>> + Send;

    /// The state of the log, once all that was delivered is durable.
    fn checkpoint(&self) -> impl Future<Output = Result<State, Closed>> + Send;

    /// End LSN and id of the transactions with changes that are in the log and committed at or after `from`, in stream order.
    fn recorded_since(&self, from: Lsn) -> impl Future<Output = Result<Vec<(EndLsn, Xid8)>, Error>> + Send;

    /// Up to which end LSN the log survives a crash.
    fn durable(&self) -> watch::Receiver<Lsn>;

    /// Whether the log's disk has room.
    fn room(&self) -> watch::Receiver<DiskSpace>;
}

/// What the session is doing, for health, logs and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// On the way.
    Connecting,
    /// The slot streams.
    Streaming,
    /// Something is wrong that may pass.
    Retrying(String),
    /// Something is wrong that somebody has to repair.
    Failed(String),
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It may pass: back off and reconnect.
    #[error("{0}")]
    Transient(String),
    /// It lasts until somebody repairs it.
    #[error("{0}")]
    Definite(String),
    /// The process must end.
    #[error(transparent)]
    Fatal(#[from] Fatal),
}

/// Why the process must end.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// The log was written from another database.
    #[error(
        "the change log belongs to another database ({recorded}) than database.uri leads to ({found}): \
         point database.uri at the right one, set changelog.path to another directory, or start the log anew with --reset-log"
    )]
    ForeignSource {
        /// Whose log it is.
        recorded: Source,
        /// Where we are connected.
        found: Source,
    },
    /// The change log does not take any more.
    #[error(transparent)]
    Log(#[from] Closed),
}

impl From<Closed> for Error {
    fn from(closed: Closed) -> Self {
        Self::Fatal(Fatal::Log(closed))
    }
}

impl Error {
    fn transient(what: impl fmt::Display) -> Self {
        Self::Transient(what.to_string())
    }

    fn definite(what: impl fmt::Display) -> Self {
        Self::Definite(what.to_string())
    }
}

/// Waits between attempts: growing, with jitter so that many processes do not come back as one.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    const MIN: Duration = Duration::from_millis(100);
    const MAX: Duration = Duration::from_secs(10);
    /// Nothing changes within seconds where somebody has to repair something.
    const DEFINITE: Duration = Duration::from_secs(15);

    /// After an attempt that failed; how long to wait before the next.
    pub fn after(&mut self, error: &Error) -> Duration {
        let base = match error {
            Error::Definite(_) => Self::DEFINITE,
            _ => Self::MAX.min(Self::MIN * 2u32.saturating_pow(self.failures.min(10))),
        };
        self.failures = self.failures.saturating_add(1);
        base.mul_f64(0.8 + 0.4 * fastrand::f64())
    }

    /// After an attempt that worked.
    pub const fn reset(&mut self) {
        self.failures = 0;
    }
}
