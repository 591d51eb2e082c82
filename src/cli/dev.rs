//! `tuplewatch dev`: starts a private PostgreSQL, prepares it, and serves, in one command.
//!
//! The cluster and the change log live in one directory, and stay there for the next run. Ctrl-C stops the server and
//! the cluster.

use super::overrides::ConfigArgs;
use super::terminal::{Style, program};
use super::{say, setup, stop_signal};
use crate::app;
use crate::cli::telemetry;
use crate::config::Config;
use crate::dev_postgres::{Cluster, ClusterOptions, Installation, StopMode};
use anyhow::{Context as _, anyhow};
use clap::ValueHint;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(super) struct DevArgs {
    /// Directory of the cluster and of the change log
    #[arg(long, default_value = "./tuplewatch-dev", value_name = "DIR", value_hint = ValueHint::DirPath)]
    data_dir: PathBuf,
    /// Directory with PostgreSQL's programs (postgres, initdb, pg_ctl), if they are not found automatically
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pg_bin: Option<PathBuf>,
    /// Port of the private PostgreSQL. By default a free port is chosen once and kept
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pg_port: Option<u16>,
}

const DATABASE: &str = "postgres";

/// The address of the private cluster, and the directory of all data.
struct Place {
    uri: String,
    data_dir: PathBuf,
}

pub(super) async fn run(config: ConfigArgs, args: &DevArgs) -> anyhow::Result<()> {
    if config.sets("database.uri") {
        let what = "dev starts its own PostgreSQL: remove --database-uri, or use serve";
        return Err(app::Misconfigured::Command(what).into());
    }
    let config = config
        .with_default("server.host", "127.0.0.1".into())
        .with_default("changelog.path", args.data_dir.join("log").display().to_string());
    // Errors in the flags are reported before anything is started.
    telemetry::init(&config.load()?.logger);

    let installation = Installation::find(args.pg_bin.as_deref())?;
    let options =
        ClusterOptions { data_dir: args.data_dir.join("postgres"), port: args.pg_port, ..ClusterOptions::default() };
    // From here on Ctrl-C also stops the cluster. If anything fails, dropping it stops it.
    let mut stopping = Box::pin(stop_signal());
    say(&format!("PostgreSQL {} from {}", installation.version(), installation.bin_dir().display()));
    let mut cluster = tokio::select! {
        cluster = Cluster::create_or_open(installation, options) => cluster?,
        () = &mut stopping => return Ok(()),
    };
    if cluster.is_elsewhere() {
        say(&format!(
            "The cluster is in {}: PostgreSQL does not run as root, and its unprivileged user cannot access {}",
            cluster.data_dir().display(),
            args.data_dir.display()
        ));
    }
    let ended = tokio::select! {
        started = cluster.start() => match started {
            Ok(()) => None,
            Err(error) => Some(Err(error.into())),
        },
        () = &mut stopping => Some(Ok(())),
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            let place = Place { uri: cluster.uri(DATABASE), data_dir: std::path::absolute(&args.data_dir)? };
            let config = config.with("database.uri", place.uri.clone());
            tokio::select! {
                served = serve(config, &place, &mut stopping) => served,
                status = cluster.exited() => {
                    let log = cluster.log_path();
                    Err(anyhow!("PostgreSQL ended unexpectedly ({status:?}): see {}", log.display()))
                }
            }
        }
    };
    cluster.stop(StopMode::Fast).await.context("cannot stop PostgreSQL")?;
    ended
}

async fn serve(config: ConfigArgs, cluster: &Place, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let config = config.load()?;
    let steps = setup::apply(&config, false).await?;
    say(match steps {
        0 => "Continuing with the data of the previous run",
        _ => "Created tables, publication and replication slot",
    });
    say(&welcome(&config, cluster, Style::of_stdout()));
    app::serve(&config, false, stop).await
}

/// The addresses of the server, and the first commands to try.
fn welcome(config: &Config, Place { uri, data_dir }: &Place, style: Style) -> String {
    let host = &config.server.host;
    let address = |port: u16| match port {
        0 => format!("{host}, a free port: the log says which"),
        port => format!("{host}:{port}"),
    };
    let mut places = vec![("gRPC", address(config.server.grpc.port))];
    if let Some(http) = &config.server.http {
        places.push(("HTTP", address(http.port)));
    }
    places.push(("PostgreSQL", uri.clone()));
    places.push(("data", data_dir.display().to_string()));
    let places: String =
        places.iter().map(|(name, place)| format!("  {} {place}\n", style.faint(&format!("{name:10}")))).collect();
    let insert = format!(
        "psql {uri} -c \"INSERT INTO tuplewatch.relation_tuples VALUES \
         ('t1', 'document', '1', 'viewer', 'user', 'alice', '')\""
    );
    format!(
        "\n{places}\nNow, in a second terminal, watch tenant t1:\n\n  {}\n\n\
         and in a third one, write a tuple:\n\n  {}\n\n\
         Ctrl-C stops tuplewatch and PostgreSQL; the data stays for the next time.\n",
        style.strong(&watch_command(config)),
        style.strong(&insert)
    )
}

/// The command that watches this server.
fn watch_command(config: &Config) -> String {
    let credentials = if config.authn.credentials.is_some() { "TUPLEWATCH_TOKEN=… " } else { "" };
    let server = match (&config.server.grpc.tls, config.server.grpc.port) {
        (None, 3478) => String::new(),
        (None, 0) => " --server http://127.0.0.1:PORT".to_owned(),
        (None, port) => format!(" --server http://127.0.0.1:{port}"),
        (Some(_), port) => format!(" --server https://localhost:{port} --ca-cert FILE"),
    };
    format!("{credentials}{} watch --tenant t1{server}", program())
}
