//! The settings that are fixed in our sessions, whatever the defaults of the role, the database and the server are.
//!
//! A default of `ALTER ROLE … SET`, `ALTER DATABASE … SET` or `ALTER SYSTEM SET` could change the text of values, end
//! our sessions, or let them act as another role. A reload could change it in the middle of a stream. A setting in the
//! startup message takes precedence over all of these (its source is the client), and a reload does not change it. The
//! settings are separate parameters, which the server applies after `options`, so nothing in `database.uri` can
//! override them.
//!
//! Values have PostgreSQL's default form, so the stream contains the text that `SELECT column::text` returns in an
//! ordinary session.

/// The sessions that a pin applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sessions {
    /// SQL sessions: for tuplewatch's own statements, and for reads and writes of clients.
    Sql,
    /// The replication session.
    Stream,
    /// All sessions.
    All,
}

/// A setting, its value, and the sessions that it applies to.
pub(super) type Pin = (&'static str, &'static str, Sessions);

use Sessions::{All, Sql, Stream};

/// The pins in the startup message. Every server from PostgreSQL 14 on has these settings, and every role may set them.
const PINS: [Pin; 26] = [
    // The text of values, in the stream and in the calls of Data.
    ("DateStyle", "ISO, MDY", All),
    ("IntervalStyle", "postgres", All),
    ("TimeZone", "UTC", All),
    ("bytea_output", "hex", All),
    ("extra_float_digits", "1", All),
    ("lc_monetary", "C", All),
    ("xmlbinary", "base64", All),
    ("xmloption", "content", All),
    ("array_nulls", "on", All),
    // The stream has the path of an ordinary session. Our statements use a path without functions of other users.
    ("search_path", "\"$user\", public", Stream),
    ("search_path", "pg_catalog, pg_temp", Sql),
    // The syntax of our statements, and the form of the expressions that checks compare.
    ("standard_conforming_strings", "on", All),
    ("backslash_quote", "safe_encoding", All),
    ("quote_all_identifiers", "off", All),
    ("transform_null_equals", "off", All),
    ("client_min_messages", "warning", All),
    // If a policy would hide rows, an error instead of only the other rows.
    ("row_security", "off", All),
    // The user of database.uri, whose rights are checked, instead of the role of ALTER ROLE … SET role.
    ("role", "none", All),
    // Limits on statements and sessions. tuplewatch has its own limits, with its own messages.
    ("statement_timeout", "0", All),
    ("lock_timeout", "0", All),
    ("idle_in_transaction_session_timeout", "0", All),
    ("exit_on_error", "off", All),
    // A reader that is silent for this long is lost, and another one may take the slot.
    ("wal_sender_timeout", "20s", Stream),
    // Markers are written by SQL. A read-only default is a habit, not a missing right.
    ("default_transaction_read_only", "off", All),
    ("default_transaction_isolation", "read committed", All),
    ("default_transaction_deferrable", "off", All),
];

/// The pins that are set by SQL, because they depend on the server's version or require a superuser.
const LATE_PINS: [LatePin; 4] = [
    LatePin { pin: ("idle_session_timeout", "0", All), since: 14, superuser: false },
    // The transaction of the stream is the one that is decoded, which may take long.
    LatePin { pin: ("transaction_timeout", "0", All), since: 17, superuser: false },
    // English messages in our log. Only superusers may set it, so no decision depends on the text of an error: see
    // `failure`.
    LatePin { pin: ("lc_messages", "C", All), since: 14, superuser: true },
    // Triggers must fire for writes of clients. Only a superuser may set it, and so only a superuser's default can be
    // wrong.
    LatePin { pin: ("session_replication_role", "origin", Sql), since: 14, superuser: true },
];

struct LatePin {
    pin: Pin,
    /// The first version of PostgreSQL that has the setting.
    since: u32,
    /// Whether only superusers may set it.
    superuser: bool,
}

impl Sessions {
    fn has(self, (_, _, on): &Pin) -> bool {
        *on == All || *on == self
    }

    /// The parameters of the startup message.
    pub(super) fn pins(self) -> impl Iterator<Item = (&'static str, &'static str)> + use<> {
        PINS.iter().filter(move |pin| self.has(pin)).map(|(name, value, _)| (*name, *value))
    }

    /// The statements that set the late pins.
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
