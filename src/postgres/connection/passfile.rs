//! Password files in libpq's format, such as `~/.pgpass`.
//!
//! A line is `host:port:database:user:password`. `*` matches everything, `\:` and `\\` stand for the character, and `#`
//! begins a comment line. The first matching line applies. The file is read for every connection, so a changed password
//! needs no restart.

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use super::Password;

/// A larger file, of more than ten thousand lines, is not a password file.
const BYTES_MAX: u64 = 1024 * 1024;
/// The permission bits of everyone but the owner.
const GROUP_AND_OTHERS: u32 = 0o077;

/// The path of a password file.
#[derive(Clone, Debug)]
pub(super) struct Passfile {
    path: PathBuf,
}

/// The connection that needs a password.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    /// The host in the URI, and the other names that libpq would look for.
    pub(super) hosts: &'a [&'a str],
    pub(super) port: u16,
    pub(super) database: &'a str,
    pub(super) user: &'a str,
}

impl Passfile {
    pub(super) const fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Returns the password of the first matching line. An unusable file is ignored, with a warning in the log.
    pub(super) async fn password(&self, wanted: Wanted<'_>) -> Option<Password> {
        let content = self.read().await?;
        let lines = content.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
        lines.into_iter().find_map(|line| password_of(line, wanted)).map(Password::new)
    }

    async fn read(&self) -> Option<Vec<u8>> {
        let passfile = self.path.display();
        let metadata = match tokio::fs::metadata(&self.path).await {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(%passfile, %error, "the password file cannot be read, and is ignored");
                return None;
            }
        };
        if !metadata.is_file() || metadata.len() > BYTES_MAX {
            tracing::warn!(%passfile, "the password file is not a plain file of at most 1 MiB, and is ignored");
            return None;
        }
        if metadata.permissions().mode() & GROUP_AND_OTHERS != 0 {
            tracing::warn!(%passfile, "others can read the password file, so it is ignored: chmod 0600 it");
            return None;
        }
        match tokio::fs::read(&self.path).await {
            Ok(content) => Some(content),
            Err(error) => {
                tracing::warn!(%passfile, %error, "the password file cannot be read, and is ignored");
                None
            }
        }
    }
}

fn password_of(line: &[u8], wanted: Wanted<'_>) -> Option<Vec<u8>> {
    if line.starts_with(b"#") {
        return None;
    }
    let mut fields = Fields { rest: Some(line) };
    let mut fits = |values: &[&str]| {
        let Some(Field { text, plain }) = fields.next() else { return false };
        (plain && text == b"*") || values.iter().any(|value| value.as_bytes() == text)
    };
    let port = wanted.port.to_string();
    if fits(wanted.hosts) && fits(&[&port]) && fits(&[wanted.database]) && fits(&[wanted.user]) {
        fields.next().map(|field| field.text).filter(|password| !password.is_empty())
    } else {
        None
    }
}

/// The text between two colons. It consists of bytes, because passwords need not be text.
struct Field {
    text: Vec<u8>,
    /// Whether nothing was escaped, so that `*` is the wildcard.
    plain: bool,
}

struct Fields<'a> {
    rest: Option<&'a [u8]>,
}

impl Iterator for Fields<'_> {
    type Item = Field;

    fn next(&mut self) -> Option<Field> {
        let mut field = Field { text: Vec::new(), plain: true };
        let mut rest = self.rest.take()?;
        while let Some((byte, behind)) = rest.split_first() {
            rest = behind;
            match byte {
                b':' => {
                    self.rest = Some(rest);
                    return Some(field);
                }
                b'\\' => {
                    field.plain = false;
                    let (escaped, behind) =
                        rest.split_first().map_or((None, rest), |(byte, behind)| (Some(*byte), behind));
                    rest = behind;
                    field.text.extend(escaped);
                }
                byte => field.text.push(*byte),
            }
        }
        Some(field)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Wanted<'_> = Wanted { hosts: &["db1", "localhost"], port: 5433, database: "app", user: "ada" };

    #[test]
    fn lines_are_matched_as_libpq_matches_them() {
        let check = |line: &str, expected: Option<&str>| {
            let found = password_of(line.as_bytes(), WANTED);
            assert_eq!(found.as_deref(), expected.map(str::as_bytes), "{line}");
        };
        check("db1:5433:app:ada:secret", Some("secret"));
        check("localhost:5433:app:ada:secret", Some("secret"));
        check("*:*:*:*:secret", Some("secret"));
        check("db1:5433:app:ada:", None);
        check("db1:5433:app:ada", None);
        check("db2:5433:app:ada:secret", None);
        check("db1:5432:app:ada:secret", None);
        check("db1:5433:other:ada:secret", None);
        check("db1:5433:app:bob:secret", None);
        check(r"d\b1:5433:app:ada:se\:cr\\et", Some(r"se:cr\et"));
        check(r"\*:5433:app:ada:secret", None);
        check("db1:5433:app:ada:secret:more", Some("secret"));
        check("# db1:5433:app:ada:secret", None);
        check("#*:*:*:*:secret", None);
        check("", None);
        check("db1:5433:app:ada:pass wörd ", Some("pass wörd "));
    }

    #[test]
    fn a_password_may_be_any_bytes() {
        assert_eq!(password_of(b"*:*:*:*:\xe9\\:\xff", WANTED).as_deref(), Some(&b"\xe9:\xff"[..]));
    }

    #[tokio::test]
    async fn the_first_matching_line_of_a_private_file_counts() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"db2:*:*:*:Latin-1 \xe9\r\ndb1:*:*:ada:first\r\n*:*:*:*:second\n").unwrap();
        let passfile = Passfile::new(file.path().to_owned());
        let set_mode = |mode| std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap();
        set_mode(0o600);
        assert_eq!(passfile.password(WANTED).await.unwrap().bytes(), b"first");
        for open in [0o640, 0o604, 0o660] {
            set_mode(open);
            assert!(passfile.password(WANTED).await.is_none(), "{open:o}");
        }
        let missing = Passfile::new(file.path().with_extension("missing"));
        assert!(missing.password(WANTED).await.is_none());
        let directory = Passfile::new(std::env::temp_dir());
        assert!(directory.password(WANTED).await.is_none());
    }
}
