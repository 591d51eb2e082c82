//! What goes into the commands of messages of the file and the flags that were given.

use std::path::Path;

use super::database_uri::DatabaseUri;
use super::origin::flag;
use crate::model::diagnostic::CommandLine;

/// The keys in whose values there may be a secret, beside the URI, of which only the password is one.
const SECRET: [&str; 1] = ["authn.preshared.keys"];

/// What the environment sets is there for the next command too, so that it is only the file and the flags.
pub(super) fn of(file: Option<&Path>, overrides: &[(String, String)]) -> CommandLine {
    let mut commands = CommandLine::default();
    if let Some(file) = file {
        commands.push("--config", file.display().to_string());
    }
    for (key, value) in overrides {
        if key == "database.uri" {
            let uri = DatabaseUri::new(value);
            let shown = uri.without_password();
            if shown != *value {
                commands.leave_out("its password is left out here: put it into PGPASSWORD");
            }
            commands.push(flag(key), shown);
        } else if SECRET.contains(&key.as_str()) {
            commands.leave_out("secrets are left out here");
        } else {
            commands.push(flag(key), value);
        }
    }
    commands
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_repeats_the_given_options_without_secrets() {
        let given = |key: &str, value: &str| {
            of(Some(Path::new("t.yaml")), &[(key.to_owned(), value.to_owned())]).serve().to_string()
        };
        let with = |rest: &str| format!("tuplewatch serve --config t.yaml{rest}");
        assert_eq!(given("replication.slot", "s"), with(" --replication-slot s"));
        assert_eq!(given("database.uri", "postgres://u@h/db"), with(" --database-uri postgres://u@h/db"));
        let hint = " (its password is left out here: put it into PGPASSWORD)";
        assert_eq!(
            given("database.uri", "postgres://u:secret@h/db"),
            with(&format!(" --database-uri postgres://u@h/db{hint}"))
        );
        assert_eq!(given("authn.preshared.keys", "secret"), with(" (secrets are left out here)"));
    }
}
