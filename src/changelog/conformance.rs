//! One suite for every implementation of the contract, and the real log against the model under crashes.

use super::model::{Inner, ModelLog};
use super::*;
use crate::model::change::{Fact, Operation, Tuple, encode};
use crate::model::lsn::{CommitLsn, CommitTime, EndLsn, Xid8};
use crate::model::timeline::Timeline;
use crate::model::transaction::{GapReason, Header, MessageBuilder};
use proptest::prelude::*;
use std::time::{SystemTime, UNIX_EPOCH};

fn tenant(name: &str) -> TenantId {
    TenantId::new(name).unwrap()
}

fn header(commit: u64) -> Header {
    Header { commit: CommitLsn(Lsn(commit)), xid: Xid8(commit), commit_time: CommitTime(7) }
}

fn message(commit: u64, end: Option<u64>, steps: &[u64]) -> Message {
    let mut builder = MessageBuilder::default();
    for step in steps {
        let mut encoded = Vec::new();
        let id = format!("{commit}-{step}");
        let tuple = Tuple {
            entity_type: "doc",
            entity_id: &id,
            relation: "viewer",
            subject_type: "user",
            subject_id: "1",
            subject_relation: "",
        };
        encode(Operation::Create, &Fact::Tuple(tuple), &mut encoded);
        builder.push(*step, &encoded, encoded.len());
    }
    builder.finish(header(commit), end.map(|end| EndLsn(Lsn(end))))
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

/// The end of a transaction all of whose messages were staged.
fn end_of_staged(commit: u64) -> Entry {
    let Entry::Transaction(whole) = transaction(commit, &[]) else { unreachable!() };
    Entry::Transaction(Arc::new(Transaction { staged: true, ..(*whole).clone() }))
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

/// The messages for a tenant's reader, as commit LSNs with the number of changes.
fn reads(log: &dyn ChangeLog, name: &str, after: Position) -> Vec<(u64, usize)> {
    let batch = log.read(&tenant(name), after, Position::MAX, usize::MAX).unwrap();
    batch.messages.iter().map(|m| (m.header.commit.0.0, m.steps.len())).collect()
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
    assert_eq!(log.horizon(&tenant("c")).unwrap(), Position::at(Lsn(50)));

    // The end LSN of one transaction may be the commit LSN of the next.
    assert_eq!(reads(log, "a", Position::at(Lsn(110))), [(110, 2)]);
    assert_eq!(reads(log, "a", Position::inside(CommitLsn(Lsn(100)), 2)), [(100, 1), (110, 2)]);
    assert_eq!(reads(log, "a", Position::at(Lsn(120))), []);
    let up_to = log.read(&tenant("a"), Position::ZERO, Position::at(Lsn(110)), usize::MAX).unwrap();
    assert_eq!((up_to.messages.len(), up_to.more), (1, false));
    let bounded = log.read(&tenant("a"), Position::ZERO, Position::MAX, 1).unwrap();
    assert_eq!((bounded.messages.len(), bounded.more), (1, true));

    // Staged messages are readable with their transaction, and not before.
    log.append(&[staged(300, "a", &[100]), staged(300, "a", &[101])]).unwrap();
    assert_eq!(reads(log, "a", Position::at(Lsn(120))), []);
    log.append(&[Entry::Discard, transaction(220, &["b"])]).unwrap();
    assert_eq!(reads(log, "a", Position::at(Lsn(120))), []);
    log.append(&[staged(300, "a", &[5, 6]), end_of_staged(300)]).unwrap();
    assert_eq!(reads(log, "a", Position::at(Lsn(120))), [(300, 2)]);
    assert_eq!(reads(log, "a", Position::inside(CommitLsn(Lsn(300)), 5)), [(300, 1)]);

    let since = |from: u64| log.transactions_since(Lsn(from)).unwrap();
    assert_eq!(since(111), [(EndLsn(Lsn(230)), Xid8(220)), (EndLsn(Lsn(310)), Xid8(300))]);
    assert_eq!(since(110).len(), 3);
    log.append(&[Entry::Watermark(Lsn(230))]).unwrap();
    assert_eq!(log.state().watermark, Lsn(230));

    // A repeated entry is ignored, and does not open a transaction.
    log.append(&[staged(100, "a", &[1]), Entry::Discard]).unwrap();
    assert_eq!(reads(log, "a", Position::ZERO), [(100, 2), (110, 2), (300, 2)]);
    log.append(&[transaction(100, &["c"])]).unwrap();
    assert_eq!(reads(log, "c", Position::ZERO), []);

    assert_eq!(log.find_token(TokenId([110; 16])).unwrap(), Some(EndLsn(Lsn(120))));
    assert_eq!(log.find_token(TokenId([1; 16])).unwrap(), None);

    let committed = |commit: u64| {
        Some(TransactionOutcome::Committed { commit: CommitLsn(Lsn(commit)), end: EndLsn(Lsn(commit + 10)) })
    };
    let find = |xid: u64| log.find_transaction(&tenant("c"), Xid8(xid)).unwrap();
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
    // A transaction without changes cannot be found.
    let Entry::Transaction(empty) = transaction(310, &[]) else { unreachable!() };
    log.append(&[Entry::Transaction(empty)]).unwrap();
    assert_eq!((find(310), before(400), since(310)), (None, Some(Xid8(300)), vec![]));

    log.append(&[Entry::Gap(gap(Some("a"), 310, 320)), Entry::Gap(gap(None, 330, 400))]).unwrap();
    assert_eq!(log.gaps(), [gap(Some("a"), 310, 320), gap(None, 330, 400)]);
    assert_eq!(log.state().tail, Lsn(400));

    // The server continues on another timeline: 300 ends at 310, past the switch.
    let history =
        History::from_timelines(vec![Timeline { id: 1, begin: Lsn::ZERO }, Timeline { id: 2, begin: Lsn(305) }])
            .unwrap();
    log.append(&[Entry::Diverge { at: Lsn(305), history: history.clone() }]).unwrap();
    assert_eq!(log.state().tail, Lsn(305));
    assert_eq!(log.state().origin.unwrap().history, history);
    assert_eq!(reads(log, "a", Position::at(Lsn(120))), []);
    assert_eq!(reads(log, "a", Position::ZERO), [(100, 2), (110, 2)]);
    assert_eq!(reads(log, "b", Position::at(Lsn(120))), [(220, 2)]);
    assert_eq!(log.gaps(), []);
    // An abandoned id stays refused, even if the new history reuses it.
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
    assert_eq!(log.horizon(&tenant("a")).unwrap(), Position::inside(CommitLsn(Lsn(100)), u64::MAX));
    assert!(log.horizon(&tenant("a")).unwrap() < Position::at(Lsn(110)), "the token after it resumes");
    let find = |name: &str| log.find_transaction(&tenant(name), Xid8(100)).unwrap();
    let newest = Some(TransactionOutcome::Committed { commit: CommitLsn(Lsn(100)), end: EndLsn(Lsn(110)) });
    assert_eq!((find("a"), find("quiet"), find("other")), (newest, newest, None), "and so does its id");
    let newest = Some(TransactionOutcome::Committed { commit: CommitLsn(Lsn(150)), end: EndLsn(Lsn(160)) });
    let staged = log.find_transaction(&tenant("staged"), Xid8(150)).unwrap();
    assert_eq!(staged, newest, "also where all that the tenant had of it was staged");
    assert_eq!(log.horizon(&tenant("other")).unwrap(), Position::at(Lsn(50)));
    assert!(log.knows(&tenant("quiet")).unwrap());
    drop(log);
    let log = LocalLog::open(options(directory.path())).unwrap();
    assert_eq!(log.horizon(&tenant("quiet")).unwrap(), Position::inside(CommitLsn(Lsn(100)), u64::MAX));
}

#[test]
fn a_full_disk_drops_history_before_it_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let log = LocalLog::open(Options { reserve_bytes: u64::MAX - 1, ..options(directory.path()) }).unwrap();
    log.append(&[adopt(), transaction(100, &["a"])]).unwrap();
    assert!(matches!(log.retain(0).unwrap(), DiskSpace::Short { .. }));
    assert_eq!(reads(&log, "a", Position::ZERO), []);
    assert_eq!(log.horizon(&tenant("a")).unwrap(), Position::inside(CommitLsn(Lsn(100)), u64::MAX));
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

    /// The process dies, and the next one finds the directory as the operating system has it.
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
        // Opening discards staged messages.
        self.model.apply(&Entry::Discard);
        self.history.push(self.model.clone());
        self.synced = self.synced.min(self.history.len() - 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// After a crash (a copy of the directory at some moment), the log is a prefix of the appended entries with at least the synced ones.
    /// The same holds after the next crash.
    #[test]
    fn a_crashed_log_is_a_prefix_of_the_model(steps in entries(), crash_every in 4usize..20) {
        const ROLLS_MAX: u64 = 10;
        let mut run = Run::begin();
        let (mut commit, mut open, mut rolls) = (1000, None, 0);
        for (n, (kind, pick)) in steps.into_iter().enumerate() {
            let names: &[&str] = match pick % 4 { 0 => &["a"], 1 => &["b", "a"], 2 => &["a"], _ => &["c"] };
            commit += 10 + u64::from(pick % 2) * 10;
            // A staged transaction is completed or discarded before the next entry.
            if !matches!(kind, 7..=9)
                && let Some(open) = open.take()
            {
                run.push(end_of_staged(open));
            }
            match kind {
                0..=3 => run.push(transaction(commit, names)),
                4 => run.push(Entry::Progress(Lsn(commit))),
                5 => {
                    run.push(staged(commit, "a", &[2, 5]));
                    open = Some(commit);
                }
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
        let reads: Vec<_> = ["a", "b", "c"]
            .iter()
            .map(|name| log.read(&tenant(name), Position::ZERO, Position::MAX, usize::MAX).unwrap())
            .collect();
        let around = places.iter().flat_map(|at| [*at, at + 1]).chain([u64::MAX]);
        let index: Vec<_> = around
            .map(|at| {
                let (before, below) = (log.transaction_before(CommitLsn(Lsn(at))), log.largest_below(Xid8(at)));
                (before.unwrap(), below.unwrap(), log.find_transaction(&tenant("z"), Xid8(at)).unwrap())
            })
            .collect();
        (log.state().tail, log.state().origin, reads, log.gaps(), log.transactions_since(Lsn(0)).unwrap(), index)
    };
    all(log) == all(&model)
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
