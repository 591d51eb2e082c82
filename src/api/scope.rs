//! Whose data a caller may use.

use crate::access::authn::Caller;

/// Somebody else's tenant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", forbidden(.0))]
pub struct Forbidden(String);

fn forbidden(tenant: &str) -> String {
    // Nobody has checked it yet, and headers have bounds.
    const SHOWN_MAX: usize = 128;
    if tenant.len() <= SHOWN_MAX {
        format!("these credentials are not for tenant '{tenant}'")
    } else {
        "these credentials are not for this tenant".to_owned()
    }
}

/// An error unless the caller may use the tenant. Without admission in front, there is no caller, and everybody may.
pub(super) fn authorize(caller: Option<&Caller>, tenant: &str) -> Result<(), Forbidden> {
    if caller.is_none_or(|caller| caller.may_use(tenant)) { Ok(()) } else { Err(Forbidden(tenant.to_owned())) }
}
