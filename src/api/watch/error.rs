//! The errors of a stream, at its start or its end. The message of an error goes to the subscriber, and says what to do
//! next.

use super::Tokens;
use crate::api::encode::Malformed;
use crate::api::scope::Forbidden;
use crate::hub::End;
use crate::hub::start::Error as StartError;
use crate::model::change::TenantIdError;
use crate::model::lsn::{CommitTime, Position};
use crate::model::scope::Scope;
use crate::model::transaction::GapReason;

/// The key of the token that continues after a gap. It is absent while the end of the gap is unknown: see
/// [`crate::model::transaction::Gap::writers`].
pub(crate) const NEXT_SNAP_TOKEN: &str = "next_snap_token";
/// The key of the oldest token that is still valid.
pub(crate) const EARLIEST_SNAP_TOKEN: &str = "earliest_snap_token";
/// The end of a gap's message, with the remedy.
pub(crate) const AFTER_GAP: &str = ". Read the state anew, then go on from next_snap_token in the error details";

/// The reason if the client needs new credentials.
pub(crate) const CREDENTIALS_EXPIRED: &str = "CREDENTIALS_EXPIRED";
/// The reason if the tenant id is invalid.
const INVALID_TENANT: &str = "INVALID_TENANT";
/// The reason if the next changes were dropped.
pub(crate) const SNAP_TOKEN_TOO_OLD: &str = "SNAP_TOKEN_TOO_OLD";

const LOG_UNREADABLE: &str = "the change log cannot be read: see the server's log";
const TOO_SLOW: &str = "this stream was read so slowly that the changes that come next are no longer kept: start without a token and \
                        read the state anew";

