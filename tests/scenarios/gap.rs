//! The end of a gap. PostgreSQL decides for each row whether to send it, and sends a transaction when it commits. A transaction that
//! wrote while a table was not published, and commits long after the table is published again, arrives without these rows. So a gap that
//! ended with the repair would hide them for ever.

use crate::support::change::Change;
use crate::support::postgres::{Postgres, major};
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::{Stream, metadata, optional_metadata, reason};
use crate::support::wait::{eventually, within};
use std::time::{Duration, Instant};
use tonic::{Code, Status};

/// The publication is reduced and restored while a transaction writes and stays open.
struct Case {
    name: &'static str,
    /// The first major version that has it.
    since: u32,
    /// Prepares the publication.
    made: &'static str,
    away: &'static str,
    back: &'static str,
    ends: Ends,
}

/// How the transaction ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ends {
    Commit,
    /// Prepared while the gap is open, and committed by another session.
    CommitPrepared,
    Rollback,
    /// Its session is terminated.
    Terminate,
}

const CASES: [Case; 7] = [
    Case {
        name: "member",
        since: 14,
        made: "",
        away: "ALTER PUBLICATION $NAME DROP TABLE tuplewatch.relation_tuples",
        back: "ALTER PUBLICATION $NAME ADD TABLE tuplewatch.relation_tuples",
        ends: Ends::Commit,
    },
    Case {
        name: "operation",
        since: 14,
        made: "",
        away: "ALTER PUBLICATION $NAME SET (publish = 'update, delete, truncate')",
        back: "ALTER PUBLICATION $NAME SET (publish = 'insert, update, delete, truncate')",
        ends: Ends::CommitPrepared,
    },
    Case {
        name: "row_filter",
        since: 15,
        made: "",
        away: "ALTER PUBLICATION $NAME SET TABLE tuplewatch.relation_tuples WHERE (entity_id <> 'late'), tuplewatch.attributes",
        back: "ALTER PUBLICATION $NAME SET TABLE tuplewatch.relation_tuples, tuplewatch.attributes",
        ends: Ends::Commit,
    },
    Case {
        name: "column_list",
        since: 15,
        made: "",
        away: "ALTER PUBLICATION $NAME SET TABLE tuplewatch.relation_tuples (tenant_id, entity_type, entity_id, relation, \
               subject_type, subject_id), tuplewatch.attributes",
        back: "ALTER PUBLICATION $NAME SET TABLE tuplewatch.relation_tuples, tuplewatch.attributes",
        ends: Ends::Rollback,
    },
    Case {
        name: "by_schema",
        since: 15,
        made: "ALTER PUBLICATION $NAME SET TABLES IN SCHEMA tuplewatch",
        away: "ALTER PUBLICATION $NAME SET TABLE tuplewatch.attributes",
        back: "ALTER PUBLICATION $NAME SET TABLES IN SCHEMA tuplewatch",
        ends: Ends::Terminate,
    },
    Case {
        name: "root_option",
        since: 14,
        made: "",
        away: "ALTER PUBLICATION $NAME SET (publish_via_partition_root = true, publish = 'truncate')",
        back: "ALTER PUBLICATION $NAME SET (publish_via_partition_root = false, publish = 'insert, update, delete, truncate')",
        ends: Ends::Commit,
    },
    Case {
        name: "other_tables",
        since: 14,
        made: "",
        away: "ALTER PUBLICATION $NAME SET TABLE tuplewatch.attributes",
        back: "ALTER PUBLICATION $NAME SET TABLE tuplewatch.attributes, tuplewatch.relation_tuples",
        ends: Ends::Commit,
    },
];

impl Case {
    async fn run(&self, sql: &Sql, statement: &str) {
        sql.run(&statement.replace("$NAME", self.name)).await;
    }

    fn insert(&self, id: &str) -> String {
        let tenant = self.name;
        format!("INSERT INTO tuplewatch.relation_tuples VALUES ('{tenant}', 'document', '{id}', 'viewer', 'user', 'u')")
    }

