//! `tuplewatch completions`: prints a script that completes the command line in a shell.

use super::{Cli, examples};
use anyhow::Context as _;
use clap::CommandFactory as _;
use clap_complete::Shell;
use std::io::Write as _;

#[derive(Debug, clap::Args)]
#[command(after_help = examples::COMPLETIONS)]
pub(super) struct CompletionsArgs {
    /// The shell to print the script for
    shell: Shell,
}

pub(super) fn run(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), env!("CARGO_PKG_NAME"), &mut script);
    // A truncated script is worse than none, so this error is reported.
    std::io::stdout().write_all(&script).context("cannot write the script")
}
