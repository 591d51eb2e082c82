//! One suite for every implementation of the contract, and the real log against the model under crashes.

use super::reference::{Inner, ModelLog};
use super::*;
use crate::model::lsn::{CommitLsn, CommitTime, EndLsn, Xid8};
use crate::model::timeline::Timeline;
use crate::model::transaction::{GapReason, Header, Message};
use proptest::prelude::*;
use std::time::{SystemTime, UNIX_EPOCH};

fn tenant(name: &str) -> TenantId {
    TenantId::new(name).unwrap()
}

fn header(commit: u64) -> Header {
    Header { commit: CommitLsn(Lsn(commit)), xid: Xid8(commit), commit_time: CommitTime(7) }
}

fn message(commit: u64, end: Option<u64>, steps: &[u64]) -> Message {
    Message::of_tuples(header(commit), steps.iter().copied(), end)
}

fn transaction(commit: u64, tenants: &[&str]) -> Entry {
    let end = commit + 10;
    Entry::Transaction(Arc::new(Transaction {
        header: header(commit),
        end: EndLsn(Lsn(end)),
        messages: tenants
            .iter()
            .zip(1..)
            .map(|(name, n)| (tenant(name), message(commit, Some(end), &[n * 2, n * 2 + 1])))
            .collect(),
        staged: false,
        gaps: vec![],
        token_ids: vec![TokenId([commit as u8; 16])],
        tallies: vec![],
    }))
}

fn staged(commit: u64, name: &str, steps: &[u64]) -> Entry {
    let messages = vec![(tenant(name), message(commit, None, steps))];
    Entry::Staged(Arc::new(Staged { commit: CommitLsn(Lsn(commit)), messages }))
}

/// The transaction, changed.
fn with(entry: Entry, change: impl FnOnce(&mut Transaction)) -> Entry {
    let Entry::Transaction(whole) = entry else { unreachable!() };
    let mut transaction = (*whole).clone();
    change(&mut transaction);
    Entry::Transaction(Arc::new(transaction))
}

/// The end of a transaction all of whose messages were staged.
fn end_of_staged(commit: u64) -> Entry {
    with(transaction(commit, &[]), |transaction| transaction.staged = true)
}

/// A transaction with a row of tenant b that does not decode, and then, where `truncated`, a TRUNCATE.
fn with_gaps(commit: u64, names: &[&str], truncated: bool) -> Entry {
    with(transaction(commit, names), |transaction| {
        let gap = |name, steps| Gap {
            from: Position::inside(CommitLsn(Lsn(commit)), steps),
            to: Position::after(transaction.end),
            ..gap(name, 0, 0)
        };
        transaction.gaps.push(gap(Some("b"), 10));
        transaction.gaps.extend(truncated.then(|| gap(None, 12)));
        for (name, message) in &mut transaction.messages {
            if truncated || name.as_str() == "b" {
                message.end = None;
            }
        }
    })
}

fn adopt() -> Entry {
    let source = Source { system_identifier: 5, database_oid: 6 };
    Entry::Adopt(Origin { source, history: History::first(), lsn: Lsn(50), xid: Xid8(45) })
}

fn gap(name: Option<&str>, from: u64, to: u64) -> Gap {
    Gap {
        tenant: name.map(tenant),
        from: Position::at(Lsn(from)),
        to: Position::at(Lsn(to)),
        reason: GapReason::SlotMoved,
        writers: Vec::new(),
    }
}

fn options(path: &std::path::Path) -> Options {
    Options { path: path.to_owned(), age_seconds: 3600, size_bytes: 1 << 30, reserve_bytes: 0 }
}

fn scope(name: &str) -> Scope {
    Scope::Tenant(tenant(name))
}

/// What a tenant's reader gets, as commit LSNs with the number of changes.
fn reads(log: &dyn ChangeLog, name: &str, after: Position) -> Vec<(u64, usize)> {
    let batch = log.read(&scope(name), &after.into(), &Position::MAX.into(), usize::MAX).unwrap();
    batch.messages.iter().map(|found| (found.message.header.commit.0.0, found.message.steps.len())).collect()
}

