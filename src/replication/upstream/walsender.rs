//! The upstream for a real PostgreSQL: one connection for SQL, and one for replication.
//!
//! Both connections lead to the same server, which is checked by its system identifier. SQL checks the requirements,
//! creates the slot, reads the publication, and asks every few seconds whether the server still has the walsender,
//! because a silent replication connection proves nothing. Every statement has a time limit. The replication connection
//! reads the slot.

use super::{Link, Server, Started, Upstream};
use crate::changelog::State;
use crate::decode::pgoutput::RelationId;
use crate::model::diagnostic::{Diagnostic, Report, Severity};
use crate::model::lsn::{Lsn, Snapshot, Xid8};
use crate::model::timeline::{History, Source};
use crate::postgres::connection::{
    ConnectError, Connection, Endpoints, Event, Walsender, WalsenderError, application_name,
};
use crate::postgres::primary::Found;
use crate::postgres::primary::PrimaryConnector;
use crate::postgres::publication::{Checks, Published};
use crate::postgres::requirements;
use crate::postgres::slot::{self, Slot, Waiting};
use crate::postgres::transactions;
use crate::postgres::transactions::Writer;
use crate::replication::{Definite, Error, Fatal, Options, Transient};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;

/// A longer statement on the SQL connection means that the server does not answer.
const STATEMENT_MAX: Duration = Duration::from_secs(15);
/// The longest wait for the slot: the server has to load it, and another walsender may be about to release it.
const START_MAX: Duration = Duration::from_secs(60);
/// The longest wait for a change of the slot, which is quick unless a walsender reads it.
const ALTER_MAX: Duration = Duration::from_secs(5);

/// The server of `database.uri`.
pub(crate) struct Postgres {
    options: Options,
    endpoints: Endpoints,
    /// Publishes the server for the other connections.
    found: watch::Sender<Found>,
}

impl Postgres {
    /// Creates an upstream that reads from the primary among `endpoints`.
    pub(crate) fn new(options: Options, endpoints: Endpoints) -> Self {
        Self { options, endpoints, found: watch::Sender::default() }
    }

    /// Follows the server that the session found to be the primary of its source. All other statements go to it, also
    /// after it changes.
    pub(crate) fn primaries(&self) -> PrimaryConnector {
        PrimaryConnector::new(self.found.subscribe())
    }

    /// Checks whether a session could stream, before the process is ready. A temporary cause (such as a server that is
    /// still starting) is not an error, because the session tries again.
    ///
    /// # Errors
    /// If something has to be repaired first.
    pub(crate) async fn preflight(&self, state: &State) -> Result<(), Error> {
        let look = async {
            let sql = self.endpoints.connect(&application_name(&state.node_id)).await?;
            own_source(&sql, state).await?;
            check(&sql, &self.options, state.origin.is_some()).await?;
            self.warn_of_limits(&sql).await
        };
        match look.await {
            Err(Error::Transient(error)) => {
                tracing::warn!("PostgreSQL cannot be reached yet: {error}");
                Ok(())
            }
            result => result,
        }
    }

    /// Warns if PostgreSQL permits this process fewer connections than it may open.
    async fn warn_of_limits(&self, sql: &Connection) -> Result<(), Error> {
        let limits = bounded(requirements::Limits::read(&sql.client)).await?;
        let mut report = Report::default();
        limits.check(self.options.connections_max, &mut report);
        for Diagnostic { subject, what, meaning, fix, .. } in report.into_diagnostics() {
            let (meaning, fix) = (meaning.unwrap_or_default(), fix.unwrap_or_default());
            tracing::warn!("{subject}: {what}. {meaning} Fix: {fix}");
        }
        Ok(())
    }

    /// Opens the session's SQL connection. If a limit prevents it, the other users of PostgreSQL close their
    /// connections.
    async fn connect_sql(&self, name: &str) -> Result<Arc<Connection>, Error> {
        let connected = self.endpoints.connect(name).await;
        let is_refused = connected.as_ref().is_err_and(ConnectError::is_limit);
        self.found.send_if_modified(|found| std::mem::replace(&mut found.is_refused, is_refused) != is_refused);
        Ok(Arc::new(connected?))
    }

