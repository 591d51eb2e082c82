//! `tuplewatch completions`: what a shell needs to complete the command line.

use super::{Cli, examples};
use anyhow::Context as _;
use clap::CommandFactory as _;
use clap_complete::Shell;
use std::io::Write as _;

#[derive(Debug, clap::Args)]
#[command(after_help = examples::COMPLETIONS)]
pub(super) struct CompletionsArgs {
    /// Whose script to print
    shell: Shell,
}

pub(super) fn run(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), env!("CARGO_PKG_NAME"), &mut script);
    // A part of a script is worse than none, so whoever wants it is told.
    std::io::stdout().write_all(&script).context("cannot write the script")
}
