//! Runs the program to its end or in the background.

use crate::support::wait::{eventually, within};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

/// Chooses the PostgreSQL of `dev`. The only variable of ours that the program gets from our environment.
pub(crate) const PG_BIN: &str = "TUPLEWATCH_PG_BIN";

/// The program in this directory, without the variables of our environment that configure it.
pub(crate) fn program(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tuplewatch"));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("PG") || text.starts_with("TUPLEWATCH_") && text != PG_BIN {
            command.env_remove(name);
        }
    }
    // Otherwise a URI without a user would mean our user.
    command.env_remove("USER").env_remove("LOGNAME");
    command.current_dir(directory).kill_on_drop(true).stdin(Stdio::null());
    command
}

/// A terminal turns this into the signal INT for its foreground program.
pub(crate) const CTRL_C: &str = "\x03";

/// The same command on a terminal that `script` creates. Both of its outputs are printed there. The standard input of `script` is the
/// keyboard.
pub(crate) fn on_terminal(command: &Command) -> Command {
    let command = command.as_std();
    let words: Vec<&str> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(|word| word.to_str().unwrap()).collect();
    let mut script = Command::new("script");
    if cfg!(target_os = "linux") {
        // Without exec, a shell in between would get the Ctrl-C too, and some shells then end by the signal whatever the program does.
        script.args(["-q", "-e", "-c", &format!("exec {}", words.join(" ")), "/dev/null"]);
    } else {
        script.args(["-q", "/dev/null"]).args(words);
    }
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => script.env(name, value),
            None => script.env_remove(name),
        };
    }
    if let Some(directory) = command.get_current_dir() {
        script.current_dir(directory);
    }
    script.stdin(Stdio::piped()).kill_on_drop(true);
    script
}

/// The exit code and the output of a run.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// Runs a command to its end.
pub(crate) async fn run(mut command: Command) -> Ran {
    let what = format!("{:?} ends", command.as_std());
    let output = within(&what, command.output()).await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let ran = Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) };
    assert!(!ran.err.contains("panicked"), "{ran:?}");
    ran
}

/// Runs the program with these arguments, in a temporary directory.
pub(crate) async fn tuplewatch(arguments: &[&str]) -> Ran {
    let directory = tempfile::tempdir().unwrap();
    let mut command = program(directory.path());
    command.args(arguments);
    run(command).await
}

impl Ran {
    /// The run must have succeeded. Returns its output.
    #[track_caller]
    pub(crate) fn succeeded(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.out
    }

    /// The run must have failed with all of these messages.
    #[track_caller]
    pub(crate) fn failed(self, expected: &[&str]) {
        self.ended(1, expected);
    }

    /// The run must have failed as misused, with all of these messages and no output.
    #[track_caller]
    pub(crate) fn misused(self, expected: &[&str]) {
        assert_eq!(self.out, "", "{self:?}");
        self.ended(2, expected);
    }

    #[track_caller]
    fn ended(&self, code: i32, expected: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        for text in expected {
            assert!(self.err.contains(text), "missing: {text}\n{}", self.err);
        }
    }
}

/// The program in the background. Killed when dropped.
pub(crate) struct Process {
    child: Child,
    out: Lines,
    err: Lines,
}

/// The lines of one output so far.
struct Lines {
    kept: Arc<Mutex<Vec<String>>>,
    reader: JoinHandle<()>,
}

impl Lines {
    fn read(from: impl AsyncRead + Send + Unpin + 'static) -> Self {
        let kept = Arc::<Mutex<Vec<String>>>::default();
        let lines = kept.clone();
        let reader = tokio::spawn(async move {
            let mut from = BufReader::new(from).lines();
            while let Ok(Some(line)) = from.next_line().await {
                lines.lock().unwrap().push(line);
            }
        });
        Self { kept, reader }
    }

    fn all(&self) -> Vec<String> {
        self.kept.lock().unwrap().clone()
    }

    /// Waits for the end of the output.
    async fn end(&mut self) {
        if !self.reader.is_finished() {
            within("the output ends", &mut self.reader).await.unwrap();
        }
    }
}

impl Process {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let out = Lines::read(child.stdout.take().unwrap());
        let err = Lines::read(child.stderr.take().unwrap());
        Self { child, out, err }
    }

    /// The lines of its standard output.
    pub(crate) fn printed(&self) -> Vec<String> {
        self.out.all()
    }

    /// The lines of its standard error: the log, or an error.
    pub(crate) fn logged(&self) -> Vec<String> {
        self.err.all()
    }

    /// Waits until it has printed this many lines. Returns all lines.
    pub(crate) async fn prints(&self, count: usize) -> Vec<String> {
        eventually(&format!("{count} lines are printed"), async || self.printed().len() >= count).await;
        self.printed()
    }

    /// Waits until a line of its log contains this text.
    pub(crate) async fn until_logged(&self, text: &str) {
        let is_there = async || self.logged().iter().any(|line| line.contains(text));
        eventually(&format!("'{text}' is logged"), is_there).await;
    }

    /// Waits until a line of its log contains this text. Fails if the process ends before.
    pub(crate) async fn reaches(&mut self, text: &str) {
        self.reaches_in(text, Self::logged).await;
    }

    /// [`Process::reaches`] on a terminal, where the log is printed.
    pub(crate) async fn reaches_on_terminal(&mut self, text: &str) {
        self.reaches_in(text, Self::printed).await;
    }

    async fn reaches_in(&mut self, text: &str, lines: impl Fn(&Self) -> Vec<String>) {
        let what = format!("'{text}' is logged, or the process ends");
        let is_there = |process: &Self| lines(process).iter().any(|line| line.contains(text));
        eventually(&what, async || is_there(self) || !self.is_running()).await;
        assert!(is_there(self), "ended without saying '{text}'");
    }

    /// Types this on its terminal.
    pub(crate) async fn types(&mut self, text: &str) {
        let keyboard = self.child.stdin.as_mut().expect("a process on a terminal");
        keyboard.write_all(text.as_bytes()).await.unwrap();
    }

    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id().expect("a process that runs")
    }

    /// Sends a signal by its name, such as INT.
    pub(crate) fn signal(&self, name: &str) {
        signal(self.id(), name);
    }

    pub(crate) async fn kill_9(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// Waits until it ends by itself; its output is complete then.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let status = within("the process ends", self.child.wait()).await.unwrap();
        self.out.end().await;
        self.err.end().await;
        status
    }

    /// Waits until it listens for gRPC or HTTP. Returns the address.
    pub(crate) async fn listens(&self, protocol: &str) -> SocketAddr {
        let listening = format!("{protocol} is listening");
        self.until_logged(&listening).await;
        let line = self.logged().into_iter().find(|line| line.contains(&listening)).unwrap();
        address_in(&line)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let (out, err) = (self.printed().join("\n"), self.logged().join("\n"));
            eprintln!("process {:?} printed:\n{out}\nand logged:\n{err}", self.child.id());
        }
    }
}

/// The address of this machine in a line of the log, whose format may be text or JSON.
pub(crate) fn address_in(line: &str) -> SocketAddr {
    let (_, from) = line.split_once("127.0.0.1:").unwrap_or_else(|| panic!("no address: {line}"));
    let port: String = from.chars().take_while(char::is_ascii_digit).collect();
    SocketAddr::from((Ipv4Addr::LOCALHOST, port.parse().unwrap()))
}

/// Sends a signal to a process that may be gone.
pub(crate) fn signal(id: u32, name: &str) {
    let mut kill = std::process::Command::new("kill");
    let _ = kill.args([format!("-{name}"), id.to_string()]).stderr(Stdio::null()).status();
}
