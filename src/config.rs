//! What an operator can set: every key, its default and its limits.
//!
//! ```text
//! YAML file ──┐
//! environment ┼─▶ Reader ──▶ Config      (typed, validated, what the program works with)
//! flags ──────┘        └───▶ Effective   (the same as YAML, with the origin of every value)
//! ```
//!
//! A later source wins over an earlier one, key by key. The `read` functions below name each key once, in the order of
//! the document; whatever a source holds beyond those keys is an unknown key. Reading never stops at the first error: an
//! operator who sets up a new node gets the whole list in one go.
//!
//! Invariants:
//! - A `Config` that exists is valid: no other module checks these values again.
//! - The value of a secret key is in no error message, and in no `Debug` or `Display` output.
//!
//! Left out on purpose: whether files exist, whether the server is reachable, and what is inside the database URI. Those
//! belong to the modules that use them.

mod authn;
mod choice;
mod command_line;
mod database_uri;
mod document;
mod effective;
mod environment;
mod error;
mod given;
mod host;
mod origin;
mod quantity;
mod reader;
mod spelling;

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use authn::{Authn, Credentials, Exempt, Oidc, PresharedKey, SecureUrl};
pub use choice::{AuthnMethod, Failover, LogFormat, LogLevel, OnUndecodable, Preset, SnapTokenFormat};
pub use database_uri::DatabaseUri;
pub use effective::Effective;
pub use environment::from_env;
pub use error::Error;
pub use host::Host;
pub use quantity::ByteSize;
pub use spelling::nearest;

use crate::model::diagnostic::CommandLine;
use error::Problem;
use given::{
    boolean, choice, database_uri, duration, host, list, optional_path, origin, path, publication, schema, size, slot,
    whole,
};
use reader::Reader;

/// Where Permify creates its tables, unless its connection has another search_path.
const DEFAULT_SCHEMA: &str = "public";
const MINUTE_SECS: u64 = 60;
const DAY_SECS: u64 = 24 * 60 * MINUTE_SECS;

/// The validated configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Section `server`.
    pub server: Server,
    /// Section `logger`.
    pub logger: Logger,
    /// Section `authn`.
    pub authn: Authn,
    /// Section `service`.
    pub service: Service,
    /// Section `database`.
    pub database: Database,
    /// Section `replication`.
    pub replication: Replication,
    /// Section `mapping`.
    pub mapping: Mapping,
    /// Section `snap_token`.
    pub snap_token: SnapToken,
    /// Section `changelog`.
    pub changelog: Changelog,
    /// Section `shutdown`.
    pub shutdown: Shutdown,
    effective: Effective,
    commands: CommandLine,
}

/// Where requests are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// The address that every listener binds to.
    pub host: Host,
    /// Requests that all listeners together take in a second; `None` sets no limit.
    pub rate_limit: Option<NonZeroU32>,
    /// The gRPC listener.
    pub grpc: Grpc,
    /// The HTTP gateway; `None` where it is switched off.
    pub http: Option<Http>,
}

/// The gRPC listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grpc {
    /// 0 lets the system choose a free port.
    pub port: u16,
    /// `None` serves plain text.
    pub tls: Option<Tls>,
}

/// The HTTP gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Http {
    /// 0 lets the system choose a free port.
    pub port: u16,
    /// `None` serves plain text.
    pub tls: Option<Tls>,
    /// Origins whose pages may call it: `scheme://host[:port]`, or `*` for all.
    pub cors_allowed_origins: Vec<String>,
    /// Longest body of a request.
    pub body_size_max: ByteSize,
    /// `/readyz` says no from this lag behind the server on; zero only asks whether changes are delivered.
    pub ready_lag_max: Duration,
}

/// PEM files of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// The certificate chain of the server.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// When set, clients must present a certificate that this authority signed.
    pub client_ca: Option<PathBuf>,
}

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logger {
    /// The least severe event that is logged.
    pub level: LogLevel,
    /// How a line looks.
    pub format: LogFormat,
}

