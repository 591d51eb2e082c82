//! Watches the slot from outside: how much WAL it keeps, whether it is about to be lost, and which process reads it.
//!
//! The monitor has a connection of its own, because it must also warn while no session runs: when the change log's disk
//! is full, or another process reads the slot. It changes nothing. It logs each condition once when it begins, and once
//! when it ends. The session itself reports the errors that end it.
//!
//! The reports also feed metrics and readiness. They include the lag of the *received* position, because the slot's
//! position is acknowledged later, and may be delayed on purpose.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, timeout};

use crate::model::diagnostic::{Bytes, CommandLine};
use crate::model::lsn::Lsn;
use crate::postgres::connection::{Endpoints, application_name};
use crate::postgres::primary::{Line, PrimaryConnector};
use crate::postgres::slot::{Loss, OPEN_TRANSACTIONS, SlotStatus};

/// The interval between two looks at the slot. A problem is reported within twice this time.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// The longest wait for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Less WAL than this is not a backlog. The server writes whole pages but sends only whole records, so the last,
/// incomplete record can stay unsent for long.
const NO_BACKLOG: u64 = 1 << 20;
/// The most remembered positions of the server, which tell when it was at an earlier one. Beyond this number the lag is
/// that of the oldest position, and keeps growing.
const SAMPLES_MAX: usize = 1024;

/// The limits above which the monitor warns; zero disables a warning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Thresholds {
    /// WAL that the server keeps for the slot, in bytes.
    pub retained_wal_bytes: u64,
    /// WAL that may still be written before the slot is lost (`safe_wal_size`), in bytes. Less than this is a warning.
    pub safe_wal_bytes: u64,
    /// The time since the server passed the position of the slot.
    pub lag: Duration,
}

/// The slot to watch, and the limits.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// The slot of the session.
    pub slot: String,
    /// The id of the change log. The connections of this node are named after it.
    pub node_id: String,
    /// The limits above which the monitor warns.
    pub thresholds: Thresholds,
    /// Writes the commands in messages.
    pub commands: CommandLine,
}

/// The result of the last look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    /// The time of the look, for ages.
    pub at: Instant,
    /// The same time as wall clock time.
    pub at_time: SystemTime,
    /// The end of the server's WAL.
    pub wal_end: Lsn,
    /// How far the received position is behind `wal_end`; `None` before the first session.
    pub received: Option<Lag>,
    /// The state of the slot; `None` if it does not exist.
    pub slot: Option<SlotReport>,
}

impl Report {
    /// The age above which a report counts as outdated. Looks are several times as frequent.
    pub(crate) const AGE_MAX: Duration = Duration::from_secs(30);
}

/// The state of the slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SlotReport {
    /// Whether a process reads it.
    pub is_active: bool,
    /// Whether it is lost: it cannot be read any more.
    pub is_lost: bool,
    /// PostgreSQL's `wal_status`.
    pub wal_status: Option<String>,
    /// The acknowledged position.
    pub confirmed: Option<Lsn>,
    /// How far the acknowledged position is behind the server.
    pub lag: Option<Lag>,
    /// WAL that the server keeps for it.
    pub retained_bytes: Option<u64>,
    /// WAL that may still be written before it is lost. `None`: there is no limit.
    pub safe_bytes: Option<u64>,
}

/// How far a position is behind the end of the server's WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lag {
    pub bytes: u64,
    /// The time since the server passed the position, in steps of the looks; zero if the server is still there.
    pub time: Duration,
    /// Whether the server passed the position before this process first looked, at its start or after a long time
    /// without a look. Then the real lag is longer by an unknown time.
    pub is_older: bool,
}

/// A problem with the slot.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Condition {
    Missing,
    Lost(Loss),
    Held { pid: i32, name: String },
    Retained { bytes: u64 },
    Unsafe { bytes: u64 },
    Lagging { behind_bytes: u64, lag: Duration },
}

impl Condition {
    /// Whether both are the same kind of condition, whatever their numbers.
    fn is_same(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }

    const fn is_error(&self) -> bool {
        matches!(self, Self::Missing | Self::Lost(_))
    }

    /// The message after the condition has ended.
    const fn ended(&self) -> &'static str {
        match self {
            Self::Missing => "exists again",
            Self::Lost(_) => "can be read again",
            Self::Held { .. } => "is no longer in use by another process",
            Self::Retained { .. } => "keeps less WAL again",
            Self::Unsafe { .. } => "is no longer about to be lost",
            Self::Lagging { .. } => "has caught up",
        }
    }
}

