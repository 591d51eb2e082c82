//! Watches the slot from outside: how much WAL it keeps, whether it is about to be lost, and who has it.
//!
//! On a connection of its own, because what it warns of goes on while no session does: with the disk of the change log full,
//! with the slot in somebody else's hands. It changes nothing. Each condition is said once when it begins and once when it is
//! over; what makes a session fail is the session's to say.
//!
//! What a look found is also for metrics and readiness, with the lag of what was *received*: the slot is told later, and may be
//! told late on purpose.

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
use crate::postgres::slot::{OPEN_TRANSACTIONS, SlotStatus};

/// How often the slot is looked at: whatever is wrong with it is said within twice this.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Longest wait for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Less WAL than this is no backlog. The server writes whole pages, and sends whole records: what it has of one that is not yet
/// written to its end, and may not be for long, nobody receives.
const NO_BACKLOG: u64 = 1 << 20;
/// Positions of the server that are remembered to tell how long ago it was at another one. With more, the lag is that of the
/// oldest, and grows on.
const SAMPLES_MAX: usize = 1024;

/// From where on somebody should know. Zero: never.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thresholds {
    /// WAL that the server keeps for the slot, in bytes.
    pub retained_wal_bytes: u64,
    /// WAL that may still be written before the slot is lost (`safe_wal_size`), in bytes.
    pub safe_wal_bytes: u64,
    /// How long ago the server was where the slot is.
    pub lag: Duration,
}

/// What to watch.
#[derive(Clone, Debug)]
pub struct Options {
    /// The session's slot.
    pub slot: String,
    /// Id of the change log, which the connections of this node are named after.
    pub node_id: String,
    /// From where on it warns.
    pub thresholds: Thresholds,
    /// How messages write commands.
    pub commands: CommandLine,
}

/// What the last look found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// When.
    pub at: Instant,
    /// The same, by the clock that people read.
    pub at_time: SystemTime,
    /// How far the server's WAL is written.
    pub wal_end: Lsn,
    /// How far what was received is behind that; `None` before the first session.
    pub received: Option<Lag>,
    /// The slot, if it is there.
    pub slot: Option<SlotReport>,
}

impl Report {
    /// Longest that a report says how things are: looks come several times as often.
    pub const AGE_MAX: Duration = Duration::from_secs(30);
}

/// What was found of the slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotReport {
    /// Somebody reads it.
    pub is_active: bool,
    /// Nothing can be read from it any more.
    pub is_lost: bool,
    /// PostgreSQL's `wal_status`.
    pub wal_status: Option<String>,
    /// What it was told.
    pub confirmed: Option<Lsn>,
    /// How far that is behind the server.
    pub lag: Option<Lag>,
    /// WAL that is kept for it.
    pub retained_bytes: Option<u64>,
    /// WAL that may still be written before it is lost. `None`: there is no limit.
    pub safe_bytes: Option<u64>,
}

/// How far a position is behind the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lag {
    /// Bytes of WAL.
    pub bytes: u64,
    /// How long ago the server was there, in steps of the looks; zero where it is there now.
    pub time: Duration,
    /// It was there before this process could look, at its start or after a long time without: nobody knows how long before.
    pub is_older: bool,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Condition {
    Missing,
    Lost(String),
    Held { pid: i32, name: String },
    Retained { bytes: u64 },
    Unsafe { bytes: u64 },
    Lagging { behind_bytes: u64, lag: Duration },
}

impl Condition {
    /// Conditions of one kind are one condition, whatever its numbers.
    fn is_same(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }

    const fn is_error(&self) -> bool {
        matches!(self, Self::Missing | Self::Lost(_))
    }

    /// What it is that is over.
    const fn over(&self) -> &'static str {
        match self {
            Self::Missing => "is there again",
            Self::Lost(_) => "can be read again",
            Self::Held { .. } => "is not held by anybody else any more",
            Self::Retained { .. } => "keeps less WAL again",
            Self::Unsafe { .. } => "is not about to be lost any more",
            Self::Lagging { .. } => "has caught up",
        }
    }
}

