//! An open write transaction, of this database or another one, delays no delivery.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::changes;

#[tokio::test]
async fn an_open_transaction_delays_nothing() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    sql.run("CREATE DATABASE other").await;

    let open = postgres.sql().await;
    open.run("BEGIN").await;
    open.insert("t1", "open").await;
    let other = Sql::connect(&postgres.uri_of("other")).await;
    other.run("BEGIN; CREATE TABLE t (n int); INSERT INTO t VALUES (1)").await;
    let is_open =
        "2 = (SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction' AND backend_xid IS NOT NULL)";
    assert!(sql.is_true(is_open).await);

    // All of this happens while the two transactions are open, so nothing waits for them.
    let mut stream = server.watch("t1", "").await;
    for n in 0..200 {
        sql.insert("t1", &format!("d{n}")).await;
        stream.expect(Change::create(Change::viewer(&format!("d{n}")))).await;
    }
    let token = {
        sql.run("BEGIN").await;
        sql.insert("t1", "own").await;
        let token = sql.value("SELECT tuplewatch.snap_token()").await;
        sql.run("COMMIT").await;
        stream.expect(Change::create(Change::viewer("own"))).await;
        token
    };
    server.kill_and_restart().await;
    let mut after_own = server.watch("t1", &token).await;
    let mut now = server.watch("t1", "").await;
    sql.insert("t1", "later").await;
    for stream in [&mut after_own, &mut now] {
        stream.expect(Change::create(Change::viewer("later"))).await;
    }
    assert!(sql.is_true(is_open).await, "both were open all the time");

    // Its place is that of its commit.
    open.insert("t1", "open2").await;
    open.run("COMMIT").await;
    other.run("ROLLBACK").await;
    sql.insert("t1", "last").await;
    let last = Change::create(Change::viewer("last"));
    let expected = ["open", "open2", "last"].map(|id| Change::create(Change::viewer(id)));
    for stream in [&mut after_own, &mut now] {
        assert_eq!(changes(&stream.up_to(&last).await), expected);
    }
}
