//! The binary: it chooses the allocator of the process. Everything else is in the library.

use std::process::ExitCode;

/// Every message is allocated on one thread and freed on another. The system's allocator spends a quarter of the
/// processor time on that, mimalloc a fraction.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    tuplewatch::cli::main()
}
