//! A change log with a faulty disk. A crash keeps everything synced and some of the rest; a sync may fail; the disk may
//! lie.

use super::world::World;
use crate::changelog::reference::{Inner, ModelLog};
use crate::changelog::{Batch, ChangeLog, DiskSpace, Entry, Error, State, TransactionOutcome};
use crate::model::change::TenantId;
use crate::model::lsn::{CommitLsn, EndLsn, Lsn, Position, Xid8};
use crate::model::scope::{Place, Scope};
use crate::model::snap_token::TokenId;
use crate::model::transaction::Gap;
use std::sync::{Arc, Mutex, MutexGuard};

/// The disk, which outlives the process.
#[derive(Clone)]
pub(super) struct Disk {
    world: World,
    inner: Arc<Mutex<Contents>>,
}

struct Contents {
    /// The state after the worst crash.
    synced: Inner,
    /// The entries applied since the last sync.
    unsynced: Vec<Entry>,
    /// The state with all entries.
    applied: Inner,
    /// The states of all syncs. A disk that lies returns to an older one.
    older: Vec<Inner>,
    /// Whether a write or sync has failed.
    poisoned: bool,
}

impl Disk {
    pub(super) fn new(world: World) -> Self {
        let contents = Contents {
            synced: Inner::default(),
            unsynced: Vec::new(),
            applied: Inner::default(),
            older: Vec::new(),
            poisoned: false,
        };
        Self { world, inner: Arc::new(Mutex::new(contents)) }
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.inner.lock().unwrap()
    }

    /// The tail that survives any crash.
    pub(super) fn synced_tail(&self) -> Lsn {
        self.contents().synced.tail()
    }

    /// Whether the result of the first check survives any crash.
    pub(super) fn is_verified(&self) -> bool {
        self.contents().synced.state().verified.is_some()
    }

    /// The process dies. The next one finds everything synced, and a random part of the rest. If the disk `lies`, even
    /// synced entries are missing.
    pub(super) fn crash(&self, lies: bool) {
        let mut contents = self.contents();
        let surviving = usize::try_from(self.world.below(contents.unsynced.len() as u64 + 1)).unwrap();
        let mut found = contents.synced.clone();
        for entry in contents.unsynced.iter().take(surviving) {
            found.apply(entry);
        }
        self.world
            .note(format!("the disk keeps {surviving} of {} entries that were not synced", contents.unsynced.len()));
        if lies && !contents.older.is_empty() {
            let back = usize::try_from(self.world.below(contents.older.len() as u64)).unwrap();
            found = contents.older[back].clone();
            self.world.note(format!("the disk lied: it goes back to {}", found.tail()));
        }
        // Opening a log discards an open transaction.
        found.apply(&Entry::Discard);
        *contents = Contents {
            synced: found.clone(),
            unsynced: Vec::new(),
            applied: found,
            older: contents.older.clone(),
            poisoned: false,
        };
    }

    fn model(&self) -> ModelLog {
        ModelLog::of(self.contents().applied.clone())
    }
}

impl ChangeLog for Disk {
    fn state(&self) -> State {
        self.contents().applied.state().clone()
    }

    fn append(&self, entries: &[Entry]) -> Result<(), Error> {
        let gone = || Error::Poisoned("the process is dead".into());
        for entry in entries {
            // A step before each entry, so that a crash can split a batch.
            if self.contents().poisoned || !self.world.step(|| format!("append {}", name(entry))) {
                return Err(gone());
            }
            let mut contents = self.contents();
            contents.applied.apply(entry);
            contents.unsynced.push(entry.clone());
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), Error> {
        if self.contents().poisoned || !self.world.step(|| "sync begins".into()) {
            return Err(Error::Poisoned("the process is dead".into()));
        }
        if self.world.once_in(60) {
            self.contents().poisoned = true;
            self.world.note("the sync fails".into());
            return Err(Error::Poisoned("no space, or worse".into()));
        }
        {
            let mut contents = self.contents();
            contents.synced = contents.applied.clone();
            contents.unsynced.clear();
            let synced = contents.synced.clone();
            contents.older.push(synced);
        }
        if self.world.step(|| "synced".into()) { Ok(()) } else { Err(Error::Poisoned("the process is dead".into())) }
    }

    fn read(&self, scope: &Scope, after: &Place, up_to: &Place, bytes_max: usize) -> Result<Batch, Error> {
        self.model().read(scope, after, up_to, bytes_max)
    }

    fn reads_block(&self) -> bool {
        false
    }

    fn transactions_since(&self, from: Lsn) -> Result<Vec<(EndLsn, Xid8)>, Error> {
        self.model().transactions_since(from)
    }

    fn horizon(&self, scope: &Scope) -> Result<Position, Error> {
        self.model().horizon(scope)
    }

    fn knows(&self, tenant: &TenantId) -> Result<bool, Error> {
        self.model().knows(tenant)
    }

    fn find_token(&self, id: TokenId) -> Result<Option<EndLsn>, Error> {
        self.model().find_token(id)
    }

    fn find_transaction(&self, scope: &Scope, xid: Xid8) -> Result<Option<TransactionOutcome>, Error> {
        self.model().find_transaction(scope, xid)
    }

    fn transaction_before(&self, commit: CommitLsn) -> Result<Option<Xid8>, Error> {
        self.model().transaction_before(commit)
    }

    fn largest_below(&self, xid: Xid8) -> Result<Option<(Xid8, CommitLsn)>, Error> {
        self.model().largest_below(xid)
    }

    fn gaps(&self) -> Vec<Gap> {
        self.model().gaps()
    }

    fn retain(&self, now_unix_seconds: u64) -> Result<DiskSpace, Error> {
        self.model().retain(now_unix_seconds)
    }
}

fn name(entry: &Entry) -> String {
    match entry {
        Entry::Adopt(origin) => format!("the origin {}", origin.lsn),
        Entry::Staged(staged) => format!("messages of the open transaction {}", staged.commit),
        Entry::Discard => "the end of an open transaction".into(),
        Entry::Transaction(transaction) => format!("transaction {}..{}", transaction.header.commit, transaction.end),
        Entry::Progress(lsn) => format!("progress {lsn}"),
        Entry::Gap(gap) => format!("gap {}..{}", gap.from.lsn, gap.to.lsn),
        Entry::Diverge { at, .. } => format!("divergence at {at}"),
        Entry::Verified(verified) => format!("verified {}", verified.at),
        Entry::Mapping(_) => "mapping".into(),
        Entry::Watermark(lsn) => format!("watermark {lsn}"),
    }
}
