//! Decodes pgoutput, protocol version 1, text format.
//!
//! [`boundary`] decodes Begin, Commit and logical messages. [`decode`] decodes the messages between them: Relation,
//! Type, Origin, Insert, Update, Delete and Truncate, as PostgreSQL's "Logical Replication Message Formats" defines
//! them. The decoder is pure: it borrows from the input, allocates nothing for a row, and returns an error for
//! malformed bytes instead of panicking. A message of an unknown type is an error too, because skipping it could lose a
//! change.
//!
//! A row message names its table by a relation id that an earlier Relation message of the same session defined; see
//! [`RelationId`]. The [`RelationCache`] keeps these definitions, in the form that its user derives from them.

mod reader;

use reader::Reader;
use std::collections::HashMap;
use std::fmt;

/// The oid of a table, by which row messages name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelationId(pub u32);

/// The old column values that UPDATE and DELETE carry: `relreplident`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaIdentity {
    /// The values of the primary key.
    Default,
    /// No values.
    Nothing,
    /// All values.
    Full,
    /// The values of a chosen unique index.
    Index,
}

/// The definition of a table for the rows that follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation {
    /// Its oid.
    pub id: RelationId,
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// The content of old rows.
    pub replica_identity: ReplicaIdentity,
    /// In the order of the values in rows.
    pub columns: Vec<Column>,
}

impl fmt::Display for Relation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

/// A published column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Whether the column is part of the replica identity, so that old rows carry it.
    pub in_identity: bool,
    /// The oid of its type.
    pub type_oid: u32,
}

/// A transaction boundary, or a message written with `pg_logical_emit_message`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boundary<'a> {
    /// A transaction begins.
    Begin {
        /// Its commit LSN (`final_lsn`).
        commit: u64,
        /// When it committed: microseconds since 2000-01-01 00:00 UTC.
        commit_time: i64,
        /// The lower half of its id.
        xid: u32,
    },
    /// A transaction ends.
    Commit {
        /// Its commit LSN.
        commit: u64,
        /// Its end LSN.
        end: u64,
    },
    /// A logical message.
    Logical {
        /// Whether it belongs to the transaction around it.
        is_transactional: bool,
        /// The name of the program that it belongs to, in the database's encoding.
        prefix: &'a [u8],
        /// The content.
        content: &'a [u8],
    },
}

/// One decoded message.
#[derive(Clone, Debug, PartialEq)]
pub enum Message<'a> {
    /// Defines a table for the rows that follow.
    Relation(Relation),
    /// Defines a type, which the text format does not need.
    Type,
    /// The transaction was replicated from another server.
    Origin,
    /// A row was inserted.
    Insert {
        /// Its table.
        relation: RelationId,
        /// The row.
        new: Row<'a>,
    },
    /// A row was changed.
    Update {
        /// Its table.
        relation: RelationId,
        /// The old row, as far as the replica identity includes it. Absent if no column of the identity changed and the
        /// identity is not FULL.
        old: Option<Row<'a>>,
        /// The new row.
        new: Row<'a>,
    },
    /// A row was deleted.
    Delete {
        /// Its table.
        relation: RelationId,
        /// The old row, as far as the replica identity includes it.
        old: Row<'a>,
    },
    /// Tables were emptied.
    Truncate {
        /// The tables.
        relations: Vec<RelationId>,
    },
}

/// One column value of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// SQL NULL. In the old row of an UPDATE or DELETE it also means "not part of the replica identity".
    Null,
    /// A TOASTed value that did not change and was not sent.
    Unchanged,
    /// The value's text, in UTF-8 by the session's `client_encoding`.
    Text(&'a str),
    /// Text that is not UTF-8. A database with the encoding SQL_ASCII accepts any bytes, and PostgreSQL cannot convert them.
    Bytes(&'a [u8]),
}

/// The values of a row, in the order of its relation's columns. They are checked when decoded, so iterating cannot fail.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Row<'a> {
    columns: u16,
    bytes: &'a [u8],
}