    /// Creates the slot, if there is none.
    async fn create_slot(&self, sql: &Connection) -> Result<(), Error> {
        if Slot::read(&sql.client, &self.options.slot).await?.is_some() {
            return Ok(());
        }
        let mut waiting = |waiting: &Waiting| tracing::info!("{waiting}");
        let created = slot::create_slot(sql, &self.options.slot, self.options.failover, &mut waiting);
        let created = created.await?;
        tracing::info!(slot = %self.options.slot, position = %created, "created the replication slot");
        Ok(())
    }

    /// Lets standbys keep a copy of a slot that is older than PostgreSQL 17, or that another program created.
    ///
    /// Only if no walsender reads the slot. Otherwise PostgreSQL would wait for the slot without limit, even after our
    /// connection has ended. Such a slot is not read unaltered either, because then it could not be altered until we
    /// stop.
    async fn enable_failover(
        &self,
        sql: &Connection,
        walsender: &mut Walsender,
        name: &str,
        pid: i32,
    ) -> Result<(), Error> {
        let slot = &self.options.slot;
        if !self.options.failover {
            return Ok(());
        }
        let found = Slot::read(&sql.client, slot).await?;
        let Some(found) = found.filter(|found| found.failover == Some(false)) else { return Ok(()) };
        if let Some(pid) = found.active_pid {
            let is_left_behind = end_left_behind(sql, slot, name).await?;
            let slot = slot.clone();
            let in_use =
                if is_left_behind { Transient::SlotLeftBehind { slot } } else { Transient::SlotInUse { slot, pid } };
            return Err(in_use.into());
        }
        // Slot names contain only letters, digits and underscores.
        let statement = format!("ALTER_REPLICATION_SLOT \"{slot}\" (FAILOVER true)");
        match timeout(ALTER_MAX, walsender.query(&statement)).await {
            Ok(Ok(_)) => tracing::info!(slot, "standbys may keep a copy of the replication slot from now on"),
            Ok(Err(error)) => tracing::warn!(slot, "the replication slot will not outlive a failover: {error}"),
            Err(_) => {
                // Another walsender took the slot first, and ours would wait for it.
                let statement = "SELECT pg_terminate_backend($1)";
                bounded(sql.client.query_opt(statement, &[&pid])).await?;
                return Err(Transient::SlotTaken { slot: slot.clone() }.into());
            }
        }
        Ok(())
    }
}

/// Checks the requirements on PostgreSQL.
async fn check(sql: &Connection, options: &Options, slot_expected: bool) -> Result<(), Error> {
    let expectation = requirements::Expectation {
        mapping: &options.mapping,
        slot: &options.slot,
        publication: &options.publication,
        slot_expected,
        ack_delay: options.ack_delay,
        commands: &options.commands,
    };
    let diagnostics = bounded(requirements::check(&sql.client, &expectation)).await?;
    let errors: Vec<Diagnostic> =
        diagnostics.into_iter().filter(|diagnostic| diagnostic.severity == Severity::Error).collect();
    if errors.is_empty() { Ok(()) } else { Err(Definite::Unfit(errors).into()) }
}

impl Upstream for Postgres {
    type Link = PostgresLink;

    async fn connect(&self, state: &State) -> Result<PostgresLink, Error> {
        let name = application_name(&state.node_id);
        if let Some(origin) = &state.origin {
            self.endpoints.prefer_timeline(origin.history.current().number);
        }
        let sql = self.connect_sql(&name).await?;
        let source = own_source(&sql, state).await?;
        check(&sql, &self.options, state.origin.is_some()).await?;
        if state.origin.is_none() {
            // Only while the log is empty: a slot that is created later would begin with an unnoticed gap.
            self.create_slot(&sql).await?;
        }
        let mut walsender = sql.endpoint().replicate(&name).await?;
        // A database with encoding SQL_ASCII may contain any bytes. If the walsender had to send UTF-8, it would fail
        // at each value that is not UTF-8, again and again. Unconverted, such a value is a gap for its tenant.
        let as_they_are = "SELECT pg_catalog.set_config('client_encoding', 'SQL_ASCII', false) \
                           WHERE pg_catalog.current_setting('server_encoding') = 'SQL_ASCII'";
        bounded(walsender.query(as_they_are)).await?;
        let identity = bounded(walsender.identify()).await?;
        if identity.system_identifier != source.system_identifier {
            return Err(Transient::TwoServers.into());
        }
        let history = history(&mut walsender, identity.timeline).await?;
        let pid = walsender_pid(&mut walsender).await?;
        self.enable_failover(&sql, &mut walsender, &name, pid).await?;
        let server = Server { source, history, wal_end: identity.wal_end };
        Ok(PostgresLink {
            options: self.options.clone(),
            found: self.found.clone(),
            name,
            pid,
            sql,
            walsender,
            server,
            checks: Checks::default(),
        })
    }
}

