//! The low-water mark of the socket, below which arriving bytes do not wake the reader: `SO_RCVLOWAT`, while the session is behind.
//!
//! PostgreSQL sends each row by itself. A faster reader is woken for each row, and has read it before the next one comes. These
//! wake-ups are most of the cost of a large backlog, on both sides. With the mark, many rows come at once.
//!
//! ```text
//!            much within a short time
//!   lowered ──────────────────────────▶ raised ──┐ the mark is reached
//!      ▲                                  │  ▲   │ within WAIT_MAX,
//!      │ little came within WAIT_MAX      │  └───┘ or much came
//!      └──────────────────────────────────┘
//! ```
//!
//! So a session that is not behind never waits, and the last bytes of a backlog wait for [`WAIT_MAX`] at the most. On a TCP socket, also below
//! TLS, under Linux; a Unix socket wakes for every byte, whatever is set.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::time::Instant;

/// The mark while it is raised. Linux may use a lower one, by the size of the socket's buffer.
pub(super) const MARK: usize = 64 << 10;
/// Longest wait below the mark; the timer rounds it up to the next millisecond.
pub(super) const WAIT_MAX: Duration = Duration::from_millis(1);
/// The mark is raised when this many bytes have come within [`WINDOW`]: a thousand rows.
const MUCH: usize = 128 << 10;
const WINDOW: Duration = Duration::from_millis(16);
/// As many within [`WAIT_MAX`] show that the backlog continues.
const STILL_MUCH: usize = MUCH / 16;

/// The mark of one socket.
pub(super) struct LowWater {
    /// None on sockets without such a mark.
    socket: Option<OwnedFd>,
    is_raised: bool,
    /// When the window began, and the bytes that have come since.
    window: Option<(Instant, usize)>,
}

impl LowWater {
    /// Begins lowered. Without a socket it stays so.
    pub(super) const fn new(socket: Option<OwnedFd>) -> Self {
        Self { socket, is_raised: false, window: None }
    }

    /// Whether a read has to be given up after [`WAIT_MAX`], followed by [`LowWater::lower`], and begun again.
    pub(super) const fn is_raised(&self) -> bool {
        self.is_raised
    }

    /// Lowers the mark: the bytes that have come can be read at once.
    pub(super) fn lower(&mut self) {
        self.set(false);
    }

    /// Notes a read of this many bytes. `had_lapsed`: the read came after [`LowWater::lower`].
    pub(super) fn came(&mut self, bytes: usize, had_lapsed: bool, now: Instant) {
        if self.is_raised {
            return;
        }
        let (began, before) = self.window.filter(|(began, _)| now - *began <= WINDOW).unwrap_or((now, 0));
        let sum = before + bytes;
        let is_much = if had_lapsed { bytes >= STILL_MUCH } else { sum >= MUCH };
        self.window = (!is_much).then_some((began, sum));
        if is_much {
            self.set(true);
        }
    }

    fn set(&mut self, is_raised: bool) {
        let Some(socket) = &self.socket else { return };
        match set(socket, if is_raised { MARK } else { 1 }) {
            Ok(()) => self.is_raised = is_raised,
            Err(error) => {
                tracing::debug!(%error, "no low-water mark");
                (self.socket, self.is_raised) = (None, false);
            }
        }
    }
}

/// No maintained crate has a safe form of this option.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "setsockopt with an integer, which is read during the call and not kept")]
fn set(socket: &OwnedFd, bytes: usize) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    let bytes = libc::c_int::try_from(bytes).map_err(io::Error::other)?;
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open as long as `socket` is, and the pointer is to an initialized integer of this length.
    let result = unsafe {
        let value = (&raw const bytes).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, value, length)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(not(target_os = "linux"))]
fn set(_: &OwnedFd, _: usize) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raised_after(reads: &[(u64, usize)]) -> bool {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut mark = LowWater::new(Some(socket.into()));
        let began = Instant::now();
        for (at, bytes) in reads {
            mark.came(*bytes, false, began + Duration::from_micros(*at));
        }
        mark.is_raised()
    }

    #[test]
    fn only_much_data_in_a_short_time_raises_the_mark() {
        let every = |micros: u64, bytes: usize| (0..10_000).map(|n| (n * micros, bytes)).collect::<Vec<_>>();
        assert!(raised_after(&every(5, 150)), "a backlog of small rows");
        assert!(raised_after(&[(0, MUCH)]));
        assert!(!raised_after(&every(50, 300)), "20,000 transactions a second");
        assert!(!raised_after(&[(0, MUCH / 2), (20_000, MUCH / 2)]));
        let transaction = vec![(0, 150); 500];
        assert!(!raised_after(&transaction), "one of 500 rows");
    }

    #[test]
    fn the_mark_stays_raised_while_much_data_arrives() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut mark = LowWater::new(Some(socket.into()));
        let now = Instant::now();
        mark.came(MUCH, false, now);
        for bytes in [STILL_MUCH, STILL_MUCH, STILL_MUCH - 1] {
            assert!(mark.is_raised());
            mark.lower();
            assert!(!mark.is_raised());
            mark.came(bytes, true, now);
        }
        assert!(!mark.is_raised());
        let mut none = LowWater::new(None);
        none.came(MUCH, false, now);
        assert!(!none.is_raised());
    }
}
