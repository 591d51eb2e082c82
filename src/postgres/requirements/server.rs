//! The requirements on the server's settings, and on the rights of the role.

use serde::Deserialize;
use tokio_postgres::Client;

use super::MAJORS;
use crate::model::diagnostic::{Bytes, Diagnostic, Report};
use crate::postgres::catalog::{Document, identifier};
use crate::postgres::slot::AckDelay;
use crate::postgres::slot::Slot;

/// The version of PostgreSQL.
#[derive(Debug)]
pub(crate) struct Version {
    text: String,
    major: i32,
    minor: i32,
}

/// The first minor releases whose walsender applies an altered publication even after a transaction that was writing
/// while it was altered.
const MENDED_IN: [(i32, i32); 4] = [(14, 18), (15, 13), (16, 9), (17, 5)];

impl Version {
    /// Reads the version in a separate statement, because older versions lack columns that the other statements read.
    pub(crate) async fn read(client: &Client) -> Result<Self, tokio_postgres::Error> {
        let sql = "SELECT current_setting('server_version'), current_setting('server_version_num')::int4";
        let row = client.query_typed_one(sql, &[]).await?;
        let number: i32 = row.try_get(1)?;
        Ok(Self { text: row.try_get(0)?, major: number / 10_000, minor: number % 10_000 })
    }

    pub(super) const fn major(&self) -> i32 {
        self.major
    }

    /// Whether the other statements work on this version.
    pub(crate) const fn is_supported(&self) -> bool {
        self.major >= *MAJORS.start()
    }

    pub(crate) fn diagnostic(&self) -> Diagnostic {
        const SUBJECT: &str = "version";
        let (text, oldest, newest) = (&self.text, MAJORS.start(), MAJORS.end());
        if !self.is_supported() {
            let what = format!("PostgreSQL {text} is too old: {oldest} is the oldest that works");
            Diagnostic::error(SUBJECT, what).fix(format!("-- upgrade PostgreSQL to {oldest} or newer"))
        } else if let Some((major, minor)) =
            MENDED_IN.iter().find(|(major, minor)| self.major == *major && self.minor < *minor)
        {
            let what = format!("PostgreSQL {text} can miss that a publication was altered");
            let meaning = "If the publication is altered while a transaction writes, rows of later transactions may not be sent, \
                           and nothing tells.";
            let fix = format!(
                "-- update PostgreSQL to {major}.{minor} or newer; until then restart tuplewatch after ALTER PUBLICATION"
            );
            Diagnostic::warning(SUBJECT, what).means(meaning).fix(fix)
        } else if self.major <= *newest {
            Diagnostic::ok(SUBJECT, format!("PostgreSQL {text}"))
        } else {
            let what = format!("PostgreSQL {text} is newer than what tuplewatch is tested with ({newest})");
            Diagnostic::warning(SUBJECT, what).fix("-- check for a newer version of tuplewatch")
        }
    }
}

/// The server's settings and the role's rights.
#[derive(Debug, Deserialize)]
pub(super) struct Server {
    pub(super) database: String,
    pub(super) role: String,
    may_replicate: bool,
    /// The role that `ALTER ROLE … SET role` would switch to.
    becomes: Option<String>,
    /// Whether this is Amazon RDS, which has its own means to grant replication and to set wal_level.
    is_rds: bool,
    wal_level: String,
    slots: i64,
    slots_max: i64,
    walsenders: i64,
    walsenders_max: i64,
    commit_timestamps: String,
    slot_keep_size: String,
    /// The same in bytes. A negative number means that there is no limit.
    slot_keep_bytes: i64,
    synchronous_standbys: String,
    /// Settings with a configured value that needs a restart.
    pending_restart: Vec<String>,
}

impl Server {
    pub(super) async fn read(client: &Client) -> Result<Self, tokio_postgres::Error> {
        let sql = "
            SELECT json_build_object(
                'database', current_database(),
                'role', current_user,
                'may_replicate', rolsuper OR rolreplication OR COALESCE(
                    (SELECT pg_has_role(oid, 'MEMBER') FROM pg_roles WHERE rolname = 'rds_replication'), false),
                'becomes', (SELECT substr(setting, length('role=') + 1)
                              FROM pg_db_role_setting, unnest(setconfig) AS setting
                             WHERE setrole IN (0, (SELECT oid FROM pg_roles WHERE rolname = current_user))
                               AND setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
                               AND starts_with(setting, 'role=')
                             ORDER BY setrole DESC, setdatabase DESC LIMIT 1),
                'is_rds', EXISTS (SELECT FROM pg_roles WHERE rolname = 'rds_replication'),
                'wal_level', current_setting('wal_level'),
                'slots', (SELECT count(*) FROM pg_replication_slots),
                'slots_max', current_setting('max_replication_slots')::int,
                'walsenders', (SELECT count(*) FROM pg_stat_replication),
                'walsenders_max', current_setting('max_wal_senders')::int,
                'commit_timestamps', current_setting('track_commit_timestamp'),
                'slot_keep_size', current_setting('max_slot_wal_keep_size'),
                'slot_keep_bytes', (SELECT setting::int8 << 20 FROM pg_settings WHERE name = 'max_slot_wal_keep_size'),
                'synchronous_standbys', current_setting('synchronous_standby_names'),
                'pending_restart',
                    COALESCE((SELECT json_agg(name) FROM pg_settings WHERE pending_restart), '[]'))
              FROM pg_roles WHERE rolname = current_user";
        client.query_typed_one(sql, &[]).await?.try_get::<_, Document<Self>>(0).map(|document| document.0)
    }

