//! Messages of PostgreSQL's protocol, from the server and to it.
//!
//! A byte says what a message is, four how long the rest is, these four included.

use std::io;

use bytes::BytesMut;
use postgres_protocol::message::backend::{Header, Message};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf, split};

use super::wire::Wire;

/// Most that is read at a time.
const CHUNK: usize = 128 << 10;
/// The longest message that PostgreSQL makes: its `MaxAllocSize`.
const MESSAGE_MAX: usize = 1 << 30;
/// The longest before there is a session. Real ones have some hundred bytes.
const EARLY_MESSAGE_MAX: usize = 64 << 10;

/// The server.
pub(super) struct Peer {
    pub(super) incoming: Incoming,
    pub(super) outgoing: WriteHalf<Wire>,
}

/// What it sends.
pub(super) struct Incoming {
    wire: ReadHalf<Wire>,
    /// See [`Incoming::unread`].
    buffer: BytesMut,
    message_max: usize,
}

impl Peer {
    /// Who is not yet known to be PostgreSQL.
    pub(super) fn new(wire: Wire) -> Self {
        let (wire, outgoing) = split(wire);
        Self { incoming: Incoming { wire, buffer: BytesMut::new(), message_max: EARLY_MESSAGE_MAX }, outgoing }
    }

    /// From now on messages may be as long as PostgreSQL makes them.
    pub(super) const fn trust(&mut self) {
        self.incoming.message_max = MESSAGE_MAX;
    }

    /// For a driver, which begins behind what is unread.
    pub(super) fn into_wire(self) -> Wire {
        self.incoming.wire.unsplit(self.outgoing)
    }

    pub(super) async fn send(&mut self, message: impl FnOnce(&mut BytesMut) -> io::Result<()>) -> io::Result<()> {
        let mut out = BytesMut::new();
        // Fails for text with a zero byte in it.
        message(&mut out)?;
        self.outgoing.write_all(&out).await?;
        // TLS would keep what is small.
        self.outgoing.flush().await
    }

    /// The next message.
    pub(super) async fn receive(&mut self) -> io::Result<Message> {
        parse(self.incoming.next().await?)
    }
}

impl Incoming {
    /// The next message, in its bytes. Cancel safe.
    pub(super) async fn next(&mut self) -> io::Result<BytesMut> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(message);
            }
            self.read().await?;
        }
    }

    /// The next message, if all of it was read.
    pub(super) fn take(&mut self) -> io::Result<Option<BytesMut>> {
        Ok(match self.first_length()? {
            Some(length) if length <= self.buffer.len() => Some(self.buffer.split_to(length)),
            _ => None,
        })
    }

    /// What was read and not taken.
    pub(super) fn unread(&self) -> &[u8] {
        &self.buffer
    }

    /// Waits for more, and takes what there is. Cancel safe.
    pub(super) async fn read(&mut self) -> io::Result<()> {
        let wanted = self.first_length()?.map_or(0, |length| length.saturating_sub(self.buffer.len())).max(CHUNK / 2);
        if self.buffer.capacity() - self.buffer.len() < wanted {
            // Anew, so that the room of a long message is not kept.
            let mut room = BytesMut::with_capacity((self.buffer.len() + wanted).max(CHUNK));
            room.extend_from_slice(&self.buffer);
            self.buffer = room;
        }
        match self.wire.read_buf(&mut self.buffer).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    /// Of the first message, as far as that is known.
    fn first_length(&self) -> io::Result<Option<usize>> {
        let Some(header) = Header::parse(&self.buffer)? else { return Ok(None) };
        let length = usize::try_from(header.len()).ok().and_then(|length| length.checked_add(1));
        match length.filter(|length| *length <= self.message_max) {
            None => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it sent something that is not of PostgreSQL's protocol",
            )),
            length => Ok(length),
        }
    }
}

/// The message of which these are all bytes.
pub(super) fn parse(mut message: BytesMut) -> io::Result<Message> {
    Message::parse(&mut message)?
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it sent something that is not whole"))
}
