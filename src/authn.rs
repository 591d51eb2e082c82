//! Who makes a request.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::SystemTime;

/// What is known of who makes a request; in the request's extensions. Without authentication it is anyone. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    /// `None`: all tenants.
    tenants: Option<Arc<HashSet<String>>>,
    expires_at: Option<SystemTime>,
}

impl Caller {
    /// Whether the tenant is one of theirs.
    pub fn may_use(&self, tenant: &str) -> bool {
        self.tenants.as_ref().is_none_or(|tenants| tenants.contains(tenant))
    }

    /// When the credentials stop being good, and with them the streams that were opened with them.
    pub const fn expires_at(&self) -> Option<SystemTime> {
        self.expires_at
    }
}
