//! `tuplewatch watch`: prints the changes of a tenant as they are committed, and resumes after a lost connection.
//!
//! Changes go to standard output. Notices about the stream go to standard error.

mod json;
mod lines;

use super::connection::{ConnectionArgs, Connector};
use super::failure::{Failure, is_local};
use super::terminal::{Style, program};
use super::{examples, stop_signal};
use crate::api::grpc::proto::watch_client::WatchClient;
use crate::api::grpc::proto::{DataChanges, WatchRequest};
use crate::api::grpc::watch::START_SNAP_TOKEN;
use crate::api::watch::{AFTER_GAP, NEXT_SNAP_TOKEN};
use crate::model::diagnostic::shell_word;
use anyhow::{Context as _, anyhow};
use clap::ValueHint;
use lines::Lines;
use std::io;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::time::timeout;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

#[derive(Debug, clap::Args)]
#[command(after_help = examples::WATCH)]
pub(super) struct WatchArgs {
    /// The tenant whose changes to print
    #[arg(long, short, value_hint = ValueHint::Other)]
    tenant: String,
    /// Start after this token instead of now
    #[arg(long, value_name = "TOKEN", value_hint = ValueHint::Other)]
    snap_token: Option<String>,
    #[command(flatten)]
    connection: ConnectionArgs,
    /// Text for people, or one JSON object a line
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Text,
    Json,
}

/// The longest wait for the last notice to be written.
const LAST_WORDS_MAX: Duration = Duration::from_secs(1);
const WAIT_MIN: Duration = Duration::from_millis(100);
const WAIT_MAX: Duration = Duration::from_secs(5);

pub(super) async fn run(args: &WatchArgs) -> anyhow::Result<()> {
    let connector = args.connection.connector()?;
    let mut watch = Watch::new(args);
    tokio::select! {
        ended = watch.follow(connector) => return ended,
        () = stop_signal() => {}
    }
    // The reader of standard error may be gone, so the wait is limited.
    let _ = timeout(LAST_WORDS_MAX, watch.say_how_to_resume()).await;
    Ok(())
}

/// One run of the command, over all its connections.
struct Watch<'a> {
    args: &'a WatchArgs,
    printer: Printer,
    /// The style of notices.
    style: Style,
    /// The start of the next connection; empty means now.
    token: String,
    /// Whether a stream was ever open.
    has_begun: bool,
    /// Whether the loss of the connection was reported, so that its return has to be.
    is_lost: bool,
    wait: Duration,
}

/// The reason why a connection ended.
enum End {
    /// The connection could not be made.
    Unreachable(tonic::transport::Error),
    /// The server ended the stream, or the connection broke.
    Status(Status),
    /// The output could not be written.
    Output(io::Error),
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

impl<'a> Watch<'a> {
    fn new(args: &'a WatchArgs) -> Self {
        let token = args.snap_token.clone().unwrap_or_default();
        let (printer, style) = (Printer::new(args.output), Style::of_stderr());
        Self { args, printer, style, token, has_begun: false, is_lost: false, wait: WAIT_MIN }
    }

