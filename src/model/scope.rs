//! Whose changes a stream has, and the places in such a stream.
//!
//! A stream of one tenant has that tenant's changes, as executed. A stream of all tenants has the transactions in commit order, and inside
//! a transaction the tenants in the order of their ids (by bytes), each tenant's changes as executed:
//!
//! ```text
//!  commit LSN c                                             end LSN
//!  │  tenant a          tenant b          tenant x          │
//!  │  steps 1, 4        steps 2, 5        step 3            │
//!  ├────────┬───────────────────┬───────────────────────────┤
//!           │                   └ (c, 0, [b, 5]): a whole, b up to step 5, nothing of x
//!           └ (c, 0, [a, 1]): a up to step 1
//! ```
//!
//! A stream of all tenants can begin with the token of one tenant's stream, which includes the same number of row steps for every tenant. So a
//! [`Place`] has both: those steps, and the progress of the stream since, tenant by tenant.

use crate::model::change::TenantId;
use crate::model::lsn::{EndLsn, Lsn, Position};
use std::fmt;

/// Whose changes a stream has.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// One tenant's.
    Tenant(TenantId),
    /// Those of all tenants.
    All,
}

impl Scope {
    /// Whether a stream of this scope has the changes of this tenant.
    pub fn includes(&self, tenant: &TenantId) -> bool {
        match self {
            Self::Tenant(own) => own == tenant,
            Self::All => true,
        }
    }

    /// The tenant, where it is one.
    pub const fn tenant(&self) -> Option<&TenantId> {
        match self {
            Self::Tenant(tenant) => Some(tenant),
            Self::All => None,
        }
    }
}

impl From<TenantId> for Scope {
    fn from(tenant: TenantId) -> Self {
        Self::Tenant(tenant)
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tenant(tenant) => write!(f, "tenant {tenant}"),
            Self::All => f.write_str("all tenants"),
        }
    }
}

/// A place in a stream, between two changes.
///
/// It includes every transaction that commits below `position.lsn`. Of the transaction that commits *at* it, a place without `within` includes
/// the first `position.steps` row steps of every tenant. A place with `within: Some((tenant, steps))` includes all tenants below that one whole,
/// that one up to `steps`, and those above up to `position.steps`. In the stream of one tenant, `within` is always `None`.
///
/// Places inside one transaction are ordered only if they have the same `position.steps`. Those do not change while a stream lasts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// A commit LSN with row steps, or an end LSN without.
    pub position: Position,
    /// How far a stream of all tenants has come inside the transaction.
    pub within: Option<(TenantId, u64)>,
}

impl From<Position> for Place {
    fn from(position: Position) -> Self {
        Self { position, within: None }
    }
}

impl Place {
    /// All row steps of a tenant in a transaction, however many there are.
    pub const WHOLE: u64 = u64::MAX;

    /// After every transaction that ends at or before this LSN.
    pub const fn at(lsn: Lsn) -> Self {
        Self { position: Position::at(lsn), within: None }
    }

    /// After the whole of the transaction that ends here.
    pub const fn after(end: EndLsn) -> Self {
        Self::at(end.0)
    }

    /// In the transaction of `from`, after `steps` row steps of this tenant.
    pub fn inside(from: Position, tenant: TenantId, steps: u64) -> Self {
        Self { position: from, within: Some((tenant, steps)) }
    }

    /// The same place in the stream of one tenant. The end of a transaction whose end LSN is not known is its commit LSN with
    /// [`Place::WHOLE`] row steps.
    pub fn of(&self, tenant: &TenantId) -> Position {
        let steps = match &self.within {
            Some((within, _)) if tenant < within => Self::WHOLE,
            Some((within, steps)) if tenant == within => *steps,
            _ => self.position.steps,
        };
        Position { steps, ..self.position }
    }

    /// The same place in a stream of this scope.
    pub fn in_scope(&self, scope: &Scope) -> Self {
        match scope {
            Scope::Tenant(tenant) => self.of(tenant).into(),
            Scope::All => self.clone(),
        }
    }

    /// The same place in commit order. Between the tenants of a transaction, it is the position after all row steps of the transaction.
    pub fn outer(&self) -> Position {
        match self.within {
            None => self.position,
            Some(_) => Position { steps: Self::WHOLE, ..self.position },
        }
    }

    /// How far the WAL must agree for the place to mean the same: see [`Position::extent`].
    pub fn extent(&self) -> Lsn {
        self.outer().extent()
    }

    /// The earlier of this place and the end of all transactions that end at or before `lsn`.
    #[must_use]
    pub fn min_at(self, lsn: Lsn) -> Self {
        if self.position >= Position::at(lsn) { Self::at(lsn) } else { self }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.position.fmt(f)?;
        match &self.within {
            None => Ok(()),
            Some((tenant, Self::WHOLE)) => write!(f, " after tenant '{tenant}'"),
            Some((tenant, steps)) => write!(f, " in tenant '{tenant}' after {steps}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::lsn::CommitLsn;

    #[test]
    fn a_place_between_tenants_is_a_position_for_each() {
        let [a, b, c] = ["a", "b", "c"].map(|name| TenantId::new(name).unwrap());
        let commit = CommitLsn(Lsn(100));
        let place = Place::inside(Position::inside(commit, 4), b.clone(), 6);
        let steps = [&a, &b, &c].map(|tenant| place.of(tenant).steps);
        assert_eq!(steps, [Place::WHOLE, 6, 4]);
        assert_eq!(place.in_scope(&Scope::All), place);
        assert_eq!(place.in_scope(&Scope::Tenant(c)), Position::inside(commit, 4).into());
        assert!(place.outer() < Position::at(Lsn(101)) && place.outer() > Position::inside(commit, 1 << 40));
        assert_eq!(place.extent(), Lsn(101));
        assert_eq!(Place::inside(Position::at(commit.0), a, 0).extent(), Lsn(101));
        assert_eq!(Place::at(commit.0).extent(), Lsn(100));
    }

    #[test]
    fn the_earlier_of_a_place_and_the_tail() {
        let within = Place::inside(Position::at(Lsn(100)), TenantId::new("a").unwrap(), 1);
        assert_eq!(within.clone().min_at(Lsn(110)), within);
        assert_eq!(within.clone().min_at(Lsn(100)), Place::at(Lsn(100)));
        assert_eq!(Place::at(Lsn(120)).min_at(Lsn(110)), Place::at(Lsn(110)));
    }
}
