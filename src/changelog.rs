//! The change log: a durable, bounded, replayable copy of the stream.
//!
//! ```text
//!        horizon(scope)                     tail
//!  ┄┄┄┄┄┄┄┄┄┄┤ readable, by tenant           │ staged, not yet readable
//!   dropped  ├──────────────┬───────┬────────┼──────────────┐
//!            │ segment n    │ n+1   │ active │              │
//!            └──────────────┴───────┴────────┴──────────────┘
//! ```
//!
//! [`ChangeLog`] is the contract; [`LocalLog`] keeps it on local disk. The contract in full:
//!
//! - [`ChangeLog::append`] takes entries in stream order and applies each atomically, in memory and to the operating
//!   system; they are *durable* once [`ChangeLog::sync`] returned. After a crash the log is some prefix of what was
//!   appended, at least all that was synced.
//! - Messages that were [`Entry::Staged`] become readable with their [`Entry::Transaction`], and vanish with
//!   [`Entry::Discard`] or at the next open.
//! - A transaction that ends at or before the tail is there already, and is ignored.
//! - [`ChangeLog::read`] gives the messages of one tenant or of all, in the order of such a stream ([`Scope`]), and costs in proportion to
//!   them.
//! - Below [`ChangeLog::horizon`] something *of that scope* was dropped by retention. A tenant that was quiet keeps an old
//!   horizon, however long ago its last change was.
//! - A transaction with changes is found by its id as long as it is here. One that was abandoned stays known as such.
//! - Gaps outlive the messages around them.
//! - Any failed write or sync poisons the log: every later call fails, and the process must end.
//!
//! PostgreSQL is the truth: losing this log costs history, not correctness. It is written by one thread
//! ([`Recorder`](recorder::Recorder)) and read by many.

pub mod examination;
mod local;
pub mod recorder;

#[cfg(test)]
mod conformance;
#[cfg(test)]
pub(crate) mod model;

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

/// Most gaps that are kept; with more, the oldest go, and nobody from before them can resume. An open one stays.
pub const GAPS_MAX: usize = 10_000;

/// One thing to append.
#[derive(Clone, Debug)]
pub enum Entry {
    /// The log begins: from this source, on this history, complete from `origin` on.
    Adopt(Origin),
    /// Messages of a transaction that has not ended yet.
    Staged(Arc<Staged>),
    /// The open transaction will not end: the session is gone.
    Discard,
    /// A whole transaction, except for what was staged.
    Transaction(Arc<Transaction>),
    /// Nothing for us up to this LSN.
    Progress(Lsn),
    /// A gap that is not inside a transaction; the tail moves to its end.
    Gap(Gap),
    /// The server went on along another history: what lies past `at` is abandoned.
    Diverge {
        /// The switch LSN.
        at: Lsn,
        /// The history from now on.
        history: History,
    },
    /// What is published was checked.
    Verified(Verified),
    /// The mapping in use from the tail on.
    Mapping([u8; 32]),
    /// Everything up to here is visible to every new snapshot of PostgreSQL.
    Watermark(Lsn),
}

/// Where a log began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The database.
    pub source: Source,
    /// Its history at the time.
    pub history: History,
    /// Everything that committed at or after is here.
    pub lsn: Lsn,
    /// Everything that committed before has an id below.
    pub xid: Xid8,
}

/// A check of what is published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// What was found, in a form to compare.
    pub fingerprint: String,
    /// Everything before this LSN was written under it.
    pub at: Lsn,
}

/// What the log knows of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// This log directory's own id, made with it.
    pub node_id: String,
    /// `None` until [`Entry::Adopt`].
    pub origin: Option<Origin>,
    /// Everything before is here, or was; also how far an idle stream got.
    pub tail: Lsn,
    /// The last check.
    pub verified: Option<Verified>,
    /// The mapping that the log was written with.
    pub mapping: Option<[u8; 32]>,
    /// Everything up to here was visible when it was last recorded; not past the tail.
    pub watermark: Lsn,
    /// The gap whose end is not known yet, if there is one: see [`Gap::writers`].
    pub open_gap: Option<Gap>,
}

/// What [`ChangeLog::read`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// In stream order; the first may begin inside a message.
    pub messages: Vec<TenantMessage>,
    /// Whether the limit on bytes ended it, so that there may be more.
    pub more: bool,
}

/// What the log knows of a transaction id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransactionOutcome {
    /// It committed, with changes.
    Committed {
        /// Its commit LSN.
        commit: CommitLsn,
        /// Its end LSN.
        end: EndLsn,
    },
    /// The server went on along a history on which it did not commit. The id may be another transaction's there, and then
    /// nobody can tell which of the two is meant.
    Abandoned,
}

/// What the disk has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskSpace {
    /// Go on.
    Enough,
    /// Less than the reserve is free, and nothing is left to drop: stop appending.
    Short {
        /// Bytes free.
        free: u64,
    },
    /// The directory is not the one that was opened: nobody could read back what is appended now.
    Elsewhere,
}

/// What the log takes, and what it may.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes on disk that retention counts: not the journals, nor what is still in memory.
    pub bytes: u64,
    /// Above this the oldest goes.
    pub bytes_max: u64,
    /// Bytes of journals.
    pub journal_bytes: u64,
    /// Pieces that are dropped as a whole.
    pub segments: u64,
    /// When the oldest of them was begun, in seconds since 1970.
    pub oldest_unix_seconds: u64,
    /// Bytes free on the disk. `None` where the file system does not say.
    pub free_bytes: Option<u64>,
    /// With less free the oldest goes early.
    pub reserve_bytes: u64,
}

