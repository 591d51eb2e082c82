//! The committed changes in commit order, from a second slot of PostgreSQL.
//!
//! This decoder uses no code of tuplewatch, so that a bug cannot hide itself. It reads pgoutput, protocol version 1, text format; see
//! "Logical Replication Message Formats" in PostgreSQL's documentation.

use super::change::Change;
use super::sql::Sql;
use std::collections::HashMap;

const SLOT: &str = "reference";

/// A committed transaction.
#[derive(Debug)]
pub(crate) struct Transaction {
    pub(crate) commit_lsn: u64,
    /// Microseconds since 2000.
    pub(crate) commit_time: i64,
    /// Tenant and change, in the order of execution.
    pub(crate) changes: Vec<(String, Change)>,
}

/// Creates the slot. To be called when the tables exist, before anything is written. Does nothing if it was called before.
pub(crate) async fn begin(sql: &Sql) {
    begin_with("", sql).await;
}

/// [`begin`], with a slot that is copied to standbys.
pub(crate) async fn begin_with_failover(sql: &Sql) {
    begin_with(", failover => true", sql).await;
}

async fn begin_with(options: &str, sql: &Sql) {
    // A separate publication, because tests change tuplewatch's.
    let has_none = sql.is_true("NOT EXISTS (SELECT FROM pg_publication WHERE pubname = 'reference')").await;
    if has_none {
        sql.run("CREATE PUBLICATION reference FOR TABLE tuplewatch.relation_tuples, tuplewatch.attributes").await;
    }
    sql.run(&format!(
        "SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput'{options}) \
          WHERE NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = '{SLOT}')"
    ))
    .await;
}

/// All transactions since [`begin`].
pub(crate) async fn read(sql: &Sql) -> Vec<Transaction> {
    read_by("pg_logical_slot_peek_binary_changes", sql).await
}

/// The transactions after this commit LSN, which are removed from the slot.
pub(crate) async fn consume(sql: &Sql, after: u64) -> Vec<Transaction> {
    let mut transactions = read_by("pg_logical_slot_get_binary_changes", sql).await;
    // A crash of PostgreSQL resets the slot to its last checkpoint, and then some are sent again.
    transactions.retain(|transaction| transaction.commit_lsn > after);
    transactions
}

async fn read_by(function: &str, sql: &Sql) -> Vec<Transaction> {
    let statement = format!(
        "SELECT data FROM {function}('{SLOT}', NULL, NULL, 'proto_version', '1', 'publication_names', 'reference')"
    );
    let mut reader = Reader::default();
    for row in sql.query(&statement, &[]).await.unwrap() {
        reader.message(row.get(0));
    }
    assert!(reader.open.is_none(), "the last transaction is whole");
    assert!(reader.transactions.is_sorted_by_key(|transaction| transaction.commit_lsn), "commits come in order");
    reader.transactions
}

/// One tenant's changes.
pub(crate) fn of_tenant(transactions: &[Transaction], tenant: &str) -> Vec<Change> {
    let all = transactions.iter().flat_map(|transaction| &transaction.changes);
    all.filter(|(owner, _)| owner == tenant).map(|(_, change)| change.clone()).collect()
}

struct Relation {
    name: String,
    columns: Vec<String>,
}

type Row = HashMap<String, Option<String>>;

#[derive(Default)]
struct Reader {
    relations: HashMap<u32, Relation>,
    open: Option<Transaction>,
    transactions: Vec<Transaction>,
}

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_at(N);
        self.0 = rest;
        head.try_into().unwrap()
    }

    fn u8(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take())
    }

    fn i64(&mut self) -> i64 {
        i64::from_be_bytes(self.take())
    }

    fn text(&mut self, length: usize) -> String {
        let (head, rest) = self.0.split_at(length);
        self.0 = rest;
        String::from_utf8(head.to_vec()).unwrap()
    }

    fn c_string(&mut self) -> String {
        let length = self.0.iter().position(|byte| *byte == 0).unwrap();
        let text = self.text(length);
        self.u8();
        text
    }
}

