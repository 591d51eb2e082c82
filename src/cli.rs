//! The command line: what can be said, and the subcommands that say it.

mod completions;
mod connection;
mod dev;
mod doctor;
mod examples;
mod failure;
mod health;
mod overrides;
mod setup;
mod telemetry;
mod terminal;
mod token;
mod watch;

use crate::app;
use crate::config::{self, LogFormat};
use clap::{Parser, Subcommand};
use overrides::ConfigArgs;
use std::process::ExitCode;
use std::time::Duration;
use terminal::Color;
use tokio::runtime::Runtime;

/// A change feed for relationship-based authorization data in PostgreSQL.
///
/// Tails one logical replication slot, turns committed rows into tuple changes, and streams them over gRPC to any number of
/// subscribers, each of which can come back with its last snap token and get exactly the rest.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, max_term_width = 110, after_help = examples::ALL)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// When to colour output: auto (on a terminal, unless NO_COLOR is set), always, or never
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "WHEN",
        global = true,
        hide_possible_values = true,
        hide_default_value = true
    )]
    color: Color,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Stream changes to subscribers
    #[command(after_help = examples::SERVE)]
    Serve {
        #[command(flatten)]
        config: ConfigArgs,
        /// Delete the change log first: its history is lost, and tokens from before are refused
        #[arg(long)]
        reset_log: bool,
    },
    /// Prepare PostgreSQL: tables, publication, replication slot. Does only what is missing
    #[command(after_help = examples::SETUP)]
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
    #[command(after_help = examples::TEARDOWN)]
    Teardown {
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Try it: start a private PostgreSQL, prepare it, and serve. Ctrl-C stops all of it, and the data stays
    // It has a database of its own.
    #[command(after_help = examples::DEV, mut_arg("database.uri", |arg| arg.hide(true)))]
    Dev {
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        args: dev::DevArgs,
    },
    /// Print a tenant's changes as they come; resumes by itself
    Watch(watch::WatchArgs),
    /// Ask a running server whether it serves, or whether it is alive
    Health(health::HealthArgs),
    /// Explain a snap token
    Token(token::TokenArgs),
    /// Print the configuration in force, with the origin of every value and without secrets
    #[command(after_help = examples::CONFIG)]
    Config {
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Print a script that completes this command line in a shell
    Completions(completions::CompletionsArgs),
}

/// Exit codes: success.
const OK: u8 = 0;
/// Something failed.
const FAILURE: u8 = 1;
/// The command line or the configuration is wrong.
const USAGE: u8 = 2;

/// Longest wait for what is still running in the end.
const CLOSE_MAX: Duration = Duration::from_secs(1);

/// The whole program: reads the command line, starts the runtime and runs the command; its exit code.
///
/// It is neither async nor generic, and has to stay so: the bodies of async functions are compiled where they are first polled. In
/// the binary that would be nearly all of the program, with every generic function that the library has already.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return cli.fail(&error),
    };
    let code = runtime.block_on(cli.run());
    // A thread may be writing to a pipe that nobody reads, and would for ever.
    runtime.shutdown_timeout(CLOSE_MAX);
    code
}

impl Cli {
    /// Runs the command; its exit code.
    async fn run(self) -> ExitCode {
        // Named here: a second implementation in the tree would leave rustls without a choice. One that is installed already stays.
        let _ = rustls::crypto::ring::default_provider().install_default();
        self.color.apply();
        let ended = match &self.command {
            Command::Serve { config, reset_log } => serve(config, *reset_log).await,
            Command::Setup { config, args } => setup::setup(config, args).await,
            Command::Doctor { config, args } => match doctor::run(config, args).await {
                // What is wrong was said.
                Ok(doctor::Verdict::Ill) => return FAILURE.into(),
                Ok(doctor::Verdict::Well) => Ok(()),
                Err(error) => Err(error),
            },
            Command::Teardown { config } => setup::teardown(config).await,
            Command::Dev { config, args } => Box::pin(dev::run(config.clone(), args)).await,
            Command::Watch(args) => watch::run(args).await,
            Command::Health(args) => health::run(args).await,
            Command::Token(args) => {
                token::run(args);
                Ok(())
            }
            Command::Config { config } => print_config(config),
            Command::Completions(args) => completions::run(args),
        };
        match ended {
            Ok(()) => OK.into(),
            Err(error) => {
                self.say_last(&describe(error.as_ref()));
                let misconfigured = error.is::<config::Error>() || error.is::<app::Misconfigured>();
                if misconfigured { USAGE.into() } else { FAILURE.into() }
            }
        }
    }

    /// Ends before it has begun, for want of what the system should give; the exit code.
    fn fail(&self, error: &std::io::Error) -> ExitCode {
        self.say_last(&format!("cannot start: {error}"));
        FAILURE.into()
    }

    /// Says the error that the command ends with, as its configuration has the log, also where it is the configuration that is wrong: a
    /// machine that reads JSON can read this line, too.
    fn say_last(&self, text: &str) {
        let logger = match &self.command {
            Command::Serve { config, .. }
            | Command::Setup { config, .. }
            | Command::Doctor { config, .. }
            | Command::Teardown { config }
            | Command::Dev { config, .. }
            | Command::Config { config } => config.logger(),
            Command::Watch(_) | Command::Health(_) | Command::Token(_) | Command::Completions(_) => {
                return say_error(text);
            }
        };
        match logger.format {
            LogFormat::Text => say_error(text),
            LogFormat::Json => {
                telemetry::init(logger);
                tracing::error!("{text}");
            }
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

/// Completes at SIGINT or SIGTERM. They are caught from now on, and not from when it is first polled.
fn stop_signal() -> impl Future<Output = ()> {
    use tokio::signal::unix::{Signal, SignalKind, signal};
    let catch = |kind, name| signal(kind).inspect_err(|error| tracing::warn!("{name} cannot be caught: {error}")).ok();
    let (interrupt, terminate) = (catch(SignalKind::interrupt(), "SIGINT"), catch(SignalKind::terminate(), "SIGTERM"));
    let next = async |signal: Option<Signal>| match signal {
        Some(mut signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    };
    async move {
        tokio::select! {
            () = next(interrupt) => {}
            () = next(terminate) => {}
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

    /// The commands of a help text: the lines that begin with two spaces and the program's name, without shell syntax.
    fn commands(help: &str) -> impl Iterator<Item = Vec<&str>> {
        help.lines().filter(|line| line.starts_with("  tuplewatch ")).map(|line| {
            let words = line.split_whitespace().take_while(|word| !["#", "|", ">", ">>"].contains(word));
            words.map(|word| word.trim_matches('\'')).collect()
        })
    }

    #[test]
    fn every_subcommand_shows_examples_that_parse() {
        let command = Cli::command();
        for command in command.get_subcommands().chain([&command]) {
            let name = command.get_name();
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.starts_with("Examples:\n"), "{name} has no examples");
            assert!(commands(&help).count() > 0, "{name} has no examples");
            for words in commands(&help) {
                assert!(name == "tuplewatch" || words[1] == name, "{name} has the example {words:?}");
                Cli::try_parse_from(&words).unwrap_or_else(|error| panic!("{words:?}: {error}"));
            }
        }
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
