//! What the hub asks of the primary, as SQL on connections of their own.

use crate::change::TenantId;
use crate::hub::publisher::Snapshots;
use crate::hub::start::{Look, Primary, TransactionStatus, Unreachable};
use crate::lsn::{Lsn, Snapshot, Xid8};
use crate::mapping::TenantsSpec;
use crate::replication::Primaries;
use crate::replication::connection::Connection;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_postgres::Statement;

/// Longest wait for one answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Longest wait of one caller, with connecting and with those before it.
const CALL_MAX: Duration = Duration::from_secs(30);
/// After a failure to connect, the next try is not before this.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Requests that wait for the connection.
const QUEUE_MAX: usize = 4096;
/// Requests that share one statement.
const SHARED_MAX: usize = 1024;

/// A connection that is made when it is needed, and again when it was lost or the session found another primary, with one
/// prepared statement.
struct Lazy {
    primaries: Primaries,
    statement: String,
    open: Option<(Connection, Statement)>,
    /// When connecting failed last, and why: not tried again for everybody who asks.
    failed: Option<(Instant, String)>,
}

impl Lazy {
    const fn new(primaries: Primaries, statement: String) -> Self {
        Self { primaries, statement, open: None, failed: None }
    }

    async fn get(&mut self) -> Result<&(Connection, Statement), String> {
        let moved = self.primaries.has_moved();
        if moved || self.open.as_ref().is_none_or(|(connection, _)| connection.is_closed()) {
            self.open = None;
            if let Some((at, error)) = &self.failed
                && !moved
                && at.elapsed() < RETRY_AFTER
            {
                return Err(error.clone());
            }
            // Bounded by the connect timeout of the URI.
            self.open = match self.connect().await {
                Ok(open) => Some(open),
                Err(error) => {
                    self.failed = Some((Instant::now(), error.clone()));
                    return Err(error);
                }
            };
        }
        self.open.as_ref().ok_or_else(|| "no connection".to_owned())
    }

    async fn connect(&mut self) -> Result<(Connection, Statement), String> {
        let connection = self.primaries.connect().await.map_err(|error| error.to_string())?;
        let prepare = async {
            // A mark must not wait for a synchronous standby.
            connection.client.batch_execute("SET synchronous_commit = local").await.map_err(sql)?;
            connection.client.prepare(&self.statement).await.map_err(sql)
        };
        let statement = tokio::time::timeout(ANSWER_MAX, prepare).await.map_err(|_| late())??;
        Ok((connection, statement))
    }
}

fn late() -> String {
    format!("no answer within {} s", ANSWER_MAX.as_secs())
}

/// Runs one question within its time; a connection that is late is given up.
async fn ask<T>(
    lazy: &mut Lazy,
    question: impl AsyncFnOnce(&(Connection, Statement)) -> Result<T, String>,
) -> Result<T, String> {
    let open = lazy.get().await?;
    match tokio::time::timeout(ANSWER_MAX, question(open)).await {
        Ok(answer) => answer,
        Err(_) => {
            lazy.open = None;
            Err(late())
        }
    }
}

fn sql(error: tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => format!("{} ({})", db.message(), db.code().code()),
        None => error.to_string(),
    }
}

/// `pg_current_snapshot()`, for the publisher.
pub(super) struct SqlSnapshots(Lazy);

impl SqlSnapshots {
    pub(super) fn new(primaries: Primaries) -> Self {
        Self(Lazy::new(primaries, "SELECT pg_current_snapshot()::text".into()))
    }
}

impl Snapshots for SqlSnapshots {
    type Error = String;

    async fn take(&mut self) -> Result<Snapshot, String> {
        ask(&mut self.0, async |(connection, statement)| {
            let row = connection.client.query_one(statement, &[]).await.map_err(sql)?;
            let snapshot: String = row.get(0);
            snapshot.parse().map_err(|error: crate::lsn::ParseSnapshotError| error.to_string())
        })
        .await
    }
}

enum Question {
    Look { tenant: TenantId, reply: oneshot::Sender<Result<Look, Unreachable>> },
    Status { xid: Xid8, reply: oneshot::Sender<Result<TransactionStatus, Unreachable>> },
    Mark { reply: oneshot::Sender<Result<Lsn, Unreachable>> },
}

/// Asks the task that owns the connection. Cheap to clone.
#[derive(Clone)]
pub(super) struct SqlPrimary {
    questions: mpsc::Sender<Question>,
}

impl SqlPrimary {
    /// The handle, and the task to be run. `tenants` tells where tenants are listed; without it every one exists.
    pub(super) fn new(primaries: Primaries, tenants: Option<&TenantsSpec>) -> (Self, impl Future<Output = ()> + use<>) {
        let (questions, received) = mpsc::channel(QUEUE_MAX);
        let known = match tenants {
            Some(spec) => {
                let (id, table) = (spec.id_to_sql(), spec.table.to_sql());
                format!("ARRAY(SELECT {id}::text FROM {table} WHERE {id}::text = ANY($1))")
            }
            None => "$1::text[]".to_owned(),
        };
        // The snapshot of a statement is taken before any of it is evaluated, and so before the flush position is read.
        let statement = format!("SELECT pg_current_wal_flush_lsn()::text, pg_current_snapshot()::text, {known}");
        let lazy = Lazy::new(primaries, statement);
        (Self { questions }, answer_all(lazy, received))
    }

