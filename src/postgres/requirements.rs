//! The requirements on PostgreSQL, and their remedies.
//!
//! `serve` refuses to start if [`check`] finds an error. Each diagnostic contains the statement that fixes it, ready
//! for psql. A step that is not a statement (a restart) follows as a comment. `doctor` makes the same checks and more:
//! [`crate::admin::doctor`].
//!
//! The checks need no privileges, because they read only catalogs that every role may read.

mod connections;
mod server;
mod tables;

use tokio_postgres::Client;

use crate::decode::mapping::Mapping;
use crate::model::diagnostic::{CommandLine, Diagnostic, Report};
use crate::postgres::catalog::{Catalog, identifier};
use crate::postgres::publication::LOOK_AT_ONCE;
use crate::postgres::slot::AckDelay;
use crate::postgres::slot::Slot;
pub(crate) use connections::Limits;
use server::Server;
pub(crate) use server::Version;
pub(crate) use tables::not_a_table;
use tables::{Tenants, check_table};

/// The versions of PostgreSQL that tuplewatch is tested with.
const MAJORS: std::ops::RangeInclusive<i32> = 14..=18;

/// The objects that tuplewatch will use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expectation<'a> {
    pub(crate) mapping: &'a Mapping,
    /// The slot's name.
    pub(crate) slot: &'a str,
    /// The publication's name.
    pub(crate) publication: &'a str,
    /// Whether the slot must exist. If not, there must be room for it.
    pub(crate) slot_expected: bool,
    /// The delay of acknowledgements.
    pub(crate) ack_delay: AckDelay,
    /// The form of commands in fixes.
    pub(crate) commands: &'a CommandLine,
}

/// Checks all requirements, in five statements.
///
/// # Errors
/// If PostgreSQL does not answer. Its answers become diagnostics, never errors.
pub(crate) async fn check(
    client: &Client,
    expected: &Expectation<'_>,
) -> Result<Vec<Diagnostic>, tokio_postgres::Error> {
    let mut report = Report::default();
    let version = Version::read(client).await?;
    report.add(version.diagnostic());
    if !version.is_supported() {
        return Ok(report.into_diagnostics());
    }
    let server = Server::read(client).await?;
    let catalog = Catalog::read(client, expected.publication, expected.mapping).await?;
    let slot = Slot::read(client, expected.slot).await?;
    let tenants = match expected.mapping.tenants() {
        Some(tenants) => Some(Tenants::read(client, &tenants.table, &tenants.id).await?),
        None => None,
    };

    server.check(&mut report);
    server.check_synchronous_standbys(expected.ack_delay, &mut report);
    server.check_keep_size(expected.ack_delay, &mut report);
    server.check_room(slot.as_ref(), &mut report);
    let fixes = Fixes { has_slot: slot.is_some(), commands: expected.commands };
    for table in &catalog.tables {
        check_table(table, &catalog, expected, fixes, &server, &version, &mut report);
    }
    if let (Some(tenants), Some(spec)) = (tenants, expected.mapping.tenants()) {
        tenants.check(&spec.table, &spec.id, fixes, &server, &mut report);
    }
    check_publication(&catalog, expected, fixes, &mut report);
    check_slot(slot.as_ref(), expected, &server, &mut report);
    Ok(report.into_diagnostics())
}

/// Checks the requirements of a new slot: settings, rights, and room unless it replaces another slot.
///
/// # Errors
/// If PostgreSQL does not answer.
pub(crate) async fn check_for_slot(
    client: &Client,
    takes_room: bool,
    report: &mut Report,
) -> Result<(), tokio_postgres::Error> {
    Server::read(client).await?.check_for_slot(takes_room, report);
    Ok(())
}

/// The form of fixes.
#[derive(Clone, Copy)]
struct Fixes<'a> {
    /// If there is a slot, tuplewatch may be running, and must check at once.
    has_slot: bool,
    commands: &'a CommandLine,
}

impl Fixes<'_> {
    /// A statement that alters the publication, or what it publishes.
    fn alter(self, statement: &str) -> String {
        if self.has_slot {
            format!("{statement}; {LOOK_AT_ONCE}  -- at once, no reload")
        } else {
            format!("{statement};  -- at once, no reload")
        }
    }

    fn setup(self) -> String {
        self.commands
            .setup()
            .fix("as the owner of the tables; it creates those of the preset tuples, others are yours to create")
    }
}

/// The fix for an unusable slot.
pub(crate) fn recreate_slot(commands: &CommandLine) -> String {
    commands.recreate_slot().fix("the changes in between are lost, and subscribers receive a gap")
}

