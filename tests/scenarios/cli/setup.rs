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

const NOTHING_TO_DO: &str = "nothing to do: everything exists\n";

/// The client of PostgreSQL: beside its programs, or in the PATH.
pub(crate) fn psql() -> Command {
    let beside = Installation::find(None).unwrap_or_else(|error| panic!("{error}")).bin_dir().join("psql");
    let mut command = Command::new(if beside.exists() { beside } else { "psql".into() });
    command.kill_on_drop(true).env("LC_ALL", "C");
    command
}

/// Runs a script with psql, which stops at the first error.
async fn psql_runs(uri: &str, script: &str) {
    let mut psql = psql();
    psql.args(["--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1", uri]).stdin(Stdio::piped());
    let mut psql = psql.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("psql, which is needed here");
    psql.stdin.take().unwrap().write_all(script.as_bytes()).await.unwrap();
    let output = within("psql ends", psql.wait_with_output()).await.unwrap();
    assert!(output.status.success(), "{output:?}\n{script}");
}

/// The objects that setup creates.
pub(super) async fn things(sql: &Sql) -> String {
    sql.value(
        "SELECT format('%s slots, %s publications, %s schemas', (SELECT count(*) FROM pg_replication_slots), \
         (SELECT count(*) FROM pg_publication), (SELECT count(*) FROM pg_namespace WHERE nspname = 'tuplewatch'))",
    )
    .await
}

async fn leftovers(sql: &Sql) -> String {
    sql.value(
        "SELECT format('%s slots, %s publications, %s tuples', (SELECT count(*) FROM pg_replication_slots), \
         (SELECT count(*) FROM pg_publication), (SELECT count(*) FROM tuplewatch.relation_tuples))",
    )
    .await
}

#[tokio::test]
async fn setup_does_exactly_what_its_dry_run_prints() {
    let postgres = Postgres::start().await;
    let (sql, uri) = (postgres.sql().await, postgres.uri());
    let dry_run = ["setup", "--dry-run", "--database-uri", &uri];
    let script = tuplewatch(&dry_run).await.succeeded();
    assert_eq!(tuplewatch(&dry_run).await.succeeded(), script, "nothing was done");
    psql_runs(&uri, &script).await;
    assert_eq!(leftovers(&sql).await, "1 slots, 1 publications, 0 tuples");
    assert_eq!(tuplewatch(&["setup", "--database-uri", &uri]).await.succeeded(), NOTHING_TO_DO);
    assert_eq!(tuplewatch(&dry_run).await.succeeded(), format!("-- {NOTHING_TO_DO}"));

    // Only missing parts are created.
    sql.run("ALTER PUBLICATION tuplewatch DROP TABLE tuplewatch.attributes").await;
    let script = tuplewatch(&dry_run).await.succeeded();
    assert!(script.contains("ADD TABLE \"tuplewatch\".\"attributes\"") && !script.contains("CREATE"), "{script}");
    psql_runs(&uri, &script).await;
    assert_eq!(tuplewatch(&["setup", "--database-uri", &uri]).await.succeeded(), NOTHING_TO_DO);
}

#[tokio::test]
async fn setup_and_teardown_are_idempotent() {
    let postgres = Postgres::start().await;
    let (sql, uri) = (postgres.sql().await, postgres.uri());
    let (setup, teardown) = (["setup", "--database-uri", &uri], ["teardown", "--database-uri", &uri]);
    // Two at once: one of them does the work.
    let (one, other) = tokio::join!(tuplewatch(&setup), tuplewatch(&setup));
    let (one, other) = (one.succeeded(), other.succeeded());
    assert!([&one, &other].into_iter().any(|printed| printed == NOTHING_TO_DO), "{one}{other}");
    assert!(
        [&one, &other].into_iter().any(|printed| printed.ends_with("create replication slot tuplewatch ...\ndone\n"))
    );
    assert_eq!(tuplewatch(&setup).await.succeeded(), NOTHING_TO_DO);

    let mut server = Server::serve(&postgres, &[]).await;
    let mut stream = server.watch("t1", "").await;
    let in_use = "replication slot tuplewatch: is in use by process ";
    tuplewatch(&teardown).await.failed(&["nothing was changed", in_use, "SELECT pg_terminate_backend("]);
    tuplewatch(&["setup", "--recreate-slot", "--database-uri", &uri]).await.failed(&[in_use]);
    sql.insert("t1", "kept").await;
    stream.expect(Change::create(Change::viewer("kept"))).await;

    server.terminate().await;
    assert!(server.ended().await.success());
    let printed = tuplewatch(&teardown).await.succeeded();
    assert!(printed.contains("drop replication slot tuplewatch") && printed.ends_with("\ndone\n"), "{printed}");
    assert_eq!(leftovers(&sql).await, "0 slots, 0 publications, 1 tuples");
    let nothing = "nothing to do: neither slot nor publication exists\n";
    assert_eq!(tuplewatch(&teardown).await.succeeded(), nothing);

    // Setup works again after a teardown.
    tuplewatch(&setup).await.succeeded();
    assert_eq!(leftovers(&sql).await, "1 slots, 1 publications, 1 tuples");
}

