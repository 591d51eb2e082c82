//! Who may talk to us, and whom we trust: [`authn`] checks keys and tokens, [`admission`] stands in front of every service, [`tls`] and
//! [`connections`] accept. [`trust`] says which certificate of a server we believe, of PostgreSQL and of tuplewatch alike.

pub mod admission;
pub mod authn;
pub mod connections;
pub mod tls;
pub mod trust;
