//! The issuer, over HTTP: its metadata (OpenID Connect Discovery 1.0, section 4), then its keys.
//!
//! Both are small documents of somebody else's, so that everything about them is bounded: their size, the time that they take,
//! and where they come from. Redirects are not followed.

use super::keys::Keys;
use crate::config::SecureUrl;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use std::time::Duration;

/// For both documents together.
const FETCH_MAX: Duration = Duration::from_secs(10);
/// The metadata of large issuers has 5 KiB, their keys 10.
const DOCUMENT_BYTES_MAX: usize = 1 << 20;
const USER_AGENT: &str = concat!("tuplewatch/", env!("CARGO_PKG_VERSION"));

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Without authorities no https server can be trusted.
    #[error("the system's certificate authorities cannot be read: {0} (SSL_CERT_FILE names them)")]
    Authorities(std::io::Error),
    /// Too slow.
    #[error("no answer within {FETCH_MAX:?}")]
    TimedOut,
    /// No connection, or one that was not trusted.
    #[error("{url}: {}", chain(.source.as_ref()))]
    Unreachable {
        /// What was asked for.
        url: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Another answer than 200.
    #[error("{url} answers {status}")]
    Refused {
        /// What was asked for.
        url: String,
        /// The answer.
        status: http::StatusCode,
    },
    /// Something else than what it should be.
    #[error("{url} is not what it should be: {source}")]
    Malformed {
        /// What was asked for.
        url: String,
        /// Why.
        source: serde_json::Error,
    },
    /// Somebody else's metadata.
    #[error("{url} is about the issuer '{found}': authn.oidc.issuer must be written the same way")]
    OtherIssuer {
        /// What was asked for.
        url: String,
        /// Who it is about.
        found: String,
    },
    /// Keys that anybody on the way could replace.
    #[error("its keys are at '{0}', which is no https URL")]
    Insecure(String),
    /// None that we could use.
    #[error("{0} has no RSA or EC key for signatures")]
    NoKeys(String),
}

/// An error of hyper's hides what matters in its causes.
fn chain(error: &(dyn std::error::Error + Send + Sync)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[derive(Deserialize)]
struct Metadata {
    issuer: String,
    jwks_uri: String,
}

pub(super) struct Issuer {
    url: SecureUrl,
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
}

impl Issuer {
    pub(super) fn new(url: SecureUrl) -> Result<Self, Error> {
        // Named here: a second implementation in the tree would leave rustls without a choice.
        let connector = HttpsConnectorBuilder::new()
            .with_provider_and_native_roots(rustls::crypto::ring::default_provider())
            .map_err(Error::Authorities)?
            .https_or_http()
            .enable_http1()
            .build();
        // Nothing is kept open from one fetch to the next, minutes later.
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector);
        Ok(Self { url, client })
    }

    pub(super) const fn url(&self) -> &SecureUrl {
        &self.url
    }

    /// Its keys as they are now.
    pub(super) async fn fetch(&self) -> Result<Keys, Error> {
        tokio::time::timeout(FETCH_MAX, self.fetch_documents()).await.unwrap_or(Err(Error::TimedOut))
    }

    async fn fetch_documents(&self) -> Result<Keys, Error> {
        let url = format!("{}/.well-known/openid-configuration", self.url.as_str().trim_end_matches('/'));
        let malformed = |url: &str, source| Error::Malformed { url: url.to_owned(), source };
        let metadata: Metadata =
            serde_json::from_slice(&self.get(&url).await?).map_err(|source| malformed(&url, source))?;
        if metadata.issuer != self.url.as_str() {
            return Err(Error::OtherIssuer { url, found: metadata.issuer });
        }
        let url = metadata.jwks_uri;
        if SecureUrl::parse(&url).is_none() {
            return Err(Error::Insecure(url));
        }
        let keys = Keys::parse(&self.get(&url).await?).map_err(|source| malformed(&url, source))?;
        if keys.is_empty() { Err(Error::NoKeys(url)) } else { Ok(keys) }
    }

    async fn get(&self, url: &str) -> Result<Bytes, Error> {
        let unreachable = |source| Error::Unreachable { url: url.to_owned(), source };
        let request = http::Request::get(url).header("user-agent", USER_AGENT).header("accept", "application/json");
        let request = request.body(Empty::new()).map_err(|error| unreachable(error.into()))?;
        let response = self.client.request(request).await.map_err(|error| unreachable(error.into()))?;
        let status = response.status();
        if status != http::StatusCode::OK {
            return Err(Error::Refused { url: url.to_owned(), status });
        }
        let body = Limited::new(response.into_body(), DOCUMENT_BYTES_MAX).collect().await.map_err(unreachable)?;
        Ok(body.to_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::http::StatusCode;
    use axum::response::IntoResponse as _;
    use axum::routing::get;
    use serde_json::{Value, json};

    /// Checks the message about an issuer with this metadata and these keys. `ISSUER` stands for its URL.
    async fn check(metadata: (u16, Value), keys: (u16, Value), says: &str) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let answer = |(status, body): (u16, Value)| {
            let body = body.to_string().replace("ISSUER", &url);
            get(async move || (StatusCode::from_u16(status).unwrap(), [("location", "/keys")], body).into_response())
        };
        let router =
            Router::new().route("/.well-known/openid-configuration", answer(metadata)).route("/keys", answer(keys));
        let serving = tokio::spawn(async move { axum::serve(listener, router).await });
        let issuer = Issuer::new(SecureUrl::parse(&url).unwrap()).unwrap();
        let said = issuer.fetch().await.map(drop).map_or_else(|error| error.to_string(), |()| String::new());
        let said = said.replace(&url, "ISSUER");
        assert!(said.contains(says) && said.is_empty() == says.is_empty(), "not {says}: {said}");
        serving.abort();
    }

    #[tokio::test]
    async fn malformed_metadata_and_keys_are_refused() {
        let metadata = || (200, json!({"issuer": "ISSUER", "jwks_uri": "ISSUER/keys", "more": [1]}));
        let key = json!({"kty": "RSA", "n": "AQAB", "e": "AQAB"});
        let keys = || (200, json!({"keys": [key]}));
        check(metadata(), keys(), "").await;
        check((404, json!({})), keys(), "ISSUER/.well-known/openid-configuration answers 404 Not Found").await;
        check((302, json!({})), keys(), "ISSUER/.well-known/openid-configuration answers 302 Found").await;
        check((200, json!("html")), keys(), "openid-configuration is not what it should be: ").await;
        check((200, json!({"issuer": "ISSUER"})), keys(), "missing field `jwks_uri`").await;
        let other = json!({"issuer": "ISSUER/", "jwks_uri": "ISSUER/keys"});
        check((200, other), keys(), "is about the issuer 'ISSUER/': authn.oidc.issuer must be written the same").await;
        let insecure = json!({"issuer": "ISSUER", "jwks_uri": "http://keys.example/"});
        check((200, insecure), keys(), "its keys are at 'http://keys.example/', which is no https URL").await;
        check(metadata(), (500, json!({})), "ISSUER/keys answers 500").await;
        check(metadata(), (200, json!({"keys": []})), "ISSUER/keys has no RSA or EC key for signatures").await;
        check(metadata(), (200, json!({"keys": 1})), "ISSUER/keys is not what it should be: ").await;
        let huge = "x".repeat(DOCUMENT_BYTES_MAX);
        check(metadata(), (200, json!({"keys": [key], "more": huge})), "ISSUER/keys: length limit exceeded").await;
    }
}
