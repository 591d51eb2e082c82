//! Facts of a tenant, and how they change: relation tuples and attributes.
//!
//! A change is encoded once, when its row is decoded, and stays in these bytes in memory, in the log and on the wire: see [`encoding`].
//! Whoever wants to know what is in them reads a [`ChangeView`].

mod encoding;

#[cfg(test)]
pub(crate) use encoding::tests::values;
pub use encoding::{ChangeView, Changes, FactView, ValueView, encode, envelope_bytes, split_first};

use std::fmt;
use std::sync::Arc;

/// A tenant's id. Cheap to clone; the bytes are PostgreSQL's text, at most [`TenantId::BYTES_MAX`] of them.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(Arc<str>);

/// The text cannot be a tenant id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TenantIdError {
    /// Nothing in it.
    #[error("the tenant id is empty")]
    Empty,
    /// Longer than the limit.
    #[error("the tenant id has {0} bytes; at most {max} are allowed", max = TenantId::BYTES_MAX)]
    TooLong(usize),
    /// A NUL byte, which PostgreSQL text cannot hold.
    #[error("the tenant id contains a NUL character")]
    Nul,
}

impl TenantId {
    /// Longest tenant id, in bytes.
    pub const BYTES_MAX: usize = 512;

    /// Takes any text that a `text` column can hold.
    ///
    /// # Errors
    /// Where it is empty, too long, or has a NUL.
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

/// What happened to a fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// It holds from now on.
    Create,
    /// It no longer holds.
    Delete,
}

/// A relation tuple: the subject has the relation to the entity. In the order of the `tuples` preset's primary key.
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

/// Type URLs of attribute values begin with this.
pub const TYPE_URL_PREFIX: &str = "type.googleapis.com/base.v1.";

impl AttributeValue {
    /// Name of the `base.v1` message that carries it; in JSON, too, its `@type`.
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

/// What a change is about.
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
