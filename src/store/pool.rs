//! The store's connection pool: a bounded number of connections to the session's primary.

use super::{Error, Unreachable};
use crate::postgres::connection::Connection;
use crate::postgres::primary::{self, PrimaryConnector};
use deadpool::managed::{self, Metrics, Object, PoolError, RecycleError, RecycleResult, TimeoutType};
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio_postgres::Client;

/// The longest wait for a free connection.
const WAIT_MAX: Duration = Duration::from_secs(10);
/// The longest wait for the answer of an idle connection that is checked.
const WELL_MAX: Duration = Duration::from_secs(2);
/// The statement timeout, which includes waits for locks.
pub(super) const STATEMENT_MAX: Duration = Duration::from_secs(30);
/// The longest wait for a lock. After that the call returns its connection and tries again. Otherwise a few calls for
/// one tenant, which is being deleted, would occupy all connections.
const LOCK_MAX: Duration = Duration::from_secs(1);

/// The pool. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Pool(managed::Pool<Opener>);

impl Pool {
    /// Creates the pool. Its connections belong to the current runtime.
    pub(super) fn new(connector: PrimaryConnector, connections_max: usize) -> Self {
        let session = connector.clone();
        let opener = Opener { connector, runtime: Handle::current(), logged: Mutex::default() };
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

/// Closes idle connections while PostgreSQL refuses the session a connection.
async fn give_way(pool: managed::WeakPool<Opener>, mut session: PrimaryConnector) {
    loop {
        session.session_refused().await;
        let Some(pool) = pool.upgrade() else { return };
        pool.retain(|_, _| false);
        drop(pool);
        session.session_accepted().await;
    }
}

/// A connection for one call. Dropping it returns it to the pool.
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
    connector: PrimaryConnector,
    /// The runtime of the connections. They outlive the runtime of the call that opens them.
    runtime: Handle,
    /// The reason that the log has why there are no connections; empty while there are some.
    logged: Mutex<String>,
}

impl Opener {
    /// Logs each reason in full, once. Callers get it without hosts and roles.
    fn log(&self, error: &primary::Error) {
        let reason = error.in_full().to_string();
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if !matches!(error, primary::Error::NoSession) && *logged != reason {
            tracing::warn!("Data and Tenancy have no connection to PostgreSQL: {reason}");
            *logged = reason;
        }
    }
}

#[derive(Debug)]
struct Open {
    connection: Connection,
    /// The connector's state when the connection was opened.
    connector: PrimaryConnector,
}

impl managed::Manager for Opener {
    type Type = Open;
    type Error = Error;

    /// The connect timeout of the URI limits this.
    async fn create(&self) -> Result<Open, Error> {
        let mut connector = self.connector.clone();
        // Dropped together with this call if its caller gives up.
        let mut connecting = JoinSet::new();
        connecting.spawn_on(async move { (connector.connect().await, connector) }, &self.runtime);
        let Some(Ok((connection, connector))) = connecting.join_next().await else {
            return Err(Error::Unreachable(Unreachable::Stopping));
        };
        let connection = connection.inspect_err(|error| self.log(error))?;
        self.logged.lock().unwrap_or_else(PoisonError::into_inner).clear();
        // Triggers of these tables use the schema public, as for other writers.
        let set = format!(
            "SET search_path = \"$user\", public; SET statement_timeout = '{}s'; SET lock_timeout = '{}s'",
            STATEMENT_MAX.as_secs(),
            LOCK_MAX.as_secs()
        );
        connection.client.batch_execute(&set).await?;
        // A statement of a caller that has gone away ends soon. Servers on some systems do not support this setting.
        let _ = connection.client.batch_execute("SET client_connection_check_interval = '1s'").await;
        Ok(Open { connection, connector })
    }

    /// Costs a round trip. So no call gets a connection that has died silently, or that still runs the statement of a
    /// caller that has gone away.
    async fn recycle(&self, open: &mut Open, _: &Metrics) -> RecycleResult<Error> {
        if open.connector.has_moved() {
            return Err(RecycleError::message("the session has found another primary"));
        }
        open.connection.client.batch_execute("").await.map_err(|error| RecycleError::Backend(error.into()))
    }
}
