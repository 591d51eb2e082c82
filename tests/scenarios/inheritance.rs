//! Rows of a table that inherits from a watched table: SELECT returns them, and the stream never does.

use crate::support::api::Api;
use crate::support::change::Change;
use crate::support::interruption::{Interruption, Lasting, Remedy, each_on_a_cluster};
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use tuplewatch::api::grpc::proto::TupleFilter;

const INHERIT: &str = "CREATE TABLE tuplewatch.archive () INHERITS (tuplewatch.relation_tuples); \
                       INSERT INTO tuplewatch.archive VALUES ('t1', 'document', 'old', 'viewer', 'user', 'u')";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_inheriting_table_is_an_error_and_then_a_gap() {
    each_on_a_cluster(
        [
            ("detached", Remedy::Sql(&["ALTER TABLE tuplewatch.archive NO INHERIT tuplewatch.relation_tuples"])),
            ("dropped", Remedy::Sql(&["DROP TABLE tuplewatch.archive"])),
        ]
        .map(|(name, remedy)| Interruption {
            name,
            fault: &[INHERIT],
            reasons: &["SCHEMA_CHANGED"],
            detail: "another table inherited from table tuplewatch.relation_tuples for a while",
            lasts: Some(Lasting {
                messages: &[
                    "table tuplewatch.relation_tuples: table tuplewatch.archive inherits from it, and is not mapped",
                    "NO INHERIT",
                ],
                remedy,
            }),
        }),
    )
    .await;
}

#[tokio::test]
async fn reads_and_deletes_leave_inheriting_tables_alone() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let (sql, _stream, _) = server.first_delivered(&postgres, "own").await;
    sql.run(INHERIT).await;
    let mut api = Api::of(&server).await;
    assert_eq!(api.read("t1", TupleFilter::default(), 10).await, ["document:own#viewer@user:u"]);
    api.delete_tenant("t1").await.unwrap();
    assert_eq!(sql.value("SELECT count(*) FROM ONLY tuplewatch.relation_tuples").await, "0");
    assert_eq!(sql.value("SELECT count(*) FROM tuplewatch.archive").await, "1");
}

/// Each table is streamed under its own name.
#[tokio::test]
async fn a_mapped_inheriting_table_is_streamed() {
    let postgres = Postgres::start().await;
    let columns = "company text, id text, person text";
    postgres
        .sql()
        .await
        .run(&format!(
            "CREATE SCHEMA shop; CREATE TABLE shop.ancestor (note text); \
             CREATE TABLE shop.shares ({columns}) INHERITS (shop.ancestor); \
             CREATE TABLE shop.old_shares () INHERITS (shop.shares); \
             ALTER TABLE shop.shares REPLICA IDENTITY FULL; ALTER TABLE shop.old_shares REPLICA IDENTITY FULL"
        ))
        .await;
    let mapping = tempfile::tempdir().unwrap();
    let file = mapping.path().join("shares.yaml");
    let table = |name: &str| {
        format!(
            "{{table: shop.{name}, tenant: company, tuple: {{entity_type: {{constant: document}}, entity_id: id, \
             relation: {{constant: viewer}}, subject_type: {{constant: user}}, subject_id: person}}}}"
        )
    };
    std::fs::write(&file, format!("tables: [{}, {}]", table("shares"), table("old_shares"))).unwrap();
    let server = Server::serve(&postgres, &[("--mapping-file", file.to_str().unwrap())]).await;
    let mut stream = server.watch("acme", "").await;
    let sql = postgres.sql().await;
    sql.run("INSERT INTO shop.shares VALUES ('', 'acme', '1', 'u')").await;
    stream.expect(Change::created("1")).await;
    sql.run("INSERT INTO shop.old_shares VALUES ('', 'acme', '2', 'u')").await;
    stream.expect(Change::created("2")).await;
    // A statement on the parent affects the rows of both.
    sql.run("DELETE FROM shop.shares WHERE id = '2'").await;
    stream.expect(Change::delete(Change::viewer("2"))).await;
}
