//! The recorder, the one writer of the change log: a thread that appends entries in order, syncs them in groups, and
//! applies retention.
//!
//! Live delivery does not wait for the recorder, but acknowledgements to the slot do. Under load the recorder therefore
//! syncs only every [`SYNC_DELAY`], and in a quiet log soon after an append. One watch publishes the LSN up to which
//! the log is *appended*, and so readable; another the LSN up to which it is *durable*, and may be acknowledged. A
//! failed write ends the recorder, and then the process.

use super::{ChangeLog, DiskSpace, Entry, Error, State};
use crate::metrics::metrics;
use crate::model::lsn::Lsn;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;

/// The longest time between an append and its sync.
///
/// The session acknowledges WAL at most once a second, so this delay costs the server little WAL. It limits a busy log
/// to 20 syncs a second on any disk.
pub(crate) const SYNC_DELAY: Duration = Duration::from_millis(50);

/// The shortest time between two appends, so that a busy log gathers entries: one append of many small transactions
/// writes hardly more than an append of one, and wakes this thread once. Subscribers read from memory, and
/// acknowledgements wait for the sync anyway. So this delays only transactions that are too large for memory, tokens
/// that wait for the log, and flushes.
const APPEND_EVERY: Duration = Duration::from_millis(2);
/// The interval of retention.
const RETAIN_EVERY: Duration = Duration::from_secs(5);
/// The number of appended bytes after which retention runs early.
const RETAIN_BYTES: usize = 64 << 20;
/// The interval at which a full disk is checked again.
const ROOM_EVERY: Duration = Duration::from_secs(1);
/// The bytes that may wait to be appended. Beyond them, [`Handle::append`] waits.
const QUEUE_BYTES: usize = 16 << 20;
/// The entries that may wait to be appended.
const QUEUE_ENTRIES: usize = 4096;
/// The bytes of one atomic append.
const APPEND_BYTES: usize = 4 << 20;

enum Command {
    Append(Entry, OwnedSemaphorePermit),
    Flush(oneshot::Sender<State>),
}

/// The recorder has ended: the log is poisoned, or the process is ending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the change log takes no more entries")]
pub(crate) struct Closed;

/// Hands entries to the recorder. Cheap to clone. Entries of one handle keep their order.
#[derive(Clone, Debug)]
pub(crate) struct Handle {
    commands: mpsc::Sender<Command>,
    /// Bounds the queue by bytes: one permit for each byte.
    room_in_queue: Arc<Semaphore>,
    appended: watch::Receiver<Lsn>,
    durable: watch::Receiver<Lsn>,
    room: watch::Receiver<DiskSpace>,
}

/// The writing side. Run it on its own thread.
pub(crate) struct Recorder {
    log: Arc<dyn ChangeLog>,
    commands: mpsc::Receiver<Command>,
    appended: watch::Sender<Lsn>,
    durable: watch::Sender<Lsn>,
    room: watch::Sender<DiskSpace>,
}

/// Returns a recorder for this log, and a handle to it.
pub(crate) fn new(log: Arc<dyn ChangeLog>) -> (Recorder, Handle) {
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
    /// Queues an entry. Waits while the queue is full.
    ///
    /// # Errors
    /// If the recorder has ended.
    pub(crate) async fn append(&self, entry: Entry) -> Result<(), Closed> {
        let bytes = bytes(&entry).min(QUEUE_BYTES);
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        let permit = self.room_in_queue.clone().acquire_many_owned(permits).await.map_err(|_| Closed)?;
        self.commands.send(Command::Append(entry, permit)).await.map_err(|_| Closed)
    }

    /// Waits until all entries queued so far are durable, and returns the state of the log at that time.
    ///
    /// # Errors
    /// If the recorder has ended.
    pub(crate) async fn flush(&self) -> Result<State, Closed> {
        let (reply, state) = oneshot::channel();
        self.commands.send(Command::Flush(reply)).await.map_err(|_| Closed)?;
        state.await.map_err(|_| Closed)
    }

    /// The end LSN up to which the log can be read.
    pub(crate) fn appended(&self) -> watch::Receiver<Lsn> {
        self.appended.clone()
    }

    /// The end LSN up to which the log survives a crash.
    pub(crate) fn durable(&self) -> watch::Receiver<Lsn> {
        self.durable.clone()
    }

    /// Whether the log may append.
    pub(crate) fn room(&self) -> watch::Receiver<DiskSpace> {
        self.room.clone()
    }
}

/// The bytes that an entry takes up in the queue.
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
    /// Appends until all handles are dropped, then syncs and returns. It blocks on the disk, so it needs its own
    /// thread.
    ///
    /// # Errors
    /// If a write or a sync fails.
    pub(crate) async fn run(self) -> Result<(), Error> {
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
                    // Wait until the directory is back: the next process would not find what this one calls durable.
                    self.retain().await?;
                }
                self.sync()?;
                unsynced_since = None;
            }
            for flush in flushes {
                // The caller may have stopped waiting.
                let _ = flush.send(self.log.state());
            }
            if retained_at.elapsed() >= RETAIN_EVERY || retained_bytes >= RETAIN_BYTES {
                self.retain().await?;
                retained_at = Instant::now();
                retained_bytes = 0;
            }
        }
    }

    /// Appends the first command and the commands queued behind it. Returns the number of appended bytes.
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
        // The log has no other writer, so the sync covers exactly the tail of now.
        let tail = *self.appended.borrow();
        let began = std::time::Instant::now();
        self.log.sync()?;
        metrics().fsync_seconds.observe(began.elapsed().as_secs_f64());
        self.durable.send_replace(tail);
        Ok(())
    }

    /// Applies retention. If the disk is still full, or the log's directory is gone, waits until that changes.
    /// Meanwhile nothing is appended, and nothing becomes durable.
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
                             from PostgreSQL stops, and WAL is kept there. Put the directory back, and tuplewatch continues; a \
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
    use crate::changelog::reference::ModelLog;

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

        // There is nothing to sync.
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
