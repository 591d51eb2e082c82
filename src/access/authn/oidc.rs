//! JWTs of an OpenID Connect issuer.
//!
//! ```text
//!  Verifier ◀── watch: the keys ─── Refresher ──▶ issuer: discovery, JWKS
//!     └────────── notify: a key that is not known ──▶ ┘
//! ```
//!
//! - Keys are fetched at start, at intervals, and when a token names an unknown key, so that a rotation is noticed at
//!   once. `UNKNOWN_KEYS_PER_MINUTE` limits the fetches for unknown keys, whatever callers send.
//! - If the issuer does not answer, the known keys stay in use. A token with an unknown key is then answered with
//!   "cannot be checked", not with a refusal.
//! - The algorithm must be in the list here, and must fit the key. The token's header only selects among these. So
//!   neither `none` nor a public key that is used as an HMAC secret is accepted.
//! - Expiry is exact, because streams end with it. Only `nbf` has a leeway, for clocks behind the issuer's.

pub(crate) mod issuer;
mod keys;
mod signature;

use super::{Caller, Error};
use crate::config;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use issuer::Issuer;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, Header, Validation, decode, decode_header};
use keys::Keys;
use serde_json::{Map, Value};
use std::collections::HashSet;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, watch};

/// The accepted signature algorithms. All of them use a public key.
const ALGORITHMS: [Algorithm; 5] =
    [Algorithm::RS256, Algorithm::RS384, Algorithm::RS512, Algorithm::ES256, Algorithm::ES384];
/// How far this machine's clock may be behind the issuer's: a token that was just issued must be valid.
const CLOCK_LEEWAY: Duration = Duration::from_secs(30);
/// The interval between two fetches, and so the longest use of a key that the issuer withdrew.
const REFRESH_EVERY: Duration = Duration::from_secs(5 * 60);
/// The first wait after a failure; it doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// The limit of fetches for unknown keys. A rotation needs one.
const UNKNOWN_KEYS_PER_MINUTE: NonZeroU32 = NonZeroU32::MIN.saturating_add(5);

/// The issuer's keys, as far as they are known.
#[derive(Clone, Default)]
struct Known {
    /// `None` before the first successful fetch.
    keys: Option<Arc<Keys>>,
    /// Whether the last fetch succeeded, so that a key that is not here does not exist.
    is_complete: bool,
}

/// Creates both halves. The refresher must run as long as the verifier is used.
pub(super) fn new(config: &config::Oidc) -> Result<(Verifier, Refresher), issuer::Error> {
    signature::install();
    let (publish, known) = watch::channel(Known::default());
    let wanted = Arc::new(Notify::new());
    let issuer = Issuer::new(config.issuer.clone())?;
    let verifier = Verifier { options: config.clone(), known, wanted: wanted.clone() };
    Ok((verifier, Refresher { issuer, publish, wanted }))
}

pub(crate) struct Verifier {
    options: config::Oidc,
    known: watch::Receiver<Known>,
    wanted: Arc<Notify>,
}

impl Verifier {
    /// Verifies a token, and returns its caller.
    pub(super) async fn verify(&self, token: &str) -> Result<Caller, Error> {
        let header = decode_header(token).map_err(|error| refusal(&error))?;
        // RFC 7515, section 4.1.11: an unsupported critical extension must be refused.
        if !ALGORITHMS.contains(&header.alg) || header.crit.is_some() {
            return Err(Error::InvalidBearerToken);
        }
        let keys = self.keys_with(&header).await?;
        let key = keys.find(&header).ok_or(Error::InvalidBearerToken)?;
        let claims = decode::<Map<String, Value>>(token, key, &self.validation(header.alg));
        self.caller(&claims.map_err(|error| refusal(&error))?.claims)
    }

    /// The known keys. If the token's key is not among them, asks the issuer first.
    async fn keys_with(&self, header: &Header) -> Result<Arc<Keys>, Error> {
        let mut known = self.known.clone();
        if let Some(keys) = known.borrow_and_update().keys.clone().filter(|keys| keys.find(header).is_some()) {
            return Ok(keys);
        }
        self.wanted.notify_one();
        // Every fetch wakes this up, whether it succeeded or was not permitted. An error means that the process is
        // ending.
        known.changed().await.map_err(|_| Error::IssuerUnreachable)?;
        let known = known.borrow();
        match &known.keys {
            Some(keys) if known.is_complete || keys.find(header).is_some() => Ok(keys.clone()),
            _ => Err(Error::IssuerUnreachable),
        }
    }