/// The reason why bytes are not a pgoutput message. All of these errors are lasting: the server sends the same bytes
/// again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The message ends too early.
    #[error("a pgoutput message ends in the middle of {0}")]
    Truncated(&'static str),
    /// The message has further bytes behind its end.
    #[error("a pgoutput message of type '{0}' has {1} bytes behind its end")]
    Trailing(char, usize),
    /// Protocol version 1 has no message type for the first byte.
    #[error("unknown pgoutput message type 0x{0:02x}: this server speaks a newer protocol than tuplewatch knows")]
    UnknownType(u8),
    /// The message has an unknown tag.
    #[error("unknown tag 0x{tag:02x} for {what} in a pgoutput message")]
    UnknownTag {
        /// The tagged part.
        what: &'static str,
        /// The byte.
        tag: u8,
    },
    /// A name is not UTF-8. (Such a value becomes [`Value::Bytes`].)
    #[error("{0} in a pgoutput message is not UTF-8")]
    NotUtf8(&'static str),
    /// A negative count or length.
    #[error("a negative {0} in a pgoutput message")]
    Negative(&'static str),
}

/// Decodes a [`Boundary`]; `None` for any other message, which [`decode`] decodes.
///
/// # Errors
/// The bytes are not exactly one message.
pub fn boundary(bytes: &[u8]) -> Result<Option<Boundary<'_>>, Error> {
    let mut reader = Reader::new(bytes);
    let kind = reader.u8("a message type")?;
    let boundary = match kind {
        b'B' => {
            let commit = reader.u64("a commit LSN")?;
            let commit_time = reader.i64("a commit time")?;
            Boundary::Begin { commit, commit_time, xid: reader.u32("a transaction id")? }
        }
        b'C' => {
            reader.u8("flags of a commit")?;
            let commit = reader.u64("a commit LSN")?;
            let end = reader.u64("an end LSN")?;
            reader.i64("a commit time")?;
            Boundary::Commit { commit, end }
        }
        b'M' => {
            let flags = reader.u8("flags of a logical message")?;
            reader.u64("a logical message's LSN")?;
            let prefix = reader.c_string("a logical message's prefix")?;
            let length = reader.i32("a logical message's length")?;
            let length = usize::try_from(length).map_err(|_| Error::Negative("logical message's length"))?;
            let content = reader.bytes(length, "a logical message")?;
            Boundary::Logical { is_transactional: flags & 1 == 1, prefix, content }
        }
        _ => return Ok(None),
    };
    whole(kind, &reader).map(|()| Some(boundary))
}

fn whole(kind: u8, reader: &Reader<'_>) -> Result<(), Error> {
    match reader.remaining() {
        0 => Ok(()),
        n => Err(Error::Trailing(char::from(kind), n)),
    }
}

/// Decodes any other message than a [`Boundary`].
///
/// # Errors
/// The bytes are not exactly one message of protocol version 1 in text format.
pub fn decode(bytes: &[u8]) -> Result<Message<'_>, Error> {
    let mut reader = Reader::new(bytes);
    let kind = reader.u8("a message type")?;
    let message = match kind {
        b'R' => Message::Relation(relation(&mut reader)?),
        b'Y' => {
            reader.u32("a type id")?;
            reader.str("a type's schema")?;
            reader.str("a type's name")?;
            Message::Type
        }
        b'O' => {
            reader.u64("an origin's commit LSN")?;
            reader.str("an origin's name")?;
            Message::Origin
        }
        b'I' => {
            let relation = RelationId(reader.u32("a relation id")?);
            match reader.u8("a row tag")? {
                b'N' => Message::Insert { relation, new: row(&mut reader)? },
                tag => return Err(Error::UnknownTag { what: "the row of an INSERT", tag }),
            }
        }
        b'U' => {
            let relation = RelationId(reader.u32("a relation id")?);
            let mut tag = reader.u8("a row tag")?;
            let old = if matches!(tag, b'K' | b'O') {
                let old = row(&mut reader)?;
                tag = reader.u8("a row tag")?;
                Some(old)
            } else {
                None
            };
            match tag {
                b'N' => Message::Update { relation, old, new: row(&mut reader)? },
                tag => return Err(Error::UnknownTag { what: "a row of an UPDATE", tag }),
            }
        }
        b'D' => {
            let relation = RelationId(reader.u32("a relation id")?);
            match reader.u8("a row tag")? {
                b'K' | b'O' => Message::Delete { relation, old: row(&mut reader)? },
                tag => return Err(Error::UnknownTag { what: "the row of a DELETE", tag }),
            }
        }
        b'T' => {
            let count =
                usize::try_from(reader.i32("a relation count")?).map_err(|_| Error::Negative("relation count"))?;
            reader.u8("truncate options")?;
            // The capacity is limited by the remaining bytes, because the count may be wrong.
            let mut relations = Vec::with_capacity(count.min(reader.remaining() / 4));
            for _ in 0..count {
                relations.push(RelationId(reader.u32("a relation id")?));
            }
            Message::Truncate { relations }
        }
        other => return Err(Error::UnknownType(other)),
    };
    whole(kind, &reader).map(|()| message)
}

