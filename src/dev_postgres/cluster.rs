//! One private cluster: its directory, and its postmaster as a child process.

use std::fs::{self, File, OpenOptions};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::account::{Account, output_text, run};
use super::directory::{initdb, locate, made_by, reader_of, take_possession, write_file};
use super::postmaster::{Cause, Holder, PidFile, holder, log_tail};
use super::{Error, Installation, settings};

/// Long enough to recover the WAL of a killed test cluster on a slow disk.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// The children of a killed postmaster end within milliseconds, except in a long system call.
const LINGERING_MAX: Duration = Duration::from_secs(10);
/// A fast shutdown waits for a checkpoint, and for walsenders until their receivers have confirmed everything.
const STOP_WITHIN: Duration = Duration::from_secs(60);
/// The limit for each attempt to stop a leftover postmaster. A harder mode follows.
const TAKEOVER_WITHIN: Duration = Duration::from_secs(10);
const DROP_WITHIN: Duration = Duration::from_secs(5);
/// The interval of looks at a file or a child. Waiting for either would take a thread or a file watcher.
const POLL: Duration = Duration::from_millis(10);
/// Each attempt uses another random port. Even on a busy machine several rarely fail in a row.
const PORT_ATTEMPTS: u32 = 5;
/// A log of at least this size is renamed to `postgres.log.old` at a start.
const LOG_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// The options of a cluster.
#[derive(Debug, Clone, Default)]
pub struct ClusterOptions {
    /// A new or empty directory, or one with such a cluster. The cluster owns it: keep no other files in it.
    pub data_dir: PathBuf,
    /// `None`: the first start chooses a free port, which is kept.
    pub port: Option<u16>,
    /// Additional PostgreSQL settings. They replace those of the last run.
    pub settings: Vec<(String, String)>,
}

/// The modes of `pg_ctl stop`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Waits until the last client has disconnected.
    Smart,
    /// Disconnects clients, writes a checkpoint, and lets walsenders send the rest.
    Fast,
    /// Ends at once, without a checkpoint. The next start recovers, as after a crash.
    Immediate,
}

impl StopMode {
    fn name(self) -> &'static str {
        match self {
            Self::Smart => "smart",
            Self::Fast => "fast",
            Self::Immediate => "immediate",
        }
    }
}

/// A private cluster, started and stopped by its owner. Dropping it stops it immediately.
#[derive(Debug)]
pub struct Cluster {
    installation: Installation,
    account: Account,
    data_dir: PathBuf,
    requested_dir: PathBuf,
    extra_settings: Vec<(String, String)>,
    port: Port,
    /// The child process, until its end was noticed.
    postmaster: Option<Child>,
    /// The open file holds the kernel's lock.
    _lock: File,
}

#[derive(Debug, Clone, Copy)]
enum Port {
    /// Chosen by the caller, or remembered. Clients may know it.
    Settled(u16),
    /// Chosen at random, and not used by a postmaster yet, so it can still change.
    Proposed(u16),
}

impl Cluster {
    /// Creates the cluster if it does not exist, and locks it. Does not start it.
    ///
    /// # Errors
    /// Any reason that makes a start pointless, above all [`Error::InUse`], [`Error::WrongMajor`], [`Error::NotOurs`].
    pub async fn create_or_open(installation: Installation, options: ClusterOptions) -> Result<Self, Error> {
        let ClusterOptions { data_dir, port, settings } = options;
        let requested_dir = std::path::absolute(&data_dir).map_err(Error::io("resolve", &data_dir))?;
        let (data_dir, account) = locate(&requested_dir)?;
        let lock = take_possession(&data_dir)?;

        let pgdata = data_dir.join("pgdata");
        let installation = match made_by(&pgdata)? {
            Some(major) => reader_of(installation, major, &data_dir)?,
            None => installation,
        };
        account.check_program(installation.bin_dir().join("postgres"))?;
        if !pgdata.exists() {
            initdb(&installation, &account, &data_dir).await?;
        }

        let remembered = fs::read_to_string(data_dir.join("port")).ok().and_then(|text| text.trim().parse().ok());
        let port = port.or(remembered).map_or_else(|| Port::Proposed(settings::free_port()), Port::Settled);
        let cluster = Self {
            installation,
            account,
            data_dir,
            requested_dir,
            extra_settings: settings,
            port,
            postmaster: None,
            _lock: lock,
        };
        cluster.write_settings()?;
        Ok(cluster)
    }

