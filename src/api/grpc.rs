//! The gRPC edge: `base.v1.Watch`, `base.v1.Data`, `base.v1.Tenancy`, health and reflection.
//!
//! Only the edges know the generated types. A message is encoded once ([`crate::model::change`]) and framed once, and every subscriber
//! is sent the same frame: see [`crate::api::encode`] for its bytes, and `connection` for how they are sent. Methods other than Watch are
//! tonic's. [`status`] is the one place that turns errors into statuses.

mod calls;
mod connection;
pub mod data;
mod fact;
pub mod health;
mod send_counters;
pub mod status;
pub mod tenancy;
mod validation;
pub mod watch;

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

/// The types, servers and clients of `proto/`. Everything in `src/api/grpc/proto/` is generated: `just generate` writes it, and
/// `tests/generated.rs` fails where it is not up to date.
#[expect(missing_docs, clippy::all, reason = "generated")]
pub mod proto {
    include!("grpc/proto/base.v1.rs");

    /// All of `proto/`, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!("grpc/proto/descriptors.bin");
}

/// Why the server cannot serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
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
    /// A thread to serve on cannot be had, or is gone.
    #[error("the threads of the gRPC server failed: {0}")]
    Threads(std::io::Error),
    /// The descriptors do not read.
    #[error("the gRPC reflection service failed: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// A bound listener: bound before anything else starts, so that a taken port is said at once.
pub struct Listener {
    listener: connections::Listener,
    tls: Option<tls::Acceptor>,
}

impl Listener {
    /// Binds host and port (port 0 takes any), and reads certificates and keys.
    ///
    /// # Errors
    /// Where that is not possible.
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

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.listener.address()
    }
}

/// The services of `proto/`, whoever they are served to. Cheap to clone.
#[derive(Clone)]
#[expect(missing_docs, reason = "the fields are the services' names")]
pub struct Services<P> {
    pub watch: WatchService<P>,
    pub data: Arc<data::DataService<P>>,
    pub tenancy: Arc<tenancy::TenancyService>,
}

/// Serves until `stop` turns true and all streams have ended. Dropped before, it cuts them.
///
/// # Errors
/// Where serving fails.
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
        // Many clients have only learned this one, which is the same in all but its name.
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

/// An error unless who makes the request may use the tenant.
fn authorize<T>(request: &Request<T>, tenant: &str) -> Result<(), Forbidden> {
    scope::authorize(request.extensions().get::<Caller>(), Requested::Tenant(tenant))
}
