//! Transactions of every kind. A rolled-back one is never delivered. A committed one is delivered completely, in the order of execution,
//! and transactions arrive in commit order, however many of them were open at the same time.
//!
//! A subscriber that applies one change too many, or two in the wrong order, keeps a permission that was revoked. Logical messages of any
//! program must not disturb the order either.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::reference;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::{Stream, changes, reason};
use crate::support::wait::{eventually, within};
use crate::support::writer::{TENANTS, add_tenants, seed};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tonic::Code;
use tuplewatch::dev_postgres::StopMode;

fn created(id: &str) -> Change {
    Change::created(id)
}

fn deleted(id: &str) -> Change {
    Change::delete(Change::viewer(id))
}

/// The row of [`Sql::insert`].
fn row(id: &str) -> String {
    format!("('t1', 'document', '{id}', 'viewer', 'user', 'u', '')")
}

fn insert(id: &str) -> String {
    format!("INSERT INTO tuplewatch.relation_tuples VALUES {}", row(id))
}

fn delete(id: &str) -> String {
    format!("DELETE FROM tuplewatch.relation_tuples WHERE entity_id = '{id}'")
}

#[tokio::test]
async fn a_transaction_is_streamed_as_it_was_executed() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    reference::begin(&sql).await;
    let start = sql.value("SELECT tuplewatch.snap_token()").await;
    let mut stream = server.watch("t1", "").await;

    let (i, d) = (insert, delete);
    let copy = postgres.pgdata().join("tuples.copy");
    let copied = format!("tuplewatch.relation_tuples FROM '{}'", copy.display());
    sql.run(&format!("COPY (VALUES {}, {}) TO '{}'", row("copied1"), row("copied2"), copy.display())).await;
    let value = |n: u32| format!(r#"{{"@type": "type.googleapis.com/base.v1.IntegerValue", "data": {n}}}"#);
    let upsert = |n: u32| {
        format!(
            "INSERT INTO tuplewatch.attributes VALUES ('t1', 'document', 'd', 'size', '{}') \
             ON CONFLICT (tenant_id, entity_type, entity_id, attribute) DO UPDATE SET value = EXCLUDED.value",
            value(n)
        )
    };
    let size = |n: u32| Change::attribute("document", "d", "size", &value(n));

    for (statements, expected) in [
        // Savepoints.
        (
            format!("BEGIN; {}; SAVEPOINT s; {}; ROLLBACK TO s; {}; COMMIT", i("a"), i("no"), i("b")),
            vec![created("a"), created("b")],
        ),
        (
            format!(
                "BEGIN; SAVEPOINT s; {}; SAVEPOINT t; {}; ROLLBACK TO t; {}; RELEASE t; {}; RELEASE s; {}; COMMIT",
                i("c"), d("a"), i("e"), i("f"), d("c")
            ),
            vec![created("c"), created("e"), created("f"), deleted("c")],
        ),
        (format!("BEGIN; SAVEPOINT s; {}; SAVEPOINT t; {}; ROLLBACK TO s; COMMIT", i("no"), i("no2")), vec![]),
        (
            format!(
                "DO $$ BEGIN FOR n IN 1..3 LOOP BEGIN {}; IF n < 3 THEN RAISE EXCEPTION 'no'; END IF; \
                 EXCEPTION WHEN raise_exception THEN NULL; END; END LOOP; END $$",
                i("third")
            ),
            vec![created("third")],
        ),
        // Complete rollbacks.
        (format!("BEGIN; {}; {}; ROLLBACK", i("no"), d("a")), vec![]),
        ("DO $$ BEGIN COMMIT; END $$".into(), vec![]),
        // Several rows with one statement.
        (
            format!("INSERT INTO tuplewatch.relation_tuples VALUES {}, {}, {}", row("g"), row("h"), row("i")),
            vec![created("g"), created("h"), created("i")],
        ),
        (format!("COPY {copied}"), vec![created("copied1"), created("copied2")]),
        // The same fact again and again.
        (
            format!("BEGIN; {}; {}; {}; {}; COMMIT", d("a"), i("a"), d("a"), i("a")),
            vec![deleted("a"), created("a"), deleted("a"), created("a")],
        ),
        // Upserts: new, another value, the same value, and none.
        (upsert(1), vec![Change::create(size(1))]),
        (upsert(2), vec![Change::delete(size(1)), Change::create(size(2))]),
        (upsert(2), vec![]),
        (format!("{} ON CONFLICT DO NOTHING", i("a")), vec![]),
        (
            format!("INSERT INTO tuplewatch.relation_tuples VALUES {}, {}, {} ON CONFLICT DO NOTHING", row("a"), row("j"), row("j")),
            vec![created("j")],
        ),
        // One statement that deletes and inserts, row by row.
        (
            "WITH gone AS (DELETE FROM tuplewatch.relation_tuples WHERE entity_id IN ('g', 'h') RETURNING *) \
             INSERT INTO tuplewatch.relation_tuples \
             SELECT tenant_id, entity_type, entity_id || '2', relation, subject_type, subject_id, subject_relation FROM gone"
                .into(),
            vec![deleted("g"), created("g2"), deleted("h"), created("h2")],
        ),
        // Triggers: before its row, and after the statement with all its rows.
        (
            "CREATE FUNCTION also() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
                 IF NEW.entity_id NOT LIKE '%+' THEN \
                     INSERT INTO tuplewatch.relation_tuples VALUES \
                     (NEW.tenant_id, NEW.entity_type, NEW.entity_id || TG_ARGV[0], NEW.relation, NEW.subject_type, NEW.subject_id); \
                 END IF; RETURN NEW; END $$; \
             CREATE TRIGGER b BEFORE INSERT ON tuplewatch.relation_tuples FOR EACH ROW EXECUTE FUNCTION also('-before+'); \
             CREATE TRIGGER a AFTER INSERT ON tuplewatch.relation_tuples FOR EACH ROW EXECUTE FUNCTION also('-after+')"
                .into(),
            vec![],
        ),
        (
            format!("INSERT INTO tuplewatch.relation_tuples VALUES {}, {}", row("k"), row("l")),
            ["k-before+", "k", "l-before+", "l", "k-after+", "l-after+"].map(created).to_vec(),
        ),
        // Without triggers. The rows are still delivered.
        (
            format!("BEGIN; SET LOCAL session_replication_role = replica; {}; {}; COMMIT", i("m"), d("l")),
            vec![created("m"), deleted("l")],
        ),
        ("DROP FUNCTION also CASCADE".into(), vec![]),
        // Other tables, and temporary uses of tables.
        (format!("BEGIN; CREATE TABLE x (n int); INSERT INTO x VALUES (1); {}; DROP TABLE x; COMMIT", i("n")), vec![created("n")]),
        ("CREATE TABLE x (n int); INSERT INTO x VALUES (1)".into(), vec![]),
        (i("end"), vec![created("end")]),
    ] {
        sql.run(&statements).await;
        if !expected.is_empty() {
            assert_eq!(stream.next().await.changes, expected, "{statements}");
        }
    }
    // An error in the middle.
    assert!(sql.batch_execute(&format!("BEGIN; {}; SELECT 1 / 0; COMMIT", i("no"))).await.is_err());
    sql.run("ROLLBACK").await;
    sql.insert("t1", "last").await;
    stream.expect(created("last")).await;

    // This equals the reference and the table.
    let all = changes(&server.watch("t1", &start).await.up_to(&created("last")).await);
    assert_eq!(all, reference::of_tenant(&reference::read(&sql).await, "t1"));
    let mut state = std::collections::BTreeSet::new();
    assert!(all.iter().all(|change| change.apply(&mut state)), "every change changes something");
    assert_eq!(state, sql.facts("t1").await);
}

