//! tuplewatch itself, as a process.

use super::change::Change;
use super::port::free_address;
use super::postgres::Postgres;
use super::proxy::Proxy;
use super::sql::Sql;
use super::stream::Stream;
use super::wait::{eventually, within};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tuplewatch::model::lsn::Lsn;

/// Lines of the server's log that are shown when a test fails.
const LOG_TAIL: usize = 500;

/// A node: a slot, a log directory, and one process after the other. Killed when dropped.
pub(crate) struct Server {
    flags: Vec<String>,
    directory: TempDir,
    process: Option<Process>,
    /// Of gRPC and of HTTP, the same for each process.
    addresses: [SocketAddr; 2],
    log: Arc<Mutex<Vec<String>>>,
}

struct Process {
    child: Child,
    /// Ends with the process, when the log has its last line.
    log_reader: JoinHandle<()>,
}

/// The disk of the machine that runs the tests may be smaller than the default.
const RESERVE: &str = "--changelog-disk-reserve";

/// The program, without the variables of our environment that configure it. `TUPLEWATCH_BIN` names another build of it.
fn program() -> Command {
    let built = env!("CARGO_BIN_EXE_tuplewatch").into();
    let mut command = Command::new(std::env::var_os("TUPLEWATCH_BIN").unwrap_or(built));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TUPLEWATCH_") {
            command.env_remove(name);
        }
    }
    command.kill_on_drop(true).stdin(Stdio::null());
    command
}

impl Server {
    /// Runs `setup`, and prepares a node with the slot `tuplewatch`. `flags` are pairs of a flag and its value.
    pub(crate) async fn prepare(postgres: &Postgres, flags: &[(&str, &str)]) -> Self {
        Self::prepare_slot(&postgres.uri(), "tuplewatch", flags).await
    }

    pub(crate) async fn prepare_slot(uri: &str, slot: &str, flags: &[(&str, &str)]) -> Self {
        let mut all = vec![("--database-uri", uri), ("--replication-slot", slot)];
        all.extend(flags);
        let flags: Vec<String> =
            all.iter().flat_map(|(flag, value)| [(*flag).to_owned(), (*value).to_owned()]).collect();
        let directory = tempfile::tempdir().unwrap();
        let addresses = [free_address(), free_address()];
        let server = Self { flags, directory, process: None, addresses, log: Arc::default() };
        server.setup(&[]).await;
        server
    }

