//! What `doctor` looks at: all that `serve` requires, and what makes trouble later.
//!
//! It connects as `serve` does and changes nothing. What [`requirements`] finds comes first; the rest is the doctor's alone,
//! so that neither costs `serve` anything nor keeps it from starting: how far the slot is behind and who has it, what holds
//! it back, whether it survives a promotion, and whether a replication connection can be made at all.
//!
//! A server that cannot be asked is a diagnostic too. So there is no error.

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

/// Longest wait for all answers together, once there is a connection.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// What is looked at, and from where on it is worth a warning.
#[derive(Clone, Copy, Debug)]
pub struct Examination<'a> {
    /// What `serve` is going to use.
    pub expected: Expectation<'a>,
    /// SQL connections that `serve` may have.
    pub connections_max: usize,
    /// Of the change log, where there is one.
    pub node_id: Option<&'a str>,
    /// Those of the slot's monitor.
    pub thresholds: Thresholds,
    /// A transaction that is open for longer is reported.
    pub long_transaction: Duration,
}

impl Examination<'_> {
    /// Looks at everything, on the primary among `endpoints`.
    pub async fn run(&self, endpoints: &Endpoints) -> Vec<Diagnostic> {
        let mut report = Report::default();
        match endpoints.connect("tuplewatch doctor").await {
            Ok(connection) => {
                report.ok("connection", format!("to {}", connection.endpoint()));
                match timeout(ANSWER_MAX, self.look(&connection, &mut report)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => report.add(unusable("connection", &connection.endpoint().sql_error(error))),
                    Err(_) => {
                        let what = format!("the server did not answer within {} s", ANSWER_MAX.as_secs());
                        report.error("connection", what, "-- it is overloaded, or a lock is in the way: try again");
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
        // Where the slot is in use, such a connection is there, and what a second one needs may not be.
        if slot_status.is_none_or(|slot_status| !slot_status.is_in_use()) {
            link::check(connection, report).await;
        }
        Ok(())
    }
}

/// What a connection failed with.
fn unusable(subject: &str, error: &ConnectError) -> Diagnostic {
    let diagnostic = Diagnostic::error(subject, format!("PostgreSQL cannot be used at {}", error.cause()));
    let remedy = error.remedy().unwrap_or_else(|| "the server's log may say more".to_owned());
    diagnostic.fix(format!("-- {remedy}"))
}
