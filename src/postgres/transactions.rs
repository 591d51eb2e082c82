//! Open transactions that something else waits for: a new slot, the end of a gap, a lock on a table.
//!
//! Every role can see that a transaction exists, whether it has an id, and which tables it has locked. Only members of its role and of
//! `pg_read_all_stats` can see since when it is open and what it does.

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

/// At most this many of the oldest transactions are named; more would not help the reader.
pub(crate) const NAMED_MAX: usize = 5;

/// An open transaction, of a session or prepared.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Transaction {
    owner: Owner,
    /// None: hidden from us.
    open_seconds: Option<f64>,
    /// User, database, application and state, as far as they can be seen.
    pub(crate) whose: String,
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
    /// Its id.
    pub(crate) xid: Xid8,
    /// Its owner and the statement that ends it, as far as they can be seen, for people.
    pub(crate) description: String,
}

/// Locks of a table that count.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Locks {
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

/// The open transactions of the whole cluster that have an id, and those that have locked one of the tables; the oldest first. Leaves
/// out our own and that of the process `waiting`.
pub(crate) async fn open(
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

/// Ids of the transactions that have locked one of these tables, or a partition of one, as writers do.
///
/// # Errors
/// Where PostgreSQL cannot be asked.
pub(crate) async fn writers(client: &Client, tables: &[RelationId]) -> Result<Vec<Xid8>, tokio_postgres::Error> {
    // All locks in one look, so that a transaction's lock of a table and the one of its id belong together. A transaction that has the
    // first and not yet the second has not written. Ids of savepoints are among them.
    let sql = "
        WITH held AS MATERIALIZED (SELECT * FROM pg_locks WHERE granted)
        SELECT DISTINCT pg_snapshot_xmax(pg_current_snapshot())::text::int8, own.transactionid::text::int8
          FROM held AS lock
          JOIN held AS own ON own.virtualtransaction = lock.virtualtransaction AND own.pid IS NOT DISTINCT FROM lock.pid
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

/// Those of these transactions that have not ended. A transaction releases the lock of its id when it ends, after its commit record
/// was written.
///
/// # Errors
/// Where PostgreSQL cannot be asked.
pub(crate) async fn running(client: &Client, of: &[Xid8]) -> Result<Vec<Writer>, tokio_postgres::Error> {
    let sql = "
        SELECT COALESCE(json_agg(json_build_object(
                   'xid', transactionid::text::int8, 'tables', json_build_array(),
                   'owner', CASE WHEN gid IS NULL THEN json_build_object('session', lock.pid)
                                 ELSE json_build_object('prepared', gid) END,
                   'open_seconds', extract(epoch FROM clock_timestamp() - COALESCE(xact_start, prepared)),
                   'whose', concat_ws(', ', 'user ' || COALESCE(usename, owner), NULLIF(application_name, ''), state))), '[]')
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

/// As PostgreSQL's `xid` has it.
const fn low_half(xid: Xid8) -> u32 {
    (xid.0 & 0xFFFF_FFFF) as u32
}

impl Transaction {
    /// How long it has been open; `None`: hidden from us.
    pub(crate) fn open(&self) -> Option<Duration> {
        self.open_seconds.map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default())
    }

    /// "transaction of process 7".
    pub(crate) fn subject(&self) -> String {
        match &self.owner {
            Owner::Session(pid) => format!("transaction of process {pid}"),
            Owner::Prepared(gid) => format!("prepared transaction {}", literal(gid)),
        }
    }

    /// The statement that ends the transaction, with advice as a comment. Names that others chose stay out of the comment, where
    /// nothing quotes them.
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
    /// The owner, and the statement that ends the transaction, on one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let open = self.open().map(|open| format!(", open for {}", Span(open))).unwrap_or_default();
        write!(f, "{} ({}{open}), which ends with ", self.subject(), self.whose)?;
        match &self.owner {
            Owner::Session(pid) => write!(f, "SELECT pg_terminate_backend({pid})"),
            Owner::Prepared(gid) => write!(f, "COMMIT PREPARED {0} or ROLLBACK PREPARED {0}", literal(gid)),
        }
    }
}