/// All that a reader of this scope gets, in reads of `bytes_max` each.
fn all_of(log: &dyn ChangeLog, scope: &Scope, after: &Place, bytes_max: usize) -> Vec<TenantMessage> {
    let (mut found, mut place) = (Vec::new(), after.clone());
    loop {
        let batch = log.read(scope, &place, &Position::MAX.into(), bytes_max).unwrap();
        for recorded in batch.messages {
            place = recorded.reached(scope, &place);
            found.push(recorded);
        }
        if !batch.more {
            return found;
        }
    }
}

/// What a reader of all gets: tenants with commit LSNs and steps, `|` behind what ends a transaction.
fn reads_all(log: &dyn ChangeLog, after: &Place) -> String {
    let show = |recorded: &TenantMessage| {
        let (tenant, message) = (&recorded.tenant, &recorded.message);
        let (commit, steps) = (message.header.commit, message.steps.len());
        let end = if recorded.ends_transaction.is_some() { "|" } else { "" };
        format!("{tenant}{}:{steps}{end}", commit.0.0)
    };
    let found = log.read(&Scope::All, after, &Position::MAX.into(), usize::MAX).unwrap();
    found.messages.iter().map(show).collect::<Vec<_>>().join(" ")
}

/// The contract, for any implementation.
fn conforms(log: &dyn ChangeLog) {
    assert_eq!(log.state().origin, None);
    log.append(&[adopt(), transaction(100, &["a", "b"]), transaction(110, &["a"]), Entry::Progress(Lsn(200))]).unwrap();
    assert_eq!(log.state().tail, Lsn(200));
    assert_eq!(reads(log, "a", Position::ZERO), [(100, 2), (110, 2)]);
    assert_eq!(reads(log, "b", Position::ZERO), [(100, 2)]);
    assert_eq!(reads(log, "c", Position::ZERO), []);
    assert!(log.knows(&tenant("a")).unwrap() && !log.knows(&tenant("c")).unwrap());
    assert_eq!(log.horizon(&scope("c")).unwrap(), Position::at(Lsn(50)));

    // One transaction ends where the next one commits.
    assert_eq!(reads(log, "a", Position::at(Lsn(110))), [(110, 2)]);
    assert_eq!(reads(log, "a", Position::inside(CommitLsn(Lsn(100)), 2)), [(100, 1), (110, 2)]);
    assert_eq!(reads(log, "a", Position::at(Lsn(120))), []);
    let up_to = log.read(&scope("a"), &Place::default(), &Position::at(Lsn(110)).into(), usize::MAX).unwrap();
    assert_eq!((up_to.messages.len(), up_to.more), (1, false));
    let bounded = log.read(&scope("a"), &Place::default(), &Position::MAX.into(), 1).unwrap();
    assert_eq!((bounded.messages.len(), bounded.more), (1, true));

    // All tenants: commit order, then tenant order; resumed from anywhere.
    assert_eq!(reads_all(log, &Place::default()), "a100:2 b100:2| a110:2|");
    let inside = |name: &str, steps| Place::inside(Position::at(Lsn(100)), tenant(name), steps);
    assert_eq!(reads_all(log, &inside("a", 2)), "a100:1 b100:2| a110:2|");
    assert_eq!(reads_all(log, &inside("a", Place::WHOLE)), "b100:2| a110:2|");
    assert_eq!(reads_all(log, &inside("aa", 0)), "b100:2| a110:2|");
    assert_eq!(reads_all(log, &inside("b", 4)), "b100:1| a110:2|");
    assert_eq!(reads_all(log, &inside("b", Place::WHOLE)), "a110:2|");
    // The token of one tenant: tenants above have had those steps, too.
    let of_one = Position::inside(CommitLsn(Lsn(100)), 4);
    assert_eq!(reads_all(log, &of_one.into()), "b100:1| a110:2|");
    assert_eq!(reads_all(log, &Place::inside(of_one, tenant("a"), Place::WHOLE)), "b100:1| a110:2|");
    let up_to = log.read(&Scope::All, &Place::default(), &inside("a", Place::WHOLE), usize::MAX).unwrap();
    assert_eq!((up_to.messages.len(), up_to.more), (1, false));
    assert_eq!(log.horizon(&Scope::All).unwrap(), Position::at(Lsn(50)));

    // Staged messages are readable with their transaction, and not before.
    log.append(&[staged(300, "a", &[100]), staged(300, "a", &[101])]).unwrap();
    assert_eq!(reads(log, "a", Position::at(Lsn(120))), []);
    log.append(&[Entry::Discard, transaction(220, &["b"])]).unwrap();
    assert_eq!(reads(log, "a", Position::at(Lsn(120))), []);
    log.append(&[staged(300, "a", &[5, 6]), end_of_staged(300)]).unwrap();
    assert_eq!(reads(log, "a", Position::at(Lsn(120))), [(300, 2)]);
    assert_eq!(reads(log, "a", Position::inside(CommitLsn(Lsn(300)), 5)), [(300, 1)]);
    assert_eq!(reads_all(log, &Place::at(Lsn(120))), "b220:2| a300:2|");

    let since = |from: u64| log.transactions_since(Lsn(from)).unwrap();
    assert_eq!(since(111), [(EndLsn(Lsn(230)), Xid8(220)), (EndLsn(Lsn(310)), Xid8(300))]);
    assert_eq!(since(110).len(), 3);
    log.append(&[Entry::Watermark(Lsn(230))]).unwrap();
    assert_eq!(log.state().watermark, Lsn(230));

    // What is there already is ignored, and not taken for a transaction that is open.
    log.append(&[staged(100, "a", &[1]), Entry::Discard]).unwrap();
    assert_eq!(reads(log, "a", Position::ZERO), [(100, 2), (110, 2), (300, 2)]);
    log.append(&[transaction(100, &["c"])]).unwrap();
    assert_eq!(reads(log, "c", Position::ZERO), []);

    assert_eq!(log.find_token(TokenId([110; 16])).unwrap(), Some(EndLsn(Lsn(120))));
    assert_eq!(log.find_token(TokenId([1; 16])).unwrap(), None);

    let committed = |commit: u64| {
        Some(TransactionOutcome::Committed { commit: CommitLsn(Lsn(commit)), end: EndLsn(Lsn(commit + 10)) })
    };
    let find = |xid: u64| log.find_transaction(&scope("c"), Xid8(xid)).unwrap();
    let before = |commit: u64| log.transaction_before(CommitLsn(Lsn(commit))).unwrap();
    let below = |xid: u64| log.largest_below(Xid8(xid)).unwrap();
    assert_eq!([100, 110, 300, 99].map(find), [committed(100), committed(110), committed(300), None]);
    assert_eq!(
        [100, 101, 110, 300, 1000].map(before),
        [None, Some(100), Some(100), Some(220), Some(300)].map(|x| x.map(Xid8))
    );
    assert_eq!(
        [100, 101, 1000].map(below),
        [None, Some((Xid8(100), CommitLsn(Lsn(100)))), Some((Xid8(300), CommitLsn(Lsn(300))))]
    );
    // Without changes there is nothing of it to find.
    let Entry::Transaction(empty) = transaction(310, &[]) else { unreachable!() };
    log.append(&[Entry::Transaction(empty)]).unwrap();
    assert_eq!((find(310), before(400), since(310)), (None, Some(Xid8(300)), vec![]));

    log.append(&[Entry::Gap(gap(Some("a"), 310, 320)), Entry::Gap(gap(None, 330, 400))]).unwrap();
    assert_eq!(log.gaps(), [gap(Some("a"), 310, 320), gap(None, 330, 400)]);
    assert_eq!(log.state().tail, Lsn(400));

    // The server goes on along another timeline: 300 ends at 310, past the switch.
    let history = History::from_timelines(vec![
        Timeline { number: 1, begin: Lsn::ZERO },
        Timeline { number: 2, begin: Lsn(305) },
    ])
    .unwrap();
    log.append(&[Entry::Diverge { at: Lsn(305), history: history.clone() }]).unwrap();
    assert_eq!(log.state().tail, Lsn(305));
    assert_eq!(log.state().origin.unwrap().history, history);
    assert_eq!(reads(log, "a", Position::at(Lsn(120))), []);
    assert_eq!(reads(log, "a", Position::ZERO), [(100, 2), (110, 2)]);
    assert_eq!(reads(log, "b", Position::at(Lsn(120))), [(220, 2)]);
    assert_eq!(log.gaps(), []);
    // An id that was cut away stays refused, also where the new history gives it to another transaction.
    assert_eq!(
        (find(300), find(220), before(1000)),
        (Some(TransactionOutcome::Abandoned), committed(220), Some(Xid8(220)))
    );
    assert_eq!(below(1000), Some((Xid8(220), CommitLsn(Lsn(220)))));
    // A gap that spans the switch remains, up to it.
    log.append(&[Entry::Gap(gap(None, 303, 320)), Entry::Diverge { at: Lsn(305), history: history.clone() }]).unwrap();
    assert_eq!(log.gaps(), [gap(None, 303, 305)]);
    assert_eq!(log.find_token(TokenId([300u64 as u8; 16])).unwrap(), None);

    let verified = Verified { fingerprint: "x".into(), at: Lsn(305) };
    log.append(&[Entry::Verified(verified.clone()), Entry::Mapping([7; 32])]).unwrap();
    assert_eq!(log.state().verified, Some(verified));
    assert_eq!(log.state().mapping, Some([7; 32]));
    log.sync().unwrap();
}

