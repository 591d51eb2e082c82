//! The change log: a durable, bounded copy of the stream that subscribers can replay.
//!
//! ```text
//!        horizon(scope)                     tail
//!  ┄┄┄┄┄┄┄┄┄┄┤ readable, by tenant           │ staged, not yet readable
//!   dropped  ├──────────────┬───────┬────────┼──────────────┐
//!            │ segment n    │ n+1   │ active │              │
//!            └──────────────┴───────┴────────┴──────────────┘
//! ```
//!
//! [`ChangeLog`] is the contract, and [`LocalLog`] implements it on local disk. The contract:
//!
//! - [`ChangeLog::append`] takes entries in stream order and applies each atomically. An entry is *durable* once a
//!   later [`ChangeLog::sync`] has returned. After a crash the log is a prefix of the appended entries, and contains at
//!   least all durable ones.
//! - Messages of an [`Entry::Staged`] become readable with the [`Entry::Transaction`] of their transaction.
//!   [`Entry::Discard`] removes them, and so does opening the log.
//! - A transaction that ends at or before the tail is already in the log, and is ignored.
//! - [`ChangeLog::read`] returns the messages of one tenant or of all tenants, in the order of that stream ([`Scope`]).
//!   Its cost is proportional to the messages that it returns.
//! - Retention has dropped messages of a scope only below the [`ChangeLog::horizon`] of that scope. A quiet tenant
//!   keeps its old horizon, however old its last change is.
//! - The log finds a transaction with changes by its id while the transaction is in the log. It remembers the ids of
//!   abandoned transactions.
//! - A gap stays in the log when the messages around it are dropped.
//! - A failed write or sync poisons the log: every later call fails, and the process must end.
//!
//! PostgreSQL is the source of truth: losing this log costs history, not correctness. One thread writes the log
//! ([`Recorder`](recorder::Recorder)), and many threads read it.

pub(crate) mod examination;
mod local;
pub(crate) mod recorder;

#[cfg(test)]
mod conformance;
#[cfg(test)]
pub(crate) mod reference;

pub use local::{LocalLog, Options};

use crate::decode::assembler::Staged;
use crate::model::change::TenantId;
use crate::model::lsn::{CommitLsn, EndLsn, Lsn, Position, Xid8};
use crate::model::scope::{Place, Scope};
use crate::model::snap_token::TokenId;
use crate::model::timeline::{History, Source};
use crate::model::transaction::{Gap, TenantMessage, Transaction};
use std::path::PathBuf;
use std::sync::Arc;

/// The maximum number of gaps in the log. Beyond it the oldest closed gap is dropped, and tokens from before that gap
/// are refused.
pub const GAPS_MAX: usize = 10_000;

/// An entry to append.
#[derive(Clone, Debug)]
pub enum Entry {
    /// The log begins with this source and history, and is complete from `lsn` on.
    Adopt(Origin),
    /// Messages of a transaction that has not ended.
    Staged(Arc<Staged>),
    /// The open transaction will not end, because the session has ended.
    Discard,
    /// A whole transaction, without the messages that were staged before.
    Transaction(Arc<Transaction>),
    /// The stream contains nothing for us up to this LSN.
    Progress(Lsn),
    /// A gap outside of transactions. The tail moves to the end of the gap.
    Gap(Gap),
    /// The server continues on another history. Everything after `at` is abandoned.
    Diverge {
        /// The switch LSN.
        at: Lsn,
        /// The new history.
        history: History,
    },
    /// The result of a check of the mapped tables and the publication.
    Verified(Verified),
    /// The fingerprint of the mapping that applies from the tail on.
    Mapping([u8; 32]),
    /// Every new snapshot of PostgreSQL sees everything up to this LSN.
    Watermark(Lsn),
}

/// The beginning of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The database.
    pub source: Source,
    /// The history of the database at that time.
    pub history: History,
    /// The log contains every transaction that commits at or after this LSN.
    pub lsn: Lsn,
    /// Every transaction that committed before `lsn` has a smaller id.
    pub xid: Xid8,
}

