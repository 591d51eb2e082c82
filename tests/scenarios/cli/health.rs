//! `tuplewatch health`, for containers and scripts.

use super::process::{Ran, tuplewatch};
use crate::support::port::free_address;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::wait::eventually;
use tokio::net::TcpListener;
use tuplewatch::dev_postgres::StopMode;

async fn health(server: &Server, flags: &[&str]) -> Ran {
    let url = format!("http://{}", server.address());
    tuplewatch(&[&["health", "--server", &url], flags].concat()).await
}

#[tokio::test]
async fn a_server_without_postgresql_is_alive_and_not_serving() {
    let mut postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    assert_eq!(health(&server, &[]).await.succeeded(), "SERVING\n");
    assert_eq!(health(&server, &["--service", "base.v1.Watch"]).await.succeeded(), "SERVING\n");
    assert_eq!(health(&server, &["--alive"]).await.succeeded(), "alive\n");
    health(&server, &["--service", "nobody"]).await.failed(&["knows no service 'nobody'"]);
    health(&server, &["--service", "x", "--alive"]).await.misused(&["cannot be used with"]);

    postgres.stop(StopMode::Fast).await;
    let expected = "is NOT_SERVING: the slot does not stream, and is tried again";
    eventually("the state and its reason are printed", async || health(&server, &[]).await.err.contains(expected))
        .await;
    health(&server, &[]).await.failed(&[expected]);
    assert_eq!(health(&server, &["--alive"]).await.succeeded(), "alive\n");
}

#[tokio::test]
async fn a_refusal_counts_as_alive_and_silence_does_not() {
    let postgres = Postgres::start().await;
    let guarded = [("--authn-enabled", "true"), ("--authn-preshared-keys", "k"), ("--authn-exempt-health", "false")];
    let mut server = Server::prepare(&postgres, &guarded).await;
    server.start().await;
    assert_eq!(health(&server, &["--alive"]).await.succeeded(), "alive\n");
    health(&server, &[]).await.failed(&["does not report its health", "ERROR_CODE_MISSING_BEARER_TOKEN"]);

    // A server that accepts and does not answer.
    let silent = TcpListener::bind(free_address()).await.unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    for flags in [&[][..], &["--alive"]] {
        let ran = tuplewatch(&[&["health", "--server", &url], flags].concat()).await;
        ran.failed(&["does not answer within 3 s"]);
    }
    drop(silent);
    let ran = tuplewatch(&["health", "--alive", "--server", &url]).await;
    ran.failed(&[&format!("cannot reach {url}"), "Connection refused"]);
}
