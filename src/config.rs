//! The configuration: every key with its default and its limits.
//!
//! ```text
//! YAML file ──┐
//! environment ┼─▶ Reader ──▶ Config      (typed, validated, used by the program)
//! flags ──────┘        └───▶ Effective   (the same as YAML, with the origin of every value)
//! ```
//!
//! A later source wins over an earlier one, key by key. The `read` functions below name each key once, in the order of
//! the document. All other keys in a source are errors. Reading never stops at the first error, so an operator gets the
//! whole list at once.
//!
//! Invariants:
//! - A `Config` that exists is valid: no other module checks these values again.
//! - The value of a secret key is in no error message, and in no `Debug` or `Display` output.
//!
//! This module does not check whether files exist, whether the server is reachable, or whether the database URI is
//! valid. The modules that use these values do.

mod authn;
mod choice;
mod command_line;
mod database_uri;
mod effective;
mod environment;
mod error;
mod host;
mod origin;
mod parse;
mod quantity;
mod reader;
mod spelling;
mod yaml_file;

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(crate) use authn::{Authn, Credentials, Exempt, Oidc, PresharedKey, SecureUrl};
pub(crate) use choice::{Failover, LogFormat, LogLevel, OnUndecodable, Preset, SnapTokenFormat};
pub(crate) use database_uri::DatabaseUri;
pub(crate) use effective::Effective;
pub(crate) use environment::from_env;
pub use error::Error;
pub(crate) use host::Host;
pub(crate) use quantity::ByteSize;
pub(crate) use spelling::nearest;

use crate::model::diagnostic::CommandLine;
use error::Problem;
use parse::{
    boolean, choice, database_uri, duration, host, list, optional_path, origin, path, publication, schema, size, slot,
    whole,
};
use reader::Reader;

/// The schema of Permify's tables, unless its connection sets another `search_path`.
const DEFAULT_SCHEMA: &str = "public";
const MINUTE_SECS: u64 = 60;
const DAY_SECS: u64 = 24 * 60 * MINUTE_SECS;

/// The validated configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Section `server`.
    pub server: Server,
    pub(crate) logger: Logger,
    pub(crate) authn: Authn,
    pub(crate) service: Service,
    pub(crate) database: Database,
    pub(crate) replication: Replication,
    pub(crate) mapping: Mapping,
    pub(crate) snap_token: SnapToken,
    pub(crate) changelog: Changelog,
    /// Section `shutdown`.
    pub shutdown: Shutdown,
    effective: Effective,
    commands: CommandLine,
}

/// The listeners.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// The address that every listener binds to.
    pub(crate) host: Host,
    /// Requests a second that all listeners together accept; `None` sets no limit.
    pub(crate) rate_limit: Option<NonZeroU32>,
    /// The gRPC listener.
    pub grpc: Grpc,
    /// The HTTP gateway; `None` if it is switched off.
    pub http: Option<Http>,
}

/// The gRPC listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grpc {
    /// 0 lets the system choose a free port.
    pub port: u16,
    /// `None` serves plain text.
    pub(crate) tls: Option<Tls>,
}

/// The HTTP gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Http {
    /// 0 lets the system choose a free port.
    pub port: u16,
    /// `None` serves plain text.
    pub(crate) tls: Option<Tls>,
    /// Origins whose pages may call the gateway: `scheme://host[:port]`, or `*` for all.
    pub(crate) cors_allowed_origins: Vec<String>,
    /// The longest body of a request.
    pub(crate) body_size_max: ByteSize,
    /// `/readyz` answers 503 from this lag behind the server on. At zero, `/readyz` ignores the lag.
    pub(crate) ready_lag_max: Duration,
}

/// PEM files of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tls {
    /// The certificate chain of the server.
    pub(crate) cert: PathBuf,
    /// Its private key.
    pub(crate) key: PathBuf,
    /// When set, clients must present a certificate that this authority signed.
    pub(crate) client_ca: Option<PathBuf>,
}

