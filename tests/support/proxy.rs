//! A TCP proxy that a test breaks: between tuplewatch and PostgreSQL, or between a subscriber and tuplewatch.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What the proxy does with its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// Forwards.
    Open,
    /// Forwards nothing, and ends nothing: a cable that was pulled.
    Silent,
    /// Ended those of before this generation, the hard way.
    Cut(u64),
}

/// Listens on loopback and forwards to one address. Gone, with its connections, when dropped.
pub(crate) struct Proxy {
    address: SocketAddr,
    line: watch::Sender<Line>,
    cuts: AtomicU64,
    /// Bytes that went to the client side.
    returned: Arc<AtomicU64>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    pub(crate) async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let line = watch::Sender::new(Line::Open);
        let returned = Arc::new(AtomicU64::new(0));
        let (lines, count) = (line.subscribe(), returned.clone());
        let accepting = tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                tokio::spawn(forward(client, target, lines.clone(), count.clone()));
            }
        });
        Self { address, line, cuts: AtomicU64::new(0), returned, accepting }
    }

    /// In front of the server that a URI leads to.
    pub(crate) async fn to_postgres(uri: &str) -> Self {
        let config: tokio_postgres::Config = uri.parse().unwrap();
        Self::to(SocketAddr::from(([127, 0, 0, 1], config.get_ports()[0]))).await
    }

    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// `uri`, through the proxy.
    pub(crate) fn uri(&self, uri: &str) -> String {
        let config: tokio_postgres::Config = uri.parse().unwrap();
        uri.replace(&format!(":{}/", config.get_ports()[0]), &format!(":{}/", self.address.port()))
    }

    /// From now on nothing goes through, in neither direction, also on new connections; and nobody is told.
    pub(crate) fn silence(&self) {
        self.line.send_replace(Line::Silent);
    }

    /// Ends all connections; new ones work.
    pub(crate) fn cut(&self) {
        let generation = self.cuts.fetch_add(1, Ordering::Relaxed) + 1;
        self.line.send_replace(Line::Cut(generation));
    }

    /// Forwards again what was held back by [`Proxy::silence`].
    pub(crate) fn restore(&self) {
        self.line.send_replace(Line::Open);
    }

    /// Bytes that went from the server to clients so far.
    pub(crate) fn returned_bytes(&self) -> u64 {
        self.returned.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

async fn forward(client: TcpStream, target: SocketAddr, mut line: watch::Receiver<Line>, returned: Arc<AtomicU64>) {
    // Behind a cable that was pulled nobody hears of a new client. PostgreSQL in particular would wait for what it has to say,
    // for a minute even when shutting down.
    if line.wait_for(|line| *line != Line::Silent).await.is_err() {
        return;
    }
    let born = *line.borrow_and_update();
    let Ok(server) = TcpStream::connect(target).await else { return };
    for side in [&client, &server] {
        // What is lost in a cut is lost at once: no goodbye.
        let _ = side.set_nodelay(true);
        let _ = side.set_zero_linger();
    }
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let uncounted = Arc::new(AtomicU64::new(0));
    tokio::select! {
        () = pump(from_client, to_server, line.clone(), uncounted) => {}
        () = pump(from_server, to_client, line.clone(), returned) => {}
        _ = line.wait_for(|line| *line != born && matches!(line, Line::Cut(_))) => {}
    }
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut line: watch::Receiver<Line>,
    count: Arc<AtomicU64>,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok(length) = from.read(&mut buffer).await else { return };
        // Silence holds back what was read, and the end of the other side too.
        if line.wait_for(|line| *line != Line::Silent).await.is_err() || length == 0 {
            return;
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
        count.fetch_add(u64::try_from(length).unwrap(), Ordering::Relaxed);
    }
}
