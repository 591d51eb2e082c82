//! Transactions that are open, and that others wait for: a slot in the making, the end of a gap, a lock on a table.
//!
//! Every role sees that there is one, whether it has an id, and which tables it has locked. Since when it is open, and what it
//! does, only members of its role and of `pg_read_all_stats` see.

use serde::Deserialize;
use std::fmt;
use std::time::Duration;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::catalog::{Document, Table, literal};
use crate::finding::Span;
use crate::mapping::TableName;

/// The oldest that are named; more would not help whoever reads it.
pub(super) const NAMED_MAX: usize = 5;

/// An open transaction, of a session or prepared.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Transaction {
    owner: Owner,
    /// None: hidden from us.
    open_seconds: Option<f64>,
    /// User, database, application and state, as far as they can be seen.
    pub(super) whose: String,
    /// The watched tables that it has locked.
    pub(super) tables: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Owner {
    Session(i32),
    Prepared(String),
}

/// Locks of a table that count.
#[derive(Clone, Copy, Debug)]
pub(super) enum Locks {
    /// Those that writers take.
    Writing,
    /// Those that `LOCK TABLE … IN SHARE ROW EXCLUSIVE MODE` waits for.
    NotReading,
    /// All, for which `ALTER TABLE` waits.
    All,
}

impl Locks {
    /// As `pg_locks` names them.
    const fn modes(self) -> &'static [&'static str] {
        match self {
            Self::Writing => &["RowExclusiveLock", "ShareRowExclusiveLock", "ExclusiveLock", "AccessExclusiveLock"],
            Self::NotReading => &[
                "RowExclusiveLock",
                "ShareUpdateExclusiveLock",
                "ShareLock",
                "ShareRowExclusiveLock",
                "ExclusiveLock",
                "AccessExclusiveLock",
            ],
            Self::All => &[
                "AccessShareLock",
                "RowShareLock",
                "RowExclusiveLock",
                "ShareUpdateExclusiveLock",
                "ShareLock",
                "ShareRowExclusiveLock",
                "ExclusiveLock",
                "AccessExclusiveLock",
            ],
        }
    }
}

/// Tables by oid, each partition under the name of the table that is mapped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Watched {
    oids: Vec<u32>,
    names: Vec<String>,
}

impl Watched {
    pub(super) fn one(oid: u32, name: &TableName) -> Self {
        Self { oids: vec![oid], names: vec![name.to_string()] }
    }

    pub(super) fn of<'a>(tables: impl IntoIterator<Item = &'a Table>) -> Self {
        let mut watched = Self::default();
        for table in tables {
            let partitions = table.partitions.iter().map(|partition| partition.relation);
            for oid in table.oid.into_iter().chain(partitions) {
                watched.oids.push(oid);
                watched.names.push(table.name().to_string());
            }
        }
        watched
    }
}

/// Those that have an id, of the whole cluster, and those that have locked one of the tables; the oldest first. Neither our own
/// nor that of the process `waiting`.
pub(super) async fn open(
    client: &Client,
    watched: &Watched,
    locks: Locks,
    waiting: Option<i32>,
) -> Result<Vec<Transaction>, tokio_postgres::Error> {
    // The locks of prepared transactions have no process. What they have in common with the transaction is a virtual id, which
    // also has the lock of the id itself.
    let sql = "
        WITH locked AS (
            SELECT pid, virtualtransaction, json_agg(DISTINCT watched.name) AS tables
              FROM pg_locks JOIN unnest($1, $2) AS watched(oid, name) ON relation = watched.oid
             WHERE locktype = 'relation' AND granted AND mode = ANY ($3)
               AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
             GROUP BY pid, virtualtransaction),
        open AS (
            SELECT json_build_object('session', pid) AS owner, xact_start AS since, backend_xid AS xid, tables,
                   concat_ws(', ', 'user ' || usename, 'database ' || datname, NULLIF(application_name, ''), state) AS whose
              FROM pg_stat_activity LEFT JOIN locked USING (pid)
             WHERE (backend_xid IS NOT NULL OR tables IS NOT NULL) AND pid <> pg_backend_pid()
               AND pid IS DISTINCT FROM $4
            UNION ALL
            SELECT json_build_object('prepared', gid), prepared, transaction, tables,
                   concat_ws(', ', 'user ' || owner, 'database ' || pg_prepared_xacts.database)
              FROM pg_prepared_xacts
              LEFT JOIN (SELECT locked.tables, own.transactionid FROM locked JOIN pg_locks AS own USING (virtualtransaction)
                          WHERE locked.pid IS NULL AND own.pid IS NULL AND own.locktype = 'transactionid') AS prepared_locks
                     ON transactionid = transaction)
        SELECT COALESCE(json_agg(json_build_object(
                   'owner', owner, 'whose', whose, 'tables', COALESCE(tables, '[]'),
                   'open_seconds', extract(epoch FROM clock_timestamp() - since)) ORDER BY since, age(xid) DESC), '[]')
          FROM open";
    let row = client
        .query_typed_one(
            sql,
            &[
                (&watched.oids, Type::OID_ARRAY),
                (&watched.names, Type::TEXT_ARRAY),
                (&locks.modes(), Type::TEXT_ARRAY),
                (&waiting, Type::INT4),
            ],
        )
        .await?;
    row.try_get::<_, Document<Vec<Transaction>>>(0).map(|document| document.0)
}

impl Transaction {
    /// How long it has been open; `None`: hidden from us.
    pub(super) fn open(&self) -> Option<Duration> {
        self.open_seconds.map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default())
    }

    /// "transaction of process 7".
    pub(super) fn subject(&self) -> String {
        match &self.owner {
            Owner::Session(pid) => format!("transaction of process {pid}"),
            Owner::Prepared(gid) => format!("prepared transaction {}", literal(gid)),
        }
    }

    /// The statement that ends it, with what to know before as a comment. Names that others chose stay out of the comment,
    /// where nothing quotes them.
    pub(super) fn ending(&self) -> String {
        match &self.owner {
            Owner::Session(pid) => {
                format!("SELECT pg_terminate_backend({pid});  -- it is rolled back: ask whose it is first")
            }
            Owner::Prepared(gid) => format!(
                "ROLLBACK PREPARED {};  -- or COMMIT PREPARED, as whoever prepared it knows; connected to its database",
                literal(gid)
            ),
        }
    }
}

impl fmt::Display for Transaction {
    /// Whose it is, and what ends it, on one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let open = self.open().map(|open| format!(", open for {}", Span(open))).unwrap_or_default();
        write!(f, "{} ({}{open}), which ends with ", self.subject(), self.whose)?;
        match &self.owner {
            Owner::Session(pid) => write!(f, "SELECT pg_terminate_backend({pid})"),
            Owner::Prepared(gid) => write!(f, "COMMIT PREPARED {0} or ROLLBACK PREPARED {0}", literal(gid)),
        }
    }
}
