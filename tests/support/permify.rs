//! Permify's tables, and the statements that Permify runs on them.

use super::change::Change;
use super::postgres::Postgres;
use super::server::Server;
use super::sql::Sql;
use std::collections::BTreeMap;
use tuplewatch::model::lsn::Xid8;
use tuplewatch::model::snap_token::SnapToken;

/// The value of `expired_tx_id` in a live row.
pub(crate) const LIVE: &str = "9223372036854775807";

/// How the tables were created.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tables {
    /// By a new installation.
    New,
    /// By an installation from before there were tenants: the column was added last, and the live value was 0.
    Grown,
}

/// The tables in some schema of a database.
#[derive(Clone)]
pub(crate) struct Permify {
    uri: String,
    schema: String,
}

/// The result of a write.
pub(crate) struct Written {
    pub(crate) xid: u64,
    pub(crate) snapshot: String,
}

impl Written {
    /// The token of 8 bytes.
    pub(crate) fn token(&self) -> String {
        SnapToken::Xid(Xid8(self.xid)).to_string()
    }

    /// The text token of later versions.
    pub(crate) fn text_token(&self) -> String {
        SnapToken::Snapshot { xid: Xid8(self.xid), snapshot: self.snapshot.parse().unwrap() }.to_string()
    }
}

/// The id in a token of 8 bytes.
pub(crate) fn xid_of(token: &str) -> u64 {
    match token.parse() {
        Ok(SnapToken::Xid(xid)) => xid.0,
        other => panic!("'{token}' is no token of a transaction: {other:?}"),
    }
}

impl Permify {
    /// Creates the tables, with tenants `t1` and `t2`.
    pub(crate) async fn create(postgres: &Postgres, schema: &str, tables: Tables) -> Self {
        let permify = Self { uri: postgres.uri(), schema: schema.to_owned() };
        let sql = postgres.sql().await;
        sql.run(&format!("CREATE SCHEMA IF NOT EXISTS \"{schema}\"")).await;
        let sql = permify.sql().await;
        let tenant = "tenant_id varchar NOT NULL DEFAULT 't1'";
        let tuple = "entity_type varchar NOT NULL, entity_id varchar NOT NULL, relation varchar NOT NULL, \
                     subject_type varchar NOT NULL, subject_id varchar NOT NULL, subject_relation varchar NOT NULL";
        let attribute =
            "entity_type varchar NOT NULL, entity_id varchar NOT NULL, attribute varchar NOT NULL, value jsonb";
        let (live, first) = match tables {
            Tables::New => (LIVE, format!(", {tenant}")),
            Tables::Grown => ("0", String::new()),
        };
        let made_and_gone =
            format!("created_tx_id xid8 DEFAULT pg_current_xact_id(), expired_tx_id xid8 DEFAULT '{live}'");
        sql.run(&format!(
            "CREATE TABLE transactions (id xid8 PRIMARY KEY DEFAULT pg_current_xact_id(), \
                 snapshot pg_snapshot NOT NULL DEFAULT pg_current_snapshot(), timestamp timestamp DEFAULT now(){first}); \
             CREATE TABLE relation_tuples (id serial PRIMARY KEY{first}, {tuple}, {made_and_gone}); \
             CREATE TABLE attributes (id serial PRIMARY KEY{first}, {attribute}, {made_and_gone}); \
             CREATE TABLE tenants (id varchar PRIMARY KEY, name varchar NOT NULL, created_at timestamp DEFAULT now())"
        ))
        .await;
        if tables == Tables::Grown {
            for table in ["transactions", "relation_tuples", "attributes"] {
                sql.run(&format!("ALTER TABLE {table} ADD COLUMN {tenant}")).await;
            }
        }
        sql.run(
            "CREATE UNIQUE INDEX ON relation_tuples (tenant_id, entity_type, entity_id, relation, subject_type, \
                 subject_id, subject_relation, expired_tx_id); \
             INSERT INTO tenants (id, name) VALUES ('t1', 'example'), ('t2', 'another')",
        )
        .await;
        permify
    }

    /// A node over them. `flags` are pairs of a flag and its value.
    pub(crate) async fn serve(&self, postgres: &Postgres, flags: &[(&str, &str)]) -> Server {
        let mut all = vec![("--mapping-preset", "permify"), ("--mapping-schema", self.schema.as_str())];
        all.extend(flags);
        Server::serve(postgres, &all).await
    }

    /// A connection that finds the tables by their names.
    pub(crate) async fn sql(&self) -> Sql {
        let sql = Sql::connect(&self.uri).await;
        sql.run(&format!("SET search_path = \"{}\"", self.schema)).await;
        sql
    }

