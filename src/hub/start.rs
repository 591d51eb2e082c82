//! The start of a subscription: now, or after a snap token.
//!
//! | token | start |
//! | --- | --- |
//! | none | now: one statement gives the server's flush position L and a snapshot S; the stream has every commit at or after L, and every earlier one that S does not see |
//! | position | there, if it lies on the present history; one ahead of us waits, if the server has written that far |
//! | transaction, transaction id | right after that transaction |
//! | snapshot of a transaction | every commit that the snapshot does not see, but for that transaction |
//!
//! Requests that arrive together share one statement ([`Primary::look`] answers all of them). For a tenant that the log knows, a token
//! resumes without any statement: a thousand subscribers that reconnect at once cost PostgreSQL nothing, and do not need it.

mod resolve;

use super::primary::{Primary, TransactionStatus, Unreachable};
use super::window::Anchor;
use super::{Filter, Hub, Origin, Subscription};
use crate::changelog;
use crate::model::change::TenantId;
use crate::model::lsn::{Lsn, Position, Xid8};
use crate::model::scope::{Place, Scope};
use crate::model::snap_token::{self, SnapToken};
use crate::model::timeline::{History, SourceId, TimelineId};
use resolve::await_end;
use std::time::Duration;
use tokio::time::Instant;

/// Why a subscription cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No snap token.
    #[error(transparent)]
    Token(#[from] snap_token::Error),
    /// Neither the primary nor the log knows it.
    #[error("tenant '{0}' does not exist")]
    UnknownTenant(TenantId),
    /// Made by another database.
    #[error("the snap token belongs to another database: start without a token and read the state anew")]
    Foreign,
    /// From a timeline that is not the server's history, or from past the switch.
    #[error(
        "the snap token lies on a part of history that the server has abandoned (a failover or a restore): \
         start without a token and read the state anew"
    )]
    Abandoned,
    /// Ahead of anything written.
    #[error("the snap token is ahead of everything that the server has written: it is not of this history")]
    BeyondHistory,
    /// Its changes were dropped.
    #[error(
        "the snap token is too old: the changes after it are no longer kept; start without a token and read the state anew"
    )]
    TooOld {
        /// The earliest position from which the log is complete for the scope.
        earliest: Position,
    },
    /// Nothing is known of the transaction.
    #[error(
        "nothing is known of transaction {xid} of the snap token: its changes are no longer kept, or it is from before the \
         change log began, was rolled back, or changed nothing that is watched; start without a token and read the state anew"
    )]
    UnknownTransaction {
        /// The transaction.
        xid: Xid8,
        /// The earliest position from which the log is complete for the scope.
        earliest: Position,
    },
    /// The transaction of the token runs on.
    #[error("the transaction of the snap token is still running after {0:?}: try again when it has ended")]
    StillRunning(Duration),
    /// PostgreSQL is needed for the answer, and cannot be asked.
    #[error("PostgreSQL cannot be asked at the moment, try again: {0}")]
    Unreachable(#[from] Unreachable),
    /// The log cannot be read.
    #[error(transparent)]
    Log(#[from] changelog::Error),
}

/// The start of a subscription.
pub(super) struct Start {
    /// The stream delivers the changes after it.
    pub(super) place: Place,
    /// The reader has a state of no later than this.
    pub(super) seen: Position,
    /// The transactions after `place` that the reader's state already contains.
    pub(super) filter: Option<Filter>,
}

impl Start {
    /// For a reader that has everything up to here.
    pub(super) fn after(place: impl Into<Place>) -> Self {
        let place = place.into();
        Self { seen: place.outer(), place, filter: None }
    }
}

fn origin(anchor: &Anchor) -> Result<&Origin, Unreachable> {
    anchor.origin.as_ref().ok_or(Unreachable::NoSession)
}

fn check_source(anchor: &Anchor, id: SourceId) -> Result<&History, Error> {
    let (source, history) = origin(anchor)?;
    if id == source.id() { Ok(history) } else { Err(Error::Foreign) }
}

/// A place must lie on our history, and not ahead of what the server has written.
async fn check_place(
    anchor: &Anchor,
    primary: &impl Primary,
    scope: &Scope,
    (source, timeline): (SourceId, TimelineId),
    place: &Place,
    appended: Lsn,
) -> Result<(), Error> {
    if !check_source(anchor, source)?.holds(timeline, place.extent()) {
        return Err(Error::Abandoned);
    }
    let lsn = place.position.lsn;
    // Everything in the log was sent by the server, even if it is not released yet.
    if lsn > anchor.released.max(appended) && lsn > primary.look(scope).await?.flush_lsn {
        return Err(Error::BeyondHistory);
    }
    Ok(())
}

fn require(scope: &Scope, exists: bool) -> Result<(), Error> {
    match scope {
        Scope::Tenant(tenant) if !exists => Err(Error::UnknownTenant(tenant.clone())),
        _ => Ok(()),
    }
}

impl Hub {
    /// Starts a subscription. When this returns, the start is fixed: every later commit will be in the stream.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn start(
        &self,
        primary: &impl Primary,
        scope: Scope,
        token: &str,
        resolve_timeout: Duration,
    ) -> Result<Subscription, Error> {
        let token = if token.is_empty() { None } else { Some(token.parse::<SnapToken>()?) };

        // First: a divergence that comes while we look is the subscription's to notice.
        let anchor = self.window().anchor();
        let known = self.knows(&scope).await?;
        if token.is_some() && !known {
            require(&scope, primary.look(&scope).await?.scope_exists)?;
        }
        let Start { place, seen, filter } = match token {
            Some(SnapToken::Position { source, timeline, place, .. }) => {
                let appended = *self.inner.appended.borrow();
                check_place(&anchor, primary, &scope, (source, timeline), &place, appended).await?;
                Start::after(place.in_scope(&scope))
            }
            Some(SnapToken::Transaction { source, id, xid, floor }) => {
                check_source(&anchor, source)?;
                self.after_token(primary, id, xid, floor, resolve_timeout).await?
            }
            Some(SnapToken::Xid(xid)) => {
                origin(&anchor)?;
                self.after_xid(primary, &scope, xid, resolve_timeout).await?
            }
            Some(SnapToken::Snapshot { xid, snapshot }) => {
                origin(&anchor)?;
                self.after_snapshot(primary, &scope, xid, snapshot, resolve_timeout).await?
            }
            None => {
                // Everything that was visible before is visible to the snapshot that is taken now.
                let look = primary.look(&scope).await?;
                require(&scope, look.scope_exists || known)?;
                origin(&anchor)?;
                let filter = Filter { lsn: look.flush_lsn, snapshot: look.snapshot, own: None };
                let (place, seen) = (Place::at(anchor.watermark), Position::at(look.flush_lsn));
                Start { place, seen, filter: Some(filter) }
            }
        };
        // Joined first, so that nothing after the check goes by unnoticed.
        let subscription = Subscription::new(self.clone(), scope.clone(), place, seen, filter, anchor.divergences);
        let horizon = self.on_disk(move |log| log.horizon(&scope)).await?;
        if subscription.place().outer() < horizon {
            return Err(Error::TooOld { earliest: horizon });
        }
        Ok(subscription)
    }

    /// Waits until a new snapshot of the primary sees all that the token stands for; an empty one stands for nothing.
    ///
    /// # Errors
    /// As [`Hub::start`], except the errors about the tenant and about changes that are no longer kept.
    pub async fn readable(
        &self,
        primary: &impl Primary,
        tenant: &TenantId,
        token: &str,
        timeout: Duration,
    ) -> Result<(), Error> {
        if token.is_empty() {
            return Ok(());
        }
        let deadline = Instant::now() + timeout;
        let anchor = self.window().anchor();
        let scope = Scope::Tenant(tenant.clone());
        match token.parse::<SnapToken>()? {
            SnapToken::Position { source, timeline, place, .. } => {
                let appended = *self.inner.appended.borrow();
                check_place(&anchor, primary, &scope, (source, timeline), &place, appended).await?;
                let mut watermark = self.watch_watermark();
                let reached = watermark.wait_for(|lsn| *lsn >= place.extent());
                let late = |_| Unreachable::Behind(place.clone());
                tokio::time::timeout_at(deadline, reached).await.map(drop).map_err(late)?;
            }
            // The others need nothing of the stream: PostgreSQL shows a transaction as over when its snapshots see it.
            SnapToken::Transaction { source, xid, floor, .. } => {
                check_source(&anchor, source)?;
                if floor > primary.look(&scope).await?.flush_lsn {
                    return Err(Error::BeyondHistory);
                }
                await_end(primary, xid, deadline, timeout).await?;
            }
            SnapToken::Xid(xid) | SnapToken::Snapshot { xid, .. } => {
                if await_end(primary, xid, deadline, timeout).await? == TransactionStatus::Unassigned {
                    return Err(Error::BeyondHistory);
                }
            }
        }
        Ok(())
    }

    async fn knows(&self, scope: &Scope) -> Result<bool, changelog::Error> {
        let Scope::Tenant(tenant) = scope else { return Ok(true) };
        if self.window().knows(tenant) {
            return Ok(true);
        }
        let tenant = tenant.clone();
        self.on_disk(move |log| log.knows(&tenant)).await
    }
}
