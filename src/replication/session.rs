//! The session on the slot: it connects, checks and streams, and starts again after an error.
//!
//! [`Session::run`] is a loop over sessions. Each session opens a link to the server, compares the server's history,
//! the publication and the mapping with those of the log, and only then acknowledges anything. While it streams, one
//! task does everything in turn: it passes events to the receiver, delivers entries to the sink, acknowledges durable
//! WAL, checks the publication, and asks which writers of a gap are still running.
//!
//! The state in [`Session`] outlives a link. So after a reconnect the stream continues behind the last delivered
//! transaction. Everything about one link ends with [`Opened`].

use super::{Backoff, Closed, Definite, Error, Fatal, Options, Sink, Status, Transient};
use crate::changelog::{DiskSpace, Entry, Origin, State, Verified};
use crate::decode::assembler::Assembler;
use crate::decode::pgoutput::RelationId;
use crate::metrics::metrics;
use crate::model::lsn::{Lsn, Position};
use crate::model::transaction::{Gap, GapReason};
use crate::postgres::publication::{self, Published};
use crate::replication::ack_delay::AckTracker;
use crate::replication::counting::Counting;
use crate::replication::gap::{UnsettledGap, WRITERS_EVERY};
use crate::replication::gap_log::GapLog;
use crate::replication::receiver::Receiver;
use crate::replication::upstream::{Link, Upstream};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

/// The shortest time between two records of idle progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// The interval of checks of the publication.
const VERIFY_EVERY: Duration = Duration::from_secs(5);
/// The longest wait for the last acknowledgement at shutdown.
const LAST_STATUS_MAX: Duration = Duration::from_secs(2);
/// The interval at which the slot is read during that wait.
const LAST_STATUS_POLL: Duration = Duration::from_millis(50);

/// The session, see the module [`replication`](super).
pub(crate) struct Session<U, O> {
    options: Options,
    upstream: U,
    sink: O,
    status: watch::Sender<Status>,
    /// The failure that was logged last, until the slot streams again.
    logged: Option<String>,
    /// The end LSN up to which this process has delivered everything. `None` before the first session.
    received: Option<Lsn>,
    ack_tracker: AckTracker,
    /// Publishes `received`, once for each batch.
    delivered: watch::Sender<Option<Lsn>>,
    counting: Counting,
    gap_log: GapLog,
    /// Makes the session check the publication, or reconnect, at once.
    check_request: Arc<Notify>,
    /// Whether the slot has streamed in this process.
    has_streamed: bool,
}

/// Turns `true` to end the session.
pub(super) type Stop = watch::Receiver<bool>;

/// A stream whose checks have passed, so that it may be acknowledged.
struct Opened<L> {
    link: L,
    receiver: Receiver,
    /// The gap that a check found, or that an earlier session left open.
    gap: Option<UnsettledGap>,
}

impl<U: Upstream, O: Sink> Session<U, O> {
    /// Creates a session that reads from `upstream` and delivers to `sink`.
    pub(crate) fn new(options: Options, upstream: U, sink: O) -> Self {
        Self {
            ack_tracker: AckTracker::new(options.ack_delay),
            counting: Counting::new(options.mapping.tables().iter().map(|spec| spec.table.to_string())),
            options,
            upstream,
            sink,
            status: watch::Sender::new(Status::Connecting),
            logged: None,
            received: None,
            delivered: watch::Sender::new(None),
            gap_log: GapLog::default(),
            check_request: Arc::new(Notify::new()),
            has_streamed: false,
        }
    }

    /// Follows the status of the session.
    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Follows the end LSN up to which everything was delivered. `None` before the first session.
    pub(crate) fn received(&self) -> watch::Receiver<Option<Lsn>> {
        self.delivered.subscribe()
    }

    /// A notification makes the session check the publication at once, and skip the wait before the next attempt.
    pub(crate) fn check_request(&self) -> Arc<Notify> {
        self.check_request.clone()
    }

