//! The body of a stream. It takes messages only as fast as the client reads, and leaves time for the other streams of
//! its thread.
//!
//! - **Lines are shared.** All streams, of all threads, share the encoded line of a message ([`LINE`]). The body joins
//!   copies of short lines, and contains slices of long ones.
//! - **Memory is bounded.** The body takes about [`READY_BYTES`] from the hub at a time, or sixteen times as much from
//!   the log. It encodes a message only when hyper has room for it, and hyper buffers 64 KiB for a connection. So a
//!   client that does not read costs these bytes, and the message that it has begun to read.
//! - **Streams take turns.** After [`TURN_BYTES`], or one longer message, the body lets the other streams of its thread
//!   run.

use super::refusal::Refusal;
use crate::api::encode::base_v1::line::{LINE, Line};
use crate::api::watch::{Error, Next, Stream};
use crate::metrics::metrics;
use axum::body::{Bytes, HttpBody};
use bytes::{BufMut as _, BytesMut};
use http_body::Frame;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep};

/// The bytes of messages that are taken from the hub at a time. From the log it is 16 KiB: as JSON, this about fills
/// the buffer of a connection, and it is small enough for many clients that do not read.
const READY_BYTES: usize = 1 << 10;
/// Messages are joined up to this length, and longer ones are sent in pieces of this length.
const PIECE_BYTES: usize = 16 << 10;
/// The bytes that hyper receives before the other streams of the thread run. hyper polls a pending body once more in the same turn
/// (`poll_loop` of its HTTP/1 dispatcher), so a turn comes to twice this length, which is the size of its buffer.
const TURN_BYTES: usize = 32 << 10;
/// The event id that replaces the snap token when the stream must not continue.
pub(super) const ENDED: &str = "ended";
/// Proxies close a quiet connection after a minute, and some after half a minute.
const COMMENT_EVERY: Duration = Duration::from_secs(15);

/// The name of the list of changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Changes {
    /// The name in the first version of the API.
    TupleChanges,
    /// The name in later versions.
    DataChanges,
}

/// The form of messages, and of an error at the end.
enum Form {
    Lines(Changes),
    /// Server-Sent Events, with the time of the next comment.
    Events(Pin<Box<Sleep>>),
}

/// The body of a stream, see the module.
pub(super) struct Body {
    form: Form,
    /// `None` after the end.
    stream: Option<Box<Stream>>,
    out: Output,
    /// The bytes that hyper has received in this turn.
    turn_bytes: usize,
}

impl Body {
    /// A body of JSON lines.
    pub(super) fn lines(stream: Stream, changes: Changes) -> Self {
        Self { form: Form::Lines(changes), stream: Some(Box::new(stream)), out: Output::default(), turn_bytes: 0 }
    }

    /// A body of Server-Sent Events. The first event carries the id of the start, and no data, so pages do not see it.
    pub(super) fn events(stream: Stream, start: Option<&str>) -> Self {
        let mut out = Output::default();
        if let Some(start) = start {
            out.put_all(&["id: ", start, "\n\n"]);
        }
        Self { form: events(), stream: Some(Box::new(stream)), out, turn_bytes: 0 }
    }

    /// A body of Server-Sent Events with this error only.
    pub(super) fn failed_events(error: Error) -> Self {
        let (form, mut out) = (events(), Output::default());
        form.put_error(error, &mut out);
        Self { form, stream: None, out, turn_bytes: 0 }
    }

