//! The change log on local disk, in fjall: an embedded LSM tree with atomic batches across keyspaces and checksums.
//!
//! ```text
//! <path>/tuplewatch-log.json     format and node id, written once
//! <path>/data/                   fjall
//!   keyspace "meta"              origin, tail, segments, horizons of tenants, gaps
//!   keyspace "segment-<n>"       messages by tenant, token ids, transactions (see `record`)
//! ```
//!
//! Retention is a matter of dropping whole segments: before one goes, the newest position of each tenant in it is kept as
//! that tenant's horizon. Facts about fjall that this relies on: it does not sync by default, so that `sync` does; keyspaces
//! deleted while somebody reads them stay readable for that reader; any failed write poisons the database; and a damaged end
//! of its journal is cut off at open. The last one means that a log can come back shorter than it was synced, after a fault
//! of the disk: the session notices, because the slot is then ahead of the log.

pub(super) mod directory;
mod memory;
mod page;
mod reading;
mod record;
mod segments;
mod stored;

use super::{Batch, Cause, ChangeLog, DiskSpace, Entry, Error, State, TransactionOutcome, Usage, Verified};
use crate::model::change::TenantId;
use crate::model::lsn::{CommitLsn, EndLsn, Lsn, Position, Xid8};
use crate::model::scope::{Place, Scope};
use crate::model::snap_token::TokenId;
use crate::model::transaction::Gap;
use directory::{DATA, MARKER, MARKER_NEW, Marker, PROBE};
use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};
use memory::{Memory, Written};
use page::Malformed;
use record::Horizon;
use segments::Segments;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};
use stored::{META_GAP, META_STATE, META_TAIL, Stored, meta_abandoned, meta_horizon, read_gap, read_origin, unpair};

/// Memory for blocks read from disk, shared by all readers.
const CACHE_BYTES: u64 = 32 << 20;
/// A segment's write buffer. Several of them can be full at once, while they are being written out.
const MEMTABLE_BYTES: u64 = 16 << 20;
/// Journals above this make fjall write out buffers.
const JOURNAL_BYTES: u64 = 128 << 20;
/// Threads of fjall's. By itself it has as many as there are cores; with two, the first passes compactions back to the queue, from
/// which it takes them again, as long as the second is busy with one (`fjall::worker_pool`).
const WORKERS: usize = 3;

/// Bounds of a log.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory.
    pub path: PathBuf,
    /// What was appended longer ago may go.
    pub age_seconds: u64,
    /// Above this the oldest goes, in bytes on disk.
    pub size_bytes: u64,
    /// With less free on the disk the oldest goes early, in bytes.
    pub reserve_bytes: u64,
}

/// See the module.
pub struct LocalLog {
    options: Options,
    node_id: String,
    place: directory::Location,
    db: Database,
    meta: Keyspace,
    /// For readers: the segments, replaced as a whole when one comes or goes.
    segments: RwLock<Segments>,
    /// Changed by the one writer, read by all.
    memory: Mutex<Memory>,
}