    /// Streams until `stop` turns true, and reconnects as often as necessary. When it returns without an error,
    /// everything that was delivered is durable, and is acknowledged if the server still answered.
    ///
    /// # Errors
    /// If the process must end.
    pub(crate) async fn run(mut self, mut stop: Stop) -> Result<(), Fatal> {
        let mut backoff = Backoff::default();
        loop {
            let error = match self.run_once(&mut stop, &mut backoff).await {
                Ok(()) => return Ok(()),
                Err(Error::Fatal(fatal)) => return Err(fatal),
                Err(error) => error,
            };
            match error {
                Error::Definite(_) => metrics().definite_failures.inc(),
                _ => metrics().transient_failures.inc(),
            }
            let wait = backoff.after(&error);
            self.fail(&error, wait);
            // The server sends the open transaction again.
            tokio::select! {
                biased;
                discarded = self.sink.deliver(Entry::Discard) => discarded.map_err(Fatal::Log)?,
                () = stopped(&mut stop) => return Ok(()),
            }
            tokio::select! {
                biased;
                () = tokio::time::sleep(wait) => {}
                () = self.check_request.notified() => {}
                () = stopped(&mut stop) => return Ok(()),
            }
        }
    }

    /// Publishes a failure, and logs it once while it repeats.
    fn fail(&mut self, error: &Error, wait: Duration) {
        let is_definite = matches!(error, Error::Definite(_));
        self.status.send_replace(if is_definite { Status::Failed } else { Status::Retrying });
        let text = error.to_string();
        if self.logged.as_ref() == Some(&text) {
            return;
        }
        let retry_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        if is_definite {
            tracing::error!(retry_ms, "nothing is read from PostgreSQL until this is repaired: {text}");
        } else {
            tracing::warn!(retry_ms, "the replication session ended, reconnecting: {text}");
        }
        self.logged = Some(text);
    }

    async fn run_once(&mut self, stop: &mut Stop, backoff: &mut Backoff) -> Result<(), Error> {
        let mut room = self.sink.room();
        tokio::select! {
            biased;
            has_room = room.wait_for(|room| *room == DiskSpace::Enough) => { has_room.map_err(|_| Closed)?; }
            () = stopped(stop) => return Ok(()),
        }
        let opened = tokio::select! {
            biased;
            opened = self.open() => opened?,
            () = stopped(stop) => return Ok(()),
        };
        self.logged = None;
        if self.status.send_replace(Status::Streaming) != Status::Streaming {
            tracing::info!(slot = %self.options.slot, position = %opened.receiver.received(), "streaming");
        }
        if std::mem::replace(&mut self.has_streamed, true) {
            metrics().reconnects.inc();
        }
        self.stream(opened, stop, &mut room, backoff).await
    }

    /// Connects, checks and starts, until the stream may be acknowledged.
    async fn open(&mut self) -> Result<Opened<U::Link>, Error> {
        let (mut link, resume) = self.connect_on_history().await?;
        let started = link.start().await?;
        let server = link.server().clone();
        let received = match resume {
            None => {
                let origin =
                    Origin { source: server.source, history: server.history, lsn: started.confirmed, xid: started.xid };
                tracing::info!(
                    position = %started.confirmed,
                    "the change log begins where the slot is: earlier tokens are refused (OUT_OF_RANGE)"
                );
                self.sink.deliver(Entry::Adopt(origin)).await?;
                started.confirmed
            }
            Some(resume) if started.confirmed > resume => {
                let gap = Gap {
                    tenant: None,
                    from: Position::at(resume),
                    to: Position::at(started.confirmed),
                    reason: GapReason::SlotMoved,
                    writers: Vec::new(),
                };
                self.deliver(Entry::Gap(gap)).await?;
                started.confirmed
            }
            Some(resume) => resume,
        };
        self.received = Some(received);
        self.publish_received();
        link.announce();
        let assembler = Assembler::new(self.options.mapping.clone(), self.options.limits, self.options.on_undecodable);
        let mut receiver = Receiver::new(assembler, received, started.xid);
        let state = self.sink.checkpoint().await?;
        let published = link.published().await?;
        let gap = state.open_gap.as_ref().map(UnsettledGap::recorded);
        let gap = self.compare(&link, &published, &state, &mut receiver, gap).await?;
        let recorded = self.sink.recorded_since(started.confirmed).await?;
        self.ack_tracker.resume(started.confirmed, recorded.iter().map(|(end, _)| end.0), Instant::now());
        if !receiver.has_pending_gap() && !gap.as_ref().is_some_and(UnsettledGap::is_unrecorded) {
            // With another mapping or publication, the repeated transactions could differ from those in the log.
            receiver.expect(recorded);
            receiver.await_tables(published.tables);
        }
        Ok(Opened { link, receiver, gap })
    }

