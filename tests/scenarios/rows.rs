//! Rows: large values that PostgreSQL does not send again, all kinds of updates, unusual texts and encodings, undecodable rows, and
//! TRUNCATE.
//!
//! The contents of a row in pgoutput depend on the replica identity, on TOAST and on the encoding of the database. A value that is not
//! sent must come from elsewhere or be a gap: a subscriber with an empty or wrong value would cache a permission that does not exist. And
//! one bad row must affect only its tenant.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::reference;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::{Stream, changes, metadata, reason};
use crate::support::wait::eventually;
use crate::support::writer::add_tenants;
use std::collections::BTreeSet;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

/// A temporary mapping file.
fn mapping_file(contents: &str) -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
    std::fs::write(file.path(), contents).unwrap();
    file
}

/// An attribute value in its JSON form.
fn json(kind: &str, data: &serde_json::Value) -> String {
    format!(r#"{{"@type": "type.googleapis.com/base.v1.{kind}", "data": {data}}}"#)
}

/// A text that cannot be compressed.
fn incompressible(length: usize) -> String {
    (0..length).map(|_| fastrand::alphanumeric()).collect()
}

/// Runs statements in one transaction. The next message must have exactly these changes. If there are none, the next step checks that
/// nothing was sent.
async fn step(sql: &Sql, stream: &mut Stream, statements: &str, expected: &[Change]) {
    sql.run(statements).await;
    if expected.is_empty() {
        return;
    }
    let got = stream.next().await.changes;
    // The values may have 100 kB.
    let brief = |changes: &[Change]| -> Vec<String> {
        changes.iter().map(|change| format!("{change:?}").chars().take(100).collect()).collect()
    };
    assert!(got == expected, "{statements:.200}\n  got {:#?}\n  expected {:#?}", brief(&got), brief(expected));
}

fn tuple(document: &str, relation: &str, user: &str) -> String {
    Change::tuple("document", document, relation, "user", user, "")
}

const FACTS: &str = "
tables:
  - table: shop.facts
    tenant: company
    attribute:
      entity_type: { constant: document }
      entity_id: document
      attribute: name
      value: value
    soft_delete: { column: revoked_at, null_is_live: true }
";

/// PostgreSQL sends a value that is stored out of line only if it changed. With REPLICA IDENTITY FULL the old row has it.
#[tokio::test]
async fn an_unchanged_toasted_value_is_reported_in_full() {
    let postgres = Postgres::start().await;
    let sql = postgres.sql().await;
    sql.run(
        "CREATE SCHEMA shop; CREATE TABLE shop.facts (company text, document text, name text, value jsonb, note text, \
         revoked_at timestamptz, PRIMARY KEY (company, document))",
    )
    .await;
    let file = mapping_file(FACTS);
    let server = Server::serve(&postgres, &[("--mapping-file", file.path().to_str().unwrap())]).await;
    let is_full = "SELECT relreplident FROM pg_class WHERE oid = 'shop.facts'::regclass";
    assert_eq!(sql.value(is_full).await, "f", "setup has seen to it");
    let mut stream = server.watch("acme", "").await;

    for length in [3_000, 100_000] {
        let (large, small) = (json("StringValue", &incompressible(length).into()), json("BooleanValue", &true.into()));
        let of = |document: &str, name: &str, json: &str| Change::attribute("document", document, name, json);
        let (a, b, c) = (of("d", "a", &large), of("d", "b", &large), of("d", "c", &large));
        let (moved, replaced) = (of("moved", "b", &large), of("d", "a", &small));
        let create = |fact: &str| Change::create(fact);
        let delete = |fact: &str| Change::delete(fact);

        let insert = format!("INSERT INTO shop.facts VALUES ('acme', 'd', 'a', '{large}')");
        step(&sql, &mut stream, &insert, &[create(&a)]).await;
        let stored: usize = sql.value("SELECT pg_column_size(value) FROM shop.facts").await.parse().unwrap();
        let out_of_line = "SELECT pg_relation_size(reltoastrelid) FROM pg_class WHERE oid = 'shop.facts'::regclass";
        assert!(stored >= length, "stored as it is, in {stored} bytes");
        assert_ne!(sql.value(out_of_line).await, "0", "and out of line");
        for (set, expected) in [
            // An unmapped column, and nothing at all.
            ("note = 'x'", vec![]),
            ("value = value, name = name", vec![]),
            ("name = 'b'", vec![delete(&a), create(&b)]),
            // A column of the key, and back.
            ("document = 'moved'", vec![delete(&b), create(&moved)]),
            ("document = 'd'", vec![delete(&moved), create(&b)]),
            ("revoked_at = now()", vec![delete(&b)]),
            // A softly deleted row causes no change.
            ("note = 'y', name = 'c'", vec![]),
            ("revoked_at = NULL", vec![create(&c)]),
            ("revoked_at = now(), name = 'a'", vec![delete(&c)]),
            ("revoked_at = NULL, note = NULL", vec![create(&a)]),
            (&format!("value = '{small}'"), vec![delete(&a), create(&replaced)]),
            (&format!("value = '{large}'"), vec![delete(&replaced), create(&a)]),
        ] {
            step(&sql, &mut stream, &format!("UPDATE shop.facts SET {set}"), &expected).await;
        }
        step(&sql, &mut stream, "DELETE FROM shop.facts", &[delete(&a)]).await;
    }
}

/// The same in the tables of the preset, where every column is mapped.
#[tokio::test]
async fn an_update_deletes_the_old_fact_and_creates_the_new_one() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    reference::begin(&sql).await;
    let start = sql.value("SELECT tuplewatch.snap_token()").await;
    let mut stream = server.watch("t1", "").await;
    let mut other = server.watch("t2", "").await;
    let create = |document: &str, relation: &str, user: &str| Change::create(tuple(document, relation, user));
    let delete = |document: &str, relation: &str, user: &str| Change::delete(tuple(document, relation, user));
    for id in ["a", "b", "c"] {
        sql.insert("t1", id).await;
        stream.expect(Change::created(id)).await;
    }

    let table = "UPDATE tuplewatch.relation_tuples SET";
    for (statements, expected) in [
        (
            format!("{table} subject_id = 'v' WHERE entity_id = 'a'"),
            vec![delete("a", "viewer", "u"), create("a", "viewer", "v")],
        ),
        (format!("{table} subject_id = subject_id, relation = 'viewer'"), vec![]),
        (format!("{table} relation = 'editor' WHERE false"), vec![]),
        // Two rows swap their keys, through a third key, because a unique index is checked row by row.
        (
            format!(
                "BEGIN; {table} entity_id = 'x' WHERE entity_id = 'b'; {table} entity_id = 'b' WHERE entity_id = 'c'; \
                 {table} entity_id = 'c' WHERE entity_id = 'x'; COMMIT"
            ),
            vec![
                delete("b", "viewer", "u"),
                create("x", "viewer", "u"),
                delete("c", "viewer", "u"),
                create("b", "viewer", "u"),
                delete("x", "viewer", "u"),
                create("c", "viewer", "u"),
            ],
        ),
        // There and back: both steps are delivered.
        (
            format!(
                "BEGIN; {table} relation = 'owner' WHERE entity_id = 'a'; {table} relation = 'viewer' WHERE entity_id = 'a'; \
                 COMMIT"
            ),
            vec![
                delete("a", "viewer", "v"),
                create("a", "owner", "v"),
                delete("a", "owner", "v"),
                create("a", "viewer", "v"),
            ],
        ),
        (
            format!(
                "BEGIN; INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'document', 'd', 'viewer', 'user', 'u'); \
                 {table} subject_id = 'w' WHERE entity_id = 'd'; \
                 DELETE FROM tuplewatch.relation_tuples WHERE entity_id = 'd'; COMMIT"
            ),
            vec![
                create("d", "viewer", "u"),
                delete("d", "viewer", "u"),
                create("d", "viewer", "w"),
                delete("d", "viewer", "w"),
            ],
        ),
        // To another tenant: each tenant gets its half.
        (format!("{table} tenant_id = 't2' WHERE entity_id = 'a'"), vec![delete("a", "viewer", "v")]),
    ] {
        step(&sql, &mut stream, &statements, &expected).await;
    }
    other.expect(create("a", "viewer", "v")).await;

    // Several rows with one statement: a pair for each row, in the order of execution.
    sql.run("INSERT INTO tuplewatch.relation_tuples SELECT 't1', 'document', n, 'viewer', 'user', 'u' FROM generate_series(1, 200) n")
        .await;
    assert_eq!(stream.next().await.changes.len(), 200);
    sql.run(&format!("{table} relation = 'editor' WHERE tenant_id = 't1'")).await;
    let pairs = stream.next().await.changes;
    assert_eq!(pairs.len(), 2 * 202);
    for pair in pairs.chunks(2) {
        let renamed = pair[0].fact.replace("#viewer@", "#editor@");
        assert_eq!(pair, [Change::delete(&pair[0].fact), Change::create(renamed)]);
    }

    // Attributes with large and small values that are swapped, kept and moved.
    let (large, small) = (json("StringValue", &incompressible(5_000).into()), json("IntegerValue", &7.into()));
    let of = |document: &str, name: &str, json: &str| Change::attribute("document", document, name, json);
    let attribute = |document: &str, json: &str| format!("('t1', 'document', '{document}', 'size', '{json}')");
    let insert =
        format!("INSERT INTO tuplewatch.attributes VALUES {}, {}", attribute("p", &large), attribute("q", &small));
    let (p, q) = (of("p", "size", &large), of("q", "size", &small));
    step(&sql, &mut stream, &insert, &[Change::create(&p), Change::create(&q)]).await;
    step(&sql, &mut stream, "UPDATE tuplewatch.attributes SET value = value, attribute = 'size'", &[]).await;
    let renamed = of("p", "weight", &large);
    step(
        &sql,
        &mut stream,
        "UPDATE tuplewatch.attributes SET attribute = 'weight' WHERE entity_id = 'p'",
        &[Change::delete(&p), Change::create(&renamed)],
    )
    .await;
    let swap = "UPDATE tuplewatch.attributes a SET value = b.value FROM tuplewatch.attributes b WHERE a.entity_id <> b.entity_id";
    sql.run(swap).await;
    let swapped: BTreeSet<_> = stream.next().await.changes.into_iter().collect();
    let (p, q) = (of("p", "weight", &small), of("q", "size", &large));
    let expected =
        [Change::delete(&renamed), Change::create(&p), Change::delete(of("q", "size", &small)), Change::create(&q)];
    assert_eq!(swapped, BTreeSet::from(expected));
    step(&sql, &mut stream, "DELETE FROM tuplewatch.attributes WHERE entity_id = 'p'", &[Change::delete(&p)]).await;
    step(&sql, &mut stream, "DELETE FROM tuplewatch.attributes", &[Change::delete(&q)]).await;

    sql.insert("t1", "end").await;
    sql.insert("t2", "end").await;
    let transactions = reference::read(&sql).await;
    for tenant in ["t1", "t2"] {
        let all = server.watch(tenant, &start).await.up_to(&Change::created("end")).await;
        assert_eq!(changes(&all), reference::of_tenant(&transactions, tenant), "in the order of execution");
    }
}