/// A prepared transaction has no session, survives restarts, and commits on request.
#[tokio::test]
async fn a_prepared_transaction_is_delivered_once_committed() {
    let flags = [("--service-watch-resolve-timeout", "100ms")];
    let mut postgres = Postgres::with(&[("max_prepared_transactions", "4")]).await;
    let mut server = Server::serve(&postgres, &flags).await;
    let sql = postgres.sql().await;
    let mut stream = server.watch("t1", "").await;
    let prepare = async |name: &str| {
        sql.run("BEGIN; SAVEPOINT s").await;
        sql.insert("t1", &format!("{name}-no")).await;
        sql.run("ROLLBACK TO s").await;
        sql.insert("t1", name).await;
        let token = sql.value("SELECT tuplewatch.snap_token()").await;
        sql.insert("t1", &format!("{name}2")).await;
        sql.run(&format!("PREPARE TRANSACTION '{name}'")).await;
        token
    };
    let both = |name: &str| vec![created(name), created(&format!("{name}2"))];

    // Committed at once.
    let token = prepare("a").await;
    sql.insert("t1", "meanwhile").await;
    let meanwhile = stream.expect(created("meanwhile")).await.token;
    let status = server.try_watch("t1", &token).await.err().expect("a transaction that is still open");
    assert_eq!(reason(&status), (Code::Unavailable, "TRANSACTION_STILL_RUNNING".into()));
    sql.run("COMMIT PREPARED 'a'").await;
    assert_eq!(stream.next().await.changes, both("a"));
    let mut after = server.watch("t1", &token).await;
    let _ = prepare("b").await;
    sql.run("ROLLBACK PREPARED 'b'").await;
    sql.insert("t1", "next").await;
    for stream in [&mut stream, &mut after] {
        stream.expect(created("next")).await;
    }

    // Committed after restarts of both.
    let (kept, dropped) = (prepare("kept").await, prepare("dropped").await);
    let mut expected = vec![both("a"), vec![created("next")]];
    for mode in [StopMode::Fast, StopMode::Immediate] {
        let name = format!("{mode:?}");
        postgres.sql().await.insert("t1", &name).await;
        stream.expect(created(&name)).await;
        expected.push(vec![created(&name)]);
        postgres.stop(mode).await;
        if mode == StopMode::Immediate {
            server.kill_9().await;
        }
        postgres.start_again().await;
        if mode == StopMode::Immediate {
            server.start().await;
            stream = server.watch("t1", &meanwhile).await;
            for expected in &expected {
                assert_eq!(&stream.next().await.changes, expected);
            }
        }
    }
    let sql = postgres.sql().await;
    sql.insert("t1", "before").await;
    sql.run("ROLLBACK PREPARED 'dropped'").await;
    sql.run("COMMIT PREPARED 'kept'").await;
    sql.insert("t1", "last").await;
    expected.extend([vec![created("before")], both("kept"), vec![created("last")]]);
    stream.expect(created("before")).await;
    assert_eq!(stream.next().await.changes, both("kept"));
    stream.expect(created("last")).await;
    let all = server.watch("t1", &meanwhile).await.up_to(&created("last")).await;
    assert_eq!(all.into_iter().map(|message| message.changes).collect::<Vec<_>>(), expected);
    server.watch("t1", &kept).await.expect(created("last")).await;
    // It starts at its floor: early enough, never too late.
    let rest = changes(&server.watch("t1", &dropped).await.up_to(&created("last")).await);
    assert!(rest.ends_with(&[created("kept"), created("kept2"), created("last")]), "{rest:?}");
}

