//! Obstacles to `setup` are reported all at once, with their remedies, and nothing is changed.

use super::process::{Ran, program, run, tuplewatch};
use super::setup::things;
use crate::support::postgres::Postgres;
use crate::support::sql::Sql;

const NOTHING: &str = "0 slots, 0 publications, 0 schemas";

/// The statements after `fix:`.
fn fixes(ran: &Ran) -> Vec<String> {
    let fixes = ran.err.lines().filter_map(|line| line.trim_start().strip_prefix("fix: "));
    fixes.filter(|fix| !fix.starts_with("--")).map(str::to_owned).collect()
}

/// Runs a subcommand with this mapping file.
async fn with_mapping(subcommand: &[&str], mapping: &str) -> Ran {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("m.yaml"), mapping).unwrap();
    let mut command = program(directory.path());
    command.args(subcommand).args(["--mapping-file", "m.yaml"]);
    run(command).await
}

/// A mapping of tables with columns tenant, id and owner.
fn mapping(tables: &[&str]) -> String {
    let table = |name: &&str| {
        format!(
            "{{table: {name}, tenant: tenant, tuple: {{entity_type: {{constant: document}}, entity_id: id, \
             relation: {{constant: owner}}, subject_type: {{constant: user}}, subject_id: owner}}}}"
        )
    };
    format!("tables: [{}]", tables.iter().map(table).collect::<Vec<_>>().join(", "))
}

const COLUMNS: &str = "tenant text, id text, owner text, PRIMARY KEY (tenant, id, owner)";

#[tokio::test]
async fn all_missing_settings_and_privileges_are_reported_at_once() {
    let postgres = Postgres::with(&[("wal_level", "replica"), ("max_replication_slots", "0")]).await;
    let sql = postgres.sql().await;
    sql.run("CREATE ROLE powerless LOGIN").await;
    let uri = postgres.uri().replace("postgres@", "powerless@");
    for arguments in [vec!["setup"], vec!["setup", "--dry-run"]] {
        let ran = tuplewatch(&[&arguments[..], &["--database-uri", &uri]].concat()).await;
        assert_eq!(ran.out, "");
        ran.failed(&[
            "nothing was changed, because several things are in the way",
            "database postgres: role powerless may not create a schema or a publication in it",
            "wal_level: is replica",
            "role powerless: has no REPLICATION",
            "max_replication_slots: all 0 are in use",
        ]);
    }
    assert_eq!(things(&sql).await, NOTHING);

    // Each fix works.
    for fix in fixes(&tuplewatch(&["setup", "--database-uri", &uri]).await) {
        sql.run(&fix).await;
    }
    let mut postgres = postgres;
    postgres.stop_and_set(&[]).await;
    postgres.start_again().await;
    tuplewatch(&["setup", "--database-uri", &postgres.uri().replace("postgres@", "powerless@")]).await.succeeded();
    assert_eq!(things(&postgres.sql().await).await, "1 slots, 1 publications, 1 schemas");
}

#[tokio::test]
async fn all_problems_of_tables_are_reported_at_once() {
    let postgres = Postgres::start().await;
    let sql = postgres.sql().await;
    let script = format!(
        "CREATE ROLE owner; CREATE ROLE poor LOGIN REPLICATION; GRANT CREATE ON DATABASE postgres TO poor;
         CREATE TABLE theirs ({COLUMNS}); ALTER TABLE theirs OWNER TO owner;
         CREATE SCHEMA closed; CREATE TABLE closed.inside ({COLUMNS}); ALTER TABLE closed.inside OWNER TO poor;
         CREATE UNLOGGED TABLE unlogged ({COLUMNS}); ALTER TABLE unlogged OWNER TO poor;
         CREATE TABLE narrow (tenant text, id text PRIMARY KEY); ALTER TABLE narrow OWNER TO poor;
         CREATE VIEW seen AS SELECT * FROM theirs"
    );
    sql.run(&script).await;
    let uri = postgres.uri().replace("postgres@", "poor@");
    let setup = ["setup", "--database-uri", &uri];
    let all =
        mapping(&["public.theirs", "closed.inside", "public.unlogged", "public.narrow", "public.seen", "public.none"]);
    let ran = with_mapping(&setup, &all).await;
    let fixes = fixes(&ran);
    ran.failed(&[
        "nothing was changed",
        "table public.theirs: belongs to role owner, and role poor may not publish it",
        "schema closed: role poor has no USAGE on it",
        "table public.unlogged: is not logged",
        "table public.narrow: has no column owner",
        "table public.seen: is a view",
        "table public.none: does not exist",
    ]);
    assert_eq!(things(&sql).await, NOTHING);

    // The statements among the fixes repair the rest.
    assert_eq!(fixes.len(), 3, "{fixes:#?}");
    for fix in fixes {
        sql.run(&fix).await;
    }
    with_mapping(&setup, &mapping(&["public.theirs", "closed.inside", "public.unlogged"])).await.succeeded();
    assert_eq!(sql.value("SELECT count(*) FROM pg_publication_rel").await, "3");
}

