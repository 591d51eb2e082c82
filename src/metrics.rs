//! The metrics of the process: every name with its meaning, written in Prometheus' text format.
//!
//! There are two kinds:
//!
//! - **Counters** in [`Metrics`], one for the process, like a log. A module keeps the handles that it counts with, and
//!   counts once for a batch of work. So a message needs no look-up and no shared counter of its own.
//! - **Gauges** in [`Readings`], which are read when metrics are requested. `app` fills them in from the log, the hub and
//!   the session, so that no gauge has to be kept up to date.
//!
//! No metric has a label for tenants: there may be millions, and each would be a series of its own. Labels contain only
//! tables, methods, codes and reasons, whose number is bounded. Metrics contain no values of rows.
//!
//! A test compares `docs/metrics.md`, the alert rules and the dashboard with these metrics.
//!
//! The crate is `prometheus` without its features. It writes version 0.0.4 of the text format, which `promtool` and every
//! collector read, and adds no other dependencies. (`prometheus-client` writes only OpenMetrics.)

pub(crate) mod process;
pub(crate) mod readings;
#[cfg(test)]
mod tests;

pub(crate) use readings::Readings;

use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use std::sync::LazyLock;

/// The content type of the text format.
pub(crate) const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// A sync to a local disk takes between a tenth of a millisecond and some tens of them. Seconds mean a failing disk.
const FSYNC_SECONDS: [f64; 14] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// The counters of this process. The first call creates them.
pub(crate) fn metrics() -> &'static Metrics {
    static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);
    &METRICS
}

/// Values that are counted as they happen.
pub(crate) struct Metrics {
    registry: Registry,
    /// Transactions that the session has passed on.
    pub transactions: IntCounter,
    changes: IntCounterVec,
    decode_errors: IntCounterVec,
    gaps: IntCounterVec,
    /// Sessions that streamed, after the first of this process.
    pub reconnects: IntCounter,
    /// Sessions that ended, or did not begin, because of a transient error.
    pub transient_failures: IntCounter,
    /// Sessions that ended, or did not begin, because of an error that an operator has to repair.
    pub definite_failures: IntCounter,
    /// The duration of each sync of the change log.
    pub fsync_seconds: Histogram,
    /// Streams that began by reading the log.
    pub replays: IntCounter,
    /// Streams that were so slow that they had to read the log again.
    pub slow_subscribers: IntCounter,
    /// Messages that were encoded as frames of gRPC.
    pub frames_made: IntCounter,
    /// Messages that were encoded as lines of JSON.
    pub lines_made: IntCounter,
    /// The most streams that may be open.
    pub subscribers_limit: IntGauge,
    pub grpc: Edge,
    pub http: Edge,
    streams_ended: IntCounterVec,
    grpc_requests: IntCounterVec,
    http_requests: IntCounterVec,
}

/// Streams of one protocol.
pub(crate) struct Edge {
    /// The value of the label `protocol`.
    pub protocol: &'static str,
    pub subscribers: IntGauge,
    /// Messages that were passed to the connection.
    pub messages_sent: IntCounter,
    /// The bytes of these messages.
    pub bytes_sent: IntCounter,
}

/// Changes of one table. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    /// Facts that began to hold.
    pub created: IntCounter,
    /// Facts that ceased to hold.
    pub deleted: IntCounter,
    /// Rows that could not be turned into changes.
    pub decode_errors: IntCounter,
}

