//! `dev` and `watch` as a new user runs them, in two terminals, with Ctrl-C and common accidents.

use super::cli::process::{CTRL_C, PG_BIN, Process, on_terminal, program, run, signal};
use super::cli::setup::psql;
use super::cli::watch::watch;
use crate::support::port::free_address;
use crate::support::sql::Sql;
use crate::support::wait::{eventually, within};
use serde_json::Value as Json;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::process::Command;

/// A terminal in its own directory, in which `dev` runs once or several times. Ends everything that it started.
struct Terminal {
    /// Mode 700: if we are root, no other user can enter.
    directory: TempDir,
    port: u16,
    environment: Vec<(&'static str, &'static str)>,
    dev: Option<Process>,
    /// The directory of the cluster, once it is known.
    cluster: Option<PathBuf>,
}

impl Terminal {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { directory, port: free_address().port(), environment: Vec::new(), dev: None, cluster: None }
    }

    /// `dev` on our port.
    fn command(&self, flags: &[&str]) -> Command {
        let mut command = program(self.directory.path());
        command.args(["dev", "--server-grpc-port", &self.port.to_string(), "--changelog-disk-reserve", "16MiB"]);
        command.args(["--server-http-port", "0"]);
        // As `cargo run` starts it, which changes the commands that it prints.
        command.args(flags).env("CARGO_PKG_NAME", "tuplewatch").envs(self.environment.iter().copied());
        command
    }

    /// Runs `dev` until it streams.
    async fn dev(&mut self) -> &Process {
        let dev = self.dev.insert(Process::start(self.command(&[])));
        dev.reaches("streaming").await;
        self.cluster = Some(self.find_cluster());
        self.dev.as_ref().unwrap()
    }

    /// If we are root, PostgreSQL's user cannot enter here, and `dev` prints where the cluster is instead.
    fn find_cluster(&self) -> PathBuf {
        let printed = self.process().printed();
        let directory_line = printed.iter().find_map(|line| line.strip_prefix("The cluster is in ")?.split_once(": "));
        directory_line.map_or(self.directory.path().join("tuplewatch-dev/postgres"), |(path, _)| path.into())
    }

    fn process(&self) -> &Process {
        self.dev.as_ref().unwrap()
    }

    /// The URI from the hint: `postgres://…`.
    fn uri(&self) -> String {
        let printed = self.process().printed().join(" ");
        let start = printed.find("postgres://").expect("a psql line");
        printed[start..].split(' ').next().unwrap().to_owned()
    }

    async fn sql(&self) -> Sql {
        Sql::connect(&self.uri()).await
    }

    fn server(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn watch(&self, flags: &[&str]) -> Process {
        watch(&self.server(), &[&["--tenant", "t1"], flags].concat())
    }

    async fn interrupt(&mut self, name: &str) {
        let mut dev = self.dev.take().unwrap();
        dev.signal(name);
        assert_eq!(dev.ended().await.code(), Some(0), "{:?}", dev.logged());
    }

    async fn kill_9(&mut self) {
        self.dev.take().unwrap().kill_9().await;
    }

    /// The PostgreSQL servers of our cluster.
    fn postmasters(&self) -> Vec<u32> {
        self.cluster.as_deref().map(postmasters).unwrap_or_default()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let cluster = self.cluster.take().or_else(|| self.dev.is_some().then(|| self.find_cluster()));
        // Killed, because a failed test may have left it in any state.
        if let Some(dev) = &mut self.dev
            && dev.is_running()
        {
            signal(dev.id(), "KILL");
        }
        let Some(cluster) = cluster else { return };
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut name = "QUIT";
        while let Some(postmaster) = postmasters(&cluster).pop().filter(|_| Instant::now() < deadline) {
            signal(postmaster, name);
            name = "KILL";
            std::thread::sleep(Duration::from_millis(100));
        }
        let _ = std::fs::remove_dir_all(cluster);
    }
}