impl fmt::Display for Condition {
    /// Continues "replication slot NAME".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("no longer exists"),
            Self::Lost(reason) => write!(f, "is lost ({reason})"),
            Self::Held { pid, name } => write!(
                f,
                "is in use by process {pid} ({name}): stop that process, or give this tuplewatch a slot of its own in \
                 replication.slot"
            ),
            Self::Retained { bytes } => write!(
                f,
                "keeps {} of WAL on the server (replication.warn.retained_wal). Either tuplewatch does not keep up, \
                 or a transaction has been open for a long time: {OPEN_TRANSACTIONS}",
                Bytes(*bytes)
            ),
            Self::Unsafe { bytes } => write!(
                f,
                "is lost when another {} of WAL are written (replication.warn.safe_wal_size): let tuplewatch catch up, or raise \
                 max_slot_wal_keep_size and reload",
                Bytes(*bytes)
            ),
            Self::Lagging { behind_bytes, lag } => write!(
                f,
                "is {} behind the server, which passed its position {} s ago (replication.warn.lag)",
                Bytes(*behind_bytes),
                lag.as_secs()
            ),
        }
    }
}

/// Past positions of the server, with the time when each was first seen.
#[derive(Debug, Default)]
struct Samples {
    /// In ascending order, and only those beyond the followed position.
    ahead: VecDeque<(Lsn, Instant)>,
    /// The server's position at the first look, or at the first one after a long time without. The time when the server
    /// reached it is unknown.
    found: Option<Lsn>,
    /// The time of the last look.
    last_look: Option<Instant>,
}

impl Samples {
    /// The lag of `position` while the server is at `wal_end`.
    fn lag(&mut self, wal_end: Lsn, position: Lsn, now: Instant) -> Lag {
        while self.ahead.pop_front_if(|(lsn, _)| *lsn <= position).is_some() {}
        // Drop positions of a former primary that was further ahead.
        while self.ahead.pop_back_if(|(lsn, _)| *lsn > wal_end).is_some() {}
        let is_new = self.last_look.replace(now).is_none_or(|last| now.duration_since(last) > Report::AGE_MAX);
        let found = self.found.filter(|_| !is_new).map_or(wal_end, |found| found.min(wal_end));
        self.found = Some(found);
        let is_ahead = self.ahead.back().is_none_or(|(last, _)| *last < wal_end);
        if wal_end > position && is_ahead && self.ahead.len() < SAMPLES_MAX {
            self.ahead.push_back((wal_end, now));
        }
        let time = self.ahead.front().map_or(Duration::ZERO, |(_, since)| now.saturating_duration_since(*since));
        let is_older = Some(position) < self.mostly_found();
        Lag { bytes: wal_end.0.saturating_sub(position.0), time, is_older }
    }

    /// Once this position is received, the lag is known again. It leaves out an incomplete last record.
    fn mostly_found(&self) -> Option<Lsn> {
        self.found.map(|found| Lsn(found.0.saturating_sub(NO_BACKLOG)))
    }
}

/// Derives conditions from the looks.
#[derive(Debug, Default)]
struct Tracker {
    /// Whether the slot ever existed. Before that, the session creates it or reports that it is missing.
    was_there: bool,
    /// Positions for the lag of the slot.
    samples: Samples,
    present: Vec<Condition>,
}

/// The conditions that began and ended with a look.
#[derive(Debug, Default, PartialEq, Eq)]
struct Transitions {
    began: Vec<Condition>,
    ended: Vec<Condition>,
}

impl Tracker {
    fn look(
        &mut self,
        slot_status: &SlotStatus,
        own_name: &str,
        thresholds: &Thresholds,
        now: Instant,
    ) -> (Transitions, Option<Lag>) {
        let lag = slot_status.confirmed.map(|confirmed| self.samples.lag(slot_status.wal_end, confirmed, now));
        let found = self.conditions(slot_status, own_name, thresholds, lag);
        let before = std::mem::take(&mut self.present);
        let began = found.iter().filter(|new| !before.iter().any(|old| old.is_same(new))).cloned().collect();
        let ended = before.into_iter().filter(|old| !found.iter().any(|new| new.is_same(old))).collect();
        self.present = found;
        (Transitions { began, ended }, lag)
    }

    /// Whether `value` reaches the threshold. A present condition ends only when the value is clearly below it again.
    fn passes(&self, kind: &Condition, value: u64, threshold: u64) -> bool {
        let is_present = self.present.iter().any(|present| present.is_same(kind));
        let threshold = if is_present { threshold - threshold / 4 } else { threshold };
        threshold > 0 && value >= threshold
    }

