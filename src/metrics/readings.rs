//! What is read when somebody asks.

use super::process::Process;
use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};

/// States of the session: the values of a label.
pub const SESSION_STATES: [&str; 4] = ["connecting", "streaming", "retrying", "failed"];
/// Why nothing is delivered: the values of a label.
pub const NOT_READY_REASONS: [&str; 11] = [
    "starting",
    "stopping",
    "log_gone",
    "disk_full",
    "connection_limit",
    "not_streaming",
    "visibility_unknown",
    "no_starts",
    "not_visible",
    "log_stuck",
    "window_full",
];
/// What PostgreSQL says of a slot's WAL (`wal_status`): the values of a label.
pub const WAL_STATUSES: [&str; 4] = ["reserved", "extended", "unreserved", "lost"];
/// Of the lags of all streams: so many in a hundred have this or less. Gauges, because a summary's sum and count only grow.
const RANKS: [(&str, usize); 4] = [("p50", 50), ("p90", 90), ("p99", 99), ("max", 100)];

/// Everything that is read. What is not known has no series, instead of a wrong one. LSNs are the 64-bit numbers.
#[derive(Clone, Debug, Default)]
pub struct Readings {
    /// One of [`NOT_READY_REASONS`]; `None` where changes are delivered.
    pub not_ready_reason: Option<&'static str>,
    /// How long the oldest transaction has waited to be released; zero where none waits.
    pub oldest_waiting_seconds: f64,
    /// One of [`SESSION_STATES`].
    pub session_state: &'static str,
    /// How far the stream was read.
    pub received_lsn: Option<u64>,
    /// How far the log survives a crash.
    pub durable_lsn: Option<u64>,
    /// How far subscribers are told.
    pub released_lsn: Option<u64>,
    /// When the server was looked at last, in seconds since 1970.
    pub looked_at_seconds: Option<f64>,
    /// What that look found; `None` where it was long ago.
    pub server: Option<Server>,
    /// The change log.
    pub log: Log,
    /// The recent part in memory.
    pub window: Window,
    /// How far each stream is behind what is released, in bytes of WAL.
    pub stream_lag_bytes: Vec<u64>,
    /// The process.
    pub process: Process,
}

/// Of PostgreSQL, and the slot there.
#[derive(Clone, Debug, Default)]
pub struct Server {
    /// How far its WAL is written.
    pub lsn: u64,
    /// How far what was received is behind it.
    pub lag_bytes: Option<u64>,
    /// How long ago the server was where what was received is.
    pub lag_seconds: Option<f64>,
    /// The slot, if it is there.
    pub slot: Option<Slot>,
}

/// The slot.
#[derive(Clone, Debug, Default)]
pub struct Slot {
    /// Somebody reads it.
    pub is_active: bool,
    /// One of [`WAL_STATUSES`].
    pub wal_status: Option<String>,
    /// Nothing can be read from it any more.
    pub is_lost: bool,
    /// What it was told.
    pub acknowledged_lsn: Option<u64>,
    /// How far that is behind the server.
    pub lag_bytes: Option<u64>,
    /// How long ago the server was there.
    pub lag_seconds: Option<f64>,
    /// WAL that is kept for it.
    pub retained_bytes: Option<u64>,
    /// WAL that may still be written before it is lost. `None`: there is no limit.
    pub safe_bytes: Option<u64>,
}

/// The change log.
#[derive(Clone, Debug, Default)]
pub struct Log {
    /// What retention counts.
    pub bytes: u64,
    /// Where retention drops the oldest.
    pub bytes_max: u64,
    /// What is written to journals first, beside that.
    pub journal_bytes: u64,
    /// Pieces that retention drops.
    pub segments: u64,
    /// How old the oldest change may be that is still kept.
    pub horizon_age_seconds: f64,
    /// Free on its disk.
    pub disk_free_bytes: Option<u64>,
    /// What retention keeps free there.
    pub disk_reserve_bytes: u64,
    /// Whether it takes more.
    pub has_room: bool,
}

/// The recent part of the stream, in memory.
#[derive(Clone, Debug, Default)]
pub struct Window {
    /// What it holds.
    pub bytes: u64,
    /// What it may hold.
    pub bytes_max: u64,
    /// Transactions that wait to be visible to a SELECT.
    pub pending_transactions: u64,
}

