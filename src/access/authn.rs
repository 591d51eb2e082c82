//! Who makes a request: credentials → [`Caller`].
//!
//! Both edges take `authorization: Bearer …`, and both come through [`crate::access::admission`]. What a token or a key is good for is
//! decided here alone; whether a tenant is among it is asked by every service, with [`Caller::may_use`].
//!
//! A refusal says which kind of thing is wrong, and never more: not which key was close, nor what a claim should have been.
//! Credentials are in no message and in no log.

pub mod oidc;
pub mod preshared;

use crate::config::Credentials;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::SystemTime;

/// What is known of who makes a request; in the request's extensions. Without authentication it is anyone. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    /// `None`: all tenants.
    tenants: Option<Arc<HashSet<String>>>,
    expires_at: Option<SystemTime>,
}

impl Caller {
    fn new(tenants: Option<HashSet<String>>, expires_at: Option<SystemTime>) -> Self {
        Self { tenants: tenants.map(Arc::new), expires_at }
    }

    /// Whether the tenant is one of theirs.
    pub fn may_use(&self, tenant: &str) -> bool {
        self.tenants.as_ref().is_none_or(|tenants| tenants.contains(tenant))
    }

    /// The tenants that are theirs; `None`: all.
    pub fn tenants(&self) -> Option<impl Iterator<Item = &String>> {
        self.tenants.as_ref().map(|tenants| tenants.iter())
    }

    /// When the credentials stop being good, and with them the streams that were opened with them.
    pub const fn expires_at(&self) -> Option<SystemTime> {
        self.expires_at
    }
}

/// Why credentials are not accepted. Displayed as Permify's name for it, where there is one, and what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No `authorization` header, several, or one with another scheme.
    #[error(
        "ERROR_CODE_MISSING_BEARER_TOKEN: this server asks for credentials, and the request has none: send one header \
         `Authorization: Bearer ...` with a key or token"
    )]
    MissingBearerToken,
    /// No JWT, no good signature, an algorithm that is not accepted, not yet or no longer valid.
    #[error(
        "ERROR_CODE_INVALID_BEARER_TOKEN: the token is no JWT that the issuer signed and that is valid now: get a new one, \
         and send it as `Authorization: Bearer ...`"
    )]
    InvalidBearerToken,
    /// A JWT that was issued for somebody else.
    #[error(
        "ERROR_CODE_INVALID_AUDIENCE: the token was issued for another service: ask its issuer for one with the audience of \
         this server (authn.oidc.audience)"
    )]
    InvalidAudience,
    /// A JWT of another issuer.
    #[error(
        "ERROR_CODE_INVALID_ISSUER: the token is from another issuer: send one from the issuer of this server \
         (authn.oidc.issuer)"
    )]
    InvalidIssuer,
    /// A claim that must be there is missing, or is not what it should be.
    #[error(
        "ERROR_CODE_INVALID_CLAIMS: a claim that the token must have is missing or has the wrong form: ask its issuer for one \
         with aud, exp, and the claim of authn.oidc.tenants_claim if this server has that"
    )]
    InvalidClaims,
    /// No key of the list.
    #[error(
        "ERROR_CODE_UNAUTHENTICATED: the key is none of this server's: send one of authn.preshared.keys as \
         `Authorization: Bearer ...`"
    )]
    Unauthenticated,
    /// It cannot be told: the issuer does not answer, and none of the keys at hand is the token's.
    #[error("the keys of the tokens' issuer cannot be fetched at the moment: try again")]
    IssuerUnreachable,
}

impl Error {
    /// A name for programs: Permify's without its `ERROR_CODE_`, where there is one.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::MissingBearerToken => "MISSING_BEARER_TOKEN",
            Self::InvalidBearerToken => "INVALID_BEARER_TOKEN",
            Self::InvalidAudience => "INVALID_AUDIENCE",
            Self::InvalidIssuer => "INVALID_ISSUER",
            Self::InvalidClaims => "INVALID_CLAIMS",
            Self::Unauthenticated => "UNAUTHENTICATED",
            Self::IssuerUnreachable => "ISSUER_UNREACHABLE",
        }
    }
}

/// Tells who makes a request.
pub enum Authenticator {
    /// Everybody is let in.
    Open,
    /// By a key of a list.
    Preshared(preshared::Keys),
    /// By a JWT.
    Oidc(oidc::Verifier),
}

impl Authenticator {
    /// As it is configured. The second part, where there is one, is to be run as long as requests are taken.
    ///
    /// # Errors
    /// Where the issuer cannot even be asked.
    pub fn new(credentials: Option<&Credentials>) -> Result<(Self, Option<oidc::Refresher>), oidc::issuer::Error> {
        Ok(match credentials {
            None => (Self::Open, None),
            Some(Credentials::Preshared(keys)) => (Self::Preshared(preshared::Keys::new(keys)), None),
            Some(Credentials::Oidc(oidc)) => {
                let (verifier, refresher) = oidc::new(oidc)?;
                (Self::Oidc(verifier), Some(refresher))
            }
        })
    }

    /// Who sends these headers.
    ///
    /// # Errors
    /// Where that is not proven.
    pub async fn authenticate(&self, headers: &HeaderMap) -> Result<Caller, Error> {
        match self {
            Self::Open => Ok(Caller::default()),
            Self::Preshared(keys) => keys.find(bearer_token(headers)?),
            Self::Oidc(verifier) => verifier.verify(bearer_token(headers)?).await,
        }
    }
}

/// The one token. Two headers could be read differently by whoever stands in front of us.
fn bearer_token(headers: &HeaderMap) -> Result<&str, Error> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return Err(Error::MissingBearerToken) };
    let (scheme, token) =
        value.to_str().ok().and_then(|value| value.trim().split_once(' ')).ok_or(Error::MissingBearerToken)?;
    // RFC 9110, section 11.1: the scheme's name has no case.
    if scheme.eq_ignore_ascii_case("bearer") { Ok(token.trim_start()) } else { Err(Error::MissingBearerToken) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_found_in_the_header() {
        let missing = Err(Error::MissingBearerToken);
        for (values, expected) in [
            (&[][..], missing),
            (&["Bearer abc"], Ok("abc")),
            (&["bearer abc"], Ok("abc")),
            (&["BEARER  abc "], Ok("abc")),
            (&["Bearer a b"], Ok("a b")),
            (&["Bearer"], missing),
            (&["Bearer "], missing),
            (&["Bearerabc"], missing),
            (&["abc"], missing),
            (&[""], missing),
            (&["Basic abc"], missing),
            (&["Bearer ä"], missing),
            (&["Bearer a", "Bearer a"], missing),
        ] {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(AUTHORIZATION, http::HeaderValue::from_bytes(value.as_bytes()).unwrap());
            }
            assert_eq!(bearer_token(&headers), expected, "{values:?}");
        }
    }
    #[test]
    fn a_refusal_has_a_name_and_a_sentence() {
        for error in [
            Error::MissingBearerToken,
            Error::InvalidBearerToken,
            Error::InvalidAudience,
            Error::InvalidIssuer,
            Error::InvalidClaims,
            Error::Unauthenticated,
        ] {
            let said = error.to_string();
            assert!(said.starts_with(&format!("ERROR_CODE_{}: ", error.reason())), "{said}");
        }
    }
}
