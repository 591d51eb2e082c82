//! One session after the other: connect, check, stream, and again.

use super::{Backoff, Closed, Error, Fatal, Options, Sink, Status};
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

/// Most often that idle progress is recorded.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// How often what is published is checked.
const VERIFY_EVERY: Duration = Duration::from_secs(5);
/// Longest wait for the last acknowledgement when stopping.
const LAST_STATUS_MAX: Duration = Duration::from_secs(2);
/// How often the slot is looked at meanwhile.
const LAST_STATUS_POLL: Duration = Duration::from_millis(50);

/// See the module above.
pub struct Session<U, O> {
    options: Options,
    upstream: U,
    sink: O,
    status: watch::Sender<Status>,
    /// Everything up to this end LSN was handed on by this process; `None` before the first session.
    received: Option<Lsn>,
    held: AckTracker,
    /// Tells of it, a batch at a time.
    handed_on: watch::Sender<Option<Lsn>>,
    counting: Counting,
    gap_log: GapLog,
    /// Wakes it to check what is published, or to try again, at once.
    check_request: Arc<Notify>,
    /// Whether any session has got as far as streaming.
    has_streamed: bool,
}

/// Turned to `true` to end it.
pub(super) type Stop = watch::Receiver<bool>;

/// A stream that may be acknowledged.
struct Opened<L> {
    link: L,
    receiver: Receiver,
    /// What a check found, or an earlier session left open.
    gap: Option<UnsettledGap>,
}

impl<U: Upstream, O: Sink> Session<U, O> {
    /// A session that reads from `upstream` and hands on to `sink`.
    pub fn new(options: Options, upstream: U, sink: O) -> Self {
        Self {
            held: AckTracker::new(options.ack_delay),
            counting: Counting::new(options.mapping.tables().iter().map(|spec| spec.table.to_string())),
            options,
            upstream,
            sink,
            status: watch::Sender::new(Status::Connecting),
            received: None,
            handed_on: watch::Sender::new(None),
            gap_log: GapLog::default(),
            check_request: Arc::new(Notify::new()),
            has_streamed: false,
        }
    }

    /// Follows what it is doing.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Follows up to which end LSN it has handed on everything; `None` before its first session.
    pub fn received(&self) -> watch::Receiver<Option<Lsn>> {
        self.handed_on.subscribe()
    }

    /// Notified, it checks at once what is published, and does not wait to try again.
    pub fn check_request(&self) -> Arc<Notify> {
        self.check_request.clone()
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
            match error {
                Error::Definite(_) => metrics().definite_failures.inc(),
                _ => metrics().transient_failures.inc(),
            }
            let wait = backoff.after(&error);
            self.tell(&error, wait);
            // What the session had staged will come again.
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
        if self.status.send_replace(Status::Streaming) != Status::Streaming {
            tracing::info!(slot = %self.options.slot, position = %opened.receiver.received(), "streaming");
        }
        if std::mem::replace(&mut self.has_streamed, true) {
            metrics().reconnects.inc();
        }
        self.stream(opened, stop, &mut room, backoff).await
    }

