//! `tuplewatch doctor`: prints problems, their effects and their fixes.

use super::overrides::ConfigArgs;
use super::terminal::{Style, harmless};
use super::{examples, say};
use crate::app::diagnosis::{Diagnosis, diagnose};
use crate::model::diagnostic::{Diagnostic, Severity};
use std::fmt::Write as _;
use std::time::Duration;

#[derive(Debug, clap::Args)]
#[command(after_help = examples::DOCTOR)]
pub(super) struct DoctorArgs {
    /// Print one JSON document: server, diagnostics, summary
    #[arg(long)]
    json: bool,
    /// Report transactions that have been open for longer than this
    #[arg(long, default_value = "5m", value_name = "DURATION", value_parser = humantime::parse_duration)]
    long_transaction: Duration,
}

/// Whether any diagnostic is an error.
pub(super) enum Verdict {
    NoErrors,
    Errors,
}

pub(super) async fn run(config: &ConfigArgs, args: &DoctorArgs) -> anyhow::Result<Verdict> {
    let config = config.load()?;
    config.require_database_uri()?;
    let diagnosis = diagnose(&config, args.long_transaction).await?;
    if args.json {
        say(&serde_json::to_string_pretty(&diagnosis)?);
    } else {
        say(&text(&diagnosis, Layout::of_stdout()));
    }
    Ok(if diagnosis.summary.error == 0 { Verdict::NoErrors } else { Verdict::Errors })
}

/// The layout of the text.
#[derive(Clone, Copy)]
struct Layout {
    style: Style,
    /// The line width in columns; `None` if the output is not a terminal. A fix is never broken, so that it can be
    /// pasted.
    width: Option<usize>,
}

/// Longer lines are hard to read, even on a wide terminal.
const WIDTH_MAX: usize = 140;

impl Layout {
    fn of_stdout() -> Self {
        let columns = rustix::termios::tcgetwinsize(std::io::stdout()).map_or(0, |size| usize::from(size.ws_col));
        Self { style: Style::of_stdout(), width: (columns > 0).then(|| columns.min(WIDTH_MAX)) }
    }

    fn severity(self, severity: Severity, text: &str) -> String {
        match severity {
            Severity::Ok => self.style.created(text),
            Severity::Warning => self.style.warning(text),
            Severity::Error => self.style.error(text),
        }
    }
}

/// The columns before the subject.
const MARGIN: usize = 9;
/// A longer subject pushes its line to the right.
const SUBJECT_MAX: usize = 34;
/// If less room than this remains beside the subject, the text continues below the subject.
const COLUMN_MIN: usize = 40;

/// Writes the worst diagnostics last, directly above the prompt.
fn text(diagnosis: &Diagnosis, layout: Layout) -> String {
    let mut diagnostics: Vec<&Diagnostic> = diagnosis.diagnostics.iter().collect();
    diagnostics.sort_by_key(|diagnostic| diagnostic.severity);
    let lengths = diagnostics.iter().map(|diagnostic| diagnostic.subject.chars().count());
    let column = lengths.filter(|length| *length <= SUBJECT_MAX).max().unwrap_or_default();
    let mut out = format!("{}\n\n", layout.style.strong(&diagnosis.server));
    for diagnostic in diagnostics {
        write_diagnostic(diagnostic, column, layout, &mut out);
    }
    let summary = diagnosis.summary;
    let count = |number: usize, word: &str| format!("{number} {word}{}", if number == 1 { "" } else { "s" });
    let verdict = match (summary.error, summary.warning) {
        (0, 0) => "all is well",
        (0, _) => "tuplewatch serve works",
        _ => "tuplewatch serve does not work until the errors are repaired",
    };
    let worst = diagnosis.diagnostics.iter().map(|diagnostic| diagnostic.severity).max().unwrap_or(Severity::Ok);
    let counts = format!("{}, {}, {} ok", count(summary.error, "error"), count(summary.warning, "warning"), summary.ok);
    let _ = write!(out, "\n{}: {verdict}", layout.severity(worst, &counts));
    out
}

