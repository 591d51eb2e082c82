use super::primary::{Primary, PrimaryState, TransactionStatus, Unreachable};
use super::*;
use crate::changelog::reference::ModelLog;
use crate::changelog::{Entry, Origin};
use crate::model::change::TenantId;
use crate::model::lsn::{CommitLsn, CommitTime, EndLsn, Position, Snapshot, Xid8};
use crate::model::scope::{Place, Scope};
use crate::model::snap_token::{SnapToken, TokenId};
use crate::model::timeline::Timeline;
use crate::model::transaction::{GapReason, Header, Message, TenantMessage};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

const SOURCE: Source = Source { system_identifier: 1, database_oid: 2 };
const FIRST: Timeline = Timeline { number: 1, begin: Lsn::ZERO };

/// A hub over the model log. The test moves its `appended` position.
struct Fixture {
    hub: Hub,
    log: Arc<ModelLog>,
    appended: watch::Sender<Lsn>,
}

fn tenant(name: &str) -> TenantId {
    TenantId::new(name).unwrap()
}

fn message(commit: u64, end: Option<u64>, steps: &[u64]) -> Message {
    let header = Header { commit: CommitLsn(Lsn(commit)), xid: Xid8(commit), commit_time: CommitTime(0) };
    Message::of_tuples(header, steps.iter().copied(), end)
}

/// A transaction that commits at `commit`, ends 10 later, has the xid of its commit LSN and a change for each tenant.
fn transaction(commit: u64, tenants: &[&str]) -> Transaction {
    Transaction {
        header: message(commit, None, &[]).header,
        end: EndLsn(Lsn(commit + 10)),
        messages: tenants
            .iter()
            .zip(1..)
            .map(|(name, n)| (tenant(name), message(commit, Some(commit + 10), &[n])))
            .collect(),
        staged: false,
        gaps: vec![],
        token_ids: vec![TokenId([commit as u8; 16])],
        tallies: vec![],
    }
}

impl Fixture {
    fn new(window_bytes: usize, before_visible: bool) -> Self {
        let log = Arc::new(ModelLog::default());
        let origin = Origin { source: SOURCE, history: History::first(), lsn: Lsn(100), xid: Xid8(50) };
        log.append(&[Entry::Adopt(origin)]).unwrap();
        let (appended, receiver) = watch::channel(Lsn(100));
        let hub = Hub::new(log.clone(), receiver, Options { window_bytes, before_visible }).unwrap();
        Self { hub, log, appended }
    }

    /// Appends to the log, without the hub.
    fn append(&self, transaction: Transaction) {
        let end = transaction.end;
        self.log.append(&[Entry::Transaction(Arc::new(transaction))]).unwrap();
        self.appended.send_replace(end.0);
    }

    async fn admit(&self, transaction: Transaction) {
        self.hub.admit(Arc::new(transaction)).await;
    }

    /// Releases the transactions that a snapshot with this xmax and these running transactions sees.
    fn release(&self, xmax: u64, running: &str) {
        let xmin = running.split(',').next().filter(|xid| !xid.is_empty()).map_or(xmax, |xid| xid.parse().unwrap());
        let snapshot: Snapshot = format!("{xmin}:{xmax}:{running}").parse().unwrap();
        let appended = *self.appended.borrow();
        self.hub.window().advance(Some(&snapshot), appended);
    }

    fn subscribe_to_all(&self) -> Subscription {
        let start = Position::at(Lsn(100));
        Subscription::new(self.hub.clone(), Scope::All, start.into(), start, None, 0)
    }

    fn subscribe(&self, name: &str, position: u64) -> Subscription {
        let position = Position::at(Lsn(position));
        Subscription::new(self.hub.clone(), tenant(name).into(), position.into(), position, None, 0)
    }
}

/// What a stream of all tenants has, until it waits: each message as its tenant, its commit LSN and its number of changes, and each gap as
/// `!` with its tenant, behind which it goes on. Every message is checked to be the first of a stream that is resumed in front of it, and
/// for its tenant, too.
async fn stream_of_all(fixture: &Fixture, subscription: &mut Subscription) -> String {
    let resume = |scope: Scope, place: Place| {
        let seen = place.outer();
        Subscription::new(fixture.hub.clone(), scope.clone(), place.in_scope(&scope), seen, None, 0)
    };
    let mut events = Vec::new();
    loop {
        let before = subscription.place().clone();
        let event = match tokio::time::timeout(Duration::from_secs(5), subscription.next(1)).await {
            Err(_waits) => return events.join(" "),
            Ok(next) => next,
        };
        let mut again = resume(Scope::All, before.clone());
        match event {
            Ok(items) => {
                let mut place = before.clone();
                // From the log come several at a time.
                let mut all_again = VecDeque::new();
                for item in &items {
                    while all_again.is_empty() {
                        all_again = again.next(1).await.unwrap();
                    }
                    let same = all_again.pop_front().unwrap();
                    assert_eq!((&same.tenant, &same.message), (&item.tenant, &item.message), "again from {before}");
                    let of_one = resume(item.tenant.clone().into(), place.clone()).next(1).await.unwrap();
                    assert_eq!(of_one[0].message, item.message, "of its tenant from {place}");
                    place = item.reached(&Scope::All, &place);
                    let (commit, changes) = (item.message.header.commit, item.message.steps.len());
                    events.push(format!("{}{}:{changes}", item.tenant, commit.0.0));
                }
                assert_eq!(&place, subscription.place());
            }
            Err(End::Gap(gap)) => {
                assert!(matches!(ended(&mut again).await, End::Gap(same) if same == gap), "again from {before}");
                if let Some(tenant) = &gap.tenant {
                    let mut of_one = resume(tenant.clone().into(), before.clone());
                    let end = ended(&mut of_one).await;
                    assert!(
                        matches!(&end, End::Gap(same) if *same == gap),
                        "of its tenant from {before}: {gap:?}, {end:?}; {events:?}"
                    );
                }
                events.push(format!("!{}", gap.tenant.as_ref().map_or("all", TenantId::as_str)));
                subscription.continue_after(&gap);
            }
            Err(end) => panic!("{end:?} from {before}"),
        }
    }
}

