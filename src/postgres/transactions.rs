//! Open transactions that delay something: a new slot, the end of a gap, or a lock on a table.
//!
//! Every role can see that a transaction exists, whether it has an id, and which tables it has locked. Only members of
//! its role and of `pg_read_all_stats` can see its start and its state.

use serde::Deserialize;
use std::fmt;
use std::time::Duration;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::decode::mapping::TableName;
use crate::decode::pgoutput::RelationId;
use crate::model::diagnostic::Span;
use crate::model::lsn::Xid8;
use crate::postgres::catalog::{Document, Table, literal};

/// The most transactions that are named. More would not help.
pub(crate) const NAMED_MAX: usize = 5;

/// An open transaction, of a session or prepared.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Transaction {
    owner: Owner,
    /// `None` if the role may not see it.
    open_seconds: Option<f64>,
    /// User, database, application and state, as far as the role may see them.
    pub(crate) details: String,
    /// The watched tables that it has locked.
    pub(crate) tables: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Owner {
    Session(i32),
    Prepared(String),
}

/// A transaction that may be writing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Writer {
    pub(crate) xid: Xid8,
    /// The details and the statement that ends the transaction, as far as the role may see them.
    pub(crate) description: String,
}

/// The table locks that count.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Locks {
    /// The locks of writers.
    Writing,
    /// The locks for which `LOCK TABLE … IN SHARE ROW EXCLUSIVE MODE` waits.
    NotReading,
    /// All locks, for which `ALTER TABLE` waits.
    All,
}

impl Locks {
    /// The names in `pg_locks`.
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

/// Tables by oid. A partition has the name of the mapped table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Watched {
    oids: Vec<u32>,
    names: Vec<String>,
}

impl Watched {
    pub(crate) fn one(oid: u32, name: &TableName) -> Self {
        Self { oids: vec![oid], names: vec![name.to_string()] }
    }

