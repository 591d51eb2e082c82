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
use crate::hub::start::Error as StartError;
use crate::hub::{End, Origin};
use crate::model::lsn::{CommitTime, Position, Xid8};
use crate::model::scope::{Place, Scope};
use crate::model::snap_token::{Form, SnapToken};
use crate::model::timeline::{History, SourceId};
use crate::model::transaction::Message;
use crate::store;
use std::collections::HashMap;
use std::sync::Arc;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

/// Domain of `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "tuplewatch";
/// Where to go on after a gap. Absent while its end is not known: see [`crate::model::transaction::Gap::writers`].
pub const NEXT_SNAP_TOKEN: &str = "next_snap_token";
/// How the message of a gap ends: what its reader is to do.
pub const AFTER_GAP: &str = ". Read the state anew, then go on from next_snap_token in the error details";
/// The oldest token that can still be used.
pub const EARLIEST_SNAP_TOKEN: &str = "earliest_snap_token";

/// Reason of `google.rpc.ErrorInfo` where it takes new credentials to go on.
pub const CREDENTIALS_EXPIRED: &str = "CREDENTIALS_EXPIRED";

/// Reason of `google.rpc.ErrorInfo` where a tenant id cannot be one.
const INVALID_TENANT: &str = "INVALID_TENANT";

/// Reason of `google.rpc.ErrorInfo` where the changes that come next are no longer kept.
pub const SNAP_TOKEN_TOO_OLD: &str = "SNAP_TOKEN_TOO_OLD";

/// Writes positions as tokens.
#[derive(Clone)]
pub struct Tokens {
    source: SourceId,
    history: Arc<History>,
}

impl Tokens {
    /// For positions of this source and history.
    pub fn new((source, history): &Origin) -> Self {
        Self { source: source.id(), history: history.clone() }
    }

    /// The token of a message. An id alone cannot say "inside a transaction": all messages of it but the last have the one of
    /// the transaction before, and whoever comes back with that gets them once more. Where the log has none before, the
    /// position it is.
    pub fn of_message(&self, message: &Message, form: Form, before: Option<Xid8>) -> String {
        let xid = if message.end.is_some() { Some(message.header.xid) } else { before };
        match (form, xid) {
            (Form::Permify, Some(xid)) => SnapToken::Xid(xid).to_string(),
            _ => self.write(message.reached(), message.header.commit_time),
        }
    }

    /// The token of a place, which is taken whatever form messages have.
    pub fn write(&self, place: impl Into<Place>, commit_time: CommitTime) -> String {
        let place = place.into();
        let timeline = self.history.writer_of(place.extent()).id();
        SnapToken::Position { source: self.source, timeline, place, commit_time }.to_string()
    }
}

fn with_reason(code: Code, message: String, reason: &str, metadata: Vec<(&str, String)>) -> Status {
    let metadata: HashMap<String, String> = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, DOMAIN, metadata))
}

/// The reason in its `ErrorInfo`, if it has one.
pub fn reason(status: &Status) -> Option<String> {
    status.get_details_error_info().map(|info| info.reason)
}

/// A tenant id that is none; `form` says what it must be.
pub fn invalid_tenant(form: &str) -> Status {
    with_reason(Code::InvalidArgument, format!("the tenant id {form}"), INVALID_TENANT, vec![])
}

/// Why a stream did not start.
pub fn of_start(error: StartError, tokens: Option<&Tokens>) -> Status {
    let message = error.to_string();
    match error {
        StartError::Tenant(_) => with_reason(Code::InvalidArgument, message, INVALID_TENANT, vec![]),
        StartError::Token(_) => with_reason(Code::InvalidArgument, message, "INVALID_SNAP_TOKEN", vec![]),
        StartError::UnknownTenant(_) => with_reason(Code::NotFound, message, "TENANT_NOT_FOUND", vec![]),
        StartError::Foreign => with_reason(Code::FailedPrecondition, message, "FOREIGN_SNAP_TOKEN", vec![]),
        StartError::Abandoned => with_reason(Code::FailedPrecondition, message, "ABANDONED_SNAP_TOKEN", vec![]),
        StartError::BeyondHistory => {
            with_reason(Code::FailedPrecondition, message, "SNAP_TOKEN_BEYOND_HISTORY", vec![])
        }
        StartError::TooOld { earliest } => too_old(&message, earliest, tokens),
        StartError::UnknownTransaction { earliest, .. } => {
            let earliest = earliest_of(earliest, tokens);
            with_reason(Code::OutOfRange, message, "TRANSACTION_UNKNOWN", earliest)
        }
        StartError::StillRunning(_) => with_reason(Code::Unavailable, message, "TRANSACTION_STILL_RUNNING", vec![]),
        StartError::Unreachable(_) => with_reason(Code::Unavailable, message, "POSTGRES_UNREACHABLE", vec![]),
        StartError::Log(_) => {
            tracing::error!("a stream could not start: {message}");
            with_reason(Code::Internal, "the change log cannot be read: see the server's log".into(), "LOG", vec![])
        }
    }
}

