//! Settings of the server, and rights of the role.

use super::{Patient, stops};
use crate::support::postgres::Postgres;
use crate::support::wait::eventually;

#[tokio::test]
async fn a_wal_level_of_replica_is_an_error() {
    let mut patient = Patient::new(Postgres::with(&[("wal_level", "replica")]).await);
    // Setup does all or nothing.
    let fix = "ALTER SYSTEM SET wal_level = logical";
    patient.run("setup", &[]).await.failed(&["nothing was changed", "wal_level: is replica", fix, "restart"]);
    assert!(patient.sql().await.is_true("to_regnamespace('tuplewatch') IS NULL").await);
    patient.sql().await.run(include_str!("../../../sql/0001_tables.sql")).await;
    let publication = "CREATE PUBLICATION tuplewatch FOR TABLE tuplewatch.relation_tuples, tuplewatch.attributes";
    patient.sql().await.run(publication).await;
    let diagnostic = patient.has("wal_level", "is replica").await;
    assert!(!diagnostic.what.contains("waits for a restart"), "{diagnostic:?}");

    // Half of the fix: the setting is changed, and the restart is missing.
    patient.sql().await.run("ALTER SYSTEM SET wal_level = logical").await;
    patient.reload().await;
    let is_pending = "(SELECT pending_restart FROM pg_settings WHERE name = 'wal_level')";
    eventually("it is pending", async || patient.sql().await.is_true(is_pending).await).await;
    patient.heals("wal_level", "waits for a restart").await;
}

#[tokio::test]
async fn exhausted_replication_slots_are_an_error() {
    let mut patient = Patient::ready(Postgres::with(&[("max_replication_slots", "1")]).await).await;
    patient.sql().await.run("SELECT pg_drop_replication_slot('tuplewatch')").await;
    patient.sql().await.run("SELECT pg_create_physical_replication_slot('theirs')").await;
    patient.run("setup", &[]).await.failed(&["max_replication_slots: all 1 are in use"]);
    patient.heals("max_replication_slots", "all 1 are in use").await;
}

#[tokio::test]
async fn exhausted_walsenders_are_an_error() {
    let mut patient = Patient::ready(Postgres::with(&[("max_wal_senders", "1")]).await).await;
    let other = [("--replication-slot", "theirs"), ("--changelog-path", "their-log")];
    let theirs = patient.serve(&other, &[]).await;
    patient.heals("max_wal_senders", "all 1 are in use").await;
    stops(theirs).await;
}

/// A node with a role that may log on.
async fn with_role(rights: &str) -> Patient {
    let patient = Patient::ready(Postgres::start().await).await;
    patient.sql().await.run(&format!("CREATE ROLE \"a reader\" LOGIN; {rights}")).await;
    let uri = patient.postgres.uri().replace("postgres@", "a%20reader@");
    patient.with("--database-uri", &uri)
}

const MAY_READ: &str = "GRANT USAGE ON SCHEMA tuplewatch TO \"a reader\"; \
                        GRANT SELECT ON ALL TABLES IN SCHEMA tuplewatch TO \"a reader\";";

#[tokio::test]
async fn a_role_without_replication_is_an_error() {
    let mut patient = with_role(MAY_READ).await;
    patient.heals("role a reader", "has no REPLICATION").await;
}

/// Limits below the connections of `serve`, which works with fewer, as long as it has one.
#[tokio::test]
async fn connection_limits_below_the_needs_of_serve_are_warnings() {
    let mut patient = with_role(&format!("ALTER ROLE \"a reader\" REPLICATION; {MAY_READ}")).await;
    let sql = patient.sql().await;
    sql.run("ALTER ROLE \"a reader\" CONNECTION LIMIT 5; ALTER DATABASE postgres CONNECTION LIMIT 9").await;
    drop(sql);
    patient.postgres.stop_and_set(&[("superuser_reserved_connections", "90")]).await;
    patient.postgres.start_again().await;
    for (subject, what) in [
        ("connections of role a reader", "may have 5 at a time, of which others use 0: tuplewatch serve uses up to 12"),
        ("connections to database postgres", "may be 9 at a time"),
        ("max_connections", "leaves ordinary roles 10 at a time"),
    ] {
        let found = patient.doctor(&[]).await.about("warning", subject);
        assert!(matches!(found.as_slice(), [diagnostic] if diagnostic.what.contains(what)), "{subject}: {found:#?}");
        patient.apply(&found[0]).await;
        let diagnosis = patient.doctor(&[]).await;
        assert!(diagnosis.about("warning", subject).is_empty(), "{diagnosis:#?}");
    }
    patient.streams().await;
}

