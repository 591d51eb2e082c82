//! Answers the hub's questions to the primary ([`crate::hub::primary`]) with SQL, on separate connections.
//!
//! One connection answers the questions about snapshots, for the releaser, and another one those that start streams. A
//! task owns each connection, opens it when it is needed, and moves it when the session finds another primary.
//! Questions that wait together share one statement. At a connection limit, both use the session's connection. The
//! record of answers and failures ([`Answers`]) is a part of readiness, and probes keep it up to date while nothing
//! happens.

use crate::decode::mapping::TenantsSpec;
use crate::hub::primary::{Primary, PrimaryState, TransactionStatus, Unreachable};
use crate::hub::releaser::Snapshots;
use crate::model::change::TenantId;
use crate::model::lsn::{Lsn, ParseLsnError, ParseSnapshotError, Snapshot, Xid8};
use crate::model::scope::Scope;
use crate::postgres::connection::{Connection, SqlError};
use crate::postgres::primary::{self, Line, PrimaryConnector};
use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Statement};

/// The longest wait for one answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// The longest wait of one caller, including the time to connect and earlier questions.
const CALL_MAX: Duration = Duration::from_secs(30);
/// The shortest time between two attempts to connect. Each failure doubles it. When a session begins to stream, the
/// next attempt is immediate.
const RETRY_AFTER: Duration = Duration::from_millis(500);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(5);
/// The questions that may wait for the connection.
const QUEUE_MAX: usize = 4096;
/// The questions that share one statement.
const SHARED_MAX: usize = 1024;

/// The shortest time on the session's connection before the next attempt to open a separate one.
const SHARE_FOR: Duration = Duration::from_secs(60);
/// On the shared connection, a lock (of a migration, for example) must not delay all other statements.
const SHARED_LOCK_MAX: Duration = Duration::from_secs(1);
/// The interval of probes on an idle node, so that it detects a problem before the next change needs an answer.
const PROBE_EVERY: Duration = Duration::from_secs(5);
/// The interval of probes while there is no answer.
const PROBE_AGAIN_AFTER: Duration = Duration::from_millis(250);

/// A question without an answer. Callers may see the message, so it names neither hosts nor roles. Cheap to clone,
/// because all questions of a statement share its error.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum Unanswered {
    #[error("no answer within {} s", .0.as_secs())]
    Late(Duration),
    #[error(transparent)]
    Connect(Arc<primary::Error>),
    #[error(transparent)]
    Sql(Arc<SqlError>),
    #[error("the connection ended at once")]
    Ended,
    #[error(transparent)]
    Lsn(#[from] ParseLsnError),
    #[error(transparent)]
    Snapshot(#[from] ParseSnapshotError),
    #[error("the server is shutting down")]
    Stopping,
}

/// The kind of an [`Unanswered`], for probes, which need no credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// There was no answer in time.
    Late,
    /// PostgreSQL accepts no more connections.
    Limit,
    /// The role lacks a privilege.
    Rights,
    /// A lock was not available in time.
    Locked,
    /// Any other reason, which the log names.
    Other,
}

impl Unanswered {
    fn why(&self) -> Why {
        match self {
            Self::Late(_) => Why::Late,
            Self::Connect(error) if error.is_limit() => Why::Limit,
            Self::Sql(error) => match error.sqlstate() {
                Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Why::Rights,
                Some(&SqlState::LOCK_NOT_AVAILABLE) => Why::Locked,
                Some(&SqlState::QUERY_CANCELED) => Why::Late,
                _ => Why::Other,
            },
            Self::Connect(_) | Self::Ended | Self::Lsn(_) | Self::Snapshot(_) | Self::Stopping => Why::Other,
        }
    }
}

impl From<primary::Error> for Unanswered {
    fn from(error: primary::Error) -> Self {
        Self::Connect(Arc::new(error))
    }
}

impl From<tokio_postgres::Error> for Unanswered {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Sql(Arc::new(error.into()))
    }
}