/// The services that are offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// The Watch service.
    pub watch: Watch,
}

/// The Watch service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watch {
    /// Switched off, it answers UNIMPLEMENTED.
    pub enabled: bool,
    /// Release a change before a new snapshot in Postgres can see it.
    pub before_visible: bool,
    /// A transaction is split so that no message is longer than this, as long as each change fits.
    pub message_size_max: ByteSize,
    /// How long a transaction token may wait for its transaction to end.
    pub resolve_timeout: Duration,
    /// Open streams in this process.
    pub subscribers_max: u32,
}

/// How Postgres is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Database {
    /// `None` where nothing was given: see [`Config::require_database_uri`].
    pub uri: Option<DatabaseUri>,
    /// SQL connections; the replication connection comes on top.
    pub max_connections: usize,
    /// Tuples and attributes that one call may write.
    pub max_data_per_write: usize,
}

/// SQL connections that streaming takes: visibility, the session's checks, starts, and the slot's monitor.
pub const STREAMING_CONNECTIONS: usize = 4;

impl Database {
    /// What is left of `max_connections` for Data and Tenancy.
    pub const fn connections_for_store(&self) -> usize {
        self.max_connections - STREAMING_CONNECTIONS
    }
}

/// Names of the objects in Postgres that feed this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replication {
    /// The slot that is read; the only reader must be this process.
    pub slot: String,
    /// The publication that says which tables are read.
    pub publication: String,
    /// Whether the slot is one that standbys keep a copy of, where PostgreSQL can.
    pub failover: Failover,
    /// What is on disk here, and the slot is not told of yet.
    pub acknowledgement_delay: AckDelay,
    /// When a warning about the slot is logged.
    pub warn: SlotWarnings,
}

/// What PostgreSQL keeps for a node that may lose its change log: the slot is told only what is older than `age`, or further back
/// than `size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AckDelay {
    /// Zero holds nothing back.
    pub age: Duration,
    /// In WAL, of whatever is written to the cluster.
    pub size: ByteSize,
}

/// From where on the slot is worth a warning; zero turns one off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotWarnings {
    /// The server keeps more WAL than this for the slot.
    pub retained_wal: ByteSize,
    /// Less than this may still be written before the slot is lost.
    pub safe_wal_size: ByteSize,
    /// The slot is where the server was longer ago than this.
    pub lag: Duration,
}

/// How rows become changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The mapping itself.
    pub source: MappingSource,
    /// Where the tables of the preset `permify` are. Other mappings name schemas themselves.
    pub schema: String,
    /// What happens to a row that it cannot turn into changes.
    pub on_undecodable: OnUndecodable,
}

/// Where the mapping itself comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MappingSource {
    /// One that ships with tuplewatch.
    Preset(Preset),
    /// The operator's own.
    File(PathBuf),
}

/// The snap tokens that are handed out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapToken {
    /// Their form.
    pub format: SnapTokenFormat,
}

/// The change log on local disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changelog {
    /// Its directory; relative to the working directory.
    pub path: PathBuf,
    /// How long changes are kept.
    pub retention: Retention,
    /// Free space on the disk below which the oldest changes go before their time.
    pub disk_reserve: ByteSize,
    /// Recent changes that are kept in memory.
    pub memory_window: ByteSize,
}

/// How long changes are kept: until either bound is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Counted from when a change was appended.
    pub age: Duration,
    /// On disk.
    pub size: ByteSize,
}

/// How the process ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shutdown {
    /// How long open streams may take to end after a stop was asked for.
    pub grace_period: Duration,
}

