//! The publication and the mapped tables in PostgreSQL's catalogs, read in one statement, and a cheap checksum of them.
//!
//! Three readers share the same data: [`crate::postgres::requirements`] finds errors, [`crate::admin::setup`] finds
//! missing objects, and [`crate::postgres::publication`] finds changes. So there is one [`Catalog`].
//!
//! The statements read only plain catalog tables, never functions such as `pg_get_publication_tables`. These functions
//! use a newer snapshot than the statement, so the answer would mix two states. (Privileges and row level security need
//! such functions, but neither affects the stream.)
//!
//! Any role may read these catalogs, in PostgreSQL 14 to 18.

mod statement;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::error::Error;
use tokio_postgres::Client;
use tokio_postgres::types::{FromSql, Type, accepts};

use crate::decode::mapping::{Mapping, TableName};
use crate::model::lsn::Lsn;

/// The catalogs' contents, from one statement.
#[derive(Debug, Deserialize)]
pub(crate) struct Catalog {
    /// The WAL insert position, read after the statement's snapshot was taken. 0/0 on a standby.
    #[serde(deserialize_with = "lsn")]
    pub(crate) lsn: Lsn,
    pub(crate) publication: Option<Publication>,
    /// The mapped tables, in the order of the mapping.
    pub(crate) tables: Vec<Table>,
    /// Whether row level security applies to our role in the table of tenants.
    pub(crate) tenants_are_filtered: bool,
}

/// A checksum that differs after any change of the contents of a [`Catalog`].
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Sum {
    /// The WAL insert position, as in [`Catalog`].
    #[serde(deserialize_with = "lsn")]
    pub(crate) lsn: Lsn,
    pub(crate) value: String,
}

/// A row of `pg_publication`.
#[derive(Debug, Deserialize)]
pub(crate) struct Publication {
    pub(crate) oid: u32,
    /// xmin of the row. Every ALTER PUBLICATION that changes the row itself changes it.
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
    /// `None` if there is no such table. All following fields are then empty.
    pub(crate) oid: Option<u32>,
    /// `relkind`: r for a table, p for a partitioned one.
    pub(crate) kind: Option<String>,
    /// `relfilenode` of an ordinary table. TRUNCATE, VACUUM FULL and every rewrite change it.
    pub(crate) file: Option<u32>,
    /// `relkind` of an object that has the name of the table but is not a table.
    pub(crate) other_kind: Option<String>,
    /// The mapped columns that exist.
    pub(crate) columns: Vec<Column>,
    /// The relations that store the rows: the table itself, or all leaves of a partitioned table.
    pub(crate) relations: Vec<Relation>,
    /// Every partition of the table, at any level.
    pub(crate) partitions: Vec<Partition>,
    /// Every table that inherits from this one, except partitions, and except temporary tables, which are visible only
    /// to their own session.
    pub(crate) children: Vec<Child>,
    /// `relhassubclass` of an ordinary table: it has had children since its last ANALYZE.
    pub(crate) had_children: bool,
    /// The publication's rows for this table, and for the partitioned tables above it.
    pub(crate) members: Vec<Member>,
    /// The publication's schemas that contain this table, or a partitioned table above it.
    pub(crate) schemas: Vec<SchemaMember>,
    /// Whether it is a partition of another table.
    pub(crate) is_partition: bool,
    /// Whether row level security applies to our role.
    pub(crate) is_filtered: bool,
    pub(crate) selectable: bool,
    pub(crate) schema_usable: bool,
    /// Whether the mapping uses old rows. This is not in the catalogs.
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
    /// xmin of the column's row of `pg_attribute`. Every ALTER COLUMN changes it.
    pub(crate) version: u64,
    /// The type of the column and all types that it consists of: element types, attribute types, and the types below
    /// domains and ranges.
    pub(crate) types: Vec<ValueType>,
}

/// A type that the text of a column's values depends on.
#[derive(Debug, Deserialize)]
pub(crate) struct ValueType {
    pub(crate) oid: u32,
    pub(crate) schema: String,
    pub(crate) name: String,
    /// The labels of an enum.
    pub(crate) labels: Vec<Label>,
    /// The attributes of a composite type, including dropped ones.
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
    /// 0 if the attribute was dropped.
    pub(crate) type_oid: u32,
}

impl Column {
    pub(crate) const fn is_generated(&self) -> bool {
        !self.generated.is_empty()
    }

