//! Starts the runtime, and ends with an exit code. Everything else is in the library.

use clap::Parser;
use std::process::ExitCode;
use tuplewatch::cli::{self, Cli};

#[tokio::main]
async fn main() -> ExitCode {
    cli::run(Cli::parse()).await
}
