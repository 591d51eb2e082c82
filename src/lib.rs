//! x
pub mod assembler;
pub mod change;
pub mod lsn;
pub mod mapping;
pub mod pgoutput;
pub mod snap_token;
pub mod timeline;
pub mod transaction;