impl From<Unanswered> for Unreachable {
    fn from(error: Unanswered) -> Self {
        Self::unanswered(error)
    }
}

/// The same error for the log, with hosts and roles.
pub(super) struct InFull(Unanswered);

impl fmt::Display for InFull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Unanswered::Connect(error) => error.in_full().fmt(f),
            error => error.fmt(f),
        }
    }
}

/// Whether questions of one kind are being answered. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Answers(Arc<Mutex<Asked>>);

#[derive(Debug)]
struct Asked {
    /// The time at which the waiting question was asked.
    waiting_since: Option<Instant>,
    /// The silence since the last answer in time.
    silence: Option<Silence>,
}

/// A time without answers, or without answers in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Silence {
    /// The time of the first question without an answer.
    pub(super) since: Instant,
    /// The reason why the last question was not answered. `None` if it still waits, or if there was none yet.
    pub(super) why: Option<Why>,
}

impl Answers {
    /// The time after which an answer counts as missing, because everything that needs the answer waits that long.
    pub(super) const LATE: Duration = Duration::from_secs(5);

    fn new() -> Self {
        let silence = Some(Silence { since: Instant::now(), why: None });
        Self(Arc::new(Mutex::new(Asked { waiting_since: None, silence })))
    }

    /// `None` if the last question was answered in time, and the waiting one is not late.
    pub(super) fn silence(&self) -> Option<Silence> {
        let asked = self.lock();
        let late = asked.waiting_since.filter(|since| since.elapsed() > Self::LATE);
        asked.silence.or_else(|| late.map(|since| Silence { since, why: None }))
    }

    fn lock(&self) -> MutexGuard<'_, Asked> {
        // No code that holds the lock can leave the contents half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn asked(&self) {
        self.lock().waiting_since = Some(Instant::now());
    }

    fn answered<T>(&self, answer: &Result<T, Unanswered>) {
        let mut asked = self.lock();
        let since = asked.waiting_since.take().unwrap_or_else(Instant::now);
        let why = match answer {
            Ok(_) if since.elapsed() <= Self::LATE => {
                asked.silence = None;
                return;
            }
            Ok(_) => Why::Late,
            Err(error) => error.why(),
        };
        asked.silence.get_or_insert(Silence { since, why: None }).why = Some(why);
    }
}

/// A connection with one prepared statement. It is opened when it is needed, and again after it was lost or the session
/// has found another primary.
struct Lazy {
    primaries: PrimaryConnector,
    /// The kind of its questions, for the log.
    purpose: &'static str,
    statement: String,
    open: Option<Open>,
    /// The last failure to connect. Questions share it until the next attempt.
    failed: Option<Failed>,
    answers: Answers,
}

/// The time and the error of a failure to connect.
struct Failed {
    at: Instant,
    retry_after: Duration,
    error: Unanswered,
}

struct Open {
    line: Line,
    statement: Statement,
    since: Instant,
}

impl Lazy {
    fn new(primaries: PrimaryConnector, purpose: &'static str, statement: String) -> Self {
        Self { primaries, purpose, statement, open: None, failed: None, answers: Answers::new() }
    }

    async fn get(&mut self) -> Result<(Arc<Connection>, Statement), Unanswered> {
        let moved = self.primaries.has_moved();
        let was_shared = self.open.as_ref().is_some_and(|open| open.line.is_shared());
        self.open.take_if(|open| moved || (was_shared && open.since.elapsed() >= SHARE_FOR));
        if let Some(open) = &self.open
            && let Some(connection) = open.line.get()
        {
            return Ok((connection, open.statement.clone()));
        }
        self.open = None;
        if moved {
            self.failed = None;
        }
        if let Some(Failed { at, retry_after, error }) = &self.failed
            && at.elapsed() < *retry_after
        {
            return Err(error.clone());
        }
        // The connect timeout of the URI bounds this.
        match self.connect(was_shared).await {
            Ok((connection, open)) => {
                self.failed = None;
                let statement = self.open.insert(open).statement.clone();
                Ok((connection, statement))
            }
            Err(error) => {
                let before = self.failed.take().map(|failed| failed.retry_after * 2);
                let retry_after = before.unwrap_or(RETRY_AFTER).min(RETRY_AFTER_MAX);
                self.failed = Some(Failed { at: Instant::now(), retry_after, error: error.clone() });
                Err(error)
            }
        }
    }

