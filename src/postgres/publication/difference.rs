//! The difference between two fingerprints: whether it is harmful, and its description.
//!
//! The module [`publication`](super) explains which differences are harmless, and why.

use super::{
    ATTRIBUTE, BORN_EMPTY, CHILD, COLUMN, COLUMN_LIST, DEFINITION, FILE, FILTER, HAD_CHILDREN, IDENTITY, LABEL, MEMBER,
    OID, OPERATIONS, PARTITION, PERSISTENCE, PUBLICATION, ROW_SECURITY, STORAGE, VIA_ROOT,
};
use std::collections::{BTreeMap, BTreeSet};

/// The lines in only one of two fingerprints, by subject.
pub(super) struct Difference<'a> {
    subjects: BTreeMap<&'a str, Changes<'a>>,
    /// The subjects that are members of the publication, before and after.
    members: [BTreeSet<&'a str>; 2],
}

/// The difference in one subject, as pairs of topic and value.
#[derive(Default)]
struct Changes<'a> {
    gone: BTreeSet<(&'a str, &'a str)>,
    come: BTreeSet<(&'a str, &'a str)>,
}

impl<'a> Difference<'a> {
    pub(super) fn between(old: &'a str, new: &'a str) -> Self {
        let [old, new] = [old, new].map(|text| text.lines().map(fields).collect::<BTreeSet<_>>());
        let members = [&old, &new].map(|lines| {
            lines.iter().filter(|(_, topic, _)| *topic == MEMBER).map(|(subject, _, _)| *subject).collect()
        });
        let mut subjects: BTreeMap<&str, Changes<'_>> = BTreeMap::new();
        for (subject, topic, value) in old.difference(&new) {
            subjects.entry(subject).or_default().gone.insert((topic, value));
        }
        for (subject, topic, value) in new.difference(&old) {
            subjects.entry(subject).or_default().come.insert((topic, value));
        }
        Self { subjects, members }
    }

    pub(super) fn is_harmless(&self) -> bool {
        self.subjects.values().all(|changes| changes.harmful().next().is_none())
    }

    pub(super) fn describe(&self) -> String {
        let mut phrases = Vec::new();
        let publication = self.subjects.get(PUBLICATION);
        if let Some(changes) = publication {
            phrases.push(publication_phrase(changes).to_owned());
        }
        let is_new = publication.is_some_and(|changes| changes.has(OID));
        for (table, changes) in self.subjects.iter().filter(|(subject, _)| **subject != PUBLICATION) {
            if changes.has(OID) {
                phrases.push(format!("table {table} was created, dropped, renamed or replaced by another"));
            } else if changes.has(MEMBER) {
                phrases.extend(self.membership_phrase(table, is_new));
            } else {
                phrases.extend(changes.phrases(table));
            }
        }
        if phrases.is_empty() { "nothing differs".to_owned() } else { phrases.join("; ") }
    }

    fn membership_phrase(&self, table: &str, publication_is_new: bool) -> Option<String> {
        let phrase = match self.members.each_ref().map(|members| members.contains(table)) {
            [true, false] => format!("table {table} was taken out of the publication"),
            [false, true] => format!("table {table} was added to the publication"),
            // A new publication contains the table anew anyway.
            _ if publication_is_new => return None,
            _ => format!("table {table} was taken out of the publication and added again, or is in it in another way"),
        };
        Some(phrase)
    }
}

impl<'a> Changes<'a> {
    fn has(&self, topic: &str) -> bool {
        self.gone.iter().chain(&self.come).any(|(differs, _)| *differs == topic)
    }

    /// The lines that may have changed rows or values.
    fn harmful(&self) -> impl Iterator<Item = (&'a str, &'a str)> {
        let is_rewritten = self.is_rewritten();
        let is_born = |value: &str| self.come.contains(&(BORN_EMPTY, key(value)));
        let gone = self.gone.iter().filter(move |(topic, _)| match *topic {
            BORN_EMPTY | ROW_SECURITY | HAD_CHILDREN => false,
            DEFINITION | FILE => is_rewritten,
            _ => true,
        });
        let come = self.come.iter().filter(move |(topic, value)| match *topic {
            BORN_EMPTY | ROW_SECURITY | LABEL => false,
            DEFINITION | FILE => is_rewritten,
            PARTITION | IDENTITY | PERSISTENCE | STORAGE => !is_born(value),
            _ => true,
        });
        gone.chain(come).copied()
    }

    /// Whether the table was rewritten together with the definition of a mapped column.
    fn is_rewritten(&self) -> bool {
        self.has(FILE) && self.has(DEFINITION)
    }

    /// Describes the change of a table.
    fn phrases(&self, table: &str) -> Vec<String> {
        let harmful: BTreeSet<(&str, &str)> = self.harmful().collect();
        let has = |topic: &str| harmful.iter().any(|(differs, _)| *differs == topic);
        let columns = |topic: &str| -> BTreeSet<&str> {
            harmful.iter().filter(|(differs, _)| *differs == topic).map(|(_, value)| key(value)).collect()
        };
        let mut changed: Vec<String> = Vec::new();
        let topics = [
            (FILTER, "the row filter"),
            (COLUMN_LIST, "the column list"),
            (COLUMN, "a mapped column"),
            (PARTITION, "the set of partitions"),
            (IDENTITY, "the replica identity"),
            (PERSISTENCE, "logging"),
            (STORAGE, "the storage of a partition (TRUNCATE, or a rewrite)"),
            (CHILD, "the set of tables that inherit"),
        ];
        // The lines of an added or dropped partition, and the types of a replaced column, are parts of one change.
        let is_part =
            |topic: &str| topic != PARTITION && has(PARTITION) && [IDENTITY, PERSISTENCE, STORAGE].contains(&topic);
        for (topic, words) in topics {
            if has(topic) && !is_part(topic) {
                changed.push(words.to_owned());
            }
        }
        if !has(COLUMN) {
            changed.extend(columns(LABEL).iter().map(|column| format!("an enum label in column {column}")));
            changed.extend(columns(ATTRIBUTE).iter().map(|column| format!("the composite type in column {column}")));
        }
        let mut phrases = Vec::new();
        if !changed.is_empty() {
            phrases.push(format!("{} of table {table} changed", changed.join(" and ")));
        }
        if has(FILE) && !has(COLUMN) {
            let columns = Vec::from_iter(columns(DEFINITION)).join(" and ");
            phrases
                .push(format!("table {table} was rewritten and its column {columns} altered, which may change values"));
        }
        if has(HAD_CHILDREN) && !has(CHILD) {
            phrases.push(format!("another table inherited from table {table} for a while"));
        }
        phrases
    }
}

fn publication_phrase(changes: &Changes<'_>) -> &'static str {
    if changes.has(OID) {
        "the publication was dropped and created again"
    } else if changes.has(OPERATIONS) {
        "the publication publishes other operations"
    } else if changes.has(VIA_ROOT) {
        "publish_via_partition_root of the publication changed"
    } else {
        "the publication was altered"
    }
}

/// Splits a line into subject, topic and value.
fn fields(line: &str) -> (&str, &str, &str) {
    let (subject, rest) = line.split_once('\t').unwrap_or((line, ""));
    let (topic, value) = rest.split_once('\t').unwrap_or((rest, ""));
    (subject, topic, value)
}

/// The column or relation that a value belongs to.
fn key(value: &str) -> &str {
    value.split_once(": ").map_or(value, |(key, _)| key)
}