    /// Returns a link that has not started, to a server whose history the log follows, and the position after which the
    /// log continues, if it has begun.
    async fn connect_on_history(&mut self) -> Result<(U::Link, Option<Lsn>), Error> {
        loop {
            let state = self.sink.checkpoint().await?;
            // A running process continues after the position of its hub, and a new process after that of the log.
            let resume = state.origin.as_ref().map(|_| self.received.unwrap_or(state.tail));
            let link = self.upstream.connect(&state).await?;
            let server = link.server();
            if let Some(origin) = &state.origin
                && origin.history != server.history
            {
                let history = server.history.clone();
                if history.was_left_behind_by(&origin.history) {
                    let (server, log) = (history.current().number, origin.history.current().number);
                    return Err(Definite::LeftBehind { server, log }.into());
                }
                let at = history.divergence_from(&origin.history).unwrap_or(state.tail);
                tracing::warn!(
                    timeline = history.current().number, switch_lsn = %at, "the server continues on another timeline"
                );
                self.deliver(Entry::Diverge { at, history }).await?;
                if resume.is_some_and(|resume| at < resume) {
                    metrics().gaps(GapReason::TimelineDiverged.code()).inc();
                }
                self.received = self.received.map(|received| received.min(at));
                self.ack_tracker.forget();
                // The abandoned transactions will not arrive again, so read the state of the log again.
                continue;
            }
            if let Some(log_end) = resume.filter(|resume| server.wal_end < *resume) {
                // Otherwise new WAL of the server would count as WAL that is already in the log.
                return Err(Definite::RolledBack { server_end: server.wal_end, log_end }.into());
            }
            return Ok((link, resume));
        }
    }

    /// Compares mapping and publication with those under which the log was written. A difference is a gap, which is
    /// merged with an earlier one that has not ended. The gap ends at once if no transaction is writing.
    async fn compare(
        &self,
        link: &U::Link,
        published: &Published,
        state: &State,
        receiver: &mut Receiver,
        gap: Option<UnsettledGap>,
    ) -> Result<Option<UnsettledGap>, Error> {
        let mapping = self.options.mapping.fingerprint();
        let fingerprint = published.fingerprint.clone().ok_or_else(|| self.no_publication())?;
        if gap.as_ref().is_some_and(|gap| gap.has_found(&fingerprint)) {
            return Ok(gap);
        }
        let mapping_changed = state.mapping.is_some_and(|recorded| recorded != mapping);
        let recorded = state.verified.as_ref();
        let schema_changed =
            recorded.filter(|verified| !publication::is_equivalent(&verified.fingerprint, &fingerprint));
        if !mapping_changed && schema_changed.is_none() {
            if state.mapping.is_none() {
                receiver.record(Entry::Mapping(mapping));
            }
            // The next check compares with this publication, and determines up to where this one was verified.
            if recorded.is_none_or(|verified| verified.fingerprint != fingerprint) {
                let at = recorded.map_or(receiver.received(), |verified| verified.at);
                receiver.record(Entry::Verified(Verified { fingerprint, at }));
            }
            return Ok(gap);
        }
        let reason = match schema_changed {
            // Another mapping has other tables and columns, so the difference says nothing about the schema.
            Some(verified) if !mapping_changed => GapReason::SchemaChanged {
                detail: publication::difference(Some(&verified.fingerprint), Some(&fingerprint)),
            },
            _ => GapReason::MappingChanged,
        };
        let from = schema_changed.map_or(receiver.received(), |verified| verified.at);
        // Ask only after the check: a transaction that begins to write later writes under the publication that the
        // check has seen.
        let tables: Vec<RelationId> = published.tables.keys().copied().collect();
        let writers = link.writers(&tables).await?;
        UnsettledGap::noticed(from, reason, mapping, fingerprint, writers).with(gap).await_outcome(link, receiver).await
    }

