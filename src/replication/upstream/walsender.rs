//! The upstream that is a real PostgreSQL: two connections, one for SQL and one that replicates.

use super::{Link, Server, Started, Upstream};
use crate::changelog::State;
use crate::decode::pgoutput::RelationId;
use crate::model::diagnostic::{Diagnostic, Report, Severity};
use crate::model::lsn::{Lsn, Snapshot, Xid8};
use crate::model::timeline::{History, Source};
use crate::postgres::connection::{self, Connection, Endpoints, Event, Walsender, WalsenderError, application_name};
use crate::postgres::primary::Found;
use crate::postgres::primary::PrimaryConnector;
use crate::postgres::publication::{Checks, Published};
use crate::postgres::requirements;
use crate::postgres::slot::{self, Slot, Waiting};
use crate::postgres::transactions;
use crate::postgres::transactions::Writer;
use crate::replication::{Error, Fatal, Options};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::timeout;

/// A statement on the side connection that takes longer means that the server does not answer.
const STATEMENT_MAX: Duration = Duration::from_secs(15);
/// Longest wait for the slot: it has to be read in, and may still be given up by somebody else.
const START_MAX: Duration = Duration::from_secs(60);
/// Longest wait for a change of the slot, which takes no time where nobody reads it.
const ALTER_MAX: Duration = Duration::from_secs(5);

/// The server that `database.uri` leads to.
pub struct Postgres {
    options: Options,
    endpoints: Endpoints,
    /// For those who ask the same server.
    found: watch::Sender<Found>,
}

impl Postgres {
    /// Reads from the primary among `endpoints`.
    pub fn new(options: Options, endpoints: Endpoints) -> Self {
        Self { options, endpoints, found: watch::Sender::default() }
    }

    /// Follows which server the session found to be the primary of its source. Whoever asks it anything asks this one, and
    /// again after every change.
    pub fn primaries(&self) -> PrimaryConnector {
        PrimaryConnector::new(self.found.subscribe())
    }

    /// Looks whether it could stream, before anything is promised. What may pass (a server that is still starting) is no
    /// error: the session will get there.
    ///
    /// # Errors
    /// What somebody has to repair first.
    pub async fn preflight(&self, state: &State) -> Result<(), Error> {
        let look = async {
            let sql = self.endpoints.connect(&application_name(&state.node_id)).await.map_err(connect_error)?;
            own_source(&sql, state).await?;
            check(&sql, &self.options, state.origin.is_some()).await?;
            self.warn_of_limits(&sql).await
        };
        match look.await {
            Err(Error::Transient(what)) => {
                tracing::warn!("PostgreSQL cannot be reached yet: {what}");
                Ok(())
            }
            result => result,
        }
    }

    /// Says where PostgreSQL has fewer connections for this process than it may open.
    async fn warn_of_limits(&self, sql: &Connection) -> Result<(), Error> {
        let limits = bounded(requirements::Limits::read(&sql.client)).await?.map_err(sql_error)?;
        let mut report = Report::default();
        limits.check(self.options.connections_max, &mut report);
        for Diagnostic { subject, what, meaning, fix, .. } in report.into_diagnostics() {
            let (meaning, fix) = (meaning.unwrap_or_default(), fix.unwrap_or_default());
            tracing::warn!("{subject}: {what}. {meaning} Fix: {fix}");
        }
        Ok(())
    }

    /// The session's SQL connection. Where a limit is in the way, others give up theirs.
    async fn connect_sql(&self, name: &str) -> Result<Arc<Connection>, Error> {
        let connected = self.endpoints.connect(name).await;
        let is_refused = connected.as_ref().is_err_and(connection::ConnectError::is_limit);
        self.found.send_if_modified(|found| std::mem::replace(&mut found.is_refused, is_refused) != is_refused);
        connected.map(Arc::new).map_err(connect_error)
    }

