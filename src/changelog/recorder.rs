//! The one writer of the change log: a thread that appends in order, syncs in groups, and enforces retention.
//!
//! Live delivery does not wait for it, but acknowledgements to the slot do. So it syncs rarely under load (every [`SYNC_DELAY`]) and soon when
//! idle. Two watches follow how far the log is *appended*, which readers can have, and *durable*, which can be acknowledged. A failed write
//! ends the recorder, and with it the process.

use super::{ChangeLog, DiskSpace, Entry, Error, State};
use crate::metrics::metrics;
use crate::model::lsn::Lsn;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;

/// Longest that something appended stays unsynced.
///
/// The slot is told once a second at most, so this costs at most a little WAL on the server, and it keeps a busy log at 20
/// syncs a second whatever the disk.
pub const SYNC_DELAY: Duration = Duration::from_millis(50);

/// Shortest time between two appends, so that a busy log gathers entries: an append of many small transactions writes hardly more than
/// that of one, and the session does not wake this thread for each. Subscribers read from memory, and the slot is acknowledged after the
/// sync only. So it delays only a transaction that was too large for memory, a token that waits for the log, and a flush.
const APPEND_EVERY: Duration = Duration::from_millis(2);
/// How often retention is looked at.
const RETAIN_EVERY: Duration = Duration::from_secs(5);
/// Bytes appended after which retention is looked at, however soon.
const RETAIN_BYTES: usize = 64 << 20;
/// How often a full disk is looked at.
const ROOM_EVERY: Duration = Duration::from_secs(1);
/// Bytes that may wait to be appended. Whoever has more waits.
const QUEUE_BYTES: usize = 16 << 20;
/// Entries that may wait to be appended.
const QUEUE_ENTRIES: usize = 4096;
/// Bytes that go into one atomic append.
const APPEND_BYTES: usize = 4 << 20;

enum Command {
    Append(Entry, OwnedSemaphorePermit),
    Flush(oneshot::Sender<State>),
}

/// The recorder is gone: the log is poisoned, or the process is ending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the change log takes no more entries")]
pub struct Closed;

/// Hands entries to the recorder. Cheap to clone; entries of one handle keep their order.
#[derive(Clone, Debug)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    /// Bounds the queue by bytes, in units of one.
    room_in_queue: Arc<Semaphore>,
    appended: watch::Receiver<Lsn>,
    durable: watch::Receiver<Lsn>,
    room: watch::Receiver<DiskSpace>,
}

/// The writing side, to be run on a thread of its own.
pub struct Recorder {
    log: Arc<dyn ChangeLog>,
    commands: mpsc::Receiver<Command>,
    appended: watch::Sender<Lsn>,
    durable: watch::Sender<Lsn>,
    room: watch::Sender<DiskSpace>,
}

/// A recorder for this log, and the handle to it.
pub fn new(log: Arc<dyn ChangeLog>) -> (Recorder, Handle) {
    let tail = log.state().tail;
    let (commands_tx, commands) = mpsc::channel(QUEUE_ENTRIES);
    let (appended, appended_rx) = watch::channel(tail);
    let (durable, durable_rx) = watch::channel(tail);
    let (room, room_rx) = watch::channel(DiskSpace::Enough);
    let handle = Handle {
        commands: commands_tx,
        room_in_queue: Arc::new(Semaphore::new(QUEUE_BYTES)),
        appended: appended_rx,
        durable: durable_rx,
        room: room_rx,
    };
    (Recorder { log, commands, appended, durable, room }, handle)
}

impl Handle {
    /// Queues an entry; waits while the queue is full.
    ///
    /// # Errors
    /// Where the recorder is gone.
    pub async fn append(&self, entry: Entry) -> Result<(), Closed> {
        let bytes = bytes(&entry).min(QUEUE_BYTES);
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        let permit = self.room_in_queue.clone().acquire_many_owned(permits).await.map_err(|_| Closed)?;
        self.commands.send(Command::Append(entry, permit)).await.map_err(|_| Closed)
    }

