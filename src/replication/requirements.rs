//! What PostgreSQL must be like, and what to do where it is not.
//!
//! `serve` refuses to start, and `doctor` reports, by the same [`check`]. Each finding has the statement that fixes it, to
//! be pasted into psql as it is: what a statement alone does not do (a restart) stands behind it as a comment.
//!
//! The role needs nothing to be able to ask: everything is read from catalogs that are open to all.

use serde::Deserialize;
use std::fmt;
use tokio_postgres::Client;

use super::catalog::{Catalog, Document, Publication, Table, identifier, literal};
use super::slot::Slot;
use crate::mapping::{Mapping, TableName};

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
    check_publication(&catalog, expected, &mut report);
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

/// The server's settings and the role's rights.
#[derive(Debug, Deserialize)]
struct Server {
    version: String,
    version_number: i32,
    in_recovery: bool,
    database: String,
    role: String,
    may_replicate: bool,
    /// Amazon's servers grant replication, and set wal_level, by means of their own.
    is_rds: bool,
    wal_level: String,
    wal_level_pending: bool,
    slots: i64,
    slots_max: i64,
    walsenders: i64,
    walsenders_max: i64,
    commit_timestamps: String,
    commit_timestamps_pending: bool,
    slot_keep_size: String,
}

impl Server {
    async fn read(client: &Client) -> Result<Self, tokio_postgres::Error> {
        let sql = "
            SELECT json_build_object(
                'version', current_setting('server_version'),
                'version_number', current_setting('server_version_num')::int,
                'in_recovery', pg_is_in_recovery(),
                'database', current_database(),
                'role', current_user,
                'may_replicate', rolsuper OR rolreplication OR COALESCE(
                    (SELECT pg_has_role(oid, 'MEMBER') FROM pg_roles WHERE rolname = 'rds_replication'), false),
                'is_rds', EXISTS (SELECT FROM pg_roles WHERE rolname = 'rds_replication'),
                'wal_level', current_setting('wal_level'),
                'wal_level_pending', (SELECT pending_restart FROM pg_settings WHERE name = 'wal_level'),
                'slots', (SELECT count(*) FROM pg_replication_slots),
                'slots_max', current_setting('max_replication_slots')::int,
                'walsenders', (SELECT count(*) FROM pg_stat_replication),
                'walsenders_max', current_setting('max_wal_senders')::int,
                'commit_timestamps', current_setting('track_commit_timestamp'),
                'commit_timestamps_pending',
                    (SELECT pending_restart FROM pg_settings WHERE name = 'track_commit_timestamp'),
                'slot_keep_size', current_setting('max_slot_wal_keep_size'))
              FROM pg_roles WHERE rolname = current_user";
        client.query_typed_one(sql, &[]).await?.try_get::<_, Document<Self>>(0).map(|document| document.0)
    }

    fn check(&self, report: &mut Report) {
        let major = self.version_number / 10_000;
        if major < *MAJORS.start() {
            report.error("version", format!("{} is too old: 14 is the oldest that works", self.version), None);
        } else if MAJORS.contains(&major) {
            report.ok("version", format!("PostgreSQL {}", self.version));
        } else {
            let what = format!("PostgreSQL {} is newer than what tuplewatch is tested with (18)", self.version);
            report.warning("version", what, None);
        }
        if self.in_recovery {
            let fix = "SELECT pg_promote();  -- or rather: name the primary in database.uri".to_owned();
            report.error("server", "is a standby, and changes are read from the primary", fix);
        }
        self.check_wal_level(report);
        let subject = format!("role {}", self.role);
        if self.may_replicate {
            report.ok(subject, "may replicate");
        } else {
            let role = identifier(&self.role);
            let fix = if self.is_rds {
                format!("GRANT rds_replication TO {role};  -- at once, no reload")
            } else {
                format!("ALTER ROLE {role} REPLICATION;  -- at once, no reload; by a superuser")
            };
            report.error(subject, "has no REPLICATION", fix);
        }
        if self.commit_timestamps == "on" {
            report.ok("track_commit_timestamp", "on");
        } else {
            let what = format!(
                "is off: tuplewatch does without, but pg_xact_commit_timestamp() and Permify's own Watch do not{}",
                pending(self.commit_timestamps_pending)
            );
            let fix =
                "ALTER SYSTEM SET track_commit_timestamp = on;  -- then restart PostgreSQL: a reload is not enough";
            report.warning("track_commit_timestamp", what, fix.to_owned());
        }
        if self.slot_keep_size == "-1" {
            let what = "is -1, no limit: if tuplewatch is away for long, its slot keeps WAL until the disk is full";
            let fix = "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB';  -- what the disk can spare; then a reload: \
                       SELECT pg_reload_conf();";
            report.warning("max_slot_wal_keep_size", what, fix.to_owned());
        } else {
            report.ok("max_slot_wal_keep_size", self.slot_keep_size.clone());
        }
    }

