//! A private PostgreSQL for `tuplewatch dev`, and for this project's own tests.
//!
//! Users should not have to reconfigure and restart a server to try tuplewatch (`wal_level` needs a restart). So `dev`
//! creates a cluster of its own with the PostgreSQL programs on the machine, and never touches another one.
//!
//! ```text
//! Installation::find ──▶ Cluster::create_or_open ──▶ start … stop | kill_9 | drop
//!   which programs         lock, initdb, settings      the postmaster, our child
//! ```
//!
//! The directory of a cluster holds all of its files, so deleting the directory deletes the cluster:
//!
//! ```text
//! DATA_DIR/cluster.lock    locked as long as a process uses the cluster
//!          settings.conf   tuplewatch's own, rewritten at every open; included from pgdata/postgresql.conf
//!          port            chosen once, kept from then on
//!          postgres.log    what the postmaster wrote, across restarts
//!          pgdata/         PostgreSQL's own data directory
//!          pgdata.new/     an initdb at work, or one that was interrupted
//! ```
//!
//! # Invariants
//!
//! - `pgdata` is complete or absent. `initdb` works in `pgdata.new`, which is then renamed to `pgdata`.
//! - One process at a time uses a cluster. The kernel holds its lock and releases it when the process ends, even by
//!   `kill -9`. So if the holder of the lock finds a running postmaster, that one has lost its owner and may be
//!   stopped.
//! - No postmaster outlives its [`Cluster`], unless this process is killed. Then the next start takes over.
//! - It listens on 127.0.0.1 only, because it trusts everybody who can connect. It has no Unix socket, whose path would
//!   have to be shorter than 107 bytes, which a data directory does not guarantee.
//!
//! # As root
//!
//! PostgreSQL refuses to run as root. Its programs are then started as `postgres`, or else as `nobody`. Such a user
//! often cannot access the requested directory (a clone in `/root`, a `mktemp -d`), and this module does not change the
//! modes of existing directories. In that case the cluster lives in `/var/lib/tuplewatch-dev`, see
//! [`Cluster::data_dir`].
//!
//! # Left out
//!
//! Upgrades between major versions, authentication, and networks other than loopback. The cluster is not meant for data
//! that matters.

mod account;
mod cluster;
mod directory;
mod installation;
mod postmaster;
mod settings;

use std::io;
use std::path::{Path, PathBuf};

pub use cluster::{Cluster, ClusterOptions, StopMode};
pub use installation::Installation;

/// An error for the person at the terminal: the problem, then the remedy.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum Error {
    #[error("no PostgreSQL (14 or newer) found on this machine{}.\nInstall it:  {install}\nor name the directory of its programs with --pg-bin DIR or TUPLEWATCH_PG_BIN.", seen(.rejected))]
    NotInstalled { install: String, rejected: Vec<String> },

    #[error("{origin} {} cannot be used: {reason}.\nName a directory that has postgres, initdb and pg_ctl of \
    PostgreSQL 14 or newer, such as /usr/lib/postgresql/16/bin.", .dir.display())]
    NotAnInstallation { origin: &'static str, dir: PathBuf, reason: String },

    #[error(
        "PostgreSQL does not run as root, and there is neither a user postgres nor a user nobody to run it as.\nAdd one (useradd --system postgres) or run this as an ordinary user."
    )]
    NoAccount,

    #[error("user {account}, which PostgreSQL has to run as, cannot execute {}: {reason}.\nMove the installation to \
    a directory that this user can access (not below /root), choose another with --pg-bin, or run this as an ordinary \
    user.", .program.display())]
    ProgramUnreachable { account: String, program: PathBuf, reason: String },

    #[error("{} is not empty and holds no cluster of tuplewatch.\nName a new or empty directory.", .dir.display())]
    NotOurs { dir: PathBuf },

    #[error("another tuplewatch is using {}.\nStop it, or name another directory.", .dir.display())]
    InUse { dir: PathBuf },

    #[error("the cluster in {} was made by PostgreSQL {made_by}, and PostgreSQL {found} cannot read it.\nName a \
    PostgreSQL {made_by} with --pg-bin, or delete the directory to start over.", .dir.display())]
    WrongMajor { dir: PathBuf, made_by: u32, found: u32 },

    #[error(
        "{name:?} = {value:?} cannot be written as a PostgreSQL setting.\nNames are letters, digits, _ and dots; values are one line."
    )]
    Setting { name: String, value: String },

    #[error("initdb could not create the cluster in {}:\n{output}", .dir.display())]
    Initdb { dir: PathBuf, output: String },

    #[error("PostgreSQL did not start. The end of its log, {}:\n{tail}", .log.display())]
    NotStarted { log: PathBuf, tail: String },

    #[error("PostgreSQL did not accept connections within {seconds} s. The end of its log, {}:\n{tail}", .log.display())]
    NotReady { seconds: u64, log: PathBuf, tail: String },

    #[error(
        "port {port} of 127.0.0.1 is taken by another program.\nStop that program, or choose another port for PostgreSQL."
    )]
    PortTaken { port: u16 },

    #[error(
        "a PostgreSQL left over from an earlier run (process {pid}) could not be stopped: {reason}.\nEnd it \
         manually:  kill -QUIT {pid}"
    )]
    Leftover { pid: u32, reason: String },

    #[error(
        "PostgreSQL did not stop within {seconds} s ({mode} shutdown). A client is still connected, or it cannot \
         write its checkpoint.\nStop it with a faster mode."
    )]
    NotStopped { mode: &'static str, seconds: u64 },

    #[error("cannot {action} {}: {source}", .path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

impl Error {
    /// For `map_err`: adds the action and its path.
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}

fn seen(rejected: &[String]) -> String {
    if rejected.is_empty() { String::new() } else { format!(" ({})", rejected.join("; ")) }
}

#[cfg(test)]
mod tests;
