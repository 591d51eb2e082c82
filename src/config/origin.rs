//! The origin of a value, and the name of its key in that source.

use std::fmt;
use std::path::PathBuf;

/// The prefix of every environment variable of tuplewatch.
pub(super) const VARIABLE_PREFIX: &str = "TUPLEWATCH_";

/// The source that a value was taken from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    Default,
    File(PathBuf),
    /// The name of the variable.
    Environment(String),
    /// The flag with its dashes.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", one_line(&path.to_string_lossy())),
            Self::Environment(variable) => {
                write!(f, "environment variable {}", one_line(variable))
            }
            Self::Flag(flag) => write!(f, "flag {}", one_line(flag)),
        }
    }
}

/// A key, printed as its source spells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Name {
    pub(super) key: String,
    pub(super) origin: Origin,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = one_line(&self.key);
        match &self.origin {
            Origin::Default => write!(f, "`{key}` (not set)"),
            Origin::File(_) => write!(f, "`{key}` in {}", self.origin),
            Origin::Environment(_) | Origin::Flag(_) => write!(f, "{}", self.origin),
        }
    }
}

/// The environment variable that sets `key`.
pub(super) fn variable(key: &str) -> String {
    format!("{VARIABLE_PREFIX}{}", key.replace('.', "__").to_ascii_uppercase())
}

/// The flag that sets `key`.
pub(super) fn flag(key: &str) -> String {
    format!("--{}", key.replace(['.', '_'], "-"))
}

/// Escapes control characters, so that a foreign text stays within its line in an error list or a comment.
pub(super) fn one_line(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escaped = c.is_control().then(|| c.escape_default());
            let plain = (!c.is_control()).then_some(c);
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}