    fn validation(&self, algorithm: Algorithm) -> Validation {
        let mut validation = Validation::new(algorithm);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        validation.set_issuer(&[self.options.issuer.as_str()]);
        validation.set_audience(&[&self.options.audience]);
        validation.validate_nbf = true;
        validation.leeway = CLOCK_LEEWAY.as_secs();
        validation
    }

    /// Reads the claims of a token whose signature is valid.
    fn caller(&self, claims: &Map<String, Value>) -> Result<Caller, Error> {
        // RFC 7519, section 4.1.1: the issuer is a single string.
        if !claims.get("iss").is_some_and(Value::is_string) {
            return Err(Error::InvalidIssuer);
        }
        let expires_at =
            claims.get("exp").and_then(Value::as_f64).filter(|at| *at >= 0.0).ok_or(Error::InvalidClaims)?;
        // A time beyond the range of the clock means never.
        let expires_at =
            Duration::try_from_secs_f64(expires_at).ok().and_then(|at| SystemTime::UNIX_EPOCH.checked_add(at));
        if expires_at.is_some_and(|at| at <= SystemTime::now()) {
            return Err(Error::InvalidBearerToken);
        }
        let tenants = match &self.options.tenants_claim {
            Some(name) => Some(tenants(claims.get(name)).ok_or(Error::InvalidClaims)?),
            None => None,
        };
        Ok(Caller::new(tenants, expires_at))
    }
}

/// One tenant, or a list of tenants. `None` for any other value.
fn tenants(claim: Option<&Value>) -> Option<HashSet<String>> {
    match claim? {
        Value::String(tenant) => Some(HashSet::from([tenant.clone()])),
        Value::Array(items) => items.iter().map(|item| item.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

fn refusal(error: &jsonwebtoken::errors::Error) -> Error {
    match error.kind() {
        ErrorKind::InvalidAudience => Error::InvalidAudience,
        ErrorKind::InvalidIssuer => Error::InvalidIssuer,
        ErrorKind::MissingRequiredClaim(_) | ErrorKind::InvalidClaimFormat(_) => Error::InvalidClaims,
        _ => Error::InvalidBearerToken,
    }
}

/// Fetches the keys regularly and on request.
pub(crate) struct Refresher {
    issuer: Issuer,
    publish: watch::Sender<Known>,
    wanted: Arc<Notify>,
}

impl Refresher {
    /// Runs until dropped.
    pub(crate) async fn run(self) {
        let limit = RateLimiter::direct(Quota::per_minute(UNKNOWN_KEYS_PER_MINUTE));
        let mut retry = RETRY_MIN;
        loop {
            let is_fresh = self.fetch().await;
            let wait = if is_fresh { REFRESH_EVERY } else { retry };
            retry = if is_fresh { RETRY_MIN } else { (retry * 2).min(RETRY_MAX) };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.unknown_key(&limit) => {}
            }
        }
    }

    /// Completes when a token names an unknown key and the limit permits a fetch. Otherwise it wakes the waiting
    /// requests without new keys.
    async fn unknown_key(&self, limit: &DefaultDirectRateLimiter) {
        loop {
            self.wanted.notified().await;
            if limit.check().is_ok() {
                return;
            }
            self.publish.send_modify(|_| {});
        }
    }

    /// Fetches the keys once, and returns whether that succeeded. Logs only changes of the outcome.
    async fn fetch(&self) -> bool {
        let fetched = self.issuer.fetch().await;
        let before = self.publish.borrow().clone();
        match &fetched {
            Ok(_) if !before.is_complete => tracing::info!("the keys of {} were fetched", self.issuer.url()),
            Err(error) if before.is_complete => {
                tracing::warn!(
                    "the keys of {} cannot be refreshed: {error}; the known keys stay in use",
                    self.issuer.url()
                );
            }
            Err(error) if before.keys.is_none() => {
                tracing::warn!("the keys of {} cannot be fetched, so no token is accepted: {error}", self.issuer.url());
            }
            _ => {}
        }
        let is_complete = fetched.is_ok();
        let keys = fetched.map(Arc::new).ok().or(before.keys);
        self.publish.send_replace(Known { keys, is_complete });
        is_complete
    }
}