    /// Makes the slot, if there is none.
    async fn create_slot(&self, sql: &Connection) -> Result<(), Error> {
        if Slot::read(&sql.client, &self.options.slot).await.map_err(sql_error)?.is_some() {
            return Ok(());
        }
        let mut waiting = |waiting: &Waiting| tracing::info!("{waiting}");
        let created = slot::create_slot(sql, &self.options.slot, self.options.failover, &mut waiting);
        let created = created.await.map_err(sql_error)?;
        tracing::info!(slot = %self.options.slot, position = %created, "created the replication slot");
        Ok(())
    }

    /// A slot from before PostgreSQL 17, or that somebody else made: standbys keep a copy of it from now on.
    ///
    /// Only where nobody reads it. Else PostgreSQL waits for it to be free, however long that takes, also when we have gone;
    /// and it is not read as it is either, for then nobody could alter it until we stop.
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
        let found = Slot::read(&sql.client, slot).await.map_err(sql_error)?;
        let Some(found) = found.filter(|found| found.failover == Some(false)) else { return Ok(()) };
        if let Some(holder) = found.active_pid {
            let what = format!("replication slot {slot} is active for PID {holder}");
            return Err(in_use(sql, slot, name, &what).await?);
        }
        // Slots are named by letters, digits and underscores.
        let statement = format!("ALTER_REPLICATION_SLOT \"{slot}\" (FAILOVER true)");
        match timeout(ALTER_MAX, walsender.query(&statement)).await {
            Ok(Ok(_)) => tracing::info!(slot, "standbys may keep a copy of the replication slot from now on"),
            Ok(Err(error)) => tracing::warn!(slot, "the replication slot will not outlive a failover: {error}"),
            Err(_) => {
                // Somebody was faster, and our walsender would wait for them.
                let statement = "SELECT pg_terminate_backend($1)";
                bounded(sql.client.query_opt(statement, &[&pid])).await?.map_err(sql_error)?;
                return Err(Error::transient(format!("slot {slot} came into use while it was to be altered")));
            }
        }
        Ok(())
    }
}

