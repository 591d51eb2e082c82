//! One session after the other: connect, check, stream, and again.

use super::connection::{Connection, Endpoint, Endpoints};
use super::intake::{Event, Intake};
use super::publication::{self, Published};
use super::requirements::{self, Severity};
use super::slot::{self, Slot, Waiting};
use super::{Backoff, Error, Fatal, Options, Outlet, Status, connection};
use crate::assembler::Assembler;
use crate::changelog::{Entry, Origin, Room, State, Verified};
use crate::lsn::{CommitTime, Lsn, Position, Snapshot, Xid8};
use crate::timeline::{History, Source};
use crate::transaction::{Break, BreakReason};
use pgwire_replication::{ReplicationClient, ReplicationEvent};

use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};

/// `wal_sender_timeout` of the session. Feedback suppresses the server's own pings, so it is sent only when there is
/// something to say, and the server pings at half of this: whoever hears nothing for the whole of it talks to nobody.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// Longer than [`SILENCE_MAX`], so that the driver's own feedback never suppresses the server's pings.
const WAKEUP: Duration = Duration::from_secs(30);
/// Most often that the server is told how far we are.
const STATUS_EVERY: Duration = Duration::from_millis(250);
/// Most often that idle progress is recorded.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// How often what is published is checked.
const VERIFY_EVERY: Duration = Duration::from_secs(5);
/// A statement on the side connection that takes longer means that the server does not answer.
const STATEMENT_MAX: Duration = Duration::from_secs(15);
/// Longest wait for the slot: it has to be read in, and may still be given up by somebody else.
const START_MAX: Duration = Duration::from_secs(60);
/// Events between the driver and us. A row is one event of whatever size PostgreSQL allows, so this is kept small.
const EVENTS_MAX: usize = 128;
/// Longest wait for the last acknowledgement when stopping.
const LAST_STATUS_MAX: Duration = Duration::from_secs(2);

/// See the module above.
pub struct Session<O> {
    options: Options,
    endpoints: Endpoints,
    outlet: O,
    status: watch::Sender<Status>,
    /// The primary of the present or last session.
    endpoint: watch::Sender<Option<Endpoint>>,
    /// Everything up to this end LSN was handed on by this process; `None` before the first session.
    received: Option<Lsn>,
}

/// Turned to `true` to end it.
pub(super) type Stop = watch::Receiver<bool>;

/// What the checks before the stream found.
struct Prepared {
    sql: Connection,
    client: ReplicationClient,
    intake: Intake,
}

impl<O: Outlet> Session<O> {
    /// A session that reads from `endpoints` and hands on to `outlet`.
    pub fn new(options: Options, endpoints: Endpoints, outlet: O) -> Self {
        Self {
            options,
            endpoints,
            outlet,
            status: watch::Sender::new(Status::Connecting),
            endpoint: watch::Sender::new(None),
            received: None,
        }
    }

    /// Follows what it is doing.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Follows which server the session found to be the primary of its source. Whoever asks it anything asks this one, and
    /// again after every change.
    pub fn endpoint(&self) -> watch::Receiver<Option<Endpoint>> {
        self.endpoint.subscribe()
    }

    /// Looks whether it could stream, before anything is promised. What may pass (a server that is still starting) is no
    /// error: the session will get there.
    ///
    /// # Errors
    /// What somebody has to repair first.
    pub async fn preflight(&self, state: &State) -> Result<(), Error> {
        let look = async {
            let sql = self.endpoints.connect("tuplewatch").await.map_err(connect_error)?;
            own_source(&sql, state).await?;
            self.check(&sql, state).await
        };
        match look.await {
            Err(Error::Transient(what)) => {
                tracing::warn!("PostgreSQL cannot be reached yet: {what}");
                Ok(())
            }
            result => result,
        }
    }

