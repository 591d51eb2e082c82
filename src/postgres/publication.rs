//! The check whether the publication, and the text of its values, have changed.
//!
//! Changes of a publication are silent. If a table is removed from a publication and added again, the rows written in
//! between are missing. If a publication is dropped and created again, the slot fails in PostgreSQL 14 to 17, and in 18
//! it skips the rows in between. A row filter hides rows. Some changes of values also come without a row event: a
//! rewrite of the table, or a renamed label of an enum. The stream contains none of this. So everything that determines
//! the rows of the slot, and their text, is read every few seconds and compared: the [`Published::fingerprint`].
//!
//! # What an equal fingerprint proves
//!
//! Let check A and a later check B find the same fingerprint. Then **everything that was committed before A's LSN was
//! published under that fingerprint**: the last verified LSN is that of the *previous* equal check, not that of the
//! current one.
//!
//! - A statement's snapshot is taken before any of its expressions is evaluated. So A's LSN is *newer* than A's
//!   snapshot, and by itself proves nothing: a DDL statement may have committed between the two.
//! - But B's snapshot was taken after A's LSN was read. Everything that committed before A's LSN is visible to B, and B
//!   found no difference. A change and its reversal are impossible too: a row that is updated, or deleted and inserted
//!   again, has another oid or another xmin, and the fingerprint contains both. (Replica identities have neither. If
//!   one is changed and changed back between two checks, the stream shows it: it describes the table again, and an
//!   incomplete row is a gap by itself.)
//! - One exception remains. A commit is in the WAL a moment before it is visible, and with synchronous replication this
//!   lasts until a standby has answered. A DDL statement in that moment is noticed when it becomes visible, and the gap
//!   then follows it by a check or two. No reader misses the gap, because all readers receive it.
//!
//! Most checks read only a `Sum`, which contains the xmin of every catalog row in the fingerprint. If it equals the sum
//! of the previous check, none of these rows was written in between, and the fingerprint is the same. Its LSN is read
//! in the same way.
//!
//! # Harmless differences
//!
//! Some lines may differ between fingerprints that are equivalent ([`is_equivalent`]): nothing happened between their
//! checks that affects rows or values. Each fingerprint is compared with the next one, which then replaces it in the
//! log. If checks were missed, several harmless changes may together look harmful, which causes a needless gap, but
//! never a missing one.
//!
//! - **Rewrites.** The text of a value depends on its bytes and the type of its column, not on the column's modifier or
//!   collation. While the type stays the same, bytes change without a row event only when ALTER COLUMN ... TYPE or ...
//!   SET EXPRESSION rewrites the table. That gives the table another file *and* updates the column's row of
//!   `pg_attribute`, in one commit. VACUUM FULL, CLUSTER, TRUNCATE, SET TABLESPACE, SET ACCESS METHOD and rewrites of
//!   other columns change only the file. SET STATISTICS, SET DEFAULT, SET NOT NULL, or a longer varchar change only
//!   that row.
//! - **Labels.** ADD VALUE changes no stored value.
//! - **Partitions.** A partition that was created as one began empty, and all its rows were written through its root.
//! - **Row level security** does not affect the stream. It is in the fingerprint so that the requirements are checked
//!   again.
//!
//! # Partitions
//!
//! pgoutput publishes the TRUNCATE of a partitioned table, but not that of a partition that is published as its root.
//! Such a TRUNCATE gives the partition other storage, which is in the fingerprint. VACUUM FULL, CLUSTER and rewrites by
//! ALTER TABLE look the same, and are gaps as well: a needless gap is better than deleted rows that subscribers keep.
//!
//! # Absent on purpose
//!
//! Unmapped columns, and everything else that does not affect the rows of the slot: owners, privileges, statistics. If
//! a table is renamed and renamed back between two checks, the rows in between have the other name, and no check
//! notices.
//!
//! A partition whose rows disappear without a DELETE before a check has seen it: it was created, filled and dropped
//! between two checks, or it was filled and truncated by the transaction that created it. The catalogs contain no trace
//! of either.
//!
//! Replaced input and output functions of types, by another version of an extension for example.

mod difference;

use std::collections::HashMap;
use std::fmt;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use tokio_postgres::Client;

use self::difference::Difference;
use crate::decode::mapping::Mapping;
use crate::decode::pgoutput::RelationId;
use crate::model::lsn::Lsn;
use crate::postgres::catalog::{Catalog, CompositeAttribute, Label, Publication, Sum, Table};