const ODD: &str = "
tables:
  - table: shop.odd
    tenant: company
    tuple: { entity_type: kind, entity_id: id, relation: role, subject_type: who_kind, subject_id: who, subject_relation: who_role }
";

const ODD_TABLE: &str = "
CREATE SCHEMA shop;
CREATE TABLE shop.odd (company text, kind text, id text, role text, who_kind text, who text, who_role text,
    PRIMARY KEY (company, kind, id, role, who_kind, who, who_role))";

/// Custom tables may contain any text of PostgreSQL, also as a tenant.
#[tokio::test]
async fn texts_arrive_unchanged() {
    let postgres = Postgres::start().await;
    let sql = postgres.sql().await;
    sql.run(ODD_TABLE).await;
    let file = mapping_file(ODD);
    let mut server = Server::serve(&postgres, &[("--mapping-file", file.path().to_str().unwrap())]).await;
    let long = "i".repeat(128);
    let texts = [
        "*",
        " ",
        "'",
        "''",
        "\"",
        "\\",
        "\\'; --",
        "\\x00",
        "\\u0000",
        "$1",
        "%s",
        "{}",
        "NULL",
        "\t\r\n",
        "\u{1}",
        "\u{7f}",
        "\u{80}",
        "\u{fffd}",
        "\u{ffff}",
        "\u{feff}",
        "\u{202e}",
        "\u{10ffff}",
        "😀",
        "e\u{301}",
        "é",
        "i",
        "İ",
        &long,
    ];
    let mut streams = Vec::new();
    let mut tokens = Vec::new();
    for text in texts {
        let mut stream = server.watch(text, "").await;
        let all = "INSERT INTO shop.odd VALUES ($1, $1, $1, $1, $1, $1, $1)";
        sql.execute(all, &[&text]).await.unwrap();
        tokens.push(stream.expect(Change::create(Change::tuple(text, text, text, text, text, text))).await.token);
        streams.push(stream);
    }
    // Empty texts are valid too, except for a tenant.
    sql.run("UPDATE shop.odd SET kind = '', id = '', role = '', who_kind = '', who = '', who_role = ''").await;
    for _ in ["live", "after a restart"] {
        for ((stream, text), token) in streams.iter_mut().zip(texts).zip(&tokens) {
            let was = Change::tuple(text, text, text, text, text, text);
            let is = Change::tuple("", "", "", "", "", "");
            let message = stream.next().await;
            assert_eq!(message.changes, [Change::delete(was), Change::create(is)], "{text:?}");
            *stream = server.watch(text, token).await;
        }
        server.kill_and_restart().await;
        streams.clear();
        for (text, token) in texts.iter().zip(&tokens) {
            streams.push(server.watch(text, token).await);
        }
    }
}

