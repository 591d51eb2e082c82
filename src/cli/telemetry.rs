//! Logs: text for people or JSON for machines, on standard error.
//!
//! A log line reports a change of state once, never a single change. It contains no row values and no secrets. In the
//! JSON format everything is a line of JSON, including a panic and the error that ends the process, so that a log
//! reader sees the last line too.

use crate::config::{LogFormat, LogLevel, Logger};
use anstream::{AutoStream, ColorChoice};
use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic::PanicHookInfo;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Starts logging. Only the first call has an effect, because tests start several servers in one process.
pub(crate) fn init(config: &Logger) {
    let level = match config.level {
        LogLevel::Trace => LevelFilter::TRACE,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Error => LevelFilter::ERROR,
    };
    // Dependencies log only problems.
    let filter = Targets::new().with_default(LevelFilter::WARN).with_targets([
        ("fjall", LevelFilter::ERROR),
        ("lsm_tree", LevelFilter::ERROR),
        ("tuplewatch", level),
    ]);
    let log = tracing_subscriber::registry().with(filter);
    let lines = fmt::layer().with_writer(std::io::stderr);
    // An error means that logging was already started.
    match config.format {
        LogFormat::Json => {
            if log.with(lines.json().flatten_event(true)).try_init().is_ok() {
                std::panic::set_hook(Box::new(log_panic));
            }
        }
        LogFormat::Text => {
            let is_colored = AutoStream::choice(&std::io::stderr()) != ColorChoice::Never;
            let _ = log.with(lines.with_target(false).with_ansi(is_colored)).try_init();
        }
    }
}

/// Logs a panic as one line, with the content that the standard library would print.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let location = panic.location().map(ToString::to_string).unwrap_or_default();
    let backtrace = Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| backtrace.to_string());
    tracing::error!(
        thread = thread.name().unwrap_or_default(),
        location,
        backtrace,
        "panic, which is a bug: {}",
        panic.payload_as_str().unwrap_or("(no message)")
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value as Json;
    use std::process::Command;

    const PANICS: &str = "THIS_PROCESS_PANICS";

    /// The panic hook belongs to the whole process. So the test runs itself in a second process that panics.
    #[test]
    fn a_panic_is_a_line_of_json() {
        if std::env::var_os(PANICS).is_some() {
            init(&Logger { level: LogLevel::Info, format: LogFormat::Json });
            let thread = std::thread::Builder::new().name("worker".into()).spawn(|| panic!("two\nlines of {}", "it"));
            let _ = thread.unwrap().join();
            return;
        }
        for backtrace in ["0", "1"] {
            let mut again = Command::new(std::env::current_exe().unwrap());
            again.args(["--exact", "cli::telemetry::tests::a_panic_is_a_line_of_json", "--nocapture"]);
            let output = again.env(PANICS, "1").env("RUST_BACKTRACE", backtrace).output().unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            let [line] = &said.lines().collect::<Vec<_>>()[..] else { panic!("{said}") };
            let line: Json = serde_json::from_str(line).unwrap();
            assert_eq!(line["message"], "panic, which is a bug: two\nlines of it");
            assert_eq!((&line["level"], &line["thread"]), (&Json::from("ERROR"), &Json::from("worker")));
            assert!(line["location"].as_str().unwrap().starts_with("src/cli/telemetry.rs:"), "{line}");
            assert_eq!(line["backtrace"].is_string(), backtrace == "1", "{line}");
        }
    }
}
