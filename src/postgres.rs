//! PostgreSQL as a server: how to connect to it, and what its catalogs say about tables, publication and slot.
//!
//! [`connection`] logs on, for SQL and for replication alike. [`primary`] tells everybody else which server the session found. [`catalog`]
//! reads tables and publication once for all who ask: [`requirements`] says what is wrong, [`publication`] whether anything changed.
//! [`slot`] reads and creates the replication slot, and [`transactions`] finds those that others wait for.
//!
//! Only this room and [`replication`](crate::replication) name the drivers. Nothing here keeps state about the stream.

pub(crate) mod catalog;
pub mod connection;
pub mod primary;
pub mod publication;
pub mod requirements;
pub mod slot;
#[cfg(test)]
pub(crate) mod test_postgres;
pub(crate) mod transactions;
