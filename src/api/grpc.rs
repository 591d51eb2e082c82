//! The gRPC server: `base.v1.Watch`, `base.v1.Data`, `base.v1.Tenancy`, health and reflection.
//!
//! Only the protocols know the generated types. A message is encoded once ([`crate::model::change`]) and framed once,
//! and every subscriber receives the same frame: [`crate::api::encode`] defines its bytes, and `connection` sends it.
//! tonic serves all methods except Watch. [`status`] is the only place that turns errors into statuses.

mod calls;
mod connection;
pub(crate) mod data;
mod fact;
pub(crate) mod health;
mod send_counters;
pub(crate) mod status;
pub(crate) mod tenancy;
mod validation;
pub(crate) mod watch;

use crate::access::admission::Admission;
use crate::access::authn::Caller;
use crate::access::connections;
use crate::access::tls;
use crate::api::scope::{self, Forbidden, Requested};
use crate::api::threads;
use crate::api::watch::WatchService;
use crate::config::Grpc as GrpcConfig;
use crate::hub::Hub;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::watch::Receiver;
use tonic::Request;
use tonic::service::Routes;
use tower_layer::Layer as _;

/// The types, servers and clients of `proto/`. `just generate` writes everything in `src/api/grpc/proto/`, and
/// `tests/generated.rs` fails if it is out of date.
#[expect(missing_docs, clippy::all, reason = "generated")]
pub mod proto {
    include!("grpc/proto/base.v1.rs");

    /// The descriptors of all of `proto/`, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!("grpc/proto/descriptors.bin");
}

/// A failure of the gRPC server.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The address is in use, or is not an address of this machine.
    #[error("cannot listen on {address} for gRPC: {source} (server.host, server.grpc.port)")]
    Bind { address: String, source: std::io::Error },
    /// The certificate or the key is unusable.
    #[error(transparent)]
    Tls(#[from] tls::Error),
    /// A thread cannot be started, or has failed.
    #[error("the threads of the gRPC server failed: {0}")]
    Threads(std::io::Error),
    /// The descriptors cannot be decoded.
    #[error("the gRPC reflection service failed: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// A bound listener. It is bound before everything else starts, so that a port in use is reported at once.
pub(crate) struct Listener {
    listener: connections::Listener,
    tls: Option<tls::Acceptor>,
}

impl Listener {
    /// Binds host and port (port 0 stands for any free port), and reads certificates and keys.
    ///
    /// # Errors
    /// If one of these fails.
    pub(crate) async fn bind(host: &str, config: &GrpcConfig) -> Result<Self, Error> {
        let port = config.port;
        let tls = match &config.tls {
            Some(files) => Some(tls::Acceptor::read("server.grpc.tls", files, b"h2").await?),
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

/// The services of `proto/`, for every protocol. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Services<P> {
    pub(crate) watch: WatchService<P>,
    pub(crate) data: Arc<data::DataService<P>>,
    pub(crate) tenancy: Arc<tenancy::TenancyService>,
}

/// Serves until `stop` turns true and all streams have ended. Dropping the future closes all connections.
///
/// # Errors
/// If a thread fails.
pub(crate) async fn serve<P: crate::hub::primary::Primary + 'static>(
    listener: Listener,
    services: Services<P>,
    health: health::Server<impl health::Reason>,
    admission: Admission,
    connections_max: usize,
    stop: Receiver<bool>,
) -> Result<(), Error> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let others = Routes::new(health)
        .add_service(reflection().build_v1()?)
        // Many clients know only this older version, which differs only in its name.
        .add_service(reflection().build_v1alpha()?)
        .add_service(proto::data_server::DataServer::from_arc(services.data))
        .add_service(proto::tenancy_server::TenancyServer::from_arc(services.tenancy));
    let others = admission.layer(|error| status::of_admission(error).into_http()).layer(others.prepare());
    let guard = admission.layer(|error| status::of_admission(error).into_http());

    let Listener { listener, tls } = listener;
    let connector = |hub: Hub| {
        let (tls, others, stop) = (tls.clone(), others.clone(), stop.clone());
        let watch = guard.layer(watch::Watch(services.watch.with_hub(hub)));
        move |stream| connection::serve(stream, tls.clone(), watch.clone(), others.clone(), stop.clone())
    };
    let hub = services.watch.hub();
    threads::serve(listener, "gRPC", connections_max, stop.clone(), hub, connector).await.map_err(Error::Threads)
}

/// Checks that the caller may use the tenant.
fn authorize<T>(request: &Request<T>, tenant: &str) -> Result<(), Forbidden> {
    scope::authorize(request.extensions().get::<Caller>(), Requested::Tenant(tenant))
}
