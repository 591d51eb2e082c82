//! A subscriber of one tenant or of all, which leaves and returns, and remembers what it received.

use super::server::{Committed, LAST, Queries, Server, TENANTS};
use super::world::World;
use crate::api::grpc::proto::{DataChange, DataChanges, data_change::Type};
use crate::api::watch::Tokens;
use crate::hub::start::Error as StartError;
use crate::hub::{End, Hub, Item, Origin};
use crate::model::change::TenantId;
use crate::model::lsn::{CommitTime, Position, Snapshot};
use crate::model::scope::{Place, Scope};
use fastrand::Rng;
use prost::Message as _;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The start of a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// At the beginning of history.
    First,
    /// At the time when its first stream starts.
    Now,
    /// After the first transaction that has a token.
    Transaction,
}

/// The messages that a reader has received, across its own disconnects and the deaths of the process.
pub(super) struct Reader {
    scope: Scope,
    start: Start,
    random: Rng,
    /// The token to return with, until a message was received.
    first_token: Option<String>,
    base: Base,
    received: Vec<Received>,
    /// How often it returned with the token of a message.
    returns: u64,
    /// The gaps that it was notified of.
    gaps: Vec<(Position, Position)>,
    /// The id after which it has seen enough.
    last: String,
    pub(super) is_done: bool,
}

/// The part of history before the reader's start, which is not expected from the stream.
#[derive(Clone, Debug)]
enum Base {
    Nothing,
    /// The state that a reader that starts now reads by itself.
    Snapshot(Arc<Snapshot>),
    /// Everything up to here.
    Position(Position),
}

struct Received {
    token: String,
    reached: Position,
    /// Tenants and ids.
    changes: Vec<(String, String)>,
}

impl Reader {
    pub(super) fn new(scope: Scope, start: Start, last: String, seed: u64) -> Self {
        Self {
            scope,
            start,
            random: Rng::with_seed(seed),
            first_token: None,
            base: Base::Nothing,
            received: Vec::new(),
            returns: 0,
            gaps: Vec::new(),
            last,
            is_done: false,
        }
    }

    fn token(&self) -> Option<String> {
        self.received.last().map(|received| received.token.clone()).or_else(|| self.first_token.clone())
    }

    /// Handles a gap from `from` to `position`: the reader reads its state anew and continues there.
    fn resume_at(&mut self, from: Position, position: Position, origin: &Origin) {
        // The gap can begin before the reader's position. The state that it reads covers that part.
        let reached = self.received.last().map_or(Position::ZERO, |received| received.reached);
        self.gaps.push((reached.min(from), position));
        let token = Tokens::new(origin).write(position, CommitTime(0));
        self.received.push(Received { token, reached: position, changes: Vec::new() });
    }

    /// Everything it received was abandoned: the reader starts again from now.
    fn start_again(&mut self) {
        self.received.clear();
        self.gaps.clear();
        self.first_token = None;
        self.start = Start::Now;
    }

    /// Takes a message, after which the stream stands at `place`.
    fn receive(&mut self, item: &Item, place: &Place, origin: &Origin) {
        let token = Tokens::new(origin).write(place.clone(), item.message.header.commit_time);
        let changes: Vec<_> =
            ids(&item.message.changes).into_iter().map(|id| (item.tenant.as_str().to_owned(), id)).collect();
        // This id, or a later one; in a stream of all tenants, that of the last tenant.
        self.is_done |= changes.iter().any(|(tenant, id)| {
            id.starts_with(LAST)
                && *id >= self.last
                && (self.scope != Scope::All || TENANTS.last() == Some(&tenant.as_str()))
        });
        self.received.push(Received { token, reached: place.outer(), changes });
    }

    /// Drops its last messages, like a client that crashed before it had processed them.
    fn forget(&mut self) {
        // It keeps a gap, because the state that it read then belongs to that time.
        let floor = self.received.iter().rposition(|received| received.changes.is_empty()).map_or(0, |n| n + 1);
        let remaining_min = if self.first_token.is_none() { floor.max(1) } else { floor };
        let remaining = self.random.usize(remaining_min.min(self.received.len())..=self.received.len());
        self.received.truncate(remaining);
    }

    /// Compares the received changes with the committed ones.
    pub(super) fn check(&self, committed: &[Committed]) -> Result<usize, String> {
        let mut delivered = self.received.iter().flat_map(|received| &received.changes).peekable();
        let mut missing = Vec::new();
        let mut count = 0;
        for transaction in committed {
            let is_before = match &self.base {
                Base::Nothing => false,
                Base::Snapshot(snapshot) => snapshot.sees(transaction.xid),
                Base::Position(position) => Position::at(transaction.end) <= *position,
            };
            // After a gap everything is expected, whatever the reader read at its start.
            let is_behind_gap = self.gaps.iter().any(|(_, to)| Position::at(transaction.end) > *to);
            let is_expected = !is_before || is_behind_gap;
            // A token has no snapshot. So a reader that returns may receive a change again that its starting snapshot
            // saw, if it committed after one that the snapshot did not see.
            let is_possible = is_expected || (matches!(self.base, Base::Snapshot(_)) && self.returns > 0);
            let is_own = |tenant: &str| self.scope.includes(&TenantId::new(tenant).unwrap());
            let mut changes: Vec<_> = transaction.changes.iter().filter(|(tenant, _)| is_own(tenant)).collect();
            // Inside a transaction the tenants come in order, each tenant's changes as executed.
            changes.sort_by_key(|(tenant, _)| *tenant);
            for (tenant, id) in changes {
                if is_possible && delivered.next_if(|next| next.0 == *tenant && next.1 == *id).is_some() {
                    count += 1;
                } else if is_expected && delivered.peek().is_some() {
                    missing.push((transaction, id));
                }
            }
        }
        if let Some(surplus) = delivered.next() {
            return Err(format!("{self:?} received {surplus:?} out of order, twice, or without a commit"));
        }
        for (transaction, id) in missing {
            let inside = |(from, to): &(Position, Position)| {
                Position::at(transaction.end) > *from && Position::at(transaction.end) <= *to
            };
            if !self.gaps.iter().any(inside) {
                let (commit, end) = (transaction.commit, transaction.end);
                return Err(format!("{self:?} did not receive {id} of {commit}..{end}, and there is no gap for it"));
            }
        }
        Ok(count)
    }

