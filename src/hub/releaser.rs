//! Releases transactions that PostgreSQL's snapshots can see.
//!
//! A commit is sent to us as soon as its record is flushed. It becomes visible after that, and under synchronous replication only after the
//! standby has answered. One snapshot (`pg_current_snapshot()`) decides for all transactions that wait: one small statement a batch, whatever
//! the number of transactions, tenants and subscribers.

use super::Hub;
use crate::model::lsn::Snapshot;
use std::fmt;
use std::time::Duration;
use tokio::time::Instant;

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
/// A snapshot that sees so many new transactions shows a backlog, or a high rate of commits.
const MANY: usize = 64;
/// The least time from the start of one statement to that of the next then, so that the primary executes few of them.
const MANY_EVERY: Duration = Duration::from_millis(4);
/// How often a snapshot is taken where nothing waits for one.
const PROBE_EVERY: Duration = Duration::from_secs(5);
/// Without PostgreSQL nothing can be known to be visible.
const WAIT_ON_ERROR: Duration = Duration::from_millis(250);

/// Runs until dropped, or until the log is gone.
pub async fn run(hub: Hub, snapshots: impl Snapshots) {
    if hub.inner.options.before_visible {
        // Subscribers need not wait; what is visible is found out for those who start now.
        tokio::join!(release_at_once(hub.clone()), release_visible(hub, snapshots));
    } else {
        release_visible(hub, snapshots).await;
    }
}

async fn release_at_once(hub: Hub) {
    let mut admitted = hub.inner.admitted.subscribe();
    let mut appended = hub.inner.appended.clone();
    loop {
        advance(&hub, None);
        let changed = tokio::select! {
            biased;
            changed = admitted.changed() => changed,
            changed = appended.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

async fn release_visible(hub: Hub, mut snapshots: impl Snapshots) {
    let mut admitted = hub.inner.admitted.subscribe();
    let mut appended = hub.inner.appended.clone();
    let mut tries = 0;
    let mut failing = false;
    let mut probe_at = Instant::now();
    loop {
        admitted.mark_unchanged();
        let (pending, needs_snapshot) = {
            let window = hub.window();
            (window.is_pending(), window.needs_snapshot())
        };
        if !pending && !failing && Instant::now() < probe_at {
            if let Ok(Err(_)) = tokio::time::timeout_at(probe_at, admitted.changed()).await {
                return;
            }
            continue;
        }
        // Also where nothing waits: an idle node must find out that it could not release the next change.
        let asked_at = Instant::now();
        let snapshot = if needs_snapshot || !pending {
            probe_at = asked_at + PROBE_EVERY;
            match snapshots.take().await {
                Ok(snapshot) => {
                    failing = false;
                    Some(snapshot)
                }
                Err(error) => {
                    if !failing {
                        tracing::warn!(
                            "PostgreSQL does not say which transactions are visible, so changes wait to be released: {error}"
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
        let done = advance(&hub, snapshot.as_ref());
        if done.is_further || !pending {
            tries = 0;
            if snapshot.is_some() && done.seen >= MANY {
                tokio::time::sleep_until(asked_at + MANY_EVERY).await;
            }
            continue;
        }
        tries += 1;
        if tries > IMMEDIATE_TRIES {
            let wait = WAIT_MAX.min(WAIT_MIN * (1 << (tries - IMMEDIATE_TRIES).min(5)));
            // What waits may wait for the log, or for a standby.
            if let Ok(Err(_)) = tokio::time::timeout(wait, appended.changed()).await {
                return;
            }
        }
    }
}

/// What [`advance`] did.
struct Advance {
    /// Whether anything was released or seen.
    is_further: bool,
    /// The transactions and other entries that are visible now, and were not before.
    seen: usize,
}

/// Releases what it can.
fn advance(hub: &Hub, snapshot: Option<&Snapshot>) -> Advance {
    let appended = *hub.inner.appended.borrow();
    let mut window = hub.window();
    let before = (window.released(), window.watermark(), window.pending());
    window.advance(snapshot, appended);
    let after = (window.released(), window.watermark(), window.pending());
    if after.1 != before.1 || after.2 != before.2 {
        hub.inner.watermark.send_replace(after.1);
    }
    Advance { is_further: after != before, seen: before.2.saturating_sub(after.2) }
}
