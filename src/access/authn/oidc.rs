//! JWTs of an OpenID Connect issuer.
//!
//! ```text
//!  Verifier ◀── watch: the keys ─── Refresher ──▶ issuer: discovery, JWKS
//!     └────────── notify: a key that is not known ──▶ ┘
//! ```
//!
//! - Keys are fetched at start, then at intervals, and when a token names one that is not known: that is how a rotation is
//!   noticed at once. Whoever sends unknown names by the thousand has the issuer asked as often as `UNKNOWN_KEYS_PER_MINUTE` allows.
//! - An issuer that does not answer takes nothing away: the keys at hand go on being used. Where the token's is not among them,
//!   the answer is "cannot be told", not "no".
//! - The algorithm comes from the list here and must be one of the key's; what the token says of it chooses, and is not
//!   believed. So neither `none` nor a public key taken for an HMAC secret gets anywhere.
//! - Expiry is exact, as streams end with it; only `nbf` has a leeway, for clocks that are behind the issuer's.

pub mod issuer;
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

/// Algorithms of signatures that are accepted; all of them have a public key.
const ALGORITHMS: [Algorithm; 5] =
    [Algorithm::RS256, Algorithm::RS384, Algorithm::RS512, Algorithm::ES256, Algorithm::ES384];
/// How far our clock may be behind the issuer's, so that a token just issued is good.
const CLOCK_LEEWAY: Duration = Duration::from_secs(30);
/// A key that the issuer withdrew is used for so long at most.
const REFRESH_EVERY: Duration = Duration::from_secs(5 * 60);
/// The first wait after a failure; it doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// Fetches for keys that are not known. A rotation needs one.
const UNKNOWN_KEYS_PER_MINUTE: NonZeroU32 = NonZeroU32::MIN.saturating_add(5);

/// What is known of the issuer's keys.
#[derive(Clone, Default)]
struct Known {
    /// `None` before the first fetch that succeeded.
    keys: Option<Arc<Keys>>,
    /// Whether the last fetch succeeded: whether a key that is not here does not exist.
    is_complete: bool,
}

/// Both halves; the second one is to be run as long as the first is used.
pub(super) fn new(config: &config::Oidc) -> Result<(Verifier, Refresher), issuer::Error> {
    signature::install();
    let (publish, known) = watch::channel(Known::default());
    let wanted = Arc::new(Notify::new());
    let issuer = Issuer::new(config.issuer.clone())?;
    let verifier = Verifier { options: config.clone(), known, wanted: wanted.clone() };
    Ok((verifier, Refresher { issuer, publish, wanted }))
}

/// Checks tokens.
pub struct Verifier {
    options: config::Oidc,
    known: watch::Receiver<Known>,
    wanted: Arc<Notify>,
}

impl Verifier {
    /// Whose token it is.
    pub(super) async fn verify(&self, token: &str) -> Result<Caller, Error> {
        let header = decode_header(token).map_err(|error| refusal(&error))?;
        // RFC 7515, section 4.1.11: an extension that must be understood, and is not.
        if !ALGORITHMS.contains(&header.alg) || header.crit.is_some() {
            return Err(Error::InvalidBearerToken);
        }
        let keys = self.keys_with(&header).await?;
        let key = keys.find(&header).ok_or(Error::InvalidBearerToken)?;
        let claims = decode::<Map<String, Value>>(token, key, &self.validation(header.alg));
        self.caller(&claims.map_err(|error| refusal(&error))?.claims)
    }

    /// The keys, after the issuer was asked where the token's is not among them.
    async fn keys_with(&self, header: &Header) -> Result<Arc<Keys>, Error> {
        let mut known = self.known.clone();
        if let Some(keys) = known.borrow_and_update().keys.clone().filter(|keys| keys.find(header).is_some()) {
            return Ok(keys);
        }
        self.wanted.notify_one();
        // However the fetch ends, and also where there is none. An error: the process is ending.
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

    /// What the claims of a token with a good signature say.
    fn caller(&self, claims: &Map<String, Value>) -> Result<Caller, Error> {
        // A list of issuers is no issuer (RFC 7519, section 4.1.1).
        if !claims.get("iss").is_some_and(Value::is_string) {
            return Err(Error::InvalidIssuer);
        }
        let expires_at =
            claims.get("exp").and_then(Value::as_f64).filter(|at| *at >= 0.0).ok_or(Error::InvalidClaims)?;
        // As far away as a clock does not reach is as good as never.
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

/// One tenant, or a list of them. `None` for anything else.
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

/// Keeps the keys fresh.
pub struct Refresher {
    issuer: Issuer,
    publish: watch::Sender<Known>,
    wanted: Arc<Notify>,
}

impl Refresher {
    /// Runs until it is dropped.
    pub async fn run(self) {
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

    /// Completes when a token names a key that is not known, and the issuer may be asked for it. Where it may not, whoever
    /// waits is told that there is nothing new.
    async fn unknown_key(&self, limit: &DefaultDirectRateLimiter) {
        loop {
            self.wanted.notified().await;
            if limit.check().is_ok() {
                return;
            }
            self.publish.send_modify(|_| {});
        }
    }

    /// Fetches the keys once; whether that worked. It is said when that changes.
    async fn fetch(&self) -> bool {
        let fetched = self.issuer.fetch().await;
        let before = self.publish.borrow().clone();
        match &fetched {
            Ok(_) if !before.is_complete => tracing::info!("the keys of {} are here", self.issuer.url()),
            Err(error) if before.is_complete => {
                tracing::warn!("the keys of {} cannot be refreshed: {error}; those at hand stay", self.issuer.url());
            }
            Err(error) if before.keys.is_none() => {
                tracing::warn!(
                    "the keys of {} cannot be fetched, without which no token is accepted: {error}",
                    self.issuer.url()
                );
            }
            _ => {}
        }
        let is_complete = fetched.is_ok();
        let keys = fetched.map(Arc::new).ok().or(before.keys);
        self.publish.send_replace(Known { keys, is_complete });
        is_complete
    }
}