impl Reader {
    fn message(&mut self, data: &[u8]) {
        let mut bytes = Bytes(data);
        match bytes.u8() {
            b'B' => {
                let (commit_lsn, commit_time) = (bytes.u64(), bytes.i64());
                self.open = Some(Transaction { commit_lsn, commit_time, changes: Vec::new() });
            }
            b'C' => self.transactions.push(self.open.take().unwrap()),
            b'R' => self.relation(&mut bytes),
            b'I' => {
                let relation = bytes.u32();
                assert_eq!(bytes.u8(), b'N');
                let new = self.row(relation, &mut bytes, None);
                self.report(relation, None, Some(&new));
            }
            b'U' => {
                let relation = bytes.u32();
                let old = match bytes.u8() {
                    b'N' => None,
                    _ => {
                        let old = self.row(relation, &mut bytes, None);
                        assert_eq!(bytes.u8(), b'N');
                        Some(old)
                    }
                };
                let new = self.row(relation, &mut bytes, old.as_ref());
                // Without an old row no column of the replica identity has changed, and only those matter here.
                if let Some(old) = old.filter(|old| *old != new) {
                    self.report(relation, Some(&old), Some(&new));
                }
            }
            b'D' => {
                let relation = bytes.u32();
                bytes.u8();
                let old = self.row(relation, &mut bytes, None);
                self.report(relation, Some(&old), None);
            }
            b'T' | b'Y' | b'O' => {}
            other => panic!("an unknown message: {:?}", char::from(other)),
        }
    }

    fn relation(&mut self, bytes: &mut Bytes<'_>) {
        let id = bytes.u32();
        let _schema = bytes.c_string();
        let name = bytes.c_string();
        let _identity = bytes.u8();
        let count = bytes.u16();
        let columns = (0..count)
            .map(|_| {
                let _flags = bytes.u8();
                let name = bytes.c_string();
                let (_type, _modifier) = (bytes.u32(), bytes.u32());
                name
            })
            .collect();
        self.relations.insert(id, Relation { name, columns });
    }

    /// A row. Large unchanged values, which are not sent, are taken from `old`.
    fn row(&self, relation: u32, bytes: &mut Bytes<'_>, old: Option<&Row>) -> Row {
        let columns = &self.relations[&relation].columns;
        assert_eq!(usize::from(bytes.u16()), columns.len());
        let value = |name: &String| {
            let value = match bytes.u8() {
                b'n' => None,
                b'u' => old.expect("an old row")[name].clone(),
                b't' => {
                    let length = bytes.u32();
                    Some(bytes.text(usize::try_from(length).unwrap()))
                }
                other => panic!("an unknown kind of value: {:?}", char::from(other)),
            };
            (name.clone(), value)
        };
        columns.iter().map(value).collect()
    }

    fn report(&mut self, relation: u32, old: Option<&Row>, new: Option<&Row>) {
        let table = self.relations[&relation].name.as_str();
        let fact = |row: &Row| {
            let of = |column: &str| row[column].clone().unwrap_or_default();
            let fact = match table {
                "relation_tuples" => Change::tuple(
                    &of("entity_type"),
                    &of("entity_id"),
                    &of("relation"),
                    &of("subject_type"),
                    &of("subject_id"),
                    &of("subject_relation"),
                ),
                "attributes" => Change::attribute(&of("entity_type"), &of("entity_id"), &of("attribute"), &of("value")),
                other => panic!("a row of a table that is not watched: {other}"),
            };
            (of("tenant_id"), fact)
        };
        let deleted = old.map(fact).map(|(tenant, fact)| (tenant, Change::delete(fact)));
        let created = new.map(fact).map(|(tenant, fact)| (tenant, Change::create(fact)));
        self.open.as_mut().unwrap().changes.extend(deleted.into_iter().chain(created));
    }
}
