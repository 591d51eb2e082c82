//! The probes: whether the process is alive, whether it is ready, and its metrics.
//!
//! The process is *alive* if it answers: an orchestrator must not restart it because PostgreSQL is down. It is *ready*
//! if it delivers changes with little delay.

use super::json;
use crate::metrics;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use std::fmt;
use std::sync::Arc;
use tokio::sync::Mutex;

/// The source of the answers.
pub(crate) trait Probes: Send + Sync + 'static {
    /// The reason why the process is not ready, in words that a client without credentials may read.
    type NotReady: fmt::Display;

    /// Checks whether the process delivers changes with little delay.
    ///
    /// # Errors
    /// The reason, if it does not.
    fn ready(&self) -> Result<(), Self::NotReady>;

    /// All metrics in the text format. May block.
    fn metrics(&self) -> String;
}

/// One request at a time reads the metrics. Reading them delays the releaser for a moment, so many requests together
/// must not delay it all the time.
type Alone<P> = Arc<Mutex<Arc<P>>>;

pub(super) fn routes<P: Probes>(probes: P) -> Router {
    let probes = Arc::new(probes);
    let alone: Alone<P> = Arc::new(Mutex::new(probes.clone()));
    let ready = Router::new().route("/readyz", get(ready::<P>)).with_state(probes);
    let metrics = Router::new().route("/metrics", get(scrape::<P>)).with_state(alone);
    Router::new().route("/healthz", get(alive)).merge(ready).merge(metrics)
}

async fn alive() -> Response {
    ([(CONTENT_TYPE, json::CONTENT_TYPE)], r#"{"status":"ALIVE"}"#).into_response()
}

async fn ready<P: Probes>(State(probes): State<Arc<P>>) -> Response {
    let (status, body) = match probes.ready() {
        Ok(()) => (StatusCode::OK, serde_json::json!({"status": "READY"})),
        Err(reason) => {
            let body = serde_json::json!({"status": "NOT_READY", "reason": reason.to_string()});
            (StatusCode::SERVICE_UNAVAILABLE, body)
        }
    };
    let headers = [(CONTENT_TYPE, json::CONTENT_TYPE), (CACHE_CONTROL, "no-store")];
    (status, headers, body.to_string()).into_response()
}

async fn scrape<P: Probes>(State(alone): State<Alone<P>>) -> Response {
    // The lock is held until the metrics are read, even if the client has gone away.
    let probes = alone.lock_owned().await;
    match tokio::task::spawn_blocking(move || probes.metrics()).await {
        Ok(text) => ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => super::refusal::Refusal::internal(error.to_string()).into_response(),
    }
}
