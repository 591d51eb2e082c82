//! The public keys of an issuer (JSON Web Key Set, RFC 7517).

use jsonwebtoken::jwk::{AlgorithmParameters, Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, Header};
use serde::Deserialize;

/// More keys than any issuer has at a time. Further keys are ignored.
const KEYS_MAX: usize = 256;

/// The keys of a set that can verify signatures.
pub(super) struct Keys(Vec<Key>);

struct Key {
    id: Option<String>,
    /// The only algorithm that the key may be used with, if the set says so.
    algorithm: Option<Algorithm>,
    decoding: DecodingKey,
}

#[derive(Deserialize)]
struct Document {
    /// Each key is parsed by itself, because an unknown kind of key does not invalidate the others (RFC 7517, section
    /// 5).
    keys: Vec<serde_json::Value>,
}

impl Keys {
    pub(super) fn parse(document: &[u8]) -> Result<Self, serde_json::Error> {
        let document: Document = serde_json::from_slice(document)?;
        let keys = document.keys.into_iter().filter_map(|key| Key::new(&serde_json::from_value(key).ok()?));
        Ok(Self(keys.take(KEYS_MAX).collect()))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The key that a token with this header is signed with. If the header names no key, exactly one key must fit.
    pub(super) fn find(&self, header: &Header) -> Option<&DecodingKey> {
        let mut fitting = self.0.iter().filter(|key| key.fits(header));
        let key = fitting.next()?;
        (header.kid.is_some() || fitting.next().is_none()).then_some(&key.decoding)
    }
}

impl Key {
    fn new(jwk: &Jwk) -> Option<Self> {
        let is_public = matches!(jwk.algorithm, AlgorithmParameters::RSA(_) | AlgorithmParameters::EllipticCurve(_));
        let is_for_signatures = matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature));
        if !is_public || !is_for_signatures {
            return None;
        }
        let algorithm = match jwk.common.key_algorithm {
            Some(algorithm) => Some(Algorithm::try_from(algorithm).ok()?),
            None => None,
        };
        Some(Self { id: jwk.common.key_id.clone(), algorithm, decoding: DecodingKey::from_jwk(jwk).ok()? })
    }

    fn fits(&self, header: &Header) -> bool {
        (header.kid.is_none() || header.kid == self.id)
            && self.algorithm.is_none_or(|algorithm| algorithm == header.alg)
            && self.decoding.family() == header.alg.family()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn header(kid: Option<&str>, alg: Algorithm) -> Header {
        Header { kid: kid.map(str::to_owned), ..Header::new(alg) }
    }

    #[test]
    fn a_key_is_found_by_its_name_and_kind() {
        let document = json!({ "keys": [
            { "kty": "RSA", "kid": "a", "n": "AQAB", "e": "AQAB" },
            { "kty": "EC", "kid": "b", "alg": "ES256", "crv": "P-256", "x": "AQAB", "y": "AQAB", "use": "sig" },
            { "kty": "EC", "kid": "c", "crv": "P-384", "x": "AQAB", "y": "AQAB" },
            { "kty": "RSA", "kid": "encrypts", "n": "AQAB", "e": "AQAB", "use": "enc" },
            { "kty": "RSA", "kid": "wraps", "n": "AQAB", "e": "AQAB", "alg": "RSA-OAEP" },
            { "kty": "oct", "kid": "secret", "k": "AQAB" },
            { "kty": "EC", "kid": "strange", "crv": "secp256k1", "x": "AQAB", "y": "AQAB" },
            { "kty": "RSA", "kid": "broken", "n": "?", "e": "AQAB" },
            7,
        ]});
        let keys = Keys::parse(document.to_string().as_bytes()).unwrap();
        for (kid, algorithm, found) in [
            (Some("a"), Algorithm::RS256, true),
            (Some("a"), Algorithm::RS512, true),
            (Some("a"), Algorithm::ES256, false),
            (Some("a"), Algorithm::HS256, false),
            (Some("b"), Algorithm::ES256, true),
            (Some("b"), Algorithm::ES384, false),
            (Some("c"), Algorithm::ES384, true),
            (Some("d"), Algorithm::RS256, false),
            (Some("encrypts"), Algorithm::RS256, false),
            (Some("wraps"), Algorithm::RS256, false),
            (Some("secret"), Algorithm::HS256, false),
            (Some("strange"), Algorithm::ES256, false),
            (Some("broken"), Algorithm::RS256, false),
            (None, Algorithm::RS256, true),
            // Both keys fit.
            (None, Algorithm::ES256, false),
            (None, Algorithm::ES384, true),
        ] {
            assert_eq!(keys.find(&header(kid, algorithm)).is_some(), found, "{kid:?} {algorithm:?}");
        }
        assert!(Keys::parse(b"{\"keys\": []}").unwrap().is_empty());
        assert!(Keys::parse(b"{}").is_err());
    }
}
