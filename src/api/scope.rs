//! The authorization of a caller for a scope.
//!
//! Admission authenticates the caller, and this module decides whether the credentials cover the tenant, or all
//! tenants, that the request names. gRPC and HTTP both use it.

use crate::access::authn::Caller;

/// The scope that a request names, before anything about it is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Requested<'a> {
    /// One tenant, as unchecked text.
    Tenant(&'a str),
    /// All tenants. No request of base.v1 can name them.
    #[cfg_attr(not(test), expect(dead_code, reason = "requests of tuplewatch.v1 name it"))]
    All,
}

/// The credentials do not give access to the requested scope.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Forbidden {
    /// The credentials do not cover the tenant.
    #[error("{}", forbidden(.0))]
    Tenant(String),
    /// The credentials cover some tenants only.
    #[error("these credentials are restricted to some tenants, and not for a stream of all tenants")]
    All,
}

fn forbidden(tenant: &str) -> String {
    // The text is unchecked, and headers are limited.
    const SHOWN_MAX: usize = 128;
    if tenant.len() <= SHOWN_MAX {
        format!("these credentials are not for tenant '{tenant}'")
    } else {
        "these credentials are not for this tenant".to_owned()
    }
}

/// Checks that the caller may use the scope. Without admission there is no caller, and everything is permitted.
pub(super) fn authorize(caller: Option<&Caller>, requested: Requested<'_>) -> Result<(), Forbidden> {
    let Some(caller) = caller else { return Ok(()) };
    match requested {
        Requested::Tenant(tenant) if !caller.may_use(tenant) => Err(Forbidden::Tenant(tenant.to_owned())),
        Requested::All if !caller.may_use_all() => Err(Forbidden::All),
        Requested::Tenant(_) | Requested::All => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unrestricted_credentials_are_for_all_tenants() {
        let restricted = Caller::of_tenants(["t1"]);
        let check = |caller: Option<&Caller>, requested, expected| assert_eq!(authorize(caller, requested), expected);
        let other = || Forbidden::Tenant("t2".to_owned());
        check(Some(&restricted), Requested::Tenant("t1"), Ok(()));
        check(Some(&restricted), Requested::Tenant("t2"), Err(other()));
        check(Some(&restricted), Requested::All, Err(Forbidden::All));
        check(Some(&Caller::default()), Requested::All, Ok(()));
        check(None, Requested::All, Ok(()));
    }
}