    /// Starts PostgreSQL, and returns once it accepts connections. Stops a postmaster that a killed run left behind
    /// first. Does nothing if PostgreSQL is running.
    ///
    /// Dropping the future leaves a postmaster that is starting up. It ends with the cluster.
    ///
    /// # Errors
    /// Includes the end of PostgreSQL's log if it may explain the failure.
    pub async fn start(&mut self) -> Result<(), Error> {
        // The process may be running without being ready, if an earlier call was dropped during the start. Then only
        // the waiting remains.
        if !self.is_running() {
            self.end_leftover().await?;
            self.rotate_log()?;
        }
        let mut attempt = 1;
        loop {
            self.write_settings()?;
            match (self.start_past_lingering().await, self.port) {
                (Ok(()), _) => break,
                (Err(Error::PortTaken { .. }), Port::Proposed(port)) if attempt < PORT_ATTEMPTS => {
                    tracing::debug!(port, "port was taken meanwhile, choosing another");
                    self.port = Port::Proposed(settings::free_port());
                    attempt += 1;
                }
                (Err(error), _) => return Err(error),
            }
        }
        self.port = Port::Settled(self.port());
        write_file(&self.data_dir.join("port"), &self.port().to_string())
    }

    /// Stops PostgreSQL. Does nothing if it is not running.
    ///
    /// # Errors
    /// [`Error::NotStopped`] after a minute. PostgreSQL is then still running, and still shutting down.
    pub async fn stop(&mut self, mode: StopMode) -> Result<(), Error> {
        if !self.is_running() {
            return Ok(());
        }
        let asked = run(self.pg_ctl_stop(mode, &["-W"])).await?;
        let deadline = Instant::now() + STOP_WITHIN;
        while self.is_running() {
            if Instant::now() > deadline {
                tracing::warn!(pg_ctl = %output_text(&asked), "PostgreSQL does not stop");
                return Err(Error::NotStopped { mode: mode.name(), seconds: STOP_WITHIN.as_secs() });
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    /// [`Self::stop`], then [`Self::start`] on the same port.
    pub async fn restart(&mut self, mode: StopMode) -> Result<(), Error> {
        self.stop(mode).await?;
        self.start().await
    }

    /// Sends SIGKILL to the postmaster, like a crash. Its children end a moment later, which [`Self::start`] waits for.
    pub async fn kill_9(&mut self) -> Result<(), Error> {
        if let Some(postmaster) = &mut self.postmaster {
            postmaster.kill().map_err(Error::io("kill the PostgreSQL of", &self.data_dir))?;
        }
        self.exited().await;
        Ok(())
    }

    /// Waits until PostgreSQL has ended, for whatever reason. `None` if it was not running. Cancel safe.
    pub async fn exited(&mut self) -> Option<ExitStatus> {
        loop {
            let ended = self.postmaster.as_mut()?.try_wait();
            match ended {
                Ok(None) => sleep(POLL).await,
                Ok(Some(status)) => {
                    self.postmaster = None;
                    return Some(status);
                }
                // The process is no longer a child of this one: other code has waited for it.
                Err(_) => {
                    self.postmaster = None;
                    return None;
                }
            }
        }
    }

    /// Whether the postmaster lives, which does not mean that it accepts connections.
    pub fn is_running(&mut self) -> bool {
        let running = self.postmaster.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)));
        if !running {
            self.postmaster = None;
        }
        running
    }