/// Makes a running session check the publication at once after a repair or a change, instead of at the next interval.
pub(crate) const LOOK_AT_ONCE: &str = "SELECT pg_logical_emit_message(true, 'tuplewatch', 'check');";
/// The content of its message. A role that may write one may also write tuples.
pub(crate) const CHECK_REQUEST: &[u8] = b"check";

/// The result of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Published {
    /// Lines of `subject TAB topic TAB value`. `None` if there is no such publication.
    pub(crate) fingerprint: Option<String>,
    /// The WAL insert position after the check's snapshot was taken. The *next* equal check verifies everything before
    /// it.
    pub(crate) lsn: Lsn,
    /// The mapped tables that exist, by oid.
    pub(crate) tables: HashMap<RelationId, String>,
}

/// Successive checks of one mapping on one server. Only the first check, and those that find a change, read everything.
#[derive(Debug, Default)]
pub(crate) struct Checks {
    /// The last result, with the sum that was read before it.
    last: Mutex<Option<(String, Published)>>,
}

impl Checks {
    /// Runs the next check: one statement if nothing has changed, otherwise two (and one for the server's version). It
    /// costs the server about 10 ms, most of it for planning.
    ///
    /// # Errors
    /// If PostgreSQL does not answer.
    pub(crate) async fn next(
        &self,
        client: &Client,
        publication: &str,
        mapping: &Mapping,
    ) -> Result<Published, tokio_postgres::Error> {
        let sum = Sum::read(client, publication, mapping).await?;
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((_, published)) = last.filter(|(value, _)| *value == sum.value) {
            return Ok(Published { lsn: sum.lsn, ..published });
        }
        let published = fingerprint(client, publication, mapping).await?;
        // A change since the sum was read makes the next sum differ, so everything is then read again.
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((sum.value, published.clone()));
        Ok(published)
    }
}

/// Reads the fingerprint and its LSN in one statement (and one for the server's version).
///
/// # Errors
/// If PostgreSQL does not answer.
pub(crate) async fn fingerprint(
    client: &Client,
    publication: &str,
    mapping: &Mapping,
) -> Result<Published, tokio_postgres::Error> {
    let catalog = Catalog::read(client, publication, mapping).await?;
    let fingerprint = catalog.publication.as_ref().map(|publication| {
        let mut lines = Lines(String::new());
        describe_publication(publication, &mut lines);
        for table in &catalog.tables {
            describe_table(table, publication, &mut lines);
            for child in catalog.unmapped_children(table) {
                lines.add(&table.name().to_string(), CHILD, format!("{}: version {}", child.relation, child.version));
            }
        }
        if let Some(tenants) = mapping.tenants().filter(|_| catalog.tenants_are_filtered) {
            lines.add(&tenants.table.to_string(), ROW_SECURITY, "applies");
        }
        lines.0
    });
    let tables = catalog.tables.iter().filter_map(|table| Some((RelationId(table.oid?), table.name().to_string())));
    Ok(Published { fingerprint, lsn: catalog.lsn, tables: tables.collect() })
}

const PUBLICATION: &str = "publication";
const OID: &str = "oid";
const VERSION: &str = "version";
const OPERATIONS: &str = "operations";
const VIA_ROOT: &str = "via root";
const GENERATED: &str = "generated columns";
const MEMBER: &str = "member";
const FILTER: &str = "row filter";
const COLUMN_LIST: &str = "column list";
const COLUMN: &str = "column";
/// The row of `pg_attribute` of a mapped column.
const DEFINITION: &str = "definition";
/// The file of an ordinary table.
const FILE: &str = "file";
const LABEL: &str = "label";
const ATTRIBUTE: &str = "attribute";
const PARTITION: &str = "partition";
/// A partition that was created as one.
const BORN_EMPTY: &str = "born empty";
const CHILD: &str = "child";
const HAD_CHILDREN: &str = "had children";
const IDENTITY: &str = "identity";
const PERSISTENCE: &str = "persistence";
const STORAGE: &str = "storage";
const ROW_SECURITY: &str = "row security";

struct Lines(String);

impl Lines {
    fn add(&mut self, subject: &str, topic: &str, value: impl fmt::Display) {
        // Names may contain tabs and line breaks, which are separators here.
        let escaped = subject.replace('\\', "\\\\").replace('\t', "\\t").replace('\n', "\\n");
        let value = value.to_string().replace('\\', "\\\\").replace('\t', "\\t").replace('\n', "\\n");
        let _ = writeln!(self.0, "{escaped}\t{topic}\t{value}");
    }
}