/// Why a stream ended.
pub fn of_end(end: End, scope: &Scope, tokens: &Tokens) -> Status {
    match end {
        End::Gap(gap) if gap.is_open() => {
            let message = format!(
                "the history of {scope} is not continuous: {}; and transactions that began before are still running, whose \
                 changes may be missing when they commit. Read the state anew and watch without a token; the gap is told \
                 again, with {NEXT_SNAP_TOKEN} in the error details, when they have ended",
                gap.reason
            );
            with_reason(Code::Aborted, message, gap.reason.code(), vec![])
        }
        End::Gap(gap) => {
            let message = format!("the history of {scope} is not continuous: {}{AFTER_GAP}", gap.reason);
            let next = tokens.write(gap.to, CommitTime::default());
            with_reason(Code::Aborted, message, gap.reason.code(), vec![(NEXT_SNAP_TOKEN, next)])
        }
        End::Abandoned { at } => {
            let reason = crate::model::transaction::GapReason::TimelineDiverged;
            let message = format!("{reason}{AFTER_GAP}");
            let next = tokens.write(Position::at(at), CommitTime::default());
            with_reason(Code::Aborted, message, reason.code(), vec![(NEXT_SNAP_TOKEN, next)])
        }
        End::TooOld { earliest } => {
            let message = "this stream was read so slowly that the changes that come next are no longer kept: \
                           start without a token and read the state anew";
            too_old(message, earliest, Some(tokens))
        }
        End::Closed => shutting_down(),
        End::Log(error) => {
            tracing::error!("a stream of {scope} ended: {error}");
            with_reason(Code::Internal, "the change log cannot be read: see the server's log".into(), "LOG", vec![])
        }
    }
}

fn too_old(message: &str, earliest: Position, tokens: Option<&Tokens>) -> Status {
    with_reason(Code::OutOfRange, message.to_owned(), SNAP_TOKEN_TOO_OLD, earliest_of(earliest, tokens))
}

fn earliest_of(earliest: Position, tokens: Option<&Tokens>) -> Vec<(&'static str, String)> {
    let token = tokens.map(|tokens| (EARLIEST_SNAP_TOKEN, tokens.write(earliest, CommitTime::default())));
    token.into_iter().collect()
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

/// What a stream was opened with is no longer good.
pub fn expired() -> Status {
    let message =
        "the credentials that this stream was opened with have expired: reconnect with new ones and the last \
                   snap token"
            .to_owned();
    with_reason(Code::Unauthenticated, message, CREDENTIALS_EXPIRED, vec![])
}

/// Somebody else's tenant.
pub fn forbidden(tenant: &str) -> Status {
    // Nobody has checked it yet, and headers have bounds.
    const SHOWN_MAX: usize = 128;
    let message = if tenant.len() <= SHOWN_MAX {
        format!("these credentials are not for tenant '{tenant}'")
    } else {
        "these credentials are not for this tenant".to_owned()
    };
    with_reason(Code::PermissionDenied, message, "TENANT_FORBIDDEN", vec![])
}

/// A browser's page that may not write here.
pub fn other_origin(origin: &str) -> Status {
    let message = format!("pages of {origin} may not do this: see server.http.cors_allowed_origins");
    with_reason(Code::PermissionDenied, message, "ORIGIN_FORBIDDEN", vec![])
}

/// The process is ending.
pub fn shutting_down() -> Status {
    let message = "the server is shutting down: reconnect with the last snap token".to_owned();
    with_reason(Code::Unavailable, message, "SHUTTING_DOWN", vec![])
}

/// Watch is off.
pub fn disabled() -> Status {
    let message = "Watch is disabled in this server's configuration (service.watch.enabled)".to_owned();
    with_reason(Code::Unimplemented, message, "WATCH_DISABLED", vec![])
}

/// No more streams.
pub fn too_many(max: usize) -> Status {
    let message =
        format!("{max} streams are open, which is the limit (service.watch.subscribers_max): try again later");
    with_reason(Code::ResourceExhausted, message, "TOO_MANY_SUBSCRIBERS", vec![])
}
