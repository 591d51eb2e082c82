//! The files of a running or failed postmaster: `postmaster.pid` and the log.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Command, Stdio};

use super::account::Account;

/// The most lines and bytes of the log in an error message.
const TAIL_LINES: usize = 20;
const TAIL_BYTES: u64 = 8 * 1024;

/// The fields of `postmaster.pid` that are needed here (PostgreSQL's `utils/pidfile.h`): its first and its eighth line.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PidFile {
    pub(super) pid: u32,
    /// Whether it accepts connections. Before that, the line is missing or says "starting".
    pub(super) ready: bool,
}

impl PidFile {
    pub(super) fn read(pgdata: &Path) -> Option<Self> {
        Self::parse(&fs::read_to_string(pgdata.join("postmaster.pid")).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines().map(str::trim);
        // The number is negative for a single-user server, which does not listen.
        let pid = lines.next()?.parse().ok()?;
        Some(Self { pid, ready: lines.nth(6) == Some("ready") })
    }
}

/// The process that has the id in a `postmaster.pid`.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// The running postmaster of this directory.
    Postmaster,
    /// A different process, which got the id after the postmaster had ended.
    Stranger,
    /// No process, or one of another user. PostgreSQL itself recognizes that neither is a postmaster.
    Nobody,
}

/// Finds out which process has the id. PostgreSQL mistakes any process of its own user with that id for a postmaster:
/// it would refuse to start, and `pg_ctl` would stop the wrong process.
pub(super) fn holder(pid: u32, pgdata: &Path, account: &Account) -> Holder {
    let is_postmaster = if Path::new("/proc/self").exists() {
        // The working directory of a postmaster is its data directory. Its own user reads it, because root may not in a
        // container.
        let mut readlink = account.command(Path::new("/bin/sh"));
        readlink.args(["-c", "readlink \"/proc/$1/cwd\"", "sh", &pid.to_string()]);
        let canonical = pgdata.canonicalize().unwrap_or_else(|_| pgdata.to_owned());
        first_line(&mut readlink).map(|line| Path::new(&line) == canonical)
    } else {
        let mut ps = Command::new("ps");
        ps.args(["-o", "command=", "-p", &pid.to_string()]);
        first_line(&mut ps).map(|line| line.contains(&*pgdata.to_string_lossy()))
    };
    match is_postmaster {
        Some(true) => Holder::Postmaster,
        Some(false) => Holder::Stranger,
        None => Holder::Nobody,
    }
}

fn first_line(command: &mut Command) -> Option<String> {
    let output = command.stderr(Stdio::null()).output().ok()?;
    String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned).filter(|line| !line.is_empty())
}

/// The reason why a postmaster ended, if a retry can help.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// Children of a killed postmaster still use its shared memory. They notice its end and follow.
    Lingering,
    PortTaken,
    Other,
}

impl Cause {
    /// Compares with messages of PostgreSQL 14 to 18, which are English because [`Account::command`] sets the locale.
    pub(super) fn of(log: &str) -> Self {
        if log.contains("pre-existing shared memory block") {
            Self::Lingering
        } else if log.contains("could not create any TCP/IP sockets") {
            Self::PortTaken
        } else {
            Self::Other
        }
    }
}

/// The end of the log behind `from`. An unreadable log is treated as empty, so that the original error is reported.
pub(super) fn log_tail(log: &Path, from: u64) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(log)?;
        let end = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(from.max(end.saturating_sub(TAIL_BYTES))))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines.get(lines.len().saturating_sub(TAIL_LINES)..).unwrap_or_default();
    if tail.is_empty() { "(it is empty)".into() } else { tail.join("\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pid_files_are_parsed() {
        let check = |text, expected: Option<(u32, bool)>| {
            assert_eq!(PidFile::parse(text), expected.map(|(pid, ready)| PidFile { pid, ready }), "{text:?}");
        };
        check("12\n/d\n1700000000\n5432\n\n127.0.0.1\n  123  45\nready   \n", Some((12, true)));
        check("12\n/d\n1700000000\n5432\n\n127.0.0.1\n  123  45\nstarting\n", Some((12, false)));
        check("12\n/d\n1700000000\n5432\n\n", Some((12, false)));
        check("-12\n/d\n", None);
        check("", None);
    }

    #[test]
    fn the_holder_of_a_pid_file_is_recognized() {
        let dir = tempfile::tempdir().unwrap();
        let check = |pid, expected| assert_eq!(holder(pid, dir.path(), &Account::Ourselves), expected);
        check(std::process::id(), Holder::Stranger);
        // Above the highest id that Linux assigns.
        check(5_000_000, Holder::Nobody);
        let mut child = Command::new("sleep").arg("60").current_dir(dir.path()).spawn().unwrap();
        if cfg!(target_os = "linux") {
            check(child.id(), Holder::Postmaster);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        check(child.id(), Holder::Nobody);
    }

    #[test]
    fn the_tail_of_a_log_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        assert_eq!(log_tail(&log, 0), "(it is empty)");
        fs::write(&log, "old\nnew\n").unwrap();
        assert_eq!(log_tail(&log, 4), "new");
        assert_eq!(log_tail(&log, 99), "(it is empty)");
        fs::write(&log, "line\n".repeat(10_000) + "last").unwrap();
        let tail = log_tail(&log, 0);
        assert_eq!(tail.lines().count(), TAIL_LINES);
        assert!(tail.ends_with("last"));
    }
}