    fn conditions(
        &mut self,
        slot_status: &SlotStatus,
        own_name: &str,
        thresholds: &Thresholds,
        lag: Option<Lag>,
    ) -> Vec<Condition> {
        let Some(slot) = &slot_status.slot else {
            return if self.was_there { vec![Condition::Missing] } else { Vec::new() };
        };
        self.was_there = true;
        if let Some(reason) = slot.loss() {
            return vec![Condition::Lost(reason)];
        }
        let mut found = Vec::new();
        if let Some(pid) = slot.active_pid
            && let Some(name) = slot_status.holder.as_ref().filter(|name| *name != own_name)
        {
            let name = if name.is_empty() { "without a name".to_owned() } else { name.clone() };
            found.push(Condition::Held { pid, name });
        }
        if let Some(bytes) = slot_status.retained_bytes {
            let retained = Condition::Retained { bytes };
            if self.passes(&retained, bytes, thresholds.retained_wal_bytes) {
                found.push(retained);
            }
        }
        if let Some(bytes) = slot.safe_bytes() {
            let limit = thresholds.safe_wal_bytes;
            let unsafe_now = Condition::Unsafe { bytes };
            let is_present = self.present.iter().any(|present| present.is_same(&unsafe_now));
            let limit = if is_present { limit.saturating_add(limit / 4) } else { limit };
            if limit > 0 && bytes < limit {
                found.push(unsafe_now);
            }
        }
        if let Some(Lag { bytes, time, .. }) = lag {
            let lagging = Condition::Lagging { behind_bytes: bytes, lag: time };
            let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
            if self.passes(&lagging, ms(time), ms(thresholds.lag)) {
                found.push(lagging);
            }
        }
        found
    }
}

impl Report {
    fn of(slot_status: SlotStatus, received: Option<Lag>, slot_lag: Option<Lag>, now: Instant) -> Self {
        let slot = slot_status.slot.map(|slot| SlotReport {
            is_active: slot.active_pid.is_some(),
            is_lost: slot.loss().is_some(),
            confirmed: slot_status.confirmed,
            lag: slot_lag,
            retained_bytes: slot_status.retained_bytes,
            safe_bytes: slot.safe_bytes(),
            wal_status: slot.wal_status,
        });
        Self { at: now, at_time: SystemTime::now(), wal_end: slot_status.wal_end, received, slot }
    }
}

/// Looks at the slot regularly, and logs conditions.
pub(crate) struct Monitor {
    endpoints: Endpoints,
    /// Tells when a connection limit refuses the session, which takes precedence, and lends the session's SQL
    /// connection.
    connector: PrimaryConnector,
    options: Options,
    reports: watch::Sender<Option<Report>>,
}

impl Monitor {
    /// Creates a monitor that asks the primary among `endpoints`.
    pub(crate) fn new(endpoints: Endpoints, connector: PrimaryConnector, options: Options) -> Self {
        Self { endpoints, connector, options, reports: watch::Sender::new(None) }
    }

    /// Follows the reports; `None` before the first look. While a look is impossible, the last report stays.
    pub(crate) fn reports(&self) -> watch::Receiver<Option<Report>> {
        self.reports.subscribe()
    }