/// Values at the limits of the preset's constraints.
#[tokio::test]
async fn the_presets_longest_and_empty_values_arrive_unchanged() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let (id, word) = ("-".repeat(128), "_".repeat(64));
    sql.run(&format!("INSERT INTO tuplewatch.tenants (id, name) VALUES ('{id}', ''), ('*', '')")).await;
    for tenant in [&*id, "*"] {
        let mut stream = server.watch(tenant, "").await;
        for (entity, subject, relation) in [(&*id, "*", &*word), ("*", &*id, "")] {
            let values = format!("('{tenant}', '{word}', '{entity}', '{word}', '{word}', '{subject}', '{relation}')");
            let fact = Change::tuple(&word, entity, &word, &word, subject, relation);
            let insert = format!("INSERT INTO tuplewatch.relation_tuples VALUES {values}");
            step(&sql, &mut stream, &insert, &[Change::create(fact)]).await;
        }
        let odd = "'\"\\ \u{1}\u{7f}\u{fffd}\u{ffff}\u{10ffff}😀\n";
        for (kind, data) in [
            ("StringValue", serde_json::json!("")),
            ("StringValue", serde_json::json!(odd)),
            ("StringArrayValue", serde_json::json!([])),
            ("StringArrayValue", serde_json::json!(["", odd])),
            ("IntegerValue", serde_json::json!(i32::MIN)),
            ("BooleanValue", serde_json::json!(false)),
        ] {
            let json = json(kind, &data);
            let fact = Change::attribute(&word, &id, &word, &json);
            let insert = "INSERT INTO tuplewatch.attributes VALUES ($1, $2, $3, $2, $4::text::jsonb)";
            sql.execute(insert, &[&tenant, &word, &id, &json]).await.unwrap();
            stream.expect(Change::create(&*fact)).await;
            step(&sql, &mut stream, "DELETE FROM tuplewatch.attributes", &[Change::delete(fact)]).await;
        }
    }
}