    async fn check(&self, postgres: &Postgres) {
        let (name, sql, writer) = (self.name, postgres.sql().await, postgres.sql().await);
        let flags = [("--replication-publication", name)];
        let mut server = Server::prepare_slot(&postgres.uri(), name, &flags).await;
        self.run(&sql, self.made).await;
        sql.run(&format!("INSERT INTO tuplewatch.tenants (id, name) VALUES ('{name}', '')")).await;
        server.start().await;
        server.serving().await;
        let mut stream = server.watch(name, "").await;
        sql.insert(name, "before").await;
        let before = stream.expect(Change::created("before")).await.token;

        writer.run(&format!("BEGIN; {}", self.insert("early"))).await;
        self.run(&sql, self.away).await;
        // In a savepoint, so that the row has the id of a subtransaction.
        writer.run(&format!("SAVEPOINT s; {}; RELEASE s", self.insert("late"))).await;
        self.run(&sql, self.back).await;

        let began = Instant::now();
        let (_, status) = within(&format!("{name}: the gap is reported"), stream.ending()).await;
        assert_eq!(reason(&status), (Code::Aborted, "SCHEMA_CHANGED".to_owned()), "{name}");
        // A session that found the publication incomplete has ended, and returns after its backoff.
        assert!(began.elapsed() < Duration::from_secs(30), "{name}: reported after {:?}", began.elapsed());
        assert_eq!(optional_metadata(&status, "next_snap_token"), None, "{name}: its end must be unknown");
        server.until_logged("the gap stays open until these transactions have ended, as they may commit").await;
        server.serving().await;

        // Changes of other transactions are still delivered, those of the same table too, also after a restart.
        let mut stream = server.watch(name, "").await;
        sql.insert(name, "meanwhile").await;
        let meanwhile = stream.expect(Change::created("meanwhile")).await.token;
        let (_, status) = server.watch(name, &before).await.ending().await;
        assert_eq!(optional_metadata(&status, "next_snap_token"), None, "{name}: it must still be open");
        // A gap that is not on disk yet would be found again, and would end this stream too early.
        sql.until_recorded(name).await;
        server.kill_and_restart().await;
        let mut stream = server.watch(name, &meanwhile).await;
        sql.insert(name, "later").await;
        stream.expect(Change::created("later")).await;

        self.end(&sql, &writer).await;
        let (_, status) = within(&format!("{name}: it is reported again"), stream.ending()).await;
        let next = self.is_over(&server, &status).await;
        // Every token leads to the same end of the gap.
        for token in [&before, &meanwhile] {
            let (_, status) = server.watch(name, token).await.ending().await;
            assert_eq!(metadata(&status, "next_snap_token"), next, "{name}");
        }
        let held = sql.facts(name).await;
        let is_committed = matches!(self.ends, Ends::Commit | Ends::CommitPrepared);
        assert_eq!(
            held.contains(&Change::viewer("late")),
            is_committed,
            "{name}: the state has it, and no stream does"
        );
    }

    async fn end(&self, sql: &Sql, writer: &Sql) {
        match self.ends {
            Ends::Commit => writer.run("COMMIT").await,
            Ends::Rollback => writer.run("ROLLBACK").await,
            Ends::CommitPrepared => {
                writer.run("PREPARE TRANSACTION 'late'").await;
                sql.run("COMMIT PREPARED 'late'").await;
            }
            Ends::Terminate => {
                let statement =
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'";
                sql.run(statement).await;
            }
        }
    }