/// Id, parent and command line of every process.
fn processes() -> Vec<(u32, u32, String)> {
    let proc = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.ok()?.path();
        let id = path.file_name()?.to_str()?.parse().ok()?;
        let arguments = std::fs::read(path.join("cmdline")).ok()?;
        let status = std::fs::read_to_string(path.join("status")).ok()?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()?;
        Some((id, parent, String::from_utf8_lossy(&arguments).replace('\0', " ")))
    };
    if Path::new("/proc/self").exists() {
        return std::fs::read_dir("/proc").unwrap().filter_map(proc).collect();
    }
    let output = std::process::Command::new("ps").args(["-axo", "pid=,ppid=,command="]).output().unwrap();
    let line = |line: &str| {
        let (id, rest) = line.trim().split_once(' ')?;
        let (parent, command) = rest.trim().split_once(' ')?;
        Some((id.parse().ok()?, parent.parse().ok()?, format!("{command} ")))
    };
    String::from_utf8_lossy(&output.stdout).lines().filter_map(line).collect()
}

fn postmasters(cluster: &Path) -> Vec<u32> {
    let data = format!("-D {} ", cluster.join("pgdata").display());
    let is_ours = |process: &(u32, u32, String)| process.2.contains("postgres ") && process.2.contains(&data);
    let ours: Vec<_> = processes().into_iter().filter(is_ours).collect();
    // A new child has its parent's command line until it sets its own.
    let is_child = |parent: u32| ours.iter().any(|process| process.0 == parent);
    ours.iter().filter(|process| !is_child(process.1)).map(|process| process.0).collect()
}

fn children(parent: u32) -> Vec<u32> {
    processes().into_iter().filter(|process| process.1 == parent).map(|process| process.0).collect()
}

fn tuple(id: &str) -> String {
    format!("INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'document', '{id}', 'viewer', 'user', 'u')")
}

/// The ids of the printed documents in order, and the last token.
fn documents(printed: &[String]) -> (Vec<String>, String) {
    let mut ids = Vec::new();
    let mut token = String::new();
    for line in printed {
        let line: Json = serde_json::from_str(line).unwrap();
        token = line["changes"]["snap_token"].as_str().unwrap().to_owned();
        for change in line["changes"]["tuple_changes"].as_array().unwrap() {
            assert_eq!(change["operation"], "OPERATION_CREATE");
            ids.push(change["tuple"]["entity"]["id"].as_str().unwrap().to_owned());
        }
    }
    (ids, token)
}

/// Waits until the watches have begun, and have printed a first tuple. Their later output is complete.
async fn warm_up(sql: &Sql, watches: &[&Process]) {
    for watch in watches {
        watch.until_logged("watching tenant t1 on ").await;
    }
    sql.run(&tuple("warm")).await;
    for watch in watches {
        watch.prints(1).await;
    }
}