    /// Waits until everything queued before is durable, and tells the state of the log then.
    ///
    /// # Errors
    /// Where the recorder is gone.
    pub async fn flush(&self) -> Result<State, Closed> {
        let (reply, state) = oneshot::channel();
        self.commands.send(Command::Flush(reply)).await.map_err(|_| Closed)?;
        state.await.map_err(|_| Closed)
    }

    /// Up to which end LSN the log can be read.
    pub fn appended(&self) -> watch::Receiver<Lsn> {
        self.appended.clone()
    }

    /// Up to which end LSN the log survives a crash.
    pub fn durable(&self) -> watch::Receiver<Lsn> {
        self.durable.clone()
    }

    /// Whether the disk has room.
    pub fn room(&self) -> watch::Receiver<DiskSpace> {
        self.room.clone()
    }
}

/// What an entry counts for in the queue.
fn bytes(entry: &Entry) -> usize {
    const OVERHEAD: usize = 128;
    match entry {
        Entry::Transaction(transaction) => transaction.bytes(),
        Entry::Staged(staged) => {
            OVERHEAD + staged.messages.iter().map(|(_, m)| m.changes.len() + OVERHEAD).sum::<usize>()
        }
        _ => OVERHEAD,
    }
}

impl Recorder {
    /// Appends until all handles are gone, then syncs and returns. Blocks on the disk: to be run on its own thread.
    ///
    /// # Errors
    /// Where a write or sync failed.
    pub async fn run(self) -> Result<(), Error> {
        let log = self.log.clone();
        self.record().await.map_err(|error| match error {
            Error::Poisoned(cause) if !log.is_in_place() => Error::Displaced(cause),
            error => error,
        })
    }

    async fn record(mut self) -> Result<(), Error> {
        let mut unsynced_since: Option<Instant> = None;
        let (mut appended_at, mut last_bytes) = (Instant::now(), 0);
        let mut retained_at = Instant::now();
        let mut retained_bytes = 0;
        self.retain().await?;
        loop {
            let wake = unsynced_since.map_or(retained_at + RETAIN_EVERY, |since| since + SYNC_DELAY);
            let next = tokio::time::timeout_at(wake, self.commands.recv()).await;
            let mut flushes = Vec::new();
            match next {
                Ok(None) => {
                    if unsynced_since.is_some() {
                        self.sync()?;
                    }
                    return Ok(());
                }
                Ok(Some(first)) => {
                    let received = Instant::now();
                    if matches!(first, Command::Append(..)) && last_bytes < APPEND_BYTES {
                        tokio::time::sleep_until(appended_at + APPEND_EVERY).await;
                    }
                    let appended = self.append(first, &mut flushes)?;
                    if appended > 0 {
                        (appended_at, last_bytes) = (Instant::now(), appended);
                        retained_bytes += appended;
                        unsynced_since.get_or_insert(received);
                    }
                }
                Err(_elapsed) => {}
            }
            let due = unsynced_since.is_some_and(|since| since.elapsed() >= SYNC_DELAY);
            if due || (!flushes.is_empty() && unsynced_since.is_some()) {
                if !self.log.is_in_place() {
                    // Until it is: nothing is called durable that the next process would not find.
                    self.retain().await?;
                }
                self.sync()?;
                unsynced_since = None;
            }
            for flush in flushes {
                // Whoever asked may have gone.
                let _ = flush.send(self.log.state());
            }
            if retained_at.elapsed() >= RETAIN_EVERY || retained_bytes >= RETAIN_BYTES {
                self.retain().await?;
                retained_at = Instant::now();
                retained_bytes = 0;
            }
        }
    }