    /// Streams until told to stop; reconnects as often as it takes. When it returns without an error, everything that was
    /// handed on is durable and acknowledged, as far as the server listened.
    ///
    /// # Errors
    /// Where the process must end.
    pub async fn run(mut self, mut stop: Stop) -> Result<(), Fatal> {
        let mut backoff = Backoff::default();
        loop {
            let error = match self.run_once(&mut stop, &mut backoff).await {
                Ok(()) => return Ok(()),
                Err(Error::Fatal(fatal)) => return Err(fatal),
                Err(error) => error,
            };
            let wait = backoff.after(&error);
            self.tell(&error, wait);
            // What the session had staged will come again.
            tokio::select! {
                discarded = self.outlet.deliver(Entry::Discard) => discarded.map_err(Fatal::Log)?,
                () = stopped(&mut stop) => return Ok(()),
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stopped(&mut stop) => return Ok(()),
            }
        }
    }

    /// Logs a failure once, however often it comes again.
    fn tell(&self, error: &Error, wait: Duration) {
        let status = match error {
            Error::Definite(what) => Status::Failed(what.clone()),
            error => Status::Retrying(error.to_string()),
        };
        if self.status.send_replace(status.clone()) != status {
            let retry_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
            match status {
                Status::Failed(what) => {
                    tracing::error!(retry_ms, "nothing is read from PostgreSQL until this is repaired: {what}")
                }
                _ => tracing::warn!(retry_ms, "the replication session ended, reconnecting: {error}"),
            }
        }
    }

    async fn run_once(&mut self, stop: &mut Stop, backoff: &mut Backoff) -> Result<(), Error> {
        let mut room = self.outlet.room();
        tokio::select! {
            has_room = room.wait_for(|room| *room == Room::Enough) => { has_room.map_err(|_| super::Closed)?; }
            () = stopped(stop) => return Ok(()),
        }
        let prepared = tokio::select! {
            prepared = self.prepare() => prepared?,
            () = stopped(stop) => return Ok(()),
        };
        if self.status.send_replace(Status::Streaming) != Status::Streaming {
            tracing::info!(slot = %self.options.slot, position = %prepared.intake.received(), "streaming");
        }
        self.stream(prepared, stop, &mut room, backoff).await
    }

    /// Everything between nothing and a stream that may be acknowledged.
    async fn prepare(&mut self) -> Result<Prepared, Error> {
        let state = self.outlet.checkpoint().await?;
        let name = format!("tuplewatch {}", state.node_id);
        let sql = self.endpoints.connect(&name).await.map_err(connect_error)?;
        let source = own_source(&sql, &state).await?;
        self.check(&sql, &state).await?;
        if state.origin.is_none() {
            // Only while the log is empty: a slot made later would begin with a gap, and say nothing of it.
            self.create_slot(&sql).await?;
        }

        let config = sql.endpoint().replication_config(&self.options.slot, &self.options.publication);
        // Behind those of the URI.
        let given = config.options.clone().unwrap_or_default();
        let config = config
            .with_options(format!("{given} -c wal_sender_timeout={}", SILENCE_MAX.as_millis()).trim_start())
            .with_application_name(name)
            .with_status_interval(STATUS_EVERY)
            .with_wakeup_interval(WAKEUP)
            .with_buffer_size(EVENTS_MAX)
            // Nothing is acknowledged before the checks have passed.
            .with_ack_lsn(pgwire_replication::Lsn::ZERO);

        let (mut client, history, resume) = self.connect_on_history(config, source, state).await?;
        client.start().await.map_err(driver_error)?;
        timeout(START_MAX, client.wait_started())
            .await
            .map_err(|_| Error::transient(format!("replication did not start within {} s", START_MAX.as_secs())))?
            .map_err(driver_error)?;

        // The slot is ours now, so nobody moves it any more.
        let (confirmed, xid) = slot_position(&sql, &self.options.slot).await?;
        let received = match resume {
            None => {
                let origin = Origin { source, history, lsn: confirmed };
                tracing::info!(%confirmed, "the change log begins");
                self.outlet.deliver(Entry::Adopt(origin)).await?;
                confirmed
            }
            Some(resume) if confirmed > resume => {
                tracing::error!(
                    log = %resume, slot = %confirmed,
                    "the slot has moved on without this change log: what was committed in between is lost to it"
                );
                let gap = Break {
                    tenant: None,
                    from: Position::at(resume),
                    to: Position::at(confirmed),
                    reason: BreakReason::SlotMoved,
                };
                self.outlet.deliver(Entry::Break(gap)).await?;
                confirmed
            }
            Some(resume) => resume,
        };
        self.received = Some(received);
        self.endpoint.send_replace(Some(sql.endpoint().clone()));
        let assembler = Assembler::new(self.options.mapping.clone(), self.options.limits, self.options.on_undecodable);
        let mut intake = Intake::new(assembler, received, xid);
        let state = self.outlet.checkpoint().await?;
        self.compare(&sql, &state, &mut intake).await?;
        Ok(Prepared { sql, client, intake })
    }

