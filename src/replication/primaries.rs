//! Which server to ask: the one that the session reads from, and no other, even where that still answers.

use super::connection::{ConnectError, Connection, Endpoint};
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
    /// The one that it found does not take a connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

/// Follows the session. Each clone does by itself.
#[derive(Clone, Debug)]
pub struct Primaries(watch::Receiver<Option<Endpoint>>);

impl Primaries {
    /// `found` is told of each primary that the session goes on with.
    pub const fn new(found: watch::Receiver<Option<Endpoint>>) -> Self {
        Self(found)
    }

    /// Whether the session has found a primary since [`Primaries::connect`]: connections of before should be given up.
    pub fn has_moved(&self) -> bool {
        self.0.has_changed().unwrap_or(false)
    }

    /// A connection to the present one. Bounded by the wait for a first session and the connect timeout of the URI.
    ///
    /// # Errors
    /// Where there is none yet, or it takes no connection.
    pub async fn connect(&mut self) -> Result<Connection, Error> {
        // What came of the wait is seen below.
        let _ = tokio::time::timeout(FIRST_SESSION_MAX, self.0.wait_for(Option::is_some)).await.map(drop);
        let endpoint = self.0.borrow_and_update().clone().ok_or(Error::NoSession)?;
        Ok(endpoint.connect().await?)
    }
}