async fn database(postgres: &Postgres, name: &str, encoding: &str) -> String {
    postgres
        .sql()
        .await
        .run(&format!("CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"))
        .await;
    postgres.uri_of(name)
}

#[tokio::test]
async fn values_of_a_latin1_database_arrive_in_unicode() {
    let postgres = Postgres::start().await;
    let uri = database(&postgres, "latin1", "LATIN1").await;
    let sql = Sql::connect(&uri).await;
    let file = mapping_file(ODD);
    sql.run(ODD_TABLE).await;
    let flags = [("--mapping-file", file.path().to_str().unwrap())];
    let mut server = Server::prepare_slot(&uri, "tuplewatch", &flags).await;
    server.start().await;
    server.serving().await;
    // Every character that LATIN1 has, as a tenant too.
    let all: String = (1..=255u8).map(char::from).collect();
    let mut stream = server.watch(&all, "").await;
    sql.execute("INSERT INTO shop.odd VALUES ($1, $1, $1, $1, $1, $1, '')", &[&all]).await.unwrap();
    let fact = Change::tuple(&all, &all, &all, &all, &all, "");
    stream.expect(Change::create(&*fact)).await;
    sql.run("DELETE FROM shop.odd").await;
    stream.expect(Change::delete(fact)).await;
}

