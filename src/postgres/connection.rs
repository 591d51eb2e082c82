//! Connections to PostgreSQL according to `database.uri`.
//!
//! `database.uri` may contain everything that libpq understands. Two kinds of connections follow it: SQL through
//! tokio-postgres, and replication, whose messages pgwire-replication reads and writes. So the URI is parsed once, in
//! this module, and resolved once, to one address of one host. Both connections begin with a session that `logon` has
//! logged on:
//! ```text
//! "postgres://…"  ──parse──▶ Endpoints ──connect──▶ Connection (SQL) ──endpoint()──▶ Endpoint
//!  or "host=…"               every host             the first that is a primary      │
//!                                                   Walsender ◀──── replicate() ─────┘
//!
//! each session:  dial ──▶ wire (TLS: crate::trust) ──▶ peer (messages) ──▶ logon (password, pins) ──┬─▶ tokio-postgres
//!                                                                                                  └─▶ Walsender
//! ```
//!
//! # Invariants
//!
//! - Both connections go to the same *address*. A name is not enough, because it may stand for several servers.
//! - Both have the same TLS, password and settings, whatever the defaults of the role, the database and the server are:
//!   see `pins`.
//! - Neither goes to a standby, which [`Endpoint::connect`] checks, nor to an old primary while there is a newer one.
//! - No message and no `Debug` output contains the password.
//!
//! # Differences from libpq
//!
//! - `sslmode=prefer` uses TLS if the server offers it, and does not retry without TLS after a failure.
//! - A certificate of X.509 version 1 is refused, and a common name is not compared with an address.
//! - The default host is `localhost`, over TCP. Without `sslrootcert` and `~/.postgresql/root.crt`, certificates are
//!   verified against Mozilla's roots.
//! - A client certificate is used only if the URI names it. `~/.postgresql` is not searched for one.
//! - Every host is tried, even after one that refused the password; see [`ConnectError::is_definite`].

mod failure;
mod logon;
mod pace;
mod passfile;
mod password;
mod peer;
mod pins;
mod uri;
mod walsender;
mod wire;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream, lookup_host};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};

use failure::{Attempt, Failure};
use logon::{LogOn, LoggedOn};
use passfile::{Passfile, Wanted};
use password::Password;
use pins::Sessions;
use wire::{Tls, Wire};

pub(crate) use failure::{ConnectError, SqlError};
pub(crate) use failure::{SessionEnd, WalsenderError};
pub(crate) use uri::UriError;
pub(crate) use walsender::{Event, Walsender};

/// The application name of the connections of the node with this id, in `pg_stat_activity` and `pg_stat_replication`.
pub(crate) fn application_name(node_id: &str) -> String {
    format!("tuplewatch {node_id}")
}

/// The timeline that a primary writes, or NULL on a standby. The first eight digits of a WAL file's name are its
/// timeline.
const TIMELINE: &str = "SELECT CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN
    ('x' || pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int8 END";

/// The most hosts of one URI: a bound far above any cluster.
const HOSTS_MAX: usize = 16;
/// The most addresses of one name that are tried. Each may take a whole connect_timeout.
const ADDRESSES_MAX: usize = 8;

/// The contents of `database.uri`: the hosts in order, and the parameters of the log-on.
#[derive(Clone, Debug)]
pub struct Endpoints {
    hosts: Vec<Host>,
    user: String,
    /// The password of the URI or PGPASSWORD. Empty if the password file is used.
    password: Password,
    passfile: Option<Passfile>,
    database: String,
    tls: Tls,
    connect_timeout: Duration,
    application_name: Option<String>,
    options: Option<String>,
    keepalive: Keepalive,
    /// See [`Endpoints::prefer_timeline`]. Shared by all clones.
    timeline: Arc<AtomicU32>,
}

#[derive(Clone, Debug)]
struct Host {
    place: Place,
    port: u16,
}

#[derive(Clone, Debug)]
enum Place {
    /// If the URI contains only the address, it is also the name.
    Tcp { name: String, address: Option<IpAddr> },
    /// The directory of a Unix socket.
    Socket { dir: String },
}

/// The settings of TCP keepalive. (The replication connection detects a dead server sooner, by its own messages.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Keepalive {
    enabled: bool,
    idle: Duration,
    interval: Duration,
    retries: u32,
    /// TCP_USER_TIMEOUT, on systems that have it.
    user_timeout: Option<Duration>,
}