    fn no_publication(&self) -> Error {
        let recreate_slot = self.options.commands.recreate_slot().to_string();
        Definite::NoPublication { publication: self.options.publication.clone(), recreate_slot }.into()
    }

    async fn stream(
        &mut self,
        opened: Opened<U::Link>,
        stop: &mut Stop,
        room: &mut watch::Receiver<DiskSpace>,
        backoff: &mut Backoff,
    ) -> Result<(), Error> {
        let Opened { mut link, mut receiver, mut gap } = opened;
        let check_request = self.check_request.clone();
        let mut durable = self.sink.durable();
        let mut progress = every(PROGRESS_EVERY);
        let mut verify = every(VERIFY_EVERY);
        let mut ask_writers = every(WRITERS_EVERY);
        let mut last_check: Option<Published> = None;
        let mut events = Vec::new();
        let mut unreadable = None;
        let mut lost = std::pin::pin!(link.lost());
        loop {
            while let Some(entry) = receiver.pop() {
                let reached = reached(&entry);
                tokio::select! {
                    biased;
                    delivered = self.deliver(entry) => delivered?,
                    error = no_room(room) => return Err(error),
                    () = stopped(stop) => return self.finish(link, durable).await,
                }
                if reached.is_some() {
                    self.received = reached;
                    // Reset only now, because a session that connects and then fails has made no progress.
                    backoff.reset();
                }
            }
            self.publish_received();
            // The entries before the error have been delivered.
            if let Some(error) = unreadable {
                return Err(Definite::Stream(error).into());
            }
            self.acknowledge(&link, &durable);
            tokio::select! {
                biased;
                () = stopped(stop) => return self.finish(link, durable).await,
                error = no_room(room) => return Err(error),
                changed = durable.changed() => changed.map_err(|_| Closed)?,
                _ = progress.tick(), if receiver.is_idle_ahead() => receiver.advance(),
                _ = verify.tick() => {
                    gap = tokio::select! {
                        biased;
                        verified = self.verify(&link, &mut receiver, &mut last_check, gap) => verified?,
                        error = no_room(room) => return Err(error),
                        () = stopped(stop) => return self.finish(link, durable).await,
                    };
                }
                _ = ask_writers.tick(), if gap.is_some() && !receiver.has_pending_gap() => {
                    if let Some(unsettled) = gap.take() {
                        gap = tokio::select! {
                            biased;
                            settled = unsettled.await_outcome(&link, &mut receiver) => settled?,
                            error = no_room(room) => return Err(error),
                            () = stopped(stop) => return self.finish(link, durable).await,
                        };
                    }
                }
                () = check_request.notified() => verify.reset_immediately(),
                received = link.next(&mut events) => {
                    received?;
                    unreadable = events.drain(..).try_for_each(|event| receiver.take(event)).err();
                    if receiver.take_check_request() {
                        verify.reset_immediately();
                    }
                }
                // Poll the stream first, because its error is more precise.
                error = &mut lost => return Err(error),
            }
        }
    }

    /// Delivers one entry, and counts it afterwards. As cancel safe as [`Sink::deliver`].
    async fn deliver(&mut self, entry: Entry) -> Result<(), Closed> {
        self.sink.deliver(entry.clone()).await?;
        self.counting.count(&entry);
        self.gap_log.log(&entry);
        Ok(())
    }

