//! Runs one transaction of many tuples through a real PostgreSQL and a real server. It checks that the transaction
//! arrives complete in bounded messages, measures the memory, and checks that a subscriber that is disconnected in the
//! middle resumes there.
//!
//! `cargo bench --bench large_transaction [-- TUPLES]` (default 1,000,000). It prints the measurements, and fails if a
//! change is missing, duplicated or too large.

#![expect(clippy::print_stdout, reason = "what was measured is its output")]

use anyhow::{Context as _, ensure};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;
use tuplewatch::api::grpc::proto::{DataChanges, WatchRequest, data_change::Type, watch_client::WatchClient};
use tuplewatch::dev_postgres::{Cluster, ClusterOptions, Installation, StopMode};

const MESSAGE_SIZE_MAX: usize = 1 << 20;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let tuples: usize = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(1_000_000);
    let directory = std::env::temp_dir().join(format!("tuplewatch-bench-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    let options = ClusterOptions { data_dir: directory.join("postgres"), ..ClusterOptions::default() };
    let mut cluster = Cluster::create_or_open(Installation::find(None)?, options).await?;
    cluster.start().await?;
    let uri = cluster.uri("postgres");
    let result = measure(&uri, &directory, tuples).await;
    cluster.stop(StopMode::Fast).await?;
    cluster.destroy().await?;
    std::fs::remove_dir_all(&directory)?;
    result
}

/// The server, killed when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    /// A line of /proc/PID/status, in KiB.
    fn status_kib(&self, field: &str) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find(|line| line.starts_with(field)).context("no such field")?;
        line.split_whitespace().nth(1).context("no value")?.parse().context("no number")
    }
}

fn start(uri: &str, directory: &Path) -> anyhow::Result<(Server, String)> {
    let program = env!("CARGO_BIN_EXE_tuplewatch");
    let setup = Command::new(program).args(["setup", "--database-uri", uri]).stdout(Stdio::null()).status()?;
    ensure!(setup.success(), "setup failed");
    let mut child = Command::new(program)
        .args(["serve", "--database-uri", uri, "--server-host", "127.0.0.1", "--server-grpc-port", "0"])
        .args(["--server-http-enabled", "false"])
        .args(["--logger-format", "json", "--changelog-path"])
        .arg(directory.join("log"))
        .stderr(Stdio::piped())
        .spawn()?;
    let stderr = child.stderr.take().context("no stderr")?;
    let server = Server(child);
    let mut lines = BufReader::new(stderr).lines();
    let mut address = String::new();
    for line in lines.by_ref() {
        let line: serde_json::Value = serde_json::from_str(&line?)?;
        if let Some(found) = line.get("address").and_then(|address| address.as_str()) {
            address = format!("http://{found}");
        }
        if line.get("message").and_then(|message| message.as_str()) == Some("streaming") {
            break;
        }
    }
    std::thread::spawn(move || lines.for_each(drop));
    Ok((server, address))
}

/// An open stream, whose headers have arrived.
async fn watch(
    address: &str,
    snap_token: &str,
) -> anyhow::Result<tonic::Streaming<tuplewatch::api::grpc::proto::WatchResponse>> {
    let mut client = WatchClient::connect(address.to_owned()).await?;
    let request = WatchRequest { tenant_id: "t1".into(), snap_token: snap_token.into() };
    Ok(client.watch(request).await?.into_inner())
}

fn numbers(changes: &DataChanges) -> impl Iterator<Item = usize> + '_ {
    changes.tuple_changes.iter().filter_map(|change| match &change.r#type {
        Some(Type::Tuple(tuple)) => tuple.entity.as_ref()?.id.parse().ok(),
        _ => None,
    })
}

async fn measure(uri: &str, directory: &Path, tuples: usize) -> anyhow::Result<()> {
    use prost::Message as _;
    let (server, address) = start(uri, directory)?;
    let base_kib = server.status_kib("VmRSS")?;
    let mut stream = watch(&address, "").await?;
    let (client, connection) = tokio_postgres::connect(uri, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    let insert = format!(
        "INSERT INTO tuplewatch.relation_tuples SELECT 't1', 'document', n::text, 'viewer', 'user', 'user-' || n, '' \
         FROM generate_series(1, {tuples}) n"
    );
    client.batch_execute(&insert).await?;
    let committed = Instant::now();

    let (mut received, mut messages, mut bytes_max) = (0, 0usize, 0);
    let mut tokens = Vec::new();
    let mut cut = false;
    while received < tuples {
        let response = stream.message().await?.context("the stream ended")?;
        bytes_max = bytes_max.max(response.encoded_len());
        let changes = response.changes.context("an empty response")?;
        for number in numbers(&changes) {
            received += 1;
            ensure!(number == received, "change {number} came where {received} was due");
        }
        messages += 1;
        tokens.push((changes.snap_token.clone(), received));
        if !cut && received >= tuples / 2 {
            cut = true;
            stream = watch(&address, &changes.snap_token).await?;
        }
    }
    let seconds = committed.elapsed().as_secs_f64();
    let peak_kib = server.status_kib("VmHWM")?;

    let mut resumed = 0;
    for (token, had) in tokens.iter().step_by((tokens.len() / 8).max(1)) {
        let mut stream = watch(&address, token).await?;
        let mut next = *had;
        while next < tuples {
            let response = stream.message().await?.context("the stream ended")?;
            for number in numbers(&response.changes.context("an empty response")?) {
                next += 1;
                ensure!(number == next, "after a token at {had}: {number} came where {next} was due");
            }
        }
        resumed += 1;
    }
    ensure!(bytes_max <= MESSAGE_SIZE_MAX, "a message of {bytes_max} bytes");
    println!("tuples in one transaction   {tuples}");
    println!("messages                    {messages}, the largest of {bytes_max} bytes");
    println!("commit to last change       {seconds:.2} s, {:.0} changes/s", tuples as f64 / seconds);
    println!("resumed inside it           {resumed} times, and once while it was streamed");
    println!("resident memory             {} MiB at the most, {} MiB before", peak_kib / 1024, base_kib / 1024);
    Ok(())
}
