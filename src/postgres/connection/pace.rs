//! The pace of the reader: while it is behind, it pauses between reads.
//!
//! PostgreSQL sends each row by itself. A reader that is faster than the server is woken for each row, and the server's
//! kernel sends each row as a segment of its own. Both cost more than the row itself. With pauses, one read brings many
//! rows.
//!
//! ```text
//!               MUCH without a keepalive
//!   caught up ───────────────────────────▶ behind: pause, read, pause, read, …
//!       ▲                                     │
//!       └───────────── a keepalive ───────────┘
//! ```
//!
//! A walsender sends a keepalive before it waits for more WAL (`WalSndWaitForWal` in PostgreSQL's source), so a reader
//! that is not behind never pauses, and the keepalive after the last row of a backlog ends the pauses. No byte waits
//! longer than [`PAUSE_MAX`].
//!
//! From a server on the same machine the reader also has a small receive window. During a pause the window is full. The
//! server continues to write into its send buffer, where the kernel joins the rows, and this halves the walsender's
//! work. The pause must not be so long that the send buffer is full too, nor so short that the window is not: see
//! [`Pace::record_read`]. Over a network, a small window would limit the throughput to one window in a round trip. A
//! Unix socket joins nothing, and its send buffer is soon full, so there the reader does not pause.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::net::{TcpSocket, TcpStream};

/// The bytes since the last keepalive that show that the reader is behind: some hundred rows.
const MUCH: usize = 64 << 10;
/// The size of the receive buffer for a server on the same machine. Linux doubles it.
const BUFFER: u32 = 16 << 10;
/// A shorter pause is left out, because the timer is not more exact.
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

/// Opens the connection of a walsender, with a small receive window if the server is on the same machine. The window
/// must be small from the begin: a server sends no segment that is longer than half of the largest window it has seen.
///
/// # Errors
/// Those of the operating system.
pub(super) async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if cfg!(target_os = "linux") && address.ip().to_canonical().is_loopback() {
        socket.set_recv_buffer_size(BUFFER)?;
    }
    socket.connect(address).await
}

impl Pace {
    /// `socket`: of a TCP connection.
    pub(super) const fn new(socket: Option<OwnedFd>) -> Self {
        Self { socket, since_keepalive: 0, pause: PAUSE_FIRST, is_over: true }
    }

    /// Pauses once after each read, if the reader is behind. Blocks the thread: during a timer of the runtime, every
    /// segment would wake the thread.
    pub(super) fn keep(&mut self) {
        let is_over = std::mem::replace(&mut self.is_over, true);
        if !is_over && self.is_behind() && self.pause > PAUSE_MIN {
            std::thread::sleep(self.pause);
        }
    }

    /// Records a read of this many bytes, and adapts the pause.
    ///
    /// A read opens the window, which the rows in the send buffer fill again at once. If they bring half as much as was
    /// read, or more, the server has enough of them, and the next pause is a little shorter. Otherwise it is longer, by
    /// twice as much: too many rows in the send buffer cost nothing yet.
    pub(super) fn record_read(&mut self, bytes: usize) {
        if self.is_behind() {
            let has_more = self.waiting() >= bytes / 2;
            let next = if has_more { self.pause - self.pause / 16 } else { self.pause + self.pause / 8 };
            self.pause = next.clamp(PAUSE_MIN, PAUSE_MAX);
        }
        self.since_keepalive = self.since_keepalive.saturating_add(bytes);
        self.is_over = false;
    }

    /// Records a keepalive of the server.
    pub(super) const fn record_keepalive(&mut self) {
        (self.since_keepalive, self.pause) = (0, PAUSE_FIRST);
    }

    const fn is_behind(&self) -> bool {
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
    fn a_reader_is_behind_after_much_without_a_keepalive() {
        let (mut pace, _other) = pace();
        for _ in 0..1_000 {
            pace.record_read(MUCH - 1);
            assert!(!pace.is_behind());
            pace.record_keepalive();
        }
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