impl fmt::Display for Condition {
    /// Continues "replication slot NAME".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("does not exist any more"),
            Self::Lost(reason) => write!(f, "is lost ({reason})"),
            Self::Held { pid, name } => write!(
                f,
                "is in use by process {pid} ({name}): stop that one, or give this tuplewatch a slot of its own in \
                 replication.slot"
            ),
            Self::Retained { bytes } => write!(
                f,
                "keeps {} of WAL on the server (replication.warn.retained_wal). Either this tuplewatch does not keep up, or a \
                 transaction has been open for long: {OPEN_TRANSACTIONS}",
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
                "is {} behind, where the server was {} s ago (replication.warn.lag)",
                Bytes(*behind_bytes),
                lag.as_secs()
            ),
        }
    }
}

/// Where the server was when.
#[derive(Debug, Default)]
struct Samples {
    /// In order, and only what is past the position that is followed.
    ahead: VecDeque<(Lsn, Instant)>,
    /// What was there at the first look, or the first after a long time without: nobody knows since when.
    found: Option<Lsn>,
    /// When it was looked at last.
    last_look: Option<Instant>,
}

impl Samples {
    /// How far `position` is behind, with the server at `wal_end` now.
    fn lag(&mut self, wal_end: Lsn, position: Lsn, now: Instant) -> Lag {
        while self.ahead.pop_front_if(|(lsn, _)| *lsn <= position).is_some() {}
        // Of a server that was further, and is no longer the primary.
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

    /// Where what was found is received, but for what is no backlog.
    fn mostly_found(&self) -> Option<Lsn> {
        self.found.map(|found| Lsn(found.0.saturating_sub(NO_BACKLOG)))
    }
}

/// Turns looks into conditions.
#[derive(Debug, Default)]
struct Watch {
    /// Whether the slot was ever there: before that, it is the session's to make or miss it.
    was_there: bool,
    /// For the slot's position.
    samples: Samples,
    present: Vec<Condition>,
}

/// What began, and what is over.
#[derive(Debug, Default, PartialEq, Eq)]
struct News {
    began: Vec<Condition>,
    over: Vec<Condition>,
}

impl Watch {
    fn look(
        &mut self,
        slot_status: &SlotStatus,
        own_name: &str,
        thresholds: &Thresholds,
        now: Instant,
    ) -> (News, Option<Lag>) {
        let lag = slot_status.confirmed.map(|confirmed| self.samples.lag(slot_status.wal_end, confirmed, now));
        let found = self.conditions(slot_status, own_name, thresholds, lag);
        let before = std::mem::take(&mut self.present);
        let began = found.iter().filter(|new| !before.iter().any(|old| old.is_same(new))).cloned().collect();
        let over = before.into_iter().filter(|old| !found.iter().any(|new| new.is_same(old))).collect();
        self.present = found;
        (News { began, over }, lag)
    }

    /// Whether a threshold is passed. What has begun is over only when it is clearly on the right side again.
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

/// Looks at the slot for as long as it is polled, and logs.
pub struct Monitor {
    endpoints: Endpoints,
    /// Where a limit of connections is in the way, the session comes first, and lends its own.
    primaries: PrimaryConnector,
    options: Options,
    reports: watch::Sender<Option<Report>>,
}

impl Monitor {
    /// A monitor that asks the primary among `endpoints`.
    pub fn new(endpoints: Endpoints, primaries: PrimaryConnector, options: Options) -> Self {
        Self { endpoints, primaries, options, reports: watch::Sender::new(None) }
    }

    /// Follows what it finds; `None` before its first look. It keeps what it found last where it cannot look.
    pub fn reports(&self) -> watch::Receiver<Option<Report>> {
        self.reports.subscribe()
    }