/// A database with the encoding SQL_ASCII stores any bytes, and PostgreSQL refuses to send a client bytes outside its encoding. If UTF-8
/// were requested, the walsender itself would fail at the row, again and again.
#[tokio::test]
async fn invalid_utf_8_is_a_gap_for_its_tenant_alone() {
    let postgres = Postgres::start().await;
    let uri = database(&postgres, "ascii", "SQL_ASCII").await;
    let mut server = Server::prepare_slot(&uri, "tuplewatch", &[]).await;
    server.start().await;
    server.serving().await;
    let sql = Sql::connect(&uri).await;
    add_tenants(&sql).await;
    let (mut harmed, mut other) = (server.watch("t1", "").await, server.watch("t2", "").await);
    // The bytes of é in UTF-8, and in LATIN1.
    let write = |tenant: &str, document: &str, bytes: &str| {
        format!(
            "INSERT INTO tuplewatch.attributes VALUES ('{tenant}', 'document', '{document}', 'name', \
             ('{{\"@type\": \"type.googleapis.com/base.v1.StringValue\", \"data\": \"' || \
              convert_from('{bytes}', 'SQL_ASCII') || '\"}}')::jsonb)"
        )
    };
    let named = |document: &str| Change::attribute("document", document, "name", &json("StringValue", &"é".into()));
    sql.run(&write("t1", "d1", "\\xc3a9")).await;
    let token = harmed.expect(Change::create(named("d1"))).await.token;

    sql.run(&format!("BEGIN; {}; {}; COMMIT", write("t1", "d2", "\\xe9"), write("t2", "d2", "\\xc3a9"))).await;
    other.expect(Change::create(named("d2"))).await;
    // Another invalid value is another change.
    let change = "UPDATE tuplewatch.attributes SET value = replace(value::text, convert_from('\\xe9', 'SQL_ASCII'), \
                  convert_from('\\xff', 'SQL_ASCII'))::jsonb WHERE entity_id = 'd2' AND tenant_id = 't1'";
    sql.run(change).await;
    sql.insert("t1", "after").await;
    sql.insert("t2", "after").await;
    other.expect(Change::created("after")).await;
    for _ in ["live", "after a restart"] {
        let (messages, status) = harmed.ending().await;
        assert_eq!((changes(&messages), reason(&status)), (vec![], (Code::Aborted, "UNDECODABLE_ROW".into())));
        assert!(status.message().contains("not UTF-8"), "{}", status.message());
        let next = metadata(&status, "next_snap_token");
        let (messages, status) = server.watch("t1", &next).await.ending().await;
        assert_eq!((changes(&messages), reason(&status)), (vec![], (Code::Aborted, "UNDECODABLE_ROW".into())));
        let next = metadata(&status, "next_snap_token");
        server.watch("t1", &next).await.expect(Change::created("after")).await;
        server.kill_and_restart().await;
        harmed = server.watch("t1", &token).await;
    }
    let lsn = sql.flushed().await;
    eventually("acknowledgement continues", async || sql.confirmed_reaches(&lsn).await).await;
}

