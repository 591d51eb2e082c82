//! A private cluster that is removed with the test.

use super::sql::Sql;
use pgwire_replication::{Lsn, ReplicationClient, ReplicationConfig};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tuplewatch::dev_postgres::{Cluster, ClusterOptions, Installation, StopMode};

pub(crate) struct Postgres {
    // Stops when dropped, and so before its directory goes.
    cluster: Cluster,
    settings: Vec<(String, String)>,
    _directory: Directory,
}

/// Not a `TempDir`: as root PostgreSQL runs as another user, who could not enter one.
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Settings beyond the defaults of the cluster. The tests crash PostgreSQL and not the machine, so nothing is lost without fsync, and
/// commits follow each other faster.
const SETTINGS: [(&str, &str); 8] = [
    ("fsync", "off"),
    ("shared_buffers", "64MB"),
    ("deadlock_timeout", "50ms"),
    ("max_connections", "100"),
    ("max_wal_size", "2GB"),
    ("max_slot_wal_keep_size", "-1"),
    ("autovacuum", "off"),
    ("log_min_messages", "fatal"),
];

/// The major version that the tests run against.
pub(crate) fn major() -> u32 {
    Postgres::installed().major()
}

impl Postgres {
    pub(crate) async fn start() -> Self {
        Self::with(&[]).await
    }

    /// With further settings.
    pub(crate) async fn with(settings: &[(&str, &str)]) -> Self {
        Self::of(Self::installed(), settings).await
    }

    /// At least this major version, for a feature that came with it: the version of the other tests if it is new enough, or one that is
    /// fetched once.
    pub(crate) async fn since(major: u32, settings: &[(&str, &str)]) -> Self {
        let installed = Self::installed();
        let installation = if installed.major() >= major { installed } else { Self::fetched(major).await };
        Self::of(installation, settings).await
    }

    fn installed() -> Installation {
        // Its error says what to install.
        Installation::find(None).unwrap_or_else(|error| panic!("{error}"))
    }

    async fn fetched(major: u32) -> Installation {
        let fetch = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/postgres/fetch");
        let fetched = tokio::process::Command::new(fetch).arg(major.to_string()).output().await.unwrap();
        let printed = String::from_utf8_lossy(&fetched.stderr);
        assert!(fetched.status.success(), "PostgreSQL {major} cannot be fetched: {printed}");
        let bin = PathBuf::from(String::from_utf8(fetched.stdout).unwrap().trim());
        Installation::find(Some(&bin)).unwrap_or_else(|error| panic!("{error}"))
    }

    async fn of(installation: Installation, settings: &[(&str, &str)]) -> Self {
        let directory = Directory(std::env::temp_dir().join(Self::new_name()));
        let settings: Vec<_> =
            SETTINGS.iter().chain(settings).map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let mut postgres = Self::open(directory, installation, &settings).await;
        postgres.start_again().await;
        postgres
    }

    /// With the durability of a production server, for benchmarks, and with further settings.
    #[allow(dead_code, reason = "for the benchmarks")]
    pub(crate) async fn durable(settings: &[(&str, &str)]) -> Self {
        const SETTINGS: [(&str, &str); 3] = [("fsync", "on"), ("max_wal_size", "8GB"), ("shared_buffers", "256MB")];
        Self::with(&[&SETTINGS, settings].concat()).await
    }

    fn new_name() -> String {
        format!("tuplewatch-tests-{}-{:08x}", std::process::id(), fastrand::u32(..))
    }

    async fn open(directory: Directory, installation: Installation, settings: &[(String, String)]) -> Self {
        let options = ClusterOptions { data_dir: directory.0.join("cluster"), port: None, settings: settings.to_vec() };
        let cluster = Cluster::create_or_open(installation, options).await.unwrap_or_else(|error| panic!("{error}"));
        Self { cluster, settings: settings.to_vec(), _directory: directory }
    }

    pub(crate) fn uri(&self) -> String {
        self.cluster.uri("postgres")
    }

    pub(crate) fn uri_of(&self, database: &str) -> String {
        self.cluster.uri(database)
    }

    pub(crate) async fn sql(&self) -> Sql {
        Sql::connect(&self.uri()).await
    }

