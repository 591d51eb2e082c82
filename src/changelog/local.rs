//! The change log on local disk, in fjall: an embedded LSM tree with checksums, and with atomic batches across
//! keyspaces.
//!
//! ```text
//! <path>/tuplewatch-log.json     format and node id, written once
//! <path>/data/                   fjall
//!   keyspace "meta"              origin, tail, segments, horizons of tenants, gaps
//!   keyspace "segment-<n>"       messages by tenant, token ids, transactions (see `record`)
//! ```
//!
//! Retention drops whole segments. Before it drops a segment, it stores each tenant's newest position in it as that
//! tenant's horizon.
//!
//! This module relies on these properties of fjall: it does not sync by itself, so that `sync` decides; a reader can
//! still read a keyspace that is deleted meanwhile; a failed write poisons the database; and opening a database cuts a
//! damaged end off its journal. So after a fault of the disk, the log may be shorter than its last sync. The session
//! notices this, because the slot is then ahead of the log.

mod apply;
pub(super) mod directory;
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
use apply::{Memory, Written};
use directory::{DATA, MARKER, MARKER_NEW, Marker, PROBE};
use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};
use page::Malformed;
use record::Horizon;
use segments::Segments;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};
use stored::{META_GAP, META_STATE, META_TAIL, Stored, meta_abandoned, meta_horizon, read_gap, read_origin, unpair};

/// The cache of blocks that were read from disk, shared by all readers.
const CACHE_BYTES: u64 = 32 << 20;
/// The write buffer of a segment. Several buffers can be full at once, while fjall writes them out.
const MEMTABLE_BYTES: u64 = 16 << 20;
/// fjall writes out buffers while the journals are larger than this.
const JOURNAL_BYTES: u64 = 128 << 20;
/// The threads of fjall. Its default is the number of cores. With two threads, the first spins while the second runs a
/// compaction: it returns other compactions to the queue and takes them again (`fjall::worker_pool`).
const WORKERS: usize = 3;

/// The location and the bounds of a log.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory.
    pub path: PathBuf,
    /// The age beyond which a segment is dropped.
    pub age_seconds: u64,
    /// The bytes on disk above which the oldest segment is dropped.
    pub size_bytes: u64,
    /// The free bytes of the disk below which segments are dropped early.
    pub reserve_bytes: u64,
}

/// The change log on local disk, see the module.
pub struct LocalLog {
    options: Options,
    node_id: String,
    place: directory::Location,
    db: Database,
    meta: Keyspace,
    /// The segments for readers, replaced as a whole when a segment is added or dropped.
    segments: RwLock<Segments>,
    /// Changed by the one writer, and read by all threads.
    memory: Mutex<Memory>,
}

