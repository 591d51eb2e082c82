//! Against real PostgreSQL.

use super::*;
use crate::model::diagnostic::Severity;
use crate::postgres::publication::fingerprint;
use crate::postgres::requirements::{Expectation, check};
use crate::postgres::slot::AckDelay;
use crate::postgres::test_postgres::{Database, mapping, one_table, plain, tuples};

fn silent(_: Event<'_>) {}

fn wanted<'a>(mapping: &'a Mapping, slot: &'a str) -> Setup<'a> {
    let (apply_schema, recreate_slot, failover) = (false, false, true);
    Setup { mapping, slot, publication: "Feed", apply_schema, recreate_slot, failover, commands: plain() }
}

/// The last step, for a tuplewatch that may be running.
const LOOK: &str = "notify a running tuplewatch";

fn explanations(steps: &[Step]) -> Vec<&str> {
    steps.iter().map(|step| step.explanation.as_str()).collect()
}

fn expectation<'a>(mapping: &'a Mapping, slot: &'a str) -> Expectation<'a> {
    let ack_delay = AckDelay::default();
    Expectation { mapping, slot, publication: "Feed", slot_expected: true, ack_delay, commands: plain() }
}

#[tokio::test]
async fn setup_then_nothing_to_do_then_teardown() {
    let database = Database::new().await;
    let client = &database.connection.client;
    let mapping = tuples();
    let setup = Setup { apply_schema: true, ..wanted(&mapping, &database.name) };
    let create_slot = format!("create replication slot {}", database.name);
    let all = ["apply 0001_tables.sql", "apply 0002_snap_token.sql", "create publication Feed", create_slot.as_str()];
    let planned = setup.plan(client).await.unwrap();
    assert_eq!(explanations(&planned), all);
    assert_eq!(planned.iter().map(Step::is_transactional).collect::<Vec<_>>(), [true, true, true, false]);

    let mut seen = Vec::new();
    let mut on_event = |event: Event<'_>| {
        if let Event::Step(step) = event {
            seen.push(step.explanation.clone());
        }
    };
    let done = setup.apply(&database.connection, &mut on_event).await.unwrap();
    assert_eq!(explanations(&done), all);
    assert_eq!(seen, all);
    assert_eq!(setup.plan(client).await.unwrap(), []);
    assert_eq!(setup.apply(&database.connection, &mut silent).await.unwrap(), []);
    let diagnostics = check(client, &expectation(&mapping, &database.name)).await.unwrap();
    assert!(diagnostics.iter().all(|diagnostic| diagnostic.severity != Severity::Error), "{diagnostics:#?}");

    database.execute("INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'd', '1', 'r', 'u', '2')").await;
    let teardown = Teardown { slot: &database.name, publication: "Feed" };
    let drop_slot = format!("drop replication slot {}", database.name);
    let done = teardown.apply(&database.connection, &mut silent).await.unwrap();
    assert_eq!(explanations(&done), [drop_slot.as_str(), "drop publication Feed"]);
    assert_eq!(teardown.apply(&database.connection, &mut silent).await.unwrap(), []);
    let sql = "SELECT count(*) FROM tuplewatch.relation_tuples";
    assert_eq!(client.query_typed_one(sql, &[]).await.unwrap().get::<_, i64>(0), 1);
}

#[tokio::test]
async fn the_plan_is_sql_that_can_be_run_by_hand() {
    let database = Database::new().await;
    let mapping = tuples();
    let setup = Setup { apply_schema: true, ..wanted(&mapping, &database.name) };
    let steps = setup.plan(&database.connection.client).await.unwrap();
    // psql sends one statement after the other, which matters for the slot.
    let (definitions, rest) = steps.split_at(steps.len() - 1);
    database.execute(&Script(definitions).to_string()).await;
    database.execute(&Script(rest).to_string()).await;
    assert_eq!(setup.plan(&database.connection.client).await.unwrap(), []);
    Teardown { slot: &database.name, publication: "Feed" }.apply(&database.connection, &mut silent).await.unwrap();
}

