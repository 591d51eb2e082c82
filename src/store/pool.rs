//! The store's connections: a bounded number, to the primary that the session reads from.

use super::{Error, Unreachable};
use crate::postgres::connection::Connection;
use crate::postgres::primary::{self, PrimaryConnector};
use deadpool::managed::{self, Metrics, Object, PoolError, RecycleError, RecycleResult, TimeoutType};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio_postgres::Client;

/// Longest wait for a connection that others use.
const WAIT_MAX: Duration = Duration::from_secs(10);
/// A connection that is asked whether it is well has this long to answer.
const WELL_MAX: Duration = Duration::from_secs(2);
/// PostgreSQL ends a statement of ours that takes longer, waits for locks included.
pub(super) const STATEMENT_MAX: Duration = Duration::from_secs(30);
/// Longest wait for a lock that somebody else has: then the call gives its connection back, and tries again. Else a few calls
/// for one tenant, which is being deleted, would hold all connections.
const LOCK_MAX: Duration = Duration::from_secs(1);

/// Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Pool(managed::Pool<Opener>);

impl Pool {
    /// Belongs to the runtime that this is called in.
    pub(super) fn new(primaries: PrimaryConnector, connections_max: usize) -> Self {
        let session = primaries.clone();
        let opener = Opener { primaries, runtime: Handle::current(), is_told: AtomicBool::new(false) };
        let builder = managed::Pool::builder(opener)
            .max_size(connections_max)
            .runtime(deadpool::Runtime::Tokio1)
            .wait_timeout(Some(WAIT_MAX))
            .recycle_timeout(Some(WELL_MAX));
        match builder.build() {
            Ok(pool) => {
                tokio::spawn(give_way(pool.weak(), session));
                Self(pool)
            }
            Err(error) => unreachable!("a pool with timeouts has a runtime for them: {error}"),
        }
    }

    pub(super) async fn get(&self) -> Result<Lease, Error> {
        self.0.get().await.map(Lease).map_err(|error| match error {
            PoolError::Timeout(TimeoutType::Wait) => Error::Busy,
            PoolError::Backend(error) => error,
            _ => Error::Unreachable(Unreachable::NoConnection),
        })
    }
}

/// Closes what is idle where PostgreSQL refuses the session a connection.
async fn give_way(pool: managed::WeakPool<Opener>, mut session: PrimaryConnector) {
    loop {
        session.session_refused().await;
        let Some(pool) = pool.upgrade() else { return };
        pool.retain(|_, _| false);
        drop(pool);
        session.session_accepted().await;
    }
}

/// A connection for one call. Dropped, it goes back.
pub(super) struct Lease(Object<Opener>);

impl Deref for Lease {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.0.connection.client
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.0.connection.client
    }
}

#[derive(Debug)]
struct Opener {
    primaries: PrimaryConnector,
    /// Connections live on it: that of whoever asks for one may end before those of others who use it later.
    runtime: Handle,
    /// Whether the log has the reason why there are no connections.
    is_told: AtomicBool,
}

impl Opener {
    /// Logs the reason in full, once. Callers get it without hosts and roles.
    fn tell(&self, error: &primary::Error) {
        if !matches!(error, primary::Error::NoSession) && !self.is_told.swap(true, Ordering::Relaxed) {
            tracing::warn!("Data and Tenancy have no connection to PostgreSQL: {}", error.in_full());
        }
    }
}

#[derive(Debug)]
struct Open {
    connection: Connection,
    /// As of when it was opened.
    primaries: PrimaryConnector,
}

impl managed::Manager for Opener {
    type Type = Open;
    type Error = Error;

    /// Bounded by the connect timeout of the URI.
    async fn create(&self) -> Result<Open, Error> {
        let mut primaries = self.primaries.clone();
        // Dropped with this call, where nobody waits for it any more.
        let mut connecting = JoinSet::new();
        connecting.spawn_on(async move { (primaries.connect().await, primaries) }, &self.runtime);
        let Some(Ok((connection, primaries))) = connecting.join_next().await else {
            return Err(Error::Unreachable(Unreachable::Stopping));
        };
        let connection = connection.inspect_err(|error| self.tell(error))?;
        self.is_told.store(false, Ordering::Relaxed);
        // Triggers of these tables find what is in the schema public, as they do for other writers.
        let set = format!(
            "SET search_path = \"$user\", public; SET statement_timeout = '{}s'; SET lock_timeout = '{}s'",
            STATEMENT_MAX.as_secs(),
            LOCK_MAX.as_secs()
        );
        connection.client.batch_execute(&set).await?;
        // What nobody waits for any more ends soon. Servers on some systems cannot do it.
        let _ = connection.client.batch_execute("SET client_connection_check_interval = '1s'").await;
        Ok(Open { connection, primaries })
    }

    /// Costs a round trip, so that nobody is given a connection that has died silently, or on which the statement of somebody
    /// who has gone away still runs.
    async fn recycle(&self, open: &mut Open, _: &Metrics) -> RecycleResult<Error> {
        if open.primaries.has_moved() {
            return Err(RecycleError::message("the session has found another primary"));
        }
        open.connection.client.batch_execute("").await.map_err(|error| RecycleError::Backend(error.into()))
    }
}
