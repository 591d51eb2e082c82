//! The limits on connections of the role, the database and the server.
//!
//! A replication connection counts towards none of these limits, but towards `max_wal_senders` (PostgreSQL 14 to 18).
//! Only the server's limit applies to a superuser.

use serde::Deserialize;
use tokio_postgres::Client;

use crate::model::diagnostic::{Diagnostic, Report};
use crate::postgres::catalog::{Document, identifier};

/// A limit, and the number of other connections that count towards it.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Limit {
    /// The limit. A negative number means that there is none.
    most: i64,
    others: i64,
}

/// The three limits.
#[derive(Debug, Deserialize)]
pub(crate) struct Limits {
    role: String,
    database: String,
    is_superuser: bool,
    of_role: Limit,
    of_database: Limit,
    /// Without the reserved connections.
    of_server: Limit,
    max_connections: i64,
}

const MEANING: &str = "With fewer, statements of streams share a connection, and calls of Data and Tenancy are refused while \
                       none is free. Without any, nothing is delivered.";

impl Limits {
    pub(crate) async fn read(client: &Client) -> Result<Self, tokio_postgres::Error> {
        // A role may not see backend_type and name of other roles' sessions.
        let sql = "
            WITH others AS MATERIALIZED (
                SELECT usesysid, datid FROM pg_catalog.pg_stat_activity
                 WHERE usesysid IS NOT NULL AND datid IS NOT NULL AND pid <> pg_backend_pid()
                   AND COALESCE(backend_type, 'client backend') = 'client backend'
                   AND COALESCE(application_name, '') NOT LIKE 'tuplewatch%')
            SELECT json_build_object(
                'role', rolname,
                'database', datname,
                'is_superuser', rolsuper,
                'of_role', json_build_object(
                    'most', rolconnlimit, 'others', (SELECT count(*) FROM others WHERE usesysid = r.oid)),
                'of_database', json_build_object(
                    'most', datconnlimit, 'others', (SELECT count(*) FROM others WHERE datid = d.oid)),
                'of_server', json_build_object(
                    'most', current_setting('max_connections')::int - CASE WHEN rolsuper THEN 0 ELSE
                        current_setting('superuser_reserved_connections')::int
                            + COALESCE(current_setting('reserved_connections', true)::int, 0) END,
                    'others', (SELECT count(*) FROM others)),
                'max_connections', current_setting('max_connections')::int)
              FROM pg_catalog.pg_roles r, pg_catalog.pg_database d
             WHERE rolname = session_user AND datname = current_database()";
        client.query_typed_one(sql, &[]).await?.try_get::<_, Document<Self>>(0).map(|document| document.0)
    }

    /// Compares the limits with the most connections that `serve` opens.
    pub(crate) fn check(&self, wanted: usize, report: &mut Report) {
        let wanted = i64::try_from(wanted).unwrap_or(i64::MAX);
        let limited = |limit: Limit| limit.most >= 0 && limit.most.saturating_sub(limit.others) < wanted;
        let what = |limit: Limit, holder: &str| {
            format!(
                "{holder} {} at a time, of which others use {}: tuplewatch serve uses up to {wanted} (database.max_connections)",
                limit.most, limit.others
            )
        };
        let enough = |limit: Limit| limit.others.saturating_add(wanted);
        if !self.is_superuser && limited(self.of_role) {
            let role = identifier(&self.role);
            let fix = format!("ALTER ROLE {role} CONNECTION LIMIT {};  -- at once, no reload", enough(self.of_role));
            let what = what(self.of_role, "may have");
            let subject = format!("connections of role {}", self.role);
            report.add(Diagnostic::warning(subject, what).means(MEANING).fix(fix));
        }
        if !self.is_superuser && limited(self.of_database) {
            let database = identifier(&self.database);
            let enough = enough(self.of_database);
            let fix = format!("ALTER DATABASE {database} CONNECTION LIMIT {enough};  -- at once, no reload");
            let what = what(self.of_database, "may be");
            let subject = format!("connections to database {}", self.database);
            report.add(Diagnostic::warning(subject, what).means(MEANING).fix(fix));
        }
        if limited(self.of_server) {
            let reserved = self.max_connections - self.of_server.most;
            let max_connections = enough(self.of_server).saturating_add(reserved);
            let fix = format!(
                "ALTER SYSTEM SET max_connections = {max_connections};  -- then restart PostgreSQL: a reload is not enough"
            );
            let what = what(self.of_server, "leaves ordinary roles");
            report.add(Diagnostic::warning("max_connections", what).means(MEANING).fix(fix));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the fixes for a `serve` with 12 connections.
    fn check(is_superuser: bool, limits: [(i64, i64); 3]) -> Vec<String> {
        let [of_role, of_database, of_server] = limits.map(|(most, others)| Limit { most, others });
        let (role, database) = ("ada".to_owned(), "app".to_owned());
        let limits = Limits { role, database, is_superuser, of_role, of_database, of_server, max_connections: 100 };
        let mut report = Report::default();
        limits.check(12, &mut report);
        let fix = |diagnostic: Diagnostic| diagnostic.fix.unwrap().split_once(';').unwrap().0.to_owned();
        report.into_diagnostics().into_iter().map(fix).collect()
    }

    #[test]
    fn free_connections_are_compared_with_the_needs_of_serve() {
        let none: [&str; 0] = [];
        assert_eq!(check(false, [(-1, 40), (-1, 40), (97, 85)]), none);
        assert_eq!(check(false, [(12, 0), (13, 1), (97, 0)]), none);
        assert_eq!(check(false, [(11, 0), (-1, 0), (97, 0)]), ["ALTER ROLE \"ada\" CONNECTION LIMIT 12"]);
        assert_eq!(
            check(false, [(12, 1), (20, 10), (97, 86)]),
            [
                "ALTER ROLE \"ada\" CONNECTION LIMIT 13",
                "ALTER DATABASE \"app\" CONNECTION LIMIT 22",
                "ALTER SYSTEM SET max_connections = 101"
            ]
        );
        assert_eq!(check(true, [(1, 0), (1, 0), (100, 99)]), ["ALTER SYSTEM SET max_connections = 111"]);
    }
}