/// What PostgreSQL must be like.
async fn check(sql: &Connection, options: &Options, slot_expected: bool) -> Result<(), Error> {
    let expectation = requirements::Expectation {
        mapping: &options.mapping,
        slot: &options.slot,
        publication: &options.publication,
        slot_expected,
        ack_delay: options.ack_delay,
        commands: &options.commands,
    };
    let diagnostics = bounded(requirements::check(&sql.client, &expectation)).await?.map_err(sql_error)?;
    let errors: Vec<String> = diagnostics
        .iter()
        .filter(|diagnostic| diagnostic.severity == Severity::Error)
        .map(ToString::to_string)
        .collect();
    if !errors.is_empty() {
        return Err(Error::definite(errors.join("\n")));
    }
    Ok(())
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
            // Only while the log is empty: a slot made later would begin with a gap, and say nothing of it.
            self.create_slot(&sql).await?;
        }
        let mut walsender = sql.endpoint().replicate(&name).await.map_err(connect_error)?;
        // Such a database holds any bytes. Asked for UTF-8, the walsender would fail on those that are not, each time that it
        // came to them; as they are, they are a gap for their tenant.
        let as_they_are = "SELECT pg_catalog.set_config('client_encoding', 'SQL_ASCII', false) \
                           WHERE pg_catalog.current_setting('server_encoding') = 'SQL_ASCII'";
        bounded(walsender.query(as_they_are)).await?.map_err(walsender_error)?;
        let identity = bounded(walsender.identify()).await?.map_err(walsender_error)?;
        if identity.system_identifier != source.system_identifier {
            return Err(Error::transient("the two connections lead to different servers"));
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

/// See the module.
pub struct PostgresLink {
    options: Options,
    found: watch::Sender<Found>,
    /// That walsenders of this node have.
    name: String,
    /// Of the walsender.
    pid: i32,
    /// Shared with those who are refused one of their own.
    sql: Arc<Connection>,
    walsender: Walsender,
    server: Server,
    checks: Checks,
}

impl PostgresLink {
    /// What the stream ended with.
    fn stream_error(&self, error: WalsenderError) -> Error {
        // undefined_object: the slot was found, so that it is the publication.
        if error.sqlstate() == Some("42704") && error.routine() == Some("get_publication_oid") {
            return Error::definite(format!(
                "{error}. The slot reads from before the publication was created: run {}; what has changed in between is lost, and \
                 subscribers are told",
                self.options.commands.recreate_slot()
            ));
        }
        walsender_error(error)
    }

    /// The slot's confirmed flush, and the next transaction id.
    async fn slot_position(&self) -> Result<Started, Error> {
        let slot = &self.options.slot;
        let statement = "SELECT confirmed_flush_lsn::text, pg_current_snapshot()::text FROM pg_replication_slots \
                         WHERE slot_name = $1";
        let row = bounded(self.sql.client.query_opt(statement, &[slot])).await?.map_err(sql_error)?;
        let row = row.ok_or_else(|| Error::transient(format!("slot {slot} has just disappeared")))?;
        let confirmed: Option<String> = row.get(0);
        let confirmed = confirmed.ok_or_else(|| Error::definite(format!("slot {slot} has no confirmed position")))?;
        let snapshot: String = row.get(1);
        let snapshot: Snapshot = snapshot.parse().map_err(Error::definite)?;
        let xid: Xid8 = snapshot.xmax();
        Ok(Started { confirmed: confirmed.parse().map_err(Error::definite)?, xid })
    }
}

impl Link for PostgresLink {
    fn server(&self) -> &Server {
        &self.server
    }

    async fn start(&mut self) -> Result<Started, Error> {
        let Options { slot, publication, .. } = &self.options;
        let started = timeout(START_MAX, self.walsender.start(slot, publication)).await;
        let late = |_| Error::transient(format!("replication did not start within {} s", START_MAX.as_secs()));
        if let Err(error) = started.map_err(late)? {
            // object_in_use: the slot is active for another process.
            if error.sqlstate() == Some("55006") {
                return Err(in_use(&self.sql, slot, &self.name, &error.to_string()).await?);
            }
            return Err(self.stream_error(error));
        }
        // The slot is ours now, so nobody moves it any more.
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
        async { Error::transient(closed.await) }
    }

    fn acknowledge(&self, lsn: Lsn) {
        self.walsender.acknowledge(lsn);
    }

    async fn check_alive(&self) -> Result<(), Error> {
        let statement = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1";
        let row = bounded(self.sql.client.query_opt(statement, &[&self.options.slot])).await?.map_err(sql_error)?;
        let holder: Option<i32> = row.and_then(|row| row.get(0));
        if holder == Some(self.pid) {
            return Ok(());
        }
        Err(Error::transient("the server has given up the replication connection: it died on the way"))
    }

    async fn check_fit(&self) -> Result<(), Error> {
        check(&self.sql, &self.options, true).await
    }

    async fn published(&self) -> Result<Published, Error> {
        bounded(self.checks.next(&self.sql.client, &self.options.publication, &self.options.mapping))
            .await?
            .map_err(sql_error)
    }

    async fn writers(&self, tables: &[RelationId]) -> Result<Vec<Xid8>, Error> {
        bounded(transactions::writers(&self.sql.client, tables)).await?.map_err(sql_error)
    }

    async fn running(&self, of: &[Xid8]) -> Result<Vec<Writer>, Error> {
        bounded(transactions::running(&self.sql.client, of)).await?.map_err(sql_error)
    }

    async fn mark(&self) -> Result<Lsn, Error> {
        let sql = &self.sql.client;
        let statement = "SELECT pg_logical_emit_message(true, 'tuplewatch', 'mark')";
        bounded(sql.batch_execute("SET synchronous_commit = local")).await?.map_err(sql_error)?;
        bounded(sql.query_one(statement, &[])).await?.map_err(sql_error)?;
        let row = bounded(sql.query_one("SELECT pg_current_wal_insert_lsn()::text", &[])).await?.map_err(sql_error)?;
        let lsn: String = row.get(0);
        lsn.parse().map_err(Error::definite)
    }

    async fn confirmed(&self) -> Result<Lsn, Error> {
        Ok(self.slot_position().await?.confirmed)
    }

    async fn close(self) {
        self.walsender.close().await;
    }
}

fn walsender_error(error: WalsenderError) -> Error {
    if error.is_definite() { Error::definite(error) } else { Error::transient(error) }
}

fn connect_error(error: connection::ConnectError) -> Error {
    if error.is_definite() { Error::definite(error) } else { Error::transient(error) }
}

fn sql_error(error: tokio_postgres::Error) -> Error {
    Error::transient(connection::describe(&error))
}

async fn bounded<T>(work: impl Future<Output = T>) -> Result<T, Error> {
    let late = |_| Error::transient(format!("the server did not answer within {} s", STATEMENT_MAX.as_secs()));
    timeout(STATEMENT_MAX, work).await.map_err(late)
}

/// What to say of a slot that is in use, as `what` tells. Ends the walsender that holds it if it is one that this node, whose
/// walsenders have this name, left behind: after a connection that died without a word the server goes on waiting for an answer
/// of it. Anybody else's is left alone.
async fn in_use(sql: &Connection, slot: &str, name: &str, what: &str) -> Result<Error, Error> {
    let statement = "SELECT pg_terminate_backend(activity.pid)
                       FROM pg_stat_activity AS activity JOIN pg_replication_slots AS slot ON slot.active_pid = activity.pid
                      WHERE slot.slot_name = $1 AND activity.application_name = $2
                        AND activity.backend_type = 'walsender'";
    let evicted = bounded(sql.client.query_opt(statement, &[&slot, &name])).await?.map_err(sql_error)?;
    Ok(Error::transient(match evicted {
        Some(_) => format!("{what}, which this node left behind: ended it"),
        None => what.to_owned(),
    }))
}

/// Which database this is; an error where the log is another one's.
async fn own_source(sql: &Connection, state: &State) -> Result<Source, Error> {
    let found = source(sql).await?;
    match state.origin.as_ref().map(|origin| origin.source).filter(|recorded| *recorded != found) {
        Some(recorded) => Err(Fatal::ForeignSource { recorded, found }.into()),
        None => Ok(found),
    }
}

/// Which database of which cluster this is.
async fn source(sql: &Connection) -> Result<Source, Error> {
    let statement = "SELECT c.system_identifier, d.oid FROM pg_control_system() c, pg_database d \
                     WHERE d.datname = current_database()";
    let row = bounded(sql.client.query_one(statement, &[])).await?.map_err(sql_error)?;
    let (system, oid): (i64, u32) = (row.get(0), row.get(1));
    // SQL has no unsigned integers: the bits are what counts.
    Ok(Source { system_identifier: system.cast_unsigned(), database_oid: oid })
}

async fn walsender_pid(walsender: &mut Walsender) -> Result<i32, Error> {
    let rows = bounded(walsender.query("SELECT pg_catalog.pg_backend_pid()")).await?.map_err(walsender_error)?;
    let pid = rows.first().and_then(|row| row.first()?.as_ref()?.parse().ok());
    pid.ok_or_else(|| Error::transient("the walsender did not tell its process id"))
}

/// The timelines that lead to this one.
async fn history(walsender: &mut Walsender, timeline: u32) -> Result<History, Error> {
    if timeline == 1 {
        return Ok(History::first());
    }
    let file = bounded(walsender.timeline_history(timeline)).await?.map_err(walsender_error)?;
    History::parse(timeline, &file).map_err(Error::definite)
}