#[test]
fn the_model_conforms() {
    conforms(&ModelLog::default());
}

#[test]
fn the_local_log_conforms_and_persists() {
    let directory = tempfile::tempdir().unwrap();
    let log = LocalLog::open(options(directory.path())).unwrap();
    conforms(&log);
    let before = (log.state(), reads(&log, "a", Position::ZERO), log.gaps());
    drop(log);
    let log = LocalLog::open(options(directory.path())).unwrap();
    assert_eq!((log.state(), reads(&log, "a", Position::ZERO), log.gaps()), before);
}

#[test]
fn open_removes_staged_leftovers() {
    let directory = tempfile::tempdir().unwrap();
    let log = LocalLog::open(options(directory.path())).unwrap();
    log.append(&[adopt(), staged(100, "a", &[1, 2])]).unwrap();
    drop(log);
    let log = LocalLog::open(options(directory.path())).unwrap();
    log.append(&[transaction(100, &["b"]), transaction(120, &["a"])]).unwrap();
    assert_eq!(reads(&log, "a", Position::ZERO), [(120, 2)]);
}

#[test]
fn retention_by_age_keeps_each_tenants_horizon() {
    let directory = tempfile::tempdir().unwrap();
    let log = LocalLog::open(options(directory.path())).unwrap();
    log.append(&[adopt(), transaction(100, &["a", "quiet"])]).unwrap();
    log.append(&[staged(150, "staged", &[2, 3]), end_of_staged(150)]).unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    assert_eq!(log.retain(now + 1000).unwrap(), DiskSpace::Enough);
    // A transaction is being staged while the next segment begins.
    log.append(&[transaction(200, &["a"]), staged(300, "a", &[2, 3])]).unwrap();
    assert_eq!(log.retain(now + 2000).unwrap(), DiskSpace::Enough);
    let Entry::Transaction(whole) = transaction(300, &["b"]) else { unreachable!() };
    let messages = vec![(tenant("a"), message(300, Some(310), &[8]))];
    let end = Entry::Transaction(Arc::new(Transaction { staged: true, messages, ..(*whole).clone() }));
    log.append(&[end]).unwrap();
    assert_eq!(reads(&log, "a", Position::ZERO), [(100, 2), (200, 2), (300, 2), (300, 1)]);
    for after in [Position::at(Lsn(210)), Position::at(Lsn(300)), Position::inside(CommitLsn(Lsn(300)), 2)] {
        let changes: usize = reads(&log, "a", after).iter().map(|(_, changes)| changes).sum();
        assert_eq!(changes, if after.steps == 0 { 3 } else { 2 }, "{after}");
    }

    // An hour after it ended, the first segment goes.
    assert_eq!(log.retain(now + 1000 + 3700).unwrap(), DiskSpace::Enough);
    assert_eq!(reads(&log, "a", Position::ZERO), [(200, 2), (300, 2), (300, 1)]);
    assert_eq!(log.horizon(&scope("a")).unwrap(), Position::inside(CommitLsn(Lsn(100)), u64::MAX));
    assert!(log.horizon(&scope("a")).unwrap() < Position::at(Lsn(110)), "the token after it resumes");
    let find = |name: &str| log.find_transaction(&scope(name), Xid8(100)).unwrap();
    let newest = Some(TransactionOutcome::Committed { commit: CommitLsn(Lsn(100)), end: EndLsn(Lsn(110)) });
    assert_eq!((find("a"), find("quiet"), find("other")), (newest, newest, None), "and so does its id");
    let newest = Some(TransactionOutcome::Committed { commit: CommitLsn(Lsn(150)), end: EndLsn(Lsn(160)) });
    let staged = log.find_transaction(&scope("staged"), Xid8(150)).unwrap();
    assert_eq!(staged, newest, "also where all that the tenant had of it was staged");
    assert_eq!(log.horizon(&scope("other")).unwrap(), Position::at(Lsn(50)));
    assert_eq!(log.horizon(&Scope::All).unwrap(), Position::at(Lsn(160)), "behind the newest of any tenant");
    assert_eq!(log.find_transaction(&Scope::All, Xid8(150)).unwrap(), newest);
    assert_eq!(reads_all(&log, &Place::at(Lsn(160))), "a200:2| a300:2 a300:1|");
    assert!(log.knows(&tenant("quiet")).unwrap());
    // Of a transaction that began in a dropped segment nothing is of use to a stream of all.
    assert_eq!(log.retain(now + 2000 + 3700).unwrap(), DiskSpace::Enough);
    assert_eq!(log.horizon(&scope("a")).unwrap(), Position::inside(CommitLsn(Lsn(300)), 3));
    assert_eq!(log.horizon(&Scope::All).unwrap(), Position::at(Lsn(310)));
    drop(log);
    let log = LocalLog::open(options(directory.path())).unwrap();
    assert_eq!(log.horizon(&scope("quiet")).unwrap(), Position::inside(CommitLsn(Lsn(100)), u64::MAX));
    assert_eq!(log.horizon(&Scope::All).unwrap(), Position::at(Lsn(310)));
}

