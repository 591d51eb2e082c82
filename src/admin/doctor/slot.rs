//! Checks the slot: which process reads it, how far it is behind, and how much WAL the server keeps for it.

use serde::Deserialize;
use std::time::Duration;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::admin::monitor::Thresholds;
use crate::model::diagnostic::{Bytes, CommandLine, Diagnostic, Report, Span};
use crate::postgres::catalog::{Document, literal};
use crate::postgres::slot::{self, OPEN_TRANSACTIONS, Slot};

/// The slot's status as the monitor reads it, with additional times.
pub(super) struct SlotStatus {
    pub(super) slot: Slot,
    seen: slot::SlotStatus,
    times: Times,
}

#[derive(Debug, Deserialize)]
struct Times {
    /// The time since the server passed the position of the slot; a lower bound if only the WAL files tell it. `None`:
    /// hidden from this role.
    lag_seconds: Option<f64>,
    /// From version 17 on.
    inactive_seconds: Option<f64>,
    /// From version 18 on, with its unit, as it is set.
    idle_timeout: Option<String>,
    may_list_wal: bool,
}

impl SlotStatus {
    pub(super) async fn read(client: &Client, name: &str) -> Result<Option<Self>, tokio_postgres::Error> {
        let mut seen = slot::SlotStatus::read(client, name).await?;
        let Some(slot) = seen.slot.take() else { return Ok(None) };
        let sql = "
            SELECT json_build_object(
                       'lag_seconds', (SELECT extract(epoch FROM flush_lag) FROM pg_stat_replication
                                        WHERE pid = slot.active_pid),
                       'inactive_seconds', extract(epoch FROM clock_timestamp()
                                                   - (to_json(slot) ->> 'inactive_since')::timestamptz),
                       'idle_timeout', NULLIF(current_setting('idle_replication_slot_timeout', true), '0'),
                       'may_list_wal', has_function_privilege('pg_ls_waldir()', 'EXECUTE'))
              FROM pg_replication_slots AS slot WHERE slot.slot_name::text = $1";
        let Some(row) = client.query_typed_opt(sql, &[(&name, Type::TEXT)]).await? else { return Ok(None) };
        let Document(mut times) = row.try_get::<_, Document<Times>>(0)?;
        if times.may_list_wal {
            // The server has written the last page of that file since it passed the slot's position. The lag that a
            // walsender reports is more exact, but stops growing while its subscriber stands still.
            let sql = "SELECT extract(epoch FROM clock_timestamp() - wal.modification)::float8
                         FROM pg_replication_slots AS slot
                         JOIN pg_ls_waldir() AS wal ON wal.name = pg_walfile_name(slot.confirmed_flush_lsn)
                        WHERE slot.slot_name::text = $1";
            let row = client.query_typed_opt(sql, &[(&name, Type::TEXT)]).await?;
            let seconds: Option<f64> = row.map(|row| row.try_get(0)).transpose()?;
            times.lag_seconds = [times.lag_seconds, seconds].into_iter().flatten().reduce(f64::max);
        }
        Ok(Some(Self { slot, seen, times }))
    }

    pub(super) const fn is_in_use(&self) -> bool {
        self.slot.active_pid.is_some()
    }

    /// The bytes behind the acknowledged position. `None`: nothing was acknowledged yet.
    fn behind_bytes(&self) -> Option<u64> {
        self.seen.confirmed.map(|confirmed| self.seen.wal_end.0.saturating_sub(confirmed.0))
    }

    /// The time since the server passed the position of the slot.
    fn lag(&self) -> Option<Duration> {
        if self.behind_bytes() == Some(0) { Some(Duration::ZERO) } else { self.times.lag_seconds.map(seconds) }
    }

    /// `own_name` is the name of this node's connections. `held_bytes` of WAL are kept on purpose, by the
    /// acknowledgement delay.
    pub(super) fn check(
        &self,
        name: &str,
        own_name: Option<&str>,
        thresholds: &Thresholds,
        held_bytes: u64,
        commands: &CommandLine,
        report: &mut Report,
    ) {
        let subject = format!("replication slot {name}");
        self.check_holder(&subject, own_name, report);
        // A lost slot, or one of another kind, keeps nothing for tuplewatch.
        if self.slot.loss().is_none() && self.slot.slot_type == "logical" {
            self.check_position(name, &subject, thresholds, held_bytes, commands, report);
            self.check_safety(&subject, thresholds, report);
        }
        if let Some(timeout) = &self.times.idle_timeout {
            let what = format!("is {timeout}: a slot that is not read for that long is lost");
            let fix = "ALTER SYSTEM SET idle_replication_slot_timeout = 0;  -- or longer than tuplewatch is ever \
            stopped; then a \
                       reload: SELECT pg_reload_conf();";
            report.warning("idle_replication_slot_timeout", what, fix);
        }
    }