impl Default for Keepalive {
    /// These values detect a dead server within a minute: 30 s + 3 × 10 s. The systems' defaults need over two hours.
    fn default() -> Self {
        Self {
            enabled: true,
            idle: Duration::from_secs(30),
            interval: Duration::from_secs(10),
            retries: 3,
            user_timeout: None,
        }
    }
}

impl Endpoints {
    /// Parses `database.uri`. PGUSER, PGPASSWORD, PGPASSFILE and HOME supply missing parts.
    ///
    /// # Errors
    /// If a part cannot be understood or honoured. The error names the part, without its value.
    pub(crate) fn parse(uri: &str) -> Result<Self, UriError> {
        Self::parse_in(uri, &|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn parse_in(uri: &str, environment: uri::Environment<'_>) -> Result<Self, UriError> {
        uri::parse(uri, environment)
    }

    /// From now on, a primary on an older timeline is used only if there is no other. An old primary that a failover
    /// has replaced may still answer, and is not in recovery.
    pub(crate) fn prefer_timeline(&self, id: u32) {
        self.timeline.store(id, Ordering::Relaxed);
    }

    /// Connects to the first address that answers and is a primary. Each address has `connect_timeout` (10 s) from the
    /// first packet to the answer whether it is a primary.
    ///
    /// # Errors
    /// The failure at each address.
    pub(crate) async fn connect(&self, application_name: &str) -> Result<Connection, ConnectError> {
        let timeline = self.timeline.load(Ordering::Relaxed);
        let mut older = None;
        let mut attempts = Vec::new();
        for host in &self.hosts {
            let endpoints = match self.resolve(host, application_name).await {
                Ok(endpoints) => endpoints,
                Err(failure) => {
                    attempts.push(Attempt { endpoint: self.named(host), failure });
                    continue;
                }
            };
            for endpoint in endpoints {
                match endpoint.attempt().await {
                    Ok(primary) if primary.timeline >= timeline => return Ok(primary.connection),
                    Ok(primary) => older = older.or(Some(primary.connection)),
                    Err(failure) => attempts.push(Attempt { endpoint: endpoint.to_string(), failure }),
                }
            }
        }
        older.ok_or_else(|| ConnectError::new(attempts))
    }

    async fn resolve(&self, host: &Host, application_name: &str) -> Result<Vec<Endpoint>, Failure> {
        let targets: Vec<Target> = match &host.place {
            Place::Socket { dir } => vec![Target::Socket { dir: dir.clone() }],
            Place::Tcp { name, address: Some(address) } => {
                vec![Target::Tcp { name: name.clone(), address: SocketAddr::new(*address, host.port) }]
            }
            Place::Tcp { name, address: None } => {
                let found = tokio::time::timeout(self.connect_timeout, lookup_host((name.as_str(), host.port))).await;
                let found = found.map_err(|_| Failure::TimedOut(self.connect_timeout))?.map_err(Failure::Resolve)?;
                found.take(ADDRESSES_MAX).map(|address| Target::Tcp { name: name.clone(), address }).collect()
            }
        };
        let password = self.password_for(host).await;
        // Our name comes first, because it identifies our own sessions, and the server cuts names at 63 bytes.
        let application_name = match &self.application_name {
            Some(theirs) => format!("{application_name} {theirs}"),
            None => application_name.to_owned(),
        };
        Ok(targets
            .into_iter()
            .map(|target| Endpoint {
                target,
                port: host.port,
                user: self.user.clone(),
                password: password.clone(),
                database: self.database.clone(),
                tls: self.tls.clone(),
                connect_timeout: self.connect_timeout,
                application_name: application_name.clone(),
                options: self.options.clone(),
                keepalive: self.keepalive,
            })
            .collect())
    }

    async fn password_for(&self, host: &Host) -> Password {
        let (Some(passfile), true) = (&self.passfile, self.password.is_empty()) else {
            return self.password.clone();
        };
        let hosts: &[&str] = match &host.place {
            Place::Tcp { name, .. } => &[name],
            // For a socket of this name, libpq searches its own default directory, which differs between builds.
            Place::Socket { dir } if ["/tmp", "/run/postgresql", "/var/run/postgresql"].contains(&dir.as_str()) => {
                &[dir, "localhost"]
            }
            Place::Socket { dir } => &[dir],
        };
        let wanted = Wanted { hosts, port: host.port, database: &self.database, user: &self.user };
        passfile.password(wanted).await.unwrap_or_default()
    }

    fn named(&self, host: &Host) -> String {
        let (Place::Tcp { name, .. } | Place::Socket { dir: name }) = &host.place;
        format!("{} (database {}, user {})", with_port(name, host.port), self.database, self.user)
    }
}

impl fmt::Display for Endpoints {
    /// The hosts, the database and the user.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, host) in self.hosts.iter().enumerate() {
            let (Place::Tcp { name, .. } | Place::Socket { dir: name }) = &host.place;
            write!(f, "{}{}", if n == 0 { "" } else { "," }, with_port(name, host.port))?;
        }
        write!(f, " (database {}, user {})", self.database, self.user)
    }
}