fn relation(reader: &mut Reader<'_>) -> Result<Relation, Error> {
    let id = RelationId(reader.u32("a relation id")?);
    let schema = match reader.str("a schema name")? {
        // pgoutput sends an empty name for pg_catalog.
        "" => "pg_catalog",
        schema => schema,
    };
    let name = reader.str("a table name")?;
    let replica_identity = match reader.u8("a replica identity")? {
        b'd' => ReplicaIdentity::Default,
        b'n' => ReplicaIdentity::Nothing,
        b'f' => ReplicaIdentity::Full,
        b'i' => ReplicaIdentity::Index,
        tag => return Err(Error::UnknownTag { what: "a replica identity", tag }),
    };
    let count = reader.u16("a column count")?;
    let mut columns = Vec::with_capacity(usize::from(count).min(reader.remaining()));
    for _ in 0..count {
        let flags = reader.u8("column flags")?;
        let name = reader.str("a column name")?.to_owned();
        let type_oid = reader.u32("a type id")?;
        reader.i32("a type modifier")?;
        columns.push(Column { name, in_identity: flags & 1 == 1, type_oid });
    }
    Ok(Relation { id, schema: schema.to_owned(), name: name.to_owned(), replica_identity, columns })
}

fn row<'a>(reader: &mut Reader<'a>) -> Result<Row<'a>, Error> {
    let columns = reader.u16("a column count")?;
    let bytes = reader.rest();
    for _ in 0..columns {
        value(reader)?;
    }
    let used = bytes.len() - reader.remaining();
    Ok(Row { columns, bytes: bytes.get(..used).unwrap_or(bytes) })
}

fn value<'a>(reader: &mut Reader<'a>) -> Result<Value<'a>, Error> {
    match reader.u8("a column value")? {
        b'n' => Ok(Value::Null),
        b'u' => Ok(Value::Unchanged),
        b't' => {
            let length = reader.i32("a value's length")?;
            let length = usize::try_from(length).map_err(|_| Error::Negative("value length"))?;
            let text = reader.bytes(length, "a column value")?;
            Ok(std::str::from_utf8(text).map_or(Value::Bytes(text), Value::Text))
        }
        tag => Err(Error::UnknownTag { what: "a column value (is the binary format on?)", tag }),
    }
}

impl<'a> Row<'a> {
    /// The values, in column order.
    pub fn values(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let mut reader = Reader::new(self.bytes);
        (0..self.columns).map_while(move |_| value(&mut reader).ok())
    }

    /// The number of values.
    pub const fn len(&self) -> usize {
        self.columns as usize
    }

    /// Whether there are no values.
    pub const fn is_empty(&self) -> bool {
        self.columns == 0
    }
}

/// Omits the values, because they are user data, and debug output may reach logs.
impl fmt::Debug for Row<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Row({} columns)", self.columns)
    }
}

/// The relations of this session, each as the `T` that the user of the cache derived from its Relation message.
///
/// A cache belongs to one session. A new session starts with an empty one, because the server sends each definition again
/// before its first use.
#[derive(Debug)]
pub struct RelationCache<T> {
    relations: HashMap<RelationId, T>,
}

impl<T> Default for RelationCache<T> {
    fn default() -> Self {
        Self { relations: HashMap::new() }
    }
}

impl<T> RelationCache<T> {
    /// Sets the definition of a table that is new or was altered.
    pub fn define(&mut self, id: RelationId, derived: T) {
        self.relations.insert(id, derived);
    }

    /// The value derived from the latest definition.
    pub fn get(&self, id: RelationId) -> Option<&T> {
        self.relations.get(&id)
    }
}

#[cfg(test)]
mod tests;
