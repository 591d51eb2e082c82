//! Defaults of a role, a database or the server that differ from PostgreSQL's own. Values are still streamed in the usual format, no
//! session ends, and no other role is assumed.
//!
//! PostgreSQL formats values by the settings of the session, in the walsender too, and applies a new default of the server while it
//! streams.

use super::cli::process::{program, run, tuplewatch};
use crate::support::api::Api;
use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::Stream;
use crate::support::wait::eventually;

/// A type, a value in SQL, and its text in a session with PostgreSQL's own defaults.
const VALUES: [(&str, &str, &str); 12] = [
    ("timestamptz", "'2024-02-03 04:05:06.7+00'", "2024-02-03 04:05:06.7+00"),
    ("timestamp", "'2024-02-03 04:05:06'", "2024-02-03 04:05:06"),
    ("timetz", "'04:05:06+02'", "04:05:06+02"),
    ("date", "'2024-02-03'", "2024-02-03"),
    ("interval", "'1 year 2 mons -3 days 04:05:06'", "1 year 2 mons -3 days +04:05:06"),
    ("tstzrange", "'[2024-02-03 04:05:06+00,)'", "[\"2024-02-03 04:05:06+00\",)"),
    ("date[]", "'{2024-02-03}'", "{2024-02-03}"),
    ("bytea", "'\\xdead00'", "\\xdead00"),
    ("float8", "0.1::float8 + 0.2::float8", "0.30000000000000004"),
    ("float4", "1.1", "1.1"),
    ("money", "12345.67::numeric", "$12,345.67"),
    ("jsonb", "'{\"a\": 1.50}'", "{\"a\": 1.50}"),
];

/// If PostgreSQL was built with libxml.
const XML: (&str, &str, &str) = ("xml", "'<a>b</a>'", "<a>b</a>");

async fn values(sql: &Sql) -> Vec<(&'static str, &'static str, &'static str)> {
    let xml = sql.batch_execute("SELECT '<a/>'::xml").await.is_ok().then_some(XML);
    VALUES.into_iter().chain(xml).collect()
}

/// Settings for `ALTER … SET` that exist as defaults in real installations.
const OF_THE_ROLE: [&str; 17] = [
    "IntervalStyle = 'iso_8601'",
    "bytea_output = 'escape'",
    "search_path = 'nowhere'",
    "role = 'somebody_else'",
    "row_security = on",
    "statement_timeout = '1ms'",
    "lock_timeout = '1ms'",
    "idle_in_transaction_session_timeout = '1ms'",
    "idle_session_timeout = '300ms'",
    "default_transaction_read_only = on",
    "default_transaction_isolation = 'serializable'",
    "default_transaction_deferrable = on",
    "standard_conforming_strings = off",
    "quote_all_identifiers = on",
    "exit_on_error = on",
    "client_min_messages = 'error'",
    "wal_sender_timeout = '1min'",
];

const OF_THE_SERVER: [&str; 3] = ["TimeZone = 'Asia/Kolkata'", "extra_float_digits = -15", "xmloption = 'document'"];

/// Creates a table for each type, with the value as the subject of a tuple, and a role that may read them.
async fn prepare(sql: &Sql) -> tempfile::NamedTempFile {
    let mut mapping = "tables:\n".to_owned();
    sql.run("CREATE SCHEMA shop").await;
    for (n, (of_type, ..)) in values(sql).await.iter().enumerate() {
        sql.run(&format!("CREATE TABLE shop.v{n} (company text, id text PRIMARY KEY, value {of_type} NOT NULL)")).await;
        sql.run(&format!("ALTER TABLE shop.v{n} REPLICA IDENTITY FULL")).await;
        mapping += &format!(
            "  - table: shop.v{n}\n    tenant: company\n    tuple: {{ entity_type: {{ constant: document }}, entity_id: id, \
             relation: {{ constant: has }}, subject_type: {{ constant: value }}, subject_id: value }}\n"
        );
    }
    sql.run(
        "CREATE ROLE somebody_else; CREATE ROLE reader LOGIN REPLICATION; GRANT somebody_else TO reader;
         GRANT USAGE ON SCHEMA shop TO reader; GRANT SELECT ON ALL TABLES IN SCHEMA shop TO reader",
    )
    .await;
    let file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
    std::fs::write(file.path(), mapping).unwrap();
    file
}

/// Each value arrives in its ordinary form.
async fn all_arrive(sql: &Sql, stream: &mut Stream, id: &str) {
    for (n, (of_type, value, text)) in values(sql).await.iter().enumerate() {
        sql.run(&format!("INSERT INTO shop.v{n} VALUES ('t1', '{id}', {value})")).await;
        let expected = Change::create(Change::tuple("document", id, "has", "value", text, ""));
        let got = stream.next().await.changes;
        assert_eq!(got, [expected], "{of_type} {value}");
    }
}