    /// Writes ready messages, up to a piece. `Pending` if no message is ready and no comment is due.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Self { form, stream, out, .. } = self;
        let (mut messages, mut bytes) = (0, 0);
        while let Some(open) = stream
            && out.len() < PIECE_BYTES
        {
            match open.poll_next(cx, LINE, READY_BYTES) {
                Poll::Ready(Ok(Next { envelope, .. })) => {
                    messages += 1;
                    bytes += form.put(Line::new(envelope), out) as u64;
                }
                Poll::Ready(Err(error)) => {
                    open.end(&error);
                    form.put_error(error, out);
                    *stream = None;
                }
                Poll::Pending => break,
            }
        }
        if messages > 0 {
            metrics().http.messages_sent.inc_by(messages);
            metrics().http.bytes_sent.inc_by(bytes);
        }
        if let Form::Events(comment) = form {
            if out.len() == 0 && stream.is_some() && comment.as_mut().poll(cx).is_ready() {
                out.put_all(&[":\n\n"]);
            }
            if out.len() > 0 {
                comment.as_mut().reset(Instant::now() + COMMENT_EVERY);
            }
        }
        if out.len() > 0 || stream.is_none() { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.turn_bytes >= TURN_BYTES {
            self.turn_bytes = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if self.out.len() == 0 && self.poll_fill(cx).is_pending() {
            self.turn_bytes = 0;
            return Poll::Pending;
        }
        let piece = self.out.take();
        self.turn_bytes += piece.as_ref().map_or(0, Bytes::len);
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }
}

fn events() -> Form {
    Form::Events(Box::pin(tokio::time::sleep(COMMENT_EVERY)))
}

impl Form {
    /// Writes a message. Returns the length of its JSON.
    fn put(&self, line: Line, out: &mut Output) -> usize {
        let json = line.json();
        let length = json.len();
        match self {
            Self::Lines(Changes::DataChanges) => out.put(line.whole()),
            Self::Lines(Changes::TupleChanges) => {
                let (before, behind) = line.around_name();
                out.put(before);
                out.put_all(&["tuple_changes"]);
                out.put(behind);
            }
            Self::Events(_) => {
                out.put_all(&["id: "]);
                out.put(line.snap_token());
                out.put_all(&["\ndata: "]);
                out.put(json);
                out.put_all(&["\n\n"]);
            }
        }
        length
    }

    /// Writes the error that ends the stream.
    fn put_error(&self, error: Error, out: &mut Output) {
        let id = if error.ends_again_on_resume() { ["id: ", ENDED, "\n"] } else { [""; 3] };
        let json = Refusal::from(error).json();
        match self {
            Self::Lines(_) => out.put_all(&["{\"error\":", &json, "}\n"]),
            Self::Events(_) => {
                out.put_all(&["event: error\ndata: ", &json, "\n"]);
                out.put_all(&id);
                out.put_all(&["\n"]);
            }
        }
    }
}

/// The output that hyper has not received yet.
#[derive(Default)]
struct Output {
    /// Pieces that precede `joined`: slices of long lines, and the bytes between them.
    pieces: VecDeque<Bytes>,
    pieces_bytes: usize,
    joined: BytesMut,
}

impl Output {
    fn len(&self) -> usize {
        self.pieces_bytes + self.joined.len()
    }

    fn put_all(&mut self, texts: &[&str]) {
        texts.iter().for_each(|text| self.joined.put_slice(text.as_bytes()));
    }

    /// Copies short bytes, and shares long ones.
    fn put(&mut self, bytes: Bytes) {
        if bytes.len() < PIECE_BYTES {
            return self.joined.put(bytes);
        }
        let joined = self.joined.split().freeze();
        self.pieces_bytes += joined.len() + bytes.len();
        self.pieces.extend([joined, bytes].into_iter().filter(|piece| !piece.is_empty()));
    }

