use super::*;
use crate::decode::mapping::{Spec, TUPLES_PRESET};
use crate::model::change::Changes;
use crate::model::lsn::{CommitTime, Lsn, Xid8};

/// The tables of the preset, and optionally one that marks a transaction as a tenant's.
fn mapping(tells_transactions: bool) -> Arc<Mapping> {
    let transactions = "\n  - { table: tuplewatch.transactions, tenant: tenant_id, transaction: true }";
    let yaml = format!("{TUPLES_PRESET}{}", if tells_transactions { transactions } else { "" });
    let spec: Spec = crate::yaml::from_str(&yaml).unwrap();
    Arc::new(Mapping::new(spec).unwrap())
}

/// An assembler that knows `relation_tuples` as relation 1 and an unmapped table as relation 2.
fn assembler(limits: Limits, on_undecodable: OnUndecodable) -> Assembler {
    let mut assembler = Assembler::new(mapping(false), limits, on_undecodable);
    assembler.change(&relation(1, "relation_tuples")).unwrap();
    assembler.change(&relation(2, "else")).unwrap();
    assembler
}

/// A Relation message.
fn relation(id: u32, name: &str) -> Vec<u8> {
    let columns =
        ["tenant_id", "entity_type", "entity_id", "relation", "subject_type", "subject_id", "subject_relation"];
    let mut bytes = vec![b'R'];
    bytes.extend(id.to_be_bytes());
    bytes.extend(b"tuplewatch\0");
    bytes.extend(name.as_bytes());
    bytes.extend([0, b'd', 0, columns.len() as u8]);
    for column in columns {
        bytes.push(1);
        bytes.extend(column.as_bytes());
        bytes.extend([0, 0, 0, 0, 25, 0xFF, 0xFF, 0xFF, 0xFF]);
    }
    bytes
}

const LIMITS: Limits = Limits { message_bytes: 1 << 20, change_bytes: 4 << 20, stage_bytes: 4 << 20 };

fn header() -> Header {
    Header { commit: CommitLsn(Lsn(100)), xid: Xid8(9), commit_time: CommitTime(5) }
}

/// An INSERT; `-` as entity id means NULL.
fn insert(relation: u32, tenant: &str, entity_id: &str) -> Vec<u8> {
    let mut bytes = vec![b'I'];
    bytes.extend(relation.to_be_bytes());
    bytes.extend([b'N', 0, 7]);
    for value in [tenant, "doc", entity_id, "viewer", "user", "1", ""] {
        if value == "-" {
            bytes.push(b'n');
        } else {
            bytes.push(b't');
            bytes.extend((value.len() as u32).to_be_bytes());
            bytes.extend(value.as_bytes());
        }
    }
    bytes
}

fn truncate(relation: u32) -> Vec<u8> {
    let mut bytes = vec![b'T', 0, 0, 0, 1, 0];
    bytes.extend(relation.to_be_bytes());
    bytes
}

fn summary(messages: &[(TenantId, Message)]) -> Vec<String> {
    messages
        .iter()
        .map(|(tenant, message)| {
            let count = Changes::of(&message.changes).count();
            format!("{tenant} {count} {}", message.reached())
        })
        .collect()
}

fn run(assembler: &mut Assembler, rows: &[Vec<u8>]) -> (Vec<Staged>, Transaction) {
    assembler.begin(header()).unwrap();
    let staged = rows.iter().filter_map(|row| assembler.change(row).unwrap()).collect();
    (staged, assembler.commit(CommitLsn(Lsn(100)), EndLsn(Lsn(200))).unwrap())
}

#[test]
fn each_tenant_gets_its_own_message() {
    let mut assembler = assembler(LIMITS, OnUndecodable::Gap);
    let rows = [insert(1, "b", "1"), insert(2, "b", "x"), insert(1, "a", "2"), insert(1, "b", "3")];
    let (staged, transaction) = run(&mut assembler, &rows);
    assert!(staged.is_empty() && !transaction.staged);
    assert_eq!(summary(&transaction.messages), ["b 2 0/C8", "a 1 0/C8"]);
    // Unmapped rows count as steps: positions do not depend on the mapping.
    assert_eq!(transaction.messages[0].1.last_step, 8);
    assert_eq!(transaction.reached(), Position::at(Lsn(200)));
}

#[test]
fn messages_are_cut_and_all_but_the_last_resume_inside() {
    let limits = Limits { message_bytes: 100, ..LIMITS };
    let rows: Vec<_> = (0..5).map(|n| insert(1, "a", &n.to_string())).collect();
    let (_, transaction) = run(&mut assembler(limits, OnUndecodable::Gap), &rows);
    assert_eq!(summary(&transaction.messages), ["a 2 0/64+4", "a 2 0/64+8", "a 1 0/C8"]);
}

