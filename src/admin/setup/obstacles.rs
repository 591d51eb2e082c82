//! Looks for the obstacles of `setup` and `teardown` before anything is changed, and reports them together.
//!
//! Each obstacle is a diagnostic with a fix, as in `doctor`. There are two kinds: obstacles that `serve` would have too
//! ([`requirements`]), and missing rights of the role, which matter only here.

use serde::Deserialize;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::Setup;
use crate::decode::mapping::TableName;
use crate::model::diagnostic::{Diagnostic, Report};
use crate::postgres::catalog::{Catalog, Document, Publication, Table, identifier};
use crate::postgres::requirements::{self, Version};
use crate::postgres::slot::Slot;

/// The schema of the preset `tuples`.
const PRESET_SCHEMA: &str = "tuplewatch";
/// The tables of the preset that are not mapped, with the columns that identify them.
const BESIDE: [(&str, [&str; 2]); 2] = [("tenants", ["id", "name"]), ("schema_version", ["version", "name"])];

fn preset_table(name: &str) -> TableName {
    TableName { schema: PRESET_SCHEMA.to_owned(), name: name.to_owned() }
}

/// The rights of the role in the database.
#[derive(Debug, Deserialize)]
pub(super) struct Rights {
    pub(super) database: String,
    role: String,
    /// Whether the role may create publications and schemas.
    may_create: bool,
    publication: Option<Object>,
    /// The existing ones among the requested tables and schemas.
    tables: Vec<Object>,
    schemas: Vec<Object>,
}

#[derive(Debug, Deserialize)]
struct Object {
    schema: Option<String>,
    name: String,
    owner: String,
    /// Whether the role has the rights of the owner.
    is_owned: bool,
    /// For a schema: whether the role has USAGE on it.
    #[serde(default)]
    usable: bool,
    /// For a table: whether it is a real table, and not a view, for example.
    #[serde(default)]
    is_table: bool,
    #[serde(default)]
    columns: Vec<String>,
}

impl Rights {
    pub(super) async fn read(
        client: &Client,
        publication: &str,
        tables: &[TableName],
    ) -> Result<Self, tokio_postgres::Error> {
        let sql = "
            SELECT json_build_object(
                'database', current_database(),
                'role', current_user,
                'may_create', has_database_privilege(current_database(), 'CREATE'),
                'publication', (
                    SELECT json_build_object('name', pubname, 'owner', pg_get_userbyid(pubowner),
                                             'is_owned', pg_has_role(pubowner, 'USAGE'))
                      FROM pg_publication WHERE pubname = $1),
                'tables', COALESCE((
                    SELECT json_agg(json_build_object('schema', nspname, 'name', relname, 'owner', pg_get_userbyid(relowner),
                                                      'is_owned', pg_has_role(relowner, 'USAGE'),
                                                      'is_table', relkind IN ('r', 'p'),
                                                      'columns', COALESCE((
                                SELECT json_agg(attname) FROM pg_attribute
                                 WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped), '[]')))
                      FROM unnest($2, $3) AS wanted(schema_name, table_name)
                      JOIN pg_namespace AS n ON nspname = schema_name
                      JOIN pg_class AS c ON relnamespace = n.oid AND relname = table_name), '[]'),
                'schemas', COALESCE((
                    SELECT json_agg(json_build_object('name', nspname, 'owner', pg_get_userbyid(nspowner),
                                                      'is_owned', pg_has_role(nspowner, 'USAGE'),
                                                      'usable', has_schema_privilege(oid, 'USAGE')))
                      FROM pg_namespace WHERE nspname = ANY ($2)), '[]'))";
        let schemas: Vec<&str> = tables.iter().map(|table| table.schema.as_str()).collect();
        let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
        let row = client
            .query_typed_one(
                sql,
                &[(&publication, Type::TEXT), (&schemas, Type::TEXT_ARRAY), (&names, Type::TEXT_ARRAY)],
            )
            .await?;
        row.try_get::<_, Document<Self>>(0).map(|document| document.0)
    }

    fn check_creation(&self, things: &[&str], report: &mut Report) {
        if !self.may_create && !things.is_empty() {
            let what = things.join(" or ");
            let fix = format!(
                "GRANT CREATE ON DATABASE {} TO {};  -- at once, no reload; by its owner or a superuser",
                identifier(&self.database),
                identifier(&self.role)
            );
            let what = format!("role {} may not create {what} in it", self.role);
            report.error(format!("database {}", self.database), what, fix);
        }
    }

