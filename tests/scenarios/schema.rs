//! Watched tables change while tuplewatch runs: columns are added, dropped, moved, renamed and retyped, tables are renamed, dropped,
//! partitioned. Columns are found by name, so most of this changes nothing. A change that makes rows unreadable, or moves them
//! elsewhere, is reported. No value ever takes the place of another.

use super::publication::create_partitioned;
use crate::support::change::Change;
use crate::support::interruption::{Interruption, Lasting, Remedy, each_on_a_cluster};
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::{Stream, changes, metadata, reason};
use crate::support::wait::eventually;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

const SCHEMA_CHANGED: &[&str] = &["SCHEMA_CHANGED"];
const UNDECODABLE_ROW: &[&str] = &["UNDECODABLE_ROW"];

#[tokio::test]
async fn unmapped_columns_change_without_a_gap() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let (sql, mut stream, token) = server.first_delivered(&postgres, "first").await;
    let insert = "INSERT INTO tuplewatch.relation_tuples (subject_id, tenant_id, entity_type, relation, subject_type, \
                  entity_id) VALUES ('u', 't1', 'document', 'viewer', 'user', ";
    for (n, statement) in [
        "ADD COLUMN note text DEFAULT 'viewer'",
        "ADD COLUMN number int, ADD COLUMN more text",
        "DROP COLUMN note",
        "ALTER COLUMN number TYPE text",
        "RENAME COLUMN more TO tenant",
        "DROP COLUMN number",
    ]
    .iter()
    .enumerate()
    {
        // In one transaction with rows before and after it: pgoutput sends the new columns in the middle.
        sql.run(&format!("BEGIN; {insert} 'b{n}')")).await;
        sql.run(&format!("ALTER TABLE tuplewatch.relation_tuples {statement}")).await;
        sql.run(&format!("{insert} 'c{n}'); COMMIT")).await;
        sql.run(&format!("UPDATE tuplewatch.relation_tuples SET entity_id = 'd{n}' WHERE entity_id = 'b{n}'")).await;
        sql.run(&format!("DELETE FROM tuplewatch.relation_tuples WHERE entity_id = 'c{n}'")).await;
    }
    let expected: Vec<Change> = (0..6)
        .flat_map(|n| {
            let [b, c, d] = ["b", "c", "d"].map(|id| Change::viewer(&format!("{id}{n}")));
            [
                Change::create(b.clone()),
                Change::create(c.clone()),
                Change::delete(b),
                Change::create(d),
                Change::delete(c),
            ]
        })
        .collect();
    let last = expected.last().unwrap();
    assert_eq!(changes(&stream.up_to(last).await), expected);
    // Several checks find nothing either, and the slot can be read again from before all changes.
    verified_again(&postgres).await;
    stream.expect_silence().await;
    server.kill_and_restart().await;
    assert_eq!(changes(&server.watch("t1", &token).await.up_to(last).await), expected);
}

/// Waits until the publication was checked twice from now on.
pub(super) async fn verified_again(postgres: &Postgres) {
    let sql = postgres.sql().await;
    // The first check may have begun earlier, and the last one has only begun.
    for _ in 0..3 {
        sql.check_published().await;
    }
}

