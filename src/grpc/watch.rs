//! `base.v1.Watch/Watch`.
//!
//! What tonic would generate from the service, with one difference: responses are bytes that were encoded before, so the
//! codec copies instead of encoding, and every subscriber is sent the same ones.

use super::proto;
use super::status::{self, Tokens};
use crate::authn::Caller;
use crate::hub::start::Primary;
use crate::hub::{End, Hub, Item, Subscription};
use crate::lsn::{CommitTime, Lsn, Xid8};
use crate::snap_token::Form;
use bytes::{BufMut, Bytes};
use futures_util::stream::{self, Stream};
use prost::Message as _;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;
use tonic::body::Body;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::server::{Grpc, NamedService, ServerStreamingService};
use tonic::{Request, Response, Status};
use tower_service::Service;

/// Bytes that a stream takes from the hub at a time, and so holds while its client does not read.
const TAKE_BYTES: usize = 256 << 10;
/// What the codec gathers before it writes: many small messages become one frame of several KiB, because clients charge
/// small unread frames against the connection.
fn buffers() -> BufferSettings {
    BufferSettings::new(256, 32 << 10)
}
/// Header of a response: the token that resumes from the start of its stream, for who has had no message yet.
pub const START_SNAP_TOKEN: &str = "snap-token";
/// Largest request. Both fields are short, but what is too long in them should be said of them.
const REQUEST_BYTES_MAX: usize = 4 << 20;

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
}

/// The service. Cheap to clone.
pub struct WatchService<P> {
    inner: Arc<Inner<P>>,
}

struct Inner<P> {
    hub: Hub,
    primary: P,
    options: Options,
    /// One permit a stream.
    streams: Arc<Semaphore>,
    /// Turns true when streams must end.
    stop: watch::Receiver<bool>,
}

impl<P> Clone for WatchService<P> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<P: Primary + 'static> WatchService<P> {
    /// Streams from this hub; `primary` is asked where a start depends on it.
    pub fn new(hub: Hub, primary: P, options: Options, stop: watch::Receiver<bool>) -> Self {
        let streams = Arc::new(Semaphore::new(options.subscribers_max));
        Self { inner: Arc::new(Inner { hub, primary, options, streams, stop }) }
    }

    /// Starts a stream. When this returns the start is fixed.
    ///
    /// # Errors
    /// See [`status`].
    pub async fn watch(&self, request: Request<proto::WatchRequest>) -> Result<Response<Responses>, Status> {
        super::authorize(&request, &request.get_ref().tenant_id)?;
        let expires_at = request.extensions().get::<Caller>().and_then(Caller::expires_at).and_then(instant);
        self.inner.clone().watch(request.into_inner(), expires_at).await
    }
}

/// Encoded `WatchResponse`s.
pub type Responses = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

