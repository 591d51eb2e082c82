//! The requirements on the watched tables, and on the table of tenants.
//!
//! A watched table must be readable, published with complete old rows, and must change only by row events. Otherwise
//! the stream would silently lack rows or values, so each violation is an error that keeps `serve` from starting.

use serde::Deserialize;
use tokio_postgres::Client;

use super::server::{Server, Version};
use super::{Expectation, Fixes};
use crate::decode::mapping::TableName;
use crate::model::diagnostic::{Diagnostic, Report};
use crate::postgres::catalog::{Catalog, Column, Document, Publication, Table, identifier};

/// Checks that a watched table can be read, that it is published, that its old rows are complete, and that its rows and
/// values change only with row events.
pub(super) fn check_table(
    table: &Table,
    catalog: &Catalog,
    expected: &Expectation<'_>,
    fixes: Fixes<'_>,
    server: &Server,
    version: &Version,
    report: &mut Report,
) {
    let name = table.name();
    let subject = format!("table {name}");
    let before = report.count();
    if let Some(diagnostic) = not_a_table(table) {
        return report.add(diagnostic);
    }
    if table.oid.is_none() {
        return report.error(subject, "does not exist", fixes.setup());
    }
    let spec = expected.mapping.tables().iter().find(|spec| spec.table == name);
    for wanted in spec.map(crate::decode::mapping::TableSpec::columns).unwrap_or_default() {
        if !table.columns.iter().any(|column| column.name == wanted) {
            let fix = "-- correct the mapping, or add the column";
            report.error(&subject, format!("has no column {wanted}, which the mapping names"), fix);
        }
    }
    check_access(&name, table.schema_usable, table.selectable, &server.role, report);
    if table.is_filtered {
        report_row_security(&name, &server.role, report);
    }
    check_values(table, report);
    for child in catalog.unmapped_children(table) {
        let what = format!("table {} inherits from it, and is not mapped", child.name());
        let (child, parent) = (child.name().to_sql(), child.parent().to_sql());
        let fix = format!("ALTER TABLE {child} NO INHERIT {parent};  -- at once, no reload; or map it as well");
        let meaning = "SELECT returns its rows as rows of the mapped table, but their changes have its own name.";
        report.add(Diagnostic::error(&subject, what).means(meaning).fix(fix));
    }
    for relation in &table.relations {
        let relation_subject = format!("table {}", relation.name());
        if relation.kind == "f" {
            let fix = "-- detach it, or make it an ordinary table";
            report.error(&relation_subject, "is a foreign table: its changes are not in the WAL", fix);
        }
        if relation.persistence != "p" {
            let fix =
                format!("ALTER TABLE {} SET LOGGED;  -- rewrites it under an exclusive lock", relation.name().to_sql());
            report.error(&relation_subject, "is not logged: its changes are not in the WAL", fix);
        }
    }
    for (relation, what) in table.unidentified() {
        let fix = fixes.alter(&format!("ALTER TABLE {} REPLICA IDENTITY FULL", relation.name().to_sql()));
        let meaning = "It determines which columns of the old row an UPDATE or DELETE contains.";
        report.add(Diagnostic::error(format!("table {}", relation.name()), what).means(meaning).fix(fix));
    }
    if let Some(publication) = &catalog.publication {
        check_membership(table, expected, fixes, publication, report);
        check_generated(table, expected, fixes, publication, version, report);
    }
    if report.is_fine_since(before) {
        let what = if table.reads_old_rows { ", and its old rows are complete" } else { "" };
        report.ok(subject, format!("can be read, is published{what}"));
    }
}

