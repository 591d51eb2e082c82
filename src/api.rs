//! The services: over gRPC in [`grpc`], and the same over HTTP in [`http`].

pub mod grpc;
pub mod http;
