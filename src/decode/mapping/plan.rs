//! The plan for reading rows of one relation: column names are resolved to slots once for each Relation message.

use super::attribute_value;
use super::spec::{COLUMNS_MAX, Piece, SoftDelete, TableSpec, ValueSpec, pieces};
use crate::decode::pgoutput::{Relation, Row, Value};
use crate::model::change::{Attribute, Fact, Operation, Tuple};
use std::borrow::Cow;
use std::sync::Arc;

/// The mapped columns of a row, each in its slot.
type Slots<'a> = [Value<'a>; COLUMNS_MAX];

/// The plan for reading rows of one relation.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Schema and name, for messages.
    table: Arc<str>,
    /// The slot of each column of the relation, if it is mapped.
    slot_of_column: Vec<Option<u8>>,
    /// The tenant, then the parts of the tuple or attribute in the order of [`TableSpec::values`].
    values: Vec<(&'static str, Source)>,
    kind: Kind,
    soft_delete: Option<(Source, SoftDelete)>,
    /// A mapped column that the replica identity lacks, so that old rows cannot be read.
    not_in_identity: Option<String>,
}

/// The content of the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tuple,
    Attribute,
    Transaction,
}

/// The origin of a text.
#[derive(Clone, Debug)]
enum Source {
    Slot(u8),
    Constant(String),
    Template(Vec<Source>),
    /// The relation lacks this column.
    Missing(String),
}

/// A row that cannot be turned into changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Undecodable {
    /// The tenant, if it can be read.
    pub tenant: Option<String>,
    /// The problem, without values of the row.
    pub detail: String,
}

/// The outcome of one step of a row message.
#[derive(Debug, PartialEq)]
pub enum Outcome<'a> {
    /// A change.
    Change {
        /// The tenant of the fact.
        tenant: &'a str,
        /// Whether the fact begins or ceases to hold.
        operation: Operation,
        /// The fact.
        fact: Fact<'a>,
    },
    /// The transaction belongs to this tenant, even if it changes nothing.
    Transaction {
        /// The tenant.
        tenant: &'a str,
    },
    /// A gap.
    Undecodable(Undecodable),
}

/// Each row message has two steps: a delete happens in the first, a create in the second.
const DELETE_STEP: u64 = 1;
const CREATE_STEP: u64 = 2;

impl Plan {
    pub(super) fn new(spec: &TableSpec, relation: &Relation) -> Self {
        let names = spec.columns();
        let slot_of = |name: &str| {
            let known = relation.columns.iter().any(|column| column.name == name);
            let slot = names.iter().position(|column| *column == name).and_then(|n| u8::try_from(n).ok());
            match slot {
                Some(slot) if known => Source::Slot(slot),
                _ => Source::Missing(name.to_owned()),
            }
        };
        let source = |value: &ValueSpec| match value {
            ValueSpec::Column(name) => slot_of(name),
            ValueSpec::Constant { constant } => Source::Constant(constant.clone()),
            ValueSpec::Template { template } => Source::Template(
                pieces(template)
                    .into_iter()
                    .flatten()
                    .map(|piece| match piece {
                        Piece::Text(text) => Source::Constant(text.to_owned()),
                        Piece::Column(name) => slot_of(name),
                    })
                    .collect(),
            ),
        };
        let slot_of_column = relation
            .columns
            .iter()
            .map(|column| names.iter().position(|name| *name == column.name).and_then(|n| u8::try_from(n).ok()))
            .collect();
        let not_in_identity = relation
            .columns
            .iter()
            .find(|column| names.contains(&column.name.as_str()) && !column.in_identity)
            .map(|column| column.name.clone());
        Self {
            table: relation.to_string().into(),
            slot_of_column,
            values: spec.values().into_iter().map(|(word, value)| (word, source(value))).collect(),
            kind: match spec {
                TableSpec { transaction: true, .. } => Kind::Transaction,
                TableSpec { attribute: Some(_), .. } => Kind::Attribute,
                TableSpec { .. } => Kind::Tuple,
            },
            soft_delete: spec.soft_delete.as_ref().map(|soft| (slot_of(&soft.column), soft.clone())),
            not_in_identity,
        }
    }