    pub(crate) fn is_stored(&self) -> bool {
        self.generated == "s"
    }

    /// Returns the component type whose text depends on names of other objects, if there is one.
    pub(crate) fn type_that_follows_names(&self) -> Option<&ValueType> {
        self.types.iter().find(|value_type| value_type.follows_names())
    }
}

impl ValueType {
    /// Types such as `regclass` store an oid, and are written as a name.
    fn follows_names(&self) -> bool {
        self.schema == "pg_catalog" && (self.name.starts_with("reg") || self.name == "aclitem")
    }
}

/// A row of `pg_inherits` of a partition.
#[derive(Debug, Deserialize)]
pub(crate) struct Partition {
    pub(crate) relation: u32,
    /// xmin of the row. A partition that was detached and attached again has another one.
    pub(crate) version: u64,
    /// Whether the partition was created as one, and not truncated by a later transaction. All rows that it ever had
    /// were then written through its root.
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

    /// The table that it inherits from. That table may itself inherit from the mapped one.
    pub(crate) fn parent(&self) -> TableName {
        TableName { schema: self.parent_schema.clone(), name: self.parent.clone() }
    }
}

/// A relation that stores rows, or the root of a partitioned table.
#[derive(Debug, Deserialize)]
pub(crate) struct Relation {
    pub(crate) oid: u32,
    pub(crate) schema: String,
    pub(crate) name: String,
    /// `relkind`. A partition can also be f, a foreign table.
    pub(crate) kind: String,
    /// `relpersistence`. Only p, a permanent table, is in the WAL.
    pub(crate) persistence: String,
    /// `relfilenode` of a partition below the mapped table. TRUNCATE and every rewrite change it.
    pub(crate) storage: Option<u32>,
    /// `relreplident`: d(efault: primary key), i(ndex), f(ull), n(othing).
    pub(crate) identity: String,
    /// The columns of the replica identity.
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

    /// Returns the unmapped tables that inherit from this one. Their changes are not read.
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

/// Runs one of the two statements.
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
    // The mapped columns are a flat list with the number of their table, because arrays of arrays must be rectangular.
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

    /// Whether the table is a system catalog. Their oids are below `FirstNormalObjectId`.
    pub(crate) fn is_system(&self) -> bool {
        self.oid.is_some_and(|oid| oid < 16_384)
    }

    /// Whether the publication contains the table: by itself, by its schema, by a partitioned table above it, or with
    /// all tables.
    pub(crate) fn is_published(&self, publication: &Publication) -> bool {
        publication.all_tables || !self.members.is_empty() || !self.schemas.is_empty()
    }

    /// Whether its changes are published under the name of a partitioned table above it.
    pub(crate) fn is_published_as_its_root(&self, publication: &Publication) -> bool {
        let above = publication.all_tables
            || self.members.iter().any(|member| Some(member.relation) != self.oid)
            || self.schemas.iter().any(|member| member.schema != self.schema);
        publication.via_root && self.is_partition && above
    }

    /// Returns the relations with an insufficient replica identity, with the reason.
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

    /// Returns the table's own row in the publication. Its row filter and column list do not apply if its whole schema
    /// is published.
    pub(crate) fn own_member(&self) -> Option<&Member> {
        let by_schema = self.schemas.iter().any(|member| member.schema == self.schema);
        self.members.iter().find(|member| !by_schema && Some(member.relation) == self.oid)
    }
}

impl Relation {
    pub(crate) fn name(&self) -> TableName {
        TableName { schema: self.schema.clone(), name: self.name.clone() }
    }

    /// Returns the first of these columns that is missing from old rows.
    fn uncovered<'a>(&self, columns: &'a [Column]) -> Option<&'a Column> {
        let covers = |column: &Column| match self.identity.as_str() {
            "f" => true,
            "n" => false,
            _ => self.identity_columns.iter().any(|covered| covered.name == column.name),
        };
        columns.iter().find(|column| !covers(column))
    }
}

/// Quotes a name as an SQL identifier.
pub(crate) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Quotes a text as an SQL literal on one line, valid with any `standard_conforming_strings`.
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

/// A json value that is decoded as `T`.
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

    /// Returns the number of rows that the statement's plan reads, including those that it discards.
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

    /// Twice the partitions cost at most twice the work, whatever statistics the planner has.
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
