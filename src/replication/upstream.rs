//! The contract between a session and the server: PostgreSQL ([`walsender`]), or a script in a test.
//!
//! All decisions about lost, repeated and acknowledged data are on the session's side of this contract, so that a test
//! can run them against a server that fails at any moment.

pub(crate) mod walsender;

use super::Error;
use crate::changelog::State;
use crate::decode::pgoutput::RelationId;
use crate::model::lsn::{Lsn, Xid8};
use crate::model::timeline::{History, Source};
use crate::postgres::connection::Event;
use crate::postgres::publication::Published;
use crate::postgres::transactions::Writer;

/// Opens links.
pub(crate) trait Upstream: Send + Sync {
    /// The type of a connection.
    type Link: Link;

    /// Connects to the primary and checks its requirements. If the log has no origin yet, creates a missing slot.
    /// Nothing is read or acknowledged before [`Link::start`].
    ///
    /// # Errors
    /// Fatal if the log belongs to another source.
    fn connect(&self, state: &State) -> impl Future<Output = Result<Self::Link, Error>> + Send;
}

/// The server of a new link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Server {
    /// The database.
    pub(crate) source: Source,
    /// The timelines that lead to the server's current one.
    pub(crate) history: History,
    /// The end LSN of the server's WAL.
    pub(crate) wal_end: Lsn,
}

/// The slot, once this link holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Started {
    /// The slot's confirmed position: transactions that committed before it are not sent.
    pub(crate) confirmed: Lsn,
    /// The server's next transaction id.
    pub(crate) xid: Xid8,
}

/// One connection to the server. A failed link stays failed.
pub(crate) trait Link: Send {
    /// The server of the link.
    fn server(&self) -> &Server;

    /// Starts replication at the slot's position. From then on nobody else can move the slot.
    ///
    /// # Errors
    /// If the server refuses.
    fn start(&mut self) -> impl Future<Output = Result<Started, Error>> + Send;

    /// Publishes that the log follows this server now, so that all other statements go to it.
    fn announce(&self);

    /// Waits for the next event, and adds it to `events` together with a bounded number of ready events. Cancel safe.
    /// It does not detect a dead server: see [`Link::check_alive`].
    ///
    /// # Errors
    /// If the link has failed.
    fn next(&mut self, events: &mut Vec<Event>) -> impl Future<Output = Result<(), Error>> + Send;

    /// Completes when the SQL connection beside the stream has ended. A server that shuts down ends that connection at
    /// once, but keeps the stream until everything is acknowledged, which may be delayed.
    fn lost(&self) -> impl Future<Output = Error> + Send + 'static;

    /// Acknowledges to the slot that everything up to this end LSN is durable. Never moves backward.
    fn acknowledge(&self, lsn: Lsn);

    /// Checks whether the server still has this link; called every few seconds. Silence proves nothing, because a
    /// server that decodes changes of other tables for minutes neither sends nor reads meanwhile.
    ///
    /// # Errors
    /// If the server has lost the link, or does not answer.
    fn check_alive(&self) -> impl Future<Output = Result<(), Error>> + Send;

    /// Checks whether the server still meets the requirements.
    ///
    /// # Errors
    /// Definite if it does not: the publication lacks something that the mapping needs, or old rows are incomplete.
    fn check_fit(&self) -> impl Future<Output = Result<(), Error>> + Send;

    /// Reads the publication and its tables.
    ///
    /// # Errors
    /// If the server does not answer.
    fn published(&self) -> impl Future<Output = Result<Published, Error>> + Send;

    /// Returns the transactions that have an id, and hold a lock that writers take on one of these tables or their
    /// partitions. They may belong to any session, or be prepared.
    ///
    /// # Errors
    /// If the server does not answer.
    fn writers(&self, tables: &[RelationId]) -> impl Future<Output = Result<Vec<Xid8>, Error>> + Send;

    /// Returns those of these transactions that have not ended. The commit record of an ended transaction is in the
    /// WAL.
    ///
    /// # Errors
    /// If the server does not answer.
    fn running(&self, of: &[Xid8]) -> impl Future<Output = Result<Vec<Writer>, Error>> + Send;

    /// Writes a marker, which the slot will send, and returns a position after it and after everything before.
    ///
    /// # Errors
    /// If the server does not answer.
    fn mark(&self) -> impl Future<Output = Result<Lsn, Error>> + Send;

    /// Returns the slot's confirmed position.
    ///
    /// # Errors
    /// If the server does not answer.
    fn confirmed(&self) -> impl Future<Output = Result<Lsn, Error>> + Send;

    /// Closes the link in order.
    fn close(self) -> impl Future<Output = ()> + Send;
}
