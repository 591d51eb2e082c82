//! Connections of both edges: how they are accepted, and how many at a time.
//!
//! The accept loops of the libraries know no limit, and spin where the process has no descriptors left. Here the next ones wait to
//! be accepted, in the listen queue of the operating system, until one of those that are open is closed.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{SockRef, TcpKeepalive};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch::Receiver;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

/// Connections beside those that have a stream.
const BESIDE_STREAMS: usize = 1024;
/// Descriptors that are not for connections: the change log, PostgreSQL, the listeners.
const OTHER_DESCRIPTORS: u64 = 256;
/// How long a connection may be quiet, and how long and how often the other side is then asked.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(20);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
/// After an error of the listener itself, which is mostly a lack of descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);

/// Most connections of one edge: one for each stream and some more, or half of what the process may have open.
pub fn limit(streams_max: usize) -> usize {
    let descriptors = raise_descriptors();
    let half = usize::try_from(descriptors.saturating_sub(OTHER_DESCRIPTORS) / 2).unwrap_or(usize::MAX).max(1);
    // More of them are enough for many streams: gRPC has a hundred on one connection.
    if half < streams_max.min(BESIDE_STREAMS) {
        tracing::warn!(
            "the limit of open files is {descriptors}: no more than {half} connections of gRPC, and as many of HTTP, are \
             accepted, and the next ones wait. Raise it (ulimit -n, LimitNOFILE, --ulimit nofile)"
        );
    }
    streams_max.saturating_add(BESIDE_STREAMS).min(Semaphore::MAX_PERMITS).min(half)
}

/// Has the process open as much as it is allowed to ask for, and returns how much that is. What it starts with is mostly 1024, for
/// the sake of programs that call `select`.
fn raise_descriptors() -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_ok();
    // No number: there is no limit.
    (if raised { maximum } else { current }).unwrap_or(u64::MAX)
}

/// A listener: bound before anything else starts, so that a taken port is said at once.
pub struct Listener {
    listener: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// Binds host and port; port 0 takes any.
    ///
    /// # Errors
    /// Where the address is taken or not ours.
    pub async fn bind(host: &str, port: u16) -> std::io::Result<Self> {
        let listener = TcpListener::bind((host, port)).await?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts at most `max` connections at a time, and has each served by what `spawn` makes a task of, until `stop` turns
    /// true; then waits until all have ended. Dropped before, it cuts them.
    pub async fn serve(
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
                // What has ended is forgotten.
                Some(_) = connections.join_next() => continue,
                accepted = incoming.next() => accepted,
            };
            spawn(&mut connections, stream, place);
        }
        drop(incoming);
        while connections.join_next().await.is_some() {}
    }
}

/// Connections as they come.
struct Incoming {
    listener: TcpListener,
    free: Arc<Semaphore>,
    protocol: &'static str,
}

/// What a connection holds for as long as it lasts.
pub type Place = OwnedSemaphorePermit;

impl Incoming {
    /// The next connection: without delay, and found out about where the other side is gone without a word.
    ///
    /// Cancel safe.
    async fn next(&self) -> (TcpStream, Place) {
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_AFTER).with_interval(KEEPALIVE_EVERY);
        loop {
            let Ok(place) = self.free.clone().acquire_owned().await else {
                // Never closed.
                return std::future::pending().await;
            };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let prepared =
                        stream.set_nodelay(true).and_then(|()| SockRef::from(&stream).set_tcp_keepalive(&keepalive));
                    match prepared {
                        Ok(()) => return (stream, place),
                        // It was gone before it was accepted.
                        Err(error) => tracing::debug!("a connection for {} ended at once: {error}", self.protocol),
                    }
                }
                // One that was gone before it was accepted may also end here, and costs the others a moment.
                Err(error) => {
                    tracing::warn!("{} cannot accept a connection: {error}", self.protocol);
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    }
}
