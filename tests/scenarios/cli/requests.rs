//! Requests that no client library would send. Each gets its status, and other streams are not affected.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::Stream;
use crate::support::wait::within;
use bytes::Bytes;
use http_body::{Body as _, Frame};
use prost::Message as _;
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::body::Body;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tower_service::Service as _;
use tuplewatch::api::grpc::proto::WatchRequest;

const WATCH: &str = "/base.v1.Watch/Watch";

/// A body in one piece.
struct Whole(Option<Bytes>);

impl http_body::Body for Whole {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
    }
}

fn request(path: &str, body: impl Into<Bytes>) -> http::Request<Body> {
    let request = http::Request::post(path).header("content-type", "application/grpc").header("te", "trailers");
    request.body(Body::new(Whole(Some(body.into())))).unwrap()
}

/// The status of a refused call, from the headers or the trailers.
async fn refusal(channel: &Channel, request: http::Request<Body>) -> Status {
    let mut channel = channel.clone();
    let refused = async {
        poll_fn(|context| channel.poll_ready(context)).await.unwrap();
        let response = channel.call(request).await.unwrap();
        if let Some(status) = Status::from_header_map(response.headers()) {
            return status;
        }
        assert_eq!(response.status(), 200, "{response:?}");
        let mut body = response.into_body();
        while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
            if let Ok(trailers) = frame.unwrap().into_trailers() {
                return Status::from_header_map(&trailers).expect("a status in the trailers");
            }
        }
        panic!("a response without a status");
    };
    within("the call is refused", refused).await
}

/// With gRPC's prefix: whether it is compressed, and its length.
fn framed(message: &[u8]) -> Vec<u8> {
    framed_as(0, u32::try_from(message.len()).unwrap(), message)
}

fn framed_as(compressed: u8, length: u32, message: &[u8]) -> Vec<u8> {
    [&[compressed][..], &length.to_be_bytes(), message].concat()
}

fn watch(tenant: &str, token: &str) -> Vec<u8> {
    WatchRequest { tenant_id: tenant.to_owned(), snap_token: token.to_owned() }.encode_to_vec()
}

/// A well-behaved subscriber, and a writer for it.
struct Neighbour {
    sql: Sql,
    stream: Stream,
    changes: u32,
}

impl Neighbour {
    async fn is_fine(&mut self) {
        self.changes += 1;
        let id = self.changes.to_string();
        self.sql.insert("t1", &id).await;
        self.stream.expect(Change::create(Change::viewer(&id))).await;
    }
}

#[tokio::test]
async fn malformed_requests_get_a_precise_status() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let (sql, channel) = (postgres.sql().await, server.channel().await);
    // On the same connection as all the others.
    let stream = Stream::open_on(channel.clone(), "t1", "").await.unwrap();
    let mut neighbour = Neighbour { sql, stream, changes: 0 };
    neighbour.is_fine().await;

    let megabyte = "x".repeat(1 << 20);
    let whole = watch("t1", &"A".repeat(60));
    let random: String = (0..60).map(|_| fastrand::alphanumeric()).collect();
    let two = [framed(&watch("", "")), framed(&watch("t1", ""))].concat();
    for (what, body, code, expected) in [
        ("no tenant", framed(&watch("", "")), Code::InvalidArgument, "the tenant id is empty"),
        ("an empty message", framed(b""), Code::InvalidArgument, "the tenant id is empty"),
        ("a NUL", framed(&watch("t\0", "")), Code::InvalidArgument, "the tenant id contains a NUL character"),
        ("a long tenant", framed(&watch(&"x".repeat(513), "")), Code::InvalidArgument, "at most 512 are allowed"),
        ("a huge tenant", framed(&watch(&megabyte, "")), Code::InvalidArgument, ""),
        ("a stranger", framed(&watch("nobody", "")), Code::NotFound, "tenant 'nobody' does not exist"),
        ("no base64", framed(&watch("t1", "\u{1f980}")), Code::InvalidArgument, "is not base64"),
        ("a short token", framed(&watch("t1", "AQ")), Code::InvalidArgument, "damaged, cut short"),
        ("a random token", framed(&watch("t1", &random)), Code::InvalidArgument, "damaged, cut short"),
        ("a long token", framed(&watch("t1", &"A".repeat(70_000))), Code::InvalidArgument, "longer than 65536 bytes"),
        ("a huge token", framed(&watch("t1", &megabyte)), Code::InvalidArgument, ""),
        ("a tenant that is no text", framed(b"\x0a\x02\xff\xfe"), Code::InvalidArgument, "is no WatchRequest"),
        ("a token that is no text", framed(b"\x0a\x02t1\x12\x01\xff"), Code::InvalidArgument, "is no WatchRequest"),
        ("half a message", framed(&whole[..30]), Code::InvalidArgument, "is no WatchRequest"),
        ("a tenant of another type", framed(b"\x08\x01"), Code::InvalidArgument, "is no WatchRequest"),
        ("no protobuf", framed(b"\xff\xff\xff\xff\xff"), Code::InvalidArgument, "is no WatchRequest"),
        ("two requests, the first without a tenant", two, Code::InvalidArgument, "the tenant id is empty"),
        ("nothing", Vec::new(), Code::Internal, ""),
        ("half a prefix", vec![0, 0, 0], Code::Internal, ""),
        ("half of what the prefix says", framed_as(0, 60, &whole[..30]), Code::Internal, ""),
        ("an unknown flag", framed_as(7, 3, b"abc"), Code::Internal, ""),
        ("a compression that was not named", framed_as(1, 3, b"abc"), Code::Internal, ""),
        ("a prefix that promises 4 GiB", framed_as(0, u32::MAX, b"abc"), Code::InvalidArgument, ""),
    ] {
        let status = refusal(&channel, request(WATCH, body)).await;
        assert_eq!(status.code(), code, "{what}: {status:?}");
        assert!(status.message().contains(expected), "{what}: {status:?}");
        assert!(status.message().len() < 1000, "{what}: {status:?}");
        neighbour.is_fine().await;
    }

    for (path, expected) in [
        ("/base.v1.Watch/Wotch", "base.v1.Watch has one method, Watch"),
        ("/base.v1.Watch/", ""),
        ("/base.v1.Wotch/Watch", ""),
        ("/", ""),
        ("/base.v1.Watch/Watch/", "base.v1.Watch has one method, Watch"),
    ] {
        let status = refusal(&channel, request(path, framed(&watch("t1", "")))).await;
        assert_eq!(status.code(), Code::Unimplemented, "{path}: {status:?}");
        assert!(status.message().contains(expected), "{path}: {status:?}");
        neighbour.is_fine().await;
    }
    let mut compressed = request(WATCH, framed(&watch("t1", "")));
    compressed.headers_mut().insert("grpc-encoding", "snappy".parse().unwrap());
    assert_eq!(refusal(&channel, compressed).await.code(), Code::Unimplemented);
    neighbour.is_fine().await;
    assert!(!server.has_logged("panicked"));

    server.terminate().await;
    assert!(server.ended().await.success());
}