#[tokio::test]
async fn dev_continues_the_next_day_with_the_same_data() {
    let mut terminal = Terminal::new();
    let first_run = terminal.dev().await.printed();
    assert!(first_run[0].starts_with("PostgreSQL "), "{first_run:?}");
    assert!(first_run.contains(&"Created tables, publication and replication slot".to_owned()), "{first_run:?}");
    let hint = |start: &str| first_run.iter().find(|line| line.trim().starts_with(start)).unwrap().trim().to_owned();
    let watch_hint = format!("cargo run --release -- watch --tenant t1 --server {}", terminal.server());
    assert_eq!(hint("cargo"), watch_hint);
    let psql_hint = hint("psql");

    let sql = terminal.sql().await;
    let (json, text) = (terminal.watch(&["--output", "json"]), terminal.watch(&[]));
    warm_up(&sql, &[&json, &text]).await;
    let lines_before = [json.printed().len(), text.printed().len()];
    // The printed line, except for the path of psql.
    let mut shell = Command::new("sh");
    let path = psql().as_std().get_program().to_str().unwrap().to_owned();
    shell.args(["-c", &psql_hint.replacen("psql", &path, 1)]).env("PSQLRC", "/dev/null");
    let output = within("psql ends", shell.kill_on_drop(true).output()).await.unwrap();
    assert!(output.status.success(), "{output:?}");
    let line = json.prints(lines_before[0] + 1).await.pop().unwrap();
    let change = &serde_json::from_str::<Json>(&line).unwrap()["changes"]["tuple_changes"][0];
    assert_eq!(change["operation"], "OPERATION_CREATE");
    assert_eq!(change["tuple"]["subject"]["id"], "alice");
    let token = documents(&json.printed()).1;
    sql.run("DELETE FROM tuplewatch.relation_tuples WHERE subject_id = 'alice'").await;
    let printed = text.prints(lines_before[1] + 2).await;
    let last: Vec<&str> = printed.iter().rev().take(2).map(|line| line.split_once(' ').unwrap().1).collect();
    assert_eq!(last, ["- document:1#viewer@user:alice", "+ document:1#viewer@user:alice"]);

    // Ctrl-C ends everything.
    let [postmaster] = terminal.postmasters()[..] else { panic!("one PostgreSQL: {:?}", terminal.postmasters()) };
    let family = [children(postmaster), vec![postmaster]].concat();
    let uri = terminal.uri();
    drop(sql);
    terminal.interrupt("INT").await;
    eventually("no process is left", async || processes().iter().all(|process| !family.contains(&process.0))).await;
    assert_eq!(terminal.postmasters(), [0; 0]);
    assert!(Sql::try_connect(&uri).await.is_err());
    json.until_logged("reconnecting").await;

    // The next day: the data is the same, and the watch resumes by itself.
    let second_run = terminal.dev().await.printed();
    assert!(!second_run.iter().any(|line| line.contains("Created") || line.contains("...")), "{second_run:?}");
    assert_eq!(terminal.uri(), uri);
    let sql = terminal.sql().await;
    assert_eq!(sql.value("SELECT count(*) > 0 FROM tuplewatch.relation_tuples").await, "t");
    sql.run(&tuple("the-next-day")).await;
    let is_there = |process: &Process| process.printed().iter().any(|line| line.contains("the-next-day"));
    eventually("both watches print it", async || is_there(&json) && is_there(&text)).await;
    let resumed = terminal.watch(&["--snap-token", &token]);
    let printed = resumed.prints(2).await;
    assert!(printed[0].ends_with("- document:1#viewer@user:alice"), "{printed:?}");
    assert!(printed[1].ends_with("+ document:the-next-day#viewer@user:u"), "{printed:?}");
    terminal.interrupt("TERM").await;
    assert_eq!(terminal.postmasters(), [0; 0]);
}

/// As a person runs it: its output goes to a terminal, and Ctrl-C is typed there.
#[tokio::test]
async fn dev_runs_on_a_terminal_until_ctrl_c_is_typed() {
    let mut terminal = Terminal::new();
    let dev = terminal.dev.insert(Process::start(on_terminal(&terminal.command(&[]))));
    dev.reaches_on_terminal("streaming").await;
    terminal.cluster = Some(terminal.find_cluster());
    assert_eq!(terminal.postmasters().len(), 1);
    let sql = terminal.sql().await;
    let watch = terminal.watch(&["--output", "json"]);
    warm_up(&sql, &[&watch]).await;
    drop(sql);

    let mut dev = terminal.dev.take().unwrap();
    dev.types(CTRL_C).await;
    assert_eq!(dev.ended().await.code(), Some(0), "{:?}", dev.printed());
    assert_eq!(terminal.postmasters(), [0; 0]);
}

