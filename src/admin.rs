//! Tools for operators: [`setup`] creates and removes tuplewatch's objects in PostgreSQL, [`doctor`] reports problems,
//! and [`monitor`] watches the slot while `serve` runs.
//!
//! Only [`app`](crate::app) and [`cli`](crate::cli) use this room. The stream of changes does not depend on it.

pub(crate) mod doctor;
pub(crate) mod monitor;
pub(crate) mod setup;
