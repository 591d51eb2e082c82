//! Connections: who may have one, and for how long.
//!
//! Hyper's own accept loops have no limits, so here is one. A connection that says nothing costs a descriptor until a
//! timeout: of the TLS handshake, of the headers (which is also how long it may idle between requests), of the body
//! (`call`). Where all are taken, the next ones wait to be accepted. A client that is gone without a word is found by TCP
//! keepalive, as HTTP/1 has no pings.

use super::Gateway;
use crate::config::{Http as HttpConfig, Tls};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use socket2::{SockRef, TcpKeepalive};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::sync::watch::Receiver;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// Longest time for the headers of a request to come, counted from when the connection is ready for one.
const HEADERS_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a response that wait for a client that does not read, and the longest headers of a request.
const BUFFER_BYTES_MAX: usize = 64 << 10;
/// Connections beside those that have a stream.
const CONNECTIONS_BESIDE_STREAMS: usize = 1024;
/// As gRPC's pings: how long a connection may be quiet, and how long and how often the other side is then asked.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(20);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
/// After an error of the listener itself, which is mostly a lack of descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);

/// Why the gateway cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is taken or not ours.
    #[error("cannot listen on {address} for HTTP: {source} (server.host, server.http.port)")]
    Bind {
        /// The address.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// A certificate or key cannot be read.
    #[error("cannot read {path} (server.http.tls): {source}")]
    Certificate {
        /// The file.
        path: String,
        /// Why.
        source: pem::Error,
    },
    /// They are no certificate and key, or do not belong together.
    #[error("the certificate or key of server.http.tls cannot be used: {0}")]
    Tls(#[from] rustls::Error),
}

/// A bound listener: bound before anything else starts, so that a taken port is said at once.
pub struct Listener {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    address: SocketAddr,
}

impl Listener {
    /// Binds host and port (port 0 takes any), and reads certificate and key.
    ///
    /// # Errors
    /// Where that is not possible.
    pub async fn bind(host: &str, config: &HttpConfig) -> Result<Self, Error> {
        let port = config.port;
        let tls = config.tls.as_ref().map(tls_acceptor).transpose()?;
        let bind = |source| Error::Bind { address: format!("{host}:{port}"), source };
        let listener = TcpListener::bind((host, port)).await.map_err(bind)?;
        let address = listener.local_addr().map_err(bind)?;
        Ok(Self { listener, tls, address })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

fn tls_acceptor(tls: &Tls) -> Result<TlsAcceptor, Error> {
    let unreadable = |path: &Path| {
        let path = path.display().to_string();
        move |source| Error::Certificate { path, source }
    };
    let chain = CertificateDer::pem_file_iter(&tls.cert).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    // A file without any certificate would else be read as an empty chain.
    let chain = chain.and_then(|chain| if chain.is_empty() { Err(pem::Error::NoItemsFound) } else { Ok(chain) });
    let chain = chain.map_err(unreadable(&tls.cert))?;
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(unreadable(&tls.key))?;
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Serves until `stop` turns true and all connections have ended.
///
/// Dropped before, it cuts them.
pub async fn serve(listener: Listener, gateway: Gateway, streams_max: usize, mut stop: Receiver<bool>) {
    let router = gateway.into_router();
    let connections_max = (streams_max + CONNECTIONS_BESIDE_STREAMS).min(Semaphore::MAX_PERMITS);
    let free = Arc::new(Semaphore::new(connections_max));
    let mut connections = JoinSet::new();
    loop {
        let accepted = async {
            // Never closed.
            let place = free.clone().acquire_owned().await.ok();
            (listener.listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => break,
            // What has ended is forgotten.
            Some(_) = connections.join_next() => continue,
            accepted = accepted => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let connection = connect(stream, listener.tls.clone(), router.clone(), stop.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            // One that was gone before it was accepted also ends here, and costs the others a moment.
            Err(error) => {
                tracing::warn!("HTTP cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn connect(stream: TcpStream, tls: Option<TlsAcceptor>, router: Router, mut stop: Receiver<bool>) {
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_AFTER).with_interval(KEEPALIVE_EVERY);
    let prepared = stream.set_nodelay(true).and_then(|()| SockRef::from(&stream).set_tcp_keepalive(&keepalive));
    if let Err(error) = prepared {
        tracing::debug!("an HTTP connection ended at once: {error}");
        return;
    }
    let Some(tls) = tls else {
        return talk(stream, router, stop).await;
    };
    let handshake = tokio::select! {
        handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)) => handshake,
        _ = stop.wait_for(|stop| *stop) => return,
    };
    match handshake {
        Ok(Ok(stream)) => talk(stream, router, stop).await,
        Ok(Err(error)) => tracing::debug!("a TLS handshake failed: {error}"),
        Err(_) => tracing::debug!("a TLS handshake took longer than {HANDSHAKE_TIMEOUT:?}"),
    }
}

/// Requests and responses, one after the other.
async fn talk(stream: impl AsyncRead + AsyncWrite + Unpin, router: Router, mut stop: Receiver<bool>) {
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
            // The answer that is on its way is sent; a stream ends by itself, with a last word.
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("an HTTP connection ended: {error}");
    }
}
