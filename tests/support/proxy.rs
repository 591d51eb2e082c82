//! A TCP proxy that a test breaks: between tuplewatch and PostgreSQL, or between a subscriber and tuplewatch.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// The state of the proxy. A generation of connections ends with every [`Proxy::cut`] and [`Proxy::strand`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// Forwards.
    Open,
    /// Forwards nothing, and closes nothing, like a pulled cable.
    Silent,
    /// The same for connections older than this generation.
    Stranded(u64),
    /// Resets connections older than this generation.
    Cut(u64),
}

impl Line {
    /// Whether a connection of this generation forwards nothing.
    const fn is_silent(self, generation: u64) -> bool {
        match self {
            Self::Silent => true,
            Self::Stranded(first) => generation < first,
            Self::Open | Self::Cut(_) => false,
        }
    }

    const fn is_cut(self, generation: u64) -> bool {
        matches!(self, Self::Cut(first) if generation < first)
    }
}

/// State that all connections share.
struct Shared {
    /// Used in turn, except for those that do not answer.
    targets: Vec<SocketAddr>,
    line: watch::Sender<Line>,
    generation: AtomicU64,
    accepted: AtomicU64,
    /// Bytes that were forwarded to clients.
    returned: AtomicU64,
    /// Limit of bytes a second to each client; 0 is no limit.
    pace: AtomicU64,
    /// A text, and its replacement of the same length, in the data from clients.
    rewrite: Option<(Vec<u8>, Vec<u8>)>,
}

/// Listens on loopback and forwards to one address, or to several as a load balancer does. Ends with its connections when dropped.
pub(crate) struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    pub(crate) async fn to(target: SocketAddr) -> Self {
        Self::start(vec![target], None).await
    }

    /// In front of several equivalent servers.
    pub(crate) async fn among(targets: &[SocketAddr]) -> Self {
        Self::start(targets.to_vec(), None).await
    }

    async fn start(targets: Vec<SocketAddr>, rewrite: Option<(Vec<u8>, Vec<u8>)>) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            targets,
            line: watch::Sender::new(Line::Open),
            generation: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
            returned: AtomicU64::new(0),
            pace: AtomicU64::new(0),
            rewrite,
        });
        let serving = shared.clone();
        let accepting = tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                serving.accepted.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(forward(client, serving.clone()));
            }
        });
        Self { address, shared, accepting }
    }

    /// In front of the server that a URI leads to.
    pub(crate) async fn to_postgres(uri: &str) -> Self {
        Self::to(address_of(uri)).await
    }

    /// The same, and replaces a text in the data from clients with another of the same length. Only for short texts at the beginning of a
    /// connection: a text that the network splits is not found.
    pub(crate) async fn to_postgres_rewriting(uri: &str, from: &str, to: &str) -> Self {
        assert_eq!(from.len(), to.len(), "lengths are part of the protocol");
        Self::start(vec![address_of(uri)], Some((from.into(), to.into()))).await
    }

    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// `uri`, through the proxy.
    pub(crate) fn uri(&self, uri: &str) -> String {
        uri.replace(&format!(":{}/", address_of(uri).port()), &format!(":{}/", self.address.port()))
    }

    /// Stops forwarding in both directions, on new connections too, without closing any.
    pub(crate) fn silence(&self) {
        self.shared.line.send_replace(Line::Silent);
    }

    /// Stops forwarding on the present connections without closing them, like a firewall that has forgotten them. New ones work.
    pub(crate) fn strand(&self) {
        let generation = self.next_generation();
        self.shared.line.send_replace(Line::Stranded(generation));
    }

    /// Ends all connections; new ones work.
    pub(crate) fn cut(&self) {
        let generation = self.next_generation();
        self.shared.line.send_replace(Line::Cut(generation));
    }

    fn next_generation(&self) -> u64 {
        self.shared.generation.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Ends [`Proxy::silence`] or [`Proxy::strand`], and forwards the delayed data.
    pub(crate) fn restore(&self) {
        self.shared.line.send_replace(Line::Open);
    }

    /// Limits the data from the server to this many bytes a second on each connection; 0 is no limit.
    pub(crate) fn slow_down(&self, bytes_per_second: u64) {
        self.shared.pace.store(bytes_per_second, Ordering::Relaxed);
    }

    /// Connections so far.
    pub(crate) fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// Bytes that were forwarded from servers to clients so far.
    pub(crate) fn returned_bytes(&self) -> u64 {
        self.shared.returned.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

fn address_of(uri: &str) -> SocketAddr {
    let config: tokio_postgres::Config = uri.parse().unwrap();
    SocketAddr::from(([127, 0, 0, 1], config.get_ports()[0]))
}

async fn forward(client: TcpStream, shared: Arc<Shared>) {
    let mut line = shared.line.subscribe();
    // A pulled cable hides new clients from the server. PostgreSQL would wait a minute for the first message of one, even during a
    // shutdown.
    if line.wait_for(|line| *line != Line::Silent).await.is_err() {
        return;
    }
    let generation = shared.generation.load(Ordering::Relaxed);
    let Some(server) = connect(&shared).await else { return };
    for side in [&client, &server] {
        // A cut resets the connection and drops its data.
        let _ = side.set_nodelay(true);
        let _ = side.set_zero_linger();
    }
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::select! {
        () = pump(from_client, to_server, &shared, generation, Direction::ToServer) => {}
        () = pump(from_server, to_client, &shared, generation, Direction::ToClient) => {}
        _ = line.wait_for(|line| line.is_cut(generation)) => {}
    }
}

/// Connects to the next target that answers.
async fn connect(shared: &Shared) -> Option<TcpStream> {
    let turn = usize::try_from(shared.accepted.load(Ordering::Relaxed)).unwrap();
    for n in 0..shared.targets.len() {
        if let Ok(server) = TcpStream::connect(shared.targets[(turn + n) % shared.targets.len()]).await {
            return Some(server);
        }
    }
    None
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToServer,
    ToClient,
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, shared: &Shared, generation: u64, direction: Direction) {
    let mut line = shared.line.subscribe();
    let mut buffer = vec![0; 64 << 10];
    loop {
        // A reset connection is one that has ended.
        let length = from.read(&mut buffer).await.unwrap_or(0);
        // A silent line delays data, and the end of the other side.
        if line.wait_for(|line| !line.is_silent(generation)).await.is_err() || length == 0 {
            return;
        }
        let chunk = &mut buffer[..length];
        if direction == Direction::ToServer
            && let Some((found, replacement)) = &shared.rewrite
            && let Some(at) = chunk.windows(found.len()).position(|window| window == found)
        {
            chunk[at..at + found.len()].copy_from_slice(replacement);
        }
        if to.write_all(chunk).await.is_err() {
            return;
        }
        let length = u64::try_from(length).unwrap();
        let pace = shared.pace.load(Ordering::Relaxed);
        if direction == Direction::ToClient {
            shared.returned.fetch_add(length, Ordering::Relaxed);
            if let Some(micros) = (length * 1_000_000).checked_div(pace) {
                tokio::time::sleep(Duration::from_micros(micros)).await;
            }
        }
    }
}
