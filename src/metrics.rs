//! Metrics: every name that there is, with its meaning; and how they are written, in Prometheus' text format.
//!
//! Two kinds, by how they come about:
//!
//! - **Counted** as it happens: [`Metrics`], one for the process, as logs are. Parts hold on to the handle that they count with, and
//!   count where work comes in batches, so that a message costs no look-up and no shared counter of its own.
//! - **Read** when somebody asks: [`Readings`], which `app` fills in from the log, the hub and the session. Nobody keeps a gauge
//!   up to date for nothing.
//!
//! No metric has a label for tenants: there may be millions, and each value is a series for ever. What labels have is bounded by
//! tables, methods, codes and reasons. No value of a row is in here.
//!
//! A test holds `docs/metrics.md`, the alert rules and the dashboard to what is here.
//!
//! The crate is `prometheus` without its features: it writes version 0.0.4 of the text format, which is what `promtool` and every
//! collector reads, and brings nothing that is not in the tree already. (`prometheus-client` writes OpenMetrics only.)

pub mod process;
pub mod readings;
#[cfg(test)]
mod tests;

pub use readings::Readings;

use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use std::sync::LazyLock;

/// The content type of the text.
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// A sync of a local disk takes from a tenth of a millisecond to some tens; seconds are a disk in trouble.
const FSYNC_SECONDS: [f64; 14] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// What this process counts. The first call makes it.
pub fn metrics() -> &'static Metrics {
    static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);
    &METRICS
}

/// What is counted as it happens.
pub struct Metrics {
    registry: Registry,
    /// Transactions that the session handed on.
    pub transactions: IntCounter,
    changes: IntCounterVec,
    decode_errors: IntCounterVec,
    gaps: IntCounterVec,
    /// Sessions that streamed, after the first of this process.
    pub reconnects: IntCounter,
    /// Sessions that ended, or did not begin, for a reason that may pass.
    pub transient_failures: IntCounter,
    /// The same, for one that somebody has to repair.
    pub definite_failures: IntCounter,
    /// How long syncs of the change log take.
    pub fsync_seconds: Histogram,
    /// Streams that began with reading the log.
    pub replays: IntCounter,
    /// Streams that fell from memory back to the log.
    pub slow_subscribers: IntCounter,
    /// Messages that were encoded as frames of gRPC.
    pub frames_made: IntCounter,
    /// Messages that were encoded as lines of JSON.
    pub lines_made: IntCounter,
    /// Streams that may be open.
    pub subscribers_limit: IntGauge,
    /// Streams over gRPC.
    pub grpc: Edge,
    /// Streams over HTTP.
    pub http: Edge,
    streams_ended: IntCounterVec,
    grpc_requests: IntCounterVec,
    http_requests: IntCounterVec,
}

/// Streams of one protocol.
pub struct Edge {
    /// Its name.
    pub protocol: &'static str,
    /// Those that are open.
    pub subscribers: IntGauge,
    /// Messages that were handed to the connection.
    pub messages_sent: IntCounter,
    /// Their bytes.
    pub bytes_sent: IntCounter,
}

/// Changes of one table. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Table {
    /// Facts that hold from then on.
    pub created: IntCounter,
    /// Facts that no longer hold.
    pub deleted: IntCounter,
    /// Rows that could not be turned into changes.
    pub decode_errors: IntCounter,
}

impl Metrics {
    fn new() -> Self {
        let new = Registrar(Registry::new());
        let failures = new.counters(
            "tuplewatch_session_failures_total",
            "Replication sessions that ended or did not begin, by whether it may pass (transient) or needs repair (definite).",
            &["kind"],
        );
        let subscribers =
            new.gauges("tuplewatch_subscribers", "Streams of changes that are open, by protocol.", &["protocol"]);
        let messages_sent =
            new.counters("tuplewatch_messages_sent_total", "Messages sent to subscribers, by protocol.", &["protocol"]);
        let bytes_sent = new.counters(
            "tuplewatch_sent_bytes_total",
            "Bytes of messages sent to subscribers, without HTTP's framing and TLS, by protocol.",
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
                "Transactions received from PostgreSQL, with changes or without.",
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
                "Gaps in history, by the reason that subscribers are told.",
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
                "How long it took to make the change log durable.",
                &FSYNC_SECONDS,
            ),
            replays: new.counter(
                "tuplewatch_replays_total",
                "Streams that began behind what is in memory, and read the change log first.",
            ),
            slow_subscribers: new.counter(
                "tuplewatch_slow_subscribers_total",
                "Streams that were read so slowly that they fell from memory back to the change log.",
            ),
            frames_made: envelopes_made.with_label_values(&["base_v1_frame"]),
            lines_made: envelopes_made.with_label_values(&["base_v1_json"]),
            subscribers_limit: new.gauge("tuplewatch_subscribers_limit", "Streams of changes that may be open."),
            grpc: edge("grpc"),
            http: edge("http"),
            streams_ended: new.counters(
                "tuplewatch_streams_ended_total",
                "Streams of changes that ended, by protocol and by the reason that the subscriber was told.",
                &["protocol", "reason"],
            ),
            grpc_requests: new.counters(
                "tuplewatch_grpc_requests_total",
                "Requests of gRPC that have ended, by service, method and code; those of Watch when their stream ends.",
                &["service", "method", "code"],
            ),
            http_requests: new.counters(
                "tuplewatch_http_requests_total",
                "Requests of HTTP whose answer has begun, by status.",
                &["code"],
            ),
            registry: new.0,
        }
    }

    /// The counters of a table, to be kept by who counts.
    pub fn table(&self, table: &str) -> Table {
        Table {
            created: self.changes.with_label_values(&[table, "create"]),
            deleted: self.changes.with_label_values(&[table, "delete"]),
            decode_errors: self.decode_errors.with_label_values(&[table]),
        }
    }

    /// Gaps for this reason.
    pub fn gaps(&self, reason: &str) -> IntCounter {
        self.gaps.with_label_values(&[reason])
    }

    /// Streams of this protocol that ended for this reason.
    pub fn streams_ended(&self, protocol: &str, reason: &str) -> IntCounter {
        self.streams_ended.with_label_values(&[protocol, reason])
    }

    /// Requests of gRPC that ended so. Only names of methods that there are: a client may ask for anything.
    pub fn grpc_requests(&self, service: &str, method: &str, code: &str) -> IntCounter {
        self.grpc_requests.with_label_values(&[service, method, code])
    }

    /// Requests of HTTP that were answered so.
    pub fn http_requests(&self, status: &str) -> IntCounter {
        self.http_requests.with_label_values(&[status])
    }

    /// All of it, in the text format.
    pub fn text(&self, readings: &Readings) -> String {
        let mut families = self.registry.gather();
        families.extend(readings.families());
        // Fails where a family is empty, and there is none.
        TextEncoder::new().encode_to_string(&families).unwrap_or_default()
    }
}

/// Makes metrics and registers them.
struct Registrar(Registry);

impl Registrar {
    fn add<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let added = made.and_then(|metric| self.0.register(Box::new(metric.clone())).map(|()| metric));
        #[expect(clippy::expect_used, reason = "names and labels are constants, and a test makes them all")]
        added.expect("names are valid, and each is there once")
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
