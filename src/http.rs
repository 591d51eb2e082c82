//! The HTTP gateway: what gRPC serves, as JSON.
//!
//! ```text
//!  HTTP ─▶ listener ─▶ Gateway ─▶ call: JSON, path and query → tonic::Request ─▶ the services of gRPC, in process
//!                                                                                         │
//!  HTTP ◀──────────── JSON · JSON lines · Server-Sent Events ◀── answer · refusal · watch ◀┘
//! ```
//!
//! Nothing is decided here that gRPC decides: validation, authorization and statuses are the services', and a request's headers
//! and extensions (with the caller, once known) go over to them. What is decided here is how it looks in HTTP: paths, the JSON
//! form (`json`), the HTTP status of a gRPC status (`refusal`), and how a stream of changes is written (`watch`).
//!
//! A stream's body is pulled from the service as fast as the client reads, so that a slow one costs here what it costs in gRPC.
//!
//! Left out on purpose: HTTP/2 (a browser that wants more than six streams comes through a proxy that speaks it) and
//! compression, which would hold back small messages.

mod call;
mod data;
mod json;
mod listener;
mod refusal;
mod tenancy;
mod watch;

pub use listener::{Error, Listener, serve};

use crate::config::Http as HttpConfig;
use crate::grpc::proto::data_server::Data;
use crate::grpc::proto::tenancy_server::Tenancy;
use crate::grpc::watch::WatchService;
use crate::hub::start::Primary;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use axum::http::{Method, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use refusal::Refusal;
use std::time::Duration;
use tower_http::cors::{AllowOrigin, CorsLayer};

/// How long a browser may remember what CORS allows.
const CORS_MAX_AGE: Duration = Duration::from_secs(3600);

/// The routes that are served.
pub struct Gateway {
    routes: Router,
    body_bytes_max: usize,
    cors: Option<CorsLayer>,
}

impl Gateway {
    /// With Watch, and `/healthz`.
    pub fn new<P: Primary + 'static>(config: &HttpConfig, watch: WatchService<P>) -> Self {
        Self::over(config, watch::routes(watch))
    }

    /// With `base.v1.Data`.
    #[must_use]
    pub fn with_data(mut self, data: impl Data) -> Self {
        self.routes = self.routes.merge(data::routes(data));
        self
    }

    /// With `base.v1.Tenancy`.
    #[must_use]
    pub fn with_tenancy(mut self, tenancy: impl Tenancy) -> Self {
        self.routes = self.routes.merge(tenancy::routes(tenancy));
        self
    }

    fn over(config: &HttpConfig, routes: Router) -> Self {
        Self {
            routes: routes.route("/healthz", get(alive)),
            body_bytes_max: config.body_size_max.to_usize(),
            cors: cors(&config.cors_allowed_origins),
        }
    }

    /// All routes, with what holds for each.
    fn into_router(self) -> Router {
        let router = self
            .routes
            .method_not_allowed_fallback(async |method: Method| Refusal::method_not_allowed(&method))
            .fallback(async |uri: Uri| Refusal::no_route(uri.path()))
            .layer(DefaultBodyLimit::max(self.body_bytes_max));
        // Outermost: a page of another origin may read why it was refused, too.
        match self.cors {
            Some(cors) => router.layer(cors),
            None => router,
        }
    }
}

/// Says that the process runs and answers; whether it streams is what gRPC's health says.
async fn alive() -> Response {
    ([(CONTENT_TYPE, json::CONTENT_TYPE)], r#"{"status":"SERVING"}"#).into_response()
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
        .expose_headers([RETRY_AFTER, HeaderName::from_static(crate::grpc::watch::START_SNAP_TOKEN)])
        .max_age(CORS_MAX_AGE);
    Some(layer)
}

#[cfg(test)]
mod tests;
