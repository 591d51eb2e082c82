//! Concurrent writers: deadlocks, serialization failures, locks, and contention.

use super::{Api, refusal, subjects};
use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::wait::{eventually, within};
use crate::support::writer::seed;
use std::collections::BTreeSet;
use tonic::Code;
use tuplewatch::api::grpc::proto::{AttributeFilter, TupleFilter};

/// Runs this code before every insert of an entity.
async fn on_insert(sql: &Sql, entity: &str, does: &str) {
    sql.run(&format!(
        "CREATE FUNCTION hook() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {does} RETURN NEW; END $$;
         CREATE TRIGGER hook BEFORE INSERT ON tuplewatch.relation_tuples FOR EACH ROW
             WHEN (NEW.entity_id = '{entity}') EXECUTE FUNCTION hook()"
    ))
    .await;
}

#[tokio::test]
async fn the_victim_of_a_deadlock_is_retried() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut api = Api::of(&server).await;
    let (sql, other, gate) = (postgres.sql().await, postgres.sql().await, postgres.sql().await);
    on_insert(&sql, "b", "PERFORM pg_advisory_xact_lock(1);").await;

    // Ours holds a and waits at b. The other holds c and waits for a, without ever checking for deadlocks.
    gate.run("SELECT pg_advisory_lock(1)").await;
    other.run("SET deadlock_timeout = '10min'; BEGIN").await;
    other.insert("t1", "c").await;
    let write = tokio::spawn(async move {
        let tuples = ["document:a#viewer@user:u", "document:b#viewer@user:u", "document:c#viewer@user:u"];
        api.try_write("t1", &tuples).await
    });
    sql.until_waiting(1).await;
    let other = tokio::spawn(async move {
        other.insert("t1", "a").await;
        other.run("COMMIT").await;
    });
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
    eventually("the other waits for ours", async || sql.value(waits).await == "2").await;
    gate.run("SELECT pg_advisory_unlock(1)").await;

    let token = within("the write", write).await.unwrap().unwrap();
    within("the other", other).await.unwrap();
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    // There is more than one if ours is back at a before the other has continued.
    eventually("there was a deadlock", async || sql.value(deadlocks).await != "0").await;
    assert_eq!(sql.facts("t1").await.len(), 3);
    sql.insert("t1", "after").await;
    server.watch("t1", &token).await.expect(Change::created("after")).await;
}

#[tokio::test]
async fn serialization_failures_are_retried_a_bounded_number_of_times() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut api = Api::of(&server).await;
    let sql = postgres.sql().await;
    // A sequence also counts attempts that are rolled back.
    sql.run("CREATE SEQUENCE tries; CREATE TABLE failures AS SELECT 3 AS count").await;
    let fail = "IF nextval('tries') <= (SELECT count FROM failures) THEN RAISE serialization_failure; END IF;";
    on_insert(&sql, "unlucky", fail).await;
    let unlucky = ["document:unlucky#viewer@user:u", "document:with#viewer@user:u"];

    let mut stream = server.watch("t1", "").await;
    api.write("t1", &unlucky).await;
    assert_eq!(sql.value("SELECT last_value FROM tries").await, "4");
    assert_eq!(stream.next().await.changes, [Change::created("unlucky"), Change::created("with")]);

    sql.run("TRUNCATE failures; INSERT INTO failures VALUES (1000); ALTER SEQUENCE tries RESTART; DELETE FROM tuplewatch.relation_tuples")
        .await;
    let refused = (Code::Aborted, "ERROR_CODE_ERROR_MAX_RETRIES".to_owned());
    assert_eq!(refusal(api.try_write("t1", &unlucky).await), refused);
    assert_eq!(sql.value("SELECT last_value FROM tries").await, "10");
    assert!(sql.facts("t1").await.is_empty(), "nothing of it happened");
}

#[tokio::test]
async fn refused_statements_are_not_retried_and_reveal_no_values() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut api = Api::of(&server).await;
    let sql = postgres.sql().await;
    on_insert(&sql, "secret", "RAISE 'no' USING DETAIL = NEW.entity_id;").await;
    let status = api.try_write("t1", &["document:secret#viewer@user:u"]).await.unwrap_err();
    assert!(!format!("{status:?}").contains("secret"));
    assert_eq!(refusal::<()>(Err(status)), (Code::Internal, "ERROR_CODE_EXECUTION".to_owned()));
    server.until_logged("a call of Data or Tenancy failed").await;
    assert!(!server.has_logged("secret"));
    // A violation of an added constraint is an error of the caller.
    sql.run("ALTER TABLE tuplewatch.relation_tuples ADD CONSTRAINT short CHECK (length(entity_id) < 10)").await;
    let status = api.try_write("t1", &["document:tenletters#viewer@user:u"]).await.unwrap_err();
    assert!(!format!("{status:?}").contains("tenletters"));
    assert_eq!(refusal::<()>(Err(status)), (Code::InvalidArgument, "ERROR_CODE_VALIDATION".to_owned()));
    // The connection is still usable.
    api.write("t1", &["document:fine#viewer@user:u"]).await;
}