/// Tables with the names of the preset tables, which `CREATE TABLE IF NOT EXISTS` would skip.
#[tokio::test]
async fn tables_of_another_shape_are_refused() {
    let postgres = Postgres::start().await;
    let (sql, uri) = (postgres.sql().await, postgres.uri());
    let script = "CREATE SCHEMA tuplewatch; CREATE TABLE tuplewatch.relation_tuples (id int);
                  CREATE TABLE tuplewatch.schema_version (id int); CREATE VIEW tuplewatch.tenants AS SELECT 1 AS id";
    sql.run(script).await;
    tuplewatch(&["setup", "--database-uri", &uri]).await.failed(&[
        "nothing was changed",
        "table tuplewatch.relation_tuples: has no column tenant_id",
        "table tuplewatch.schema_version: has no column version",
        "table tuplewatch.tenants: is not a table",
    ]);
    assert_eq!(sql.value("SELECT to_regclass('tuplewatch.attributes') IS NULL").await, "t");
    assert_eq!(things(&sql).await, "0 slots, 0 publications, 1 schemas");

    // A schema that belongs to another role.
    sql.run("DROP SCHEMA tuplewatch CASCADE; CREATE ROLE theirs; CREATE SCHEMA tuplewatch AUTHORIZATION theirs").await;
    sql.run("CREATE ROLE poor LOGIN REPLICATION; GRANT CREATE ON DATABASE postgres TO poor").await;
    let poor = uri.replace("postgres@", "poor@");
    tuplewatch(&["setup", "--database-uri", &poor]).await.failed(&[
        "schema tuplewatch: belongs to role theirs, and role poor may not create tables in it",
        "schema tuplewatch: role poor has no USAGE on it",
    ]);
    assert_eq!(things(&sql).await, "0 slots, 0 publications, 1 schemas");
}

/// An unusable slot, and a publication that belongs to another role.
#[tokio::test]
async fn unusable_slots_and_publications_are_refused() {
    let postgres = Postgres::start().await;
    let (sql, uri) = (postgres.sql().await, postgres.uri());
    sql.run("CREATE DATABASE elsewhere").await;
    let elsewhere = Sql::connect(&postgres.uri_of("elsewhere")).await;
    let make = "SELECT pg_create_logical_replication_slot('tuplewatch', 'pgoutput'";
    let setup = ["setup", "--database-uri", &uri];
    for (holder, create, expected) in [
        (&elsewhere, format!("{make})"), "is for database elsewhere"),
        (&elsewhere, "SELECT pg_create_physical_replication_slot('tuplewatch')".to_owned(), "is a physical slot"),
        (&sql, format!("{make}, true)"), "is a temporary one"),
        (&sql, format!("{make}, false, true)"), "decodes two-phase transactions at PREPARE"),
        (&sql, format!("{make})"), "publication tuplewatch: does not exist, and replication slot tuplewatch is older"),
    ] {
        holder.run(&create).await;
        tuplewatch(&setup).await.failed(&["nothing was changed", expected]);
        assert_eq!(things(&sql).await, "1 slots, 0 publications, 0 schemas", "{expected}");
        holder.run("SELECT pg_drop_replication_slot('tuplewatch')").await;
    }

    tuplewatch(&setup).await.succeeded();
    sql.run("CREATE ROLE poor LOGIN REPLICATION; ALTER PUBLICATION tuplewatch DROP TABLE tuplewatch.attributes").await;
    sql.run("ALTER SCHEMA tuplewatch OWNER TO poor; ALTER TABLE tuplewatch.attributes OWNER TO poor").await;
    let poor = uri.replace("postgres@", "poor@");
    let belongs = "publication tuplewatch: belongs to role postgres, and role poor may not";
    tuplewatch(&["setup", "--database-uri", &poor]).await.failed(&[&format!("{belongs} alter it")]);
    tuplewatch(&["teardown", "--database-uri", &poor])
        .await
        .failed(&["nothing was changed", &format!("{belongs} drop it")]);
    assert_eq!(things(&sql).await, "1 slots, 1 publications, 1 schemas");
}

/// A failure that could not be foreseen rolls back everything.
#[tokio::test]
async fn a_failed_definition_rolls_back_the_earlier_ones() {
    let postgres = Postgres::start().await;
    let (sql, uri) = (postgres.sql().await, postgres.uri());
    let script = "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS
                      $$BEGIN RAISE EXCEPTION 'publications are made by the platform team'; END$$;
                  CREATE EVENT TRIGGER refuse ON ddl_command_end WHEN TAG IN ('CREATE PUBLICATION')
                      EXECUTE FUNCTION refuse()";
    sql.run(script).await;
    tuplewatch(&["setup", "--database-uri", &uri])
        .await
        .failed(&["could not create publication tuplewatch, and nothing was changed", "made by the platform team"]);
    assert_eq!(things(&sql).await, NOTHING);
    sql.run("DROP EVENT TRIGGER refuse").await;
    tuplewatch(&["setup", "--database-uri", &uri]).await.succeeded();
}