    async fn put<T>(
        &self,
        question: impl FnOnce(oneshot::Sender<Result<T, Unreachable>>) -> Question,
    ) -> Result<T, Unreachable> {
        let gone = || Unreachable("the server is shutting down".to_owned());
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.questions.send(question(reply)).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())?
        };
        let late = |_| Unreachable(format!("no answer within {} s", CALL_MAX.as_secs()));
        tokio::time::timeout(CALL_MAX, asked).await.map_err(late)?
    }
}

impl Primary for SqlPrimary {
    async fn look(&self, tenant: &TenantId) -> Result<Look, Unreachable> {
        let tenant = tenant.clone();
        self.put(|reply| Question::Look { tenant, reply }).await
    }

    async fn transaction_status(&self, xid: Xid8) -> Result<TransactionStatus, Unreachable> {
        self.put(|reply| Question::Status { xid, reply }).await
    }

    async fn mark(&self) -> Result<Lsn, Unreachable> {
        self.put(|reply| Question::Mark { reply }).await
    }
}

async fn answer_all(mut lazy: Lazy, mut questions: mpsc::Receiver<Question>) {
    let mut batch = Vec::new();
    while questions.recv_many(&mut batch, SHARED_MAX).await > 0 {
        let mut looks = Vec::new();
        for question in batch.drain(..) {
            match question {
                Question::Look { tenant, reply } if !reply.is_closed() => looks.push((tenant, reply)),
                // Whoever asked may be gone, before and after.
                Question::Look { .. } => {}
                Question::Status { reply, .. } if reply.is_closed() => {}
                Question::Mark { reply } if reply.is_closed() => {}
                Question::Status { xid, reply } => {
                    let _ = reply.send(status(&mut lazy, xid).await.map_err(Unreachable));
                }
                Question::Mark { reply } => {
                    let _ = reply.send(mark(&mut lazy).await.map_err(Unreachable));
                }
            }
        }
        if looks.is_empty() {
            continue;
        }
        let tenants: Vec<&str> = looks.iter().map(|(tenant, _)| tenant.as_str()).collect();
        let answer = look(&mut lazy, &tenants).await;
        for (tenant, reply) in looks {
            let _ = reply.send(match &answer {
                Ok((look, known)) => Ok(Look { tenant_exists: known.contains(tenant.as_str()), ..look.clone() }),
                Err(error) => Err(Unreachable(error.clone())),
            });
        }
    }
}

async fn look(lazy: &mut Lazy, tenants: &[&str]) -> Result<(Look, HashSet<String>), String> {
    ask(lazy, async |(connection, statement)| {
        let row = connection.client.query_one(statement, &[&tenants]).await.map_err(sql)?;
        let flush_lsn: String = row.get(0);
        let flush_lsn = flush_lsn.parse().map_err(|error: crate::lsn::ParseLsnError| error.to_string())?;
        let snapshot: String = row.get(1);
        let snapshot: Snapshot = snapshot.parse().map_err(|error: crate::lsn::ParseSnapshotError| error.to_string())?;
        let known: Vec<String> = row.get(2);
        let look = Look { flush_lsn, snapshot: Arc::new(snapshot), tenant_exists: false };
        Ok((look, known.into_iter().collect()))
    })
    .await
}

async fn status(lazy: &mut Lazy, xid: Xid8) -> Result<TransactionStatus, String> {
    ask(lazy, async |(connection, _)| {
        let statement = "SELECT pg_xact_status($1::text::xid8) IS NOT DISTINCT FROM 'in progress'";
        match connection.client.query_one(statement, &[&xid.to_string()]).await {
            Ok(row) if row.get(0) => Ok(TransactionStatus::InProgress),
            Ok(_) => Ok(TransactionStatus::Over),
            // Its transaction was lost in a crash, or the token is forged.
            Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::INVALID_PARAMETER_VALUE) => {
                Ok(TransactionStatus::Unassigned)
            }
            Err(error) => Err(sql(error)),
        }
    })
    .await
}

async fn mark(lazy: &mut Lazy) -> Result<Lsn, String> {
    ask(lazy, async |(connection, _)| {
        let statement = "SELECT pg_logical_emit_message(true, 'tuplewatch', 'mark')::text";
        let row = connection.client.query_one(statement, &[]).await.map_err(sql)?;
        let lsn: String = row.get(0);
        lsn.parse().map_err(|error: crate::lsn::ParseLsnError| error.to_string())
    })
    .await
}
