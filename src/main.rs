//! Starts the runtime, and ends with an exit code. Everything else is in the library.

use clap::Parser;
use std::process::ExitCode;
use tuplewatch::cli::{self, Cli};

/// What one thread allocates another one frees, with every message. The system's allocator takes a quarter of the processor time
/// for it, this one a fraction.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> ExitCode {
    cli::run(Cli::parse()).await
}
