//! The services over gRPC and HTTP. [`watch`] implements a stream of changes independently of protocols. [`grpc`] and
//! [`http`] serve it, and the other services, over their protocol. [`encode`] makes the messages of each version of the
//! API.
//!
//! Only [`grpc`], [`http`] and [`encode`] know the parts of a protocol, such as statuses, frames and headers.

pub mod encode;
pub mod grpc;
pub(crate) mod http;
mod permify_names;
mod scope;
mod threads;
pub(crate) mod watch;
