//! Which server to ask: the one that the session reads from, and no other, even if another one still answers.
//!
//! If PostgreSQL refuses more connections (because of a limit of the role, the database or the server), other statements share the session's
//! SQL connection, which exists for as long as anything streams. If the session itself is refused, all others close their connections for it.

use crate::postgres::connection::{ConnectError, Connection, Endpoint};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::watch;

/// Longest wait for the session to find a primary, when there was none before. A process that has just started gets there soon.
const FIRST_SESSION_MAX: Duration = Duration::from_secs(5);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The session has found no primary yet.
    #[error("no session with PostgreSQL was established yet: the log of tuplewatch says why")]
    NoSession,
    /// The session comes first.
    #[error("PostgreSQL takes no more connections: the next one that is free is for the replication session")]
    SessionFirst,
    /// The one that it found does not take a connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

impl Error {
    /// Whether a limit of connections is the reason.
    pub fn is_limit(&self) -> bool {
        match self {
            Self::NoSession => false,
            Self::SessionFirst => true,
            Self::Connect(error) => error.is_limit(),
        }
    }
}

/// What the session tells of itself to those who ask the same server.
#[derive(Clone, Debug, Default)]
pub(crate) struct Found {
    /// The primary of the present or last session.
    pub(crate) endpoint: Option<Endpoint>,
    /// The session's SQL connection, for as long as it streams.
    pub(crate) session: Weak<Connection>,
    /// PostgreSQL refused the session a connection, because there are too many.
    pub(crate) is_refused: bool,
}

/// A connection to ask on.
#[derive(Debug)]
pub enum Line {
    /// Nobody else's.
    Own(Arc<Connection>),
    /// The session's: it goes with the session.
    Shared(Weak<Connection>),
}

impl Line {
    /// The connection, unless it has ended.
    pub fn get(&self) -> Option<Arc<Connection>> {
        let connection = match self {
            Self::Own(connection) => Some(connection.clone()),
            Self::Shared(connection) => connection.upgrade(),
        };
        connection.filter(|connection| !connection.is_closed())
    }

    /// Whether it is the session's.
    pub const fn is_shared(&self) -> bool {
        matches!(self, Self::Shared(_))
    }
}

/// Follows the session. Each clone does by itself.
#[derive(Clone, Debug)]
pub struct PrimaryConnector(watch::Receiver<Found>);

impl PrimaryConnector {
    /// `found` is told of each primary that the session goes on with.
    pub(crate) const fn new(found: watch::Receiver<Found>) -> Self {
        Self(found)
    }

    /// Whether the session has found a primary, or needs a connection, since [`PrimaryConnector::connect`]: connections of before should
    /// be given up.
    pub fn has_moved(&self) -> bool {
        self.0.has_changed().unwrap_or(false)
    }

    /// Whether PostgreSQL refuses the session a connection, because there are too many.
    pub fn is_session_refused(&self) -> bool {
        self.0.borrow().is_refused
    }

    /// Completes when the session is refused a connection; never where it has ended for good.
    pub async fn session_refused(&mut self) {
        self.wait(|found| found.is_refused).await;
    }

    /// Completes when it is not, or no more.
    pub async fn session_accepted(&mut self) {
        self.wait(|found| !found.is_refused).await;
    }

    async fn wait(&mut self, condition: impl FnMut(&Found) -> bool) {
        if self.0.wait_for(condition).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// A connection to the present one. Bounded by the wait for a first session and the connect timeout of the URI.
    ///
    /// # Errors
    /// Where there is none yet, or it takes no connection.
    pub async fn connect(&mut self) -> Result<Connection, Error> {
        // What came of the wait is seen below.
        let found = |found: &Found| found.endpoint.is_some() || found.is_refused;
        let _ = tokio::time::timeout(FIRST_SESSION_MAX, self.0.wait_for(found)).await.map(drop);
        let Found { endpoint, is_refused, .. } = self.0.borrow_and_update().clone();
        if is_refused {
            return Err(Error::SessionFirst);
        }
        Ok(endpoint.ok_or(Error::NoSession)?.connect().await?)
    }

    /// The same; where PostgreSQL takes no more connections, the session's.
    ///
    /// # Errors
    /// As [`PrimaryConnector::connect`].
    pub async fn connect_or_share(&mut self) -> Result<Line, Error> {
        match self.connect().await {
            Ok(connection) => Ok(Line::Own(Arc::new(connection))),
            Err(error) if error.is_limit() => self.share().ok_or(error),
            Err(error) => Err(error),
        }
    }

    /// The session's connection, while it streams.
    pub fn share(&self) -> Option<Line> {
        let session = self.0.borrow().session.clone();
        (session.strong_count() > 0).then_some(Line::Shared(session))
    }
}