/// One address, with the parameters of the log-on.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    target: Target,
    port: u16,
    user: String,
    password: Password,
    database: String,
    tls: Tls,
    connect_timeout: Duration,
    application_name: String,
    options: Option<String>,
    keepalive: Keepalive,
}

#[derive(Clone, Debug)]
enum Target {
    /// The name in the URI, for which the certificate must be valid.
    Tcp {
        name: String,
        address: SocketAddr,
    },
    Socket {
        dir: String,
    },
}

impl Endpoint {
    /// Opens another SQL connection to the same address.
    ///
    /// # Errors
    /// As [`Endpoints::connect`].
    pub(crate) async fn connect(&self) -> Result<Connection, ConnectError> {
        self.attempt().await.map(|primary| primary.connection).map_err(|failure| self.failed(failure))
    }

    /// Logs on for replication at the same address, with this application name.
    ///
    /// # Errors
    /// As [`Endpoints::connect`].
    pub(crate) async fn replicate(&self, application_name: &str) -> Result<Walsender, ConnectError> {
        let session = Box::pin(self.log_on(Sessions::Stream, application_name));
        let session = tokio::time::timeout(self.connect_timeout, session).await;
        let session = session.map_err(|_| Failure::TimedOut(self.connect_timeout)).flatten();
        session.map(LoggedOn::into_walsender).map_err(|failure| self.failed(failure))
    }

    /// A failure of the replication connection to this address.
    pub(crate) fn replication_error(&self, error: WalsenderError) -> ConnectError {
        self.failed(Failure::Replication(error))
    }

    /// An error of the SQL connection to this address.
    pub(crate) fn sql_error(&self, error: tokio_postgres::Error) -> ConnectError {
        self.failed(Failure::Sql(error.into()))
    }

    fn failed(&self, failure: Failure) -> ConnectError {
        ConnectError::new(vec![Attempt { endpoint: self.to_string(), failure }])
    }

    /// The application name of our sessions. `pg_stat_activity` shows 63 bytes of it.
    pub(crate) fn application_name(&self) -> &str {
        &self.application_name
    }

    async fn attempt(&self) -> Result<Primary, Failure> {
        // Boxed: a TLS handshake in progress is large.
        let attempt = Box::pin(async {
            let connection = self.start(self.log_on(Sessions::Sql, &self.application_name).await?).await?;
            let row = connection.client.query_typed_one(TIMELINE, &[]).await;
            let timeline: Option<i64> =
                row.and_then(|row| row.try_get(0)).map_err(|error| Failure::Sql(error.into()))?;
            let timeline = timeline.ok_or(Failure::InRecovery)?;
            Ok(Primary { connection, timeline: u32::try_from(timeline).unwrap_or_default() })
        });
        let timed_out = |_| Failure::TimedOut(self.connect_timeout);
        tokio::time::timeout(self.connect_timeout, attempt).await.map_err(timed_out)?
    }

