//! Settings that our sessions have whatever the defaults of the role, the database and the server are.
//!
//! A default of `ALTER ROLE … SET`, `ALTER DATABASE … SET` or `ALTER SYSTEM SET` would change what the values of rows look like,
//! end our sessions, or let them act as another role; and a reload would change it in the middle of a stream. A setting of the
//! startup message beats all of these (its source is the client), and a reload does not touch it. They are parameters of their
//! own there and come after `options` in the server's reading of it, so that nothing in `database.uri` undoes them.
//!
//! Values have the form that PostgreSQL gives them by default: `SELECT column::text` of an ordinary session is what is streamed.

/// The sessions that a pin applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sessions {
    /// SQL: tuplewatch's own statements, and those that read and write for clients.
    Sql,
    /// The one that replicates.
    Stream,
    /// All of them.
    All,
}

/// A setting, its value, and where.
pub(super) type Pin = (&'static str, &'static str, Sessions);

use Sessions::{All, Sql, Stream};

/// Sent in the startup message: every server from PostgreSQL 14 on has them, and every role may set them.
const PINS: [Pin; 26] = [
    // The text of values: what is streamed, and what Data reads and writes.
    ("DateStyle", "ISO, MDY", All),
    ("IntervalStyle", "postgres", All),
    ("TimeZone", "UTC", All),
    ("bytea_output", "hex", All),
    ("extra_float_digits", "1", All),
    ("lc_monetary", "C", All),
    ("xmlbinary", "base64", All),
    ("xmloption", "content", All),
    ("array_nulls", "on", All),
    // The stream has the path of an ordinary session; our statements, the path that nobody else's functions are in.
    ("search_path", "\"$user\", public", Stream),
    ("search_path", "pg_catalog, pg_temp", Sql),
    // How our statements are read, and how PostgreSQL writes the expressions that checks compare.
    ("standard_conforming_strings", "on", All),
    ("backslash_quote", "safe_encoding", All),
    ("quote_all_identifiers", "off", All),
    ("transform_null_equals", "off", All),
    ("client_min_messages", "warning", All),
    // Where a policy would hide rows, an error rather than only the others.
    ("row_security", "off", All),
    // The user of database.uri, whose rights are checked, and not the one that ALTER ROLE … SET role makes of it.
    ("role", "none", All),
    // Limits on statements and sessions. Ours have bounds of their own, with messages of their own.
    ("statement_timeout", "0", All),
    ("lock_timeout", "0", All),
    ("idle_in_transaction_session_timeout", "0", All),
    ("exit_on_error", "off", All),
    // A reader that is silent for so long is gone, and another one may take the slot.
    ("wal_sender_timeout", "20s", Stream),
    // Markers are written by SQL. That sessions only read by default is a habit, and no right that is missing.
    ("default_transaction_read_only", "off", All),
    ("default_transaction_isolation", "read committed", All),
    ("default_transaction_deferrable", "off", All),
];

/// Set once the server has sent its version, and whether the role is a superuser.
const LATE_PINS: [LatePin; 4] = [
    LatePin { pin: ("idle_session_timeout", "0", All), since: 14, superuser: false },
    // The transaction of the stream is the one that is decoded, which may take long.
    LatePin { pin: ("transaction_timeout", "0", All), since: 17, superuser: false },
    // English messages in our log. Only superusers may set it, so no decision depends on the text of an error: see `failure`.
    LatePin { pin: ("lc_messages", "C", All), since: 14, superuser: true },
    // So that triggers fire for what clients write. Only a superuser can have been given another value by mistake.
    LatePin { pin: ("session_replication_role", "origin", Sql), since: 14, superuser: true },
];

struct LatePin {
    pin: Pin,
    /// The first PostgreSQL that has it.
    since: u32,
    /// Whether only superusers may set it.
    superuser: bool,
}

impl Sessions {
    fn has(self, (_, _, on): &Pin) -> bool {
        *on == All || *on == self
    }

    /// Parameters of the startup message.
    pub(super) fn pins(self) -> impl Iterator<Item = (&'static str, &'static str)> + use<> {
        PINS.iter().filter(move |pin| self.has(pin)).map(|(name, value, _)| (*name, *value))
    }

    /// The statements that set the rest.
    pub(super) fn late_pins(self, major: u32, is_superuser: bool) -> String {
        let may = |late: &&LatePin| self.has(&late.pin) && major >= late.since && (is_superuser || !late.superuser);
        let set = |late: &LatePin| format!("SET {} = '{}';", late.pin.0, late.pin.1);
        LATE_PINS.iter().filter(may).map(set).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_servers_and_ordinary_roles_get_fewer_pins() {
        let timeouts = "SET idle_session_timeout = '0';";
        assert_eq!(Sql.late_pins(13, false), "");
        assert_eq!(Sql.late_pins(16, false), timeouts);
        assert_eq!(Stream.late_pins(17, false), format!("{timeouts}SET transaction_timeout = '0';"));
        assert_eq!(Stream.late_pins(14, true), format!("{timeouts}SET lc_messages = 'C';"));
        assert!(Sql.late_pins(18, true).ends_with("SET session_replication_role = 'origin';"));
    }

    #[test]
    fn no_session_sets_a_pin_twice() {
        for sessions in [Sql, Stream] {
            let mut names: Vec<_> = sessions.pins().map(|(name, _)| name).collect();
            names.sort_unstable();
            let all = names.len();
            names.dedup();
            assert_eq!(names.len(), all);
        }
    }
}
