//! The connection of the session to the change log and the hub.
//!
//! ```text
//!  session ──▶ LogAndHub ──┬──▶ recorder ──▶ change log
//!                          └──▶ hub ──▶ releaser ──▶ record_watermark ──▶ recorder
//! ```
//!
//! The session delivers one entry at a time, and neither it nor the hub knows the other. The watermark of the hub is
//! recorded in the log, so that a restart waits only for the visibility of later transactions.

use crate::changelog::recorder::{self, Closed};
use crate::changelog::{DiskSpace, Entry, State};
use crate::hub::Hub;
use crate::model::lsn::{EndLsn, Lsn, Xid8};
use crate::replication::{self, Sink};
use std::time::Duration;
use tokio::sync::watch;

/// The change log and the hub, as the sink of the session.
pub(crate) struct LogAndHub {
    pub(crate) recorder: recorder::Handle,
    pub(crate) hub: Hub,
}

impl Sink for LogAndHub {
    /// The log receives the entry first, because the window waits for the log before it evicts messages. The hub's part
    /// is last and atomic, so a cancelled delivery can be repeated.
    async fn deliver(&self, entry: Entry) -> Result<(), Closed> {
        self.recorder.append(entry.clone()).await?;
        match entry {
            Entry::Adopt(origin) => self.hub.begin_at(origin.source, origin.history, origin.lsn),
            Entry::Transaction(transaction) => self.hub.admit(transaction).await,
            Entry::Progress(lsn) => self.hub.progress(lsn),
            Entry::Gap(gap) => self.hub.interrupt(gap),
            Entry::Diverge { at, history } => {
                // Readers use the log for everything that the hub has dropped, so the log must have removed it as well.
                self.recorder.flush().await?;
                self.hub.diverge(at, history);
            }
            Entry::Staged(_) | Entry::Discard | Entry::Verified(_) | Entry::Mapping(_) | Entry::Watermark(_) => {}
        }
        Ok(())
    }

    async fn checkpoint(&self) -> Result<State, Closed> {
        self.recorder.flush().await
    }

    async fn recorded_since(&self, from: Lsn) -> Result<Vec<(EndLsn, Xid8)>, replication::Error> {
        Ok(self.hub.recorded_since(from).await.map_err(replication::Transient::Log)?)
    }

    fn durable(&self) -> watch::Receiver<Lsn> {
        self.recorder.durable()
    }

    fn room(&self) -> watch::Receiver<DiskSpace> {
        self.recorder.room()
    }
}

/// The shortest time between two records of the watermark. After a restart, the visibility of later transactions is
/// determined again.
const WATERMARK_EVERY: Duration = Duration::from_secs(1);

pub(crate) async fn record_watermark(mut watermark: watch::Receiver<Lsn>, recorder: recorder::Handle) {
    while watermark.changed().await.is_ok() {
        let lsn = *watermark.borrow_and_update();
        if recorder.append(Entry::Watermark(lsn)).await.is_err() {
            return;
        }
        tokio::time::sleep(WATERMARK_EVERY).await;
    }
}
