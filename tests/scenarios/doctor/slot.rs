//! The slot: lost, held by others, behind, or delayed by a transaction.

use super::{Diagnostic, Patient, stops};
use crate::support::postgres::Postgres;
use crate::support::sql::Sql;
use crate::support::wait::{eventually, within};

const SLOT: &str = "replication slot tuplewatch";

/// Writes WAL segments until this condition holds for the slot.
async fn write_until(sql: &Sql, what: &str, condition: &str) {
    let condition = format!("(SELECT {condition} FROM pg_replication_slots WHERE slot_name = 'tuplewatch')");
    eventually(what, async || {
        sql.insert("t1", &fastrand::u64(..).to_string()).await;
        sql.run("SELECT pg_switch_wal()").await;
        sql.run("CHECKPOINT").await;
        sql.is_true(&condition).await
    })
    .await;
}

#[tokio::test]
async fn a_lost_slot_is_an_error() {
    let mut patient = Patient::used(Postgres::with(&[("max_slot_wal_keep_size", "1MB")]).await).await;
    write_until(&patient.sql().await, "the slot is lost", "wal_status = 'lost'").await;
    patient.run("setup", &[]).await.failed(&["nothing was changed", "is lost", "tuplewatch setup --recreate-slot"]);
    patient.heals(SLOT, "is lost").await;
}

#[tokio::test]
async fn a_dropped_slot_is_an_error() {
    let mut patient = Patient::used(Postgres::start().await).await;
    patient.sql().await.run("SELECT pg_drop_replication_slot('tuplewatch')").await;
    patient.heals(SLOT, "does not exist").await;
}

#[tokio::test]
async fn a_physical_slot_is_an_error() {
    let patient = Patient::ready(Postgres::start().await).await;
    patient.sql().await.run("SELECT pg_drop_replication_slot('tuplewatch')").await;
    patient.sql().await.run("SELECT pg_create_physical_replication_slot('tuplewatch')").await;
    let diagnostic = patient.has(SLOT, "is a physical slot").await;
    assert!(diagnostic.fix.unwrap().contains("choose another name in replication.slot"));
    let patient = patient.with("--replication-slot", "another");
    patient.is_well().await;
    patient.streams().await;
}

/// The server keeps WAL for a slot that is not read, and serving is the remedy.
#[tokio::test]
async fn an_unread_slot_is_a_warning() {
    let patient = Patient::used(Postgres::start().await).await.with("--replication-warn-retained-wal", "32MiB");
    let kept = "pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) > 48 * 1024 * 1024";
    write_until(&patient.sql().await, "much is kept", kept).await;
    let warnings = patient.doctor(&[]).await.about("warning", SLOT);
    let [diagnostic] = warnings.as_slice() else { panic!("{warnings:#?}") };
    assert!(diagnostic.what.contains("not read for") || diagnostic.what.contains("never read"), "{diagnostic:?}");
    assert!(diagnostic.fix.as_deref().unwrap().starts_with("tuplewatch serve"), "{diagnostic:?}");

    let process = patient.serve(&[], &[]).await;
    let sql = patient.sql().await;
    // The server releases WAL after it next logs the running transactions, which needs activity.
    eventually("it catches up, and nothing is kept", async || {
        sql.insert("t1", &fastrand::u64(..).to_string()).await;
        sql.run("CHECKPOINT").await;
        patient.doctor(&[]).await.about("warning", SLOT).is_empty()
    })
    .await;
    stops(process).await;
}

#[tokio::test]
async fn a_slot_close_to_its_wal_limit_is_a_warning() {
    let mut patient = Patient::used(Postgres::with(&[("max_slot_wal_keep_size", "64MB")]).await).await;
    let warnings = patient.doctor(&[]).await.about("warning", SLOT);
    let [diagnostic] = warnings.as_slice() else { panic!("{warnings:#?}") };
    assert!(diagnostic.what.contains("is lost when another"), "{diagnostic:?}");
    patient.apply(diagnostic).await;
    assert!(patient.doctor(&[]).await.about("warning", SLOT).is_empty());
}