    /// A replication connection that has not started, on a history that the log follows; and where the log goes on, if it
    /// has begun.
    async fn connect_on_history(
        &mut self,
        config: pgwire_replication::ReplicationConfig,
        source: Source,
        mut state: State,
    ) -> Result<(ReplicationClient, History, Option<Lsn>), Error> {
        loop {
            // A process that goes on, goes on behind what its hub has; a new one behind what the log has.
            let resume = state.origin.as_ref().map(|_| self.received.unwrap_or(state.tail));
            let start = resume.unwrap_or(Lsn::ZERO);
            let config = config.clone().with_start_lsn(driver_lsn(start));
            let mut client = ReplicationClient::connect_gated(config).await.map_err(driver_error)?;
            let identity = bounded(client.identify_system()).await?.map_err(driver_error)?;
            if identity.system_id != source.system_identifier.to_string() {
                return Err(Error::transient("the two connections lead to different servers"));
            }
            let history = history(&mut client, identity.timeline).await?;
            if let Some(origin) = &state.origin
                && origin.history != history
            {
                let at = history.divergence_from(&origin.history).unwrap_or(state.tail);
                tracing::warn!(
                    timeline = history.current().id, switch_lsn = %at, "the server goes on along another timeline"
                );
                self.outlet.deliver(Entry::Diverge { at, history }).await?;
                self.received = self.received.map(|received| received.min(at));
                state = self.outlet.checkpoint().await?;
                // The start is part of the connection: connect again.
                continue;
            }
            let wal_end = Lsn(identity.xlogpos.as_u64());
            if wal_end < start {
                // START_REPLICATION past the end is accepted silently, and then skips what is written next.
                return Err(Error::definite(format!(
                    "the server's WAL ends at {wal_end}, before what the change log has ({start}), on the same timeline: its \
                     storage was rolled back, and the log holds changes that never happened there. Start the log anew with \
                     --reset-log"
                )));
            }
            return Ok((client, history, resume));
        }
    }

    /// What PostgreSQL must be like.
    async fn check(&self, sql: &Connection, state: &State) -> Result<(), Error> {
        let expectation = requirements::Expectation {
            mapping: &self.options.mapping,
            slot: &self.options.slot,
            publication: &self.options.publication,
            slot_expected: state.origin.is_some(),
        };
        let findings = bounded(requirements::check(&sql.client, &expectation)).await?.map_err(sql_error)?;
        let errors: Vec<String> =
            findings.iter().filter(|finding| finding.severity == Severity::Error).map(ToString::to_string).collect();
        if !errors.is_empty() {
            return Err(Error::definite(errors.join("\n")));
        }
        Ok(())
    }

    /// Makes the slot, if there is none.
    async fn create_slot(&self, sql: &Connection) -> Result<(), Error> {
        if Slot::read(&sql.client, &self.options.slot).await.map_err(sql_error)?.is_some() {
            return Ok(());
        }
        let mut waiting = |waiting: &Waiting| tracing::info!("{waiting}");
        let created = slot::create_slot(sql, &self.options.slot, &mut waiting).await.map_err(sql_error)?;
        tracing::info!(slot = %self.options.slot, position = %created, "created the replication slot");
        Ok(())
    }

