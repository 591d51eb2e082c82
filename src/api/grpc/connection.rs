//! One HTTP/2 connection and everything on it, in one task.
//!
//! ```text
//!            requests                    Watch has started
//!   h2 ────────────────▶ exchanges ─────────────────────────▶ streams
//!    ▲                   (any method)                         (thousands, small)
//!    └──────────── flushed once for all that was ready ──────────┘
//! ```
//!
//! The design serves fan-out. A server with a task, a queue and a chain of boxed bodies for each stream spends more
//! time on these than on the message. Here a message to a thousand streams on ten connections wakes ten tasks. Each of
//! them hands the same bytes to h2 a hundred times, and then writes once. h2 implements the protocol: frames, windows
//! and limits.
//!
//! - **Memory is bounded.** A stream takes a message from the hub, and the next one only after h2 had room for the first:
//!   within the client's window, and within [`SEND_BYTES_MAX`] for bytes that the socket does not accept. It reserves room only
//!   when it has something to send, because the room that an idle stream reserves is missing for other streams.
//! - **Resources of a lost client are freed.** A stream ends when it is reset, when its connection is closed, or when
//!   pings stay unanswered.
//! - When the server stops, its streams end with a status, and then the connection ends.

use super::calls::Call;
use super::send_counters::SendCounters;
use super::status;
use super::watch::{self, Frames, Responses};
use crate::access::tls;
use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, Stream as _};
use h2::server::{self, SendResponse};
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use http_body::{Body as _, Frame};
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, Sleep};
use tonic::body::Body;
use tower_service::Service;

/// The time within which a client must send the HTTP/2 preface. Pings begin only after the preface, so nothing else
/// ends a silent connection.
const OPENING_MAX: Duration = Duration::from_secs(10);
/// Pings keep middleboxes from dropping a quiet connection, and detect lost clients.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(20);
/// A client that leaves a ping unanswered for this long is lost, and its resources are freed.
const KEEPALIVE_MAX: Duration = Duration::from_secs(10);
/// Streams on one connection. Clients should use several connections with about a hundred streams each.
const STREAMS_MAX: u32 = 1_000;
/// Streams of a connection that start at the same time; further ones wait. The start of a stream takes much more memory
/// than an open stream, and clients that reconnect open all their streams at once.
const STARTS_MAX: usize = 16;
/// The longest header list of a request, in bytes.
const HEADERS_MAX: u32 = 16 << 10;
/// The bytes that a client may send before they are read: the largest request of Data, and some more.
const RECEIVE_WINDOW: u32 = 1 << 20;
/// Bytes of one stream that may wait for the socket, if the client's window is larger, in addition to one message.
const SEND_BYTES_MAX: usize = 64 << 10;

/// A service of a connection, behind [`crate::access::admission`].
pub(super) trait Serves<B>:
    Service<Request<RequestBody>, Response = Response<B>, Error = Infallible, Future: Send> + Clone + Send + 'static
{
}

impl<B, S> Serves<B> for S where
    S: Service<Request<RequestBody>, Response = Response<B>, Error = Infallible, Future: Send> + Clone + Send + 'static
{
}

/// Serves a connection until it is closed, or until `stop` turns true and all its streams have ended.
pub(super) async fn serve(
    stream: TcpStream,
    tls: Option<tls::Acceptor>,
    watch: impl Serves<Responses>,
    others: impl Serves<Body>,
    mut stop: Receiver<bool>,
) -> io::Result<()> {
    let Some(acceptor) = tls else {
        return serve_h2(stream, watch, others, stop).await;
    };
    let stream = tokio::select! {
        stream = acceptor.accept(stream) => stream?,
        _ = stop.wait_for(|stop| *stop) => return Ok(()),
    };
    serve_h2(stream, watch, others, stop).await
}