    fn publish_received(&self) {
        self.delivered.send_if_modified(|known| std::mem::replace(known, self.received) != self.received);
    }

    /// Acknowledges the durable WAL, less the delay, but never more than was delivered, because the server does not
    /// send acknowledged WAL again after a reconnect. Returns the acknowledged end LSN.
    fn acknowledge(&mut self, link: &U::Link, durable: &watch::Receiver<Lsn>) -> Lsn {
        let durable = *durable.borrow();
        let released = self.ack_tracker.release(durable.min(self.received.unwrap_or_default()), Instant::now());
        link.acknowledge(released);
        released
    }

    /// Checks the publication, and records up to which position it was unchanged. Returns the rest of the gap, if there
    /// is one.
    async fn verify(
        &self,
        link: &U::Link,
        receiver: &mut Receiver,
        last_check: &mut Option<Published>,
        mut gap: Option<UnsettledGap>,
    ) -> Result<Option<UnsettledGap>, Error> {
        link.check_alive().await?;
        if receiver.has_pending_gap() {
            return Ok(gap);
        }
        let published = link.published().await?;
        let fingerprint = published.fingerprint.clone().ok_or_else(|| self.no_publication())?;
        match last_check.as_ref().filter(|last| last.fingerprint == published.fingerprint) {
            // The new publication must not count as verified before the gap is recorded.
            Some(_) if gap.as_ref().is_some_and(UnsettledGap::is_unrecorded) => {}
            // The fingerprints of two checks agree, so everything before the first check was written under this
            // publication.
            Some(last) if last.lsn <= receiver.received() => {
                receiver.record(Entry::Verified(Verified { fingerprint, at: last.lsn }));
            }
            Some(_) => {}
            None => {
                let state = self.sink.checkpoint().await?;
                // If the publication lacks something that the mapping needs, the stream must stop: a definite error
                // now, and a gap after the repair.
                link.check_fit().await?;
                gap = self.compare(link, &published, &state, receiver, gap).await?;
            }
        }
        *last_check = Some(published);
        Ok(gap)
    }

    /// Shuts down in order: everything that was delivered becomes durable, and is acknowledged.
    async fn finish(&mut self, link: U::Link, durable: watch::Receiver<Lsn>) -> Result<(), Error> {
        self.sink.checkpoint().await?;
        let target = self.acknowledge(&link, &durable);
        let taken = async {
            // Wait until the server shows the acknowledgement: closing a connection with unread data can lose its last
            // message.
            while link.confirmed().await? < target {
                tokio::time::sleep(LAST_STATUS_POLL).await;
            }
            Ok::<(), Error>(())
        };
        if !matches!(timeout(LAST_STATUS_MAX, taken).await, Ok(Ok(()))) {
            tracing::warn!(
                "PostgreSQL did not confirm the last acknowledgement in time: it will send some changes again"
            );
        }
        link.close().await;
        Ok(())
    }
}

fn every(period: Duration) -> tokio::time::Interval {
    let mut interval = interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

async fn stopped(stop: &mut Stop) {
    // A dropped sender also stops the session.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Completes when the log may not append. The session then ends, because a walsender whose client cannot acknowledge
/// delays the shutdown of PostgreSQL.
async fn no_room(room: &mut watch::Receiver<DiskSpace>) -> Error {
    match room.wait_for(|room| *room != DiskSpace::Enough).await {
        Ok(room) if *room == DiskSpace::Elsewhere => Transient::LogGone.into(),
        Ok(_) => Transient::DiskFull.into(),
        Err(_) => Closed.into(),
    }
}

/// The end LSN that a subscriber can have reached after this entry.
fn reached(entry: &Entry) -> Option<Lsn> {
    match entry {
        Entry::Transaction(transaction) => Some(transaction.end.0),
        Entry::Progress(lsn) => Some(*lsn),
        Entry::Gap(gap) => Some(gap.to.lsn),
        _ => None,
    }
}
