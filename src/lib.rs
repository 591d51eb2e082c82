//! x
pub mod assembler;
pub mod change;
pub mod changelog;
pub mod config;
pub mod dev_postgres;
pub mod hub;
pub mod lsn;
pub mod mapping;
pub mod pgoutput;
pub mod snap_token;
pub mod timeline;
pub mod transaction;
