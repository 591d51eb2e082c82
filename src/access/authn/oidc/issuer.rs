//! Fetches the issuer's metadata over HTTP (OpenID Connect Discovery 1.0, section 4), then its keys.
//!
//! Both are documents of a foreign server, so their size, duration and origin are limited. Redirects are not followed.

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

/// The limit for both documents together.
const FETCH_MAX: Duration = Duration::from_secs(10);
/// The metadata of large issuers has 5 KiB, their key sets 10 KiB.
const DOCUMENT_BYTES_MAX: usize = 1 << 20;
const USER_AGENT: &str = concat!("tuplewatch/", env!("CARGO_PKG_VERSION"));

/// The reason for a failed fetch.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The trusted authorities of this machine could not be loaded.
    #[error("the system's certificate authorities cannot be read: {0} (SSL_CERT_FILE names them)")]
    Authorities(std::io::Error),
    /// The fetch took too long.
    #[error("no answer within {FETCH_MAX:?}")]
    TimedOut,
    /// The connection failed, or its certificate was not trusted.
    #[error("{url}: {}", chain(.source.as_ref()))]
    Unreachable { url: String, source: Box<dyn std::error::Error + Send + Sync> },
    /// The status was not 200.
    #[error("{url} answers {status}")]
    Refused { url: String, status: http::StatusCode },
    /// The document is not valid.
    #[error("{url} is not a valid document: {source}")]
    Malformed { url: String, source: serde_json::Error },
    /// The metadata belongs to another issuer.
    #[error("{url} is about the issuer '{found}': authn.oidc.issuer must be written the same way")]
    OtherIssuer {
        url: String,
        /// The issuer that the metadata names.
        found: String,
    },
    /// The key set has a URL without TLS, so an attacker on the way could replace the keys.
    #[error("its keys are at '{0}', which is not an https URL")]
    Insecure(String),
    /// The key set has no usable key.
    #[error("{0} has no RSA or EC key for signatures")]
    NoKeys(String),
}

/// The error with its causes. The outer errors of hyper say little.
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
        // Explicit, because rustls cannot choose a provider if a dependency adds a second one.
        let connector = HttpsConnectorBuilder::new()
            .with_provider_and_native_roots(rustls::crypto::ring::default_provider())
            .map_err(Error::Authorities)?
            .https_or_http()
            .enable_http1()
            .build();
        // Fetches are minutes apart, so no connection is kept open.
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector);
        Ok(Self { url, client })
    }

    pub(super) const fn url(&self) -> &SecureUrl {
        &self.url
    }

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

    /// Checks the error for this metadata and these keys. `ISSUER` stands for the issuer's URL.
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
    async fn foreign_documents_are_checked() {
        let metadata = || (200, json!({"issuer": "ISSUER", "jwks_uri": "ISSUER/keys", "more": [1]}));
        let key = json!({"kty": "RSA", "n": "AQAB", "e": "AQAB"});
        let keys = || (200, json!({"keys": [key]}));
        check(metadata(), keys(), "").await;
        check((404, json!({})), keys(), "ISSUER/.well-known/openid-configuration answers 404 Not Found").await;
        check((302, json!({})), keys(), "ISSUER/.well-known/openid-configuration answers 302 Found").await;
        check((200, json!("html")), keys(), "openid-configuration is not a valid document: ").await;
        check((200, json!({"issuer": "ISSUER"})), keys(), "missing field `jwks_uri`").await;
        let other = json!({"issuer": "ISSUER/", "jwks_uri": "ISSUER/keys"});
        check((200, other), keys(), "is about the issuer 'ISSUER/': authn.oidc.issuer must be written the same").await;
        let insecure = json!({"issuer": "ISSUER", "jwks_uri": "http://keys.example/"});
        check((200, insecure), keys(), "its keys are at 'http://keys.example/', which is not an https URL").await;
        check(metadata(), (500, json!({})), "ISSUER/keys answers 500").await;
        check(metadata(), (200, json!({"keys": []})), "ISSUER/keys has no RSA or EC key for signatures").await;
        check(metadata(), (200, json!({"keys": 1})), "ISSUER/keys is not a valid document: ").await;
        let huge = "x".repeat(DOCUMENT_BYTES_MAX);
        check(metadata(), (200, json!({"keys": [key], "more": huge})), "ISSUER/keys: length limit exceeded").await;
    }
}
