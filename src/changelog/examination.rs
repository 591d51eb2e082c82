//! The examination of the log's directory by `doctor`: whether `serve` could keep a log there, and how fast the disk
//! syncs. It may run while a `serve` has the log open, and it leaves no files behind.

use super::Error;
use super::local::Options;
use super::local::directory::{self, DATA, MARKER, Marker, PROBE};
use crate::model::diagnostic::{Bytes, CommandLine, Diagnostic, Report, shell_word};
use rustix::fs::{Access, access};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const SUBJECT: &str = "change log";
/// The user id of root.
const ROOT: u32 = 0;
/// Enough for a stable median, and few enough to be quick on a slow disk.
const SYNCS: usize = 20;
/// One page, like the writes of the log's journal.
const SYNC_BYTES: usize = 4096;
/// A disk that is fit for a database needs a fraction of this.
const SYNC_MAX: Duration = Duration::from_millis(20);

/// The result of an examination.
#[derive(Debug)]
pub(crate) struct Examination {
    /// The node id of the existing log.
    pub(crate) node_id: Option<String>,
    /// Whether the existing log follows a slot.
    pub(crate) has_begun: bool,
    /// The findings.
    pub(crate) diagnostics: Vec<Diagnostic>,
}

/// Examines the directory. Blocks on the disk.
pub(crate) fn examine(options: &Options, commands: &CommandLine) -> Examination {
    let mut report = Report::default();
    let marker = examine_directory(options, commands, &mut report);
    let has_begun = marker.as_ref().is_some_and(|marker| marker.has_begun);
    Examination { node_id: marker.map(|marker| marker.node_id), has_begun, diagnostics: report.into_diagnostics() }
}

fn examine_directory(options: &Options, commands: &CommandLine, report: &mut Report) -> Option<Marker> {
    let path = std::path::absolute(&options.path).unwrap_or_else(|_| options.path.clone());
    let place = match nearest(&path) {
        Ok(place) => place,
        Err(error) => {
            let what = format!("in {} cannot be looked at: {error}", path.display());
            report.error(SUBJECT, what, "-- run doctor as the user that tuplewatch runs as");
            return None;
        }
    };
    if !place.is_dir() {
        let what = format!("cannot be kept in {}: {} is not a directory", path.display(), place.display());
        report.error(SUBJECT, what, "-- set changelog.path to a directory, or to a path where one can be created");
        return None;
    }
    let marker = if place == path { Marker::read(&path) } else { Ok(None) };
    let marker = match marker {
        Ok(marker) => marker,
        // The directory may belong to another program: write nothing to it.
        Err(error) => {
            report.add(unreadable(&error, commands));
            return None;
        }
    };
    let is_open = directory::is_open(&path);
    report.ok(SUBJECT, describe(&path, marker.as_ref(), is_open));
    let is_open = is_open != Some(false);
    if place == path && !is_open {
        check_owners(&path, report);
    }
    check_disk(place, is_open, report);
    check_space(&path, place, options, report);
    marker
}