impl Config {
    /// Reads and validates all sources: `file`, then `env`, then `overrides` from flags, the later ones winning.
    ///
    /// `env` may hold the whole environment: only names that begin with `TUPLEWATCH_` are looked at. `overrides` are
    /// pairs of a dotted key (`server.grpc.port`) and its text.
    ///
    /// # Errors
    ///
    /// One [`Error`] with everything that is wrong in any of the sources.
    pub fn load(
        file: Option<&Path>,
        env: impl IntoIterator<Item = (String, String)>,
        overrides: &[(String, String)],
    ) -> Result<Self, Error> {
        let mut read = Reader::new(file, env, overrides);
        let server = Server::read(&mut read);
        let logger = Logger::read(&mut read);
        let authn = Authn::read(&mut read);
        let service = Service::read(&mut read);
        let database = Database::read(&mut read);
        let replication = Replication::read(&mut read);
        let mapping = Mapping::read(&mut read);
        let snap_token = SnapToken::read(&mut read);
        let changelog = Changelog::read(&mut read);
        let shutdown = Shutdown::read(&mut read);
        if changelog.memory_window < service.watch.message_size_max {
            read.refuse(
                &["changelog.memory_window", "service.watch.message_size_max"],
                "the window must hold at least one message of the largest size",
            );
        }
        Ok(Self {
            server,
            logger,
            authn,
            service,
            database,
            replication,
            mapping,
            snap_token,
            changelog,
            shutdown,
            effective: read.finish()?,
            commands: command_line::of(file, overrides),
        })
    }

    /// What the sources say of the log, whatever else is wrong with them: so that what is wrong can be said as they ask for.
    pub fn logger(
        file: Option<&Path>,
        env: impl IntoIterator<Item = (String, String)>,
        overrides: &[(String, String)],
    ) -> Logger {
        Logger::read(&mut Reader::new(file, env, overrides))
    }

    /// The database URI, for the subcommands that cannot do without.
    ///
    /// # Errors
    ///
    /// Says where it can be set.
    pub fn require_database_uri(&self) -> Result<&DatabaseUri, Error> {
        self.database.uri.as_ref().ok_or_else(|| Problem::Missing { key: "database.uri" }.into())
    }

    /// How a message writes another command for the same configuration.
    pub fn commands(&self) -> &CommandLine {
        &self.commands
    }

    /// The configuration as YAML with the origin of every value; it loads again, but for the redacted secrets.
    pub fn effective(&self) -> &Effective {
        &self.effective
    }
}

impl Server {
    fn read(read: &mut Reader) -> Self {
        Self {
            host: read.get("server.host", Host::any_ipv4(), host),
            // Far above what clients of a feed ask for: only a client that reconnects in a loop comes here.
            rate_limit: NonZeroU32::new(read.get("server.rate_limit", 10_000, whole(0..=10_000_000))),
            grpc: Grpc {
                // The port that Permify's clients know.
                port: read.get("server.grpc.port", 3478, whole(0..=65_535)),
                tls: Tls::read(
                    read,
                    ["server.grpc.tls.enabled", "server.grpc.tls.cert", "server.grpc.tls.key"],
                    Some("server.grpc.tls.client_ca"),
                ),
            },
            http: Http::read(read),
        }
    }
}

impl Http {
    fn read(read: &mut Reader) -> Option<Self> {
        let enabled = read.get("server.http.enabled", true, boolean);
        let http = Self {
            // The port that Permify's clients know.
            port: read.get("server.http.port", 3476, whole(0..=65_535)),
            tls: Tls::read(read, ["server.http.tls.enabled", "server.http.tls.cert", "server.http.tls.key"], None),
            cors_allowed_origins: read.get("server.http.cors_allowed_origins", Vec::new(), list(origin)),
            // As much as gRPC takes. A body is held in memory as a whole, and its JSON tree with it.
            body_size_max: read.get(
                "server.http.body_size_max",
                ByteSize::mib(4),
                size(ByteSize::kib(1)..=ByteSize::mib(64)),
            ),
            // Several times what finds a lag (5 s), and as old as a platform's probes tolerate.
            ready_lag_max: read.get(
                "server.http.ready_lag_max",
                Duration::from_secs(30),
                duration(Duration::ZERO..=Duration::from_secs(DAY_SECS)),
            ),
        };
        enabled.then_some(http)
    }
}

