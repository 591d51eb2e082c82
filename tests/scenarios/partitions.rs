//! Partitions come and go. A table that was created as a partition is a normal rotation, and ends no stream. A partition that may have
//! brought rows with it is a gap.

use super::publication::create_partitioned;
use super::schema::verified_again;
use crate::support::change::Change;
use crate::support::interruption::Interruption;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::changes;

async fn insert(sql: &Sql, kind: &str, id: &str) -> Change {
    sql.run(&format!("INSERT INTO tuplewatch.relation_tuples VALUES ('t1', '{kind}', '{id}', 'viewer', 'user', 'u')"))
        .await;
    Change::create(Change::tuple(kind, id, "viewer", "user", "u", ""))
}

#[tokio::test]
async fn a_rotation_of_partitions_is_no_gap() {
    let postgres = Postgres::start().await;
    create_partitioned(&postgres.sql().await).await;
    let mut server = Server::serve(&postgres, &[]).await;
    let (sql, mut stream, token) = server.first_delivered(&postgres, "first").await;
    let mut expected = Vec::new();
    let root = "PARTITION OF tuplewatch.relation_tuples";
    for (statement, kind) in [
        (format!("CREATE TABLE tuplewatch.teams {root} FOR VALUES IN ('team')"), "team"),
        // In one transaction with its first row, after the creation of another one.
        (
            format!(
                "BEGIN; CREATE TABLE tuplewatch.a {root} FOR VALUES IN ('a'); \
                 CREATE TABLE tuplewatch.b {root} FOR VALUES IN ('b')"
            ),
            "a",
        ),
        ("COMMIT".to_owned(), "b"),
        // A partitioned partition, with two partitions below it.
        (format!("CREATE TABLE tuplewatch.level {root} FOR VALUES IN ('c', 'd') PARTITION BY LIST (entity_type)"), ""),
        ("CREATE TABLE tuplewatch.c PARTITION OF tuplewatch.level FOR VALUES IN ('c')".to_owned(), "c"),
        (
            "DO $$ BEGIN CREATE TABLE tuplewatch.d PARTITION OF tuplewatch.level FOR VALUES IN ('d'); END $$"
                .to_owned(),
            "d",
        ),
        (format!("CREATE TABLE tuplewatch.rest {root} DEFAULT"), "e"),
        (format!("CREATE TABLE tuplewatch.f {root} FOR VALUES IN ('f')"), "f"),
        // Dropped before a check, and without rows.
        (format!("CREATE TABLE tuplewatch.g {root} FOR VALUES IN ('g'); DROP TABLE tuplewatch.g"), ""),
    ] {
        sql.run(&statement).await;
        if !kind.is_empty() {
            expected.push(insert(&sql, kind, "1").await);
        }
    }
    let last = expected.last().unwrap().clone();
    assert_eq!(changes(&stream.up_to(&last).await), expected);
    verified_again(&postgres).await;
    stream.expect_silence().await;

    // The same for a process that was not running.
    server.kill_9().await;
    sql.run(&format!("CREATE TABLE tuplewatch.h {root} FOR VALUES IN ('h')")).await;
    expected.push(insert(&sql, "h", "1").await);
    server.start().await;
    server.serving().await;
    let last = expected.last().unwrap().clone();
    assert_eq!(changes(&server.watch("t1", &token).await.up_to(&last).await), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_that_may_have_brought_rows_is_a_gap() {
    let postgres = Postgres::start().await;
    create_partitioned(&postgres.sql().await).await;
    for case in [
        // In one transaction, like the creation of a partition.
        Interruption {
            name: "filled",
            fault: &["BEGIN; CREATE TABLE tuplewatch.teams (LIKE tuplewatch.relation_tuples INCLUDING ALL); \
                      INSERT INTO tuplewatch.teams VALUES ('$NAME', 'team', 't', 'member', 'user', 'u'); \
                      ALTER TABLE tuplewatch.relation_tuples ATTACH PARTITION tuplewatch.teams FOR VALUES IN ('team'); COMMIT"],
            reasons: &["SCHEMA_CHANGED"],
            detail: "the set of partitions of table tuplewatch.relation_tuples changed",
            lasts: None,
        },
        // New, and truncated before a check. PostgreSQL does not send that.
        Interruption {
            name: "emptied",
            fault: &[
                "CREATE TABLE tuplewatch.groups PARTITION OF tuplewatch.relation_tuples FOR VALUES IN ('group')",
                "INSERT INTO tuplewatch.relation_tuples VALUES ('other', 'group', 'g', 'member', 'user', 'u')",
                "TRUNCATE tuplewatch.groups",
            ],
            reasons: &["SCHEMA_CHANGED"],
            detail: "the set of partitions of table tuplewatch.relation_tuples changed",
            lasts: None,
        },
        Interruption {
            name: "gone",
            fault: &["DROP TABLE tuplewatch.teams"],
            reasons: &["SCHEMA_CHANGED"],
            detail: "the set of partitions of table tuplewatch.relation_tuples changed",
            lasts: None,
        },
    ] {
        let server = case.prepare(&postgres).await;
        case.check(postgres.sql().await, server).await;
    }
}
