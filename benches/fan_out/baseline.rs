//! What tuplewatch is compared with: servers of Watch that have nothing but messages to send.
//!
//! Each is this program, started anew with `--baseline`, so that its processor time is measured like tuplewatch's. It makes all
//! its messages beforehand, from one that tuplewatch sent. Each byte on its standard input has the next one published, to one
//! tenant after the other; where that ends, so does the process.

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

/// Of gRPC, before each message: a flag and the length.
const PREFIX_BYTES: usize = 5;

/// How messages get to subscribers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    /// tonic's usual one.
    Broadcast,
    /// As little as there can be around h2.
    BareH2,
}

/// A server, killed when dropped.
pub(crate) struct Baseline {
    process: Child,
    orders: ChildStdin,
    pub(crate) address: SocketAddr,
}

impl Baseline {
    /// Returns once it listens. `sample` is a `WatchResponse` that tuplewatch sent.
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

    /// Has it publish so many messages more.
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

/// Serves where this process is a baseline.
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

/// What a baseline has to send. Message `n` is for tenant `n % tenants`.
struct Source {
    tenants: usize,
    messages: u64,
    /// With the number of any transaction.
    sample: Vec<u8>,
    /// Where this number is.
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

    /// The encoded message of this number.
    fn message(&self, number: u64) -> Vec<u8> {
        let mut message = self.sample.clone();
        message[self.digits.clone()].copy_from_slice(format!("{number:010}").as_bytes());
        message
    }

    /// Which tenant a request is for.
    fn tenant(&self, request: &WatchRequest) -> usize {
        let tenant = request.tenant_id.strip_prefix("load").and_then(|tenant| tenant.parse::<usize>().ok());
        tenant.filter(|tenant| *tenant < self.tenants).expect("a tenant of the load")
    }
}

/// Tells the benchmark where this process listens.
fn announce(address: SocketAddr) {
    println!("{address}");
    std::io::stdout().flush().unwrap();
}

/// How many messages are to be published, as they become due.
struct Orders(pipe::Receiver);

impl Orders {
    fn from_stdin() -> Self {
        let stdin = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
        Self(pipe::Receiver::from_owned_fd(stdin).unwrap())
    }

    /// Some more, or `None` where the benchmark has ended.
    async fn next(&mut self) -> Option<usize> {
        let mut bytes = [0; 1024];
        Some(self.0.read(&mut bytes).await.unwrap()).filter(|count| *count > 0)
    }
}

/// What a request of gRPC asks for, behind its prefix.
fn request(framed: &[u8]) -> WatchRequest {
    WatchRequest::decode(&framed[PREFIX_BYTES..]).unwrap()
}
