//! Keys that were agreed on beforehand.

use super::{Caller, Error};
use crate::config::PresharedKey;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

/// The keys, as their digests: of equal length, so that comparing them tells nothing of how long a key is.
pub struct Keys(Vec<([u8; 32], Caller)>);

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

    /// Whose key it is. Takes as long for a key that is nearly right, and compares with all of them.
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