/// Past the limit, but not invalidated before the next checkpoint.
#[tokio::test]
async fn an_unreserved_slot_is_a_warning() {
    let mut patient = Patient::used(Postgres::with(&[("max_slot_wal_keep_size", "1MB")]).await).await;
    let sql = patient.sql().await;
    let is_unreserved = "(SELECT wal_status = 'unreserved' FROM pg_replication_slots WHERE slot_name = 'tuplewatch')";
    eventually("it is far behind", async || {
        sql.insert("t1", &fastrand::u64(..).to_string()).await;
        sql.run("SELECT pg_switch_wal()").await;
        sql.is_true(is_unreserved).await
    })
    .await;
    let warnings = patient.doctor(&[]).await.about("warning", SLOT);
    let [diagnostic] = warnings.as_slice() else { panic!("{warnings:#?}") };
    assert!(diagnostic.what.contains("will be lost at one of the next checkpoints"), "{diagnostic:?}");
    patient.apply(diagnostic).await;
    sql.run("CHECKPOINT").await;
    patient.is_well().await;
    patient.streams().await;
}

#[tokio::test]
async fn a_slot_held_by_another_node_is_a_warning() {
    let mut patient = Patient::used(Postgres::start().await).await;
    let mut thief = patient.serve(&[("--changelog-path", "their-log")], &[]).await;
    let diagnosis = patient.doctor(&[]).await;
    let warnings = diagnosis.about("warning", SLOT);
    let [diagnostic] = warnings.as_slice() else { panic!("{diagnosis:#?}") };
    assert!(diagnostic.what.contains("which is not this tuplewatch"), "{diagnostic:?}");
    // The other node is stopped first, as the fix says.
    thief.kill_9().await;
    patient.apply(diagnostic).await;
    eventually("the slot is free", async || patient.doctor(&[]).await.about("warning", SLOT).is_empty()).await;
    patient.streams().await;
}

/// Another program does not give way.
#[tokio::test]
async fn a_slot_held_by_another_program_is_an_error() {
    let patient = Patient::used(Postgres::start().await).await;
    let mut stranger = patient.postgres.stranger("cdc").await;
    patient.sql().await.insert("t1", "theirs").await;
    within("the stranger reads", stranger.recv()).await.unwrap();
    patient.has(SLOT, "(cdc), which is not this tuplewatch").await;
    stranger.abort();
    eventually("the slot is free", async || patient.doctor(&[]).await.summary.error == 0).await;
}

/// `serve` is suspended, and its role sees nothing of its walsender but its existence.
#[tokio::test]
async fn a_slot_that_is_read_too_slowly_is_a_warning() {
    let postgres = Postgres::start().await;
    let admin = postgres.uri();
    let patient = Patient::used(postgres).await.with("--replication-warn-retained-wal", "32MiB");
    let sql = patient.sql().await;
    sql.run("CREATE ROLE reader LOGIN REPLICATION; GRANT USAGE ON SCHEMA tuplewatch TO reader").await;
    sql.run("GRANT SELECT ON ALL TABLES IN SCHEMA tuplewatch TO reader").await;
    let patient = patient.with("--database-uri", &admin.replace("postgres@", "reader@"));
    let process = patient.serve(&[], &[]).await;
    process.signal("STOP");
    let behind = "pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn) > 48 * 1024 * 1024";
    write_until(&sql, "it is far behind", behind).await;
    let warnings = patient.doctor(&[]).await.about("warning", SLOT);
    let [diagnostic] = warnings.as_slice() else { panic!("{warnings:#?}") };
    assert!(diagnostic.what.contains("this role may not see since when (GRANT pg_monitor)"), "{diagnostic:?}");
    assert!(diagnostic.fix.as_deref().unwrap().contains("tuplewatch does not keep up"), "{diagnostic:?}");
    process.signal("CONT");
    stops(process).await;
}

/// A forgotten `BEGIN`.
#[tokio::test]
async fn a_long_transaction_is_a_warning() {
    let mut patient = Patient::used(Postgres::start().await).await;
    let forgotten = patient.sql().await;
    forgotten.run("BEGIN; SELECT pg_current_xact_id()").await;
    let pid = forgotten.value("SELECT pg_backend_pid()").await;
    let subject = format!("transaction of process {pid}");
    // It is not old enough for the default.
    assert!(patient.doctor(&[]).await.about("warning", &subject).is_empty());
    let warnings = patient.doctor(&["--long-transaction", "0s"]).await.about("warning", &subject);
    let [diagnostic] = warnings.as_slice() else { panic!("{warnings:#?}") };
    assert!(
        diagnostic.what.contains("user postgres") && diagnostic.what.contains("idle in transaction"),
        "{diagnostic:?}"
    );
    patient.apply(diagnostic).await;
    eventually("it has ended", async || {
        patient.doctor(&["--long-transaction", "0s"]).await.about("warning", &subject).is_empty()
    })
    .await;

    // A role that may not see its age gets a diagnostic with the remedy.
    let other = patient.sql().await;
    other.run("CREATE ROLE reader LOGIN REPLICATION; GRANT USAGE ON SCHEMA tuplewatch TO reader").await;
    other.run("GRANT SELECT ON ALL TABLES IN SCHEMA tuplewatch TO reader; BEGIN; SELECT pg_current_xact_id()").await;
    let admin = patient.postgres.uri();
    let patient = patient.with("--database-uri", &admin.replace("postgres@", "reader@"));
    let hidden = patient.doctor(&["--long-transaction", "0s"]).await.about("ok", "transactions");
    assert!(hidden[0].what.contains("role reader may not see since when"), "{hidden:?}");
    patient.sql().await.run(hidden[0].fix.as_deref().unwrap()).await;
    let diagnosis = patient.doctor(&["--long-transaction", "0s"]).await;
    assert!(diagnosis.of_severity("warning").iter().any(|diagnostic| diagnostic.subject.starts_with("transaction of")));
}

