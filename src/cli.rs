//! The command line: what can be said, and the subcommands that say it.

mod connection;
mod dev;
mod doctor;
mod overrides;
mod setup;
mod token;
mod watch;

use crate::app;
use crate::config;
use crate::telemetry;
use clap::{Parser, Subcommand};
use overrides::ConfigArgs;
use std::process::ExitCode;

/// A change feed for relationship-based authorization data in PostgreSQL.
///
/// Tails one logical replication slot, turns committed rows into tuple changes, and streams them over gRPC to any number of
/// subscribers, each of which can come back with its last snap token and get exactly the rest.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Stream changes to subscribers
    Serve {
        #[command(flatten)]
        config: ConfigArgs,
        /// Delete the change log first: its history is lost, and tokens from before are refused
        #[arg(long)]
        reset_log: bool,
    },
    /// Prepare PostgreSQL: tables, publication, replication slot. Does only what is missing
    Setup {
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        args: setup::SetupArgs,
    },
    /// Say what is wrong, what it means, and what repairs it: the server, the slot, the change log. Changes nothing
    Doctor {
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        args: doctor::DoctorArgs,
    },
    /// Drop the replication slot and the publication, so that nothing keeps WAL for us. Tables stay
    Teardown {
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Try it: start a private PostgreSQL, prepare it, and serve. Ctrl-C stops all of it, and the data stays
    Dev {
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        args: dev::DevArgs,
    },
    /// Print a tenant's changes as they come; resumes by itself
    Watch(watch::WatchArgs),
    /// Explain a snap token
    Token(token::TokenArgs),
    /// Print the configuration in force, with the origin of every value and without secrets
    Config {
        #[command(flatten)]
        config: ConfigArgs,
    },
}

/// Exit codes: success.
const OK: u8 = 0;
/// Something failed.
const FAILURE: u8 = 1;
/// The command line or the configuration is wrong.
const USAGE: u8 = 2;

/// Runs the program; its exit code.
pub async fn run(cli: Cli) -> ExitCode {
    // Two implementations are in the tree, so that rustls does not choose; where one is installed already, it stays.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let ended = match cli.command {
        Command::Serve { config, reset_log } => serve(&config, reset_log).await,
        Command::Setup { config, args } => setup::setup(&config, &args).await,
        Command::Doctor { config, args } => match doctor::run(&config, &args).await {
            // What is wrong was said.
            Ok(doctor::Verdict::Ill) => return FAILURE.into(),
            Ok(doctor::Verdict::Well) => Ok(()),
            Err(error) => Err(error),
        },
        Command::Teardown { config } => setup::teardown(&config).await,
        Command::Dev { config, args } => Box::pin(dev::run(config, args)).await,
        Command::Watch(args) => watch::run(args).await,
        Command::Token(args) => {
            token::run(&args);
            Ok(())
        }
        Command::Config { config } => print_config(&config),
    };
    match ended {
        Ok(()) => OK.into(),
        Err(error) => {
            say_error(&describe(error.as_ref()));
            let misconfigured = error.is::<config::Error>() || error.is::<app::Misconfigured>();
            if misconfigured { USAGE.into() } else { FAILURE.into() }
        }
    }
}

/// An error with its causes, but for those that it tells itself.
fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

async fn serve(config: &ConfigArgs, reset_log: bool) -> anyhow::Result<()> {
    let config = config.load()?;
    config.require_database_uri()?;
    telemetry::init(&config.logger);
    app::serve(&config, reset_log, stop_signal()).await
}

fn print_config(config: &ConfigArgs) -> anyhow::Result<()> {
    say(&config.load()?.effective().to_string());
    Ok(())
}

/// Completes at SIGINT or SIGTERM.
async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
        }
        Err(error) => {
            tracing::warn!("SIGTERM cannot be caught: {error}");
            let _ = tokio::signal::ctrl_c().await;
        }
    }
}

/// Prints what was asked for. Whoever reads it may be gone, like `head`.
fn say(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
}

/// Prints what went wrong.
fn say_error(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "tuplewatch: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_key_has_a_flag() {
        let cli = Cli::try_parse_from([
            "tuplewatch",
            "config",
            "--server-grpc-port",
            "7",
            "--service-watch-enabled",
            "false",
        ]);
        let Command::Config { config } = cli.unwrap().command else { panic!() };
        let config = config.with_default("server.grpc.port", "8".into()).with_default("replication.slot", "s".into());
        let config = config.load().unwrap();
        assert_eq!(config.server.grpc.port, 7);
        assert!(!config.service.watch.enabled);
        assert_eq!(config.replication.slot, "s");
    }
}