#[tokio::test]
async fn a_table_without_select_is_an_error() {
    let revoke = "REVOKE SELECT ON tuplewatch.attributes FROM \"a reader\"";
    let mut patient = with_role(&format!("ALTER ROLE \"a reader\" REPLICATION; {MAY_READ}; {revoke}")).await;
    patient.heals("table tuplewatch.attributes", "has no SELECT").await;
}

#[tokio::test]
async fn a_schema_without_usage_is_an_error() {
    let revoke = "REVOKE USAGE ON SCHEMA tuplewatch FROM PUBLIC, \"a reader\"";
    let mut patient = with_role(&format!("ALTER ROLE \"a reader\" REPLICATION; {MAY_READ}; {revoke}")).await;
    let errors = patient.doctor(&[]).await.of_severity("error");
    assert!(
        !errors.is_empty() && errors.iter().all(|error| error.what.contains("no USAGE on schema tuplewatch")),
        "{errors:#?}"
    );
    patient.apply(&errors[0]).await;
    patient.is_well().await;
    patient.streams().await;
}

/// Settings that are dangerous only later.
#[tokio::test]
async fn a_missing_limit_is_a_warning() {
    let mut patient = Patient::ready(Postgres::with(&[("track_commit_timestamp", "off")]).await).await;
    for setting in ["max_slot_wal_keep_size", "track_commit_timestamp"] {
        let found = patient.doctor(&[]).await.about("warning", setting);
        assert_eq!(found.len(), 1, "{setting}");
        patient.apply(&found[0]).await;
        let diagnosis = patient.doctor(&[]).await;
        assert_eq!(diagnosis.about("ok", setting).len(), 1, "{diagnosis:#?}");
    }
}

const HOLD_BACK: (&str, &str) = ("--replication-acknowledgement-delay-age", "1m");

#[tokio::test]
async fn a_wal_limit_below_the_acknowledgement_delay_is_an_error() {
    let patient = Patient::ready(Postgres::with(&[("max_slot_wal_keep_size", "512MB")]).await).await;
    let mut patient = patient.with(HOLD_BACK.0, HOLD_BACK.1);
    patient.heals("max_slot_wal_keep_size", "lets 1024 MiB be held back of it").await;
}

/// PostgreSQL counts a logical walsender as a standby too.
#[tokio::test]
async fn commits_that_would_wait_for_tuplewatch_are_reported() {
    const SETTING: &str = "synchronous_standby_names";
    let patient = Patient::ready(Postgres::start().await).await;
    patient.sql().await.run(&format!("ALTER SYSTEM SET {SETTING} = '*'")).await;
    patient.reload().await;
    let found = patient.doctor(&[]).await.about("warning", SETTING);
    assert!(
        matches!(found.as_slice(), [diagnostic] if diagnostic.what.contains("tuplewatch matches too")),
        "{found:#?}"
    );
    let mut patient = patient.with(HOLD_BACK.0, HOLD_BACK.1);
    let diagnostic = patient.has(SETTING, "tuplewatch matches too").await;
    patient.apply(&diagnostic).await;
    patient.is_well().await;
    // There is no standby of that name, and a commit would wait for it.
    patient.sql().await.run(&format!("ALTER SYSTEM RESET {SETTING}")).await;
    patient.reload().await;
    patient.streams().await;
}
