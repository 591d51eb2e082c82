//! The hub: from the stream of received transactions to any number of subscriptions.
//!
//! ```text
//!               admit                release                      subscriptions
//!   session ───────────▶ window ──(visible in Postgres?)──▶ released ──▶ one reader each:
//!                        (memory, bounded)                                window, or change log
//!                          │ evicts only transactions that the log has
//!                          ▼
//!                        change log
//! ```
//!
//! - **A delivered change is already visible to SELECT.** PostgreSQL streams a commit before it is visible, and a cache that reloads on
//!   the message would cache the old state again. So a transaction is released once a snapshot of PostgreSQL sees it. One statement
//!   decides for all transactions that wait ([`releaser`]).
//! - **One reader over memory and disk.** A [`Subscription`] is a position. It yields the messages after it, from memory if memory has
//!   them and from the log otherwise, and then waits. There is no catch-up mode.
//! - **A slow subscriber delays nobody else.** It holds no memory: the window evicts by its own bound, and the subscription continues
//!   from the log.
//! - A full window whose oldest part is not in the log yet makes [`Hub::admit`] wait, and so the slot is not read.
//!
//! This module reads the log and never writes it; it knows nothing of replication.

mod feeds;
mod item;
pub mod primary;
pub mod releaser;
pub mod start;
mod subscription;
mod wake_batch;
mod window;

#[cfg(test)]
mod tests;

pub use item::{EnvelopeForm, Item};
pub use subscription::{End, Filter, Subscription};
pub use wake_batch::WakeBatch;

use crate::changelog::ChangeLog;
use crate::model::lsn::{CommitLsn, EndLsn, Lsn, Xid8};
use crate::model::timeline::{History, Source};
use crate::model::transaction::{Gap, Message, Transaction};
use bytes::Bytes;
use item::LongItems;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use window::Window;

/// Reads of the log that run at the same time; more wait. They are short, and a thread each.
const DISK_READS_MAX: usize = 4;

/// Bounds and behaviour.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Memory for recent messages, in bytes.
    pub window_bytes: usize,
    /// Release at once, without asking whether PostgreSQL's snapshots see it yet.
    pub before_visible: bool,
}

/// The contents of memory, and the progress of its readers.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    /// Bytes that recent messages take.
    pub bytes: usize,
    /// Bytes that they may take.
    pub bytes_max: usize,
    /// Transactions that wait to be visible.
    pub pending: usize,
    /// Everything before is released.
    pub released: Lsn,
    /// The distance of each subscription from that LSN, in bytes of WAL; zero for a subscription that waits for more.
    pub lags: Vec<u64>,
}

/// The transactions that wait in memory, and since when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waits {
    /// When the oldest transaction was received that was not released yet.
    pub unreleased_since: Option<Instant>,
    /// Since when there is no room for the next transaction.
    pub full_since: Option<Instant>,
}

/// The source and the history that positions belong to. Cheap to clone.
pub type Origin = (Source, Arc<History>);

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct Hub {
    inner: Arc<Inner>,
    /// The batch that wakes subscriptions of this handle.
    wake_batch: Option<WakeBatch>,
}

struct Inner {
    log: Arc<dyn ChangeLog>,
    /// The end LSN up to which the log can be read.
    appended: watch::Receiver<Lsn>,
    /// Held for short, bounded work, and never across an await.
    window: Mutex<Window>,
    /// Tells the releaser that something waits.
    admitted: watch::Sender<Lsn>,
    /// Follows the window's watermark, and wakes transactions that wait for room in the window.
    watermark: watch::Sender<Lsn>,
    disk_reads: Arc<Semaphore>,
    long_items: LongItems,
    options: Options,
}

impl Hub {
    /// A hub over this log. `appended` follows the log's tail.
    ///
    /// # Errors
    /// Where the log cannot be read.
    pub fn new(
        log: Arc<dyn ChangeLog>,
        appended: watch::Receiver<Lsn>,
        options: Options,
    ) -> Result<Self, crate::changelog::Error> {
        let state = log.state();
        // Transactions that the log has and PostgreSQL may not show yet wait like received ones.
        let in_doubt = log.transactions_since(state.watermark)?;
        let origin = state.origin.map(|origin| (origin.source, Arc::new(origin.history)));
        let window = Window::new(options, origin, state.watermark, &in_doubt, state.tail, log.gaps());
        Ok(Self {
            inner: Arc::new(Inner {
                log,
                appended,
                window: Mutex::new(window),
                admitted: watch::Sender::new(state.tail),
                watermark: watch::Sender::new(state.watermark),
                disk_reads: Arc::new(Semaphore::new(DISK_READS_MAX)),
                long_items: LongItems::default(),
                options,
            }),
            wake_batch: None,
        })
    }

    /// A handle for a thread that serves many subscriptions, and the batch that has to run there and wakes them together.
    pub fn with_wake_batch(&self) -> (Self, WakeBatch) {
        let wake_batch = WakeBatch::default();
        self.window().add_wake_batch(wake_batch.clone());
        (Self { inner: self.inner.clone(), wake_batch: Some(wake_batch.clone()) }, wake_batch)
    }

    /// Ends all subscriptions, and every later one.
    pub fn close(&self) {
        self.window().close();
    }