/// The result of a check of the mapped tables and the publication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The fingerprint of the checked definitions.
    pub fingerprint: String,
    /// All WAL before this LSN was written under these definitions.
    pub at: Lsn,
}

/// The state of the log, without its messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The id of this log directory, created with the directory.
    pub node_id: String,
    /// `None` until [`Entry::Adopt`].
    pub origin: Option<Origin>,
    /// The end of the log: everything before this LSN was appended. It advances also while the stream is idle.
    pub tail: Lsn,
    /// The most recent check.
    pub verified: Option<Verified>,
    /// The fingerprint of the mapping that applies at the tail.
    pub mapping: Option<[u8; 32]>,
    /// The most recently recorded watermark, at most the tail.
    pub watermark: Lsn,
    /// The open gap, if there is one: see [`Gap::writers`].
    pub open_gap: Option<Gap>,
}

/// The result of [`ChangeLog::read`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The messages in stream order. The first may begin inside a message.
    pub messages: Vec<TenantMessage>,
    /// Whether the byte limit ended the read, so that more messages may follow.
    pub more: bool,
}

/// The outcome of a transaction, found by its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransactionOutcome {
    /// The transaction committed, with changes.
    Committed {
        /// Its commit LSN.
        commit: CommitLsn,
        /// Its end LSN.
        end: EndLsn,
    },
    /// The server continued on a history in which this transaction did not commit. The new history may use the id
    /// again, so the id alone is ambiguous.
    Abandoned,
}

/// Whether the log may append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskSpace {
    /// The log may append.
    Enough,
    /// Less than the reserve is free and retention has nothing left to drop: stop appending.
    Short {
        /// The number of free bytes.
        free: u64,
    },
    /// The path no longer leads to the directory that was opened. The next process would not find new entries.
    Elsewhere,
}

/// The disk usage of the log, and its limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The bytes on disk that retention counts: neither the journals nor the data still in memory.
    pub bytes: u64,
    /// The limit of `bytes`: above it, retention drops the oldest segment.
    pub bytes_max: u64,
    /// The bytes of the journals.
    pub journal_bytes: u64,
    /// The number of segments. Retention drops whole segments.
    pub segments: u64,
    /// The time at which the oldest segment began, in seconds since 1970.
    pub oldest_unix_seconds: u64,
    /// The free bytes of the disk. `None` if the file system does not report them.
    pub free_bytes: Option<u64>,
    /// The reserve: with fewer free bytes, retention drops segments early.
    pub reserve_bytes: u64,
}

/// A failure of the log.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process has the log open.
    #[error(
        "the change log at {0} is in use by another process: stop that one, or set changelog.path to another directory"
    )]
    Locked(PathBuf),
    /// The directory contains other files.
    #[error("{0} is not empty and holds no change log of tuplewatch: set changelog.path to an empty or new directory")]
    Foreign(PathBuf),
    /// A version of tuplewatch with another format wrote the directory.
    #[error(
        "the change log at {path} has format {found}, and this version of tuplewatch writes format {expected}: \
         use the version that wrote it, or start it anew with --reset-log (history is lost, subscribers re-read)"
    )]
    Format {
        /// The directory.
        path: PathBuf,
        /// The format in the directory.
        found: u32,
        /// The format of this version.
        expected: u32,
    },
    /// Parts of the log are missing or cannot be decoded.
    #[error(
        "the change log at {path} is damaged ({detail}): start it anew with --reset-log \
         (its history is lost, and subscribers re-read their state)"
    )]
    Damaged {
        /// The directory.
        path: PathBuf,
        /// The damage.
        detail: String,
    },
    /// A directory or file cannot be created or opened.
    #[error("the change log at {path} cannot be opened: {source}")]
    Open {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A write or sync failed. The log accepts nothing more, and the process must end.
    #[error("writing the change log failed, so that nothing more can be promised durable: {0}")]
    Poisoned(Cause),
    /// As `Poisoned`, and the directory is no longer in its place. This may be the cause, because new files are created
    /// by path.
    #[error(
        "writing the change log failed, so that nothing more can be promised durable: {0}: its directory was moved, deleted, \
         unmounted or replaced"
    )]
    Displaced(Cause),
    /// A read failed.
    #[error("reading the change log failed: {0}")]
    Read(Cause),
}

