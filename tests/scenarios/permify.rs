//! Permify's own tables, written with Permify's own statements. Every change is delivered, including those that Permify's Watch misses.

use crate::support::change::Change;
use crate::support::permify::{
    LIVE, Permify, Tables, Written, begin, collect_garbage, delete_attributes, delete_tuples, history, insert_tuple,
    json, set_attribute, write, xid_of,
};
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::{Message, Stream, metadata, reason};
use crate::support::wait::within;
use crate::support::writer::seed;
use fastrand::Rng;
use std::collections::{BTreeMap, HashSet};
use tonic::Code;
use tuplewatch::model::lsn::{Position, Xid8};
use tuplewatch::model::scope::Place;
use tuplewatch::model::snap_token::SnapToken;

fn created(id: &str) -> Change {
    Change::created(id)
}

fn deleted(id: &str) -> Change {
    Change::delete(Change::viewer(id))
}

async fn watch(server: &Server, tenant: &str, token: &str) -> Stream {
    server.watch(tenant, token).await.with_empty()
}

/// The next message has the token of this write, and these changes.
async fn expect(stream: &mut Stream, written: &Written, changes: &[Change]) {
    let message = stream.next().await;
    assert_eq!(message.changes, changes);
    assert_eq!(message.token, written.token());
}

