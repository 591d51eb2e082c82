//! Starts the runtime, and ends with an exit code. Everything else is in the library.

use clap::Parser;
use std::process::ExitCode;
use std::time::Duration;
use tuplewatch::cli::Cli;

/// What one thread allocates another one frees, with every message. The system's allocator takes a quarter of the processor time
/// for it, this one a fraction.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Longest wait for what is still running in the end.
const CLOSE_MAX: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return cli.fail(&error),
    };
    let code = runtime.block_on(cli.run());
    // A thread may be writing to a pipe that nobody reads, and would for ever.
    runtime.shutdown_timeout(CLOSE_MAX);
    code
}