    fn check_holder(&self, subject: &str, own_name: Option<&str>, report: &mut Report) {
        let (Some(pid), Some(holder)) = (self.slot.active_pid, self.seen.holder.as_deref()) else { return };
        let is_tuplewatch = holder.starts_with("tuplewatch ");
        if is_tuplewatch && own_name.is_none_or(|own| holder.starts_with(own)) {
            return;
        }
        let holder = if holder.is_empty() { "without a name" } else { holder };
        let meaning = "Only one process at a time can read a slot, and the server does not send again the changes \
                       that it acknowledges.";
        let fix = format!(
            "SELECT pg_terminate_backend({pid});  -- stop the service that starts it first; or give this tuplewatch \
             a slot of its own in replication.slot"
        );
        let what = format!("is in use by process {pid} ({holder}), which is not this tuplewatch");
        // Another tuplewatch may run there on purpose, and this one is to take over from it.
        let diagnostic = if is_tuplewatch { Diagnostic::warning } else { Diagnostic::error };
        report.add(diagnostic(subject, what).means(meaning).fix(fix));
    }

    fn check_position(
        &self,
        name: &str,
        subject: &str,
        thresholds: &Thresholds,
        held_bytes: u64,
        commands: &CommandLine,
        report: &mut Report,
    ) {
        let (Some(retained), Some(behind)) = (self.seen.retained_bytes, self.behind_bytes()) else { return };
        let lag = self.lag();
        let inactive = self.times.inactive_seconds.map(seconds);
        let reader = match inactive {
            _ if self.is_in_use() => String::new(),
            Some(inactive) => format!("; not read for {}", Span(inactive)),
            None => "; never read".to_owned(),
        };
        let ago = match lag {
            Some(lag) if lag.is_zero() => String::new(),
            Some(lag) => format!(", {} or more", Span(lag)),
            None if self.times.may_list_wal => String::new(),
            None => ", but this role may not see since when (GRANT pg_monitor)".to_owned(),
        };
        let left = self.slot.safe_bytes();
        let left = left.map(|left| format!("; it is lost after another {}", Bytes(left))).unwrap_or_default();
        let what = format!("keeps {} of WAL, and is {} behind{ago}{reader}{left}", Bytes(retained), Bytes(behind));

        let is_late = |duration: Option<Duration>| {
            duration.is_some_and(|duration| !thresholds.lag.is_zero() && duration >= thresholds.lag)
        };
        let is_behind = is_late(lag) || (!self.is_in_use() && is_late(inactive));
        let keeps_much = thresholds.retained_wal_bytes > 0 && retained >= thresholds.retained_wal_bytes;
        if !is_behind && !keeps_much {
            return report.ok(subject, what);
        }
        let diagnostic = Diagnostic::warning(subject, what);
        report.add(if !self.is_in_use() {
            let drop = format!(
                "or, if it will not be read again, in psql: SELECT pg_drop_replication_slot({});",
                literal(name)
            );
            diagnostic
                .means("Until it is read, subscribers receive nothing, and the server keeps all WAL.")
                .fix(commands.serve().fix(&drop))
        } else if is_behind || behind.saturating_sub(held_bytes) >= retained.saturating_sub(behind) {
            diagnostic
                .means("Subscribers receive changes late, and the server keeps all WAL that is not acknowledged.")
                .fix(
                    "-- tuplewatch does not keep up: its log says why (the disk of the change log, the network, a large \
                     transaction)",
                )
        } else {
            diagnostic
                .means("The WAL is kept for a transaction that is open, or ended a moment ago.")
                .fix(format!("{OPEN_TRANSACTIONS};"))
        });
    }

