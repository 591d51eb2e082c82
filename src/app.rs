//! The composition root: it builds the parts of `serve`, connects and supervises them, and shuts them down in order.
//!
//! ```text
//!  session ──▶ LogAndHub ──┬──▶ recorder ──▶ change log ──┐
//!                          └──▶ hub ◀── releaser          │ reads
//!                                └──▶ gRPC streams ◀──────┘
//!                                       └──▶ HTTP streams
//!
//!  gRPC calls of Data and Tenancy ◀──▶ store ◀──▶ PostgreSQL
//! ```
//!
//! The parts shut down in the order of the stream: first the subscribers, with a status that lets them resume; then the
//! session, whose last acknowledgement waits for the log; then the log.

mod delivery;
pub mod diagnosis;
mod edges;
pub(crate) mod log_and_hub;
mod node_status;
mod primary;

use crate::admin::monitor::{self, Monitor, Thresholds};
use crate::api::grpc;
use crate::changelog::recorder;
use crate::changelog::{self, ChangeLog, LocalLog};
use crate::config::{self, Config, MappingSource, Preset};
use crate::decode::assembler::{Limits, OnUndecodable};
use crate::decode::mapping::{Mapping, PERMIFY_PRESET, Spec, TUPLES_PRESET};
use crate::hub::{self, Hub};
use crate::metrics::process::Process;
use crate::model::lsn::Lsn;
use crate::postgres::connection::Endpoints;
use crate::postgres::slot::AckDelay;
use crate::replication::upstream::walsender::Postgres;
use crate::replication::{self, Session};
use crate::thread;
use crate::yaml;
use anyhow::{Context as _, anyhow};
use delivery::Delivery;
use edges::Edges;
use log_and_hub::{LogAndHub, record_watermark};
use node_status::NodeStatus;
use primary::{SqlPrimary, SqlSnapshots};
use std::borrow::Cow;
use std::fmt;
use std::io::IsTerminal as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

/// The largest change. gRPC clients refuse messages above 4 MiB by default, and the token and the framing need some of
/// it.
const CHANGE_BYTES_MAX: usize = (4 << 20) - 1024;
/// The bytes of a response besides its changes: a token of 60 characters, keys and lengths. It is far below the
/// smallest `message_size_max`.
const RESPONSE_BYTES: usize = 80;
/// An open transaction is handed to the log in pieces of this size.
const STAGE_BYTES: usize = 4 << 20;

/// An error of the configuration that shows only when it is used. Its source has the cause.
#[derive(Debug, thiserror::Error)]
pub enum Misconfigured {
    /// The file cannot be read.
    #[error("cannot read {0} (mapping.file)")]
    MappingFile(MappingName),
    /// The text is not YAML, or does not have the form of a mapping.
    #[error("{0} does not read")]
    MappingForm(MappingName),
    /// The mapping is inconsistent.
    #[error("{0} cannot be used")]
    Mapping(MappingName),
    /// The URI cannot be parsed.
    #[error("database.uri cannot be used")]
    DatabaseUri,
    /// The configuration does not permit the command.
    #[error("{0}")]
    Command(&'static str),
}

/// The mapping that an error concerns.
#[derive(Clone, Debug)]
pub struct MappingName(MappingSource);

impl fmt::Display for MappingName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            MappingSource::Preset(Preset::Tuples) => f.write_str("preset tuples"),
            MappingSource::Preset(Preset::Permify) => f.write_str("preset permify"),
            MappingSource::File(path) => write!(f, "mapping file {}", path.display()),
        }
    }
}

/// Loads the configured mapping.
///
/// # Errors
/// If the file cannot be read, or is not a valid mapping.
pub fn load_mapping(config: &Config) -> anyhow::Result<Mapping> {
    let name = || MappingName(config.mapping.source.clone());
    let text = match &config.mapping.source {
        MappingSource::Preset(Preset::Tuples) => TUPLES_PRESET.into(),
        MappingSource::Preset(Preset::Permify) => PERMIFY_PRESET.into(),
        MappingSource::File(path) => {
            Cow::Owned(std::fs::read_to_string(path).with_context(|| Misconfigured::MappingFile(name()))?)
        }
    };
    let mut spec: Spec = yaml::from_str(&text).with_context(|| Misconfigured::MappingForm(name()))?;
    if config.mapping.source == MappingSource::Preset(Preset::Permify) {
        spec = spec.in_schema(&config.mapping.schema);
    }
    Mapping::new(spec).with_context(|| Misconfigured::Mapping(name()))
}

/// The endpoints of the configured database.
///
/// # Errors
/// If no database is configured, or its URI is invalid.
pub fn endpoints(config: &Config) -> anyhow::Result<Endpoints> {
    let uri = config.require_database_uri()?;
    Endpoints::parse(uri.expose()).context(Misconfigured::DatabaseUri)
}

