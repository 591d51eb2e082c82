//! The cluster's settings file, and its port.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::path::Path;

use super::Error;

/// Below what Linux (32768) and macOS (49152) give to outgoing connections: a port from there might be somebody's local
/// end at the moment when the cluster wants it back.
const PORTS: Range<u16> = 15_000..32_000;

/// What tuplewatch needs, and what a developer's machine needs. A caller's settings come after these and may differ.
const DEFAULTS: [(&str, &str); 5] = [
    ("wal_level", "logical"),
    ("track_commit_timestamp", "on"),
    ("max_replication_slots", "16"),
    ("max_wal_senders", "16"),
    // A slot that nobody reads, of a trial long forgotten, must not fill the disk.
    ("max_slot_wal_keep_size", "4GB"),
];

/// The text of `settings.conf`. Later lines win, so what keeps the cluster private comes last.
pub(super) fn render(port: u16, extra: &[(String, String)], requested_dir: &Path) -> Result<String, Error> {
    let mut text = String::from("# Written by tuplewatch at every start: changes made here are lost.\n");
    // Debug form: a path may hold a line break, which would end the comment.
    let _ = writeln!(text, "# The cluster of {requested_dir:?}.");
    for (name, value) in DEFAULTS {
        push(&mut text, name, value)?;
    }
    for (name, value) in extra {
        push(&mut text, name, value)?;
    }
    push(&mut text, "listen_addresses", "127.0.0.1")?;
    push(&mut text, "unix_socket_directories", "")?;
    push(&mut text, "port", &port.to_string())?;
    Ok(text)
}

fn push(text: &mut String, name: &str, value: &str) -> Result<(), Error> {
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.');
    if !is_name || value.contains(['\n', '\r', '\0']) {
        return Err(Error::Setting { name: name.into(), value: value.into() });
    }
    let quoted = value.replace('\\', "\\\\").replace('\'', "''");
    let _ = writeln!(text, "{name} = '{quoted}'");
    Ok(())
}

/// A port that nobody listens on now. Only PostgreSQL's own bind can make sure, so whoever uses it must be ready to ask
/// again.
pub(super) fn free_port() -> u16 {
    let first = fastrand::u16(PORTS);
    // Once around. If all of them are taken, any is as good: starting will say so.
    let mut ports = (first..PORTS.end).chain(PORTS.start..first);
    ports.find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok()).unwrap_or(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_quoted_and_ours_come_last() {
        let extra = [("search_path".into(), r"a'b\c".into()), ("port".into(), "1".into())];
        let text = render(5433, &extra, Path::new("/a\nport = 2")).unwrap();
        assert!(text.contains("\nwal_level = 'logical'\n"), "{text}");
        assert!(text.contains("\nsearch_path = 'a''b\\\\c'\n"), "{text}");
        assert!(text.ends_with("\nport = '5433'\n"), "{text}");
        assert!(!text.contains("\nport = 2"), "{text}");
    }

    #[test]
    fn settings_that_would_break_the_file_are_refused() {
        let check = |name: &str, value: &str| {
            let error = render(1, &[(name.into(), value.into())], Path::new("/")).unwrap_err();
            assert!(matches!(error, Error::Setting { .. }), "{error}");
        };
        check("", "x");
        check("a b", "x");
        check("include '/etc/passwd'", "x");
        check("a", "x\ny = z");
        check("a", "\0");
    }

    #[test]
    fn a_free_port_can_be_bound() {
        let port = free_port();
        assert!(PORTS.contains(&port));
        TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    }
}
