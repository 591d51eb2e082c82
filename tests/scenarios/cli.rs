//! The command line: exit codes and messages.
//!
//! 0 is success, 1 a failure, 2 a mistake in the command line or the configuration. A refused command changes nothing: neither the slot,
//! nor the change log, nor the streams of other clients.

pub(crate) mod process;

mod changelog;
mod configuration;
mod documents;
mod health;
mod logs;
mod mapping;
mod obstacles;
pub(crate) mod prerequisites;
mod requests;
pub(crate) mod setup;
mod shell;
mod terminal;
pub(crate) mod watch;
