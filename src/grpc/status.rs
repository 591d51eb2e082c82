//! Errors → gRPC statuses: the one place.
//!
//! Every status says what to do next. Where a token would help, it is in `google.rpc.ErrorInfo`, domain `tuplewatch`,
//! metadata `next_snap_token` (after a break) or `earliest_snap_token` (for a token that is too old).

use crate::admission;
use crate::authn;
use crate::change::TenantId;
use crate::hub::start::Error as StartError;
use crate::hub::{End, Origin};
use crate::lsn::{CommitTime, Position};
use crate::snap_token::SnapToken;
use crate::timeline::History;
use std::collections::HashMap;
use std::sync::Arc;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// Domain of `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "tuplewatch";
/// Where to go on after a break.
pub const NEXT_SNAP_TOKEN: &str = "next_snap_token";
/// The oldest token that can still be used.
pub const EARLIEST_SNAP_TOKEN: &str = "earliest_snap_token";

/// Reason of `google.rpc.ErrorInfo` where it takes new credentials to go on.
pub const CREDENTIALS_EXPIRED: &str = "CREDENTIALS_EXPIRED";

/// Writes positions as tokens.
#[derive(Clone)]
pub struct Tokens {
    source: [u8; 8],
    history: Arc<History>,
}

impl Tokens {
    /// For positions of this source and history.
    pub fn new((source, history): &Origin) -> Self {
        Self { source: source.hash(), history: history.clone() }
    }

    /// The token of a position.
    pub fn write(&self, position: Position, commit_time: CommitTime) -> String {
        let timeline = self.history.writer_of(position.extent()).hash();
        SnapToken::Position { source: self.source, timeline, position, commit_time }.to_string()
    }
}

fn with_reason(code: Code, message: String, reason: &str, metadata: Vec<(&str, String)>) -> Status {
    let metadata: HashMap<String, String> = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, DOMAIN, metadata))
}

/// Why a stream did not start.
pub fn of_start(error: StartError, tokens: Option<&Tokens>) -> Status {
    let message = error.to_string();
    match error {
        StartError::Tenant(_) => with_reason(Code::InvalidArgument, message, "INVALID_TENANT", vec![]),
        StartError::Token(_) => with_reason(Code::InvalidArgument, message, "INVALID_SNAP_TOKEN", vec![]),
        StartError::UnknownTenant(_) => with_reason(Code::NotFound, message, "TENANT_NOT_FOUND", vec![]),
        StartError::Foreign => with_reason(Code::FailedPrecondition, message, "FOREIGN_SNAP_TOKEN", vec![]),
        StartError::Abandoned => with_reason(Code::FailedPrecondition, message, "ABANDONED_SNAP_TOKEN", vec![]),
        StartError::BeyondHistory => {
            with_reason(Code::FailedPrecondition, message, "SNAP_TOKEN_BEYOND_HISTORY", vec![])
        }
        StartError::TooOld { earliest } => too_old(&message, earliest, tokens),
        StartError::StillRunning(_) => with_reason(Code::Unavailable, message, "TRANSACTION_STILL_RUNNING", vec![]),
        StartError::Unreachable(_) => with_reason(Code::Unavailable, message, "POSTGRES_UNREACHABLE", vec![]),
        StartError::Log(_) => {
            tracing::error!("a stream could not start: {message}");
            with_reason(Code::Internal, "the change log cannot be read: see the server's log".into(), "LOG", vec![])
        }
    }
}

/// Why a stream ended.
pub fn of_end(end: End, tenant: &TenantId, tokens: &Tokens) -> Status {
    match end {
        End::Broken(gap) => {
            let message = format!(
                "the history of tenant {tenant} is not continuous: {}. Read the state anew, then go on from \
                 {NEXT_SNAP_TOKEN} in the error details",
                gap.reason
            );
            let next = tokens.write(gap.to, CommitTime::default());
            with_reason(Code::Aborted, message, gap.reason.code(), vec![(NEXT_SNAP_TOKEN, next)])
        }
        End::Abandoned { at } => {
            let reason = crate::transaction::BreakReason::TimelineDiverged;
            let message =
                format!("{reason}. Read the state anew, then go on from {NEXT_SNAP_TOKEN} in the error details");
            let next = tokens.write(Position::at(at), CommitTime::default());
            with_reason(Code::Aborted, message, reason.code(), vec![(NEXT_SNAP_TOKEN, next)])
        }
        End::TooOld { earliest } => {
            let message = "this stream was read so slowly that the changes that come next are no longer kept: \
                           start without a token and read the state anew";
            too_old(message, earliest, Some(tokens))
        }
        End::Log(error) => {
            tracing::error!("a stream of tenant {tenant} ended: {error}");
            with_reason(Code::Internal, "the change log cannot be read: see the server's log".into(), "LOG", vec![])
        }
    }
}

fn too_old(message: &str, earliest: Position, tokens: Option<&Tokens>) -> Status {
    let earliest = tokens.map(|tokens| (EARLIEST_SNAP_TOKEN, tokens.write(earliest, CommitTime::default())));
    with_reason(Code::OutOfRange, message.to_owned(), "SNAP_TOKEN_TOO_OLD", earliest.into_iter().collect())
}

/// Why a request did not get in.
pub fn of_admission(error: &admission::Error) -> Status {
    let message = error.to_string();
    match error {
        admission::Error::Credentials(authn::Error::IssuerUnreachable) => {
            with_reason(Code::Unavailable, message, "ISSUER_UNREACHABLE", vec![])
        }
        admission::Error::Credentials(_) => {
            // Permify's name is the whole message, as its clients compare it.
            let reason = message.trim_start_matches("ERROR_CODE_").to_owned();
            with_reason(Code::Unauthenticated, message, &reason, vec![])
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
    let message = format!("these credentials are not for tenant '{tenant}'");
    with_reason(Code::PermissionDenied, message, "TENANT_FORBIDDEN", vec![])
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
