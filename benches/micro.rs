//! Measures each step on the path of a change: decoding, mapping and assembly, the change log, the message.
//!
//! `cargo bench --bench micro [-- FILTER]`; `--quick` is criterion's own. It needs no PostgreSQL, because it has the
//! bytes that a server would send.

#![expect(clippy::unwrap_used, reason = "what cannot be prepared cannot be measured")]

use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use tuplewatch::api::encode::base_v1;
use tuplewatch::changelog::{ChangeLog, Entry, LocalLog, Options, Origin};
use tuplewatch::decode::assembler::{Assembler, Limits, OnUndecodable};
use tuplewatch::decode::mapping::{Mapping, Spec, TUPLES_PRESET};
use tuplewatch::decode::pgoutput;
use tuplewatch::model::change::{self, Fact, Operation, TenantId, Tuple};
use tuplewatch::model::lsn::{CommitLsn, CommitTime, EndLsn, Lsn, Xid8};
use tuplewatch::model::timeline::{History, Source};
use tuplewatch::model::transaction::{Header, Message, MessageBuilder, Transaction};

const TUPLES: u32 = 1;
const ATTRIBUTES: u32 = 2;
const TUPLE_COLUMNS: [&str; 7] =
    ["tenant_id", "entity_type", "entity_id", "relation", "subject_type", "subject_id", "subject_relation"];
const ATTRIBUTE_COLUMNS: [&str; 5] = ["tenant_id", "entity_type", "entity_id", "attribute", "value"];
const TUPLE: Tuple<'_> = Tuple {
    entity_type: "document",
    entity_id: "document-4711",
    relation: "viewer",
    subject_type: "user",
    subject_id: "user-815",
    subject_relation: "",
};
const ATTRIBUTE: [&str; 5] = [
    "t1",
    "document",
    "document-4711",
    "is_public",
    r#"{"data": true, "@type": "type.googleapis.com/base.v1.BooleanValue"}"#,
];
/// As long as a native token.
const TOKEN: &str = "dGhpcyBpcyBhYm91dCBhcyBsb25nIGFzIGEgc25hcCB0b2tlbiBpcyBhbnk=";
/// WAL between two commits, in bytes.
const COMMIT_DISTANCE: u64 = 256;

type Group<'a> = BenchmarkGroup<'a, criterion::measurement::WallTime>;

fn tuple_values() -> [&'static str; 7] {
    let Tuple { entity_type, entity_id, relation, subject_type, subject_id, subject_relation } = TUPLE;
    ["t1", entity_type, entity_id, relation, subject_type, subject_id, subject_relation]
}

/// pgoutput's Relation.
fn relation(id: u32, name: &str, columns: &[&str]) -> Vec<u8> {
    let mut bytes = vec![b'R'];
    bytes.extend(id.to_be_bytes());
    bytes.extend(b"tuplewatch\0");
    bytes.extend(name.as_bytes());
    bytes.extend([0, b'd']);
    bytes.extend(u16::try_from(columns.len()).unwrap().to_be_bytes());
    for column in columns {
        bytes.push(1);
        bytes.extend(column.as_bytes());
        bytes.extend([0, 0, 0, 0, 25, 0xFF, 0xFF, 0xFF, 0xFF]);
    }
    bytes
}

/// pgoutput's Insert.
fn insert(relation: u32, values: &[&str]) -> Vec<u8> {
    let mut bytes = vec![b'I'];
    bytes.extend(relation.to_be_bytes());
    bytes.push(b'N');
    bytes.extend(u16::try_from(values.len()).unwrap().to_be_bytes());
    for value in values {
        bytes.push(b't');
        bytes.extend(u32::try_from(value.len()).unwrap().to_be_bytes());
        bytes.extend(value.as_bytes());
    }
    bytes
}

fn header(commit: u64) -> Header {
    Header { commit: CommitLsn(Lsn(commit)), xid: Xid8(commit), commit_time: CommitTime(1) }
}

fn message(commit: u64, changes: u64) -> Message {
    let mut encoded = Vec::new();
    change::encode(Operation::Create, &Fact::Tuple(TUPLE), &mut encoded);
    let mut builder = MessageBuilder::default();
    (1..=changes).for_each(|row| builder.push(2 * row, &encoded, encoded.len()));
    builder.finish(header(commit), Some(EndLsn(Lsn(commit + COMMIT_DISTANCE))))
}

/// Rows and their values.
fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    for (name, bytes) in [("tuple", insert(TUPLES, &tuple_values())), ("attribute", insert(ATTRIBUTES, &ATTRIBUTE))] {
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(name, |bencher| {
            bencher.iter(|| match pgoutput::decode(black_box(&bytes)).unwrap() {
                pgoutput::Message::Insert { new, .. } => new.values().map(black_box).count(),
                _ => 0,
            });
        });
    }
}

/// Assembles Begin, Inserts and Commit into a transaction with its messages, ready for log and subscribers.
fn assembly(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("mapping and assembly");
    for rows in [1, 100] {
        transactions(&mut group, &format!("tuples, {rows} a transaction"), &insert(TUPLES, &tuple_values()), rows);
        transactions(&mut group, &format!("attributes, {rows} a transaction"), &insert(ATTRIBUTES, &ATTRIBUTE), rows);
    }
}

