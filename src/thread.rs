//! Runs a future on a thread of its own, with a single-threaded runtime.
//!
//! Tasks that exchange much data share such a thread, because a task that wakes another one on the same thread costs no
//! system call: the replication session with its reports, the releaser with its connection, and the streams of one
//! connection with their writer. The recorder has one too, because it waits for the disk.

use std::io;
use tokio::runtime::{self, Handle};
use tokio::sync::oneshot;

/// Runs `work` on a new thread called `name`.
///
/// Tasks that `work` spawns, and tasks spawned through the returned handle, run on that thread too. The returned future
/// completes with the output of `work`. Dropping it cancels the work. It panics if the work panicked.
///
/// # Errors
/// The operating system has no more threads or descriptors.
pub(crate) fn run<T: Send + 'static>(
    name: String,
    work: impl Future<Output = T> + Send + 'static,
) -> io::Result<(Handle, impl Future<Output = T> + Send + 'static)> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    let (result, ended) = oneshot::channel();
    let (waiting, is_dropped) = oneshot::channel::<()>();
    let run = move || {
        let output = runtime.block_on(async {
            tokio::select! {
                output = work => Some(output),
                _ = is_dropped => None,
            }
        });
        if let Some(output) = output {
            // The receiver may have been dropped.
            let _ = result.send(output);
        }
    };
    std::thread::Builder::new().name(name.clone()).spawn(run)?;
    let result = async move {
        let _waiting = waiting;
        match ended.await {
            Ok(output) => output,
            Err(_) => panic!("thread {name} panicked"),
        }
    };
    Ok((handle, result))
}