#[test]
fn a_transaction_of_very_many_tenants_is_read_in_their_order() {
    let directory = tempfile::tempdir().unwrap();
    let log = LocalLog::open(options(directory.path())).unwrap();
    let names: Vec<String> = (0..1000).map(|n| format!("{:03}", n * 7 % 1000)).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    log.append(&[adopt(), transaction(100, &names), transaction(200, &["x"])]).unwrap();
    let found = all_of(&log, &Scope::All, &Place::default(), 1_000);
    assert_eq!(found.len(), 1001);
    assert!(found.windows(2).all(|pair| pair[0].tenant < pair[1].tenant));
    let ends: Vec<_> = found.iter().filter_map(|recorded| recorded.ends_transaction).map(|end| end.0.0).collect();
    assert_eq!(ends, [110, 210]);
    let from = Place::inside(Position::at(Lsn(100)), tenant("500"), Place::WHOLE);
    assert_eq!(all_of(&log, &Scope::All, &from, 1_000), found[501..]);
}

#[test]
fn a_full_disk_drops_history_before_it_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let log = LocalLog::open(Options { reserve_bytes: u64::MAX - 1, ..options(directory.path()) }).unwrap();
    log.append(&[adopt(), transaction(100, &["a"])]).unwrap();
    assert!(matches!(log.retain(0).unwrap(), DiskSpace::Short { .. }));
    assert_eq!(reads(&log, "a", Position::ZERO), []);
    assert_eq!(log.horizon(&scope("a")).unwrap(), Position::inside(CommitLsn(Lsn(100)), u64::MAX));
}

