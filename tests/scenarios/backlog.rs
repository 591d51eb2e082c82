//! Repeated backlogs over each kind of connection.
//!
//! During a backlog, tuplewatch lets data gather in the socket before it wakes up. The last data of a backlog does not fill the socket. It
//! must still arrive immediately, not with the next write.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::stream::changes;
use crate::support::wait::eventually;
use rcgen::{CertificateParams, KeyPair};

/// The number of backlogs, one after the other.
const ROUNDS: usize = 8;
/// The number of one-row transactions in each backlog, and of rows in the large transaction after them.
const SMALL: usize = 2_000;
const LARGE: usize = 10_000;

#[tokio::test]
async fn the_last_change_of_a_backlog_is_not_delayed() {
    let mut postgres = Postgres::start().await;
    let directory = postgres.pgdata().display().to_string();
    postgres.stop_and_set(&[("unix_socket_directories", &directory)]).await;
    postgres.start_again().await;
    let sql = postgres.sql().await;
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
    postgres.put_file("server.crt", &certificate.pem());
    postgres.put_file("server.key", &key.serialize_pem());
    sql.run("ALTER SYSTEM SET ssl = on").await;
    sql.run("SELECT pg_reload_conf()").await;
    eventually("the server does TLS", async || sql.value("SHOW ssl").await == "on").await;

    let mut server = Server::prepare(&postgres, &[]).await;
    let socket = format!("host={directory} port={} user=postgres dbname=postgres", sql.value("SHOW port").await);
    let tcp = postgres.uri();
    for (what, uri, is_encrypted, address) in [
        ("TCP", format!("{tcp}?sslmode=disable"), "false", "127.0.0.1"),
        ("TLS", format!("{tcp}?sslmode=require"), "true", "127.0.0.1"),
        ("socket", socket, "false", ""),
    ] {
        server.point_to(&uri);
        server.start().await;
        server.serving().await;
        let session =
            "SELECT ssl || coalesce(host(client_addr), '') FROM pg_stat_replication JOIN pg_stat_ssl USING (pid)";
        assert_eq!(sql.value(session).await, format!("{is_encrypted}{address}"), "{what}");
        let mut stream = server.watch("t1", "").await;
        for round in 0..ROUNDS {
            let name = |part: &str| format!("{what}-{round}-{part}");
            // Written while the server is suspended, so that it has to catch up.
            server.suspend().await;
            let insert = "INSERT INTO tuplewatch.relation_tuples SELECT 't1', 'document',";
            let tuple = "'viewer', 'user', 'u', ''";
            sql.run(&format!(
                "DO $$ BEGIN FOR n IN 1..{SMALL} LOOP {insert} '{}' || n, {tuple}; COMMIT; END LOOP; END $$",
                name("small")
            ))
            .await;
            sql.run(&format!("{insert} '{}' || n, {tuple} FROM generate_series(1, {LARGE}) n", name("large"))).await;
            sql.insert("t1", &name("last")).await;
            server.resume().await;
            let messages = stream.up_to(&Change::created(&name("last"))).await;
            assert_eq!(changes(&messages).len(), SMALL + LARGE + 1, "{what}");
            // A change after the backlog is not delayed either.
            sql.insert("t1", &name("later")).await;
            stream.expect(Change::created(&name("later"))).await;
        }
        server.terminate().await;
        server.ended().await;
    }
}