    /// Changes the value of live rows to the present one.
    pub(crate) async fn change_live_value(&self) {
        let sql = self.sql().await;
        for table in ["relation_tuples", "attributes"] {
            sql.run(&format!(
                "UPDATE {table} SET expired_tx_id = '{LIVE}' WHERE expired_tx_id = '0'; \
                 ALTER TABLE {table} ALTER COLUMN expired_tx_id SET DEFAULT '{LIVE}'"
            ))
            .await;
        }
    }
}

/// Begins a write.
pub(crate) async fn begin(sql: &Sql, tenant: &str) -> Written {
    sql.run("BEGIN").await;
    let insert = format!("INSERT INTO transactions (tenant_id) VALUES ('{tenant}') RETURNING id, snapshot");
    let row = sql.rows(&insert).await.remove(0);
    Written { xid: row[0].parse().unwrap(), snapshot: row[1].clone() }
}

/// A whole write.
pub(crate) async fn write(sql: &Sql, tenant: &str, statements: &[String]) -> Written {
    let written = begin(sql, tenant).await;
    for statement in statements {
        sql.run(statement).await;
    }
    sql.run("COMMIT").await;
    written
}

/// Inserts `document:{id}#viewer@user:u`, if it is absent.
pub(crate) fn insert_tuple(tenant: &str, id: &str) -> String {
    format!(
        "INSERT INTO relation_tuples (tenant_id, entity_type, entity_id, relation, subject_type, subject_id, \
             subject_relation) VALUES ('{tenant}', 'document', '{id}', 'viewer', 'user', 'u', '') ON CONFLICT DO NOTHING"
    )
}

/// All tuples of a document.
pub(crate) fn delete_tuples(tenant: &str, id: &str) -> String {
    format!(
        "UPDATE relation_tuples SET expired_tx_id = pg_current_xact_id() WHERE tenant_id = '{tenant}' \
         AND entity_type = 'document' AND entity_id = '{id}' AND expired_tx_id IN ('{LIVE}', '0')"
    )
}

/// All attributes of a document of this name.
pub(crate) fn delete_attributes(tenant: &str, id: &str, attribute: &str) -> String {
    format!(
        "UPDATE attributes SET expired_tx_id = pg_current_xact_id() WHERE tenant_id = '{tenant}' \
         AND entity_type = 'document' AND entity_id = '{id}' AND attribute = '{attribute}' \
         AND expired_tx_id IN ('{LIVE}', '0')"
    )
}

/// Replaces an attribute.
pub(crate) fn set_attribute(tenant: &str, id: &str, attribute: &str, kind: &str, data: &str) -> String {
    format!(
        "{}; INSERT INTO attributes (tenant_id, entity_type, entity_id, attribute, value) \
         VALUES ('{tenant}', 'document', '{id}', '{attribute}', '{}')",
        delete_attributes(tenant, id, attribute),
        json(kind, data)
    )
}

/// The JSON of a value.
pub(crate) fn json(kind: &str, data: &str) -> String {
    format!(r#"{{"@type": "type.googleapis.com/base.v1.{kind}", "data": {data}}}"#)
}

/// Deletes the marked rows.
pub(crate) async fn collect_garbage(sql: &Sql) {
    for table in ["relation_tuples", "attributes"] {
        sql.run(&format!("DELETE FROM {table} WHERE expired_tx_id NOT IN ('{LIVE}', '0')")).await;
    }
    sql.run("DELETE FROM transactions").await;
}

/// The changes of each write of a tenant according to the tables, by the id of the write, sorted by their texts.
pub(crate) async fn history(sql: &Sql, tenant: &str) -> BTreeMap<u64, Vec<Change>> {
    let writes = sql.rows(&format!("SELECT id FROM transactions WHERE tenant_id = '{tenant}'")).await;
    let mut history: BTreeMap<u64, Vec<Change>> =
        writes.iter().map(|row| (row[0].parse().unwrap(), Vec::new())).collect();
    let rows = sql
        .rows(&format!(
            "SELECT created_tx_id, expired_tx_id, entity_type, entity_id, relation, subject_type, subject_id, \
                 subject_relation, '' FROM relation_tuples WHERE tenant_id = '{tenant}' UNION ALL \
             SELECT created_tx_id, expired_tx_id, entity_type, entity_id, attribute, '', '', '', value::text \
               FROM attributes WHERE tenant_id = '{tenant}'"
        ))
        .await;
    for row in rows {
        let fact = match row[8].as_str() {
            "" => Change::tuple(&row[2], &row[3], &row[4], &row[5], &row[6], &row[7]),
            value => Change::attribute(&row[2], &row[3], &row[4], value),
        };
        history.get_mut(&row[0].parse().unwrap()).unwrap().push(Change::create(&fact));
        if row[1] != LIVE && row[1] != "0" {
            history.get_mut(&row[1].parse().unwrap()).unwrap().push(Change::delete(&fact));
        }
    }
    history.values_mut().for_each(|changes| changes.sort());
    history
}
