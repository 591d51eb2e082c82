//! The counters of messages and bytes that a connection sends on its streams of Watch.
//!
//! Threads that share a counter contend for it with every message. So the streams of a connection count in the
//! connection, which belongs to one task. Each poll of the connection adds its counts to the metrics once.

use crate::metrics::metrics;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The counters of one connection. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct SendCounters(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    messages: AtomicU64,
    bytes: AtomicU64,
}

impl SendCounters {
    /// Adds to the counts. Only the task of the connection may call this.
    pub(super) fn add(&self, messages: usize, bytes: usize) {
        for (count, more) in [(&self.0.messages, messages), (&self.0.bytes, bytes)] {
            // No other task changes the count, so a load and a store suffice.
            count.store(count.load(Ordering::Relaxed) + more as u64, Ordering::Relaxed);
        }
    }

    /// Adds the counts since the last call to the metrics.
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
