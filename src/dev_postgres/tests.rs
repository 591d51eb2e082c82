//! Against real PostgreSQL, the one that [`Installation::find`] finds.

use std::fs;
use std::future::Future;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::account::Account;
use super::directory::UNFINISHED;
use super::*;

/// A temporary directory. The test does not create it, so that PostgreSQL's user can access it whatever the umask.
struct Place(PathBuf);

impl Place {
    fn new() -> Self {
        let name = format!("tuplewatch-dev-postgres-{}-{:08x}", std::process::id(), fastrand::u32(..));
        Self(std::env::temp_dir().join(name))
    }

    fn data_dir(&self) -> PathBuf {
        self.0.join("cluster")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn options(data_dir: PathBuf) -> ClusterOptions {
    ClusterOptions { data_dir, port: None, settings: vec![("fsync".into(), "off".into())] }
}

async fn open(data_dir: PathBuf) -> Result<Cluster, Error> {
    Cluster::create_or_open(Installation::find(None).unwrap(), options(data_dir)).await
}

async fn started(place: &Place) -> Cluster {
    let mut cluster = open(place.data_dir()).await.unwrap();
    cluster.start().await.unwrap();
    cluster
}

fn psql(cluster: &Cluster, sql: &str) -> String {
    let beside = cluster.installation().bin_dir().join("psql");
    let program = if beside.exists() { beside } else { "psql".into() };
    let uri = cluster.uri("postgres");
    let output =
        Command::new(program).args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", &uri, "-c", sql]).output().unwrap();
    assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn pid_in_file(cluster: &Cluster) -> u32 {
    let text = fs::read_to_string(cluster.data_dir().join("pgdata/postmaster.pid")).unwrap();
    text.lines().next().unwrap().parse().unwrap()
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The effect of `kill -9` on this process: the lock is released, and the postmaster lives on.
fn abandon(mut cluster: Cluster) -> std::process::Child {
    cluster.take_postmaster().unwrap()
}

/// Polls the future once, up to its first wait.
async fn begin<T>(future: impl Future<Output = T>) {
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|context| {
        let _ = future.as_mut().poll(context);
        std::task::Poll::Ready(())
    })
    .await;
}

#[tokio::test]
async fn a_cluster_is_created_started_and_continued() {
    let place = Place::new();
    let mut cluster = started(&place).await;
    assert!(cluster.is_running() && !cluster.is_elsewhere());
    assert_eq!(psql(&cluster, "SHOW wal_level"), "logical");
    assert_eq!(psql(&cluster, "SHOW track_commit_timestamp"), "on");
    assert_eq!(psql(&cluster, "SHOW listen_addresses"), "127.0.0.1");
    assert_eq!(psql(&cluster, "SHOW unix_socket_directories"), "");
    assert_eq!(psql(&cluster, "SHOW server_encoding"), "UTF8");
    assert_eq!(psql(&cluster, "SHOW fsync"), "off");
    assert_eq!(psql(&cluster, "SHOW port"), cluster.port().to_string());
    psql(&cluster, "CREATE TABLE kept (n int); INSERT INTO kept VALUES (1)");
    // Starting a running cluster changes nothing.
    let pid = pid_in_file(&cluster);
    cluster.start().await.unwrap();
    assert_eq!(pid_in_file(&cluster), pid);

    cluster.restart(StopMode::Fast).await.unwrap();
    assert_ne!(pid_in_file(&cluster), pid);
    assert_eq!(psql(&cluster, "SELECT n FROM kept"), "1");
    let port = cluster.port();
    cluster.stop(StopMode::Smart).await.unwrap();
    assert!(!cluster.is_running());
    cluster.stop(StopMode::Fast).await.unwrap();
    drop(cluster);

    // Another run with other settings: the same data and the same port.
    let mut options = options(place.data_dir());
    options.settings = vec![("work_mem".into(), "5MB".into())];
    let mut cluster = Cluster::create_or_open(Installation::find(None).unwrap(), options).await.unwrap();
    cluster.start().await.unwrap();
    assert_eq!(cluster.port(), port);
    assert_eq!(psql(&cluster, "SELECT n FROM kept"), "1");
    assert_eq!(psql(&cluster, "SHOW work_mem"), "5MB");
    assert_eq!(psql(&cluster, "SHOW fsync"), "on");

    cluster.destroy().await.unwrap();
    assert!(!place.data_dir().exists());
}

#[tokio::test]
async fn a_cluster_survives_kill_9_under_load() {
    let place = Place::new();
    let mut cluster = started(&place).await;
    psql(&cluster, "CREATE TABLE kept (n int)");
    for n in 1..=5 {
        psql(&cluster, &format!("INSERT INTO kept VALUES ({n})"));
        // Busy backends notice the end of the postmaster late.
        let uri = cluster.uri("postgres");
        let mut busy: Vec<_> = (0..4)
            .map(|_| {
                let mut command = Command::new("psql");
                command.args(["-XAtq", "-d", &uri, "-c", "SELECT count(*) FROM generate_series(1, 3000000)"]);
                command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap()
            })
            .collect();
        let active = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%generate_series%' AND state = 'active' \
                      AND pid <> pg_backend_pid()";
        eventually("somebody is busy", || psql(&cluster, active) != "0").await;
        cluster.kill_9().await.unwrap();
        assert!(!cluster.is_running());
        cluster.start().await.unwrap();
        assert_eq!(psql(&cluster, "SELECT count(*) FROM kept"), n.to_string());
        busy.iter_mut().for_each(|child| drop(child.wait()));
    }
    assert!(fs::read_to_string(cluster.log_path()).unwrap().contains("automatic recovery in progress"));
}

#[tokio::test]
async fn a_cluster_of_a_killed_run_is_taken_over() {
    let place = Place::new();
    let cluster = started(&place).await;
    psql(&cluster, "CREATE TABLE kept (n int)");
    let port = cluster.port();
    let mut orphan = abandon(cluster);
    assert!(matches!(orphan.try_wait(), Ok(None)));

    let cluster = started(&place).await;
    assert_eq!(cluster.port(), port);
    assert_ne!(pid_in_file(&cluster), orphan.id());
    assert_eq!(psql(&cluster, "SELECT count(*) FROM kept"), "0");
    eventually("the orphan has ended", || matches!(orphan.try_wait(), Ok(Some(_)))).await;
}

#[tokio::test]
async fn an_outdated_pid_file_is_ignored() {
    let place = Place::new();
    let mut cluster = started(&place).await;
    cluster.stop(StopMode::Fast).await.unwrap();
    let pid_file = cluster.data_dir().join("pgdata/postmaster.pid");
    let pgdata = cluster.data_dir().join("pgdata");

    // The id now belongs to a process of the same user, which PostgreSQL would mistake for a postmaster.
    let account = Account::unprivileged().unwrap().or_owner_of(&pgdata);
    let mut stranger = account.command(Path::new("/bin/sleep")).arg("600").spawn().unwrap();
    for pid in [stranger.id(), 4_999_999] {
        let text = format!("{pid}\n{}\n1700000000\n{}\n\n127.0.0.1\n  1 2\nready\n", pgdata.display(), cluster.port());
        fs::write(&pid_file, text).unwrap();
        account.give(&pid_file).unwrap();
        cluster.start().await.unwrap();
        assert_eq!(psql(&cluster, "SELECT 1"), "1");
        cluster.stop(StopMode::Fast).await.unwrap();
    }
    assert!(matches!(stranger.try_wait(), Ok(None)), "the stranger was harmed");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[tokio::test]
async fn dropping_a_cluster_leaves_no_process() {
    let place = Place::new();
    let cluster = started(&place).await;
    let pid = pid_in_file(&cluster);
    let port = cluster.port();
    drop(cluster);
    let is_gone = || Command::new("kill").args(["-0", &pid.to_string()]).output().is_ok_and(|o| !o.status.success());
    assert!(is_gone());
    TcpListener::bind(("127.0.0.1", port)).unwrap();

    // A cluster that is only starting is too young for pg_ctl.
    let mut cluster = open(place.data_dir()).await.unwrap();
    begin(cluster.start()).await;
    let pid = cluster.postmaster_id().unwrap();
    drop(cluster);
    let is_gone = || Command::new("kill").args(["-0", &pid.to_string()]).output().is_ok_and(|o| !o.status.success());
    assert!(is_gone());
    let mut cluster = started(&place).await;

    // A start that was dropped can be resumed.
    cluster.stop(StopMode::Fast).await.unwrap();
    begin(cluster.start()).await;
    cluster.start().await.unwrap();
    assert_eq!(psql(&cluster, "SELECT 1"), "1");
}

#[tokio::test]
async fn an_interrupted_initdb_is_repeated() {
    let place = Place::new();
    begin(open(place.data_dir())).await;
    let unfinished = fs::read_dir(place.data_dir()).unwrap().map(|entry| entry.unwrap().path());
    let unfinished = unfinished.into_iter().find(|path| path.to_string_lossy().contains(UNFINISHED)).unwrap();
    assert!(!place.data_dir().join("pgdata").exists());
    fs::write(unfinished.join("PG_VERSION"), "15").unwrap();

    let cluster = started(&place).await;
    assert_eq!(psql(&cluster, "SELECT 1"), "1");
    assert!(!unfinished.exists());
}

#[tokio::test]
async fn a_cluster_has_one_owner_at_a_time() {
    let place = Place::new();
    let cluster = open(place.data_dir()).await.unwrap();
    let error = open(place.data_dir()).await.unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    drop(cluster);
    open(place.data_dir()).await.unwrap();
}

#[tokio::test]
async fn foreign_directories_are_left_alone() {
    let place = Place::new();
    for dir in [&place.0, &place.data_dir()] {
        fs::create_dir(dir).unwrap();
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::write(place.data_dir().join("PG_VERSION"), "15").unwrap();
    let error = open(place.data_dir()).await.unwrap_err();
    assert!(matches!(error, Error::NotOurs { .. }), "{error}");
    assert_eq!(fs::read_dir(place.data_dir()).unwrap().count(), 1);
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let place = Place::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let installation = Installation::find(None).unwrap();
    let options = ClusterOptions { port: Some(port), ..options(place.data_dir()) };
    let mut cluster = Cluster::create_or_open(installation, options).await.unwrap();
    let error = cluster.start().await.unwrap_err();
    assert!(matches!(error, Error::PortTaken { port: named } if named == port), "{error}");
    drop(taken);
    cluster.start().await.unwrap();
    assert_eq!(cluster.uri("a b/ü"), format!("postgres://postgres@127.0.0.1:{port}/a%20b%2F%C3%BC"));
}

#[tokio::test]
async fn an_unused_port_can_change() {
    let place = Place::new();
    let mut options = options(place.data_dir());
    // Then the reason is all that PostgreSQL logs.
    options.settings.push(("log_min_messages".into(), "fatal".into()));
    let mut cluster = Cluster::create_or_open(Installation::find(None).unwrap(), options).await.unwrap();
    let proposed = cluster.port();
    let taken = TcpListener::bind(("127.0.0.1", proposed)).unwrap();
    cluster.start().await.unwrap();
    assert_ne!(cluster.port(), proposed);
    assert_eq!(psql(&cluster, "SELECT 1"), "1");
    drop(taken);
}

#[tokio::test]
async fn a_failed_start_quotes_the_log() {
    let place = Place::new();
    let mut options = options(place.data_dir());
    options.settings.push(("shared_buffers".into(), "nonsense".into()));
    let mut cluster = Cluster::create_or_open(Installation::find(None).unwrap(), options).await.unwrap();
    let message = cluster.start().await.unwrap_err().to_string();
    assert!(message.contains("shared_buffers") && message.contains("postgres.log"), "{message}");
}

#[tokio::test]
async fn another_major_version_is_named() {
    let place = Place::new();
    drop(open(place.data_dir()).await.unwrap());
    fs::write(place.data_dir().join("pgdata/PG_VERSION"), "9\n").unwrap();
    let message = open(place.data_dir()).await.unwrap_err().to_string();
    assert!(message.contains("made by PostgreSQL 9") && message.contains("--pg-bin"), "{message}");
}

/// An ordinary user has no such case, because PostgreSQL runs as that user.
#[tokio::test]
async fn as_root_an_unreachable_directory_is_replaced() {
    if Account::unprivileged().unwrap() == Account::Ourselves {
        return;
    }
    let place = Place::new();
    fs::create_dir(&place.0).unwrap();
    fs::set_permissions(&place.0, fs::Permissions::from_mode(0o700)).unwrap();
    let requested = place.0.join("deep/er");
    let mut cluster = open(requested.clone()).await.unwrap();
    assert!(cluster.is_elsewhere() && cluster.data_dir().starts_with("/var/lib/tuplewatch-dev"));
    assert!(!place.0.join("deep").exists());
    cluster.start().await.unwrap();
    psql(&cluster, "CREATE TABLE kept (n int)");
    let there = cluster.data_dir().to_owned();
    drop(cluster);

    let mut cluster = open(requested).await.unwrap();
    assert_eq!(cluster.data_dir(), there);
    cluster.start().await.unwrap();
    assert_eq!(psql(&cluster, "SELECT count(*) FROM kept"), "0");
    cluster.destroy().await.unwrap();
    assert!(!there.exists());
}

#[tokio::test]
async fn as_root_unreachable_programs_are_named() {
    if Account::unprivileged().unwrap() == Account::Ourselves {
        return;
    }
    let place = Place::new();
    let closed = tempfile::tempdir().unwrap();
    fs::set_permissions(closed.path(), fs::Permissions::from_mode(0o700)).unwrap();
    for program in ["postgres", "initdb", "pg_ctl"] {
        let path = closed.path().join(program);
        fs::write(&path, "#!/bin/sh\necho 'postgres (PostgreSQL) 15.1'\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let installation = Installation::find(Some(closed.path())).unwrap();
    let error = Cluster::create_or_open(installation, options(place.data_dir())).await.unwrap_err();
    assert!(matches!(error, Error::ProgramUnreachable { .. }), "{error}");
}
