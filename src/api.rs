//! The services: over gRPC in [`grpc`], and the same over HTTP in [`http`]. [`encode`] makes the messages of each version of the API.

pub mod encode;
pub mod grpc;
pub mod http;
