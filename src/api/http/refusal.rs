//! gRPC statuses → HTTP errors: the one place.
//!
//! The body is `{code, message, details}` with the gRPC code, and the HTTP status is the one that gRPC's own gateway has
//! for it. What HTTP itself refuses has the form, too.

use super::json;
use axum::http::header::{CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// A request that is not answered.
#[derive(Debug)]
pub(super) struct Refusal {
    http: StatusCode,
    status: Box<Status>,
}

impl Refusal {
    fn new(http: StatusCode, status: Status) -> Self {
        Self { http, status: Box::new(status) }
    }

    /// Nothing is served at this path.
    pub(super) fn no_route(path: &str) -> Self {
        Self::from(Status::not_found(format!("nothing is served at {path}")))
    }

    /// Something is served at this path, by other methods.
    pub(super) fn method_not_allowed(method: &Method) -> Self {
        let status = Status::unimplemented(format!("this path is not served by {method}: see Allow"));
        Self::new(StatusCode::METHOD_NOT_ALLOWED, status)
    }

    /// A parameter where there are none.
    pub(super) fn not_in_query(method: &Method, name: &str) -> Self {
        let message =
            format!("{method} takes no query parameters, and there is `{name}`: put it into the JSON of the body");
        Self::from(Status::invalid_argument(message))
    }

    /// The body cannot be read to its end: it is too large, or the connection broke.
    pub(super) fn unreadable(http: StatusCode, message: String) -> Self {
        let code = if http == StatusCode::PAYLOAD_TOO_LARGE { Code::ResourceExhausted } else { Code::InvalidArgument };
        Self::new(http, Status::new(code, message))
    }

    /// The body did not come in time.
    pub(super) fn too_slow(limit: Duration) -> Self {
        let status = Status::deadline_exceeded(format!("the body of the request did not come within {limit:?}"));
        Self::new(StatusCode::REQUEST_TIMEOUT, status)
    }
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self::new(of(status.code()), status)
    }
}

/// As gRPC's own gateway has it.
fn of(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        // "Client closed request": it has no name.
        Code::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => StatusCode::BAD_REQUEST,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(json::CONTENT_TYPE));
        if self.http == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // In whole seconds, and never before the time.
        if let Some(delay) = self.status.get_details_retry_info().and_then(|info| info.retry_delay) {
            headers.insert(
                RETRY_AFTER,
                HeaderValue::from(delay.as_millis().div_ceil(1000).try_into().unwrap_or(u64::MAX)),
            );
        }
        (self.http, headers, json::write_status(&self.status)).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic_types::ErrorDetails;

    #[test]
    fn every_code_has_its_status() {
        for (code, http) in [
            (Code::Cancelled, 499),
            (Code::Unknown, 500),
            (Code::InvalidArgument, 400),
            (Code::DeadlineExceeded, 504),
            (Code::NotFound, 404),
            (Code::AlreadyExists, 409),
            (Code::PermissionDenied, 403),
            (Code::ResourceExhausted, 429),
            (Code::FailedPrecondition, 400),
            (Code::Aborted, 409),
            (Code::OutOfRange, 400),
            (Code::Unimplemented, 501),
            (Code::Internal, 500),
            (Code::Unavailable, 503),
            (Code::DataLoss, 500),
            (Code::Unauthenticated, 401),
        ] {
            let response = Refusal::from(Status::new(code, "no")).into_response();
            assert_eq!(response.status().as_u16(), http, "{code:?}");
            assert_eq!(response.headers().contains_key(WWW_AUTHENTICATE), http == 401);
        }
    }

    #[test]
    fn the_retry_delay_is_in_the_headers() {
        for (delay_ms, seconds) in [(1, "1"), (1000, "1"), (1001, "2")] {
            let details = ErrorDetails::with_retry_info(Some(Duration::from_millis(delay_ms)));
            let status = Status::with_error_details(Code::ResourceExhausted, "slower", details);
            assert_eq!(Refusal::from(status).into_response().headers()[RETRY_AFTER], seconds);
        }
    }
}