    /// Compares mapping and publication with what the log was written under.
    async fn compare(&self, sql: &Connection, state: &State, intake: &mut Intake) -> Result<(), Error> {
        let mapping = self.options.mapping.fingerprint();
        let published = self.published(sql).await?;
        let fingerprint = published.fingerprint.clone().ok_or_else(|| self.no_publication())?;
        let mapping_changed = state.mapping.is_some_and(|recorded| recorded != mapping);
        let schema_changed = state.verified.as_ref().filter(|verified| verified.fingerprint != fingerprint);
        if !mapping_changed && schema_changed.is_none() {
            if state.mapping.is_none() {
                intake.record(Entry::Mapping(mapping));
            }
            if state.verified.is_none() {
                intake.record(Entry::Verified(Verified { fingerprint, at: intake.received() }));
            }
            return Ok(());
        }
        let to = mark(sql).await?;
        let reason = match schema_changed {
            Some(verified) => BreakReason::SchemaChanged {
                detail: publication::difference(Some(&verified.fingerprint), Some(&fingerprint)),
            },
            None => BreakReason::MappingChanged,
        };
        tracing::error!("{reason}: subscribers have to read their state anew");
        let from = schema_changed.map_or(intake.received(), |verified| verified.at);
        let then = vec![Entry::Mapping(mapping), Entry::Verified(Verified { fingerprint, at: to })];
        intake.interrupt(from, to, reason, then);
        Ok(())
    }

    async fn published(&self, sql: &Connection) -> Result<Published, Error> {
        bounded(publication::fingerprint(&sql.client, &self.options.publication, &self.options.mapping))
            .await?
            .map_err(sql_error)
    }

    fn no_publication(&self) -> Error {
        Error::definite(format!(
            "publication {} does not exist: run tuplewatch setup, or CREATE PUBLICATION",
            self.options.publication
        ))
    }

    async fn stream(
        &mut self,
        prepared: Prepared,
        stop: &mut Stop,
        room: &mut watch::Receiver<Room>,
        backoff: &mut Backoff,
    ) -> Result<(), Error> {
        let Prepared { sql, mut client, mut intake } = prepared;
        let mut durable = self.outlet.durable();
        let mut progress = every(PROGRESS_EVERY);
        let mut verify = every(VERIFY_EVERY);
        let mut last_check: Option<Published> = None;
        let mut last_heard = Instant::now();
        loop {
            while let Some(entry) = intake.pop() {
                let reached = reached(&entry);
                tokio::select! {
                    biased;
                    delivered = self.outlet.deliver(entry) => delivered?,
                    error = no_room(room) => return Err(error),
                    () = stopped(stop) => return self.finish(&sql, client, durable).await,
                }
                if reached.is_some() {
                    self.received = reached;
                    // Only now: a session that connects and then fails has not got anywhere.
                    backoff.reset();
                }
            }
            self.acknowledge(&client, &durable);
            tokio::select! {
                biased;
                () = stopped(stop) => return self.finish(&sql, client, durable).await,
                error = no_room(room) => return Err(error),
                changed = durable.changed() => changed.map_err(|_| super::Closed)?,
                _ = progress.tick(), if intake.is_idle_ahead() => intake.advance(),
                _ = verify.tick() => {
                    tokio::select! {
                        verified = self.verify(&sql, &mut intake, &mut last_check) => verified?,
                        error = no_room(room) => return Err(error),
                        () = stopped(stop) => return self.finish(&sql, client, durable).await,
                    }
                }
                event = timeout_at(last_heard + SILENCE_MAX, client.recv()) => {
                    let event = event.map_err(|_| Error::transient(format!(
                        "nothing was heard from the server for {} s: the connection is dead", SILENCE_MAX.as_secs()
                    )))?;
                    last_heard = Instant::now();
                    let event = event.map_err(driver_error)?;
                    let event = event.ok_or_else(|| Error::transient("the server ended the stream"))?;
                    if let Some(event) = convert(event) {
                        intake.take(event).map_err(Error::definite)?;
                    }
                }
            }
        }
    }

