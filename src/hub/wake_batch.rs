//! Wakes readers from within the thread that serves them.
//!
//! A runtime of one thread runs what wakes inside it in that order, and what is woken from outside one by one in between. So the
//! connection that the first of a thousand woken readers writes to is flushed with one message in it where the releaser wakes
//! them, and with a message of each of its readers where they are woken from within: a tenth of the processor time, in writes
//! that are saved.

use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;
use tokio::sync::Notify;

/// What a thread's readers are woken by. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct WakeBatch {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Mostly one for each reader that waited; gone when it rings.
    waiting: Mutex<Vec<Waker>>,
    rung: Notify,
}

impl WakeBatch {
    /// Wakes for ever; to be run on the thread.
    pub async fn run<T>(self) -> T {
        let mut woken = Vec::new();
        loop {
            self.inner.rung.notified().await;
            std::mem::swap(&mut *self.inner.waiting.lock().unwrap_or_else(PoisonError::into_inner), &mut woken);
            woken.drain(..).for_each(Waker::wake);
        }
    }

    /// One more to be woken when the wake_batch rings.
    pub(super) fn add(&self, waker: Waker) {
        self.inner.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(waker);
    }

    pub(super) fn ring(&self) {
        if !self.inner.waiting.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            self.inner.rung.notify_one();
        }
    }
}
