//! Wakes the readers of a thread together, from within that thread.
//!
//! A runtime of one thread runs tasks that are woken inside it in that order, and takes tasks that are woken from outside one by one in
//! between. Woken from outside, the first of a thousand readers has its connection flushed with one message in it. Woken from within,
//! all readers of a connection run first, and it is flushed once with a message for each: a tenth of the processor time.

use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;
use tokio::sync::Notify;

/// The readers of one thread that wait to be woken. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct WakeBatch {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// About one for each reader that waits. Emptied when they are woken.
    waiting: Mutex<Vec<Waker>>,
    due: Notify,
}

impl WakeBatch {
    /// Wakes readers whenever they are due, and never returns. Must run on their thread.
    pub async fn run<T>(self) -> T {
        let mut woken = Vec::new();
        loop {
            self.inner.due.notified().await;
            std::mem::swap(&mut *self.inner.waiting.lock().unwrap_or_else(PoisonError::into_inner), &mut woken);
            woken.drain(..).for_each(Waker::wake);
        }
    }

    /// Adds a reader, to be woken with the others.
    pub(super) fn add(&self, waker: Waker) {
        self.inner.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(waker);
    }

    /// Has the readers woken that were added.
    pub(super) fn wake(&self) {
        if !self.inner.waiting.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            self.inner.due.notify_one();
        }
    }
}
