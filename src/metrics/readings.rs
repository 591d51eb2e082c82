//! Gauges that are read when metrics are requested.

use super::process::Process;
use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};

/// The states of the session: the values of a label.
pub(crate) const SESSION_STATES: [&str; 4] = ["connecting", "streaming", "retrying", "failed"];
/// The reasons for not being ready: the values of a label.
pub(crate) const NOT_READY_REASONS: [&str; 11] = [
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
/// PostgreSQL's states of a slot's WAL (`wal_status`): the values of a label.
pub(crate) const WAL_STATUSES: [&str; 4] = ["reserved", "extended", "unreserved", "lost"];
/// The percentiles of the lags of all streams. They are gauges, because the sum and count of a summary may only grow.
const RANKS: [(&str, usize); 4] = [("p50", 50), ("p90", 90), ("p99", 99), ("max", 100)];

/// All readings. An unknown value has no series, instead of a wrong one. LSNs are 64-bit numbers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Readings {
    /// One of [`NOT_READY_REASONS`]; `None` if changes are delivered.
    pub not_ready_reason: Option<&'static str>,
    /// The time that the oldest transaction has waited to be released; zero if none waits.
    pub oldest_waiting_seconds: f64,
    /// One of [`SESSION_STATES`].
    pub session_state: &'static str,
    /// The end LSN up to which WAL was received.
    pub received_lsn: Option<u64>,
    /// The end LSN up to which the change log is durable.
    pub durable_lsn: Option<u64>,
    /// The end LSN up to which changes are released to subscribers.
    pub released_lsn: Option<u64>,
    /// The time of the last look at the server, in seconds since 1970.
    pub looked_at_seconds: Option<f64>,
    /// The result of the last look; `None` if it is outdated.
    pub server: Option<Server>,
    pub log: Log,
    /// The recent messages in memory.
    pub window: Window,
    /// The lag of each stream behind the released position, in bytes of WAL.
    pub stream_lag_bytes: Vec<u64>,
    pub process: Process,
}