    async fn connect(&mut self, was_shared: bool) -> Result<(Arc<Connection>, Open), Unanswered> {
        let line = self.primaries.connect_or_share().await?;
        let connection = line.get().ok_or(Unanswered::Ended)?;
        let prepare = async {
            // A marker must not wait for a synchronous standby.
            connection.client.batch_execute("SET synchronous_commit = local").await?;
            if line.is_shared() {
                let set = format!("SET lock_timeout = '{}s'", SHARED_LOCK_MAX.as_secs());
                connection.client.batch_execute(&set).await?;
            }
            connection.client.prepare(&self.statement).await
        };
        let statement = tokio::time::timeout(ANSWER_MAX, prepare).await.map_err(|_| Unanswered::Late(ANSWER_MAX))??;
        match (was_shared, line.is_shared()) {
            (false, true) => tracing::warn!(
                "PostgreSQL takes no more connections, so {} share the session's connection: tuplewatch doctor names the limit",
                self.purpose
            ),
            (true, false) => tracing::info!("{} have their own connection again", self.purpose),
            _ => {}
        }
        let open = Open { line, statement, since: Instant::now() };
        Ok((connection, open))
    }
}

/// Asks one question within its time limit. A connection without an answer in time is closed.
async fn ask<T>(
    lazy: &mut Lazy,
    question: impl AsyncFnOnce(&Client, &Statement) -> Result<T, Unanswered>,
) -> Result<T, Unanswered> {
    lazy.answers.asked();
    let answer = match lazy.get().await {
        Ok((connection, statement)) => {
            match tokio::time::timeout(ANSWER_MAX, question(&connection.client, &statement)).await {
                Ok(answer) => answer,
                Err(_) => {
                    lazy.open = None;
                    Err(Unanswered::Late(ANSWER_MAX))
                }
            }
        }
        Err(error) => Err(error),
    };
    lazy.answers.answered(&answer);
    answer
}

/// `pg_current_snapshot()`, for the releaser.
pub(super) struct SqlSnapshots(Lazy);

impl SqlSnapshots {
    pub(super) fn new(primaries: PrimaryConnector) -> Self {
        Self(Lazy::new(primaries, "snapshots", "SELECT pg_current_snapshot()::text".into()))
    }

    /// Whether snapshots are being answered.
    pub(super) fn answers(&self) -> Answers {
        self.0.answers.clone()
    }
}

impl Snapshots for SqlSnapshots {
    type Error = InFull;

    async fn take(&mut self) -> Result<Snapshot, InFull> {
        let taken = ask(&mut self.0, async |client, statement| {
            let row = client.query_one(statement, &[]).await?;
            let snapshot: String = row.get(0);
            Ok(snapshot.parse::<Snapshot>()?)
        });
        taken.await.map_err(InFull)
    }
}

enum Question {
    State { scope: Scope, reply: oneshot::Sender<Result<PrimaryState, Unreachable>> },
    Status { xid: Xid8, reply: oneshot::Sender<Result<TransactionStatus, Unreachable>> },
    Mark { reply: oneshot::Sender<Result<Lsn, Unreachable>> },
}

/// A handle to the task that owns the connection. Cheap to clone.
#[derive(Clone)]
pub(super) struct SqlPrimary {
    questions: mpsc::Sender<Question>,
}