    pub(super) fn check(&self, report: &mut Report) {
        self.check_wal_level(report);
        self.check_replication(report);
        self.check_commit_timestamps(report);
    }

    /// Checks the requirements of a new slot, and the room for it unless it replaces another slot.
    pub(super) fn check_for_slot(&self, takes_room: bool, report: &mut Report) {
        self.check_wal_level(report);
        self.check_replication(report);
        self.check_room_for("max_replication_slots", self.slots, self.slots_max, takes_room, report);
    }

    fn check_replication(&self, report: &mut Report) {
        let subject = format!("role {}", self.role);
        if let Some(other) = self.becomes.as_ref().filter(|other| *other != "none" && **other != self.role) {
            let role = identifier(&self.role);
            let what =
                format!("would become {other} at log-on (SET role), and acts as itself here, with its own rights");
            let fix = format!("ALTER ROLE {role} RESET role;  -- or name another user in database.uri");
            report.warning(&subject, what, fix);
        }
        if self.may_replicate {
            report.ok(subject, "may replicate");
        } else {
            let role = identifier(&self.role);
            let fix = if self.is_rds {
                format!("GRANT rds_replication TO {role};  -- at once, no reload")
            } else {
                format!("ALTER ROLE {role} REPLICATION;  -- at once, no reload; by a superuser")
            };
            let meaning = "Only a role that has it may read from a replication slot.";
            report.add(Diagnostic::error(subject, "has no REPLICATION").means(meaning).fix(fix));
        }
    }

    fn check_commit_timestamps(&self, report: &mut Report) {
        if self.commit_timestamps == "on" {
            report.ok("track_commit_timestamp", "on");
        } else {
            let what = format!(
                "is off: tuplewatch does not need it, but pg_xact_commit_timestamp() and Permify's own Watch do{}",
                self.pending("track_commit_timestamp")
            );
            let fix =
                "ALTER SYSTEM SET track_commit_timestamp = on;  -- then restart PostgreSQL: a reload is not enough";
            report.warning("track_commit_timestamp", what, fix);
        }
    }

    /// Checks that the server keeps enough WAL for the acknowledgement delay.
    pub(super) fn check_keep_size(&self, ack_delay: AckDelay, report: &mut Report) {
        const SETTING: &str = "max_slot_wal_keep_size";
        let Ok(keep_bytes) = u64::try_from(self.slot_keep_bytes) else {
            let what = "is -1, no limit: if tuplewatch is down for long, its slot keeps WAL until the disk is full";
            let fix = "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB';  -- what the disk can spare; then a reload: \
                       SELECT pg_reload_conf();";
            return report.warning(SETTING, what, fix);
        };
        let delayed_bytes = ack_delay.bytes_max();
        // The rest is for WAL since the last checkpoint, and for WAL that is written while tuplewatch is down.
        if delayed_bytes == 0 || delayed_bytes < keep_bytes / 2 {
            return report.ok(SETTING, self.slot_keep_size.clone());
        }
        let what = format!(
            "is {}, and replication.acknowledgement_delay.size lets {} be held back of it",
            self.slot_keep_size,
            Bytes(delayed_bytes)
        );
        let fix = format!(
            "ALTER SYSTEM SET {SETTING} = '{}MB';  -- then a reload: SELECT pg_reload_conf(); or set \
             replication.acknowledgement_delay.size to less",
            (delayed_bytes >> 20).saturating_mul(4)
        );
        if delayed_bytes < keep_bytes {
            let meaning = "While tuplewatch is down, only little WAL may be written before the slot is lost.";
            report.add(Diagnostic::warning(SETTING, what).means(meaning).fix(fix));
        } else {
            report.add(
                Diagnostic::error(SETTING, what)
                    .means("The slot would be lost while tuplewatch works as configured.")
                    .fix(fix),
            );
        }
    }

