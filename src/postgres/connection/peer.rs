//! Messages of PostgreSQL's protocol, from the server and to it.
//!
//! The first byte of a message is its type. The next four bytes are its length, which includes these four bytes but not
//! the type.

use std::io;

use bytes::BytesMut;
use postgres_protocol::message::backend::{Header, Message};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf, split};

use super::pace::Pace;
use super::wire::Wire;

/// The least free room of the buffer for a read.
const ROOM_MIN: usize = 64 << 10;
/// The size of a new buffer.
const ROOM: usize = 4 * ROOM_MIN;
/// The longest message that PostgreSQL creates: its `MaxAllocSize`.
const MESSAGE_MAX: usize = 1 << 30;
/// The longest message before the server has accepted the session. Real ones have some hundred bytes.
const EARLY_MESSAGE_MAX: usize = 64 << 10;

/// Bytes that are not a message of PostgreSQL's protocol.
#[derive(Debug, thiserror::Error)]
enum Malformed {
    #[error("it sent something that is not of PostgreSQL's protocol")]
    Length,
    #[error("it sent an incomplete message")]
    Incomplete,
}

impl From<Malformed> for io::Error {
    fn from(malformed: Malformed) -> Self {
        Self::new(io::ErrorKind::InvalidData, malformed)
    }
}

/// The connection to a server.
pub(super) struct Peer {
    pub(super) incoming: Incoming,
    pub(super) outgoing: WriteHalf<Wire>,
}

/// The bytes from the server.
pub(super) struct Incoming {
    wire: ReadHalf<Wire>,
    /// See [`Incoming::unread`].
    buffer: BytesMut,
    message_max: usize,
    pace: Pace,
}

impl Peer {
    /// Creates a peer that may not be PostgreSQL.
    pub(super) fn new(wire: Wire) -> Self {
        let pace = Pace::new(wire.tcp().and_then(|socket| socket.try_clone_to_owned().ok()));
        let (wire, outgoing) = split(wire);
        let (buffer, message_max) = (BytesMut::new(), EARLY_MESSAGE_MAX);
        Self { incoming: Incoming { wire, buffer, message_max, pace }, outgoing }
    }

    /// From now on, messages may be as long as PostgreSQL creates them.
    pub(super) const fn trust(&mut self) {
        self.incoming.message_max = MESSAGE_MAX;
    }

    /// Returns the stream for a driver, which reads the remaining bytes.
    pub(super) fn into_wire(self) -> Wire {
        self.incoming.wire.unsplit(self.outgoing)
    }

    pub(super) async fn send(&mut self, message: impl FnOnce(&mut BytesMut) -> io::Result<()>) -> io::Result<()> {
        send(&mut self.outgoing, message).await
    }

    /// Receives and parses the next message.
    pub(super) async fn receive(&mut self) -> io::Result<Message> {
        parse(self.incoming.next().await?)
    }
}

impl Incoming {
    /// Receives the bytes of the next message. Cancel safe.
    pub(super) async fn next(&mut self) -> io::Result<BytesMut> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(message);
            }
            self.read().await?;
        }
    }

    /// Returns the next message, if all its bytes were read.
    pub(super) fn take(&mut self) -> io::Result<Option<BytesMut>> {
        Ok(match self.first_length()? {
            Some(length) if length <= self.buffer.len() => Some(self.buffer.split_to(length)),
            _ => None,
        })
    }

    /// The bytes that were read but not taken.
    pub(super) fn unread(&self) -> &[u8] {
        &self.buffer
    }

    /// Waits for more bytes, and reads those that have arrived. While much arrives, it first blocks the thread for up
    /// to two milliseconds. Cancel safe.
    pub(super) async fn read(&mut self) -> io::Result<()> {
        let missing = self.first_length()?.map_or(0, |length| length.saturating_sub(self.buffer.len()));
        if self.buffer.capacity() - self.buffer.len() < missing.max(ROOM_MIN) {
            // A new buffer, so that the memory of a long message is freed.
            let mut room = BytesMut::with_capacity((self.buffer.len() + missing).max(ROOM));
            room.extend_from_slice(&self.buffer);
            self.buffer = room;
        }
        self.pace.keep(missing);
        let bytes = self.wire.read_buf(&mut self.buffer).await.and_then(unless_closed)?;
        self.pace.record_read(bytes);
        Ok(())
    }

    /// Records that the last message was a keepalive message.
    pub(super) const fn record_keepalive(&mut self) {
        self.pace.record_keepalive();
    }

    #[cfg(test)]
    pub(super) const fn is_behind(&self) -> bool {
        self.pace.is_behind()
    }

    /// Returns the length of the first message, if its header was read.
    fn first_length(&self) -> io::Result<Option<usize>> {
        let Some(header) = Header::parse(&self.buffer)? else { return Ok(None) };
        let length = usize::try_from(header.len()).ok().and_then(|length| length.checked_add(1));
        match length.filter(|length| *length <= self.message_max) {
            None => Err(Malformed::Length.into()),
            length => Ok(length),
        }
    }
}

