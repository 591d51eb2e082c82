//! `base.v1.Watch` over HTTP, in two forms.
//!
//! | | JSON lines | Server-Sent Events |
//! | --- | --- | --- |
//! | | `POST` | `GET`, for a browser's EventSource |
//! | a message | `{"result": {"changes": …}}` | `id:` its snap token, `data: {"changes": …}` |
//! | an error | `{"error": {code, message, details}}`, the last line | `event: error`, `data: {code, …}`, the last event |
//! | while idle | nothing | a comment |
//!
//! In both the headers are sent once the start is fixed, and `snap-token` among them resumes from this start. An EventSource that
//! comes back sends the id of its last event beside the query that it began with; the id wins.
//!
//! An EventSource comes back by itself when a stream ends, with the id of the last event, but gives up for ever where it is
//! answered with anything but 200. So what heals with time (PostgreSQL is away, too many streams) is told in a stream that
//! ends at once, and what does not is an HTTP error. An end that a running stream would come to again (a gap, a token
//! that became too old) has the id [`ENDED`], and who comes back with it is answered 204, which is how one tells an EventSource
//! to stay away: going on is for the page to decide, which has to read its state anew. An event without data, which no page
//! sees, has the id of the start, so that also who has had no message yet resumes without a gap.

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

/// The id of the last event that an EventSource had.
pub(super) const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Tells nginx not to gather the lines of a stream.
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
        // Passed over, it would be a stream from now on for a client that wants to resume.
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
    // It is what came last, and the query is what the page began with: a browser sends both.
    if let Some(last) = headers.get(LAST_EVENT_ID).filter(|last| !last.is_empty()) {
        if last == ENDED {
            return Ok(StatusCode::NO_CONTENT.into_response());
        }
        // Bytes that are no text are no token either.
        request.get_mut().snap_token = String::from_utf8_lossy(last.as_bytes()).into_owned();
    }
    let (start, body) = match start(&service, request).await {
        Ok(Started { stream, snap_token }) => {
            let body = stream::Body::events(stream, snap_token.as_deref());
            (snap_token, body)
        }
        Err(error) if error.passes() => (None, stream::Body::failed_events(error)),
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

/// `start` resumes from the start of the stream.
fn response(content_type: &'static str, start: Option<&str>, body: stream::Body) -> Response {
    let kind = [(CONTENT_TYPE, content_type), (CACHE_CONTROL, "no-cache")];
    let start = start.and_then(|token| HeaderValue::from_str(token).ok());
    (kind, [UNBUFFERED], start.map(|token| [(START, token)]), Body::new(body)).into_response()
}