#[tokio::test]
async fn each_of_500_tenants_gets_its_part_of_a_transaction() {
    const TENANT_COUNT: usize = 500;
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    sql.run(&format!(
        "INSERT INTO tuplewatch.tenants SELECT 'tenant' || n, '' FROM generate_series(1, {TENANT_COUNT}) n"
    ))
    .await;
    let tenants: Vec<String> = (1..=TENANT_COUNT).map(|n| format!("tenant{n}")).collect();
    let mut streams = Vec::new();
    for channel in [server.channel().await, server.channel().await] {
        for tenant in &tenants {
            streams.push(within("headers", Stream::open_on(channel.clone(), tenant, "")).await.unwrap());
        }
    }
    // Interleaved. Each tenant has different changes, two more than its number has digits.
    sql.run(&format!(
        "BEGIN; \
         INSERT INTO tuplewatch.relation_tuples \
             SELECT 'tenant' || n, 'document', n || '.' || i, 'viewer', 'user', 'u' \
             FROM generate_series(1, 4) i, generate_series(1, {TENANT_COUNT}) n WHERE i <= length(n::text) + 1 ORDER BY i, n; \
         DELETE FROM tuplewatch.relation_tuples WHERE entity_id LIKE '%.1'; \
         COMMIT"
    ))
    .await;
    let expected = |n: usize| -> Vec<Change> {
        let inserted = (1..=n.to_string().len() + 1).map(|i| created(&format!("{n}.{i}")));
        inserted.chain([deleted(&format!("{n}.1"))]).collect()
    };
    let mut tokens = Vec::new();
    for (at, stream) in streams.iter_mut().enumerate() {
        let message = stream.next().await;
        assert_eq!(message.changes, expected(at % TENANT_COUNT + 1));
        tokens.push(message.token);
    }
    assert!(tokens.iter().all(|token| *token == tokens[0]), "it was one transaction");
    for tenant in &tenants {
        sql.insert(tenant, "after").await;
    }
    for (tenant, stream) in tenants.iter().zip(&mut streams) {
        stream.expect(created("after")).await;
        // The token is valid for every tenant, and after a restart.
        if tenant.ends_with("00") {
            server.watch(tenant, &tokens[0]).await.expect(created("after")).await;
        }
    }
    server.kill_and_restart().await;
    for tenant in tenants.iter().filter(|tenant| tenant.ends_with("00")) {
        server.watch(tenant, &tokens[0]).await.expect(created("after")).await;
    }
}

