//! YAML files: the configuration and mappings.
//!
//! [`parse`] makes a tree of [`Value`]s, which the configuration reads key by key. [`from_str`] makes a type of serde out of such a
//! tree, for a mapping. Errors name the line of bad YAML, and the key of a bad value (`tables[0].tenant`).
//!
//! The parser recurses once for each level of nesting. It bounds flow style itself; text from outside that may be nested in
//! blocks without end has to be bounded before.

mod deserialize;

use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fmt;
use yaml_rust2::{ScanError, Yaml, YamlLoader};

/// Keys and their values.
pub type Section = BTreeMap<String, Value>;

/// What stands at a key, or in a list.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Value {
    Null,
    Boolean(bool),
    Integer(i64),
    /// Also an integer that is too large.
    Fraction(f64),
    Text(String),
    List(Vec<Value>),
    Section(Section),
}

/// Why a text is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No YAML. The message ends with the line and the column.
    #[error(transparent)]
    Malformed(#[from] ScanError),
    /// Several documents, with `---` between them.
    #[error("got {0} YAML documents, expected 1")]
    Documents(usize),
    /// A key that is a list, a section or nothing.
    #[error("a key must be a text, a number or a boolean")]
    Key,
    /// A text or a list in the place of everything.
    #[error("invalid type: {0}, expected keys with values")]
    NotSections(&'static str),
    /// A value that does not fit where it is.
    #[error("{message}{}", at(path))]
    Value {
        /// What is wrong.
        message: String,
        /// The key; empty for the whole text.
        path: String,
    },
}

fn at(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!(" for key `{path}`") }
}

/// The sections of a text. None where the text is empty.
///
/// # Errors
/// Where it is no YAML, or holds something else.
pub fn parse(text: &str) -> Result<Section, Error> {
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

/// What a text says, as a `T`. Where a `T` has a text, numbers and booleans are taken too, and where it has a boolean, `yes`, `no`,
/// `on`, `off`, 1 and 0.
///
/// # Errors
/// Where it is no YAML, or no `T`.
pub fn from_str<T: DeserializeOwned>(text: &str) -> Result<T, Error> {
    T::deserialize(Value::Section(parse(text)?))
}

impl Value {
    /// In words, for messages.
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
        // Loops and no iterators: these are the frames of the recursion.
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
    /// As much as a message needs.
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