fn write_diagnostic(diagnostic: &Diagnostic, column: usize, layout: Layout, out: &mut String) {
    let severity = layout.severity(diagnostic.severity, &format!("{:<8}", diagnostic.severity));
    let subject = format!("{:<column$}", harmless(&diagnostic.subject));
    let begin = MARGIN + subject.chars().count() + 2;
    let room = |indent: usize| layout.width.map_or(usize::MAX, |width| width.saturating_sub(indent));
    let indent = if room(begin) < COLUMN_MIN { MARGIN } else { begin };
    let what = wrap(&harmless(&diagnostic.what), room(begin), room(indent)).join(&format!("\n{:indent$}", ""));
    let _ = writeln!(out, "{severity} {subject}  {what}");
    for line in diagnostic.meaning.map(|meaning| wrap(meaning, room(MARGIN), room(MARGIN))).unwrap_or_default() {
        let _ = writeln!(out, "{:MARGIN$}{}", "", layout.style.faint(&line));
    }
    if let Some(fix) = &diagnostic.fix {
        let _ = writeln!(out, "{:MARGIN$}fix: {}", "", layout.style.strong(&harmless(fix)));
    }
}

/// Breaks `text` at spaces into lines of at most `first` and then `rest` characters. A longer word gets a line of its
/// own.
fn wrap(text: &str, first: usize, rest: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let room = if lines.len() == 1 { first } else { rest };
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.chars().count() + 1 + word.chars().count() <= room => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::app::diagnosis::Summary;

    fn diagnosis() -> Diagnosis {
        let diagnostics = vec![
            Diagnostic::error("slot s", "is lost (a long reason that has to be broken)")
                .means("It is gone.")
                .fix("tuplewatch setup --recreate-slot"),
            Diagnostic::ok("wal_level", "logical"),
        ];
        Diagnosis { server: "db:5432".into(), diagnostics, summary: Summary { error: 1, warning: 0, ok: 1 } }
    }

    #[test]
    fn the_worst_diagnostic_is_last() {
        let plain = text(&diagnosis(), Layout { style: Style::PLAIN, width: None });
        let expected = "\
db:5432

ok       wal_level  logical
error    slot s     is lost (a long reason that has to be broken)
         It is gone.
         fix: tuplewatch setup --recreate-slot

1 error, 0 warnings, 1 ok: tuplewatch serve does not work until the errors are repaired";
        assert_eq!(plain, expected);
    }

    #[test]
    fn text_is_wrapped_and_coloured_on_a_terminal() {
        let broken = text(&diagnosis(), Layout { style: Style::COLORED, width: Some(62) });
        assert!(
            broken.contains("\u{1b}[1m\u{1b}[31merror   \u{1b}[0m slot s     is lost (a long reason that has to be\n"),
            "{broken}"
        );
        assert!(broken.contains(&format!("\n{:20}broken)\n", "")), "{broken}");
        // The terminal is too narrow for a second column, and the fix stays whole.
        let narrow = text(&diagnosis(), Layout { style: Style::PLAIN, width: Some(40) });
        assert!(narrow.contains("\n         reason that has to be broken)\n"), "{narrow}");
        assert!(narrow.contains("fix: tuplewatch setup --recreate-slot\n"), "{narrow}");
    }

    #[test]
    fn a_diagnosis_is_written_as_json() {
        let json = serde_json::to_value(diagnosis()).unwrap();
        let expected = serde_json::json!({
            "server": "db:5432",
            "diagnostics": [
                {"severity": "error", "subject": "slot s", "what": "is lost (a long reason that has to be broken)",
                 "meaning": "It is gone.", "fix": "tuplewatch setup --recreate-slot"},
                {"severity": "ok", "subject": "wal_level", "what": "logical", "meaning": null, "fix": null},
            ],
            "summary": {"error": 1, "warning": 0, "ok": 1},
        });
        assert_eq!(json, expected);
    }
}