/// Each on its own cluster, because they change the same table.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changed_mapped_columns_and_tables_are_gaps_or_errors() {
    let cases = [
        // Its values are lost with it, without a row event.
        Interruption {
            name: "moved",
            fault: &["BEGIN; ALTER TABLE tuplewatch.relation_tuples DROP COLUMN relation, \
                      ADD COLUMN relation text NOT NULL DEFAULT 'viewer'; \
                      ALTER TABLE tuplewatch.relation_tuples REPLICA IDENTITY FULL; COMMIT"],
            reasons: SCHEMA_CHANGED,
            detail: "a mapped column and the replica identity of table tuplewatch.relation_tuples changed",
            lasts: None,
        },
        Interruption {
            name: "retyped",
            fault: &["ALTER TABLE tuplewatch.relation_tuples ALTER COLUMN entity_id TYPE varchar(200)"],
            reasons: SCHEMA_CHANGED,
            detail: "a mapped column of table tuplewatch.relation_tuples changed",
            lasts: None,
        },
        Interruption {
            name: "column_renamed",
            fault: &[
                "ALTER TABLE tuplewatch.relation_tuples RENAME COLUMN subject_id TO subject",
                "INSERT INTO tuplewatch.relation_tuples VALUES ('$NAME', 'document', 'lost', 'viewer', 'user', 'u')",
            ],
            reasons: UNDECODABLE_ROW,
            detail: "subject_id cannot be read: the table has no column subject_id",
            lasts: Some(Lasting {
                messages: &["table tuplewatch.relation_tuples: has no column subject_id, which the mapping names"],
                remedy: Remedy::Sql(&["ALTER TABLE tuplewatch.relation_tuples RENAME COLUMN subject TO subject_id"]),
            }),
        },
        Interruption {
            name: "table_renamed",
            fault: &[
                "ALTER TABLE tuplewatch.relation_tuples RENAME TO renamed",
                "INSERT INTO tuplewatch.renamed VALUES ('$NAME', 'document', 'lost', 'viewer', 'user', 'u')",
            ],
            reasons: UNDECODABLE_ROW,
            detail: "a row of table tuplewatch.renamed could not be decoded",
            lasts: Some(Lasting {
                messages: &["table tuplewatch.relation_tuples: does not exist"],
                remedy: Remedy::Sql(&["ALTER TABLE tuplewatch.renamed RENAME TO relation_tuples"]),
            }),
        },
        Interruption {
            name: "table_dropped",
            fault: &["DROP TABLE tuplewatch.relation_tuples"],
            reasons: SCHEMA_CHANGED,
            detail: "table tuplewatch.relation_tuples was created, dropped, renamed or replaced by another",
            lasts: Some(Lasting {
                messages: &["table tuplewatch.relation_tuples: does not exist", "tuplewatch setup"],
                remedy: Remedy::Setup(&[]),
            }),
        },
    ];
    each_on_a_cluster(cases).await;
}

/// Rows that are written meanwhile arrive under an unwatched name.
#[tokio::test]
async fn a_table_renamed_and_back_between_two_checks_is_a_gap() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let (sql, _stream, token) = server.first_delivered(&postgres, "before").await;
    let token = check_renamed_and_back(&server, &sql, &token, "described").await;

    // A session that has not received the description of the table yet.
    server.kill_and_restart().await;
    check_renamed_and_back(&server, &sql, &token, "undescribed").await;
}

async fn check_renamed_and_back(server: &Server, sql: &Sql, token: &str, after: &str) -> String {
    let stream = server.watch("t1", token).await;
    // In one transaction, so that no check happens in between. The row is described under the name at its time.
    sql.run(
        "BEGIN; \
         ALTER TABLE tuplewatch.relation_tuples RENAME TO renamed; \
         INSERT INTO tuplewatch.renamed SELECT 't1', 'document', md5(random()::text), 'viewer', 'user', 'u'; \
         ALTER TABLE tuplewatch.renamed RENAME TO relation_tuples; \
         COMMIT",
    )
    .await;
    sql.insert("t1", after).await;
    let mut last = String::new();
    for mut stream in [stream, server.watch("t1", token).await] {
        let (messages, status) = stream.ending().await;
        assert_eq!(changes(&messages), []);
        assert_eq!(reason(&status), (Code::Aborted, "UNDECODABLE_ROW".into()));
        assert!(status.message().contains("tuplewatch.renamed"), "{}", status.message());
        let mut next = server.watch("t1", &metadata(&status, "next_snap_token")).await;
        last = next.expect(Change::created(after)).await.token;
    }
    last
}

/// The same table with a replica identity, in its own cluster, with its own mapping.
struct Shares {
    postgres: Postgres,
    server: Server,
    _mapping: tempfile::TempDir,
}