#[test]
fn directories_without_a_log_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let open = || LocalLog::open(options(&path)).map(drop).map_err(|error| error.to_string());
    assert_eq!(open(), Ok(()));
    let log = LocalLog::open(options(&path)).unwrap();
    assert!(open().unwrap_err().contains("in use by another process"));
    assert!(LocalLog::reset(&path).unwrap_err().to_string().contains("in use by another process"));
    drop(log);

    std::fs::remove_dir_all(path.join("data")).unwrap();
    assert!(open().unwrap_err().contains("is damaged (its directory data is missing)"));
    LocalLog::reset(&path).unwrap();
    assert_eq!(open(), Ok(()));

    std::fs::write(path.join("tuplewatch-log.json"), r#"{"format": 99, "node_id": "x"}"#).unwrap();
    assert!(open().unwrap_err().contains("has format 99"));
    std::fs::write(path.join("tuplewatch-log.json"), "{").unwrap();
    assert!(open().unwrap_err().contains("is damaged"));

    std::fs::write(path.join("precious.txt"), "x").unwrap();
    assert!(LocalLog::reset(&path).unwrap_err().to_string().contains("holds no change log"));
    let foreign = directory.path().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("x"), "x").unwrap();
    assert!(LocalLog::open(options(&foreign)).map(drop).unwrap_err().to_string().contains("holds no change log"));
}

