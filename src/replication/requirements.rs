//! What PostgreSQL must be like, and what to do where it is not.
//!
//! `serve` refuses to start where [`check`] finds an error. Each finding has the statement that fixes it, to be pasted into
//! psql as it is: what a statement alone does not do (a restart) stands behind it as a comment.
//!
//! The role needs nothing to be able to ask: everything is read from catalogs that are open to all.

mod server;
mod tables;

use std::fmt;
use tokio_postgres::Client;

use super::catalog::{Catalog, identifier};
use super::slot::Slot;
use crate::mapping::Mapping;
use server::Server;
use tables::{Tenants, check_table};

/// The versions that tuplewatch is tested with.
const MAJORS: std::ops::RangeInclusive<i32> = 14..=18;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// As it should be.
    Ok,
    /// It works, and somebody should know.
    Warning,
    /// It does not work.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// A setting, a table, the slot …
    pub subject: String,
    /// What was found.
    pub what: String,
    /// What to run. SQL (or a tuplewatch command), with the rest as a comment.
    pub fix: Option<String>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<8} {}: {}", self.severity, self.subject, self.what)?;
        if let Some(fix) = &self.fix {
            write!(f, "\n         fix: {fix}")?;
        }
        Ok(())
    }
}

/// What tuplewatch is going to use.
#[derive(Clone, Copy, Debug)]
pub struct Expectation<'a> {
    /// Names the tables.
    pub mapping: &'a Mapping,
    /// Name of the slot.
    pub slot: &'a str,
    /// Name of the publication.
    pub publication: &'a str,
    /// Whether the slot must be there. If not, there must be room for it.
    pub slot_expected: bool,
}

/// Looks at everything, in four statements.
///
/// # Errors
/// Where PostgreSQL cannot be asked. What it answers is never an error but a finding.
pub async fn check(client: &Client, expected: &Expectation<'_>) -> Result<Vec<Finding>, tokio_postgres::Error> {
    let server = Server::read(client).await?;
    let catalog = Catalog::read(client, expected.publication, expected.mapping).await?;
    let slot = Slot::read(client, expected.slot).await?;
    let tenants = match expected.mapping.tenants() {
        Some(tenants) => Some(Tenants::read(client, &tenants.table, &tenants.id).await?),
        None => None,
    };

    let mut report = Report { findings: Vec::new() };
    server.check(&mut report);
    server.check_room(slot.as_ref(), expected.slot_expected, &mut report);
    for table in &catalog.tables {
        check_table(table, expected, &server, catalog.publication.as_ref(), &mut report);
    }
    if let (Some(tenants), Some(spec)) = (tenants, expected.mapping.tenants()) {
        tenants.check(&spec.table, &spec.id, &server, &mut report);
    }
    check_publication(&catalog, expected, slot.is_some(), &mut report);
    check_slot(slot.as_ref(), expected, &server, &mut report);
    Ok(report.findings)
}

/// Collects findings.
struct Report {
    findings: Vec<Finding>,
}

impl Report {
    fn add(&mut self, severity: Severity, subject: impl fmt::Display, what: impl Into<String>, fix: Option<String>) {
        self.findings.push(Finding { severity, subject: subject.to_string(), what: what.into(), fix });
    }

    fn ok(&mut self, subject: impl fmt::Display, what: impl Into<String>) {
        self.add(Severity::Ok, subject, what, None);
    }

    fn warning(&mut self, subject: impl fmt::Display, what: impl Into<String>, fix: impl Into<Option<String>>) {
        self.add(Severity::Warning, subject, what, fix.into());
    }

    fn error(&mut self, subject: impl fmt::Display, what: impl Into<String>, fix: impl Into<Option<String>>) {
        self.add(Severity::Error, subject, what, fix.into());
    }

    /// Whether nothing was wrong since there were so many findings.
    fn is_fine_since(&self, count: usize) -> bool {
        self.findings.iter().skip(count).all(|finding| finding.severity == Severity::Ok)
    }
}

/// The way out where the slot is of no use any more.
const RECREATE: &str = "tuplewatch setup --recreate-slot  -- what changed in between is lost, and subscribers are told";

fn check_publication(catalog: &Catalog, expected: &Expectation<'_>, has_slot: bool, report: &mut Report) {
    let name = identifier(expected.publication);
    let subject = format!("publication {}", expected.publication);
    let Some(publication) = &catalog.publication else {
        let tables: Vec<String> = catalog.tables.iter().map(|table| table.name().to_sql()).collect();
        let fix = if has_slot {
            // A slot that is older than the publication cannot be read with it.
            RECREATE.to_owned()
        } else {
            format!("{}  -- or: tuplewatch setup", creation(expected.publication, &tables))
        };
        return report.error(subject, "does not exist", fix);
    };
    let operations = [
        ("insert", publication.insert),
        ("update", publication.update),
        ("delete", publication.delete),
        ("truncate", publication.truncate),
    ];
    let missing: Vec<&str> =
        operations.iter().filter(|(_, is_published)| !is_published).map(|(word, _)| *word).collect();
    if missing.is_empty() {
        report.ok(subject, "publishes insert, update, delete and truncate");
    } else {
        let fix = format!("ALTER PUBLICATION {name} SET (publish = '{ALL_OPERATIONS}');  -- at once, no reload");
        report.error(subject, format!("does not publish {}", missing.join(", ")), fix);
    }
}

/// As `WITH (publish = …)` wants it.
pub(super) const ALL_OPERATIONS: &str = "insert, update, delete, truncate";

/// The statement that creates the publication.
pub(super) fn creation(publication: &str, tables: &[String]) -> String {
    format!(
        "CREATE PUBLICATION {} FOR TABLE {} WITH (publish = '{ALL_OPERATIONS}', publish_via_partition_root = true);",
        identifier(publication),
        tables.join(", ")
    )
}

fn check_slot(slot: Option<&Slot>, expected: &Expectation<'_>, server: &Server, report: &mut Report) {
    let subject = format!("replication slot {}", expected.slot);
    let Some(slot) = slot else {
        if expected.slot_expected {
            report.error(subject, "does not exist", RECREATE.to_owned());
        }
        return;
    };
    if slot.slot_type != "logical" || slot.plugin.as_deref() != Some("pgoutput") {
        let what = format!("is a {} slot of {}", slot.slot_type, slot.plugin.as_deref().unwrap_or("no plugin"));
        let fix = "-- it belongs to somebody else: choose another name in replication.slot".to_owned();
        return report.error(subject, what, fix);
    }
    if slot.database.as_deref() != Some(&server.database) {
        let what = format!("is for database {}", slot.database.as_deref().unwrap_or("?"));
        let fix = "-- it belongs to somebody else: choose another name in replication.slot".to_owned();
        return report.error(subject, what, fix);
    }
    let before = report.findings.len();
    if let Some(reason) = slot.loss() {
        report.error(&subject, format!("is lost ({reason})"), RECREATE.to_owned());
    } else if slot.wal_status.as_deref() == Some("unreserved") {
        let left = slot.safe_wal_size.map(|bytes| format!("; {bytes} bytes of WAL are left")).unwrap_or_default();
        report.warning(&subject, format!("will be lost soon: it is far behind{left}"), None);
    }
    if slot.two_phase {
        report.error(
            &subject,
            "decodes two-phase transactions at PREPARE, before they are committed",
            RECREATE.to_owned(),
        );
    }
    if report.is_fine_since(before) {
        let holder = slot.active_pid.map(|pid| format!(", in use by process {pid}")).unwrap_or_default();
        report.ok(subject, format!("is there{holder}"));
    }
}

#[cfg(test)]
mod tests;
