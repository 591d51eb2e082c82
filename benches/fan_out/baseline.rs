//! The baselines for tuplewatch: servers of Watch that only send prepared messages.
//!
//! Each baseline is this program, started anew with `--baseline`, so that its processor time is measured in the same
//! way. It makes all of its messages in advance, from one that tuplewatch sent. Each byte on its standard input
//! publishes the next message, to one tenant after the other. The process ends with its input.

mod bare_h2;
mod broadcast;

use crate::NUMBERS_A_WRITER;
use crate::support::raw_watch::{changes, entity_id};
use crate::support::report::{number, option};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use prost::Message as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::process::Stdio;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::pipe;
use tokio::process::{Child, ChildStdin, Command};
use tuplewatch::api::grpc::proto::WatchRequest;

/// gRPC's prefix of each message: a flag and the length.
const PREFIX_BYTES: usize = 5;

/// The way in which messages reach subscribers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    /// tonic's usual way.
    Broadcast,
    /// The smallest possible server on h2.
    BareH2,
}

/// A server, killed when dropped.
pub(crate) struct Baseline {
    process: Child,
    orders: ChildStdin,
    pub(crate) address: SocketAddr,
}

impl Baseline {
    /// Starts the server, and returns once it listens. `sample` is a `WatchResponse` that tuplewatch sent.
    pub(crate) async fn start(way: Way, tenants: usize, messages: u64, sample: &[u8]) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--baseline", way.name(), "--sample", &BASE64_STANDARD.encode(sample)])
            .args(["--tenants", &tenants.to_string(), "--messages", &messages.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let orders = process.stdin.take().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let address = lines.next_line().await.unwrap().expect("a baseline that listens");
        Self { process, orders, address: address.parse().unwrap() }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id().expect("a process that runs")
    }

    /// Publishes a number of further messages.
    pub(crate) async fn publish(&mut self, messages: u64) {
        self.orders.write_all(&vec![0; messages as usize]).await.unwrap();
    }
}

impl Way {
    const fn name(self) -> &'static str {
        match self {
            Self::Broadcast => "broadcast",
            Self::BareH2 => "bare-h2",
        }
    }
}

/// Serves, if this process is a baseline.
pub(crate) fn serve_if_asked() -> bool {
    let Some(name) = option("--baseline") else { return false };
    let source = Source::from_arguments();
    if name == Way::Broadcast.name() {
        broadcast::serve(source);
    } else {
        assert_eq!(name, Way::BareH2.name());
        bare_h2::serve(source);
    }
    true
}

/// The messages of a baseline. Message `n` is for tenant `n % tenants`.
struct Source {
    tenants: usize,
    messages: u64,
    /// A message with the number of some transaction.
    sample: Vec<u8>,
    /// The offset of the number.
    digits: Range<usize>,
}

impl Source {
    fn from_arguments() -> Self {
        let sample = BASE64_STANDARD.decode(option("--sample").unwrap()).unwrap();
        let mut id: &[u8] = &[];
        changes(&sample, |change| id = entity_id(change));
        let start = sample.windows(id.len()).position(|bytes| bytes == id).unwrap();
        let digits = start..start + id.len();
        assert_eq!(digits.len(), NUMBERS_A_WRITER.to_string().len(), "the entity id is a number");
        let tenants = number("--tenants").unwrap() as usize;
        Self { tenants, messages: number("--messages").unwrap(), sample, digits }
    }

    /// The encoded message with this number.
    fn message(&self, number: u64) -> Vec<u8> {
        let mut message = self.sample.clone();
        message[self.digits.clone()].copy_from_slice(format!("{number:010}").as_bytes());
        message
    }

    /// The tenant of a request.
    fn tenant(&self, request: &WatchRequest) -> usize {
        let tenant = request.tenant_id.strip_prefix("load").and_then(|tenant| tenant.parse::<usize>().ok());
        tenant.filter(|tenant| *tenant < self.tenants).expect("a tenant of the load")
    }
}

/// Reports the address of this process to the benchmark.
fn announce(address: SocketAddr) {
    println!("{address}");
    std::io::stdout().flush().unwrap();
}

/// The requests to publish further messages.
struct Orders(pipe::Receiver);

impl Orders {
    fn from_stdin() -> Self {
        let stdin = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
        Self(pipe::Receiver::from_owned_fd(stdin).unwrap())
    }

    /// The number of further messages, or `None` if the benchmark has ended.
    async fn next(&mut self) -> Option<usize> {
        let mut bytes = [0; 1024];
        Some(self.0.read(&mut bytes).await.unwrap()).filter(|count| *count > 0)
    }
}

/// The tenant in a gRPC request, behind its prefix.
fn request(framed: &[u8]) -> WatchRequest {
    WatchRequest::decode(&framed[PREFIX_BYTES..]).unwrap()
}
