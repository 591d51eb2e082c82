//! Keeps an index of who has which relation to what, and prints each entry that changes.
//!
//! ```text
//! cargo run --example watch -- TENANT STATE_FILE [URL]
//! ```
//!
//! Stands for whatever follows a tenant: a cache, a search index, materialized permissions. `../README.md` has the rules that the
//! comments refer to.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for a terminal")]

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;
// Of another crate, these come from compiling proto/ with tonic-prost-build.
use tuplewatch::api::grpc::proto::data_change::{Operation, Type};
use tuplewatch::api::grpc::proto::data_client::DataClient;
use tuplewatch::api::grpc::proto::watch_client::WatchClient;
use tuplewatch::api::grpc::proto::{
    DataChange, RelationshipReadRequest, RelationshipReadRequestMetadata, Tuple, TupleFilter, WatchRequest,
};

const WAIT_MAX: Duration = Duration::from_secs(10);

/// Subjects by `document:1#viewer`, and the token of the state that they are from: saved together (rule 3).
#[derive(Default, Serialize, Deserialize)]
struct Index {
    token: String,
    subjects: BTreeMap<String, BTreeSet<String>>,
}

impl Index {
    fn load(path: &Path) -> anyhow::Result<Self> {
        match File::open(path) {
            Ok(file) => serde_json::from_reader(file).with_context(|| format!("{} does not read", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("cannot open {}", path.display())),
        }
    }

    /// Written beside the file and moved over it: whoever is killed here leaves the old one or the new one. With a database, rows
    /// and token go into one transaction.
    fn save(&mut self, path: &Path, token: String) -> anyhow::Result<()> {
        self.token = token;
        let beside = path.with_extension("new");
        let file = File::create(&beside)?;
        serde_json::to_writer(&file, self)?;
        file.sync_all()?;
        Ok(std::fs::rename(&beside, path)?)
    }

    /// Adds or removes, whether it is there or not: a change may come that was already read (rule 2).
    fn apply(&mut self, change: &DataChange) {
        // Attributes come the same way; this index has none.
        let Some(Type::Tuple(tuple)) = &change.r#type else { return };
        let (key, subject) = entry(tuple);
        let subjects = self.subjects.entry(key.clone()).or_default();
        match change.operation() {
            Operation::Delete => subjects.remove(&subject),
            _ => subjects.insert(subject),
        };
        println!("{key} = {}", subjects.iter().map(String::as_str).collect::<Vec<_>>().join(" "));
    }
}

/// `document:1#viewer` and `user:ada`.
fn entry(tuple: &Tuple) -> (String, String) {
    let (entity, subject) = (tuple.entity.clone().unwrap_or_default(), tuple.subject.clone().unwrap_or_default());
    let relation = if subject.relation.is_empty() { String::new() } else { format!("#{}", subject.relation) };
    let key = format!("{}:{}#{}", entity.r#type, entity.id, tuple.relation);
    (key, format!("{}:{}{relation}", subject.r#type, subject.id))
}

struct Follower {
    channel: Channel,
    tenant: String,
    path: PathBuf,
    index: Index,
    /// Where the next stream starts; empty: now.
    token: String,
    /// Whether the index has everything up to the token.
    is_complete: bool,
    failures: u32,
}

impl Follower {
    /// One stream, until it ends.
    async fn stream(&mut self) -> anyhow::Result<()> {
        let request = WatchRequest { tenant_id: self.tenant.clone(), snap_token: self.token.clone() };
        // Returns once the start is fixed: what is committed from here on is in the stream (rule 1).
        let response = WatchClient::new(self.channel.clone()).watch(with_credentials(request)?).await?;
        if !self.is_complete {
            let start = response.metadata().get("snap-token").context("no start token: is this tuplewatch?")?;
            let start = start.to_str()?.to_owned();
            self.read_state(&start).await?;
            self.index.save(&self.path, start.clone())?;
            (self.token, self.is_complete) = (start, true);
        }
        let mut responses = response.into_inner();
        while let Some(response) = responses.message().await? {
            self.failures = 0;
            let changes = response.changes.unwrap_or_default();
            changes.tuple_changes.iter().for_each(|change| self.index.apply(change));
            self.index.save(&self.path, changes.snap_token.clone())?;
            self.token = changes.snap_token;
        }
        Ok(())
    }

    /// Reads everything. Pages are of different moments; what changes in between comes with the stream (rule 2).
    async fn read_state(&mut self, start: &str) -> anyhow::Result<()> {
        let mut request = RelationshipReadRequest {
            tenant_id: self.tenant.clone(),
            metadata: Some(RelationshipReadRequestMetadata { snap_token: start.to_owned() }),
            filter: Some(TupleFilter::default()),
            page_size: 100,
            continuous_token: String::new(),
        };
        self.index.subjects.clear();
        let mut count = 0;
        loop {
            let mut call = with_credentials(request.clone())?;
            call.set_timeout(Duration::from_secs(30));
            let page = DataClient::new(self.channel.clone()).read_relationships(call).await?.into_inner();
            count += page.tuples.len();
            for (key, subject) in page.tuples.iter().map(entry) {
                self.index.subjects.entry(key).or_default().insert(subject);
            }
            request.continuous_token = page.continuous_token;
            if request.continuous_token.is_empty() {
                println!("read anew: {count} tuples");
                return Ok(());
            }
        }
    }

    async fn follow(mut self) -> anyhow::Result<()> {
        loop {
            if let Err(error) = self.stream().await {
                let status = error.downcast::<Status>()?;
                eprintln!("{:?}: {}", status.code(), status.message());
                let details = status.get_error_details();
                let next = details.error_info().and_then(|info| info.metadata.get("next_snap_token"));
                match (status.code(), next) {
                    // Rule 4: changes are missing before this token.
                    (Code::Aborted, Some(next)) => (self.token, self.is_complete) = (next.clone(), false),
                    // Rule 4: there is no token to go on from.
                    (Code::Aborted | Code::OutOfRange | Code::FailedPrecondition, _) => {
                        (self.token, self.is_complete) = (String::new(), false);
                    }
                    // What passes by itself.
                    (Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded, _)
                    | (Code::Internal | Code::Unknown | Code::Cancelled, _) => {}
                    // Everything else is for a person to look at.
                    _ => return Err(status.into()),
                }
            }
            // Rule 5. Not all at once: others lost the same server.
            self.failures += 1;
            let wait = WAIT_MAX.min(Duration::from_millis(100 << self.failures.min(10)));
            tokio::time::sleep(wait.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
        }
    }
}

fn with_credentials<T>(request: T) -> anyhow::Result<Request<T>> {
    let mut request = Request::new(request);
    if let Ok(token) = std::env::var("TUPLEWATCH_TOKEN") {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse()?);
    }
    Ok(request)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(tenant), Some(path)) = (arguments.next(), arguments.next()) else {
        anyhow::bail!("usage: watch TENANT STATE_FILE [URL]");
    };
    let url = arguments.next().unwrap_or_else(|| "http://localhost:3478".to_owned());
    // Over TLS: an https URL, and `tls_config`.
    let channel = Endpoint::from_shared(url)?
        // A peer that is gone says nothing. Without pings one would wait for it for ever.
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(10))
        // How far the server may send ahead of us.
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(16 << 20)
        .connect_lazy();
    let path = PathBuf::from(path);
    let index = Index::load(&path)?;
    let (token, is_complete) = (index.token.clone(), !index.token.is_empty());
    Follower { channel, tenant, path, index, token, is_complete, failures: 0 }.follow().await
}
