//! `base.v1.Watch/Watch`.
//!
//! What tonic would generate from the service, with one difference: what is sent are frames that were made before, once for all
//! subscribers. There is no codec, no task and no allocation for each message in between; who sends them is
//! `super::connection`, and over HTTP the gateway.
//!
//! How frames are cut decides what a message costs, and whether a connection lives:
//!
//! - What is ready is sent together: many small messages become one DATA frame of several KiB.
//! - Messages are never short, and so DATA frames are not. A client of h2 charges a connection 256 bytes, less its length, for every short
//!   frame that is not read yet, and closes the connection when these charges come to half of its window. Frames of more than 170 bytes
//!   fill the window first, and then the stream waits, as it should.

use super::calls::code_name;
use super::proto;
use super::status::{self, Tokens};
use super::validation;
use crate::access::authn::Caller;
use crate::api::encode::base_v1;
use crate::hub::primary::Primary;
use crate::hub::{End, Hub, Item, Subscription};
use crate::metrics::{Edge, metrics};
use crate::model::lsn::{CommitLsn, CommitTime, Xid8};
use crate::model::snap_token::Form;
use crate::model::transaction::Message;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream::Stream;
use http::header::{CONTENT_TYPE, HeaderValue};
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, Sleep};
use tonic::codec::{DecodeBuf, Decoder, Streaming};
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status};
use tower_service::Service;

/// What is ready is taken from the hub, and joined, up to this: a DATA frame of HTTP/2 has at most 16 KiB, where the client does not
/// allow more.
const JOIN_BYTES: usize = 16 << 10;
/// Compressed or not, and the length of the message: "Length-Prefixed-Message" of gRPC over HTTP/2.
const PREFIX_BYTES: usize = 5;
/// No frame is shorter. See the module; below the 256 at which h2 begins to write each frame by itself.
const FRAME_BYTES_MIN: usize = 192;
/// The field of `WatchResponse` that fills up short ones. Nobody knows it, and so everybody passes it over.
const PADDING: u32 = 15;
/// Header of a response: the token that resumes from the start of its stream, for who has had no message yet.
pub const START_SNAP_TOKEN: &str = "snap-token";
/// Largest request. Both fields are short, but what is too long in them should be said of them.
const REQUEST_BYTES_MAX: usize = 4 << 20;
/// Messages that an idle stream keeps room for.
const READY_MAX: usize = 4;
const SERVICE: &str = "/base.v1.Watch/";
const METHOD: &str = "Watch";

/// Whether a request with this path is for this service.
pub(super) fn is_path(path: &str) -> bool {
    path.starts_with(SERVICE)
}

/// How streams behave.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Whether Watch is on.
    pub enabled: bool,
    /// Streams at a time.
    pub subscribers_max: usize,
    /// Longest wait for a transaction token to resolve.
    pub resolve_timeout: Duration,
    /// The form of the tokens of messages.
    pub token_form: Form,
    /// Whether tenant ids have Permify's form, as in the presets. A mapping of one's own may have any.
    pub permify_tenants: bool,
}

/// The service. Cheap to clone.
pub struct WatchService<P> {
    hub: Hub,
    inner: Arc<Inner<P>>,
}

struct Inner<P> {
    primary: P,
    options: Options,
    /// One permit a stream.
    streams: Arc<Semaphore>,
    /// Turns true when streams must end.
    stop: watch::Receiver<bool>,
}

impl<P> Clone for WatchService<P> {
    fn clone(&self) -> Self {
        Self { hub: self.hub.clone(), inner: self.inner.clone() }
    }
}

