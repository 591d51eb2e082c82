//! What PostgreSQL's catalogs say about the publication and the mapped tables, read in one statement.
//!
//! Three readers ask the same questions: [`super::requirements`] what is wrong, [`super::setup`] what is missing,
//! [`super::publication`] whether anything changed. So there is one answer, [`Catalog`].
//!
//! Only plain catalog tables are read for it, never functions such as `pg_get_publication_tables`: those look things up
//! with a newer snapshot than the statement's, and the answer would mix two states. (The privileges are looked up that
//! way; they are not part of the fingerprint.)
//!
//! Any role may read what is read here. PostgreSQL 14 to 18.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::error::Error;
use tokio_postgres::Client;
use tokio_postgres::types::{FromSql, Type, accepts};

use crate::lsn::Lsn;
use crate::mapping::{Mapping, TableName};

/// Row filters, column lists and schemas in publications came with it.
const FINE_GRAINED_PUBLICATIONS: i32 = 15_00_00;

/// What one statement saw.
#[derive(Debug, Deserialize)]
pub(super) struct Catalog {
    /// The WAL insert position, read after the statement's snapshot was taken. 0/0 on a standby.
    #[serde(deserialize_with = "lsn")]
    pub(super) lsn: Lsn,
    pub(super) publication: Option<Publication>,
    /// In the order of the mapping.
    pub(super) tables: Vec<Table>,
}

/// A row of `pg_publication`.
#[derive(Debug, Deserialize)]
pub(super) struct Publication {
    pub(super) oid: u32,
    /// xmin of the row: another one after every ALTER PUBLICATION that changes the row itself.
    pub(super) version: u64,
    pub(super) all_tables: bool,
    pub(super) insert: bool,
    pub(super) update: bool,
    pub(super) delete: bool,
    pub(super) truncate: bool,
    pub(super) via_root: bool,
    /// From version 18 on: `s` publishes stored generated columns.
    pub(super) generated: Option<String>,
}

/// A mapped table.
#[derive(Debug, Deserialize)]
pub(super) struct Table {
    pub(super) schema: String,
    pub(super) name: String,
    /// None: no such table, and everything below is empty.
    pub(super) oid: Option<u32>,
    /// `relkind`: r for a table, p for a partitioned one.
    pub(super) kind: Option<String>,
    /// `relkind` of what has this name instead of a table.
    pub(super) other_kind: Option<String>,
    /// The mapped columns that exist.
    pub(super) columns: Vec<Column>,
    /// Where the rows are: the table, and with a partitioned one all its leaves.
    pub(super) relations: Vec<Relation>,
    /// Every partition below it.
    pub(super) partitions: Vec<Partition>,
    /// Its own membership in the publication, and those of the partitioned tables above it.
    pub(super) members: Vec<Member>,
    /// Schemas in the publication, of the table and of the partitioned tables above it.
    pub(super) schemas: Vec<SchemaMember>,
    /// Whether it is a partition of another table.
    pub(super) is_partition: bool,
    pub(super) selectable: bool,
    pub(super) schema_usable: bool,
    /// Whether the mapping counts what rows were before. Not from the catalog.
    #[serde(skip)]
    pub(super) reads_old_rows: bool,
}

/// A mapped column.
#[derive(Debug, Deserialize)]
pub(super) struct Column {
    pub(super) name: String,
    pub(super) number: i16,
    pub(super) type_oid: u32,
    /// `attgenerated`: s(tored), v(irtual, from version 18 on), or empty.
    pub(super) generated: String,
}

impl Column {
    pub(super) const fn is_generated(&self) -> bool {
        !self.generated.is_empty()
    }

    pub(super) fn is_stored(&self) -> bool {
        self.generated == "s"
    }
}

/// A row of `pg_inherits`.
#[derive(Debug, Deserialize)]
pub(super) struct Partition {
    pub(super) relation: u32,
    /// xmin of the row: another one where it was detached and attached again.
    pub(super) version: u64,
}

