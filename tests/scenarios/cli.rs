//! The program as a person meets it: exit codes, and what is said where something is wrong.
//!
//! 0 is success, 1 a failure, 2 a mistake in the command line or the configuration. Whatever is refused leaves everything as
//! it was: the slot, the change log, and the streams of whoever is connected.

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