impl<P: Primary + 'static> Inner<P> {
    async fn watch(
        self: Arc<Self>,
        request: proto::WatchRequest,
        expires_at: Option<Instant>,
    ) -> Result<Response<Responses>, Status> {
        if !self.options.enabled {
            return Err(status::disabled());
        }
        if *self.stop.borrow() {
            return Err(status::shutting_down());
        }
        let permit = self.streams.clone().try_acquire_owned();
        let permit = permit.map_err(|_| status::too_many(self.options.subscribers_max))?;
        let start =
            self.hub.start(&self.primary, &request.tenant_id, &request.snap_token, self.options.resolve_timeout);
        let mut stop = self.stop.clone();
        let started = tokio::select! {
            started = start => started,
            _ = stop.wait_for(|stop| *stop) => return Err(status::shutting_down()),
        };
        let tokens = self.hub.origin().map(|origin| Tokens::new(&origin));
        let subscription = started.map_err(|error| status::of_start(error, tokens.as_ref()))?;
        let position = subscription.position();
        let start_token = tokens.map(|tokens| tokens.write(position, CommitTime::default()));
        let (hub, token_form) = (self.hub.clone(), self.options.token_form);
        let ready = VecDeque::new();
        let open = Open { hub, token_form, subscription, stop, expires_at, ready, before: None, _permit: permit };
        let responses = stream::unfold(Some(open), async |open| {
            let mut open = open?;
            match open.next_in_time().await {
                Ok(response) => Some((Ok(response), Some(open))),
                Err(status) => Some((Err(status), None)),
            }
        });
        let mut response: Response<Responses> = Response::new(Box::pin(responses));
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

/// Completes at that moment, if there is one.
async fn reached(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// An open stream.
struct Open {
    hub: Hub,
    token_form: Form,
    subscription: Subscription,
    stop: watch::Receiver<bool>,
    /// When it must end, whatever is ready.
    expires_at: Option<Instant>,
    ready: VecDeque<Arc<Item>>,
    /// Commit LSN of a transaction in several messages, and the one before it.
    before: Option<(Lsn, Option<Xid8>)>,
    _permit: OwnedSemaphorePermit,
}

impl Open {
    async fn next_in_time(&mut self) -> Result<Bytes, Status> {
        let expired = reached(self.expires_at);
        tokio::select! {
            biased;
            () = expired => Err(status::expired()),
            next = self.next() => next,
        }
    }

    async fn next(&mut self) -> Result<Bytes, Status> {
        loop {
            if let Some(item) = self.ready.front().cloned() {
                // The hub has a source before it has a message.
                let tokens = self.tokens()?;
                let before = self.transaction_before(&item, &tokens).await?;
                // Only now, as this may have waited.
                self.ready.pop_front();
                return Ok(item
                    .wire(|message| message.to_watch_response(&tokens.of_message(message, self.token_form, before))));
            }
            let next = tokio::select! {
                biased;
                _ = self.stop.wait_for(|stop| *stop) => return Err(status::shutting_down()),
                next = self.subscription.next(TAKE_BYTES) => next,
            };
            match next {
                Ok(items) => self.ready.extend(items),
                Err(end) => {
                    let tokens = self.tokens()?;
                    return Err(status::of_end(end, self.subscription.tenant(), &tokens));
                }
            }
        }
    }

    /// What the token of a message says that is not the last of its transaction, where it has to be a transaction's.
    async fn transaction_before(&mut self, item: &Item, tokens: &Tokens) -> Result<Option<Xid8>, Status> {
        let commit = item.message.header.commit;
        if self.token_form == Form::Native || item.message.end.is_some() || item.is_encoded() {
            return Ok(None);
        }
        if let Some((_, before)) = self.before.filter(|(known, _)| *known == commit) {
            return Ok(before);
        }
        let before = self.hub.transaction_before(commit).await;
        let before = before.map_err(|error| status::of_end(End::Log(error), self.subscription.tenant(), tokens))?;
        self.before = Some((commit, before));
        Ok(before)
    }

    fn tokens(&self) -> Result<Tokens, Status> {
        // Of the batch, and not of what the server may have gone on to since.
        self.subscription.origin().map(Tokens::new).ok_or_else(|| Status::internal("a message without a source"))
    }
}

impl<P: Primary + 'static> ServerStreamingService<proto::WatchRequest> for WatchService<P> {
    type Response = Bytes;
    type ResponseStream = Responses;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Responses>, Status>> + Send>>;

    fn call(&mut self, request: Request<proto::WatchRequest>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move { service.watch(request).await })
    }
}

impl<P> NamedService for WatchService<P> {
    const NAME: &'static str = "base.v1.Watch";
}

impl<B, P> Service<http::Request<B>> for WatchService<P>
where
    B: http_body::Body + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
    P: Primary + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            if request.uri().path() != "/base.v1.Watch/Watch" {
                return Ok(Status::unimplemented("base.v1.Watch has one method, Watch").into_http());
            }
            let mut grpc = Grpc::new(WatchCodec).max_decoding_message_size(REQUEST_BYTES_MAX);
            Ok(told_apart(grpc.server_streaming(service, request).await))
        })
    }
}

/// tonic calls a request that is too large OUT_OF_RANGE, which here is what a token is that is too old. Ours have details.
fn told_apart(response: http::Response<Body>) -> http::Response<Body> {
    let out_of_range = response.headers().get("grpc-status").is_some_and(|code| code == "11");
    if out_of_range && !response.headers().contains_key("grpc-status-details-bin") {
        return Status::invalid_argument("the request is larger than any WatchRequest").into_http();
    }
    response
}

/// Decodes requests, and copies responses that are encoded already.
struct WatchCodec;

impl Codec for WatchCodec {
    type Encode = Bytes;
    type Decode = proto::WatchRequest;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for WatchCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }
}

impl Decoder for WatchCodec {
    type Item = proto::WatchRequest;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<proto::WatchRequest>, Status> {
        let request = proto::WatchRequest::decode(buffer);
        request.map(Some).map_err(|error| Status::invalid_argument(format!("the request is no WatchRequest: {error}")))
    }

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }
}