    /// Runs until dropped. `received` follows the end LSN up to which the session has passed on everything.
    pub(crate) async fn run(self, mut received: watch::Receiver<Option<Lsn>>) {
        let own_name = application_name(&self.options.node_id);
        let (mut tracker, mut samples) = (Tracker::default(), Samples::default());
        // The first session's position makes the lag known, so look as soon as it is there.
        let mut wanted = Some(Lsn::ZERO);
        let mut open: Option<Line> = None;
        let mut refused = self.connector.clone();
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                _ = received.wait_for(|received| *received >= wanted), if wanted.is_some() => wanted = None,
                () = refused.session_refused(), if open.is_some() => open = None,
            }
            if self.connector.is_session_refused() {
                continue;
            }
            let line = match open.take().filter(|line| line.get().is_some()) {
                Some(line) => Some(line),
                None => match self.endpoints.connect(&own_name).await {
                    Ok(connection) => Some(Line::Own(Arc::new(connection))),
                    Err(error) if error.is_limit() => self.connector.share(),
                    // The session reports that PostgreSQL is unreachable.
                    Err(_) => None,
                },
            };
            let Some((line, connection)) = line.and_then(|line| line.get().map(|connection| (line, connection))) else {
                continue;
            };
            match timeout(ANSWER_MAX, SlotStatus::read(&connection.client, &self.options.slot)).await {
                Ok(Ok(slot_status)) => {
                    let now = Instant::now();
                    let (transitions, slot_lag) = tracker.look(&slot_status, &own_name, &self.options.thresholds, now);
                    self.log(&transitions);
                    let position = *received.borrow();
                    let lag = position.map(|position| samples.lag(slot_status.wal_end, position, now));
                    // After the last session has ended, the position does not move any more.
                    if lag.is_some_and(|lag| lag.is_older) && received.has_changed().is_ok() {
                        wanted = samples.mostly_found();
                    }
                    self.reports.send_replace(Some(Report::of(slot_status, lag, slot_lag, now)));
                    // Next time a connection of its own may be free.
                    open = Some(line).filter(|line| !line.is_shared());
                }
                Ok(Err(error)) => tracing::debug!(%error, "the slot could not be looked at"),
                Err(_) => tracing::debug!("the slot could not be looked at in time"),
            }
        }
    }

    fn log(&self, transitions: &Transitions) {
        for condition in &transitions.began {
            if condition.is_error() {
                tracing::error!(
                    slot = %self.options.slot,
                    "replication slot {} {condition}: run {}. Changes until then are lost, and subscribers receive \
                     a gap",
                    self.options.slot,
                    self.options.commands.recreate_slot()
                );
            } else {
                tracing::warn!(slot = %self.options.slot, "replication slot {} {condition}", self.options.slot);
            }
        }
        for condition in &transitions.ended {
            tracing::info!(slot = %self.options.slot, "replication slot {} {}", self.options.slot, condition.ended());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THRESHOLDS: Thresholds =
        Thresholds { retained_wal_bytes: 1000, safe_wal_bytes: 100, lag: Duration::from_secs(60) };

    fn slot_status(retained: u64, safe: i64, wal_end: u64, confirmed: u64) -> SlotStatus {
        let slot = serde_json::json!({
            "plugin": "pgoutput", "slot_type": "logical", "database": "d", "active_pid": 7,
            "wal_status": "reserved", "safe_wal_size": safe,
        });
        SlotStatus {
            slot: Some(serde_json::from_value(slot).unwrap()),
            holder: Some("tuplewatch me".into()),
            wal_end: Lsn(wal_end),
            retained_bytes: Some(retained),
            confirmed: Some(Lsn(confirmed)),
        }
    }

    /// The messages of a look, shortened.
    fn look(tracker: &mut Tracker, slot_status: &SlotStatus, now: Instant) -> Vec<String> {
        let (transitions, _) = tracker.look(slot_status, "tuplewatch me", &THRESHOLDS, now);
        let began = transitions.began.iter().map(ToString::to_string);
        began.chain(transitions.ended.iter().map(|condition| condition.ended().to_owned())).collect()
    }

    #[test]
    fn conditions_are_reported_once_at_their_start_and_end() {
        let mut tracker = Tracker::default();
        let now = Instant::now();
        let check = |tracker: &mut Tracker, slot_status: &SlotStatus, seconds: u64, expected: &[&str]| {
            let said = look(tracker, slot_status, now + Duration::from_secs(seconds));
            assert_eq!(said.len(), expected.len(), "{said:?}");
            assert!(said.iter().zip(expected).all(|(said, expected)| said.contains(expected)), "{said:?}");
        };
        check(&mut tracker, &slot_status(999, 100, 10, 10), 0, &[]);
        check(&mut tracker, &slot_status(1000, 100, 10, 10), 5, &["retained_wal"]);
        check(&mut tracker, &slot_status(5000, 99, 10, 10), 10, &["safe_wal_size"]);
        // Just below the threshold the condition does not end yet.
        check(&mut tracker, &slot_status(800, 110, 10, 10), 15, &[]);
        check(
            &mut tracker,
            &slot_status(700, 130, 10, 10),
            20,
            &["keeps less WAL again", "no longer about to be lost"],
        );
        check(&mut tracker, &slot_status(0, -5, 10, 10), 25, &["is lost when another 0 bytes"]);
    }

    #[test]
    fn after_a_promotion_the_old_primary_does_not_count() {
        let (mut samples, now) = (Samples::default(), Instant::now());
        let at = |seconds: u64| now + Duration::from_secs(seconds);
        let lag = |bytes, seconds| Lag { bytes, time: Duration::from_secs(seconds), is_older: false };
        assert_eq!(samples.lag(Lsn(1000), Lsn(990), at(0)), lag(10, 0));
        assert_eq!(samples.lag(Lsn(995), Lsn(995), at(60)), lag(0, 0));
        assert_eq!(samples.lag(Lsn(999), Lsn(995), at(65)), lag(4, 0));
        assert_eq!(samples.lag(Lsn(999), Lsn(995), at(70)), lag(4, 5));
    }

    #[test]
    fn lag_is_the_time_since_the_server_passed_the_slots_position() {
        let mut tracker = Tracker::default();
        let now = Instant::now();
        let at = |seconds: u64| now + Duration::from_secs(seconds);
        assert!(look(&mut tracker, &slot_status(0, 1000, 100, 50), at(0)).is_empty());
        assert!(look(&mut tracker, &slot_status(0, 1000, 200, 50), at(30)).is_empty());
        // The slot moves, and its lag is never more than a minute.
        assert!(look(&mut tracker, &slot_status(0, 1000, 300, 100), at(65)).is_empty());
        let said = look(&mut tracker, &slot_status(0, 1000, 400, 199), at(95));
        assert!(said.len() == 1 && said[0].contains("65 s ago"), "{said:?}");
        assert_eq!(look(&mut tracker, &slot_status(0, 1000, 400, 400), at(100)), ["has caught up"]);
    }

    #[test]
    fn the_age_of_a_lag_from_before_the_first_look_is_unknown() {
        let now = Instant::now();
        let mut samples = Samples::default();
        let mut is_older = |mib: u64, received_mib: u64, seconds: u64| {
            let (wal_end, received) = (Lsn(mib << 20), Lsn(received_mib << 20));
            samples.lag(wal_end, received, now + Duration::from_secs(seconds)).is_older
        };
        assert!(is_older(1000, 10, 0) && is_older(2000, 998, 5));
        // The last bytes may be an incomplete record, which is not sent.
        assert!(!is_older(3000, 999, 10));
        assert!(!is_older(4000, 999, 40));
        // The same after a long time without a look, even if nothing was written meanwhile.
        assert!(is_older(5000, 999, 71) && !is_older(5000, 4999, 76));
        assert!(!is_older(5000, 4999, 150));
    }

    #[test]
    fn the_received_position_has_its_own_lag() {
        let now = Instant::now();
        let at = |seconds: u64| now + Duration::from_secs(seconds);
        let mut samples = Samples::default();
        let mut check = |wal_end: u64, received: u64, seconds: u64, bytes: u64, time: u64| {
            let lag = samples.lag(Lsn(wal_end), Lsn(received), at(seconds));
            assert_eq!(lag, Lag { bytes, time: Duration::from_secs(time), is_older: false }, "{seconds}");
        };
        check(100, 100, 0, 0, 0);
        // WAL that is being sent is not late.
        check(200, 150, 5, 50, 0);
        check(300, 200, 10, 100, 0);
        check(400, 200, 15, 200, 5);
        check(400, 200, 20, 200, 10);
        check(500, 350, 25, 150, 10);
        // The received position may be ahead of the last look.
        check(500, 510, 30, 0, 0);

        let report = Report::of(slot_status(7, -5, 600, 400), None, None, now);
        let slot = report.slot.unwrap();
        assert_eq!((slot.retained_bytes, slot.safe_bytes, slot.confirmed), (Some(7), Some(0), Some(Lsn(400))));
        assert!(slot.is_active && !slot.is_lost);
    }

    #[test]
    fn a_slot_that_is_missing_lost_or_used_by_another_process() {
        let mut tracker = Tracker::default();
        let now = Instant::now();
        let none = || SlotStatus { slot: None, ..slot_status(0, 1000, 10, 10) };
        // The session creates the slot.
        assert!(look(&mut tracker, &none(), now).is_empty());
        assert!(look(&mut tracker, &slot_status(0, 1000, 10, 10), now).is_empty());
        let other = SlotStatus { holder: Some("pg_recvlogical".into()), ..slot_status(0, 1000, 10, 10) };
        assert!(look(&mut tracker, &other, now)[0].contains("in use by process 7 (pg_recvlogical)"));
        assert!(look(&mut tracker, &other, now).is_empty());
        let mut lost = slot_status(0, 1000, 10, 10);
        lost.slot.as_mut().unwrap().wal_status = Some("lost".into());
        assert!(look(&mut tracker, &lost, now)[0].contains("is lost (WAL that it needs has been removed)"));
        assert!(look(&mut tracker, &none(), now)[0].contains("no longer exists"));
        assert_eq!(look(&mut tracker, &slot_status(0, 1000, 10, 10), now), ["exists again"]);
    }
}
