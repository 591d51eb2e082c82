//! From the bytes of a replication stream to transactions, without I/O.
//!
//! [`pgoutput`] reads PostgreSQL's messages, [`mapping`] turns rows into facts, and [`assembler`] gives each change its place and cuts
//! transactions into messages. Bytes from outside never panic: what cannot be decoded becomes a gap.

pub mod assembler;
pub mod mapping;
pub mod pgoutput;
