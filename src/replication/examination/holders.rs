//! Transactions that hold the slot back: its `restart_lsn` does not pass the beginning of one that has written and is still
//! open, and a slot in the making waits for all of them.
//!
//! Only those with a transaction id count. That one has an id is visible to every role; since when, and whose it is, only to
//! members of its role and of `pg_read_all_stats`.

use serde::Deserialize;
use std::time::Duration;
use tokio_postgres::Client;

use super::super::catalog::{Document, identifier, literal};
use crate::finding::{Finding, Report, Span};

/// The oldest that are named; more would not help whoever reads it.
const NAMED_MAX: usize = 5;

const MEANING: &str = "The server keeps all WAL since its beginning for the slot, and a new slot waits for its end.";

#[derive(Debug, Deserialize)]
struct Holders {
    role: String,
    sessions: Vec<Session>,
    prepared: Vec<Prepared>,
}

/// A session with a transaction that has an id.
#[derive(Debug, Deserialize)]
struct Session {
    pid: i32,
    /// None: hidden from us.
    open_seconds: Option<f64>,
    /// Whose it is, in words.
    whose: String,
}

#[derive(Debug, Deserialize)]
struct Prepared {
    gid: String,
    database: String,
    owner: String,
    open_seconds: f64,
}

impl Holders {
    async fn read(client: &Client) -> Result<Self, tokio_postgres::Error> {
        let sql = "
            SELECT json_build_object(
                'role', current_user,
                'sessions', COALESCE((
                    SELECT json_agg(json_build_object(
                               'pid', pid,
                               'open_seconds', extract(epoch FROM clock_timestamp() - xact_start),
                               'whose', concat_ws(', ', 'user ' || usename, 'database ' || datname,
                                                  NULLIF(application_name, ''), state)) ORDER BY age(backend_xid) DESC)
                      FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()), '[]'),
                'prepared', COALESCE((
                    SELECT json_agg(json_build_object(
                               'gid', gid, 'database', database, 'owner', owner,
                               'open_seconds', extract(epoch FROM clock_timestamp() - prepared)) ORDER BY prepared)
                      FROM pg_prepared_xacts), '[]'))";
        client.query_typed_one(sql, &[]).await?.try_get::<_, Document<Self>>(0).map(|document| document.0)
    }

    fn check(&self, long: Duration, report: &mut Report) {
        let before = report.count();
        let is_long = |seconds: f64| seconds >= long.as_secs_f64();
        let span = |seconds: f64| Span(Duration::try_from_secs_f64(seconds).unwrap_or_default());
        let sessions = self.sessions.iter().filter_map(|session| Some((session, session.open_seconds?)));
        for (session, open) in sessions.filter(|(_, open)| is_long(*open)).take(NAMED_MAX) {
            let what = format!("has been open for {} ({})", span(open), session.whose);
            let fix =
                format!("SELECT pg_terminate_backend({});  -- it is rolled back: ask whose it is first", session.pid);
            let finding = Finding::warning(format!("transaction of process {}", session.pid), what);
            report.add(finding.means(MEANING).fix(fix));
        }
        for prepared in self.prepared.iter().filter(|prepared| is_long(prepared.open_seconds)).take(NAMED_MAX) {
            let gid = literal(&prepared.gid);
            let what = format!(
                "has been open for {} (user {}, database {})",
                span(prepared.open_seconds),
                prepared.owner,
                prepared.database
            );
            // Names that others chose stay out of the comment, where nothing quotes them.
            let fix = format!(
                "ROLLBACK PREPARED {gid};  -- or COMMIT PREPARED, as whoever prepared it knows; connected to its database"
            );
            report.add(Finding::warning(format!("prepared transaction {gid}"), what).means(MEANING).fix(fix));
        }
        let hidden = self.sessions.iter().filter(|session| session.open_seconds.is_none()).count();
        if hidden > 0 {
            let what = format!("{hidden} are open, and since when is hidden from role {}", self.role);
            let fix = format!(
                "GRANT pg_read_all_stats TO {};  -- at once, no reload; by a superuser",
                identifier(&self.role)
            );
            report.add(Finding::ok("transactions", what).fix(fix));
        } else if report.is_fine_since(before) {
            report.ok("transactions", format!("none that writes has been open for {}", Span(long)));
        }
    }
}

pub(super) async fn check(client: &Client, long: Duration, report: &mut Report) -> Result<(), tokio_postgres::Error> {
    Holders::read(client).await?.check(long, report);
    Ok(())
}