    /// Another program that reads the slot `tuplewatch` under this application name, and acknowledges nothing.
    pub(crate) async fn stranger(&self, application_name: &str) -> ReplicationClient {
        let config = self.replication_config("tuplewatch").with_application_name(application_name);
        ReplicationClient::connect(config).await.unwrap()
    }

    /// The configuration of another client that reads a slot, and acknowledges nothing by itself.
    pub(crate) fn replication_config(&self, slot: &str) -> ReplicationConfig {
        let uri: tokio_postgres::Config = self.uri().parse().unwrap();
        ReplicationConfig::new("127.0.0.1", "postgres", "", "postgres", slot, "tuplewatch")
            .with_port(uri.get_ports()[0])
            .with_ack_lsn(Lsn::ZERO)
    }

    /// Stops the cluster, and changes settings for the next start. The last value of a name counts.
    pub(crate) async fn stop_and_set(&mut self, settings: &[(&str, &str)]) {
        self.stop(StopMode::Fast).await;
        let lines: String = settings.iter().map(|(name, value)| format!("{name} = '{value}'\n")).collect();
        let path = self.pgdata().join("postgresql.auto.conf");
        let before = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, before + &lines).unwrap();
    }

    /// A second cluster with a copy of the data of this one, which must not be running. Not started.
    pub(crate) async fn copy(&self) -> Self {
        let directory = Directory(std::env::temp_dir().join(Self::new_name()));
        std::fs::create_dir_all(&directory.0).unwrap();
        let target = directory.0.join("cluster");
        // Keeps the owners: if we are root, the files belong to another user.
        let copied = std::process::Command::new("cp").arg("-a").arg(self.cluster.data_dir()).arg(&target).status();
        assert!(copied.unwrap().success());
        for left in ["port", "postgres.log"] {
            let _ = std::fs::remove_file(target.join(left));
        }
        Self::open(directory, self.cluster.installation().clone(), &self.settings).await
    }

    /// Makes the next start a recovery: `standby.signal` or `recovery.signal`.
    pub(crate) fn put_signal(&self, name: &str) {
        self.put_file(name, "");
    }

    /// Writes a file into the data directory, with the owner and the mode of PostgreSQL's own files.
    pub(crate) fn put_file(&self, name: &str, contents: &str) {
        let path = self.pgdata().join(name);
        std::fs::write(&path, contents).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        // PostgreSQL removes such a file itself, and runs as another user if we are root.
        let owner = std::fs::metadata(self.pgdata()).unwrap();
        std::os::unix::fs::chown(&path, Some(owner.uid()), Some(owner.gid())).unwrap();
    }

    /// Saves a copy of the data, which must not be in use.
    pub(crate) fn save(&self) {
        let status = std::process::Command::new("cp").arg("-a").arg(self.pgdata()).arg(self.saved()).status();
        assert!(status.unwrap().success());
    }

    /// Replaces the data with the saved copy, as a rollback of the storage does.
    pub(crate) fn put_back(&self) {
        std::fs::remove_dir_all(self.pgdata()).unwrap();
        std::fs::rename(self.saved(), self.pgdata()).unwrap();
    }

    fn saved(&self) -> PathBuf {
        self.cluster.data_dir().join("saved")
    }

    /// PostgreSQL's own data directory.
    pub(crate) fn pgdata(&self) -> PathBuf {
        self.cluster.data_dir().join("pgdata")
    }

    /// 15 in 15.18.
    pub(crate) fn major(&self) -> u32 {
        self.cluster.installation().major()
    }

    /// The installation that it runs.
    #[allow(dead_code, reason = "for the benchmarks")]
    pub(crate) fn installation(&self) -> &Installation {
        self.cluster.installation()
    }

    /// Stops the cluster. Returns how long that took.
    pub(crate) async fn stop(&mut self, mode: StopMode) -> Duration {
        let began = Instant::now();
        self.cluster.stop(mode).await.unwrap_or_else(|error| panic!("{error}"));
        began.elapsed()
    }

    pub(crate) async fn start_again(&mut self) {
        self.cluster.start().await.unwrap_or_else(|error| panic!("{error}"));
    }
}
