//! Checks the signatures of tokens with ring, the library that all TLS here uses.
//!
//! jsonwebtoken brings two implementations of its own, aws-lc and RustCrypto. Either would be a second cryptography library in
//! the program, and aws-lc alone costs a quarter of a cold build. It leaves room for another one: this.
//!
//! Only what [`ALGORITHMS`](super::ALGORITHMS) lists is implemented, and only checking: the program signs nothing.

use jsonwebtoken::crypto::{CryptoProvider, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{ErrorKind, Result};
use jsonwebtoken::signature::{Error, Verifier};
use jsonwebtoken::{Algorithm, AlgorithmFamily, DecodingKey, DecodingKeyKind};
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, EcdsaVerificationAlgorithm, RSA_PKCS1_2048_8192_SHA256,
    RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey,
};

static PROVIDER: CryptoProvider = CryptoProvider {
    signer_factory: |_, _| Err(ErrorKind::UnsupportedAlgorithm.into()),
    verifier_factory: |algorithm, key| Ok(Box::new(Signatures::new(*algorithm, key)?)),
    // For making JWKs from keys; reading JWKs needs none of these.
    key_utils: KeyUtils {
        rsa_pub_components_from_private_key: |_| Err(ErrorKind::UnsupportedAlgorithm.into()),
        rsa_pub_components_from_public_key: |_| Err(ErrorKind::UnsupportedAlgorithm.into()),
        ec_pub_components_from_private_key: |_, _| Err(ErrorKind::UnsupportedAlgorithm.into()),
        ed_pub_components_from_private_key: |_, _| Err(ErrorKind::UnsupportedAlgorithm.into()),
        compute_digest: |_, _| Err(ErrorKind::UnsupportedAlgorithm.into()),
    },
};

/// Makes this the implementation that jsonwebtoken uses in the whole process. Must be called before the first token is checked.
pub(super) fn install() {
    // An error means that it is installed already.
    let _ = PROVIDER.install_default();
}

/// Checks signatures of one algorithm with one key.
struct Signatures {
    algorithm: Algorithm,
    scheme: Scheme,
    key: DecodingKey,
}

