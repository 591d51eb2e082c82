//! The format of a mapping file.

use serde::Deserialize;

/// The most columns that the mapping of one table may read.
pub(super) const COLUMNS_MAX: usize = 16;
use std::fmt;

/// A whole mapping file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The table that lists tenants. Without it every tenant id is accepted.
    pub tenants: Option<TenantsSpec>,
    /// The watched tables.
    pub tables: Vec<TableSpec>,
}

/// A table with one row for each tenant.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantsSpec {
    /// The table.
    pub table: TableName,
    /// The column with the tenant's id.
    pub id: String,
}

/// The mapping of one table, whose rows are tuples, attributes, or marks of transactions.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableSpec {
    /// The table.
    pub table: TableName,
    /// The tenant of a row.
    pub tenant: ValueSpec,
    /// Set if rows are tuples.
    pub tuple: Option<TupleSpec>,
    /// Set if rows are attributes.
    pub attribute: Option<AttributeSpec>,
    /// Set if a transaction inserts a row to mark itself as a tenant's. The tenant then receives a message of the
    /// transaction even without changes. Other changes of such rows, and TRUNCATE, have no meaning.
    #[serde(default)]
    pub transaction: bool,
    /// Set if rows are marked instead of deleted.
    pub soft_delete: Option<SoftDelete>,
}

/// The values of a tuple's parts.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields are the words of the model")]
pub struct TupleSpec {
    pub entity_type: ValueSpec,
    pub entity_id: ValueSpec,
    pub relation: ValueSpec,
    pub subject_type: ValueSpec,
    pub subject_id: ValueSpec,
    /// Without it subjects are direct. NULL means empty.
    #[serde(default = "ValueSpec::empty")]
    pub subject_relation: ValueSpec,
}

/// The values of an attribute's parts.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields are the words of the model")]
pub struct AttributeSpec {
    pub entity_type: ValueSpec,
    pub entity_id: ValueSpec,
    pub attribute: ValueSpec,
    /// JSON in Permify's form: `{"@type": "type.googleapis.com/base.v1.BooleanValue", "data": true}`.
    pub value: ValueSpec,
}

/// A mark on rows that stay when their facts cease to hold.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SoftDelete {
    /// The column with the mark.
    pub column: String,
    /// The texts of the column in live rows. `null_is_live` decides about NULL.
    #[serde(default)]
    pub live: Vec<String>,
    /// Whether rows with NULL are live.
    #[serde(default)]
    pub null_is_live: bool,
}

/// `schema.table`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct TableName {
    /// The schema, spelled as in the catalog.
    pub schema: String,
    /// The name within the schema.
    pub name: String,
}

impl TableName {
    /// Whether this is the table with the given schema and name.
    pub fn is(&self, schema: &str, name: &str) -> bool {
        self.schema == schema && self.name == name
    }

    /// The name quoted for SQL.
    pub fn to_sql(&self) -> String {
        format!("{}.{}", quote(&self.schema), quote(&self.name))
    }
}

/// Quotes a name as an SQL identifier.
fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

impl TenantsSpec {
    /// The id column, quoted for SQL.
    pub fn id_to_sql(&self) -> String {
        quote(&self.id)
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

impl TryFrom<String> for TableName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.split_once('.') {
            Some((schema, name)) if !schema.is_empty() && !name.is_empty() => {
                Ok(Self { schema: schema.to_owned(), name: name.to_owned() })
            }
            _ => Err(format!("'{text}' is not a table: write schema.table")),
        }
    }
}

/// The origin of a text: a column (a plain string in the file), a constant, or a template.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "expected a column, {constant: text} or {template: text}")]
pub enum ValueSpec {
    /// The column of that name.
    Column(String),
    /// A constant text.
    Constant {
        /// The text.
        constant: String,
    },
    /// A text with columns in braces: `user:{id}`.
    Template {
        /// The text.
        template: String,
    },
}

impl ValueSpec {
    pub(super) const fn empty() -> Self {
        Self::Constant { constant: String::new() }
    }
}

/// A piece of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    Text(&'a str),
    Column(&'a str),
}

/// Splits a template into pieces; `None` if its braces do not match or a column is empty.
pub(super) fn pieces(template: &str) -> Option<Vec<Piece<'_>>> {
    let mut pieces = Vec::new();
    let mut rest = template;
    while let Some((text, behind)) = rest.split_once('{') {
        let (column, tail) = behind.split_once('}')?;
        if column.is_empty() || column.contains('{') || text.contains('}') {
            return None;
        }
        pieces.push(Piece::Text(text));
        pieces.push(Piece::Column(column));
        rest = tail;
    }
    if rest.contains('}') {
        return None;
    }
    pieces.push(Piece::Text(rest));
    Some(pieces)
}