/// A link to PostgreSQL.
pub(crate) struct PostgresLink {
    options: Options,
    found: watch::Sender<Found>,
    /// The application name of this node's walsenders.
    name: String,
    /// The process id of the walsender.
    pid: i32,
    /// Statements share this connection while PostgreSQL refuses them their own.
    sql: Arc<Connection>,
    walsender: Walsender,
    server: Server,
    checks: Checks,
}

impl PostgresLink {
    /// The error with which the stream ended.
    fn stream_error(&self, error: WalsenderError) -> Error {
        if error.is_missing_publication() {
            let recreate_slot = self.options.commands.recreate_slot().to_string();
            return Definite::YoungPublication { source: error, recreate_slot }.into();
        }
        error.into()
    }

    /// Returns the slot's confirmed position, and the next transaction id.
    async fn slot_position(&self) -> Result<Started, Error> {
        let slot = &self.options.slot;
        let statement = "SELECT confirmed_flush_lsn::text, pg_current_snapshot()::text FROM pg_replication_slots \
                         WHERE slot_name = $1";
        let row = bounded(self.sql.client.query_opt(statement, &[slot])).await?;
        let row = row.ok_or_else(|| Transient::SlotDropped { slot: slot.clone() })?;
        let confirmed: Option<String> = row.get(0);
        let confirmed = confirmed.ok_or_else(|| Definite::NoPosition { slot: slot.clone() })?;
        let snapshot: String = row.get(1);
        let snapshot: Snapshot = snapshot.parse().map_err(Definite::Snapshot)?;
        let xid: Xid8 = snapshot.xmax();
        Ok(Started { confirmed: confirmed.parse().map_err(Definite::Lsn)?, xid })
    }
}

impl Link for PostgresLink {
    fn server(&self) -> &Server {
        &self.server
    }

    async fn start(&mut self) -> Result<Started, Error> {
        let Options { slot, publication, .. } = &self.options;
        let started = timeout(START_MAX, self.walsender.start(slot, publication)).await;
        if let Err(error) = started.map_err(|_| Transient::NotStarted(START_MAX))? {
            if error.sqlstate() == Some(&SqlState::OBJECT_IN_USE)
                && end_left_behind(&self.sql, slot, &self.name).await?
            {
                return Err(Transient::SlotLeftBehind { slot: slot.clone() }.into());
            }
            return Err(self.stream_error(error));
        }
        // The slot is ours now, so its position is stable.
        self.slot_position().await
    }

    fn announce(&self) {
        let (endpoint, session) = (Some(self.sql.endpoint().clone()), Arc::downgrade(&self.sql));
        self.found.send_replace(Found { endpoint, session, is_refused: false });
    }

    async fn next(&mut self, events: &mut Vec<Event>) -> Result<(), Error> {
        self.walsender.next(events).await.map_err(|error| self.stream_error(error))
    }