/// The error that a stream fails to start with, or ends with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The credentials do not give access to the scope.
    #[error(transparent)]
    Forbidden(#[from] Forbidden),
    /// Watch is disabled.
    #[error("Watch is disabled in this server's configuration (service.watch.enabled)")]
    Disabled,
    /// The tenant id does not have the required form, which follows.
    #[error("the tenant id {0}")]
    TenantForm(&'static str),
    /// The text cannot be a tenant id.
    #[error(transparent)]
    TenantId(#[from] TenantIdError),
    /// The process is ending.
    #[error("the server is shutting down: reconnect with the last snap token")]
    ShuttingDown,
    /// Too many streams are open.
    #[error("{max} streams are open, which is the limit (service.watch.subscribers_max): try again later")]
    TooMany { max: usize },
    /// The token cannot be resolved to a start.
    #[error("{}", start_message(.error))]
    Start {
        error: StartError,
        /// `None` while the source of positions is unknown.
        tokens: Option<Tokens>,
    },
    /// The credentials of the stream have expired.
    #[error(
        "the credentials that this stream was opened with have expired: reconnect with new ones and the last snap token"
    )]
    Expired,
    /// The stream cannot continue.
    #[error(transparent)]
    Ended(Box<Ended>),
    /// The next message cannot be encoded.
    #[error("a message cannot be sent: {0}")]
    Unsendable(#[from] Malformed),
    /// The next message cannot have a token.
    #[error("a message without a source")]
    NoSource,
}

/// The end of a stream.
#[derive(Debug, thiserror::Error)]
#[error("{}", end_message(.end, .scope))]
pub(crate) struct Ended {
    pub(crate) end: End,
    scope: Scope,
    /// Writes the tokens in its message.
    tokens: Tokens,
}

impl Error {
    /// The error of a stream that cannot start.
    pub(crate) fn of_start(error: StartError, tokens: Option<Tokens>) -> Self {
        if let StartError::Log(error) = &error {
            tracing::error!("a stream could not start: {error}");
        }
        Self::Start { error, tokens }
    }

    /// The error of a stream of this scope that cannot continue.
    pub(super) fn of_end(end: End, scope: &Scope, tokens: Tokens) -> Self {
        if let End::Log(error) = &end {
            tracing::error!("a stream of {scope} ended: {error}");
        }
        Self::Ended(Box::new(Ended { end, scope: scope.clone(), tokens }))
    }

    /// A stable name for programs. `None` for an internal error, which a client cannot resolve.
    pub(crate) fn reason(&self) -> Option<&'static str> {
        Some(match self {
            Self::Forbidden(_) => "TENANT_FORBIDDEN",
            Self::Disabled => "WATCH_DISABLED",
            Self::TenantForm(_) | Self::TenantId(_) => INVALID_TENANT,
            Self::ShuttingDown => SHUTTING_DOWN,
            Self::TooMany { .. } => "TOO_MANY_SUBSCRIBERS",
            Self::Expired => CREDENTIALS_EXPIRED,
            Self::Start { error, .. } => match error {
                StartError::Token(_) => "INVALID_SNAP_TOKEN",
                StartError::UnknownTenant(_) => "TENANT_NOT_FOUND",
                StartError::Foreign => "FOREIGN_SNAP_TOKEN",
                StartError::Abandoned => "ABANDONED_SNAP_TOKEN",
                StartError::BeyondHistory => "SNAP_TOKEN_BEYOND_HISTORY",
                StartError::TooOld { .. } => SNAP_TOKEN_TOO_OLD,
                StartError::UnknownTransaction { .. } => "TRANSACTION_UNKNOWN",
                StartError::StillRunning(_) => "TRANSACTION_STILL_RUNNING",
                StartError::Unreachable(_) => "POSTGRES_UNREACHABLE",
                StartError::Log(_) => LOG,
            },
            Self::Ended(ended) => match &ended.end {
                End::Gap(gap) => gap.reason.code(),
                End::Abandoned { .. } => GapReason::TimelineDiverged.code(),
                End::TooOld { .. } => SNAP_TOKEN_TOO_OLD,
                End::Closed => SHUTTING_DOWN,
                End::Log(_) => LOG,
            },
            Self::Unsendable(_) | Self::NoSource => return None,
        })
    }

    /// The token that helps the client, with its key.
    pub(crate) fn snap_token(&self) -> Option<(&'static str, String)> {
        let write = |tokens: &Tokens, position| tokens.write(position, CommitTime::default());
        match self {
            Self::Start {
                error: StartError::TooOld { earliest } | StartError::UnknownTransaction { earliest, .. },
                tokens,
            } => tokens.as_ref().map(|tokens| (EARLIEST_SNAP_TOKEN, write(tokens, *earliest))),
            Self::Ended(ended) => match &ended.end {
                End::Gap(gap) if gap.is_open() => None,
                End::Gap(gap) => Some((NEXT_SNAP_TOKEN, write(&ended.tokens, gap.to))),
                End::Abandoned { at } => Some((NEXT_SNAP_TOKEN, write(&ended.tokens, Position::at(*at)))),
                End::TooOld { earliest } => Some((EARLIEST_SNAP_TOKEN, write(&ended.tokens, *earliest))),
                End::Closed | End::Log(_) => None,
            },
            _ => None,
        }
    }

    /// Whether the same request may succeed later without any change.
    pub(crate) fn is_temporary(&self) -> bool {
        match self {
            Self::ShuttingDown | Self::TooMany { .. } | Self::Unsendable(_) | Self::NoSource => true,
            Self::Start { error, .. } => {
                matches!(error, StartError::StillRunning(_) | StartError::Unreachable(_) | StartError::Log(_))
            }
            Self::Ended(ended) => matches!(ended.end, End::Closed | End::Log(_)),
            Self::Forbidden(_) | Self::Disabled | Self::TenantForm(_) | Self::TenantId(_) | Self::Expired => false,
        }
    }

    /// Whether a stream that resumes after the last message would end here again.
    pub(crate) fn ends_again_on_resume(&self) -> bool {
        match self {
            Self::Ended(ended) => matches!(ended.end, End::Gap(_) | End::Abandoned { .. } | End::TooOld { .. }),
            _ => false,
        }
    }
}

const SHUTTING_DOWN: &str = "SHUTTING_DOWN";
const LOG: &str = "LOG";

fn start_message(error: &StartError) -> String {
    match error {
        StartError::Log(_) => LOG_UNREADABLE.to_owned(),
        error => error.to_string(),
    }
}

fn end_message(end: &End, scope: &Scope) -> String {
    match end {
        End::Gap(gap) if gap.is_open() => format!(
            "the history of {scope} is not continuous: {}; and transactions that began before are still running, whose \
             changes may be missing when they commit. Read the state anew and watch without a token; the gap is reported \
             again, with {NEXT_SNAP_TOKEN} in the error details, when they have ended",
            gap.reason
        ),
        End::Gap(gap) => format!("the history of {scope} is not continuous: {}{AFTER_GAP}", gap.reason),
        End::Abandoned { .. } => format!("{}{AFTER_GAP}", GapReason::TimelineDiverged),
        End::TooOld { .. } => TOO_SLOW.to_owned(),
        End::Closed => Error::ShuttingDown.to_string(),
        End::Log(_) => LOG_UNREADABLE.to_owned(),
    }
}
