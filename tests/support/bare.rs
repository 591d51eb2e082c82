//! The baseline of the benchmarks: the client of pgwire-replication reads a slot and does nothing else.

use pgwire_replication::{Lsn, ReplicationClient, ReplicationConfig, ReplicationEvent};
use std::time::Duration;

/// Commits between acknowledgements, each of which wakes the client.
const ACKNOWLEDGE_EVERY: u32 = 1_000;

/// Reads its own slot and reports as often as tuplewatch does, with a queue of the best length for it.
pub(crate) struct Bare {
    client: ReplicationClient,
    commits: u32,
}

impl Bare {
    /// Returns once the server streams.
    pub(crate) async fn start(config: ReplicationConfig) -> Self {
        let config = config
            .with_status_interval(Duration::from_millis(250))
            .with_wakeup_interval(Duration::from_millis(500))
            .with_buffer_size(8_192)
            .with_start_lsn(Lsn::ZERO);
        let mut client = ReplicationClient::connect_gated(config).await.unwrap();
        client.start().await.unwrap();
        client.wait_started().await.unwrap();
        Self { client, commits: 0 }
    }

    /// The next event. Acknowledges commits in batches.
    pub(crate) async fn next(&mut self) -> ReplicationEvent {
        let event = self.client.recv().await.unwrap().expect("the stream does not end");
        if let ReplicationEvent::Commit { end_lsn, .. } = event {
            self.commits += 1;
            if self.commits.is_multiple_of(ACKNOWLEDGE_EVERY) {
                self.client.update_applied_lsn(end_lsn);
            }
        }
        event
    }

    /// Ends the session, which frees the slot.
    pub(crate) async fn close(mut self) {
        self.client.shutdown().await.unwrap();
    }
}

/// Whether the event is a row: pgoutput's Insert, Update or Delete.
pub(crate) fn is_row(event: &ReplicationEvent) -> bool {
    matches!(event, ReplicationEvent::XLogData { data, .. } if matches!(data.first(), Some(b'I' | b'U' | b'D')))
}
