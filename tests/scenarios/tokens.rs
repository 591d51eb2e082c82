//! Snap tokens from SQL, from streams, and from elsewhere, and invalid ones.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::{Message, changes, metadata, reason};
use crate::support::wait::{eventually, within};
use crate::support::writer::add_tenants;
use tokio::process::Command;
use tonic::Code;
use tuplewatch::model::lsn::{CommitTime, Lsn, Position};
use tuplewatch::model::scope::Place;
use tuplewatch::model::snap_token::SnapToken;
use tuplewatch::model::timeline::TimelineId;

fn created(id: &str) -> Change {
    Change::create(Change::viewer(id))
}

async fn token(sql: &Sql) -> String {
    sql.value("SELECT tuplewatch.snap_token()").await
}

#[tokio::test]
async fn a_transaction_token_starts_right_after_its_transaction() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;

    // With rows before and after the call.
    sql.run("BEGIN").await;
    sql.insert("t1", "own1").await;
    let with_rows = token(&sql).await;
    sql.insert("t1", "own2").await;
    sql.run("COMMIT").await;
    sql.insert("t1", "a").await;
    // Without rows.
    let without_rows = token(&sql).await;
    sql.insert("t1", "b").await;
    sql.run("BEGIN READ ONLY").await;
    let read_only = token(&sql).await;
    sql.run("COMMIT").await;
    sql.insert("t1", "c").await;
    // In a released savepoint, and twice in one transaction.
    sql.run("BEGIN; SAVEPOINT s").await;
    sql.insert("t1", "own3").await;
    let first = token(&sql).await;
    sql.run("RELEASE SAVEPOINT s").await;
    let second = token(&sql).await;
    assert_ne!(first, second);
    sql.run("COMMIT").await;
    sql.insert("t1", "d").await;

    for _ in ["from memory", "from disk"] {
        let check = async |token: &str, expected: &[&str]| {
            let messages = server.watch("t1", token).await.up_to(&created("d")).await;
            let expected: Vec<Change> = expected.iter().map(|id| created(id)).collect();
            assert_eq!(changes(&messages), expected);
        };
        check(&with_rows, &["a", "b", "c", "own3", "d"]).await;
        check(&without_rows, &["b", "c", "own3", "d"]).await;
        check(&read_only, &["c", "own3", "d"]).await;
        check(&first, &["d"]).await;
        check(&second, &["d"]).await;
        server.kill_and_restart().await;
    }
}

#[tokio::test]
async fn an_unknown_transaction_token_starts_at_its_floor() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    sql.insert("t1", "before").await;

    sql.run("BEGIN").await;
    sql.insert("t1", "own1").await;
    sql.run("SAVEPOINT s").await;
    let savepoint = token(&sql).await;
    sql.run("ROLLBACK TO SAVEPOINT s").await;
    sql.insert("t1", "own2").await;
    sql.run("COMMIT").await;
    sql.run("BEGIN").await;
    let rolled_back = token(&sql).await;
    sql.insert("t1", "never").await;
    sql.run("ROLLBACK").await;
    sql.insert("t1", "last").await;

    // Its transaction committed after the floor, so it is delivered: a start may be too early, never too late.
    let messages = server.watch("t1", &savepoint).await.up_to(&created("last")).await;
    assert_eq!(changes(&messages), ["own1", "own2", "last"].map(created));
    server.watch("t1", &rolled_back).await.expect(created("last")).await;
}

#[tokio::test]
async fn a_transaction_token_waits_for_its_transaction() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let writer = postgres.sql().await;
    writer.run("BEGIN").await;
    writer.insert("t1", "own").await;
    let token = token(&writer).await;

    let endpoint = server.endpoint();
    let opening = {
        let token = token.clone();
        tokio::spawn(async move { crate::support::stream::Stream::open(&endpoint, "t1", &token).await })
    };
    let has_asked = "EXISTS (SELECT FROM pg_stat_activity WHERE application_name LIKE 'tuplewatch%' \
                     AND query LIKE '%pg_xact_status%')";
    eventually("it asks for the outcome of the transaction", async || sql.is_true(has_asked).await).await;
    sql.insert("t1", "meanwhile").await;
    assert!(!opening.is_finished());
    writer.run("COMMIT").await;
    let mut stream = within("the stream starts", opening).await.unwrap().unwrap();
    sql.insert("t1", "after").await;
    stream.expect(created("after")).await;
}