    /// The gap has ended. Returns the token after it.
    async fn is_over(&self, server: &Server, status: &Status) -> String {
        let name = self.name;
        assert_eq!(reason(status), (Code::Aborted, "SCHEMA_CHANGED".to_owned()), "{name}");
        let next = metadata(status, "next_snap_token");
        let mut stream: Stream = server.watch(name, &next).await;
        stream.expect_silence().await;
        next
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_ends_after_every_transaction_that_wrote_inside_it() {
    let major = major();
    let cases = CASES.iter().filter(|case| case.since <= major);
    let runs = cases.map(async |case| {
        // Each on its own cluster, because they would wait for each other's transactions.
        let postgres = Postgres::with(&[("max_prepared_transactions", "4")]).await;
        case.check(&postgres).await;
    });
    futures_util::future::join_all(runs).await;
}

/// A restart with a mapping of one more table, during a write to that table.
#[tokio::test]
async fn a_table_added_by_a_mapping_is_complete_after_its_writers_end() {
    let postgres = Postgres::start().await;
    let (sql, writer) = (postgres.sql().await, postgres.sql().await);
    sql.run(
        "CREATE TABLE a (t text, id text, PRIMARY KEY (t, id)); CREATE TABLE b (t text, id text, PRIMARY KEY (t, id))",
    )
    .await;
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, tables: &[&str]| {
        let path = directory.path().join(name);
        let table = |table: &&str| {
            format!(
                "  - table: public.{table}\n    tenant: t\n    tuple: {{entity_type: {{constant: document}}, entity_id: id, \
                 relation: {{constant: viewer}}, subject_type: {{constant: user}}, subject_id: {{constant: u}}}}\n"
            )
        };
        std::fs::write(&path, format!("tables:\n{}", tables.iter().map(table).collect::<String>())).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (one, two) = (file("one.yaml", &["a"]), file("two.yaml", &["a", "b"]));
    let mut server = Server::serve(&postgres, &[("--mapping-file", &one)]).await;
    let mut stream = server.watch("t1", "").await;
    sql.run("INSERT INTO a VALUES ('t1', 'first')").await;
    let token = stream.expect(Change::created("first")).await.token;
    server.terminate().await;
    server.ended().await;

    writer.run("BEGIN; INSERT INTO b VALUES ('t1', 'late')").await;
    sql.run("ALTER PUBLICATION tuplewatch ADD TABLE b").await;
    server.set("--mapping-file", &two);
    server.start().await;
    server.serving().await;
    let (_, status) = server.watch("t1", &token).await.ending().await;
    assert_eq!(reason(&status), (Code::Aborted, "MAPPING_CHANGED".to_owned()));
    // The schema has not changed.
    assert!(!status.message().contains("created, dropped"), "{}", status.message());
    assert_eq!(optional_metadata(&status, "next_snap_token"), None, "its end must be unknown");
    writer.run("COMMIT").await;
    let closed = async || {
        let (_, status) = server.watch("t1", &token).await.ending().await;
        optional_metadata(&status, "next_snap_token")
    };
    eventually("the gap has an end", async || closed().await.is_some()).await;
    let mut stream = server.watch("t1", &closed().await.unwrap()).await;
    sql.run("INSERT INTO b VALUES ('t1', 'after')").await;
    stream.expect(Change::created("after")).await;
}

/// A repair does not wait for the next regular check.
#[tokio::test]
async fn the_publication_is_checked_at_once_on_request() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let began = Instant::now();
    for n in 0..6 {
        let mut stream = server.watch("t1", "").await;
        sql.run(
            "BEGIN; ALTER PUBLICATION tuplewatch DROP TABLE tuplewatch.relation_tuples; \
                 ALTER PUBLICATION tuplewatch ADD TABLE tuplewatch.relation_tuples; COMMIT",
        )
        .await;
        match n % 2 {
            0 => sql.run("SELECT pg_logical_emit_message(true, 'tuplewatch', 'check')").await,
            _ => server.hang_up().await,
        }
        stream.ending().await;
    }
    // Regular checks happen every five seconds.
    assert!(began.elapsed() < Duration::from_secs(20), "six checks took {:?}", began.elapsed());
}

/// For operators who read the log of the server.
#[tokio::test]
async fn repeated_gaps_of_a_table_are_logged_once_a_minute() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let (sql, mut stream, _) = server.first_delivered(&postgres, "first").await;
    sql.run("ALTER TABLE tuplewatch.attributes DROP CONSTRAINT IF EXISTS attributes_value_check CASCADE").await;
    for _ in 0..3 {
        sql.run("TRUNCATE tuplewatch.relation_tuples").await;
    }
    stream.ending().await;
    sql.insert("t1", "last").await;
    let flushed = sql.flushed().await;
    eventually("everything is read", async || sql.confirmed_reaches(&flushed).await).await;
    let line = "a gap in the stream: table tuplewatch.relation_tuples was truncated";
    server.until_logged("To remove rows without a gap, DELETE them").await;
    assert_eq!(server.times_logged(line), 1, "a line a minute for each table");
    assert!(!server.has_logged("t1"), "a tenant is nothing for the log");
}
