//! Decodes the bytes of a replication stream into transactions, without I/O.
//!
//! [`pgoutput`] decodes PostgreSQL's messages, [`mapping`] turns rows into facts, and [`assembler`] assigns each change
//! its position and cuts transactions into messages. Bytes from outside never cause a panic: rows that cannot be
//! decoded become gaps.

pub mod assembler;
pub mod mapping;
pub mod pgoutput;
