//! Finds the PostgreSQL programs to use.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Error;

/// The oldest release that tuplewatch supports. It is the first whose pgoutput sends logical messages, which
/// `snap_token()` needs.
const MAJOR_MIN: u32 = 14;

/// All three are required, because client packages contain `pg_config`, and sometimes `pg_ctl`, without a server.
const PROGRAMS: [&str; 3] = ["postgres", "initdb", "pg_ctl"];

const PG_BIN: &str = "TUPLEWATCH_PG_BIN";

/// The places where distributions install several versions: the parent directory, and the prefix of the versions'
/// names.
const VERSIONED: [(&str, &str); 4] = [
    ("/usr/lib/postgresql", ""),
    ("/usr", "pgsql-"),
    ("/opt/homebrew/opt", "postgresql@"),
    ("/usr/local/opt", "postgresql@"),
];

/// A directory with the programs of one PostgreSQL server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installation {
    bin_dir: PathBuf,
    version: String,
    major: u32,
    chosen: bool,
}

impl Installation {
    /// Finds the first usable installation of: `explicit` (`--pg-bin`), `TUPLEWATCH_PG_BIN`, `pg_config --bindir`, the
    /// usual places with the newest version first, `PATH`.
    ///
    /// # Errors
    /// [`Error::NotAnInstallation`] if the option or the variable names a directory without one: no other is used
    /// instead. [`Error::NotInstalled`] if there is none anywhere.
    pub fn find(explicit: Option<&Path>) -> Result<Self, Error> {
        if let Some(dir) = explicit {
            return Self::named("--pg-bin", dir);
        }
        if let Some(dir) = env::var_os(PG_BIN).filter(|dir| !dir.is_empty()) {
            return Self::named(PG_BIN, Path::new(&dir));
        }
        let mut rejected = Vec::new();
        for dir in candidates() {
            match Self::at(&dir) {
                Ok(installation) => return Ok(installation),
                // Only a directory that looks like PostgreSQL is worth mentioning.
                Err(reason) if dir.join("pg_config").exists() || dir.join("postgres").exists() => {
                    rejected.push(format!("{}: {reason}", dir.display()));
                }
                Err(_) => {}
            }
        }
        rejected.dedup();
        let os_release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        Err(Error::NotInstalled { install: install_command(env::consts::OS, &os_release), rejected })
    }

    /// The directory of `postgres`, `initdb` and `pg_ctl`. Clients such as `psql` may be elsewhere.
    pub fn bin_dir(&self) -> &Path {
        &self.bin_dir
    }

    /// The major version: 15 in "15.18".
    pub fn major(&self) -> u32 {
        self.major
    }

    /// The version as the server prints it: "15.18", "18beta1".
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Another installation, of this major version, for a cluster that this one cannot read. `None` if there is none,
    /// or if the user chose this one.
    pub(super) fn sibling(&self, major: u32) -> Option<Self> {
        let mut others = candidates().into_iter().filter(|_| !self.chosen).filter_map(|dir| Self::at(&dir).ok());
        others.find(|other| other.major == major)
    }

    fn named(origin: &'static str, dir: &Path) -> Result<Self, Error> {
        let not = |reason| Error::NotAnInstallation { origin, dir: dir.to_owned(), reason };
        // The programs are started in another working directory.
        let absolute = std::path::absolute(dir).map_err(|error| not(error.to_string()))?;
        let found = Self::at(&absolute).map_err(not)?;
        Ok(Self { chosen: true, ..found })
    }

    fn at(dir: &Path) -> Result<Self, String> {
        if !dir.is_dir() {
            return Err("there is no such directory".into());
        }
        let missing: Vec<_> = PROGRAMS.into_iter().filter(|program| !dir.join(program).is_file()).collect();
        if !missing.is_empty() {
            return Err(format!("it has no {} (are only client programs installed?)", missing.join(", ")));
        }
        let output = Command::new(dir.join("postgres")).arg("--version").output();
        let output = output.map_err(|error| format!("its postgres does not run: {error}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let Some((version, major)) = parse_version(&text) else {
            let complaint = String::from_utf8_lossy(&output.stderr);
            return Err(format!("its postgres does not print its version: {}{}", text.trim(), complaint.trim()));
        };
        if major < MAJOR_MIN {
            return Err(format!("it is PostgreSQL {version}, and the oldest supported version is {MAJOR_MIN}"));
        }
        Ok(Self { bin_dir: dir.to_owned(), version: version.to_owned(), major, chosen: false })
    }
}

/// The directories to search if the user chose none.
fn candidates() -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output()
        && output.status.success()
    {
        dirs.push(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    }
    for (parent, prefix) in VERSIONED {
        dirs.extend(versions_in(Path::new(parent), prefix));
    }
    if let Some(path) = env::var_os("PATH") {
        dirs.extend(env::split_paths(&path).filter(|dir| dir.is_absolute()));
    }
    dirs
}

/// `parent/prefix*/bin`, with the highest number first.
fn versions_in(parent: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir(parent)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let major = leading_number(entry.file_name().to_str()?.strip_prefix(prefix)?)?;
            Some((major, entry.path().join("bin")))
        })
        .collect();
    found.sort_by(|a, b| b.cmp(a));
    found.into_iter().map(|(_, dir)| dir).collect()
}