fn check_publication(catalog: &Catalog, expected: &Expectation<'_>, fixes: Fixes<'_>, report: &mut Report) {
    let name = identifier(expected.publication);
    let subject = format!("publication {}", expected.publication);
    let Some(publication) = &catalog.publication else {
        let tables: Vec<String> = catalog.tables.iter().map(|table| table.name().to_sql()).collect();
        let fix = if fixes.has_slot {
            // A slot that is older than the publication cannot be read with it.
            recreate_slot(fixes.commands)
        } else {
            format!("{}  -- or: {}", creation(expected.publication, &tables), expected.commands.setup())
        };
        let meaning = "It lists the tables to read: without it no change reaches tuplewatch.";
        return report.add(Diagnostic::error(subject, "does not exist").means(meaning).fix(fix));
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
        let fix = fixes.alter(&format!("ALTER PUBLICATION {name} SET (publish = '{ALL_OPERATIONS}')"));
        let what = format!("does not publish {}", missing.join(", "));
        report.add(
            Diagnostic::error(subject, what)
                .means("Such changes reach neither tuplewatch nor its subscribers.")
                .fix(fix),
        );
    }
}

/// The value for `WITH (publish = …)`.
pub(crate) const ALL_OPERATIONS: &str = "insert, update, delete, truncate";

/// The statement that creates the publication.
pub(crate) fn creation(publication: &str, tables: &[String]) -> String {
    format!(
        "CREATE PUBLICATION {} FOR TABLE {} WITH (publish = '{ALL_OPERATIONS}', publish_via_partition_root = true);",
        identifier(publication),
        tables.join(", ")
    )
}

fn check_slot(slot: Option<&Slot>, expected: &Expectation<'_>, server: &Server, report: &mut Report) {
    let subject = format!("replication slot {}", expected.slot);
    let Some(slot) = slot else {
        if !expected.slot_expected {
            return report.ok(subject, "does not exist: tuplewatch serve creates it with a new change log");
        }
        let meaning = "The change log continues from it: it was dropped, or this is another server (after a promotion or an upgrade).";
        return report
            .add(Diagnostic::error(subject, "does not exist").means(meaning).fix(recreate_slot(expected.commands)));
    };
    if let Some(diagnostic) = foreign_slot(slot, expected.slot, &server.database) {
        return report.add(diagnostic);
    }
    let before = report.count();
    check_fit(slot, &subject, expected.commands, report);
    if report.is_fine_since(before) {
        let holder = slot.active_pid.map(|pid| format!(", in use by process {pid}")).unwrap_or_default();
        let status = slot.wal_status.as_deref().unwrap_or("unknown");
        report.ok(subject, format!("is there (wal_status {status}){holder}"));
    }
}

/// The diagnostic for a slot that is not tuplewatch's, or not for this database.
pub(crate) fn foreign_slot(slot: &Slot, name: &str, database: &str) -> Option<Diagnostic> {
    let what = if slot.slot_type != "logical" || slot.plugin.as_deref() != Some("pgoutput") {
        format!("is a {} slot of {}", slot.slot_type, slot.plugin.as_deref().unwrap_or("no plugin"))
    } else if slot.database.as_deref() != Some(database) {
        format!("is for database {}", slot.database.as_deref().unwrap_or("?"))
    } else if slot.temporary {
        "is a temporary one, and disappears with the session that created it".to_owned()
    } else {
        return None;
    };
    let fix = "-- it belongs to somebody else: choose another name in replication.slot";
    Some(Diagnostic::error(format!("replication slot {name}"), what).fix(fix))
}

/// Checks whether the needed WAL can still be read from the slot, and for how long.
pub(crate) fn check_fit(slot: &Slot, subject: &str, commands: &CommandLine, report: &mut Report) {
    if let Some(reason) = slot.loss() {
        let meaning = "It can no longer be read: tuplewatch was down, or behind, for longer than the server keeps WAL.";
        let diagnostic = Diagnostic::error(subject, format!("is lost ({reason})"));
        report.add(diagnostic.means(meaning).fix(recreate_slot(commands)));
    } else if slot.wal_status.as_deref() == Some("unreserved") {
        let what =
            "will be lost at one of the next checkpoints: it is farther behind than max_slot_wal_keep_size allows";
        let fix = "ALTER SYSTEM SET max_slot_wal_keep_size = -1;  -- until tuplewatch has caught up; then a reload: \
                   SELECT pg_reload_conf();";
        report.warning(subject, what, fix);
    }
    if slot.two_phase {
        let what = "decodes two-phase transactions at PREPARE, before they are committed";
        report.error(subject, what, recreate_slot(commands));
    }
}

#[cfg(test)]
mod tests;