    /// Reports if the role lacks the rights of the owner, which `what` needs.
    fn check_owner(&self, subject: &str, object: &Object, what: &str, report: &mut Report) {
        if !object.is_owned {
            let fix = format!(
                "GRANT {} TO {};  -- by a superuser; or run setup as {}",
                identifier(&object.owner),
                identifier(&self.role),
                object.owner
            );
            let found = format!("belongs to role {}, and role {} may not {what} it", object.owner, self.role);
            report.error(subject, found, fix);
        }
    }

    pub(super) fn check_publication_owner(&self, what: &str, report: &mut Report) {
        if let Some(publication) = &self.publication {
            self.check_owner(&format!("publication {}", publication.name), publication, what, report);
        }
    }

    fn schema(&self) -> Option<&Object> {
        self.schemas.iter().find(|schema| schema.name == PRESET_SCHEMA)
    }

    fn table(&self, name: &TableName) -> Option<&Object> {
        self.tables.iter().find(|object| object.name == name.name && object.schema.as_deref() == Some(&name.schema))
    }

    fn check_table_owner(&self, name: &TableName, what: &str, report: &mut Report) {
        if let Some(object) = self.table(name) {
            self.check_owner(&format!("table {name}"), object, what, report);
        }
    }

    fn check_schemas(&self, report: &mut Report) {
        for schema in self.schemas.iter().filter(|schema| !schema.usable) {
            let (name, role) = (identifier(&schema.name), identifier(&self.role));
            let fix = format!("GRANT USAGE ON SCHEMA {name} TO {role};  -- at once, no reload; by {}", schema.owner);
            let what = format!("role {} has no USAGE on it", self.role);
            report.error(format!("schema {}", schema.name), what, fix);
        }
    }
}

/// Looks for steps of the plan that would fail.
pub(super) struct Obstacles<'a> {
    pub(super) setup: &'a Setup<'a>,
    pub(super) catalog: &'a Catalog,
    pub(super) slot: Option<&'a Slot>,
    /// Whether the files of the preset will be applied.
    pub(super) applies_schema: bool,
}

