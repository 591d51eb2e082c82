//! Commands in messages, with the options of this process, so that they can be pasted.

use super::shell_word;
use std::fmt;

/// The options of this process that its other subcommands take too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    /// Pairs of a flag and its value.
    options: Vec<(String, String)>,
    /// How to pass a secret that was left out.
    left_out: Option<&'static str>,
}

/// The options that `setup` reads.
const FOR_SETUP: [&str; 4] = ["--config", "--database-", "--mapping-", "--replication-"];
/// The options that `serve` reads: all.
const FOR_SERVE: [&str; 1] = ["--"];

impl CommandLine {
    /// Adds an option.
    pub fn push(&mut self, flag: impl Into<String>, value: impl Into<String>) {
        self.options.push((flag.into(), value.into()));
    }

    /// Notes that a secret was left out. `instead` tells how to pass it.
    pub const fn leave_out(&mut self, instead: &'static str) {
        self.left_out = Some(instead);
    }

    /// `tuplewatch setup`.
    pub fn setup(&self) -> Command {
        self.command("setup", &FOR_SETUP)
    }

    /// `tuplewatch setup --recreate-slot`.
    pub fn recreate_slot(&self) -> Command {
        self.command("setup --recreate-slot", &FOR_SETUP)
    }

    /// `tuplewatch serve`.
    pub fn serve(&self) -> Command {
        self.command("serve", &FOR_SERVE)
    }

    /// `tuplewatch serve --reset-log`.
    pub fn reset_log(&self) -> Command {
        self.command("serve --reset-log", &FOR_SERVE)
    }

    fn command(&self, subcommand: &str, takes: &[&str]) -> Command {
        let mut line = format!("tuplewatch {subcommand}");
        let taken = self.options.iter().filter(|(flag, _)| takes.iter().any(|prefix| flag.starts_with(prefix)));
        for (flag, value) in taken {
            line = format!("{line} {flag} {}", shell_word(value));
        }
        Command { line, left_out: self.left_out }
    }
}

/// A command, for a message or a fix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    line: String,
    left_out: Option<&'static str>,
}

impl Command {
    /// The command as a fix, with a shell comment.
    pub fn fix(&self, comment: &str) -> String {
        match self.left_out {
            Some(left_out) => format!("{}  # {left_out}; {comment}", self.line),
            None => format!("{}  # {comment}", self.line),
        }
    }
}

impl fmt::Display for Command {
    /// The command within a sentence.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line)?;
        self.left_out.map_or(Ok(()), |left_out| write!(f, " ({left_out})"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_printed_with_the_options_they_accept() {
        let mut commands = CommandLine::default();
        assert_eq!(commands.setup().to_string(), "tuplewatch setup");
        assert_eq!(commands.reset_log().fix("why"), "tuplewatch serve --reset-log  # why");
        for (flag, value) in [
            ("--config", "my setup.yaml"),
            ("--database-uri", "postgres://u@h/db"),
            ("--replication-slot", "s"),
            ("--changelog-path", "log"),
        ] {
            commands.push(flag, value);
        }
        let setup = "--config 'my setup.yaml' --database-uri postgres://u@h/db --replication-slot s";
        assert_eq!(commands.setup().to_string(), format!("tuplewatch setup {setup}"));
        assert_eq!(commands.serve().to_string(), format!("tuplewatch serve {setup} --changelog-path log"));
        commands.leave_out("the password is left out");
        assert_eq!(
            commands.recreate_slot().fix("why"),
            format!("tuplewatch setup --recreate-slot {setup}  # the password is left out; why")
        );
        assert_eq!(
            commands.recreate_slot().to_string(),
            format!("tuplewatch setup --recreate-slot {setup} (the password is left out)")
        );
    }
}