/// Random stream entries; the numbers become commit LSNs later.
fn entries() -> impl Strategy<Value = Vec<(u8, u8)>> {
    proptest::collection::vec((0u8..12, any::<u8>()), 1..40)
}

/// The same with ids that are not in the order of commits.
fn with_other_ids(entry: Entry) -> Entry {
    /// Odd, so that no two commits below the bound get the same.
    const FACTOR: u64 = 2_654_435_761;
    const BOUND: u64 = 1 << 13;
    let header = |header: Header| Header { xid: Xid8(header.commit.0.0 * FACTOR % BOUND), ..header };
    let with_header = |(tenant, message): &(TenantId, Message)| {
        (tenant.clone(), Message { header: header(message.header), ..message.clone() })
    };
    match entry {
        Entry::Transaction(transaction) => Entry::Transaction(Arc::new(Transaction {
            header: header(transaction.header),
            messages: transaction.messages.iter().map(with_header).collect(),
            ..(*transaction).clone()
        })),
        Entry::Staged(staged) => Entry::Staged(Arc::new(Staged {
            messages: staged.messages.iter().map(with_header).collect(),
            ..(*staged).clone()
        })),
        other => other,
    }
}

/// A log, the model, and every state of the model so far.
struct Run {
    directory: tempfile::TempDir,
    opened: usize,
    log: Option<LocalLog>,
    model: Inner,
    history: Vec<Inner>,
    /// How many of those states are synced.
    synced: usize,
    /// Not appended yet.
    waiting: Vec<Entry>,
}

