//! A subscriber that leaves and returns, and remembers what it received.

use super::server::{Asked, Committed, LAST, Server};
use super::world::World;
use crate::api::grpc::proto::{DataChange, DataChanges, data_change::Type};
use crate::api::grpc::status::Tokens;
use crate::hub::start::Error as StartError;
use crate::hub::{End, Hub, Item, Origin};
use crate::model::lsn::{CommitTime, Position, Snapshot};
use fastrand::Rng;
use prost::Message as _;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The start of a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// At the beginning of everything.
    First,
    /// Whenever its first stream starts.
    Now,
    /// After the first transaction that has a token.
    Transaction,
}

/// The received messages, across its own disconnects and the deaths of the process.
pub(super) struct Reader {
    tenant: &'static str,
    start: Start,
    random: Rng,
    /// The token to return with if it has no message yet.
    first_token: Option<String>,
    base: Base,
    kept: Vec<Kept>,
    /// How often it came back with the token of a message.
    returns: u64,
    /// The reported gaps.
    gaps: Vec<(Position, Position)>,
    /// The id after which it has seen enough.
    last: String,
    pub(super) is_done: bool,
}

/// Changes before its start, which the stream must not deliver.
#[derive(Clone, Debug)]
enum Base {
    Nothing,
    /// The state that a reader can read at its start.
    Snapshot(Arc<Snapshot>),
    /// Everything up to here.
    Position(Position),
}

struct Kept {
    token: String,
    reached: Position,
    changes: Vec<String>,
}

impl Reader {
    pub(super) fn new(tenant: &'static str, start: Start, last: String, seed: u64) -> Self {
        Self {
            tenant,
            start,
            random: Rng::with_seed(seed),
            first_token: None,
            base: Base::Nothing,
            kept: Vec::new(),
            returns: 0,
            gaps: Vec::new(),
            last,
            is_done: false,
        }
    }

    fn token(&self) -> Option<String> {
        self.kept.last().map(|kept| kept.token.clone()).or_else(|| self.first_token.clone())
    }

    /// History may be incomplete from `from` to `position`: the reader reads its state again and continues from there.
    fn go_on_from(&mut self, from: Position, position: Position, origin: &Origin) {
        // A gap can begin before its last message. The state contains the missing changes.
        let reached = self.kept.last().map_or(Position::ZERO, |kept| kept.reached);
        self.gaps.push((reached.min(from), position));
        let token = Tokens::new(origin).write(position, CommitTime(0));
        self.kept.push(Kept { token, reached: position, changes: Vec::new() });
    }

    /// Everything was abandoned: the reader starts again, now.
    fn begin_again(&mut self) {
        self.kept.clear();
        self.gaps.clear();
        self.first_token = None;
        self.start = Start::Now;
    }

    fn keep(&mut self, item: &Item, origin: &Origin) {
        let message = &item.message;
        let token = Tokens::new(origin).write(message.reached(), message.header.commit_time);
        let changes = ids(&message.changes);
        // Or a later one.
        self.is_done |= changes.iter().any(|id| id.starts_with(LAST) && *id >= self.last);
        self.kept.push(Kept { token, reached: message.reached(), changes });
    }

    /// Forgets its last messages, like a subscriber that crashed before it applied them.
    fn forget(&mut self) {
        // It keeps a reported gap, because its state is from that time.
        let floor = self.kept.iter().rposition(|kept| kept.changes.is_empty()).map_or(0, |n| n + 1);
        let least = if self.first_token.is_none() { floor.max(1) } else { floor };
        let keep = self.random.usize(least.min(self.kept.len())..=self.kept.len());
        self.kept.truncate(keep);
    }

