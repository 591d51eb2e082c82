//! The mapping of errors to gRPC statuses, all in this file.
//!
//! Every status says what to do next. If a token helps the client, it is in `google.rpc.ErrorInfo` with domain
//! `tuplewatch`: in the metadata `next_snap_token` after a gap, or `earliest_snap_token` for a token that is too old.
//!
//! Clients of Data and Tenancy compare the *message* of a status with Permify's error names. So the message of their
//! statuses is such a name. `google.rpc.LocalizedMessage` contains the explanation and the remedy, and
//! `google.rpc.BadRequest` the invalid fields.

use crate::access::admission;
use crate::access::authn;
use crate::api::scope::Forbidden;
use crate::api::watch;
use crate::hub::End;
use crate::hub::start::Error as StartError;
use crate::store;
use std::collections::HashMap;
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

/// The domain of `google.rpc.ErrorInfo`.
pub(crate) const DOMAIN: &str = "tuplewatch";

fn with_reason(code: Code, message: String, reason: &str, metadata: Vec<(&str, String)>) -> Status {
    let metadata: HashMap<String, String> = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, DOMAIN, metadata))
}

/// The reason in the status's `ErrorInfo`, if there is one.
pub(crate) fn reason(status: &Status) -> Option<String> {
    status.get_details_error_info().map(|info| info.reason)
}

impl From<watch::Error> for Status {
    fn from(error: watch::Error) -> Self {
        let (code, message) = (code_of(&error), error.to_string());
        match error.reason() {
            Some(reason) => with_reason(code, message, reason, error.snap_token().into_iter().collect()),
            None => Self::new(code, message),
        }
    }
}

fn code_of(error: &watch::Error) -> Code {
    use watch::Error;
    match error {
        Error::Forbidden(_) => Code::PermissionDenied,
        Error::Disabled => Code::Unimplemented,
        Error::TenantForm(_) | Error::TenantId(_) => Code::InvalidArgument,
        Error::ShuttingDown => Code::Unavailable,
        Error::TooMany { .. } => Code::ResourceExhausted,
        Error::Expired => Code::Unauthenticated,
        Error::Start { error, .. } => match error {
            StartError::Token(_) => Code::InvalidArgument,
            StartError::UnknownTenant(_) => Code::NotFound,
            StartError::Foreign | StartError::Abandoned | StartError::BeyondHistory => Code::FailedPrecondition,
            StartError::TooOld { .. } | StartError::UnknownTransaction { .. } => Code::OutOfRange,
            StartError::StillRunning(_) | StartError::Unreachable(_) => Code::Unavailable,
            StartError::Log(_) => Code::Internal,
        },
        Error::Ended(ended) => match &ended.end {
            End::Gap(_) | End::Abandoned { .. } => Code::Aborted,
            End::TooOld { .. } => Code::OutOfRange,
            End::Closed => Code::Unavailable,
            End::Log(_) => Code::Internal,
        },
        Error::Unsendable(_) | Error::NoSource => Code::Internal,
    }
}

/// A path of Watch that is not its method.
pub(super) fn no_method() -> Status {
    Status::unimplemented("base.v1.Watch has one method, Watch")
}

/// A compressed request of Watch.
pub(super) fn compressed_request() -> Status {
    Status::unimplemented("requests of Watch are not compressed")
}

/// A request of Watch that is too large.
pub(super) fn large_request() -> Status {
    Status::invalid_argument("the request is larger than any WatchRequest")
}

/// A request without a message.
pub(super) fn no_request() -> Status {
    Status::internal("a request without a message")
}

/// A request of Watch that cannot be decoded.
pub(super) fn bad_request(error: &prost::DecodeError) -> Status {
    Status::invalid_argument(format!("the request is no WatchRequest: {error}"))
}

/// The client's deadline has passed.
pub(super) fn deadline_exceeded(timeout: Duration) -> Status {
    Status::deadline_exceeded(format!("no answer within the {timeout:?} of grpc-timeout"))
}

impl From<Forbidden> for Status {
    fn from(forbidden: Forbidden) -> Self {
        watch::Error::from(forbidden).into()
    }
}

/// A status with the message `ERROR_CODE_` and the reason.
fn with_name(code: Code, reason: &str, explanation: impl Into<String>, violations: Vec<FieldViolation>) -> Status {
    let mut details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::<String, String>::new());
    details.set_localized_message("en", explanation);
    if !violations.is_empty() {
        details.set_bad_request(violations);
    }
    Status::with_error_details(code, format!("ERROR_CODE_{reason}"), details)
}

