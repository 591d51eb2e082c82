//! Maps rows to changes. A mapping is data ([`Spec`]), never code; the presets are files of the same format.
//!
//! | row message | result |
//! | --- | --- |
//! | INSERT | create |
//! | DELETE | delete |
//! | UPDATE that changes mapped values | delete of the old fact, then create of the new one |
//! | UPDATE that changes none | nothing |
//! | soft delete: live → marked, marked → live | delete, create |
//! | any removal of a marked row | nothing |
//! | INSERT into a table of transactions | marks the transaction as its tenant's |
//! | any other change there | nothing |
//!
//! A TOASTed value that PostgreSQL did not send again is taken from the old row, and never treated as empty. A row that
//! cannot be turned into changes is an [`Undecodable`], with its tenant if that can be read.
//!
//! Only this module and [`crate::store`], which belongs to the preset `tuples`, know names of tables and columns.
//! [`crate::decode::assembler`] handles transactions.

mod attribute_value;
mod plan;
mod spec;

pub use attribute_value::{
    Error as AttributeValueError, parse as parse_attribute_value, write as write_attribute_value,
};
pub use plan::{Outcome, Plan, Undecodable};
pub use spec::{
    AttributeSpec, Columns, Error, SoftDelete, Spec, TableName, TableSpec, TenantsSpec, TupleSpec, ValueSpec,
};

use crate::decode::pgoutput::Relation;
use sha2::{Digest, Sha256};

/// The preset `tuples`, in the format of [`Spec`].
pub const TUPLES_PRESET: &str = include_str!("mapping/tuples.yaml");

/// The preset `permify`, in the format of [`Spec`]. [`Spec::in_schema`] sets the schema of its tables.
pub const PERMIFY_PRESET: &str = include_str!("mapping/permify.yaml");

/// A checked [`Spec`].
#[derive(Clone, Debug)]
pub struct Mapping {
    spec: Spec,
}

impl Mapping {
    /// Checks a specification.
    ///
    /// # Errors
    /// It contradicts itself: a table twice, a table of no kind or of several, a malformed template.
    pub fn new(spec: Spec) -> Result<Self, Error> {
        spec.check()?;
        Ok(Self { spec })
    }

    /// The watched tables.
    pub fn tables(&self) -> &[TableSpec] {
        &self.spec.tables
    }

    /// The table that lists tenants, if there is one.
    pub const fn tenants(&self) -> Option<&TenantsSpec> {
        self.spec.tenants.as_ref()
    }

    /// Whether rows of some table mark a transaction as a tenant's.
    pub fn tells_transactions(&self) -> bool {
        self.spec.tables.iter().any(|table| table.transaction)
    }

    /// The plan for the rows of this relation; `None` if it is not mapped.
    pub fn plan(&self, relation: &Relation) -> Option<Plan> {
        let table = self.spec.tables.iter().find(|table| table.table.is(&relation.schema, &relation.name))?;
        Some(Plan::new(table, relation))
    }

    /// A hash that differs between mappings, and is stable across restarts.
    pub fn fingerprint(&self) -> [u8; 32] {
        // The debug output of plain data is stable within a version. A new version may read rows differently anyway.
        let mut hasher = Sha256::new();
        hasher.update(format!("{:?}", self.spec.tables));
        hasher.finalize().into()
    }
}

#[cfg(test)]
mod tests;