impl Tls {
    /// Whoever listens takes a certificate and a key, and only some also ask for one of the client.
    fn read(
        read: &mut Reader,
        [enabled_key, cert_key, key_key]: [&'static str; 3],
        client_ca_key: Option<&'static str>,
    ) -> Option<Self> {
        let enabled = read.get(enabled_key, false, boolean);
        let cert = read.get(cert_key, None, optional_path);
        let key = read.get(key_key, None, optional_path);
        let client_ca = client_ca_key.and_then(|client_ca_key| read.get(client_ca_key, None, optional_path));
        if !enabled {
            return None;
        }
        for (path, name) in [(&cert, cert_key), (&key, key_key)] {
            if path.is_none() {
                read.refuse(&[enabled_key, name], "TLS needs this file when it is enabled");
            }
        }
        Some(Self { cert: cert?, key: key?, client_ca })
    }
}

impl Logger {
    fn read(read: &mut Reader) -> Self {
        Self {
            level: read.get("logger.level", LogLevel::Info, choice),
            format: read.get("logger.format", LogFormat::Text, choice),
        }
    }
}

impl Service {
    fn read(read: &mut Reader) -> Self {
        Self {
            watch: Watch {
                enabled: read.get("service.watch.enabled", true, boolean),
                before_visible: read.get("service.watch.before_visible", false, boolean),
                // gRPC clients refuse messages above 4 MiB unless told otherwise. Below 1 KiB the token and the
                // framing of each message would outweigh the changes in it.
                message_size_max: read.get(
                    "service.watch.message_size_max",
                    ByteSize::mib(1),
                    size(ByteSize::kib(1)..=ByteSize::mib(4)),
                ),
                // A call that waits longer than some minutes is cut by the proxies on its way.
                resolve_timeout: read.get(
                    "service.watch.resolve_timeout",
                    Duration::from_secs(10),
                    duration(Duration::ZERO..=Duration::from_secs(5 * MINUTE_SECS)),
                ),
                // Each stream costs a file descriptor at most and some tens of KiB: a million is where one process
                // stops making sense.
                subscribers_max: read.get("service.watch.subscribers_max", 10_000, whole(1..=1_000_000)),
            },
        }
    }
}

impl Database {
    fn read(read: &mut Reader) -> Self {
        Self {
            uri: read.get("database.uri", None, database_uri),
            // One at least is left for Data and Tenancy. Postgres itself allows 100 by default, and they belong to the
            // application.
            max_connections: read.get("database.max_connections", 12, whole(STREAMING_CONNECTIONS as u64 + 1..=64)),
            // Permify's default; a request of 4 MiB holds at most some 100,000.
            max_data_per_write: read.get("database.max_data_per_write", 1_000, whole(1..=100_000)),
        }
    }
}

impl Replication {
    fn read(read: &mut Reader) -> Self {
        Self {
            slot: read.get("replication.slot", "tuplewatch".to_owned(), slot),
            publication: read.get("replication.publication", "tuplewatch".to_owned(), publication),
            failover: read.get("replication.failover", Failover::Auto, choice),
            acknowledgement_delay: AckDelay {
                // Off: it keeps WAL on the primary, and sends it again at each reconnect.
                age: read.get(
                    "replication.acknowledgement_delay.age",
                    Duration::ZERO,
                    duration(Duration::ZERO..=Duration::from_secs(DAY_SECS)),
                ),
                // At the most, what the log has of it (16 bytes a transaction) is held in memory while it comes again.
                size: read.get(
                    "replication.acknowledgement_delay.size",
                    ByteSize::gib(1),
                    size(ByteSize::mib(1)..=ByteSize::gib(64)),
                ),
            },
            warn: SlotWarnings {
                // Far above what a checkpoint keeps anyway, far below what fills a disk.
                retained_wal: read.get(
                    "replication.warn.retained_wal",
                    ByteSize::gib(1),
                    size(ByteSize::bytes(0)..=ByteSize::gib(1024 * 1024)),
                ),
                // Some minutes of a busy server.
                safe_wal_size: read.get(
                    "replication.warn.safe_wal_size",
                    ByteSize::mib(256),
                    size(ByteSize::bytes(0)..=ByteSize::gib(1024 * 1024)),
                ),
                lag: read.get(
                    "replication.warn.lag",
                    Duration::from_secs(MINUTE_SECS),
                    duration(Duration::ZERO..=Duration::from_secs(365 * DAY_SECS)),
                ),
            },
        }
    }
}

impl Mapping {
    fn read(read: &mut Reader) -> Self {
        let preset = read.get("mapping.preset", Preset::Tuples, choice);
        let schema = read.get("mapping.schema", DEFAULT_SCHEMA.to_owned(), schema);
        let file = read.get("mapping.file", None, optional_path);
        if schema != DEFAULT_SCHEMA && (preset != Preset::Permify || file.is_some()) {
            read.refuse(
                &["mapping.schema", if file.is_some() { "mapping.file" } else { "mapping.preset" }],
                "only the preset permify is told its schema: the tables of tuples are in schema tuplewatch, and a file names \
                 schemas itself",
            );
        }
        let source = match file {
            None => MappingSource::Preset(preset),
            Some(file) => {
                if read.is_explicit("mapping.preset") {
                    read.refuse(&["mapping.preset", "mapping.file"], "give one of the two, not both");
                }
                // Printed, the default would contradict the file.
                read.omit("mapping.preset");
                read.omit("mapping.schema");
                MappingSource::File(file)
            }
        };
        Self { source, schema, on_undecodable: read.get("mapping.on_undecodable", OnUndecodable::Gap, choice) }
    }
}

impl SnapToken {
    fn read(read: &mut Reader) -> Self {
        Self { format: read.get("snap_token.format", SnapTokenFormat::Auto, choice) }
    }
}

impl Changelog {
    fn read(read: &mut Reader) -> Self {
        // Beyond any local disk: it only keeps sums of sizes far from overflow.
        let disk_size_max = ByteSize::gib(1024 * 1024);
        Self {
            path: read.get("changelog.path", PathBuf::from("./tuplewatch-data"), path),
            retention: Retention {
                // A day lets a consumer fail on a Friday evening's deploy and be repaired on Saturday. Less than a
                // minute would be shorter than an ordinary reconnect.
                age: read.get(
                    "changelog.retention.age",
                    Duration::from_secs(DAY_SECS),
                    duration(Duration::from_secs(MINUTE_SECS)..=Duration::from_secs(365 * DAY_SECS)),
                ),
                // What is dropped is dropped in whole segments, so a few of them must fit.
                size: read.get("changelog.retention.size", ByteSize::gib(10), size(ByteSize::mib(64)..=disk_size_max)),
            },
            // Without any reserve the disk could fill up between two checks.
            disk_reserve: read.get("changelog.disk_reserve", ByteSize::gib(1), size(ByteSize::mib(16)..=disk_size_max)),
            memory_window: read.get(
                "changelog.memory_window",
                ByteSize::mib(64),
                size(ByteSize::mib(1)..=ByteSize::gib(64)),
            ),
        }
    }
}

impl Shutdown {
    fn read(read: &mut Reader) -> Self {
        Self {
            // Container platforms kill after 30 s by default: this leaves time for the last fsync.
            grace_period: read.get(
                "shutdown.grace_period",
                Duration::from_secs(10),
                duration(Duration::ZERO..=Duration::from_secs(10 * MINUTE_SECS)),
            ),
        }
    }
}

#[cfg(test)]
mod tests;
