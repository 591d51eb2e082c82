//! The publication and the mapped tables in PostgreSQL's catalogs, read in one statement; and a cheap checksum of them.
//!
//! Three readers share the same data: [`crate::postgres::requirements`] finds errors, [`crate::admin::setup`] missing objects,
//! [`crate::postgres::publication`] changes. So there is one [`Catalog`].
//!
//! Only plain catalog tables are read for it, never functions such as `pg_get_publication_tables`: those look things up
//! with a newer snapshot than the statement's, and the answer would mix two states. (Privileges and row level security are looked
//! up that way; they decide nothing of what is streamed.)
//!
//! Any role may read these catalogs. PostgreSQL 14 to 18.

mod statement;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::error::Error;
use tokio_postgres::Client;
use tokio_postgres::types::{FromSql, Type, accepts};

use crate::decode::mapping::{Mapping, TableName};
use crate::model::lsn::Lsn;

/// The result of one statement.
#[derive(Debug, Deserialize)]
pub(crate) struct Catalog {
    /// The WAL insert position, read after the statement's snapshot was taken. 0/0 on a standby.
    #[serde(deserialize_with = "lsn")]
    pub(crate) lsn: Lsn,
    pub(crate) publication: Option<Publication>,
    /// In the order of the mapping.
    pub(crate) tables: Vec<Table>,
    /// Whether row level security applies to our role in the table that lists tenants.
    pub(crate) tenants_are_filtered: bool,
}

/// A checksum that differs after any change of the contents of a [`Catalog`].
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Sum {
    /// As in [`Catalog`].
    #[serde(deserialize_with = "lsn")]
    pub(crate) lsn: Lsn,
    pub(crate) value: String,
}

/// A row of `pg_publication`.
#[derive(Debug, Deserialize)]
pub(crate) struct Publication {
    pub(crate) oid: u32,
    /// xmin of the row: another one after every ALTER PUBLICATION that changes the row itself.
    pub(crate) version: u64,
    pub(crate) all_tables: bool,
    pub(crate) insert: bool,
    pub(crate) update: bool,
    pub(crate) delete: bool,
    pub(crate) truncate: bool,
    pub(crate) via_root: bool,
    /// From version 18 on: `s` publishes stored generated columns.
    pub(crate) generated: Option<String>,
}

/// A mapped table.
#[derive(Debug, Deserialize)]
pub(crate) struct Table {
    pub(crate) schema: String,
    pub(crate) name: String,
    /// None: no such table, and everything below is empty.
    pub(crate) oid: Option<u32>,
    /// `relkind`: r for a table, p for a partitioned one.
    pub(crate) kind: Option<String>,
    /// `relfilenode` of an ordinary table: another one after TRUNCATE, VACUUM FULL, and whatever rewrites it.
    pub(crate) file: Option<u32>,
    /// `relkind` of an object that has this name and is not a table.
    pub(crate) other_kind: Option<String>,
    /// The mapped columns that exist.
    pub(crate) columns: Vec<Column>,
    /// Where the rows are: the table, and with a partitioned one all its leaves.
    pub(crate) relations: Vec<Relation>,
    /// Every partition below it.
    pub(crate) partitions: Vec<Partition>,
    /// Every table that inherits from it, except partitions and temporary tables, which only their own session sees.
    pub(crate) children: Vec<Child>,
    /// `relhassubclass` of an ordinary table: it has had children since it was last analyzed.
    pub(crate) had_children: bool,
    /// Its own membership in the publication, and those of the partitioned tables above it.
    pub(crate) members: Vec<Member>,
    /// Schemas in the publication, of the table and of the partitioned tables above it.
    pub(crate) schemas: Vec<SchemaMember>,
    /// Whether it is a partition of another table.
    pub(crate) is_partition: bool,
    /// Whether row level security applies to our role.
    pub(crate) is_filtered: bool,
    pub(crate) selectable: bool,
    pub(crate) schema_usable: bool,
    /// Whether the mapping uses the old rows. Not from the catalog.
    #[serde(skip)]
    pub(crate) reads_old_rows: bool,
}

/// A mapped column.
#[derive(Debug, Deserialize)]
pub(crate) struct Column {
    pub(crate) name: String,
    pub(crate) number: i16,
    pub(crate) type_oid: u32,
    /// `attgenerated`: s(tored), v(irtual, from version 18 on), or empty.
    pub(crate) generated: String,
    /// xmin of its row of `pg_attribute`: another one after every ALTER COLUMN.
    pub(crate) version: u64,
    /// Its type, and every type under that: of elements, attributes, and what a domain or range is of.
    pub(crate) types: Vec<ValueType>,
}