    /// PostgreSQL counts logical walsenders as standbys. Ours would confirm a commit late (with its acknowledgement),
    /// or before a standby has it.
    pub(super) fn check_synchronous_standbys(&self, ack_delay: AckDelay, report: &mut Report) {
        const SETTING: &str = "synchronous_standby_names";
        if !counts_us(&self.synchronous_standbys) {
            return;
        }
        let what = format!("is {}, which tuplewatch matches too", self.synchronous_standbys);
        let fix = format!(
            "ALTER SYSTEM SET {SETTING} = 'FIRST 1 (standby1)';  -- the names (application_name) of your standbys; then a reload: \
             SELECT pg_reload_conf();"
        );
        if ack_delay.age.is_zero() {
            let meaning = "A commit may count as replicated although only tuplewatch has received it.";
            report.add(Diagnostic::warning(SETTING, what).means(meaning).fix(fix));
        } else {
            let meaning = "Every commit may wait until its WAL is older than replication.acknowledgement_delay.age.";
            report.add(Diagnostic::error(SETTING, what).means(meaning).fix(fix));
        }
    }

    fn check_wal_level(&self, report: &mut Report) {
        if self.wal_level == "logical" {
            return report.ok("wal_level", "logical");
        }
        let what = format!("is {}{}", self.wal_level, self.pending("wal_level"));
        let fix = if self.is_rds {
            "-- set rds.logical_replication = 1 in the parameter group, then restart (reboot) the instance"
        } else {
            "ALTER SYSTEM SET wal_level = logical;  -- then restart PostgreSQL: a reload is not enough"
        };
        let meaning = "Row changes can be read from the WAL only with wal_level = logical.";
        report.add(Diagnostic::error("wal_level", what).means(meaning).fix(fix));
    }

    pub(super) fn check_room(&self, slot: Option<&Slot>, report: &mut Report) {
        self.check_room_for("max_replication_slots", self.slots, self.slots_max, slot.is_none(), report);
        // If our slot is in use by a running tuplewatch, its walsender is already counted.
        let needs_walsender = slot.is_none_or(|slot| slot.active_pid.is_none());
        self.check_room_for("max_wal_senders", self.walsenders, self.walsenders_max, needs_walsender, report);
    }

    fn check_room_for(&self, setting: &str, used: i64, most: i64, needs_one: bool, report: &mut Report) {
        if used < most || !needs_one {
            return report.ok(setting, format!("{used} of {most} in use"));
        }
        let more = most.saturating_add(10);
        let fix = format!("ALTER SYSTEM SET {setting} = {more};  -- then restart PostgreSQL: a reload is not enough");
        let what = format!("all {most} are in use{}", self.pending(setting));
        report.add(Diagnostic::error(setting, what).means("tuplewatch needs one to itself.").fix(fix));
    }

    fn pending(&self, setting: &str) -> &'static str {
        if self.pending_restart.iter().any(|pending| pending == setting) {
            " (another value stands in the configuration and waits for a restart)"
        } else {
            ""
        }
    }
}

/// Whether `synchronous_standby_names` matches our walsenders. PostgreSQL compares whole application names, and ours
/// consist of `tuplewatch` and a node's id.
fn counts_us(standbys: &str) -> bool {
    let mut names = standbys.split([',', '(', ')']).map(|name| name.trim_matches([' ', '"']).to_ascii_lowercase());
    names.any(|name| name == "*" || name.starts_with("tuplewatch "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::diagnostic::Severity;

    #[test]
    fn old_versions_are_errors_or_warnings() {
        for (major, minor, severity) in [
            (12, 22, Severity::Error),
            (13, 23, Severity::Error),
            (14, 17, Severity::Warning),
            (14, 18, Severity::Ok),
            (15, 12, Severity::Warning),
            (17, 5, Severity::Ok),
            (18, 0, Severity::Ok),
            (19, 0, Severity::Warning),
        ] {
            let version = Version { text: format!("{major}.{minor}"), major, minor };
            assert_eq!(version.diagnostic().severity, severity, "{major}.{minor}");
            assert_eq!(version.is_supported(), severity != Severity::Error, "{major}.{minor}");
        }
    }

    #[test]
    fn standby_names_that_match_us_are_recognized() {
        for ours in ["*", "\"*\"", "2 (a, *)", "ANY 1 (\"tuplewatch 7f\", b)", "FIRST 1 (\"Tuplewatch 7f\")"] {
            assert!(counts_us(ours), "{ours}");
        }
        for others in
            ["", "a", "tuplewatch", "FIRST 2 (tuplewatch_db1, \"tuplewatch-db2\")", "ANY 1 (\"my tuplewatch\")"]
        {
            assert!(!counts_us(others), "{others}");
        }
    }
}