/// Returns the directory itself, or its nearest existing ancestor.
///
/// # Errors
/// If the user may not see it.
fn nearest(path: &Path) -> io::Result<&Path> {
    for ancestor in path.ancestors() {
        match ancestor.symlink_metadata() {
            Ok(_) => return Ok(ancestor),
            // A path below a file does not exist.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(path)
}

/// `is_open` is `None` if this user cannot read the lock.
fn describe(path: &Path, marker: Option<&Marker>, is_open: Option<bool>) -> String {
    let path = path.display();
    let Some(Marker { node_id, .. }) = marker else {
        return format!("is not there yet: tuplewatch serve begins it in {path}");
    };
    let user = match is_open {
        Some(true) => "a tuplewatch has it open",
        Some(false) => "no tuplewatch has it open",
        None => "this user cannot see whether a tuplewatch has it open",
    };
    format!("in {path}, of node {node_id}, and {user}")
}

fn unreadable(error: &Error, commands: &CommandLine) -> Diagnostic {
    let fix = match error {
        Error::Foreign(_) => "-- set changelog.path to an empty or new directory".to_owned(),
        Error::Open { .. } => "-- let the user that tuplewatch runs as read it".to_owned(),
        Error::Format { .. } => format!(
            "-- run the version that wrote it. Without that version, discard its history: {}",
            commands.reset_log()
        ),
        _ => commands.reset_log().fix("the history of the log is lost, and subscribers re-read their state"),
    };
    Diagnostic::error(SUBJECT, error.to_string()).fix(fix)
}

/// Checks for files that a run as another user left behind.
fn check_owners(path: &Path, report: &mut Report) {
    let Ok(own) = fs::metadata(path) else { return };
    if own.uid() == ROOT {
        // On a volume that belongs to a group, other users create files in root's directory. Root can write those too.
        return;
    }
    let inside = fs::read_dir(path.join(DATA)).into_iter().flatten().flatten().map(|entry| entry.path());
    let files = [path.join(MARKER), path.join(DATA)].into_iter().chain(inside);
    let mut owners = files.filter_map(|file| Some((fs::metadata(&file).ok()?.uid(), file)));
    let Some((owner, file)) = owners.find(|(owner, _)| *owner != own.uid()) else { return };
    let what = format!("{} belongs to user {owner}, and its directory to user {}", file.display(), own.uid());
    let meaning = "tuplewatch cannot write files that belong to another user.";
    let fix = format!("chown -R {}:{} {}  # as root", own.uid(), own.gid(), word(path));
    // Root can open everything, so a success says nothing about the user that runs `serve`.
    let diagnostic = match access(&file, Access::WRITE_OK) {
        Ok(()) if rustix::process::geteuid().is_root() => Diagnostic::warning,
        Ok(()) => return,
        Err(_) => Diagnostic::error,
    };
    report.add(diagnostic(SUBJECT, what).means(meaning).fix(fix));
}

/// Checks that the disk can be written, the time of a sync, and the kind of file system.
fn check_disk(place: &Path, is_open: bool, report: &mut Report) {
    match median_sync(place) {
        Ok(sync) => {
            let what = format!("a sync takes {:.1} ms", sync.as_secs_f64() * 1000.0);
            if sync > SYNC_MAX {
                let meaning = "Changes are acknowledged to PostgreSQL after one; under load the slot falls behind.";
                let fix = "-- set changelog.path to a faster disk, best a local SSD";
                report.add(Diagnostic::warning("disk of the change log", what).means(meaning).fix(fix));
            } else {
                report.ok("disk of the change log", what);
            }
        }
        // The log belongs to another user, who has it open.
        Err(error) if is_open && error.kind() == ErrorKind::PermissionDenied => {
            report.ok("disk of the change log", "cannot be measured by this user");
        }
        Err(error) => report.add(unwritable(place, &error)),
    }
    if let Some((kind, meaning)) = file_system(place) {
        let fix = "-- set changelog.path to a local disk that stays (in a container: a volume)";
        report.add(Diagnostic::warning("disk of the change log", format!("is {kind}")).means(meaning).fix(fix));
    }
}

fn unwritable(place: &Path, error: &io::Error) -> Diagnostic {
    let user = rustix::process::geteuid().as_raw();
    let fix = match error.kind() {
        ErrorKind::PermissionDenied => format!(
            "-- run doctor as the user that tuplewatch runs as; if this is that user, as root: chown -R {user} {}",
            word(place)
        ),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "-- make room on the disk".to_owned(),
        _ => "-- set changelog.path to a directory that can be written".to_owned(),
    };
    let what = format!("cannot be kept: user {user} cannot write to {}: {error}", place.display());
    Diagnostic::error(SUBJECT, what).fix(fix)
}

/// A file that is deleted with this value.
struct Probe {
    path: PathBuf,
    file: File,
}

impl Drop for Probe {
    fn drop(&mut self) {
        // Another doctor may have deleted the file.
        let _ = fs::remove_file(&self.path);
    }
}

fn median_sync(place: &Path) -> io::Result<Duration> {
    let path = place.join(PROBE);
    // A killed doctor may have left its file. Never open an existing file: it could be a link to elsewhere.
    let _ = fs::remove_file(&path);
    let mut probe = Probe { file: File::create_new(&path)?, path };
    let mut times = Vec::with_capacity(SYNCS);
    for _ in 0..SYNCS {
        let began = Instant::now();
        probe.file.write_all(&[0; SYNC_BYTES])?;
        probe.file.sync_data()?;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    Ok(times.get(SYNCS / 2).copied().unwrap_or_default())
}

fn check_space(path: &Path, place: &Path, options: &Options, report: &mut Report) {
    const SUBJECT: &str = "room for the change log";
    let (free, used) = (directory::free_bytes(place).unwrap_or(u64::MAX), bytes_below(path));
    let reserve = options.reserve_bytes;
    let what = format!("{} are free, and the log has {}", Bytes(free), Bytes(used));
    if free.saturating_add(used) < reserve {
        let what = format!("{what}: less than changelog.disk_reserve ({})", Bytes(reserve));
        let meaning = "Nothing is read from PostgreSQL while less than the reserve is free.";
        let fix = "-- make room on the disk, or set changelog.disk_reserve to less";
        report.add(Diagnostic::error(SUBJECT, what).means(meaning).fix(fix));
    } else if free.saturating_add(used) < reserve.saturating_add(options.size_bytes) {
        let what = format!(
            "{what}: less than changelog.retention.size ({}) and changelog.disk_reserve ({}) together",
            Bytes(options.size_bytes),
            Bytes(reserve)
        );
        let meaning = "If the log grows that large, its oldest changes are dropped early.";
        let fix = "-- make room on the disk, or set changelog.retention.size to less";
        report.add(Diagnostic::warning(SUBJECT, what).means(meaning).fix(fix));
    } else {
        report.ok(SUBJECT, what);
    }
}

/// The bytes that the files take on disk. Files may appear and disappear meanwhile.
fn bytes_below(path: &Path) -> u64 {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.fold(0, |sum, entry| {
        let bytes = match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
            Ok(metadata) => metadata.blocks().saturating_mul(512),
            Err(_) => 0,
        };
        sum.saturating_add(bytes)
    })
}

/// File systems that are unfit for a log, with the consequence.
#[cfg(target_os = "linux")]
fn file_system(place: &Path) -> Option<(&'static str, &'static str)> {
    const REMOTE: &str = "The log is unavailable whenever the network is, and a sync may not reach the disk.";
    // The constants are those of linux/magic.h. The field is signed on some systems, and only its low 32 bits count.
    let kind = rustix::fs::statfs(place).ok()?.f_type as u32;
    Some(match kind {
        0x6969 => ("on NFS", REMOTE),
        0xff53_4d42 | 0xfe53_4d42 | 0x517b => ("on SMB", REMOTE),
        0x0102_1997 => ("on 9P", REMOTE),
        0x00c3_6400 => ("on Ceph", REMOTE),
        0x6573_5546 => ("on FUSE", "It may be on a network, and a sync may not reach the disk."),
        0x0102_1994 => ("in memory (tmpfs)", "The log's history is lost when the machine restarts."),
        0x794c_7630 => ("in a container's own layer (overlay)", "The log's history is lost with the container."),
        _ => return None,
    })
}

#[cfg(not(target_os = "linux"))]
fn file_system(_: &Path) -> Option<(&'static str, &'static str)> {
    None
}

fn word(path: &Path) -> String {
    shell_word(&path.display().to_string()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::changelog::{ChangeLog as _, LocalLog};
    use crate::model::diagnostic::Severity;

    fn options(path: &Path) -> Options {
        Options { path: path.to_owned(), age_seconds: 3600, size_bytes: 64 << 20, reserve_bytes: 16 << 20 }
    }

    fn errors(options: &Options) -> Vec<Diagnostic> {
        let diagnostics = examine(options, &CommandLine::default()).diagnostics;
        diagnostics.into_iter().filter(|diagnostic| diagnostic.severity == Severity::Error).collect()
    }

    fn names(path: &Path) -> Vec<String> {
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn an_examination_leaves_no_files_and_disturbs_no_process() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("not/yet");
        let found = examine(&options(&path), &CommandLine::default());
        assert!(found.node_id.is_none() && errors(&options(&path)).is_empty(), "{found:?}");
        assert_eq!(names(directory.path()), Vec::<String>::new());

        let log = LocalLog::open(options(&path)).unwrap();
        let before = names(&path);
        let found = examine(&options(&path), &CommandLine::default());
        assert_eq!(found.node_id, Some(log.state().node_id));
        assert!(
            found.diagnostics.iter().any(|diagnostic| diagnostic.what.ends_with("a tuplewatch has it open")),
            "{found:?}"
        );
        assert_eq!(names(&path), before);
        drop(log);
        let found = examine(&options(&path), &CommandLine::default());
        assert!(
            found.diagnostics.iter().any(|diagnostic| diagnostic.what.ends_with("no tuplewatch has it open")),
            "{found:?}"
        );

        // Leftovers of a killed doctor do not matter.
        for path in [path, directory.path().join("empty")] {
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join(PROBE), "x").unwrap();
            drop(LocalLog::open(options(&path)).unwrap());
            LocalLog::reset(&path).unwrap();
            assert_eq!(names(&path), Vec::<String>::new());
        }
    }

    #[test]
    fn an_examination_finds_what_serve_would_refuse() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let full = Options { reserve_bytes: u64::MAX, ..options(&directory.path().join("log")) };
        for (options, what, fix) in [
            (options(&file), "is not a directory", "changelog.path"),
            (options(&file.join("log")), "is not a directory", "changelog.path"),
            (options(directory.path()), "holds no change log of tuplewatch", "changelog.path"),
            (full, "less than changelog.disk_reserve", "changelog.disk_reserve"),
        ] {
            let found = errors(&options);
            let [diagnostic] = found.as_slice() else { panic!("{found:#?}") };
            assert!(diagnostic.what.contains(what) && diagnostic.fix.as_deref().unwrap().contains(fix), "{diagnostic}");
        }
        let path = directory.path().join("log");
        drop(LocalLog::open(options(&path)).unwrap());
        fs::remove_dir_all(path.join(DATA)).unwrap();
        let found = errors(&options(&path));
        assert!(
            matches!(&found[..], [diagnostic] if diagnostic.fix.as_deref().unwrap().starts_with("tuplewatch serve --reset-log"))
        );
    }
}
