//! A private cluster, gone with the test.

use super::sql::Sql;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tuplewatch::dev_postgres::{Cluster, ClusterOptions, Installation, StopMode};

pub(crate) struct Postgres {
    // Stops when dropped, and so before its directory goes.
    cluster: Cluster,
    _directory: Directory,
}

/// Not a `TempDir`: as root PostgreSQL runs as another user, who could not enter one.
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What the tests need besides the cluster's own defaults. Without fsync a crash of PostgreSQL, which is all that is tested
/// here, loses nothing, and commits come closer together.
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

impl Postgres {
    pub(crate) async fn start() -> Self {
        Self::with(&[]).await
    }

    /// With further settings.
    pub(crate) async fn with(settings: &[(&str, &str)]) -> Self {
        // Says what to install where there is none.
        let installation = Installation::find(None).unwrap_or_else(|error| panic!("{error}"));
        let name = format!("tuplewatch-tests-{}-{:08x}", std::process::id(), fastrand::u32(..));
        let directory = Directory(std::env::temp_dir().join(name));
        let settings = SETTINGS.iter().chain(settings).map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let options = ClusterOptions { data_dir: directory.0.join("cluster"), port: None, settings };
        let mut cluster =
            Cluster::create_or_open(installation, options).await.unwrap_or_else(|error| panic!("{error}"));
        cluster.start().await.unwrap_or_else(|error| panic!("{error}"));
        Self { cluster, _directory: directory }
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

    /// How long it took.
    pub(crate) async fn stop(&mut self, mode: StopMode) -> Duration {
        let began = Instant::now();
        self.cluster.stop(mode).await.unwrap_or_else(|error| panic!("{error}"));
        began.elapsed()
    }

    pub(crate) async fn start_again(&mut self) {
        self.cluster.start().await.unwrap_or_else(|error| panic!("{error}"));
    }
}
