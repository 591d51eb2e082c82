//! Preshared keys.

use super::{Caller, Error};
use crate::config::PresharedKey;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

/// The digests of the keys. Digests have equal lengths, so the time of a comparison reveals nothing about the length of
/// a key.
pub(crate) struct Keys(Vec<([u8; 32], Caller)>);

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

impl Keys {
    pub(super) fn new(keys: &[PresharedKey]) -> Self {
        let known = |key: &PresharedKey| {
            let tenants = key.tenants.as_ref().map(|tenants| tenants.iter().cloned().collect());
            (digest(key.expose()), Caller::new(tenants, None))
        };
        Self(keys.iter().map(known).collect())
    }

    /// Finds the caller of a key. It compares with all keys in constant time, so the time reveals nothing about a
    /// similar key.
    pub(super) fn find(&self, key: &str) -> Result<Caller, Error> {
        let digest = digest(key);
        let found = self.0.iter().fold(
            None,
            |found, (known, caller)| {
                if bool::from(known.ct_eq(&digest)) { Some(caller) } else { found }
            },
        );
        found.cloned().ok_or(Error::Unauthenticated)
    }
}