    async fn follow(&mut self, connector: Connector) -> anyhow::Result<()> {
        let connection = &self.args.connection;
        loop {
            let authorization = connection.authorization()?;
            let failure = match self.stream(&connector, authorization.clone()).await {
                Ok(()) => Failure::of_status(&Status::unavailable("the server ended the stream")),
                // A reader such as `head` has read enough.
                Err(End::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                Err(End::Output(error)) => return Err(error).context("cannot print the changes"),
                Err(End::Unreachable(error)) => Failure::of_connection(&error),
                // After a gap the command warns and continues, as a person at a terminal would.
                Err(End::Status(status)) if status.code() == Code::Aborted => {
                    self.pass_gap(&status).await;
                    continue;
                }
                // The token expired, and its file has a new one.
                Err(End::Status(status))
                    if status.code() == Code::Unauthenticated && connection.authorization()? != authorization =>
                {
                    self.is_lost = true;
                    continue;
                }
                Err(End::Status(status)) if !is_local(&status) => match Failure::of_status(&status) {
                    Failure::Lasting(text) => return Err(anyhow!("the server refused: {text}")),
                    passing @ Failure::Passing { .. } => passing,
                },
                Err(End::Status(status)) => Failure::of_status(&status),
            };
            match failure {
                Failure::Passing { text, pause } => self.wait_after(&text, pause).await,
                Failure::Lasting(text) => return Err(anyhow!("cannot watch {}: {text}", connection.server)),
            }
        }
    }

    /// Continues after a gap, at the server's next token if it sent one, else from now.
    async fn pass_gap(&mut self, status: &Status) {
        let details = status.get_error_details();
        let next = details.error_info().and_then(|info| info.metadata.get(NEXT_SNAP_TOKEN)).cloned();
        self.token = next.unwrap_or_default();
        let what = status.message().trim_end_matches(AFTER_GAP);
        let text = format!("GAP: {what}. Changes are missing here; {}", self.resume_position());
        notice(&self.style.warning(&text)).await;
    }

    /// The position of the next connection, in words.
    fn resume_position(&self) -> String {
        match &*self.token {
            "" => "reading from now on".to_owned(),
            token => format!("resuming after token {}", short(token)),
        }
    }

    /// Runs one connection until it ends.
    async fn stream(&mut self, connector: &Connector, authorization: Option<AsciiMetadataValue>) -> Result<(), End> {
        let channel: Channel = connector.connect().await.map_err(End::Unreachable)?;
        let tenant_id = self.args.tenant.clone();
        let mut request = Request::new(WatchRequest { tenant_id, snap_token: self.token.clone() });
        if let Some(authorization) = authorization {
            request.metadata_mut().insert("authorization", authorization);
        }
        let response = WatchClient::new(channel).watch(request).await?;
        self.say_begun().await;
        // A stream that breaks before its first message then resumes at its start.
        if self.token.is_empty() {
            let start = response.metadata().get(START_SNAP_TOKEN).and_then(|token| token.to_str().ok());
            self.token = start.unwrap_or_default().to_owned();
        }
        let mut responses = response.into_inner();
        while let Some(response) = responses.message().await? {
            let changes = response.changes.unwrap_or_default();
            self.printer.print(&changes).await.map_err(End::Output)?;
            self.token = changes.snap_token;
        }
        Ok(())
    }

    async fn say_begun(&mut self) {
        if !self.has_begun {
            let WatchArgs { tenant, connection, .. } = self.args;
            let from = if self.token.is_empty() { "now".to_owned() } else { format!("token {}", short(&self.token)) };
            let text = format!("watching tenant {tenant} on {} from {from}; Ctrl-C ends", connection.server);
            notice(&self.style.faint(&text)).await;
        } else if self.is_lost {
            notice(&self.style.faint(&format!("connected again, {}", self.resume_position()))).await;
        }
        (self.has_begun, self.is_lost, self.wait) = (true, false, WAIT_MIN);
    }

    /// Waits before the next attempt. A lost connection is reported once, not at each attempt.
    async fn wait_after(&mut self, lost: &str, pause: Duration) {
        let wait = self.wait.max(pause);
        if !self.is_lost {
            let server = &self.args.connection.server;
            let (first, last) = (wait.as_secs_f32(), WAIT_MAX.as_secs());
            let text = format!("{server}: {lost}; reconnecting in {first} s, then at least every {last} s");
            notice(&self.style.warning(&text)).await;
        }
        self.is_lost = true;
        tokio::time::sleep(wait).await;
        self.wait = (self.wait * 2).min(WAIT_MAX);
    }

    /// Prints the command that resumes after the last printed change.
    async fn say_how_to_resume(&self) {
        if !self.has_begun {
            return;
        }
        let mut words = vec!["watch".to_owned(), "--tenant".to_owned(), self.args.tenant.clone()];
        words.extend(self.args.connection.flags());
        if self.args.output == Output::Json {
            words.extend(["--output".to_owned(), "json".to_owned()]);
        }
        words.extend(["--snap-token".to_owned(), self.token.clone()]);
        let words: Vec<_> = words.iter().map(|word| shell_word(word)).collect();
        let command = format!("{} {}", program(), words.join(" "));
        notice(&format!("{}\n  {}", self.style.faint("to resume from here:"), self.style.strong(&command))).await;
    }
}

/// Prints a notice to standard error. As in [`Printer::print`], the caller can drop this future while it waits for a
/// reader.
async fn notice(text: &str) {
    let mut out = tokio::io::stderr();
    let _ = out.write_all(format!("{text}\n").as_bytes()).await;
    let _ = out.flush().await;
}

/// The end of a token, which tells it from others. Tokens have similar beginnings.
fn short(token: &str) -> String {
    const SHOWN: usize = 10;
    match token.char_indices().nth_back(SHOWN - 1) {
        Some((at, _)) if at > 0 => format!("…{}", token.get(at..).unwrap_or_default()),
        _ => token.to_owned(),
    }
}

enum Printer {
    Text(Lines),
    Json,
}

impl Printer {
    fn new(output: Output) -> Self {
        match output {
            Output::Text => Self::Text(Lines::to_stdout()),
            Output::Json => Self::Json,
        }
    }

    /// Prints a whole message at once. The caller can drop this future while it waits for a reader that has stopped.
    async fn print(&mut self, changes: &DataChanges) -> io::Result<()> {
        let text = match self {
            Self::Text(lines) => lines.message(changes),
            Self::Json => json::line(changes),
        };
        let mut out = tokio::io::stdout();
        out.write_all(text.as_bytes()).await?;
        out.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_shortened_to_their_ends() {
        for (token, shown) in [("", ""), ("abc", "abc"), ("0123456789", "0123456789"), ("xx0123456789", "…0123456789")]
        {
            assert_eq!(short(token), shown);
        }
    }
}
