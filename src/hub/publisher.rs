//! Publishes what PostgreSQL's snapshots can see.
//!
//! A commit is on its way to us as soon as its record is flushed; it becomes visible only after that, and under synchronous
//! replication after the standby answered. `pg_visible_in_snapshot` of one snapshot decides for all that waits, so it is one
//! small statement a batch, whatever the number of transactions, tenants and subscribers.

use super::Hub;
use crate::lsn::Snapshot;
use std::fmt;
use std::time::Duration;

/// Takes snapshots: `pg_current_snapshot()` on the primary.
pub trait Snapshots: Send {
    /// Why none could be taken.
    type Error: fmt::Display + Send;

    /// A snapshot that is taken after the call.
    fn take(&mut self) -> impl Future<Output = Result<Snapshot, Self::Error>> + Send;
}

/// A transaction that was just streamed is nearly always visible at once: ask again without waiting, this often.
const IMMEDIATE_TRIES: u32 = 3;
const WAIT_MIN: Duration = Duration::from_millis(1);
/// Under synchronous replication the wait is a round trip to a standby, or until somebody repairs it.
const WAIT_MAX: Duration = Duration::from_millis(16);
/// Without PostgreSQL nothing can be known to be visible.
const WAIT_ON_ERROR: Duration = Duration::from_millis(250);

/// Runs until dropped.
pub async fn run(hub: Hub, mut snapshots: impl Snapshots) {
    let mut admitted = hub.watch_admitted();
    let mut appended = hub.inner.appended.clone();
    let mut tries = 0;
    let mut failing = false;
    loop {
        admitted.mark_unchanged();
        let (pending, needs_snapshot) = {
            let window = hub.window();
            (window.is_pending(), window.needs_snapshot())
        };
        if !pending {
            if admitted.changed().await.is_err() {
                return;
            }
            continue;
        }
        if hub.inner.options.before_visible {
            // Subscribers need not wait; what is visible is found out for those who start now.
            advance(&hub, None);
        }
        let snapshot = if needs_snapshot {
            match snapshots.take().await {
                Ok(snapshot) => {
                    failing = false;
                    Some(snapshot)
                }
                Err(error) => {
                    if !failing {
                        tracing::warn!(
                            "changes wait to be published: what is visible in PostgreSQL is unknown: {error}"
                        );
                    }
                    failing = true;
                    tokio::time::sleep(WAIT_ON_ERROR).await;
                    continue;
                }
            }
        } else {
            None
        };
        if advance(&hub, snapshot.as_ref()) {
            tries = 0;
            continue;
        }
        tries += 1;
        if tries > IMMEDIATE_TRIES {
            let wait = WAIT_MAX.min(WAIT_MIN * (1 << (tries - IMMEDIATE_TRIES).min(5)));
            // What waits may wait for the log, or for a standby.
            let _ = tokio::time::timeout(wait, appended.changed()).await;
        }
    }
}

/// Whether it got any further.
fn advance(hub: &Hub, snapshot: Option<&Snapshot>) -> bool {
    let appended = *hub.inner.appended.borrow();
    let (before, published, visible_before, visible) = {
        let mut window = hub.window();
        let (before, visible_before) = (window.published(), window.visible());
        let published = window.advance(snapshot, appended);
        (before, published, visible_before, window.visible())
    };
    if published != before {
        hub.inner.published.send_replace(published);
    }
    published != before || visible != visible_before
}
