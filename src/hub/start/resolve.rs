//! Finds the transaction of a token in the stream.
//!
//! If the log has the transaction, that is its place. If not, it may still arrive: while PostgreSQL says that it runs, and then until the
//! stream has passed a marker that was written after it had ended. A transaction that has not arrived by then was rolled back, changed nothing
//! that is watched, or is older than the log.

use super::{Error, Start};
use crate::changelog::{self, ChangeLog, TransactionOutcome};
use crate::hub::primary::{Primary, TransactionStatus, Unreachable};
use crate::hub::{Filter, Hub};
use crate::model::lsn::{CommitLsn, EndLsn, Lsn, Position, Snapshot, Xid8};
use crate::model::scope::{Place, Scope};
use crate::model::snap_token::TokenId;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long to wait, between looks, for a transaction to end.
const STATUS_EVERY: Duration = Duration::from_millis(50);

/// A transaction that left no trace.
struct Missing {
    /// Whether PostgreSQL has not even handed out its id.
    is_unassigned: bool,
    /// Whatever it did, it was over before this.
    mark: Lsn,
}

impl Hub {
    /// Right after the transaction that carried `id`. A transaction without a trace resolves to its floor, because
    /// everything after the transaction is after the floor. The reader's state reaches at least to the end of the transaction.
    pub(super) async fn after_token(
        &self,
        primary: &impl Primary,
        id: TokenId,
        xid: Xid8,
        floor: Lsn,
        timeout: Duration,
    ) -> Result<Start, Error> {
        match self.await_outcome(primary, xid, timeout, move |log| log.find_token(id)).await? {
            Ok(end) => Ok(Start::after(Position::after(end))),
            Err(missing) if floor > missing.mark => Err(Error::BeyondHistory),
            Err(missing) => Ok(Start { seen: Position::at(missing.mark), ..Start::after(Position::at(floor)) }),
        }
    }

    /// Right after the transaction with this id. There is nothing to go by for one that left no trace.
    pub(super) async fn after_xid(
        &self,
        primary: &impl Primary,
        scope: &Scope,
        xid: Xid8,
        timeout: Duration,
    ) -> Result<Start, Error> {
        let (_, end) = self.place_of(primary, scope, xid, timeout).await?;
        Ok(Start::after(Position::after(end)))
    }

    /// Everything that `snapshot`, which the transaction with this id took, does not see; without that transaction's own
    /// changes.
    pub(super) async fn after_snapshot(
        &self,
        primary: &impl Primary,
        scope: &Scope,
        xid: Xid8,
        snapshot: Snapshot,
        timeout: Duration,
    ) -> Result<Start, Error> {
        let (_, end) = self.place_of(primary, scope, xid, timeout).await?;
        let snapshot = Arc::new(snapshot);
        let (whose, seen_by) = (scope.clone(), snapshot.clone());
        let first = self.on_disk(move |log| first_unseen(log, &whose, &seen_by)).await?;
        let Some(first) = first else { return Err(self.unknown(scope, xid).await?) };
        // The snapshot was taken before the transaction ended, so it sees nothing that commits later.
        let filter = Filter { lsn: end.0, snapshot, own: Some(xid) };
        Ok(Start { place: first.into(), seen: Position::after(end), filter: Some(filter) })
    }

    /// Commit and end LSN of the transaction with this id.
    async fn place_of(
        &self,
        primary: &impl Primary,
        scope: &Scope,
        xid: Xid8,
        timeout: Duration,
    ) -> Result<(CommitLsn, EndLsn), Error> {
        let whose = scope.clone();
        match self.await_outcome(primary, xid, timeout, move |log| log.find_transaction(&whose, xid)).await? {
            Ok(TransactionOutcome::Committed { commit, end }) => Ok((commit, end)),
            Ok(TransactionOutcome::Abandoned) => Err(Error::Abandoned),
            Err(missing) if missing.is_unassigned => Err(Error::BeyondHistory),
            Err(_) => Err(self.unknown(scope, xid).await?),
        }
    }

    async fn unknown(&self, scope: &Scope, xid: Xid8) -> Result<Error, changelog::Error> {
        let scope = scope.clone();
        let earliest = self.on_disk(move |log| log.horizon(&scope)).await?;
        Ok(Error::UnknownTransaction { xid, earliest })
    }

    /// The result of `find` for the transaction, once it has ended and the stream is past it.
    async fn await_outcome<T: Send + 'static>(
        &self,
        primary: &impl Primary,
        xid: Xid8,
        timeout: Duration,
        find: impl Fn(&dyn ChangeLog) -> Result<Option<T>, changelog::Error> + Clone + Send + 'static,
    ) -> Result<Result<T, Missing>, Error> {
        if let Some(found) = self.on_disk(find.clone()).await? {
            return Ok(Ok(found));
        }
        let deadline = Instant::now() + timeout;
        let is_unassigned = await_end(primary, xid, deadline, timeout).await? == TransactionStatus::Unassigned;
        // If it committed, its commit is in the stream before the mark, and in the log soon after.
        let mark = primary.mark().await?;
        let mut appended = self.inner.appended.clone();
        let reached =
            tokio::time::timeout_at(deadline.max(Instant::now() + STATUS_EVERY), appended.wait_for(|lsn| *lsn > mark));
        if reached.await.is_err() {
            return Err(Unreachable::Behind(Place::at(mark)).into());
        }
        Ok(self.on_disk(find).await?.ok_or(Missing { is_unassigned, mark }))
    }
}

/// Waits for a transaction to end, and returns its status.
pub(super) async fn await_end(
    primary: &impl Primary,
    xid: Xid8,
    deadline: Instant,
    timeout: Duration,
) -> Result<TransactionStatus, Error> {
    loop {
        match primary.transaction_status(xid).await? {
            TransactionStatus::InProgress if Instant::now() >= deadline => return Err(Error::StillRunning(timeout)),
            TransactionStatus::InProgress => tokio::time::sleep(STATUS_EVERY).await,
            ended => return Ok(ended),
        }
    }
}

/// A position shortly before the first transaction that the snapshot does not see; `None` if the log does not reach back that far.
///
/// Transactions from `xmax` on got their ids after the snapshot was taken, and so after every transaction that it sees had committed: they
/// come later in the stream. The running ones are looked up one by one, because one may have committed without being visible yet.
fn first_unseen(log: &dyn ChangeLog, scope: &Scope, snapshot: &Snapshot) -> Result<Option<Position>, changelog::Error> {
    let mut below = log.largest_below(snapshot.xmax())?;
    while let Some((xid, _)) = below.filter(|(xid, _)| !snapshot.sees(*xid)) {
        below = log.largest_below(xid)?;
    }
    let Some((_, mut first)) = below else {
        // Nothing has gone since the log began, and that was before the snapshot was taken.
        let origin = log.state().origin.filter(|origin| origin.xid <= snapshot.xmax());
        let origin = origin.map(|origin| Position::at(origin.lsn));
        let horizon = log.horizon(scope)?;
        return Ok(origin.filter(|origin| horizon <= *origin));
    };
    for xid in snapshot.running() {
        if let Some(TransactionOutcome::Committed { commit, .. }) = log.find_transaction(scope, *xid)? {
            first = first.min(commit);
        }
    }
    Ok(Some(Position::at(first.0)))
}
