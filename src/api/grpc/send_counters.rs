//! Counts what a connection sends to its streams of Watch.
//!
//! Threads that share a counter wait for each other with every message. So streams count in their connection, which one task
//! has, and the connection adds that up whenever it is polled: once for all the streams that it sent something to.

use crate::metrics::metrics;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Of one connection. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct SendCounters(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    messages: AtomicU64,
    bytes: AtomicU64,
}

impl SendCounters {
    /// Only by the task of the connection.
    pub(super) fn add(&self, messages: usize, bytes: usize) {
        for (count, more) in [(&self.0.messages, messages), (&self.0.bytes, bytes)] {
            // No other task changes it, so that two plain steps do.
            count.store(count.load(Ordering::Relaxed) + more as u64, Ordering::Relaxed);
        }
    }

    /// Adds up what was counted since the last time.
    pub(super) fn settle(&self) {
        let messages = self.0.messages.load(Ordering::Relaxed);
        if messages > 0 {
            metrics().grpc.messages_sent.inc_by(messages);
            metrics().grpc.bytes_sent.inc_by(self.0.bytes.load(Ordering::Relaxed));
            self.0.messages.store(0, Ordering::Relaxed);
            self.0.bytes.store(0, Ordering::Relaxed);
        }
    }
}