async fn serve_h2(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    watch: impl Serves<Responses>,
    others: impl Serves<Body>,
    mut stop: Receiver<bool>,
) -> io::Result<()> {
    let handshake = server::Builder::new()
        .initial_window_size(RECEIVE_WINDOW)
        .initial_connection_window_size(RECEIVE_WINDOW)
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEADERS_MAX)
        .max_send_buffer_size(SEND_BYTES_MAX)
        .handshake(stream);
    let opened = tokio::time::timeout(OPENING_MAX, handshake);
    let mut stopped = pin!(async move {
        let _ = stop.wait_for(|stop| *stop).await;
    });
    let mut h2 = tokio::select! {
        opened = opened => opened.map_err(|_| io::ErrorKind::TimedOut)?.map_err(io::Error::other)?,
        () = &mut stopped => return Ok(()),
    };
    let keepalive = h2.ping_pong().map(Keepalive::new);
    let (exchanges, streams) = (FuturesUnordered::new(), FuturesUnordered::new());
    let starts = Arc::new(Semaphore::new(STARTS_MAX));
    let sent = SendCounters::default();
    let mut connection = Connection { h2, watch, others, exchanges, starts, streams, keepalive, sent };
    tokio::select! {
        ended = poll_fn(|cx| connection.poll(cx)) => ended,
        () = stopped => {
            connection.h2.graceful_shutdown();
            poll_fn(|cx| connection.poll(cx)).await
        }
    }
}

struct Connection<T, W, O> {
    h2: server::Connection<T, Bytes>,
    watch: W,
    others: O,
    /// The requests without a complete answer.
    exchanges: FuturesUnordered<Exchange>,
    starts: Arc<Semaphore>,
    /// The open streams of Watch.
    streams: FuturesUnordered<Following>,
    keepalive: Option<Keepalive>,
    sent: SendCounters,
}

/// A request until its answer is sent. A request of Watch instead becomes a stream.
type Exchange = Pin<Box<dyn Future<Output = Result<Option<Following>, h2::Error>> + Send>>;

impl<T, W, O> Connection<T, W, O>
where
    T: AsyncRead + AsyncWrite + Unpin,
    W: Serves<Responses>,
    O: Serves<Body>,
{
    /// Ready when the connection has ended.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            while let Poll::Ready(Some(exchanged)) = Pin::new(&mut self.exchanges).poll_next(cx) {
                match exchanged {
                    Ok(following) => self.streams.extend(following),
                    Err(error) => tracing::trace!("a request was not answered: {error}"),
                }
            }
            // Polling removes ended streams from the set.
            while let Poll::Ready(Some(())) = Pin::new(&mut self.streams).poll_next(cx) {}
            self.sent.settle();
            // Writes the messages of the streams, and reads requests.
            match self.h2.poll_accept(cx).map_err(io::Error::other)? {
                Poll::Ready(Some((request, reply))) => {
                    self.exchanges.push(self.exchange(request, reply));
                }
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Pending => break,
            }
        }
        match &mut self.keepalive {
            Some(keepalive) => keepalive.poll_lost(cx).map(|()| Err(io::ErrorKind::TimedOut.into())),
            None => Poll::Pending,
        }
    }

    /// Both services are always ready.
    fn exchange(&self, request: Request<RecvStream>, mut reply: SendResponse<Bytes>) -> Exchange {
        let request = request.map(RequestBody);
        let mut call = Call::begin(request.uri().path());
        if watch::is_path(request.uri().path()) {
            let (mut watch, starts, timeout) =
                (self.watch.clone(), self.starts.clone(), grpc_timeout(request.headers()));
            let sent = self.sent.clone();
            return Box::pin(async move {
                // The semaphore is never closed.
                let _start = starts.acquire().await;
                let answer = watch.call(request);
                let Some(response) = answered(answer, timeout, &mut reply).await? else { return Ok(None) };
                let (head, responses) = response.into_parts();
                let is_refused = responses.is_end();
                call.end_with(&head.headers);
                let send = reply.send_response(Response::from_parts(head, ()), is_refused)?;
                Ok((!is_refused).then(|| Following::new(responses, send, sent, call)))
            });
        }
        let timeout = grpc_timeout(request.headers());
        let answer = self.others.clone().call(request);
        Box::pin(async move {
            let Some(response) = answered(answer, timeout, &mut reply).await? else { return Ok(None) };
            let (head, body) = response.into_parts();
            let is_end = body.is_end_stream();
            call.end_with(&head.headers);
            let send = reply.send_response(Response::from_parts(head, ()), is_end)?;
            if !is_end {
                send_body(body, send, &mut call).await?;
            }
            Ok(None)
        })
    }
}