fn describe_publication(publication: &Publication, lines: &mut Lines) {
    let operations = [
        ("insert", publication.insert),
        ("update", publication.update),
        ("delete", publication.delete),
        ("truncate", publication.truncate),
    ];
    let operations: Vec<&str> = operations.iter().filter(|(_, on)| *on).map(|(word, _)| *word).collect();
    lines.add(PUBLICATION, OID, publication.oid);
    lines.add(PUBLICATION, VERSION, publication.version);
    lines.add(PUBLICATION, OPERATIONS, operations.join(" "));
    lines.add(PUBLICATION, VIA_ROOT, publication.via_root);
    if let Some(generated) = &publication.generated {
        lines.add(PUBLICATION, GENERATED, generated);
    }
}

fn describe_table(table: &Table, publication: &Publication, lines: &mut Lines) {
    let name = table.name().to_string();
    let Some(oid) = table.oid else {
        return lines.add(&name, OID, "none");
    };
    lines.add(&name, OID, format!("{oid} {}", table.kind.as_deref().unwrap_or_default()));
    if publication.all_tables {
        lines.add(&name, MEMBER, "all tables");
    }
    for member in &table.schemas {
        lines.add(&name, MEMBER, format!("by schema {}: {} version {}", member.schema, member.oid, member.version));
    }
    for member in &table.members {
        let through = if member.relation == oid { "itself".to_owned() } else { format!("by {}", member.relation) };
        lines.add(&name, MEMBER, format!("{through}: {} version {}", member.oid, member.version));
        if let Some(filter) = &member.filter {
            lines.add(&name, FILTER, format!("{through}: {filter}"));
        }
        if let Some(columns) = &member.columns {
            // Only mapped columns: other columns may be added and dropped.
            let mapped: Vec<String> = table
                .columns
                .iter()
                .filter(|column| columns.contains(&column.name))
                .map(|column| column.number.to_string())
                .collect();
            lines.add(&name, COLUMN_LIST, format!("{through}: {}", mapped.join(" ")));
        }
    }
    for column in &table.columns {
        let generated = if column.is_generated() { " generated" } else { "" };
        lines.add(&name, COLUMN, format!("{}: {} type {}{generated}", column.name, column.number, column.type_oid));
        lines.add(&name, DEFINITION, format!("{}: version {}", column.name, column.version));
        for value_type in &column.types {
            for Label { oid, version, label } in &value_type.labels {
                let enum_type = value_type.oid;
                lines.add(&name, LABEL, format!("{}: {enum_type} {oid} version {version} {label}", column.name));
            }
            for attribute in &value_type.attributes {
                let CompositeAttribute { number, type_oid } = attribute;
                let composite = value_type.oid;
                lines.add(&name, ATTRIBUTE, format!("{}: {composite} {number} type {type_oid}", column.name));
            }
        }
    }
    if let Some(file) = table.file {
        lines.add(&name, FILE, file);
    }
    for partition in &table.partitions {
        lines.add(&name, PARTITION, format!("{}: version {}", partition.relation, partition.version));
        if partition.was_born_empty {
            lines.add(&name, BORN_EMPTY, partition.relation);
        }
    }
    if table.had_children {
        lines.add(&name, HAD_CHILDREN, true);
    }
    if table.is_filtered {
        lines.add(&name, ROW_SECURITY, "applies");
    }
    for relation in &table.relations {
        let numbers: Vec<String> = relation.identity_columns.iter().map(|column| column.number.to_string()).collect();
        if table.reads_old_rows {
            lines.add(&name, IDENTITY, format!("{}: {} {}", relation.oid, relation.identity, numbers.join(" ")));
        }
        lines.add(&name, PERSISTENCE, format!("{}: {}", relation.oid, relation.persistence));
        if let Some(storage) = relation.storage {
            lines.add(&name, STORAGE, format!("{}: {storage}", relation.oid));
        }
    }
}

/// Whether no row and no value can have changed silently between two successive checks. See the module.
pub(crate) fn is_equivalent(old: &str, new: &str) -> bool {
    Difference::between(old, new).is_harmless()
}

/// Describes the difference between two fingerprints in a sentence. It names tables, but no values.
pub(crate) fn difference(old: Option<&str>, new: Option<&str>) -> String {
    match (old, new) {
        (None, None) => "there is no publication".to_owned(),
        (Some(_), None) => "the publication was dropped".to_owned(),
        (None, Some(_)) => "the publication was created".to_owned(),
        (Some(old), Some(new)) => Difference::between(old, new).describe(),
    }
}

#[cfg(test)]
mod tests;