    fn window(&self) -> MutexGuard<'_, Window> {
        // A panic while it was held would have broken an invariant, and ends the process.
        self.inner.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a transaction in stream order. Waits while the window is full of transactions that are not in the log yet, or not visible yet.
    pub async fn admit(&self, transaction: Arc<Transaction>) {
        // Made before the window is locked, as there can be many.
        let mut items = window::items_of(&transaction);
        if !self.window().admit(&transaction, &mut items, *self.inner.appended.borrow()) {
            self.wait_for_room(&transaction, items).await;
        }
        self.inner.admitted.send_replace(transaction.end.0);
    }

    /// Returns once it is admitted, or the log is gone and the process with it.
    async fn wait_for_room(&self, transaction: &Transaction, mut items: Vec<Arc<Item>>) {
        let mut appended = self.inner.appended.clone();
        let mut watermark = self.inner.watermark.subscribe();
        loop {
            watermark.mark_unchanged();
            let tail = *appended.borrow_and_update();
            if self.window().admit(transaction, &mut items, tail) {
                return;
            }
            tokio::select! {
                biased;
                changed = appended.changed() => if changed.is_err() {
                    return;
                },
                _ = watermark.changed() => {}
            }
        }
    }

    /// Nothing for us up to this LSN.
    pub fn progress(&self, lsn: Lsn) {
        self.window().admit_mark(lsn, None);
        self.inner.admitted.send_replace(lsn);
    }

    /// A gap that is not inside a transaction.
    pub fn interrupt(&self, gap: Gap) {
        let lsn = gap.to.lsn;
        self.window().admit_mark(lsn, Some(gap));
        self.inner.admitted.send_replace(lsn);
    }

    /// The server continues on another history: forgets everything past `at`, and ends the streams that have delivered something of it.
    pub fn diverge(&self, at: Lsn, history: History) {
        let mut window = self.window();
        window.diverge(at, Arc::new(history));
        // Whoever records how far everything is visible must not record it of the abandoned history: on the new one it may lie
        // inside a transaction.
        self.inner.watermark.send_replace(window.watermark());
    }

    /// An empty log begins here.
    pub fn begin_at(&self, source: Source, history: History, lsn: Lsn) {
        self.window().begin_at((source, Arc::new(history)), lsn);
        self.inner.watermark.send_replace(lsn);
        self.inner.admitted.send_replace(lsn);
    }

    /// The envelope of a message in this form: made once, by the first caller, and shared by all that read the message from memory.
    /// All callers give the same `make`.
    ///
    /// # Errors
    /// Those of `make`, which the next caller then tries again.
    pub fn envelope<E>(
        &self,
        item: &Item,
        form: EnvelopeForm,
        make: impl FnOnce(&Message) -> Result<Bytes, E>,
    ) -> Result<Bytes, E> {
        if let Some(made) = item.made(form) {
            return Ok(made.clone());
        }
        let make = |message: &Message| {
            let made = make(message)?;
            form.count_made();
            Ok(made)
        };
        item.make(form, make, |made| {
            form.is_counted_up_front() || self.window().reserve(item, made.len(), *self.inner.appended.borrow())
        })
    }

    /// The source and the history that positions belong to; `None` until they are known.
    pub fn origin(&self) -> Option<Origin> {
        self.window().origin().cloned()
    }

    /// The contents of memory, and the progress of its readers. Delays releases for a moment, which grows with the number of subscriptions.
    pub fn usage(&self) -> Usage {
        self.window().usage()
    }

    /// The transactions that wait, and since when.
    pub fn waits(&self) -> Waits {
        self.window().waits()
    }

    /// Follows the LSN up to which everything is visible to new snapshots. May repeat a value.
    pub fn watch_watermark(&self) -> watch::Receiver<Lsn> {
        self.inner.watermark.subscribe()
    }

    /// End LSN and id of the transactions with changes that the log has from `from` on.
    ///
    /// # Errors
    /// Where the log cannot be read.
    pub async fn recorded_since(&self, from: Lsn) -> Result<Vec<(EndLsn, Xid8)>, crate::changelog::Error> {
        self.on_disk(move |log| log.transactions_since(from)).await
    }

    /// The id of the last transaction with changes, of whichever tenant, that committed before `commit`; `None` where there is
    /// none any more.
    ///
    /// # Errors
    /// Where the log cannot be read.
    pub async fn transaction_before(&self, commit: CommitLsn) -> Result<Option<Xid8>, crate::changelog::Error> {
        let recent = self.window().transaction_before(commit);
        match recent {
            Some(xid) => Ok(Some(xid)),
            // The log has older transactions, and those that never were in memory.
            None => self.on_disk(move |log| log.transaction_before(commit)).await,
        }
    }

    /// Runs a short read of the log, on a thread for such where it may block.
    async fn on_disk<T: Send + 'static>(
        &self,
        read: impl FnOnce(&dyn ChangeLog) -> Result<T, crate::changelog::Error> + Send + 'static,
    ) -> Result<T, crate::changelog::Error> {
        if !self.inner.log.reads_block() {
            return read(&*self.inner.log);
        }
        let permit =
            self.inner.disk_reads.clone().acquire_owned().await.map_err(crate::changelog::Error::unreadable)?;
        let log = self.inner.log.clone();
        let reading = tokio::task::spawn_blocking(move || {
            // Held for as long as the read runs, even if its subscription was dropped meanwhile.
            let _permit = permit;
            read(&*log)
        });
        reading.await.map_err(crate::changelog::Error::unreadable)?
    }
}
