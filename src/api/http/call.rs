//! The conversion of an HTTP request into the request of a service, and of the answer back.

use super::json::{self, Reading};
use super::refusal::{Invalid, Refusal};
use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Query, RawPathParams, Request};
use axum::http::Method;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use prost::{Message, Name};
use std::time::Duration;
use tonic::metadata::MetadataMap;
use tonic::{Extensions, Status};

/// The longest time to receive a body: far more than the largest body takes on a slow line.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// A call of a service. Its message is made from the body, the path and (for GET) the query. Headers and extensions are
/// passed on.
///
/// Everything in the request is either understood or refused. A field may be set in two places if both agree. The
/// content type is ignored, as in Permify's gateway: the body must be JSON in any case.
pub(super) struct Call<T>(pub(super) tonic::Request<T>);

impl<T: Message + Name + Default, S: Send + Sync> FromRequest<S> for Call<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let (mut parts, body) = request.into_parts();
        let path = RawPathParams::from_request_parts(&mut parts, state).await;
        let path = path.map_err(|error| Invalid(error.body_text()))?;
        let query = Query::<Vec<(String, String)>>::from_request_parts(&mut parts, state).await;
        let Query(query) = query.map_err(|error| Invalid(error.body_text()))?;
        if let Some((name, _)) = query.first().filter(|_| !matches!(parts.method, Method::GET | Method::HEAD)) {
            return Err(Refusal::not_in_query(&parts.method, name));
        }
        let body = Bytes::from_request(Request::from_parts(parts.clone(), body), state);
        let body = tokio::time::timeout(BODY_TIMEOUT, body).await.map_err(|_| Refusal::too_slow(BODY_TIMEOUT))?;
        let body = body.map_err(|error| Refusal::unreadable(error.status(), error.body_text()))?;

        let mut reading = Reading::body::<T>(&body)?;
        for (name, text) in &path {
            reading.path(name, text)?;
        }
        for (name, text) in &query {
            // In a query, `+` stands for a space. No valid value contains a space, but a token may contain `+`.
            reading.parameter(name, &text.replace(' ', "+"))?;
        }
        let message = reading.finish()?;
        let metadata = MetadataMap::from_headers(parts.headers);
        let extensions: Extensions = parts.extensions;
        Ok(Self(tonic::Request::from_parts(metadata, extensions, message)))
    }
}

/// Writes the answer of a service as JSON.
pub(super) fn answer<T: Message + Name>(answered: Result<tonic::Response<T>, Status>) -> Result<Response, Refusal> {
    let json = json::write(answered?.get_ref())?;
    Ok(([(CONTENT_TYPE, json::CONTENT_TYPE)], json).into_response())
}
