//! What the process says of itself: whether it is alive, whether it is ready, and its metrics.
//!
//! *Alive* is who answers: who restarts what is not alive should not restart it because PostgreSQL is away. *Ready* is who delivers,
//! and is not far behind: a change that was made shortly ago has been sent.

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

/// What is asked for here.
pub trait Probes: Send + Sync + 'static {
    /// What is in the way, in words for somebody without credentials.
    type NotReady: fmt::Display;

    /// Whether the process delivers and has nearly all there is.
    ///
    /// # Errors
    /// Where it does not.
    fn ready(&self) -> Result<(), Self::NotReady>;

    /// All metrics in the text format. May block.
    fn metrics(&self) -> String;
}

/// Alone in its own time: to read metrics holds up releasing for a moment, and must not do so all the time, whoever asks.
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
    // Held for as long as it reads, also when nobody waits for it any more.
    let probes = alone.lock_owned().await;
    match tokio::task::spawn_blocking(move || probes.metrics()).await {
        Ok(text) => ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => super::refusal::Refusal::internal(error.to_string()).into_response(),
    }
}
