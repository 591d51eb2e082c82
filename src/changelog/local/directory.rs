//! The directory of a log, as far as it can be used without opening the database in it.
//!
//! ```text
//! <path>/tuplewatch-log.json     format, node id, and whether it has begun
//! <path>/data/                   fjall
//! ```

use super::super::Error;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Increased with every change that an older version would misread.
pub(super) const FORMAT: u32 = 3;
pub(in crate::changelog) const MARKER: &str = "tuplewatch-log.json";
/// The marker while it is written.
pub(super) const MARKER_NEW: &str = "tuplewatch-log.json.new";
pub(in crate::changelog) const DATA: &str = "data";
/// The file with which `doctor` measures the disk. It remains only if `doctor` is killed.
pub(in crate::changelog) const PROBE: &str = "tuplewatch-doctor.tmp";
/// The name of fjall's version file in the data directory.
const FJALL_VERSION: &str = "version";
/// The name of fjall's lock file in the data directory.
const FJALL_LOCK: &str = "lock";

/// The marker file.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::changelog) struct Marker {
    format: u32,
    pub(in crate::changelog) node_id: String,
    /// Whether the log follows a source. Its slot is then never created again automatically.
    #[serde(default)]
    pub(in crate::changelog) has_begun: bool,
}

impl Marker {
    /// Reads the marker of this directory. `None` if the directory is empty.
    ///
    /// # Errors
    /// If the directory belongs to another program, or parts of the log are missing.
    pub(in crate::changelog) fn read(path: &Path) -> Result<Option<Self>, Error> {
        let open = |source| Error::Open { path: path.to_owned(), source };
        let damaged = |detail: String| Error::Damaged { path: path.to_owned(), detail };
        let data = path.join(DATA);
        let marker = match fs::read(path.join(MARKER)) {
            Ok(json) => {
                let marker: Self = serde_json::from_slice(&json)
                    .map_err(|error| damaged(format!("{MARKER} cannot be decoded: {error}")))?;
                if marker.format != FORMAT {
                    return Err(Error::Format { path: path.to_owned(), found: marker.format, expected: FORMAT });
                }
                if !data.is_dir() {
                    return Err(damaged(format!("its directory {DATA} is missing")));
                }
                marker
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return if is_unused(path).map_err(open)? { Ok(None) } else { Err(Error::Foreign(path.to_owned())) };
            }
            Err(error) => return Err(open(error)),
        };
        // Without this file fjall would begin a new database over the remains of the old one.
        if !data.join(FJALL_VERSION).exists() && fs::read_dir(&data).map_err(open)?.next().is_some() {
            return Err(damaged(format!("{DATA}/{FJALL_VERSION} is missing")));
        }
        Ok(Some(marker))
    }

    /// Creates the marker of a new log in this directory.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let marker = Self { format: FORMAT, node_id: format!("{:016x}", fastrand::u64(..)), has_begun: false };
        // The data directory comes first, so that a marker without it proves that the data was deleted.
        fs::create_dir_all(path.join(DATA))?;
        marker.write(path)?;
        Ok(marker)
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        write_synced(&path.join(MARKER_NEW), &path.join(MARKER), &serde_json::to_vec(self)?)
    }

    /// Records that the log has a source.
    pub(super) fn begin(path: &Path, node_id: &str) -> io::Result<()> {
        Self { format: FORMAT, node_id: node_id.to_owned(), has_begun: true }.write(path)
    }
}

/// The location of an open log.
pub(super) struct Location {
    path: PathBuf,
    opened: Vec<Identity>,
}

/// Device and inode.
type Identity = (u64, u64);

impl Location {
    /// The current location of the open log in this directory.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), opened: Self::identities(path)? })
    }

    /// Whether the path still leads to the opened files. It does not if the directory was moved, deleted, replaced,
    /// unmounted, or hidden by another mount, although the open files keep working.
    pub(super) fn is_intact(&self) -> bool {
        Self::identities(&self.path).is_ok_and(|found| found == self.opened)
    }

    /// The marker does not count, because it is replaced when the log begins.
    fn identities(path: &Path) -> io::Result<Vec<Identity>> {
        let data = path.join(DATA);
        let identity = |path: &Path| fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()));
        [path, &data, &data.join(FJALL_LOCK)].into_iter().map(identity).collect()
    }
}

/// Whether a log's directory may contain a file of this name.
pub(super) fn is_own(name: &std::ffi::OsStr) -> bool {
    [MARKER, MARKER_NEW, DATA, PROBE].iter().any(|own| name == *own)
}

/// Whether a directory is empty, or contains only the remains of an interrupted creation.
fn is_unused(path: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let leftover =
            name == MARKER_NEW || name == PROBE || (name == DATA && fs::read_dir(entry.path())?.next().is_none());
        if !leftover {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Writes a file atomically: after a crash it is either complete or absent.
fn write_synced(temporary: &Path, path: &Path, contents: &[u8]) -> io::Result<()> {
    let mut file = File::create(temporary)?;
    file.write_all(contents)?;
    file.sync_all()?;
    fs::rename(temporary, path)?;
    File::open(path.parent().unwrap_or(path))?.sync_all()
}

/// The bytes that are free on the disk for this user. `None` if the file system does not report them.
pub(in crate::changelog) fn free_bytes(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Whether a process has the log open. `None` if this user may not read the lock. The check takes a free lock for a
/// moment; fjall retries, so this does not keep a `serve` from opening the log.
pub(in crate::changelog) fn is_open(path: &Path) -> Option<bool> {
    match File::open(path.join(DATA).join(FJALL_LOCK)) {
        Ok(file) => Some(matches!(file.try_lock_shared(), Err(fs::TryLockError::WouldBlock))),
        Err(error) if error.kind() == ErrorKind::NotFound => Some(false),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_directory_is_not_the_opened_one() {
        let directory = tempfile::tempdir().unwrap();
        let (log, aside) = (directory.path().join("log"), directory.path().join("aside"));
        let make = |path: &Path| {
            fs::create_dir_all(path.join(DATA)).unwrap();
            fs::write(path.join(DATA).join(FJALL_LOCK), "").unwrap();
        };
        make(&log);
        let place = Location::of(&log).unwrap();
        assert!(place.is_intact());

        fs::rename(&log, &aside).unwrap();
        assert!(!place.is_intact(), "moved away");
        make(&log);
        assert!(!place.is_intact(), "replaced");
        fs::remove_dir_all(&log).unwrap();
        std::os::unix::fs::symlink(&aside, &log).unwrap();
        assert!(place.is_intact(), "it is there again, by whatever way");
        // The marker is replaced when the log begins.
        fs::write(aside.join(MARKER), "{}").unwrap();
        assert!(place.is_intact());
        fs::remove_file(aside.join(DATA).join(FJALL_LOCK)).unwrap();
        assert!(!place.is_intact(), "emptied");
        fs::remove_dir_all(&aside).unwrap();
        assert!(!place.is_intact(), "deleted");
        assert!(Location::of(&log).is_err());
    }
}