#[tokio::test]
async fn an_undecodable_row_is_a_gap_for_its_tenant_alone() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    sql.run("ALTER TABLE tuplewatch.attributes DROP CONSTRAINT attributes_value_form").await;
    let (mut harmed, mut other) = (server.watch("t1", "").await, server.watch("t2", "").await);
    sql.insert("t1", "before").await;
    let token = harmed.expect(Change::created("before")).await.token;

    sql.run("BEGIN").await;
    sql.insert("t1", "inside").await;
    sql.insert("t2", "inside").await;
    sql.run(
        r#"INSERT INTO tuplewatch.attributes VALUES ('t1', 'document', 'd', 'secret', '{"@type": "other.Value"}')"#,
    )
    .await;
    sql.insert("t1", "beneath").await;
    sql.run("COMMIT").await;
    sql.insert("t1", "after").await;
    sql.insert("t2", "after").await;

    for process in 0..2 {
        let (messages, status) = harmed.ending().await;
        assert_eq!(changes(&messages), [Change::created("inside")]);
        assert_eq!(reason(&status), (Code::Aborted, "UNDECODABLE_ROW".into()));
        assert!(status.message().contains("tuplewatch.attributes"), "{}", status.message());
        assert!(!status.message().contains("secret"), "no values in messages: {}", status.message());
        let next = metadata(&status, "next_snap_token");
        server.watch("t1", &next).await.expect(Change::created("after")).await;
        if process == 0 {
            other.expect(Change::created("inside")).await;
            other.expect(Change::created("after")).await;
            server.kill_and_restart().await;
            harmed = server.watch("t1", &token).await;
        }
    }
    let lsn = sql.flushed().await;
    eventually("acknowledgement continues", async || sql.confirmed_reaches(&lsn).await).await;
}

/// For every form of the value, and every operation on the row.
#[tokio::test]
async fn every_kind_of_invalid_value_is_a_gap() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    sql.run("ALTER TABLE tuplewatch.attributes DROP CONSTRAINT attributes_value_form").await;
    let good = json("BooleanValue", &true.into());
    let fact = Change::attribute("document", "d", "a", &good);
    let broken = async |stream: &mut Stream, before: &[Change], what: &str| {
        let (messages, status) = stream.ending().await;
        assert_eq!(changes(&messages), before, "{what}");
        assert_eq!(reason(&status), (Code::Aborted, "UNDECODABLE_ROW".into()), "{what}");
        assert!(!status.message().contains("secret"), "no values in messages: {}", status.message());
        server.watch("t1", &metadata(&status, "next_snap_token")).await
    };
    for bad in [
        r#"{"@type": "type.googleapis.com/google.protobuf.StringValue", "data": "secret"}"#,
        r#"{"@type": "type.googleapis.com/base.v1.secret", "data": true}"#,
        r#"{"@type": "type.googleapis.com/base.v1.BooleanValue", "data": "secret"}"#,
        r#"{"@type": "type.googleapis.com/base.v1.IntegerValue", "data": 2147483648}"#,
        r#"{"@type": "type.googleapis.com/base.v1.StringArrayValue", "data": ["secret", null]}"#,
        r#"{"@type": "type.googleapis.com/base.v1.BooleanValue", "data": true, "secret": 1}"#,
        r#"{"data": "secret"}"#,
        r#""secret""#,
        "null",
    ] {
        let mut stream = server.watch("t1", "").await;
        sql.run(&format!("INSERT INTO tuplewatch.attributes VALUES ('t1', 'document', 'd', 'a', '{bad}')")).await;
        stream = broken(&mut stream, &[], bad).await;
        // The end of the invalid fact cannot be reported either.
        sql.run(&format!("UPDATE tuplewatch.attributes SET value = '{good}'")).await;
        stream = broken(&mut stream, &[], bad).await;
        sql.run(&format!("UPDATE tuplewatch.attributes SET value = '{bad}'")).await;
        stream = broken(&mut stream, &[Change::delete(&*fact)], bad).await;
        sql.run("DELETE FROM tuplewatch.attributes").await;
        stream = broken(&mut stream, &[], bad).await;
        sql.run(&format!("INSERT INTO tuplewatch.attributes VALUES ('t1', 'document', 'd', 'a', '{good}')")).await;
        stream.expect(Change::create(&*fact)).await;
        sql.run("DELETE FROM tuplewatch.attributes").await;
        stream.expect(Change::delete(&*fact)).await;
    }
}

