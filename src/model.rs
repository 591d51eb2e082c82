//! The words of the engine, as types without I/O: places in the write-ahead log, histories of a database, changes and their bytes, the
//! transactions and gaps that a stream is made of, and the tokens that clients keep.
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