#[test]
fn large_transactions_are_staged() {
    let limits = Limits { message_bytes: 100, stage_bytes: 150, ..LIMITS };
    let rows: Vec<_> = (0..6).map(|n| insert(1, if n == 0 { "b" } else { "a" }, &n.to_string())).collect();
    let (staged, transaction) = run(&mut assembler(limits, OnUndecodable::Gap), &rows);
    let staged: Vec<_> = staged.iter().map(|staged| summary(&staged.messages)).collect();
    assert_eq!(staged, [vec!["a 2 0/64+6", "b 1 0/64+2", "a 2 0/64+10"]]);
    assert!(transaction.staged);
    assert_eq!(summary(&transaction.messages), ["a 1 0/C8"]);
}

#[test]
fn the_tenant_of_a_marked_transaction_gets_a_last_message() {
    let limits = Limits { message_bytes: 100, stage_bytes: 150, ..LIMITS };
    let mut assembler = Assembler::new(mapping(true), limits, OnUndecodable::Gap);
    assembler.change(&relation(1, "relation_tuples")).unwrap();
    assembler.change(&relation(2, "transactions")).unwrap();
    let mut check = |rows: &[Vec<u8>], expected: &[&str], gaps: usize| {
        let (_, transaction) = run(&mut assembler, rows);
        assert_eq!(summary(&transaction.messages), expected);
        assert_eq!(transaction.gaps.len(), gaps);
    };
    let marked = insert(2, "a", "");
    check(std::slice::from_ref(&marked), &["a 0 0/C8"], 0);
    check(&[marked.clone(), marked.clone(), insert(1, "a", "1")], &["a 1 0/C8"], 0);
    check(&[marked.clone(), insert(1, "b", "1")], &["b 1 0/C8", "a 0 0/C8"], 0);
    // All its messages were staged before, also for a tenant without changes.
    let large: Vec<_> = (0..5).map(|n| insert(1, "b", &n.to_string())).collect();
    check(&large, &["b 0 0/C8"], 0);
    // Behind a gap there is no last message.
    check(&[marked.clone(), insert(1, "a", "-")], &[], 1);
    check(&[marked.clone(), truncate(1)], &[], 1);
    check(&[marked.clone(), truncate(2)], &["a 0 0/C8"], 0);
    check(&[insert(2, "-", "")], &[], 1);
}

#[test]
fn an_undecodable_row_is_a_gap_for_its_tenant_only() {
    let rows =
        [insert(1, "a", "1"), insert(1, "b", "1"), insert(1, "a", "-"), insert(1, "a", "2"), insert(1, "b", "2")];
    let (_, transaction) = run(&mut assembler(LIMITS, OnUndecodable::Gap), &rows);
    assert_eq!(summary(&transaction.messages), ["a 1 0/64+2", "b 2 0/C8"]);
    let [gap] = transaction.gaps.as_slice() else { panic!() };
    assert_eq!(gap.tenant, Some(TenantId::new("a").unwrap()));
    assert_eq!((gap.from, gap.to), (Position::inside(CommitLsn(Lsn(100)), 5), Position::at(Lsn(200))));
    assert_eq!(gap.reason.code(), "UNDECODABLE_ROW");
}

#[test]
fn truncate_and_unreadable_tenants_are_gaps_for_all() {
    for breaking in [truncate(1), insert(1, "-", "1")] {
        let rows = [insert(1, "a", "1"), breaking, insert(1, "b", "1")];
        let (_, transaction) = run(&mut assembler(LIMITS, OnUndecodable::Gap), &rows);
        assert_eq!(summary(&transaction.messages), ["a 1 0/64+2"]);
        let [gap] = transaction.gaps.as_slice() else { panic!() };
        assert_eq!(gap.tenant, None);
    }
    let (_, transaction) = run(&mut assembler(LIMITS, OnUndecodable::Gap), &[truncate(2)]);
    assert!(transaction.gaps.is_empty());
}

#[test]
fn a_change_too_large_to_send_is_a_gap() {
    let limits = Limits { change_bytes: 1000, ..LIMITS };
    let rows = [insert(1, "a", &"x".repeat(2000)), insert(1, "b", "1")];
    let (_, transaction) = run(&mut assembler(limits, OnUndecodable::Gap), &rows);
    assert_eq!(summary(&transaction.messages), ["b 1 0/C8"]);
    assert_eq!(transaction.gaps.len(), 1);
}