/// A table that holds rows itself, or the root of a partitioned one.
#[derive(Debug, Deserialize)]
pub(super) struct Relation {
    pub(super) oid: u32,
    pub(super) schema: String,
    pub(super) name: String,
    /// `relpersistence`: p is the one that is in the WAL.
    pub(super) persistence: String,
    /// `relfilenode` of a partition below the mapped table: another one after TRUNCATE, and after a rewrite.
    pub(super) storage: Option<u32>,
    /// `relreplident`: d(efault: primary key), i(ndex), f(ull), n(othing).
    pub(super) identity: String,
    /// Key columns of that index.
    pub(super) identity_columns: Vec<IdentityColumn>,
}

/// A column of a replica identity.
#[derive(Debug, Deserialize)]
pub(super) struct IdentityColumn {
    pub(super) name: String,
    pub(super) number: i16,
}

/// A row of `pg_publication_rel`.
#[derive(Debug, Deserialize)]
pub(super) struct Member {
    pub(super) relation: u32,
    pub(super) oid: u32,
    /// xmin of the row.
    pub(super) version: u64,
    /// A digest of the row filter.
    pub(super) filter: Option<String>,
    /// The column list.
    pub(super) columns: Option<Vec<String>>,
}

/// A row of `pg_publication_namespace`.
#[derive(Debug, Deserialize)]
pub(super) struct SchemaMember {
    pub(super) schema: String,
    pub(super) oid: u32,
    /// xmin of the row.
    pub(super) version: u64,
}

impl Catalog {
    pub(super) async fn read(
        client: &Client,
        publication: &str,
        mapping: &Mapping,
    ) -> Result<Self, tokio_postgres::Error> {
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
        let row = client
            .query_typed_one(
                &statement(version),
                &[
                    (&publication, Type::TEXT),
                    (&schemas, Type::TEXT_ARRAY),
                    (&names, Type::TEXT_ARRAY),
                    (&column_tables, Type::INT8_ARRAY),
                    (&columns, Type::TEXT_ARRAY),
                ],
            )
            .await?;
        let Document(mut catalog) = row.try_get::<_, Document<Self>>(0)?;
        for (table, spec) in catalog.tables.iter_mut().zip(mapping.tables()) {
            table.reads_old_rows = spec.reads_old_rows();
        }
        Ok(catalog)
    }
}

impl Table {
    pub(super) fn name(&self) -> TableName {
        TableName { schema: self.schema.clone(), name: self.name.clone() }
    }

    pub(super) fn is_partitioned(&self) -> bool {
        self.kind.as_deref() == Some("p")
    }

    /// Whether it is one of PostgreSQL's own, which have the oids below `FirstNormalObjectId`.
    pub(super) fn is_system(&self) -> bool {
        self.oid.is_some_and(|oid| oid < 16_384)
    }

    /// Whether the publication has it: by itself, by its schema, by a table that it is a partition of, or with all.
    pub(super) fn is_published(&self, publication: &Publication) -> bool {
        publication.all_tables || !self.members.is_empty() || !self.schemas.is_empty()
    }

    /// Whether its changes are published under the name of a table that it is a partition of.
    pub(super) fn is_published_as_its_root(&self, publication: &Publication) -> bool {
        let above = publication.all_tables
            || self.members.iter().any(|member| Some(member.relation) != self.oid)
            || self.schemas.iter().any(|member| member.schema != self.schema);
        publication.via_root && self.is_partition && above
    }