/// Commit LSNs of the available messages; `None` if the subscription waits.
async fn ready(subscription: &mut Subscription) -> Option<Vec<u64>> {
    let mut messages = VecDeque::new();
    let next = std::future::poll_fn(|cx| subscription.poll_next(cx, usize::MAX, &mut messages));
    // With the clock paused, a wait for anything but the timeout itself is none at all.
    let is_all = tokio::time::timeout(Duration::from_secs(5), next).await.ok()?.unwrap();
    if is_all {
        let mut more = VecDeque::new();
        let polled = subscription.poll_next(&mut Context::from_waker(Waker::noop()), 1, &mut more);
        assert!(polled.is_pending(), "it said that there is nothing else: {polled:?} {more:?}");
    }
    Some(messages.iter().map(|item| item.message.header.commit.0.0).collect())
}

async fn ended(subscription: &mut Subscription) -> End {
    match subscription.next(usize::MAX).await {
        Err(end) => end,
        Ok(messages) => panic!("{messages:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn only_visible_transactions_are_released_in_order() {
    let fixture = Fixture::new(1 << 20, false);
    let mut subscription = fixture.subscribe("a", 100);
    fixture.admit(transaction(200, &["a"])).await;
    fixture.admit(transaction(210, &["a"])).await;
    assert_eq!(ready(&mut subscription).await, None);
    // 210 is visible, 200 before it not yet.
    fixture.release(300, "200");
    assert_eq!(ready(&mut subscription).await, None);
    fixture.release(300, "");
    assert_eq!(ready(&mut subscription).await, Some(vec![200, 210]));
    assert_eq!(ready(&mut subscription).await, None);
}

#[tokio::test(start_paused = true)]
async fn before_visible_releases_at_once() {
    let fixture = Fixture::new(1 << 20, true);
    let mut subscription = fixture.subscribe("a", 100);
    fixture.admit(transaction(200, &["a"])).await;
    fixture.release(100, "");
    assert_eq!(ready(&mut subscription).await, Some(vec![200]));
    assert_eq!(fixture.hub.window().watermark(), Lsn(100));
    fixture.release(300, "");
    assert_eq!(fixture.hub.window().watermark(), Lsn(210));
}

#[tokio::test(start_paused = true)]
async fn readers_of_a_thread_are_woken_together() {
    let fixture = Fixture::new(1 << 20, false);
    let (hub, wake_batch) = fixture.hub.with_wake_batch();
    let start = Position::at(Lsn(100));
    let mut subscription = Subscription::new(hub, tenant("a").into(), start.into(), start, None, 0);
    let waiting = tokio::spawn(async move { subscription.next(usize::MAX).await.map(|messages| messages.len()) });
    tokio::task::yield_now().await;
    fixture.admit(transaction(200, &["a"])).await;
    fixture.release(300, "");
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(!waiting.is_finished(), "woken by somebody else");
    tokio::spawn(wake_batch.run::<()>());
    assert_eq!(waiting.await.unwrap().unwrap(), 1);
}

/// Counts how often it wakes.
#[derive(Default)]
struct Bells(AtomicUsize);

impl Wake for Bells {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_has_everything_is_woken_without_another_poll() {
    let fixture = Fixture::new(1 << 20, false);
    let mut subscription = fixture.subscribe("a", 100);
    let woken = Arc::new(Bells::default());
    let waker = Waker::from(woken.clone());
    let next = |subscription: &mut Subscription, bytes_max| {
        let mut messages = VecDeque::new();
        let polled = subscription.poll_next(&mut Context::from_waker(&waker), bytes_max, &mut messages);
        let Poll::Ready(Ok(is_all)) = polled else { panic!("{polled:?}") };
        let commits: Vec<u64> = messages.iter().map(|item| item.message.header.commit.0.0).collect();
        (commits, is_all, woken.0.load(Ordering::Relaxed))
    };
    for commit in [200, 210, 220, 230] {
        fixture.admit(transaction(commit, &["a"])).await;
    }
    fixture.release(300, "230");
    assert_eq!(next(&mut subscription, 1), (vec![200], false, 0));
    assert_eq!(next(&mut subscription, usize::MAX), (vec![210, 220], true, 0));
    // Transactions that were not released yet.
    fixture.release(300, "");
    assert_eq!(next(&mut subscription, usize::MAX), (vec![230], true, 1));
    fixture.admit(transaction(240, &["a"])).await;
    let (from, to) = (Position::at(Lsn(250)), Position::at(Lsn(260)));
    fixture.hub.interrupt(Gap { tenant: None, from, to, reason: GapReason::SlotMoved, writers: Vec::new() });
    fixture.release(300, "");
    // There is another event to report.
    assert_eq!(next(&mut subscription, usize::MAX), (vec![240], false, 2));
    assert!(matches!(ended(&mut subscription).await, End::Gap(_)));
}

#[tokio::test(start_paused = true)]
async fn a_closed_hub_ends_present_and_future_readers() {
    let fixture = Fixture::new(1 << 20, false);
    let mut waiting = fixture.subscribe("a", 100);
    let ending = tokio::spawn(async move { ended(&mut waiting).await });
    tokio::task::yield_now().await;
    fixture.hub.close();
    assert!(matches!(ending.await.unwrap(), End::Closed));
    assert!(matches!(ended(&mut fixture.subscribe("a", 100)).await, End::Closed));
}

#[tokio::test(start_paused = true)]
async fn forgotten_messages_come_from_the_log() {
    let fixture = Fixture::new(1000, false);
    let mut slow = fixture.subscribe("a", 100);
    let mut idle = fixture.subscribe("b", 100);
    for n in 0..20 {
        let next = transaction(200 + n * 10, &["a"]);
        fixture.append(next.clone());
        fixture.admit(next).await;
    }
    fixture.admit(transaction(400, &["b"])).await;
    fixture.release(1000, "");
    let mut seen = Vec::new();
    while let Some(more) = ready(&mut slow).await {
        seen.extend(more);
    }
    assert_eq!(seen, (0..20).map(|n| 200 + n * 10).collect::<Vec<_>>());
    assert_eq!(ready(&mut idle).await, Some(vec![400]));
}

#[tokio::test(start_paused = true)]
async fn a_window_full_of_unlogged_messages_takes_no_more() {
    let fixture = Fixture::new(1000, false);
    let admitting = async {
        for n in 0..20 {
            fixture.admit(transaction(200 + n * 10, &["a"])).await;
        }
    };
    tokio::pin!(admitting);
    assert!(tokio::time::timeout(Duration::from_secs(60), &mut admitting).await.is_err());
    fixture.appended.send_replace(Lsn(1000));
    admitting.await;
}

#[tokio::test(start_paused = true)]
async fn a_staged_transaction_is_read_from_the_log_in_its_place() {
    let fixture = Fixture::new(1 << 20, false);
    let mut subscription = fixture.subscribe("a", 100);
    let large = Transaction { staged: true, ..transaction(300, &["a"]) };
    fixture.admit(transaction(200, &["a"])).await;
    fixture.admit(large.clone()).await;
    fixture.admit(transaction(400, &["a"])).await;
    fixture.release(1000, "");
    // Not before the log can give it.
    assert_eq!(ready(&mut subscription).await, Some(vec![200]));
    assert_eq!(ready(&mut subscription).await, None);
    fixture.append(transaction(200, &["a"]));
    let staged = crate::decode::assembler::Staged {
        commit: CommitLsn(Lsn(300)),
        messages: vec![(tenant("a"), message(300, None, &[0; 0]))],
    };
    fixture.log.append(&[Entry::Staged(Arc::new(staged))]).unwrap();
    fixture.append(large);
    fixture.release(1000, "");
    let mut seen = Vec::new();
    while let Some(more) = ready(&mut subscription).await {
        seen.extend(more);
    }
    seen.dedup();
    assert_eq!(seen, [300, 400]);
}

#[tokio::test(start_paused = true)]
async fn a_gap_ends_every_stream_that_it_concerns() {
    let fixture = Fixture::new(1 << 20, false);
    let mut before = fixture.subscribe("a", 100);
    let mut other = fixture.subscribe("b", 100);
    fixture.admit(transaction(200, &["a", "b"])).await;
    let gap = |name: Option<&str>, from, to| Gap {
        tenant: name.map(tenant),
        from: Position::at(Lsn(from)),
        to: Position::at(Lsn(to)),
        reason: GapReason::SlotMoved,
        writers: Vec::new(),
    };
    fixture.hub.interrupt(gap(Some("a"), 250, 260));
    fixture.admit(transaction(300, &["a", "b"])).await;
    fixture.release(1000, "");
    assert_eq!(ready(&mut before).await, Some(vec![200]));
    for _ in 0..2 {
        assert!(matches!(ended(&mut before).await, End::Gap(gap) if gap.to == Position::at(Lsn(260))));
    }
    assert_eq!(ready(&mut other).await, Some(vec![200, 300]));
    let mut inside = fixture.subscribe("a", 255);
    assert!(matches!(ended(&mut inside).await, End::Gap(_)));
    let mut after = fixture.subscribe("a", 260);
    assert_eq!(ready(&mut after).await, Some(vec![300]));

    fixture.hub.interrupt(gap(None, 310, 400));
    fixture.release(1000, "");
    assert!(matches!(ended(&mut other).await, End::Gap(gap) if gap.to == Position::at(Lsn(400))));
}

#[tokio::test(start_paused = true)]
async fn streams_that_have_seen_an_abandoned_part_end() {
    let fixture = Fixture::new(1 << 20, false);
    let mut ahead = fixture.subscribe("a", 100);
    let mut behind = fixture.subscribe("b", 100);
    let mut idle = fixture.subscribe("c", 100);
    fixture.admit(transaction(200, &["a", "b"])).await;
    fixture.admit(transaction(300, &["a"])).await;
    fixture.release(1000, "");
    assert_eq!(ready(&mut ahead).await, Some(vec![200, 300]));
    // There was nothing for it, and so nothing that was abandoned.
    assert_eq!(ready(&mut idle).await, None);
    let history = History::from_timelines(vec![FIRST, Timeline { number: 2, begin: Lsn(250) }]).unwrap();
    fixture.hub.diverge(Lsn(250), history);
    assert!(matches!(ended(&mut ahead).await, End::Abandoned { at: Lsn(250) }));
    assert_eq!(ready(&mut behind).await, Some(vec![200]));
    fixture.admit(transaction(260, &["b", "c"])).await;
    fixture.release(1000, "");
    assert_eq!(ready(&mut behind).await, Some(vec![260]));
    assert_eq!(ready(&mut idle).await, Some(vec![260]));
}

/// A primary with scripted answers.
struct Scripted {
    look: Result<PrimaryState, Unreachable>,
    status: TransactionStatus,
    mark: Lsn,
}

impl Primary for Scripted {
    async fn look(&self, _: &Scope) -> Result<PrimaryState, Unreachable> {
        self.look.clone()
    }
    async fn transaction_status(&self, _: Xid8) -> Result<TransactionStatus, Unreachable> {
        Ok(self.status)
    }
    async fn mark(&self) -> Result<Lsn, Unreachable> {
        Ok(self.mark)
    }
}

fn look(snapshot: &str) -> PrimaryState {
    let snapshot = Arc::new(snapshot.parse().unwrap());
    PrimaryState { flush_lsn: Lsn(500), snapshot, scope_exists: true }
}

fn primary(tenant_exists: bool) -> Scripted {
    let look = PrimaryState { scope_exists: tenant_exists, ..look("200:230:200") };
    Scripted { look: Ok(look), status: TransactionStatus::Over, mark: Lsn(205) }
}

fn position_token(timeline: Timeline, source: Source, lsn: u64) -> String {
    SnapToken::Position {
        source: source.id(),
        timeline: timeline.id(),
        place: Place::at(Lsn(lsn)),
        commit_time: CommitTime(0),
    }
    .to_string()
}

async fn start(fixture: &Fixture, primary: &Scripted, name: &str, token: &str) -> Result<Subscription, String> {
    fixture
        .hub
        .start(primary, tenant(name).into(), token, Duration::from_secs(10))
        .await
        .map_err(|error| format!("{error:?}"))
}

#[tokio::test(start_paused = true)]
async fn a_start_now_delivers_everything_outside_its_snapshot() {
    let fixture = Fixture::new(1 << 20, false);
    let primary = Scripted { look: Ok(PrimaryState { flush_lsn: Lsn(230), ..look("200:230:200") }), ..primary(true) };
    let mut subscription = start(&fixture, &primary, "a", "").await.unwrap();
    // 200 committed before the flush position, and the snapshot does not see it; 210 it sees; 230 is after.
    for commit in [200, 210, 230] {
        fixture.admit(transaction(commit, &["a"])).await;
    }
    fixture.release(1000, "");
    assert_eq!(ready(&mut subscription).await, Some(vec![200, 230]));
}

#[tokio::test(start_paused = true)]
async fn logged_but_invisible_transactions_wait_after_a_restart() {
    let before = Fixture::new(1 << 20, false);
    for commit in [200, 210, 230] {
        before.append(transaction(commit, &["a"]));
    }
    before.log.append(&[Entry::Watermark(Lsn(210))]).unwrap();
    let options = Options { window_bytes: 1 << 20, before_visible: false };
    let hub = Hub::new(before.log.clone(), before.appended.subscribe(), options).unwrap();
    let after = Fixture { hub, ..before };
    let mut resumed = after.subscribe("a", 100);
    after.release(1000, "210");
    assert_eq!(ready(&mut resumed).await, Some(vec![200]));
    // Its snapshot does not see 210, which has been in the log for long.
    let mut now = start(
        &after,
        &Scripted { look: Ok(PrimaryState { flush_lsn: Lsn(240), ..look("210:240:210") }), ..primary(true) },
        "a",
        "",
    )
    .await
    .unwrap();
    after.release(1000, "");
    assert_eq!(ready(&mut resumed).await, Some(vec![210, 230]));
    assert_eq!(ready(&mut now).await, Some(vec![210]));
}

#[tokio::test(start_paused = true)]
async fn a_divergence_ends_a_pending_start() {
    let fixture = Fixture::new(1 << 20, false);
    fixture.admit(transaction(200, &["a"])).await;
    fixture.release(1000, "");
    let anchor = fixture.hub.window().anchor();
    let history = History::from_timelines(vec![FIRST, Timeline { number: 2, begin: Lsn(150) }]).unwrap();
    fixture.hub.diverge(Lsn(150), history);
    let watermark = Position::at(anchor.watermark);
    let mut late = Subscription::new(
        fixture.hub.clone(),
        tenant("a").into(),
        watermark.into(),
        watermark,
        None,
        anchor.divergences,
    );
    assert!(matches!(ended(&mut late).await, End::Abandoned { at: Lsn(150) }));
}

#[tokio::test(start_paused = true)]
async fn invalid_starts_are_refused() {
    let fixture = Fixture::new(1 << 20, false);
    fixture.append(transaction(200, &["a"]));
    let check = async |primary: Scripted, name: &str, token: String, expected: &str| {
        let error = start(&fixture, &primary, name, &token).await.map(|_| ()).unwrap_err();
        assert!(error.starts_with(expected), "{error}");
    };
    let other = Source { system_identifier: 9, database_oid: 2 };
    let second = Timeline { number: 2, begin: Lsn(250) };
    let down = || Scripted { look: Err(Unreachable::NoSession), ..primary(true) };
    check(primary(true), "a", "?".into(), "Token(NotBase64)").await;
    check(primary(false), "unknown", String::new(), "UnknownTenant").await;
    check(down(), "unknown", String::new(), "Unreachable").await;
    check(down(), "a", String::new(), "Unreachable").await;
    check(primary(true), "a", position_token(FIRST, other, 200), "Foreign").await;
    check(primary(true), "a", position_token(second, SOURCE, 300), "Abandoned").await;
    check(primary(true), "a", position_token(FIRST, SOURCE, 501), "BeyondHistory").await;
    check(primary(true), "a", position_token(FIRST, SOURCE, 99), "TooOld").await;
    // Resolved from the log, without PostgreSQL.
    assert!(start(&fixture, &down(), "a", &position_token(FIRST, SOURCE, 100)).await.is_ok());
    // Ahead of us, and not of the server.
    assert!(start(&fixture, &primary(true), "a", &position_token(FIRST, SOURCE, 500)).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn transaction_tokens_resolve_to_their_transaction() {
    let fixture = Fixture::new(1 << 20, false);
    fixture.append(transaction(200, &["a"]));
    let token = |id: u8, floor: u64| {
        let id = TokenId([id; 16]);
        SnapToken::Transaction { source: SOURCE.id(), id, xid: Xid8(1), floor: Lsn(floor) }.to_string()
    };
    let position = |subscription: Subscription| subscription.place().position;
    let found = start(&fixture, &primary(true), "a", &token(200, 150)).await.map(position);
    assert_eq!(found, Ok(Position::at(Lsn(210))));
    // The stream is past the mark and there was no such id: a rolled-back savepoint.
    let lost = start(&fixture, &primary(true), "a", &token(7, 150)).await.map(position);
    assert_eq!(lost, Ok(Position::at(Lsn(150))));
    let old = start(&fixture, &primary(true), "a", &token(7, 50)).await.map(position).unwrap_err();
    assert!(old.starts_with("TooOld"), "{old}");
    let running = Scripted { status: TransactionStatus::InProgress, ..primary(true) };
    let running = start(&fixture, &running, "a", &token(7, 150)).await.map(position).unwrap_err();
    assert!(running.starts_with("StillRunning"), "{running}");
}

#[tokio::test(start_paused = true)]
async fn permifys_tokens_resolve_to_their_transaction() {
    let fixture = Fixture::new(1 << 20, false);
    for commit in [200, 210, 220] {
        fixture.append(transaction(commit, &["a"]));
    }
    let check = async |primary: Scripted, token: SnapToken| {
        start(&fixture, &primary, "a", &token.to_string()).await.map(|subscription| subscription.place().position.lsn.0)
    };
    let at = async |xid: u64| check(primary(true), SnapToken::Xid(Xid8(xid))).await;
    assert_eq!(at(210).await, Ok(220));
    // Over, and the stream is past it.
    assert!(at(150).await.unwrap_err().starts_with("UnknownTransaction"));
    let with = |status| Scripted { status, ..primary(true) };
    let running = check(with(TransactionStatus::InProgress), SnapToken::Xid(Xid8(150))).await;
    assert!(running.unwrap_err().starts_with("StillRunning"));
    let forged = check(with(TransactionStatus::Unassigned), SnapToken::Xid(Xid8(1 << 60))).await;
    assert!(forged.unwrap_err().starts_with("BeyondHistory"));
    assert_eq!(fixture.hub.transaction_before(CommitLsn(Lsn(220))).await.unwrap(), Some(Xid8(210)));

    let history = History::from_timelines(vec![FIRST, Timeline { number: 2, begin: Lsn(225) }]).unwrap();
    fixture.log.append(&[Entry::Diverge { at: Lsn(225), history }]).unwrap();
    assert_eq!(at(220).await, Err("Abandoned".into()));
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_token_starts_at_everything_outside_its_snapshot() {
    let fixture = Fixture::new(1 << 20, false);
    let mut transactions = Vec::new();
    // The ids are not in the order of the commits.
    for (commit, xid) in [(200, 60), (210, 63), (220, 61), (230, 70), (240, 65), (250, 64)] {
        let mut next = transaction(commit, &["a"]);
        next.header.xid = Xid8(xid);
        for (_, message) in &mut next.messages {
            message.header.xid = Xid8(xid);
        }
        transactions.push(next);
    }
    for next in transactions {
        fixture.append(next.clone());
        fixture.admit(next).await;
    }
    fixture.release(1000, "");
    let check = async |xid: u64, snapshot: &str| {
        let token = SnapToken::Snapshot { xid: Xid8(xid), snapshot: snapshot.parse().unwrap() }.to_string();
        let mut subscription = start(&fixture, &primary(true), "a", &token).await?;
        Ok::<_, String>(ready(&mut subscription).await)
    };
    // 61 was running and has committed since; 64 is the writer's own; 65 and 70 began later.
    assert_eq!(check(64, "61:65:61").await, Ok(Some(vec![220, 230, 240])));
    // 63 had committed, but was not visible yet.
    assert_eq!(check(64, "63:64:63").await, Ok(Some(vec![210, 230, 240])));
    assert_eq!(check(70, "61:71:61,64,65").await, Ok(Some(vec![220, 240, 250])));
    // None that it sees is in the log, which began before it was taken; and after.
    assert_eq!(check(60, "60:60:").await, Ok(Some(vec![210, 220, 230, 240, 250])));
    assert!(check(60, "49:49:").await.unwrap_err().starts_with("UnknownTransaction"));
    assert!(check(66, "61:66:61").await.unwrap_err().starts_with("UnknownTransaction"));
}

/// Counts, and has no transaction running.
struct Counted(Arc<AtomicUsize>);

impl releaser::Snapshots for Counted {
    type Error = Unreachable;

    async fn take(&mut self) -> Result<Snapshot, Unreachable> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok("1000:1000:".parse().unwrap())
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_releaser_probes_visibility_now_and_then() {
    let fixture = Fixture::new(10_000, false);
    let taken = Arc::new(AtomicUsize::new(0));
    let releasing = tokio::spawn(releaser::run(fixture.hub.clone(), Counted(taken.clone())));
    tokio::time::sleep(Duration::from_secs(60)).await;
    let idle = taken.load(Ordering::Relaxed);
    assert!((10..=15).contains(&idle), "{idle} snapshots in a minute of nothing");
    let mut subscription = fixture.subscribe("a", 100);
    assert_eq!(ready(&mut subscription).await, None);
    fixture.admit(transaction(200, &["a"])).await;
    assert_eq!(ready(&mut subscription).await, Some(vec![200]), "and what comes is not kept for the next look");
    releasing.abort();
}

#[tokio::test(start_paused = true)]
async fn the_oldest_waiting_transaction_is_reported() {
    let fixture = Fixture::new(10_000, false);
    assert_eq!(fixture.hub.waits(), Waits::default());
    let began = tokio::time::Instant::now();
    fixture.admit(transaction(200, &["a"])).await;
    tokio::time::advance(Duration::from_secs(1)).await;
    fixture.admit(transaction(300, &["a"])).await;
    fixture.hub.progress(Lsn(400));
    assert_eq!(fixture.hub.waits().unreleased_since, Some(began));
    fixture.release(301, "300");
    assert_eq!(fixture.hub.waits().unreleased_since, Some(began + Duration::from_secs(1)));
    fixture.release(301, "");
    assert_eq!(fixture.hub.waits(), Waits::default(), "progress is nothing to release");

    // No room until the log has the messages in memory.
    let fixture = Fixture::new(100, false);
    fixture.admit(transaction(200, &["a"])).await;
    let hub = fixture.hub.clone();
    let waiting = tokio::spawn(async move { hub.admit(Arc::new(transaction(300, &["a"]))).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(fixture.hub.waits().full_since.is_some());
    fixture.append(transaction(200, &["a"]));
    waiting.await.unwrap();
    assert_eq!(fixture.hub.waits().full_since, None);
}

/// A made envelope of this size, as somebody makes it who reads the first message after `position`.
async fn make_json(fixture: &Fixture, position: u64, made: &AtomicUsize, bytes: usize) -> Arc<Item> {
    let mut subscription = fixture.subscribe("t1", position);
    let item = subscription.next(1).await.unwrap().pop_front().unwrap();
    make_json_of(fixture, &item, made, bytes);
    item
}

fn make_json_of(fixture: &Fixture, item: &Item, made: &AtomicUsize, bytes: usize) {
    let json = fixture.hub.envelope(item, EnvelopeForm::BaseV1Json, |_| {
        made.fetch_add(1, Ordering::Relaxed);
        Ok::<_, ()>(vec![0; bytes].into())
    });
    assert_eq!(json.unwrap().len(), bytes);
}

#[tokio::test]
async fn an_envelope_is_made_once_for_all_threads_and_again_after_an_error() {
    const READERS: usize = 20;
    let fixture = Fixture::new(1 << 20, true);
    fixture.admit(transaction(200, &["t1"])).await;
    fixture.release(1000, "");
    let item = fixture.subscribe("t1", 100).next(1).await.unwrap().pop_front().unwrap();
    let failed = fixture.hub.envelope(&item, EnvelopeForm::BaseV1Json, |_| Err("malformed"));
    assert_eq!(failed, Err("malformed"));

    let (made, together) = (AtomicUsize::new(0), std::sync::Barrier::new(READERS));
    std::thread::scope(|scope| {
        for _ in 0..READERS {
            scope.spawn(|| {
                together.wait();
                make_json_of(&fixture, &item, &made, 1000);
            });
        }
    });
    assert_eq!(made.into_inner(), 1);
    assert!(item.made(EnvelopeForm::BaseV1Frame).is_none());
}

#[tokio::test]
async fn envelopes_are_counted_and_what_is_older_makes_room_for_them() {
    let each = transaction(200, &["t1"]).bytes();
    let fixture = Fixture::new(3 * each, true);
    let (made, bytes) = (AtomicUsize::new(0), || fixture.hub.usage().bytes);
    let made_so_far = || made.load(Ordering::Relaxed);
    fixture.append(transaction(200, &["t1"]));
    fixture.append(transaction(300, &["t1"]));
    for commit in [200, 300] {
        fixture.admit(transaction(commit, &["t1"])).await;
    }
    fixture.release(1000, "");

    // There is room for one.
    let first = make_json(&fixture, 100, &made, each).await;
    assert_eq!((made_so_far(), bytes()), (1, 3 * each));
    make_json_of(&fixture, &first, &made, each);
    assert_eq!((made_so_far(), bytes()), (1, 3 * each), "it is kept, and counted once");

    // The oldest goes for the envelope of one that is newer, with its own.
    let second = make_json(&fixture, 210, &made, 2 * each).await;
    assert_eq!((made_so_far(), bytes()), (2, 3 * each));
    let again = make_json(&fixture, 100, &made, each).await;
    assert!(!Arc::ptr_eq(&first, &again), "it was read from the log");
    assert_eq!((made_so_far(), bytes()), (3, 3 * each), "what is not in the window is not counted");

    // What is left after all has gone.
    fixture.hub.diverge(Lsn(250), History::first());
    assert_eq!(bytes(), 0);
    drop(second);
}

#[tokio::test]
async fn without_room_an_envelope_is_not_kept() {
    let each = transaction(200, &["t1"]).bytes();
    let fixture = Fixture::new(3 * each, true);
    let made = AtomicUsize::new(0);
    for commit in [200, 300] {
        fixture.admit(transaction(commit, &["t1"])).await;
    }
    fixture.release(1000, "");
    // The log has nothing yet, so nothing can be forgotten.
    let item = make_json(&fixture, 210, &made, 2 * each).await;
    make_json_of(&fixture, &item, &made, 2 * each);
    assert_eq!((made.load(Ordering::Relaxed), fixture.hub.usage().bytes), (2, 2 * each));

    // Newer messages are not evicted for an older one, and nothing is evicted in vain.
    fixture.append(transaction(200, &["t1"]));
    fixture.append(transaction(300, &["t1"]));
    make_json(&fixture, 100, &made, 2 * each).await;
    make_json(&fixture, 210, &made, 4 * each).await;
    assert_eq!((made.load(Ordering::Relaxed), fixture.hub.usage().bytes), (4, 2 * each));
    // From then on each reader makes its own, and none waits for another.
    fixture.hub.diverge(Lsn(250), History::first());
    make_json_of(&fixture, &item, &made, 4 * each);
    assert_eq!((made.into_inner(), fixture.hub.usage().bytes), (5, each));
}

#[test]
fn readers_of_the_log_share_long_messages_while_one_holds_them() {
    let items = item::LongItems::default();
    let long = |byte: u8, bytes: usize| TenantMessage {
        tenant: tenant("a"),
        message: Message { changes: vec![byte; bytes].into(), ..message(100, Some(110), &[1]) },
        ends_transaction: None,
    };
    let first = items.share(long(1, item::LONG_BYTES));
    assert!(Arc::ptr_eq(&first, &items.share(long(1, item::LONG_BYTES))));
    assert!(!Arc::ptr_eq(&first, &items.share(long(2, item::LONG_BYTES))), "another message in the same place");
    let short = long(1, item::LONG_BYTES - 1);
    assert!(!Arc::ptr_eq(&items.share(short.clone()), &items.share(short)), "not worth it");

    // Bytes that wait to be sent keep it, too.
    let first = items.share(long(3, item::LONG_BYTES));
    let weak = Arc::downgrade(&first);
    let sent = first.keep(vec![0; item::LONG_BYTES].into());
    drop(first);
    assert!(Arc::ptr_eq(&weak.upgrade().unwrap(), &items.share(long(3, item::LONG_BYTES))));
    drop(sent);
    assert!(weak.upgrade().is_none());
}

/// A look inside a transaction of very many tenants begins where the reader is.
#[tokio::test(start_paused = true)]
async fn a_stream_of_all_tenants_takes_a_transaction_of_many_in_small_steps() {
    let fixture = Fixture::new(1 << 30, true);
    let names: Vec<String> = (0..5_000).map(|n| format!("{n:05}")).collect();
    fixture.admit(transaction(200, &names.iter().map(String::as_str).collect::<Vec<_>>())).await;
    fixture.release(1000, "");
    let mut subscription = fixture.subscribe_to_all();
    let mut received = Vec::new();
    while received.len() < names.len() {
        for item in subscription.next(1).await.unwrap() {
            received.push(item.tenant.as_str().to_owned());
        }
    }
    assert_eq!(received, names);
    assert_eq!(subscription.place(), &Place::at(Lsn(210)));
}

#[test]
fn the_overhead_of_a_message_covers_its_item() {
    let places = 2 * size_of::<Arc<Item>>();
    let counters = 2 * size_of::<usize>();
    assert!(size_of::<Item>() + counters + places < crate::model::transaction::MESSAGE_OVERHEAD_BYTES);
}

/// A transaction with a change of each tenant, whose row of `broken` does not decode, after `steps`.
fn with_gap(commit: u64, tenants: &[&str], broken: &[(Option<&str>, u64)]) -> Transaction {
    let mut transaction = transaction(commit, tenants);
    for (name, steps) in broken {
        let gap = Gap {
            tenant: name.map(tenant),
            from: Position::inside(CommitLsn(Lsn(commit)), *steps),
            to: Position::at(Lsn(commit + 10)),
            reason: GapReason::SlotMoved,
            writers: Vec::new(),
        };
        let ended = transaction.messages.iter_mut().filter(|(tenant, _)| gap.concerns(&tenant.clone().into()));
        ended.for_each(|(_, message)| message.end = None);
        transaction.gaps.push(gap);
    }
    transaction
}

/// A window that holds everything, and one that holds next to nothing.
const WINDOWS: [usize; 2] = [1 << 20, 1];

#[tokio::test(start_paused = true)]
async fn all_tenants_come_in_commit_order_and_then_by_tenant() {
    for window_bytes in WINDOWS {
        let fixture = Fixture::new(window_bytes, false);
        let mut subscription = fixture.subscribe_to_all();
        for next in [
            transaction(200, &["b", "a"]),
            transaction(210, &["c"]),
            with_gap(300, &["c", "a", "b"], &[(Some("b"), 3)]),
            // One that has nothing but what does not decode, behind all others.
            with_gap(310, &["a", "b"], &[(Some("x"), 0), (Some("b"), 2)]),
            with_gap(400, &["b", "c", "a"], &[(Some("b"), 1), (None, 3)]),
            transaction(500, &["a"]),
        ] {
            fixture.append(next.clone());
            fixture.admit(next).await;
        }
        fixture.release(1000, "");
        assert_eq!(
            stream_of_all(&fixture, &mut subscription).await,
            "a200:1 b200:1 c210:1 a300:1 b300:1 !b c300:1 a310:1 b310:1 !b !x a400:1 b400:1 !b c400:1 !all a500:1",
            "{window_bytes}"
        );
        // It waits, and is woken by whichever tenant.
        let next = transaction(600, &["z"]);
        fixture.append(next.clone());
        fixture.admit(next).await;
        fixture.release(1000, "");
        assert_eq!(stream_of_all(&fixture, &mut subscription).await, "z600:1");
    }
}

#[tokio::test(start_paused = true)]
async fn all_tenants_resume_from_the_token_of_one() {
    for window_bytes in WINDOWS {
        let fixture = Fixture::new(window_bytes, false);
        let next = transaction(200, &["c", "b", "a"]);
        fixture.append(next.clone());
        fixture.admit(next).await;
        fixture.release(1000, "");
        // The token includes step 1 of tenant c, and so of every tenant. Steps 2 and 3 of b and a are still to come.
        let of_one = Position::inside(CommitLsn(Lsn(200)), 1);
        let mut subscription = Subscription::new(fixture.hub.clone(), Scope::All, of_one.into(), of_one, None, 0);
        assert_eq!(stream_of_all(&fixture, &mut subscription).await, "a200:1 b200:1");
        assert_eq!(subscription.place(), &Place::at(Lsn(210)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_staged_transaction_of_all_tenants_comes_from_the_log() {
    let fixture = Fixture::new(1 << 20, false);
    let mut subscription = fixture.subscribe_to_all();
    let large = Transaction { staged: true, ..transaction(300, &["b"]) };
    for next in [transaction(200, &["a"]), large.clone(), transaction(400, &["a"])] {
        fixture.admit(next).await;
    }
    fixture.append(transaction(200, &["a"]));
    let messages = vec![(tenant("c"), message(300, None, &[1])), (tenant("a"), message(300, None, &[2]))];
    let staged = crate::decode::assembler::Staged { commit: CommitLsn(Lsn(300)), messages };
    fixture.log.append(&[Entry::Staged(Arc::new(staged))]).unwrap();
    fixture.append(large);
    fixture.append(transaction(400, &["a"]));
    fixture.release(1000, "");
    assert_eq!(stream_of_all(&fixture, &mut subscription).await, "a200:1 a300:1 b300:1 c300:1 a400:1");
}

#[tokio::test(start_paused = true)]
async fn a_stream_of_all_tenants_starts_now_and_after_tokens() {
    let fixture = Fixture::new(1 << 20, false);
    for next in [transaction(200, &["a"]), transaction(210, &["b", "a"]), transaction(220, &["c"])] {
        fixture.append(next.clone());
        fixture.admit(next).await;
    }
    fixture.release(210, "");
    let token = |place: Place| {
        let (source, timeline) = (SOURCE.id(), FIRST.id());
        SnapToken::Position { source, timeline, place, commit_time: CommitTime(0) }.to_string()
    };
    let between = Place::inside(Position::at(Lsn(210)), tenant("a"), Place::WHOLE);
    let after = SnapToken::Transaction { source: SOURCE.id(), id: TokenId([200; 16]), xid: Xid8(200), floor: Lsn(1) };
    for (token, expected) in [
        // 200 is visible to the snapshot, and 210 is not.
        (String::new(), "a210:1 b210:1 c220:1"),
        (token(Place::at(Lsn(210))), "a210:1 b210:1 c220:1"),
        (token(between), "b210:1 c220:1"),
        (after.to_string(), "a210:1 b210:1 c220:1"),
        (SnapToken::Xid(Xid8(200)).to_string(), "a210:1 b210:1 c220:1"),
    ] {
        let primary = Scripted { look: Ok(PrimaryState { flush_lsn: Lsn(230), ..look("210:210:") }), ..primary(false) };
        let started = fixture.hub.start(&primary, Scope::All, &token, Duration::from_secs(10)).await;
        let mut subscription = started.unwrap_or_else(|error| panic!("{token}: {error}"));
        fixture.release(300, "");
        assert_eq!(stream_of_all(&fixture, &mut subscription).await, expected, "{token}");
    }
}