impl Run {
    fn begin() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let model = Inner::default();
        let mut run = Self {
            directory,
            opened: 0,
            log: None,
            history: vec![model.clone()],
            model,
            synced: 0,
            waiting: Vec::new(),
        };
        run.open();
        run.push(adopt());
        run
    }

    fn path(&self, n: usize) -> std::path::PathBuf {
        self.directory.path().join(n.to_string())
    }

    /// Segments of some minutes, none of which is dropped.
    fn open(&mut self) {
        let options = Options { age_seconds: 16_000, ..options(&self.path(self.opened)) };
        self.log = Some(LocalLog::open(options).unwrap());
    }

    fn log(&self) -> &LocalLog {
        self.log.as_ref().unwrap()
    }

    fn push(&mut self, entry: Entry) {
        let entry = with_other_ids(entry);
        self.model.apply(&entry);
        self.history.push(self.model.clone());
        self.waiting.push(entry);
    }

    /// Appends all that waits, at once.
    fn append(&mut self) {
        let waiting = std::mem::take(&mut self.waiting);
        self.log().append(&waiting).unwrap();
    }

    fn sync(&mut self) {
        self.append();
        self.log().sync().unwrap();
        self.synced = self.history.len() - 1;
    }

    /// The process dies, and the next one finds what the operating system has of the directory.
    fn crash(&mut self) {
        self.append();
        copy_directory(&self.path(self.opened), &self.path(self.opened + 1));
        self.log = None;
        self.opened += 1;
        self.open();
        let matching = (self.synced..self.history.len()).rev().find(|length| same(self.log(), &self.history[*length]));
        let matching = matching.unwrap_or_else(|| panic!("the log is no prefix of at least {} entries", self.synced));
        self.history.truncate(matching + 1);
        self.model = self.history.last().unwrap().clone();
        // Opening discards what was staged.
        self.model.apply(&Entry::Discard);
        self.history.push(self.model.clone());
        self.synced = self.synced.min(self.history.len() - 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// After a crash (the directory as it was at some moment, copied), the log is a prefix of what was appended and at
    /// least what was synced; and so again after the next.
    #[test]
    fn a_crashed_log_is_a_prefix_of_the_model(steps in entries(), crash_every in 4usize..20) {
        const ROLLS_MAX: u64 = 10;
        let mut run = Run::begin();
        let (mut commit, mut open, mut rolls) = (1000, None, 0);
        for (n, (kind, pick)) in steps.into_iter().enumerate() {
            let names: &[&str] = match pick % 4 { 0 => &["a"], 1 => &["b", "a"], 2 => &["a"], _ => &["c"] };
            commit += 10 + u64::from(pick % 2) * 10;
            // A staged transaction ends before the next thing, or is discarded.
            if !matches!(kind, 7..=9)
                && let Some(open) = open.take()
            {
                let mut rest = vec![(tenant("aa"), message(open, Some(open + 10), &[8, 9]))];
                rest.truncate(pick.into());
                run.push(with(end_of_staged(open), |transaction| transaction.messages = rest));
            }
            match kind {
                0..=3 => run.push(transaction(commit, names)),
                4 => run.push(Entry::Progress(Lsn(commit))),
                5 => {
                    run.push(staged(commit, "a", &[2, 5]));
                    if pick > 100 {
                        run.push(staged(commit, "c", &[6]));
                        run.push(staged(commit, "a", &[7]));
                    }
                    open = Some(commit);
                }
                6 if pick > 100 => run.push(with_gaps(commit, names, pick > 200)),
                6 => run.push(Entry::Gap(gap(None, commit, commit + 5))),
                7 => {
                    run.push(Entry::Discard);
                    open = None;
                }
                8 => run.sync(),
                9 if rolls < ROLLS_MAX => {
                    run.append();
                    rolls += 1;
                    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
                    run.log().retain(now + rolls * 1_100).unwrap();
                }
                9 => {}
                _ => {
                    commit = commit.saturating_sub(pick.into()).max(60);
                    run.push(Entry::Diverge { at: Lsn(commit), history: History::first() });
                }
            }
            if pick % 3 == 0 {
                run.append();
            }
            if n % crash_every == crash_every - 1 {
                run.crash();
                open = None;
            }
        }
        run.append();
        prop_assert!(same(run.log(), &run.model));
    }
}

fn same(log: &LocalLog, model: &Inner) -> bool {
    let model = ModelLog::of(model.clone());
    let known = model.transactions_since(Lsn(0)).unwrap();
    let places: Vec<u64> = known.iter().flat_map(|(end, xid)| [end.0.0 - 10, xid.0]).collect();
    let all = |log: &dyn ChangeLog| {
        let reads = ["a", "aa", "b", "c"].map(|name| all_of(log, &scope(name), &Place::default(), usize::MAX));
        let everything = all_of(log, &Scope::All, &Place::default(), usize::MAX);
        let around = places.iter().flat_map(|at| [*at, at + 1]).chain([u64::MAX]);
        let index: Vec<_> = around
            .map(|at| {
                let (before, below) = (log.transaction_before(CommitLsn(Lsn(at))), log.largest_below(Xid8(at)));
                (before.unwrap(), below.unwrap(), log.find_transaction(&scope("z"), Xid8(at)).unwrap())
            })
            .collect();
        let state = log.state();
        (state.tail, state.origin, reads, everything, log.gaps(), log.transactions_since(Lsn(0)).unwrap(), index)
    };
    let found = all(log);
    let (_, _, reads, everything, ..) = &found;
    resumes(log, &model, everything);
    for recorded in reads.iter().flatten() {
        let of_one = recorded.message.reached().into();
        let [rest, expected] = [log, &model as &dyn ChangeLog].map(|log| all_of(log, &Scope::All, &of_one, usize::MAX));
        assert_eq!(rest, expected, "all tenants from {of_one}");
    }
    found == all(&model)
}

/// From each place in a stream of all tenants, in whatever pieces, comes exactly the rest; and of one tenant what that tenant's stream has.
fn resumes(log: &dyn ChangeLog, model: &dyn ChangeLog, everything: &[TenantMessage]) {
    assert_eq!(all_of(log, &Scope::All, &Place::default(), 1), everything);
    let mut place = Place::default();
    for (n, recorded) in everything.iter().enumerate() {
        place = recorded.reached(&Scope::All, &place);
        let rest = everything.get(n + 1..).unwrap_or_default();
        assert_eq!(all_of(log, &Scope::All, &place, usize::MAX), rest, "from {place}");
        for name in ["a", "aa", "b", "c"] {
            let rest: Vec<_> = rest.iter().filter(|recorded| recorded.tenant == tenant(name)).collect();
            let own = all_of(log, &scope(name), &place.in_scope(&scope(name)), usize::MAX);
            assert!(
                own.iter().map(|own| &own.message).eq(rest.iter().map(|rest| &rest.message)),
                "{name} from {place}"
            );
            assert_eq!(own, all_of(model, &scope(name), &place.in_scope(&scope(name)), usize::MAX));
        }
    }
}

fn copy_directory(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_directory(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}
