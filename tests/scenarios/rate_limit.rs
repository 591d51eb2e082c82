//! More requests than `server.rate_limit` allows.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::stream::reason;
use crate::support::wait::eventually;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_types::StatusExt as _;

#[tokio::test]
async fn excess_requests_are_refused_with_a_retry_delay() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[("--server-rate-limit", "1")]).await;
    let sql = postgres.sql().await;
    let mut stream = server.watch("t1", "").await;
    let mut refused = None;
    eventually("one is refused", async || {
        refused = server.try_watch("t1", "").await.err();
        refused.is_some()
    })
    .await;
    let status = refused.unwrap();
    assert_eq!(reason(&status), (Code::ResourceExhausted, "RATE_LIMITED".to_owned()));
    assert!(status.message().contains("1 requests a second, which is the limit (server.rate_limit)"), "{status:?}");
    let wait = status.get_details_retry_info().and_then(|info| info.retry_delay).expect("a time to come back at");
    assert!((1..=1000).contains(&wait.as_millis()), "{wait:?}");

    // Health checks are not counted, and a stream counts once, without its messages.
    for n in 0..20 {
        assert_eq!(server.health("").await, Ok(ServingStatus::Serving));
        sql.insert("t1", &n.to_string()).await;
        stream.expect(Change::create(Change::viewer(&n.to_string()))).await;
    }
    // There are no other requests, so the delay is enough.
    tokio::time::sleep(wait).await;
    server.watch("t1", "").await;
}

#[tokio::test]
async fn a_limit_of_zero_is_no_limit() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[("--server-rate-limit", "0")]).await;
    let channel = server.channel().await;
    for _ in 0..200 {
        crate::support::stream::Stream::open_on(channel.clone(), "t1", "").await.unwrap();
    }
}