/// `mapping.on_undecodable: halt`: the transaction is not delivered until an operator decides.
#[tokio::test]
async fn halt_stops_at_an_undecodable_row_until_it_is_reconfigured() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[("--mapping-on-undecodable", "halt")]).await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    sql.run("ALTER TABLE tuplewatch.attributes DROP CONSTRAINT attributes_value_form").await;
    let mut streams = [server.watch("t1", "").await, server.watch("t2", "").await];
    let mut tokens = Vec::new();
    for (stream, tenant) in streams.iter_mut().zip(["t1", "t2"]) {
        sql.insert(tenant, "before").await;
        tokens.push(stream.expect(Change::created("before")).await.token);
    }
    let before = sql.flushed().await;
    eventually("the earlier changes are acknowledged", async || sql.confirmed_reaches(&before).await).await;

    sql.run("BEGIN").await;
    sql.insert("t1", "inside").await;
    sql.run(r#"INSERT INTO tuplewatch.attributes VALUES ('t1', 'document', 'd', 'a', '{"secret": 1}')"#).await;
    sql.insert("t2", "inside").await;
    sql.run("COMMIT").await;
    let bad = sql.flushed().await;
    sql.insert("t1", "after").await;
    sql.insert("t2", "after").await;

    for process in ["live", "after a restart", "with the row repaired"] {
        let stopped = async || server.health("").await == Ok(ServingStatus::NotServing);
        eventually("health is NOT_SERVING", stopped).await;
        let expected = ["tuplewatch.attributes", "mapping.on_undecodable is 'halt'", "start once with 'gap'"];
        eventually("the remedy is logged", async || expected.iter().all(|text| server.has_logged(text))).await;
        assert!(!server.has_logged("secret"), "no values in logs");
        assert!(!sql.confirmed_reaches(&bad).await, "{process}: it must not be acknowledged");
        for stream in &mut streams {
            stream.expect_silence().await;
        }
        if process == "live" {
            sql.run("UPDATE tuplewatch.attributes SET value = '{}'").await;
        }
        server.kill_9().await;
        server.start().await;
        streams = [server.watch("t1", &tokens[0]).await, server.watch("t2", &tokens[1]).await];
    }

    // The remedy from the log.
    server.kill_9().await;
    server.set("--mapping-on-undecodable", "gap");
    server.start().await;
    server.serving().await;
    let (messages, status) = server.watch("t1", &tokens[0]).await.ending().await;
    assert_eq!(changes(&messages), [Change::created("inside")]);
    assert_eq!(reason(&status), (Code::Aborted, "UNDECODABLE_ROW".into()));
    let next = metadata(&status, "next_snap_token");
    server.watch("t1", &next).await.expect(Change::created("after")).await;
    let mut other = server.watch("t2", &tokens[1]).await;
    other.expect(Change::created("inside")).await;
    other.expect(Change::created("after")).await;
    let lsn = sql.flushed().await;
    eventually("acknowledgement continues", async || sql.confirmed_reaches(&lsn).await).await;

    // Back to halt: the row that was passed does not stop it again.
    server.kill_9().await;
    server.set("--mapping-on-undecodable", "halt");
    server.start().await;
    server.serving().await;
    let mut other = server.watch("t2", &tokens[1]).await;
    sql.insert("t2", "last").await;
    let messages = other.up_to(&Change::created("last")).await;
    assert_eq!(changes(&messages), ["inside", "after", "last"].map(Change::created));
}

