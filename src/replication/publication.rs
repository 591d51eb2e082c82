//! Whether what is published is still what it was.
//!
//! Changes of a publication are silent. A table that is taken out and put in again lost what was written in between; a
//! publication that was dropped and created anew wedges the slot on 14 to 17, and on 18 loses the middle; a row filter
//! hides rows. Nothing of that is in the stream. So everything that decides what comes out of the slot is read every few
//! seconds and compared: the [`Published::fingerprint`].
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
//!   another oid or another xmin, and those are in the fingerprint. (Replica identities and columns have no such mark.
//!   Where they are changed and changed back between two checks, the stream itself tells: it describes the table anew, and
//!   a row that is incomplete is a gap of its own.)
//! - One exception is left: a commit is in the WAL a moment before it is visible, and with synchronous replication the
//!   moment lasts until a standby has answered. A DDL in that moment is noticed when it becomes visible, and the break then lies
//!   behind it by a check or two. Nobody misses it for that: a break is for all readers, and all pass it.
//!
//! # Partitions
//!
//! pgoutput publishes the TRUNCATE of a partitioned table, and says nothing of one of a partition that it publishes as its
//! root. Such a TRUNCATE gives the partition other storage, and that is in the fingerprint. VACUUM FULL, CLUSTER and rewrites
//! by ALTER TABLE look the same, and are breaks too: rather one too many than rows that are gone and still reported.
//!
//! # Left out
//!
//! Unmapped columns, and everything else that does not decide which rows come out: owners, privileges, statistics. A table
//! that gets another name and its old one back between two checks: what is written meanwhile comes under the other name.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fmt::Write as _;
use tokio_postgres::Client;

use super::catalog::{Catalog, Publication, Table};
use crate::lsn::Lsn;
use crate::mapping::Mapping;
use crate::pgoutput::RelationId;

/// What a check saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// Lines of `subject TAB topic TAB value`. None: there is no such publication.
    pub fingerprint: Option<String>,
    /// The WAL insert position after the check's snapshot was taken. The *next* check that is equal verifies everything
    /// before it.
    pub lsn: Lsn,
    /// The mapped tables that exist, by oid.
    pub tables: HashMap<RelationId, String>,
}

/// Reads the fingerprint: one statement, with its LSN (and one for the server's version). Costs the
/// server 10 ms, nearly all of it planning.
///
/// # Errors
/// Where PostgreSQL cannot be asked.
pub async fn fingerprint(
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
const PARTITION: &str = "partition";
const IDENTITY: &str = "identity";
const PERSISTENCE: &str = "persistence";
const STORAGE: &str = "storage";

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
    }
    for partition in &table.partitions {
        lines.add(&name, PARTITION, format!("{} version {}", partition.relation, partition.version));
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

/// What differs between two fingerprints, in a sentence for people. Names tables, and nothing that was in them.
pub fn difference(old: Option<&str>, new: Option<&str>) -> String {
    let (old, new) = match (old, new) {
        (None, None) => return "there is no publication".to_owned(),
        (Some(_), None) => return "the publication was dropped".to_owned(),
        (None, Some(_)) => return "the publication was created".to_owned(),
        (Some(old), Some(new)) => (old, new),
    };
    let old_lines: BTreeSet<&str> = old.lines().collect();
    let new_lines: BTreeSet<&str> = new.lines().collect();
    let mut changed: BTreeSet<(&str, &str)> = BTreeSet::new();
    for line in old_lines.symmetric_difference(&new_lines) {
        let mut fields = line.split('\t');
        changed.insert((fields.next().unwrap_or_default(), fields.next().unwrap_or_default()));
    }
    let mut phrases: Vec<String> = Vec::new();
    let is_new = changed.contains(&(PUBLICATION, OID));
    if changed.iter().any(|(subject, _)| *subject == PUBLICATION) {
        phrases.push(publication_phrase(|topic| changed.contains(&(PUBLICATION, topic))).to_owned());
    }
    let tables: BTreeSet<&str> =
        changed.iter().map(|(subject, _)| *subject).filter(|name| *name != PUBLICATION).collect();
    for table in tables {
        let has = |topic: &str| changed.contains(&(table, topic));
        let member = format!("{table}\t{MEMBER}\t");
        let is_member = |lines: &BTreeSet<&str>| lines.iter().any(|line| line.starts_with(&member));
        let phrase = if has(OID) {
            format!("table {table} was created, dropped, renamed or replaced by another")
        } else if has(MEMBER) {
            match (is_member(&old_lines), is_member(&new_lines)) {
                (true, false) => format!("table {table} was taken out of the publication"),
                (false, true) => format!("table {table} was added to the publication"),
                // Of course it is, where the publication itself is another one.
                _ if is_new => continue,
                _ => format!(
                    "table {table} was taken out of the publication and added again, or is in it in another way"
                ),
            }
        } else {
            table_phrase(table, has)
        };
        phrases.push(phrase);
    }
    if phrases.is_empty() { "nothing differs".to_owned() } else { phrases.join("; ") }
}

fn table_phrase(table: &str, has: impl Fn(&str) -> bool) -> String {
    let topics = [
        (FILTER, "the row filter"),
        (COLUMN_LIST, "the column list"),
        (COLUMN, "a mapped column"),
        (PARTITION, "the set of partitions"),
        (IDENTITY, "the replica identity"),
        (PERSISTENCE, "logging"),
        (STORAGE, "the storage of a partition (TRUNCATE, or a rewrite)"),
    ];
    // A partition that comes or goes brings all its lines: it is one thing.
    let named = topics.iter().filter(|(topic, _)| has(topic) && (*topic == PARTITION || !has(PARTITION)));
    let named: Vec<&str> = named.map(|(_, words)| *words).collect();
    format!("{} of table {table} changed", named.join(" and "))
}

fn publication_phrase(has: impl Fn(&str) -> bool) -> &'static str {
    if has(OID) {
        "the publication was dropped and created again"
    } else if has(OPERATIONS) {
        "the publication publishes other operations"
    } else if has(VIA_ROOT) {
        "publish_via_partition_root of the publication changed"
    } else {
        "the publication was altered"
    }
}

#[cfg(test)]
mod tests;