    /// Schema and name of the table.
    pub fn table(&self) -> &Arc<str> {
        &self.table
    }

    /// Whether a TRUNCATE of the table removes facts.
    pub fn has_facts(&self) -> bool {
        self.kind != Kind::Transaction
    }

    /// Reads an INSERT. `visit` receives each outcome with its step in the row message.
    pub fn insert(&self, new: Row<'_>, visit: &mut dyn FnMut(u64, Outcome<'_>)) {
        let slots = self.load(new);
        if self.lives(&slots) {
            self.report(Operation::Create, CREATE_STEP, &slots, visit);
        }
    }

    /// Reads a DELETE.
    pub fn delete(&self, old: Row<'_>, visit: &mut dyn FnMut(u64, Outcome<'_>)) {
        if !self.has_facts() {
            return;
        }
        let slots = self.load(old);
        if let Some(column) = &self.not_in_identity {
            return visit(DELETE_STEP, self.lacks_identity("DELETE", column, &slots));
        }
        if self.lives(&slots) {
            self.report(Operation::Delete, DELETE_STEP, &slots, visit);
        }
    }

    /// Reads an UPDATE.
    pub fn update(&self, old: Option<Row<'_>>, new: Row<'_>, visit: &mut dyn FnMut(u64, Outcome<'_>)) {
        if !self.has_facts() {
            return;
        }
        let mut new = self.load(new);
        if let Some(column) = &self.not_in_identity {
            return visit(DELETE_STEP, self.lacks_identity("UPDATE", column, &new));
        }
        // The identity includes all mapped columns, so a missing old row means that none of them changed.
        let Some(old) = old.map(|row| self.load(row)) else { return };
        for (new, old) in new.iter_mut().zip(&old) {
            if *new == Value::Unchanged {
                *new = *old;
            }
        }
        let (was, is) = (self.lives(&old), self.lives(&new));
        if was && is && self.same(&old, &new) {
            return;
        }
        if was {
            self.report(Operation::Delete, DELETE_STEP, &old, visit);
        }
        if is {
            self.report(Operation::Create, CREATE_STEP, &new, visit);
        }
    }

    fn load<'a>(&self, row: Row<'a>) -> Slots<'a> {
        let mut slots = [Value::Null; COLUMNS_MAX];
        for (value, slot) in row.values().zip(&self.slot_of_column) {
            if let Some(place) = slot.and_then(|slot| slots.get_mut(usize::from(slot))) {
                *place = value;
            }
        }
        slots
    }

    fn lives(&self, slots: &Slots<'_>) -> bool {
        let Some((source, soft)) = &self.soft_delete else { return true };
        match source {
            Source::Slot(slot) => match slots.get(usize::from(*slot)) {
                Some(Value::Text(text)) => soft.live.iter().any(|live| live == text),
                Some(Value::Null) => soft.null_is_live,
                // Bytes that are not UTF-8 equal none of the mapping's words.
                Some(Value::Bytes(_)) => false,
                _ => true,
            },
            // The mark cannot be read. Reading the values will report the missing column.
            _ => true,
        }
    }

    /// Whether all values are equal, apart from the soft-delete mark.
    fn same(&self, old: &Slots<'_>, new: &Slots<'_>) -> bool {
        self.values.iter().all(|(_, source)| source.same(old, new))
    }

    fn report(&self, operation: Operation, step: u64, slots: &Slots<'_>, visit: &mut dyn FnMut(u64, Outcome<'_>)) {
        let mut texts: [Cow<'_, str>; 7] = Default::default();
        if let Some((Source::Missing(column), _)) = &self.soft_delete {
            return visit(step, self.undecodable(slots, format!("column {column} is missing")));
        }
        for ((word, source), text) in self.values.iter().zip(&mut texts) {
            match source.text(slots) {
                Ok(value) => *text = value,
                Err(Unreadable::Null) if *word == "subject_relation" => {}
                Err(unreadable) => {
                    return visit(step, self.undecodable(slots, format!("{word} {unreadable}")));
                }
            }
        }
        let [tenant, a, b, c, d, e, f] = &texts;
        if tenant.is_empty() {
            return visit(
                step,
                Outcome::Undecodable(Undecodable { tenant: None, detail: "the tenant is empty".into() }),
            );
        }
        let fact = match self.kind {
            Kind::Transaction => return visit(step, Outcome::Transaction { tenant }),
            Kind::Attribute => match attribute_value::parse(d) {
                Ok(value) => Fact::Attribute(Attribute { entity_type: a, entity_id: b, attribute: c, value }),
                Err(error) => return visit(step, self.undecodable(slots, error.to_string())),
            },
            Kind::Tuple => Fact::Tuple(Tuple {
                entity_type: a,
                entity_id: b,
                relation: c,
                subject_type: d,
                subject_id: e,
                subject_relation: f,
            }),
        };
        visit(step, Outcome::Change { tenant, operation, fact });
    }

    fn undecodable(&self, slots: &Slots<'_>, detail: String) -> Outcome<'static> {
        let tenant = self.values.first().and_then(|(_, source)| source.text(slots).ok());
        let tenant = tenant.filter(|text| !text.is_empty()).map(Cow::into_owned);
        Outcome::Undecodable(Undecodable { tenant, detail })
    }

    fn lacks_identity(&self, statement: &str, column: &str, slots: &Slots<'_>) -> Outcome<'static> {
        let detail = format!(
            "{statement} without the old value of column {column}: the replica identity lacks it \
             (ALTER TABLE {} REPLICA IDENTITY FULL)",
            self.table
        );
        self.undecodable(slots, detail)
    }
}

/// The reason why a text cannot be read.
#[derive(Debug)]
enum Unreadable<'a> {
    Null,
    Unchanged,
    NotUtf8,
    Missing(&'a str),
}

impl std::fmt::Display for Unreadable<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Null => f.write_str("is NULL"),
            Self::Unchanged => f.write_str("is a TOASTed value that was not sent (REPLICA IDENTITY FULL sends it)"),
            Self::NotUtf8 => {
                f.write_str("is not UTF-8, and the database has no encoding to convert it from (SQL_ASCII)")
            }
            Self::Missing(column) => write!(f, "cannot be read: the table has no column {column}"),
        }
    }
}

impl Source {
    fn text<'s, 'a: 's>(&'s self, slots: &Slots<'a>) -> Result<Cow<'s, str>, Unreadable<'s>> {
        match self {
            Self::Constant(text) => Ok(Cow::Borrowed(text)),
            Self::Missing(column) => Err(Unreadable::Missing(column)),
            Self::Slot(slot) => match slots.get(usize::from(*slot)) {
                Some(Value::Text(text)) => Ok(Cow::Borrowed(*text)),
                Some(Value::Unchanged) => Err(Unreadable::Unchanged),
                Some(Value::Bytes(_)) => Err(Unreadable::NotUtf8),
                Some(Value::Null) | None => Err(Unreadable::Null),
            },
            Self::Template(parts) => {
                let mut text = String::new();
                for part in parts {
                    text.push_str(&part.text(slots)?);
                }
                Ok(Cow::Owned(text))
            }
        }
    }

    fn same(&self, old: &Slots<'_>, new: &Slots<'_>) -> bool {
        match self {
            Self::Constant(_) | Self::Missing(_) => true,
            Self::Slot(slot) => old.get(usize::from(*slot)) == new.get(usize::from(*slot)),
            Self::Template(parts) => parts.iter().all(|part| part.same(old, new)),
        }
    }
}