#[tokio::test]
async fn setup_creates_only_missing_parts() {
    let database = Database::new().await;
    let client = &database.connection.client;
    let mapping = one_table("Odd \"Schema\".it's");
    let setup = wanted(&mapping, &database.name);
    let missing = setup.plan(client).await.unwrap_err().to_string();
    assert!(missing.contains("Odd \"Schema\".it's"), "{missing}");

    // A table without a key, and a publication of another table.
    let sql = r#"CREATE SCHEMA "Odd ""Schema"""; CREATE TABLE other (n int);
                 CREATE TABLE "Odd ""Schema"""."it's" (tenant text, id text, owner text) PARTITION BY LIST (tenant);
                 CREATE TABLE p1 PARTITION OF "Odd ""Schema"""."it's" FOR VALUES IN ('t1');
                 CREATE PUBLICATION "Feed" FOR TABLE other WITH (publish = 'insert')"#;
    database.execute(sql).await;
    let create_slot = format!("create replication slot {}", database.name);
    let expected = [
        "make old rows of Odd \"Schema\".it's complete in the WAL",
        "make old rows of public.p1 complete in the WAL",
        "make publication Feed publish all operations",
        "add tables to publication Feed",
        create_slot.as_str(),
    ];
    let done = setup.apply(&database.connection, &mut silent).await.unwrap();
    assert_eq!(explanations(&done), expected);
    assert_eq!(setup.plan(client).await.unwrap(), []);
    let diagnostics = check(client, &expectation(&mapping, &database.name)).await.unwrap();
    assert!(diagnostics.iter().all(|diagnostic| diagnostic.severity != Severity::Error), "{diagnostics:#?}");

    // A new partition has its own default identity.
    database.execute(r#"CREATE TABLE p2 PARTITION OF "Odd ""Schema"""."it's" FOR VALUES IN ('t2')"#).await;
    let steps = setup.plan(client).await.unwrap();
    assert_eq!(explanations(&steps), ["make old rows of public.p2 complete in the WAL", LOOK]);
    setup.apply(&database.connection, &mut silent).await.unwrap();

    // The slot is older than a publication that would be created now.
    database.execute("DROP PUBLICATION \"Feed\"").await;
    let error = setup.plan(client).await.unwrap_err().to_string();
    assert!(error.contains("is older than a new publication would be") && error.contains("--recreate-slot"), "{error}");
    let again = Setup { recreate_slot: true, ..setup };
    let drop_slot = format!("drop replication slot {}", database.name);
    let done = again.apply(&database.connection, &mut silent).await.unwrap();
    assert_eq!(explanations(&done), ["create publication Feed", drop_slot.as_str(), create_slot.as_str()]);

    // A table in use: the run gives up, names the transaction, and leaves nothing half done.
    database.execute("ALTER TABLE p1 REPLICA IDENTITY DEFAULT").await;
    let other = database.connect_as("postgres").await;
    other.client.batch_execute("BEGIN; LOCK TABLE p1 IN ROW EXCLUSIVE MODE").await.unwrap();
    let pid: i32 = other.client.query_typed_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let error = setup.apply(&database.connection, &mut silent).await.unwrap_err().to_string();
    assert!(error.contains("nothing was changed") && error.contains("Run this again"), "{error}");
    assert!(error.contains(&format!("SELECT pg_terminate_backend({pid})")), "{error}");
    other.client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(setup.apply(&database.connection, &mut silent).await.unwrap().len(), 2);
    Teardown { slot: &database.name, publication: "Feed" }.apply(&database.connection, &mut silent).await.unwrap();
}

/// Its old rows are not needed. But without an identity PostgreSQL would refuse to delete from a published table.
#[tokio::test]
async fn a_table_of_transactions_needs_some_identity() {
    let database = Database::new().await;
    let client = &database.connection.client;
    let mapping = mapping(r#"{"tables": [{"table": "public.t", "tenant": "tenant", "transaction": true}]}"#);
    let setup = wanted(&mapping, &database.name);
    database.execute("CREATE TABLE t (id int, tenant text NOT NULL)").await;
    let first = setup.plan(client).await.unwrap().remove(0);
    assert_eq!(first.explanation, "make old rows of public.t complete in the WAL");
    database.execute("ALTER TABLE t ADD PRIMARY KEY (id); CREATE PUBLICATION \"Feed\" FOR TABLE t").await;
    let create_slot = format!("create replication slot {}", database.name);
    assert_eq!(explanations(&setup.plan(client).await.unwrap()), [create_slot.as_str()]);
    // A different identity does not change the published columns.
    let published = async || fingerprint(client, "Feed", &mapping).await.unwrap().fingerprint;
    let before = published().await;
    database.execute("ALTER TABLE t REPLICA IDENTITY FULL").await;
    assert_eq!(published().await, before);
}

#[tokio::test]
async fn foreign_slots_and_slots_in_use_are_left_alone() {
    let database = Database::new().await;
    let other = Database::new().await;
    let client = &database.connection.client;
    let sql = "CREATE TABLE t (tenant text, id text, owner text, PRIMARY KEY (tenant, id, owner))";
    database.execute(sql).await;
    let mapping = one_table("public.t");
    let setup = Setup { recreate_slot: true, ..wanted(&mapping, &database.name) };
    let teardown = Teardown { slot: &database.name, publication: "Feed" };
    let remove = format!("SELECT pg_drop_replication_slot('{}')", database.name);
    for (create, expected) in [
        (format!("SELECT pg_create_physical_replication_slot('{}')", database.name), "is a physical slot"),
        (format!("SELECT pg_create_logical_replication_slot('{}', 'pgoutput')", database.name), &*other.name),
    ] {
        other.execute(&create).await;
        for error in [setup.plan(client).await.unwrap_err(), teardown.plan(client).await.unwrap_err()] {
            let error = error.to_string();
            assert!(error.contains("nothing was changed") && error.contains(expected), "{error}");
        }
        other.execute(&remove).await;
    }

    setup.apply(&database.connection, &mut silent).await.unwrap();
    let mut replication = database.connection.endpoint().replicate("tests").await.unwrap();
    replication.start(&database.name, "Feed").await.unwrap();
    for error in [setup.plan(client).await.unwrap_err(), teardown.plan(client).await.unwrap_err()] {
        let error = error.to_string();
        assert!(error.contains("is in use by process") && error.contains("pg_terminate_backend("), "{error}");
        assert!(error.contains("tests") && error.contains("postgres"), "{error}");
    }
    drop(replication);
    let mut removed = teardown.apply(&database.connection, &mut silent).await;
    while matches!(removed, Err(Error::InTheWay(_))) {
        tokio::time::sleep(Duration::from_millis(20)).await;
        removed = teardown.apply(&database.connection, &mut silent).await;
    }
    assert_eq!(removed.unwrap().len(), 2);
}

#[tokio::test]
async fn two_concurrent_runs_and_one_without_rights() {
    let database = Database::new().await;
    let mapping = tuples();
    let setup = Setup { apply_schema: true, ..wanted(&mapping, &database.name) };
    let second = database.connect_as("postgres").await;
    let (mut first_silent, mut second_silent) = (silent, silent);
    let (one, two) =
        tokio::join!(setup.apply(&database.connection, &mut first_silent), setup.apply(&second, &mut second_silent));
    assert_eq!(one.unwrap().len() + two.unwrap().len(), 4);

    let role = format!("r{}", database.name);
    database.execute(&format!("CREATE ROLE {role} LOGIN; ALTER PUBLICATION \"Feed\" SET (publish = 'insert')")).await;
    let poor = database.connect_as(&role).await;
    let error = Setup { apply_schema: false, ..setup }.apply(&poor, &mut silent).await.unwrap_err().to_string();
    assert!(error.contains("publication Feed: belongs to role postgres"), "{error}");
    let error = Teardown { slot: &database.name, publication: "Feed" }.apply(&poor, &mut silent).await.unwrap_err();
    assert!(error.to_string().contains("may not drop it"), "{error}");
    Teardown { slot: &database.name, publication: "Feed" }.apply(&database.connection, &mut silent).await.unwrap();
}

#[tokio::test]
async fn a_wait_for_old_transactions_is_reported() {
    let database = Database::new().await;
    let old = database.connect_as("postgres").await;
    old.client.batch_execute("BEGIN; CREATE TABLE t (n int)").await.unwrap();
    let (sender, mut waits) = tokio::sync::mpsc::unbounded_channel();
    let name = database.name.clone();
    let sql = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{name}'");

    // This run is dropped, and soon nothing is left of it.
    let connection = database.connect_as("postgres").await;
    let mut hook = |waiting: &Waiting| sender.send(waiting.clone()).unwrap();
    tokio::select! {
        created = create_slot(&connection, &name, true, &mut hook) => panic!("{created:?} while a transaction is open"),
        waiting = waits.recv() => {
            let message = waiting.unwrap().to_string();
            assert!(message.contains("older than") && message.contains(&format!("database {name}")), "{message}");
        }
    }
    drop(connection);
    while database.connection.client.query_typed_one(&sql, &[]).await.unwrap().get::<_, i64>(0) != 0 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    // This run waits.
    let release = async {
        waits.recv().await.unwrap();
        old.client.batch_execute("COMMIT").await.unwrap();
    };
    let (created, ()) = tokio::join!(create_slot(&database.connection, &name, true, &mut hook), release);
    assert!(created.unwrap() > crate::model::lsn::Lsn::ZERO);
    Teardown { slot: &name, publication: "none" }.apply(&database.connection, &mut silent).await.unwrap();
}