#[tokio::test]
async fn values_are_streamed_in_postgresqls_default_format() {
    let postgres = Postgres::with(&[("lc_monetary", "C")]).await;
    let sql = postgres.sql().await;
    let mapping = prepare(&sql).await;
    let mut server = Server::prepare(&postgres, &[("--mapping-file", mapping.path().to_str().unwrap())]).await;
    let reader = postgres.uri().replace("postgres@", "reader@");
    server.point_to(&format!(
        "{reader}?options=-c%20DateStyle%3DGerman%20-c%20role%3Dsomebody_else%20--bytea_output=escape"
    ));
    for setting in OF_THE_ROLE {
        sql.run(&format!("ALTER ROLE reader SET {setting}")).await;
    }
    if postgres.major() >= 17 {
        sql.run("ALTER ROLE reader SET transaction_timeout = '300ms'").await;
    }
    sql.run("ALTER DATABASE postgres SET DateStyle = 'SQL, DMY'").await;
    sql.run("ALTER ROLE reader IN DATABASE postgres SET array_nulls = off").await;
    for setting in OF_THE_SERVER {
        sql.run(&format!("ALTER SYSTEM SET {setting}")).await;
    }
    sql.run("SELECT pg_reload_conf()").await;
    server.start().await;
    server.serving().await;

    let mut stream = server.watch("t1", "").await;
    all_arrive(&sql, &mut stream, "a").await;
    // Longer than any of the timeouts.
    let lived = "(SELECT now() - min(backend_start) > '1s' FROM pg_stat_activity WHERE usename = 'reader')";
    let walsender = async || sql.walsender().await.map(|(pid, _)| pid);
    let first = walsender().await;
    eventually("the sessions have lived for a second", async || sql.is_true(lived).await).await;

    // A reload while it streams.
    for setting in ["DateStyle = 'Postgres, DMY'", "IntervalStyle = 'sql_standard'", "bytea_output = 'escape'"] {
        sql.run(&format!("ALTER SYSTEM SET {setting}")).await;
    }
    sql.run("SELECT pg_reload_conf()").await;
    let fresh = async || postgres.sql().await.value("SHOW IntervalStyle").await == "sql_standard";
    eventually("the reload is seen", fresh).await;
    all_arrive(&sql, &mut stream, "b").await;
    assert_eq!(walsender().await, first, "the same session, from beginning to end");

    // The old row's values, too.
    sql.run("DELETE FROM shop.v0 WHERE id = 'a'").await;
    let expected = Change::delete(Change::tuple("document", "a", "has", "value", VALUES[0].2, ""));
    assert_eq!(stream.next().await.changes, [expected]);
    server.terminate().await;
    assert_eq!(server.ended().await.code(), Some(0));
}

/// The role has its own rights only: `SET role` adds none and removes none.
#[tokio::test]
async fn a_role_that_sets_another_role_keeps_its_own_rights() {
    let postgres = Postgres::start().await;
    let sql = postgres.sql().await;
    tuplewatch(&["setup", "--database-uri", &postgres.uri()]).await.succeeded();
    sql.run("CREATE ROLE owner SUPERUSER; CREATE ROLE app LOGIN REPLICATION; GRANT owner TO app; ALTER ROLE app SET role = 'owner'")
        .await;
    let directory = tempfile::tempdir().unwrap();
    let app = postgres.uri().replace("postgres@", "app@");
    let mut command = program(directory.path());
    command.args(["serve", "--database-uri", &app, "--changelog-path", "log", "--server-grpc-port", "0"]);
    run(command).await.failed(&["the role has no SELECT", "TO \"app\";"]);
    let ran = tuplewatch(&["doctor", "--database-uri", &app, "--changelog-path", "log"]).await;
    for text in ["would become owner at log-on (SET role)", "ALTER ROLE \"app\" RESET role;"] {
        assert!(ran.out.contains(text), "{ran:?}");
    }
}

/// Writes of clients succeed, whatever the defaults of the role are.
#[tokio::test]
async fn writes_succeed_under_hostile_defaults() {
    let postgres = Postgres::start().await;
    let sql = postgres.sql().await;
    let mut server = Server::prepare(&postgres, &[]).await;
    sql.run("CREATE ROLE writer LOGIN SUPERUSER").await;
    for setting in OF_THE_ROLE {
        sql.run(&format!("ALTER ROLE writer SET {setting}")).await;
    }
    sql.run("ALTER ROLE writer SET session_replication_role = 'replica'").await;
    // A trigger finds a table of the schema public without its schema, as for other programs.
    sql.run(
        "CREATE TABLE public.audit (id text);
         CREATE FUNCTION tuplewatch.audit() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN INSERT INTO audit VALUES (NEW.entity_id); RETURN NEW; END';
         CREATE TRIGGER audit AFTER INSERT ON tuplewatch.relation_tuples
             FOR EACH ROW EXECUTE FUNCTION tuplewatch.audit()",
    )
    .await;
    server.point_to(&postgres.uri().replace("postgres@", "writer@"));
    server.start().await;
    server.serving().await;
    let mut stream = server.watch("t1", "").await;
    Api::of(&server).await.write("t1", &["document:a#viewer@user:u"]).await;
    assert_eq!(stream.next().await.changes, [Change::created("a")]);
    assert_eq!(sql.value("SELECT string_agg(id, ',') FROM audit").await, "a");
}
