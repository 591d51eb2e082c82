//! The publication and the mapped tables.

use super::Patient;
use crate::support::postgres::Postgres;

#[tokio::test]
async fn a_missing_publication_is_an_error() {
    let mut patient = Patient::new(Postgres::start().await);
    patient.sql().await.run(include_str!("../../../sql/0001_tables.sql")).await;
    patient.heals("publication tuplewatch", "does not exist").await;
}

#[tokio::test]
async fn an_empty_database_is_repaired_by_setup() {
    let mut patient = Patient::new(Postgres::start().await);
    let errors = patient.doctor(&[]).await.of_severity("error");
    assert_eq!(errors.len(), 4, "{errors:#?}");
    patient.apply(&errors[0]).await;
    patient.is_well().await;
    patient.streams().await;
}

#[tokio::test]
async fn a_dropped_publication_is_an_error() {
    let mut patient = Patient::used(Postgres::start().await).await;
    patient.sql().await.run("DROP PUBLICATION tuplewatch").await;
    patient.heals("publication tuplewatch", "does not exist").await;
}

#[tokio::test]
async fn unpublished_deletes_are_an_error() {
    let mut patient = Patient::used(Postgres::start().await).await;
    patient.sql().await.run("ALTER PUBLICATION tuplewatch SET (publish = 'insert, update, truncate')").await;
    patient.heals("publication tuplewatch", "does not publish delete").await;
}

#[tokio::test]
async fn a_table_outside_the_publication_is_an_error() {
    let mut patient = Patient::used(Postgres::start().await).await;
    patient.sql().await.run("ALTER PUBLICATION tuplewatch DROP TABLE tuplewatch.attributes").await;
    // A running tuplewatch checks at once.
    let diagnostic = patient.has("table tuplewatch.attributes", "is not in publication tuplewatch").await;
    let fix = diagnostic.fix.unwrap();
    assert!(fix.contains("SELECT pg_logical_emit_message(true, 'tuplewatch', 'check');"), "{fix}");
    patient.heals("table tuplewatch.attributes", "is not in publication tuplewatch").await;
}

/// Filtered rows or columns, from version 15 on.
#[tokio::test]
async fn row_filters_and_column_lists_are_errors() {
    let mut patient = Patient::used(Postgres::since(15, &[]).await).await;
    let rest = "ALTER PUBLICATION tuplewatch SET TABLE tuplewatch.attributes, tuplewatch.relation_tuples";
    for (part, what) in [
        ("WHERE (tenant_id <> 'secret')", "has a row filter"),
        ("(tenant_id, entity_type, relation)", "column entity_id is not in the column list"),
    ] {
        patient.sql().await.run(&format!("{rest} {part}")).await;
        patient.heals("table tuplewatch.relation_tuples", what).await;
    }
}

#[tokio::test]
async fn incomplete_old_rows_are_an_error() {
    let mut patient = Patient::used(Postgres::start().await).await;
    patient.sql().await.run("ALTER TABLE tuplewatch.attributes REPLICA IDENTITY DEFAULT").await;
    patient.heals("table tuplewatch.attributes", "old rows lack column value").await;
    patient.sql().await.run("ALTER TABLE tuplewatch.relation_tuples REPLICA IDENTITY NOTHING").await;
    patient.heals("table tuplewatch.relation_tuples", "old rows lack column").await;
}

const SHARES: &str = "tables: [{table: shop.shares, tenant: company, tuple: {
    entity_type: {constant: document}, entity_id: id, relation: role, subject_type: {constant: user}, subject_id: person}}]";

/// A node with a custom table.
async fn with_shares(sql: &str) -> Patient {
    let patient = Patient::new(Postgres::start().await).with("--mapping-file", "m.yaml");
    std::fs::write(patient.path().join("m.yaml"), SHARES).unwrap();
    patient.sql().await.run(&format!("CREATE SCHEMA shop; {sql}")).await;
    patient
}