/// An object that has the name of a watched table, but whose changes cannot be read.
pub(crate) fn not_a_table(table: &Table) -> Option<Diagnostic> {
    let subject = format!("table {}", table.name());
    let error = |what: &str, fix: &str| Some(Diagnostic::error(&subject, what).fix(fix));
    match table.other_kind.as_deref() {
        None if table.is_system() => {
            error("is a system catalog: PostgreSQL publishes no changes of those", "-- map a table of your own")
        }
        None => None,
        Some("v") => error(
            "is a view: changes can be read of tables only",
            "-- map the table that the view reads; the columns of the mapping are then those of the table",
        ),
        Some("m") => error(
            "is a materialized view: changes can be read of tables only",
            "-- map the table that it reads, or make it a table that a trigger or a job keeps",
        ),
        Some("f") => error(
            "is a foreign table: its rows and their changes are in another server",
            "-- run a tuplewatch for the server that has the table",
        ),
        Some(kind) => {
            let what = match kind {
                "S" => "is a sequence",
                "i" | "I" => "is an index",
                "c" => "is a composite type",
                _ => "is no table",
            };
            error(what, "-- correct the name in the mapping")
        }
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

/// If policies apply to our role, SQL returns fewer rows than the stream.
fn report_row_security(table: &TableName, role: &str, report: &mut Report) {
    let what = format!("row level security applies to role {role}: SQL would return and delete only some of the rows");
    let meaning = "The stream is not filtered. So a state that is read, and the stream after it, would not match.";
    let fix = format!(
        "ALTER ROLE {} BYPASSRLS;  -- at once, no reload; or ALTER TABLE {} DISABLE ROW LEVEL SECURITY;",
        identifier(role),
        table.to_sql()
    );
    report.add(Diagnostic::error(format!("table {table}"), what).means(meaning).fix(fix));
}

/// `regclass` and similar types: ALTER ... RENAME of the object that a value points to changes the value's text without
/// a row event.
fn check_values(table: &Table, report: &mut Report) {
    for column in &table.columns {
        let Some(value_type) = column.type_that_follows_names() else { continue };
        let what = format!(
            "column {} holds {}, which is written as a name that others can change",
            column.name, value_type.name
        );
        let meaning = "RENAME and DROP of the object would change the value without a change of the row.";
        let name = identifier(&column.name);
        let fix = format!(
            "ALTER TABLE {} ALTER COLUMN {name} TYPE text USING {name}::text;  -- rewrites it under an exclusive lock; or map another column",
            table.name().to_sql()
        );
        report.add(Diagnostic::error(format!("table {}", table.name()), what).means(meaning).fix(fix));
    }
}

fn check_membership(
    table: &Table,
    expected: &Expectation<'_>,
    fixes: Fixes<'_>,
    publication: &Publication,
    report: &mut Report,
) {
    let name = table.name();
    let subject = format!("table {name}");
    let published = identifier(expected.publication);
    if !table.is_published(publication) {
        let fix = fixes.alter(&format!("ALTER PUBLICATION {published} ADD TABLE {}", name.to_sql()));
        let what = format!("is not in publication {}", expected.publication);
        let meaning = "No change of it reaches tuplewatch. Subscribers receive a gap for the changes made meanwhile.";
        return report.add(Diagnostic::error(subject, what).means(meaning).fix(fix));
    }
    if table.is_published_as_its_root(publication) {
        let fix =
            format!("ALTER PUBLICATION {published} SET (publish_via_partition_root = false);  -- or map the root");
        let what = "is a partition, and its changes are published as those of the root";
        report.add(Diagnostic::error(&subject, what).means("They have a name that is not in the mapping.").fix(fix));
    }
    if table.is_partitioned() && !publication.via_root {
        let fix = fixes.alter(&format!("ALTER PUBLICATION {published} SET (publish_via_partition_root = true)"));
        let what = "is partitioned, and its changes are published under the names of its partitions";
        report.add(Diagnostic::error(&subject, what).means("These names are not in the mapping.").fix(fix));
    }
    let Some(member) = table.own_member() else { return };
    let afresh = fixes.alter(&format!(
        "BEGIN; ALTER PUBLICATION {published} DROP TABLE {table}; ALTER PUBLICATION {published} ADD TABLE {table}; COMMIT",
        table = name.to_sql()
    ));
    if member.filter.is_some() {
        let what = "has a row filter in the publication: hidden rows would be missing without a trace";
        report.error(&subject, what, afresh.clone());
    }
    let hidden = table.columns.iter().find(|column| match &member.columns {
        Some(list) => !list.contains(&column.name),
        None => false,
    });
    if let Some(column) = hidden {
        let what = format!("column {} is not in the column list of the publication", column.name);
        report.add(Diagnostic::error(&subject, what).means("The stream would lack it.").fix(afresh));
    }
}

/// Generated columns are published from PostgreSQL 18 on, and only stored ones: if the publication has a column list,
/// those in the list; otherwise if the publication enables them.
fn check_generated(
    table: &Table,
    expected: &Expectation<'_>,
    fixes: Fixes<'_>,
    publication: &Publication,
    version: &Version,
    report: &mut Report,
) {
    let is_published = |column: &Column| match table.own_member().and_then(|member| member.columns.as_ref()) {
        // A column outside the list has its own diagnostic.
        Some(_) => true,
        None => column.is_stored() && publication.generated.as_deref() == Some("s"),
    };
    let hidden = table.columns.iter().find(|column| column.is_generated() && !is_published(column));
    let Some(column) = hidden else { return };
    let fix = if column.is_stored() && version.major() >= 18 {
        let publication = identifier(expected.publication);
        fixes.alter(&format!("ALTER PUBLICATION {publication} SET (publish_generated_columns = stored)"))
    } else {
        "-- make it an ordinary column, or map another one".to_owned()
    };
    let what = format!("column {} is generated, and not published", column.name);
    report.add(Diagnostic::error(format!("table {}", table.name()), what).means("The stream lacks it.").fix(fix));
}

/// The table of tenants, which is read but not watched.
#[derive(Debug, Deserialize)]
pub(super) struct Tenants {
    exists: bool,
    has_column: bool,
    selectable: bool,
    schema_usable: bool,
    is_filtered: bool,
}

impl Tenants {
    pub(super) async fn read(client: &Client, table: &TableName, id: &str) -> Result<Self, tokio_postgres::Error> {
        let sql = "
            SELECT json_build_object('exists', c.oid IS NOT NULL, 'has_column', a.attname IS NOT NULL,
                       'is_filtered', COALESCE(row_security_active(c.oid), false),
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

    pub(super) fn check(&self, table: &TableName, id: &str, fixes: Fixes<'_>, server: &Server, report: &mut Report) {
        let subject = format!("table {table}");
        let before = report.count();
        if !self.exists {
            return report.error(subject, "does not exist, but contains the tenants", fixes.setup());
        }
        if !self.has_column {
            let fix = "-- correct the mapping, or add the column";
            report.error(&subject, format!("has no column {id}, which the mapping names"), fix);
        }
        check_access(table, self.schema_usable, self.selectable, &server.role, report);
        if self.is_filtered {
            report_row_security(table, &server.role, report);
        }
        if report.is_fine_since(before) {
            report.ok(subject, "can be read");
        }
    }
}
