//! A replication connection: first commands, then the stream of a slot.
//!
//! ```text
//!                     ┌─ Incoming ──▶ events, as many as one read brought ──▶ the caller of next()
//!   walsender ◀──────▶┤                  │ the server asks
//!                     └◀─ reports ◀──────┴── acknowledge(LSN)
//! ```
//!
//! A separate task sends the reports, so that the server also receives them while nobody calls `next()`: the server
//! ends a session that is silent for `wal_sender_timeout`. Meanwhile, messages from the server wait in the socket, and
//! then at the server.
//!
//! PostgreSQL documentation: "Streaming Replication Protocol", "Logical Streaming Replication Protocol".

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use fallible_iterator::FallibleIterator as _;
use pgwire_replication::protocol::framing::write_copy_data;
use pgwire_replication::protocol::{
    ReplicationCopyData, encode_standby_status_update, parse_copy_data, unix_to_pg_timestamp,
};
use postgres_protocol::message::backend::{DataRowBody, Message};
use postgres_protocol::message::frontend;
use tokio::io::WriteHalf;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use super::failure::WalsenderError as Error;
use super::peer::{Incoming, Peer, parse, send};
use super::wire::Wire;
use crate::decode::pgoutput::{self, Boundary};
use crate::model::lsn::{CommitLsn, CommitTime, EndLsn, Lsn};
use crate::postgres::catalog::identifier;

/// The interval of unasked reports. While PostgreSQL decodes changes that are not for us, it does not ask, and it
/// checks the time of the last reply only afterwards.
const UNASKED_EVERY: Duration = Duration::from_millis(500);
/// The shortest time between two reports of a new position.
const REPORT_EVERY: Duration = Duration::from_millis(250);
/// The longest wait for the server to close the connection.
const CLOSE_MAX: Duration = Duration::from_secs(2);
/// CopyBothResponse, which begins the stream. postgres-protocol does not know it.
const COPY_BOTH: u8 = b'W';

/// A message of the stream.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// pgoutput's Begin.
    Begin {
        commit: CommitLsn,
        /// The lower half of the transaction id.
        xid: u32,
        commit_time: CommitTime,
    },
    /// Any other message of pgoutput.
    Change(Bytes),
    /// A transactional logical message.
    Message { prefix: String, content: Bytes },
    /// pgoutput's Commit.
    Commit { commit: CommitLsn, end: EndLsn },
    /// The server has sent everything up to this LSN.
    KeepAlive { wal_end: Lsn },
}

/// A connection to a walsender. A failed connection stays failed.
pub(crate) struct Walsender {
    incoming: Incoming,
    /// Sends commands, until the stream starts.
    outgoing: Option<WriteHalf<Wire>>,
    /// Sends reports, once the stream has started.
    reports: Option<Reports>,
    /// The error that ended the stream, until the events before it are returned.
    ended: Option<Error>,
}

/// The answer to IDENTIFY_SYSTEM: the server and its position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) system_identifier: u64,
    /// The timeline that the server writes.
    pub(crate) timeline: u32,
    /// The end LSN of the flushed WAL.
    pub(crate) wal_end: Lsn,
}

/// The columns of a row, as text.
type Row = Vec<Option<String>>;

impl Walsender {
    pub(super) fn new(peer: Peer) -> Self {
        Self { incoming: peer.incoming, outgoing: Some(peer.outgoing), reports: None, ended: None }
    }

    /// Runs a replication command, or SQL without parameters, and returns the rows of its answer. After an error of the
    /// server the connection remains usable. Not cancel safe.
    ///
    /// # Errors
    /// Those of the server and of the connection.
    pub(crate) async fn query(&mut self, statement: &str) -> Result<Vec<Row>, Error> {
        self.command(statement).await?;
        let mut rows = Vec::new();
        let mut refused = None;
        loop {
            let message = match self.incoming.next().await.and_then(parse) {
                Ok(message) => message,
                // The server reports the reason before it closes the connection.
                Err(error) => return Err(refused.unwrap_or(Error::Lost(error))),
            };
            match message {
                Message::DataRow(row) => rows.push(texts(&row)?),
                Message::ErrorResponse(error) => refused = Some(Error::refused(&error)),
                Message::ReadyForQuery(_) => return refused.map_or(Ok(rows), Err),
                _ => {}
            }
        }
    }