/// A failure to read stored data.
#[derive(Debug, thiserror::Error)]
enum Unreadable {
    /// The disk failed, or fjall found damage.
    #[error(transparent)]
    Store(#[from] fjall::Error),
    /// The checksum is right, but the contents are not in our format.
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
    /// Opens the log, or creates one in an empty or missing directory.
    ///
    /// # Errors
    /// If the directory belongs to another program, is in use or damaged, or cannot be created.
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
                // The marker shows that the log was complete once, so a missing file is damage.
                fjall::Error::Io(source) if is_damage(source.kind()) => {
                    damaged(format!("a file is missing or cannot be read: {source}"))
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
            Some(bytes) => record::read_lsn(&bytes).ok_or_else(|| damaged("its tail cannot be decoded".into()))?,
            None => Lsn::ZERO,
        };
        let mut gaps = Vec::new();
        for item in meta.prefix(META_GAP) {
            let json = item.value().map_err(read)?;
            let stored = serde_json::from_slice(&json).map_err(|error| damaged(error.to_string()))?;
            gaps.push(read_gap(stored).ok_or_else(|| damaged("a gap cannot be decoded".into()))?);
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
        // The marker is of a version that did not record this.
        if !marker.has_begun && log.memory().stored.origin.is_some() {
            Marker::begin(&path, &log.node_id).map_err(open)?;
        }
        // The slot sends the messages again that were staged when the process ended.
        log.append(&[Entry::Discard])?;
        Ok(log)
    }

    /// Deletes the log in this directory, if there is one.
    ///
    /// # Errors
    /// If the directory contains other files, or cannot be changed.
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
        // Take the lock first, so that nothing is deleted while another process has the log open.
        if path.join(MARKER).exists() && path.join(DATA).is_dir() {
            match Database::builder(path.join(DATA)).open() {
                Err(fjall::Error::Locked) => return Err(Error::Locked(path.to_owned())),
                // Also a damaged log is deleted.
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
        // Changes replace the contents in one piece, so a panic cannot leave them half changed.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn segments(&self) -> Segments {
        self.segments.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn replace_segments(&self, segments: Segments) {
        *self.segments.write().unwrap_or_else(PoisonError::into_inner) = segments;
    }

    /// Begins a new segment if the active one has reached its share of the size or the age, so that retention has
    /// segments to drop.
    fn roll(&self, segments: &Segments, frontier: Position, now_unix_seconds: u64) -> Result<Segments, Error> {
        /// Retention drops about one in this many parts of a full log at a time.
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

    /// Drops the oldest segment, and keeps each tenant's newest position in it.
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
        // The horizons must be durable before the messages are deleted.
        self.sync()?;
        self.replace_segments(rest.clone());
        self.db.delete_keyspace(oldest.keyspace).map_err(poisoned)?;
        Ok(rest)
    }

    fn journal_bytes(&self) -> Result<u64, Error> {
        self.db.journal_disk_space().map_err(poisoned)
    }

    /// Writes out the write buffers, so that only the current journal remains. The other journals duplicate the
    /// contents of the buffers, and they also keep the files of dropped segments on the disk. The new files need less
    /// space than the journals take.
    fn shed_journals(&self, segments: &Segments) -> Result<(), Error> {
        /// A slow disk may need longer. The next run of retention then counts the rest.
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
        // If the file system does not report free space, assume that there is enough.
        directory::free_bytes(&self.options.path).unwrap_or(u64::MAX)
    }
}

fn is_damage(kind: std::io::ErrorKind) -> bool {
    use std::io::ErrorKind::{AlreadyExists, InvalidData, NotFound, UnexpectedEof};
    matches!(kind, NotFound | AlreadyExists | UnexpectedEof | InvalidData)
}

impl LocalLog {
    /// Returns the newest message of this scope that retention dropped.
    fn horizon_of(&self, scope: &Scope) -> Result<Option<Horizon>, Error> {
        let stored = self.meta.get(meta_horizon(scope)).map_err(Error::unreadable)?;
        Ok(stored.and_then(|bytes| record::read_horizon(&bytes)))
    }

    /// Returns the end of the transaction of a dropped message. An open transaction ends after all of its row steps.
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
            // A removal reads what is stored, and therefore needs the entries before it to be committed.
            let is_removal = matches!(entry, Entry::Discard | Entry::Diverge { .. });
            if is_removal {
                written.commit(self, &memory)?;
                written = Written::new(self, &memory, active);
            }
            written.rare |= !matches!(entry, Entry::Transaction(t) if !t.staged && t.gaps.is_empty())
                && !matches!(entry, Entry::Progress(_));
            memory.apply(entry, self, &mut written)?;
            // In one batch, a removal and an insertion of the same key have no defined order.
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
            // A stream of all tenants cannot use the rest of the transaction.
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
            // The writer reports failures of the disk.
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
            // Free the journals first: this costs no history.
            self.shed_journals(&segments)?;
        }
        // A reader may keep the files of a dropped segment for a moment, so dropped bytes count as free. But old journals
        // may keep these files for long: with them, only space that is already free counts.
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
                // Before the disk fills up, drop the active segment as well: history is worth less than continued
                // delivery.
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