/// Parses "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)".
fn parse_version(text: &str) -> Option<(&str, u32)> {
    let (_, after) = text.split_once("(PostgreSQL) ")?;
    let version = after.split_whitespace().next()?;
    Some((version, leading_number(version)?))
}

fn leading_number(text: &str) -> Option<u32> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text.get(..end)?.parse().ok()
}

fn install_command(os: &str, os_release: &str) -> String {
    if os == "macos" {
        return "brew install postgresql@17".into();
    }
    let field = |key: &str| {
        let line = os_release.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.unwrap_or_default().trim_matches(['"', '\'']).to_owned()
    };
    // The system itself first, then the systems that it derives from.
    let ids = format!("{} {}", field("ID"), field("ID_LIKE"));
    let known = ids.split_whitespace().find_map(|id| match id {
        "debian" | "ubuntu" => Some("apt-get install -y postgresql"),
        "fedora" => Some("dnf install -y postgresql-server"),
        // The default stream has PostgreSQL 10 or 13.
        "rhel" | "centos" | "rocky" | "almalinux" => {
            Some("dnf module enable -y postgresql:16; dnf install -y postgresql-server")
        }
        "alpine" => Some("apk add postgresql"),
        "arch" => Some("pacman -S --noconfirm postgresql"),
        "suse" | "opensuse" => Some("zypper --non-interactive install postgresql-server"),
        _ => None,
    });
    known.unwrap_or("the server package of your system, often called postgresql or postgresql-server").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_parsed() {
        let check = |text, expected| assert_eq!(parse_version(text), expected, "{text}");
        check("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n", Some(("15.18", 15)));
        check("postgres (PostgreSQL) 18beta1\n", Some(("18beta1", 18)));
        check("postgres (PostgreSQL) 9.6.24\n", Some(("9.6.24", 9)));
        check("postgres (PostgreSQL) devel\n", None);
        check("postgres 15", None);
        check("", None);
    }

    #[test]
    fn each_system_has_its_install_command() {
        let check = |os, release, expected: &str| {
            let command = install_command(os, release);
            assert!(command.contains(expected), "{os} {release:?}: {command}");
        };
        check("linux", "NAME=x\nID=debian\n", "apt-get install -y postgresql");
        check("linux", "ID=pop\nID_LIKE=\"ubuntu debian\"\n", "apt-get");
        check("linux", "ID=fedora\n", "dnf install -y postgresql-server");
        check("linux", "ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n", "module enable");
        check("linux", "ID=alpine\n", "apk add");
        check("linux", "ID=manjaro\nID_LIKE=arch\n", "pacman");
        check("linux", "ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\"\n", "zypper");
        check("macos", "", "brew");
        check("linux", "", "server package of your system");
    }

    #[test]
    fn installations_are_sorted_newest_first() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["pgsql-9", "pgsql-16", "pgsql-14", "pgsql-x", "other"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let expected: Vec<_> = ["pgsql-16", "pgsql-14", "pgsql-9"].map(|name| dir.path().join(name).join("bin")).into();
        assert_eq!(versions_in(dir.path(), "pgsql-"), expected);
        assert_eq!(versions_in(&dir.path().join("absent"), ""), Vec::<PathBuf>::new());
    }

    /// A directory with fake versions of the three programs.
    fn fake(version: &str, programs: &[&str]) -> tempfile::TempDir {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        for program in programs {
            let path = dir.path().join(program);
            fs::write(&path, format!("#!/bin/sh\necho 'postgres (PostgreSQL) {version}'\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        dir
    }

    #[test]
    fn a_chosen_directory_is_used_or_refused() {
        let check = |dir: &Path, expected: &str| {
            let message = Installation::find(Some(dir)).unwrap_err().to_string();
            assert!(message.starts_with("--pg-bin") && message.contains(expected), "{message}");
        };
        check(Path::new("/nowhere/bin"), "no such directory");
        check(fake("15.1", &["pg_ctl"]).path(), "no postgres, initdb");
        check(fake("13.9", &PROGRAMS).path(), "PostgreSQL 13.9");
        check(fake("nonsense", &PROGRAMS).path(), "version");

        let dir = fake("14.23", &PROGRAMS);
        let found = Installation::find(Some(dir.path())).unwrap();
        assert_eq!((found.bin_dir(), found.major(), found.version()), (dir.path(), 14, "14.23"));
        // A wrong choice is an error, and no other installation is used.
        assert_eq!(found.sibling(15), None);
    }

    #[test]
    fn a_missing_installation_names_the_remedy() {
        let error = Error::NotInstalled {
            install: "apt-get install -y postgresql".into(),
            rejected: vec!["/usr/bin: it has no postgres".into()],
        };
        let message = error.to_string();
        assert!(
            message.contains("apt-get install -y postgresql") && message.contains("/usr/bin: it has no"),
            "{message}"
        );
    }
}
