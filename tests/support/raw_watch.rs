//! A cheap client of Watch: HTTP/2 by `h2`, gRPC frames and protobuf fields by hand.
//!
//! For tests that a generated client is too slow for, such as thousands of streams in one thread, and for tests of DATA frames, which
//! it hides.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::client::{Builder, SendRequest};
use h2::{Reason, RecvStream};
use http::{HeaderMap, Response};
use prost::Message as _;
use std::net::SocketAddr;
use tokio::net::TcpStream;
use tuplewatch::api::grpc::proto::WatchRequest;

/// The flow-control windows: how many bytes a peer may send before they are read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Windows {
    pub(crate) stream: u32,
    pub(crate) connection: u32,
}

impl Windows {
    /// The recommended windows of clients.
    pub(crate) const WIDE: Self = Self { stream: 4 << 20, connection: 64 << 20 };
}

/// A connection. Lives as long as its streams.
#[derive(Clone)]
pub(crate) struct Connection {
    requests: SendRequest<Bytes>,
    authority: String,
}

/// An open stream of one tenant's changes.
pub(crate) struct RawStream {
    body: RecvStream,
    frames: Frames,
    /// The token that resumes from its start.
    pub(crate) start_token: String,
}

impl Connection {
    pub(crate) async fn open(address: SocketAddr, windows: Windows) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let mut builder = Builder::new();
        builder.initial_window_size(windows.stream).initial_connection_window_size(windows.connection);
        let (requests, connection) = builder.handshake(stream).await.unwrap();
        // Its streams report a failure.
        tokio::spawn(connection);
        Self { requests, authority: address.to_string() }
    }

    /// Opens a stream. Returns with the response headers, when the start is fixed.
    pub(crate) async fn watch(&self, tenant: &str, token: &str) -> RawStream {
        let response = self.request(tenant, token).await;
        let header = |name| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        assert_eq!((response.status().as_u16(), header("grpc-status")), (200, None), "{response:?}");
        let start_token = header("snap-token").unwrap();
        RawStream { body: response.into_body(), frames: Frames::default(), start_token }
    }

    /// The response to a request to watch, also where that is refused.
    pub(crate) async fn request(&self, tenant: &str, token: &str) -> Response<RecvStream> {
        let request = http::Request::post(format!("http://{}/base.v1.Watch/Watch", self.authority))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .unwrap();
        let mut requests = self.requests.clone().ready().await.unwrap();
        let (response, mut body) = requests.send_request(request, false).unwrap();
        body.send_data(framed(tenant, token), true).unwrap();
        response.await.unwrap()
    }
}

/// A request with gRPC's prefix: not compressed, its length.
fn framed(tenant: &str, token: &str) -> Bytes {
    let request = WatchRequest { tenant_id: tenant.to_owned(), snap_token: token.to_owned() };
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(u32::try_from(request.encoded_len()).unwrap());
    request.encode(&mut framed).unwrap();
    framed.freeze()
}

impl RawStream {
    /// Reads the next DATA frame, and calls `message` with each encoded `WatchResponse` that it completes.
    pub(crate) async fn read(&mut self, message: impl FnMut(&[u8])) -> Result<(), h2::Error> {
        let is_open = self.frames.read(&mut self.body, message).await?;
        assert!(is_open, "the stream ended: {:?}", self.body.trailers().await);
        Ok(())
    }
}

/// Whether the connection ended because of too many small unread frames.
pub(crate) fn is_too_many_frames(error: &h2::Error) -> bool {
    error.reason() == Some(Reason::ENHANCE_YOUR_CALM)
}

/// Every message up to and including the first for which `is_last` holds; or all, and then the trailers.
pub(crate) async fn messages(mut body: RecvStream, is_last: impl Fn(&[u8]) -> bool) -> (Vec<Vec<u8>>, HeaderMap) {
    let (mut frames, mut messages, mut is_over) = (Frames::default(), Vec::new(), false);
    while !is_over {
        let take = |message: &[u8]| {
            if !is_over {
                messages.push(message.to_vec());
                is_over = is_last(message);
            }
        };
        if !frames.read(&mut body, take).await.unwrap() {
            return (messages, body.trailers().await.unwrap().unwrap_or_default());
        }
    }
    (messages, HeaderMap::new())
}

/// Splits DATA frames into gRPC messages, which begin and end anywhere in them.
#[derive(Default)]
struct Frames {
    /// The beginning of an incomplete message.
    rest: BytesMut,
}

/// A flag and the length.
const PREFIX: usize = 5;

impl Frames {
    /// Takes what the next DATA frame completes; `false` at the end of the body.
    async fn read(&mut self, body: &mut RecvStream, message: impl FnMut(&[u8])) -> Result<bool, h2::Error> {
        let Some(chunk) = body.data().await else { return Ok(false) };
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        self.take(chunk, message);
        Ok(true)
    }

    fn take(&mut self, chunk: Bytes, mut message: impl FnMut(&[u8])) {
        if self.rest.is_empty() {
            let taken = whole(&chunk, &mut message);
            self.rest.extend_from_slice(&chunk[taken..]);
        } else {
            self.rest.extend_from_slice(&chunk);
            let taken = whole(&self.rest, &mut message);
            self.rest.advance(taken);
        }
    }
}

/// Calls `message` with each complete message. Returns their length in bytes.
fn whole(bytes: &[u8], message: &mut impl FnMut(&[u8])) -> usize {
    let mut taken = 0;
    while let Some((prefix, rest)) = bytes[taken..].split_first_chunk::<PREFIX>() {
        let [flag, length @ ..] = *prefix;
        assert_eq!(flag, 0, "a compressed message, which nobody asked for");
        let Some(content) = rest.get(..u32::from_be_bytes(length) as usize) else { break };
        message(content);
        taken += PREFIX + content.len();
    }
    taken
}

/// Calls `change` with every encoded `DataChange` of an encoded `WatchResponse`.
pub(crate) fn changes<'a>(response: &'a [u8], mut change: impl FnMut(&'a [u8])) {
    let mut has_token = false;
    for (number, content) in Fields(field(response, 1)) {
        match number {
            1 => has_token = !content.is_empty(),
            2 => change(content),
            _ => {}
        }
    }
    assert!(has_token, "a message without a token");
}

/// The entity id of an encoded `DataChange` that creates a tuple.
pub(crate) fn entity_id(change: &[u8]) -> &[u8] {
    field(field(field(change, 2), 1), 2)
}

/// Parses a decimal number.
pub(crate) fn decimal(digits: &[u8]) -> u64 {
    digits.iter().fold(0, |number, digit| {
        assert!(digit.is_ascii_digit(), "no digit in {digits:?}");
        number * 10 + u64::from(digit - b'0')
    })
}

/// The content of the first field with this number.
pub(crate) fn field(message: &[u8], wanted: u32) -> &[u8] {
    let found = Fields(message).find(|(number, _)| *number == wanted);
    found.map_or_else(|| panic!("no field {wanted} in {message:?}"), |(_, content)| content)
}

/// The fields of an encoded message, with number and content; a varint has none.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = (u32, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let key = varint(&mut self.0);
        let length = match key & 7 {
            0 => {
                varint(&mut self.0);
                0
            }
            2 => varint(&mut self.0) as usize,
            other => panic!("wire type {other}, which Watch does not use"),
        };
        let (content, rest) = self.0.split_at(length);
        self.0 = rest;
        Some((u32::try_from(key >> 3).unwrap(), content))
    }
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first().expect("a whole varint");
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            break;
        }
    }
    value
}