/// Rows that are inserted while tuplewatch is gone are printed once when it is back.
#[tokio::test]
async fn killing_dev_loses_nothing_and_leaves_no_orphan() {
    let mut terminal = Terminal::new();
    terminal.dev().await;
    let sql = terminal.sql().await;
    let watch = terminal.watch(&["--output", "json"]);
    warm_up(&sql, &[&watch]).await;
    let warm = documents(&watch.printed()).0.len();
    drop(sql);
    let mut expected = Vec::new();
    for round in 0..3 {
        let sql = terminal.sql().await;
        let ids = ["a", "b", "c", "d", "e"].map(|when| format!("{when}-{round}"));
        for id in &ids[..3] {
            sql.run(&tuple(id)).await;
        }
        expected.extend(ids.clone());
        if round == 1 {
            eventually("they are printed", async || documents(&watch.printed()).0.contains(&ids[2])).await;
        }
        // PostgreSQL survives this, for a while.
        let [orphan] = terminal.postmasters()[..] else { panic!("one PostgreSQL") };
        terminal.kill_9().await;
        for id in &ids[3..] {
            sql.run(&tuple(id)).await;
        }
        drop(sql);
        terminal.dev().await;
        let [postmaster] = terminal.postmasters()[..] else { panic!("one PostgreSQL") };
        assert_ne!(postmaster, orphan);
    }
    let sql = terminal.sql().await;
    sql.run(&tuple("last")).await;
    expected.push("last".into());
    eventually("the last is printed", async || watch.printed().iter().any(|line| line.contains("\"last\""))).await;
    assert_eq!(documents(&watch.printed()).0[warm..], expected);
    // The watch may notice two kills in a row as one.
    let logged = watch.logged();
    let resumed = logged.iter().filter(|line| line.contains("resuming after token")).count();
    assert!((1..=3).contains(&resumed), "{logged:?}");

    // PostgreSQL dies alone: dev reports it and ends.
    let [postmaster] = terminal.postmasters()[..] else { panic!("one PostgreSQL") };
    signal(postmaster, "KILL");
    let mut dev = terminal.dev.take().unwrap();
    assert_eq!(dev.ended().await.code(), Some(1));
    dev.until_logged("PostgreSQL ended unexpectedly").await;
    dev.until_logged("postgres.log").await;
    // The next run recovers it.
    terminal.dev().await;
    terminal.sql().await.run(&tuple("recovered")).await;
    eventually("the watch resumes", async || watch.printed().iter().any(|line| line.contains("recovered"))).await;
    terminal.interrupt("INT").await;
}

#[tokio::test]
async fn a_second_dev_is_refused() {
    let mut terminal = Terminal::new();
    terminal.dev().await;
    let sql = terminal.sql().await;
    let watch = terminal.watch(&["--output", "json"]);
    warm_up(&sql, &[&watch]).await;
    let warm = watch.printed().len();
    // The other port is free, but the cluster is in use.
    let mut second = program(terminal.directory.path());
    second.args(["dev", "--server-grpc-port", &free_address().port().to_string(), "--server-http-port", "0"]);
    run(second).await.failed(&["another tuplewatch is using ", "Stop it, or name another directory."]);
    sql.run(&tuple("unimpressed")).await;
    assert!(watch.prints(warm + 1).await[warm].contains("unimpressed"));
    assert_eq!(terminal.postmasters().len(), 1);

    // The port is used by the first: the second reports it, and leaves nothing behind.
    let mut neighbour = Terminal::new();
    neighbour.port = terminal.port;
    let mut process = Process::start(neighbour.command(&[]));
    assert_eq!(process.ended().await.code(), Some(1));
    process.until_logged(&format!("cannot listen on 127.0.0.1:{} for gRPC", terminal.port)).await;
    neighbour.dev = Some(process);
    neighbour.cluster = Some(neighbour.find_cluster());
    assert_eq!(neighbour.postmasters(), [0; 0]);
    sql.run(&tuple("still")).await;
    watch.prints(warm + 2).await;
    drop(sql);
    terminal.interrupt("INT").await;
}

