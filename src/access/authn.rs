//! Authentication: turns the credentials of a request into a [`Caller`].
//!
//! gRPC and HTTP both take `authorization: Bearer …`, and both pass through [`crate::access::admission`]. Only this
//! module decides which tenants a token or key gives access to. Every service checks its tenant with
//! [`Caller::may_use`].
//!
//! A refusal names the kind of the problem and nothing more: not which key was close, and not the expected value of a
//! claim. Credentials appear in no message and in no log.

pub(crate) mod oidc;
pub(crate) mod preshared;

use crate::config::Credentials;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::SystemTime;

/// The caller of a request, kept in the request's extensions. Without authentication everybody is the same caller.
/// Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Caller {
    /// `None` gives access to all tenants.
    tenants: Option<Arc<HashSet<String>>>,
    expires_at: Option<SystemTime>,
}

impl Caller {
    fn new(tenants: Option<HashSet<String>>, expires_at: Option<SystemTime>) -> Self {
        Self { tenants: tenants.map(Arc::new), expires_at }
    }

    /// A caller whose credentials are restricted to these tenants.
    #[cfg(test)]
    pub(crate) fn of_tenants<const N: usize>(tenants: [&str; N]) -> Self {
        Self::new(Some(tenants.map(str::to_owned).into()), None)
    }

    /// Whether the caller may use the tenant.
    pub(crate) fn may_use(&self, tenant: &str) -> bool {
        self.tenants.as_ref().is_none_or(|tenants| tenants.contains(tenant))
    }

    /// Whether the caller may use all tenants, also those to come.
    pub(crate) const fn may_use_all(&self) -> bool {
        self.tenants.is_none()
    }

    /// The tenants that the caller may use; `None` means all.
    pub(crate) fn tenants(&self) -> Option<impl Iterator<Item = &String>> {
        self.tenants.as_ref().map(|tenants| tenants.iter())
    }

    /// The time when the credentials expire. Streams that were opened with them end then.
    pub(crate) const fn expires_at(&self) -> Option<SystemTime> {
        self.expires_at
    }
}

/// The reason for refusing credentials. Its text is Permify's name for it, if there is one, and the remedy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    /// There is no `authorization` header, or several, or one with another scheme.
    #[error(
        "ERROR_CODE_MISSING_BEARER_TOKEN: this server asks for credentials, and the request has none: send one header \
         `Authorization: Bearer ...` with a key or token"
    )]
    MissingBearerToken,
    /// The token is not a JWT, or its signature, algorithm or validity period is wrong.
    #[error(
        "ERROR_CODE_INVALID_BEARER_TOKEN: the token is not a valid JWT of the issuer: get a new one, and send it as \
         `Authorization: Bearer ...`"
    )]
    InvalidBearerToken,
    /// The JWT was issued for another service.
    #[error(
        "ERROR_CODE_INVALID_AUDIENCE: the token was issued for another service: ask its issuer for one with the audience of \
         this server (authn.oidc.audience)"
    )]
    InvalidAudience,
    /// The JWT is from another issuer.
    #[error(
        "ERROR_CODE_INVALID_ISSUER: the token is from another issuer: send one from the issuer of this server \
         (authn.oidc.issuer)"
    )]
    InvalidIssuer,
    /// A required claim is missing or malformed.
    #[error(
        "ERROR_CODE_INVALID_CLAIMS: a claim that the token must have is missing or has the wrong form: ask its issuer for one \
         with aud, exp, and the claim of authn.oidc.tenants_claim if this server has that"
    )]
    InvalidClaims,
    /// The key is not in the list.
    #[error(
        "ERROR_CODE_UNAUTHENTICATED: the key is unknown to this server: send one of authn.preshared.keys as \
         `Authorization: Bearer ...`"
    )]
    Unauthenticated,
    /// The token cannot be checked: its key is unknown, and the issuer does not answer.
    #[error("the keys of the tokens' issuer cannot be fetched at the moment: try again")]
    IssuerUnreachable,
}

impl Error {
    /// A name for programs: Permify's without its `ERROR_CODE_`, if there is one.
    pub(crate) const fn reason(self) -> &'static str {
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

/// Identifies the caller of a request.
pub(crate) enum Authenticator {
    /// Everybody is admitted.
    Open,
    /// By a key of a list.
    Preshared(preshared::Keys),
    Oidc(oidc::Verifier),
}

impl Authenticator {
    /// Creates the configured authenticator. The refresher, if there is one, must run as long as requests are accepted.
    ///
    /// # Errors
    /// The trusted authorities cannot be loaded, so the issuer cannot be asked.
    pub(crate) fn new(
        credentials: Option<&Credentials>,
    ) -> Result<(Self, Option<oidc::Refresher>), oidc::issuer::Error> {
        Ok(match credentials {
            None => (Self::Open, None),
            Some(Credentials::Preshared(keys)) => (Self::Preshared(preshared::Keys::new(keys)), None),
            Some(Credentials::Oidc(oidc)) => {
                let (verifier, refresher) = oidc::new(oidc)?;
                (Self::Oidc(verifier), Some(refresher))
            }
        })
    }

    /// Identifies the sender of these headers.
    ///
    /// # Errors
    /// The headers do not prove who the caller is.
    pub(crate) async fn authenticate(&self, headers: &HeaderMap) -> Result<Caller, Error> {
        match self {
            Self::Open => Ok(Caller::default()),
            Self::Preshared(keys) => keys.find(bearer_token(headers)?),
            Self::Oidc(verifier) => verifier.verify(bearer_token(headers)?).await,
        }
    }
}

/// The only token. With two headers, a proxy in front could check another one than this server.
fn bearer_token(headers: &HeaderMap) -> Result<&str, Error> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return Err(Error::MissingBearerToken) };
    let (scheme, token) =
        value.to_str().ok().and_then(|value| value.trim().split_once(' ')).ok_or(Error::MissingBearerToken)?;
    // RFC 9110, section 11.1: the name of the scheme is case-insensitive.
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
