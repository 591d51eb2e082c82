//! A small OpenID Connect issuer on loopback, and the tokens that it signs.

use axum::Json;
use axum::routing::get;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, get_current_timestamp};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256, RsaKeySize};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// What the tokens of these tests are for.
pub(crate) const AUDIENCE: &str = "tuplewatch-tests";

/// A key with its name.
pub(crate) struct Key {
    id: &'static str,
    algorithm: Algorithm,
    private: EncodingKey,
}

impl Key {
    pub(crate) fn ec(id: &'static str) -> Self {
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        Self { id, algorithm: Algorithm::ES256, private: EncodingKey::from_ec_der(&pair.serialize_der()) }
    }

    pub(crate) fn rsa(id: &'static str) -> Self {
        let pair = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap();
        // PKCS #8 puts 26 bytes in front of a 2048 bit key, and PKCS #1 is what is taken.
        Self { id, algorithm: Algorithm::RS256, private: EncodingKey::from_rsa_der(&pair.serialize_der()[26..]) }
    }

    /// The same key under another name, or with another algorithm.
    pub(crate) fn named(&self, id: &'static str, algorithm: Algorithm) -> Self {
        Self { id, algorithm, private: self.private.clone() }
    }

    fn public(&self) -> Value {
        let mut jwk = Jwk::from_encoding_key(&self.private, self.algorithm).unwrap();
        jwk.common.key_id = Some(self.id.to_owned());
        // Any of its family.
        jwk.common.key_algorithm = None;
        serde_json::to_value(jwk).unwrap()
    }

    /// A token with these claims.
    pub(crate) fn sign(&self, claims: &Value) -> String {
        let header = Header { kid: Some(self.id.to_owned()), ..Header::new(self.algorithm) };
        encode(&header, claims, &self.private).unwrap()
    }

    /// A token that is signed with HMAC, and its secret is what everybody knows of this key.
    pub(crate) fn sign_with_public_key(&self, claims: &Value) -> String {
        let header = Header { kid: Some(self.id.to_owned()), ..Header::new(Algorithm::HS256) };
        let public = self.public();
        let secret = URL_SAFE_NO_PAD.decode(public["n"].as_str().unwrap()).unwrap();
        encode(&header, claims, &EncodingKey::from_secret(&secret)).unwrap()
    }

    /// A token without a signature, which names this key.
    pub(crate) fn unsigned(&self, claims: &Value) -> String {
        let header = json!({"alg": "none", "typ": "JWT", "kid": self.id});
        let part = |part: &Value| URL_SAFE_NO_PAD.encode(part.to_string());
        format!("{}.{}.", part(&header), part(claims))
    }
}

struct State {
    keys: Mutex<Value>,
    fetches: AtomicU64,
}

/// Listens on loopback. Gone when dropped.
pub(crate) struct Issuer {
    address: SocketAddr,
    state: Arc<State>,
    serving: JoinHandle<()>,
}

impl Issuer {
    pub(crate) async fn start(keys: &[&Key]) -> Self {
        let state = Arc::new(State { keys: Mutex::default(), fetches: AtomicU64::new(0) });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let issuer = Self { address, serving: serve(listener, state.clone()), state };
        issuer.publish(keys);
        issuer
    }

    /// These are its keys from now on.
    pub(crate) fn publish(&self, keys: &[&Key]) {
        *self.state.keys.lock().unwrap() = json!({"keys": keys.iter().map(|key| key.public()).collect::<Vec<_>>()});
    }

    /// Answers nobody any more.
    pub(crate) async fn stop(&mut self) {
        self.serving.abort();
        let _ = (&mut self.serving).await;
    }

    pub(crate) async fn start_again(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.serving = serve(listener, self.state.clone());
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// How often its keys were fetched.
    pub(crate) fn fetches(&self) -> u64 {
        self.state.fetches.load(Ordering::SeqCst)
    }

    /// Good claims, but for these. Null takes one out.
    pub(crate) fn claims(&self, other: &Value) -> Value {
        let now = get_current_timestamp();
        let mut claims = json!({"iss": self.url(), "aud": AUDIENCE, "sub": "somebody", "iat": now, "exp": now + 3600});
        for (name, value) in other.as_object().unwrap() {
            claims[name] = value.clone();
        }
        claims.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        claims
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn serve(listener: TcpListener, state: Arc<State>) -> JoinHandle<()> {
    let url = format!("http://{}", listener.local_addr().unwrap());
    let metadata = json!({"issuer": url, "jwks_uri": format!("{url}/keys")});
    let keys = async move || {
        state.fetches.fetch_add(1, Ordering::SeqCst);
        Json(state.keys.lock().unwrap().clone())
    };
    let router = axum::Router::new()
        .route("/.well-known/openid-configuration", get(async move || Json(metadata)))
        .route("/keys", get(keys));
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() })
}