#[test]
fn a_bad_row_halts_if_configured() {
    let mut assembler = assembler(LIMITS, OnUndecodable::Halt);
    assembler.begin(header()).unwrap();
    assert!(matches!(assembler.change(&insert(1, "a", "-")), Err(Error::Halted { .. })));
}

#[test]
fn token_ids_are_taken_from_our_logical_messages() {
    let mut assembler = assembler(LIMITS, OnUndecodable::Gap);
    assembler.logical_message(MESSAGE_PREFIX, &[1; 16]);
    assembler.begin(header()).unwrap();
    assembler.logical_message(MESSAGE_PREFIX, &[2; 16]);
    assembler.logical_message(MESSAGE_PREFIX, &[3; 15]);
    assembler.logical_message("other", &[4; 16]);
    let transaction = assembler.commit(CommitLsn(Lsn(100)), EndLsn(Lsn(200))).unwrap();
    assert_eq!(transaction.token_ids, [TokenId([2; 16])]);
    assert!(transaction.messages.is_empty());
}

#[test]
fn events_out_of_order_are_errors() {
    let mut assembler = assembler(LIMITS, OnUndecodable::Gap);
    assert!(assembler.change(&insert(1, "a", "1")).is_err());
    assert!(assembler.commit(CommitLsn(Lsn(100)), EndLsn(Lsn(200))).is_err());
    assembler.begin(header()).unwrap();
    assert!(assembler.begin(header()).is_err());
    assert_eq!(assembler.change(&insert(3, "a", "1")), Err(Error::UnknownRelation(3)));
    assert!(assembler.commit(CommitLsn(Lsn(101)), EndLsn(Lsn(200))).is_err());
}

#[test]
fn rows_of_a_mapped_table_under_another_name_are_a_gap_for_all() {
    let mut assembler = assembler(LIMITS, OnUndecodable::Gap);
    for name in ["renamed", "renamed_again"] {
        assembler.change(&relation(1, name)).unwrap();
        assembler.begin(header()).unwrap();
        assembler.change(&insert(2, "a", "1")).unwrap();
        assembler.change(&insert(1, "a", "1")).unwrap();
        let transaction = assembler.commit(CommitLsn(Lsn(100)), EndLsn(Lsn(110))).unwrap();
        let [gap] = &transaction.gaps[..] else { panic!("{transaction:?}") };
        assert_eq!(
            (gap.tenant.as_ref(), gap.from, gap.to),
            (None, Position::inside(CommitLsn(Lsn(100)), 2), Position::at(Lsn(110)))
        );
        let says =
            format!("a row of table tuplewatch.{name} could not be decoded: the table was tuplewatch.relation_tuples");
        assert!(gap.reason.to_string().starts_with(&says), "{}", gap.reason);
    }
    assembler.change(&relation(1, "relation_tuples")).unwrap();
    assembler.begin(header()).unwrap();
    assembler.change(&insert(1, "a", "1")).unwrap();
    assert_eq!(assembler.commit(CommitLsn(Lsn(100)), EndLsn(Lsn(110))).unwrap().gaps, []);
}

#[test]
fn rows_are_counted_by_table() {
    let tallies = |rows: &[Vec<u8>], limits: Limits| {
        let mut assembler = assembler(limits, OnUndecodable::Gap);
        assembler.begin(header()).unwrap();
        for row in rows {
            assembler.change(row).unwrap();
        }
        let tallies = assembler.commit(CommitLsn(Lsn(100)), EndLsn(Lsn(110))).unwrap().tallies;
        tallies.into_iter().map(|t| (t.table.to_string(), t.created, t.deleted, t.undecodable)).collect::<Vec<_>>()
    };
    let tuples = || "tuplewatch.relation_tuples".to_owned();
    assert_eq!(tallies(&[], LIMITS), []);
    assert_eq!(tallies(&[insert(2, "a", "1")], LIMITS), []);
    let rows = [insert(1, "a", "1"), insert(2, "a", "1"), insert(1, "b", "2")];
    assert_eq!(tallies(&rows, LIMITS), [(tuples(), 2, 0, 0)]);
    // Staged changes count as well.
    assert_eq!(tallies(&rows, Limits { stage_bytes: 1, ..LIMITS }), [(tuples(), 2, 0, 0)]);
    // Changes behind a gap do not count.
    let rows = [insert(1, "a", "1"), insert(1, "a", "-"), insert(1, "a", "2"), insert(1, "b", "2")];
    assert_eq!(tallies(&rows, LIMITS), [(tuples(), 2, 0, 1)]);
}
