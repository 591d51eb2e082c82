//! Row level security applies to SQL and not to the stream. Tenants would not be found, reads would be incomplete, and deletions would
//! leave rows.

use crate::support::api::Api;
use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::wait::eventually;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_types::StatusExt as _;

/// A server whose role is neither superuser nor owner.
async fn with_a_poor_role(postgres: &Postgres) -> Server {
    let mut server = Server::prepare(postgres, &[]).await;
    let sql = postgres.sql().await;
    sql.run(
        "CREATE ROLE poor LOGIN REPLICATION; \
         GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA tuplewatch TO poor",
    )
    .await;
    server.point_to(&postgres.uri().replace("postgres@", "poor@"));
    server
}

#[tokio::test]
async fn policies_that_apply_to_our_role_are_an_error() {
    let postgres = Postgres::start().await;
    let mut server = with_a_poor_role(&postgres).await;
    server.start().await;
    server.serving().await;
    let (sql, mut stream, _) = server.first_delivered(&postgres, "before").await;
    let not_serving = Ok(ServingStatus::NotServing);
    let expected = |table: &str| format!("table tuplewatch.{table}: row level security applies to role poor");
    sql.run("ALTER TABLE tuplewatch.relation_tuples ENABLE ROW LEVEL SECURITY").await;
    eventually("health is NOT_SERVING", async || server.health("").await == not_serving).await;
    server.until_logged(&expected("relation_tuples")).await;
    sql.insert("t1", "meanwhile").await;
    sql.run("ALTER ROLE poor BYPASSRLS").await;
    server.serving().await;
    // The stream is complete, so no stream ends.
    stream.expect(Change::created("meanwhile")).await;

    // The other way round, for the table of tenants, which is only read.
    sql.run("ALTER TABLE tuplewatch.tenants ENABLE ROW LEVEL SECURITY").await;
    sql.run("ALTER ROLE poor NOBYPASSRLS").await;
    eventually("health is NOT_SERVING", async || server.health("").await == not_serving).await;
    server.until_logged(&expected("tenants")).await;
    for table in ["relation_tuples", "tenants"] {
        sql.run(&format!("ALTER TABLE tuplewatch.{table} DISABLE ROW LEVEL SECURITY")).await;
    }
    server.serving().await;
    sql.insert("t1", "after").await;
    stream.expect(Change::created("after")).await;
}

#[tokio::test]
async fn a_write_refused_by_a_policy_names_row_level_security() {
    let postgres = Postgres::start().await;
    let mut server = with_a_poor_role(&postgres).await;
    server.start().await;
    server.serving().await;
    let (sql, _stream, _) = server.first_delivered(&postgres, "before").await;
    sql.run("ALTER TABLE tuplewatch.relation_tuples ENABLE ROW LEVEL SECURITY").await;
    let mut api = Api::of(&server).await;
    let refused = api.try_write("t1", &["d:1#viewer@user:ada"]).await.unwrap_err();
    assert_eq!(refused.code(), Code::Internal, "{refused:?}");
    let words = refused.get_details_localized_message().map(|words| words.message).unwrap_or_default();
    assert!(words.contains("Row level security applies to tuplewatch's role"), "{refused:?}");
}