    fn lost(&self) -> impl Future<Output = Error> + Send + 'static {
        let closed = self.sql.closed();
        async { Transient::SqlSession(closed.await).into() }
    }

    fn acknowledge(&self, lsn: Lsn) {
        self.walsender.acknowledge(lsn);
    }

    async fn check_alive(&self) -> Result<(), Error> {
        let statement = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1";
        let row = bounded(self.sql.client.query_opt(statement, &[&self.options.slot])).await?;
        let holder: Option<i32> = row.and_then(|row| row.get(0));
        if holder == Some(self.pid) {
            return Ok(());
        }
        Err(Transient::WalsenderGone.into())
    }

    async fn check_fit(&self) -> Result<(), Error> {
        check(&self.sql, &self.options, true).await
    }

    async fn published(&self) -> Result<Published, Error> {
        bounded(self.checks.next(&self.sql.client, &self.options.publication, &self.options.mapping)).await
    }

    async fn writers(&self, tables: &[RelationId]) -> Result<Vec<Xid8>, Error> {
        bounded(transactions::writers(&self.sql.client, tables)).await
    }

    async fn running(&self, of: &[Xid8]) -> Result<Vec<Writer>, Error> {
        bounded(transactions::running(&self.sql.client, of)).await
    }

    async fn mark(&self) -> Result<Lsn, Error> {
        let sql = &self.sql.client;
        let statement = "SELECT pg_logical_emit_message(true, 'tuplewatch', 'mark')";
        bounded(sql.batch_execute("SET synchronous_commit = local")).await?;
        bounded(sql.query_one(statement, &[])).await?;
        let row = bounded(sql.query_one("SELECT pg_current_wal_insert_lsn()::text", &[])).await?;
        let lsn: String = row.get(0);
        Ok(lsn.parse().map_err(Definite::Lsn)?)
    }

    async fn confirmed(&self) -> Result<Lsn, Error> {
        Ok(self.slot_position().await?.confirmed)
    }

    async fn close(self) {
        self.walsender.close().await;
    }
}

/// A failed statement is a temporary error: the checks report what is wrong with the server, with the remedy.
impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        Transient::Sql(error.into()).into()
    }
}

async fn bounded<T, E: Into<Error>>(work: impl Future<Output = Result<T, E>>) -> Result<T, Error> {
    let answer = timeout(STATEMENT_MAX, work).await.map_err(|_| Transient::NoAnswer(STATEMENT_MAX))?;
    answer.map_err(Into::into)
}

/// Ends the walsender that holds the slot if this node left it behind, which its application name `name` shows. Returns
/// whether it did. The server keeps a silently lost connection until a timeout. Walsenders of other programs are left
/// alone.
async fn end_left_behind(sql: &Connection, slot: &str, name: &str) -> Result<bool, Error> {
    let statement = "SELECT pg_terminate_backend(activity.pid)
                       FROM pg_stat_activity AS activity JOIN pg_replication_slots AS slot ON slot.active_pid = activity.pid
                      WHERE slot.slot_name = $1 AND activity.application_name = $2
                        AND activity.backend_type = 'walsender'";
    Ok(bounded(sql.client.query_opt(statement, &[&slot, &name])).await?.is_some())
}

/// Returns the database of this connection. Fails if the log belongs to another database.
async fn own_source(sql: &Connection, state: &State) -> Result<Source, Error> {
    let found = source(sql).await?;
    match state.origin.as_ref().map(|origin| origin.source).filter(|recorded| *recorded != found) {
        Some(recorded) => Err(Fatal::ForeignSource { recorded, found }.into()),
        None => Ok(found),
    }
}

/// Returns the database of this connection, and its cluster.
async fn source(sql: &Connection) -> Result<Source, Error> {
    let statement = "SELECT c.system_identifier, d.oid FROM pg_control_system() c, pg_database d \
                     WHERE d.datname = current_database()";
    let row = bounded(sql.client.query_one(statement, &[])).await?;
    let (system, oid): (i64, u32) = (row.get(0), row.get(1));
    // SQL has no unsigned integers, so read the bits as unsigned.
    Ok(Source { system_identifier: system.cast_unsigned(), database_oid: oid })
}

async fn walsender_pid(walsender: &mut Walsender) -> Result<i32, Error> {
    let rows = bounded(walsender.query("SELECT pg_catalog.pg_backend_pid()")).await?;
    let pid = rows.first().and_then(|row| row.first()?.as_ref()?.parse().ok());
    Ok(pid.ok_or(Transient::NoPid)?)
}

/// Returns the timelines that lead to this one.
async fn history(walsender: &mut Walsender, timeline: u32) -> Result<History, Error> {
    if timeline == 1 {
        return Ok(History::first());
    }
    let file = bounded(walsender.timeline_history(timeline)).await?;
    Ok(History::parse(timeline, &file).map_err(Definite::History)?)
}