/// Why something that was written cannot be read.
#[derive(Debug, thiserror::Error)]
enum Unreadable {
    /// The disk, or what is on it.
    #[error(transparent)]
    Store(#[from] fjall::Error),
    /// Its checksum is right, and it is nothing that we write.
    #[error(transparent)]
    Page(#[from] Malformed),
}

fn poisoned(error: impl Into<Cause>) -> Error {
    Error::Poisoned(error.into())
}

fn segment_options() -> KeyspaceCreateOptions {
    KeyspaceCreateOptions::default().max_memtable_size(MEMTABLE_BYTES)
}

impl LocalLog {
    /// Opens the log, or begins one in an empty or missing directory.
    ///
    /// # Errors
    /// Where the directory is somebody else's, in use, damaged, or cannot be made.
    pub fn open(options: Options) -> Result<Self, Error> {
        let path = options.path.clone();
        let open = |source| Error::Open { path: path.clone(), source };
        let damaged = |detail: String| Error::Damaged { path: path.clone(), detail };

        std::fs::create_dir_all(&path).map_err(open)?;
        let marker = match Marker::read(&path)? {
            Some(marker) => marker,
            None => Marker::create(&path).map_err(open)?,
        };
        let db = Database::builder(path.join(DATA))
            .cache_size(CACHE_BYTES)
            .max_journaling_size(JOURNAL_BYTES)
            .worker_threads(WORKERS)
            .open()
            .map_err(|error| match error {
                fjall::Error::Locked => Error::Locked(path.clone()),
                // The directory is there, and was whole once: what is not as it was is somebody's doing.
                fjall::Error::Io(source) if is_damage(source.kind()) => {
                    damaged(format!("a file of it is missing or does not read: {source}"))
                }
                fjall::Error::Io(source) => Error::Open { path: path.clone(), source },
                error => damaged(error.to_string()),
            })?;
        let read = |error: fjall::Error| damaged(error.to_string());
        if !db.keyspace_exists("meta") && !db.list_keyspace_names().is_empty() {
            return Err(damaged("its keyspace meta is missing".into()));
        }
        let meta = db.keyspace("meta", segment_options).map_err(read)?;
        let stored: Stored = match meta.get(META_STATE).map_err(read)? {
            Some(json) => serde_json::from_slice(&json).map_err(|error| damaged(error.to_string()))?,
            None => Stored::default(),
        };
        let tail = match meta.get(META_TAIL).map_err(read)? {
            Some(bytes) => record::read_lsn(&bytes).ok_or_else(|| damaged("its tail does not read".into()))?,
            None => Lsn::ZERO,
        };
        let mut gaps = Vec::new();
        for item in meta.prefix(META_GAP) {
            let json = item.value().map_err(read)?;
            let stored = serde_json::from_slice(&json).map_err(|error| damaged(error.to_string()))?;
            gaps.push(read_gap(stored).ok_or_else(|| damaged("a gap does not read".into()))?);
        }
        let segments = Segments::open(&db, &meta, &damaged)?;
        let log = Self {
            place: directory::Location::of(&path).map_err(open)?,
            options,
            node_id: marker.node_id,
            db,
            meta,
            segments: RwLock::new(segments),
            memory: Mutex::new(Memory { stored, tail, gaps }),
        };
        // Of a version that did not note it.
        if !marker.has_begun && log.memory().stored.origin.is_some() {
            Marker::begin(&path, &log.node_id).map_err(open)?;
        }
        // What was staged when the process ended will be sent again.
        log.append(&[Entry::Discard])?;
        Ok(log)
    }

    /// Deletes the log in this directory, if there is one.
    ///
    /// # Errors
    /// Where the directory holds something else, or cannot be changed.
    pub fn reset(path: &Path) -> Result<(), Error> {
        let open = |source| Error::Open { path: path.to_owned(), source };
        let mut entries = match std::fs::read_dir(path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(open(error)),
        };
        let foreign = entries.any(|entry| entry.map_or(true, |entry| !directory::is_own(&entry.file_name())));
        if foreign {
            return Err(Error::Foreign(path.to_owned()));
        }
        let missing_is_fine = |result: std::io::Result<()>| match result {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(open(error)),
            _ => Ok(()),
        };
        // A lock file that another process holds says so before anything is deleted.
        if path.join(MARKER).exists() && path.join(DATA).is_dir() {
            match Database::builder(path.join(DATA)).open() {
                Err(fjall::Error::Locked) => return Err(Error::Locked(path.to_owned())),
                // Damaged or not: it goes.
                opened => drop(opened),
            }
        }
        missing_is_fine(std::fs::remove_dir_all(path.join(DATA)))?;
        for leftover in [MARKER_NEW, PROBE] {
            missing_is_fine(std::fs::remove_file(path.join(leftover)))?;
        }
        missing_is_fine(std::fs::remove_file(path.join(MARKER)))
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        // A panic while it was held would have been a broken invariant; the contents are replaced in one piece.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn segments(&self) -> Segments {
        self.segments.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn replace_segments(&self, segments: Segments) {
        *self.segments.write().unwrap_or_else(PoisonError::into_inner) = segments;
    }

    /// Begins a new segment where the active one has had its share, so that retention has pieces to drop.
    fn roll(&self, segments: &Segments, frontier: Position, now_unix_seconds: u64) -> Result<Segments, Error> {
        /// Retention drops about this share of a full log at a time.
        const PIECES: u64 = 16;
        const SEGMENT_BYTES_MIN: u64 = 4 << 20;
        let size_max = (self.options.size_bytes / PIECES).max(SEGMENT_BYTES_MIN);
        let age_max = (self.options.age_seconds / PIECES).max(1);
        let active = segments.active();
        let due = active.bytes() >= size_max
            || (!active.is_empty() && now_unix_seconds.saturating_sub(active.created_unix_seconds) >= age_max);
        if !due {
            return Ok(segments.clone());
        }
        let rolled = segments.rolled(&self.db, frontier, now_unix_seconds)?;
        let mut batch = self.db.batch();
        rolled.store(&mut batch, &self.meta)?;
        batch.commit().map_err(poisoned)?;
        self.sync()?;
        self.replace_segments(rolled.clone());
        Ok(rolled)
    }

    /// Drops the oldest segment, keeping each tenant's newest position in it.
    fn drop_oldest(&self, segments: &Segments) -> Result<Segments, Error> {
        let Some((oldest, rest)) = segments.without_oldest() else { return Ok(segments.clone()) };
        let mut batch = self.db.batch();
        let mut of_all = self.horizon_of(&Scope::All)?;
        for item in oldest.horizons() {
            let (tenant, horizon) = item.map_err(poisoned)?;
            batch.insert(&self.meta, meta_horizon(&Scope::Tenant(tenant)), record::write_horizon(&horizon));
            if of_all.is_none_or(|newest| newest.position < horizon.position) {
                of_all = Some(horizon);
            }
        }
        if let Some(newest) = of_all {
            batch.insert(&self.meta, meta_horizon(&Scope::All), record::write_horizon(&newest));
        }
        rest.store(&mut batch, &self.meta)?;
        batch.commit().map_err(poisoned)?;
        // The horizons must be there before the messages are gone.
        self.sync()?;
        self.replace_segments(rest.clone());
        self.db.delete_keyspace(oldest.keyspace).map_err(poisoned)?;
        Ok(rest)
    }

    fn journal_bytes(&self) -> Result<u64, Error> {
        self.db.journal_disk_space().map_err(poisoned)
    }

    /// Writes out the write buffers, so that only the present journal is left. The others are a second copy of what is in the
    /// buffers, and keep the files of dropped segments from going too. Needs less room for it than the journals take.
    fn shed_journals(&self, segments: &Segments) -> Result<(), Error> {
        /// The disk may be slow; what goes later is seen the next time.
        const WAIT_MAX: Duration = Duration::from_secs(2);
        const POLL: Duration = Duration::from_millis(10);
        for keyspace in segments.newest_first().map(|segment| &segment.keyspace).chain([&self.meta]) {
            keyspace.rotate_memtable().map_err(poisoned)?;
        }
        let deadline = Instant::now() + WAIT_MAX;
        while self.db.journal_count() > 1 && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    fn free_bytes(&self) -> u64 {
        // Where the file system does not say, there is nothing to go by.
        directory::free_bytes(&self.options.path).unwrap_or(u64::MAX)
    }
}

fn is_damage(kind: std::io::ErrorKind) -> bool {
    use std::io::ErrorKind::{AlreadyExists, InvalidData, NotFound, UnexpectedEof};
    matches!(kind, NotFound | AlreadyExists | UnexpectedEof | InvalidData)
}

impl LocalLog {
    /// The newest message of this scope that retention dropped.
    fn horizon_of(&self, scope: &Scope) -> Result<Option<Horizon>, Error> {
        let stored = self.meta.get(meta_horizon(scope)).map_err(Error::unreadable)?;
        Ok(stored.and_then(|bytes| record::read_horizon(&bytes)))
    }

    /// The end of the transaction of a dropped message. One that has not ended yet ends behind all of its row steps.
    fn end_of(&self, dropped: &Horizon) -> Result<EndLsn, Error> {
        if dropped.end > EndLsn::default() {
            return Ok(dropped.end);
        }
        let commit = CommitLsn(dropped.position.lsn);
        let end = self.segments().end_of(commit).map_err(Error::unreadable)?;
        Ok(end.unwrap_or(EndLsn(Lsn(commit.0.0.saturating_add(1)))))
    }
}

impl ChangeLog for LocalLog {
    fn state(&self) -> State {
        let memory = self.memory();
        State {
            node_id: self.node_id.clone(),
            origin: memory.stored.origin.as_ref().and_then(read_origin),
            tail: memory.tail,
            verified: memory
                .stored
                .verified
                .as_ref()
                .map(|(fingerprint, at)| Verified { fingerprint: fingerprint.clone(), at: Lsn(*at) }),
            mapping: memory.stored.mapping,
            watermark: Lsn(memory.stored.watermark),
            open_gap: Gap::last_open(&memory.gaps).cloned(),
        }
    }

    fn append(&self, entries: &[Entry]) -> Result<(), Error> {
        let segments = self.segments();
        let active = segments.active();
        let mut memory = self.memory();
        let mut written = Written::new(self, &memory, active);
        for entry in entries {
            // These look for what is there already, which a batch is not before it is committed.
            let is_removal = matches!(entry, Entry::Discard | Entry::Diverge { .. });
            if is_removal {
                written.commit(self, &memory)?;
                written = Written::new(self, &memory, active);
            }
            written.rare |= !matches!(entry, Entry::Transaction(t) if !t.staged && t.gaps.is_empty())
                && !matches!(entry, Entry::Progress(_));
            memory.apply(entry, self, &mut written)?;
            // In a batch, the removal of a key and its insertion would have no order.
            if is_removal {
                written.commit(self, &memory)?;
                written = Written::new(self, &memory, active);
            }
        }
        written.commit(self, &memory)?;
        if entries.iter().any(|entry| matches!(entry, Entry::Adopt(_))) {
            Marker::begin(&self.options.path, &self.node_id).map_err(poisoned)?;
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), Error> {
        self.db.persist(PersistMode::SyncData).map_err(poisoned)
    }

    fn read(&self, scope: &Scope, after: &Place, up_to: &Place, bytes_max: usize) -> Result<Batch, Error> {
        let (up_to, gaps_end_at) = {
            let memory = self.memory();
            let gaps_end_at: Vec<_> = match scope {
                Scope::Tenant(_) => Vec::new(),
                Scope::All => memory.gaps.iter().map(|gap| gap.to).filter(|to| *to > after.position).collect(),
            };
            (up_to.clone().min_at(memory.tail), gaps_end_at)
        };
        let segments = self.segments();
        let batch = match scope {
            Scope::Tenant(tenant) => reading::one(&segments, tenant, after.position, up_to.position, bytes_max),
            Scope::All => reading::all(&segments, after, &up_to, &gaps_end_at, bytes_max),
        };
        batch.map_err(Error::unreadable)
    }

    fn transactions_since(&self, from: Lsn) -> Result<Vec<(EndLsn, Xid8)>, Error> {
        let tail = self.memory().tail;
        let found = self.segments().transactions_since(from).map_err(Error::unreadable)?;
        Ok(found.into_values().filter(|(end, _)| end.0 <= tail).collect())
    }

    fn horizon(&self, scope: &Scope) -> Result<Position, Error> {
        let floor = {
            let memory = self.memory();
            let origin = memory.stored.origin.as_ref().map_or(Position::ZERO, |origin| Position::at(Lsn(origin.lsn)));
            origin.max(unpair(memory.stored.gaps_floor))
        };
        let Some(dropped) = self.horizon_of(scope)? else { return Ok(floor) };
        let complete_from = match scope {
            Scope::Tenant(_) => dropped.position,
            // The rest of the transaction is of no use to a stream of all.
            Scope::All => Position::after(self.end_of(&dropped)?),
        };
        Ok(floor.max(complete_from))
    }

    fn knows(&self, tenant: &TenantId) -> Result<bool, Error> {
        if self.meta.contains_key(meta_horizon(&Scope::Tenant(tenant.clone()))).map_err(Error::unreadable)? {
            return Ok(true);
        }
        for segment in self.segments().since(Position::ZERO) {
            if let Some(item) = segment.keyspace.prefix(record::tenant_prefix(tenant)).next() {
                item.key().map_err(Error::unreadable)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn find_token(&self, id: TokenId) -> Result<Option<EndLsn>, Error> {
        for segment in self.segments().newest_first() {
            let found = segment.keyspace.get(record::token_key(id)).map_err(Error::unreadable)?;
            if let Some(bytes) = found {
                return Ok(record::read_lsn(&bytes).map(EndLsn));
            }
        }
        Ok(None)
    }

    fn find_transaction(&self, scope: &Scope, xid: Xid8) -> Result<Option<TransactionOutcome>, Error> {
        if self.meta.contains_key(meta_abandoned(xid)).map_err(Error::unreadable)? {
            return Ok(Some(TransactionOutcome::Abandoned));
        }
        if let Some(found) = self.segments().find(xid).map_err(Error::unreadable)? {
            return Ok(Some(found));
        }
        let newest = self.horizon_of(scope)?.filter(|horizon| horizon.xid == xid && horizon.end > EndLsn::default());
        Ok(newest
            .map(|horizon| TransactionOutcome::Committed { commit: CommitLsn(horizon.position.lsn), end: horizon.end }))
    }

    fn transaction_before(&self, commit: CommitLsn) -> Result<Option<Xid8>, Error> {
        self.segments().transaction_before(commit).map_err(Error::unreadable)
    }

    fn largest_below(&self, xid: Xid8) -> Result<Option<(Xid8, CommitLsn)>, Error> {
        self.segments().largest_below(xid).map_err(Error::unreadable)
    }

    fn gaps(&self) -> Vec<Gap> {
        self.memory().gaps.clone()
    }

    fn usage(&self) -> Usage {
        let segments = self.segments();
        Usage {
            bytes: segments.bytes(),
            bytes_max: self.options.size_bytes,
            // A failure of the disk is for who writes to find.
            journal_bytes: self.db.journal_disk_space().unwrap_or_default(),
            segments: segments.len() as u64,
            oldest_unix_seconds: segments.oldest_created_unix_seconds(),
            free_bytes: directory::free_bytes(&self.options.path),
            reserve_bytes: self.options.reserve_bytes,
        }
    }

    fn retain(&self, now_unix_seconds: u64) -> Result<DiskSpace, Error> {
        let frontier = self.memory().frontier();
        let mut segments = self.roll(&self.segments(), frontier, now_unix_seconds)?;
        let free = self.free_bytes();
        if free < self.options.reserve_bytes && self.db.journal_count() > 1 && self.journal_bytes()? < free {
            // Costs no history.
            self.shed_journals(&segments)?;
        }
        // A reader may keep the files of a dropped segment for a moment: that is no reason to drop the next one. A journal may
        // keep them for long: then only what is really free counts.
        let mut expected = if self.db.journal_count() == 1 { self.free_bytes() } else { 0 };
        loop {
            let expired = segments
                .oldest_ended_unix_seconds()
                .is_some_and(|ended| now_unix_seconds.saturating_sub(ended) >= self.options.age_seconds);
            let free = self.free_bytes().max(expected);
            let short = free < self.options.reserve_bytes;
            if !expired && !short && segments.bytes() <= self.options.size_bytes {
                return Ok(DiskSpace::Enough);
            }
            if segments.len() == 1 {
                if !short {
                    return Ok(DiskSpace::Enough);
                }
                // The active segment goes as well before the disk fills up: history is what the log is asked to give up.
                if segments.active().is_empty() {
                    return Ok(DiskSpace::Short { free: self.free_bytes() });
                }
                segments = segments.rolled(&self.db, frontier, now_unix_seconds)?;
            }
            let before = segments.bytes();
            segments = self.drop_oldest(&segments)?;
            expected = expected.saturating_add(before.saturating_sub(segments.bytes()));
        }
    }

    fn is_in_place(&self) -> bool {
        self.place.is_intact()
    }
}