    async fn log_on(&self, sessions: Sessions, application_name: &str) -> Result<LoggedOn, Failure> {
        let log_on = LogOn {
            user: &self.user,
            password: &self.password,
            database: &self.database,
            application_name,
            options: self.options.as_deref(),
            sessions,
        };
        log_on.log_on(self.dial(sessions).await?).await
    }

    async fn dial(&self, sessions: Sessions) -> Result<Wire, Failure> {
        match &self.target {
            Target::Socket { dir } => {
                let path = Path::new(dir).join(format!(".s.PGSQL.{}", self.port));
                Ok(Box::new(UnixStream::connect(path).await.map_err(Failure::Dial)?))
            }
            Target::Tcp { name, address } => {
                let stream = match sessions {
                    Sessions::Stream => pace::connect(*address).await,
                    _ => TcpStream::connect(address).await,
                };
                let stream = stream.map_err(Failure::Dial)?;
                stream.set_nodelay(true).and_then(|()| self.keepalive.set(&stream)).map_err(Failure::Dial)?;
                Ok(wire::upgrade(stream, &self.tls, name).await?)
            }
        }
    }

    async fn start(&self, session: LoggedOn) -> Result<Connection, Failure> {
        let mut config = tokio_postgres::Config::new();
        // The driver's startup message is dropped, because the session is already logged on.
        config.user(&self.user).ssl_mode(tokio_postgres::config::SslMode::Disable);
        let (client, driver) =
            config.connect_raw(session.disguised(), NoTls).await.map_err(|error| Failure::Sql(error.into()))?;
        let endpoint = self.to_string();
        let (ending, ended) = watch::channel(None);
        let driver = tokio::spawn(async move {
            let end = match driver.await {
                Ok(()) => SessionEnd::Closed,
                Err(error) => SessionEnd::Failed(Arc::new(error.into())),
            };
            // Every user of the client receives an error too, and handles it.
            tracing::debug!(%endpoint, %end, "an SQL connection ended");
            ending.send_replace(Some(end));
        });
        Ok(Connection { client, endpoint: self.clone(), driver, ended })
    }
}

impl fmt::Display for Endpoint {
    /// `db1:5432 [10.0.0.1] (database app, user ada)`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Socket { dir } => f.write_str(&with_port(dir, self.port))?,
            Target::Tcp { name, address } => {
                f.write_str(&with_port(name, self.port))?;
                if *name != address.ip().to_string() {
                    write!(f, " [{}]", address.ip())?;
                }
            }
        }
        write!(f, " (database {}, user {})", self.database, self.user)
    }
}

fn with_port(host: &str, port: u16) -> String {
    if host.parse::<std::net::Ipv6Addr>().is_ok() { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

impl Keepalive {
    fn set(&self, stream: &TcpStream) -> std::io::Result<()> {
        let socket = socket2::SockRef::from(stream);
        if self.enabled {
            let keepalive = socket2::TcpKeepalive::new().with_time(self.idle).with_interval(self.interval);
            socket.set_tcp_keepalive(&keepalive.with_retries(self.retries))?;
        }
        #[cfg(target_os = "linux")]
        socket.set_tcp_user_timeout(self.user_timeout)?;
        Ok(())
    }
}

/// A primary, found at an address.
struct Primary {
    connection: Connection,
    timeline: u32,
}

/// An SQL connection to a primary. Dropping it closes it.
#[derive(Debug)]
pub(crate) struct Connection {
    /// Runs statements, many concurrently.
    pub(crate) client: Client,
    endpoint: Endpoint,
    /// Transfers the bytes. It is aborted with this connection, because a statement that is kept would otherwise keep
    /// it alive.
    driver: JoinHandle<()>,
    /// The reason why the connection has ended. The driver drops the sender.
    ended: watch::Receiver<Option<SessionEnd>>,
}

impl Connection {
    /// The address and the user of this connection.
    pub(crate) const fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Whether the connection has ended. Keepalive detects a dead server within a minute.
    pub(crate) fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Completes with the reason when the connection has ended.
    pub(crate) fn closed(&self) -> impl Future<Output = SessionEnd> + Send + 'static {
        let mut ended = self.ended.clone();
        async move {
            let end = ended.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
            end.unwrap_or(SessionEnd::GivenUp)
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

#[cfg(test)]
mod tests;