/// The options of the session.
fn session_options(config: &Config, mapping: Arc<Mapping>) -> replication::Options {
    replication::Options {
        slot: config.replication.slot.clone(),
        publication: config.replication.publication.clone(),
        mapping,
        limits: Limits {
            message_bytes: config.service.watch.message_size_max.to_usize() - RESPONSE_BYTES,
            change_bytes: CHANGE_BYTES_MAX,
            stage_bytes: STAGE_BYTES,
        },
        on_undecodable: match config.mapping.on_undecodable {
            config::OnUndecodable::Gap => OnUndecodable::Gap,
            config::OnUndecodable::Halt => OnUndecodable::Halt,
        },
        ack_delay: ack_delay(config),
        commands: config.commands().clone(),
        failover: config.replication.failover == config::Failover::Auto,
        connections_max: connections_max(config),
    }
}

/// The most SQL connections of this process. Data and Tenancy use none if another program writes the tables.
fn connections_max(config: &Config) -> usize {
    let for_store = if edges::has_store(config) { config.database.connections_for_store() } else { 0 };
    config::STREAMING_CONNECTIONS + for_store
}

fn ack_delay(config: &Config) -> AckDelay {
    let config::AckDelay { age, size } = config.replication.acknowledgement_delay;
    AckDelay { age, size_bytes: size.get() }
}

/// The thresholds of the slot's monitor. WAL that is retained on purpose, by the acknowledgement delay, does not count.
/// Zero still disables a warning.
fn thresholds(config: &Config) -> Thresholds {
    let (warn, ack_delay) = (&config.replication.warn, ack_delay(config));
    let retained = warn.retained_wal.get();
    Thresholds {
        retained_wal_bytes: if retained == 0 { 0 } else { retained.saturating_add(ack_delay.bytes_max()) },
        safe_wal_bytes: warn.safe_wal_size.get(),
        lag: if warn.lag.is_zero() { warn.lag } else { warn.lag + ack_delay.age },
    }
}

/// Serves until `stop` completes. An error before the first stream names the remedy.
///
/// # Errors
/// If it cannot start, or if the change log fails.
pub async fn serve(config: &Config, reset_log: bool, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let mapping = Arc::new(load_mapping(config)?);
    let endpoints = endpoints(config)?;
    // The first reading determines the start time of the process.
    Process::read();
    let edges = Edges::bind(config).await?;

    let log = open_log(config, reset_log).await?;
    let (recorder, recorder_handle) = recorder::new(log.clone());
    let recording = start_recorder(recorder)?;
    let options = hub::Options {
        window_bytes: config.changelog.memory_window.to_usize(),
        before_visible: config.service.watch.before_visible,
    };
    let state = log.state();
    let hub = open_hub(log.clone(), recorder_handle.appended(), options).await?;

    let recorded = recorder_handle.clone();
    let (durable, room) = (recorded.durable(), recorded.room());
    let joined = LogAndHub { recorder: recorder_handle, hub: hub.clone() };
    let session_options = session_options(config, mapping.clone());
    let postgres = Postgres::new(session_options.clone(), endpoints.clone());
    let primaries = postgres.primaries();
    let watched = monitor::Options {
        slot: session_options.slot.clone(),
        node_id: state.node_id.clone(),
        thresholds: thresholds(config),
        commands: session_options.commands.clone(),
    };
    let monitor = Monitor::new(endpoints, primaries.clone(), watched);
    let mut stop = std::pin::pin!(stop);
    let ready = tokio::select! {
        ready = postgres.preflight(&state) => ready.map(|()| true),
        () = &mut stop => Ok(false),
    };
    if !matches!(ready, Ok(true)) {
        drop((joined, recorded));
        recording.await?;
        return ready.map(drop).context("cannot start");
    }

    let session = Session::new(session_options, postgres, joined);
    let (stop_streams, streams_stopped) = watch::channel(false);
    let (stop_session, session_stopped) = watch::channel(false);
    let snapshots = SqlSnapshots::new(primaries.clone());
    let (primary, starts, answering) = SqlPrimary::new(primaries.clone(), mapping.tenants());
    let delivery = Delivery {
        hub: hub.clone(),
        status: session.status(),
        room: room.clone(),
        received: session.received(),
        durable: durable.clone(),
        primaries: primaries.clone(),
        visibility: (!options.before_visible).then(|| snapshots.answers()),
        starts,
    };
    let (readiness, judging) = delivery.follow(streams_stopped.clone());
    let health = grpc::health::service(readiness.clone());
    let node_status = NodeStatus {
        log,
        hub: hub.clone(),
        readiness,
        status: session.status(),
        received: session.received(),
        durable,
        room,
        reports: monitor.reports(),
        ready_lag_max: config.server.http.as_ref().map_or(Duration::ZERO, |http| http.ready_lag_max),
    };
    let services = edges::services(config, &hub, primary, primaries, streams_stopped.clone());

    let mut background = JoinSet::new();
    background.spawn(record_watermark(hub.watch_watermark(), recorded));
    let (_, releasing) = thread::run("releaser".to_owned(), hub::releaser::run(hub.clone(), snapshots))
        .context("cannot start the releaser's thread")?;
    background.spawn(releasing);
    background.spawn(answering);
    background.spawn(monitor.run(session.received()));
    background.spawn(request_checks(session.check_request()));
    let judging = tokio::spawn(judging);
    let serving = edges.serve(services, node_status, health, edges::streams_max(config), streams_stopped);
    let mut server = tokio::spawn(serving);
    let streaming = thread::run("session".to_owned(), session.run(session_stopped));
    let (_, streaming) = streaming.context("cannot start the session's thread")?;
    let mut session = tokio::spawn(streaming);

    let ended: anyhow::Result<()> = tokio::select! {
        () = &mut stop => Ok(()),
        served = &mut server => flatten(served).and(Err(anyhow!("the servers ended by themselves"))),
        streamed = &mut session => flatten(streamed).and(Err(anyhow!("the replication session ended by itself"))),
        // Without the releaser, for example, nothing would be delivered any more, and only a new process has a new one.
        Some(part) = background.join_next() => {
            part.context("a part panicked").and(Err(anyhow!("a part that delivers changes ended by itself")))
        }
    };
    tracing::info!("shutting down");

    let deadline = tokio::time::Instant::now() + config.shutdown.grace_period;
    stop_streams.send_replace(true);
    hub.close();
    // This ends the streams of grpc.health.v1, for which the server would wait.
    let _ = judging.await;
    if !server.is_finished() && tokio::time::timeout_at(deadline, &mut server).await.is_err() {
        tracing::warn!("streams were still open at the end of shutdown.grace_period, and are closed");
        server.abort();
    }
    stop_session.send_replace(true);
    // The log and the slot get this time even if the streams have used the grace period up.
    let last = deadline.max(tokio::time::Instant::now() + Duration::from_secs(1));
    if !session.is_finished() && tokio::time::timeout_at(last, &mut session).await.is_err() {
        tracing::warn!("PostgreSQL did not confirm the last acknowledgement in time: it will send some changes again");
        session.abort();
    }
    background.shutdown().await;
    // The failure of the log comes first, because it is what ends a session.
    recording.await.map_err(Into::into).and(ended)
}

