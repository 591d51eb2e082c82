//! The services. [`watch`] is what a stream of changes is, without a protocol; [`grpc`] and [`http`] serve it and the others, each in
//! its own way, and [`encode`] makes the messages of each version of the API.
//!
//! What a protocol is made of (its statuses, its frames, its headers) is known only in [`grpc`], [`http`] and [`encode`].

pub mod encode;
mod forms;
pub mod grpc;
pub mod http;
mod scope;
mod threads;
pub mod watch;
