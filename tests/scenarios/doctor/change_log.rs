//! The directory of the change log.

use super::{Patient, stops};
use crate::support::postgres::Postgres;

const SUBJECT: &str = "change log";

#[tokio::test]
async fn an_unusable_path_is_an_error() {
    let patient = Patient::ready(Postgres::start().await).await.with("--changelog-path", "a-file/log");
    std::fs::write(patient.path().join("a-file"), "").unwrap();
    let diagnostic = patient.has(SUBJECT, "a-file is not a directory").await;
    assert!(diagnostic.fix.unwrap().contains("set changelog.path to a directory"));
    std::fs::remove_file(patient.path().join("a-file")).unwrap();
    patient.is_well().await;
    assert!(!patient.path().join("a-file").exists(), "nothing was made");
    patient.streams().await;
}

#[tokio::test]
async fn a_directory_with_other_files_is_an_error() {
    let patient = Patient::ready(Postgres::start().await).await.with("--changelog-path", ".");
    std::fs::write(patient.path().join("somebody's"), "").unwrap();
    let diagnostic = patient.has(SUBJECT, "holds no change log of tuplewatch").await;
    assert!(diagnostic.fix.unwrap().contains("set changelog.path to an empty or new directory"));
    let patient = patient.with("--changelog-path", "new");
    patient.is_well().await;
    patient.streams().await;
}

#[tokio::test]
async fn a_damaged_log_is_an_error() {
    let patient = Patient::used(Postgres::start().await).await;
    std::fs::remove_dir_all(patient.path().join("log/data")).unwrap();
    let diagnostic = patient.has(SUBJECT, "is damaged").await;
    assert!(diagnostic.fix.unwrap().starts_with("tuplewatch serve --reset-log"));
    stops(patient.serve(&[], &["--reset-log"]).await).await;
    patient.is_well().await;
}

#[tokio::test]
async fn a_disk_with_less_than_the_reserve_is_an_error() {
    let patient = Patient::ready(Postgres::start().await).await.with("--changelog-disk-reserve", "1000000GiB");
    let diagnostic = patient.has("room for the change log", "less than changelog.disk_reserve").await;
    assert!(diagnostic.fix.unwrap().contains("set changelog.disk_reserve to less"));
    let patient = patient.with("--changelog-disk-reserve", "16MiB");
    patient.is_well().await;
    patient.streams().await;
}
