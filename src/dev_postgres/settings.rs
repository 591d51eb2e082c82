//! The settings file of the cluster, and the choice of its port.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::path::Path;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Error;

/// Below the ports that Linux (from 32768) and macOS (from 49152) assign to outgoing connections, so that such a
/// connection does not occupy the port when the cluster restarts.
const PORTS: Range<u16> = 15_000..32_000;

/// Settings that tuplewatch needs, and settings for a developer's machine. A caller's settings follow and take
/// precedence.
const DEFAULTS: [(&str, &str); 5] = [
    ("wal_level", "logical"),
    ("track_commit_timestamp", "on"),
    ("max_replication_slots", "16"),
    ("max_wal_senders", "16"),
    // An abandoned slot must not fill the disk.
    ("max_slot_wal_keep_size", "4GB"),
];

/// The text of `settings.conf`. Later lines win, so the settings that keep the cluster private come last.
pub(super) fn render(port: u16, extra: &[(String, String)], requested_dir: &Path) -> Result<String, Error> {
    let mut text = String::from("# Written by tuplewatch at every start: changes to this file are lost.\n");
    // In debug form, because a line break in the path would end the comment.
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

/// A port that is free now, and that this process has not chosen before: the cluster of an earlier one may be stopped for
/// a moment. Only PostgreSQL's own bind can confirm it, so the caller must be ready to choose again.
pub(super) fn free_port() -> u16 {
    // Begins anywhere, because other processes may choose too.
    static NEXT: LazyLock<AtomicUsize> = LazyLock::new(|| AtomicUsize::new(fastrand::usize(..PORTS.len())));
    let next = |_| {
        let at = NEXT.fetch_add(1, Ordering::Relaxed) % PORTS.len();
        PORTS.start.saturating_add(u16::try_from(at).unwrap_or_default())
    };
    let is_free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    // If all ports are in use, the start reports it.
    (0..PORTS.len()).map(next).find(is_free).unwrap_or(PORTS.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_quoted_and_private_settings_come_last() {
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