    /// Appends the first command and what is queued behind it; how many bytes that were.
    fn append(&mut self, first: Command, flushes: &mut Vec<oneshot::Sender<State>>) -> Result<usize, Error> {
        let mut entries = Vec::new();
        let mut permits = Vec::new();
        let mut total = 0;
        let mut next = Some(first);
        while let Some(command) = next {
            match command {
                Command::Append(entry, permit) => {
                    total += bytes(&entry);
                    entries.push(entry);
                    permits.push(permit);
                }
                Command::Flush(reply) => {
                    flushes.push(reply);
                    break;
                }
            }
            next = if total < APPEND_BYTES { self.commands.try_recv().ok() } else { None };
        }
        if !entries.is_empty() {
            self.log.append(&entries)?;
            self.appended.send_replace(self.log.state().tail);
        }
        Ok(total)
    }

    fn sync(&self) -> Result<(), Error> {
        // What is appended now is durable then; the log has no other writer.
        let tail = *self.appended.borrow();
        let began = std::time::Instant::now();
        self.log.sync()?;
        metrics().fsync_seconds.observe(began.elapsed().as_secs_f64());
        self.durable.send_replace(tail);
        Ok(())
    }

    /// Enforces retention. Where the disk has no room left even so, or the log's directory is gone, waits for it: nothing is appended
    /// meanwhile, and nothing becomes durable.
    async fn retain(&self) -> Result<(), Error> {
        loop {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
            let room = if self.log.is_in_place() { self.log.retain(now)? } else { DiskSpace::Elsewhere };
            let before = self.room.send_replace(room);
            match room {
                DiskSpace::Enough => {
                    match before {
                        DiskSpace::Enough => {}
                        DiskSpace::Short { .. } => tracing::info!("the disk of the change log has room again"),
                        DiskSpace::Elsewhere => tracing::info!("the directory of the change log is back"),
                    }
                    return Ok(());
                }
                DiskSpace::Short { free } => {
                    if !matches!(before, DiskSpace::Short { .. }) {
                        tracing::error!(
                            free_bytes = free,
                            "the disk of the change log is full up to changelog.disk_reserve and nothing is left to drop: \
                             reading from PostgreSQL stops, and WAL is kept there, until there is room"
                        );
                    }
                }
                DiskSpace::Elsewhere => {
                    if before != DiskSpace::Elsewhere {
                        tracing::error!(
                            "the directory of the change log (changelog.path) was moved, deleted, unmounted or replaced: reading \
                             from PostgreSQL stops, and WAL is kept there. Put the directory back, and tuplewatch goes on; a \
                             restart without it begins a new change log, and every token from before is refused"
                        );
                    }
                }
            }
            if self.commands.is_closed() {
                return Ok(());
            }
            tokio::time::sleep(ROOM_EVERY).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::changelog::model::ModelLog;

    #[tokio::test(start_paused = true)]
    async fn a_busy_log_is_synced_rarely_and_a_quiet_one_soon() {
        let (recorder, handle) = new(Arc::new(ModelLog::default()));
        let recording = tokio::spawn(recorder.run());
        let (synced, mut durable) = (watch::Sender::new(0), handle.durable());
        let counting = synced.clone();
        tokio::spawn(async move {
            while durable.changed().await.is_ok() {
                counting.send_modify(|count| *count += 1);
            }
        });
        for millisecond in 1..=1000 {
            handle.append(Entry::Progress(Lsn(millisecond))).await.unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let under_load = *synced.borrow();
        assert!((15..=20).contains(&under_load), "{under_load} syncs in a second under load");

        // Nothing to sync, and nothing is.
        tokio::time::sleep(Duration::from_secs(60)).await;
        let before = *synced.borrow();
        assert!(before <= under_load + 1, "{before} syncs, {under_load} of them under load");
        let (appended, mut durable) = (Instant::now(), handle.durable());
        handle.append(Entry::Progress(Lsn(2000))).await.unwrap();
        durable.wait_for(|durable| *durable == Lsn(2000)).await.unwrap();
        assert!(appended.elapsed() <= SYNC_DELAY + Duration::from_millis(1), "{:?}", appended.elapsed());
        drop(handle);
        recording.await.unwrap().unwrap();
    }
}
