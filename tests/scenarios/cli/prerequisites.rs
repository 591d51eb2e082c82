//! `serve` refuses to start without its prerequisites, and the remedies that it prints work.

use super::process::{Process, Ran, program, run, tuplewatch};
use crate::support::postgres::Postgres;
use crate::support::sql::Sql;
use std::path::Path;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::process::Command;
use tuplewatch::dev_postgres::StopMode;

/// `serve` on any port, with its log in the directory.
pub(crate) fn serve(uri: &str, directory: &Path) -> Command {
    let mut command = program(directory);
    command.args(["serve", "--database-uri", uri, "--changelog-path", "log", "--changelog-disk-reserve", "16MiB"]);
    command.args(["--server-host", "127.0.0.1", "--server-grpc-port", "0", "--server-http-port", "0"]);
    command
}

/// Runs a node that is refused, before it opens a log.
async fn refused(uri: &str, flags: &[&str]) -> Ran {
    let directory = tempfile::tempdir().unwrap();
    let mut command = serve(uri, directory.path());
    command.args(flags);
    run(command).await
}

/// A node starts and streams, with a new log.
async fn works(uri: &str) {
    let directory = tempfile::tempdir().unwrap();
    starts(uri, &directory).await;
}

async fn starts(uri: &str, directory: &TempDir) {
    let mut process = Process::start(serve(uri, directory.path()));
    process.reaches("streaming").await;
    process.signal("TERM");
    assert_eq!(process.ended().await.code(), Some(0));
}

/// The printed statements.
fn fixes(ran: &Ran) -> Vec<String> {
    ran.err.lines().filter_map(|line| line.trim().strip_prefix("fix: ").map(str::to_owned)).collect()
}

fn only_fix(ran: &Ran) -> String {
    let mut fixes = fixes(ran);
    assert_eq!(fixes.len(), 1, "{ran:?}");
    fixes.remove(0)
}

async fn slots(sql: &Sql) -> String {
    sql.value("SELECT COALESCE(string_agg(slot_name, ','), '') FROM pg_replication_slots").await
}

#[tokio::test]
async fn every_refusal_names_its_remedy() {
    let postgres = Postgres::start().await;
    let sql = postgres.sql().await;

    let ran = refused(&postgres.uri(), &[]).await;
    assert_eq!(slots(&sql).await, "", "nothing is created");
    ran.failed(&[
        "table tuplewatch.relation_tuples: does not exist",
        "table tuplewatch.attributes: does not exist",
        "table tuplewatch.tenants: does not exist",
        "publication tuplewatch: does not exist",
        "fix: tuplewatch setup",
    ]);

    refused(&postgres.uri_of("nowhere"), &[]).await.failed(&[
        "database \"nowhere\" does not exist (SQLSTATE 3D000)",
        "Create the database, or correct its name in database.uri",
    ]);
    let stranger = postgres.uri().replace("postgres@", "stranger@");
    refused(&stranger, &[])
        .await
        .failed(&["role \"stranger\" does not exist (SQLSTATE 28000)", "Check the user in database.uri"]);

    let setup = ["setup", "--database-uri", &postgres.uri()];
    tuplewatch(&setup).await.succeeded();
    sql.run("CREATE ROLE \"a reader\" LOGIN").await;
    let reader = postgres.uri().replace("postgres@", "a%20reader@");
    let ran = refused(&reader, &[]).await;
    for fix in fixes(&ran) {
        sql.run(&fix).await;
    }
    ran.failed(&[
        "role a reader: has no REPLICATION",
        "fix: ALTER ROLE \"a reader\" REPLICATION;",
        "fix: GRANT SELECT ON \"tuplewatch\".\"relation_tuples\" TO \"a reader\";",
    ]);
    works(&reader).await;

    for (breaking, expected) in [
        (
            "ALTER PUBLICATION tuplewatch DROP TABLE tuplewatch.attributes",
            "table tuplewatch.attributes: is not in publication tuplewatch",
        ),
        ("ALTER PUBLICATION tuplewatch SET (publish = 'insert')", "does not publish update, delete, truncate"),
        ("ALTER TABLE tuplewatch.attributes REPLICA IDENTITY DEFAULT", "the replica identity does not cover it"),
        ("REVOKE SELECT ON tuplewatch.tenants FROM \"a reader\"", "table tuplewatch.tenants: the role has no SELECT"),
    ] {
        sql.run(breaking).await;
        let ran = refused(&reader, &[]).await;
        for fix in fixes(&ran) {
            sql.run(&fix).await;
        }
        ran.failed(&[expected]);
        works(&reader).await;
    }
    sql.run("SELECT pg_drop_replication_slot('tuplewatch')").await;
    sql.run("SELECT pg_create_physical_replication_slot('tuplewatch')").await;
    refused(&reader, &[]).await.failed(&["is a physical slot", "choose another name in replication.slot"]);
}

