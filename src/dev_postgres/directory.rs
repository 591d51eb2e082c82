//! The directory of a cluster: its location, its lock, and its creation by initdb.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::account::{Account, output_text, run};
use super::{Error, Installation};

/// The parent of clusters whose requested directory PostgreSQL's user cannot access.
const FALLBACK_DIR: &str = "/var/lib/tuplewatch-dev";

/// Decides the location of the cluster and its account.
pub(super) fn locate(requested_dir: &Path) -> Result<(PathBuf, Account), Error> {
    let unprivileged = Account::unprivileged()?;
    let account = unprivileged.clone().or_owner_of(&requested_dir.join("pgdata"));
    let existing = requested_dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    if account.can_enter(existing) {
        return Ok((requested_dir.to_owned(), account));
    }
    let elsewhere =
        Path::new(FALLBACK_DIR).join(format!("{:016x}", fnv1a(requested_dir.as_os_str().as_encoded_bytes())));
    let account = unprivileged.or_owner_of(&elsewhere.join("pgdata"));
    Ok((elsewhere, account))
}

/// FNV-1a, 64 bits. It names a directory, and the standard library's hashers may change with its version.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Creates the directory if needed, checks that it belongs to a cluster, and locks it.
pub(super) fn take_possession(data_dir: &Path) -> Result<File, Error> {
    let lock_path = data_dir.join("cluster.lock");
    create_dirs(data_dir)?;
    let mut entries = fs::read_dir(data_dir).map_err(Error::io("read", data_dir))?;
    if entries.next().is_some() && !lock_path.exists() {
        return Err(Error::NotOurs { dir: data_dir.to_owned() });
    }
    let lock = OpenOptions::new().create(true).append(true).open(&lock_path).map_err(Error::io("open", &lock_path))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(fs::TryLockError::WouldBlock) => Err(Error::InUse { dir: data_dir.to_owned() }),
        Err(fs::TryLockError::Error(source)) => Err(Error::Io { action: "lock", path: lock_path, source }),
    }
}

/// Like `create_dir_all`, but other users can pass through the created directories, whatever the umask. PostgreSQL's
/// user must be able to.
fn create_dirs(dir: &Path) -> Result<(), Error> {
    if let Some(parent) = dir.parent().filter(|parent| !parent.exists()) {
        create_dirs(parent)?;
    }
    match fs::create_dir(dir) {
        Ok(()) => fs::set_permissions(dir, Permissions::from_mode(0o755)).map_err(Error::io("set the mode of", dir)),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(Error::io("create", dir)(error)),
    }
}

/// The major version of the cluster; `None` if there is no cluster yet.
pub(super) fn made_by(pgdata: &Path) -> Result<Option<u32>, Error> {
    let path = pgdata.join("PG_VERSION");
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.trim().parse().ok()),
        Err(error) if error.kind() == ErrorKind::NotFound && !pgdata.exists() => Ok(None),
        Err(error) => Err(Error::io("read", &path)(error)),
    }
}

/// An installation that can read the cluster. After an upgrade of the machine's PostgreSQL it looks for the old
/// version.
pub(super) fn reader_of(installation: Installation, major: u32, data_dir: &Path) -> Result<Installation, Error> {
    if installation.major() == major {
        return Ok(installation);
    }
    let found = installation.major();
    let wrong = || Error::WrongMajor { dir: data_dir.to_owned(), made_by: major, found };
    installation.sibling(major).ok_or_else(wrong)
}

pub(super) async fn initdb(installation: &Installation, account: &Account, data_dir: &Path) -> Result<(), Error> {
    remove_unfinished(data_dir)?;
    // A new name each time, because an initdb that outlived its killed parent may still write to the old one.
    let unfinished = data_dir.join(format!("{UNFINISHED}{:08x}", fastrand::u32(..)));
    fs::create_dir(&unfinished).map_err(Error::io("create", &unfinished))?;
    account.give(&unfinished)?;

    let mut command = account.command(&installation.bin_dir().join("initdb"));
    command.arg("-D").arg(&unfinished);
    // The C locale is installed everywhere, and fits every encoding.
    command.args(["--username=postgres", "--encoding=UTF8", "--locale=C", "--auth=trust", "--no-instructions"]);
    let output = run(command).await?;
    if !output.status.success() {
        return Err(Error::Initdb { dir: data_dir.to_owned(), output: output_text(&output) });
    }
    // The path is relative to the including file, so the directory can be moved.
    let conf = unfinished.join("postgresql.conf");
    let text = fs::read_to_string(&conf).map_err(Error::io("read", &conf))?;
    fs::write(&conf, text + "\ninclude '../settings.conf'\n").map_err(Error::io("write", &conf))?;

    let pgdata = data_dir.join("pgdata");
    fs::rename(&unfinished, &pgdata).map_err(Error::io("rename the new cluster to", &pgdata))
}

/// The prefix of the directories in which initdb works. A complete one is renamed.
pub(super) const UNFINISHED: &str = "pgdata.new-";

/// Deletes the directories of interrupted initdbs. One that still changes stays until the next start.
fn remove_unfinished(data_dir: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(data_dir).map_err(Error::io("read", data_dir))? {
        let entry = entry.map_err(Error::io("read", data_dir))?;
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            tracing::info!("starting over: the last initdb was interrupted");
            if let Err(error) = fs::remove_dir_all(entry.path()) {
                tracing::debug!("{} could not be deleted: {error}", entry.path().display());
            }
        }
    }
    Ok(())
}

/// Writes a file atomically, and readable for PostgreSQL's user whatever the umask.
pub(super) fn write_file(path: &Path, text: &str) -> Result<(), Error> {
    let new = path.with_extension("new");
    fs::write(&new, text).map_err(Error::io("write", &new))?;
    fs::set_permissions(&new, Permissions::from_mode(0o644)).map_err(Error::io("set the mode of", &new))?;
    fs::rename(&new, path).map_err(Error::io("write", path))
}
