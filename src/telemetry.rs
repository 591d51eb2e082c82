//! Logs: text for people or JSON for machines, on standard error.
//!
//! A log line tells of a change of state, once, and never of a single change; it holds no row values and no secrets.

use crate::config::{LogFormat, LogLevel, Logger};
use anstream::{AutoStream, ColorChoice};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Starts logging. The first call wins: tests start several servers in one process.
pub fn init(config: &Logger) {
    let level = match config.level {
        LogLevel::Trace => LevelFilter::TRACE,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Error => LevelFilter::ERROR,
    };
    // Dependencies speak only where something is wrong. The driver calls every lost connection an error; we tell of it ourselves.
    let filter = EnvFilter::new(format!("warn,pgwire_replication=off,fjall=error,lsm_tree=error,tuplewatch={level}"));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // An error means that logging was started before.
    let _ = match config.format {
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
        LogFormat::Text => {
            let is_colored = AutoStream::choice(&std::io::stderr()) != ColorChoice::Never;
            lines.with_target(false).with_ansi(is_colored).try_init()
        }
    };
}