/// The slot is older than the publication, which was dropped and created again, and reads from before it.
#[tokio::test]
async fn the_printed_remedy_repairs_a_dropped_publication() {
    let postgres = Postgres::start().await;
    let sql = postgres.sql().await;
    tuplewatch(&["setup", "--database-uri", &postgres.uri()]).await.succeeded();
    let directory = tempfile::tempdir().unwrap();
    starts(&postgres.uri(), &directory).await;
    sql.run("DROP PUBLICATION tuplewatch").await;
    sql.insert("t1", "unpublished").await;

    let ran = run(serve(&postgres.uri(), directory.path())).await;
    let fix = only_fix(&ran);
    ran.failed(&["publication tuplewatch: does not exist"]);
    // The obvious repair instead is followed by another remedy.
    sql.run("CREATE PUBLICATION tuplewatch FOR TABLE tuplewatch.relation_tuples, tuplewatch.attributes").await;
    let mut process = Process::start(serve(&postgres.uri(), directory.path()));
    if postgres.major() < 18 {
        process.reaches("nothing is read from PostgreSQL until this is repaired").await;
        process.until_logged("tuplewatch setup --recreate-slot").await;
    } else {
        // From 18 on the slot continues, and skips the rows that were written without a publication.
        process.until_logged("subscribers have to read their state anew").await;
        process.reaches("streaming").await;
    }
    process.signal("TERM");
    process.ended().await;
    let (program, _) = fix.split_once("  # ").unwrap_or((&fix, ""));
    // The remedy has the options of serve.
    tuplewatch(&program.split(' ').skip(1).collect::<Vec<_>>()).await.succeeded();
    starts(&postgres.uri(), &directory).await;
}

#[tokio::test]
async fn a_changed_wal_level_needs_a_restart() {
    let mut postgres = Postgres::with(&[("wal_level", "replica")]).await;
    let sql = postgres.sql().await;
    tuplewatch(&["setup", "--database-uri", &postgres.uri()])
        .await
        .failed(&["nothing was changed", "wal_level: is replica"]);
    sql.run(include_str!("../../../sql/0001_tables.sql")).await;
    sql.run("CREATE PUBLICATION tuplewatch FOR TABLE tuplewatch.relation_tuples, tuplewatch.attributes").await;
    let ran = refused(&postgres.uri(), &[]).await;
    assert_eq!(slots(&sql).await, "");
    let fix = only_fix(&ran);
    assert_eq!(
        fix, "ALTER SYSTEM SET wal_level = logical;  -- then restart PostgreSQL: a reload is not enough",
        "{ran:?}"
    );
    ran.failed(&["wal_level: is replica"]);

    sql.run(&fix).await;
    sql.run("SELECT pg_reload_conf()").await;
    let pending = "(SELECT pending_restart FROM pg_settings WHERE name = 'wal_level')";
    crate::support::wait::eventually("the reload is seen", async || sql.is_true(pending).await).await;
    refused(&postgres.uri(), &[]).await.failed(&["another value stands in the configuration and waits for a restart"]);
    drop(sql);
    postgres.stop(StopMode::Fast).await;
    postgres.start_again().await;
    tuplewatch(&["setup", "--database-uri", &postgres.uri()]).await.succeeded();
    works(&postgres.uri()).await;
}

#[tokio::test]
async fn local_obstacles_are_named_and_leave_the_slot_free() {
    let postgres = Postgres::start().await;
    let sql = postgres.sql().await;
    tuplewatch(&["setup", "--database-uri", &postgres.uri()]).await.succeeded();

    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = taken.local_addr().unwrap().port();
    let directory = tempfile::tempdir().unwrap();
    let mut command = program(directory.path());
    command.args(["serve", "--database-uri", &postgres.uri(), "--server-host", "127.0.0.1", "--server-grpc-port"]);
    command.arg(port.to_string());
    run(command).await.failed(&[
        &format!("cannot listen on 127.0.0.1:{port} for gRPC: Address already in use (os error "),
        " (server.host, server.grpc.port)\n",
    ]);
    let mut command = program(directory.path());
    command.args(["serve", "--database-uri", &postgres.uri(), "--changelog-path", "/dev/null/log"]);
    run({
        command.args(["--server-grpc-port", "0", "--server-http-port", "0"]);
        command
    })
    .await
    .failed(&["the change log at /dev/null/log cannot be opened: Not a directory (os error 20)\n"]);

    let pem = directory.path().join("nonsense.pem");
    std::fs::write(&pem, "nonsense").unwrap();
    for listener in ["grpc", "http"] {
        let flag = |name: &str| format!("--server-{listener}-tls-{name}");
        let (section, enabled, key) = (format!("server.{listener}.tls"), flag("enabled"), flag("key"));
        let unreadable = format!("cannot read nowhere.pem ({section}");
        for (cert, expected) in [("nowhere.pem", unreadable.as_str()), (pem.to_str().unwrap(), section.as_str())] {
            let tls = [enabled.as_str(), "true", &flag("cert"), cert, &key, cert];
            // Also without a server, before anything else uses TLS.
            for uri in [&postgres.uri(), "postgres://u@127.0.0.1:1/d"] {
                refused(uri, &tls).await.failed(&[expected]);
            }
        }
    }
    let confirmed = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'tuplewatch' AND NOT active";
    assert_eq!(sql.value(confirmed).await, "1", "the slot is free for the next attempt");
    works(&postgres.uri()).await;
}

/// The soft limit at the start is often 1024, and the hard limit much larger.
#[tokio::test]
async fn the_limit_of_open_files_is_raised() {
    let postgres = Postgres::start().await;
    let directory = tempfile::tempdir().unwrap();
    let uri = postgres.uri();
    tuplewatch(&["setup", "--database-uri", &uri]).await.succeeded();
    let serve = serve(&uri, directory.path());
    let mut shell = Command::new("/bin/sh");
    shell.env_clear().current_dir(directory.path()).kill_on_drop(true);
    shell.args(["-c", "ulimit -Sn 512 && ulimit -Hn 700 && exec \"$0\" \"$@\""]);
    shell.arg(serve.as_std().get_program()).args(serve.as_std().get_args());
    let mut process = Process::start(shell);
    process.reaches("the limit of open files is 700: at most 222 connections of gRPC").await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", process.id())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(files.split_whitespace().nth(3), Some("700"), "{files}");
}
