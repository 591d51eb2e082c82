//! The checks of `doctor`: all requirements of `serve`, and conditions that will cause trouble later.
//!
//! The doctor connects as `serve` does, and changes nothing. The [`requirements`] come first. The other checks belong
//! to the doctor alone, so that they neither slow `serve` down nor prevent its start: how far the slot is behind and
//! who reads it, long transactions, failover to a standby, the clocks, and whether a replication connection can be
//! made.
//!
//! An unreachable server is also a diagnostic, so a run has no other error.

mod clock;
mod holders;
mod link;
mod slot;
mod standbys;

use std::time::Duration;
use tokio::time::timeout;

use crate::admin::monitor::Thresholds;
use crate::model::diagnostic::{Diagnostic, Report};
use crate::postgres::connection::application_name;
use crate::postgres::connection::{ConnectError, Connection, Endpoints};
use crate::postgres::requirements::{self, Expectation, Limits, Version};

/// The longest wait for all answers together, once the connection is open.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// The configuration to check, and the thresholds of the warnings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Examination<'a> {
    /// The mapping, publication and slot of `serve`.
    pub expected: Expectation<'a>,
    /// The most SQL connections that `serve` opens.
    pub connections_max: usize,
    /// The id of the change log, if there is one.
    pub node_id: Option<&'a str>,
    /// The thresholds of the slot's monitor.
    pub thresholds: Thresholds,
    /// Transactions that have been open for longer are reported.
    pub long_transaction: Duration,
}

impl Examination<'_> {
    /// Runs all checks on the primary among `endpoints`.
    pub(crate) async fn run(&self, endpoints: &Endpoints) -> Vec<Diagnostic> {
        let mut report = Report::default();
        match endpoints.connect("tuplewatch doctor").await {
            Ok(connection) => {
                report.ok("connection", format!("to {}", connection.endpoint()));
                match timeout(ANSWER_MAX, self.look(&connection, &mut report)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => report.add(unusable("connection", &connection.endpoint().sql_error(error))),
                    Err(_) => {
                        let what = format!("the server did not answer within {} s", ANSWER_MAX.as_secs());
                        report.error(
                            "connection",
                            what,
                            "-- the server is overloaded, or a lock blocks the query: \
                        try again",
                        );
                    }
                }
            }
            Err(error) => report.add(unusable("connection", &error)),
        }
        report.into_diagnostics()
    }

    async fn look(&self, connection: &Connection, report: &mut Report) -> Result<(), tokio_postgres::Error> {
        let client = &connection.client;
        let version = Version::read(client).await?;
        if !version.is_supported() {
            report.add(version.diagnostic());
            return Ok(());
        }
        report.extend(requirements::check(client, &self.expected).await?);
        Limits::read(client).await?.check(self.connections_max, report);
        let own_name = self.node_id.map(application_name);
        let slot_status = slot::SlotStatus::read(client, self.expected.slot).await?;
        if let Some(slot_status) = &slot_status {
            let (slot, commands) = (self.expected.slot, self.expected.commands);
            let held_bytes = self.expected.ack_delay.bytes_max();
            slot_status.check(slot, own_name.as_deref(), &self.thresholds, held_bytes, commands, report);
        }
        holders::check(client, &self.expected, self.long_transaction, report).await?;
        standbys::check(client, &self.expected, slot_status.as_ref(), report).await?;
        clock::check(client, report).await?;
        // While the slot is in use, serve's replication connection exists, and there may be no room for a second one.
        if slot_status.is_none_or(|slot_status| !slot_status.is_in_use()) {
            link::check(connection, report).await;
        }
        Ok(())
    }
}

/// The diagnostic for a connection that failed.
fn unusable(subject: &str, error: &ConnectError) -> Diagnostic {
    let diagnostic = Diagnostic::error(subject, format!("PostgreSQL cannot be used at {}", error.cause()));
    let remedy = error.remedy().unwrap_or_else(|| "the server's log may say more".to_owned());
    diagnostic.fix(format!("-- {remedy}"))
}