/// The log lines on standard error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Logger {
    /// The least severe event that is logged.
    pub(crate) level: LogLevel,
    /// The format of a log line.
    pub(crate) format: LogFormat,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Service {
    pub(crate) watch: Watch,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Watch {
    /// If false, Watch answers UNIMPLEMENTED.
    pub(crate) enabled: bool,
    /// Release a change before a new snapshot in PostgreSQL can see it.
    pub(crate) before_visible: bool,
    /// The largest message. A larger transaction comes in several messages; a single change is never split.
    pub(crate) message_size_max: ByteSize,
    /// The longest wait for the transaction of a transaction token to end.
    pub(crate) resolve_timeout: Duration,
    /// The most streams that may be open in this process.
    pub(crate) subscribers_max: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Database {
    /// `None` if no source sets it: see [`Config::require_database_uri`].
    pub(crate) uri: Option<DatabaseUri>,
    /// The most SQL connections. The replication connection comes on top.
    pub(crate) max_connections: usize,
    /// The most tuples and attributes that one call may write.
    pub(crate) max_data_per_write: usize,
}

/// SQL connections that streaming needs: visibility, the session's checks, stream starts, and the slot monitor.
pub(crate) const STREAMING_CONNECTIONS: usize = 4;

impl Database {
    /// The part of `max_connections` that remains for Data and Tenancy.
    pub(crate) const fn connections_for_store(&self) -> usize {
        self.max_connections - STREAMING_CONNECTIONS
    }
}

/// The objects in PostgreSQL that feed this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Replication {
    /// The replication slot. Only this process may read it.
    pub(crate) slot: String,
    /// The publication that lists the watched tables.
    pub(crate) publication: String,
    /// Whether standbys may keep a copy of the slot, if PostgreSQL can.
    pub(crate) failover: Failover,
    /// How far the acknowledged position stays behind the durable one.
    pub(crate) acknowledgement_delay: AckDelay,
    /// The limits above which a warning about the slot is logged.
    pub(crate) warn: SlotWarnings,
}

/// Delays acknowledgements, so that PostgreSQL sends recent WAL again to a node that lost its change log. A position is
/// acknowledged once it is older than `age` or further back than `size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AckDelay {
    /// Zero delays nothing.
    pub(crate) age: Duration,
    /// In bytes of WAL, which includes writes to other databases of the cluster.
    pub(crate) size: ByteSize,
}

/// The limits above which a warning about the slot is logged; zero turns a warning off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SlotWarnings {
    /// Warn if the server keeps more WAL than this for the slot.
    pub(crate) retained_wal: ByteSize,
    /// Warn if less WAL than this may still be written before the slot is lost.
    pub(crate) safe_wal_size: ByteSize,
    /// Warn if the oldest WAL that is not acknowledged yet is older than this.
    pub(crate) lag: Duration,
}

/// The mapping of rows to changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) source: MappingSource,
    /// The schema of Permify's tables, for the preset `permify`. Other mappings name schemas themselves.
    pub(crate) schema: String,
    /// The treatment of a row that the mapping cannot turn into changes.
    pub(crate) on_undecodable: OnUndecodable,
}

/// The origin of the mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MappingSource {
    /// A mapping that ships with tuplewatch.
    Preset(Preset),
    /// A mapping file of the operator.
    File(PathBuf),
}

/// The snap tokens in messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SnapToken {
    pub(crate) format: SnapTokenFormat,
}

/// The change log on local disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Changelog {
    /// Its directory, relative to the working directory.
    pub(crate) path: PathBuf,
    /// The bounds on kept history.
    pub(crate) retention: Retention,
    /// If the disk has less free space than this, the oldest changes are dropped early.
    pub(crate) disk_reserve: ByteSize,
    /// The size of the recent messages kept in memory.
    pub(crate) memory_window: ByteSize,
}

/// The bounds on kept history. Changes beyond either bound are dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Retention {
    /// The age of a change, counted from its append to the log.
    pub(crate) age: Duration,
    /// The size on disk.
    pub(crate) size: ByteSize,
}

/// The end of the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shutdown {
    /// How long open streams may take to end after a stop signal.
    pub grace_period: Duration,
}

impl Config {
    /// Reads and validates all sources: `file`, then `env`, then `overrides` from flags. Later sources win.
    ///
    /// `env` may hold the whole environment; other names than those that begin with `TUPLEWATCH_` are ignored.
    /// `overrides` are pairs of a dotted key (`server.grpc.port`) and its text.
    ///
    /// # Errors
    ///
    /// One [`Error`] that lists every problem of all sources.
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

    /// The section `logger` alone, even if the rest of the configuration is wrong: errors in the configuration are
    /// logged in this format.
    pub(crate) fn logger(
        file: Option<&Path>,
        env: impl IntoIterator<Item = (String, String)>,
        overrides: &[(String, String)],
    ) -> Logger {
        Logger::read(&mut Reader::new(file, env, overrides))
    }

    /// The database URI, for the subcommands that need it.
    ///
    /// # Errors
    ///
    /// No source sets the URI. The message lists the places to set it.
    pub(crate) fn require_database_uri(&self) -> Result<&DatabaseUri, Error> {
        self.database.uri.as_ref().ok_or_else(|| Problem::Missing { key: "database.uri" }.into())
    }

    /// Writes commands with the flags of this process, for messages that recommend another command.
    pub(crate) fn commands(&self) -> &CommandLine {
        &self.commands
    }

    /// The configuration as YAML with the origin of every value. It loads again, except for the redacted secrets.
    pub(crate) fn effective(&self) -> &Effective {
        &self.effective
    }
}