impl SqlPrimary {
    /// Returns the handle, the record of its answers, and the task to run. `tenants` names the table of tenants;
    /// without it every tenant exists.
    pub(super) fn new(
        primaries: PrimaryConnector,
        tenants: Option<&TenantsSpec>,
    ) -> (Self, Answers, impl Future<Output = ()> + use<>) {
        let (questions, received) = mpsc::channel(QUEUE_MAX);
        let known = match tenants {
            Some(spec) => {
                let (id, table) = (spec.id_to_sql(), spec.table.to_sql());
                format!("ARRAY(SELECT {id}::text FROM {table} WHERE {id}::text = ANY($1))")
            }
            None => "$1::text[]".to_owned(),
        };
        // A statement's snapshot is taken before any of its expressions is evaluated, and so before the flush position
        // is read.
        let statement = format!("SELECT pg_current_wal_flush_lsn()::text, pg_current_snapshot()::text, {known}");
        let lazy = Lazy::new(primaries, "starts of streams", statement);
        (Self { questions }, lazy.answers.clone(), answer_all(lazy, received))
    }

    async fn put<T>(
        &self,
        question: impl FnOnce(oneshot::Sender<Result<T, Unreachable>>) -> Question,
    ) -> Result<T, Unreachable> {
        let gone = || Unreachable::from(Unanswered::Stopping);
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.questions.send(question(reply)).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())?
        };
        tokio::time::timeout(CALL_MAX, asked).await.map_err(|_| Unanswered::Late(CALL_MAX))?
    }
}

impl Primary for SqlPrimary {
    async fn look(&self, scope: &Scope) -> Result<PrimaryState, Unreachable> {
        let scope = scope.clone();
        self.put(|reply| Question::State { scope, reply }).await
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
    let mut logged = LoggedReason::default();
    let mut pause = Duration::ZERO;
    loop {
        match tokio::time::timeout(pause, questions.recv_many(&mut batch, SHARED_MAX)).await {
            Ok(0) => return,
            Ok(_) => {}
            Err(_idle) => {
                // A probe is the statement that starts streams, without a tenant.
                let failed = primary_state(&mut lazy, &[]).await.err();
                let is_lasting = lazy.answers.silence().is_some_and(|silence| silence.since.elapsed() > Answers::LATE);
                match &failed {
                    None => logged.clear(),
                    Some(error) if is_lasting => logged.log(error),
                    Some(_) => {}
                }
                pause = if failed.is_some() { PROBE_AGAIN_AFTER } else { PROBE_EVERY };
                continue;
            }
        }
        let mut state_questions = Vec::new();
        for question in batch.drain(..) {
            match question {
                Question::State { scope, reply } if !reply.is_closed() => state_questions.push((scope, reply)),
                // Skip questions whose caller has gone away.
                Question::State { .. } => {}
                Question::Status { reply, .. } if reply.is_closed() => {}
                Question::Mark { reply } if reply.is_closed() => {}
                Question::Status { xid, reply } => {
                    let answer = status(&mut lazy, xid).await;
                    let _ = reply.send(answer.inspect_err(|error| logged.refer(error)).map_err(Unreachable::from));
                }
                Question::Mark { reply } => {
                    let answer = mark(&mut lazy).await;
                    let _ = reply.send(answer.inspect_err(|error| logged.refer(error)).map_err(Unreachable::from));
                }
            }
        }
        if state_questions.is_empty() {
            continue;
        }
        let tenants: Vec<&str> =
            state_questions.iter().filter_map(|(scope, _)| scope.tenant()).map(TenantId::as_str).collect();
        let answer = primary_state(&mut lazy, &tenants).await.inspect_err(|error| logged.refer(error));
        for (scope, reply) in state_questions {
            let _ = reply.send(match &answer {
                Ok((state, known)) => {
                    let scope_exists = scope.tenant().is_none_or(|tenant| known.contains(tenant.as_str()));
                    Ok(PrimaryState { scope_exists, ..state.clone() })
                }
                Err(error) => Err(error.clone().into()),
            });
        }
    }
}

/// The reason that the log has why starts are not answered, so that each is logged once.
#[derive(Default)]
struct LoggedReason(Option<String>);

impl LoggedReason {
    fn log(&mut self, error: &Unanswered) {
        let reason = InFull(error.clone()).to_string();
        if self.0.as_ref() != Some(&reason) {
            tracing::warn!("no stream can start: {reason}");
            self.0 = Some(reason);
        }
    }

