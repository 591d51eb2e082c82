//! A replication connection: commands first, and then the stream of a slot.
//!
//! ```text
//!                     ┌─ Incoming ──▶ events, as many as one read brought ──▶ whoever calls next()
//!   walsender ◀──────▶┤                  │ the server asks
//!                     └◀─ reports ◀──────┴── acknowledge(LSN)
//! ```
//!
//! The reports are a task of their own, so that the server hears of us also while nobody calls `next()`: it ends a session of which
//! it hears nothing for `wal_sender_timeout`, and what it sends meanwhile waits in the socket, and then at the server.
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

/// How often we say something unasked. While PostgreSQL decodes what is not for us it does not ping, and looks at the last reply
/// only when it is done.
const UNASKED_EVERY: Duration = Duration::from_millis(500);
/// Most often that the server is told how far we are.
const REPORT_EVERY: Duration = Duration::from_millis(250);
/// Longest wait for the server to take its leave.
const CLOSE_MAX: Duration = Duration::from_secs(2);
/// CopyBothResponse, by which the stream begins. postgres-protocol does not know it.
const COPY_BOTH: u8 = b'W';

/// What the walsender sends.
#[derive(Clone, Debug)]
pub enum Event {
    /// pgoutput's Begin.
    Begin {
        /// Commit LSN (`final_lsn`).
        commit: CommitLsn,
        /// The lower half of the transaction id.
        xid: u32,
        /// When it committed.
        commit_time: CommitTime,
    },
    /// Any other pgoutput message.
    Change(Bytes),
    /// A transactional logical message.
    Message {
        /// Whose.
        prefix: String,
        /// Its contents.
        content: Bytes,
    },
    /// pgoutput's Commit.
    Commit {
        /// Commit LSN.
        commit: CommitLsn,
        /// End LSN.
        end: EndLsn,
    },
    /// The server has sent everything up to here.
    KeepAlive {
        /// Its position.
        wal_end: Lsn,
    },
}

/// A connection to a walsender, which nothing revives once it has failed.
pub struct Walsender {
    incoming: Incoming,
    /// Until the stream starts.
    outgoing: Option<WriteHalf<Wire>>,
    /// From then on.
    reports: Option<Reports>,
    /// What the stream ended with, behind events that were to be handed on first.
    ended: Option<Error>,
}

/// Which server this is, and where it is: the answer to IDENTIFY_SYSTEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Of the cluster.
    pub system_identifier: u64,
    /// The timeline that it writes.
    pub timeline: u32,
    /// The end of its WAL that is flushed.
    pub wal_end: Lsn,
}

/// The columns of a row, as text.
type Row = Vec<Option<String>>;

impl Walsender {
    pub(super) fn new(peer: Peer) -> Self {
        Self { incoming: peer.incoming, outgoing: Some(peer.outgoing), reports: None, ended: None }
    }

    /// Runs a replication command, or SQL without parameters, and returns the rows of its answer. An error of the server leaves
    /// the connection usable. Not cancel safe.
    ///
    /// # Errors
    /// Those of the server and of the connection.
    pub async fn query(&mut self, statement: &str) -> Result<Vec<Row>, Error> {
        self.command(statement).await?;
        let mut rows = Vec::new();
        let mut refused = None;
        loop {
            let message = match self.incoming.next().await.and_then(parse) {
                Ok(message) => message,
                // It says why before it goes.
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

    /// IDENTIFY_SYSTEM.
    ///
    /// # Errors
    /// As [`Walsender::query`].
    pub async fn identify(&mut self) -> Result<Identity, Error> {
        let rows = self.query("IDENTIFY_SYSTEM").await?;
        let identity = match rows.first().map(Vec::as_slice) {
            Some([Some(system), Some(timeline), Some(wal_end), ..]) => {
                system.parse().ok().zip(timeline.parse().ok()).zip(wal_end.parse().ok())
            }
            _ => None,
        };
        let ((system_identifier, timeline), wal_end) =
            identity.ok_or_else(|| Error::unexpected("the server does not say who it is"))?;
        Ok(Identity { system_identifier, timeline, wal_end })
    }

    /// TIMELINE_HISTORY: the contents of the file. There is none of timeline 1.
    ///
    /// # Errors
    /// As [`Walsender::query`].
    pub async fn timeline_history(&mut self, timeline: u32) -> Result<String, Error> {
        let rows = self.query(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let content = rows.into_iter().next().and_then(|row| row.into_iter().nth(1)).flatten();
        content.ok_or_else(|| Error::unexpected("the server does not tell its timelines"))
    }

    /// START_REPLICATION from where the slot is: what was not acknowledged comes again. The slot is ours when it returns. No
    /// command is possible any more, whether or not it succeeds.
    ///
    /// # Errors
    /// Those of the server and of the connection.
    pub async fn start(&mut self, slot: &str, publication: &str) -> Result<(), Error> {
        // The server reads the option as a list of identifiers, which it would fold to lower case without quotes.
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

    /// Waits for events, and adds all that one read brought: not many more than 128 KiB of them, or one of whatever size. Cancel
    /// safe.
    ///
    /// # Errors
    /// What the stream ended with.
    pub async fn next(&mut self, events: &mut Vec<Event>) -> Result<(), Error> {
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

    fn event(&self, data: Bytes) -> Result<Option<Event>, Error> {
        match parse_copy_data(data).map_err(Error::unexpected)? {
            ReplicationCopyData::KeepAlive { wal_end, reply_requested, .. } => {
                if let Some(reports) = self.reports.as_ref().filter(|_| reply_requested) {
                    reports.asked.notify_one();
                }
                Ok(Some(Event::KeepAlive { wal_end: Lsn(wal_end.as_u64()) }))
            }
            ReplicationCopyData::XLogData { data, .. } => event_of(data).map_err(Error::unexpected),
        }
    }

    /// Tells the slot, soon, that everything up to here is durable. Never goes back. Before any of it the server is told `0/0`,
    /// which it takes for "nothing to report".
    pub fn acknowledge(&self, lsn: Lsn) {
        if let Some(reports) = &self.reports {
            reports.durable.send_if_modified(|told| {
                let is_further = *told < lsn;
                *told = lsn.max(*told);
                is_further
            });
        }
    }

    /// Ends it in good order: the slot is free afterwards, if the server was not too slow.
    pub async fn close(mut self) {
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
            // A connection that is closed with something unread is reset, and what was said last may be lost.
            loop {
                self.incoming.next().await?;
            }
        };
        let _: Result<io::Result<()>, _> = timeout(CLOSE_MAX, farewell).await;
    }

    async fn command(&mut self, statement: &str) -> Result<(), Error> {
        let outgoing = self.outgoing.as_mut().ok_or_else(|| Error::unexpected("the stream has started"))?;
        Ok(send(outgoing, |out| frontend::query(statement, out)).await?)
    }
}

/// What the server is told while the stream flows.
struct Reports {
    durable: watch::Sender<Lsn>,
    /// The server wants to know at once.
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

/// Of a message of pgoutput.
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
