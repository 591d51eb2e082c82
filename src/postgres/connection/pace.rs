//! The pace of the reader: while much arrives, it pauses between reads.
//!
//! PostgreSQL sends each message by itself. A reader that is faster than the server is woken for each message, and the
//! server's kernel sends each message as a segment of its own. Both cost more than the message itself. With pauses, one
//! read brings many messages.
//!
//! ```text
//!                 MUCH without a keepalive message
//!   no pauses ───────────────────────────────────────▶ behind: pause, read, pause, read, …
//!       ▲                                                │
//!       └────────────── a keepalive message ─────────────┘
//! ```
//!
//! A walsender sends a keepalive message before it waits for more WAL (`WalSndWaitForWal` in PostgreSQL's source), so
//! the pauses end with the backlog, and a stream of small transactions has none. Only the rest of a transaction, or of a
//! burst, of more than [`MUCH`] waits too. A pause is at most [`PAUSE_MAX`], and there is none after a long read or in
//! a long message. PostgreSQL also sends keepalive messages at other times, for example after each transaction without
//! a watched change if it has synchronous standbys. Then the pauses begin late or never, and the backlog costs more.
//!
//! From a server at a loopback address the reader also has a small receive buffer. During a pause it is full. The server
//! continues to write into its send buffer, where the kernel joins the messages, and this halves the walsender's work.
//! The pause must not be so long that the send buffer is full too, nor so short that the receive buffer is not: see
//! [`Pace::record_read`]. Over a network, a small receive buffer would limit the throughput to that much in a round
//! trip, and the pauses just become as long as they may. A Unix socket joins nothing, and its send buffer is soon full,
//! so there the reader does not pause.
//!
//! Small segments need more memory than the kernel expects, so it drops a few of them from a full receive buffer, and
//! the server's kernel sends them again.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpSocket, TcpStream};

/// The bytes since the last keepalive message that show that the reader is behind: a thousand rows.
const MUCH: usize = 128 << 10;
/// The size of the receive buffer for a server at a loopback address. Linux doubles it.
const BUFFER: u32 = 16 << 10;
/// The maximum size of a segment from such a server, as over Ethernet.
const SEGMENT: u32 = 1_448;
/// A read or a message of this length needs no pause.
const LONG: usize = 64 << 10;
/// No pause is this short, because the timer is not more exact.
const PAUSE_MIN: Duration = Duration::from_micros(50);
const PAUSE_FIRST: Duration = Duration::from_micros(500);
const PAUSE_MAX: Duration = Duration::from_millis(2);

/// The pace of one connection.
pub(super) struct Pace {
    /// `None` where the reader never pauses.
    socket: Option<OwnedFd>,
    since_keepalive: usize,
    pause: Duration,
    /// Whether the pause after the last read is over.
    is_over: bool,
}

/// Opens the connection of a walsender, with a small receive buffer and small segments if the address is a loopback
/// address. Loopback segments are up to 64 KiB otherwise. The server's kernel sends no part of a segment: if the one that
/// it has ready is larger than the room in the receive buffer, it sends nothing until its timer expires, after 200 ms.
///
/// # Errors
/// Those of the operating system.
pub(super) async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if cfg!(target_os = "linux") && address.ip().to_canonical().is_loopback() {
        socket.set_recv_buffer_size(BUFFER)?;
        SockRef::from(&socket).set_tcp_mss(SEGMENT)?;
    }
    socket.connect(address).await
}

impl Pace {
    /// `socket`: of a TCP connection.
    pub(super) const fn new(socket: Option<OwnedFd>) -> Self {
        Self { socket, since_keepalive: 0, pause: PAUSE_FIRST, is_over: true }
    }

    /// Pauses once after each read, if the reader is behind. `missing`: the bytes that the first message still needs.
    ///
    /// Blocks the thread: during a timer of the runtime, every segment would wake the thread. Whatever else runs on the
    /// thread waits, too.
    pub(super) fn keep(&mut self, missing: usize) {
        let is_over = std::mem::replace(&mut self.is_over, true);
        if !is_over && self.is_behind() && missing < LONG && self.pause > PAUSE_MIN {
            std::thread::sleep(self.pause);
        }
    }

    /// Records a read of this many bytes, and adapts the pause.
    ///
    /// A read makes room, which the messages in the send buffer fill again at once. If they bring half as much as was
    /// read, or more, the server has enough of them, and the next pause is a little shorter. Otherwise it is longer, by
    /// twice as much: messages in the send buffer cost nothing until it is full.
    pub(super) fn record_read(&mut self, bytes: usize) {
        if self.is_behind() {
            let has_more = self.waiting() >= bytes / 2;
            let next = if has_more { self.pause - self.pause / 16 } else { self.pause + self.pause / 8 };
            self.pause = next.clamp(PAUSE_MIN, PAUSE_MAX);
        }
        self.since_keepalive = self.since_keepalive.saturating_add(bytes);
        self.is_over = bytes >= LONG;
    }

    /// Records a keepalive message.
    pub(super) const fn record_keepalive(&mut self) {
        (self.since_keepalive, self.pause) = (0, PAUSE_FIRST);
    }

    /// Whether much has arrived since the last keepalive message.
    pub(super) const fn is_behind(&self) -> bool {
        self.socket.is_some() && self.since_keepalive >= MUCH
    }

    /// The bytes in the socket.
    fn waiting(&self) -> usize {
        let bytes = self.socket.as_ref().and_then(|socket| rustix::io::ioctl_fionread(socket).ok());
        bytes.and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;

    fn pace() -> (Pace, UnixStream) {
        let (socket, other) = UnixStream::pair().unwrap();
        (Pace::new(Some(socket.into())), other)
    }

    #[test]
    fn a_reader_is_behind_after_much_without_a_keepalive_message() {
        let (mut pace, _other) = pace();
        for _ in 0..1_000 {
            pace.record_read(MUCH - 1);
            assert!(!pace.is_behind());
            pace.record_keepalive();
        }
        for _ in 0..500 {
            pace.record_read(150);
        }
        assert!(!pace.is_behind(), "a transaction of 500 rows");
        pace.record_keepalive();
        pace.record_read(MUCH - 1);
        pace.record_read(1);
        assert!(pace.is_behind());
        pace.record_keepalive();
        assert!(!pace.is_behind());

        let mut unpaced = Pace::new(None);
        unpaced.record_read(MUCH);
        assert!(!unpaced.is_behind());
    }

    #[test]
    fn the_pause_is_shorter_while_the_server_has_more_and_longer_while_it_has_not() {
        let (mut pace, mut other) = pace();
        pace.record_read(MUCH);
        assert_eq!(pace.pause, PAUSE_FIRST);
        for _ in 0..100 {
            pace.record_read(1_000);
        }
        assert_eq!(pace.pause, PAUSE_MAX);
        other.write_all(&[0; 500]).unwrap();
        for _ in 0..100 {
            pace.record_read(1_000);
        }
        assert_eq!(pace.pause, PAUSE_MIN);
        pace.record_read(1_002);
        assert!(pace.pause > PAUSE_MIN);
        pace.record_keepalive();
        assert_eq!(pace.pause, PAUSE_FIRST);
    }
}