impl Error {
    pub(crate) fn unreadable(cause: impl Into<Cause>) -> Self {
        Self::Read(cause.into())
    }
}

/// An error of the storage engine.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// The contract of the change log, see the module.
pub trait ChangeLog: Send + Sync + 'static {
    /// The state as of the last append.
    fn state(&self) -> State;

    /// Applies entries in order. They are durable only after a [`ChangeLog::sync`].
    ///
    /// # Errors
    /// Only [`Error::Poisoned`], as every later call.
    fn append(&self, entries: &[Entry]) -> Result<(), Error>;

    /// Makes all appended entries durable.
    ///
    /// # Errors
    /// Only [`Error::Poisoned`], as every later call.
    fn sync(&self) -> Result<(), Error>;

    /// Returns the messages of this scope after `after` and up to `up_to`, inclusive, but not beyond the tail: at least
    /// one message, then about `bytes_max` bytes. Retention may run meanwhile, so the caller must compare `after` with
    /// [`ChangeLog::horizon`] *afterwards*.
    ///
    /// # Errors
    /// If the disk cannot be read.
    fn read(&self, scope: &Scope, after: &Place, up_to: &Place, bytes_max: usize) -> Result<Batch, Error>;

    /// Whether a read may wait for a disk, and therefore must run on a blocking thread. A log in memory returns at
    /// once.
    fn reads_block(&self) -> bool {
        true
    }

    /// Returns end LSN and id of every transaction with changes that committed at or after `from`, in stream order.
    ///
    /// # Errors
    /// If the disk cannot be read.
    fn transactions_since(&self, from: Lsn) -> Result<Vec<(EndLsn, Xid8)>, Error>;

    /// Returns the earliest position from which the changes of this scope are complete. For all tenants this is an end
    /// LSN.
    ///
    /// # Errors
    /// If the disk cannot be read.
    fn horizon(&self, scope: &Scope) -> Result<Position, Error>;

    /// Whether the log has ever held a change of this tenant.
    ///
    /// # Errors
    /// If the disk cannot be read.
    fn knows(&self, tenant: &TenantId) -> Result<bool, Error>;

    /// Returns the end LSN of the transaction with this token id, if the log still contains the transaction.
    ///
    /// # Errors
    /// If the disk cannot be read.
    fn find_token(&self, id: TokenId) -> Result<Option<EndLsn>, Error>;

    /// Returns the outcome of the transaction with this id, if the log still contains it, or if it is the newest
    /// transaction of this scope that retention dropped.
    ///
    /// # Errors
    /// If the disk cannot be read.
    fn find_transaction(&self, scope: &Scope, xid: Xid8) -> Result<Option<TransactionOutcome>, Error>;

    /// Returns the id of the last transaction with changes of any tenant that committed before `commit`, if the log
    /// still contains it.
    ///
    /// # Errors
    /// If the disk cannot be read.
    fn transaction_before(&self, commit: CommitLsn) -> Result<Option<Xid8>, Error>;

    /// Returns id and commit LSN of the transaction with changes that has the largest id below `xid`, of those in the
    /// log.
    ///
    /// # Errors
    /// If the disk cannot be read.
    fn largest_below(&self, xid: Xid8) -> Result<Option<(Xid8, CommitLsn)>, Error>;

    /// Returns all gaps, ordered by their ends.
    fn gaps(&self) -> Vec<Gap>;

    /// Returns the disk usage. A log in memory has none.
    fn usage(&self) -> Usage {
        Usage::default()
    }

    /// Applies retention by age (against the time `now_unix_seconds`) and by size, and drops segments early to keep the
    /// reserve free.
    ///
    /// # Errors
    /// The same as those of [`ChangeLog::append`].
    fn retain(&self, now_unix_seconds: u64) -> Result<DiskSpace, Error>;

    /// Whether the path still leads to the directory that was opened, so that a new process would find the synced
    /// entries.
    fn is_in_place(&self) -> bool {
        true
    }
}