impl<P: Primary + 'static> WatchService<P> {
    /// Streams from this hub; `primary` is asked where a start depends on it. `stop` turns true when none may start any more;
    /// those that are open end with the hub.
    pub fn new(hub: Hub, primary: P, options: Options, stop: watch::Receiver<bool>) -> Self {
        let streams = Arc::new(Semaphore::new(options.subscribers_max));
        metrics().subscribers_limit.set(i64::try_from(options.subscribers_max).unwrap_or(i64::MAX));
        // Initialized at zero, so that `rate()` sees the first increment.
        for edge in [&metrics().grpc, &metrics().http] {
            metrics().streams_ended(edge.protocol, status::SNAP_TOKEN_TOO_OLD);
        }
        Self { hub, inner: Arc::new(Inner { primary, options, streams, stop }) }
    }

    /// The same service, for a thread that has its own handle of the hub.
    #[must_use]
    pub fn with_hub(&self, hub: Hub) -> Self {
        Self { hub, inner: self.inner.clone() }
    }

    /// The hub that it streams from.
    pub const fn hub(&self) -> &Hub {
        &self.hub
    }

    /// Starts a stream that goes over this edge. When this returns the start is fixed.
    ///
    /// # Errors
    /// See [`status`].
    pub async fn watch(
        &self,
        request: Request<proto::WatchRequest>,
        edge: &'static Edge,
    ) -> Result<Response<Responses>, Status> {
        super::authorize(&request, &request.get_ref().tenant_id)?;
        let expires_at = request.extensions().get::<Caller>().and_then(Caller::expires_at).and_then(instant);
        let proto::WatchRequest { tenant_id, snap_token } = request.into_inner();
        let Inner { primary, options, streams, stop } = &*self.inner;
        if !options.enabled {
            return Err(status::disabled());
        }
        if options.permify_tenants {
            validation::watched_tenant(&tenant_id)?;
        }
        if *stop.borrow() {
            return Err(status::shutting_down());
        }
        let permit = streams.clone().try_acquire_owned();
        let permit = permit.map_err(|_| status::too_many(options.subscribers_max))?;
        let start = self.hub.start(primary, &tenant_id, &snap_token, options.resolve_timeout);
        let mut stop = stop.clone();
        let started = tokio::select! {
            started = start => started,
            _ = stop.wait_for(|stop| *stop) => return Err(status::shutting_down()),
        };
        let tokens = self.hub.origin().map(|origin| Tokens::new(&origin));
        let subscription = started.map_err(|error| status::of_start(error, tokens.as_ref()))?;
        let position = subscription.position();
        let start_token = tokens.map(|tokens| tokens.write(position, CommitTime::default()));
        let open = Open {
            hub: self.hub.clone(),
            token_form: options.token_form,
            subscription,
            expires: expires_at.map(|at| Box::pin(tokio::time::sleep_until(at))),
            ready: VecDeque::new(),
            before: Before::Unknown,
            counted: Counted::begin(edge),
            _permit: permit,
        };
        let mut response = Response::new(Responses { open: Some(Box::new(open)) });
        if let Some(token) = start_token.and_then(|token| token.parse().ok()) {
            response.metadata_mut().insert(START_SNAP_TOKEN, token);
        }
        Ok(response)
    }
}

/// The same moment on the clock that timers go by. `None`: beyond all times.
fn instant(at: SystemTime) -> Option<Instant> {
    Instant::now().checked_add(at.duration_since(SystemTime::now()).unwrap_or_default())
}

/// An open stream, as frames of gRPC or, as a [`Stream`], as encoded `WatchResponse`s. Ends with at most one error. By default, one
/// that has ended.
#[derive(Default)]
pub struct Responses {
    open: Option<Box<Open>>,
}

/// One or more messages, as they go over the wire.
pub(super) struct Frames {
    pub(super) bytes: Bytes,
    /// How many.
    pub(super) messages: usize,
    /// There are no others, and who polled is woken when there are: to poll once more now is of no use.
    pub(super) is_all: bool,
}

struct Open {
    hub: Hub,
    token_form: Form,
    subscription: Subscription,
    /// When it must end, whatever is ready.
    expires: Option<Pin<Box<Sleep>>>,
    ready: VecDeque<Arc<Item>>,
    before: Before,
    counted: Counted,
    _permit: OwnedSemaphorePermit,
}

/// A stream, among those that are open until it is dropped. Where nobody has said why it ended, the client has gone.
struct Counted {
    edge: &'static Edge,
    /// What the subscriber was told.
    reason: Option<String>,
}

impl Counted {
    fn begin(edge: &'static Edge) -> Self {
        edge.subscribers.inc();
        Self { edge, reason: None }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.edge.subscribers.dec();
        metrics().streams_ended(self.edge.protocol, self.reason.as_deref().unwrap_or("CLIENT_GONE")).inc();
    }
}

/// The transaction before one that is in several messages, by its commit LSN.
enum Before {
    Unknown,
    LookedUp(CommitLsn, Pin<Box<dyn Future<Output = Result<Option<Xid8>, End>> + Send>>),
    Known(CommitLsn, Option<Xid8>),
}

impl Responses {
    /// Whether nothing comes any more.
    pub(super) const fn is_end(&self) -> bool {
        self.open.is_none()
    }