    /// Tells the slot what is durable, but never what was not handed on: after a reconnect it would not come again.
    fn acknowledge(&self, client: &ReplicationClient, durable: &watch::Receiver<Lsn>) {
        let durable = *durable.borrow();
        if let Some(received) = self.received {
            client.update_applied_lsn(driver_lsn(durable.min(received)));
        }
    }

    /// Checks what is published, and records how far it was as it is.
    async fn verify(
        &self,
        sql: &Connection,
        intake: &mut Intake,
        last_check: &mut Option<Published>,
    ) -> Result<(), Error> {
        if intake.has_pending_break() {
            return Ok(());
        }
        let published = self.published(sql).await?;
        let fingerprint = published.fingerprint.clone().ok_or_else(|| self.no_publication())?;
        match last_check.as_ref().filter(|last| last.fingerprint == published.fingerprint) {
            // Equal twice: whatever was written before the first look was written under it.
            Some(last) if last.lsn <= intake.received() => {
                intake.record(Entry::Verified(Verified { fingerprint, at: last.lsn }));
            }
            Some(_) => {}
            None => {
                let state = self.outlet.checkpoint().await?;
                self.compare(sql, &state, intake).await?;
            }
        }
        *last_check = Some(published);
        Ok(())
    }

    /// Stops in order: what was handed on becomes durable and is acknowledged.
    async fn finish(
        &self,
        sql: &Connection,
        mut client: ReplicationClient,
        durable: watch::Receiver<Lsn>,
    ) -> Result<(), Error> {
        self.outlet.checkpoint().await?;
        self.acknowledge(&client, &durable);
        let target = self.received.unwrap_or_default().min(*durable.borrow());
        let taken = async {
            // The driver tells the server within its status interval. That the server took note has to be seen: a connection
            // that is closed with unread data on its way takes what it said last with it.
            while slot_position(sql, &self.options.slot).await?.0 < target {
                tokio::time::sleep(STATUS_EVERY / 5).await;
            }
            Ok::<(), Error>(())
        };
        if !matches!(timeout(LAST_STATUS_MAX, taken).await, Ok(Ok(()))) {
            tracing::warn!("PostgreSQL did not take the last acknowledgement in time: some changes will be sent again");
        }
        let _ = timeout(LAST_STATUS_MAX, client.shutdown()).await;
        Ok(())
    }
}

