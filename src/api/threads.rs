//! The threads that serve the connections of a protocol, each with its own runtime.
//!
//! A connection stays on one thread. When a batch is released, the thread itself wakes all its streams before it runs
//! any of them ([`crate::hub::WakeBatch`]), so a connection writes once. A runtime with several threads would run the
//! connection, and write, as soon as it wakes the first stream.
//!
//! gRPC and HTTP have separate threads, and neither uses the runtime of the releaser and of SQL. So encoding for the
//! readers of one protocol delays nothing else.

use crate::access::connections::{Listener, Place};
use crate::hub::Hub;
use crate::thread;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::watch::Receiver;
use tokio::task::JoinSet;

/// Half of the processors for each protocol, because the replication session needs processor time as well.
fn count() -> usize {
    std::thread::available_parallelism().map_or(1, |all| all.get() / 2).max(1)
}

/// Accepts at most `connections_max` connections at a time, until `stop` turns true and all have ended. Dropping the
/// future closes all connections. For each thread, `connector` receives the thread's handle of the hub, and returns the
/// service of its connections.
///
/// # Errors
/// If the operating system refuses a thread, or a thread fails.
pub(super) async fn serve<C, F>(
    listener: Listener,
    protocol: &'static str,
    connections_max: usize,
    stop: Receiver<bool>,
    hub: &Hub,
    connector: impl Fn(Hub) -> C,
) -> io::Result<()>
where
    C: Fn(TcpStream) -> F + Clone + Send + 'static,
    F: Future<Output = io::Result<()>> + Send,
{
    let (threads, running) = Threads::start(protocol, hub, connector)?;
    let spawn = |connections: &mut JoinSet<()>, stream: TcpStream, place| {
        let Some((thread, counted)) = threads.take_on(place) else { return };
        let connect = thread.connect.clone();
        // The runtime that accepted the connection releases it, and the runtime of the thread registers it.
        let stream = stream.into_std();
        let serving = async move {
            let served = async move { connect(TcpStream::from_std(stream?)?).await };
            if let Err(error) = served.await {
                tracing::debug!("a connection of {protocol} ended: {error}");
            }
            drop(counted);
        };
        connections.spawn_on(serving, &thread.runtime);
    };
    tokio::select! {
        () = listener.serve(protocol, connections_max, stop, spawn) => Ok(()),
        error = first_failure(running) => Err(error),
    }
}

/// The threads, with the number of connections on each.
struct Threads<C>(Vec<Thread<C>>);

struct Thread<C> {
    runtime: Handle,
    connect: C,
    connections: Arc<AtomicUsize>,
}

/// Counts a connection until it is dropped.
struct Counted {
    connections: Arc<AtomicUsize>,
    _place: Place,
}

impl<C> Threads<C> {
    /// Starts the threads. A task of the returned set ends only if a thread fails. Dropping the set ends the threads
    /// and closes their connections.
    fn start(protocol: &str, hub: &Hub, connector: impl Fn(Hub) -> C) -> io::Result<(Self, JoinSet<Infallible>)> {
        let (mut threads, mut running) = (Vec::new(), JoinSet::new());
        for n in 0..count() {
            let (hub, wake_batch) = hub.with_wake_batch();
            let (runtime, waking) = thread::run(format!("{}-{n}", protocol.to_lowercase()), wake_batch.run())?;
            threads.push(Thread { runtime, connect: connector(hub), connections: Arc::default() });
            running.spawn(waking);
        }
        Ok((Self(threads), running))
    }

    /// Chooses the thread with the fewest connections, and counts one more.
    fn take_on(&self, place: Place) -> Option<(&Thread<C>, Counted)> {
        let thread = self.0.iter().min_by_key(|thread| thread.connections.load(Ordering::Relaxed))?;
        thread.connections.fetch_add(1, Ordering::Relaxed);
        Some((thread, Counted { connections: thread.connections.clone(), _place: place }))
    }
}

async fn first_failure(mut running: JoinSet<Infallible>) -> io::Error {
    match running.join_next().await {
        Some(Err(error)) => io::Error::other(error),
        Some(Ok(never)) => match never {},
        None => std::future::pending().await,
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }
}
