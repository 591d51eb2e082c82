//! Rows → changes. A mapping is data ([`Spec`]), never code; the presets are files of the same format.
//!
//! | row message | becomes |
//! | --- | --- |
//! | INSERT | create |
//! | DELETE | delete |
//! | UPDATE that changes mapped values | delete of the old, then create of the new |
//! | UPDATE that does not | nothing |
//! | soft delete: live → marked, marked → live | delete, create |
//! | any removal of a marked row | nothing |
//! | INSERT into a table of transactions | the transaction is its tenant's |
//! | anything else there | nothing |
//!
//! A TOASTed value that PostgreSQL did not send again is taken from the old row, and never reported as empty. What cannot
//! be turned into changes is an [`Undecodable`], with its tenant where that can be read.
//!
//! Only this module and [`crate::store`], which belongs to the preset `tuples`, know names of tables and columns. Transactions are the
//! business of [`crate::decode::assembler`].

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

/// The `tuples` preset, in the format of [`Spec`].
pub const TUPLES_PRESET: &str = include_str!("mapping/tuples.yaml");

/// The `permify` preset, in the format of [`Spec`]; its tables are in whatever schema [`Spec::in_schema`] says.
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
    /// Where it contradicts itself: a table twice, a table that is both or neither of tuple and attribute, a malformed
    /// template.
    pub fn new(spec: Spec) -> Result<Self, Error> {
        spec.check()?;
        Ok(Self { spec })
    }

    /// The tables that rows come from.
    pub fn tables(&self) -> &[TableSpec] {
        &self.spec.tables
    }

    /// Where tenants are listed, if anywhere.
    pub const fn tenants(&self) -> Option<&TenantsSpec> {
        self.spec.tenants.as_ref()
    }

    /// Whether rows tell whose a transaction is.
    pub fn tells_transactions(&self) -> bool {
        self.spec.tables.iter().any(|table| table.transaction)
    }

    /// How to read rows of this relation; `None` where the mapping does not speak of it.
    pub fn plan(&self, relation: &Relation) -> Option<Plan> {
        let table = self.spec.tables.iter().find(|table| table.table.is(&relation.schema, &relation.name))?;
        Some(Plan::new(table, relation))
    }

    /// Tells one mapping from another, across restarts.
    pub fn fingerprint(&self) -> [u8; 32] {
        // Debug output of plain data is stable within a version, and a new version may read rows differently anyway.
        let mut hasher = Sha256::new();
        hasher.update(format!("{:?}", self.spec.tables));
        hasher.finalize().into()
    }
}

#[cfg(test)]
mod tests;
