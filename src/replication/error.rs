//! The errors that end a session, in classes that decide the reaction: back off, wait for a repair, or end the process.
//!
//! In doubt an error is transient. A definite error names its remedy, because an operator reads it. A fatal error means
//! that this log must not follow this database.

use super::receiver;
use crate::changelog::{self, recorder::Closed};
use crate::model::diagnostic::Diagnostic;
use crate::model::lsn::{Lsn, ParseLsnError, ParseSnapshotError};
use crate::model::timeline::{ParseHistoryError, Source};
use crate::postgres::connection::{ConnectError, SessionEnd, SqlError, WalsenderError};
use std::time::Duration;

/// The error that ended a session.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A temporary error: back off and reconnect.
    #[error(transparent)]
    Transient(#[from] Transient),
    /// An error that lasts until somebody repairs it.
    #[error(transparent)]
    Definite(#[from] Definite),
    /// An error after which the process must end.
    #[error(transparent)]
    Fatal(#[from] Fatal),
}

/// An error that may resolve itself.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Transient {
    #[error(transparent)]
    Connect(ConnectError),
    #[error(transparent)]
    Replication(WalsenderError),
    #[error(transparent)]
    Sql(#[from] SqlError),
    #[error(transparent)]
    SqlSession(SessionEnd),
    #[error("the server did not answer within {} s", .0.as_secs())]
    NoAnswer(Duration),
    #[error("replication did not start within {} s", .0.as_secs())]
    NotStarted(Duration),
    #[error("the two connections lead to different servers")]
    TwoServers,
    #[error("the answer to pg_backend_pid() has no process id")]
    NoPid,
    #[error("replication slot {slot} is active for PID {pid}")]
    SlotInUse { slot: String, pid: i32 },
    #[error("replication slot {slot} was held by a connection that this node left behind, which has been ended")]
    SlotLeftBehind { slot: String },
    #[error("slot {slot} came into use while it was to be altered")]
    SlotTaken { slot: String },
    #[error("slot {slot} has just disappeared")]
    SlotDropped { slot: String },
    #[error("the server no longer has our walsender: the replication connection is lost")]
    WalsenderGone,
    #[error("the disk of the change log is full: the session is closed until it has room")]
    DiskFull,
    #[error("the directory of the change log is gone: the session is closed until it is back")]
    LogGone,
    #[error(transparent)]
    Log(#[from] changelog::Error),
}

/// An error that lasts until somebody repairs it. Each message contains the remedy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Definite {
    #[error(transparent)]
    Connect(ConnectError),
    #[error(transparent)]
    Replication(WalsenderError),
    #[error(transparent)]
    Stream(#[from] receiver::Error),
    /// PostgreSQL does not meet the requirements.
    #[error("{}", lines(.0))]
    Unfit(Vec<Diagnostic>),
    #[error(
        "publication {publication} does not exist. The slot is older than a new one would be: run {recreate_slot}; the changes \
         since the publication was dropped are lost, and subscribers receive a gap"
    )]
    NoPublication { publication: String, recreate_slot: String },
    #[error(
        "{source}. The slot reads from before the publication was created: run {recreate_slot}; the changes in between are \
         lost, and subscribers receive a gap"
    )]
    YoungPublication { source: WalsenderError, recreate_slot: String },
    #[error(
        "the server is on timeline {server}, and was left behind when the change log followed a promotion to timeline {log}: it \
         is an old primary, or its storage was rolled back. Point database.uri at the present primary, or start the log anew \
         with --reset-log"
    )]
    LeftBehind { server: u32, log: u32 },
    #[error(
        "the server's WAL ends at {server_end}, before what the change log has ({log_end}), on the same timeline: its storage was \
         rolled back, and the log holds changes that never happened there. Before anybody writes to the server, have it begin a \
         new timeline (recovery.signal, restore_command = 'false', and a restart). Or start the log anew with --reset-log, and \
         have every subscriber drop its token"
    )]
    RolledBack { server_end: Lsn, log_end: Lsn },
    #[error("slot {slot} has no confirmed position")]
    NoPosition { slot: String },
    #[error(transparent)]
    Lsn(#[from] ParseLsnError),
    #[error(transparent)]
    Snapshot(#[from] ParseSnapshotError),
    #[error(transparent)]
    History(#[from] ParseHistoryError),
}

fn lines(diagnostics: &[Diagnostic]) -> String {
    diagnostics.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// An error after which the process must end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fatal {
    /// The log was written from another database.
    #[error(
        "the change log belongs to another database ({recorded}) than database.uri leads to ({found}): \
         point database.uri at the right one, set changelog.path to another directory, or start the log anew with --reset-log"
    )]
    ForeignSource {
        /// The database of the log.
        recorded: Source,
        /// The database of database.uri.
        found: Source,
    },
    /// The change log accepts no more entries.
    #[error(transparent)]
    Log(#[from] Closed),
}

impl From<Closed> for Error {
    fn from(closed: Closed) -> Self {
        Self::Fatal(closed.into())
    }
}

impl From<ConnectError> for Error {
    fn from(error: ConnectError) -> Self {
        if error.is_definite() { Definite::Connect(error).into() } else { Transient::Connect(error).into() }
    }
}

impl From<WalsenderError> for Error {
    fn from(error: WalsenderError) -> Self {
        if error.is_definite() { Definite::Replication(error).into() } else { Transient::Replication(error).into() }
    }
}