    /// Runs `tuplewatch setup` with the flags of this node.
    pub(crate) async fn setup(&self, further: &[&str]) {
        let output = within("setup", program().arg("setup").args(&self.flags).args(further).output()).await.unwrap();
        let printed = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "setup {further:?}: {:?} {printed}", output.status);
    }

    /// Changes the database for later processes.
    pub(crate) fn point_to(&mut self, uri: &str) {
        assert!(self.process.is_none(), "a process keeps the database that it was started with");
        let place = self.flags.iter().position(|flag| flag == "--database-uri").unwrap();
        self.flags[place + 1] = uri.to_owned();
    }

    /// [`Server::prepare`], [`Server::start`], and wait until the slot streams.
    pub(crate) async fn serve(postgres: &Postgres, flags: &[(&str, &str)]) -> Self {
        let mut server = Self::prepare(postgres, flags).await;
        server.start().await;
        server.serving().await;
        server
    }

    /// Keeps its change log on another disk. To be called before the first start.
    pub(crate) fn keep_log_in(&mut self, directory: TempDir) {
        assert!(self.log.lock().unwrap().is_empty(), "a process has its change log elsewhere");
        self.directory = directory;
    }

    /// [`Server::serve`], with a proxy between it and PostgreSQL.
    pub(crate) async fn serve_through(proxy: &Proxy, postgres: &Postgres) -> Self {
        let mut server = Self::prepare_slot(&proxy.uri(&postgres.uri()), "tuplewatch", &[]).await;
        server.start().await;
        server.serving().await;
        server
    }

    /// Starts the process; returns once it listens.
    pub(crate) async fn start(&mut self) {
        self.start_with(&[]).await;
    }

    /// [`Server::start`] with further arguments.
    pub(crate) async fn start_with(&mut self, arguments: &[&str]) {
        let mut listens = self.spawn(arguments);
        let listening = within("the server listens", listens.wait_for(|listens| *listens)).await;
        assert!(listening.is_ok(), "the server ended before it listened");
    }

    /// Starts a process that must end by itself with exit code 1, and must log this.
    pub(crate) async fn refuses_to_start(&mut self, expected: &str) {
        let listens = self.spawn(&[]);
        assert_eq!(self.ended().await.code(), Some(1));
        assert!(!*listens.borrow() && self.has_logged(expected), "it should have ended with: {expected}");
    }

    /// Starts the process. The watch turns true when it listens.
    fn spawn(&mut self, arguments: &[&str]) -> watch::Receiver<bool> {
        assert!(self.process.is_none(), "one process at a time");
        let mut child = self.command().args(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();

        let (found, listens) = watch::channel(false);
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let log = self.log.clone();
        log.lock().unwrap().push(format!("--- process {:?}", child.id()));
        let log_reader = tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                // HTTP has its own line before this one.
                let is_last = line.contains("gRPC is listening");
                log.lock().unwrap().push(line);
                if is_last {
                    found.send_replace(true);
                }
            }
        });
        self.process = Some(Process { child, log_reader });
        listens
    }

    fn command(&self) -> Command {
        let [port, http_port] = self.addresses.map(|address| address.port().to_string());
        let mut command = program();
        command.arg("serve").args(&self.flags);
        command.args(["--server-host", "127.0.0.1", "--server-grpc-port", &port, "--logger-format", "json"]);
        command.args(["--server-http-port", &http_port]);
        if !self.flags.iter().any(|flag| flag == RESERVE) {
            command.args([RESERVE, "16MiB"]);
        }
        command.arg("--changelog-path").arg(self.changelog());
        command
    }

    /// Changes a flag for later processes.
    pub(crate) fn set(&mut self, flag: &str, value: &str) {
        if let Some(at) = self.flags.iter().position(|given| given == flag) {
            self.flags.drain(at..at + 2);
        }
        self.flags.extend([flag.to_owned(), value.to_owned()]);
    }

    /// Waits until its health is SERVING.
    pub(crate) async fn serving(&self) {
        eventually("health is SERVING", async || self.health("").await == Ok(ServingStatus::Serving)).await;
    }

    pub(crate) async fn health(&self, service: &str) -> Result<ServingStatus, tonic::Code> {
        let channel = self.endpoint().connect().await.map_err(|_| tonic::Code::Unavailable)?;
        let request = HealthCheckRequest { service: service.to_owned() };
        let response = HealthClient::new(channel).check(request).await.map_err(|status| status.code())?;
        Ok(response.into_inner().status())
    }

    /// SIGKILL.
    pub(crate) async fn kill_9(&mut self) {
        let mut process = self.process.take().expect("a process to kill");
        process.child.kill().await.unwrap();
        within("the log ends", process.log_reader).await.unwrap();
    }

    /// SIGKILL, then a new process until it serves.
    pub(crate) async fn kill_and_restart(&mut self) {
        self.kill_9().await;
        self.start().await;
        self.serving().await;
    }

    /// SIGTERM. [`Server::ended`] gives the exit status.
    pub(crate) async fn terminate(&self) {
        self.signal("-TERM").await;
    }

    /// SIGSTOP: the process does not run, and its connections stay open.
    pub(crate) async fn suspend(&self) {
        self.signal("-STOP").await;
    }

    /// SIGCONT.
    pub(crate) async fn resume(&self) {
        self.signal("-CONT").await;
    }

    /// SIGHUP.
    pub(crate) async fn hang_up(&self) {
        self.signal("-HUP").await;
    }

    async fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.pid().to_string()]).status().await.unwrap();
        assert!(status.success());
    }

    /// Waits until the process has ended by itself; its log is complete then.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let mut process = self.process.take().expect("a process that ends");
        let status = within("the server ends", process.child.wait()).await.unwrap();
        within("the log ends", process.log_reader).await.unwrap();
        status
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        Endpoint::from_shared(format!("http://{}", self.address())).unwrap()
    }

    pub(crate) async fn channel(&self) -> Channel {
        self.endpoint().connect().await.unwrap()
    }

    /// Opens a stream, which must succeed.
    pub(crate) async fn watch(&self, tenant: &str, token: &str) -> Stream {
        match self.try_watch(tenant, token).await {
            Ok(stream) => stream,
            Err(status) => panic!("watch of {tenant} after '{token}': {status:?}"),
        }
    }

    /// A stream of t1 that has delivered its first change, the tuple with this entity id; and the token of that message.
    pub(crate) async fn first_delivered(&self, postgres: &Postgres, id: &str) -> (Sql, Stream, String) {
        let sql = postgres.sql().await;
        let mut stream = self.watch("t1", "").await;
        sql.insert("t1", id).await;
        let token = stream.expect(Change::created(id)).await.token;
        (sql, stream, token)
    }

    /// Opens a stream. Returns with the response headers or the refusal.
    pub(crate) async fn try_watch(&self, tenant: &str, token: &str) -> Result<Stream, Status> {
        within("the stream starts or is refused", Stream::open(&self.endpoint(), tenant, token)).await
    }

    /// The directory of its change log.
    pub(crate) fn changelog(&self) -> std::path::PathBuf {
        self.directory.path().join("log")
    }

    /// Whether any line of the log contains this.
    pub(crate) fn has_logged(&self, text: &str) -> bool {
        self.log.lock().unwrap().iter().any(|line| line.contains(text))
    }

    /// The beginning of each gap in the log, by its end. Gaps with an unknown end are left out.
    pub(crate) fn closed_gaps(&self) -> HashMap<Lsn, Lsn> {
        self.gap_log()()
    }

    /// A function that returns [`Server::closed_gaps`] when it is called.
    pub(crate) fn gap_log(&self) -> impl Fn() -> HashMap<Lsn, Lsn> + use<> {
        let log = self.log.clone();
        move || {
            let lines = log.lock().unwrap();
            let closed = lines.iter().filter_map(|line| gap(line)).filter(|gap| !gap.is_open);
            closed.map(|gap| (gap.to, gap.from)).collect()
        }
    }

    /// The largest end of the gaps in the log. Counts gaps with an unknown end too.
    pub(crate) fn last_gap(&self) -> Lsn {
        self.log.lock().unwrap().iter().filter_map(|line| gap(line)).map(|gap| gap.to).max().unwrap_or_default()
    }

    /// Waits until a line of the log contains this. Other signs of an event may be visible before its line.
    pub(crate) async fn until_logged(&self, text: &str) {
        eventually(&format!("the log contains {text:?}"), async || self.has_logged(text)).await;
    }

    /// The number of lines of the log that contain this.
    pub(crate) fn times_logged(&self, text: &str) -> usize {
        self.log.lock().unwrap().iter().filter(|line| line.contains(text)).count()
    }

    /// The id of the running process.
    pub(crate) fn pid(&self) -> u32 {
        self.process.as_ref().and_then(|process| process.child.id()).expect("a process that runs")
    }

    /// A field of /proc/PID/status, in KiB: `VmRSS` is the resident memory, `VmHWM` its maximum so far.
    pub(crate) fn memory_kib(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub(crate) const fn address(&self) -> SocketAddr {
        self.addresses[0]
    }

    /// Of the HTTP gateway.
    pub(crate) const fn http_address(&self) -> SocketAddr {
        self.addresses[1]
    }
}

/// A gap in the log.
struct Gap {
    from: Lsn,
    to: Lsn,
    is_open: bool,
}

/// Parses a line about a gap.
fn gap(line: &str) -> Option<Gap> {
    let line: serde_json::Value = serde_json::from_str(line).ok()?;
    let is_gap = line.get("message")?.as_str()?.starts_with("a gap in the stream");
    let lsn = |name: &str| line.get(name)?.as_str()?.parse().ok();
    is_gap.then(|| Some(Gap { from: lsn("from")?, to: lsn("to")?, is_open: line.get("is_open")?.as_bool()? }))?
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log.lock().unwrap();
            let tail = &log[log.len().saturating_sub(LOG_TAIL)..];
            eprintln!("the last of {} lines of the server's log:\n{}", log.len(), tail.join("\n"));
        }
    }
}
