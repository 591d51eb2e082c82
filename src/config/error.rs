//! The errors of a configuration, collected into one list.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::origin::{Name, flag, one_line, variable};
use crate::yaml;

/// Ten times the size of a complete configuration with a comment at every key.
pub(super) const FILE_BYTES_MAX: usize = 64 * 1024;

/// Nested blocks start in ever later columns, except for a list directly below its key. So a line that starts in column
/// n is nested at most 2n deep. The deepest key of the configuration is on level 4. The parser itself limits flow style
/// (`[[…]]`).
pub(super) const INDENT_MAX: usize = 64;

/// Aliases of aliases multiply the text. Four aliases can only multiply it by a small factor.
pub(super) const ALIASES_MAX: usize = 4;

/// All errors of a configuration: a headline, then one line for each problem.
#[derive(Debug)]
pub struct Error {
    problems: Vec<Problem>,
}

/// One line of the list.
#[derive(Debug, thiserror::Error)]
pub(super) enum Problem {
    #[error("cannot read file {}: {source}", one_line(&path.to_string_lossy()))]
    Unreadable { path: PathBuf, source: io::Error },

    #[error("file {}: {fault}", one_line(&path.to_string_lossy()))]
    BadFile { path: PathBuf, fault: FileFault },

    #[error("{name}: keys are nested, not dotted: write each part on its own line below its parent")]
    Dotted { name: Name },

    #[error("{name} is a section: it takes keys below it, not a value")]
    SectionWithValue { name: Name },

    #[error("{name}: unknown{}", did_you_mean(suggestion.as_deref()))]
    Unknown { name: Name, suggestion: Option<String> },

    #[error("{name} is {found}: must be {allowed}")]
    Invalid { name: Name, found: String, allowed: String },

    #[error("{}: {rule}", join(names))]
    Contradiction { names: Vec<Name>, rule: &'static str },

    #[error("{name}: is not valid UTF-8")]
    NotUnicode { name: Name },

    #[error(
        "`{key}` is required: set it in the configuration file, with the environment variable {}, or with the flag {}",
        variable(key),
        flag(key)
    )]
    Missing { key: &'static str },
}

/// The reason why a file as a whole is not a configuration.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileFault {
    #[error("larger than {FILE_BYTES_MAX} bytes: this is not a configuration file")]
    TooLarge,

    #[error("line {line}: is not valid UTF-8")]
    NotUnicode { line: usize },

    #[error("line {line}: indented by more than {INDENT_MAX} columns")]
    TooDeep { line: usize },

    #[error("line {line}: more than {ALIASES_MAX} YAML aliases (`*name`)")]
    TooManyAliases { line: usize },

    #[error("must hold sections such as `server:` at its top level")]
    NotSections,

    /// The message of the parser ends with the line and the column.
    #[error("{}", one_line(&.0.to_string()))]
    Malformed(yaml::Error),
}

impl Error {
    /// Succeeds if there are no problems.
    pub(super) fn check(problems: Vec<Problem>) -> Result<(), Self> {
        if problems.is_empty() { Ok(()) } else { Err(Self { problems }) }
    }
}

impl From<Problem> for Error {
    fn from(problem: Problem) -> Self {
        Self { problems: vec![problem] }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.problems.len() {
            1 => f.write_str("the configuration has an error:")?,
            count => write!(f, "the configuration has {count} errors:")?,
        }
        self.problems.iter().try_for_each(|problem| write!(f, "\n  - {problem}"))
    }
}

impl std::error::Error for Error {}

fn did_you_mean(suggestion: Option<&str>) -> String {
    suggestion.map_or_else(String::new, |name| format!("; did you mean {name}?"))
}

fn join(names: &[Name]) -> String {
    let names: Vec<String> = names.iter().map(Name::to_string).collect();
    names.join(" and ")
}