    /// Runs IDENTIFY_SYSTEM.
    ///
    /// # Errors
    /// As [`Walsender::query`].
    pub(crate) async fn identify(&mut self) -> Result<Identity, Error> {
        let rows = self.query("IDENTIFY_SYSTEM").await?;
        let identity = match rows.first().map(Vec::as_slice) {
            Some([Some(system), Some(timeline), Some(wal_end), ..]) => {
                system.parse().ok().zip(timeline.parse().ok()).zip(wal_end.parse().ok())
            }
            _ => None,
        };
        let ((system_identifier, timeline), wal_end) = identity.ok_or(Error::NoIdentity)?;
        Ok(Identity { system_identifier, timeline, wal_end })
    }

    /// Runs TIMELINE_HISTORY, and returns the contents of the history file. Timeline 1 has none.
    ///
    /// # Errors
    /// As [`Walsender::query`].
    pub(crate) async fn timeline_history(&mut self, timeline: u32) -> Result<String, Error> {
        let rows = self.query(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let content = rows.into_iter().next().and_then(|row| row.into_iter().nth(1)).flatten();
        content.ok_or(Error::NoHistory)
    }

    /// Runs START_REPLICATION at the slot's position, so that the server sends everything again that was not
    /// acknowledged. On success this connection holds the slot. Even on failure, no further command is possible.
    ///
    /// # Errors
    /// Those of the server and of the connection.
    pub(crate) async fn start(&mut self, slot: &str, publication: &str) -> Result<(), Error> {
        // The server reads the option as a list of identifiers, and folds unquoted ones to lower case.
        let publication = identifier(publication).replace('\'', "''");
        let statement = format!(
            "START_REPLICATION SLOT {} LOGICAL 0/0 (proto_version '1', publication_names '{publication}', messages 'true')",
            identifier(slot)
        );
        self.command(&statement).await?;
        loop {
            let message = self.incoming.next().await?;
            if message.first() == Some(&COPY_BOTH) {
                break;
            }
            if let Message::ErrorResponse(error) = parse(message)? {
                return Err(Error::refused(&error));
            }
        }
        self.reports = self.outgoing.take().map(Reports::begin);
        Ok(())
    }

    /// Waits for events, and adds all events of one read: up to 256 KiB, or one event of any size. Cancel safe.
    ///
    /// # Errors
    /// The error that ended the stream.
    pub(crate) async fn next(&mut self, events: &mut Vec<Event>) -> Result<(), Error> {
        if let Some(error) = self.ended.take() {
            return Err(error);
        }
        let before = events.len();
        loop {
            match self.take_all(events) {
                Err(error) if events.len() == before => return Err(error),
                Err(error) => {
                    self.ended = Some(error);
                    return Ok(());
                }
                Ok(()) if events.len() == before => self.incoming.read().await?,
                Ok(()) => return Ok(()),
            }
        }
    }

    fn take_all(&mut self, events: &mut Vec<Event>) -> Result<(), Error> {
        while let Some(message) = self.incoming.take()? {
            match parse(message)? {
                Message::CopyData(body) => events.extend(self.event(body.into_bytes())?),
                Message::ErrorResponse(error) => return Err(Error::refused(&error)),
                Message::CopyDone | Message::CommandComplete(_) => return Err(Error::Ended),
                // Notices, and settings that a reload has changed.
                _ => {}
            }
        }
        Ok(())
    }

    fn event(&mut self, data: Bytes) -> Result<Option<Event>, Error> {
        match parse_copy_data(data)? {
            ReplicationCopyData::KeepAlive { wal_end, reply_requested, .. } => {
                self.incoming.record_keepalive();
                if let Some(reports) = self.reports.as_ref().filter(|_| reply_requested) {
                    reports.asked.notify_one();
                }
                Ok(Some(Event::KeepAlive { wal_end: Lsn(wal_end.as_u64()) }))
            }
            ReplicationCopyData::XLogData { data, .. } => Ok(event_of(data)?),
        }
    }

    #[cfg(test)]
    pub(super) const fn is_behind(&self) -> bool {
        self.incoming.is_behind()
    }

    /// Acknowledges, soon, that everything up to this end LSN is durable. Never moves backward. Until the first call,
    /// reports contain `0/0`, which the server reads as "nothing to report".
    pub(crate) fn acknowledge(&self, lsn: Lsn) {
        if let Some(reports) = &self.reports {
            reports.durable.send_if_modified(|durable| {
                let is_further = *durable < lsn;
                *durable = lsn.max(*durable);
                is_further
            });
        }
    }

    /// Closes the connection in order. The slot is free afterwards, unless the server was too slow.
    pub(crate) async fn close(mut self) {
        let farewell = async {
            let mut outgoing = match self.reports.take() {
                Some(reports) => reports.end().await?,
                None => self.outgoing.take().ok_or(io::ErrorKind::BrokenPipe)?,
            };
            let last = |out: &mut BytesMut| {
                frontend::copy_done(out);
                frontend::terminate(out);
                Ok(())
            };
            send(&mut outgoing, last).await?;
            // Closing a connection with unread data resets it, and its last message may be lost.
            loop {
                self.incoming.next().await?;
            }
        };
        let _: Result<io::Result<()>, _> = timeout(CLOSE_MAX, farewell).await;
    }

    async fn command(&mut self, statement: &str) -> Result<(), Error> {
        let outgoing = self.outgoing.as_mut().ok_or(Error::Started)?;
        Ok(send(outgoing, |out| frontend::query(statement, out)).await?)
    }
}

/// The reports to the server while the stream flows.
struct Reports {
    durable: watch::Sender<Lsn>,
    /// Requests a report at once, because the server asked for one.
    asked: Arc<Notify>,
    /// Returns the wire once `durable` is dropped.
    task: JoinHandle<io::Result<WriteHalf<Wire>>>,
}

impl Reports {
    fn begin(outgoing: WriteHalf<Wire>) -> Self {
        let (durable, following) = watch::channel(Lsn(0));
        let asked = Arc::new(Notify::new());
        let task = tokio::spawn(report(outgoing, following, asked.clone()));
        Self { durable, asked, task }
    }

