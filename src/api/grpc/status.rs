//! Errors → gRPC statuses: the one place.
//!
//! Every status says what to do next. Where a token would help, it is in `google.rpc.ErrorInfo`, domain `tuplewatch`,
//! metadata `next_snap_token` (after a gap) or `earliest_snap_token` (for a token that is too old).
//!
//! Clients of Data and Tenancy compare the *message* of a status with Permify's names of errors. So there the message is
//! such a name, and what it means here, and what to do, is in `google.rpc.LocalizedMessage`; the fields that are wrong are in
//! `google.rpc.BadRequest`.

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

/// Domain of `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "tuplewatch";
fn with_reason(code: Code, message: String, reason: &str, metadata: Vec<(&str, String)>) -> Status {
    let metadata: HashMap<String, String> = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, DOMAIN, metadata))
}

/// The reason in its `ErrorInfo`, if it has one.
pub fn reason(status: &Status) -> Option<String> {
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

/// Not the method of Watch.
pub(super) fn no_method() -> Status {
    Status::unimplemented("base.v1.Watch has one method, Watch")
}

/// A request of Watch in an encoding.
pub(super) fn compressed_request() -> Status {
    Status::unimplemented("requests of Watch are not compressed")
}

/// A request of Watch that is far too long.
pub(super) fn large_request() -> Status {
    Status::invalid_argument("the request is larger than any WatchRequest")
}

/// The end where the message of a request should be.
pub(super) fn no_request() -> Status {
    Status::internal("a request without a message")
}

/// No request of Watch.
pub(super) fn bad_request(error: &prost::DecodeError) -> Status {
    Status::invalid_argument(format!("the request is no WatchRequest: {error}"))
}

/// The client did not want to wait any longer.
pub(super) fn late(patience: Duration) -> Status {
    Status::deadline_exceeded(format!("no answer within the {patience:?} of grpc-timeout"))
}

impl From<Forbidden> for Status {
    fn from(forbidden: Forbidden) -> Self {
        watch::Error::from(forbidden).into()
    }
}

/// A status whose message is `ERROR_CODE_` and the reason.
fn with_name(code: Code, reason: &str, says: impl Into<String>, violations: Vec<FieldViolation>) -> Status {
    let mut details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::<String, String>::new());
    details.set_localized_message("en", says);
    if !violations.is_empty() {
        details.set_bad_request(violations);
    }
    Status::with_error_details(code, format!("ERROR_CODE_{reason}"), details)
}

/// Why the store did not do it.
pub(crate) fn of_store(error: store::Error) -> Status {
    let says = error.to_string();
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
        tracing::error!("a call of Data or Tenancy failed: {says}");
    }
    with_name(code, reason, says, vec![])
}

/// Fields that are not as they must be.
pub fn invalid(violations: Vec<FieldViolation>) -> Status {
    let fields: Vec<&str> = violations.iter().map(|violation| violation.field.as_str()).collect();
    let says = format!("the request is not valid: see {}", fields.join(", "));
    with_name(Code::InvalidArgument, "VALIDATION", says, violations)
}

/// A tuple of something with itself.
pub fn entity_is_subject(field: String) -> Status {
    let violation = FieldViolation::new(field, "nothing has a relation to itself through the same relation");
    let says = "entity and relation are the same as the subject's";
    with_name(Code::InvalidArgument, "ENTITY_AND_SUBJECT_CANNOT_BE_EQUAL", says, vec![violation])
}

/// More rows than one write may have.
pub fn too_much_data(rows: usize, max: usize) -> Status {
    let says =
        format!("{rows} tuples and attributes in one request, and {max} are allowed (database.max_data_per_write)");
    with_name(Code::InvalidArgument, "MAX_DATA_PER_WRITE_EXCEEDED", says, vec![])
}

/// No token of a page.
pub(crate) fn bad_continuous_token(error: store::ParseKeyError) -> Status {
    let violation = FieldViolation::new("continuous_token", error.to_string());
    let says = "begin with an empty continuous_token";
    with_name(Code::InvalidArgument, "INVALID_CONTINUOUS_TOKEN", says, vec![violation])
}

/// Data and Tenancy over tables that somebody else writes.
pub fn not_our_store() -> Status {
    let message = "this server only watches the tables of its mapping, and does not write or read them for clients: use \
                   the program that owns them (for Permify's tables, Permify itself). Data and Tenancy are served over \
                   tuplewatch's own tables, with mapping.preset: tuples";
    with_reason(Code::Unimplemented, message.to_owned(), "NOT_IMPLEMENTED", vec![])
}

/// Bundles are Permify's.
pub fn no_bundles() -> Status {
    let message = "bundles are Permify's: write what a bundle would with Data.Write and Data.Delete".to_owned();
    with_reason(Code::Unimplemented, message, "NOT_IMPLEMENTED", vec![])
}

/// Why a request did not get in.
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

/// A browser's page that may not write here.
pub fn other_origin(origin: &str) -> Status {
    let message = format!("pages of {origin} may not do this: see server.http.cors_allowed_origins");
    with_reason(Code::PermissionDenied, message, "ORIGIN_FORBIDDEN", vec![])
}