/// All are prepared at the same time, with interleaved rows in the WAL, and committed in another order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_open_transactions_arrive_in_commit_order() {
    const OPEN: usize = 10_000;
    const CONNECTIONS: usize = 20;
    let open = OPEN.to_string();
    let postgres = Postgres::with(&[("max_prepared_transactions", &open), ("max_locks_per_transaction", "16")]).await;
    let mut server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    reference::begin(&sql).await;
    let start = sql.value("SELECT tuplewatch.snap_token()").await;
    let mut live = Vec::new();
    for tenant in TENANTS {
        live.push(server.watch(tenant, "").await);
    }

    let statement = |n: usize| {
        let (one, other) = (TENANTS[n % 4], TENANTS[n / 4 % 4]);
        format!(
            "BEGIN; INSERT INTO tuplewatch.relation_tuples VALUES ('{one}', 'document', 'd{n}', 'viewer', 'user', 'u'); \
             SAVEPOINT s; INSERT INTO tuplewatch.relation_tuples VALUES ('{other}', 'document', 'e{n}', 'viewer', 'user', 'u'); \
             PREPARE TRANSACTION '{n}'"
        )
    };
    run_all(&postgres, CONNECTIONS, (0..OPEN).map(statement).collect()).await;
    assert_eq!(sql.value("SELECT count(*) FROM pg_prepared_xacts").await, open, "all of them are open");
    // Nothing waits for them.
    for (stream, tenant) in live.iter_mut().zip(TENANTS) {
        sql.insert(tenant, "meanwhile").await;
        stream.expect(created("meanwhile")).await;
    }
    let mut order: Vec<usize> = (0..OPEN).collect();
    fastrand::Rng::with_seed(seed()).shuffle(&mut order);
    let end = |n: usize| {
        let verb = if n.is_multiple_of(10) { "ROLLBACK" } else { "COMMIT" };
        format!("{verb} PREPARED '{n}'")
    };
    run_all(&postgres, CONNECTIONS, order.into_iter().map(end).collect()).await;
    for tenant in TENANTS {
        sql.insert(tenant, "end").await;
    }

    let transactions = reference::read(&sql).await;
    assert!(transactions.len() > OPEN * 9 / 10);
    for (stream, tenant) in live.iter_mut().zip(TENANTS) {
        let expected = reference::of_tenant(&transactions, tenant);
        let messages = stream.up_to(&created("end")).await;
        assert!(changes(&messages) == expected[1..], "live, tenant {tenant}");
        let messages = server.watch(tenant, &start).await.up_to(&created("end")).await;
        assert!(changes(&messages) == expected, "from the start, tenant {tenant}");
    }
    server.terminate().await;
    assert!(server.ended().await.success());
}

