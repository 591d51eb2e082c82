//! Reads that must be at least as fresh as a snap token.

use super::{Api, attribute_read, fresh, refusal};
use crate::support::api::text;
use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::stream::reason;
use crate::support::wait::{eventually, within};
use tonic::{Code, Status};
use tuplewatch::api::grpc::proto::{AttributeFilter, RelationshipReadResponse};
use tuplewatch::model::lsn::Lsn;
use tuplewatch::model::snap_token::SnapToken;
use tuplewatch::model::timeline::{SourceId, TimelineId};

fn texts(read: Result<RelationshipReadResponse, Status>) -> Vec<String> {
    read.unwrap_or_else(|status| panic!("a read: {status:?}")).tuples.iter().map(text).collect()
}

#[tokio::test]
async fn a_read_sees_the_callers_write_while_replication_is_stalled() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let mut api = Api::of(&server).await;
    let mut stream = server.watch("t1", "").await;
    let (walsender, _) = sql.walsender().await.unwrap();
    let signal = async |signal: &str| {
        let sent = tokio::process::Command::new("kill").args([signal, &walsender]).status().await.unwrap();
        assert!(sent.success());
    };
    signal("-STOP").await;
    let mut expected = Vec::new();
    for n in 0..5 {
        let written = format!("d:{n}#viewer@user:a");
        let token = api.write("t1", &[&written]).await;
        expected.push(written);
        assert_eq!(texts(api.try_read(fresh("t1", &token)).await), expected);
    }
    stream.expect_silence().await;
    signal("-CONT").await;
    let last = stream.up_to(&Change::create("d:4#viewer@user:a#")).await.pop().unwrap();
    // The token of a message works too.
    assert_eq!(texts(api.try_read(fresh("t1", &last.token)).await), expected);
    let read = attribute_read("t1", AttributeFilter::default(), &last.token);
    assert!(api.try_read_attributes(read).await.unwrap().attributes.is_empty());
}

#[tokio::test]
async fn a_read_waits_for_the_transaction_of_its_token_until_a_timeout() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[("--service-watch-resolve-timeout", "1s")]).await;
    let mut api = Api::of(&server).await;
    let (sql, writer) = (postgres.sql().await, postgres.sql().await);
    writer.run("BEGIN").await;
    writer.insert("t1", "own").await;
    let token = writer.value("SELECT tuplewatch.snap_token()").await;
    let status = api.try_read(fresh("t1", &token)).await.unwrap_err();
    assert_eq!(reason(&status), (Code::Unavailable, "TRANSACTION_STILL_RUNNING".into()));

    // Longer than the commit takes on a busy machine.
    drop(server);
    let mut server = Server::serve(&postgres, &[("--service-watch-resolve-timeout", "1m")]).await;
    let mut api = Api::of(&server).await;
    let waits = async || {
        let since = sql.value("SELECT clock_timestamp()").await;
        let asked = format!(
            "SELECT count(*) > 0 FROM pg_stat_activity \
              WHERE query LIKE '%pg_xact_status%' AND query_start > '{since}' AND pid <> pg_backend_pid()"
        );
        eventually("it waits", async || sql.value(&asked).await == "t").await;
    };
    let reading = tokio::spawn(async move { api.try_read(fresh("t1", &token)).await });
    waits().await;
    assert!(!reading.is_finished());
    writer.run("COMMIT").await;
    let read = within("the read", reading).await.unwrap();
    assert_eq!(texts(read), ["document:own#viewer@user:u"]);

    // A waiting read does not delay a shutdown.
    writer.run("BEGIN").await;
    let token = writer.value("SELECT tuplewatch.snap_token()").await;
    let mut api = Api::of(&server).await;
    let reading = tokio::spawn(async move { api.try_read(fresh("t1", &token)).await });
    waits().await;
    server.terminate().await;
    let status = within("the read", reading).await.unwrap().unwrap_err();
    assert_eq!(reason(&status), (Code::Unavailable, "SHUTTING_DOWN".into()));
    assert_eq!(server.ended().await.code(), Some(0));
}

