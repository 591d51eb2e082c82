//! Access to the services, and trust in other servers. [`authn`] checks keys and tokens, [`admission`] applies them to
//! every request, [`tls`] and [`connections`] accept connections. [`trust`] decides whether to trust the certificate of
//! a server, for connections to PostgreSQL and to tuplewatch.

pub(crate) mod admission;
pub(crate) mod authn;
pub(crate) mod connections;
pub(crate) mod tls;
pub(crate) mod trust;