/// Runs statements on this many connections, in about this order.
async fn run_all(postgres: &Postgres, connections: usize, statements: Vec<String>) {
    let (statements, next) = (Arc::new(statements), Arc::new(AtomicUsize::new(0)));
    let mut tasks = Vec::new();
    for _ in 0..connections {
        let sql: Sql = postgres.sql().await;
        let (statements, next) = (statements.clone(), next.clone());
        tasks.push(tokio::spawn(async move {
            while let Some(statement) = statements.get(next.fetch_add(1, Ordering::Relaxed)) {
                sql.run(statement).await;
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

/// Every role may call `pg_logical_emit_message`, and the walsender sends all messages.
#[tokio::test]
async fn logical_messages_of_others_are_ignored() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let (sql, mut stream, token) = server.first_delivered(&postgres, "before").await;

    // Empty, with the length of a token's id and about that, of 1 MB, and not text.
    let contents = ["''", "'garbage'", "repeat('x', 15)", "repeat('x', 16)", "repeat('x', 17)", "repeat('x', 1000000)"];
    let contents = contents.into_iter().chain([r"'\x00ff00ff00ff00ff00ff00ff00ff00ff'::bytea", r"'\xff'::bytea"]);
    let mut expected = Vec::new();
    for (n, content) in contents.enumerate() {
        for (m, prefix) in ["tuplewatch", "Tuplewatch", "tuplewatch ", "other", "", "é😀"].into_iter().enumerate() {
            let emit =
                |transactional: bool| format!("SELECT pg_logical_emit_message({transactional}, '{prefix}', {content})");
            let (a, b) = (format!("a{n}.{m}"), format!("b{n}.{m}"));
            // Between transactions, around the rows of one, and in rolled-back parts.
            sql.run(&emit(false)).await;
            sql.run(&emit(true)).await;
            sql.run(&format!("BEGIN; {}; {}; {}", emit(true), insert(&a), emit(false))).await;
            sql.run(&format!("SAVEPOINT s; {}; {}; ROLLBACK TO s", emit(true), insert("no"))).await;
            sql.run(&format!("{}; {}; COMMIT", insert(&b), emit(true))).await;
            sql.run(&format!("BEGIN; {}; {}; ROLLBACK", emit(true), emit(false))).await;
            expected.push(vec![created(&a), created(&b)]);
        }
    }
    for expected in &expected {
        assert_eq!(&stream.next().await.changes, expected);
    }
    // WAL that ends with messages is acknowledged too.
    for transactional in [false, true] {
        sql.run(&format!("SELECT pg_logical_emit_message({transactional}, 'tuplewatch', repeat('x', 1000000))")).await;
        sql.run("CREATE TABLE IF NOT EXISTS x (n int)").await;
        let lsn = sql.flushed().await;
        eventually("acknowledgement continues", async || sql.confirmed_reaches(&lsn).await).await;
    }
    // An invented id does not match a token of ours.
    sql.insert("t1", "own").await;
    let own = sql.value("SELECT tuplewatch.snap_token()").await;
    sql.insert("t1", "last").await;
    server.kill_and_restart().await;
    server.watch("t1", &own).await.expect(created("last")).await;
    let all = changes(&server.watch("t1", &token).await.up_to(&created("last")).await);
    expected.push(vec![created("own"), created("last")]);
    assert_eq!(all, expected.concat());
    assert!(!server.has_logged("panicked"));
}