    /// Runs until dropped. `received` follows up to which end LSN the session has handed on everything.
    pub async fn run(self, mut received: watch::Receiver<Option<Lsn>>) {
        let own_name = application_name(&self.options.node_id);
        let (mut watch, mut samples) = (Watch::default(), Samples::default());
        // There is a lag to tell of from the first session on; and that it is no older than this process, somebody may wait for.
        let mut wanted = Some(Lsn::ZERO);
        let mut open: Option<Line> = None;
        let mut refused = self.primaries.clone();
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                _ = received.wait_for(|received| *received >= wanted), if wanted.is_some() => wanted = None,
                () = refused.session_refused(), if open.is_some() => open = None,
            }
            if self.primaries.is_session_refused() {
                continue;
            }
            let line = match open.take().filter(|line| line.get().is_some()) {
                Some(line) => Some(line),
                None => match self.endpoints.connect(&own_name).await {
                    Ok(connection) => Some(Line::Own(Arc::new(connection))),
                    Err(error) if error.is_limit() => self.primaries.share(),
                    // That PostgreSQL is out of reach is the session's to say.
                    Err(_) => None,
                },
            };
            let Some((line, connection)) = line.and_then(|line| line.get().map(|connection| (line, connection))) else {
                continue;
            };
            match timeout(ANSWER_MAX, SlotStatus::read(&connection.client, &self.options.slot)).await {
                Ok(Ok(slot_status)) => {
                    let now = Instant::now();
                    let (news, slot_lag) = watch.look(&slot_status, &own_name, &self.options.thresholds, now);
                    self.tell(&news);
                    let position = *received.borrow();
                    let lag = position.map(|position| samples.lag(slot_status.wal_end, position, now));
                    // Unless there will be no session any more.
                    if lag.is_some_and(|lag| lag.is_older) && received.has_changed().is_ok() {
                        wanted = samples.mostly_found();
                    }
                    self.reports.send_replace(Some(Report::of(slot_status, lag, slot_lag, now)));
                    // One of its own may be free the next time.
                    open = Some(line).filter(|line| !line.is_shared());
                }
                Ok(Err(error)) => tracing::debug!(%error, "the slot could not be looked at"),
                Err(_) => tracing::debug!("the slot could not be looked at in time"),
            }
        }
    }

