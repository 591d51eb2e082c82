//! The body of a stream: pulled as fast as the client reads, and fair to the others of its thread.
//!
//! - **Made once.** A message is a line that all streams share, of whichever thread ([`LINE`]). Short ones are copied together, and of long
//!   ones the body has slices.
//! - **Little is ready.** What is taken from the hub at a time comes to about [`READY_BYTES`], or sixteen times as much where it is read from
//!   the log; it is encoded only when hyper has room for it, and hyper has room for 64 KiB of a connection. So a client that does not read
//!   costs that, and the message that it has begun to read.
//! - **Nobody waits long.** After [`TURN_BYTES`], or a message that is longer, a body lets the others of its thread run.

use super::json;
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
use tonic::Status;

/// Of messages, taken from the hub at a time. From the log it is 16 KiB, about as much as fills the buffer of a connection as JSON, and
/// little enough for many clients that do not read.
const READY_BYTES: usize = 1 << 10;
/// What is ready is joined up to this, and what is longer is sent in pieces of it.
const PIECE_BYTES: usize = 16 << 10;
/// Given to hyper at a time, before the other streams of the thread have their turn: what it buffers.
const TURN_BYTES: usize = 64 << 10;
/// In place of a snap token: there is no going on from here.
pub(super) const ENDED: &str = "ended";
/// Proxies forget a quiet connection after a minute, some after half of it.
const COMMENT_EVERY: Duration = Duration::from_secs(15);

/// What the list of changes is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Changes {
    /// In the first version of the API.
    TupleChanges,
    /// In later ones.
    DataChanges,
}

/// How messages, and an error at the end, are written.
enum Form {
    Lines(Changes),
    /// Server-Sent Events, with the time of the next comment.
    Events(Pin<Box<Sleep>>),
}

/// See the module.
pub(super) struct Body {
    form: Form,
    /// `None`: it has ended.
    stream: Option<Box<Stream>>,
    out: Output,
    /// Given to hyper since the others had their turn.
    turn_bytes: usize,
}

impl Body {
    /// JSON lines.
    pub(super) fn lines(stream: Stream, changes: Changes) -> Self {
        Self { form: Form::Lines(changes), stream: Some(Box::new(stream)), out: Output::default(), turn_bytes: 0 }
    }

    /// Server-Sent Events. They begin with the id of the start, which no page sees.
    pub(super) fn events(stream: Stream, start: Option<&str>) -> Self {
        let mut out = Output::default();
        if let Some(start) = start {
            out.put_all(&["id: ", start, "\n\n"]);
        }
        Self { form: events(), stream: Some(Box::new(stream)), out, turn_bytes: 0 }
    }

    /// Server-Sent Events that end at once.
    pub(super) fn failed_events(error: Error) -> Self {
        let (form, mut out) = (events(), Output::default());
        form.put_error(error, &mut out);
        Self { form, stream: None, out, turn_bytes: 0 }
    }

    /// Takes what is ready, up to a piece. `Pending` where nothing is, and nothing is to be said.
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
    /// Writes a message. Returns how long its JSON is.
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

    /// Writes why there is no more.
    fn put_error(&self, error: Error, out: &mut Output) {
        let id = if error.recurs() { ["id: ", ENDED, "\n"] } else { [""; 3] };
        let json = json::write_status(&Status::from(error));
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

/// What is written and not yet given to hyper.
#[derive(Default)]
struct Output {
    /// Slices of long lines, with what is between them, in front of what is joined.
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

    /// Copies what is short, and shares what is long.
    fn put(&mut self, bytes: Bytes) {
        if bytes.len() < PIECE_BYTES {
            return self.joined.put(bytes);
        }
        let joined = self.joined.split().freeze();
        self.pieces_bytes += joined.len() + bytes.len();
        self.pieces.extend([joined, bytes].into_iter().filter(|piece| !piece.is_empty()));
    }

    /// The next piece.
    fn take(&mut self) -> Option<Bytes> {
        let Some(first) = self.pieces.front_mut() else {
            // With its memory: an idle stream has none.
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