/// The time that the client waits for an answer: the header `grpc-timeout` of gRPC over HTTP/2, up to eight digits and
/// a unit.
fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 60 * 60)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// Returns the answer of the service, or a status if it takes too long. `None` if the client has cancelled the request.
async fn answered<B: Default>(
    answer: impl Future<Output = Result<Response<B>, Infallible>>,
    timeout: Option<Duration>,
    reply: &mut SendResponse<Bytes>,
) -> Result<Option<Response<B>>, h2::Error> {
    let mut answer = pin!(async {
        match timeout {
            None => answer.await,
            Some(timeout) => tokio::time::timeout(timeout, answer)
                .await
                .unwrap_or_else(|_| Ok(status::deadline_exceeded(timeout).into_http())),
        }
    });
    poll_fn(|cx| match answer.as_mut().poll(cx) {
        Poll::Ready(Ok(response)) => Poll::Ready(Ok(Some(response))),
        Poll::Ready(Err(never)) => match never {},
        Poll::Pending => Poll::Ready(ready!(reply.poll_reset(cx)).map(|_| None)),
    })
    .await
}

async fn send_body(mut body: Body, mut send: SendStream<Bytes>, call: &mut Call) -> Result<(), h2::Error> {
    loop {
        let next = poll_fn(|cx| match Pin::new(&mut body).poll_frame(cx) {
            Poll::Ready(frame) => Poll::Ready(Ok(frame)),
            Poll::Pending => Poll::Ready(Err(ready!(send.poll_reset(cx)).map_or_else(|error| error, h2::Error::from))),
        });
        let frame = match next.await? {
            Some(Ok(frame)) => frame,
            None => return send.send_data(Bytes::new(), true),
            Some(Err(_)) => {
                send.send_reset(Reason::INTERNAL_ERROR);
                return Ok(());
            }
        };
        match frame.into_data() {
            Ok(data) => {
                if !poll_fn(|cx| poll_room(&mut send, cx)).await? {
                    return Ok(());
                }
                send.send_data(data, false)?;
            }
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    call.end_with(&trailers);
                    return send.send_trailers(trailers);
                }
            }
        }
    }
}

/// Waits until h2 has room for more bytes of this stream. Returns `false` if the client has gone away. The next
/// write may exceed the room, because h2 buffers the rest.
fn poll_room(send: &mut SendStream<Bytes>, cx: &mut Context<'_>) -> Poll<Result<bool, h2::Error>> {
    send.reserve_capacity(1);
    while send.capacity() == 0 {
        match ready!(send.poll_capacity(cx)) {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Poll::Ready(Err(error)),
            None => return Poll::Ready(Ok(false)),
        }
    }
    Poll::Ready(Ok(true))
}

/// An open stream of Watch. Ready when it has ended, for whatever reason.
struct Following {
    responses: Responses,
    /// Messages from the hub that wait for room.
    unsent: Option<Frames>,
    send: SendStream<Bytes>,
    h2_waker: Option<Arc<H2Waker>>,
    sent: SendCounters,
    call: Call,
}

/// Wakes a stream for h2's events: there is room, or the stream was reset.
///
/// Wake-ups during the stream's own poll are ignored. h2's state changes only within this task, so the stream itself
/// caused the event. For example, the call that takes room also wakes the stream, which would then be polled twice for
/// each message.
struct H2Waker {
    stream: Waker,
    is_polled: AtomicBool,
}

impl Wake for H2Waker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.is_polled.load(Ordering::Relaxed) {
            self.stream.wake_by_ref();
        }
    }
}

impl Following {
    const fn new(responses: Responses, send: SendStream<Bytes>, sent: SendCounters, call: Call) -> Self {
        Self { responses, unsent: None, send, h2_waker: None, sent, call }
    }
}

impl Future for Following {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let known = self.h2_waker.take().filter(|waker| waker.stream.will_wake(cx.waker()));
        let h2_waker = known
            .unwrap_or_else(|| Arc::new(H2Waker { stream: cx.waker().clone(), is_polled: AtomicBool::new(false) }));
        h2_waker.is_polled.store(true, Ordering::Relaxed);
        let waker = Waker::from(h2_waker.clone());
        let polled = self.poll_both(cx, &mut Context::from_waker(&waker));
        h2_waker.is_polled.store(false, Ordering::Relaxed);
        self.h2_waker = Some(h2_waker);
        polled
    }
}

