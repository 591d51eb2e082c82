//! The results of checks: severity, meaning, and remedy.
//!
//! `serve` refuses to start if there is an error; `doctor` shows all diagnostics. A fix can be pasted: a statement for
//! psql or a command for the shell, followed by a comment with the steps that it does not do (a restart, a reload). A
//! fix without a statement is a comment as a whole.

mod command_line;

pub use command_line::{Command, CommandLine};

use serde::Serialize;
use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

/// The severity of a diagnostic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Everything is in order.
    Ok,
    /// It works, but an operator should know.
    Warning,
    /// It does not work.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// The severity.
    pub severity: Severity,
    /// The checked object: a setting, a table, the slot, …
    pub subject: String,
    /// The finding. It continues the subject.
    pub what: String,
    /// The consequence, if `what` does not name it already.
    pub meaning: Option<&'static str>,
    /// The statement or command to run, with further steps as a comment.
    pub fix: Option<String>,
}

impl Diagnostic {
    /// A check that found everything in order.
    pub fn ok(subject: impl fmt::Display, what: impl Into<String>) -> Self {
        Self::new(Severity::Ok, subject, what)
    }

    /// A problem that an operator should know.
    pub fn warning(subject: impl fmt::Display, what: impl Into<String>) -> Self {
        Self::new(Severity::Warning, subject, what)
    }

    /// A problem that prevents operation.
    pub fn error(subject: impl fmt::Display, what: impl Into<String>) -> Self {
        Self::new(Severity::Error, subject, what)
    }

    fn new(severity: Severity, subject: impl fmt::Display, what: impl Into<String>) -> Self {
        Self { severity, subject: subject.to_string(), what: what.into(), meaning: None, fix: None }
    }

    /// Adds the consequence.
    #[must_use]
    pub const fn means(mut self, meaning: &'static str) -> Self {
        self.meaning = Some(meaning);
        self
    }

    /// Adds the remedy.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<8} {}: {}", self.severity, self.subject, self.what)?;
        if let Some(meaning) = self.meaning {
            write!(f, "\n         {meaning}")?;
        }
        if let Some(fix) = &self.fix {
            write!(f, "\n         fix: {fix}")?;
        }
        Ok(())
    }
}

/// A list of diagnostics under construction.
#[derive(Debug, Default)]
pub struct Report {
    diagnostics: Vec<Diagnostic>,
}

impl Report {
    /// Adds a diagnostic.
    pub fn add(&mut self, diagnostic: Diagnostic) {
        self.diagnostics.push(diagnostic);
    }

    /// Adds a check that found everything in order.
    pub fn ok(&mut self, subject: impl fmt::Display, what: impl Into<String>) {
        self.add(Diagnostic::ok(subject, what));
    }

    /// Adds a warning with its remedy.
    pub fn warning(&mut self, subject: impl fmt::Display, what: impl Into<String>, fix: impl Into<String>) {
        self.add(Diagnostic::warning(subject, what).fix(fix));
    }

    /// Adds an error with its remedy.
    pub fn error(&mut self, subject: impl fmt::Display, what: impl Into<String>, fix: impl Into<String>) {
        self.add(Diagnostic::error(subject, what).fix(fix));
    }

    /// The number of diagnostics.
    pub const fn count(&self) -> usize {
        self.diagnostics.len()
    }

    /// Whether all diagnostics after the first `count` are in order.
    pub fn is_fine_since(&self, count: usize) -> bool {
        self.diagnostics.iter().skip(count).all(|diagnostic| diagnostic.severity == Severity::Ok)
    }

    /// Whether any diagnostic is an error.
    pub fn has_errors(&self) -> bool {
        self.diagnostics.iter().any(|diagnostic| diagnostic.severity == Severity::Error)
    }

    /// Adds all of these diagnostics.
    pub fn extend(&mut self, diagnostics: Vec<Diagnostic>) {
        self.diagnostics.extend(diagnostics);
    }

    /// The diagnostics in the order in which they were added.
    pub fn into_diagnostics(self) -> Vec<Diagnostic> {
        self.diagnostics
    }
}

/// A number of bytes, displayed for people.
#[derive(Clone, Copy, Debug)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u32, &str); 3] = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
        // At least two digits, so that rounding does not distort the number much.
        match UNITS.iter().find(|(shift, _)| self.0 >> shift >= 10) {
            Some((shift, unit)) => write!(f, "{} {unit}", self.0 >> shift),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

/// A duration, displayed for people.
#[derive(Clone, Copy, Debug)]
pub struct Span(pub Duration);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u64, &str); 3] = [(86_400, "d"), (3_600, "h"), (60, "min")];
        let seconds = self.0.as_secs();
        match UNITS.iter().find(|(length, _)| seconds >= 3 * length) {
            Some((length, unit)) => write!(f, "{} {unit}", seconds / length),
            None if seconds >= 10 => write!(f, "{seconds} s"),
            None => write!(f, "{:.1} s", self.0.as_secs_f64()),
        }
    }
}

/// Quotes a word for a shell if needed.
pub fn shell_word(word: &str) -> Cow<'_, str> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=+@%,".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        Cow::Borrowed(word)
    } else {
        Cow::Owned(format!("'{}'", word.replace('\'', r"'\''")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_if_a_shell_would_change_them() {
        for (word, written) in [
            ("t1", "t1"),
            ("AQ+/x==", "AQ+/x=="),
            ("http://localhost:3478", "http://localhost:3478"),
            ("", "''"),
            ("a b", "'a b'"),
            ("$(x)", "'$(x)'"),
            ("it's", r"'it'\''s'"),
        ] {
            assert_eq!(shell_word(word), written);
        }
    }

    #[test]
    fn a_diagnostic_is_written_as_text() {
        let diagnostic = Diagnostic::error("slot s", "is lost").means("It is gone.").fix("tuplewatch setup");
        assert_eq!(
            diagnostic.to_string(),
            "error    slot s: is lost\n         It is gone.\n         fix: tuplewatch setup"
        );
        assert_eq!(Diagnostic::ok("wal_level", "logical").to_string(), "ok       wal_level: logical");
    }

    #[test]
    fn numbers_are_written_for_people() {
        for (bytes, text) in [(0, "0 bytes"), (10_239, "10239 bytes"), (10_240, "10 KiB"), (1 << 30, "1024 MiB")] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
        assert_eq!(Bytes(u64::MAX).to_string(), "17179869183 GiB");
        for (ms, text) in
            [(20, "0.0 s"), (1_500, "1.5 s"), (179_000, "179 s"), (180_000, "3 min"), (300_000_000, "3 d")]
        {
            assert_eq!(Span(Duration::from_millis(ms)).to_string(), text);
        }
    }
}