/// Sends the messages that the closure writes.
pub(super) async fn send(
    outgoing: &mut WriteHalf<Wire>,
    messages: impl FnOnce(&mut BytesMut) -> io::Result<()>,
) -> io::Result<()> {
    let mut out = BytesMut::new();
    // Text with a zero byte cannot be written.
    messages(&mut out)?;
    outgoing.write_all(&out).await?;
    // TLS buffers small writes.
    outgoing.flush().await
}

/// Fails if a read returned no bytes, because the connection is then closed.
fn unless_closed(bytes: usize) -> io::Result<usize> {
    if bytes == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(bytes) }
}

/// Parses the bytes of one message.
pub(super) fn parse(mut message: BytesMut) -> io::Result<Message> {
    Message::parse(&mut message)?.ok_or_else(|| Malformed::Incomplete.into())
}

#[cfg(test)]
mod tests {
    use super::super::pace;
    use super::*;
    use bytes::BufMut as _;
    use std::io::Write as _;
    use std::time::Duration;
    use tokio::net::TcpListener;

    const ROWS: usize = 50_000;
    const ROW: usize = 150;

    fn message(body: &[u8]) -> BytesMut {
        let mut message = BytesMut::new();
        message.put_u8(b'd');
        message.put_u32(u32::try_from(4 + body.len()).unwrap());
        message.put_slice(body);
        message
    }

    async fn connected() -> (Peer, std::net::TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (stream, other) = tokio::join!(pace::connect(listener.local_addr().unwrap()), listener.accept());
        let other = other.unwrap().0.into_std().unwrap();
        other.set_nonblocking(false).unwrap();
        other.set_nodelay(true).unwrap();
        (Peer::new(Box::new(stream.unwrap())), other)
    }

    /// A walsender that sends each row by itself, and then one more row at each request.
    #[tokio::test]
    async fn a_backlog_arrives_in_large_pieces_and_single_messages_after_it() {
        let (mut peer, mut walsender) = connected().await;
        peer.trust();
        let (request, requested) = std::sync::mpsc::channel();
        let sender = std::thread::spawn(move || {
            for _ in 0..ROWS {
                walsender.write_all(&message(&[b'w'; ROW])).unwrap();
            }
            while requested.recv().is_ok() {
                walsender.write_all(&message(b"last")).unwrap();
            }
        });
        let (mut rows, mut reads) = (0, 0);
        while rows < ROWS {
            match peer.incoming.take().unwrap() {
                Some(row) => {
                    assert_eq!(row.len(), 5 + ROW);
                    rows += 1;
                }
                None => {
                    peer.incoming.read().await.unwrap();
                    reads += 1;
                }
            }
        }
        assert!(reads < ROWS / 4, "{reads} reads of {ROWS} rows");
        for _ in 0..3 {
            request.send(()).unwrap();
            let last = tokio::time::timeout(Duration::from_secs(30), peer.incoming.next());
            assert_eq!(last.await.unwrap().unwrap(), message(b"last"));
        }
        drop(request);
        sender.join().unwrap();
    }

    /// Otherwise the server's kernel may wait for room: see [`pace::connect`].
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn many_segments_fit_into_the_small_receive_buffer() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = pace::connect(listener.local_addr().unwrap()).await.unwrap();
        let other = listener.accept().await.unwrap().0;
        let (stream, other) = (socket2::SockRef::from(&stream), socket2::SockRef::from(&other));
        let (buffer, segment) = (stream.recv_buffer_size().unwrap(), other.tcp_mss().unwrap());
        assert!(buffer <= 64 << 10, "a buffer of {buffer} bytes");
        assert!(usize::try_from(segment).unwrap() <= buffer / 8, "segments of {segment} bytes");
    }

    #[tokio::test]
    async fn messages_of_any_length_are_read_and_others_refused() {
        let (mut peer, mut server) = connected().await;
        let too_long = message(&vec![0; EARLY_MESSAGE_MAX]);
        let sender = std::thread::spawn(move || {
            for length in [0, 1, ROOM_MIN - 5, 3 * ROOM, 7] {
                server.write_all(&message(&vec![b'x'; length])).unwrap();
            }
            server.write_all(b"d\0\0\0\x03").unwrap();
        });
        peer.trust();
        for length in [0, 1, ROOM_MIN - 5, 3 * ROOM, 7] {
            assert_eq!(peer.incoming.next().await.unwrap().len(), 5 + length);
        }
        assert!(peer.incoming.buffer.capacity() <= ROOM, "the room of the long one is given back");
        assert_eq!(peer.incoming.next().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        sender.join().unwrap();

        // Such lengths are refused before the peer is known to be PostgreSQL.
        let (mut peer, mut server) = connected().await;
        server.write_all(&too_long[..5]).unwrap();
        assert_eq!(peer.incoming.next().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        let (mut peer, server) = connected().await;
        drop(server);
        assert_eq!(peer.incoming.next().await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
