//! The shared types of the engine, without I/O: positions in the write-ahead log, histories of a database, changes and
//! their bytes, transactions and gaps, and the tokens that clients keep.
//!
//! Nothing here waits, reads a clock, or logs. Every other room may use it.

pub mod change;
pub mod diagnostic;
pub mod lsn;
pub(crate) mod protobuf;
pub mod scope;
pub mod snap_token;
pub mod timeline;
pub mod transaction;
