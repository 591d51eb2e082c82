//! Who gets in: what stands in front of every service, on gRPC and HTTP alike.
//!
//! ```text
//!  request ──▶ exempt? ──▶ authn: who is it? ──▶ rate limit ──▶ service: may they use this tenant?
//!                              │ 401                 │ 429           │ 403
//! ```
//!
//! **Credentials come before the limit.** The limit protects what is behind it, PostgreSQL and the change log, from callers; and
//! it is one for the whole process. Counted before, requests without credentials would use up what callers are entitled to, and
//! anybody who can open a connection could lock everybody out. Refusing them costs a digest or the check of a signature, no
//! more than reading the request did; what would cost more, asking the issuer for its keys, has a limit of its own.
//!
//! Health and metrics count towards no limit: a server that is busy must not be taken for one that is dead, and it is when
//! there is too much that somebody wants to see how much.
//!
//! It is a layer of tower's, which tonic and axum both take:
//!
//! ```text
//!  Server::builder()….layer(admission.layer(|error| status::of_admission(error).into_http()))
//!  Router::new()….layer(admission.layer(|error| …the same status as a 401, 429 or 503…))
//! ```
//!
//! On axum it goes around all routes, and inside of CORS: the browser's preflight has no credentials. Services find the
//! [`Caller`] in the extensions of the request.

use crate::access::authn::{self, Authenticator, Caller};
use crate::config::Exempt;
use governor::clock::Clock as _;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use http::{HeaderMap, Request, Response};
use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tower_service::Service;

/// Why a request does not get in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It is not proven who makes it.
    #[error(transparent)]
    Credentials(#[from] authn::Error),
    /// There are too many.
    #[error(
        "more than {limit} requests a second, which is the limit (server.rate_limit): try again after {}ms",
        retry_after.as_millis()
    )]
    Rate {
        /// The limit.
        limit: NonZeroU32,
        /// When it is worth trying again: in whole milliseconds, at least one.
        retry_after: Duration,
    },
}

/// Decides who gets in. One for the whole process; cheap to clone.
#[derive(Clone)]
pub struct Admission(Arc<Inner>);

struct Inner {
    authenticator: Authenticator,
    exempt: Exempt,
    limit: Option<Limit>,
}

struct Limit {
    per_second: NonZeroU32,
    limiter: DefaultDirectRateLimiter,
}

/// What a request asks for, as far as it matters here.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Health,
    Reflection,
    Metrics,
    Other,
}

impl Kind {
    /// By the path, which is also what the services are found by.
    fn of(path: &str) -> Self {
        if matches!(path, "/healthz" | "/readyz") || path.starts_with("/grpc.health.v1.Health/") {
            Self::Health
        } else if path.starts_with("/grpc.reflection.") {
            Self::Reflection
        } else if path == "/metrics" {
            Self::Metrics
        } else {
            Self::Other
        }
    }
}

impl Admission {
    /// `rate_limit`: requests a second, all of which may come at once.
    pub fn new(authenticator: Authenticator, exempt: Exempt, rate_limit: Option<NonZeroU32>) -> Self {
        let limit = rate_limit
            .map(|per_second| Limit { per_second, limiter: RateLimiter::direct(Quota::per_second(per_second)) });
        Self(Arc::new(Inner { authenticator, exempt, limit }))
    }

    /// Around a service; `answer` writes a refusal in the way of its protocol.
    pub fn layer<B>(&self, answer: fn(&Error) -> Response<B>) -> Layer<B> {
        Layer { admission: self.clone(), answer }
    }

    async fn admit(&self, path: &str, headers: &HeaderMap) -> Result<Caller, Error> {
        let Inner { authenticator, exempt, limit } = &*self.0;
        let kind = Kind::of(path);
        let is_exempt = match kind {
            Kind::Health => exempt.health,
            Kind::Reflection => exempt.reflection,
            Kind::Metrics => exempt.metrics,
            Kind::Other => false,
        };
        let caller = if is_exempt { Caller::default() } else { authenticator.authenticate(headers).await? };
        match limit {
            Some(limit) if !matches!(kind, Kind::Health | Kind::Metrics) => limit.check()?,
            _ => {}
        }
        Ok(caller)
    }
}

impl Limit {
    fn check(&self) -> Result<(), Error> {
        self.limiter.check().map_err(|not_until| {
            let wait = not_until.wait_time_from(self.limiter.clock().now());
            let retry_after = Duration::from_millis(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).max(1));
            Error::Rate { limit: self.per_second, retry_after }
        })
    }
}

/// Puts [`Admission`] around a service.
pub struct Layer<B> {
    admission: Admission,
    answer: fn(&Error) -> Response<B>,
}

impl<B> Clone for Layer<B> {
    fn clone(&self) -> Self {
        Self { admission: self.admission.clone(), answer: self.answer }
    }
}

impl<S, B> tower_layer::Layer<S> for Layer<B> {
    type Service = Guarded<S, B>;

    fn layer(&self, service: S) -> Guarded<S, B> {
        Guarded { layer: self.clone(), service }
    }
}

/// A service, and what stands in front of it.
pub struct Guarded<S, B> {
    layer: Layer<B>,
    service: S,
}

impl<S: Clone, B> Clone for Guarded<S, B> {
    fn clone(&self) -> Self {
        Self { layer: self.layer.clone(), service: self.service.clone() }
    }
}

impl<S, Q, B> Service<Request<Q>> for Guarded<S, B>
where
    S: Service<Request<Q>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    Q: Send + 'static,
    B: 'static,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<B>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        let layer = self.layer.clone();
        // The one that said it is ready is the one to call.
        let next = self.service.clone();
        let mut service = std::mem::replace(&mut self.service, next);
        let (mut parts, body) = request.into_parts();
        Box::pin(async move {
            match layer.admission.admit(parts.uri.path(), &parts.headers).await {
                Ok(caller) => {
                    parts.extensions.insert(caller);
                    service.call(Request::from_parts(parts, body)).await
                }
                Err(error) => Ok((layer.answer)(&error)),
            }
        })
    }
}

#[cfg(test)]
mod tests;