#[tokio::test]
async fn a_call_without_a_free_connection_is_refused() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[("--database-max-connections", "5")]).await;
    let mut api = Api::of(&server).await;
    let sql = postgres.sql().await;
    // Not by waiting for the lock, because a write that waits for a lock gives its connection back.
    let blocks = "WHILE NOT pg_try_advisory_xact_lock(1) LOOP PERFORM pg_sleep(0.01); END LOOP;";
    on_insert(&sql, "a", blocks).await;
    let gate = postgres.sql().await;
    gate.run("SELECT pg_advisory_lock(1)").await;
    let mut first = api.clone();
    let write = tokio::spawn(async move { first.try_write("t1", &["document:a#viewer@user:u"]).await });
    // It has the only connection of Data until the gate opens.
    let sleeps = "EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep')";
    eventually("the write has the connection", async || sql.is_true(sleeps).await).await;
    let busy = (Code::ResourceExhausted, "ERROR_CODE_DATASTORE".to_owned());
    assert_eq!(refusal(api.try_write("t1", &["document:b#viewer@user:u"]).await), busy);
    // Watch uses another connection.
    server.watch("t1", "").await;
    assert!(!write.is_finished());
    gate.run("SELECT pg_advisory_unlock(1)").await;
    within("the write", write).await.unwrap().unwrap();
    api.write("t1", &["document:b#viewer@user:u"]).await;
    let ours = sql.value(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'tuplewatch%' \
         AND backend_type = 'client backend'",
    );
    assert!(ours.await.parse::<u32>().unwrap() <= 5);
}

/// All writes share one connection.
#[tokio::test]
async fn a_write_that_waits_for_a_lock_delays_no_other() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[("--database-max-connections", "5")]).await;
    let mut api = Api::of(&server).await;
    let (sql, other) = (postgres.sql().await, postgres.sql().await);
    other.run("BEGIN").await;
    other.insert("t1", "a").await;
    let mut first = api.clone();
    let write = tokio::spawn(async move { first.try_write("t1", &["document:a#viewer@user:u"]).await });
    sql.until_waiting(1).await;
    api.write("t1", &["document:b#viewer@user:u"]).await;
    assert!(!write.is_finished());
    other.run("COMMIT").await;
    within("the write", write).await.unwrap().unwrap();
}

/// Writers through the API and in SQL, in every order, over few rows. The stream must add up to the table.
#[tokio::test]
async fn the_stream_adds_up_to_the_table_under_contention() {
    const WRITERS: u64 = 8;
    const WRITES: u32 = 30;
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let api = Api::of(&server).await;
    let sql = postgres.sql().await;
    let mut stream = server.watch("t1", "").await;
    let seed = seed();
    let writers: Vec<_> = (0..WRITERS)
        .map(|n| {
            let (mut api, mut random) = (api.clone(), fastrand::Rng::with_seed(seed.wrapping_add(n)));
            tokio::spawn(async move {
                for _ in 0..WRITES {
                    let mut text = || format!("d:{}#viewer@user:{}", random.u8(..6), random.u8(..6));
                    let texts = [text(), text(), text(), text()];
                    if random.bool() {
                        api.write("t1", &texts.each_ref().map(String::as_str)).await;
                    } else {
                        let subject = subjects("user", &[&random.u8(..6).to_string()], "");
                        let filter = TupleFilter { subject, ..Default::default() };
                        api.try_delete("t1", filter, AttributeFilter::default()).await.unwrap();
                    }
                }
            })
        })
        .collect();
    for n in 0..WRITES {
        // In the opposite order of the API. Either side may be the victim of a deadlock.
        let insert = format!(
            "BEGIN; INSERT INTO tuplewatch.relation_tuples SELECT 't1', 'd', n, 'viewer', 'user', {}
             FROM generate_series(5, 0, -1) n ON CONFLICT DO NOTHING; COMMIT",
            n % 6
        );
        if sql.batch_execute(&insert).await.is_err() {
            sql.run("ROLLBACK").await;
        }
    }
    for writer in writers {
        within("a writer", writer).await.unwrap();
    }
    sql.insert("t1", "end").await;
    let mut state = BTreeSet::new();
    for message in stream.up_to(&Change::created("end")).await {
        for change in message.changes {
            assert!(change.apply(&mut state), "{change:?} changes nothing");
        }
    }
    assert_eq!(state, sql.facts("t1").await);
}
