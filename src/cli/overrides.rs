//! A flag for every configuration key: `server.grpc.port` is `--server-grpc-port`.
//!
//! The flags are generated from the keys of the configuration, so a new key needs no code here.

use crate::config::{Config, Error, Logger};
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches, ValueHint};
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::OnceLock;

/// The sources of the configuration on the command line: `--config`, and a flag for each key.
#[derive(Clone, Debug, Default)]
pub(super) struct ConfigArgs {
    file: Option<PathBuf>,
    overrides: Vec<(String, String)>,
    /// The section `logger` of the configuration that was loaded. It is kept because a file that is a pipe can be read
    /// only once.
    logger: OnceLock<Logger>,
}

const FILE: &str = "config";
const HEADING: &str = "Configuration (each flag is also a key of the file, and TUPLEWATCH_… in the environment)";

fn flag(key: &str) -> String {
    key.replace(['.', '_'], "-")
}

/// The completion hint for the value of a key.
fn hint(key: &str) -> ValueHint {
    match key.rsplit('.').next().unwrap_or_default() {
        "cert" | "key" | "client_ca" | "file" => ValueHint::FilePath,
        "path" => ValueHint::DirPath,
        "host" => ValueHint::Hostname,
        "uri" | "issuer" => ValueHint::Url,
        _ => ValueHint::Other,
    }
}

/// All keys with their defaults, from a configuration without sources.
fn keys() -> Vec<(&'static str, String)> {
    match Config::load(None, [], &[]) {
        Ok(config) => config.effective().entries().map(|(key, value)| (key, value.to_owned())).collect(),
        // The defaults are valid, which a test checks.
        Err(_) => Vec::new(),
    }
}

impl ConfigArgs {
    /// Whether a flag set this key.
    pub(super) fn sets(&self, key: &str) -> bool {
        self.overrides.iter().any(|(set_key, _)| set_key == key)
    }

    /// Sets a key as if by a flag, unless a flag, the environment or the file sets it.
    #[must_use]
    pub(super) fn with_default(self, key: &str, value: String) -> Self {
        // If a source has an error, a later `load` reports it.
        let is_set = self.load().is_ok_and(|config| !config.effective().is_default(key));
        if is_set { self } else { self.with(key, value) }
    }

    /// Sets a key as if by a flag, overriding all other sources.
    #[must_use]
    pub(super) fn with(mut self, key: &str, value: String) -> Self {
        self.overrides.retain(|(set_key, _)| set_key != key);
        self.overrides.push((key.to_owned(), value));
        self
    }

    /// Reads file, environment and flags.
    ///
    /// # Errors
    /// Lists all errors of these sources.
    pub(super) fn load(&self) -> Result<Config, Error> {
        let config = Config::load(self.file.as_deref(), crate::config::from_env()?, &self.overrides)?;
        self.logger.get_or_init(|| config.logger.clone());
        Ok(config)
    }

    /// The section `logger`, even if the rest of the configuration is wrong.
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
