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
use super::json::{self, Changes, Written};
use super::refusal::Refusal;
use crate::api::grpc::proto::WatchRequest;
use crate::api::grpc::watch::{Responses, START_SNAP_TOKEN, WatchService};
use crate::hub::primary::Primary;
use crate::metrics::metrics;
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use futures_util::stream::{self, Stream, StreamExt as _};
use std::convert::Infallible;
use std::time::Duration;
use tonic::{Code, Status};

/// The id of the last event that an EventSource had.
pub(super) const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// In place of a snap token: there is no going on from here.
const ENDED: &str = "ended";
/// Proxies forget a quiet connection after a minute, some after half of it.
const COMMENT_EVERY: Duration = Duration::from_secs(15);
/// Tells nginx not to gather the lines of a stream.
const UNBUFFERED: [(HeaderName, HeaderValue); 1] =
    [(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"))];
const START: HeaderName = HeaderName::from_static(START_SNAP_TOKEN);

pub(super) fn routes<P: Primary + 'static>(service: WatchService<P>) -> Router {
    type Service<P> = State<WatchService<P>>;
    let lines_of =
        async |State(service): Service<P>, Call(request)| lines(&service, request, Changes::DataChanges).await;
    let first_version =
        async |State(service): Service<P>, Call(request)| lines(&service, request, Changes::TupleChanges).await;
    Router::new()
        .route("/v1/tenants/{tenant_id}/watch", post(lines_of).get(events::<P>))
        .route("/v1/watch/watch", post(first_version))
        .with_state(service)
}

/// Messages in JSON, and at most one error, which is the last.
fn messages(responses: Responses, changes: Changes) -> impl Stream<Item = Result<Written, Status>> + Send {
    responses.scan(false, move |ended, next| {
        if *ended {
            return std::future::ready(None);
        }
        let message = next.and_then(|encoded| json::write_watch_response(encoded, changes));
        if let Ok(Written { json, .. }) = &message {
            metrics().http.messages_sent.inc();
            metrics().http.bytes_sent.inc_by(json.len() as u64);
        }
        *ended = message.is_err();
        std::future::ready(Some(message))
    })
}

async fn lines<P: Primary + 'static>(
    service: &WatchService<P>,
    request: tonic::Request<WatchRequest>,
    changes: Changes,
) -> Result<Response, Refusal> {
    if request.metadata().get(LAST_EVENT_ID.as_str()).is_some_and(|last| !last.is_empty()) {
        // Passed over, it would be a stream from now on for a client that wants to resume.
        let message =
            "Last-Event-ID is for Server-Sent Events, with GET: JSON lines resume after `snap_token` in the body";
        return Err(Status::invalid_argument(message).into());
    }
    let started = service.watch(request, &metrics().http).await?;
    let start = start_of(&started);
    let lines = messages(started.into_inner(), changes).map(|message| {
        Ok::<_, Infallible>(match message {
            Ok(Written { json, .. }) => format!("{{\"result\":{json}}}\n"),
            Err(status) => format!("{{\"error\":{}}}\n", json::write_status(&status)),
        })
    });
    let kind = [(CONTENT_TYPE, "application/x-ndjson"), (CACHE_CONTROL, "no-cache")];
    Ok((kind, UNBUFFERED, start.map(|token| [(START, token)]), Body::from_stream(lines)).into_response())
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
    let (start, messages) = match service.watch(request, &metrics().http).await {
        Ok(started) => (start_of(&started), messages(started.into_inner(), Changes::DataChanges).left_stream()),
        Err(status) if heals(status.code()) => (None, stream::iter([Err(status)]).right_stream()),
        Err(status) => return Err(status.into()),
    };
    let begin = start.as_ref().and_then(|token| token.to_str().ok()).map(|token| Event::default().id(token));
    let events = stream::iter(begin).chain(messages.map(event)).map(Ok::<_, Infallible>);
    let events = Sse::new(events).keep_alive(KeepAlive::new().interval(COMMENT_EVERY));
    Ok((UNBUFFERED, start.map(|token| [(START, token)]), events).into_response())
}

fn event(message: Result<Written, Status>) -> Event {
    match message {
        Ok(Written { snap_token, json }) => Event::default().id(snap_token).data(json),
        Err(status) => {
            let event = Event::default().event("error").data(json::write_status(&status));
            let recurs = matches!(status.code(), Code::Aborted | Code::OutOfRange);
            if recurs { event.id(ENDED) } else { event }
        }
    }
}

/// Whether the same request may well be answered otherwise in a moment.
fn heals(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded | Code::Internal | Code::Unknown
    )
}

/// The token that resumes from the start of the stream.
fn start_of(started: &tonic::Response<Responses>) -> Option<HeaderValue> {
    HeaderValue::from_bytes(started.metadata().get(START_SNAP_TOKEN)?.as_bytes()).ok()
}
