//! The server for all other statements: always the one that the session reads from, even if another server still
//! answers.
//!
//! If PostgreSQL refuses more connections (because of a limit of the role, the database or the server), other
//! statements share the session's SQL connection, which exists while the slot streams. If PostgreSQL refuses the
//! session itself, all other parts close their connections.

use crate::postgres::connection::{ConnectError, Connection, Endpoint};
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::watch;

/// The longest wait for the session to find its first primary. A process that has just started needs little time for
/// this.
const FIRST_SESSION_MAX: Duration = Duration::from_secs(5);

/// The reason why there is no connection. Callers may see the message, so only the source names hosts and roles.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The session has found no primary yet.
    #[error("no session with PostgreSQL was established yet: the log of tuplewatch says why")]
    NoSession,
    /// The session needs the next free connection.
    #[error("PostgreSQL takes no more connections: the next one that is free is for the replication session")]
    SessionFirst,
    /// A limit on connections is reached at the primary.
    #[error("PostgreSQL takes no more connections: tuplewatch doctor names the limit")]
    Limit(#[source] ConnectError),
    /// The connection to the primary failed for another reason.
    #[error("no connection to PostgreSQL could be made: see the log of tuplewatch, or ask tuplewatch doctor")]
    Connect(#[source] ConnectError),
}

impl From<ConnectError> for Error {
    fn from(error: ConnectError) -> Self {
        if error.is_limit() { Self::Limit(error) } else { Self::Connect(error) }
    }
}

impl Error {
    /// Whether a limit on connections is the reason.
    pub(crate) const fn is_limit(&self) -> bool {
        matches!(self, Self::SessionFirst | Self::Limit(_))
    }

    /// The message for the log, with hosts and roles.
    pub(crate) fn in_full(&self) -> &dyn fmt::Display {
        match self {
            Self::Limit(error) | Self::Connect(error) => error,
            Self::NoSession | Self::SessionFirst => self,
        }
    }
}

/// The server that the session found, for the other connections.
#[derive(Clone, Debug, Default)]
pub(crate) struct Found {
    /// The primary of the current or the last session.
    pub(crate) endpoint: Option<Endpoint>,
    /// The session's SQL connection, while it streams.
    pub(crate) session: Weak<Connection>,
    /// Whether PostgreSQL refuses the session a connection because of a limit.
    pub(crate) is_refused: bool,
}

/// A connection for statements.
#[derive(Debug)]
pub(crate) enum Line {
    /// A separate connection.
    Own(Arc<Connection>),
    /// The session's connection. It ends with the session.
    Shared(Weak<Connection>),
}

impl Line {
    /// Returns the connection, unless it has ended.
    pub(crate) fn get(&self) -> Option<Arc<Connection>> {
        let connection = match self {
            Self::Own(connection) => Some(connection.clone()),
            Self::Shared(connection) => connection.upgrade(),
        };
        connection.filter(|connection| !connection.is_closed())
    }

    /// Whether it is the session's connection.
    pub(crate) const fn is_shared(&self) -> bool {
        matches!(self, Self::Shared(_))
    }
}

/// Follows the session. Each clone follows it independently.
#[derive(Clone, Debug)]
pub(crate) struct PrimaryConnector(watch::Receiver<Found>);

impl PrimaryConnector {
    /// `found` holds each primary that the session reads from.
    pub(crate) const fn new(found: watch::Receiver<Found>) -> Self {
        Self(found)
    }

    /// Whether the session has found a primary, or needs a connection, since the last [`PrimaryConnector::connect`].
    /// Earlier connections should then be closed.
    pub(crate) fn has_moved(&self) -> bool {
        self.0.has_changed().unwrap_or(false)
    }

    /// Whether PostgreSQL refuses the session a connection because of a limit.
    pub(crate) fn is_session_refused(&self) -> bool {
        self.0.borrow().is_refused
    }

    /// Completes when PostgreSQL refuses the session a connection. Never completes if the session has ended for good.
    pub(crate) async fn session_refused(&mut self) {
        self.wait(|found| found.is_refused).await;
    }

    /// Completes when PostgreSQL does not, or no longer, refuse the session.
    pub(crate) async fn session_accepted(&mut self) {
        self.wait(|found| !found.is_refused).await;
    }

    async fn wait(&mut self, condition: impl FnMut(&Found) -> bool) {
        if self.0.wait_for(condition).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Connects to the current primary. The wait for a first session and the connect timeout of the URI bound the time.
    ///
    /// # Errors
    /// If there is no primary yet, or it accepts no connection.
    pub(crate) async fn connect(&mut self) -> Result<Connection, Error> {
        // A timeout of this wait shows below.
        let found = |found: &Found| found.endpoint.is_some() || found.is_refused;
        let _ = tokio::time::timeout(FIRST_SESSION_MAX, self.0.wait_for(found)).await.map(drop);
        let Found { endpoint, is_refused, .. } = self.0.borrow_and_update().clone();
        if is_refused {
            return Err(Error::SessionFirst);
        }
        Ok(endpoint.ok_or(Error::NoSession)?.connect().await?)
    }

    /// Connects to the current primary, or shares the session's connection if PostgreSQL accepts no more.
    ///
    /// # Errors
    /// As [`PrimaryConnector::connect`].
    pub(crate) async fn connect_or_share(&mut self) -> Result<Line, Error> {
        match self.connect().await {
            Ok(connection) => Ok(Line::Own(Arc::new(connection))),
            Err(error) if error.is_limit() => self.share().ok_or(error),
            Err(error) => Err(error),
        }
    }

    /// Returns the session's connection, while it streams.
    pub(crate) fn share(&self) -> Option<Line> {
        let session = self.0.borrow().session.clone();
        (session.strong_count() > 0).then_some(Line::Shared(session))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::connection::Endpoints;

    #[tokio::test]
    async fn only_the_log_has_hosts_and_roles() {
        let endpoints = Endpoints::parse("postgres://ada@%2Fmissing/db").unwrap();
        let error = Error::from(endpoints.connect("tests").await.unwrap_err());
        let (for_callers, for_the_log) = (error.to_string(), error.in_full().to_string());
        for secret in ["missing", "ada", "5432"] {
            assert!(!for_callers.contains(secret), "{for_callers}");
            assert!(for_the_log.contains(secret), "{for_the_log}");
        }
    }
}