#[tokio::test]
async fn every_write_of_permify_is_streamed() {
    for (schema, tables) in [("public", Tables::New), ("Authz 'n more", Tables::Grown)] {
        let postgres = Postgres::start().await;
        let permify = Permify::create(&postgres, schema, tables).await;
        let of_schema = "relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())";
        let objects = format!("SELECT count(*) FROM pg_class WHERE {of_schema}");
        let sql = permify.sql().await;
        let before = sql.value(&objects).await;
        let server = permify.serve(&postgres, &[]).await;
        assert_eq!(sql.value(&objects).await, before, "nothing was created beside Permify's tables");
        assert!(sql.is_true("to_regnamespace('tuplewatch') IS NULL").await);
        let identities = format!(
            "SELECT string_agg(format('%s=%s', relname, relreplident), ' ' ORDER BY relname) FROM pg_class \
             WHERE {of_schema} AND relname IN ('attributes', 'relation_tuples', 'transactions')"
        );
        assert_eq!(sql.value(&identities).await, "attributes=f relation_tuples=f transactions=d");

        let mut stream = watch(&server, "t1", "").await;
        let written = write(&sql, "t1", &[insert_tuple("t1", "1"), insert_tuple("t1", "2")]).await;
        expect(&mut stream, &written, &[created("1"), created("2")]).await;
        // Writes without a change: their writer waits for the token too.
        let written = write(&sql, "t1", &[insert_tuple("t1", "1")]).await;
        expect(&mut stream, &written, &[]).await;
        let written = write(&sql, "t1", &[]).await;
        expect(&mut stream, &written, &[]).await;
        write(&sql, "t2", &[insert_tuple("t2", "elsewhere")]).await;
        let written = write(&sql, "t1", &[delete_tuples("t1", "2")]).await;
        expect(&mut stream, &written, &[deleted("2")]).await;

        let values = [
            ("StringValue", r#""é""#),
            ("IntegerValue", "-7"),
            ("DoubleValue", "2.5"),
            ("BooleanValue", "true"),
            ("StringArrayValue", r#"["a",""]"#),
            ("IntegerArrayValue", "[1,-2]"),
            ("DoubleArrayValue", "[0.5]"),
            ("BooleanArrayValue", "[true,false]"),
        ];
        let mut earlier: Option<String> = None;
        for (kind, data) in values {
            let written = write(&sql, "t1", &[set_attribute("t1", "1", "any", kind, data)]).await;
            let fact = Change::attribute("document", "1", "any", &json(kind, data));
            let gone = earlier.replace(fact.clone()).map(Change::delete);
            let changes: Vec<Change> = gone.into_iter().chain([Change::create(fact)]).collect();
            expect(&mut stream, &written, &changes).await;
        }

        // A bundle that writes a tuple and deletes it again.
        let on = Change::attribute("document", "3", "public", &json("BooleanValue", "true"));
        let bundle = [
            insert_tuple("t1", "3"),
            set_attribute("t1", "3", "public", "BooleanValue", "true"),
            delete_tuples("t1", "3"),
            delete_attributes("t1", "1", "any"),
        ];
        let written = write(&sql, "t1", &bundle).await;
        let gone = Change::delete(earlier.take().unwrap());
        expect(&mut stream, &written, &[created("3"), Change::create(&on), deleted("3"), gone]).await;

        // A migration and a garbage collection change no fact.
        permify.change_live_value().await;
        collect_garbage(&sql).await;
        assert_eq!(sql.value("SELECT count(*) FROM relation_tuples WHERE tenant_id = 't1'").await, "1");
        let written = write(&sql, "t1", &[insert_tuple("t1", "4")]).await;
        expect(&mut stream, &written, &[created("4")]).await;

        // The deletion of a tenant deletes its facts. Permify writes no transaction for it.
        let rest = [deleted("1"), deleted("4"), Change::delete(&on)];
        sql.run(
            "BEGIN; DELETE FROM relation_tuples WHERE tenant_id = 't1'; DELETE FROM attributes WHERE tenant_id = 't1'; \
             DELETE FROM transactions WHERE tenant_id = 't1'; DELETE FROM tenants WHERE id = 't1'; COMMIT",
        )
        .await;
        let message = stream.next().await;
        assert_eq!(message.changes, rest);
        // A token of the tenant still resumes, and nothing follows.
        let mut last = watch(&server, "t1", &written.token()).await;
        assert_eq!(last.next().await.changes, rest);
        last.expect_silence().await;
    }
}

/// Runs random statements of Permify on few documents.
async fn write_at_random(permify: Permify, mut random: Rng, count: usize) {
    let sql = permify.sql().await;
    for _ in 0..count {
        let tenant = if random.bool() { "t1" } else { "t2" };
        let id = random.u8(..40).to_string();
        let mut statements = vec![format!("BEGIN; INSERT INTO transactions (tenant_id) VALUES ('{tenant}')")];
        match random.u8(..10) {
            0 => {}
            1..5 => statements.push(insert_tuple(tenant, &id)),
            5..7 => statements.push(delete_tuples(tenant, &id)),
            7..9 => statements.push(set_attribute(tenant, &id, "public", "IntegerValue", &random.i8(..).to_string())),
            _ => statements.extend([insert_tuple(tenant, &id), delete_tuples(tenant, &id)]),
        }
        statements.push(if random.u8(..20) == 0 { "ROLLBACK" } else { "COMMIT" }.to_owned());
        if let Err(error) = sql.batch_execute(&statements.join("; ")).await {
            // A deadlock or a unique violation, which is normal for writers.
            let code = error.code().map(|code| code.code().to_owned());
            assert!(matches!(code.as_deref(), Some("40P01" | "23505")), "{error} {code:?}");
            sql.run("ROLLBACK").await;
        }
    }
}

/// Reads from `token` up to this write, and reconnects now and then. Collects the changes of each message with its transaction.
async fn read_up_to(server: &Server, tenant: &str, token: &str, last: u64, received: &mut Vec<(u64, Vec<Change>)>) {
    let mut token = token.to_owned();
    loop {
        let mut stream = watch(server, tenant, &token).await;
        for _ in 0..300 {
            let mut message = stream.next().await;
            message.changes.sort();
            let xid = xid_of(&message.token);
            received.push((xid, message.changes));
            if xid == last {
                return;
            }
            token = message.token;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_writes_are_complete_whatever_their_timestamps() {
    const WRITERS: usize = 16;
    const ROUND: usize = 200;
    const ROUNDS_MAX: usize = 10;
    let seed = seed();
    let postgres = Postgres::with(&[("track_commit_timestamp", "on")]).await;
    let permify = Permify::create(&postgres, "authz", Tables::Grown).await;
    let server = permify.serve(&postgres, &[]).await;
    let sql = permify.sql().await;
    // Permify's Watch reports nothing while this runs.
    sql.run("CREATE DATABASE other").await;
    let other = Sql::connect(&postgres.uri_of("other")).await;
    other.run("BEGIN; SELECT pg_current_xact_id()").await;

    let tenants = ["t1", "t2"];
    let mut tokens = Vec::new();
    let mut received = [Vec::new(), Vec::new()];
    for tenant in tenants {
        tokens.push(write(&sql, tenant, &[]).await.text_token());
    }
    let first: HashSet<u64> = tokens.iter().map(|token| first_xid(token)).collect();
    let mut shown = 0;
    for round in 0..ROUNDS_MAX {
        let random = |writer: usize| Rng::with_seed(seed.wrapping_add((round * WRITERS + writer) as u64));
        let writers = (0..WRITERS).map(|n| tokio::spawn(write_at_random(permify.clone(), random(n), ROUND)));
        for writer in writers.collect::<Vec<_>>() {
            within("the writers are done", writer).await.unwrap();
        }
        for ((tenant, token), received) in tenants.iter().zip(&mut tokens).zip(&mut received) {
            let last = write(&sql, tenant, &[]).await;
            read_up_to(&server, tenant, token, last.xid, received).await;
            *token = last.token();

            let mut expected = history(&sql, tenant).await;
            expected.retain(|xid, _| !first.contains(xid));
            let distinct: BTreeMap<u64, Vec<Change>> = received.iter().cloned().collect();
            assert_eq!(distinct.len(), received.len(), "no transaction comes twice");
            assert_eq!(distinct, expected);
        }
        let (ties, inversions) = ties_and_inversions(&sql, &received[0]).await;
        eprintln!("{} transactions of t1, {ties} equal timestamps, {inversions} inverted", received[0].len());
        if ties > 0 && inversions > 0 {
            return;
        }
        shown += ties + inversions;
    }
    // Inverted ones are rare from version 18 on.
    assert!(shown > 0, "no equal or inverted commit timestamps in {ROUNDS_MAX} rounds: nothing was shown");
}

fn first_xid(token: &str) -> u64 {
    let Ok(SnapToken::Snapshot { xid, .. }) = token.parse() else { panic!("a text token") };
    xid.0
}

/// The number of repeated commit timestamps, and of those before their predecessor in the order of the stream.
async fn ties_and_inversions(sql: &Sql, received: &[(u64, Vec<Change>)]) -> (usize, usize) {
    let rows =
        sql.rows("SELECT id, extract(epoch FROM pg_xact_commit_timestamp(id::xid)) * 1000000 FROM transactions").await;
    let times: BTreeMap<u64, f64> = rows.iter().map(|row| (row[0].parse().unwrap(), row[1].parse().unwrap())).collect();
    let times: Vec<f64> = received.iter().map(|(xid, _)| times[xid]).collect();
    let distinct: HashSet<u64> = times.iter().map(|time| time.to_bits()).collect();
    (times.len() - distinct.len(), times.windows(2).filter(|pair| pair[1] < pair[0]).count())
}

#[tokio::test]
async fn tokens_of_every_form_resume() {
    let postgres = Postgres::start().await;
    let permify = Permify::create(&postgres, "public", Tables::New).await;
    let sql = permify.sql().await;
    let long_ago = write(&sql, "t1", &[insert_tuple("t1", "before the log")]).await;
    let mut server = permify.serve(&postgres, &[("--service-watch-resolve-timeout", "2s")]).await;
    let first = write(&sql, "t1", &[insert_tuple("t1", "first")]).await;

    // Two other transactions run during this one: one commits before it, and one after it.
    let (earlier, later) = (permify.sql().await, permify.sql().await);
    let before = begin(&earlier, "t1").await;
    let after = begin(&later, "t1").await;
    let own = begin(&sql, "t1").await;
    earlier.run(&insert_tuple("t1", "earlier")).await;
    earlier.run("COMMIT").await;
    sql.run(&insert_tuple("t1", "own")).await;
    sql.run("COMMIT").await;
    let waiting = server.try_watch("t1", &after.token()).await.err().expect("a transaction that runs");
    assert_eq!(reason(&waiting), (Code::Unavailable, "TRANSACTION_STILL_RUNNING".into()));
    later.run(&insert_tuple("t1", "later")).await;
    later.run("COMMIT").await;

    // A rolled-back write leaves an unknown id.
    let rolled_back = begin(&sql, "t1").await;
    sql.run("ROLLBACK").await;
    let next = sql.value("SELECT pg_snapshot_xmax(pg_current_snapshot())").await.parse::<u64>().unwrap();
    for process in 0..2 {
        // Also after Permify has deleted the transactions, because the log has them itself.
        if process == 1 {
            collect_garbage(&sql).await;
            server.kill_9().await;
            server.start().await;
            server.serving().await;
        }
        let mut stream = watch(&server, "t1", &first.token()).await;
        expect(&mut stream, &before, &[created("earlier")]).await;
        expect(&mut stream, &own, &[created("own")]).await;
        expect(&mut stream, &after, &[created("later")]).await;
        // Everything outside its snapshot, except for itself.
        let mut stream = watch(&server, "t1", &own.text_token()).await;
        expect(&mut stream, &before, &[created("earlier")]).await;
        expect(&mut stream, &after, &[created("later")]).await;
        // The first write in the log.
        let mut stream = watch(&server, "t1", &first.text_token()).await;
        expect(&mut stream, &before, &[created("earlier")]).await;

        let check = async |token: &str, code: Code, expected: &str| {
            let status = server.try_watch("t1", token).await.err().unwrap_or_else(|| panic!("{expected}: accepted"));
            assert_eq!(reason(&status), (code, expected.to_owned()), "{status:?}");
            status
        };
        for token in [long_ago.token(), long_ago.text_token(), rolled_back.token(), SnapToken::Xid(Xid8(0)).to_string()]
        {
            let status = check(&token, Code::OutOfRange, "TRANSACTION_UNKNOWN").await;
            // Tokens in statuses are native, whatever the form of those in messages.
            let mut stream = watch(&server, "t1", &metadata(&status, "earliest_snap_token")).await;
            expect(&mut stream, &first, &[created("first")]).await;
        }
        for xid in [next + 1_000_000, u64::MAX] {
            let token = SnapToken::Xid(Xid8(xid)).to_string();
            check(&token, Code::FailedPrecondition, "SNAP_TOKEN_BEYOND_HISTORY").await;
        }
        check("AAAAAAAAAAA", Code::InvalidArgument, "INVALID_SNAP_TOKEN").await;
    }
}

#[tokio::test]
async fn native_tokens_can_be_chosen_and_xids_work_in_any_preset() {
    let postgres = Postgres::start().await;
    let permify = Permify::create(&postgres, "public", Tables::New).await;
    let server = permify.serve(&postgres, &[("--snap-token-format", "native")]).await;
    let sql = permify.sql().await;
    let mut stream = watch(&server, "t1", "").await;
    let first = write(&sql, "t1", &[]).await;
    let second = write(&sql, "t1", &[insert_tuple("t1", "second")]).await;
    let token = stream.next().await.token;
    assert!(matches!(token.parse(), Ok(SnapToken::Position { .. })));
    for token in [token, first.token(), first.text_token()] {
        watch(&server, "t1", &token).await.expect(created("second")).await;
    }

    let own = Server::prepare_slot(&postgres.uri(), "own", &[("--replication-publication", "own")]).await;
    let mut own = own;
    own.start().await;
    own.serving().await;
    sql.run("BEGIN").await;
    let xid = sql.value("SELECT pg_current_xact_id()").await.parse().unwrap();
    sql.insert("t1", "written").await;
    sql.run("COMMIT").await;
    sql.insert("t1", "after").await;
    own.watch("t1", &SnapToken::Xid(Xid8(xid)).to_string()).await.expect(created("after")).await;
    let status = own.try_watch("t1", &second.token()).await.err().expect("a transaction of other tables");
    assert_eq!(reason(&status), (Code::OutOfRange, "TRANSACTION_UNKNOWN".into()));
}

/// Reads until this write's last message.
async fn read_whole(stream: &mut Stream, token: &str) -> Vec<Message> {
    let mut messages = Vec::new();
    loop {
        let message = stream.next().await;
        let is_last = message.token == token;
        messages.push(message);
        if is_last {
            return messages;
        }
    }
}

fn ids(messages: &[Message]) -> Vec<String> {
    messages.iter().flat_map(|message| &message.changes).map(|change| change.fact.clone()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_transaction_resumes_at_its_beginning() {
    let many = |tenant: &str, name: &str, count: usize| {
        format!(
            "INSERT INTO relation_tuples (tenant_id, entity_type, entity_id, relation, subject_type, subject_id, \
                 subject_relation) SELECT '{tenant}', 'document', '{name}' || n, 'viewer', 'user', repeat('u', 100), '' \
             FROM generate_series(1, {count}) n"
        )
    };
    let postgres = Postgres::start().await;
    let permify = Permify::create(&postgres, "public", Tables::New).await;
    let sql = permify.sql().await;
    let mut server = permify.serve(&postgres, &[("--service-watch-message-size-max", "1KiB")]).await;
    let mut stream = watch(&server, "t1", "").await;

    // It is the first in the log, so its parts have native tokens.
    let first = write(&sql, "t1", &[many("t1", "a", 50)]).await;
    let messages = read_whole(&mut stream, &first.token()).await;
    assert_eq!(ids(&messages).len(), 50);
    let inside = &messages[2];
    assert!(matches!(
        inside.token.parse(),
        Ok(SnapToken::Position { place: Place { position: Position { steps: 1.., .. }, .. }, .. })
    ));
    let rest = read_whole(&mut watch(&server, "t1", &inside.token).await, &first.token()).await;
    assert_eq!(ids(&rest), ids(&messages[3..]));

    // The preceding transaction belongs to another tenant. The second large one exceeds the memory for a transaction.
    let mut before = write(&sql, "t2", &[insert_tuple("t2", "before")]).await;
    for (name, count) in [("b", 50), ("c", 60_000)] {
        let large = write(&sql, "t1", &[many("t1", name, count)]).await;
        let messages = read_whole(&mut stream, &large.token()).await;
        let all = ids(&messages);
        assert_eq!((all.len(), all.iter().collect::<HashSet<_>>().len()), (count, count));
        let (_, parts) = messages.split_last().unwrap();
        assert!(parts.len() > 3 && parts.iter().all(|message| message.token == before.token()));
        for process in 0..2 {
            let mut resumed = watch(&server, "t1", &parts[2].token).await;
            assert_eq!(ids(&read_whole(&mut resumed, &large.token()).await), all);
            if process == 0 {
                server.kill_9().await;
                server.start().await;
                server.serving().await;
                stream = watch(&server, "t1", &large.token()).await;
            }
        }
        before = large;
    }

    // A large tenant is deleted.
    sql.run("DELETE FROM relation_tuples WHERE tenant_id = 't1'").await;
    let mut gone = 0;
    let last = loop {
        let message = stream.next().await;
        gone += message.changes.len();
        if message.token != before.token() {
            break message;
        }
    };
    assert_eq!(gone, 60_100);
    let end = write(&sql, "t1", &[insert_tuple("t1", "end")]).await;
    expect(&mut stream, &end, &[created("end")]).await;
    expect(&mut watch(&server, "t1", &last.token).await, &end, &[created("end")]).await;
}

#[tokio::test]
async fn truncating_facts_is_a_gap_and_truncating_transactions_is_not() {
    let postgres = Postgres::start().await;
    let permify = Permify::create(&postgres, "public", Tables::New).await;
    let server = permify.serve(&postgres, &[]).await;
    let sql = permify.sql().await;
    let mut stream = watch(&server, "t1", "").await;
    let written = write(&sql, "t1", &[insert_tuple("t1", "1")]).await;
    expect(&mut stream, &written, &[created("1")]).await;
    sql.run("TRUNCATE transactions").await;
    let written = write(&sql, "t1", &[insert_tuple("t1", "2")]).await;
    expect(&mut stream, &written, &[created("2")]).await;
    sql.run("TRUNCATE transactions, relation_tuples").await;
    let (_, status) = stream.ending().await;
    assert_eq!(reason(&status), (Code::Aborted, "TRUNCATE".into()));
    let status = watch(&server, "t1", &written.token()).await.ending().await.1;
    assert_eq!(reason(&status), (Code::Aborted, "TRUNCATE".into()));
    let mut stream = watch(&server, "t1", &metadata(&status, "next_snap_token")).await;
    let written = write(&sql, "t1", &[insert_tuple("t1", "3")]).await;
    expect(&mut stream, &written, &[created("3")]).await;
    // Marked rows are no facts, whoever marked them.
    sql.run(&format!("UPDATE relation_tuples SET expired_tx_id = '5' WHERE expired_tx_id = '{LIVE}'")).await;
    assert_eq!(stream.next().await.changes, [deleted("3")]);
}