    pub(super) fn has_gaps(&self) -> bool {
        !self.gaps.is_empty()
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let messages: Vec<String> =
            self.received.iter().map(|received| format!("{} {:?}", received.reached, received.changes)).collect();
        let (scope, start, base, gaps) = (&self.scope, &self.start, &self.base, &self.gaps);
        write!(f, "the reader of {scope} ({start:?} after {base:?}, gaps {gaps:?}, received {messages:#?})")
    }
}

/// The ids in the changes of a message.
fn ids(changes: &[u8]) -> Vec<String> {
    let changes = DataChanges::decode(changes).unwrap().tuple_changes;
    let id = |change: DataChange| match change.r#type {
        Some(Type::Tuple(tuple)) => tuple.entity.unwrap().id,
        other => panic!("not a tuple: {other:?}"),
    };
    changes.into_iter().map(id).collect()
}

/// Reads until the reader is finished, or the process dies.
pub(super) async fn read(world: World, server: Server, hub: Hub, reader: Arc<Mutex<Reader>>) {
    while !reader.lock().unwrap().is_done {
        if !prepare(&server, &reader) {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        }
        if stream(&world, &server, &hub, &reader).await {
            let mut reader = reader.lock().unwrap();
            if reader.is_done {
                world.report_done();
            } else {
                reader.forget();
            }
        } else {
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }
}

/// Sets the token of the start. Returns whether the reader can start.
fn prepare(server: &Server, reader: &Mutex<Reader>) -> bool {
    let mut reader = reader.lock().unwrap();
    if reader.token().is_some() {
        return true;
    }
    match reader.start {
        Start::Now => {}
        Start::First => reader.first_token = Some(server.first_token()),
        Start::Transaction => {
            let with_token = |t: &Committed| Some((server.transaction_token(t)?, t.end));
            let Some((token, end)) = server.committed().iter().find_map(with_token) else { return false };
            reader.first_token = Some(token);
            reader.base = Base::Position(Position::at(end));
        }
    }
    true
}

/// Runs one stream. Returns whether the reader left by its own choice.
async fn stream(world: &World, server: &Server, hub: &Hub, reader: &Mutex<Reader>) -> bool {
    let (scope, token) = {
        let reader = reader.lock().unwrap();
        (reader.scope.clone(), reader.token())
    };
    let queries = Queries { server, snapshot: Mutex::new(None) };
    let started =
        hub.start(&queries, scope.clone(), token.as_deref().unwrap_or_default(), Duration::from_secs(10)).await;
    let mut subscription = match started {
        Ok(subscription) => subscription,
        Err(StartError::Unreachable(_)) => return false,
        Err(StartError::TooOld { earliest }) => {
            let origin = hub.origin().expect("a horizon has an origin");
            reader.lock().unwrap().resume_at(Position::MAX, earliest, &origin);
            return false;
        }
        Err(StartError::Abandoned) => {
            reader.lock().unwrap().start_again();
            return false;
        }
        Err(error) => {
            world.violate(format!("a reader of {scope} cannot start with {token:?}: {error}"));
            return false;
        }
    };
    if token.is_none() {
        let snapshot = queries.snapshot.lock().unwrap().take().expect("a start from now takes a snapshot");
        reader.lock().unwrap().base = Base::Snapshot(snapshot);
    }
    if !reader.lock().unwrap().received.is_empty() {
        reader.lock().unwrap().returns += 1;
    }
    let mut patience = reader.lock().unwrap().random.usize(1..12);
    while patience > 0 {
        let bytes_max = reader.lock().unwrap().random.usize(1..200);
        let mut place = subscription.place().clone();
        let next = subscription.next(bytes_max).await;
        if world.is_dead() {
            // The process died before it delivered this.
            std::future::pending::<()>().await;
        }
        let mut reader = reader.lock().unwrap();
        match next {
            Ok(items) => {
                let origin = subscription.origin().expect("a message has an origin").clone();
                for item in items {
                    if !server.is_visible(item.message.header.xid) {
                        world.violate(format!("{} was sent before it was visible", item.message.header.commit));
                    }
                    place = item.reached(&scope, &place);
                    reader.receive(&item, &place, &origin);
                }
                if reader.is_done {
                    return true;
                }
                patience -= 1;
            }
            Err(End::Gap(gap)) => {
                let origin = hub.origin().expect("a gap has an origin");
                reader.resume_at(gap.from, gap.to, &origin);
                return false;
            }
            Err(End::TooOld { earliest }) => {
                let origin = hub.origin().expect("a horizon has an origin");
                reader.resume_at(Position::MAX, earliest, &origin);
                return false;
            }
            Err(End::Abandoned { .. }) => {
                reader.start_again();
                return false;
            }
            Err(End::Log(error)) => {
                world.violate(format!("the log cannot be read: {error}"));
                return false;
            }
            Err(End::Closed) => return false,
        }
    }
    true
}