    fn check_wal_level(&self, report: &mut Report) {
        if self.wal_level == "logical" {
            return report.ok("wal_level", "logical");
        }
        let what = format!("is {}{}", self.wal_level, pending(self.wal_level_pending));
        let fix = if self.is_rds {
            "-- set rds.logical_replication = 1 in the parameter group, then restart (reboot) the instance"
        } else {
            "ALTER SYSTEM SET wal_level = logical;  -- then restart PostgreSQL: a reload is not enough"
        };
        report.error("wal_level", what, fix.to_owned());
    }

    fn check_room(&self, slot: Option<&Slot>, slot_expected: bool, report: &mut Report) {
        if slot.is_none() && !slot_expected {
            self.check_room_for("max_replication_slots", self.slots, self.slots_max, report);
        }
        // If ours is in use, by a tuplewatch that runs, its walsender is among those that are counted.
        if slot.is_none_or(|slot| slot.active_pid.is_none()) {
            self.check_room_for("max_wal_senders", self.walsenders, self.walsenders_max, report);
        }
    }

    #[expect(clippy::unused_self, reason = "it belongs to the checks of the server")]
    fn check_room_for(&self, setting: &str, used: i64, most: i64, report: &mut Report) {
        if used < most {
            return report.ok(setting, format!("{used} of {most} in use"));
        }
        let more = most.saturating_add(10);
        let fix = format!("ALTER SYSTEM SET {setting} = {more};  -- then restart PostgreSQL: a reload is not enough");
        report.error(setting, format!("all {most} are in use"), fix);
    }
}

fn pending(is_pending: bool) -> &'static str {
    if is_pending { " (another value stands in the configuration and waits for a restart)" } else { "" }
}

fn check_table(
    table: &Table,
    expected: &Expectation<'_>,
    server: &Server,
    publication: Option<&Publication>,
    report: &mut Report,
) {
    let name = table.name();
    let subject = format!("table {name}");
    let before = report.findings.len();
    if table.oid.is_none() {
        let fix =
            "tuplewatch setup  -- it creates the tables of the preset 'tuples'; those of other mappings are yours";
        return report.error(subject, "does not exist", fix.to_owned());
    }
    let spec = expected.mapping.tables().iter().find(|spec| spec.table == name);
    for wanted in spec.map(crate::mapping::TableSpec::columns).unwrap_or_default() {
        if !table.columns.iter().any(|column| column.name == wanted) {
            let fix = "-- correct the mapping, or add the column".to_owned();
            report.error(&subject, format!("has no column {wanted}, which the mapping names"), fix);
        }
    }
    check_access(&name, table.schema_usable, table.selectable, &server.role, report);
    for relation in &table.relations {
        let relation_subject = format!("table {}", relation.name());
        if relation.persistence != "p" {
            let fix =
                format!("ALTER TABLE {} SET LOGGED;  -- rewrites it under an exclusive lock", relation.name().to_sql());
            report.error(&relation_subject, "is not logged: its changes are not in the WAL", fix);
        }
        if let Some(column) = relation.uncovered(&table.columns) {
            let what = format!("old rows lack column {}: the replica identity does not cover it", column.name);
            let fix = format!("ALTER TABLE {} REPLICA IDENTITY FULL;  -- at once, no reload", relation.name().to_sql());
            report.error(&relation_subject, what, fix);
        }
    }
    if let Some(publication) = publication {
        check_membership(table, expected, publication, report);
    }
    if report.is_fine_since(before) {
        report.ok(subject, "can be read, is published, and its old rows are complete");
    }
}

fn check_access(table: &TableName, schema_usable: bool, selectable: bool, role: &str, report: &mut Report) {
    let role = identifier(role);
    let subject = format!("table {table}");
    if !schema_usable {
        let fix = format!("GRANT USAGE ON SCHEMA {} TO {role};  -- at once, no reload", identifier(&table.schema));
        report.error(&subject, format!("the role has no USAGE on schema {}", table.schema), fix);
    }
    if !selectable {
        let fix = format!("GRANT SELECT ON {} TO {role};  -- at once, no reload", table.to_sql());
        report.error(&subject, "the role has no SELECT", fix);
    }
}

