//! The gRPC edge: `base.v1.Watch`, `base.v1.Data`, `base.v1.Tenancy`, health and reflection.
//!
//! Only the edges know the generated types. A message is encoded once ([`crate::change`]) and framed once, and every subscriber
//! is sent the same frame: see [`watch`]. [`status`] is the one place that turns errors into statuses.

pub mod data;
mod fact;
pub mod status;
pub mod tenancy;
mod threads;
mod validation;
pub mod watch;

use crate::admission::Admission;
use crate::authn::Caller;
use crate::config::Grpc as GrpcConfig;
use crate::connections;
use crate::tls;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use threads::{Connection, Threads};
use tokio::sync::watch::Receiver;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Request, Status};
use tonic_health::pb::health_server::{Health, HealthServer};

/// The generated types and clients of `proto/`.
#[expect(missing_docs, clippy::all, reason = "generated")]
pub mod proto {
    tonic::include_proto!("base.v1");

    /// All of `proto/`, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}

/// Pings on quiet connections keep middleboxes from forgetting them, and find clients that are gone.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(20);
/// A client that does not answer a ping for this long is gone, and what it held is given back.
const KEEPALIVE_MAX: Duration = Duration::from_secs(10);
/// Streams on one connection. Clients do better with several connections at about a hundred each.
const STREAMS_MAX: u32 = 1_000;
/// Longest header list of a request, in bytes.
const HEADERS_MAX: u32 = 16 << 10;

/// Why the server cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is taken or not ours.
    #[error("cannot listen on {address} for gRPC: {source} (server.host, server.grpc.port)")]
    Bind {
        /// The address.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// The certificate or the key cannot be used.
    #[error(transparent)]
    Tls(#[from] tls::Error),
    /// No threads to serve on.
    #[error("the threads of the gRPC server cannot be started: {0}")]
    Threads(std::io::Error),
    /// Serving failed.
    #[error("the gRPC server failed: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// The descriptors do not read.
    #[error("the gRPC reflection service failed: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// A bound listener: bound before anything else starts, so that a taken port is said at once.
pub struct Listener {
    listener: connections::Listener,
    tls: Option<ServerTlsConfig>,
}

impl Listener {
    /// Binds host and port (port 0 takes any), and reads certificates and keys.
    ///
    /// # Errors
    /// Where that is not possible.
    pub async fn bind(host: &str, config: &GrpcConfig) -> Result<Self, Error> {
        let port = config.port;
        let tls = match &config.tls {
            Some(files) => Some(tls_config(tls::Material::read("server.grpc.tls", files).await?)),
            None => None,
        };
        let bind = |source| Error::Bind { address: format!("{host}:{port}"), source };
        let listener = connections::Listener::bind(host, port).await.map_err(bind)?;
        Ok(Self { listener, tls })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.listener.address()
    }
}

/// The services of `proto/`, whoever they are served to. Cheap to clone.
#[derive(Clone)]
#[expect(missing_docs, reason = "the fields are the services' names")]
pub struct Services<P> {
    pub watch: watch::WatchService<P>,
    pub data: Arc<data::DataService<P>>,
    pub tenancy: Arc<tenancy::TenancyService>,
}

/// Serves until `stop` turns true and all streams have ended. Dropped before, it cuts them.
///
/// # Errors
/// Where serving fails.
pub async fn serve<P: crate::hub::start::Primary + 'static>(
    listener: Listener,
    services: Services<P>,
    health: HealthServer<impl Health>,
    admission: Admission,
    connections_max: usize,
    mut stop: Receiver<bool>,
) -> Result<(), Error> {
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let mut server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_EVERY))
        .http2_keepalive_timeout(Some(KEEPALIVE_MAX))
        .max_concurrent_streams(STREAMS_MAX)
        .http2_max_header_list_size(HEADERS_MAX)
        .layer(admission.layer(|error| status::of_admission(error).into_http()));
    let Listener { listener, tls } = listener;
    if let Some(tls) = tls {
        server = server.tls_config(tls)?;
    }
    let threads = Threads::start(|connections| {
        let (hub, bell) = services.watch.hub().with_bell();
        let mut stop = stop.clone();
        let serving = server
            .clone()
            .add_service(health.clone())
            .add_service(reflection.clone())
            .add_service(services.watch.with_hub(hub))
            .add_service(proto::data_server::DataServer::from_arc(services.data.clone()))
            .add_service(proto::tenancy_server::TenancyServer::from_arc(services.tenancy.clone()))
            .serve_with_incoming_shutdown(ReceiverStream::new(connections).map(Connection::adopt), async move {
                let _ = stop.wait_for(|stop| *stop).await;
            });
        async move {
            tokio::select! {
                served = serving => served,
                never = bell.run() => never,
            }
        }
    });
    let mut threads = threads.map_err(Error::Threads)?;
    let mut incoming = listener.accept("gRPC", connections_max);
    loop {
        let (stream, place) = tokio::select! {
            // First: threads end when it comes.
            biased;
            _ = stop.wait_for(|stop| *stop) => break,
            Some(ended) = threads.ended() => {
                return ended.and(Err(Error::Threads(std::io::Error::other("one of them ended by itself"))));
            }
            accepted = incoming.next() => accepted,
        };
        if let Err(error) = threads.serve(stream, place).await {
            tracing::debug!("a gRPC connection ended at once: {error}");
        }
    }
    drop(incoming);
    while let Some(ended) = threads.ended().await {
        ended?;
    }
    Ok(())
}

/// An error unless who makes the request may use the tenant.
pub(crate) fn authorize<T>(request: &Request<T>, tenant: &str) -> Result<(), Status> {
    let caller = request.extensions().get::<Caller>();
    if caller.is_none_or(|caller| caller.may_use(tenant)) { Ok(()) } else { Err(status::forbidden(tenant)) }
}

fn tls_config(material: tls::Material) -> ServerTlsConfig {
    let identity = Identity::from_pem(material.cert, material.key);
    let config = ServerTlsConfig::new().identity(identity).timeout(tls::HANDSHAKE_MAX);
    match material.client_ca {
        Some(authority) => config.client_ca_root(Certificate::from_pem(authority)),
        None => config,
    }
}
