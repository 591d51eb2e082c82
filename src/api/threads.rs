//! The threads that serve the connections of a protocol, each with a runtime of its own.
//!
//! A connection stays on one thread. So what is released wakes its streams from within that thread, all of them before it runs
//! ([`crate::hub::WakeBatch`]), and it writes once. On a runtime of several threads it would run, and write, as soon as the first
//! stream was woken.
//!
//! gRPC and HTTP have threads of their own, and neither is on the runtime that releases changes and asks PostgreSQL: what is encoded for
//! the readers of one protocol delays nothing else.

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

/// Half of the processors for each protocol, as the stream from PostgreSQL goes on meanwhile.
fn count() -> usize {
    std::thread::available_parallelism().map_or(1, |all| all.get() / 2).max(1)
}

/// Accepts at most `connections_max` connections at a time, until `stop` turns true and all have ended. Dropped before, it cuts them.
/// `connector` makes for each thread, and its own handle of the hub, what serves a connection there.
///
/// # Errors
/// Where the operating system has no more threads, or one has failed.
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
        let Some((thread, held)) = threads.take_on(place) else { return };
        let connect = thread.connect.clone();
        // The runtime that accepted it gives it up; that of the thread takes it on.
        let stream = stream.into_std();
        let serving = async move {
            let served = async move { connect(TcpStream::from_std(stream?)?).await };
            if let Err(error) = served.await {
                tracing::debug!("a connection of {protocol} ended: {error}");
            }
            drop(held);
        };
        connections.spawn_on(serving, &thread.runtime);
    };
    tokio::select! {
        () = listener.serve(protocol, connections_max, stop, spawn) => Ok(()),
        error = first_failure(running) => Err(error),
    }
}

/// Threads, and who is on them.
struct Threads<C>(Vec<Thread<C>>);

struct Thread<C> {
    runtime: Handle,
    connect: C,
    connections: Arc<AtomicUsize>,
}

/// A connection, counted as long as this value lives.
struct Counted {
    connections: Arc<AtomicUsize>,
    _place: Place,
}

impl<C> Threads<C> {
    /// Starts them. What comes back besides ends where one has failed; dropped, it ends them and cuts what they serve.
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

    /// The thread that has the fewest connections, for one more.
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