impl Server {
    fn read(read: &mut Reader) -> Self {
        Self {
            host: read.get("server.host", Host::any_ipv4(), host),
            // Far above the needs of a change feed: only a client that reconnects in a loop reaches this.
            rate_limit: NonZeroU32::new(read.get("server.rate_limit", 10_000, whole(0..=10_000_000))),
            grpc: Grpc {
                // The port of Permify, which its clients use.
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
            // The port of Permify's gateway.
            port: read.get("server.http.port", 3476, whole(0..=65_535)),
            tls: Tls::read(read, ["server.http.tls.enabled", "server.http.tls.cert", "server.http.tls.key"], None),
            cors_allowed_origins: read.get("server.http.cors_allowed_origins", Vec::new(), list(origin)),
            // The same as gRPC's limit. The whole body and its JSON tree are held in memory.
            body_size_max: read.get(
                "server.http.body_size_max",
                ByteSize::mib(4),
                size(ByteSize::kib(1)..=ByteSize::mib(64)),
            ),
            // Several times the interval at which the lag is measured (5 s), and no more than the probes of a platform
            // tolerate.
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
    /// Reads the section `tls` of a listener. Only some listeners can ask clients for a certificate.
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
                // gRPC clients refuse messages above 4 MiB by default. Below 1 KiB the token and the framing would
                // outweigh the changes in a message.
                message_size_max: read.get(
                    "service.watch.message_size_max",
                    ByteSize::mib(1),
                    size(ByteSize::kib(1)..=ByteSize::mib(4)),
                ),
                // Proxies on the way end a call that waits longer than some minutes.
                resolve_timeout: read.get(
                    "service.watch.resolve_timeout",
                    Duration::from_secs(10),
                    duration(Duration::ZERO..=Duration::from_secs(5 * MINUTE_SECS)),
                ),
                // A stream costs at most a file descriptor and some tens of KiB. More than a million do not fit into
                // one process.
                subscribers_max: read.get("service.watch.subscribers_max", 10_000, whole(1..=1_000_000)),
            },
        }
    }
}

impl Database {
    fn read(read: &mut Reader) -> Self {
        Self {
            uri: read.get("database.uri", None, database_uri),
            // At least one connection remains for Data and Tenancy. PostgreSQL itself allows 100 by default, and most
            // of them belong to the application.
            max_connections: read.get("database.max_connections", 12, whole(STREAMING_CONNECTIONS as u64 + 1..=64)),
            // Permify's default. A request of 4 MiB holds about 100,000 facts at most.
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
                // Off by default, because it keeps WAL on the primary, and the server sends that WAL again at each
                // reconnect.
                age: read.get(
                    "replication.acknowledgement_delay.age",
                    Duration::ZERO,
                    duration(Duration::ZERO..=Duration::from_secs(DAY_SECS)),
                ),
                // During a reconnect the log's index of this WAL is held in memory, at most 16 bytes for each
                // transaction.
                size: read.get(
                    "replication.acknowledgement_delay.size",
                    ByteSize::gib(1),
                    size(ByteSize::mib(1)..=ByteSize::gib(64)),
                ),
            },
            warn: SlotWarnings {
                // Far above the WAL that a checkpoint keeps anyway, far below the size of a disk.
                retained_wal: read.get(
                    "replication.warn.retained_wal",
                    ByteSize::gib(1),
                    size(ByteSize::bytes(0)..=ByteSize::gib(1024 * 1024)),
                ),
                // The WAL of some minutes on a busy server.
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
                "only the preset permify takes a schema: the tables of the preset tuples are in schema tuplewatch, and a \
                 mapping file names its schemas itself",
            );
        }
        let source = match file {
            None => MappingSource::Preset(preset),
            Some(file) => {
                if read.is_explicit("mapping.preset") {
                    read.refuse(&["mapping.preset", "mapping.file"], "set one of the two, not both");
                }
                // The printed configuration would contradict itself if it had the default beside the file.
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
        // More than any local disk has. The bound keeps sums of sizes far from overflow.
        let disk_size_max = ByteSize::gib(1024 * 1024);
        Self {
            path: read.get("changelog.path", PathBuf::from("./tuplewatch-data"), path),
            retention: Retention {
                // A consumer that fails in a Friday evening's deployment can be repaired on Saturday. Less than a
                // minute would be shorter than an ordinary reconnect.
                age: read.get(
                    "changelog.retention.age",
                    Duration::from_secs(DAY_SECS),
                    duration(Duration::from_secs(MINUTE_SECS)..=Duration::from_secs(365 * DAY_SECS)),
                ),
                // Retention drops whole segments, so a few of them must fit.
                size: read.get("changelog.retention.size", ByteSize::gib(10), size(ByteSize::mib(64)..=disk_size_max)),
            },
            // Without a reserve the disk could fill up between two checks.
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
            // Container platforms kill a process after 30 s by default. This leaves time for the last fsync.
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
