//! Work that has a thread to itself, with a runtime of that one thread.
//!
//! Tasks that hand much to each other do so without waking anybody else: the session and its reports, the streams of a connection
//! and what writes them.

use std::io;
use tokio::runtime::{self, Handle};
use tokio::sync::oneshot;

/// Runs a future on a thread of this name; what it spawns belongs to that thread as well, and so does what is spawned through the
/// handle. The other part of what comes back is the result to wait for. Dropped before, it cuts the work; it panics where the
/// work did.
///
/// # Errors
/// Where the operating system has no more threads or descriptors.
pub fn run<T: Send + 'static>(
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
            // Whoever started it may be gone.
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