    /// Compares the received changes with the committed ones.
    pub(super) fn check(&self, committed: &[Committed]) -> Result<usize, String> {
        let mut had = self.kept.iter().flat_map(|kept| &kept.changes).peekable();
        let mut missing = Vec::new();
        let mut count = 0;
        for transaction in committed {
            let is_before = match &self.base {
                Base::Nothing => false,
                Base::Snapshot(snapshot) => snapshot.sees(transaction.xid),
                Base::Position(position) => Position::at(transaction.end) <= *position,
            };
            // Behind a gap it gets everything, whatever it read when it started.
            let is_behind_gap = self.gaps.iter().any(|(_, to)| Position::at(transaction.end) > *to);
            let is_expected = !is_before || is_behind_gap;
            // A token has no snapshot. A returning reader may get a change that it could read at its start, if that committed after one
            // that it could not read.
            let is_possible = is_expected || (matches!(self.base, Base::Snapshot(_)) && self.returns > 0);
            for (_, id) in transaction.changes.iter().filter(|(tenant, _)| *tenant == self.tenant) {
                if is_possible && had.next_if(|next| *next == id).is_some() {
                    count += 1;
                } else if is_expected && had.peek().is_some() {
                    missing.push((transaction, id));
                }
            }
        }
        if let Some(surplus) = had.next() {
            return Err(format!("{self:?} was sent {surplus} out of order, twice, or for nothing"));
        }
        for (transaction, id) in missing {
            let inside = |(from, to): &(Position, Position)| {
                Position::at(transaction.end) > *from && Position::at(transaction.end) <= *to
            };
            if !self.gaps.iter().any(inside) {
                let (commit, end) = (transaction.commit, transaction.end);
                return Err(format!("{self:?} was not sent {id} of {commit}..{end}, nor told so"));
            }
        }
        Ok(count)
    }

    pub(super) fn was_told_of_gaps(&self) -> bool {
        !self.gaps.is_empty()
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let had: Vec<String> = self.kept.iter().map(|kept| format!("{} {:?}", kept.reached, kept.changes)).collect();
        let (tenant, start, base, gaps) = (self.tenant, &self.start, &self.base, &self.gaps);
        write!(f, "the reader of {tenant} ({start:?} after {base:?}, gaps {gaps:?}, had {had:#?})")
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

/// Reads until it has everything, or the process dies.
pub(super) async fn read(world: World, server: Server, hub: Hub, reader: Arc<Mutex<Reader>>) {
    while !reader.lock().unwrap().is_done {
        if !prepare(&server, &reader) {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        }
        if stream(&world, &server, &hub, &reader).await {
            let mut reader = reader.lock().unwrap();
            if reader.is_done {
                world.tell_done();
            } else {
                reader.forget();
            }
        } else {
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }
}

/// Gives it the token that it starts with; whether it can start.
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

/// One stream; whether it was left of the reader's own accord.
async fn stream(world: &World, server: &Server, hub: &Hub, reader: &Mutex<Reader>) -> bool {
    let (tenant, token) = {
        let reader = reader.lock().unwrap();
        (reader.tenant, reader.token())
    };
    let asked = Asked { server, snapshot: Mutex::new(None) };
    let started = hub.start(&asked, tenant, token.as_deref().unwrap_or_default(), Duration::from_secs(10)).await;
    let mut subscription = match started {
        Ok(subscription) => subscription,
        Err(StartError::Unreachable(_)) => return false,
        Err(StartError::TooOld { earliest }) => {
            let origin = hub.origin().expect("a horizon has an origin");
            reader.lock().unwrap().go_on_from(Position::MAX, earliest, &origin);
            return false;
        }
        Err(StartError::Abandoned) => {
            reader.lock().unwrap().begin_again();
            return false;
        }
        Err(error) => {
            world.violate(format!("a reader of {tenant} cannot start with {token:?}: {error}"));
            return false;
        }
    };
    if token.is_none() {
        let snapshot = asked.snapshot.lock().unwrap().take().expect("a start now looks");
        reader.lock().unwrap().base = Base::Snapshot(snapshot);
    }
    if !reader.lock().unwrap().kept.is_empty() {
        reader.lock().unwrap().returns += 1;
    }
    let mut patience = reader.lock().unwrap().random.usize(1..12);
    while patience > 0 {
        let bytes_max = reader.lock().unwrap().random.usize(1..200);
        let next = subscription.next(bytes_max).await;
        if world.is_dead() {
            // It did not get that far.
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
                    reader.keep(&item, &origin);
                }
                if reader.is_done {
                    return true;
                }
                patience -= 1;
            }
            Err(End::Gap(gap)) => {
                let origin = hub.origin().expect("a gap has an origin");
                reader.go_on_from(gap.from, gap.to, &origin);
                return false;
            }
            Err(End::TooOld { earliest }) => {
                let origin = hub.origin().expect("a horizon has an origin");
                reader.go_on_from(Position::MAX, earliest, &origin);
                return false;
            }
            Err(End::Abandoned { .. }) => {
                reader.begin_again();
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