    pub(crate) fn of<'a>(tables: impl IntoIterator<Item = &'a Table>) -> Self {
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

/// Returns the open transactions of the cluster that have an id or have locked one of the tables, oldest first. It
/// omits our own transaction and that of the process `waiting`.
pub(crate) async fn open(
    client: &Client,
    watched: &Watched,
    locks: Locks,
    waiting: Option<i32>,
) -> Result<Vec<Transaction>, tokio_postgres::Error> {
    // The locks of prepared transactions have no process. A virtual id connects them with their transaction, which also
    // holds the lock of its id under that virtual id.
    let sql = "
        WITH locked AS (
            SELECT pid, virtualtransaction, json_agg(DISTINCT watched.name) AS tables
              FROM pg_locks JOIN unnest($1, $2) AS watched(oid, name) ON relation = watched.oid
             WHERE locktype = 'relation' AND granted AND mode = ANY ($3)
               AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
             GROUP BY pid, virtualtransaction),
        open AS (
            SELECT json_build_object('session', pid) AS owner, xact_start AS since, backend_xid AS xid, tables,
                   concat_ws(', ', 'user ' || usename, 'database ' || datname, NULLIF(application_name, ''), state) AS details
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
                   'owner', owner, 'details', details, 'tables', COALESCE(tables, '[]'),
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

/// Returns the ids of the transactions that hold a writer's lock on one of these tables or their partitions.
///
/// # Errors
/// If PostgreSQL does not answer.
pub(crate) async fn writers(client: &Client, tables: &[RelationId]) -> Result<Vec<Xid8>, tokio_postgres::Error> {
    // Read all locks at once, so that a transaction's lock of a table matches the lock of its id. A transaction that
    // has the first but not yet the second has not written. Ids of savepoints are included.
    let sql = "
        WITH locks AS MATERIALIZED (SELECT * FROM pg_locks WHERE granted)
        SELECT DISTINCT pg_snapshot_xmax(pg_current_snapshot())::text::int8, own.transactionid::text::int8
          FROM locks AS lock
          JOIN locks AS own ON own.virtualtransaction = lock.virtualtransaction AND own.pid IS NOT DISTINCT FROM lock.pid
         WHERE lock.locktype = 'relation' AND lock.mode = ANY ($2)
           AND lock.database = (SELECT oid FROM pg_database WHERE datname = current_database())
           AND (lock.relation = ANY ($1)
                OR EXISTS (SELECT FROM pg_partition_ancestors(lock.relation) AS above(oid) WHERE above.oid = ANY ($1)))
           AND own.locktype = 'transactionid' AND own.mode = 'ExclusiveLock'";
    let oids: Vec<u32> = tables.iter().map(|table| table.0).collect();
    let modes = Locks::Writing.modes();
    let rows = client.query_typed(sql, &[(&oids, Type::OID_ARRAY), (&modes, Type::TEXT_ARRAY)]).await?;
    rows.iter()
        .map(|row| {
            let (next, xid): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
            Ok(Xid8(next.cast_unsigned()).widen(low_half(Xid8(xid.cast_unsigned()))))
        })
        .collect()
}

/// Returns those of these transactions that have not ended. A transaction releases the lock of its id when it ends,
/// after its commit record was written.
///
/// # Errors
/// If PostgreSQL does not answer.
pub(crate) async fn running(client: &Client, of: &[Xid8]) -> Result<Vec<Writer>, tokio_postgres::Error> {
    let sql = "
        SELECT COALESCE(json_agg(json_build_object(
                   'xid', transactionid::text::int8, 'tables', json_build_array(),
                   'owner', CASE WHEN gid IS NULL THEN json_build_object('session', lock.pid)
                                 ELSE json_build_object('prepared', gid) END,
                   'open_seconds', extract(epoch FROM clock_timestamp() - COALESCE(xact_start, prepared)),
                   'details', concat_ws(', ', 'user ' || COALESCE(usename, owner), NULLIF(application_name, ''), state))), '[]')
          FROM pg_locks AS lock
          LEFT JOIN pg_stat_activity AS activity ON activity.pid = lock.pid
          LEFT JOIN pg_prepared_xacts ON transaction = transactionid
         WHERE granted AND locktype = 'transactionid' AND mode = 'ExclusiveLock' AND transactionid::text = ANY ($1)";
    #[derive(Deserialize)]
    struct Running {
        xid: u32,
        #[serde(flatten)]
        transaction: Transaction,
    }
    let asked: Vec<String> = of.iter().map(|xid| low_half(*xid).to_string()).collect();
    let row = client.query_typed_one(sql, &[(&asked, Type::TEXT_ARRAY)]).await?;
    let Document(running) = row.try_get::<_, Document<Vec<Running>>>(0)?;
    let writer = |running: Running| {
        let xid = of.iter().find(|xid| low_half(**xid) == running.xid)?;
        Some(Writer { xid: *xid, description: running.transaction.to_string() })
    };
    Ok(running.into_iter().filter_map(writer).collect())
}

/// The lower half of the id, which PostgreSQL's type `xid` contains.
const fn low_half(xid: Xid8) -> u32 {
    (xid.0 & 0xFFFF_FFFF) as u32
}

impl Transaction {
    /// The time since it began. `None` if the role may not see it.
    pub(crate) fn open(&self) -> Option<Duration> {
        self.open_seconds.map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default())
    }

    /// For example "transaction of process 7".
    pub(crate) fn subject(&self) -> String {
        match &self.owner {
            Owner::Session(pid) => format!("transaction of process {pid}"),
            Owner::Prepared(gid) => format!("prepared transaction {}", literal(gid)),
        }
    }

    /// Returns the statement that ends the transaction, with advice as a comment. Names that other users chose are not
    /// in the comment, where nothing would quote them.
    pub(crate) fn ending(&self) -> String {
        match &self.owner {
            Owner::Session(pid) => {
                format!("SELECT pg_terminate_backend({pid});  -- it is rolled back: ask whose it is first")
            }
            Owner::Prepared(gid) => format!(
                "ROLLBACK PREPARED {};  -- or COMMIT PREPARED, as the program that prepared it decides; connected to its database",
                literal(gid)
            ),
        }
    }
}

impl fmt::Display for Transaction {
    /// Writes the details, and the statement that ends the transaction, on one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let open = self.open().map(|open| format!(", open for {}", Span(open))).unwrap_or_default();
        write!(f, "{} ({}{open}), which ends with ", self.subject(), self.details)?;
        match &self.owner {
            Owner::Session(pid) => write!(f, "SELECT pg_terminate_backend({pid})"),
            Owner::Prepared(gid) => write!(f, "COMMIT PREPARED {0} or ROLLBACK PREPARED {0}", literal(gid)),
        }
    }
}
