//! `base.v1.Watch/Watch`.
//!
//! The code that tonic would generate from the service, with one difference: it sends frames that were encoded once for
//! all subscribers. Between the hub and the connection there is no codec, no task, and no allocation for each message.
//! `super::connection` sends the frames. Messages that are ready together are sent together, so many small messages
//! become one DATA frame of several KiB. The bytes of a frame are defined in [`frame`].

use super::{proto, status};
use crate::access::authn::Caller;
use crate::api::encode::base_v1::frame::{self, FRAME};
use crate::api::scope::Requested;
use crate::api::watch::{Error, Next, Started, Stream, WatchService};
use crate::hub::primary::Primary;
use crate::metrics::metrics;
use bytes::{BufMut, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HeaderValue};
use prost::Message as _;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tonic::codec::{DecodeBuf, Decoder, Streaming};
use tonic::{Code, Status};
use tower_service::Service;

/// The bytes up to which ready messages are joined. A DATA frame of HTTP/2 has at most 16 KiB, unless the client
/// permits more.
const JOIN_BYTES: usize = 16 << 10;
/// The response header with the token that resumes from the start of the stream, for a client that has received no
/// message yet.
pub(crate) const START_SNAP_TOKEN: &str = "snap-token";
/// The largest request. Its fields are short, but a field that is too long should get a specific error.
const REQUEST_BYTES_MAX: usize = 4 << 20;
const SERVICE: &str = "/base.v1.Watch/";
const METHOD: &str = "Watch";

/// Whether this service serves the path.
pub(super) fn is_path(path: &str) -> bool {
    path.starts_with(SERVICE)
}

/// The body of a response. The default is the body of a refusal, which is empty.
#[derive(Default)]
pub(super) struct Responses(Option<Box<Stream>>);

/// One or more messages as bytes of the wire.
pub(super) struct Frames {
    pub(super) bytes: Bytes,
    /// The number of messages.
    pub(super) messages: usize,
    /// Whether no other message is ready, and the polling task is registered for the next one. An immediate second poll
    /// would find nothing.
    pub(super) is_all: bool,
}

impl Responses {
    /// Whether the body has ended.
    pub(super) const fn is_end(&self) -> bool {
        self.0.is_none()
    }

    /// Polls for the next messages, as frames that are joined up to [`JOIN_BYTES`]. It returns at most one error, as
    /// its last item.
    pub(super) fn poll_frames(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frames, Status>>> {
        let Some(stream) = &mut self.0 else { return Poll::Ready(None) };
        let next = ready!(poll_joined(stream, cx));
        if let Err(error) = &next {
            stream.end(error);
            self.0 = None;
        }
        Poll::Ready(Some(next.map_err(Status::from)))
    }
}

fn poll_joined(stream: &mut Stream, cx: &mut Context<'_>) -> Poll<Result<Frames, Error>> {
    let Next { envelope: first, is_all } = ready!(stream.poll_next(cx, FRAME, JOIN_BYTES))?;
    if stream.ready() == 0 || first.len() >= JOIN_BYTES {
        return Poll::Ready(Ok(Frames { bytes: first, messages: 1, is_all: is_all && stream.ready() == 0 }));
    }
    // Assume that the other ready messages are as long as the first: h2 keeps the buffer, so it should not be mostly
    // empty.
    let expected = first.len() * (stream.ready() + 1);
    let mut joined = BytesMut::with_capacity(expected.min(JOIN_BYTES + frame::BYTES_MIN));
    joined.put(first);
    let mut messages = 1;
    while stream.ready() > 0
        && joined.len() < JOIN_BYTES
        // The next call returns the same error again.
        && let Poll::Ready(Ok(next)) = stream.poll_next(cx, FRAME, JOIN_BYTES)
    {
        joined.put(next.envelope);
        messages += 1;
    }
    Poll::Ready(Ok(Frames { bytes: joined.freeze(), messages, is_all: is_all && stream.ready() == 0 }))
}

/// The service as a connection calls it.
pub(super) struct Watch<P>(pub(super) WatchService<P>);

impl<P> Clone for Watch<P> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B, P> Service<http::Request<B>> for Watch<P>
where
    B: http_body::Body + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
    P: Primary + 'static,
{
    type Response = http::Response<Responses>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        let Self(service) = self.clone();
        Box::pin(async move {
            let caller: Option<Caller> = request.extensions_mut().remove();
            let proto::WatchRequest { tenant_id, snap_token } = match read(request).await {
                Ok(request) => request,
                Err(status) => return Ok(status.into_http()),
            };
            let started =
                service.start(caller.as_ref(), Requested::Tenant(&tenant_id), &snap_token, &metrics().grpc).await;
            Ok(started.map_or_else(|error| Status::from(error).into_http(), write))
        })
    }
}

/// Reads the single message of a request.
async fn read<B>(request: http::Request<B>) -> Result<proto::WatchRequest, Status>
where
    B: http_body::Body + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
{
    let (head, body) = request.into_parts();
    if head.uri.path().strip_prefix(SERVICE) != Some(METHOD) {
        return Err(status::no_method());
    }
    if head.headers.get("grpc-encoding").is_some_and(|encoding| encoding != "identity") {
        return Err(status::compressed_request());
    }
    let mut messages = Streaming::new_request(RequestDecoder, body, None, Some(REQUEST_BYTES_MAX));
    let message = messages.message().await.map_err(|status| match status.code() {
        // tonic's code for a message above the limit.
        Code::OutOfRange => status::large_request(),
        _ => status,
    })?;
    message.ok_or_else(status::no_request)
}

fn write(Started { stream, snap_token }: Started) -> http::Response<Responses> {
    let mut response = http::Response::new(Responses(Some(Box::new(stream))));
    if let Some(token) = snap_token.and_then(|token| token.parse().ok()) {
        response.headers_mut().insert(START_SNAP_TOKEN, token);
    }
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

struct RequestDecoder;

impl Decoder for RequestDecoder {
    type Item = proto::WatchRequest;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<proto::WatchRequest>, Status> {
        proto::WatchRequest::decode(buffer).map(Some).map_err(|error| status::bad_request(&error))
    }
}