/// Two nodes: the fast one has delivered a change that the slow one has not received.
#[tokio::test]
async fn a_read_waits_until_its_position_is_visible() {
    let postgres = Postgres::start().await;
    let fast = Server::serve(&postgres, &[]).await;
    let mut slow = Server::prepare_slot(&postgres.uri(), "slow", &[("--service-watch-resolve-timeout", "1s")]).await;
    slow.start().await;
    slow.serving().await;
    let sql = postgres.sql().await;
    let mut api = Api::of(&slow).await;
    let mut stream = fast.watch("t1", "").await;
    let walsender = sql.value("SELECT active_pid FROM pg_replication_slots WHERE slot_name = 'slow'").await;
    let signal = async |signal: &str| {
        let sent = tokio::process::Command::new("kill").args([signal, &walsender]).status().await.unwrap();
        assert!(sent.success());
    };
    signal("-STOP").await;
    sql.insert("t1", "ahead").await;
    let token = stream.expect(Change::created("ahead")).await.token;
    let status = api.try_read(fresh("t1", &token)).await.unwrap_err();
    assert_eq!(reason(&status), (Code::Unavailable, "POSTGRES_UNREACHABLE".into()));
    signal("-CONT").await;
    eventually("the slow one has it", async || api.try_read(fresh("t1", &token)).await.is_ok()).await;
    assert_eq!(texts(api.try_read(fresh("t1", &token)).await), ["document:ahead#viewer@user:u"]);
}

#[tokio::test]
async fn reads_and_watch_refuse_the_same_tokens() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let mut api = Api::of(&server).await;
    let mut stream = server.watch("t1", "").await;
    sql.insert("t1", "first").await;
    let good: SnapToken = stream.expect(Change::created("first")).await.token.parse().unwrap();
    let SnapToken::Position { source, timeline, place, commit_time } = good.clone() else { panic!("a position token") };
    let written: SnapToken = api.write("t1", &[]).await.parse().unwrap();
    let SnapToken::Transaction { mut id, xid, floor, .. } = written else { panic!("a transaction token") };
    // The id of a transaction that is not in the log.
    id.0[0] ^= 1;
    let mut ahead = place.clone();
    ahead.position.lsn.0 += 1 << 40;

    let token = |token: SnapToken| token.to_string();
    let cases = [
        ("not a token".to_owned(), Code::InvalidArgument, "INVALID_SNAP_TOKEN"),
        (
            token(SnapToken::Position { source: SourceId([1; 8]), timeline, place: place.clone(), commit_time }),
            Code::FailedPrecondition,
            "FOREIGN_SNAP_TOKEN",
        ),
        (
            token(SnapToken::Position { source, timeline: TimelineId([1; 8]), place, commit_time }),
            Code::FailedPrecondition,
            "ABANDONED_SNAP_TOKEN",
        ),
        (
            token(SnapToken::Position { source, timeline, place: ahead, commit_time }),
            Code::FailedPrecondition,
            "SNAP_TOKEN_BEYOND_HISTORY",
        ),
        (
            token(SnapToken::Transaction { source: SourceId([1; 8]), id, xid, floor }),
            Code::FailedPrecondition,
            "FOREIGN_SNAP_TOKEN",
        ),
        (
            token(SnapToken::Transaction { source, id, xid, floor: Lsn(floor.0 + (1 << 40)) }),
            Code::FailedPrecondition,
            "SNAP_TOKEN_BEYOND_HISTORY",
        ),
    ];
    for (token, code, expected) in cases {
        let status = api.try_read(fresh("t1", &token)).await.unwrap_err();
        assert_eq!(reason(&status), (code, expected.to_owned()), "{token}");
        let read = attribute_read("t1", AttributeFilter::default(), &token);
        assert_eq!(api.try_read_attributes(read).await.unwrap_err().code(), code);
        assert_eq!(server.try_watch("t1", &token).await.err().map(|status| reason(&status)), Some(reason(&status)));
    }
    let unknown = (Code::NotFound, "ERROR_CODE_TENANT_NOT_FOUND".to_owned());
    assert_eq!(refusal(api.try_read(fresh("nobody", &token(good))).await), unknown);
}