/// A type that the text of a column's values depends on.
#[derive(Debug, Deserialize)]
pub(crate) struct ValueType {
    pub(crate) oid: u32,
    pub(crate) schema: String,
    pub(crate) name: String,
    /// Of an enum.
    pub(crate) labels: Vec<Label>,
    /// Of a composite type, also those that were dropped.
    pub(crate) attributes: Vec<CompositeAttribute>,
}

/// A row of `pg_enum`.
#[derive(Debug, Deserialize)]
pub(crate) struct Label {
    pub(crate) oid: u32,
    /// xmin of the row.
    pub(crate) version: u64,
    pub(crate) label: String,
}

/// An attribute of a composite type.
#[derive(Debug, Deserialize)]
pub(crate) struct CompositeAttribute {
    pub(crate) number: i16,
    /// 0 where it was dropped.
    pub(crate) type_oid: u32,
}

impl Column {
    pub(crate) const fn is_generated(&self) -> bool {
        !self.generated.is_empty()
    }

    pub(crate) fn is_stored(&self) -> bool {
        self.generated == "s"
    }

    /// The type in it whose text depends on names of other objects.
    pub(crate) fn type_that_follows_names(&self) -> Option<&ValueType> {
        self.types.iter().find(|value_type| value_type.follows_names())
    }
}

impl ValueType {
    /// `regclass` and its kin store an oid, and are written as a name.
    fn follows_names(&self) -> bool {
        self.schema == "pg_catalog" && (self.name.starts_with("reg") || self.name == "aclitem")
    }
}

/// A row of `pg_inherits` of a partition.
#[derive(Debug, Deserialize)]
pub(crate) struct Partition {
    pub(crate) relation: u32,
    /// xmin of the row: another one where it was detached and attached again.
    pub(crate) version: u64,
    /// Whether it was created as a partition, and not truncated by a later transaction: all that ever was in it came under its root.
    pub(crate) was_born_empty: bool,
}

/// A row of `pg_inherits` of a table that inherits.
#[derive(Debug, Deserialize)]
pub(crate) struct Child {
    pub(crate) relation: u32,
    /// xmin of the row.
    pub(crate) version: u64,
    schema: String,
    name: String,
    parent_schema: String,
    parent: String,
}

impl Child {
    pub(crate) fn name(&self) -> TableName {
        TableName { schema: self.schema.clone(), name: self.name.clone() }
    }

    /// The table that it inherits from, which may itself inherit from the mapped one.
    pub(crate) fn parent(&self) -> TableName {
        TableName { schema: self.parent_schema.clone(), name: self.parent.clone() }
    }
}

/// A table that holds rows itself, or the root of a partitioned one.
#[derive(Debug, Deserialize)]
pub(crate) struct Relation {
    pub(crate) oid: u32,
    pub(crate) schema: String,
    pub(crate) name: String,
    /// `relkind`: f for a foreign table, which only a partition can be.
    pub(crate) kind: String,
    /// `relpersistence`: p is the one that is in the WAL.
    pub(crate) persistence: String,
    /// `relfilenode` of a partition below the mapped table: another one after TRUNCATE, and after a rewrite.
    pub(crate) storage: Option<u32>,
    /// `relreplident`: d(efault: primary key), i(ndex), f(ull), n(othing).
    pub(crate) identity: String,
    /// Key columns of that index.
    pub(crate) identity_columns: Vec<IdentityColumn>,
}

/// A column of a replica identity.
#[derive(Debug, Deserialize)]
pub(crate) struct IdentityColumn {
    pub(crate) name: String,
    pub(crate) number: i16,
}

/// A row of `pg_publication_rel`.
#[derive(Debug, Deserialize)]
pub(crate) struct Member {
    pub(crate) relation: u32,
    pub(crate) oid: u32,
    /// xmin of the row.
    pub(crate) version: u64,
    /// A digest of the row filter.
    pub(crate) filter: Option<String>,
    /// The column list.
    pub(crate) columns: Option<Vec<String>>,
}

/// A row of `pg_publication_namespace`.
#[derive(Debug, Deserialize)]
pub(crate) struct SchemaMember {
    pub(crate) schema: String,
    pub(crate) oid: u32,
    /// xmin of the row.
    pub(crate) version: u64,
}

impl Catalog {
    pub(crate) async fn read(
        client: &Client,
        publication: &str,
        mapping: &Mapping,
    ) -> Result<Self, tokio_postgres::Error> {
        let mut catalog: Self = ask(client, statement::everything, publication, mapping).await?;
        for (table, spec) in catalog.tables.iter_mut().zip(mapping.tables()) {
            table.reads_old_rows = spec.reads_old_rows();
        }
        Ok(catalog)
    }