impl Following {
    fn poll_both(&mut self, hub: &mut Context<'_>, h2: &mut Context<'_>) -> Poll<()> {
        let Self { responses, unsent, send, sent, call, .. } = self;
        let mut is_all = false;
        loop {
            if unsent.is_some() {
                match poll_room(send, h2) {
                    Poll::Ready(Ok(true)) => {}
                    Poll::Ready(Ok(false) | Err(_)) => return Poll::Ready(()),
                    Poll::Pending => break,
                }
            }
            if let Some(Frames { bytes, messages, .. }) = unsent.take() {
                let length = bytes.len();
                if send.send_data(bytes, false).is_err() {
                    return Poll::Ready(());
                }
                sent.add(messages, length);
            }
            if is_all {
                break;
            }
            match responses.poll_frames(hub) {
                Poll::Ready(Some(Ok(frames))) => {
                    // Valid in this poll only: while a stream waits for room, the hub wakes it only once.
                    is_all = frames.is_all;
                    *unsent = Some(frames);
                }
                Poll::Ready(Some(Err(status))) => {
                    let mut trailers = HeaderMap::new();
                    let is_written = status.add_header(&mut trailers).is_ok();
                    call.end_with(&trailers);
                    if !is_written || send.send_trailers(trailers).is_err() {
                        send.send_reset(Reason::INTERNAL_ERROR);
                    }
                    return Poll::Ready(());
                }
                Poll::Ready(None) => return Poll::Ready(()),
                Poll::Pending => break,
            }
        }
        // The client may go away whatever the stream waits for.
        send.poll_reset(h2).map(drop)
    }
}

/// The body of a request, in the form that services read.
pub(super) struct RequestBody(RecvStream);

impl http_body::Body for RequestBody {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if let Some(data) = ready!(self.0.poll_data(cx)?) {
            // The service bounds its memory itself, so the client may send as many bytes again.
            self.0.flow_control().release_capacity(data.len())?;
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        let trailers = ready!(self.0.poll_trailers(cx))?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }
}

/// Pings the client, and detects that it is lost.
struct Keepalive {
    pings: PingPong,
    /// The time of the next ping, or the deadline of an unanswered one.
    timer: Pin<Box<Sleep>>,
    is_unanswered: bool,
}

impl Keepalive {
    fn new(pings: PingPong) -> Self {
        Self { pings, timer: Box::pin(tokio::time::sleep(KEEPALIVE_EVERY)), is_unanswered: false }
    }

    /// Ready when the client is lost.
    fn poll_lost(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.is_unanswered && self.pings.poll_pong(cx).is_ready() {
                self.is_unanswered = false;
                self.timer.as_mut().reset(Instant::now() + KEEPALIVE_EVERY);
            }
            ready!(self.timer.as_mut().poll(cx));
            if self.is_unanswered || self.pings.send_ping(Ping::opaque()).is_err() {
                return Poll::Ready(());
            }
            self.is_unanswered = true;
            self.timer.as_mut().reset(Instant::now() + KEEPALIVE_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_read_in_every_unit() {
        let check = |value: &'static str, expected: Option<Duration>| {
            let headers = HeaderMap::from_iter([("grpc-timeout".parse().unwrap(), value.parse().unwrap())]);
            assert_eq!(grpc_timeout(&headers), expected, "{value:?}");
        };
        check("2H", Some(Duration::from_secs(7200)));
        check("3M", Some(Duration::from_secs(180)));
        check("4S", Some(Duration::from_secs(4)));
        check("99999999m", Some(Duration::from_millis(99_999_999)));
        check("5u", Some(Duration::from_micros(5)));
        check("0n", Some(Duration::ZERO));
        for unreadable in ["", "S", "5", "5s", "-5S", "+5S", "1.5S", "100000000S", "5\u{b5}"] {
            check(unreadable, None);
        }
        assert_eq!(grpc_timeout(&HeaderMap::new()), None);
    }
}
