//! The diagnosis of `doctor`: the change log's directory and the server, examined beside a running `serve`.
//!
//! It only combines the checks of [`crate::changelog::examination`] and [`crate::admin::doctor`]; the command line
//! prints the result.

use super::{ack_delay, connections_max, endpoints, load_mapping, log_options, thresholds};
use crate::admin::doctor::Examination;
use crate::changelog::examination::examine;
use crate::config::Config;
use crate::model::diagnostic::{Diagnostic, Severity};
use crate::postgres::requirements::Expectation;
use serde::Serialize;
use std::time::Duration;

/// The complete result.
#[derive(Debug, Serialize)]
pub struct Diagnosis {
    /// The hosts, the database and the user.
    pub server: String,
    /// The findings, in the order of the checks.
    pub diagnostics: Vec<Diagnostic>,
    /// The number of findings of each severity.
    pub summary: Summary,
}

/// The number of findings of each severity.
#[derive(Clone, Copy, Debug, Serialize)]
#[expect(missing_docs, reason = "the fields have the names of the severities")]
pub struct Summary {
    pub error: usize,
    pub warning: usize,
    pub ok: usize,
}

impl Summary {
    fn of(diagnostics: &[Diagnostic]) -> Self {
        let count = |severity| diagnostics.iter().filter(|diagnostic| diagnostic.severity == severity).count();
        Self { error: count(Severity::Error), warning: count(Severity::Warning), ok: count(Severity::Ok) }
    }
}

/// Runs all checks. They change nothing, and do not disturb a running program.
///
/// # Errors
/// Only if the configuration is invalid. An unreachable server is a finding.
pub async fn diagnose(config: &Config, long_transaction: Duration) -> anyhow::Result<Diagnosis> {
    let mapping = load_mapping(config)?;
    let endpoints = endpoints(config)?;
    let (options, commands) = (log_options(config), config.commands().clone());
    let log = tokio::task::spawn_blocking(move || examine(&options, &commands)).await?;
    let examination = Examination {
        expected: Expectation {
            mapping: &mapping,
            slot: &config.replication.slot,
            publication: &config.replication.publication,
            // A log that has begun continues from its slot.
            slot_expected: log.has_begun,
            ack_delay: ack_delay(config),
            commands: config.commands(),
        },
        connections_max: connections_max(config),
        node_id: log.node_id.as_deref(),
        thresholds: thresholds(config),
        long_transaction,
    };
    let mut diagnostics = examination.run(&endpoints).await;
    diagnostics.extend(log.diagnostics);
    Ok(Diagnosis { server: endpoints.to_string(), summary: Summary::of(&diagnostics), diagnostics })
}