/// PostgreSQL, and the slot there.
#[derive(Clone, Debug, Default)]
pub(crate) struct Server {
    /// The end of the server's WAL.
    pub lsn: u64,
    /// The received position's lag behind it.
    pub lag_bytes: Option<u64>,
    /// The time since the server passed the received position.
    pub lag_seconds: Option<f64>,
    /// The slot, if it is there.
    pub slot: Option<Slot>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Slot {
    /// Whether a process reads it.
    pub is_active: bool,
    /// One of [`WAL_STATUSES`].
    pub wal_status: Option<String>,
    /// Whether it can no longer be read.
    pub is_lost: bool,
    /// The acknowledged position.
    pub acknowledged_lsn: Option<u64>,
    /// Its lag behind the server.
    pub lag_bytes: Option<u64>,
    /// The time since the server passed it.
    pub lag_seconds: Option<f64>,
    /// WAL that the server keeps for it.
    pub retained_bytes: Option<u64>,
    /// WAL that may still be written before it is lost. `None`: there is no limit.
    pub safe_bytes: Option<u64>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Log {
    /// The size that retention counts.
    pub bytes: u64,
    /// The size above which retention drops the oldest changes.
    pub bytes_max: u64,
    /// The size of the journals, which is not counted in `bytes`.
    pub journal_bytes: u64,
    /// The number of segments, the units of retention.
    pub segments: u64,
    /// The age of the oldest change that may still be read.
    pub horizon_age_seconds: f64,
    /// Free space on the disk.
    pub disk_free_bytes: Option<u64>,
    /// The free space that retention maintains.
    pub disk_reserve_bytes: u64,
    /// Whether the log accepts appends.
    pub has_room: bool,
}

/// The recent messages in memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Window {
    /// The size of the messages.
    pub bytes: u64,
    /// The largest permitted size.
    pub bytes_max: u64,
    /// Transactions that are not visible to a SELECT yet.
    pub pending_transactions: u64,
}

impl Readings {
    /// The metric families of the text format.
    pub(super) fn families(&self) -> Vec<MetricFamily> {
        let mut to = Families::default();
        to.info("tuplewatch_build_info", "The version that runs; always 1.", "version", env!("CARGO_PKG_VERSION"));
        to.gauge(
            "tuplewatch_ready",
            "Whether changes are delivered: the slot streams, received changes are released, and streams can start.",
            self.not_ready_reason.is_none(),
        );
        to.states(
            "tuplewatch_not_ready",
            "Why changes are not delivered: 1 for the present reason.",
            "reason",
            &NOT_READY_REASONS,
            self.not_ready_reason.unwrap_or_default(),
        );
        to.gauge(
            "tuplewatch_oldest_waiting_seconds",
            "How long the oldest transaction has waited to be released to subscribers; 0 if none waits.",
            self.oldest_waiting_seconds,
        );
        to.states(
            "tuplewatch_session_state",
            "The state of the replication session: 1 for the present state.",
            "state",
            &SESSION_STATES,
            self.session_state,
        );
        to.gauge("tuplewatch_received_lsn_bytes", "End LSN up to which WAL was received.", self.received_lsn);
        to.gauge("tuplewatch_durable_lsn_bytes", "End LSN up to which the change log is durable.", self.durable_lsn);
        to.gauge(
            "tuplewatch_released_lsn_bytes",
            "End LSN up to which changes are released to subscribers.",
            self.released_lsn,
        );
        to.gauge(
            "tuplewatch_server_look_timestamp_seconds",
            "The time of the last look at PostgreSQL and the slot, in seconds since 1970.",
            self.looked_at_seconds,
        );
        if let Some(server) = &self.server {
            server.write(&mut to);
        }
        self.log.write(&mut to);
        let window = &self.window;
        to.gauge("tuplewatch_window_bytes", "Memory used by recent messages.", window.bytes);
        to.gauge(
            "tuplewatch_window_limit_bytes",
            "Memory that recent messages may use (changelog.memory_window).",
            window.bytes_max,
        );
        to.gauge(
            "tuplewatch_pending_transactions",
            "Transactions that are not visible to a SELECT yet.",
            window.pending_transactions,
        );
        to.gauge(
            "tuplewatch_streams_behind",
            "Open streams that have not received all released changes yet.",
            self.stream_lag_bytes.iter().filter(|lag| **lag > 0).count() as u64,
        );
        to.ranks(
            "tuplewatch_stream_lag_bytes",
            "How far open streams are behind the released position, in bytes of WAL: half of them at most by p50, and so on.",
            self.stream_lag_bytes.clone(),
        );
        self.process.write(&mut to);
        to.0
    }
}

impl Server {
    fn write(&self, to: &mut Families) {
        to.gauge("tuplewatch_server_lsn_bytes", "End of the WAL that PostgreSQL has written.", self.lsn);
        to.gauge("tuplewatch_lag_bytes", "WAL that was written and is not received yet.", self.lag_bytes);
        to.gauge(
            "tuplewatch_lag_seconds",
            "Age of the oldest WAL that is not received yet; 0 if there is none.",
            self.lag_seconds,
        );
        to.gauge("tuplewatch_slot_exists", "Whether the replication slot exists.", self.slot.is_some());
        let Some(slot) = &self.slot else { return };
        to.gauge("tuplewatch_slot_active", "Whether a process reads the slot.", slot.is_active);
        to.gauge("tuplewatch_slot_lost", "Whether the slot can no longer be read.", slot.is_lost);
        if let Some(status) = &slot.wal_status {
            to.states(
                "tuplewatch_slot_wal_status",
                "PostgreSQL's wal_status of the slot: 1 for the present status.",
                "status",
                &WAL_STATUSES,
                status,
            );
        }
        to.gauge(
            "tuplewatch_acknowledged_lsn_bytes",
            "LSN up to which PostgreSQL has received acknowledgements for the slot (confirmed_flush_lsn).",
            slot.acknowledged_lsn,
        );
        to.gauge("tuplewatch_slot_lag_bytes", "WAL that was written and is not acknowledged yet.", slot.lag_bytes);
        to.gauge(
            "tuplewatch_slot_lag_seconds",
            "Age of the oldest WAL that is not acknowledged yet; 0 if there is none.",
            slot.lag_seconds,
        );
        to.gauge("tuplewatch_slot_retained_wal_bytes", "WAL that PostgreSQL keeps for the slot.", slot.retained_bytes);
        to.gauge(
            "tuplewatch_slot_safe_wal_bytes",
            "WAL that may be written before the slot is lost; absent without a limit (max_slot_wal_keep_size).",
            slot.safe_bytes,
        );
    }
}

impl Log {
    fn write(&self, to: &mut Families) {
        to.gauge("tuplewatch_log_bytes", "Size of the change log on disk, without its journals.", self.bytes);
        to.gauge(
            "tuplewatch_log_limit_bytes",
            "Size above which the oldest changes are dropped (changelog.retention.size).",
            self.bytes_max,
        );
        to.gauge("tuplewatch_log_journal_bytes", "Size of the change log's journals on disk.", self.journal_bytes);
        to.gauge("tuplewatch_log_segments", "Segments of the change log, which are dropped as a whole.", self.segments);
        to.gauge(
            "tuplewatch_log_horizon_age_seconds",
            "Age of the oldest change that the change log still has.",
            self.horizon_age_seconds,
        );
        to.gauge("tuplewatch_log_disk_free_bytes", "Free space on the disk of the change log.", self.disk_free_bytes);
        to.gauge(
            "tuplewatch_log_disk_reserve_bytes",
            "Free space below which the oldest changes are dropped early (changelog.disk_reserve).",
            self.disk_reserve_bytes,
        );
        to.gauge(
            "tuplewatch_log_has_room",
            "Whether the change log accepts changes: 0 while its disk is full and nothing is read from PostgreSQL.",
            self.has_room,
        );
    }
}

impl Process {
    fn write(&self, to: &mut Families) {
        to.counter("process_cpu_seconds_total", "Processor time that the process used, in seconds.", self.cpu_seconds);
        to.gauge("process_resident_memory_bytes", "Resident memory of the process.", self.resident_bytes);
        to.gauge("process_open_fds", "Open descriptors.", self.open_fds);
        to.gauge("process_max_fds", "Limit of open descriptors.", self.max_fds);
        to.gauge("process_start_time_seconds", "Start of the process, in seconds since 1970.", self.start_time_seconds);
    }
}

/// The value of a gauge, which may be missing.
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

    /// A series for each state, so that the series of a former state falls to zero.
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
