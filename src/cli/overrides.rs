//! A flag for every configuration key: `server.grpc.port` is `--server-grpc-port`.

use crate::config::{Config, Error, Logger};
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches, ValueHint};
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::OnceLock;

/// Where the configuration comes from: `--config`, and a flag a key.
#[derive(Clone, Debug, Default)]
pub(super) struct ConfigArgs {
    file: Option<PathBuf>,
    overrides: Vec<(String, String)>,
    /// Of the configuration that was loaded: a file that is a pipe can be read once.
    logger: OnceLock<Logger>,
}

const FILE: &str = "config";
const HEADING: &str = "Configuration (each also as a key of the file and as TUPLEWATCH_… in the environment)";

fn flag(key: &str) -> String {
    key.replace(['.', '_'], "-")
}

/// What a shell completes a key's value with.
fn hint(key: &str) -> ValueHint {
    match key.rsplit('.').next().unwrap_or_default() {
        "cert" | "key" | "client_ca" | "file" => ValueHint::FilePath,
        "path" => ValueHint::DirPath,
        "host" => ValueHint::Hostname,
        "uri" | "issuer" => ValueHint::Url,
        _ => ValueHint::Other,
    }
}

/// The keys, from the configuration with nothing set.
fn keys() -> Vec<(&'static str, String)> {
    match Config::load(None, [], &[]) {
        Ok(config) => config.effective().entries().map(|(key, value)| (key, value.to_owned())).collect(),
        // The defaults are valid; a test says so.
        Err(_) => Vec::new(),
    }
}

impl ConfigArgs {
    /// Whether a flag set this key.
    pub(super) fn sets(&self, key: &str) -> bool {
        self.overrides.iter().any(|(given, _)| given == key)
    }

    /// Sets a key as if by a flag, where neither flag nor environment nor file sets it.
    #[must_use]
    pub(super) fn with_default(self, key: &str, value: String) -> Self {
        // Where something is wrong with them, `load` says so afterwards.
        let is_given = self.load().is_ok_and(|config| !config.effective().is_default(key));
        if is_given { self } else { self.with(key, value) }
    }

    /// Sets a key as if by a flag, whoever else sets it.
    #[must_use]
    pub(super) fn with(mut self, key: &str, value: String) -> Self {
        self.overrides.retain(|(given, _)| given != key);
        self.overrides.push((key.to_owned(), value));
        self
    }

    /// Reads file, environment and flags.
    ///
    /// # Errors
    /// All that is wrong with any of them.
    pub(super) fn load(&self) -> Result<Config, Error> {
        let config = Config::load(self.file.as_deref(), crate::config::from_env()?, &self.overrides)?;
        self.logger.get_or_init(|| config.logger.clone());
        Ok(config)
    }

    /// What they say of the log, whatever else is wrong with them.
    pub(super) fn logger(&self) -> &Logger {
        let text = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        self.logger
            .get_or_init(|| Config::logger(self.file.as_deref(), std::env::vars_os().filter_map(text), &self.overrides))
    }
}

impl Args for ConfigArgs {
    fn augment_args(command: Command) -> Command {
        let file = Arg::new(FILE)
            .long(FILE)
            .short('c')
            .value_name("FILE")
            .env("TUPLEWATCH_CONFIG")
            .value_parser(clap::value_parser!(PathBuf))
            .value_hint(ValueHint::FilePath)
            .help("Configuration file (YAML)");
        keys().into_iter().fold(command.arg(file), |command, (key, default)| {
            let help = if default.is_empty() || default == "\"\"" {
                key.to_owned()
            } else {
                format!("{key} [default: {default}]")
            };
            command.arg(
                Arg::new(key)
                    .long(flag(key))
                    .value_name("VALUE")
                    .value_hint(hint(key))
                    .help(help)
                    .help_heading(HEADING)
                    .hide_short_help(key != "database.uri"),
            )
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for ConfigArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut args = Self::default();
        args.update_from_arg_matches(matches)?;
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.file = matches.get_one::<PathBuf>(FILE).cloned();
        self.overrides = keys()
            .into_iter()
            .filter_map(|(key, _)| Some((key.to_owned(), matches.get_one::<String>(key)?.clone())))
            .collect();
        Ok(())
    }
}
