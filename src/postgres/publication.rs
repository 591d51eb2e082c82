//! Whether the publication, and the text of its values, are still the same.
//!
//! Changes of a publication are silent. A table that is taken out and put in again lost what was written in between; a
//! publication that was dropped and created anew wedges the slot on 14 to 17, and on 18 loses the middle; a row filter
//! hides rows. Some changes of values come without a row event, too: a rewrite of the table, another label of an enum. None of that is
//! in the stream. So everything that decides which rows come out of the slot, and as which text, is read every few seconds and
//! compared: the [`Published::fingerprint`].
//!
//! # What an equal fingerprint proves
//!
//! Let check A and, later, check B find the same fingerprint. Then **everything that was committed before A's LSN was
//! published under that fingerprint**: the last verified LSN is that of the *previous* equal check, not of the present
//! one.
//!
//! - A statement's snapshot is taken before anything in it is evaluated. So A's LSN is *newer* than what A saw, and by itself
//!   says nothing: a DDL may have committed between the two.
//! - But B's snapshot was taken after A's LSN was read. Whatever committed below A's LSN is visible to B, and B saw nothing
//!   new. Nor can there have been a change and its reversal: rows that are written or deleted and written again have
//!   another oid or another xmin, and those are in the fingerprint. (Replica identities have no such mark.
//!   Where one is changed and changed back between two checks, the stream itself tells: it describes the table anew, and
//!   a row that is incomplete is a gap of its own.)
//! - One exception is left: a commit is in the WAL a moment before it is visible, and with synchronous replication the
//!   moment lasts until a standby has answered. A DDL in that moment is noticed when it becomes visible, and the gap then lies
//!   behind it by a check or two. No reader misses it: a gap is for all readers, and all pass it.
//!
//! Most checks read only a `Sum`, which takes the xmin of every catalog row that the fingerprint is made of. Where it is that of
//! the check before, no such row was written in between, and the fingerprint is the same. Its LSN is read in the same way.
//!
//! # What differs and changes nothing
//!
//! Some lines may differ between fingerprints that are equivalent ([`is_equivalent`]): between their checks nothing happened that
//! rows or values depend on. Equivalence is decided between one fingerprint and the next, and the next takes its place in the log. Where
//! checks were missed, several harmless changes may look like one that is not: a gap too many, never one too few.
//!
//! - **Rewrites.** A column has the same type; are its values the same? What a value is written as depends on its bytes and its type, not
//!   on the modifier or collation of its column. Its bytes change without a row event only where ALTER COLUMN ... TYPE or ... SET
//!   EXPRESSION writes the table anew, and that gives the table another file *and* updates the column's row of `pg_attribute`, in
//!   one commit. VACUUM FULL, CLUSTER, TRUNCATE, SET TABLESPACE, SET ACCESS METHOD and rewrites of other columns change only the
//!   file; SET STATISTICS, SET DEFAULT, SET NOT NULL, or a longer varchar only that row.
//! - **Labels.** ADD VALUE changes no value that is stored.
//! - **Partitions.** One that was created as such was empty when it became one, and what was written to it since came under its root.
//! - **Row level security** has no say in what is streamed. It is in the fingerprint so that the requirements are looked at again.
//!
//! # Partitions
//!
//! pgoutput publishes the TRUNCATE of a partitioned table, and says nothing of one of a partition that it publishes as its
//! root. Such a TRUNCATE gives the partition other storage, and that is in the fingerprint. VACUUM FULL, CLUSTER and rewrites
//! by ALTER TABLE look the same, and are gaps too: rather one too many than rows that are gone and still reported.
//!
//! # Left out
//!
//! Unmapped columns, and everything else that does not decide which rows come out: owners, privileges, statistics. A table
//! that gets another name and its old one back between two checks: what is written meanwhile comes under the other name.
//!
//! A partition that no check has seen before its rows went without a DELETE: created, filled and dropped between two checks, or
//! filled and truncated by the very transaction that created it. It leaves no trace in the catalogs.
//!
//! Input and output functions of types that are replaced: by another version of an extension, for example.

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

/// Makes a running session check the publication at once, and not with its next check, after something was repaired or changed.
pub(crate) const LOOK_AT_ONCE: &str = "SELECT pg_logical_emit_message(true, 'tuplewatch', 'check');";
/// The content of its message. A role that may write one may also write tuples.
pub(crate) const CHECK_REQUEST: &[u8] = b"check";

/// The result of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Published {
    /// Lines of `subject TAB topic TAB value`. None: there is no such publication.
    pub(crate) fingerprint: Option<String>,
    /// The WAL insert position after the check's snapshot was taken. The *next* check that is equal verifies everything
    /// before it.
    pub(crate) lsn: Lsn,
    /// The mapped tables that exist, by oid.
    pub(crate) tables: HashMap<RelationId, String>,
}

/// Checks, one after the other, of the same mapping on one server. Only the first, and those that find a change, read
/// everything.
#[derive(Debug, Default)]
pub(crate) struct Checks {
    /// The sum that was read before the fingerprint was.
    last: Mutex<Option<(String, Published)>>,
}

impl Checks {
    /// The next check. One statement where nothing changed, or else two (and one for the server's version). Costs the server some
    /// 10 ms, most of it planning.
    ///
    /// # Errors
    /// Where PostgreSQL cannot be asked.
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
        // What changed since the sum was read makes the next one differ: everything is read once more.
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((sum.value, published.clone()));
        Ok(published)
    }
}

/// Reads the fingerprint: one statement, with its LSN (and one for the server's version).
///
/// # Errors
/// Where PostgreSQL cannot be asked.
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
/// A partition that was created as such.
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
        // Names may hold tabs and line breaks, which separate here.
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
            // Only mapped ones: the rest may come and go.
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

/// Whether no row and no value can have changed in silence between two checks, one after the other. See the module.
pub(crate) fn is_equivalent(old: &str, new: &str) -> bool {
    Difference::between(old, new).is_harmless()
}

/// What differs between two fingerprints, in a sentence for people. Names tables, and nothing that was in them.
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