    /// Stops the cluster, and deletes its directory with all data.
    pub async fn destroy(mut self) -> Result<(), Error> {
        self.stop(StopMode::Immediate).await?;
        tokio::fs::remove_dir_all(&self.data_dir).await.map_err(Error::io("delete", &self.data_dir))
    }

    /// The port on 127.0.0.1. It is final after the first start, or if the caller chose it.
    pub fn port(&self) -> u16 {
        let (Port::Settled(port) | Port::Proposed(port)) = self.port;
        port
    }

    /// A URI for any PostgreSQL client, as the superuser. It is final when [`Self::port`] is.
    pub fn uri(&self, database: &str) -> String {
        let mut uri = format!("postgres://postgres@127.0.0.1:{}/", self.port());
        for byte in database.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                uri.push(char::from(byte));
            } else {
                uri.push_str(&format!("%{byte:02X}"));
            }
        }
        uri
    }

    /// The directory of the cluster, which may differ from the requested one if this process runs as root.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// Whether [`Self::data_dir`] differs from the requested directory.
    pub fn is_elsewhere(&self) -> bool {
        self.data_dir != self.requested_dir
    }

    /// The installation in use. If there are several, it is the one of the cluster's major version.
    pub fn installation(&self) -> &Installation {
        &self.installation
    }

    /// The log of PostgreSQL.
    pub fn log_path(&self) -> PathBuf {
        self.data_dir.join("postgres.log")
    }

    fn pgdata(&self) -> PathBuf {
        self.data_dir.join("pgdata")
    }

    fn write_settings(&self) -> Result<(), Error> {
        let text = settings::render(self.port(), &self.extra_settings, &self.requested_dir)?;
        write_file(&self.data_dir.join("settings.conf"), &text)
    }

    fn rotate_log(&self) -> Result<(), Error> {
        let log = self.log_path();
        match fs::metadata(&log) {
            Ok(metadata) if metadata.len() > LOG_BYTES_MAX => {
                fs::rename(&log, log.with_extension("log.old")).map_err(Error::io("rename", &log))
            }
            _ => Ok(()),
        }
    }

    /// Repeats the start until the children of a killed postmaster have ended.
    async fn start_past_lingering(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + LINGERING_MAX;
        loop {
            let (error, cause) = match self.start_once().await {
                Ok(()) => return Ok(()),
                Err(failed) => failed,
            };
            match cause {
                Cause::Lingering if Instant::now() < deadline => sleep(POLL * 10).await,
                Cause::PortTaken => return Err(Error::PortTaken { port: self.port() }),
                _ => return Err(error),
            }
        }
    }

    /// Spawns the postmaster if it is not running, and waits until it is ready.
    async fn start_once(&mut self) -> Result<(), (Error, Cause)> {
        let log = self.log_path();
        let log_from = if self.is_running() { 0 } else { self.spawn().map_err(|error| (error, Cause::Other))? };
        let deadline = Instant::now() + READY_WITHIN;
        while !self.is_ready() {
            if !self.is_running() {
                let tail = log_tail(&log, log_from);
                let cause = Cause::of(&tail);
                return Err((Error::NotStarted { log, tail }, cause));
            }
            if Instant::now() > deadline {
                let tail = log_tail(&log, log_from);
                return Err((Error::NotReady { seconds: READY_WITHIN.as_secs(), log, tail }, Cause::Other));
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    /// Spawns the postmaster, and returns the offset of its first line in the log.
    fn spawn(&mut self) -> Result<u64, Error> {
        let log_path = self.log_path();
        // Not readable for other users, because it quotes statements. PostgreSQL's user inherits the open file.
        let log = OpenOptions::new().create(true).append(true).mode(0o600).open(&log_path);
        let log = log.map_err(Error::io("open", &log_path))?;
        let log_from = log.metadata().map_err(Error::io("look at", &log_path))?.len();
        let for_stdout = log.try_clone().map_err(Error::io("open", &log_path))?;

        let program = self.installation.bin_dir().join("postgres");
        let mut command = self.account.command(&program);
        command.arg("-D").arg(self.pgdata()).stdin(Stdio::null()).stdout(for_stdout).stderr(log);
        self.postmaster = Some(command.spawn().map_err(Error::io("run", &program))?);
        Ok(log_from)
    }

    /// Ready according to its PID file, and reachable. The PID file must be this postmaster's, not an earlier one's.
    fn is_ready(&self) -> bool {
        let ours = self.postmaster.as_ref().map(Child::id);
        PidFile::read(&self.pgdata()).is_some_and(|file| file.ready && Some(file.pid) == ours)
            && TcpStream::connect((Ipv4Addr::LOCALHOST, self.port())).is_ok()
    }

    /// Stops a leftover postmaster. This process holds the lock and has no postmaster, so a running one has lost its
    /// owner.
    async fn end_leftover(&self) -> Result<(), Error> {
        let pgdata = self.pgdata();
        let Some(PidFile { pid, .. }) = PidFile::read(&pgdata) else { return Ok(()) };
        match holder(pid, &pgdata, &self.account) {
            // PostgreSQL removes the file itself, after it has checked the shared memory that the file names.
            Holder::Nobody => return Ok(()),
            // PostgreSQL would mistake the process for a postmaster and refuse to start.
            Holder::Stranger => {
                let pid_file = pgdata.join("postmaster.pid");
                return fs::remove_file(&pid_file).map_err(Error::io("delete the outdated", &pid_file));
            }
            Holder::Postmaster => tracing::info!(pid, "stopping the PostgreSQL that an earlier run left behind"),
        }
        let seconds = TAKEOVER_WITHIN.as_secs().to_string();
        let mut reason = String::new();
        for mode in [StopMode::Fast, StopMode::Immediate] {
            let output = run(self.pg_ctl_stop(mode, &["-w", "-t", &seconds])).await?;
            // pg_ctl only watches the file, which the postmaster deletes a moment before it ends.
            let deadline = Instant::now() + LINGERING_MAX;
            loop {
                if holder(pid, &pgdata, &self.account) != Holder::Postmaster {
                    return Ok(());
                }
                if PidFile::read(&pgdata).is_some() || Instant::now() > deadline {
                    break;
                }
                sleep(POLL).await;
            }
            reason = output_text(&output);
        }
        Err(Error::Leftover { pid, reason })
    }

    fn pg_ctl_stop(&self, mode: StopMode, waiting: &[&str]) -> Command {
        let mut command = self.account.command(&self.installation.bin_dir().join("pg_ctl"));
        command.args(["stop", "-m", mode.name()]).args(waiting).arg("-D").arg(self.pgdata());
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.is_running() {
            return;
        }
        // pg_ctl need not wait, because the postmaster is a child of this process.
        let mut stop = self.pg_ctl_stop(StopMode::Immediate, &["-W"]);
        let asked = stop.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        let deadline = Instant::now() + DROP_WITHIN;
        let is_asked = asked.is_ok_and(|status| status.success());
        while is_asked && self.is_running() && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        // The postmaster is too young for pg_ctl, or stuck.
        if let Some(mut postmaster) = self.postmaster.take() {
            let killed = postmaster.kill().and_then(|()| postmaster.wait());
            if let Err(error) = killed {
                tracing::warn!(pid = postmaster.id(), %error, "PostgreSQL may still be running");
            }
        }
    }
}

#[cfg(test)]
impl Cluster {
    pub(super) fn take_postmaster(&mut self) -> Option<Child> {
        self.postmaster.take()
    }

    pub(super) fn postmaster_id(&self) -> Option<u32> {
        self.postmaster.as_ref().map(Child::id)
    }
}