#[tokio::test]
async fn dev_can_be_stopped_at_any_moment() {
    let mut terminal = Terminal::new();
    // During initdb, the start of PostgreSQL, and the first stream.
    for (delay_ms, name) in [(30, "INT"), (150, "TERM"), (400, "KILL"), (700, "INT"), (1100, "TERM"), (1600, "INT")] {
        terminal.dev = Some(Process::start(terminal.command(&[])));
        let began = Instant::now();
        eventually("it has printed its first line", async || !terminal.process().printed().is_empty()).await;
        // The exact moments do not matter, only that they differ.
        tokio::time::sleep(Duration::from_millis(delay_ms).saturating_sub(began.elapsed())).await;
        let cluster = terminal.find_cluster();
        terminal.cluster = Some(cluster.clone());
        let mut dev = terminal.dev.take().unwrap();
        dev.signal(name);
        let ended = dev.ended().await;
        if name != "KILL" {
            let what = format!("{name} after {delay_ms} ms: {ended:?} {:?}", dev.logged());
            // Before it handles signals, a signal ends it.
            assert!(matches!(ended.code(), Some(0) | None), "{what}");
            let ours = |(_, _, command): &(u32, u32, String)| command.contains(cluster.to_str().unwrap());
            eventually(&what, async || !processes().iter().any(ours)).await;
        }
    }
    // The environment configures dev too.
    terminal.environment = vec![("TUPLEWATCH_SERVER__HOST", "0.0.0.0")];
    let listening = format!("address=0.0.0.0:{}", terminal.port);
    terminal.dev().await.until_logged(&listening).await;
    assert_eq!(terminal.postmasters().len(), 1);
    terminal.interrupt("INT").await;
    assert_eq!(terminal.postmasters(), [0; 0]);
}

#[tokio::test]
async fn a_failed_start_is_reported_once() {
    let terminal = Terminal::new();
    let empty = tempfile::tempdir().unwrap();
    let empty = empty.path().to_str().unwrap();
    for (bin, expected) in
        [("/nonexistent", "there is no such directory"), (empty, "it has no postgres, initdb, pg_ctl")]
    {
        let remedy = "Name a directory that has postgres, initdb and pg_ctl of PostgreSQL 14 or newer";
        let by_flag = run(terminal.command(&["--pg-bin", bin])).await;
        assert_eq!(by_flag.err.matches("tuplewatch: ").count(), 1, "{by_flag:?}");
        by_flag.failed(&[&format!("--pg-bin {bin} cannot be used: {expected}"), remedy]);
        let mut command = terminal.command(&[]);
        command.env(PG_BIN, bin);
        run(command).await.failed(&[&format!("{PG_BIN} {bin} cannot be used: {expected}"), remedy]);
    }
    assert_eq!(std::fs::read_dir(terminal.directory.path()).unwrap().count(), 0, "nothing is created");

    // A directory with other files, which PostgreSQL's user can reach.
    let theirs = terminal.directory.path().join("theirs");
    std::fs::create_dir_all(theirs.join("postgres")).unwrap();
    std::fs::write(theirs.join("postgres/cat.jpeg"), "miaow").unwrap();
    let open: std::fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(terminal.directory.path(), open).unwrap();
    run(terminal.command(&["--data-dir", "theirs"]))
        .await
        .failed(&["theirs/postgres is not empty and holds no cluster of tuplewatch", "Name a new or empty directory."]);
    assert_eq!(std::fs::read(theirs.join("postgres/cat.jpeg")).unwrap(), b"miaow");

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    run(terminal.command(&["--data-dir", "here", "--pg-port", &port]))
        .await
        .failed(&[&format!("port {port} of 127.0.0.1 is taken by another program"), "choose another port"]);
    assert_eq!(postmasters(&terminal.directory.path().join("here/postgres")), [0; 0]);
}