impl Shares {
    async fn with(identity: &str) -> Self {
        let postgres = Postgres::start().await;
        postgres
            .sql()
            .await
            .run(&format!(
                "CREATE SCHEMA shop; \
                 CREATE TABLE shop.shares (note text, person int NOT NULL, company text NOT NULL, role text NOT NULL, \
                     document int NOT NULL, large text); \
                 ALTER TABLE shop.shares ALTER COLUMN large SET STORAGE EXTERNAL; {identity}"
            ))
            .await;
        let mapping = tempfile::tempdir().unwrap();
        let file = mapping.path().join("shares.yaml");
        let yaml = "tables: [{table: shop.shares, tenant: company, tuple: {entity_type: {constant: document}, \
                    entity_id: document, relation: role, subject_type: {constant: user}, subject_id: person}}]";
        std::fs::write(&file, yaml).unwrap();
        let server = Server::serve(&postgres, &[("--mapping-file", file.to_str().unwrap())]).await;
        Self { postgres, server, _mapping: mapping }
    }

    fn share(document: u32, role: &str, person: u32) -> String {
        Change::tuple("document", &document.to_string(), role, "user", &person.to_string(), "")
    }
}

#[tokio::test]
async fn changes_are_complete_under_each_sufficient_replica_identity() {
    for identity in [
        "ALTER TABLE shop.shares ADD PRIMARY KEY (company, document, person, role)",
        "ALTER TABLE shop.shares REPLICA IDENTITY FULL",
        "CREATE UNIQUE INDEX wide ON shop.shares (role, person, document, company) INCLUDE (note); \
         ALTER TABLE shop.shares REPLICA IDENTITY USING INDEX wide",
        // `setup` makes it FULL.
        "ALTER TABLE shop.shares REPLICA IDENTITY NOTHING",
        "CREATE UNIQUE INDEX narrow ON shop.shares (company, document); \
         ALTER TABLE shop.shares REPLICA IDENTITY USING INDEX narrow",
    ] {
        let shares = Shares::with(identity).await;
        let sql = shares.postgres.sql().await;
        let mut stream = shares.server.watch("acme", "").await;
        // The unchanged large value is not sent again.
        sql.run(
            "INSERT INTO shop.shares SELECT 'n', person, 'acme', 'viewer', 10 * person, repeat('x', 5000) \
             FROM generate_series(1, 3) person",
        )
        .await;
        sql.run("UPDATE shop.shares SET note = 'other' WHERE person = 1").await;
        sql.run("UPDATE shop.shares SET role = 'editor', note = NULL WHERE person IN (1, 2)").await;
        sql.run("UPDATE shop.shares SET person = person").await;
        sql.run("DELETE FROM shop.shares WHERE person IN (2, 3)").await;
        let [one, two, three] = [1, 2, 3].map(|person| Shares::share(10 * person, "viewer", person));
        let [one_edits, two_edits] = [1, 2].map(|person| Shares::share(10 * person, "editor", person));
        let last = Change::delete(three.clone());
        let mut all = changes(&stream.up_to(&last).await);
        // The order of the rows of one statement is up to PostgreSQL.
        all[3..7].sort();
        all[7..].sort();
        let mut expected = vec![Change::create(one.clone()), Change::create(two.clone()), Change::create(three)];
        let mut updated = vec![
            Change::delete(one),
            Change::create(one_edits),
            Change::delete(two),
            Change::create(two_edits.clone()),
        ];
        updated.sort();
        let mut deleted = vec![Change::delete(two_edits), last];
        deleted.sort();
        expected.extend(updated);
        expected.extend(deleted);
        assert_eq!(all, expected, "{identity}");
    }
}

/// Before the next check notices, an incomplete old row is a gap, and no value is invented.
#[tokio::test]
async fn a_change_with_an_incomplete_old_row_is_a_gap_at_once() {
    let shares = Shares::with("ALTER TABLE shop.shares ADD PRIMARY KEY (company, document, person, role)").await;
    let sql = shares.postgres.sql().await;
    let mut streams: Vec<Stream> = vec![
        shares.server.watch("acme", "").await,
        shares.server.watch("acme", "").await,
        shares.server.watch("other", "").await,
    ];
    sql.run("INSERT INTO shop.shares VALUES ('', 1, 'acme', 'viewer', 10), ('', 2, 'other', 'viewer', 20)").await;
    for (stream, share) in streams.iter_mut().zip([
        Shares::share(10, "viewer", 1),
        Shares::share(10, "viewer", 1),
        Shares::share(20, "viewer", 2),
    ]) {
        stream.expect(Change::create(share)).await;
    }
    sql.run("CREATE UNIQUE INDEX narrow ON shop.shares (company)").await;
    sql.run("ALTER TABLE shop.shares REPLICA IDENTITY USING INDEX narrow").await;
    sql.run("UPDATE shop.shares SET role = 'editor' WHERE company = 'acme'").await;
    sql.run("DELETE FROM shop.shares WHERE company = 'other'").await;
    for mut stream in streams {
        let (messages, status) = stream.ending().await;
        assert_eq!(changes(&messages), [], "nothing that the old row does not tell");
        assert_eq!(reason(&status), (Code::Aborted, "UNDECODABLE_ROW".into()));
        let expected = "the replica identity lacks it (ALTER TABLE shop.shares REPLICA IDENTITY FULL)";
        assert!(status.message().contains(expected), "{}", status.message());
    }
}

