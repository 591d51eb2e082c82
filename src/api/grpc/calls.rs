//! Counts requests by method and code when they end. A stream of Watch is one request.

use super::proto;
use crate::metrics::metrics;
use http::HeaderMap;
use prost::Message as _;
use prost_types::FileDescriptorSet;
use std::collections::HashMap;
use std::sync::LazyLock;
use tonic::Code;

#[derive(Debug)]
struct Method {
    service: String,
    name: String,
}

/// The methods by path. Clients may request any other path, so a requested path is never a label.
static METHODS: LazyLock<HashMap<String, Method>> = LazyLock::new(|| {
    let sets = [
        proto::DESCRIPTORS,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ];
    let mut methods = HashMap::new();
    // A test checks that all methods are found, so errors can be skipped here.
    for file in sets.into_iter().filter_map(|set| FileDescriptorSet::decode(set).ok()).flat_map(|set| set.file) {
        for service in &file.service {
            let service_name = format!("{}.{}", file.package(), service.name());
            for method in &service.method {
                let method = Method { service: service_name.clone(), name: method.name().to_owned() };
                methods.insert(format!("/{}/{}", method.service, method.name), method);
            }
        }
    }
    methods
});

/// A request in progress, counted when it is dropped. If it has no code by then, the client has gone away.
#[derive(Debug)]
pub(super) struct Call {
    method: Option<&'static Method>,
    code: Code,
}

impl Call {
    /// Begins a request of the method with this path.
    pub(super) fn begin(path: &str) -> Self {
        Self { method: METHODS.get(path), code: Code::Cancelled }
    }

    /// Records the code, if these headers or trailers contain one.
    pub(super) fn end_with(&mut self, headers: &HeaderMap) {
        if let Some(code) = headers.get("grpc-status") {
            self.code = Code::from_bytes(code.as_bytes());
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let (service, name) = match self.method {
            Some(Method { service, name }) => (service.as_str(), name.as_str()),
            None => ("other", "other"),
        };
        metrics().grpc_requests(service, name, code_name(self.code)).inc();
    }
}

/// The spelling of the gRPC specification.
pub(super) const fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_known_by_their_paths() {
        for path in [
            "/base.v1.Watch/Watch",
            "/base.v1.Data/Write",
            "/base.v1.Tenancy/List",
            "/grpc.health.v1.Health/Check",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ] {
            assert!(METHODS.contains_key(path), "{path}");
        }
        assert!(!METHODS.contains_key("/base.v1.Watch/Else"));
    }

    #[test]
    fn a_request_is_counted_once_under_its_code() {
        let count = |code| metrics().grpc_requests("base.v1.Tenancy", "Create", code).get();
        let headers =
            |code: &'static str| HeaderMap::from_iter([("grpc-status".parse().unwrap(), code.parse().unwrap())]);
        for (ends, code) in [(Some("0"), "OK"), (Some("16"), "UNAUTHENTICATED"), (None, "CANCELLED")] {
            let before = count(code);
            let mut call = Call::begin("/base.v1.Tenancy/Create");
            call.end_with(&HeaderMap::new());
            if let Some(ends) = ends {
                call.end_with(&headers(ends));
            }
            assert_eq!(count(code), before);
            drop(call);
            assert_eq!(count(code), before + 1, "{code}");
        }
    }
}