    fn tell(&self, news: &News) {
        for condition in &news.began {
            if condition.is_error() {
                tracing::error!(
                    slot = %self.options.slot,
                    "replication slot {} {condition}: run {}; what has changed since, and until then, is lost, and subscribers are \
                     told",
                    self.options.slot,
                    self.options.commands.recreate_slot()
                );
            } else {
                tracing::warn!(slot = %self.options.slot, "replication slot {} {condition}", self.options.slot);
            }
        }
        for condition in &news.over {
            tracing::info!(slot = %self.options.slot, "replication slot {} {}", self.options.slot, condition.over());
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

    /// The log messages, shortened.
    fn look(watch: &mut Watch, slot_status: &SlotStatus, now: Instant) -> Vec<String> {
        let (news, _) = watch.look(slot_status, "tuplewatch me", &THRESHOLDS, now);
        let began = news.began.iter().map(ToString::to_string);
        began.chain(news.over.iter().map(|condition| condition.over().to_owned())).collect()
    }

    #[test]
    fn each_threshold_is_logged_once_when_crossed_and_once_when_over() {
        let mut watch = Watch::default();
        let now = Instant::now();
        let check = |watch: &mut Watch, slot_status: &SlotStatus, seconds: u64, expected: &[&str]| {
            let said = look(watch, slot_status, now + Duration::from_secs(seconds));
            assert_eq!(said.len(), expected.len(), "{said:?}");
            assert!(said.iter().zip(expected).all(|(said, expected)| said.contains(expected)), "{said:?}");
        };
        check(&mut watch, &slot_status(999, 100, 10, 10), 0, &[]);
        check(&mut watch, &slot_status(1000, 100, 10, 10), 5, &["retained_wal"]);
        check(&mut watch, &slot_status(5000, 99, 10, 10), 10, &["safe_wal_size"]);
        // Around the threshold nothing is over yet.
        check(&mut watch, &slot_status(800, 110, 10, 10), 15, &[]);
        check(&mut watch, &slot_status(700, 130, 10, 10), 20, &["keeps less WAL again", "not about to be lost"]);
        check(&mut watch, &slot_status(0, -5, 10, 10), 25, &["is lost when another 0 bytes"]);
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
        let mut watch = Watch::default();
        let now = Instant::now();
        let at = |seconds: u64| now + Duration::from_secs(seconds);
        assert!(look(&mut watch, &slot_status(0, 1000, 100, 50), at(0)).is_empty());
        assert!(look(&mut watch, &slot_status(0, 1000, 200, 50), at(30)).is_empty());
        // It moves, and is still a minute behind at no time.
        assert!(look(&mut watch, &slot_status(0, 1000, 300, 100), at(65)).is_empty());
        let said = look(&mut watch, &slot_status(0, 1000, 400, 199), at(95));
        assert!(said.len() == 1 && said[0].contains("65 s ago"), "{said:?}");
        assert_eq!(look(&mut watch, &slot_status(0, 1000, 400, 400), at(100)), ["has caught up"]);
    }

    #[test]
    fn the_age_of_a_lag_from_before_the_first_sample_is_unknown() {
        let now = Instant::now();
        let mut samples = Samples::default();
        let mut is_older = |mib: u64, received_mib: u64, seconds: u64| {
            let (wal_end, received) = (Lsn(mib << 20), Lsn(received_mib << 20));
            samples.lag(wal_end, received, now + Duration::from_secs(seconds)).is_older
        };
        assert!(is_older(1000, 10, 0) && is_older(2000, 998, 5));
        // The end may be a part of a record, which is not sent.
        assert!(!is_older(3000, 999, 10));
        assert!(!is_older(4000, 999, 40));
        // The same after a long time without a look, be it that nothing was written meanwhile.
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
        // WAL that is on its way is not late yet.
        check(200, 150, 5, 50, 0);
        check(300, 200, 10, 100, 0);
        check(400, 200, 15, 200, 5);
        check(400, 200, 20, 200, 10);
        check(500, 350, 25, 150, 10);
        // The received position may be ahead of the last sample.
        check(500, 510, 30, 0, 0);

        let report = Report::of(slot_status(7, -5, 600, 400), None, None, now);
        let slot = report.slot.unwrap();
        assert_eq!((slot.retained_bytes, slot.safe_bytes, slot.confirmed), (Some(7), Some(0), Some(Lsn(400))));
        assert!(slot.is_active && !slot.is_lost);
    }

    #[test]
    fn a_missing_lost_or_foreign_slot_is_logged() {
        let mut watch = Watch::default();
        let now = Instant::now();
        let none = || SlotStatus { slot: None, ..slot_status(0, 1000, 10, 10) };
        // It is the session that makes it.
        assert!(look(&mut watch, &none(), now).is_empty());
        assert!(look(&mut watch, &slot_status(0, 1000, 10, 10), now).is_empty());
        let other = SlotStatus { holder: Some("pg_recvlogical".into()), ..slot_status(0, 1000, 10, 10) };
        assert!(look(&mut watch, &other, now)[0].contains("in use by process 7 (pg_recvlogical)"));
        assert!(look(&mut watch, &other, now).is_empty());
        let mut lost = slot_status(0, 1000, 10, 10);
        lost.slot.as_mut().unwrap().wal_status = Some("lost".into());
        assert!(look(&mut watch, &lost, now)[0].contains("is lost (WAL that it needs has been removed)"));
        assert!(look(&mut watch, &none(), now)[0].contains("does not exist any more"));
        assert_eq!(look(&mut watch, &slot_status(0, 1000, 10, 10), now), ["is there again"]);
    }
}
