//! The threads that serve gRPC, each with a runtime of its own.
//!
//! A connection stays on one thread. So what is released wakes its streams from within that thread, all of them before it runs
//! ([`crate::hub::WakeBatch`]), and it writes once. On a runtime of several threads it would run, and write, as soon as the first
//! stream was woken.

use crate::access::connections::Place;
use crate::api::watch::WatchService;
use crate::hub::primary::Primary;
use crate::thread;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::runtime::Handle;
use tokio::task::JoinSet;

/// Half of the processors, as the other half has the stream from PostgreSQL to go on with.
fn count() -> usize {
    std::thread::available_parallelism().map_or(1, |all| all.get() / 2).max(1)
}

/// Threads, and who is on them.
pub(super) struct Threads<P>(Vec<Thread<P>>);

/// One of them, and its own handle of the service that it has most of.
pub(super) struct Thread<P> {
    pub(super) runtime: Handle,
    pub(super) watch: WatchService<P>,
    connections: Arc<AtomicUsize>,
}

/// A connection, counted as long as this value lives.
pub(super) struct Counted {
    connections: Arc<AtomicUsize>,
    _place: Place,
}

impl<P: Primary + 'static> Threads<P> {
    /// Starts them. What comes back besides tells when one has failed; dropped, it ends them and cuts what they serve.
    ///
    /// # Errors
    /// Where the operating system has no more threads.
    pub(super) fn start(watch: &WatchService<P>) -> io::Result<(Self, impl Future<Output = io::Error> + use<P>)> {
        let (mut threads, mut running) = (Vec::new(), JoinSet::<Infallible>::new());
        for n in 0..count() {
            let (hub, wake_batch) = watch.hub().with_wake_batch();
            let (runtime, waking) = thread::run(format!("grpc-{n}"), wake_batch.run())?;
            threads.push(Thread { runtime, watch: watch.with_hub(hub), connections: Arc::default() });
            running.spawn(waking);
        }
        let failed = async move {
            match running.join_next().await {
                Some(Err(error)) => io::Error::other(error),
                Some(Ok(never)) => match never {},
                None => std::future::pending().await,
            }
        };
        Ok((Self(threads), failed))
    }

    /// The thread that has the fewest connections, for one more.
    pub(super) fn take_on(&self, place: Place) -> Option<(&Thread<P>, Counted)> {
        let thread = self.0.iter().min_by_key(|thread| thread.connections.load(Ordering::Relaxed))?;
        thread.connections.fetch_add(1, Ordering::Relaxed);
        Some((thread, Counted { connections: thread.connections.clone(), _place: place }))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }
}
