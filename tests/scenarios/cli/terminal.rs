//! Colours and layout: on a terminal, into a pipe, and as one asks for it.

use super::process::{Process, program};
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::wait::eventually;
use tokio::process::Command;

/// `watch` of t1, with nothing in the environment that says something of colours.
fn watch(server: &Server, flags: &[&str]) -> Command {
    let mut command = program(&std::env::temp_dir());
    for name in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "CI"] {
        command.env_remove(name);
    }
    command.env("TERM", "xterm");
    command
        .args(["watch", "--tenant", "t1", "--server", server.endpoint().uri().to_string().trim_end_matches('/')])
        .args(flags);
    command
}

/// The same command on a terminal, which `script` makes.
fn on_terminal(command: &Command) -> Command {
    let command = command.as_std();
    let words: Vec<&str> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(|word| word.to_str().unwrap()).collect();
    let mut script = Command::new("script");
    if cfg!(target_os = "linux") {
        script.args(["-q", "-e", "-c", &words.join(" "), "/dev/null"]);
    } else {
        script.args(["-q", "/dev/null"]).args(words);
    }
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => script.env(name, value),
            None => script.env_remove(name),
        };
    }
    script.stdin(std::process::Stdio::null()).kill_on_drop(true);
    script
}

const GREEN: &str = "\x1b[32m";

#[tokio::test]
async fn colours_are_for_terminals() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;

    let mut plain_terminal = on_terminal(&watch(&server, &[]));
    plain_terminal.env("NO_COLOR", "1");
    let mut forced = watch(&server, &["--color", "always"]);
    forced.env("NO_COLOR", "1");
    // What has colours, and what is laid out for a person.
    let runs = [
        ("a pipe", watch(&server, &[]), false, false),
        ("a pipe, --color always", forced, true, false),
        ("a terminal", on_terminal(&watch(&server, &[])), true, true),
        ("a terminal, NO_COLOR", plain_terminal, false, true),
        ("a terminal, --color never", on_terminal(&watch(&server, &["--color", "never"])), false, true),
    ];
    let runs =
        runs.map(|(what, command, is_colored, is_terminal)| (what, Process::start(command), is_colored, is_terminal));
    for (what, process, ..) in &runs {
        // On a terminal both streams are one.
        let said = || [process.printed(), process.complained()].concat();
        let has_begun = async || said().iter().any(|line| line.contains("watching tenant t1 on "));
        eventually(&format!("the watch into {what} has begun"), has_begun).await;
    }
    sql.run(
        "BEGIN; INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'document', '1', 'viewer', 'user', 'ada', '');
         INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'document', '2', 'viewer', 'user', 'ada', ''); COMMIT",
    )
    .await;
    for (what, process, is_colored, is_terminal) in &runs {
        let is_last = |line: &String| line.contains("document:2#viewer");
        eventually(&format!("it is shown in {what}"), async || process.printed().iter().any(is_last)).await;
        let printed = process.printed();
        let shown = printed.iter().find(|line| is_last(line)).unwrap();
        assert_eq!(shown.contains(GREEN), *is_colored, "{what}: {shown:?}");
        let all = printed.join("\n");
        assert_eq!(all.contains('\x1b'), *is_colored, "{what}: {all:?}");
        let columns = "document:2#viewer       @user:ada";
        assert_eq!(shown.contains(columns), *is_terminal, "{what}: {shown:?}");
        // The second change of a message is under the first.
        assert_eq!(shown.contains("Z + document") || shown.contains("Z\x1b[0m"), !is_terminal, "{what}: {shown:?}");
        assert_eq!(printed.iter().any(|line| line.contains(" (UTC)")), *is_terminal, "{what}: {printed:?}");
    }
}