    /// Everything between nothing and a stream that may be acknowledged.
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
                    "the change log begins where the slot is: tokens from before are refused (OUT_OF_RANGE)"
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
        self.tell_received();
        link.announce();
        let assembler = Assembler::new(self.options.mapping.clone(), self.options.limits, self.options.on_undecodable);
        let mut receiver = Receiver::new(assembler, received, started.xid);
        let state = self.sink.checkpoint().await?;
        let published = link.published().await?;
        let gap = state.open_gap.as_ref().map(UnsettledGap::recorded);
        let gap = self.compare(&link, &published, &state, &mut receiver, gap).await?;
        let recorded = self.sink.recorded_since(started.confirmed).await?;
        self.held.resume(started.confirmed, recorded.iter().map(|(end, _)| end.0), Instant::now());
        if !receiver.has_pending_gap() && !gap.as_ref().is_some_and(UnsettledGap::is_unrecorded) {
            // Under another mapping or publication other transactions would have changes.
            receiver.expect(recorded);
            receiver.await_tables(published.tables);
        }
        Ok(Opened { link, receiver, gap })
    }

    /// A link that has not started, to a server whose history the log follows; and where the log goes on, if it has begun.
    async fn connect_on_history(&mut self) -> Result<(U::Link, Option<Lsn>), Error> {
        loop {
            let state = self.sink.checkpoint().await?;
            // A process that goes on, goes on behind what its hub has; a new one behind what the log has.
            let resume = state.origin.as_ref().map(|_| self.received.unwrap_or(state.tail));
            let link = self.upstream.connect(&state).await?;
            let server = link.server();
            if let Some(origin) = &state.origin
                && origin.history != server.history
            {
                let history = server.history.clone();
                if history.was_left_behind_by(&origin.history) {
                    return Err(Error::definite(format!(
                        "the server is on timeline {}, and was left behind when the change log followed a promotion to timeline \
                         {}: it is an old primary, or its storage was rolled back. Point database.uri at the present primary, or \
                         start the log anew with --reset-log",
                        history.current().number,
                        origin.history.current().number
                    )));
                }
                let at = history.divergence_from(&origin.history).unwrap_or(state.tail);
                tracing::warn!(
                    timeline = history.current().number, switch_lsn = %at, "the server goes on along another timeline"
                );
                self.deliver(Entry::Diverge { at, history }).await?;
                if resume.is_some_and(|resume| at < resume) {
                    metrics().gaps(GapReason::TimelineDiverged.code()).inc();
                }
                self.received = self.received.map(|received| received.min(at));
                self.held.forget();
                // What is abandoned is not expected to come again: look at the log once more.
                continue;
            }
            if let Some(start) = resume.filter(|resume| server.wal_end < *resume) {
                // What is written there next would be taken for what we have.
                return Err(Error::definite(format!(
                    "the server's WAL ends at {}, before what the change log has ({start}), on the same timeline: its \
                     storage was rolled back, and the log holds changes that never happened there. Before anybody writes to it, \
                     have it begin a new timeline (recovery.signal, restore_command = 'false', and a restart). Or start the log \
                     anew with --reset-log, and have every subscriber drop its token",
                    server.wal_end
                )));
            }
            return Ok((link, resume));
        }
    }

    /// Compares mapping and publication with what the log was written under. What differs is a gap, together with an earlier one that
    /// has not ended; it is settled at once where nobody is writing.
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
            // The next one is compared with this one. How far it was verified is for the next check to say.
            if recorded.is_none_or(|verified| verified.fingerprint != fingerprint) {
                let at = recorded.map_or(receiver.received(), |verified| verified.at);
                receiver.record(Entry::Verified(Verified { fingerprint, at }));
            }
            return Ok(gap);
        }
        let reason = match schema_changed {
            // Another mapping is about other tables and columns: that they differ says nothing of the schema.
            Some(verified) if !mapping_changed => GapReason::SchemaChanged {
                detail: publication::difference(Some(&verified.fingerprint), Some(&fingerprint)),
            },
            _ => GapReason::MappingChanged,
        };
        let from = schema_changed.map_or(receiver.received(), |verified| verified.at);
        // After the check, which saw what whoever begins to write from now on writes under.
        let tables: Vec<RelationId> = published.tables.keys().copied().collect();
        let writers = link.writers(&tables).await?;
        UnsettledGap::noticed(from, reason, mapping, fingerprint, writers).with(gap).await_outcome(link, receiver).await
    }

    fn no_publication(&self) -> Error {
        Error::definite(format!(
            "publication {} does not exist. The slot is older than a new one would be: run {}; what has changed since it was \
             dropped is lost, and subscribers are told",
            self.options.publication,
            self.options.commands.recreate_slot()
        ))
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
                    // Only now: a session that connects and then fails has not got anywhere.
                    backoff.reset();
                }
            }
            self.tell_received();
            // What came before it is handed on.
            if let Some(error) = unreadable {
                return Err(Error::definite(error));
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
                // Behind the stream, which knows better why it ended.
                error = &mut lost => return Err(error),
            }
        }
    }

    /// Hands on one entry, and counts it once it is there. As cancel safe as [`Sink::deliver`].
    async fn deliver(&mut self, entry: Entry) -> Result<(), Closed> {
        self.sink.deliver(entry.clone()).await?;
        self.counting.count(&entry);
        self.gap_log.tell(&entry);
        Ok(())
    }

    fn tell_received(&self) {
        self.handed_on.send_if_modified(|told| std::mem::replace(told, self.received) != self.received);
    }

    /// Tells the slot what is durable and not held back, but never what was not handed on: after a reconnect it would not come
    /// again. What it was told.
    fn acknowledge(&mut self, link: &U::Link, durable: &watch::Receiver<Lsn>) -> Lsn {
        let durable = *durable.borrow();
        let told = self.held.release(durable.min(self.received.unwrap_or_default()), Instant::now());
        link.acknowledge(told);
        told
    }

    /// Checks what is published, and records how far it was as it is. What remains of the gap.
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
            // Before its gap is recorded it must not look as if it had always been so.
            Some(_) if gap.as_ref().is_some_and(UnsettledGap::is_unrecorded) => {}
            // Equal twice: whatever was written before the first look was written under it.
            Some(last) if last.lsn <= receiver.received() => {
                receiver.record(Entry::Verified(Verified { fingerprint, at: last.lsn }));
            }
            Some(_) => {}
            None => {
                let state = self.sink.checkpoint().await?;
                // Where less is published than there is, nothing may flow: an error that lasts, and the gap when it is over.
                link.check_fit().await?;
                gap = self.compare(link, &published, &state, receiver, gap).await?;
            }
        }
        *last_check = Some(published);
        Ok(gap)
    }

    /// Stops in order: what was handed on becomes durable and is acknowledged.
    async fn finish(&mut self, link: U::Link, durable: watch::Receiver<Lsn>) -> Result<(), Error> {
        self.sink.checkpoint().await?;
        let target = self.acknowledge(&link, &durable);
        let taken = async {
            // That the server took note has to be seen: a connection that is closed with unread data on its way takes what it
            // said last with it.
            while link.confirmed().await? < target {
                tokio::time::sleep(LAST_STATUS_POLL).await;
            }
            Ok::<(), Error>(())
        };
        if !matches!(timeout(LAST_STATUS_MAX, taken).await, Ok(Ok(()))) {
            tracing::warn!("PostgreSQL did not take the last acknowledgement in time: some changes will be sent again");
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
    // Whoever could stop us is gone: that is a stop too.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// A walsender that waits for somebody who cannot acknowledge holds up the shutdown of PostgreSQL: rather none.
async fn no_room(room: &mut watch::Receiver<DiskSpace>) -> Error {
    match room.wait_for(|room| *room != DiskSpace::Enough).await {
        Ok(room) if *room == DiskSpace::Elsewhere => {
            Error::transient("the directory of the change log is gone: the session is closed until it is back")
        }
        Ok(_) => Error::transient("the disk of the change log is full: the session is closed until it has room"),
        Err(_) => Closed.into(),
    }
}

/// How far a subscriber can be after this entry.
fn reached(entry: &Entry) -> Option<Lsn> {
    match entry {
        Entry::Transaction(transaction) => Some(transaction.end.0),
        Entry::Progress(lsn) => Some(*lsn),
        Entry::Gap(gap) => Some(gap.to.lsn),
        _ => None,
    }
}
