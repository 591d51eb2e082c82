//! Readiness: whether changes are delivered. `/readyz`, `grpc.health.v1`, `tuplewatch health` and the metrics all
//! repeat this one judgement.
//!
//! A node is ready if the slot streams, if PostgreSQL answers which transactions are visible, if streams can start, and
//! if nothing is stuck on the way. This also holds for an idle node: every few seconds, [`super::primary`] and the
//! hub's releaser probe what the next change will need.
//!
//! Readiness does not flap. The status of the session counts at once. A failing statement makes a ready node unready
//! only after [`Answers::LATE`], and an unready node becomes ready only after an answer. So one failed statement
//! changes nothing.
//!
//! The lag behind the server does not count here: a node that lags still delivers. Only `/readyz` considers it
//! (`server.http.ready_lag_max`).

use super::primary::{Answers, Silence, Why};
use crate::changelog::DiskSpace;
use crate::hub::{Hub, Waits};
use crate::model::lsn::Lsn;
use crate::postgres::primary::PrimaryConnector;
use crate::replication::Status;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// The interval between judgements. A change of the session's status, or of the log's room, causes another one at once.
const JUDGE_EVERY: Duration = Duration::from_secs(1);
/// A commit becomes visible at once, or when a synchronous standby confirms it. A longer wait needs an operator.
const INVISIBLE_MAX: Duration = Duration::from_secs(15);
/// A sync takes milliseconds. One that takes this long is not slow, it hangs.
const UNSYNCED_MAX: Duration = Duration::from_secs(30);
/// Each release, and each write to the log, frees memory of the window.
const FULL_MAX: Duration = Duration::from_secs(15);

/// The reason why nothing is delivered. The messages contain neither hosts nor data, because probes need no
/// credentials. They are ASCII.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Obstacle {
    #[error("tuplewatch is starting: PostgreSQL has not answered all questions yet")]
    Starting,
    #[error("tuplewatch is shutting down")]
    Stopping,
    #[error(
        "the directory of the change log (changelog.path) was moved, deleted, unmounted or replaced: put it back, or restart \
         tuplewatch to begin a new change log"
    )]
    LogGone,
    #[error(
        "the disk of the change log is full up to changelog.disk_reserve, so nothing is read from PostgreSQL: free some space"
    )]
    DiskFull,
    #[error(
        "PostgreSQL takes no more connections from tuplewatch: end others, or raise the limit of the role, the database or the \
         server that tuplewatch doctor names"
    )]
    ConnectionLimit,
    #[error("the slot does not stream yet: the log of tuplewatch has the reason")]
    Connecting,
    #[error("the slot does not stream, and is tried again: see the log of tuplewatch, or ask tuplewatch doctor")]
    Retrying,
    #[error(
        "the slot does not stream until something is repaired: see the log of tuplewatch, or ask tuplewatch doctor"
    )]
    Failed,
    #[error("PostgreSQL does not say which transactions are visible, so no change can be released: {}", cause(*.0))]
    VisibilityUnknown(Option<Why>),
    #[error("no stream can start, because PostgreSQL does not answer for its position: {}", cause(*.0))]
    NoStarts(Option<Why>),
    #[error(
        "a transaction has committed and is not visible to new snapshots of PostgreSQL: its commit waits for a synchronous \
         standby (wait_event SyncRep in pg_stat_activity): repair the standby, or take it out of synchronous_standby_names"
    )]
    NotVisible,
    #[error("the disk of the change log does not complete writes, so nothing is acknowledged: check the disk")]
    LogStuck,
    #[error(
        "memory is full of changes that are not yet released, or not yet in the change log (changelog.memory_window)"
    )]
    WindowFull,
}

/// The cause and the remedy of a statement without an answer.
const fn cause(why: Option<Why>) -> &'static str {
    match why {
        None | Some(Why::Late) => {
            "it has not answered in time: look for an overload, and for locks (pg_stat_activity, pg_locks)"
        }
        Some(Why::Limit) => {
            "it takes no more connections: end others, or raise the limit of the role, the database or the server that \
             tuplewatch doctor names"
        }
        Some(Why::Rights) => "the role lacks a privilege: tuplewatch doctor names it, and the statement that grants it",
        Some(Why::Locked) => "the table of tenants is locked: look for the transaction that holds the lock (pg_locks)",
        Some(Why::Other) => "see the log of tuplewatch, or ask tuplewatch doctor",
    }
}

