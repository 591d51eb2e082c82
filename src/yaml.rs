//! YAML files: the configuration and mappings.
//!
//! [`parse`] makes a tree of [`Value`]s, which the configuration reads key by key. [`from_str`] turns such a tree into
//! a type of serde, for a mapping. Errors name the line of malformed YAML, and the key of a wrong value
//! (`tables[0].tenant`).
//!
//! The parser recurses once for each level of nesting. It limits the nesting of flow style itself, but not of blocks. A
//! caller that reads untrusted text has to limit that before.

mod deserialize;

use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fmt;
use yaml_rust2::{ScanError, Yaml, YamlLoader};

/// Keys and their values.
pub(crate) type Section = BTreeMap<String, Value>;

/// The value of a key, or an item of a list.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Null,
    Boolean(bool),
    Integer(i64),
    /// Also an integer that exceeds 64 bits.
    Fraction(f64),
    Text(String),
    List(Vec<Value>),
    Section(Section),
}

/// The reason why a text was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The text is not YAML. The message ends with the line and the column.
    #[error(transparent)]
    Malformed(#[from] ScanError),
    /// The text has several documents, separated by `---`.
    #[error("got {0} YAML documents, expected 1")]
    Documents(usize),
    /// A key is a list, a section or null.
    #[error("a key must be a text, a number or a boolean")]
    Key,
    /// The text has no sections at its top level.
    #[error("invalid type: {0}, expected keys with values")]
    NotSections(&'static str),
    /// A value has the wrong type.
    #[error("{message}{}", at(path))]
    Value {
        /// The problem in words.
        message: String,
        /// The path of the value; empty for the whole text.
        path: String,
    },
}

fn at(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!(" for key `{path}`") }
}

/// Parses a text into its sections. An empty text has none.
///
/// # Errors
/// The text is not YAML, or has no sections at its top level.
pub(crate) fn parse(text: &str) -> Result<Section, Error> {
    let mut documents = YamlLoader::load_from_str(text)?;
    let document = documents.pop();
    match document.map(value) {
        _ if !documents.is_empty() => Err(Error::Documents(documents.len() + 1)),
        None => Ok(Section::new()),
        Some(Ok(Value::Section(section))) => Ok(section),
        Some(Ok(other)) => Err(Error::NotSections(other.kind())),
        Some(Err(error)) => Err(error),
    }
}

/// Parses a text into a `T`. A string field also accepts numbers and booleans. A boolean field also accepts `yes`,
/// `no`, `on`, `off`, 1 and 0.
///
/// # Errors
/// The text is not YAML, or does not fit `T`.
pub fn from_str<T: DeserializeOwned>(text: &str) -> Result<T, Error> {
    T::deserialize(Value::Section(parse(text)?))
}

impl Value {
    /// The type of the value in words, for messages.
    const fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Boolean(_) => "a boolean",
            Self::Integer(_) => "a number",
            Self::Fraction(_) => "a fraction",
            Self::Text(_) => "a text",
            Self::List(_) => "a list",
            Self::Section(_) => "a section",
        }
    }
}

fn value(yaml: Yaml) -> Result<Value, Error> {
    Ok(match yaml {
        Yaml::Boolean(value) => Value::Boolean(value),
        Yaml::Integer(number) => Value::Integer(number),
        Yaml::Real(_) => Value::Fraction(yaml.as_f64().unwrap_or(f64::NAN)),
        Yaml::String(text) => Value::Text(text),
        // Loops instead of iterator chains, because each level of nesting adds the stack frames between two calls.
        Yaml::Array(items) => {
            let mut list = Vec::with_capacity(items.len());
            for item in items {
                list.push(value(item)?);
            }
            Value::List(list)
        }
        Yaml::Hash(entries) => {
            let mut section = Section::new();
            for (key, item) in entries {
                section.insert(text(key)?, value(item)?);
            }
            Value::Section(section)
        }
        Yaml::Null | Yaml::BadValue | Yaml::Alias(_) => Value::Null,
    })
}

fn text(key: Yaml) -> Result<String, Error> {
    match key {
        Yaml::String(text) | Yaml::Real(text) => Ok(text),
        Yaml::Integer(number) => Ok(number.to_string()),
        Yaml::Boolean(value) => Ok(value.to_string()),
        _ => Err(Error::Key),
    }
}

impl fmt::Display for Value {
    /// The type, and the value if it is a scalar.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Boolean(value) => write!(f, "boolean `{value}`"),
            Self::Integer(number) => write!(f, "number `{number}`"),
            Self::Fraction(number) => write!(f, "fraction `{number}`"),
            Self::Text(text) => write!(f, "text {text:?}"),
            Self::Null | Self::List(_) | Self::Section(_) => f.write_str(self.kind()),
        }
    }
}
