//! Access to the services, and trust in other servers. [`authn`] checks keys and tokens, [`admission`] applies them to
//! every request, [`tls`] and [`connections`] accept connections. [`trust`] decides whether to trust the certificate of
//! a server, for connections to PostgreSQL and to tuplewatch.

pub mod admission;
pub mod authn;
pub mod connections;
pub mod tls;
pub mod trust;