impl Obstacle {
    /// The label of the obstacle in the metrics, one of
    /// [`NOT_READY_REASONS`](crate::metrics::readings::NOT_READY_REASONS).
    pub(super) const fn reason(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Stopping => "stopping",
            Self::LogGone => "log_gone",
            Self::DiskFull => "disk_full",
            Self::ConnectionLimit => "connection_limit",
            Self::Connecting | Self::Retrying | Self::Failed => "not_streaming",
            Self::VisibilityUnknown(_) => "visibility_unknown",
            Self::NoStarts(_) => "no_starts",
            Self::NotVisible => "not_visible",
            Self::LogStuck => "log_stuck",
            Self::WindowFull => "window_full",
        }
    }
}

/// The facts of one moment, for the judgement.
#[derive(Clone, Debug)]
struct Facts {
    status: Status,
    /// The time since which the slot streams, if it does.
    streaming_since: Option<Instant>,
    room: DiskSpace,
    /// Whether PostgreSQL refuses the session a connection because of a limit.
    session_refused: bool,
    /// The silence of the statement that finds visible transactions. `None` if it was answered, or if changes are
    /// released without it.
    visibility: Option<Silence>,
    /// The silence of the statement that starts streams.
    starts: Option<Silence>,
    waits: Waits,
    /// The time since which received data waits to become durable without progress.
    unsynced_since: Option<Instant>,
}

/// Returns the first obstacle, or `None`. A cause precedes its consequences.
fn judge(facts: &Facts, was_ready: bool, now: Instant) -> Option<Obstacle> {
    let longer =
        |since: Option<Instant>, most: Duration| since.is_some_and(|since| now.saturating_duration_since(since) > most);
    // A node becomes ready only after an answer, and unready only after a lasting silence.
    let silent = |silence: Option<Silence>, obstacle: fn(Option<Why>) -> Obstacle| {
        let Silence { since, why } = silence?;
        // Nothing could be asked before the session streamed.
        let is_over = longer(facts.streaming_since.max(Some(since)), Answers::LATE);
        match (was_ready, is_over) {
            (true, false) => None,
            (false, false) => Some(Obstacle::Starting),
            (_, true) => Some(obstacle(why)),
        }
    };
    match facts.room {
        DiskSpace::Elsewhere => return Some(Obstacle::LogGone),
        DiskSpace::Short { .. } => return Some(Obstacle::DiskFull),
        DiskSpace::Enough => {}
    }
    match facts.status {
        Status::Streaming => {}
        _ if facts.session_refused => return Some(Obstacle::ConnectionLimit),
        Status::Connecting => return Some(Obstacle::Connecting),
        Status::Retrying => return Some(Obstacle::Retrying),
        Status::Failed => return Some(Obstacle::Failed),
    }
    let unanswered = silent(facts.visibility, Obstacle::VisibilityUnknown);
    if let Some(obstacle) = unanswered.or_else(|| silent(facts.starts, Obstacle::NoStarts)) {
        return Some(obstacle);
    }
    if longer(facts.unsynced_since, UNSYNCED_MAX) {
        return Some(Obstacle::LogStuck);
    }
    if longer(facts.waits.unreleased_since, INVISIBLE_MAX) {
        return Some(Obstacle::NotVisible);
    }
    longer(facts.waits.full_since, FULL_MAX).then_some(Obstacle::WindowFull)
}

/// Follows the status of all parts. It holds no handle whose drop a part waits for at shutdown.
pub(super) struct Delivery {
    pub(super) hub: Hub,
    pub(super) status: watch::Receiver<Status>,
    pub(super) room: watch::Receiver<DiskSpace>,
    pub(super) received: watch::Receiver<Option<Lsn>>,
    pub(super) durable: watch::Receiver<Lsn>,
    pub(super) primaries: PrimaryConnector,
    /// The answers about snapshots. `None` if changes are released without them (`service.watch.before_visible`).
    pub(super) visibility: Option<Answers>,
    pub(super) starts: Answers,
}

/// The judgement: `None` while changes are delivered.
pub(super) type Readiness = watch::Receiver<Option<Obstacle>>;

impl Delivery {
    /// Returns the judgement, and the task that updates it until `stop` turns true.
    pub(super) fn follow(self, stop: watch::Receiver<bool>) -> (Readiness, impl Future<Output = ()>) {
        let (judgement, readiness) = watch::channel(Some(Obstacle::Starting));
        (readiness, self.run(judgement, stop))
    }

