//! `logger.format: json`: every line of the standard error is JSON, up to the last one.

use super::process::{Ran, program, run};
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use serde_json::Value as Json;
use tokio::process::Command;

/// The run ended with this code, all its lines are JSON, and the last one is an error with this text.
fn ends(ran: &Ran, code: i32, expected: &str) {
    assert_eq!(ran.code, Some(code), "{ran:?}");
    let lines: Vec<Json> = ran
        .err
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    let last = lines.last().unwrap_or_else(|| panic!("{ran:?}"));
    assert_eq!(last["level"], "ERROR", "{ran:?}");
    assert!(last["message"].as_str().unwrap().contains(expected), "{ran:?}");
}

fn command(arguments: &[&str]) -> Command {
    let mut command = program(&std::env::temp_dir());
    command.args(arguments);
    command
}

#[tokio::test]
async fn the_final_error_is_json() {
    let json = ["--logger-format", "json"];
    let nowhere = ["--database-uri", "postgres://u@127.0.0.1:1/d"];
    for (arguments, code, expected) in [
        (&["serve"][..], 2, "`database.uri` is required"),
        (&["serve", "--server-grpc-port", "high"], 2, "must be a whole number"),
        (&["serve", "--config", "nowhere.yaml"], 2, "cannot read file nowhere.yaml"),
        (
            &["serve", "--database-uri", "postgres://u@127.0.0.1:1/d", "--mapping-file", "nowhere.yaml"],
            2,
            "cannot read mapping",
        ),
        (&["serve", "--database-uri", "http://h/d"], 2, "database.uri cannot be used"),
        (&["config", "--server-grpc-port", "high"], 2, "must be a whole number"),
        (&["doctor"], 2, "`database.uri` is required"),
        (&["dev", "--database-uri", "postgres://u@h/d"], 2, "dev starts its own PostgreSQL"),
    ] {
        ends(&run(command(&[arguments, &json].concat())).await, code, expected);
    }
    for subcommand in ["setup", "teardown"] {
        ends(&run(command(&[&[subcommand], &json[..], &nowhere].concat())).await, 1, "Connection refused");
    }
}

#[tokio::test]
async fn the_log_format_is_honoured_despite_other_mistakes() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("server.yaml");
    std::fs::write(&file, "logger: {format: json}\nsever: {port: 1}\n").unwrap();
    ends(&run(command(&["serve", "--config", file.to_str().unwrap()])).await, 2, "did you mean `server`?");

    let mut from_environment = command(&["serve", "--server-grpc-port", "high"]);
    from_environment.env("TUPLEWATCH_LOGGER__FORMAT", "json").env("TUPLEWATCH_SEVER__PORT", "1");
    ends(&run(from_environment).await, 2, "the configuration has 2 errors");

    // The text format stays text, and so do errors of the command line.
    let text = run(command(&["serve", "--logger-format", "text"])).await;
    assert!(text.err.starts_with("tuplewatch: the configuration has an error"), "{text:?}");
    let usage = run(command(&["serve", "--logger-format", "json", "--no-such-flag"])).await;
    assert!(usage.err.starts_with("error: unexpected argument"), "{usage:?}");
}

/// There are not enough descriptors for a runtime, so this fails before everything else.
#[tokio::test]
async fn a_failure_before_the_runtime_is_json() {
    for (format, begins) in [("json", "{"), ("text", "tuplewatch: cannot start: ")] {
        let mut shell = Command::new("sh");
        shell.args(["-c", "ulimit -n 4; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_tuplewatch"), "serve"]);
        let ran = run({
            shell.args(["--logger-format", format, "--database-uri", "postgres://u@h/d"]);
            shell
        })
        .await;
        assert_eq!(ran.code, Some(1), "{ran:?}");
        assert!(ran.err.starts_with(begins) && ran.err.contains("cannot start: Too many open files"), "{ran:?}");
        if format == "json" {
            ends(&ran, 1, "cannot start: Too many open files");
        }
    }
}

/// A used port, and a change log that cannot be created: these fail after logging has begun.
#[tokio::test]
async fn a_failed_start_ends_with_json() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let (uri, port) = (postgres.uri(), server.address().port().to_string());
    let serve = ["serve", "--logger-format", "json", "--database-uri", &uri, "--server-host", "127.0.0.1"];
    let ran = run(command(&[&serve[..], &["--server-grpc-port", &port]].concat())).await;
    ends(&ran, 1, "cannot listen on 127.0.0.1:");

    let free = ["--server-grpc-port", "0", "--server-http-port", "0", "--changelog-path", "/dev/null/log"];
    ends(&run(command(&[&serve[..], &free].concat())).await, 1, "/dev/null/log");
}
