//! The server's settings, and the rights of the role.

use serde::Deserialize;
use tokio_postgres::Client;

use super::super::catalog::{Document, identifier};
use super::super::slot::Slot;
use super::{MAJORS, Report};

/// The server's settings and the role's rights.
#[derive(Debug, Deserialize)]
pub(super) struct Server {
    version: String,
    version_number: i32,
    in_recovery: bool,
    pub(super) database: String,
    pub(super) role: String,
    may_replicate: bool,
    /// Amazon's servers grant replication, and set wal_level, by means of their own.
    is_rds: bool,
    wal_level: String,
    wal_level_pending: bool,
    slots: i64,
    slots_max: i64,
    walsenders: i64,
    walsenders_max: i64,
    commit_timestamps: String,
    commit_timestamps_pending: bool,
    slot_keep_size: String,
}

impl Server {
    pub(super) async fn read(client: &Client) -> Result<Self, tokio_postgres::Error> {
        let sql = "
            SELECT json_build_object(
                'version', current_setting('server_version'),
                'version_number', current_setting('server_version_num')::int,
                'in_recovery', pg_is_in_recovery(),
                'database', current_database(),
                'role', current_user,
                'may_replicate', rolsuper OR rolreplication OR COALESCE(
                    (SELECT pg_has_role(oid, 'MEMBER') FROM pg_roles WHERE rolname = 'rds_replication'), false),
                'is_rds', EXISTS (SELECT FROM pg_roles WHERE rolname = 'rds_replication'),
                'wal_level', current_setting('wal_level'),
                'wal_level_pending', (SELECT pending_restart FROM pg_settings WHERE name = 'wal_level'),
                'slots', (SELECT count(*) FROM pg_replication_slots),
                'slots_max', current_setting('max_replication_slots')::int,
                'walsenders', (SELECT count(*) FROM pg_stat_replication),
                'walsenders_max', current_setting('max_wal_senders')::int,
                'commit_timestamps', current_setting('track_commit_timestamp'),
                'commit_timestamps_pending',
                    (SELECT pending_restart FROM pg_settings WHERE name = 'track_commit_timestamp'),
                'slot_keep_size', current_setting('max_slot_wal_keep_size'))
              FROM pg_roles WHERE rolname = current_user";
        client.query_typed_one(sql, &[]).await?.try_get::<_, Document<Self>>(0).map(|document| document.0)
    }

    pub(super) fn check(&self, report: &mut Report) {
        let major = self.version_number / 10_000;
        if major < *MAJORS.start() {
            report.error("version", format!("{} is too old: 14 is the oldest that works", self.version), None);
        } else if MAJORS.contains(&major) {
            report.ok("version", format!("PostgreSQL {}", self.version));
        } else {
            let what = format!("PostgreSQL {} is newer than what tuplewatch is tested with (18)", self.version);
            report.warning("version", what, None);
        }
        if self.in_recovery {
            let fix = "SELECT pg_promote();  -- or rather: name the primary in database.uri".to_owned();
            report.error("server", "is a standby, and changes are read from the primary", fix);
        }
        self.check_wal_level(report);
        let subject = format!("role {}", self.role);
        if self.may_replicate {
            report.ok(subject, "may replicate");
        } else {
            let role = identifier(&self.role);
            let fix = if self.is_rds {
                format!("GRANT rds_replication TO {role};  -- at once, no reload")
            } else {
                format!("ALTER ROLE {role} REPLICATION;  -- at once, no reload; by a superuser")
            };
            report.error(subject, "has no REPLICATION", fix);
        }
        if self.commit_timestamps == "on" {
            report.ok("track_commit_timestamp", "on");
        } else {
            let what = format!(
                "is off: tuplewatch does without, but pg_xact_commit_timestamp() and Permify's own Watch do not{}",
                pending(self.commit_timestamps_pending)
            );
            let fix =
                "ALTER SYSTEM SET track_commit_timestamp = on;  -- then restart PostgreSQL: a reload is not enough";
            report.warning("track_commit_timestamp", what, fix.to_owned());
        }
        if self.slot_keep_size == "-1" {
            let what = "is -1, no limit: if tuplewatch is away for long, its slot keeps WAL until the disk is full";
            let fix = "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB';  -- what the disk can spare; then a reload: \
                       SELECT pg_reload_conf();";
            report.warning("max_slot_wal_keep_size", what, fix.to_owned());
        } else {
            report.ok("max_slot_wal_keep_size", self.slot_keep_size.clone());
        }
    }

    fn check_wal_level(&self, report: &mut Report) {
        if self.wal_level == "logical" {
            return report.ok("wal_level", "logical");
        }
        let what = format!("is {}{}", self.wal_level, pending(self.wal_level_pending));
        let fix = if self.is_rds {
            "-- set rds.logical_replication = 1 in the parameter group, then restart (reboot) the instance"
        } else {
            "ALTER SYSTEM SET wal_level = logical;  -- then restart PostgreSQL: a reload is not enough"
        };
        report.error("wal_level", what, fix.to_owned());
    }

    pub(super) fn check_room(&self, slot: Option<&Slot>, slot_expected: bool, report: &mut Report) {
        if slot.is_none() && !slot_expected {
            check_room_for("max_replication_slots", self.slots, self.slots_max, report);
        }
        // If ours is in use, by a tuplewatch that runs, its walsender is among those that are counted.
        if slot.is_none_or(|slot| slot.active_pid.is_none()) {
            check_room_for("max_wal_senders", self.walsenders, self.walsenders_max, report);
        }
    }
}

fn check_room_for(setting: &str, used: i64, most: i64, report: &mut Report) {
    if used < most {
        return report.ok(setting, format!("{used} of {most} in use"));
    }
    let more = most.saturating_add(10);
    let fix = format!("ALTER SYSTEM SET {setting} = {more};  -- then restart PostgreSQL: a reload is not enough");
    report.error(setting, format!("all {most} are in use"), fix);
}

fn pending(is_pending: bool) -> &'static str {
    if is_pending { " (another value stands in the configuration and waits for a restart)" } else { "" }
}
