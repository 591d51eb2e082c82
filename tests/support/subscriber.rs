//! A cheap subscriber for benchmarks, so that they measure the server.

use bytes::Bytes;
use std::net::SocketAddr;
use std::time::Duration;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};
use tonic_prost::ProstCodec;
use tuplewatch::api::grpc::proto::WatchRequest;

/// The windows of a client that expects much data.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// The time between two attempts while the server starts.
const RETRY: Duration = Duration::from_millis(2);

/// An open stream.
pub(crate) struct Subscriber {
    responses: Streaming<Response>,
    /// The token that resumes from the start of the stream.
    pub(crate) start_token: String,
}

/// `base.v1.WatchResponse`.
#[derive(Clone, PartialEq, prost::Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    changes: Option<Changes>,
}

/// `base.v1.DataChanges`, with each change still encoded.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Changes {
    #[prost(string, tag = "1")]
    pub(crate) snap_token: String,
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub(crate) tuple_changes: Vec<Bytes>,
}

impl Subscriber {
    /// A connection for about a hundred streams.
    pub(crate) async fn connect(address: SocketAddr) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        let endpoint = endpoint
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
        endpoint.connect().await.unwrap()
    }

    /// Opens a stream, and retries while the server is unavailable.
    pub(crate) async fn open(channel: Channel, tenant: &str, token: &str) -> Self {
        loop {
            match Self::try_open(channel.clone(), tenant, token).await {
                Ok(subscriber) => return subscriber,
                Err(status) if status.code() == Code::Unavailable => tokio::time::sleep(RETRY).await,
                Err(status) => panic!("watch of {tenant} after '{token}': {status:?}"),
            }
        }
    }

    async fn try_open(channel: Channel, tenant: &str, token: &str) -> Result<Self, Status> {
        let mut grpc = Grpc::new(channel);
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let request = WatchRequest { tenant_id: tenant.to_owned(), snap_token: token.to_owned() };
        let path = PathAndQuery::from_static("/base.v1.Watch/Watch");
        let codec: ProstCodec<WatchRequest, Response> = ProstCodec::default();
        let response = grpc.server_streaming(Request::new(request), path, codec).await?;
        let start_token = response.metadata().get("snap-token").expect("a token to start from").to_str().unwrap();
        Ok(Self { start_token: start_token.to_owned(), responses: response.into_inner() })
    }

    /// The next message.
    pub(crate) async fn next(&mut self) -> Changes {
        let response = self.responses.message().await.unwrap_or_else(|status| panic!("the stream ended: {status:?}"));
        let changes = response.expect("a stream that does not end").changes.expect("a response with changes");
        assert!(!changes.tuple_changes.is_empty(), "a message without changes");
        changes
    }
}

/// Runs a future on its own thread.
pub(crate) async fn on_own_thread<F: Future<Output: Send + 'static>>(
    work: impl FnOnce() -> F + Send + 'static,
) -> F::Output {
    let work = move || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work());
    tokio::task::spawn_blocking(work).await.unwrap()
}