    fn check_safety(&self, subject: &str, thresholds: &Thresholds, report: &mut Report) {
        // The requirements report a slot that is unreserved.
        let Some(left) = self.slot.safe_bytes().filter(|_| self.slot.wal_status.as_deref() != Some("unreserved"))
        else {
            return;
        };
        if left < thresholds.safe_wal_bytes {
            let what = format!("is lost when another {} of WAL are written (safe_wal_size)", Bytes(left));
            let fix = "ALTER SYSTEM SET max_slot_wal_keep_size = -1;  -- or more than now, as much as the disk can spare; then a \
                       reload: SELECT pg_reload_conf();";
            report.warning(subject, what, fix);
        }
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::diagnostic::Severity;

    const THRESHOLDS: Thresholds =
        Thresholds { retained_wal_bytes: 1000, safe_wal_bytes: 100, lag: Duration::from_secs(60) };

    /// An active slot of this node without problems, except for `changes`.
    fn diagnostics(slot: serde_json::Value, changes: serde_json::Value) -> Vec<String> {
        let mut slot_status = serde_json::json!({
            "slot": {"plugin": "pgoutput", "slot_type": "logical", "database": "d", "active_pid": 7,
                     "wal_status": "reserved", "safe_wal_size": 1000},
            "holder": "tuplewatch me", "wal_end": "0/2000", "retained_bytes": 0, "confirmed": "0/2000",
            "lag_seconds": null, "inactive_seconds": null, "idle_timeout": null, "may_list_wal": true,
        });
        for (place, more) in [("/slot", slot), ("", changes)] {
            let object = slot_status.pointer_mut(place).unwrap().as_object_mut().unwrap();
            object.extend(more.as_object().unwrap().clone());
        }
        let times = serde_json::from_value(slot_status.clone()).unwrap();
        let mut seen: slot::SlotStatus = serde_json::from_value(slot_status).unwrap();
        let slot_status = SlotStatus { slot: seen.slot.take().unwrap(), seen, times };
        let mut report = Report::default();
        slot_status.check("s", Some("tuplewatch me"), &THRESHOLDS, 0x100, &CommandLine::default(), &mut report);
        let bad = report.into_diagnostics().into_iter().filter(|diagnostic| diagnostic.severity != Severity::Ok);
        bad.map(|diagnostic| format!("{diagnostic}")).collect()
    }

    #[test]
    fn conditions_that_are_warnings() {
        let none = || serde_json::json!({});
        let check = |slot, changes, expected: &[&str]| {
            let found = diagnostics(slot, changes);
            assert_eq!(found.len(), expected.len(), "{found:#?}");
            assert!(found.iter().zip(expected).all(|(found, expected)| found.contains(expected)), "{found:#?}");
        };
        let idle = || serde_json::json!({"active_pid": null});
        check(none(), none(), &[]);
        check(none(), serde_json::json!({"holder": "tuplewatch me and more"}), &[]);
        check(none(), serde_json::json!({"holder": null}), &[]);
        check(none(), serde_json::json!({"holder": "pg_recvlogical"}), &["by process 7 (pg_recvlogical)"]);
        check(none(), serde_json::json!({"holder": "tuplewatch you"}), &["not this tuplewatch"]);
        check(none(), serde_json::json!({"retained_bytes": 1000}), &["for a transaction that is open"]);
        check(none(), serde_json::json!({"retained_bytes": 1000, "confirmed": "0/1D00"}), &["does not keep up"]);
        check(
            none(),
            serde_json::json!({"retained_bytes": 1000, "confirmed": "0/1E00"}),
            &["for a transaction that is open"],
        );
        check(none(), serde_json::json!({"confirmed": "0/1FFF", "lag_seconds": 60.0}), &["does not keep up"]);
        // At the end of the WAL, the age of that WAL does not matter.
        check(none(), serde_json::json!({"lag_seconds": 6000.0}), &[]);
        check(idle(), serde_json::json!({"confirmed": "0/1FFF", "lag_seconds": 59.0}), &[]);
        check(idle(), serde_json::json!({"confirmed": "0/1FFF", "lag_seconds": 60.0}), &["fix: tuplewatch serve"]);
        check(idle(), serde_json::json!({"inactive_seconds": 7200.0}), &["not read for 120 min"]);
        check(serde_json::json!({"safe_wal_size": 99}), none(), &["99 bytes of WAL are written"]);
        check(serde_json::json!({"safe_wal_size": null}), none(), &[]);
        check(serde_json::json!({"safe_wal_size": -5, "wal_status": "unreserved"}), none(), &[]);
        check(serde_json::json!({"wal_status": "lost"}), serde_json::json!({"retained_bytes": 5000}), &[]);
        check(none(), serde_json::json!({"idle_timeout": "1d"}), &["idle_replication_slot_timeout: is 1d"]);
    }
}
