//! Whether the slot survives a promotion, and whether waiting for standbys holds it up. From version 17 on a slot can be copied
//! to standbys (`failover`), and then waits for those that `synchronized_standby_slots` names.

use serde::Deserialize;
use tokio_postgres::Client;

use super::Expectation;
use super::slot::SlotStatus;
use crate::model::diagnostic::{CommandLine, Diagnostic, Report};
use crate::postgres::catalog::{Document, identifier, literal};
use crate::postgres::slot::FAILOVER_SLOTS;

const SETTING: &str = "synchronized_standby_slots";

#[derive(Debug, Deserialize)]
struct Standbys {
    version_number: i32,
    /// Connected ones; everything that streams WAL as it is.
    count: i64,
    /// Physical slots that are in use: by what a standby has its WAL kept.
    physical: Vec<String>,
    /// What the setting names.
    named: Vec<Named>,
}

/// A slot that is to be waited for.
#[derive(Debug, Deserialize)]
struct Named {
    name: String,
    /// None: there is no such slot.
    slot_type: Option<String>,
    active: Option<bool>,
}

impl Named {
    /// Why it will never have got as far as it should.
    fn obstacle(&self) -> Option<&'static str> {
        match (self.slot_type.as_deref(), self.active) {
            (None, _) => Some("does not exist"),
            (Some("physical"), Some(true)) => None,
            (Some("physical"), _) => Some("has no standby connected"),
            (Some(_), _) => Some("is not a physical slot"),
        }
    }
}

impl Standbys {
    async fn read(client: &Client) -> Result<Self, tokio_postgres::Error> {
        // Where the state is hidden from us, whatever is no logical slot's walsender is taken for a standby's.
        let sql = "
            SELECT json_build_object(
                'version_number', current_setting('server_version_num')::int,
                'count', (SELECT count(*) FROM pg_stat_replication AS sender
                           WHERE COALESCE(state, 'streaming') IN ('streaming', 'catchup')
                             AND NOT EXISTS (SELECT FROM pg_replication_slots AS slot
                                              WHERE slot.active_pid = sender.pid AND slot.slot_type = 'logical')),
                'physical', COALESCE((SELECT json_agg(slot_name ORDER BY slot_name) FROM pg_replication_slots
                                       WHERE slot_type = 'physical' AND active), '[]'),
                'named', COALESCE((
                    SELECT json_agg(json_build_object('name', named.name, 'slot_type', slot.slot_type,
                                                      'active', slot.active) ORDER BY named.name)
                      FROM (SELECT lower(trim(item, ' \"')) AS name
                              FROM string_to_table(current_setting('synchronized_standby_slots', true), ',') AS item)
                           AS named
                      LEFT JOIN pg_replication_slots AS slot ON slot.slot_name::text = named.name
                     WHERE named.name <> ''), '[]'))";
        client.query_typed_one(sql, &[]).await?.try_get::<_, Document<Self>>(0).map(|document| document.0)
    }

    fn check(&self, slot: &str, slot_status: Option<&SlotStatus>, commands: &CommandLine, report: &mut Report) {
        if self.version_number < FAILOVER_SLOTS {
            if self.count > 0 {
                let what = format!(
                    "{} connected. Before version 17 none gets a copy of the slot: a promotion leaves a gap, and takes a new slot: {}",
                    self.count,
                    commands.recreate_slot()
                );
                report.ok("standbys", what);
            }
            return;
        }
        let before = report.count();
        self.check_named(slot_status.is_some_and(|slot_status| slot_status.slot.failover == Some(true)), report);
        let Some(slot_status) = slot_status else { return };
        let subject = format!("replication slot {slot}");
        if self.count > 0 && slot_status.slot.failover != Some(true) {
            let what = "is not copied to the standbys (failover is off)";
            let meaning = "After a promotion it is not there: what changes until there is a new one is a gap.";
            let fix = format!(
                "-- tuplewatch serve sets it by itself with replication.failover: auto. Or, while nobody reads the slot, in a \
                 replication connection (psql 'dbname=… replication=database'): ALTER_REPLICATION_SLOT {} (FAILOVER true)",
                identifier(slot)
            );
            report.add(Diagnostic::warning(&subject, what).means(meaning).fix(fix));
        } else if self.count > 0 && self.named.is_empty() {
            let meaning =
                "Changes can reach subscribers before a standby has them: after a promotion those never happened.";
            let fix = if self.physical.is_empty() {
                format!("-- give each standby a slot (primary_slot_name), and name them in {SETTING}")
            } else {
                setting(&self.physical.join(", "), "leave out those of backups, which are never promoted")
            };
            report.add(Diagnostic::warning(SETTING, "is empty, and standbys are connected").means(meaning).fix(fix));
        }
        if report.is_fine_since(before) {
            let word = |is_on: Option<bool>| if is_on == Some(true) { "on" } else { "off" };
            let (failover, synced) = (word(slot_status.slot.failover), word(slot_status.slot.synced));
            report
                .ok(subject, format!("failover is {failover}, synced is {synced}; standbys connected: {}", self.count));
        }
    }

    fn check_named(&self, fails_over: bool, report: &mut Report) {
        let obstacles: Vec<(&Named, &str)> =
            self.named.iter().filter_map(|named| Some((named, named.obstacle()?))).collect();
        if obstacles.is_empty() {
            return;
        }
        let what: Vec<String> = obstacles.iter().map(|(named, why)| format!("{}, which {why}", named.name)).collect();
        let what = format!("names {}", what.join(", and "));
        let good = self.named.iter().filter(|named| named.obstacle().is_none());
        let good: Vec<&str> = good.map(|named| named.name.as_str()).collect();
        let until = "start the standby instead where it comes back soon: while it is not named, a promotion of it takes back what \
                     was streamed";
        let fix = setting(&good.join(", "), until);
        report.add(if fails_over {
            let meaning =
                "The slot waits for it before it sends anything: nothing reaches tuplewatch until it is there.";
            Diagnostic::error(SETTING, what).means(meaning).fix(fix)
        } else {
            let meaning =
                "Slots with failover wait for it before they send anything; tuplewatch's has it off, and does not.";
            Diagnostic::warning(SETTING, what).means(meaning).fix(fix)
        });
    }
}

fn setting(slots: &str, but: &str) -> String {
    let value = literal(slots);
    format!("ALTER SYSTEM SET {SETTING} = {value};  -- then a reload: SELECT pg_reload_conf(); but {but}")
}

pub(super) async fn check(
    client: &Client,
    expected: &Expectation<'_>,
    slot_status: Option<&SlotStatus>,
    report: &mut Report,
) -> Result<(), tokio_postgres::Error> {
    Standbys::read(client).await?.check(expected.slot, slot_status, expected.commands, report);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_or_idle_standby_slot_is_reported() {
        let named =
            |slot_type: Option<&str>, active| Named { name: "n".into(), slot_type: slot_type.map(Into::into), active };
        for (slot_type, active, expected) in [
            (None, None, Some("does not exist")),
            (Some("physical"), Some(true), None),
            (Some("physical"), Some(false), Some("has no standby connected")),
            (Some("logical"), Some(true), Some("is not a physical slot")),
        ] {
            assert_eq!(named(slot_type, active).obstacle(), expected, "{slot_type:?} {active:?}");
        }
    }
}