    /// Logs an error whose text refers its caller to the log.
    fn refer(&mut self, error: &Unanswered) {
        if let Unanswered::Connect(cause) = error
            && matches!(**cause, primary::Error::Connect(_))
        {
            self.log(error);
        }
    }

    fn clear(&mut self) {
        self.0 = None;
    }
}

async fn primary_state(lazy: &mut Lazy, tenants: &[&str]) -> Result<(PrimaryState, HashSet<String>), Unanswered> {
    ask(lazy, async |client, statement| {
        let row = client.query_one(statement, &[&tenants]).await?;
        let flush_lsn: String = row.get(0);
        let flush_lsn = flush_lsn.parse::<Lsn>()?;
        let snapshot: String = row.get(1);
        let snapshot = snapshot.parse::<Snapshot>()?;
        let known: Vec<String> = row.get(2);
        let state = PrimaryState { flush_lsn, snapshot: Arc::new(snapshot), scope_exists: false };
        Ok((state, known.into_iter().collect()))
    })
    .await
}

async fn status(lazy: &mut Lazy, xid: Xid8) -> Result<TransactionStatus, Unanswered> {
    ask(lazy, async |client, _| {
        let statement = "SELECT pg_xact_status($1::text::xid8) IS NOT DISTINCT FROM 'in progress'";
        match client.query_one(statement, &[&xid.to_string()]).await {
            Ok(row) if row.get(0) => Ok(TransactionStatus::InProgress),
            Ok(_) => Ok(TransactionStatus::Over),
            // A crash has lost the transaction of the token, or the token is forged.
            Err(error) if error.code() == Some(&SqlState::INVALID_PARAMETER_VALUE) => Ok(TransactionStatus::Unassigned),
            Err(error) => Err(error.into()),
        }
    })
    .await
}

async fn mark(lazy: &mut Lazy) -> Result<Lsn, Unanswered> {
    ask(lazy, async |client, _| {
        let statement = "SELECT pg_logical_emit_message(true, 'tuplewatch', 'mark')::text";
        let row = client.query_one(statement, &[]).await?;
        let lsn: String = row.get(0);
        Ok(lsn.parse::<Lsn>()?)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATE: Duration = Answers::LATE;

    #[tokio::test(start_paused = true)]
    async fn a_silence_lasts_from_the_first_question_to_a_timely_answer() {
        let second = Duration::from_secs(1);
        let refused = || Err::<(), _>(primary::Error::SessionFirst.into());
        let answers = Answers::new();
        let began = Instant::now();
        assert_eq!(answers.silence(), Some(Silence { since: began, why: None }), "nobody has asked yet");
        answers.asked();
        answers.answered(&Ok(()));
        assert_eq!(answers.silence(), None);

        // A waiting question is no silence before it is late.
        let asked_at = Instant::now();
        answers.asked();
        tokio::time::advance(LATE).await;
        assert_eq!(answers.silence(), None);
        tokio::time::advance(second).await;
        assert_eq!(answers.silence(), Some(Silence { since: asked_at, why: None }));
        // A late answer does not end a silence.
        answers.answered(&Ok(()));
        assert_eq!(answers.silence(), Some(Silence { since: asked_at, why: Some(Why::Late) }));
        answers.asked();
        answers.answered(&Ok(()));
        assert_eq!(answers.silence(), None);

        let asked_at = Instant::now();
        for _ in 0..3 {
            answers.asked();
            answers.answered(&refused());
            tokio::time::advance(second).await;
        }
        assert_eq!(
            answers.silence(),
            Some(Silence { since: asked_at, why: Some(Why::Limit) }),
            "since the first of them"
        );
    }
}