#[tokio::test]
async fn a_missing_replica_identity_makes_a_node_unready() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let (sql, mut stream, _) = server.first_delivered(&postgres, "before").await;
    sql.run("ALTER TABLE tuplewatch.relation_tuples REPLICA IDENTITY NOTHING").await;
    for statement in
        ["DELETE FROM tuplewatch.relation_tuples", "UPDATE tuplewatch.relation_tuples SET subject_id = 'other'"]
    {
        let error = sql.batch_execute(statement).await.expect_err(statement);
        assert_eq!(error.code().map(|code| code.code().to_owned()).as_deref(), Some("55000"), "{statement}: {error}");
    }
    let not_serving = Ok(ServingStatus::NotServing);
    eventually("health is NOT_SERVING", async || server.health("").await == not_serving).await;
    server.until_logged("old rows lack column entity_id: the replica identity does not cover it").await;
    sql.run("ALTER TABLE tuplewatch.relation_tuples REPLICA IDENTITY DEFAULT").await;
    sql.run("DELETE FROM tuplewatch.relation_tuples").await;
    // Nothing is lost, so the stream continues.
    stream.expect(Change::delete(Change::viewer("before"))).await;
}

#[tokio::test]
async fn changes_of_partitions_are_streamed_under_their_root() {
    let postgres = Postgres::start().await;
    let sql = postgres.sql().await;
    create_partitioned(&sql).await;
    let mut server = Server::serve(&postgres, &[]).await;
    let mut stream = server.watch("t1", "").await;
    let tuple = |kind: &str, id: &str| Change::tuple(kind, id, "viewer", "user", "u", "");
    sql.insert("t1", "a").await;
    let token = stream.expect(Change::created("a")).await.token;
    sql.run("INSERT INTO tuplewatch.folders VALUES ('t1', 'folder', 'f', 'viewer', 'user', 'u')").await;
    // From one partition to the other: PostgreSQL deletes and inserts.
    sql.run("UPDATE tuplewatch.relation_tuples SET entity_type = 'folder' WHERE entity_id = 'a'").await;
    // Inside a partition, and by the partition's name.
    sql.run("UPDATE tuplewatch.folders SET entity_id = 'b' WHERE entity_id = 'a'").await;
    sql.run("DELETE FROM tuplewatch.relation_tuples").await;
    let mut expected = vec![
        Change::create(tuple("folder", "f")),
        Change::delete(tuple("document", "a")),
        Change::create(tuple("folder", "a")),
        Change::delete(tuple("folder", "a")),
        Change::create(tuple("folder", "b")),
    ];
    let mut all = Vec::new();
    while all.len() < 7 {
        all.extend(stream.next().await.changes);
    }
    all[5..].sort();
    expected.extend([Change::delete(tuple("folder", "b")), Change::delete(tuple("folder", "f"))]);
    assert_eq!(all, expected);

    sql.insert("t1", "last").await;
    server.kill_9().await;
    server.start().await;
    let again = changes(&server.watch("t1", &token).await.up_to(&Change::created("last")).await);
    assert_eq!(again.len(), 8);
    assert_eq!(again[..5], expected[..5]);

    // PostgreSQL sends the TRUNCATE of the root under its name.
    let mut stream = server.watch("t1", "").await;
    sql.run("TRUNCATE tuplewatch.relation_tuples").await;
    let (_, status) = stream.ending().await;
    assert_eq!(reason(&status), (Code::Aborted, "TRUNCATE".into()));
}
