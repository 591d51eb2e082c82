//! What is different where a person reads the output, and how commands are written for people to paste.

use crate::model::diagnostic::shell_word;
use anstream::{AutoStream, ColorChoice};
use anstyle::AnsiColor::{Green, Red, Yellow};
use std::borrow::Cow;
use std::io::IsTerminal as _;

/// When output is coloured. `Auto` also knows NO_COLOR, CLICOLOR_FORCE and TERM=dumb.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Color {
    #[default]
    Auto,
    Always,
    Never,
}

impl Color {
    /// Decides for the whole process: what is printed, notices, and the log.
    pub(super) fn apply(self) {
        let choice = match self {
            Self::Auto => ColorChoice::Auto,
            Self::Always => ColorChoice::Always,
            Self::Never => ColorChoice::Never,
        };
        choice.write_global();
    }
}

/// Styles text for one stream, or leaves it as it is where the stream takes no colours.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    is_colored: bool,
}

impl Style {
    #[cfg(test)]
    pub(super) const PLAIN: Self = Self { is_colored: false };
    #[cfg(test)]
    pub(super) const COLORED: Self = Self { is_colored: true };

    pub(super) fn of_stdout() -> Self {
        Self { is_colored: AutoStream::choice(&std::io::stdout()) != ColorChoice::Never }
    }

    pub(super) fn of_stderr() -> Self {
        Self { is_colored: AutoStream::choice(&std::io::stderr()) != ColorChoice::Never }
    }

    fn with(self, style: anstyle::Style, text: &str) -> String {
        if self.is_colored { format!("{style}{text}{style:#}") } else { text.to_owned() }
    }

    /// What came to be.
    pub(super) fn created(self, text: &str) -> String {
        self.with(Green.on_default(), text)
    }

    /// What is gone.
    pub(super) fn deleted(self, text: &str) -> String {
        self.with(Red.on_default(), text)
    }

    /// What somebody should look at.
    pub(super) fn warning(self, text: &str) -> String {
        self.with(Yellow.on_default().bold(), text)
    }

    /// What does not work.
    pub(super) fn error(self, text: &str) -> String {
        self.with(Red.on_default().bold(), text)
    }

    /// What is there for those who look for it.
    pub(super) fn faint(self, text: &str) -> String {
        self.with(anstyle::Style::new().dimmed(), text)
    }

    /// What to see first: a command to paste.
    pub(super) fn strong(self, text: &str) -> String {
        self.with(anstyle::Style::new().bold(), text)
    }
}

/// Whether somebody reads along.
pub(super) fn stdout_is_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// How this program is called here: as it was, or through cargo where cargo runs it.
pub(super) fn program() -> String {
    let is_run_by_cargo = std::env::var("CARGO_PKG_NAME").is_ok_and(|name| name == env!("CARGO_PKG_NAME"));
    match std::env::args().next() {
        Some(name) if !is_run_by_cargo => shell_word(&name).into_owned(),
        _ => "cargo run --release --".to_owned(),
    }
}

/// Text from elsewhere, which must not steer the terminal or break a line.
pub(super) fn harmless(text: &str) -> Cow<'_, str> {
    if text.chars().any(char::is_control) {
        Cow::Owned(
            text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.into() }).collect(),
        )
    } else {
        Cow::Borrowed(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_cannot_control_the_terminal() {
        assert_eq!(harmless("größer"), "größer");
        assert_eq!(harmless("a\x1b[2J\nb"), r"a\u{1b}[2J\nb");
    }

    #[test]
    fn styles_end_where_the_text_does() {
        assert_eq!(Style::PLAIN.created("x"), "x");
        assert_eq!(Style::COLORED.created("x"), "\x1b[32mx\x1b[0m");
    }
}
