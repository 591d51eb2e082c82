//! HTTP connections, and the time limits of a silent one.
//!
//! A silent connection uses a descriptor until a timeout: of the TLS handshake, of the headers (this is also the time
//! that it may idle between requests), or of the body (`call`). [`crate::access::connections`] limits the number of
//! connections, and detects lost clients, because HTTP/1 has no pings.

use super::Gateway;
use crate::access::connections;
use crate::access::tls;
use crate::api::threads;
use crate::api::watch::WatchService;
use crate::config::Http as HttpConfig;
use crate::hub::Hub;
use crate::hub::primary::Primary;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch::Receiver;

/// The longest time to receive the headers of a request, from the moment at which the connection is ready for it.
const HEADERS_TIMEOUT: Duration = Duration::from_secs(30);
/// The bytes of a response that may wait for a client to read them, and the longest headers of a request.
const BUFFER_BYTES_MAX: usize = 64 << 10;

/// A failure of the HTTP server.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The address is in use, or is not an address of this machine.
    #[error("cannot listen on {address} for HTTP: {source} (server.host, server.http.port)")]
    Bind { address: String, source: io::Error },
    /// The certificate or the key is unusable.
    #[error(transparent)]
    Tls(#[from] tls::Error),
    /// A thread cannot be started, or has failed.
    #[error("the threads of the HTTP server failed: {0}")]
    Threads(io::Error),
}

/// A bound listener. It is bound before everything else starts, so that a port in use is reported at once.
pub(crate) struct Listener {
    listener: connections::Listener,
    tls: Option<tls::Acceptor>,
}

impl Listener {
    /// Binds host and port (port 0 stands for any free port), and reads certificate and key.
    ///
    /// # Errors
    /// If one of these fails.
    pub(crate) async fn bind(host: &str, config: &HttpConfig) -> Result<Self, Error> {
        let port = config.port;
        let tls = match &config.tls {
            Some(files) => Some(tls::Acceptor::read("server.http.tls", files, b"http/1.1").await?),
            None => None,
        };
        let bind = |source| Error::Bind { address: format!("{host}:{port}"), source };
        let listener = connections::Listener::bind(host, port).await.map_err(bind)?;
        Ok(Self { listener, tls })
    }

    /// The address that it listens on.
    pub(crate) const fn address(&self) -> SocketAddr {
        self.listener.address()
    }
}

/// Serves until `stop` turns true and all connections have ended. Dropping the future closes all connections.
///
/// # Errors
/// If no thread can be started, or one fails.
pub(crate) async fn serve<P: Primary + 'static>(
    listener: Listener,
    gateway: Gateway,
    watch: WatchService<P>,
    connections_max: usize,
    stop: Receiver<bool>,
) -> Result<(), Error> {
    let Listener { listener, tls } = listener;
    let connector = |hub: Hub| {
        let (tls, stop) = (tls.clone(), stop.clone());
        let router = gateway.clone().with_watch(watch.with_hub(hub)).into_router();
        move |stream| connect(stream, tls.clone(), router.clone(), stop.clone())
    };
    threads::serve(listener, "HTTP", connections_max, stop.clone(), watch.hub(), connector)
        .await
        .map_err(Error::Threads)
}

/// Serves a connection until it is closed, or until `stop` turns true and its last answer has ended.
pub(super) async fn connect(
    stream: TcpStream,
    tls: Option<tls::Acceptor>,
    router: Router,
    mut stop: Receiver<bool>,
) -> io::Result<()> {
    let Some(acceptor) = tls else {
        return serve_http1(stream, router, stop).await;
    };
    let stream = tokio::select! {
        stream = acceptor.accept(stream) => stream?,
        _ = stop.wait_for(|stop| *stop) => return Ok(()),
    };
    serve_http1(stream, router, stop).await
}

/// Serves requests and responses, one after the other.
async fn serve_http1(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    router: Router,
    mut stop: Receiver<bool>,
) -> io::Result<()> {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_TIMEOUT)
        .max_buf_size(BUFFER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let stopped = async move {
        let _ = stop.wait_for(|stop| *stop).await;
    };
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stopped => {
            // An answer in progress is completed. A stream ends by itself, with its final message.
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    ended.map_err(io::Error::other)
}