    async fn end(self) -> io::Result<WriteHalf<Wire>> {
        drop(self.durable);
        self.task.await.map_err(io::Error::other)?
    }
}

impl Drop for Walsender {
    fn drop(&mut self) {
        if let Some(reports) = &self.reports {
            reports.task.abort();
        }
    }
}

async fn report(
    mut outgoing: WriteHalf<Wire>,
    mut durable: watch::Receiver<Lsn>,
    asked: Arc<Notify>,
) -> io::Result<WriteHalf<Wire>> {
    loop {
        let lsn = pgwire_replication::Lsn::from_u64(durable.borrow_and_update().0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let now = unix_to_pg_timestamp(i64::try_from(now).unwrap_or_default());
        write_copy_data(&mut outgoing, &encode_standby_status_update(lsn, now, false))
            .await
            .map_err(io::Error::other)?;
        let reported = Instant::now();
        let further = async {
            durable.changed().await?;
            sleep_until(reported + REPORT_EVERY).await;
            Ok::<(), watch::error::RecvError>(())
        };
        tokio::select! {
            biased;
            () = asked.notified() => {}
            further = further => if further.is_err() { return Ok(outgoing) },
            () = sleep_until(reported + UNASKED_EVERY) => {}
        }
    }
}

/// Decodes a pgoutput message into an event.
fn event_of(data: Bytes) -> Result<Option<Event>, pgoutput::Error> {
    let event = match pgoutput::boundary(&data)? {
        None => Event::Change(data),
        Some(Boundary::Begin { commit, commit_time, xid }) => {
            Event::Begin { commit: CommitLsn(Lsn(commit)), xid, commit_time: CommitTime(commit_time) }
        }
        Some(Boundary::Commit { commit, end }) => {
            Event::Commit { commit: CommitLsn(Lsn(commit)), end: EndLsn(Lsn(end)) }
        }
        Some(Boundary::Logical { is_transactional: false, .. }) => return Ok(None),
        Some(Boundary::Logical { is_transactional: true, prefix, content }) => {
            Event::Message { prefix: String::from_utf8_lossy(prefix).into_owned(), content: data.slice_ref(content) }
        }
    };
    Ok(Some(event))
}

fn texts(row: &DataRowBody) -> io::Result<Row> {
    let text = |range| row.buffer().get(range).map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    row.ranges().map(|range| Ok(range.and_then(text))).collect()
}