fn flatten<E: Into<anyhow::Error>>(joined: Result<Result<(), E>, tokio::task::JoinError>) -> anyhow::Result<()> {
    joined.context("a task panicked")?.map_err(Into::into)
}

fn log_options(config: &Config) -> changelog::Options {
    changelog::Options {
        path: config.changelog.path.clone(),
        age_seconds: config.changelog.retention.age.as_secs(),
        size_bytes: config.changelog.retention.size.get(),
        reserve_bytes: config.changelog.disk_reserve.get(),
    }
}

async fn open_log(config: &Config, reset: bool) -> anyhow::Result<Arc<dyn ChangeLog>> {
    let options = log_options(config);
    let open = move || {
        if reset {
            LocalLog::reset(&options.path)?;
            tracing::warn!("the change log was deleted, and a new one begins: earlier tokens are refused");
        }
        LocalLog::open(options)
    };
    Ok(Arc::new(tokio::task::spawn_blocking(open).await??))
}

/// Runs the recorder on its own thread. The returned future completes when all handles are dropped and everything is
/// durable.
fn start_recorder(
    recorder: recorder::Recorder,
) -> anyhow::Result<impl Future<Output = Result<(), changelog::Error>> + Send + 'static> {
    let recording = async move {
        let ended = recorder.run().await;
        if let Err(error) = &ended {
            tracing::error!("{error}");
        }
        ended
    };
    let (_, recorded) = thread::run("recorder".to_owned(), recording).context("cannot start the recorder's thread")?;
    Ok(recorded)
}

/// Opens the hub with the transactions that were not yet visible when the log was closed.
async fn open_hub(
    log: Arc<dyn ChangeLog>,
    appended: watch::Receiver<Lsn>,
    options: hub::Options,
) -> anyhow::Result<Hub> {
    Ok(tokio::task::spawn_blocking(move || Hub::new(log, appended, options)).await??)
}

/// On SIGHUP, the session checks the publication at once, and does not wait before its next attempt. A closing terminal
/// sends the same signal to end the process, so a process with a terminal does not catch it. Never returns, because the
/// end of a part ends the process.
async fn request_checks(request: Arc<Notify>) {
    use tokio::signal::unix::{SignalKind, signal};
    if !std::io::stderr().is_terminal() {
        match signal(SignalKind::hangup()) {
            Ok(mut hangups) => {
                while hangups.recv().await.is_some() {
                    tracing::info!("SIGHUP: checking the publication at once");
                    request.notify_one();
                }
            }
            Err(error) => tracing::warn!("SIGHUP cannot be caught: {error}"),
        }
    }
    std::future::pending().await
}
