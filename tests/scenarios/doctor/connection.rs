//! Servers that cannot be queried give one diagnostic, and the change log is still examined.

use super::Patient;
use crate::support::postgres::Postgres;

const SUBJECT: &str = "connection";

/// Inserts lines at the beginning of pg_hba.conf.
async fn allow(patient: &Patient, lines: &str) {
    let before = std::fs::read_to_string(patient.postgres.pgdata().join("pg_hba.conf")).unwrap();
    patient.postgres.put_file("pg_hba.conf", &format!("{lines}\n{before}"));
    patient.reload().await;
}

/// The server is refused, and the change log is still examined.
async fn is_refused(patient: &Patient, what: &str, fix: &str) {
    let diagnostic = patient.has(SUBJECT, what).await;
    assert!(diagnostic.fix.as_deref().unwrap().contains(fix), "{diagnostic:?}");
    let diagnosis = patient.doctor(&[]).await;
    assert_eq!(diagnosis.about("ok", "change log").len(), 1, "{diagnosis:#?}");
}

#[tokio::test]
async fn a_refused_connection_is_an_error() {
    let mut patient = Patient::ready(Postgres::start().await).await;
    patient.postgres.stop(tuplewatch::dev_postgres::StopMode::Fast).await;
    is_refused(&patient, "Connection refused", "-- Nothing listens there: check host and port in database.uri").await;
    patient.postgres.start_again().await;
    patient.is_well().await;
}

#[tokio::test]
async fn a_missing_database_is_an_error() {
    let patient = Patient::ready(Postgres::start().await).await;
    let (right, wrong) = (patient.postgres.uri(), patient.postgres.uri_of("nowhere"));
    let patient = patient.with("--database-uri", &wrong);
    is_refused(&patient, "database \"nowhere\" does not exist", "correct its name in database.uri").await;
    patient.with("--database-uri", &right).is_well().await;
}

#[tokio::test]
async fn a_wrong_password_is_an_error() {
    let patient = Patient::ready(Postgres::start().await).await;
    patient.sql().await.run("CREATE ROLE secret LOGIN SUPERUSER PASSWORD 'right'").await;
    allow(&patient, "host all secret 127.0.0.1/32 scram-sha-256").await;
    let uri = |password: &str, postgres: &Postgres| postgres.uri().replace("postgres@", &format!("secret:{password}@"));
    let (right, wrong) = (uri("right", &patient.postgres), uri("wrong", &patient.postgres));
    let patient = patient.with("--database-uri", &wrong);
    is_refused(&patient, "password authentication failed", "Check user and password in database.uri").await;
    let ran = patient.run("doctor", &[]).await;
    assert!(!ran.out.contains(":wrong"), "{ran:?}");
    let patient = patient.with("--database-uri", &right);
    patient.is_well().await;
    patient.streams().await;
}

#[tokio::test]
async fn a_server_that_requires_tls_is_an_error_without_it() {
    let patient = Patient::ready(Postgres::start().await).await;
    let certificate = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    patient.postgres.put_file("server.crt", &certificate.cert.pem());
    patient.postgres.put_file("server.key", &certificate.signing_key.serialize_pem());
    patient.sql().await.run("ALTER SYSTEM SET ssl = on").await;
    patient.sql().await.run("CREATE ROLE careful LOGIN SUPERUSER").await;
    allow(&patient, "hostssl all careful 127.0.0.1/32 trust\nhost all careful 127.0.0.1/32 reject").await;
    let uri = patient.postgres.uri().replace("postgres@", "careful@");
    let patient = patient.with("--database-uri", &format!("{uri}?sslmode=disable"));
    is_refused(&patient, "no encryption", "set sslmode=require in database.uri").await;
    let patient = patient.with("--database-uri", &format!("{uri}?sslmode=require"));
    patient.is_well().await;
    patient.streams().await;
}