    async fn run(mut self, judgement: watch::Sender<Option<Obstacle>>, mut stop: watch::Receiver<bool>) {
        let mut syncing = Syncing::default();
        let mut streaming_since = None;
        let mut ticks = interval(JUDGE_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !*stop.borrow_and_update() {
            let facts = self.observe(&mut syncing, &mut streaming_since);
            let before = *judgement.borrow();
            let now = judge(&facts, before.is_none(), Instant::now());
            if judgement.send_replace(now) != now {
                log(before, now);
            }
            // At the start, the node becomes ready without waiting for the next second.
            let coming_up = now == Some(Obstacle::Starting);
            tokio::select! {
                _ = ticks.tick() => {}
                () = tokio::time::sleep(JUDGE_EVERY / 50), if coming_up => {}
                // If the sender is dropped, a part has ended, and the process ends with it.
                Ok(()) = self.status.changed() => {}
                Ok(()) = self.room.changed() => {}
                _ = stop.changed() => {}
            }
            if stop.has_changed().is_err() {
                break;
            }
        }
        judgement.send_replace(Some(Obstacle::Stopping));
    }

    fn observe(&mut self, syncing: &mut Syncing, streaming_since: &mut Option<Instant>) -> Facts {
        // Read `durable` first: it was received before, so it cannot be ahead of `received`.
        let durable = *self.durable.borrow();
        let received = self.received.borrow().unwrap_or_default();
        let status = *self.status.borrow_and_update();
        *streaming_since = (status == Status::Streaming).then(|| streaming_since.unwrap_or_else(Instant::now));
        Facts {
            status,
            streaming_since: *streaming_since,
            room: *self.room.borrow_and_update(),
            session_refused: self.primaries.is_session_refused(),
            visibility: self.visibility.as_ref().and_then(Answers::silence),
            starts: self.starts.silence(),
            waits: self.hub.waits(),
            unsynced_since: syncing.since(received, durable, Instant::now()),
        }
    }
}

/// Logs an obstacle once when it appears, and once when it is over.
fn log(before: Option<Obstacle>, now: Option<Obstacle>) {
    match (before, now) {
        (_, Some(Obstacle::Starting)) => {}
        // The session and the recorder log these in more detail.
        (_, Some(Obstacle::Connecting | Obstacle::Retrying | Obstacle::Failed)) => {}
        (_, Some(Obstacle::LogGone | Obstacle::DiskFull)) => {}
        (_, Some(obstacle)) => tracing::error!(reason = obstacle.reason(), "not ready: {obstacle}"),
        (Some(Obstacle::Starting), None) => tracing::info!("ready: changes are delivered"),
        (_, None) => tracing::info!("ready again: changes are delivered"),
    }
}

/// Measures how long the log has made nothing durable while received data waits.
#[derive(Debug, Default)]
struct Syncing(Option<(Lsn, Instant)>);

impl Syncing {
    fn since(&mut self, received: Lsn, durable: Lsn, now: Instant) -> Option<Instant> {
        self.0 = match self.0 {
            _ if received <= durable => None,
            Some((at, since)) if at == durable => Some((at, since)),
            _ => Some((durable, now)),
        };
        self.0.map(|(_, since)| since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::readings::NOT_READY_REASONS;

    fn at(seconds: u64) -> Instant {
        static EPOCH: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
        *EPOCH + Duration::from_secs(seconds)
    }

    /// The facts of a node that delivers.
    fn healthy() -> Facts {
        Facts {
            status: Status::Streaming,
            streaming_since: Some(at(90)),
            room: DiskSpace::Enough,
            session_refused: false,
            visibility: None,
            starts: None,
            waits: Waits::default(),
            unsynced_since: None,
        }
    }

    fn silence(since: u64, why: Option<Why>) -> Option<Silence> {
        Some(Silence { since: at(since), why })
    }

    fn waits(unreleased: Option<u64>, full: Option<u64>) -> Waits {
        Waits { unreleased_since: unreleased.map(at), full_since: full.map(at) }
    }

    #[test]
    fn each_obstacle_counts_from_its_own_delay_on() {
        let cases = [
            ("all is well", healthy(), None, 0),
            (
                "a slot that does not stream counts at once",
                Facts { status: Status::Retrying, ..healthy() },
                Some(Obstacle::Retrying),
                0,
            ),
            ("so does one that needs repair", Facts { status: Status::Failed, ..healthy() }, Some(Obstacle::Failed), 0),
            (
                "a limit of connections is named",
                Facts { status: Status::Retrying, session_refused: true, ..healthy() },
                Some(Obstacle::ConnectionLimit),
                0,
            ),
            ("a limit is over when the slot streams", Facts { session_refused: true, ..healthy() }, None, 0),
            (
                "the disk is the cause of a slot that does not stream",
                Facts { status: Status::Retrying, room: DiskSpace::Short { free: 1 }, ..healthy() },
                Some(Obstacle::DiskFull),
                0,
            ),
            (
                "and so is its directory",
                Facts { status: Status::Retrying, room: DiskSpace::Elsewhere, ..healthy() },
                Some(Obstacle::LogGone),
                0,
            ),
            (
                "a snapshot that fails once is nothing",
                Facts { visibility: silence(100, Some(Why::Other)), ..healthy() },
                None,
                105,
            ),
            (
                "one that fails for long is",
                Facts { visibility: silence(100, Some(Why::Limit)), ..healthy() },
                Some(Obstacle::VisibilityUnknown(Some(Why::Limit))),
                106,
            ),
            (
                "and so is one without an answer",
                Facts { visibility: silence(100, None), starts: silence(100, None), ..healthy() },
                Some(Obstacle::VisibilityUnknown(None)),
                106,
            ),
            (
                "a start that fails for long",
                Facts { starts: silence(100, Some(Why::Rights)), ..healthy() },
                Some(Obstacle::NoStarts(Some(Why::Rights))),
                106,
            ),
            ("a commit that a standby confirms soon", Facts { waits: waits(Some(100), None), ..healthy() }, None, 115),
            (
                "one that it does not",
                Facts { waits: waits(Some(100), None), ..healthy() },
                Some(Obstacle::NotVisible),
                116,
            ),
            (
                "what waits because of the snapshot is not blamed on a standby",
                Facts { visibility: silence(100, Some(Why::Late)), waits: waits(Some(100), None), ..healthy() },
                Some(Obstacle::VisibilityUnknown(Some(Why::Late))),
                120,
            ),
            ("a slow disk", Facts { unsynced_since: Some(at(100)), ..healthy() }, None, 130),
            (
                "a disk that hangs, and memory that is full because of it",
                Facts { unsynced_since: Some(at(100)), waits: waits(Some(100), Some(110)), ..healthy() },
                Some(Obstacle::LogStuck),
                131,
            ),
            ("memory that is full for a moment", Facts { waits: waits(None, Some(100)), ..healthy() }, None, 115),
            ("and for long", Facts { waits: waits(None, Some(100)), ..healthy() }, Some(Obstacle::WindowFull), 116),
        ];
        for (what, facts, expected, now) in cases {
            assert_eq!(judge(&facts, true, at(now)), expected, "{what}");
        }
    }

    #[test]
    fn an_unready_node_becomes_ready_only_with_an_answer() {
        for (what, silence, now, expected) in [
            (
                "it could not be asked before there was a session",
                silence(10, Some(Why::Other)),
                91,
                Some(Obstacle::Starting),
            ),
            ("it was asked just now", silence(100, None), 105, Some(Obstacle::Starting)),
            ("it was asked for long", silence(100, None), 106, Some(Obstacle::NoStarts(None))),
            ("a lock stays", silence(10, Some(Why::Locked)), 96, Some(Obstacle::NoStarts(Some(Why::Locked)))),
            ("it was answered", None, 106, None),
        ] {
            assert_eq!(judge(&Facts { starts: silence, ..healthy() }, false, at(now)), expected, "{what}");
        }
    }

    #[test]
    fn a_log_is_stuck_since_its_last_progress() {
        let mut syncing = Syncing::default();
        let mut since = |received, durable, now| syncing.since(Lsn(received), Lsn(durable), at(now));
        assert_eq!(since(0, 10, 0), None, "a log from before");
        assert_eq!(since(20, 10, 1), Some(at(1)));
        assert_eq!(since(30, 10, 5), Some(at(1)), "more is received, and nothing durable");
        assert_eq!(since(30, 20, 6), Some(at(6)), "it moves");
        assert_eq!(since(30, 30, 7), None);
    }

    #[test]
    fn reasons_are_a_bounded_label_and_fit_a_header() {
        let causes = [None, Some(Why::Late), Some(Why::Limit), Some(Why::Rights), Some(Why::Locked), Some(Why::Other)];
        let plain = [
            Obstacle::Starting,
            Obstacle::Stopping,
            Obstacle::LogGone,
            Obstacle::DiskFull,
            Obstacle::ConnectionLimit,
            Obstacle::Connecting,
            Obstacle::Retrying,
            Obstacle::Failed,
            Obstacle::NotVisible,
            Obstacle::LogStuck,
            Obstacle::WindowFull,
        ];
        let statements = causes.into_iter().flat_map(|why| [Obstacle::VisibilityUnknown(why), Obstacle::NoStarts(why)]);
        for obstacle in plain.into_iter().chain(statements) {
            assert!(NOT_READY_REASONS.contains(&obstacle.reason()), "{obstacle:?}");
            assert!(obstacle.to_string().bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{obstacle}");
        }
    }
}
