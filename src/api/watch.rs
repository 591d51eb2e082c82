//! Watch: the access to tenants, the start of a stream, the number of streams, and the end of a stream.
//!
//! This module knows no protocol: [`WatchService::start`] returns a [`Stream`] or an [`Error`], and each protocol turns
//! them into frames and statuses.

mod error;
mod stream;
mod tokens;

pub(crate) use error::{AFTER_GAP, Error, NEXT_SNAP_TOKEN, SNAP_TOKEN_TOO_OLD};
pub(crate) use stream::{Next, Stream};
pub(crate) use tokens::Tokens;

use super::scope::Requested;
use super::{permify_names, scope};
use crate::access::authn::Caller;
use crate::hub::Hub;
use crate::hub::primary::Primary;
use crate::metrics::{Edge, metrics};
use crate::model::change::TenantId;
use crate::model::lsn::CommitTime;
use crate::model::scope::Scope;
use crate::model::snap_token::Form;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, watch};

/// The settings of streams.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// Whether Watch is enabled.
    pub(crate) enabled: bool,
    /// The most streams at a time.
    pub(crate) subscribers_max: usize,
    /// The longest wait for a transaction token to resolve.
    pub(crate) resolve_timeout: Duration,
    /// The form of the tokens in messages.
    pub(crate) token_form: Form,
    /// Whether tenant ids must have Permify's form, as with the presets. Other mappings permit any text.
    pub(crate) permify_tenants: bool,
}

/// The Watch service. Cheap to clone.
pub(crate) struct WatchService<P> {
    hub: Hub,
    inner: Arc<Inner<P>>,
}

struct Inner<P> {
    primary: P,
    options: Options,
    /// One permit for each stream.
    streams: Arc<Semaphore>,
    /// Turns true when no stream may start any more.
    stop: watch::Receiver<bool>,
}

impl<P> Clone for WatchService<P> {
    fn clone(&self) -> Self {
        Self { hub: self.hub.clone(), inner: self.inner.clone() }
    }
}

/// A stream with a fixed start: it delivers everything that commits from now on.
pub(crate) struct Started {
    pub(crate) stream: Stream,
    /// The token that resumes from the start, for a client that has received no message yet.
    pub(crate) snap_token: Option<String>,
}

impl<P: Primary> WatchService<P> {
    /// A service on this hub. `primary` resolves starts that depend on PostgreSQL. After `stop` turns true, no stream
    /// starts; open streams end with the hub.
    pub(crate) fn new(hub: Hub, primary: P, options: Options, stop: watch::Receiver<bool>) -> Self {
        let streams = Arc::new(Semaphore::new(options.subscribers_max));
        metrics().subscribers_limit.set(i64::try_from(options.subscribers_max).unwrap_or(i64::MAX));
        // Initialized at zero, so that `rate()` sees the first increment.
        for edge in [&metrics().grpc, &metrics().http] {
            metrics().streams_ended(edge.protocol, SNAP_TOKEN_TOO_OLD);
        }
        Self { hub, inner: Arc::new(Inner { primary, options, streams, stop }) }
    }

    /// Returns the same service for a thread with its own handle of the hub.
    #[must_use]
    pub(crate) fn with_hub(&self, hub: Hub) -> Self {
        Self { hub, inner: self.inner.clone() }
    }

    /// The hub of the streams.
    pub(crate) const fn hub(&self) -> &Hub {
        &self.hub
    }

    /// Starts a stream of the changes after the token, or from now on if the token is empty. The protocol counts the
    /// stream.
    ///
    /// # Errors
    /// See [`Error`].
    pub(crate) async fn start(
        &self,
        caller: Option<&Caller>,
        requested: Requested<'_>,
        snap_token: &str,
        edge: &'static Edge,
    ) -> Result<Started, Error> {
        scope::authorize(caller, requested)?;
        let Inner { primary, options, streams, stop } = &*self.inner;
        if !options.enabled {
            return Err(Error::Disabled);
        }
        let scope = match requested {
            Requested::Tenant(tenant) => {
                let id = TenantId::new(tenant)?;
                if options.permify_tenants && !permify_names::is_id(tenant) {
                    return Err(Error::TenantForm(permify_names::ID));
                }
                Scope::Tenant(id)
            }
            Requested::All => Scope::All,
        };
        if *stop.borrow() {
            return Err(Error::ShuttingDown);
        }
        let permit = streams.clone().try_acquire_owned();
        let permit = permit.map_err(|_| Error::TooMany { max: options.subscribers_max })?;
        let mut stop = stop.clone();
        let started = tokio::select! {
            started = self.hub.start(primary, scope, snap_token, options.resolve_timeout) => started,
            _ = stop.wait_for(|stop| *stop) => return Err(Error::ShuttingDown),
        };
        let tokens = self.hub.origin().map(|origin| Tokens::new(&origin));
        let subscription = match started {
            Ok(subscription) => subscription,
            Err(error) => return Err(Error::of_start(error, tokens)),
        };
        let snap_token = tokens.map(|tokens| tokens.write(subscription.place().clone(), CommitTime::default()));
        let expires_at = caller.and_then(Caller::expires_at);
        let stream = Stream::new(self.hub.clone(), options.token_form, subscription, expires_at, edge, permit);
        Ok(Started { stream, snap_token })
    }
}