    /// The next messages, as frames that are joined up to some KiB.
    pub(super) fn poll_frames(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frames, Status>>> {
        self.poll_joined(cx, JOIN_BYTES)
    }

    fn poll_joined(&mut self, cx: &mut Context<'_>, bytes_max: usize) -> Poll<Option<Result<Frames, Status>>> {
        let Some(open) = &mut self.open else { return Poll::Ready(None) };
        let next = ready!(open.poll_joined(cx, bytes_max));
        if let Err(status) = &next {
            open.counted.reason = Some(status::reason(status).unwrap_or_else(|| code_name(status.code()).to_owned()));
            self.open = None;
        }
        Poll::Ready(Some(next))
    }
}

impl Stream for Responses {
    type Item = Result<Bytes, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = ready!(self.poll_joined(cx, 0));
        Poll::Ready(next.map(|next| next.map(|next| next.bytes.slice(PREFIX_BYTES..))))
    }
}

impl Open {
    fn poll_joined(&mut self, cx: &mut Context<'_>, bytes_max: usize) -> Poll<Result<Frames, Status>> {
        if let Some(expires) = &mut self.expires
            && expires.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(status::expired()));
        }
        let is_all = ready!(self.poll_ready(cx))?;
        let first = ready!(self.poll_frame(cx))?;
        if self.ready.is_empty() || first.len() >= bytes_max {
            return Poll::Ready(Ok(Frames { bytes: first, messages: 1, is_all: is_all && self.ready.is_empty() }));
        }
        // As much as there is, if the others are like the first: what h2 keeps should not be mostly empty.
        let expected = first.len() * (self.ready.len() + 1);
        let mut joined = BytesMut::with_capacity(expected.min(bytes_max + FRAME_BYTES_MIN));
        joined.put(first);
        let mut messages = 1;
        while !self.ready.is_empty()
            && joined.len() < bytes_max
            // An error comes again the next time.
            && let Poll::Ready(Ok(frame)) = self.poll_frame(cx)
        {
            joined.put(frame);
            messages += 1;
        }
        Poll::Ready(Ok(Frames { bytes: joined.freeze(), messages, is_all: is_all && self.ready.is_empty() }))
    }

    /// Waits until some are ready. `true`: they are all there are, and who polls now is woken when there are more.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Status>> {
        if !self.ready.is_empty() {
            // Who polled when they were taken may have been woken since.
            return Poll::Ready(Ok(false));
        }
        // Held only while there is something in it: idle streams are many.
        self.ready.shrink_to(READY_MAX);
        match ready!(self.subscription.poll_next(cx, JOIN_BYTES, &mut self.ready)) {
            Ok(is_all) => Poll::Ready(Ok(is_all)),
            Err(end) => Poll::Ready(Err(status::of_end(end, self.subscription.tenant(), &self.tokens()?))),
        }
    }

    /// The frame of the first that is ready.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, Status>> {
        let Some(item) = self.ready.front().cloned() else {
            return Poll::Ready(Err(Status::internal("no message was ready")));
        };
        let frame = match item.framed() {
            Some(frame) => frame.clone(),
            None => {
                let tokens = self.tokens()?;
                let before = ready!(self.poll_before(cx, &item, &tokens))?;
                item.frame(|message| frame(message, &tokens.of_message(message, self.token_form, before)))
                    .map_err(|error| Status::internal(format!("a message cannot be sent: {error}")))?
            }
        };
        self.ready.pop_front();
        Poll::Ready(Ok(frame))
    }

    /// What the token of a message says that is not the last of its transaction, where it has to be a transaction's.
    fn poll_before(
        &mut self,
        cx: &mut Context<'_>,
        item: &Item,
        tokens: &Tokens,
    ) -> Poll<Result<Option<Xid8>, Status>> {
        let commit = item.message.header.commit;
        if self.token_form == Form::Native || item.message.end.is_some() {
            return Poll::Ready(Ok(None));
        }
        loop {
            self.before = match &mut self.before {
                Before::Known(of, before) if *of == commit => return Poll::Ready(Ok(*before)),
                Before::LookedUp(of, lookup) if *of == commit => match ready!(lookup.as_mut().poll(cx)) {
                    Ok(before) => Before::Known(commit, before),
                    Err(end) => {
                        self.before = Before::Unknown;
                        return Poll::Ready(Err(status::of_end(end, self.subscription.tenant(), tokens)));
                    }
                },
                _ => {
                    let hub = self.hub.clone();
                    Before::LookedUp(
                        commit,
                        Box::pin(async move { hub.transaction_before(commit).await.map_err(End::Log) }),
                    )
                }
            };
        }
    }

    fn tokens(&self) -> Result<Tokens, Status> {
        // Of the batch, and not of what the server may have gone on to since.
        self.subscription.origin().map(Tokens::new).ok_or_else(|| Status::internal("a message without a source"))
    }
}

