//! Failover slots (from version 17 on), and the standbys that they wait for.

use super::Patient;
use crate::scenarios::cli::setup::psql;
use crate::support::postgres::Postgres;
use crate::support::wait::{eventually, within};
use tuplewatch::dev_postgres::StopMode;

const SETTING: &str = "synchronized_standby_slots";

#[tokio::test]
async fn a_missing_synchronized_standby_slot_is_an_error() {
    let patient = Patient::new(Postgres::since(17, &[(SETTING, "gone")]).await);
    let mut patient = patient.with("--replication-failover", "off");
    patient.run("setup", &[]).await.succeeded();
    // Without failover the slot does not wait.
    let diagnosis = patient.doctor(&[]).await;
    assert_eq!(diagnosis.about("warning", SETTING).len(), 1, "{diagnosis:#?}");
    patient.is_well().await;

    patient = patient.with("--replication-failover", "auto");
    patient.run("setup", &["--recreate-slot"]).await.succeeded();
    let diagnostic = patient.has(SETTING, "names gone, which does not exist").await;
    patient.apply(&diagnostic).await;
    patient.is_well().await;
    patient.streams().await;
}

/// A standby without a copy of the slot.
#[tokio::test]
async fn a_slot_that_a_promotion_would_lose_is_a_warning() {
    let patient = Patient::new(Postgres::since(17, &[]).await);
    let mut patient = patient.with("--replication-failover", "off");
    patient.run("setup", &[]).await.succeeded();
    patient.sql().await.run("SELECT pg_create_physical_replication_slot('standby1', true)").await;
    patient.postgres.stop(StopMode::Fast).await;
    let mut standby = patient.postgres.copy().await;
    patient.postgres.start_again().await;
    let port = patient.postgres.uri().rsplit_once(':').unwrap().1.split('/').next().unwrap().to_owned();
    let conninfo = format!("host=127.0.0.1 port={port} user=postgres dbname=postgres");
    standby.stop_and_set(&[("primary_conninfo", &conninfo), ("primary_slot_name", "standby1")]).await;
    standby.put_signal("standby.signal");
    standby.start_again().await;
    let sql = patient.sql().await;
    let is_connected = "EXISTS (SELECT FROM pg_stat_replication WHERE state = 'streaming')";
    eventually("the standby streams", async || sql.is_true(is_connected).await).await;

    let diagnosis = patient.doctor(&[]).await;
    let warnings = diagnosis.about("warning", "replication slot tuplewatch");
    let [diagnostic] = warnings.as_slice() else { panic!("{diagnosis:#?}") };
    assert!(diagnostic.what.contains("is not copied to the standbys"), "{diagnostic:?}");
    let (_, command) = diagnostic.fix.as_deref().unwrap().split_once("replication=database'): ").unwrap();
    let conninfo = format!("{conninfo} replication=database");
    let output = within("psql", psql().args(["--no-psqlrc", &conninfo, "--command", command]).output()).await.unwrap();
    assert!(output.status.success(), "{output:?}");

    let found = patient.doctor(&[]).await.about("warning", SETTING);
    assert!(matches!(found.as_slice(), [diagnostic] if diagnostic.what.contains("is empty")), "{found:#?}");
    patient.apply(&found[0]).await;
    let diagnosis = patient.doctor(&[]).await;
    let slot = diagnosis.about("ok", "replication slot tuplewatch");
    assert!(
        slot.iter().any(|diagnostic| diagnostic.what == "failover is on, synced is off; standbys connected: 1"),
        "{slot:#?}"
    );
    patient.streams().await;

    // The standby stops, and the slot would wait for it for ever.
    standby.stop(StopMode::Fast).await;
    eventually("the slot is not active", async || {
        sql.is_true("EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = 'standby1' AND NOT active)").await
    })
    .await;
    let diagnostic = patient.has(SETTING, "names standby1, which has no standby connected").await;
    patient.apply(&diagnostic).await;
    patient.is_well().await;
}

/// tuplewatch cannot read from a standby.
#[tokio::test]
async fn a_uri_that_leads_to_a_standby_is_an_error() {
    let mut patient = Patient::ready(Postgres::start().await).await;
    patient.postgres.stop(StopMode::Fast).await;
    patient.postgres.put_signal("standby.signal");
    patient.postgres.start_again().await;
    let diagnostic = patient.has("connection", "it is a standby").await;
    assert!(diagnostic.fix.unwrap().contains("name it in database.uri"));
    patient.sql().await.run("SELECT pg_promote()").await;
    patient.is_well().await;
}
