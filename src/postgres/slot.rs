//! The replication slot: its state, and its creation.
//!
//! The creation of a slot waits for every transaction of the cluster that was open when it began. One forgotten `BEGIN`
//! can delay it without limit, so the caller learns which transactions it waits for.

use serde::Deserialize;
use std::fmt;
use std::time::{Duration, Instant};
use tokio_postgres::Client;
use tokio_postgres::types::{PgLsn, Type};

use crate::model::lsn::Lsn;
use crate::postgres::catalog::Document;
use crate::postgres::connection::Connection;
use crate::postgres::transactions::{self, Locks, NAMED_MAX, Watched};

/// The delay of acknowledgements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct AckDelay {
    /// WAL is acknowledged only this long after it became durable. Zero means no delay.
    pub(crate) age: Duration,
    /// The largest delay, in bytes of WAL.
    pub(crate) size_bytes: u64,
}

impl AckDelay {
    /// The most WAL that may wait for its acknowledgement, in bytes.
    pub(crate) const fn bytes_max(self) -> u64 {
        if self.age.is_zero() { 0 } else { self.size_bytes }
    }
}

/// The time between two reports of a wait. Shorter waits are normal.
const REPORT_EVERY: Duration = Duration::from_secs(3);

/// A row of `pg_replication_slots`. Columns that this version of PostgreSQL lacks have the value of a healthy slot.
#[derive(Debug, Deserialize)]
pub(crate) struct Slot {
    pub(crate) plugin: Option<String>,
    pub(crate) slot_type: String,
    pub(crate) database: Option<String>,
    pub(crate) active_pid: Option<i32>,
    pub(crate) wal_status: Option<String>,
    /// The bytes of WAL that may still be written before the slot is lost. `None` if there is no limit.
    pub(crate) safe_wal_size: Option<i64>,
    #[serde(default)]
    pub(crate) two_phase: bool,
    #[serde(default)]
    pub(crate) temporary: bool,
    /// From version 16 on.
    #[serde(default)]
    pub(crate) conflicting: Option<bool>,
    /// From version 17 on.
    #[serde(default)]
    pub(crate) invalidation_reason: Option<String>,
    /// Whether standbys keep a copy of the slot. From version 17 on.
    #[serde(default)]
    pub(crate) failover: Option<bool>,
    /// Whether the slot is itself such a copy, on a server that was a standby. From version 17 on.
    #[serde(default)]
    pub(crate) synced: Option<bool>,
}

impl Slot {
    pub(crate) async fn read(client: &Client, name: &str) -> Result<Option<Self>, tokio_postgres::Error> {
        let sql = "SELECT row_to_json(slot) FROM pg_catalog.pg_replication_slots AS slot WHERE slot_name::text = $1";
        let row = client.query_typed_opt(sql, &[(&name, Type::TEXT)]).await?;
        row.map(|row| row.try_get::<_, Document<Self>>(0).map(|document| document.0)).transpose()
    }

    /// The bytes of WAL that may still be written before the slot is lost. `None` if there is no limit. If it is
    /// negative, the next checkpoint invalidates the slot.
    pub(crate) fn safe_bytes(&self) -> Option<u64> {
        self.safe_wal_size.map(|left| u64::try_from(left).unwrap_or(0))
    }

    /// The reason why the slot can no longer be read, if it cannot.
    pub(crate) fn loss(&self) -> Option<Loss> {
        if let Some(reason) = &self.invalidation_reason {
            return Some(Loss::Invalidated(reason.clone()));
        }
        if self.conflicting == Some(true) {
            return Some(Loss::Conflict);
        }
        (self.wal_status.as_deref() == Some("lost")).then_some(Loss::WalRemoved)
    }
}

/// The reason why a slot can no longer be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Loss {
    /// PostgreSQL's `invalidation_reason`.
    #[error("{0}")]
    Invalidated(String),
    #[error("it conflicted with recovery")]
    Conflict,
    #[error("WAL that it needs has been removed")]
    WalRemoved,
}

/// The state of a slot and of its server, at one moment.
#[derive(Debug, Deserialize)]
pub(crate) struct SlotStatus {
    /// `None` if there is no such slot.
    pub(crate) slot: Option<Slot>,
    /// The application name of the backend that holds the slot.
    pub(crate) holder: Option<String>,
    /// The LSN up to which the server has written WAL.
    #[serde(deserialize_with = "crate::postgres::catalog::lsn")]
    pub(crate) wal_end: Lsn,
    /// The bytes of WAL from the oldest that is kept for the slot. `None` if no WAL is kept for it.
    pub(crate) retained_bytes: Option<u64>,
    /// The end LSN up to which the slot was acknowledged.
    #[serde(deserialize_with = "crate::postgres::catalog::optional_lsn")]
    pub(crate) confirmed: Option<Lsn>,
}