/// It would use one of a bounded number of connections.
#[tokio::test]
async fn a_silent_connection_is_closed() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut silent = TcpStream::connect(server.address()).await.unwrap();
    let mut settings = Vec::new();
    // The way it ends does not matter.
    let _ = within("it is closed", silent.read_to_end(&mut settings)).await;
    server.serving().await;
}

/// Data that is not HTTP/2, or breaks its rules, ends its own connection only.
#[tokio::test]
async fn garbage_on_the_wire_ends_its_own_connection() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut neighbour = Neighbour { sql: postgres.sql().await, stream: server.watch("t1", "").await, changes: 0 };
    let address = server.endpoint().uri().authority().unwrap().to_string();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let settings = b"\0\0\0\x04\0\0\0\0\0";
    for (what, bytes) in [
        ("HTTP/1.1", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec()),
        ("TLS", [b"\x16\x03\x01\x02\x00\x01\x00".to_vec(), vec![0; 600]].concat()),
        ("noise", (0..10_000).map(|_| fastrand::u8(..)).collect()),
        ("zeros", vec![0; 100_000]),
        ("a frame too long", [&preface[..], settings, b"\xff\xff\xff\0\0\0\0\0\x01"].concat()),
        (
            "headers that do not decode",
            [&preface[..], settings, b"\0\0\x04\x01\x05\0\0\0\x01\xff\xff\xff\xff"].concat(),
        ),
        ("data without a stream", [&preface[..], settings, b"\0\0\x01\0\0\0\0\0\x01x"].concat()),
        ("a window of nothing", [&preface[..], settings, b"\0\0\x04\x08\0\0\0\0\0\0\0\0\0"].concat()),
    ] {
        let mut connection = TcpStream::connect(&address).await.unwrap();
        // It may be closed before all of it is sent.
        let _ = connection.write_all(&bytes).await;
        let _ = connection.shutdown().await;
        let mut answer = Vec::new();
        let _ = within(&format!("{what}: the connection is closed"), connection.read_to_end(&mut answer)).await;
        neighbour.is_fine().await;
    }
    // Idle connections cause no refusals.
    let idle: Vec<TcpStream> = futures_util::future::join_all((0..200).map(|_| TcpStream::connect(&address)))
        .await
        .into_iter()
        .flatten()
        .collect();
    assert_eq!(idle.len(), 200);
    neighbour.is_fine().await;
    server.watch("t1", "").await;

    // A request with too large headers, on a connection that stays usable.
    let channel = server.channel().await;
    let mut long = request(WATCH, framed(&watch("t1", "")));
    long.headers_mut().insert("x-long", "x".repeat(40 << 10).parse().unwrap());
    let mut sender = channel.clone();
    poll_fn(|context| sender.poll_ready(context)).await.unwrap();
    let refused = within("an answer", sender.call(long)).await;
    assert!(refused.is_err() || refused.is_ok_and(|response| !response.status().is_success()));
    Stream::open_on(channel, "t1", "").await.unwrap();
    neighbour.is_fine().await;
    assert!(!server.has_logged("panicked"));
}