impl Readings {
    /// As the families of the text format.
    pub(super) fn families(&self) -> Vec<MetricFamily> {
        let mut to = Families::default();
        to.info("tuplewatch_build_info", "The version that runs; always 1.", "version", env!("CARGO_PKG_VERSION"));
        to.gauge(
            "tuplewatch_ready",
            "Whether changes are delivered: the slot streams, what is received is released, and streams can start.",
            self.not_ready_reason.is_none(),
        );
        to.states(
            "tuplewatch_not_ready",
            "Why changes are not delivered: 1 for the reason that there is.",
            "reason",
            &NOT_READY_REASONS,
            self.not_ready_reason.unwrap_or_default(),
        );
        to.gauge(
            "tuplewatch_oldest_waiting_seconds",
            "How long the oldest transaction has waited to be released to subscribers; 0 where none waits.",
            self.oldest_waiting_seconds,
        );
        to.states(
            "tuplewatch_session_state",
            "What the replication session is doing: 1 for the state that it is in.",
            "state",
            &SESSION_STATES,
            self.session_state,
        );
        to.gauge("tuplewatch_received_lsn_bytes", "LSN up to which WAL was received.", self.received_lsn);
        to.gauge("tuplewatch_durable_lsn_bytes", "LSN up to which the change log is on disk.", self.durable_lsn);
        to.gauge("tuplewatch_released_lsn_bytes", "LSN up to which subscribers are told.", self.released_lsn);
        to.gauge(
            "tuplewatch_server_look_timestamp_seconds",
            "When PostgreSQL and the slot were looked at last, in seconds since 1970.",
            self.looked_at_seconds,
        );
        if let Some(server) = &self.server {
            server.write(&mut to);
        }
        self.log.write(&mut to);
        let window = &self.window;
        to.gauge("tuplewatch_window_bytes", "Memory that recent messages take.", window.bytes);
        to.gauge("tuplewatch_window_limit_bytes", "Memory that they may take.", window.bytes_max);
        to.gauge(
            "tuplewatch_pending_transactions",
            "Transactions that wait until a SELECT sees them.",
            window.pending_transactions,
        );
        to.gauge(
            "tuplewatch_streams_behind",
            "Open streams that have not taken all that is released for them.",
            self.stream_lag_bytes.iter().filter(|lag| **lag > 0).count() as u64,
        );
        to.ranks(
            "tuplewatch_stream_lag_bytes",
            "How far open streams are behind what is released, in bytes of WAL: half of them by p50 at most, and so on.",
            self.stream_lag_bytes.clone(),
        );
        self.process.write(&mut to);
        to.0
    }
}

impl Server {
    fn write(&self, to: &mut Families) {
        to.gauge("tuplewatch_server_lsn_bytes", "LSN up to which PostgreSQL has written WAL.", self.lsn);
        to.gauge("tuplewatch_lag_bytes", "WAL that is written and was not received yet.", self.lag_bytes);
        to.gauge(
            "tuplewatch_lag_seconds",
            "How long ago PostgreSQL was where what was received is; 0 where all of it was received.",
            self.lag_seconds,
        );
        to.gauge("tuplewatch_slot_exists", "Whether the replication slot is there.", self.slot.is_some());
        let Some(slot) = &self.slot else { return };
        to.gauge("tuplewatch_slot_active", "Whether somebody reads the slot.", slot.is_active);
        to.gauge("tuplewatch_slot_lost", "Whether nothing can be read from the slot any more.", slot.is_lost);
        if let Some(status) = &slot.wal_status {
            to.states(
                "tuplewatch_slot_wal_status",
                "What PostgreSQL says of the slot's WAL: 1 for the status that it has.",
                "status",
                &WAL_STATUSES,
                status,
            );
        }
        to.gauge(
            "tuplewatch_acknowledged_lsn_bytes",
            "LSN up to which the slot was acknowledged, as PostgreSQL has it.",
            slot.acknowledged_lsn,
        );
        to.gauge("tuplewatch_slot_lag_bytes", "WAL that is written and not acknowledged.", slot.lag_bytes);
        to.gauge(
            "tuplewatch_slot_lag_seconds",
            "How long ago PostgreSQL was where the slot is; 0 where all of it is acknowledged.",
            slot.lag_seconds,
        );
        to.gauge("tuplewatch_slot_retained_wal_bytes", "WAL that PostgreSQL keeps for the slot.", slot.retained_bytes);
        to.gauge(
            "tuplewatch_slot_safe_wal_bytes",
            "WAL that may be written before the slot is lost; not there without a limit (max_slot_wal_keep_size).",
            slot.safe_bytes,
        );
    }
}

