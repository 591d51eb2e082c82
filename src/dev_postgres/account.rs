//! The account that runs PostgreSQL's programs: this process's own, or an unprivileged one if this process runs as
//! root.

use std::env;
use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use super::Error;

/// In the order of preference. The packages of distributions create `postgres`; `nobody` exists everywhere.
const NAMES: [&str; 2] = ["postgres", "nobody"];

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Account {
    /// The account of this process.
    Ourselves,
    /// Another account, which only root can switch to.
    Other { name: String, uid: u32, gid: u32 },
}

impl Account {
    /// # Errors
    /// [`Error::NoAccount`]: this process runs as root, and there is no other account.
    pub(super) fn unprivileged() -> Result<Self, Error> {
        if !are_root() {
            return Ok(Self::Ourselves);
        }
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        in_passwd(&passwd).ok_or(Error::NoAccount)
    }

    /// The owner of an existing cluster, as which PostgreSQL has to run. `self` if this process cannot switch accounts.
    pub(super) fn or_owner_of(self, pgdata: &Path) -> Self {
        match fs::metadata(pgdata) {
            Ok(metadata) if self != Self::Ourselves && metadata.uid() != 0 => {
                Self::Other { name: format!("with uid {}", metadata.uid()), uid: metadata.uid(), gid: metadata.gid() }
            }
            _ => self,
        }
    }

    pub(super) fn name(&self) -> &str {
        match self {
            Self::Ourselves => "that runs this",
            Self::Other { name, .. } => name,
        }
    }

    /// A command that runs as this account, in a process group of its own: Ctrl-C in the terminal must reach only this
    /// process, which then stops PostgreSQL in order.
    pub(super) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        // The account may have no access to the current directory, which PostgreSQL's programs insist on resolving.
        command.current_dir("/").process_group(0);
        // The server's programs would read settings for clients (PGPORT, PGDATA, PGOPTIONS, …) too.
        for (key, _) in env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("PG")) {
            command.env_remove(key);
        }
        // initdb fails if the locale is not installed, and the log's messages are compared with English ones.
        command.env("LC_ALL", "C");
        if let Self::Other { uid, gid, .. } = self {
            // As root, this also drops the supplementary groups.
            command.uid(*uid).gid(*gid);
        }
        command
    }

    pub(super) fn give(&self, path: &Path) -> Result<(), Error> {
        match self {
            Self::Ourselves => Ok(()),
            Self::Other { uid, gid, .. } => {
                chown(path, Some(*uid), Some(*gid)).map_err(Error::io("hand over to PostgreSQL's user", path))
            }
        }
    }

    /// Whether the account can pass through `dir` and all its parents. The kernel decides that, because modes alone do
    /// not tell (access control lists, symbolic links).
    pub(super) fn can_enter(&self, dir: &Path) -> bool {
        if *self == Self::Ourselves {
            return true;
        }
        let mut test = self.command(Path::new("/bin/sh"));
        test.args(["-c", "test -x \"$1\"", "sh"]).arg(dir);
        test.status().is_ok_and(|status| status.success())
    }

    /// Checks that the account can run the program, even if root can.
    pub(super) fn check_program(&self, program: PathBuf) -> Result<(), Error> {
        let output = self.command(&program).arg("--version").output();
        let reason = match output {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        Err(Error::ProgramUnreachable { account: self.name().to_owned(), program, reason })
    }
}

/// Runs one of PostgreSQL's short-lived programs, and kills it if the future is dropped.
pub(super) async fn run(command: Command) -> Result<Output, Error> {
    let program = PathBuf::from(command.get_program());
    let mut command = tokio::process::Command::from(command);
    command.stdin(Stdio::null()).kill_on_drop(true).output().await.map_err(Error::io("run", &program))
}

pub(super) fn output_text(output: &Output) -> String {
    let text = [String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)].concat();
    text.trim().to_owned()
}

/// `geteuid()` without an unsafe call: the owner of this process's /proc entry, or else the output of `id`.
fn are_root() -> bool {
    if let Ok(metadata) = fs::metadata("/proc/self") {
        return metadata.uid() == 0;
    }
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

fn in_passwd(passwd: &str) -> Option<Account> {
    NAMES.into_iter().find_map(|wanted| {
        passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next().filter(|name| *name == wanted)?.to_owned();
            let uid = fields.nth(1)?.parse().ok().filter(|uid| *uid != 0)?;
            let gid = fields.next()?.parse().ok()?;
            Some(Account::Other { name, uid, gid })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_found_in_passwd() {
        let check = |text: &str, expected: Option<(&str, u32, u32)>| {
            let expected = expected.map(|(name, uid, gid)| Account::Other { name: name.into(), uid, gid });
            assert_eq!(in_passwd(text), expected, "{text:?}");
        };
        let root = "root:x:0:0:root:/root:/bin/sh\n";
        let nobody = "nobody:x:65534:65533:nobody:/:/sbin/nologin\n";
        let postgres = "postgres:x:101:104:,,,:/var/lib/postgresql:/bin/bash\n";
        check(&format!("{root}{nobody}{postgres}"), Some(("postgres", 101, 104)));
        check(&format!("{root}{nobody}"), Some(("nobody", 65534, 65533)));
        check(root, None);
        check("postgres:x:0:0::/:/bin/sh\n", None);
        check("postgres:x\nnobody::a:b\n:::\n", None);
        check("", None);
    }
}
