//! The directory of a log, without opening what is in it.
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

/// Counted up with every change that an older version would misread.
pub(super) const FORMAT: u32 = 3;
pub(in crate::changelog) const MARKER: &str = "tuplewatch-log.json";
/// Before it has its name.
pub(super) const MARKER_NEW: &str = "tuplewatch-log.json.new";
pub(in crate::changelog) const DATA: &str = "data";
/// What `doctor` measures the disk with. Left behind only where it was killed.
pub(in crate::changelog) const PROBE: &str = "tuplewatch-doctor.tmp";
/// fjall's own marker in the data.
const FJALL_VERSION: &str = "version";
/// fjall's own lock, in the data.
const FJALL_LOCK: &str = "lock";

/// The marker file.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::changelog) struct Marker {
    format: u32,
    pub(in crate::changelog) node_id: String,
    /// Whether the log follows a source, and with it a slot, which is then never made again by itself.
    #[serde(default)]
    pub(in crate::changelog) has_begun: bool,
}

impl Marker {
    /// Of the log in this directory; `None` where it is empty.
    ///
    /// # Errors
    /// Where the directory is somebody else's, or parts are missing.
    pub(in crate::changelog) fn read(path: &Path) -> Result<Option<Self>, Error> {
        let open = |source| Error::Open { path: path.to_owned(), source };
        let damaged = |detail: String| Error::Damaged { path: path.to_owned(), detail };
        let data = path.join(DATA);
        let marker = match fs::read(path.join(MARKER)) {
            Ok(json) => {
                let marker: Self = serde_json::from_slice(&json)
                    .map_err(|error| damaged(format!("{MARKER} does not read: {error}")))?;
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
        // Without this file fjall begins a database anew, over what is left of the one that was there.
        if !data.join(FJALL_VERSION).exists() && fs::read_dir(&data).map_err(open)?.next().is_some() {
            return Err(damaged(format!("{DATA}/{FJALL_VERSION} is missing")));
        }
        Ok(Some(marker))
    }

    /// Of a log that begins in this directory.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let marker = Self { format: FORMAT, node_id: format!("{:016x}", fastrand::u64(..)), has_begun: false };
        // The data directory first: a marker without one means that somebody deleted it.
        fs::create_dir_all(path.join(DATA))?;
        marker.write(path)?;
        Ok(marker)
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        write_synced(&path.join(MARKER_NEW), &path.join(MARKER), &serde_json::to_vec(self)?)
    }

    /// Of a log that has a source, from now on or as its data say.
    pub(super) fn begin(path: &Path, node_id: &str) -> io::Result<()> {
        Self { format: FORMAT, node_id: node_id.to_owned(), has_begun: true }.write(path)
    }
}

/// Where a log was opened.
pub(super) struct Location {
    path: PathBuf,
    opened: Vec<Identity>,
}

/// Device and inode.
type Identity = (u64, u64);

impl Location {
    /// Of the log in this directory, which is open.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), opened: Self::look(path)? })
    }

    /// Whether the path still leads there. It does not where the directory was moved away, deleted, replaced, unmounted, or hidden by
    /// another mount; the files that are open work all the same.
    pub(super) fn is_intact(&self) -> bool {
        Self::look(&self.path).is_ok_and(|found| found == self.opened)
    }

    /// The marker is left out: it is written anew when the log begins.
    fn look(path: &Path) -> io::Result<Vec<Identity>> {
        let data = path.join(DATA);
        let identity = |path: &Path| fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()));
        [path, &data, &data.join(FJALL_LOCK)].into_iter().map(identity).collect()
    }
}

/// Whether the name is one of those that a log's directory has.
pub(super) fn is_own(name: &std::ffi::OsStr) -> bool {
    [MARKER, MARKER_NEW, DATA, PROBE].iter().any(|own| name == *own)
}

/// Whether a directory is empty, or has what is left of a log that was being made when the process ended.
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

/// Writes a file so that it is there whole, or not at all.
fn write_synced(temporary: &Path, path: &Path, contents: &[u8]) -> io::Result<()> {
    let mut file = File::create(temporary)?;
    file.write_all(contents)?;
    file.sync_all()?;
    fs::rename(temporary, path)?;
    File::open(path.parent().unwrap_or(path))?.sync_all()
}

/// Bytes that are free on the disk, for us. `None` where the file system does not say.
pub(in crate::changelog) fn free_bytes(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Whether a process has the log open; `None` where we may not know. To find out takes its lock for a moment, where nobody has it; fjall tries several times.
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
