//! The mapping of errors to HTTP statuses, all in this file.
//!
//! The body is `{code, message, details}`: a `google.rpc.Status` with the gRPC code. The HTTP status is the one to
//! which grpc-gateway maps the code. Errors of HTTP itself have the same form.

use super::json;
use crate::api::watch;
use axum::http::header::{CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use prost::Message as _;
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::{StatusExt as _, pb};

/// The answer to a refused request, or the end of a stream.
#[derive(Debug)]
pub(super) struct Refusal {
    http: StatusCode,
    status: Box<pb::Status>,
    /// The time after which a client should try again.
    retry_after: Option<Duration>,
}

/// A request that cannot be understood.
pub(super) struct Invalid(pub(super) String);

impl Refusal {
    fn new(http: StatusCode, code: Code, message: String) -> Self {
        let status = pb::Status { code: code as i32, message, details: Vec::new() };
        Self { http, status: Box::new(status), retry_after: None }
    }

    fn of_code(code: Code, message: String) -> Self {
        Self::new(http_status(code), code, message)
    }

    /// The path is unknown.
    pub(super) fn no_route(path: &str) -> Self {
        Self::of_code(Code::NotFound, format!("nothing is served at {path}"))
    }

    /// The path is known, but not with this method.
    pub(super) fn method_not_allowed(method: &Method) -> Self {
        let message = format!("this path is not served by {method}: see Allow");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, Code::Unimplemented, message)
    }

    /// A query parameter of a method that has none.
    pub(super) fn not_in_query(method: &Method, name: &str) -> Self {
        let message =
            format!("{method} takes no query parameters, and there is `{name}`: put it into the JSON of the body");
        Invalid(message).into()
    }

    /// The body cannot be read to its end, because it is too large or the connection broke.
    pub(super) fn unreadable(http: StatusCode, message: String) -> Self {
        let code = if http == StatusCode::PAYLOAD_TOO_LARGE { Code::ResourceExhausted } else { Code::InvalidArgument };
        Self::new(http, code, message)
    }

    /// The body did not arrive in time.
    pub(super) fn too_slow(limit: Duration) -> Self {
        let message = format!("the body of the request did not come within {limit:?}");
        Self::new(StatusCode::REQUEST_TIMEOUT, Code::DeadlineExceeded, message)
    }

    /// The server is at fault.
    pub(super) fn internal(message: String) -> Self {
        Self::of_code(Code::Internal, message)
    }

    /// The JSON of the body, or of the end of a stream.
    pub(super) fn json(&self) -> String {
        json::write_status(&self.status)
    }
}

impl From<Invalid> for Refusal {
    fn from(Invalid(message): Invalid) -> Self {
        Self::of_code(Code::InvalidArgument, message)
    }
}

impl From<json::Error> for Refusal {
    fn from(error: json::Error) -> Self {
        match error {
            json::Error::Unwritable | json::Error::NoForm(_) => Self::internal(error.to_string()),
            _ => Invalid(error.to_string()).into(),
        }
    }
}

impl From<watch::Error> for Refusal {
    fn from(error: watch::Error) -> Self {
        Self::from(Status::from(error))
    }
}

/// The refusal of a service.
impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        let mut refusal = Self::of_code(status.code(), status.message().to_owned());
        refusal.status.details = pb::Status::decode(status.details()).map(|rich| rich.details).unwrap_or_default();
        refusal.retry_after = status.get_details_retry_info().and_then(|info| info.retry_delay);
        refusal
    }
}

/// The mapping of grpc-gateway.
fn http_status(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        // "Client Closed Request" has no constant.
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
        // Round up to whole seconds, so that a client does not come back too early.
        if let Some(delay) = self.retry_after {
            headers.insert(
                RETRY_AFTER,
                HeaderValue::from(delay.as_millis().div_ceil(1000).try_into().unwrap_or(u64::MAX)),
            );
        }
        (self.http, headers, self.json()).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value as Json, json};
    use std::collections::HashMap;
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

    #[test]
    fn an_error_has_its_details() {
        let json = |status: Status| -> Json { serde_json::from_str(&Refusal::from(status).json()).unwrap() };
        let plain = json(Status::not_found("no tenant"));
        assert_eq!(plain, json!({"code": 5, "message": "no tenant", "details": []}));

        let metadata = [("next_snap_token".to_owned(), "s".to_owned())];
        let details = ErrorDetails::with_error_info("BROKEN", "tuplewatch", HashMap::from(metadata));
        let info = json!({
            "@type": "type.googleapis.com/google.rpc.ErrorInfo",
            "reason": "BROKEN",
            "domain": "tuplewatch",
            "metadata": {"next_snap_token": "s"},
        });
        let rich = json(Status::with_error_details(Code::Aborted, "broken", details));
        assert_eq!(rich, json!({"code": 10, "message": "broken", "details": [info]}));

        // Details that cannot be decoded, or have no JSON form, are left out.
        let details = pb::Status { code: 13, message: "m".into(), details: vec![unknown()] }.encode_to_vec();
        for details in [b"\xff".to_vec(), details] {
            let status = Status::with_details(Code::Internal, "m", details.into());
            assert_eq!(json(status), json!({"code": 13, "message": "m", "details": []}));
        }
    }

    fn unknown() -> prost_types::Any {
        prost_types::Any { type_url: "type.googleapis.com/a.B".into(), value: Vec::new() }
    }
}
