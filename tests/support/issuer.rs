//! A small OpenID Connect issuer on loopback, and the tokens that it signs.

use super::port::free_address;
use axum::Json;
use axum::routing::get;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, get_current_timestamp};
use ring::hmac;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512,
    RsaKeyPair, RsaPublicKeyComponents,
};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// The audience of the tokens in these tests.
pub(crate) const AUDIENCE: &str = "tuplewatch-tests";

/// A key with its name. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Key {
    id: &'static str,
    algorithm: Algorithm,
    private: Private,
}

#[derive(Clone)]
enum Private {
    Ec(Arc<EcdsaKeyPair>),
    Rsa(Arc<RsaKeyPair>),
}

impl Key {
    pub(crate) fn ec(id: &'static str) -> Self {
        let (scheme, rng) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
        let generated = EcdsaKeyPair::generate_pkcs8(scheme, &rng).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(scheme, generated.as_ref(), &rng).unwrap();
        Self { id, algorithm: Algorithm::ES256, private: Private::Ec(Arc::new(pair)) }
    }

    /// One of two keys from files, because ring generates no RSA keys.
    pub(crate) fn rsa(id: &'static str) -> Self {
        let file: &[u8] = match id {
            "rsa" => include_bytes!("keys/rsa.p8"),
            "stranger" => include_bytes!("keys/stranger.p8"),
            _ => panic!("there is no RSA key named {id}"),
        };
        let pair = RsaKeyPair::from_pkcs8(file).unwrap();
        Self { id, algorithm: Algorithm::RS256, private: Private::Rsa(Arc::new(pair)) }
    }

    /// The same key under another name, or with another algorithm.
    pub(crate) fn named(&self, id: &'static str, algorithm: Algorithm) -> Self {
        Self { id, algorithm, private: self.private.clone() }
    }

    /// As a JWK, for any algorithm of its family.
    fn public(&self) -> Value {
        let base64 = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        match &self.private {
            Private::Ec(pair) => {
                let (x, y) = pair.public_key().as_ref()[1..].split_at(32);
                json!({"kty": "EC", "kid": self.id, "crv": "P-256", "x": base64(x), "y": base64(y)})
            }
            Private::Rsa(pair) => {
                let public = RsaPublicKeyComponents::<Vec<u8>>::from(pair.public());
                json!({"kty": "RSA", "kid": self.id, "n": base64(&public.n), "e": base64(&public.e)})
            }
        }
    }

    /// A token with these claims.
    pub(crate) fn sign(&self, claims: &Value) -> String {
        self.token(self.algorithm, claims, |text| self.signature(text))
    }

    fn signature(&self, text: &[u8]) -> Vec<u8> {
        let rng = SystemRandom::new();
        match &self.private {
            Private::Ec(pair) => pair.sign(&rng, text).unwrap().as_ref().to_vec(),
            Private::Rsa(pair) => {
                let scheme = match self.algorithm {
                    Algorithm::RS256 => &RSA_PKCS1_SHA256,
                    Algorithm::RS384 => &RSA_PKCS1_SHA384,
                    Algorithm::RS512 => &RSA_PKCS1_SHA512,
                    other => panic!("an RSA key does not sign {other:?}"),
                };
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(scheme, &rng, text, &mut signature).unwrap();
                signature
            }
        }
    }

    /// A token that is signed with HMAC, with the public key as its secret.
    pub(crate) fn sign_with_public_key(&self, claims: &Value) -> String {
        let secret = URL_SAFE_NO_PAD.decode(self.public()["n"].as_str().unwrap()).unwrap();
        let secret = hmac::Key::new(hmac::HMAC_SHA256, &secret);
        self.token(Algorithm::HS256, claims, |text| hmac::sign(&secret, text).as_ref().to_vec())
    }

    fn token(&self, algorithm: Algorithm, claims: &Value, sign: impl Fn(&[u8]) -> Vec<u8>) -> String {
        let header = json!({"alg": algorithm, "typ": "JWT", "kid": self.id});
        let [header, claims] = [&header, claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string()));
        let signed = format!("{header}.{claims}");
        let signature = URL_SAFE_NO_PAD.encode(sign(signed.as_bytes()));
        format!("{signed}.{signature}")
    }

    /// A token without a signature that names this key.
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

/// Listens on loopback. Stops when dropped.
pub(crate) struct Issuer {
    address: SocketAddr,
    state: Arc<State>,
    serving: JoinHandle<()>,
}

impl Issuer {
    pub(crate) async fn start(keys: &[&Key]) -> Self {
        let state = Arc::new(State { keys: Mutex::default(), fetches: AtomicU64::new(0) });
        let address = free_address();
        let listener = TcpListener::bind(address).await.unwrap();
        let issuer = Self { address, serving: serve(listener, state.clone()), state };
        issuer.publish(keys);
        issuer
    }

    /// Replaces its keys.
    pub(crate) fn publish(&self, keys: &[&Key]) {
        *self.state.keys.lock().unwrap() = json!({"keys": keys.iter().map(|key| key.public()).collect::<Vec<_>>()});
    }

    /// Stops to listen.
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

    /// The number of times its keys were fetched.
    pub(crate) fn fetches(&self) -> u64 {
        self.state.fetches.load(Ordering::SeqCst)
    }

    /// Valid claims with some replaced; null removes one.
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