/// A message of gRPC: its prefix, and the `WatchResponse`.
fn frame(message: &Message, snap_token: &str) -> Result<Bytes, base_v1::Malformed> {
    let response = base_v1::response(snap_token, &message.changes)?;
    let missing = FRAME_BYTES_MIN.saturating_sub(PREFIX_BYTES + response.len());
    let mut padding = Vec::new();
    if missing > 0 {
        encode_key(PADDING, WireType::LengthDelimited, &mut padding);
        encode_varint(missing as u64, &mut padding);
        padding.resize(padding.len() + missing, 0);
    }
    let mut frame = Vec::with_capacity(PREFIX_BYTES + response.len() + padding.len());
    // Not compressed.
    frame.put_u8(0);
    // Bounded by the largest change, far below 4 GiB.
    frame.put_u32(u32::try_from(response.len() + padding.len()).unwrap_or(u32::MAX));
    frame.put_slice(&response);
    frame.put_slice(&padding);
    Ok(frame.into())
}

impl<B, P> Service<http::Request<B>> for WatchService<P>
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

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            let answer = match read(request).await {
                Ok(request) => service.watch(request, &metrics().grpc).await,
                Err(status) => Err(status),
            };
            Ok(answer.map_or_else(Status::into_http, write))
        })
    }
}

/// The one message of a request.
async fn read<B>(request: http::Request<B>) -> Result<Request<proto::WatchRequest>, Status>
where
    B: http_body::Body + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
{
    let (head, body) = request.into_parts();
    if head.uri.path().strip_prefix(SERVICE) != Some(METHOD) {
        return Err(Status::unimplemented("base.v1.Watch has one method, Watch"));
    }
    if head.headers.get("grpc-encoding").is_some_and(|encoding| encoding != "identity") {
        return Err(Status::unimplemented("requests of Watch are not compressed"));
    }
    let mut messages = Streaming::new_request(RequestDecoder, body, None, Some(REQUEST_BYTES_MAX));
    let message = messages.message().await.map_err(|status| match status.code() {
        // That is what a token is that is too old.
        Code::OutOfRange => Status::invalid_argument("the request is larger than any WatchRequest"),
        _ => status,
    })?;
    let message = message.ok_or_else(|| Status::internal("a request without a message"))?;
    Ok(Request::from_parts(MetadataMap::from_headers(head.headers), head.extensions, message))
}

fn write(response: Response<Responses>) -> http::Response<Responses> {
    let (metadata, responses, extensions) = response.into_parts();
    let mut response = http::Response::new(responses);
    *response.headers_mut() = metadata.into_headers();
    *response.extensions_mut() = extensions;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

struct RequestDecoder;

impl Decoder for RequestDecoder {
    type Item = proto::WatchRequest;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<proto::WatchRequest>, Status> {
        let request = proto::WatchRequest::decode(buffer);
        request.map(Some).map_err(|error| Status::invalid_argument(format!("the request is no WatchRequest: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::lsn::EndLsn;
    use crate::model::lsn::{CommitTime, Lsn};
    use crate::model::transaction::{Header, MessageBuilder};

    #[test]
    fn no_frame_is_below_the_minimum_size() {
        let header = Header { commit: CommitLsn(Lsn(1)), xid: Xid8(1), commit_time: CommitTime(0) };
        for change_bytes in 0..300 {
            let mut builder = MessageBuilder::default();
            // An unknown field of DataChanges, of any length.
            let mut change = Vec::new();
            prost::encoding::bytes::encode(9, &vec![1; change_bytes], &mut change);
            builder.push(1, &change, change.len());
            let message = builder.finish(header, Some(EndLsn(Lsn(2))));
            let frame = frame(&message, "token").unwrap();
            assert!(frame.len() >= FRAME_BYTES_MIN, "{}", frame.len());
            let (prefix, response) = frame.split_at(PREFIX_BYTES);
            assert_eq!(prefix, [&[0][..], &u32::try_from(response.len()).unwrap().to_be_bytes()].concat());
            let decoded = proto::WatchResponse::decode(response).unwrap();
            assert_eq!(decoded.changes.unwrap().snap_token, "token");
        }
    }
}