/// The reason why a mapping cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It has no tables.
    #[error("the mapping names no table")]
    NoTables,
    /// A table appears twice.
    #[error("the mapping names table {0} twice")]
    Duplicate(String),
    /// A table has no kind, or several.
    #[error("table {0} of the mapping needs exactly one of 'tuple', 'attribute' and 'transaction: true'")]
    Kind(String),
    /// The braces of a template do not match.
    #[error(
        "table {table} of the mapping has a malformed template '{template}': columns stand in braces, as in user:{{id}}"
    )]
    Template {
        /// The table.
        table: String,
        /// The template.
        template: String,
    },
    /// A table reads too many columns.
    #[error("table {0} of the mapping uses more than {max} columns", max = COLUMNS_MAX)]
    TooManyColumns(String),
    /// No row would ever be live.
    #[error("table {0} of the mapping has a soft_delete with neither 'live' values nor 'null_is_live'")]
    NothingLives(String),
}

/// Column names.
pub type Columns<'a> = Vec<&'a str>;

impl TableSpec {
    /// The texts that make up a change, the tenant first, each with its name for messages.
    pub(super) fn values(&self) -> Vec<(&'static str, &ValueSpec)> {
        let mut values = vec![("tenant", &self.tenant)];
        if let Some(tuple) = &self.tuple {
            values.extend([
                ("entity_type", &tuple.entity_type),
                ("entity_id", &tuple.entity_id),
                ("relation", &tuple.relation),
                ("subject_type", &tuple.subject_type),
                ("subject_id", &tuple.subject_id),
                ("subject_relation", &tuple.subject_relation),
            ]);
        }
        if let Some(attribute) = &self.attribute {
            values.extend([
                ("entity_type", &attribute.entity_type),
                ("entity_id", &attribute.entity_id),
                ("attribute", &attribute.attribute),
                ("value", &attribute.value),
            ]);
        }
        values
    }

    /// Whether the mapping reads the old rows of UPDATE and DELETE.
    pub const fn reads_old_rows(&self) -> bool {
        !self.transaction
    }

    /// All columns that the mapping reads, without duplicates.
    pub fn columns(&self) -> Columns<'_> {
        let mut columns = Vec::new();
        for (_, value) in self.values() {
            match value {
                ValueSpec::Column(column) => columns.push(column.as_str()),
                ValueSpec::Constant { .. } => {}
                ValueSpec::Template { template } => {
                    columns.extend(pieces(template).into_iter().flatten().filter_map(|piece| match piece {
                        Piece::Column(column) => Some(column),
                        Piece::Text(_) => None,
                    }));
                }
            }
        }
        columns.extend(self.soft_delete.as_ref().map(|soft| soft.column.as_str()));
        columns.sort_unstable();
        columns.dedup();
        columns
    }
}

impl Spec {
    /// Moves all tables to another schema.
    #[must_use]
    pub fn in_schema(mut self, schema: &str) -> Self {
        let tenants = self.tenants.iter_mut().map(|tenants| &mut tenants.table);
        for table in self.tables.iter_mut().map(|table| &mut table.table).chain(tenants) {
            schema.clone_into(&mut table.schema);
        }
        self
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        if self.tables.is_empty() {
            return Err(Error::NoTables);
        }
        for (n, table) in self.tables.iter().enumerate() {
            let name = table.table.to_string();
            if self.tables.iter().take(n).any(|earlier| earlier.table == table.table) {
                return Err(Error::Duplicate(name));
            }
            let kinds = [table.tuple.is_some(), table.attribute.is_some(), table.transaction];
            if kinds.iter().filter(|is_set| **is_set).count() != 1 {
                return Err(Error::Kind(name));
            }
            for (_, value) in table.values() {
                if let ValueSpec::Template { template } = value
                    && pieces(template).is_none()
                {
                    return Err(Error::Template { table: name, template: template.clone() });
                }
            }
            if table.columns().len() > COLUMNS_MAX {
                return Err(Error::TooManyColumns(name));
            }
            if table.soft_delete.as_ref().is_some_and(|soft| soft.live.is_empty() && !soft.null_is_live) {
                return Err(Error::NothingLives(name));
            }
        }
        Ok(())
    }
}