impl Log {
    fn write(&self, to: &mut Families) {
        to.gauge("tuplewatch_log_bytes", "What the change log has on disk, without its journals.", self.bytes);
        to.gauge(
            "tuplewatch_log_limit_bytes",
            "Where the oldest of it is dropped (changelog.retention.size).",
            self.bytes_max,
        );
        to.gauge("tuplewatch_log_journal_bytes", "What the change log's journals have on disk.", self.journal_bytes);
        to.gauge("tuplewatch_log_segments", "Pieces of the change log that are dropped as a whole.", self.segments);
        to.gauge(
            "tuplewatch_log_horizon_age_seconds",
            "How far back the change log goes, at least for what was changed.",
            self.horizon_age_seconds,
        );
        to.gauge("tuplewatch_log_disk_free_bytes", "Free on the disk of the change log.", self.disk_free_bytes);
        to.gauge(
            "tuplewatch_log_disk_reserve_bytes",
            "With less free the oldest is dropped early (changelog.disk_reserve).",
            self.disk_reserve_bytes,
        );
        to.gauge(
            "tuplewatch_log_has_room",
            "Whether the change log takes more: 0 while its disk is full and nothing is read from PostgreSQL.",
            self.has_room,
        );
    }
}

impl Process {
    fn write(&self, to: &mut Families) {
        to.counter(
            "process_cpu_seconds_total",
            "Time of processors that the process used, in seconds.",
            self.cpu_seconds,
        );
        to.gauge("process_resident_memory_bytes", "Memory of the process that is resident.", self.resident_bytes);
        to.gauge("process_open_fds", "Descriptors that are open.", self.open_fds);
        to.gauge("process_max_fds", "Descriptors that may be open.", self.max_fds);
        to.gauge(
            "process_start_time_seconds",
            "When the process started, in seconds since 1970.",
            self.start_time_seconds,
        );
    }
}

/// What may be a value of a gauge, or be missing.
trait Value {
    fn number(self) -> Option<f64>;
}

impl Value for f64 {
    fn number(self) -> Option<f64> {
        Some(self)
    }
}

impl Value for u64 {
    /// Exact up to 2^53, which is 8 PiB of WAL.
    fn number(self) -> Option<f64> {
        Some(self as f64)
    }
}

impl Value for bool {
    fn number(self) -> Option<f64> {
        Some(f64::from(self))
    }
}

impl<V: Value> Value for Option<V> {
    fn number(self) -> Option<f64> {
        self.and_then(V::number)
    }
}

#[derive(Default)]
struct Families(Vec<MetricFamily>);

impl Families {
    fn add(&mut self, name: &str, help: &str, kind: MetricType, metrics: Vec<Metric>) {
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        family.set_metric(metrics);
        self.0.push(family);
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Value) {
        if let Some(value) = value.number() {
            self.add(name, help, MetricType::GAUGE, vec![gauge(vec![], value)]);
        }
    }

    fn counter(&mut self, name: &str, help: &str, value: f64) {
        let mut counter = Counter::default();
        counter.set_value(value);
        let mut metric = Metric::default();
        metric.set_counter(counter);
        self.add(name, help, MetricType::COUNTER, vec![metric]);
    }

    fn info(&mut self, name: &str, help: &str, label: &str, value: &str) {
        self.add(name, help, MetricType::GAUGE, vec![gauge(vec![pair(label, value)], 1.0)]);
    }

    /// A series for each state, so that one that is left does not stay.
    fn states(&mut self, name: &str, help: &str, label: &str, all: &[&str], present: &str) {
        let one = |state: &&str| gauge(vec![pair(label, state)], f64::from(*state == present));
        self.add(name, help, MetricType::GAUGE, all.iter().map(one).collect());
    }

    fn ranks(&mut self, name: &str, help: &str, mut values: Vec<u64>) {
        values.sort_unstable();
        let at = |(rank, percent): (&str, usize)| {
            let place = (values.len() * percent).div_ceil(100).saturating_sub(1);
            let value = values.get(place).copied().unwrap_or_default();
            gauge(vec![pair("rank", rank)], value as f64)
        };
        self.add(name, help, MetricType::GAUGE, RANKS.into_iter().map(at).collect());
    }
}

fn pair(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}

fn gauge(labels: Vec<LabelPair>, value: f64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut metric = Metric::from_label(labels);
    metric.set_gauge(gauge);
    metric
}