#[tokio::test]
async fn a_transaction_token_waits_until_a_timeout() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[("--service-watch-resolve-timeout", "100ms")]).await;
    let sql = postgres.sql().await;
    sql.run("BEGIN").await;
    let token = token(&sql).await;
    let status = server.try_watch("t1", &token).await.err().expect("a transaction that still runs");
    assert_eq!(reason(&status), (Code::Unavailable, "TRANSACTION_STILL_RUNNING".into()));
    sql.run("COMMIT").await;
    let mut stream = server.watch("t1", &token).await;
    sql.insert("t1", "after").await;
    stream.expect(created("after")).await;
}

#[tokio::test]
async fn invalid_tokens_and_tenants_are_refused() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    // Opened before the refusals, and not affected by them.
    let mut stream = server.watch("t1", "").await;
    sql.insert("t1", "first").await;
    let good = stream.expect(created("first")).await.token;
    let SnapToken::Position { source, timeline, place, commit_time } = good.parse().unwrap() else {
        panic!("Watch emits position tokens")
    };

    sql.run("CREATE DATABASE other").await;
    let _other_node = Server::prepare_slot(&postgres.uri_of("other"), "other", &[]).await;
    let foreign = token(&Sql::connect(&postgres.uri_of("other")).await).await;
    let write = |source, timeline, lsn: u64| {
        SnapToken::Position { source, timeline, place: Place::at(Lsn(lsn)), commit_time }.to_string()
    };
    let lsn = place.position.lsn.0;
    let mut source_of_another = source;
    source_of_another.0[0] ^= 1;
    let SnapToken::Transaction { id, xid, .. } = token(&sql).await.parse().unwrap() else {
        panic!("snap_token() returns transaction tokens")
    };
    let mut unknown_id = id;
    unknown_id.0[0] ^= 1;
    let future = SnapToken::Transaction { source, id: unknown_id, xid, floor: Lsn(lsn + (1 << 40)) }.to_string();
    // An LSN before the log began, or the same one with nothing before it.
    let ancient = SnapToken::Transaction { source, id: unknown_id, xid, floor: Lsn(16) }.to_string();
    let mut damaged = good.clone().into_bytes();
    damaged[30] = if damaged[30] == b'A' { b'B' } else { b'A' };

    let invalid = (Code::InvalidArgument, "INVALID_SNAP_TOKEN");
    let cases = [
        ("no base64", "%%%".to_owned(), invalid),
        ("one character", "A".to_owned(), invalid),
        ("text", "not a token at all".to_owned(), invalid),
        ("cut short", good[..good.len() - 1].to_owned(), invalid),
        ("cut in half", good[..good.len() / 2].to_owned(), invalid),
        ("with something behind", format!("{good}AAAA"), invalid),
        ("damaged", String::from_utf8(damaged).unwrap(), invalid),
        ("random", (0..60).map(|_| fastrand::alphanumeric()).collect(), invalid),
        ("long", "A".repeat(5_000), invalid),
        ("1 MB", "A".repeat(1_000_000), invalid),
        ("another database's", foreign, (Code::FailedPrecondition, "FOREIGN_SNAP_TOKEN")),
        (
            "another cluster's",
            write(source_of_another, timeline, lsn),
            (Code::FailedPrecondition, "FOREIGN_SNAP_TOKEN"),
        ),
        (
            "another timeline's",
            write(source, TimelineId([7; 8]), lsn),
            (Code::FailedPrecondition, "ABANDONED_SNAP_TOKEN"),
        ),
        ("future", write(source, timeline, lsn + (1 << 40)), (Code::FailedPrecondition, "SNAP_TOKEN_BEYOND_HISTORY")),
        ("the end of time", write(source, timeline, u64::MAX), (Code::FailedPrecondition, "SNAP_TOKEN_BEYOND_HISTORY")),
        ("a future transaction's", future, (Code::FailedPrecondition, "SNAP_TOKEN_BEYOND_HISTORY")),
        ("from before the log", write(source, timeline, 16), (Code::OutOfRange, "SNAP_TOKEN_TOO_OLD")),
        ("zero", write(source, timeline, 0), (Code::OutOfRange, "SNAP_TOKEN_TOO_OLD")),
        ("an ancient transaction's", ancient, (Code::OutOfRange, "SNAP_TOKEN_TOO_OLD")),
    ];
    let mut wrong = Vec::new();
    for (what, token, (code, expected)) in cases {
        match server.try_watch("t1", &token).await {
            Ok(_) => wrong.push(format!("{what}: accepted")),
            Err(status) if reason(&status) != (code, expected.to_owned()) => {
                wrong.push(format!(
                    "{what}: {:?} '{}' instead of {code:?} {expected}",
                    reason(&status),
                    status.message()
                ));
            }
            Err(status) => {
                assert!(!status.message().is_empty());
                if code == Code::OutOfRange {
                    // The earliest token leads to the complete history.
                    let earliest = metadata(&status, "earliest_snap_token");
                    server.watch("t1", &earliest).await.expect(created("first")).await;
                }
            }
        }
    }
    let long = "a".repeat(513);
    let (malformed, unknown) = ((Code::InvalidArgument, "INVALID_TENANT"), (Code::NotFound, "TENANT_NOT_FOUND"));
    let tenants = [("", malformed), (&long, malformed), ("t\0", malformed), ("a b", malformed), ("nobody", unknown)];
    for (tenant, (code, expected)) in tenants {
        for token in ["", &good] {
            let status = server.try_watch(tenant, token).await.err().expect("a refused tenant");
            if reason(&status) != (code, expected.to_owned()) {
                wrong.push(format!("tenant {tenant:?}: {:?} '{}'", reason(&status), status.message()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");

    // In the standard alphabet and padded it is the same token.
    let standard = good.replace('-', "+").replace('_', "/");
    for token in [good, standard] {
        let mut resumed = server.watch("t1", &token).await;
        sql.insert("t1", "next").await;
        resumed.expect(created("next")).await;
        stream.expect(created("next")).await;
        sql.run("DELETE FROM tuplewatch.relation_tuples WHERE entity_id = 'next'").await;
        stream.expect(Change::delete(Change::viewer("next"))).await;
    }
}

#[tokio::test]
async fn a_token_from_before_a_nodes_log_is_too_old() {
    let postgres = Postgres::start().await;
    let first = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let mut stream = first.watch("t1", "").await;
    sql.insert("t1", "early").await;
    let position = stream.expect(created("early")).await.token;
    let transaction = token(&sql).await;
    sql.insert("t1", "early2").await;

    let mut second = Server::prepare_slot(&postgres.uri(), "second", &[]).await;
    second.start().await;
    second.serving().await;
    sql.insert("t1", "late").await;
    for token in [position, transaction] {
        let status = second.try_watch("t1", &token).await.err().expect("a token that is too old");
        assert_eq!(reason(&status), (Code::OutOfRange, "SNAP_TOKEN_TOO_OLD".into()));
        let earliest = metadata(&status, "earliest_snap_token");
        second.watch("t1", &earliest).await.expect(created("late")).await;
        let messages = first.watch("t1", &token).await.up_to(&created("late")).await;
        assert_eq!(changes(&messages).last(), Some(&created("late")));
    }
}

/// Two nodes with a slot each: the fast one has delivered a change that the slow one has not received.
#[tokio::test]
async fn a_token_ahead_of_a_node_waits_for_it() {
    let postgres = Postgres::start().await;
    let fast = Server::serve(&postgres, &[]).await;
    let mut slow = Server::prepare_slot(&postgres.uri(), "slow", &[]).await;
    slow.start().await;
    slow.serving().await;
    let sql = postgres.sql().await;
    let mut stream = fast.watch("t1", "").await;

    let walsender = sql.value("SELECT active_pid FROM pg_replication_slots WHERE slot_name = 'slow'").await;
    signal("-STOP", &walsender).await;
    sql.insert("t1", "ahead").await;
    let token = stream.expect(created("ahead")).await.token;
    let mut ahead = slow.watch("t1", &token).await;
    let mut now = slow.watch("t1", "").await;
    sql.insert("t1", "after").await;
    stream.expect(created("after")).await;
    ahead.expect_silence().await;
    signal("-CONT", &walsender).await;
    ahead.expect(created("after")).await;
    now.expect(created("after")).await;
}

async fn signal(signal: &str, process: &str) {
    let status = Command::new("kill").args([signal, process]).status().await.unwrap();
    assert!(status.success());
}

/// Alternating rows of two tenants and both tables, and an UPDATE of the key, which has two steps in one row message.
const INTERLEAVED: &str = "
    BEGIN;
    INSERT INTO tuplewatch.relation_tuples
        SELECT 't' || 1 + n % 2, 'document', 'd' || n, 'viewer', 'user', 'u', '' FROM generate_series(1, 1200) n;
    UPDATE tuplewatch.relation_tuples SET subject_id = 'v' WHERE entity_id LIKE 'd1%';
    INSERT INTO tuplewatch.attributes
        SELECT 't' || 1 + n % 2, 'document', 'd' || n, 'size',
               jsonb_build_object('@type', 'type.googleapis.com/base.v1.IntegerValue', 'data', n) FROM generate_series(1, 50) n;
    COMMIT";

#[tokio::test]
async fn every_token_inside_a_transaction_gives_the_rest() {
    let small = [("--service-watch-message-size-max", "1KiB")];
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &small).await;
    // The same stream, cut at other places.
    let mut other =
        Server::prepare_slot(&postgres.uri(), "other", &[("--service-watch-message-size-max", "1500B")]).await;
    other.start().await;
    other.serving().await;
    let mut coarse = Server::prepare_slot(&postgres.uri(), "coarse", &[]).await;
    coarse.start().await;
    coarse.serving().await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    let start = token(&sql).await;
    sql.run(INTERLEAVED).await;
    sql.insert("t1", "end").await;

    let whole = server.watch("t1", &start).await.up_to(&created("end")).await;
    let inner = whole.len() - 2;
    assert!(inner > 20, "{} messages", whole.len());
    assert!(whole.iter().all(|message| message.bytes < 1200), "each below the limit");
    for _ in ["from memory", "from disk"] {
        for n in 0..=inner {
            for node in [&server, &other, &coarse] {
                let rest = node.watch("t1", &whole[n].token).await.up_to(&created("end")).await;
                assert_eq!(changes(&rest), changes(&whole[n + 1..]), "after message {n}: {}", whole[n].token);
            }
        }
        for node in [&mut server, &mut other, &mut coarse] {
            node.kill_and_restart().await;
        }
    }
}

/// So large that it is staged on disk before its commit arrives.
#[tokio::test]
async fn tokens_inside_a_staged_transaction_give_the_rest() {
    let small = [("--service-watch-message-size-max", "16KiB"), ("--changelog-memory-window", "1MiB")];
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &small).await;
    let sql = postgres.sql().await;
    let mut stream = server.watch("t1", "").await;
    let long = "x".repeat(100);
    sql.run(&format!(
        "INSERT INTO tuplewatch.relation_tuples \
         SELECT 't1', 'document', '{long}' || n, 'viewer', 'user', '{long}', '' FROM generate_series(1, 40000) n"
    ))
    .await;
    sql.insert("t1", "end").await;
    let whole: Vec<Message> = stream.up_to(&created("end")).await;
    assert_eq!(changes(&whole).len(), 40_001);
    assert!(whole.iter().all(|message| message.bytes < (16 << 10) + 128), "each below the limit");
    let positions: Vec<Position> = whole.iter().map(|message| position(&message.token).0).collect();
    assert!(positions.is_sorted() && positions.windows(2).all(|pair| pair[0] != pair[1]), "tokens only grow");

    for _ in ["live", "after a restart"] {
        for n in [0, 1, whole.len() / 3, whole.len() / 2, whole.len() - 3, whole.len() - 2] {
            let rest = server.watch("t1", &whole[n].token).await.up_to(&created("end")).await;
            assert!(changes(&rest) == changes(&whole[n + 1..]), "after message {n}");
        }
        server.kill_and_restart().await;
    }
}

fn position(token: &str) -> (Position, CommitTime) {
    match token.parse().unwrap() {
        SnapToken::Position { place, commit_time, .. } => (place.position, commit_time),
        other => panic!("Watch emits position tokens, and not {other:?}"),
    }
}
