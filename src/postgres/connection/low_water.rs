//! The low-water mark of the socket (`SO_RCVLOWAT`), below which received bytes do not wake the reader. It is raised
//! while the session is behind.
//!
//! PostgreSQL sends each row by itself. A reader that is faster than the server is woken for each row, and these
//! wake-ups are most of the cost of a large backlog, on both sides. With the mark, one wake-up brings many rows.
//!
//! ```text
//!            much within a short time
//!   lowered ──────────────────────────▶ raised ──┐ the mark is reached
//!      ▲                                  │  ▲   │ within WAIT_MAX,
//!      │ little came within WAIT_MAX      │  └───┘ or much came
//!      └──────────────────────────────────┘
//! ```
//!
//! So a session that is not behind never waits, and the last bytes of a backlog wait for at most [`WAIT_MAX`]. This
//! works on TCP sockets under Linux, also below TLS. A Unix socket wakes for every byte, whatever the mark.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::time::Instant;

/// The raised mark. Linux may use a lower one, depending on the size of the socket's buffer.
pub(super) const MARK: usize = 64 << 10;
/// The longest wait below the mark. The timer rounds it up to the next millisecond.
pub(super) const WAIT_MAX: Duration = Duration::from_millis(1);
/// The bytes within [`WINDOW`] that raise the mark: a thousand rows.
const MUCH: usize = 128 << 10;
const WINDOW: Duration = Duration::from_millis(16);
/// The bytes within [`WAIT_MAX`] that show that the backlog continues.
const STILL_MUCH: usize = MUCH / 16;

/// The mark of one socket.
pub(super) struct LowWater {
    /// `None` on sockets without such a mark.
    socket: Option<OwnedFd>,
    is_raised: bool,
    /// The begin of the window, and the bytes received since then.
    window: Option<(Instant, usize)>,
}

impl LowWater {
    /// Begins lowered. Without a socket it stays lowered.
    pub(super) const fn new(socket: Option<OwnedFd>) -> Self {
        Self { socket, is_raised: false, window: None }
    }

    /// Whether a read must be interrupted after [`WAIT_MAX`], and repeated after [`LowWater::lower`].
    pub(super) const fn is_raised(&self) -> bool {
        self.is_raised
    }

    /// Lowers the mark, so that all received bytes can be read at once.
    pub(super) fn lower(&mut self) {
        self.set(false);
    }

    /// Records a read of this many bytes. `had_lapsed`: the read followed a [`LowWater::lower`].
    pub(super) fn record_read(&mut self, bytes: usize, had_lapsed: bool, now: Instant) {
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

/// No maintained crate has a safe interface to this option.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "setsockopt with an integer, which is read during the call and not kept")]
fn set(socket: &OwnedFd, bytes: usize) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    let bytes = libc::c_int::try_from(bytes).map_err(io::Error::other)?;
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open while `socket` lives, and the pointer is valid for an initialized integer of this
    // length.
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
            mark.record_read(*bytes, false, began + Duration::from_micros(*at));
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
        mark.record_read(MUCH, false, now);
        for bytes in [STILL_MUCH, STILL_MUCH, STILL_MUCH - 1] {
            assert!(mark.is_raised());
            mark.lower();
            assert!(!mark.is_raised());
            mark.record_read(bytes, true, now);
        }
        assert!(!mark.is_raised());
        let mut none = LowWater::new(None);
        none.record_read(MUCH, false, now);
        assert!(!none.is_raised());
    }
}