fn every(period: Duration) -> tokio::time::Interval {
    let mut interval = interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

async fn stopped(stop: &mut Stop) {
    // Whoever could stop us is gone: that is a stop too.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// A walsender that waits for somebody who cannot acknowledge holds up the shutdown of PostgreSQL: rather none.
async fn no_room(room: &mut watch::Receiver<Room>) -> Error {
    match room.wait_for(|room| *room != Room::Enough).await {
        Ok(_) => Error::transient("the disk of the change log is full: the session is closed until it has room"),
        Err(_) => super::Closed.into(),
    }
}

/// How far a subscriber can be after this entry.
fn reached(entry: &Entry) -> Option<Lsn> {
    match entry {
        Entry::Transaction(transaction) => Some(transaction.end),
        Entry::Progress(lsn) => Some(*lsn),
        Entry::Break(gap) => Some(gap.to.lsn),
        _ => None,
    }
}

fn convert(event: ReplicationEvent) -> Option<Event> {
    let lsn = |lsn: pgwire_replication::Lsn| Lsn(lsn.as_u64());
    Some(match event {
        ReplicationEvent::Begin { final_lsn, xid, commit_time_micros } => {
            Event::Begin { commit: lsn(final_lsn), xid, commit_time: CommitTime(commit_time_micros) }
        }
        ReplicationEvent::XLogData { data, .. } => Event::Change(data),
        ReplicationEvent::Commit { lsn: commit, end_lsn, .. } => {
            Event::Commit { commit: lsn(commit), end: lsn(end_lsn) }
        }
        ReplicationEvent::Message { transactional: true, prefix, content, .. } => Event::Message { prefix, content },
        ReplicationEvent::KeepAlive { wal_end, .. } => Event::KeepAlive { wal_end: lsn(wal_end) },
        ReplicationEvent::Message { .. } | ReplicationEvent::StoppedAt { .. } => return None,
    })
}

fn driver_lsn(lsn: Lsn) -> pgwire_replication::Lsn {
    pgwire_replication::Lsn::from_u64(lsn.0)
}

fn driver_error(error: pgwire_replication::PgWireError) -> Error {
    if connection::sqlstate(&error) == Some("42704") && error.to_string().contains("publication") {
        return Error::definite(format!(
            "{error}. The slot reads from before the publication was created: run tuplewatch setup --recreate-slot; what has \
             changed in between is lost, and subscribers are told"
        ));
    }
    if connection::is_definite(&error) { Error::definite(error) } else { Error::transient(error) }
}

fn connect_error(error: connection::ConnectError) -> Error {
    if error.is_definite() { Error::definite(error) } else { Error::transient(error) }
}

fn sql_error(error: tokio_postgres::Error) -> Error {
    match error.as_db_error() {
        Some(db) => Error::transient(format!("{} ({})", db.message(), db.code().code())),
        None => Error::transient(error),
    }
}

async fn bounded<T>(work: impl Future<Output = T>) -> Result<T, Error> {
    let late = |_| Error::transient(format!("the server did not answer within {} s", STATEMENT_MAX.as_secs()));
    timeout(STATEMENT_MAX, work).await.map_err(late)
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

/// The timelines that lead to this one.
async fn history(client: &mut ReplicationClient, timeline: u32) -> Result<History, Error> {
    if timeline == 1 {
        return Ok(History::first());
    }
    let file = bounded(client.timeline_history(timeline)).await?.map_err(driver_error)?;
    History::parse(timeline, &String::from_utf8_lossy(&file.content)).map_err(Error::definite)
}

/// The slot's confirmed flush, and the next transaction id.
async fn slot_position(sql: &Connection, slot: &str) -> Result<(Lsn, Xid8), Error> {
    let statement = "SELECT confirmed_flush_lsn::text, pg_current_snapshot()::text FROM pg_replication_slots \
                     WHERE slot_name = $1";
    let row = bounded(sql.client.query_opt(statement, &[&slot])).await?.map_err(sql_error)?;
    let row = row.ok_or_else(|| Error::transient(format!("slot {slot} has just disappeared")))?;
    let confirmed: Option<String> = row.get(0);
    let confirmed = confirmed.ok_or_else(|| Error::definite(format!("slot {slot} has no confirmed position")))?;
    let snapshot: String = row.get(1);
    let snapshot: Snapshot = snapshot.parse().map_err(Error::definite)?;
    Ok((confirmed.parse().map_err(Error::definite)?, snapshot.xmax()))
}

/// Writes a transaction, so that the stream comes to the position that this returns, which is past everything so far.
async fn mark(sql: &Connection) -> Result<Lsn, Error> {
    let statement = "SELECT pg_logical_emit_message(true, 'tuplewatch', 'mark')";
    bounded(sql.client.batch_execute("SET synchronous_commit = local")).await?.map_err(sql_error)?;
    bounded(sql.client.query_one(statement, &[])).await?.map_err(sql_error)?;
    let row =
        bounded(sql.client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[])).await?.map_err(sql_error)?;
    let lsn: String = row.get(0);
    lsn.parse().map_err(Error::definite)
}