    /// The tables that inherit from this one without being mapped: their changes are not read.
    pub(crate) fn unmapped_children<'a>(&'a self, table: &'a Table) -> impl Iterator<Item = &'a Child> {
        let is_mapped = |child: &Child| self.tables.iter().any(|table| table.oid == Some(child.relation));
        table.children.iter().filter(move |child| !is_mapped(child))
    }
}

impl Sum {
    pub(crate) async fn read(
        client: &Client,
        publication: &str,
        mapping: &Mapping,
    ) -> Result<Self, tokio_postgres::Error> {
        ask(client, statement::sum, publication, mapping).await
    }
}

/// Executes one of the statements.
async fn ask<T: DeserializeOwned>(
    client: &Client,
    statement: fn(i32) -> String,
    publication: &str,
    mapping: &Mapping,
) -> Result<T, tokio_postgres::Error> {
    let version: i32 =
        client.query_typed_one("SELECT current_setting('server_version_num')::int4", &[]).await?.try_get(0)?;
    let schemas: Vec<&str> = mapping.tables().iter().map(|table| table.table.schema.as_str()).collect();
    let names: Vec<&str> = mapping.tables().iter().map(|table| table.table.name.as_str()).collect();
    // A flat list of the mapped columns, with the number of their table: arrays of arrays would have to be square.
    let mut column_tables = Vec::new();
    let mut columns = Vec::new();
    for (n, table) in (1_i64..).zip(mapping.tables()) {
        for column in table.columns() {
            column_tables.push(n);
            columns.push(column);
        }
    }
    let tenants = mapping.tenants().map(|tenants| &tenants.table);
    let row = client
        .query_typed_one(
            &statement(version),
            &[
                (&publication, Type::TEXT),
                (&schemas, Type::TEXT_ARRAY),
                (&names, Type::TEXT_ARRAY),
                (&column_tables, Type::INT8_ARRAY),
                (&columns, Type::TEXT_ARRAY),
                (&tenants.map(|table| table.schema.as_str()), Type::TEXT),
                (&tenants.map(|table| table.name.as_str()), Type::TEXT),
            ],
        )
        .await?;
    row.try_get::<_, Document<T>>(0).map(|document| document.0)
}

impl Table {
    pub(crate) fn name(&self) -> TableName {
        TableName { schema: self.schema.clone(), name: self.name.clone() }
    }

    pub(crate) fn is_partitioned(&self) -> bool {
        self.kind.as_deref() == Some("p")
    }

    /// Whether it is one of PostgreSQL's own, which have the oids below `FirstNormalObjectId`.
    pub(crate) fn is_system(&self) -> bool {
        self.oid.is_some_and(|oid| oid < 16_384)
    }

    /// Whether the publication has it: by itself, by its schema, by a table that it is a partition of, or with all.
    pub(crate) fn is_published(&self, publication: &Publication) -> bool {
        publication.all_tables || !self.members.is_empty() || !self.schemas.is_empty()
    }

    /// Whether its changes are published under the name of a table that it is a partition of.
    pub(crate) fn is_published_as_its_root(&self, publication: &Publication) -> bool {
        let above = publication.all_tables
            || self.members.iter().any(|member| Some(member.relation) != self.oid)
            || self.schemas.iter().any(|member| member.schema != self.schema);
        publication.via_root && self.is_partition && above
    }

    /// The relations whose replica identity is insufficient, and why.
    pub(crate) fn unidentified(&self) -> impl Iterator<Item = (&Relation, String)> {
        self.relations.iter().filter_map(|relation| {
            let what = if self.reads_old_rows {
                let column = relation.uncovered(&self.columns)?;
                format!("old rows lack column {}: the replica identity does not cover it", column.name)
            } else if relation.identity != "f" && relation.identity_columns.is_empty() {
                "has no replica identity: PostgreSQL refuses UPDATE and DELETE on it once it is published".to_owned()
            } else {
                return None;
            };
            Some((relation, what))
        })
    }

    /// Its own row in the publication, where its filter and its columns count: a publication of its whole schema is for all
    /// rows and columns.
    pub(crate) fn own_member(&self) -> Option<&Member> {
        let by_schema = self.schemas.iter().any(|member| member.schema == self.schema);
        self.members.iter().find(|member| !by_schema && Some(member.relation) == self.oid)
    }
}

impl Relation {
    pub(crate) fn name(&self) -> TableName {
        TableName { schema: self.schema.clone(), name: self.name.clone() }
    }

    /// The first of the columns that old rows would lack.
    fn uncovered<'a>(&self, columns: &'a [Column]) -> Option<&'a Column> {
        let covers = |column: &Column| match self.identity.as_str() {
            "f" => true,
            "n" => false,
            _ => self.identity_columns.iter().any(|covered| covered.name == column.name),
        };
        columns.iter().find(|column| !covers(column))
    }
}

