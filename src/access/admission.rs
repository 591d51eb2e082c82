//! Admission: the layer in front of every service, for gRPC and HTTP alike.
//!
//! ```text
//!  request ──▶ exempt? ──▶ authn: who is it? ──▶ rate limit ──▶ service: may they use this tenant?
//!                              │ 401                 │ 429           │ 403
//! ```
//!
//! **Credentials are checked before the rate limit.** The limit protects PostgreSQL and the change log, and there is
//! one for the whole process. If it counted first, requests without credentials would use it up, and anybody who can
//! connect could lock all callers out. Refusing such a request costs a digest or a signature check, no more than
//! reading it did. Asking the issuer for its keys costs more, and has a limit of its own.
//!
//! Health and metrics do not count towards the limit: a busy server must not look dead, and its metrics matter most
//! under load.
//!
//! Admission is a tower layer, which tonic and axum both accept:
//!
//! ```text
//!  Server::builder()….layer(admission.layer(|error| status::of_admission(error).into_http()))
//!  Router::new()….layer(admission.layer(|error| …the same status as a 401, 429 or 503…))
//! ```
//!
//! In axum it surrounds all routes, inside of the CORS layer, because a browser's preflight request has no credentials.
//! Services find the [`Caller`] in the extensions of the request.

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

/// The reason for refusing a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    /// The credentials do not prove who the caller is.
    #[error(transparent)]
    Credentials(#[from] authn::Error),
    #[error(
        "more than {limit} requests a second, which is the limit (server.rate_limit): try again after {}ms",
        retry_after.as_millis()
    )]
    Rate {
        limit: NonZeroU32,
        /// The wait until a retry may succeed, in whole milliseconds, at least one.
        retry_after: Duration,
    },
}

/// Decides which requests are admitted. There is one for the whole process. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Admission(Arc<Inner>);

struct Inner {
    authenticator: Authenticator,
    exempt: Exempt,
    limit: Option<Limit>,
}

struct Limit {
    per_second: NonZeroU32,
    limiter: DefaultDirectRateLimiter,
}

/// The kind of a request, as far as admission distinguishes it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Health,
    Reflection,
    Metrics,
    Other,
}

impl Kind {
    /// Derives the kind from the path, which also selects the service.
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
    /// Creates the admission. `rate_limit` is in requests a second, all of which may come at once.
    pub(crate) fn new(authenticator: Authenticator, exempt: Exempt, rate_limit: Option<NonZeroU32>) -> Self {
        let limit = rate_limit
            .map(|per_second| Limit { per_second, limiter: RateLimiter::direct(Quota::per_second(per_second)) });
        Self(Arc::new(Inner { authenticator, exempt, limit }))
    }

    /// A layer around a service. `answer` turns a refusal into a response of the protocol.
    pub(crate) fn layer<B>(&self, answer: fn(&Error) -> Response<B>) -> Layer<B> {
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

/// The tower layer that puts [`Admission`] around a service.
pub(crate) struct Layer<B> {
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

/// A service with admission in front.
pub(crate) struct Guarded<S, B> {
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
        // The instance that was polled ready must be the one that is called.
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