    /// The relations whose replica identity does not do, and why.
    pub(super) fn unidentified(&self) -> impl Iterator<Item = (&Relation, String)> {
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
    pub(super) fn own_member(&self) -> Option<&Member> {
        let by_schema = self.schemas.iter().any(|member| member.schema == self.schema);
        self.members.iter().find(|member| !by_schema && Some(member.relation) == self.oid)
    }
}

impl Relation {
    pub(super) fn name(&self) -> TableName {
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
pub(super) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text as an SQL literal on one line, whatever `standard_conforming_strings` is.
pub(super) fn literal(text: &str) -> String {
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
pub(super) struct Document<T>(pub(super) T);

impl<'a, T: DeserializeOwned> FromSql<'a> for Document<T> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(serde_json::from_slice(raw)?))
    }

    accepts!(JSON);
}

pub(super) fn lsn<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Lsn, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

pub(super) fn optional_lsn<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Lsn>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    text.map(|text| text.parse().map_err(serde::de::Error::custom)).transpose()
}

/// $1 publication, $2 and $3 schemas and names of the tables, $4 and $5 the mapped columns: number of table, name.
///
/// oids and xids are cast to int8, because JSON would have them as strings. `int2vector` begins at 0, and so do the
/// slices of it; the columns of an index behind its key (INCLUDE) are not in a replica identity, and neither is a key
/// that is deferrable.
fn statement(version: i32) -> String {
    let (filter, columns, schemas) = if version >= FINE_GRAINED_PUBLICATIONS {
        (
            "md5(member.prqual::text)",
            "CASE WHEN member.prattrs IS NOT NULL THEN
                (SELECT json_agg(a.attname ORDER BY a.attnum) FROM pg_attribute AS a
                  WHERE a.attrelid = member.prrelid AND a.attnum = ANY (member.prattrs::int2[]))
             END",
            "(SELECT json_agg(json_build_object('schema', s.nspname, 'oid', member.oid::int8,
                                                'version', member.xmin::text::int8) ORDER BY member.oid)
                FROM pg_publication_namespace AS member JOIN pg_namespace AS s ON s.oid = member.pnnspid
               WHERE member.pnpubid = (SELECT oid FROM publication)
                 AND member.pnnspid IN (SELECT c.relnamespace FROM lineage AS l JOIN pg_class AS c ON c.oid = l.oid
                                         WHERE l.ordinal = wanted.ordinal))",
        )
    } else {
        ("NULL", "NULL", "NULL::json")
    };
    format!(
        "WITH RECURSIVE
publication AS (SELECT p.xmin, p.* FROM pg_publication AS p WHERE p.pubname = $1),
wanted AS (
    SELECT w.ordinal, w.schema_name, w.table_name, c.oid, c.relkind, c.relispartition, n.oid AS namespace
      FROM unnest($2, $3) WITH ORDINALITY AS w(schema_name, table_name, ordinal)
      LEFT JOIN pg_namespace AS n ON n.nspname = w.schema_name
      LEFT JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = w.table_name AND c.relkind IN ('r', 'p')),
tree(ordinal, oid, attached) AS (
    SELECT ordinal, oid, NULL::int8 FROM wanted WHERE oid IS NOT NULL
    UNION ALL
    SELECT t.ordinal, i.inhrelid, i.xmin::text::int8 FROM tree AS t
      JOIN pg_class AS parent ON parent.oid = t.oid AND parent.relkind = 'p'
      JOIN pg_inherits AS i ON i.inhparent = t.oid AND NOT i.inhdetachpending),
lineage(ordinal, oid) AS (
    SELECT ordinal, oid FROM wanted WHERE oid IS NOT NULL
    UNION ALL
    SELECT l.ordinal, i.inhparent FROM lineage AS l
      JOIN pg_class AS child ON child.oid = l.oid AND child.relispartition
      JOIN pg_inherits AS i ON i.inhrelid = l.oid AND NOT i.inhdetachpending)
SELECT json_build_object(
    'lsn', CASE WHEN pg_is_in_recovery() THEN '0/0' ELSE pg_current_wal_insert_lsn()::text END,
    'publication', (SELECT json_build_object(
        'oid', oid::int8, 'version', xmin::text::int8, 'all_tables', puballtables, 'insert', pubinsert,
        'update', pubupdate, 'delete', pubdelete, 'truncate', pubtruncate, 'via_root', pubviaroot,
        'generated', to_json(publication) ->> 'pubgencols') FROM publication),
    'tables', (SELECT json_agg(json_build_object(
        'schema', wanted.schema_name, 'name', wanted.table_name, 'oid', wanted.oid::int8, 'kind', wanted.relkind,
        'other_kind', (SELECT c.relkind FROM pg_class AS c WHERE c.relnamespace = wanted.namespace
                          AND c.relname = wanted.table_name AND c.relkind NOT IN ('r', 'p')),
        'is_partition', COALESCE(wanted.relispartition, false),
        'selectable', COALESCE(has_table_privilege(wanted.oid, 'SELECT'), false),
        'schema_usable', COALESCE(has_schema_privilege(wanted.namespace, 'USAGE'), false),
        'columns', COALESCE((
            SELECT json_agg(json_build_object('name', a.attname, 'number', a.attnum, 'type_oid', a.atttypid::int8,
                                              'generated', a.attgenerated) ORDER BY a.attname)
              FROM unnest($4, $5) AS mapped(ordinal, name)
              JOIN pg_attribute AS a ON a.attrelid = wanted.oid AND a.attname = mapped.name AND a.attnum > 0
                                    AND NOT a.attisdropped
             WHERE mapped.ordinal = wanted.ordinal), '[]'),
        'relations', COALESCE((
            SELECT json_agg(json_build_object('oid', c.oid::int8, 'schema', n.nspname, 'name', c.relname,
                    'persistence', c.relpersistence, 'identity', c.relreplident,
                    'storage', CASE WHEN c.oid <> wanted.oid THEN c.relfilenode::int8 END,
                    'identity_columns', COALESCE((
                        SELECT json_agg(json_build_object('name', a.attname, 'number', a.attnum) ORDER BY a.attnum)
                          FROM pg_index AS x
                          JOIN pg_attribute AS a ON a.attrelid = x.indrelid
                               AND a.attnum = ANY ((x.indkey::int2[])[0:x.indnkeyatts - 1])
                         WHERE x.indrelid = c.oid AND x.indimmediate AND x.indisvalid
                           AND CASE c.relreplident WHEN 'd' THEN x.indisprimary
                                                   WHEN 'i' THEN x.indisreplident ELSE false END), '[]')
                   ) ORDER BY c.oid)
              FROM tree JOIN pg_class AS c ON c.oid = tree.oid JOIN pg_namespace AS n ON n.oid = c.relnamespace
             WHERE tree.ordinal = wanted.ordinal AND (c.relkind <> 'p' OR c.oid = wanted.oid)), '[]'),
        'partitions', COALESCE((
            SELECT json_agg(json_build_object('relation', tree.oid::int8, 'version', tree.attached) ORDER BY tree.oid)
              FROM tree WHERE tree.ordinal = wanted.ordinal AND tree.attached IS NOT NULL), '[]'),
        'members', COALESCE((
            SELECT json_agg(json_build_object('relation', member.prrelid::int8, 'oid', member.oid::int8,
                    'version', member.xmin::text::int8, 'filter', {filter}, 'columns', {columns}) ORDER BY member.oid)
              FROM pg_publication_rel AS member
             WHERE member.prpubid = (SELECT oid FROM publication)
               AND member.prrelid IN (SELECT l.oid FROM lineage AS l WHERE l.ordinal = wanted.ordinal)), '[]'),
        'schemas', COALESCE({schemas}, '[]')
    ) ORDER BY wanted.ordinal) FROM wanted))"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting() {
        assert_eq!(identifier("a\"b"), "\"a\"\"b\"");
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal(r"a\b'"), r"E'a\\b'''");
        assert_eq!(literal("a\u{1b}\nb"), r"E'a\u001b\u000ab'");
    }
}