fn check_membership(table: &Table, expected: &Expectation<'_>, publication: &Publication, report: &mut Report) {
    let name = table.name();
    let subject = format!("table {name}");
    let published = identifier(expected.publication);
    if !table.is_published(publication) {
        let fix = format!("ALTER PUBLICATION {published} ADD TABLE {};  -- at once, no reload", name.to_sql());
        return report.error(subject, format!("is not in publication {}", expected.publication), fix);
    }
    if table.is_published_as_its_root(publication) {
        let fix =
            format!("ALTER PUBLICATION {published} SET (publish_via_partition_root = false);  -- or map the root");
        report.error(&subject, "is a partition, and its changes are published as those of the root", fix);
    }
    if table.is_partitioned() && !publication.via_root {
        let fix =
            format!("ALTER PUBLICATION {published} SET (publish_via_partition_root = true);  -- at once, no reload");
        report.error(&subject, "is partitioned, and its changes are published under the names of its partitions", fix);
    }
    let Some(member) = table.own_member() else { return };
    let afresh = format!(
        "BEGIN; ALTER PUBLICATION {published} DROP TABLE {table}; ALTER PUBLICATION {published} ADD TABLE {table}; COMMIT;  \
         -- at once, no reload",
        table = name.to_sql()
    );
    if member.filter.is_some() {
        let what = "has a row filter in the publication: what it hides would be missing without a trace";
        report.error(&subject, what, afresh.clone());
    }
    let hidden = table.columns.iter().find(|column| match &member.columns {
        Some(list) => !list.contains(&column.name),
        None => false,
    });
    if let Some(column) = hidden {
        let what = format!("column {} is not in the column list of the publication", column.name);
        report.error(&subject, what, afresh);
    }
    let listed = |name: &String| member.columns.as_ref().is_some_and(|list| list.contains(name));
    let all_generated = publication.generated.as_deref() == Some("s");
    let generated = table.columns.iter().find(|column| column.generated && !all_generated && !listed(&column.name));
    if let Some(column) = generated {
        let fix = format!("ALTER PUBLICATION {published} SET (publish_generated_columns = stored);  -- 18 or newer");
        report.error(&subject, format!("column {} is generated, and not published", column.name), fix);
    }
}

fn check_publication(catalog: &Catalog, expected: &Expectation<'_>, report: &mut Report) {
    let name = identifier(expected.publication);
    let subject = format!("publication {}", expected.publication);
    let Some(publication) = &catalog.publication else {
        let tables: Vec<String> = catalog.tables.iter().map(|table| table.name().to_sql()).collect();
        let fix = format!("{}  -- or: tuplewatch setup", creation(expected.publication, &tables));
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
    const RECREATE: &str =
        "tuplewatch setup --recreate-slot  -- what changed in between is lost, and subscribers are told";
    let subject = format!("replication slot {}", expected.slot);
    let Some(slot) = slot else {
        if expected.slot_expected {
            let fix = format!("SELECT pg_create_logical_replication_slot({}, 'pgoutput');", literal(expected.slot));
            report.error(subject, "does not exist", fix);
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

/// The table that lists tenants: it is not watched, only read.
#[derive(Debug, Deserialize)]
struct Tenants {
    exists: bool,
    has_column: bool,
    selectable: bool,
    schema_usable: bool,
}

impl Tenants {
    async fn read(client: &Client, table: &TableName, id: &str) -> Result<Self, tokio_postgres::Error> {
        let sql = "
            SELECT json_build_object('exists', c.oid IS NOT NULL, 'has_column', a.attname IS NOT NULL,
                       'selectable', COALESCE(has_table_privilege(c.oid, 'SELECT'), false),
                       'schema_usable', COALESCE(has_schema_privilege(n.oid, 'USAGE'), false))
              FROM (SELECT) AS one
              LEFT JOIN pg_namespace AS n ON n.nspname = $1
              LEFT JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = $2
              LEFT JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attname = $3 AND NOT a.attisdropped";
        let text = tokio_postgres::types::Type::TEXT;
        let parameters: [(&(dyn tokio_postgres::types::ToSql + Sync), _); 3] =
            [(&table.schema, text.clone()), (&table.name, text.clone()), (&id, text)];
        client.query_typed_one(sql, &parameters).await?.try_get::<_, Document<Self>>(0).map(|document| document.0)
    }

    fn check(&self, table: &TableName, id: &str, server: &Server, report: &mut Report) {
        let subject = format!("table {table}");
        let before = report.findings.len();
        if !self.exists {
            let fix =
                "tuplewatch setup  -- it creates the tables of the preset 'tuples'; those of other mappings are yours";
            return report.error(subject, "does not exist, and tenants are looked up in it", fix.to_owned());
        }
        if !self.has_column {
            let fix = "-- correct the mapping, or add the column".to_owned();
            report.error(&subject, format!("has no column {id}, which the mapping names"), fix);
        }
        check_access(table, self.schema_usable, self.selectable, &server.role, report);
        if report.is_fine_since(before) {
            report.ok(subject, "can be read");
        }
    }
}

#[cfg(test)]
mod tests;