    /// Returns the next piece.
    fn take(&mut self) -> Option<Bytes> {
        let Some(first) = self.pieces.front_mut() else {
            // Give the memory away too: an idle stream holds none.
            return Some(std::mem::take(&mut self.joined).freeze()).filter(|joined| !joined.is_empty());
        };
        let piece = first.split_to(first.len().min(PIECE_BYTES));
        self.pieces_bytes -= piece.len();
        if first.is_empty() {
            self.pieces.pop_front();
        }
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::scope::Requested;
    use crate::api::watch::{Options, Started, Tokens, WatchService};
    use crate::changelog::reference::ModelLog;
    use crate::changelog::{ChangeLog as _, Entry, Origin};
    use crate::hub::primary::{Primary, PrimaryState, TransactionStatus, Unreachable};
    use crate::hub::{self, Hub, releaser};
    use crate::model::change::TenantId;
    use crate::model::lsn::{CommitLsn, CommitTime, EndLsn, Lsn, Position, Snapshot, Xid8};
    use crate::model::scope::Scope;
    use crate::model::snap_token::Form as TokenForm;
    use crate::model::timeline::{History, Source};
    use crate::model::transaction::{Header, Message, Transaction};
    use serde_json::Value as Json;
    use std::future::poll_fn;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    /// A resume within the window sends no query to PostgreSQL.
    struct Unasked;

    impl Primary for Unasked {
        async fn look(&self, _: &Scope) -> Result<PrimaryState, Unreachable> {
            unreachable!()
        }

        async fn transaction_status(&self, _: Xid8) -> Result<TransactionStatus, Unreachable> {
            unreachable!()
        }

        async fn mark(&self) -> Result<Lsn, Unreachable> {
            unreachable!()
        }
    }

    struct SeesAll;

    impl releaser::Snapshots for SeesAll {
        type Error = Infallible;

        async fn take(&mut self) -> Result<Snapshot, Infallible> {
            Ok("10000:10000:".parse().unwrap())
        }
    }

    /// Returns a service on a hub with these messages for the tenant `t1`, each with this many tuples, and a value that
    /// keeps the hub open.
    async fn watch(tuples: &[usize]) -> (WatchService<Unasked>, impl Sized) {
        let log = Arc::new(ModelLog::default());
        let source = Source { system_identifier: 1, database_oid: 2 };
        log.append(&[Entry::Adopt(Origin { source, history: History::first(), lsn: Lsn(100), xid: Xid8(50) })])
            .unwrap();
        let (append, appended) = tokio::sync::watch::channel(Lsn(100));
        let hub = Hub::new(log, appended, hub::Options { window_bytes: 64 << 20, before_visible: false }).unwrap();
        tokio::spawn(releaser::run(hub.clone(), SeesAll));
        for (count, commit) in tuples.iter().zip((200..).step_by(100)) {
            let header = Header { commit: CommitLsn(Lsn(commit)), xid: Xid8(commit), commit_time: CommitTime(0) };
            let end = EndLsn(Lsn(commit + 10));
            let message = Message::of_tuples(header, 1..=*count as u64, Some(end.0.0));
            let messages = vec![(TenantId::new("t1").unwrap(), message)];
            let (gaps, token_ids, tallies) = (vec![], vec![], vec![]);
            let transaction = Transaction { header, end, messages, staged: false, gaps, token_ids, tallies };
            hub.admit(Arc::new(transaction)).await;
            hub.watch_watermark().wait_for(|lsn| *lsn >= end.0).await.unwrap();
        }
        let (stopping, stop) = tokio::sync::watch::channel(false);
        let options = Options {
            enabled: true,
            subscribers_max: 100,
            resolve_timeout: Duration::from_secs(1),
            token_form: TokenForm::Native,
            permify_tenants: true,
        };
        (WatchService::new(hub, Unasked, options, stop), (append, stopping))
    }

    /// Starts before all messages.
    async fn start(service: &WatchService<Unasked>) -> Stream {
        let token = Tokens::new(&service.hub().origin().unwrap()).write(Position::at(Lsn(100)), CommitTime(0));
        let started = service.start(None, Requested::Tenant("t1"), &token, &metrics().http).await;
        let Started { stream, snap_token } = started.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(snap_token, Some(token));
        stream
    }

    /// Counts wake-ups.
    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns the pieces of each turn, until the body waits for the hub.
    fn turns(body: &mut Body) -> Vec<Vec<Bytes>> {
        let (woken, mut turns) = (Arc::new(Woken::default()), Vec::new());
        loop {
            let (before, mut pieces) = (woken.0.load(Ordering::Relaxed), Vec::new());
            let waker = Waker::from(woken.clone());
            while let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(&mut Context::from_waker(&waker)) {
                pieces.push(frame.expect("an open body").unwrap().into_data().unwrap());
            }
            turns.push(pieces);
            if woken.0.load(Ordering::Relaxed) == before {
                return turns;
            }
        }
    }

    fn text(turns: &[Vec<Bytes>]) -> String {
        String::from_utf8(turns.concat().concat()).unwrap()
    }

    #[tokio::test]
    async fn a_turn_is_bounded_whatever_a_message_is_and_nothing_is_lost_between_turns() {
        let tuples = [1, 1, 10_000, 1, 500, 500, 500, 1, 1];
        let (service, _open) = watch(&tuples).await;
        let mut lines = Body::lines(start(&service).await, Changes::DataChanges);
        let mut first = Body::lines(start(&service).await, Changes::TupleChanges);
        let mut events = Body::events(start(&service).await, None);
        let turns = [&mut lines, &mut first, &mut events].map(turns);
        for turns in &turns {
            assert!(turns.len() > 10, "{}", turns.len());
            for pieces in turns {
                assert!(pieces.iter().map(Bytes::len).sum::<usize>() < TURN_BYTES + 2 * PIECE_BYTES);
                assert!(pieces.iter().all(|piece| piece.len() < 2 * PIECE_BYTES));
            }
        }
        let [lines, first, events] = turns.each_ref().map(|turns| text(turns));
        let json: Vec<Json> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let counts = json.iter().map(|line| line["result"]["changes"]["data_changes"].as_array().unwrap().len());
        assert!(counts.eq(tuples));
        assert_eq!(first, lines.replace("\"data_changes\":", "\"tuple_changes\":"));
        let as_events = lines.lines().zip(&json).map(|(line, json)| {
            let token = json["result"]["changes"]["snap_token"].as_str().unwrap();
            let json = line.strip_prefix("{\"result\":").and_then(|line| line.strip_suffix('}')).unwrap();
            format!("id: {token}\ndata: {json}\n\n")
        });
        assert_eq!(events, as_events.collect::<String>());

        // All bodies contain slices of the same bytes.
        let long = |turns: &[Vec<Bytes>]| -> Vec<*const u8> {
            turns.iter().flatten().filter(|piece| piece.len() == PIECE_BYTES).map(|piece| piece.as_ptr()).collect()
        };
        let mut again = Body::lines(start(&service).await, Changes::DataChanges);
        assert!(long(&turns[0]).len() > 50);
        assert_eq!(long(&self::turns(&mut again)), long(&turns[0]));
    }

    async fn next(body: &mut Body) -> Option<Bytes> {
        let frame = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await;
        frame.map(|frame| frame.unwrap().into_data().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_event_source_has_comments_and_at_the_end_the_error() {
        let (service, _open) = watch(&[1]).await;
        let mut events = Body::events(start(&service).await, Some("start"));
        assert_eq!(next(&mut events).await.unwrap(), "id: start\n\n");
        assert!(next(&mut events).await.unwrap().starts_with(b"id: "));
        let since = Instant::now();
        for n in 1..=2 {
            assert_eq!(next(&mut events).await.unwrap(), ":\n\n");
            assert_eq!(since.elapsed().as_secs(), n * 15);
        }
        service.hub().close();
        let error = next(&mut events).await.unwrap();
        assert!(error.starts_with(b"event: error\ndata: {\"code\":14,") && error.ends_with(b"}\n\n"), "{error:?}");
        assert_eq!(next(&mut events).await, None);

        let mut lines = Body::lines(start(&service).await, Changes::DataChanges);
        let error = next(&mut lines).await.unwrap();
        assert!(error.starts_with(b"{\"error\":{\"code\":14,") && error.ends_with(b"}}\n"), "{error:?}");
        assert_eq!(next(&mut lines).await, None);
        let mut failed = Body::failed_events(Error::ShuttingDown);
        assert!(next(&mut failed).await.unwrap().starts_with(b"event: error\n"));
        assert_eq!(next(&mut failed).await, None);
    }
}