/// Why the log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process has it open.
    #[error(
        "the change log at {0} is in use by another process: stop that one, or set changelog.path to another directory"
    )]
    Locked(PathBuf),
    /// The directory holds something else.
    #[error("{0} is not empty and holds no change log of tuplewatch: set changelog.path to an empty or new directory")]
    Foreign(PathBuf),
    /// The directory was written by a version of tuplewatch with another format.
    #[error(
        "the change log at {path} has format {found}, and this version of tuplewatch writes format {expected}: \
         use the version that wrote it, or start it anew with --reset-log (history is lost, subscribers re-read)"
    )]
    Format {
        /// The directory.
        path: PathBuf,
        /// What it says.
        found: u32,
        /// What we write.
        expected: u32,
    },
    /// Parts are missing or do not read.
    #[error(
        "the change log at {path} is damaged ({detail}): start it anew with --reset-log \
         (its history is lost, and subscribers re-read their state)"
    )]
    Damaged {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A directory or file cannot be made or opened.
    #[error("the change log at {path} cannot be opened: {source}")]
    Open {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A write or sync failed. Nothing later is accepted, and the process must end.
    #[error("writing the change log failed, so that nothing more can be promised durable: {0}")]
    Poisoned(Cause),
    /// The same, and its directory is no longer where it was. The write may have failed because of that: new files are made by their
    /// path.
    #[error(
        "writing the change log failed, so that nothing more can be promised durable: {0}: its directory was moved, deleted, \
         unmounted or replaced"
    )]
    Displaced(Cause),
    /// Reading failed.
    #[error("reading the change log failed: {0}")]
    Read(Cause),
}

impl Error {
    pub(crate) fn unreadable(cause: impl Into<Cause>) -> Self {
        Self::Read(cause.into())
    }
}

/// An error of whatever the log is kept in.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// See the module.
pub trait ChangeLog: Send + Sync + 'static {
    /// What the log knows of itself, as of the last append.
    fn state(&self) -> State;

    /// Applies entries in order. Not durable before [`ChangeLog::sync`].
    ///
    /// # Errors
    /// Only [`Error::Poisoned`], and then from there on for ever.
    fn append(&self, entries: &[Entry]) -> Result<(), Error>;

    /// Makes everything appended durable.
    ///
    /// # Errors
    /// Only [`Error::Poisoned`], and then from there on for ever.
    fn sync(&self) -> Result<(), Error>;

    /// The messages of this scope after `after` and up to `up_to` (inclusive, and not beyond the tail), at least one and then
    /// about `bytes_max` bytes. The caller compares its start with [`ChangeLog::horizon`] *afterwards*.
    ///
    /// # Errors
    /// Where the disk cannot be read.
    fn read(&self, scope: &Scope, after: &Place, up_to: &Place, bytes_max: usize) -> Result<Batch, Error>;

    /// Whether reading may wait for a disk, and so belongs on a thread for such. A log in memory answers at once.
    fn reads_block(&self) -> bool {
        true
    }

    /// End LSN and id of every transaction with changes that committed at or after `from`, in stream order.
    ///
    /// # Errors
    /// Where the disk cannot be read.
    fn transactions_since(&self, from: Lsn) -> Result<Vec<(EndLsn, Xid8)>, Error>;

    /// The earliest position from which the changes of this scope are complete; of all tenants, an end LSN.
    ///
    /// # Errors
    /// Where the disk cannot be read.
    fn horizon(&self, scope: &Scope) -> Result<Position, Error>;

    /// Whether the log has ever held a change of this tenant.
    ///
    /// # Errors
    /// Where the disk cannot be read.
    fn knows(&self, tenant: &TenantId) -> Result<bool, Error>;

    /// The end LSN of the transaction that carried this token id, if it is still here.
    ///
    /// # Errors
    /// Where the disk cannot be read.
    fn find_token(&self, id: TokenId) -> Result<Option<EndLsn>, Error>;

    /// What became of the transaction with this id, if it is still here or is the newest of this scope that retention dropped.
    ///
    /// # Errors
    /// Where the disk cannot be read.
    fn find_transaction(&self, scope: &Scope, xid: Xid8) -> Result<Option<TransactionOutcome>, Error>;

    /// The id of the last transaction with changes, of whichever tenant, that committed before `commit`, if it is still here.
    ///
    /// # Errors
    /// Where the disk cannot be read.
    fn transaction_before(&self, commit: CommitLsn) -> Result<Option<Xid8>, Error>;

    /// Of the transactions with changes that are still here, the one with the largest id below `xid`: id and commit LSN.
    ///
    /// # Errors
    /// Where the disk cannot be read.
    fn largest_below(&self, xid: Xid8) -> Result<Option<(Xid8, CommitLsn)>, Error>;

    /// All gaps, in stream order of their ends.
    fn gaps(&self) -> Vec<Gap>;

    /// What it takes on disk. A log in memory takes nothing.
    fn usage(&self) -> Usage {
        Usage::default()
    }

    /// Drops what retention no longer wants: by age (`now` in seconds since 1970), by size, and early for the reserve.
    ///
    /// # Errors
    /// As [`ChangeLog::append`].
    fn retain(&self, now_unix_seconds: u64) -> Result<DiskSpace, Error>;

    /// Whether its directory is still the one that was opened: a process that starts now would find what is synced.
    fn is_in_place(&self) -> bool {
        true
    }
}