const COLUMNS: &str = "company text, id text, role text, person text, PRIMARY KEY (company, id, role, person)";

#[tokio::test]
async fn partitions_published_under_their_own_names_are_an_error() {
    let sql = format!(
        "CREATE TABLE shop.shares ({COLUMNS}) PARTITION BY LIST (company);
         CREATE TABLE shop.rest PARTITION OF shop.shares DEFAULT"
    );
    let mut patient = with_shares(&sql).await;
    patient.run("setup", &[]).await.succeeded();
    patient.sql().await.run("ALTER PUBLICATION tuplewatch SET (publish_via_partition_root = false)").await;
    patient.heals("table shop.shares", "is partitioned").await;
}

#[tokio::test]
async fn an_unlogged_table_is_an_error() {
    let sql = format!("CREATE UNLOGGED TABLE shop.shares ({COLUMNS}); CREATE PUBLICATION tuplewatch FOR ALL TABLES");
    let mut patient = with_shares(&sql).await;
    patient.run("setup", &[]).await.succeeded();
    patient.heals("table shop.shares", "is not logged").await;
}

#[tokio::test]
async fn a_missing_mapped_column_is_an_error() {
    let sql = format!("CREATE TABLE shop.shares ({COLUMNS})");
    let patient = with_shares(&sql).await;
    patient.run("setup", &[]).await.succeeded();
    patient.sql().await.run("ALTER TABLE shop.shares RENAME COLUMN person TO colleague").await;
    let diagnostic = patient.has("table shop.shares", "has no column person, which the mapping names").await;
    assert_eq!(diagnostic.fix.as_deref(), Some("-- correct the mapping, or add the column"));
    std::fs::write(patient.path().join("m.yaml"), SHARES.replace("person", "colleague")).unwrap();
    patient.is_well().await;
    patient.streams().await;
}

/// Other objects with the name of a mapped table.
#[tokio::test]
async fn a_mapped_name_of_another_object_is_an_error() {
    let foreign = "CREATE FOREIGN DATA WRAPPER nowhere; CREATE SERVER elsewhere FOREIGN DATA WRAPPER nowhere;
                   CREATE FOREIGN TABLE shop.shares (company text) SERVER elsewhere";
    for (create, drop, what) in [
        ("CREATE VIEW shop.shares AS SELECT 1", "VIEW", "is a view"),
        ("CREATE MATERIALIZED VIEW shop.shares AS SELECT 1", "MATERIALIZED VIEW", "is a materialized view"),
        (foreign, "FOREIGN TABLE", "is a foreign table"),
        ("CREATE SEQUENCE shop.shares", "SEQUENCE", "is a sequence"),
        ("CREATE TYPE shop.shares AS (company text)", "TYPE", "is a composite type"),
    ] {
        let patient = with_shares(create).await;
        let errors = patient.doctor(&[]).await.about("error", "table shop.shares");
        let [diagnostic] = errors.as_slice() else { panic!("{errors:#?}") };
        assert!(
            diagnostic.what.contains(what) && diagnostic.fix.as_deref().unwrap().starts_with("-- "),
            "{diagnostic:?}"
        );
        patient.run("setup", &[]).await.failed(&["nothing was changed", &format!("table shop.shares: {what}")]);
        patient.run("serve", &[]).await.failed(&[what]);
        patient.sql().await.run(&format!("DROP {drop} shop.shares; CREATE TABLE shop.shares ({COLUMNS})")).await;
        patient.run("setup", &[]).await.succeeded();
        patient.is_well().await;
    }
    let patient = with_shares("").await;
    let system = SHARES.replace("shop.shares", "pg_catalog.pg_class").replace("company", "relname");
    std::fs::write(patient.path().join("m.yaml"), system).unwrap();
    let errors = patient.doctor(&[]).await.about("error", "table pg_catalog.pg_class");
    assert!(errors[0].what.starts_with("is a system catalog"), "{errors:#?}");
    patient.run("setup", &[]).await.failed(&["nothing was changed", "is a system catalog"]);
}
