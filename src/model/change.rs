//! Changes of facts: relation tuples and attributes of a tenant.
//!
//! A change is encoded once, when its row is decoded. Memory, log and wire all hold these bytes: see [`encoding`]. To
//! look into them, read a [`ChangeView`].

mod encoding;

#[cfg(test)]
pub(crate) use encoding::tests::values;
pub use encoding::{ChangeView, Changes, FactView, ValueView, encode, envelope_bytes, split_first};

use std::fmt;
use std::sync::Arc;

/// The id of a tenant: a PostgreSQL text of at most [`TenantId::BYTES_MAX`] bytes. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(Arc<str>);

/// The reason why a text cannot be a tenant id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TenantIdError {
    /// The text is empty.
    #[error("the tenant id is empty")]
    Empty,
    /// The text is longer than the limit.
    #[error("the tenant id has {0} bytes; at most {max} are allowed", max = TenantId::BYTES_MAX)]
    TooLong(usize),
    /// The text has a NUL byte, which PostgreSQL's text type cannot contain.
    #[error("the tenant id contains a NUL character")]
    Nul,
}

impl TenantId {
    /// The longest tenant id, in bytes.
    pub const BYTES_MAX: usize = 512;

    /// Accepts any text that a `text` column can contain.
    ///
    /// # Errors
    /// The text is empty, too long, or contains a NUL.
    pub fn new(text: &str) -> Result<Self, TenantIdError> {
        match text.len() {
            0 => Err(TenantIdError::Empty),
            n if n > Self::BYTES_MAX => Err(TenantIdError::TooLong(n)),
            _ if text.contains('\0') => Err(TenantIdError::Nul),
            _ => Ok(Self(text.into())),
        }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::borrow::Borrow<str> for TenantId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The kind of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// The fact begins to hold.
    Create,
    /// The fact ceases to hold.
    Delete,
}

/// A relation tuple: the subject has the relation to the entity. Ordered as the primary key of the preset `tuples`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the fields are the words of the model")]
pub struct Tuple<'a> {
    pub entity_type: &'a str,
    pub entity_id: &'a str,
    pub relation: &'a str,
    pub subject_type: &'a str,
    pub subject_id: &'a str,
    /// Empty for a direct subject.
    pub subject_relation: &'a str,
}

/// An attribute of an entity.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the fields are the words of the model")]
pub struct Attribute<'a> {
    pub entity_type: &'a str,
    pub entity_id: &'a str,
    pub attribute: &'a str,
    pub value: AttributeValue,
}

/// The value of an attribute. The kinds are those of `base.v1.*Value`, and of `tuplewatch.v1.Value`.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the variants are the kinds' names")]
pub enum AttributeValue {
    String(String),
    Integer(i32),
    Double(f64),
    Boolean(bool),
    StringArray(Vec<String>),
    IntegerArray(Vec<i32>),
    DoubleArray(Vec<f64>),
    BooleanArray(Vec<bool>),
}

/// The prefix of the type URLs of attribute values.
pub const TYPE_URL_PREFIX: &str = "type.googleapis.com/base.v1.";

impl AttributeValue {
    /// The name of the `base.v1` message for the value, which is also its `@type` in JSON.
    pub const fn message_name(&self) -> &'static str {
        match self {
            Self::String(_) => "StringValue",
            Self::Integer(_) => "IntegerValue",
            Self::Double(_) => "DoubleValue",
            Self::Boolean(_) => "BooleanValue",
            Self::StringArray(_) => "StringArrayValue",
            Self::IntegerArray(_) => "IntegerArrayValue",
            Self::DoubleArray(_) => "DoubleArrayValue",
            Self::BooleanArray(_) => "BooleanArrayValue",
        }
    }
}

/// The content of a change.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the variants are their contents")]
pub enum Fact<'a> {
    Tuple(Tuple<'a>),
    Attribute(Attribute<'a>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_tenant_ids_are_refused() {
        assert!(TenantId::new("t1").is_ok());
        assert_eq!(TenantId::new(""), Err(TenantIdError::Empty));
        assert_eq!(TenantId::new("a\0b"), Err(TenantIdError::Nul));
        assert_eq!(TenantId::new(&"x".repeat(513)), Err(TenantIdError::TooLong(513)));
    }
}