impl SlotStatus {
    pub(crate) async fn read(client: &Client, name: &str) -> Result<Self, tokio_postgres::Error> {
        let sql = "
            SELECT json_build_object(
                       'slot', CASE WHEN slot.slot_name IS NOT NULL THEN row_to_json(slot) END,
                       'holder', (SELECT application_name FROM pg_catalog.pg_stat_activity WHERE pid = slot.active_pid),
                       'wal_end', now.wal_end,
                       'retained_bytes', CASE WHEN slot.restart_lsn IS NOT NULL
                                          THEN GREATEST(pg_wal_lsn_diff(now.wal_end, slot.restart_lsn), 0) END,
                       'confirmed', slot.confirmed_flush_lsn)
              FROM (SELECT pg_current_wal_lsn() AS wal_end) AS now
              LEFT JOIN pg_catalog.pg_replication_slots AS slot ON slot.slot_name::text = $1";
        let row = client.query_typed_one(sql, &[(&name, Type::TEXT)]).await?;
        row.try_get::<_, Document<Self>>(0).map(|document| document.0)
    }
}

/// The wait of a slot's creation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Waiting {
    pub(crate) elapsed: Duration,
    /// Descriptions of the transactions that it waits for. Empty if they have just ended.
    pub(crate) transactions: Vec<String>,
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "waiting for transactions older than the new replication slot, {} s so far", self.elapsed.as_secs())?;
        if !self.transactions.is_empty() {
            write!(f, ": {}", self.transactions.join("; "))?;
        }
        Ok(())
    }
}

/// Shows the open transactions for which the server keeps WAL.
pub(crate) const OPEN_TRANSACTIONS: &str =
    "SELECT pid, xact_start, query FROM pg_stat_activity WHERE backend_xid IS NOT NULL ORDER BY xact_start";

/// The oldest version whose standbys can keep copies of logical slots, as in `server_version_num`.
pub(crate) const FAILOVER_SLOTS: i32 = 170_000;

/// Creates the slot and returns its consistent point: the slot streams every transaction that commits at or after it.
/// The publication must already exist. With `failover`, standbys may keep a copy of the slot, if PostgreSQL supports
/// it.
///
/// `report` is called every few seconds while older transactions are open. The wait has no limit: end these
/// transactions, or drop this future. After a drop, the server notices within seconds that the client is gone, and
/// creates no slot.
///
/// # Errors
/// Those of PostgreSQL: 42710 if a slot of that name exists, 53400 if there are too many slots, 55000 if `wal_level` is
/// wrong, 42501 if the role lacks REPLICATION.
pub(crate) async fn create_slot(
    connection: &Connection,
    name: &str,
    failover: bool,
    report: &mut (dyn FnMut(&Waiting) + Send),
) -> Result<Lsn, tokio_postgres::Error> {
    let client = &connection.client;
    let pid: i32 = client.query_typed_one("SELECT pg_backend_pid()", &[]).await?.try_get(0)?;
    // Limits on statements and locks must not apply, because this wait is normal.
    client.batch_execute("SET statement_timeout = 0; SET lock_timeout = 0").await?;
    // Not every operating system supports this. Without it, an abandoned wait continues.
    let unavailable = client.batch_execute("SET client_connection_check_interval = '1s'").await.is_err();
    tracing::debug!(unavailable, "asked the server to detect that a waiting client is gone");

    let started = Instant::now();
    let sql = format!("SELECT lsn FROM {}", creation("$1", failover && can_fail_over(client).await?));
    let parameters: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 1] = [(&name, Type::NAME)];
    let mut creation = std::pin::pin!(client.query_typed_one(&sql, &parameters));
    // A second connection, opened only if there is something to report.
    let mut observer: Option<Connection> = None;
    let created = loop {
        if let Ok(created) = tokio::time::timeout(REPORT_EVERY, &mut creation).await {
            break created;
        }
        if observer.as_ref().is_none_or(Connection::is_closed) {
            observer = connection.endpoint().connect().await.ok();
        }
        let transactions = match &observer {
            Some(observer) => blockers(&observer.client, pid).await.unwrap_or_default(),
            None => Vec::new(),
        };
        report(&Waiting { elapsed: started.elapsed(), transactions });
    };
    let reset = "RESET statement_timeout; RESET lock_timeout; RESET client_connection_check_interval";
    let reset = client.batch_execute(reset).await;
    let consistent_point: PgLsn = created?.try_get(0)?;
    reset.map(|()| Lsn(consistent_point.into()))
}

/// Whether standbys of this server can keep copies of logical slots.
pub(crate) async fn can_fail_over(client: &Client) -> Result<bool, tokio_postgres::Error> {
    let sql = "SELECT current_setting('server_version_num')::int4 >= $1";
    client.query_typed_one(sql, &[(&FAILOVER_SLOTS, Type::INT4)]).await?.try_get(0)
}

/// The call that creates a slot. `name` is SQL.
pub(crate) fn creation(name: &str, failover: bool) -> String {
    let failover = if failover { ", failover => true" } else { "" };
    format!("pg_catalog.pg_create_logical_replication_slot({name}, 'pgoutput'{failover})")
}

/// Returns the oldest transactions with an id, for which the slot waits.
async fn blockers(client: &Client, waiting: i32) -> Result<Vec<String>, tokio_postgres::Error> {
    let open = transactions::open(client, &Watched::default(), Locks::Writing, Some(waiting)).await?;
    Ok(open.iter().take(NAMED_MAX).map(ToString::to_string).collect())
}
