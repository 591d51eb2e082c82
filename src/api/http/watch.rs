//! `base.v1.Watch` over HTTP, in two forms.
//!
//! | | JSON lines | Server-Sent Events |
//! | --- | --- | --- |
//! | | `POST` | `GET`, for a browser's EventSource |
//! | a message | `{"result": {"changes": …}}` | `id:` its snap token, `data: {"changes": …}` |
//! | an error | `{"error": {code, message, details}}`, the last line | `event: error`, `data: {code, …}`, the last event |
//! | while idle | nothing | a comment |
//!
//! In both forms the headers are sent when the start is fixed, and the header `snap-token` resumes from this start. A
//! reconnecting EventSource sends the id of its last event together with its original query; the id takes precedence.
//!
//! When a stream ends, an EventSource reconnects by itself with the id of its last event. But it gives up for ever at
//! any status other than 200. So a temporary error (PostgreSQL is down, too many streams) is sent in a stream that ends
//! at once, and a lasting error is an HTTP error.
//!
//! After an end that every reconnect would reach again (a gap, a token that has become too old), the id is [`ENDED`]. A
//! request with this id is answered with 204, which stops an EventSource: the page must read its state anew, and
//! decides when to continue.
//!
//! The first event has the id of the start and no data, so pages do not see it. With it, a client that has received no
//! message also resumes without a gap.

use super::call::Call;
use super::refusal::{Invalid, Refusal};
use super::stream::{self, Changes, ENDED};
use crate::access::authn::Caller;
use crate::api::grpc::proto::WatchRequest;
use crate::api::grpc::watch::START_SNAP_TOKEN;
use crate::api::scope::Requested;
use crate::api::watch::{Error, Started, WatchService};
use crate::hub::primary::Primary;
use crate::metrics::metrics;
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use axum::routing::post;

/// The id of the last event that an EventSource received.
pub(super) const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Keeps nginx from buffering the lines of a stream.
const UNBUFFERED: (HeaderName, HeaderValue) =
    (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
const START: HeaderName = HeaderName::from_static(START_SNAP_TOKEN);

pub(super) fn routes<P: Primary + 'static>(service: WatchService<P>) -> Router {
    type Service<P> = State<WatchService<P>>;
    let lines_of = async |State(service): Service<P>, headers: HeaderMap, Call(request)| {
        lines(&service, &headers, request, Changes::DataChanges).await
    };
    let first_version = async |State(service): Service<P>, headers: HeaderMap, Call(request)| {
        lines(&service, &headers, request, Changes::TupleChanges).await
    };
    Router::new()
        .route("/v1/tenants/{tenant_id}/watch", post(lines_of).get(events::<P>))
        .route("/v1/watch/watch", post(first_version))
        .with_state(service)
}

async fn lines<P: Primary + 'static>(
    service: &WatchService<P>,
    headers: &HeaderMap,
    request: tonic::Request<WatchRequest>,
    changes: Changes,
) -> Result<Response, Refusal> {
    if headers.get(LAST_EVENT_ID).is_some_and(|last| !last.is_empty()) {
        // If the header were ignored, a client that wants to resume would start a stream from now on.
        let message =
            "Last-Event-ID is for Server-Sent Events, with GET: JSON lines resume after `snap_token` in the body";
        return Err(Invalid(message.to_owned()).into());
    }
    let Started { stream, snap_token } = start(service, request).await?;
    Ok(response("application/x-ndjson", snap_token.as_deref(), stream::Body::lines(stream, changes)))
}

async fn events<P: Primary + 'static>(
    State(service): State<WatchService<P>>,
    headers: HeaderMap,
    Call(mut request): Call<WatchRequest>,
) -> Result<Response, Refusal> {
    // A browser sends both: the id of the last event, and the original query of the page.
    if let Some(last) = headers.get(LAST_EVENT_ID).filter(|last| !last.is_empty()) {
        if last == ENDED {
            return Ok(StatusCode::NO_CONTENT.into_response());
        }
        // Invalid UTF-8 cannot be a token, and the service refuses the replaced text.
        request.get_mut().snap_token = String::from_utf8_lossy(last.as_bytes()).into_owned();
    }
    let (start, body) = match start(&service, request).await {
        Ok(Started { stream, snap_token }) => {
            let body = stream::Body::events(stream, snap_token.as_deref());
            (snap_token, body)
        }
        Err(error) if error.is_temporary() => (None, stream::Body::failed_events(error)),
        Err(error) => return Err(error.into()),
    };
    Ok(response("text/event-stream", start.as_deref(), body))
}

async fn start<P: Primary + 'static>(
    service: &WatchService<P>,
    request: tonic::Request<WatchRequest>,
) -> Result<Started, Error> {
    let (_, extensions, WatchRequest { tenant_id, snap_token }) = request.into_parts();
    service.start(extensions.get::<Caller>(), Requested::Tenant(&tenant_id), &snap_token, &metrics().http).await
}

/// `start` is the token that resumes from the start of the stream.
fn response(content_type: &'static str, start: Option<&str>, body: stream::Body) -> Response {
    let kind = [(CONTENT_TYPE, content_type), (CACHE_CONTROL, "no-cache")];
    let start = start.and_then(|token| HeaderValue::from_str(token).ok());
    (kind, [UNBUFFERED], start.map(|token| [(START, token)]), Body::new(body)).into_response()
}
