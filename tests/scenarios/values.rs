//! Values change without a row event: a table is rewritten, an enum label is renamed, a composite type gets another attribute. Subscribers
//! would keep the old values for ever, so each of these is a gap. A similar change that keeps all values ends no stream.

use super::schema::verified_again;
use crate::support::change::Change;
use crate::support::interruption::{Interruption, Lasting, Remedy, each_on_a_cluster};
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::stream::{changes, metadata, reason};
use tonic::Code;

const SCHEMA_CHANGED: &[&str] = &["SCHEMA_CHANGED"];

/// A table of papers whose columns have types of all kinds.
struct Papers {
    postgres: Postgres,
    server: Server,
    _mapping: tempfile::TempDir,
}

impl Papers {
    async fn new() -> Self {
        let postgres = Postgres::start().await;
        postgres
            .sql()
            .await
            .run(
                "CREATE SCHEMA shop; \
                 CREATE TYPE shop.role AS ENUM ('reader', 'writer'); \
                 CREATE DOMAIN shop.title AS shop.role NOT NULL; \
                 CREATE TYPE shop.person AS (number int, titles shop.title[]); \
                 CREATE TABLE shop.papers (company text, paper numeric(10, 2), role shop.title, person shop.person, \
                     note text, PRIMARY KEY (company, paper)); \
                 ALTER TABLE shop.papers REPLICA IDENTITY FULL",
            )
            .await;
        let mapping = tempfile::tempdir().unwrap();
        let file = mapping.path().join("papers.yaml");
        let yaml = "tables: [{table: shop.papers, tenant: company, tuple: {entity_type: {constant: paper}, \
                    entity_id: paper, relation: role, subject_type: {constant: person}, subject_id: person}}]";
        std::fs::write(&file, yaml).unwrap();
        let server = Server::serve(&postgres, &[("--mapping-file", file.to_str().unwrap())]).await;
        Self { postgres, server, _mapping: mapping }
    }

    async fn insert(&self, paper: &str, role: &str, person: &str) -> Change {
        self.postgres
            .sql()
            .await
            .run(&format!("INSERT INTO shop.papers VALUES ('acme', {paper}, '{role}', '{person}')"))
            .await;
        Change::create(Change::tuple("paper", paper, role, "person", person, ""))
    }
}

#[tokio::test]
async fn a_value_that_changes_without_a_row_event_is_a_gap() {
    let papers = Papers::new().await;
    let sql = papers.postgres.sql().await;
    let mut stream = papers.server.watch("acme", "").await;
    stream.expect(papers.insert("1.00", "reader", "(1,{reader})").await).await;
    let rewritten = "table shop.papers was rewritten and its column paper altered, which may change values";
    for (n, (fault, expected)) in [
        (
            "ALTER TYPE shop.role RENAME VALUE 'reader' TO 'viewer'",
            "an enum label in column person and an enum label in column role of table shop.papers changed",
        ),
        (
            "ALTER TYPE shop.person ADD ATTRIBUTE more text",
            "the composite type in column person of table shop.papers changed",
        ),
        ("ALTER TABLE shop.papers ALTER COLUMN paper TYPE numeric(10, 1)", rewritten),
        ("ALTER TABLE shop.papers ALTER COLUMN paper TYPE numeric(10, 1) USING paper + 1", rewritten),
    ]
    .into_iter()
    .enumerate()
    {
        sql.run(fault).await;
        let (messages, status) = stream.ending().await;
        assert_eq!(changes(&messages), [], "{fault}");
        assert_eq!(reason(&status), (Code::Aborted, "SCHEMA_CHANGED".into()), "{fault}");
        assert!(status.message().contains(expected), "{fault}: {}", status.message());
        stream = papers.server.watch("acme", &metadata(&status, "next_snap_token")).await;
        let person = if n == 0 { "(2,{viewer})" } else { "(2,{viewer},)" };
        let paper = format!("{}.{}", 100 * (n + 1), if n < 2 { "00" } else { "0" });
        stream.expect(papers.insert(&paper, "viewer", person).await).await;
    }
}

/// Each seen by a separate check, and by a process that was not running.
#[tokio::test]
async fn a_schema_change_that_keeps_all_values_ends_no_stream() {
    let mut papers = Papers::new().await;
    let sql = papers.postgres.sql().await;
    let mut stream = papers.server.watch("acme", "").await;
    let first = papers.insert("1.00", "reader", "(1,{reader})").await;
    let token = stream.expect(first).await.token;
    let mut expected = Vec::new();
    for (n, statement) in [
        "VACUUM FULL shop.papers",
        "ALTER TABLE shop.papers ALTER COLUMN paper SET STATISTICS 7",
        "ALTER TYPE shop.role ADD VALUE 'owner' BEFORE 'writer'",
        "ALTER TABLE shop.papers ALTER COLUMN note TYPE text USING upper(note)",
        "ALTER TABLE shop.papers ALTER COLUMN paper TYPE numeric(12, 2)",
    ]
    .into_iter()
    .enumerate()
    {
        sql.run(statement).await;
        let change = papers.insert(&format!("{}.00", 10 + n), "writer", "(2,{writer})").await;
        stream.expect(change.clone()).await;
        expected.push(change);
        verified_again(&papers.postgres).await;
    }
    stream.expect_silence().await;

    papers.server.kill_9().await;
    sql.run("CLUSTER shop.papers USING papers_pkey").await;
    let change = papers.insert("20.00", "owner", "(2,{owner})").await;
    expected.push(change.clone());
    papers.server.start().await;
    papers.server.serving().await;
    assert_eq!(changes(&papers.server.watch("acme", &token).await.up_to(&change).await), expected);
}

/// Each on its own cluster, because they change the same table.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rewrite_of_a_preset_table_is_a_gap_or_an_error() {
    let cases = [
        Interruption {
            name: "rewritten",
            fault: &[
                "ALTER TABLE tuplewatch.relation_tuples ALTER COLUMN subject_id TYPE text COLLATE \"C\" USING lower(subject_id)",
            ],
            reasons: SCHEMA_CHANGED,
            detail: "table tuplewatch.relation_tuples was rewritten and its column subject_id altered, which may change values",
            lasts: None,
        },
        Interruption {
            name: "named",
            fault: &["ALTER TABLE tuplewatch.relation_tuples DROP CONSTRAINT relation_tuples_subject_id_form, \
                      ALTER COLUMN subject_id TYPE regrole USING 'postgres'"],
            reasons: SCHEMA_CHANGED,
            detail: "a mapped column of table tuplewatch.relation_tuples changed",
            lasts: Some(Lasting {
                messages: &["column subject_id holds regrole, which is written as a name that others can change"],
                remedy: Remedy::Sql(&[
                    "ALTER TABLE tuplewatch.relation_tuples ALTER COLUMN subject_id TYPE varchar(200)",
                ]),
            }),
        },
    ];
    each_on_a_cluster(cases).await;
}