impl Obstacles<'_> {
    /// Reports all obstacles.
    pub(super) async fn check(&self, client: &Client, report: &mut Report) -> Result<(), tokio_postgres::Error> {
        let mut names: Vec<TableName> = self.catalog.tables.iter().map(Table::name).collect();
        names.extend(BESIDE.iter().filter(|_| self.applies_schema).map(|(name, _)| preset_table(name)));
        let rights = Rights::read(client, self.setup.publication, &names).await?;
        let schema = (self.applies_schema && rights.schema().is_none()).then_some("a schema");
        let publication = self.catalog.publication.is_none().then_some("a publication");
        rights.check_creation(&schema.into_iter().chain(publication).collect::<Vec<_>>(), report);
        rights.check_schemas(report);
        if self.applies_schema {
            Self::check_schema(&rights, &names, report);
        }
        for table in &self.catalog.tables {
            self.check_table(table, &rights, report);
        }
        self.check_publication(&rights, report);
        self.check_slot(client, &rights.database, report).await
    }

    /// The files create a schema, tables, functions and comments. They leave existing tables alone.
    fn check_schema(rights: &Rights, names: &[TableName], report: &mut Report) {
        if let Some(schema) = rights.schema() {
            rights.check_owner(&format!("schema {PRESET_SCHEMA}"), schema, "create tables in", report);
        }
        for name in names {
            rights.check_table_owner(name, "comment on", report);
        }
        for (name, columns) in BESIDE {
            let name = preset_table(name);
            let Some(table) = rights.table(&name) else { continue };
            let missing = columns.iter().find(|column| !table.columns.iter().any(|there| there == *column));
            let what = match missing {
                _ if !table.is_table => "is not a table, but setup would create a table of that name".to_owned(),
                Some(column) => format!("has no column {column}: it is not the table that setup creates"),
                None => continue,
            };
            report.error(format!("table {name}"), what, "-- give it another name, or map tables of your own");
        }
    }

    fn check_table(&self, table: &Table, rights: &Rights, report: &mut Report) {
        let name = table.name();
        let subject = format!("table {name}");
        if let Some(diagnostic) = requirements::not_a_table(table) {
            return report.add(diagnostic);
        }
        if table.oid.is_none() {
            if !self.applies_schema {
                let fix = "-- create it, or correct the mapping (of the preset permify: mapping.schema)";
                report.error(subject, "does not exist, and the mapping watches it", fix);
            }
            return;
        }
        let spec = self.setup.mapping.tables().iter().find(|spec| spec.table == name);
        let columns = spec.map(crate::decode::mapping::TableSpec::columns).unwrap_or_default();
        for wanted in columns {
            if !table.columns.iter().any(|column| column.name == wanted) {
                let fix =
                    "-- correct the mapping, or add the column; if the table is another one, give it another name";
                report.error(&subject, format!("has no column {wanted}, which the mapping names"), fix);
            }
        }
        let is_added = self.catalog.publication.as_ref().is_none_or(|publication| !table.is_published(publication));
        for relation in table.relations.iter().filter(|relation| is_added && relation.persistence != "p") {
            let sql = relation.name().to_sql();
            let fix = format!("ALTER TABLE {sql} SET LOGGED;  -- rewrites it under an exclusive lock");
            report.error(format!("table {}", relation.name()), "is not logged: its changes are not in the WAL", fix);
        }
        // If the files are applied, `check_schema` has already reported this.
        if !self.applies_schema && (is_added || table.unidentified().next().is_some()) {
            rights.check_table_owner(&name, "publish", report);
        }
    }

    fn check_publication(&self, rights: &Rights, report: &mut Report) {
        match &self.catalog.publication {
            None if self.slot.is_some() && !self.setup.recreate_slot => {
                let what = format!(
                    "does not exist, and replication slot {} is older than a new publication would be, so the slot \
                     could not be read with it",
                    self.setup.slot
                );
                let subject = format!("publication {}", self.setup.publication);
                report.error(subject, what, requirements::recreate_slot(self.setup.commands));
            }
            None => {}
            Some(publication) if self.alters(publication) => rights.check_publication_owner("alter", report),
            Some(_) => {}
        }
    }

    fn alters(&self, publication: &Publication) -> bool {
        !super::settings(publication, self.catalog).is_empty()
            || self.catalog.tables.iter().any(|table| !table.is_published(publication))
    }

    async fn check_slot(
        &self,
        client: &Client,
        database: &str,
        report: &mut Report,
    ) -> Result<(), tokio_postgres::Error> {
        let name = self.setup.slot;
        let Some(slot) = self.slot else {
            return requirements::check_for_slot(client, true, report).await;
        };
        if let Some(diagnostic) = requirements::foreign_slot(slot, name, database) {
            report.add(diagnostic);
        } else if self.setup.recreate_slot {
            requirements::check_for_slot(client, false, report).await?;
            check_unused(client, name, slot, report).await?;
        } else {
            requirements::check_fit(slot, &format!("replication slot {name}"), self.setup.commands, report);
        }
        Ok(())
    }
}

/// Checks the version, without which no other query can be relied on.
pub(super) async fn check_version(client: &Client) -> Result<Option<Diagnostic>, tokio_postgres::Error> {
    let version = Version::read(client).await?;
    Ok((!version.is_supported()).then(|| version.diagnostic()))
}

/// A slot cannot be dropped while a process reads it.
pub(super) async fn check_unused(
    client: &Client,
    name: &str,
    slot: &Slot,
    report: &mut Report,
) -> Result<(), tokio_postgres::Error> {
    let Some(pid) = slot.active_pid else { return Ok(()) };
    let sql = "SELECT concat_ws(', ', 'user ' || usename, NULLIF(application_name, ''), host(client_addr))
                 FROM pg_stat_activity WHERE pid = $1";
    let holder = client.query_typed_opt(sql, &[(&pid, Type::INT4)]).await?;
    let holder: String = holder.map(|row| row.try_get(0)).transpose()?.unwrap_or_else(|| "which is ending".to_owned());
    let what = format!("is in use by process {pid} ({holder})");
    let fix = format!("SELECT pg_terminate_backend({pid});  -- stop the service that starts it first");
    report.error(format!("replication slot {name}"), what, fix);
    Ok(())
}