#[tokio::test]
async fn setup_and_teardown_explain_their_failures() {
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
    sql.run("SELECT pg_create_physical_replication_slot('theirs')").await;
    for subcommand in ["setup", "teardown"] {
        tuplewatch(&[subcommand, "--database-uri", &uri, "--replication-slot", "theirs"])
            .await
            .failed(&["replication slot theirs: is a physical slot", "choose another name in replication.slot"]);
    }
    assert_eq!(things(&sql).await, "1 slots, 0 publications, 0 schemas", "the foreign slot is left alone");

    // The creation of a slot waits for open transactions. Setup names them, and can be interrupted.
    let holder = Sql::connect(&uri).await;
    holder.run("BEGIN; SELECT txid_current()").await;
    let directory = tempfile::tempdir().unwrap();
    let mut command = super::process::program(directory.path());
    command.args(["setup", "--database-uri", &uri]);
    let mut setup = Process::start(command);
    let pid = holder.value("SELECT pg_backend_pid()").await;
    setup.until_logged(&pid).await;
    // Not INT, which background processes of a shell may ignore.
    setup.signal("TERM");
    setup.ended().await;
    let mine = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'tuplewatch setup%'";
    crate::support::wait::eventually("it is gone", async || sql.value(mine).await == "0").await;
    holder.run("ROLLBACK").await;
    tuplewatch(&["setup", "--database-uri", &uri]).await.succeeded();
    assert_eq!(sql.value("SELECT count(*) FROM pg_replication_slots").await, "2");
}

/// Counts the inserts and the messages for tuplewatch in the slot.
async fn sent(sql: &Sql) -> String {
    sql.value(
        "SELECT format('%s rows, %s looks', count(*) FILTER (WHERE get_byte(data, 0) = ascii('I')), \
                       count(*) FILTER (WHERE get_byte(data, 0) = ascii('M') AND position('check'::bytea IN data) > 0)) \
           FROM pg_logical_slot_peek_binary_changes('tuplewatch', NULL, NULL, 'proto_version', '1', \
                                                    'publication_names', 'tuplewatch', 'messages', 'true')",
    )
    .await
}

const ATTRIBUTE: &str = "INSERT INTO tuplewatch.attributes VALUES ('t1', 'document', '1', 'public', \
                         '{\"@type\": \"type.googleapis.com/base.v1.BooleanValue\"}')";

/// PostgreSQL sends the rows of a transaction from after the table was added, and not those from before. So no transaction may have both.
#[tokio::test]
async fn setup_waits_for_writers_before_it_publishes_their_table() {
    let postgres = Postgres::with(&[("max_prepared_transactions", "5")]).await;
    let (sql, uri) = (postgres.sql().await, postgres.uri());
    let setup = ["setup", "--database-uri", &uri];
    tuplewatch(&setup).await.succeeded();
    let take_out = "ALTER PUBLICATION tuplewatch DROP TABLE tuplewatch.attributes";
    sql.run(take_out).await;
    let published = "SELECT count(*) FROM pg_publication_rel";

    // A writer of a table that is already published does not matter.
    let other = Sql::connect(&uri).await;
    other.run("BEGIN").await;
    other.insert("t1", "published").await;
    let writer = Sql::connect(&uri).await;
    writer.run(&format!("SET application_name = 'nightly'; BEGIN; {ATTRIBUTE}")).await;
    let pid = writer.value("SELECT pg_backend_pid()").await;
    let end = format!("SELECT pg_terminate_backend({pid})");
    let blocked = ["nothing was changed", "within 5 s", &format!("process {pid} (user postgres"), "nightly", &end];
    tuplewatch(&setup).await.failed(&blocked);
    assert_eq!(sql.value(published).await, "1");

    // A prepared transaction has locks and no session.
    writer.run("PREPARE TRANSACTION 'theirs'").await;
    tuplewatch(&setup).await.failed(&["nothing was changed", "prepared transaction 'theirs'", "ROLLBACK PREPARED"]);
    assert_eq!(sql.value(published).await, "1");
    writer.run("ROLLBACK PREPARED 'theirs'").await;

    // Setup waits for a transaction that ends in time.
    writer.run(&format!("BEGIN; {ATTRIBUTE}")).await;
    let directory = tempfile::tempdir().unwrap();
    let mut command = super::process::program(directory.path());
    command.args(setup);
    let mut waiting = Process::start(command);
    sql.until_waiting(1).await;
    writer.run("COMMIT").await;
    assert!(waiting.ended().await.success());
    assert_eq!(sql.value(published).await, "2");
    assert_eq!(tuplewatch(&setup).await.succeeded(), NOTHING_TO_DO);

    // Earlier rows are not sent, and later rows are, even of an older transaction.
    assert_eq!(sent(&sql).await, "0 rows, 1 looks");
    other.run("DELETE FROM tuplewatch.attributes").await;
    other.run(&format!("{ATTRIBUTE}; COMMIT")).await;
    assert_eq!(sent(&sql).await, "2 rows, 1 looks");
}

/// Sessions that are read-only by default write if they ask for it.
#[tokio::test]
async fn a_role_that_is_read_only_by_default_can_set_up() {
    let postgres = Postgres::start().await;
    let (sql, uri) = (postgres.sql().await, postgres.uri());
    sql.run("ALTER ROLE postgres SET default_transaction_read_only = on").await;
    tuplewatch(&["setup", "--database-uri", &uri]).await.succeeded();
    assert_eq!(tuplewatch(&["setup", "--database-uri", &uri]).await.succeeded(), NOTHING_TO_DO);
    tuplewatch(&["teardown", "--database-uri", &uri]).await.succeeded();
    assert_eq!(things(&sql).await, "0 slots, 0 publications, 1 schemas");
}
