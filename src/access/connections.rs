//! Accepts connections for gRPC and HTTP, and limits their number.
//!
//! The accept loops of the libraries have no limit, and spin if the process has no descriptors left. Here further
//! connections wait in the listen queue of the operating system until an open one is closed.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{SockRef, TcpKeepalive};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch::Receiver;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

/// Connections in addition to one for each stream.
const BESIDE_STREAMS: usize = 1024;
/// Descriptors for other uses: the change log, PostgreSQL, the listeners.
const OTHER_DESCRIPTORS: u64 = 256;
/// The idle time after which a connection is probed, and the interval of the probes.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(20);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
/// The wait after an error of the listener itself, which usually means a lack of descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);

/// The most connections of one protocol: one for each stream and some more, but at most half of the process's
/// descriptors.
pub(crate) fn limit(streams_max: usize) -> usize {
    let descriptors = raise_descriptors();
    let half = usize::try_from(descriptors.saturating_sub(OTHER_DESCRIPTORS) / 2).unwrap_or(usize::MAX).max(1);
    // More than this is enough for many streams: gRPC has up to a hundred on one connection.
    if half < streams_max.min(BESIDE_STREAMS) {
        tracing::warn!(
            "the limit of open files is {descriptors}: at most {half} connections of gRPC and as many of HTTP are \
             accepted at a time, and further ones wait. Raise it (ulimit -n, LimitNOFILE, --ulimit nofile)"
        );
    }
    streams_max.saturating_add(BESIDE_STREAMS).min(Semaphore::MAX_PERMITS).min(half)
}

/// Raises the limit of open files to its maximum, and returns the limit. The initial limit is usually 1024, for
/// programs that call `select`.
fn raise_descriptors() -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_ok();
    // `None` means that there is no limit.
    (if raised { maximum } else { current }).unwrap_or(u64::MAX)
}

/// A bound listener. It is bound before anything else starts, so that a port in use is reported at once.
pub(crate) struct Listener {
    listener: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// Binds host and port; port 0 takes any free one.
    ///
    /// # Errors
    /// The address is in use, or does not belong to this machine.
    pub(crate) async fn bind(host: &str, port: u16) -> std::io::Result<Self> {
        let listener = TcpListener::bind((host, port)).await?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts at most `max` connections at a time until `stop` turns true, and lets `spawn` start a task for each.
    /// Then waits until all have ended. Dropping the future closes them.
    pub(crate) async fn serve(
        self,
        protocol: &'static str,
        max: usize,
        mut stop: Receiver<bool>,
        spawn: impl Fn(&mut JoinSet<()>, TcpStream, Place),
    ) {
        let incoming = Incoming { listener: self.listener, free: Arc::new(Semaphore::new(max)), protocol };
        let mut connections = JoinSet::new();
        loop {
            let (stream, place) = tokio::select! {
                _ = stop.wait_for(|stop| *stop) => break,
                // Forget connections that have ended.
                Some(_) = connections.join_next() => continue,
                accepted = incoming.next() => accepted,
            };
            spawn(&mut connections, stream, place);
        }
        drop(incoming);
        while connections.join_next().await.is_some() {}
    }
}

/// The stream of incoming connections.
struct Incoming {
    listener: TcpListener,
    free: Arc<Semaphore>,
    protocol: &'static str,
}

/// The permit that a connection holds as long as it is open.
pub(crate) type Place = OwnedSemaphorePermit;

impl Incoming {
    /// The next connection, without Nagle's delay, and with keepalive probes that find a dead peer.
    ///
    /// Cancel safe.
    async fn next(&self) -> (TcpStream, Place) {
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_AFTER).with_interval(KEEPALIVE_EVERY);
        loop {
            let Ok(place) = self.free.clone().acquire_owned().await else {
                // The semaphore is never closed.
                return std::future::pending().await;
            };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let prepared =
                        stream.set_nodelay(true).and_then(|()| SockRef::from(&stream).set_tcp_keepalive(&keepalive));
                    match prepared {
                        Ok(()) => return (stream, place),
                        // The peer closed it before it was accepted.
                        Err(error) => tracing::debug!("a connection for {} ended at once: {error}", self.protocol),
                    }
                }
                // An aborted connection may also end here, and delays the others a moment.
                Err(error) => {
                    tracing::warn!("{} cannot accept a connection: {error}", self.protocol);
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    }
}