enum Scheme {
    /// PKCS #1 v1.5.
    Rsa(&'static RsaParameters),
    /// Two numbers of fixed length, one after the other (RFC 7518, section 3.4).
    Ecdsa(&'static EcdsaVerificationAlgorithm),
}

impl Signatures {
    fn new(algorithm: Algorithm, key: &DecodingKey) -> Result<Self> {
        let (family, scheme) = match algorithm {
            Algorithm::RS256 => (AlgorithmFamily::Rsa, Scheme::Rsa(&RSA_PKCS1_2048_8192_SHA256)),
            Algorithm::RS384 => (AlgorithmFamily::Rsa, Scheme::Rsa(&RSA_PKCS1_2048_8192_SHA384)),
            Algorithm::RS512 => (AlgorithmFamily::Rsa, Scheme::Rsa(&RSA_PKCS1_2048_8192_SHA512)),
            Algorithm::ES256 => (AlgorithmFamily::Ec, Scheme::Ecdsa(&ECDSA_P256_SHA256_FIXED)),
            Algorithm::ES384 => (AlgorithmFamily::Ec, Scheme::Ecdsa(&ECDSA_P384_SHA384_FIXED)),
            _ => return Err(ErrorKind::UnsupportedAlgorithm.into()),
        };
        // A key of another kind must never be read as one of this kind.
        if key.family() != family {
            return Err(ErrorKind::InvalidKeyFormat.into());
        }
        Ok(Self { algorithm, scheme, key: key.clone() })
    }
}

impl Verifier<Vec<u8>> for Signatures {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> std::result::Result<(), Error> {
        let checked = match (&self.scheme, self.key.kind()) {
            (Scheme::Rsa(parameters), DecodingKeyKind::RsaModulusExponent { n, e }) => {
                RsaPublicKeyComponents { n: number(n), e: number(e) }.verify(parameters, message, signature)
            }
            (Scheme::Ecdsa(algorithm), DecodingKeyKind::SecretOrDer(point)) => {
                UnparsedPublicKey::new(*algorithm, point).verify(message, signature)
            }
            // Keys come from JWKs, which have no other forms.
            _ => return Err(Error::new()),
        };
        checked.map_err(|_| Error::new())
    }
}

impl JwtVerifier for Signatures {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

/// Some issuers write a zero in front (RFC 7518, section 6.3.1.1, warns of them), which ring refuses.
fn number(mut bytes: &[u8]) -> &[u8] {
    while let [0, rest @ ..] = bytes {
        bytes = rest;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::ALGORITHMS;
    use super::*;
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use jsonwebtoken::jwk::Jwk;
    use ring::rand::SystemRandom;
    use ring::rsa::KeyPair as RsaKeyPair;
    use ring::signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, RSA_PKCS1_SHA256,
        RSA_PKCS1_SHA384, RSA_PKCS1_SHA512,
    };
    use serde_json::json;

    const MESSAGE: &[u8] = b"e30.e30";

    fn decoding(jwk: serde_json::Value) -> DecodingKey {
        DecodingKey::from_jwk(&serde_json::from_value::<Jwk>(jwk).unwrap()).unwrap()
    }

    fn base64(bytes: &[u8]) -> String {
        URL_SAFE_NO_PAD.encode(bytes)
    }

    fn rsa() -> RsaKeyPair {
        RsaKeyPair::from_pkcs8(include_bytes!("../../../../tests/support/keys/rsa.p8")).unwrap()
    }

    /// The modulus with this many zeros in front.
    fn rsa_public(zeros: usize) -> DecodingKey {
        let public = RsaPublicKeyComponents::<Vec<u8>>::from(rsa().public());
        let n = [vec![0; zeros], public.n].concat();
        decoding(json!({"kty": "RSA", "n": base64(&n), "e": base64(&public.e)}))
    }

    fn signed(algorithm: Algorithm) -> (DecodingKey, Vec<u8>) {
        let rng = SystemRandom::new();
        let rsa = |encoding| {
            let pair = rsa();
            let mut signature = vec![0; pair.public().modulus_len()];
            pair.sign(encoding, &rng, MESSAGE, &mut signature).unwrap();
            (rsa_public(0), signature)
        };
        let ec = |algorithm, curve: &str| {
            let private = EcdsaKeyPair::generate_pkcs8(algorithm, &rng).unwrap();
            let pair = EcdsaKeyPair::from_pkcs8(algorithm, private.as_ref(), &rng).unwrap();
            let (x, y) = pair.public_key().as_ref()[1..].split_at(pair.public_key().as_ref().len() / 2);
            let key = decoding(json!({"kty": "EC", "crv": curve, "x": base64(x), "y": base64(y)}));
            (key, pair.sign(&rng, MESSAGE).unwrap().as_ref().to_vec())
        };
        match algorithm {
            Algorithm::RS256 => rsa(&RSA_PKCS1_SHA256),
            Algorithm::RS384 => rsa(&RSA_PKCS1_SHA384),
            Algorithm::RS512 => rsa(&RSA_PKCS1_SHA512),
            Algorithm::ES256 => ec(&ECDSA_P256_SHA256_FIXED_SIGNING, "P-256"),
            Algorithm::ES384 => ec(&ECDSA_P384_SHA384_FIXED_SIGNING, "P-384"),
            other => panic!("{other:?} has no test"),
        }
    }

    fn is_good(algorithm: Algorithm, key: &DecodingKey, message: &[u8], signature: &[u8]) -> bool {
        install();
        jsonwebtoken::crypto::verify(&base64(signature), message, key, algorithm).unwrap_or(false)
    }

    #[test]
    fn each_accepted_algorithm_is_checked() {
        for algorithm in ALGORITHMS {
            let (key, signature) = signed(algorithm);
            assert!(is_good(algorithm, &key, MESSAGE, &signature), "{algorithm:?}");
            assert!(!is_good(algorithm, &key, b"e30.e31", &signature), "{algorithm:?}");
            assert!(!is_good(algorithm, &key, MESSAGE, &signature[1..]), "{algorithm:?}");
            assert!(!is_good(algorithm, &key, MESSAGE, &[]), "{algorithm:?}");
            for at in [0, signature.len() / 2, signature.len() - 1] {
                let mut other = signature.clone();
                other[at] ^= 1;
                assert!(!is_good(algorithm, &key, MESSAGE, &other), "{algorithm:?}");
            }
            for other in ALGORITHMS.into_iter().filter(|other| *other != algorithm) {
                assert!(!is_good(other, &key, MESSAGE, &signature), "{algorithm:?} as {other:?}");
            }
        }
    }

    #[test]
    fn a_modulus_may_begin_with_zeros() {
        let (_, signature) = signed(Algorithm::RS256);
        for zeros in [0, 1, 8] {
            assert!(is_good(Algorithm::RS256, &rsa_public(zeros), MESSAGE, &signature), "{zeros}");
        }
    }

    #[test]
    fn other_algorithms_and_keys_are_refused() {
        for algorithm in [Algorithm::HS256, Algorithm::PS256, Algorithm::EdDSA] {
            assert!(Signatures::new(algorithm, &rsa_public(0)).is_err(), "{algorithm:?}");
        }
        let secret = DecodingKey::from_secret(b"secret");
        let broken = decoding(json!({"kty": "RSA", "n": "", "e": "AA"}));
        let (point, _) = signed(Algorithm::ES256);
        for algorithm in ALGORITHMS {
            assert!(Signatures::new(algorithm, &secret).is_err(), "{algorithm:?}");
            assert!(!is_good(algorithm, &broken, MESSAGE, &[0; 256]), "{algorithm:?}");
        }
        assert!(Signatures::new(Algorithm::RS256, &point).is_err());
    }
}
