//! The HTTP gateway: the services of gRPC, as JSON.
//!
//! ```text
//!  HTTP ─▶ listener ─▶ Gateway ─▶ call: JSON, path and query → request ─▶ api::watch · Data and Tenancy of gRPC, in process
//!                                                                              │
//!  HTTP ◀──────── JSON · JSON lines · Server-Sent Events ◀── answer · refusal · stream
//! ```
//!
//! The gateway decides nothing that the services decide. They validate, authorize and choose statuses, and they receive
//! the headers and extensions of the HTTP request, with the caller if it is known. The gateway decides only the form in
//! HTTP: paths, JSON (`json`), the HTTP status of a gRPC status (`refusal`), and the body of a stream (`watch`,
//! `stream`).
//!
//! The body of a stream takes messages only as fast as the client reads, so a slow client costs no more here than in
//! gRPC. Connections run on their own threads ([`crate::api::threads`]), and so do the probes, which use the same port.
//!
//! Absent on purpose: HTTP/2, because a browser that needs more than six streams can use a proxy that speaks it; and
//! compression, because it would delay small messages.

mod call;
mod data;
mod json;
mod listener;
mod names;
mod probes;
mod refusal;
mod stream;
mod tenancy;
mod watch;

pub(crate) use listener::{Listener, serve};
pub(crate) use probes::Probes;

use crate::access::admission::Admission;
use crate::api::grpc::proto::data_server::Data;
use crate::api::grpc::proto::tenancy_server::Tenancy;
use crate::api::grpc::{Services, status};
use crate::api::watch::WatchService;
use crate::config::Http as HttpConfig;
use crate::hub::primary::Primary;
use crate::metrics::metrics;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderName, HeaderValue, ORIGIN, RETRY_AFTER};
use axum::http::{Method, Uri};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use refusal::Refusal;
use std::sync::Arc;
use std::time::Duration;
use tower_http::cors::{AllowOrigin, CorsLayer};

/// The time for which a browser may cache the answer of CORS.
const CORS_MAX_AGE: Duration = Duration::from_secs(3600);

/// The routes. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Gateway {
    routes: Router,
    body_bytes_max: usize,
    cors: Option<CorsLayer>,
    /// The origins whose pages may write, or `*`.
    origins: Arc<[String]>,
    admission: Admission,
}

impl Gateway {
    /// Routes to all services except Watch, and to the probes.
    pub(crate) fn new<P: Primary + 'static>(
        config: &HttpConfig,
        services: &Services<P>,
        probes: impl Probes,
        admission: Admission,
    ) -> Self {
        Self::over(config, probes::routes(probes), admission)
            .with_data(services.data.clone())
            .with_tenancy(services.tenancy.clone())
    }

    /// Adds the route of Watch. Each thread has its own handle of the hub.
    fn with_watch<P: Primary + 'static>(mut self, service: WatchService<P>) -> Self {
        self.routes = self.routes.merge(watch::routes(service));
        self
    }

    fn with_data(mut self, data: Arc<impl Data>) -> Self {
        self.routes = self.routes.merge(data::routes(data));
        self
    }

    fn with_tenancy(mut self, tenancy: Arc<impl Tenancy>) -> Self {
        self.routes = self.routes.merge(tenancy::routes(tenancy));
        self
    }

    fn over(config: &HttpConfig, routes: Router, admission: Admission) -> Self {
        Self {
            routes,
            body_bytes_max: config.body_size_max.to_usize(),
            cors: cors(&config.cors_allowed_origins),
            origins: config.cors_allowed_origins.as_slice().into(),
            admission,
        }
    }

    /// All routes, with the layers that apply to each.
    fn into_router(self) -> Router {
        let router = self
            .routes
            .method_not_allowed_fallback(async |method: Method| Refusal::method_not_allowed(&method))
            .fallback(async |uri: Uri| Refusal::no_route(uri.path()))
            .layer(DefaultBodyLimit::max(self.body_bytes_max))
            .layer(from_fn_with_state(self.origins, refuse_cross_origin_writes))
            .layer(self.admission.layer(|error| Refusal::from(status::of_admission(error)).into_response()));
        // This layer is the outermost, so that a page of another origin may also read a refusal.
        let router = match self.cors {
            Some(cors) => router.layer(cors),
            None => router,
        };
        router.layer(from_fn(count))
    }
}

/// A browser sends a request that a form could send without asking first, from a page of any origin, and only hides the
/// answer from the page. This check keeps such pages from writing to a server that the browser can reach.
async fn refuse_cross_origin_writes(State(allowed): State<Arc<[String]>>, request: Request, next: Next) -> Response {
    match cross_origin_write(&allowed, &request) {
        Some(refusal) if !request.method().is_safe() => refusal.into_response(),
        _ => next.run(request).await,
    }
}

/// The refusal of a write by a page of an origin that is neither this server's nor allowed.
fn cross_origin_write(allowed: &[String], request: &Request) -> Option<Refusal> {
    let header = |name| request.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let origin = header(ORIGIN)?;
    let is_own = origin.split_once("://").is_some_and(|(_, authority)| header(HOST) == Some(authority));
    let is_allowed = allowed.iter().any(|allowed| allowed == "*" || allowed == origin);
    (!is_own && !is_allowed).then(|| Refusal::from(status::other_origin(origin)))
}

async fn count(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    metrics().http_requests(response.status().as_str()).inc();
    response
}

fn cors(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let listed = origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok());
    let allowed =
        if origins.iter().any(|origin| origin == "*") { AllowOrigin::any() } else { AllowOrigin::list(listed) };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        .allow_headers([AUTHORIZATION, CONTENT_TYPE, watch::LAST_EVENT_ID])
        .expose_headers([RETRY_AFTER, HeaderName::from_static(crate::api::grpc::watch::START_SNAP_TOKEN)])
        .max_age(CORS_MAX_AGE);
    Some(layer)
}

#[cfg(test)]
mod tests;
