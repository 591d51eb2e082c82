//! `setup` and `teardown`.

use super::process::{Process, tuplewatch};
use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::wait::within;
use std::process::Stdio;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tuplewatch::dev_postgres::Installation;

const NOTHING_TO_DO: &str = "nothing to do: everything is there\n";

/// The client of PostgreSQL: beside its programs, or in the PATH.
pub(crate) fn psql() -> Command {
    let beside = Installation::find(None).unwrap_or_else(|error| panic!("{error}")).bin_dir().join("psql");
    let mut command = Command::new(if beside.exists() { beside } else { "psql".into() });
    command.kill_on_drop(true).env("LC_ALL", "C");
    command
}

/// Has psql run a script, which stops at the first error.
async fn psql_runs(uri: &str, script: &str) {
    let mut psql = psql();
    psql.args(["--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1", uri]).stdin(Stdio::piped());
    let mut psql = psql.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("psql, which is needed here");
    psql.stdin.take().unwrap().write_all(script.as_bytes()).await.unwrap();
    let output = within("psql ends", psql.wait_with_output()).await.unwrap();
    assert!(output.status.success(), "{output:?}\n{script}");
}

async fn leftovers(sql: &Sql) -> String {
    sql.value(
        "SELECT format('%s slots, %s publications, %s tuples', (SELECT count(*) FROM pg_replication_slots), \
         (SELECT count(*) FROM pg_publication), (SELECT count(*) FROM tuplewatch.relation_tuples))",
    )
    .await
}

#[tokio::test]
async fn what_setup_prints_is_what_it_does() {
    let postgres = Postgres::start().await;
    let (sql, uri) = (postgres.sql().await, postgres.uri());
    let dry_run = ["setup", "--dry-run", "--database-uri", &uri];
    let script = tuplewatch(&dry_run).await.succeeded();
    assert_eq!(tuplewatch(&dry_run).await.succeeded(), script, "nothing was done");
    psql_runs(&uri, &script).await;
    assert_eq!(leftovers(&sql).await, "1 slots, 1 publications, 0 tuples");
    assert_eq!(tuplewatch(&["setup", "--database-uri", &uri]).await.succeeded(), NOTHING_TO_DO);
    assert_eq!(tuplewatch(&dry_run).await.succeeded(), format!("-- {NOTHING_TO_DO}"));

    // What is missing, and no more.
    sql.run("ALTER PUBLICATION tuplewatch DROP TABLE tuplewatch.attributes").await;
    let script = tuplewatch(&dry_run).await.succeeded();
    assert!(script.contains("ADD TABLE \"tuplewatch\".\"attributes\"") && !script.contains("CREATE"), "{script}");
    psql_runs(&uri, &script).await;
    assert_eq!(tuplewatch(&["setup", "--database-uri", &uri]).await.succeeded(), NOTHING_TO_DO);
}

#[tokio::test]
async fn setup_is_done_once_and_undone_once() {
    let postgres = Postgres::start().await;
    let (sql, uri) = (postgres.sql().await, postgres.uri());
    let (setup, teardown) = (["setup", "--database-uri", &uri], ["teardown", "--database-uri", &uri]);
    // Two at once: one of them does it.
    let (one, other) = tokio::join!(tuplewatch(&setup), tuplewatch(&setup));
    let (one, other) = (one.succeeded(), other.succeeded());
    assert!([&one, &other].into_iter().any(|said| said == NOTHING_TO_DO), "{one}{other}");
    assert!([&one, &other].into_iter().any(|said| said.ends_with("create replication slot tuplewatch ...\ndone\n")));
    assert_eq!(tuplewatch(&setup).await.succeeded(), NOTHING_TO_DO);

    let mut server = Server::serve(&postgres, &[]).await;
    let mut stream = server.watch("t1", "").await;
    let in_use = "replication slot tuplewatch is in use by process ";
    tuplewatch(&teardown).await.failed(&[in_use, "Stop what uses it", "and try again"]);
    tuplewatch(&["setup", "--recreate-slot", "--database-uri", &uri]).await.failed(&[in_use]);
    sql.insert("t1", "kept").await;
    stream.expect(Change::create(Change::viewer("kept"))).await;

    server.terminate().await;
    assert!(server.ended().await.success());
    let said = tuplewatch(&teardown).await.succeeded();
    assert!(said.contains("drop replication slot tuplewatch") && said.ends_with("\ndone\n"), "{said}");
    assert_eq!(leftovers(&sql).await, "0 slots, 0 publications, 1 tuples");
    let nothing = "nothing to do: neither slot nor publication is there\n";
    assert_eq!(tuplewatch(&teardown).await.succeeded(), nothing);

    // A trial that is taken up again.
    tuplewatch(&setup).await.succeeded();
    assert_eq!(leftovers(&sql).await, "1 slots, 1 publications, 1 tuples");
}

#[tokio::test]
async fn what_setup_cannot_do_it_says() {
    let postgres = Postgres::start().await;
    let (sql, uri) = (postgres.sql().await, postgres.uri());
    for subcommand in ["setup", "teardown"] {
        tuplewatch(&[subcommand, "--database-uri", &postgres.uri_of("nowhere")])
            .await
            .failed(&["database \"nowhere\" does not exist", "Create the database, or correct its name"]);
        tuplewatch(&[subcommand, "--database-uri", "postgres://u@127.0.0.1:1/d"])
            .await
            .failed(&["Connection refused", "check host and port in database.uri"]);
    }
    sql.run("CREATE ROLE powerless LOGIN").await;
    let powerless = uri.replace("postgres@", "powerless@");
    tuplewatch(&["setup", "--database-uri", &powerless]).await.failed(&[
        "could not apply 0001_tables.sql: permission denied",
        "Run setup as the owner of the tables who may also create in the database and has REPLICATION, or as a superuser",
    ]);
    sql.run("SELECT pg_create_physical_replication_slot('theirs')").await;
    for subcommand in ["setup", "teardown"] {
        tuplewatch(&[subcommand, "--database-uri", &uri, "--replication-slot", "theirs"])
            .await
            .failed(&["replication slot theirs is not tuplewatch's", "choose another name in replication.slot"]);
    }
    assert_eq!(sql.value("SELECT count(*) FROM pg_replication_slots").await, "1", "theirs is left alone");

    // A slot waits for the transactions that are open; who holds it up is said, and it can be given up.
    let holder = Sql::connect(&uri).await;
    holder.run("BEGIN; SELECT txid_current()").await;
    let directory = tempfile::tempdir().unwrap();
    let mut command = super::process::program(directory.path());
    command.args(["setup", "--database-uri", &uri]);
    let mut setup = Process::start(command);
    let pid = holder.value("SELECT pg_backend_pid()").await;
    setup.complains(&pid).await;
    // Not INT, which a shell has ignored by what it starts in the background.
    setup.signal("TERM");
    setup.ended().await;
    let mine = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'tuplewatch setup%'";
    crate::support::wait::eventually("it is gone", async || sql.value(mine).await == "0").await;
    holder.run("ROLLBACK").await;
    tuplewatch(&["setup", "--database-uri", &uri]).await.succeeded();
    assert_eq!(sql.value("SELECT count(*) FROM pg_replication_slots").await, "2");
}