#[tokio::test]
async fn a_truncate_is_a_gap_for_every_tenant() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    let mut streams = [server.watch("t1", "").await, server.watch("t2", "").await];
    let mut tokens = Vec::new();
    for (stream, tenant) in streams.iter_mut().zip(["t1", "t2"]) {
        sql.insert(tenant, "before").await;
        tokens.push(stream.expect(Change::created("before")).await.token);
        sql.insert(tenant, "between").await;
    }
    sql.run("BEGIN").await;
    sql.insert("t1", "inside").await;
    sql.run("TRUNCATE tuplewatch.relation_tuples, tuplewatch.attributes").await;
    sql.insert("t1", "beneath").await;
    sql.run("COMMIT").await;
    sql.insert("t1", "after").await;
    sql.insert("t2", "after").await;

    let expected = [vec![Change::created("between"), Change::created("inside")], vec![Change::created("between")]];
    for how in ["live", "resumed", "by another process"] {
        for ((stream, tenant), expected) in streams.iter_mut().zip(["t1", "t2"]).zip(&expected) {
            let (messages, status) = stream.ending().await;
            assert_eq!(&changes(&messages), expected, "{how}: {tenant} has what was before");
            assert_eq!(reason(&status), (Code::Aborted, "TRUNCATE".into()));
            assert!(status.message().contains("tuplewatch.relation_tuples"), "{}", status.message());
            let next = metadata(&status, "next_snap_token");
            server.watch(tenant, &next).await.expect(Change::created("after")).await;
            // The last token before the gap leads to it too.
            let last = &messages.last().unwrap().token;
            let (messages, status) = server.watch(tenant, last).await.ending().await;
            assert_eq!((changes(&messages), status.code()), (vec![], Code::Aborted));
        }
        if how == "resumed" {
            server.kill_and_restart().await;
        }
        streams = [server.watch("t1", &tokens[0]).await, server.watch("t2", &tokens[1]).await];
    }
}

/// The statement names an unwatched table, and truncates several watched ones.
#[tokio::test]
async fn a_truncate_with_cascade_is_one_gap_at_its_place() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    sql.run(
        "CREATE TABLE owners (id text COLLATE \"C\" PRIMARY KEY); INSERT INTO owners VALUES ('t1'), ('t2'); \
         ALTER TABLE tuplewatch.relation_tuples ADD FOREIGN KEY (tenant_id) REFERENCES owners; \
         ALTER TABLE tuplewatch.attributes ADD FOREIGN KEY (tenant_id) REFERENCES owners",
    )
    .await;
    let mut streams = [server.watch("t1", "").await, server.watch("t2", "").await];
    let mut tokens = Vec::new();
    for (stream, tenant) in streams.iter_mut().zip(["t1", "t2"]) {
        sql.insert(tenant, "before").await;
        tokens.push(stream.expect(Change::created("before")).await.token);
    }
    // A rolled-back TRUNCATE has no effect.
    sql.run("BEGIN; SAVEPOINT s; TRUNCATE owners CASCADE; ROLLBACK TO s").await;
    sql.insert("t1", "kept").await;
    sql.run("COMMIT; BEGIN; TRUNCATE owners CASCADE; ROLLBACK").await;
    streams[0].expect(Change::created("kept")).await;

    sql.run("BEGIN").await;
    sql.insert("t1", "inside").await;
    sql.run("DELETE FROM tuplewatch.relation_tuples WHERE entity_id = 'before'").await;
    sql.run("TRUNCATE owners CASCADE; INSERT INTO owners VALUES ('t1'), ('t2')").await;
    sql.insert("t1", "beneath").await;
    sql.run("TRUNCATE owners CASCADE; INSERT INTO owners VALUES ('t1'), ('t2')").await;
    sql.insert("t2", "beneath").await;
    sql.run("COMMIT").await;
    sql.insert("t1", "after").await;
    sql.insert("t2", "after").await;

    let deleted = Change::delete(Change::viewer("before"));
    let expected = [vec![Change::created("inside"), deleted.clone()], vec![deleted]];
    for how in ["live", "resumed", "by another process"] {
        for ((stream, tenant), expected) in streams.iter_mut().zip(["t1", "t2"]).zip(&expected) {
            let (messages, status) = stream.ending().await;
            let got = changes(&messages);
            assert!(got.ends_with(expected), "{how}: {tenant} has what was before, and nothing else: {got:?}");
            assert_eq!(reason(&status), (Code::Aborted, "TRUNCATE".into()));
            // One gap is enough, although both tables were truncated twice.
            let next = metadata(&status, "next_snap_token");
            server.watch(tenant, &next).await.expect(Change::created("after")).await;
        }
        if how == "resumed" {
            server.kill_and_restart().await;
        }
        streams = [server.watch("t1", &tokens[0]).await, server.watch("t2", &tokens[1]).await];
    }
}
