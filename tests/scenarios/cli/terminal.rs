//! Behaviour on a terminal: colours, layout, and Ctrl-C.

use super::prerequisites::serve;
use super::process::{CTRL_C, Process, address_in, on_terminal, program};
use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::stream::{Stream, reason};
use crate::support::wait::{eventually, within};
use tokio::process::Command;
use tonic::Code;
use tonic::transport::Endpoint;

/// `watch` of t1, without variables about colours in its environment.
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

const GREEN: &str = "\x1b[32m";

#[tokio::test]
async fn only_terminals_get_colours() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;

    let mut plain_terminal = on_terminal(&watch(&server, &[]));
    plain_terminal.env("NO_COLOR", "1");
    let mut forced = watch(&server, &["--color", "always"]);
    forced.env("NO_COLOR", "1");
    // Each with whether it has colours, and whether it has the layout for people.
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
        // On a terminal both outputs are one.
        let output = || [process.printed(), process.logged()].concat();
        let has_begun = async || output().iter().any(|line| line.contains("watching tenant t1 on "));
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

/// The process ends when any part of it ends, so no part may end because of a terminal. `dev` has its own scenario.
#[tokio::test]
async fn serve_runs_on_a_terminal_until_ctrl_c_is_typed() {
    let postgres = Postgres::start().await;
    drop(Server::prepare(&postgres, &[]).await);
    let directory = tempfile::tempdir().unwrap();
    let mut command = serve(&postgres.uri(), directory.path());
    command.args(["--color", "never"]);
    let mut process = Process::start(on_terminal(&command));
    process.reaches_on_terminal("streaming").await;
    process.reaches_on_terminal("gRPC is listening").await;
    let printed = process.printed();
    let address = address_in(printed.iter().find(|line| line.contains("gRPC is listening")).unwrap());
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();

    let sql = postgres.sql().await;
    let mut stream = within("a stream", Stream::open(&endpoint, "t1", "")).await.unwrap();
    sql.insert("t1", "a").await;
    stream.expect(Change::created("a")).await;
    process.types(CTRL_C).await;
    let (_, status) = stream.ending().await;
    assert_eq!(reason(&status), (Code::Unavailable, "SHUTTING_DOWN".into()));
    assert_eq!(process.ended().await.code(), Some(0));
}
