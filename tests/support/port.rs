//! Ports of loopback for servers that stop and start again.
//!
//! Linux takes the local ends of outgoing connections from 32768 on, macOS from 49152 on. A port from there could be taken while its
//! server is down, so these lie below.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Range;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Below the ports of the clusters, which `dev_postgres` chooses.
const PORTS: Range<u16> = 10_000..15_000;

/// An address that nobody listens on, and that no other test of this process gets.
pub(crate) fn free_address() -> SocketAddr {
    // Begins anywhere, because other test processes may run.
    static NEXT: LazyLock<AtomicUsize> = LazyLock::new(|| AtomicUsize::new(fastrand::usize(..PORTS.len())));
    loop {
        let at = NEXT.fetch_add(1, Ordering::Relaxed) % PORTS.len();
        let port = PORTS.start + u16::try_from(at).unwrap();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}
