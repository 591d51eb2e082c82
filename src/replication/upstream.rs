//! The server as a session sees it: PostgreSQL ([`walsender`]), or a script in a test.
//!
//! Everything that decides what is lost, doubled or acknowledged is on the session's side of this contract, so that a test
//! can run it against a server that fails at any moment.

pub(crate) mod walsender;

use super::Error;
use crate::changelog::State;
use crate::decode::pgoutput::RelationId;
use crate::model::lsn::{Lsn, Xid8};
use crate::model::timeline::{History, Source};
use crate::postgres::connection::Event;
use crate::postgres::publication::Published;
use crate::postgres::transactions::Writer;

/// Makes links.
pub(crate) trait Upstream: Send + Sync {
    /// A connection.
    type Link: Link;

    /// Connects to the primary and checks that it is fit to be read from; where the log has no origin yet, makes the slot
    /// if it is missing. Nothing is read and nothing acknowledged before [`Link::start`].
    ///
    /// # Errors
    /// Fatal where the log belongs to another source.
    fn connect(&self, state: &State) -> impl Future<Output = Result<Self::Link, Error>> + Send;
}

/// The server that a new link leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Server {
    /// The database.
    pub(crate) source: Source,
    /// The timelines that led to where it is.
    pub(crate) history: History,
    /// The end LSN of its WAL.
    pub(crate) wal_end: Lsn,
}

/// The slot, once this link holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Started {
    /// Its confirmed flush: nothing that committed before comes.
    pub(crate) confirmed: Lsn,
    /// The server's next transaction id.
    pub(crate) xid: Xid8,
}

/// One connection to the server, which nothing revives once it has failed.
pub(crate) trait Link: Send {
    /// Where it leads.
    fn server(&self) -> &Server;

    /// Starts replication where the slot is. Nobody else can move the slot from then on.
    ///
    /// # Errors
    /// Where the server refuses.
    fn start(&mut self) -> impl Future<Output = Result<Started, Error>> + Send;

    /// Publishes that the log follows this server now: all other statements go to it.
    fn announce(&self);

    /// Waits for the next event, and adds it with those that are ready behind it, a bounded number. Cancel safe. A dead peer is
    /// not noticed here: see [`Link::check_alive`].
    ///
    /// # Errors
    /// Where the link is of no more use.
    fn next(&mut self, events: &mut Vec<Event>) -> impl Future<Output = Result<(), Error>> + Send;

    /// Completes when the SQL connection beside the stream has ended. A server that shuts down ends that one at once, and keeps the
    /// stream until everything is acknowledged, which may be delayed.
    fn lost(&self) -> impl Future<Output = Error> + Send + 'static;

    /// Acknowledges to the slot that everything up to this end LSN is durable here. Never goes back.
    fn acknowledge(&self, lsn: Lsn);

    /// Whether the server still has this link; asked every few seconds. Silence is no sign: a server that decodes changes for minutes
    /// that are not for us neither sends nor listens meanwhile.
    ///
    /// # Errors
    /// Where it does not, or cannot be asked.
    fn check_alive(&self) -> impl Future<Output = Result<(), Error>> + Send;

    /// Whether the server is still fit to be read from.
    ///
    /// # Errors
    /// Definite where it is not: less is published than the mapping needs, or old rows are incomplete.
    fn check_fit(&self) -> impl Future<Output = Result<(), Error>> + Send;

    /// The publication, and the tables in it, at present.
    ///
    /// # Errors
    /// Where the server cannot be asked.
    fn published(&self) -> impl Future<Output = Result<Published, Error>> + Send;

    /// Transactions, of whichever sessions and prepared ones too, that have an id and hold a lock that writers take on any of these
    /// tables or their partitions.
    ///
    /// # Errors
    /// Where the server cannot be asked.
    fn writers(&self, tables: &[RelationId]) -> impl Future<Output = Result<Vec<Xid8>, Error>> + Send;

    /// Those of these transactions that have not ended. The commit record of one that has is in the WAL.
    ///
    /// # Errors
    /// Where the server cannot be asked.
    fn running(&self, of: &[Xid8]) -> impl Future<Output = Result<Vec<Writer>, Error>> + Send;

    /// Writes a marker, which comes out of the slot, and returns a position past it and past everything before.
    ///
    /// # Errors
    /// Where the server cannot be asked.
    fn mark(&self) -> impl Future<Output = Result<Lsn, Error>> + Send;

    /// The slot's confirmed flush at present.
    ///
    /// # Errors
    /// Where the server cannot be asked.
    fn confirmed(&self) -> impl Future<Output = Result<Lsn, Error>> + Send;

    /// Ends it in good order.
    fn close(self) -> impl Future<Output = ()> + Send;
}