/// A gap cannot end before it does, and only its lock shows it, because it has written nothing.
#[tokio::test]
async fn a_transaction_that_locks_a_watched_table_is_a_warning() {
    let mut patient = Patient::used(Postgres::with(&[("max_prepared_transactions", "5")]).await).await;
    let writer = patient.sql().await;
    let reader = patient.sql().await;
    reader.run("BEGIN; SELECT FROM tuplewatch.attributes").await;
    writer.run("BEGIN; SET application_name = 'nightly'; DELETE FROM tuplewatch.attributes WHERE false").await;
    let pid = writer.value("SELECT pg_backend_pid()").await;
    let warnings = patient.doctor(&["--long-transaction", "0s"]).await.of_severity("warning");
    let about: Vec<&Diagnostic> =
        warnings.iter().filter(|diagnostic| diagnostic.subject.contains("transaction")).collect();
    let [diagnostic] = about.as_slice() else { panic!("{warnings:#?}") };
    assert_eq!(diagnostic.subject, format!("transaction of process {pid}"));
    for expected in ["has locked tuplewatch.attributes", "user postgres", "nightly", "idle in transaction"] {
        assert!(diagnostic.what.contains(expected), "{diagnostic:?}");
    }
    assert!(diagnostic.meaning.as_deref().unwrap().contains("A gap"), "{diagnostic:?}");
    patient.apply(diagnostic).await;

    let prepare = "BEGIN; DELETE FROM tuplewatch.attributes; PREPARE TRANSACTION 'theirs'";
    patient.sql().await.run(prepare).await;
    let warnings =
        patient.doctor(&["--long-transaction", "0s"]).await.about("warning", "prepared transaction 'theirs'");
    let [diagnostic] = warnings.as_slice() else { panic!("{warnings:#?}") };
    assert!(diagnostic.what.contains("has locked tuplewatch.attributes"), "{diagnostic:?}");
    patient.apply(diagnostic).await;
    let diagnosis = patient.doctor(&["--long-transaction", "0s"]).await;
    assert_eq!(diagnosis.about("ok", "transactions").len(), 1, "{diagnosis:#?}");
}

#[tokio::test]
async fn a_prepared_transaction_is_a_warning() {
    let mut patient = Patient::used(Postgres::with(&[("max_prepared_transactions", "5")]).await).await;
    patient.sql().await.run("BEGIN; CREATE TABLE forgotten (); PREPARE TRANSACTION E'it''s\\nforgotten'").await;
    let warnings = patient.doctor(&["--long-transaction", "0s"]).await.of_severity("warning");
    let found =
        warnings.iter().find(|diagnostic| diagnostic.subject == r"prepared transaction E'it''s\u000aforgotten'");
    patient.apply(found.unwrap_or_else(|| panic!("{warnings:#?}"))).await;
    let diagnosis = patient.doctor(&["--long-transaction", "0s"]).await;
    assert_eq!(diagnosis.about("ok", "transactions").len(), 1, "{diagnosis:#?}");
}

/// From version 18 on there can be a limit to the time that a slot is not read.
#[tokio::test]
async fn an_idle_timeout_of_slots_is_a_warning() {
    let mut patient = Patient::used(Postgres::since(18, &[("idle_replication_slot_timeout", "1d")]).await).await;
    let setting = "idle_replication_slot_timeout";
    let found = patient.doctor(&[]).await.about("warning", setting);
    assert!(matches!(found.as_slice(), [diagnostic] if diagnostic.what.contains("is 1d")), "{found:#?}");
    patient.apply(&found[0]).await;
    assert!(patient.doctor(&[]).await.about("warning", setting).is_empty());
}
