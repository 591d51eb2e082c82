//! `mapping.file`: custom tables.

use super::process::{program, run, tuplewatch};
use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::stream::changes;

const SHARES: &str = "
tables:
  - table: shop.shares
    tenant: company
    tuple:
      entity_type: { constant: document }
      entity_id: document_id
      relation: role
      subject_type: { constant: user }
      subject_id: { template: 'staff-{person}' }
    soft_delete: { column: revoked_at, null_is_live: true }
";

#[tokio::test]
async fn an_invalid_mapping_is_a_usage_error() {
    let tuple = "{entity_type: x, entity_id: x, relation: x, subject_type: x, subject_id: x}";
    for (contents, expected) in [
        ("", "tables"),
        ("tables: []", "mapping file m.yaml cannot be used: the mapping names no table"),
        ("tables: [", "mapping file m.yaml does not read: "),
        ("just text", "mapping file m.yaml does not read: "),
        ("tables: [{table: shares, tenant: t}]", "'shares' is not a table: write schema.table"),
        (
            "tables: [{table: a.b, tenant: t}]",
            "table a.b of the mapping needs exactly one of 'tuple', 'attribute' and 'transaction: true'",
        ),
        ("tables: [{table: a.b, tenant: t, tupel: {}}]", "unknown field `tupel`, expected one of `table`, `tenant`"),
        ("tables: [{table: a.b, tenant: t, tuple: {entity_type: x}}]", "entity_id"),
        (&format!("tables: [{{table: a.b, tuple: {tuple}}}]"), "tenant"),
        (
            &format!("tables: [{{table: a.b, tenant: {{constat: x}}, tuple: {tuple}}}]"),
            "a column, {constant: text} or {template: text}",
        ),
        (
            &format!("tables: [{{table: a.b, tenant: {{template: '{{x'}}, tuple: {tuple}}}]"),
            "has a malformed template '{x': columns stand in braces, as in user:{id}",
        ),
        (
            &format!("tables: [{{table: a.b, tenant: t, soft_delete: {{column: c}}, tuple: {tuple}}}]"),
            "a soft_delete with neither 'live' values nor 'null_is_live'",
        ),
        (
            &format!("tables: [{{table: a.b, tenant: t, tuple: {tuple}}}, {{table: a.b, tenant: t, tuple: {tuple}}}]"),
            "the mapping names table a.b twice",
        ),
    ] {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("m.yaml"), contents).unwrap();
        for subcommand in ["serve", "setup"] {
            let mut command = program(directory.path());
            command.args([subcommand, "--database-uri", "postgres://u@127.0.0.1:1/d", "--mapping-file", "m.yaml"]);
            run(command).await.misused(&["mapping file m.yaml", expected]);
        }
    }
    for (file, expected) in [("nowhere.yaml", "No such file"), ("/", "Is a directory")] {
        let uri = "postgres://u@127.0.0.1:1/d";
        tuplewatch(&["serve", "--database-uri", uri, "--mapping-file", file])
            .await
            .misused(&[&format!("cannot read mapping file {file} (mapping.file): "), expected]);
    }
}

#[tokio::test]
async fn a_custom_table_is_watched() {
    let postgres = Postgres::start().await;
    let (sql, uri) = (postgres.sql().await, postgres.uri());
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("shares.yaml");
    std::fs::write(&file, SHARES).unwrap();
    let file = file.to_str().unwrap();
    let setup = ["setup", "--database-uri", &uri, "--mapping-file", file];
    tuplewatch(&setup).await.failed(&[
        "table shop.shares: does not exist, and the mapping watches it",
        "create it, or correct the mapping",
    ]);
    sql.run(
        "CREATE SCHEMA shop; CREATE TABLE shop.shares (company text, document_id int, role text, person int, \
         note text, PRIMARY KEY (company, document_id, person))",
    )
    .await;
    let column = "table shop.shares: has no column revoked_at, which the mapping names";
    tuplewatch(&[
        "serve",
        "--database-uri",
        &uri,
        "--mapping-file",
        file,
        "--server-grpc-port",
        "0",
        "--server-http-port",
        "0",
    ])
    .await
    .failed(&[column, "correct the mapping, or add the column"]);
    sql.run("ALTER TABLE shop.shares ADD COLUMN revoked_at timestamptz").await;

    let mut server = Server::serve(&postgres, &[("--mapping-file", file)]).await;
    assert_eq!(sql.value("SELECT to_regnamespace('tuplewatch') IS NULL").await, "t", "tables of ours are not needed");
    // Without a table of tenants every tenant id is valid.
    let (mut acme, mut other) = (server.watch("acme", "").await, server.watch("other", "").await);
    let share = |document: &str, role: &str, person: &str| {
        Change::tuple("document", document, role, "user", &format!("staff-{person}"), "")
    };
    sql.run(
        "INSERT INTO shop.shares VALUES ('acme', 1, 'viewer', 7), ('acme', 2, 'viewer', 7), ('other', 1, 'owner', 9)",
    )
    .await;
    let first = acme.next().await;
    assert_eq!(first.changes, [Change::create(share("1", "viewer", "7")), Change::create(share("2", "viewer", "7"))]);
    other.expect(Change::create(share("1", "owner", "9"))).await;
    // An unmapped column, a value, a soft deletion, and a row that was already deleted softly.
    sql.run("UPDATE shop.shares SET note = 'x'").await;
    sql.run("UPDATE shop.shares SET role = 'editor' WHERE company = 'acme' AND document_id = 1").await;
    sql.run("UPDATE shop.shares SET revoked_at = now() WHERE company = 'acme' AND document_id = 2").await;
    sql.run("DELETE FROM shop.shares WHERE company = 'acme'").await;
    let expected = [
        Change::delete(share("1", "viewer", "7")),
        Change::create(share("1", "editor", "7")),
        Change::delete(share("2", "viewer", "7")),
        Change::delete(share("1", "editor", "7")),
    ];
    assert_eq!(changes(&acme.up_to(&expected[3]).await), expected);

    // Another process with the same file resumes.
    server.kill_9().await;
    server.start().await;
    assert_eq!(changes(&server.watch("acme", &first.token).await.up_to(&expected[3]).await), expected);
}
