//! For people who run it: creating and removing what PostgreSQL needs ([`setup`]), finding out what is wrong ([`doctor`]), and warning
//! while it runs ([`monitor`]).
//!
//! Only [`app`](crate::app) and [`cli`](crate::cli) use this room. The stream does not depend on it.

pub mod doctor;
pub mod monitor;
pub mod setup;