impl Metrics {
    fn new() -> Self {
        let new = Registrar(Registry::new());
        let failures = new.counters(
            "tuplewatch_session_failures_total",
            "Replication sessions that ended or did not begin, by kind of error: transient, or definite if it needs repair.",
            &["kind"],
        );
        let subscribers = new.gauges("tuplewatch_subscribers", "Open streams of changes, by protocol.", &["protocol"]);
        let messages_sent =
            new.counters("tuplewatch_messages_sent_total", "Messages sent to subscribers, by protocol.", &["protocol"]);
        let bytes_sent = new.counters(
            "tuplewatch_sent_bytes_total",
            "Bytes of messages sent to subscribers, without the framing of HTTP and TLS, by protocol.",
            &["protocol"],
        );
        let envelopes_made = new.counters(
            "tuplewatch_envelopes_made_total",
            "Messages that were encoded to be sent, by form: once for all streams that read a message from memory.",
            &["form"],
        );
        let edge = |protocol| Edge {
            protocol,
            subscribers: subscribers.with_label_values(&[protocol]),
            messages_sent: messages_sent.with_label_values(&[protocol]),
            bytes_sent: bytes_sent.with_label_values(&[protocol]),
        };
        Self {
            transactions: new.counter(
                "tuplewatch_transactions_total",
                "Transactions received from PostgreSQL, with or without changes.",
            ),
            changes: new.counters(
                "tuplewatch_changes_total",
                "Changes received from PostgreSQL, by table and operation (create, delete).",
                &["table", "operation"],
            ),
            decode_errors: new.counters(
                "tuplewatch_decode_errors_total",
                "Rows that could not be turned into changes, by table.",
                &["table"],
            ),
            gaps: new.counters(
                "tuplewatch_gaps_total",
                "Gaps in history, by the reason in the status that subscribers receive.",
                &["reason"],
            ),
            reconnects: new.counter(
                "tuplewatch_reconnects_total",
                "Replication sessions that streamed, after the first of this process.",
            ),
            transient_failures: failures.with_label_values(&["transient"]),
            definite_failures: failures.with_label_values(&["definite"]),
            fsync_seconds: new.histogram(
                "tuplewatch_log_fsync_duration_seconds",
                "Duration of each sync of the change log to disk.",
                &FSYNC_SECONDS,
            ),
            replays: new.counter(
                "tuplewatch_replays_total",
                "Streams that began before the recent messages in memory, and read the change log first.",
            ),
            slow_subscribers: new.counter(
                "tuplewatch_slow_subscribers_total",
                "Streams that were read so slowly that they had to return from memory to the change log.",
            ),
            subscribers_limit: new.gauge(
                "tuplewatch_subscribers_limit",
                "Limit of open streams of changes (service.watch.subscribers_max).",
            ),
            frames_made: envelopes_made.with_label_values(&["base_v1_frame"]),
            lines_made: envelopes_made.with_label_values(&["base_v1_json"]),
            grpc: edge("grpc"),
            http: edge("http"),
            streams_ended: new.counters(
                "tuplewatch_streams_ended_total",
                "Streams of changes that ended, by protocol and by the reason in their status.",
                &["protocol", "reason"],
            ),
            grpc_requests: new.counters(
                "tuplewatch_grpc_requests_total",
                "gRPC requests that have ended, by service, method and code. A Watch request ends with its stream.",
                &["service", "method", "code"],
            ),
            http_requests: new.counters(
                "tuplewatch_http_requests_total",
                "HTTP requests whose response has begun, by status.",
                &["code"],
            ),
            registry: new.0,
        }
    }

    /// The counters of a table, for the caller to keep.
    pub(crate) fn table(&self, table: &str) -> Table {
        Table {
            created: self.changes.with_label_values(&[table, "create"]),
            deleted: self.changes.with_label_values(&[table, "delete"]),
            decode_errors: self.decode_errors.with_label_values(&[table]),
        }
    }

    /// The counter of gaps with this reason.
    pub(crate) fn gaps(&self, reason: &str) -> IntCounter {
        self.gaps.with_label_values(&[reason])
    }

    /// The counter of streams of this protocol that ended for this reason.
    pub(crate) fn streams_ended(&self, protocol: &str, reason: &str) -> IntCounter {
        self.streams_ended.with_label_values(&[protocol, reason])
    }

    /// The counter of gRPC requests that ended with `code`. Pass only existing methods: names from clients are unbounded.
    pub(crate) fn grpc_requests(&self, service: &str, method: &str, code: &str) -> IntCounter {
        self.grpc_requests.with_label_values(&[service, method, code])
    }

    /// The counter of HTTP requests that were answered with `status`.
    pub(crate) fn http_requests(&self, status: &str) -> IntCounter {
        self.http_requests.with_label_values(&[status])
    }

    /// All metrics in the text format.
    pub(crate) fn text(&self, readings: &Readings) -> String {
        let mut families = self.registry.gather();
        families.extend(readings.families());
        // This fails only for an empty family, and there is none.
        TextEncoder::new().encode_to_string(&families).unwrap_or_default()
    }
}

/// Creates metrics and registers them.
struct Registrar(Registry);

impl Registrar {
    fn add<C: Collector + Clone + 'static>(&self, created: prometheus::Result<C>) -> C {
        let added = created.and_then(|metric| self.0.register(Box::new(metric.clone())).map(|()| metric));
        #[expect(clippy::expect_used, reason = "names and labels are constants, and a test creates them all")]
        added.expect("names are valid and unique")
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::new(name, help))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
    }
}
