//! Compares the metrics with their documentation, the alert rules and the dashboard.

use super::readings::{Log, Server, Slot, Window};
use super::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// One series at least of every metric.
fn everything() -> String {
    let metrics = Metrics::new();
    metrics.table("t").created.inc();
    metrics.gaps("TRUNCATE").inc();
    metrics.streams_ended("grpc", "TRUNCATE").inc();
    metrics.grpc_requests("s", "m", "OK").inc();
    metrics.http_requests("200").inc();
    metrics.fsync_seconds.observe(0.1);
    let slot = Slot {
        is_active: true,
        wal_status: Some("reserved".into()),
        is_lost: false,
        acknowledged_lsn: Some(1),
        lag_bytes: Some(1),
        lag_seconds: Some(1.5),
        retained_bytes: Some(1),
        safe_bytes: Some(1),
    };
    metrics.text(&Readings {
        not_ready_reason: None,
        oldest_waiting_seconds: 0.5,
        session_state: "streaming",
        received_lsn: Some(1 << 52),
        durable_lsn: Some(1),
        released_lsn: Some(1),
        looked_at_seconds: Some(1.0),
        server: Some(Server { lsn: 1, lag_bytes: Some(1), lag_seconds: Some(1.0), slot: Some(slot) }),
        log: Log { disk_free_bytes: Some(1), ..Log::default() },
        window: Window::default(),
        stream_lag_bytes: (0..=100).collect(),
        process: process::Process::read(),
    })
}

/// Type and labels by name, from the text format.
fn written() -> BTreeMap<String, (String, BTreeSet<String>)> {
    let mut found = BTreeMap::new();
    let mut name = String::new();
    for line in everything().lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (of, kind) = rest.split_once(' ').unwrap();
            of.clone_into(&mut name);
            assert!(found.insert(name.clone(), (kind.to_owned(), BTreeSet::new())).is_none(), "{name} is there twice");
        } else if !line.starts_with('#') {
            assert!(line.starts_with(name.as_str()), "{line} is not of {name}");
            let labels = line.split_once('{').map_or("", |(_, rest)| rest.split_once('}').unwrap().0);
            let labels =
                labels.split("\",").filter_map(|label| label.split_once('=')).map(|(label, _)| label.to_owned());
            found.get_mut(&name).unwrap().1.extend(labels.filter(|label| label != "le"));
        }
    }
    found
}

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The cells of table rows that begin with code.
fn rows(markdown: &str) -> impl Iterator<Item = Vec<&str>> {
    markdown.lines().filter(|line| line.starts_with("| `")).map(|line| {
        let cells = line.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`'));
        cells.collect()
    })
}

#[test]
fn every_metric_is_documented() {
    let markdown = read("docs/metrics.md");
    let (metrics, _) = markdown.split_once("\n## Alerts").unwrap();
    let documented: BTreeMap<_, _> = rows(metrics)
        .map(|cells| {
            let labels = cells[2].split(',').map(|label| label.trim().to_owned()).filter(|label| !label.is_empty());
            (cells[0].to_owned(), (cells[1].to_owned(), labels.collect::<BTreeSet<_>>()))
        })
        .collect();
    assert_eq!(documented, written());
}

#[test]
fn every_alert_is_documented_and_tested() {
    let (rules, tried) = (read("docker/prometheus/alerts.yml"), read("docker/prometheus/alerts_test.yml"));
    let markdown = read("docs/metrics.md");
    let (_, alerts) = markdown.split_once("\n## Alerts").unwrap();
    let documented: Vec<_> = rows(alerts).map(|cells| (cells[0], cells[1])).collect();
    let alerts: Vec<_> = rules
        .split("- alert: ")
        .skip(1)
        .map(|rule| {
            let severity = rule.split_once("severity: ").unwrap().1.split_once(' ').unwrap().0;
            (rule.lines().next().unwrap(), severity)
        })
        .collect();
    assert_eq!(documented, alerts);
    for (alert, severity) in alerts {
        let fires = format!("'{{alertname=\"{alert}\", severity=\"{severity}\"}}', value: 1");
        assert!(tried.contains(&fires), "{alert} is not seen to fire in alerts_test.yml");
    }
}

#[test]
fn rules_and_dashboard_use_existing_metrics() {
    let written = written();
    for path in ["docker/prometheus/alerts.yml", "docker/grafana/tuplewatch.json"] {
        let text = read(path);
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        let asked: BTreeSet<_> =
            words.filter(|word| word.starts_with("tuplewatch_") || word.starts_with("process_")).collect();
        assert!(asked.len() > 10, "{path} was not read");
        for name in asked {
            let whole = ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part));
            let is_part = whole.and_then(|whole| written.get(whole)).is_some_and(|(kind, _)| kind == "histogram");
            assert!(written.contains_key(name) || is_part, "{path} asks for {name}, which is not there");
        }
    }
}

#[test]
fn ranks_are_computed_over_the_streams() {
    let text = everything();
    for line in [
        "tuplewatch_stream_lag_bytes{rank=\"p50\"} 50",
        "tuplewatch_stream_lag_bytes{rank=\"p99\"} 99",
        "tuplewatch_stream_lag_bytes{rank=\"max\"} 100",
        "tuplewatch_streams_behind 100",
        "tuplewatch_received_lsn_bytes 4503599627370496",
        "tuplewatch_session_state{state=\"streaming\"} 1",
        "tuplewatch_session_state{state=\"failed\"} 0",
    ] {
        assert!(text.lines().any(|written| written == line), "{line}");
    }
    // Unknown values are not written.
    let unknown = Metrics::new().text(&Readings::default());
    assert!(
        !unknown.contains("tuplewatch_lag_seconds") && unknown.contains("tuplewatch_stream_lag_bytes{rank=\"max\"} 0")
    );
}