fn transactions(group: &mut Group<'_>, name: &str, row: &[u8], rows: u64) {
    let spec: Spec = tuplewatch::yaml::from_str(TUPLES_PRESET).unwrap();
    let limits = Limits { message_bytes: 1 << 20, change_bytes: 4 << 20, stage_bytes: 4 << 20 };
    let mut assembler = Assembler::new(Arc::new(Mapping::new(spec).unwrap()), limits, OnUndecodable::Halt);
    let mut commit = 0;
    // The first transaction defines the tables.
    assembler.begin(header(commit)).unwrap();
    assembler.change(&relation(TUPLES, "relation_tuples", &TUPLE_COLUMNS)).unwrap();
    assembler.change(&relation(ATTRIBUTES, "attributes", &ATTRIBUTE_COLUMNS)).unwrap();
    assembler.commit(CommitLsn(Lsn(commit)), EndLsn(Lsn(commit + COMMIT_DISTANCE))).unwrap();
    group.throughput(Throughput::Elements(rows));
    group.bench_function(name, |bencher| {
        bencher.iter(|| {
            commit += COMMIT_DISTANCE;
            assembler.begin(header(commit)).unwrap();
            for _ in 0..rows {
                assert!(assembler.change(black_box(row)).unwrap().is_none(), "nothing is staged");
            }
            let transaction = assembler.commit(CommitLsn(Lsn(commit)), EndLsn(Lsn(commit + COMMIT_DISTANCE))).unwrap();
            assert!(transaction.has_changes() && transaction.gaps.is_empty(), "every row is a change");
            transaction
        });
    });
}

fn log_in(path: &Path) -> LocalLog {
    let options = Options { path: path.to_owned(), age_seconds: 3600, size_bytes: 10 << 30, reserve_bytes: 0 };
    let log = LocalLog::open(options).unwrap();
    let source = Source { system_identifier: 1, database_oid: 1 };
    let origin = Origin { source, history: History::first(), lsn: Lsn(1), xid: Xid8(1) };
    log.append(&[Entry::Adopt(origin)]).unwrap();
    log
}

/// Appends transactions of one row, in batches like the recorder's, with and without the sync that makes them durable.
fn log_append(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("log append");
    group.sample_size(20);
    let tenant = TenantId::new("t1").unwrap();
    for (batch, synced) in [(1, false), (100, false), (1_000, false), (1_000, true)] {
        let directory = tempfile::tempdir().unwrap();
        let log = log_in(directory.path());
        let mut commit = 1;
        let mut entries = || {
            let entry = |_| {
                commit += COMMIT_DISTANCE;
                Entry::Transaction(Arc::new(Transaction {
                    header: header(commit),
                    end: EndLsn(Lsn(commit + COMMIT_DISTANCE)),
                    messages: vec![(tenant.clone(), message(commit, 1))],
                    staged: false,
                    gaps: vec![],
                    token_ids: vec![],
                    tallies: vec![],
                }))
            };
            (0..batch).map(entry).collect::<Vec<_>>()
        };
        let name = format!("{batch} a batch{}", if synced { ", synced" } else { "" });
        group.throughput(Throughput::Elements(batch));
        group.bench_function(name, |bencher| {
            bencher.iter_batched(
                &mut entries,
                |entries| {
                    log.append(&entries).unwrap();
                    if synced {
                        log.sync().unwrap();
                    }
                },
                BatchSize::PerIteration,
            );
        });
        assert!(log.state().tail.0 > 1, "the transactions are there");
    }
    file_append(&mut group);
}

/// The cost of the disk itself: writes the same messages to a plain file, and syncs it.
fn file_append(group: &mut Group<'_>) {
    const BATCH: u64 = 1_000;
    let mut file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..BATCH).flat_map(|n| base_v1::response(TOKEN, &message(n, 1).changes).unwrap()).collect();
    group.throughput(Throughput::Elements(BATCH));
    group.bench_function(format!("{BATCH} to a plain file, synced"), |bencher| {
        bencher.iter(|| {
            file.write_all(black_box(&bytes)).unwrap();
            file.sync_data().unwrap();
        });
    });
}

/// Encodes a change, and makes a message of encoded changes.
fn encode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("encode");
    let mut out = Vec::new();
    change::encode(Operation::Create, &Fact::Tuple(TUPLE), &mut out);
    group.throughput(Throughput::Bytes(out.len() as u64));
    group.bench_function("change", |bencher| {
        bencher.iter(|| {
            out.clear();
            change::encode(Operation::Create, black_box(&Fact::Tuple(TUPLE)), &mut out);
        });
    });
    for changes in [1, 100] {
        let message = message(1, changes);
        let response = base_v1::response(TOKEN, &message.changes).unwrap();
        group.throughput(Throughput::Bytes(response.len() as u64));
        group.bench_function(format!("message of {changes}"), |bencher| {
            bencher.iter(|| base_v1::response(black_box(TOKEN), &black_box(&message).changes));
        });
    }
}

criterion_group!(benches, decode, assembly, log_append, encode);
criterion_main!(benches);