/// The status of a failed operation of the store.
pub(crate) fn of_store(error: store::Error) -> Status {
    let explanation = error.to_string();
    let (code, reason) = match error {
        store::Error::UnknownTenant(_) => (Code::NotFound, "TENANT_NOT_FOUND"),
        store::Error::TenantExists(_) => (Code::AlreadyExists, "UNIQUE_CONSTRAINT"),
        store::Error::Collisions => (Code::Aborted, "ERROR_MAX_RETRIES"),
        store::Error::Busy => (Code::ResourceExhausted, "DATASTORE"),
        store::Error::Unreachable(_) => (Code::Unavailable, "DATASTORE"),
        store::Error::Unfit(_) => (Code::InvalidArgument, "VALIDATION"),
        store::Error::Refused(_) | store::Error::NoPrivilege(_) | store::Error::RowSecurity(_) => {
            (Code::Internal, "EXECUTION")
        }
        store::Error::Unreadable(_) => (Code::Internal, "SCAN"),
    };
    if code == Code::Internal {
        tracing::error!("a call of Data or Tenancy failed: {explanation}");
    }
    with_name(code, reason, explanation, vec![])
}

/// The status of a request with invalid fields.
pub(crate) fn invalid(violations: Vec<FieldViolation>) -> Status {
    let fields: Vec<&str> = violations.iter().map(|violation| violation.field.as_str()).collect();
    let explanation = format!("the request is not valid: see {}", fields.join(", "));
    with_name(Code::InvalidArgument, "VALIDATION", explanation, violations)
}

/// The status of a tuple that relates an entity to itself.
pub(crate) fn entity_is_subject(field: String) -> Status {
    let violation = FieldViolation::new(field, "an entity cannot have a relation to itself through the same relation");
    let explanation = "entity and relation are the same as the subject's";
    with_name(Code::InvalidArgument, "ENTITY_AND_SUBJECT_CANNOT_BE_EQUAL", explanation, vec![violation])
}

/// The status of a write with too many rows.
pub(crate) fn too_much_data(rows: usize, max: usize) -> Status {
    let explanation =
        format!("{rows} tuples and attributes in one request, and {max} are allowed (database.max_data_per_write)");
    with_name(Code::InvalidArgument, "MAX_DATA_PER_WRITE_EXCEEDED", explanation, vec![])
}

/// The status of an invalid page token.
pub(crate) fn bad_continuous_token(error: store::ParseKeyError) -> Status {
    let violation = FieldViolation::new("continuous_token", error.to_string());
    let explanation = "begin with an empty continuous_token";
    with_name(Code::InvalidArgument, "INVALID_CONTINUOUS_TOKEN", explanation, vec![violation])
}

/// The status of Data and Tenancy if another engine writes the tables.
pub(crate) fn not_our_store() -> Status {
    let message = "this server only watches the tables of its mapping, and does not write or read them for clients: use \
                   the program that owns them (for Permify's tables, Permify itself). Data and Tenancy are served over \
                   tuplewatch's own tables, with mapping.preset: tuples";
    with_reason(Code::Unimplemented, message.to_owned(), "NOT_IMPLEMENTED", vec![])
}

/// The status of bundle methods, which only Permify has.
pub(crate) fn no_bundles() -> Status {
    let message = "bundles are a feature of Permify: use Data.Write and Data.Delete instead".to_owned();
    with_reason(Code::Unimplemented, message, "NOT_IMPLEMENTED", vec![])
}

/// The status of a request that admission refused.
pub(crate) fn of_admission(error: &admission::Error) -> Status {
    let message = error.to_string();
    match error {
        admission::Error::Credentials(error) => {
            let code = match error {
                authn::Error::IssuerUnreachable => Code::Unavailable,
                _ => Code::Unauthenticated,
            };
            with_reason(code, message, error.reason(), vec![])
        }
        admission::Error::Rate { retry_after, .. } => {
            let mut details = ErrorDetails::with_retry_info(Some(*retry_after));
            details.set_error_info("RATE_LIMITED", DOMAIN, HashMap::new());
            Status::with_error_details(Code::ResourceExhausted, message, details)
        }
    }
}

/// The status of a write by a page of a forbidden origin.
pub(crate) fn other_origin(origin: &str) -> Status {
    let message = format!("pages of {origin} may not do this: see server.http.cors_allowed_origins");
    with_reason(Code::PermissionDenied, message, "ORIGIN_FORBIDDEN", vec![])
}
