//! PostgreSQL as a server: the connections to it, and its catalogs of tables, publications and slots.
//!
//! [`connection`] logs on, for SQL and for replication alike. [`primary`] directs all other statements to the server
//! that the session found. [`catalog`] reads tables and publication once, for [`requirements`], which reports errors,
//! and for [`publication`], which finds changes. [`slot`] reads and creates the replication slot, and [`transactions`]
//! finds open transactions that others wait for.
//!
//! Only this room and [`replication`](crate::replication) name the drivers. Nothing here keeps state about the stream.

pub(crate) mod catalog;
pub(crate) mod connection;
pub(crate) mod primary;
pub(crate) mod publication;
pub(crate) mod requirements;
pub(crate) mod slot;
#[cfg(test)]
pub(crate) mod test_postgres;
pub(crate) mod transactions;
