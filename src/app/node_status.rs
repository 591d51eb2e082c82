//! The status of the process for probes and metrics, from the log, the hub, the session and the slot's monitor.
//!
//! `/readyz` repeats the judgement of [`super::delivery`], and adds the lag behind the server. Everything is read when
//! it is asked for, so no part maintains gauges.

use super::delivery::{Obstacle, Readiness};
use crate::admin::monitor::{Lag, Report, SlotReport};
use crate::api::http::Probes;
use crate::changelog::{ChangeLog, DiskSpace};
use crate::hub::Hub;
use crate::metrics::metrics;
use crate::metrics::process::Process;
use crate::metrics::readings::{self, Readings};
use crate::model::lsn::Lsn;
use crate::replication::Status;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// The sources of the status. It holds no handle whose drop a part waits for at shutdown.
pub(super) struct NodeStatus {
    pub(super) log: Arc<dyn ChangeLog>,
    pub(super) hub: Hub,
    pub(super) readiness: Readiness,
    pub(super) status: watch::Receiver<Status>,
    pub(super) received: watch::Receiver<Option<Lsn>>,
    pub(super) durable: watch::Receiver<Lsn>,
    pub(super) room: watch::Receiver<DiskSpace>,
    pub(super) reports: watch::Receiver<Option<Report>>,
    /// The largest lag at which `/readyz` succeeds. Zero permits any lag.
    pub(super) ready_lag_max: Duration,
}

/// The reason why `/readyz` fails.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub(super) enum NotReady {
    #[error(transparent)]
    Obstacle(#[from] Obstacle),
    #[error("the position of the server has not been read lately")]
    UnknownLag,
    #[error("{bytes} bytes of WAL behind, of unknown age: it is catching up")]
    OldLag { bytes: u64 },
    #[error(
        "{} s and {bytes} bytes of WAL behind the server (server.http.ready_lag_max)",
        time.as_secs()
    )]
    Lag { time: Duration, bytes: u64 },
}

impl Probes for NodeStatus {
    type NotReady = NotReady;

    fn ready(&self) -> Result<(), NotReady> {
        if let Some(obstacle) = *self.readiness.borrow() {
            return Err(obstacle.into());
        }
        if self.ready_lag_max.is_zero() {
            return Ok(());
        }
        let Some(lag) = self.report().and_then(|report| report.received) else {
            return Err(NotReady::UnknownLag);
        };
        if lag.is_older {
            return Err(NotReady::OldLag { bytes: lag.bytes });
        }
        if lag.time < self.ready_lag_max {
            return Ok(());
        }
        Err(NotReady::Lag { time: lag.time, bytes: lag.bytes })
    }

    fn metrics(&self) -> String {
        metrics().text(&self.read())
    }
}

impl NodeStatus {
    /// The latest report of the monitor, unless it is outdated.
    fn report(&self) -> Option<Report> {
        self.reports.borrow().clone().filter(|report| report.at.elapsed() <= Report::AGE_MAX)
    }

    fn read(&self) -> Readings {
        // This order matters: what is acknowledged was durable before, and what is durable was received before.
        let looked_at_seconds = self.reports.borrow().as_ref().map(|report| seconds(report.at_time));
        let server = self.report().map(server);
        let durable = *self.durable.borrow();
        let received = self.received.borrow().unwrap_or_default().max(durable);
        let window = self.hub.usage();
        let unreleased_since = self.hub.waits().unreleased_since;
        Readings {
            not_ready_reason: self.readiness.borrow().map(Obstacle::reason),
            oldest_waiting_seconds: unreleased_since.map_or(0.0, |since| since.elapsed().as_secs_f64()),
            session_state: match *self.status.borrow() {
                Status::Connecting => "connecting",
                Status::Streaming => "streaming",
                Status::Retrying => "retrying",
                Status::Failed => "failed",
            },
            received_lsn: known(received),
            durable_lsn: known(durable),
            released_lsn: known(window.released),
            looked_at_seconds,
            server,
            log: self.read_log(),
            window: readings::Window {
                bytes: window.bytes as u64,
                bytes_max: window.bytes_max as u64,
                pending_transactions: window.pending as u64,
            },
            stream_lag_bytes: window.lags,
            process: Process::read(),
        }
    }

    fn read_log(&self) -> readings::Log {
        let usage = self.log.usage();
        readings::Log {
            bytes: usage.bytes,
            bytes_max: usage.bytes_max,
            journal_bytes: usage.journal_bytes,
            segments: usage.segments,
            horizon_age_seconds: (seconds(SystemTime::now()) - usage.oldest_unix_seconds as f64).max(0.0),
            disk_free_bytes: usage.free_bytes,
            disk_reserve_bytes: usage.reserve_bytes,
            has_room: !matches!(*self.room.borrow(), DiskSpace::Short { .. }),
        }
    }
}

fn server(report: Report) -> readings::Server {
    readings::Server {
        lsn: report.wal_end.0,
        lag_bytes: report.received.map(|lag| lag.bytes),
        lag_seconds: report.received.map(lag_seconds),
        slot: report.slot.map(slot),
    }
}

fn slot(slot: SlotReport) -> readings::Slot {
    readings::Slot {
        is_active: slot.is_active,
        wal_status: slot.wal_status,
        is_lost: slot.is_lost,
        acknowledged_lsn: slot.confirmed.map(|lsn| lsn.0),
        lag_bytes: slot.lag.map(|lag| lag.bytes),
        lag_seconds: slot.lag.map(lag_seconds),
        retained_bytes: slot.retained_bytes,
        safe_bytes: slot.safe_bytes,
    }
}

const fn lag_seconds(lag: Lag) -> f64 {
    lag.time.as_secs_f64()
}

/// Zero denotes a log that has not begun.
fn known(lsn: Lsn) -> Option<u64> {
    (lsn > Lsn::ZERO).then_some(lsn.0)
}

fn seconds(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