/// A name as an SQL identifier.
pub(crate) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text as an SQL literal on one line, whatever `standard_conforming_strings` is.
pub(crate) fn literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if !quoted.contains(|c: char| c == '\\' || c.is_control()) {
        return format!("'{quoted}'");
    }
    let escaped = |c: char| match c {
        '\\' => r"\\".to_owned(),
        c if c.is_control() => format!("\\u{:04x}", u32::from(c)),
        c => c.to_string(),
    };
    format!("E'{}'", quoted.chars().map(escaped).collect::<String>())
}

/// A value of type json, read as `T`.
pub(crate) struct Document<T>(pub(crate) T);

impl<'a, T: DeserializeOwned> FromSql<'a> for Document<T> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(serde_json::from_slice(raw)?))
    }

    accepts!(JSON);
}

pub(crate) fn lsn<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Lsn, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

pub(crate) fn optional_lsn<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Lsn>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    text.map(|text| text.parse().map_err(serde::de::Error::custom)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::test_postgres::{Database, one_table};

    /// Rows that the statement goes through, whether it keeps them or not.
    async fn rows_read(client: &Client, statement: fn(i32) -> String) -> f64 {
        fn of(plan: &serde_json::Value) -> f64 {
            let number = |key: &str| plan.get(key).and_then(serde_json::Value::as_f64).unwrap_or_default();
            let rows = ["Actual Rows", "Rows Removed by Filter", "Rows Removed by Join Filter"].map(number);
            let below = plan.get("Plans").and_then(serde_json::Value::as_array).into_iter().flatten();
            number("Actual Loops") * rows.iter().sum::<f64>() + below.map(of).sum::<f64>()
        }
        let version: i32 =
            client.query_typed_one("SELECT current_setting('server_version_num')::int4", &[]).await.unwrap().get(0);
        let explain = format!("EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {}", statement(version));
        let names = (["public"].as_slice(), ["root"].as_slice(), ["tenant", "id", "owner"].as_slice());
        let none = None::<&str>;
        let row = client
            .query_typed_one(
                &explain,
                &[
                    (&"feed", Type::TEXT),
                    (&names.0, Type::TEXT_ARRAY),
                    (&names.1, Type::TEXT_ARRAY),
                    (&[1_i64, 1, 1].as_slice(), Type::INT8_ARRAY),
                    (&names.2, Type::TEXT_ARRAY),
                    (&none, Type::TEXT),
                    (&none, Type::TEXT),
                ],
            )
            .await
            .unwrap();
        let Document(plans) = row.get::<_, Document<serde_json::Value>>(0);
        of(&plans[0]["Plan"])
    }

    /// With twice the partitions it is no more than twice the work, whatever the planner knows of them.
    #[tokio::test]
    async fn the_work_is_linear_in_the_partitions() {
        const COUNT: i32 = 300;
        let database = Database::new().await;
        database
            .execute(
                "CREATE TABLE root (tenant int, id int, owner int, PRIMARY KEY (tenant, id, owner)) PARTITION BY LIST (tenant);
                 CREATE PUBLICATION feed FOR TABLE root WITH (publish_via_partition_root = true)",
            )
            .await;
        let mut before = None;
        for first in [0, COUNT] {
            database
                .execute(&format!(
                    "DO $$ BEGIN FOR n IN {} .. {} LOOP
                         EXECUTE format('CREATE TABLE p%s PARTITION OF root FOR VALUES IN (%s)', n, n);
                     END LOOP; END $$",
                    first + 1,
                    first + COUNT
                ))
                .await;
            let client = &database.connection.client;
            let mut now = Vec::new();
            for analyzed in [false, true] {
                if analyzed {
                    for catalog in ["pg_class", "pg_inherits", "pg_index", "pg_attribute"] {
                        database.execute(&format!("VACUUM ANALYZE {catalog}")).await;
                    }
                }
                now.extend([rows_read(client, statement::everything).await, rows_read(client, statement::sum).await]);
            }
            if let Some(before) = before.replace(now.clone()) {
                let ratios: Vec<f64> = std::iter::zip(&now, &before).map(|(now, before)| now / before).collect();
                assert!(ratios.iter().all(|ratio| *ratio < 2.5), "{ratios:?}: {before:?}, then {now:?}");
            }
        }
        let catalog = Catalog::read(&database.connection.client, "feed", &one_table("public.root")).await.unwrap();
        assert_eq!(catalog.tables[0].partitions.len(), 600);
    }

    #[test]
    fn identifiers_and_literals_are_quoted() {
        assert_eq!(identifier("a\"b"), "\"a\"\"b\"");
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal(r"a\b'"), r"E'a\\b'''");
        assert_eq!(literal("a\u{1b}\nb"), r"E'a\u001b\u000ab'");
    }
}
