use super::*;
use proptest::prelude::*;

/// Writes messages as a server would send them. `tests/` checks the decoder against real servers.
#[derive(Default)]
struct Wire(Vec<u8>);

impl Wire {
    fn of(kind: u8) -> Self {
        Self(vec![kind])
    }
    fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }
    fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }
    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }
    fn str(mut self, text: &str) -> Self {
        self.0.extend(text.as_bytes());
        self.u8(0)
    }
    fn value(self, bytes: &[u8]) -> Self {
        let mut wire = self.u8(b't').u32(bytes.len() as u32);
        wire.0.extend(bytes);
        wire
    }
    fn row(mut self, tag: u8, values: &[Value<'_>]) -> Self {
        self = self.u8(tag).u16(values.len() as u16);
        for value in values {
            self = match value {
                Value::Null => self.u8(b'n'),
                Value::Unchanged => self.u8(b'u'),
                Value::Text(text) => self.value(text.as_bytes()),
                Value::Bytes(bytes) => self.value(bytes),
            };
        }
        self
    }
}

fn values(row: &Row<'_>) -> Vec<String> {
    row.values().map(|value| format!("{value:?}")).collect()
}

#[test]
fn begin_commit_and_messages_are_boundaries() {
    let wire = Wire::of(b'B').u32(0).u32(900).u32(0).u32(5).u32(7);
    assert_eq!(boundary(&wire.0), Ok(Some(Boundary::Begin { commit: 900, commit_time: 5, xid: 7 })));
    let wire = Wire::of(b'C').u8(0).u32(1).u32(900).u32(1).u32(950).u32(0).u32(5);
    assert_eq!(boundary(&wire.0), Ok(Some(Boundary::Commit { commit: (1 << 32) + 900, end: (1 << 32) + 950 })));
    for is_transactional in [true, false] {
        // The prefix is not UTF-8.
        let wire = Wire::of(b'M').u8(is_transactional.into()).u32(0).u32(900).u8(0xE9).u8(0).u32(2).u8(b'h').u8(0);
        let message = Boundary::Logical { is_transactional, prefix: b"\xE9", content: b"h\0" };
        assert_eq!(boundary(&wire.0), Ok(Some(message)));
    }
    assert_eq!(boundary(&Wire::of(b'I').0), Ok(None));
    let check = |wire: Wire, expected: Error| assert_eq!(boundary(&wire.0), Err(expected));
    check(Wire::default(), Error::Truncated("a message type"));
    check(Wire::of(b'B').u32(0), Error::Truncated("a commit LSN"));
    check(Wire::of(b'C').u8(0).u32(0).u32(0).u32(0).u32(0).u32(0).u32(0).u8(0), Error::Trailing('C', 1));
    check(Wire::of(b'M').u8(1).u32(0).u32(0).u8(0).u32(u32::MAX), Error::Negative("logical message's length"));
    check(Wire::of(b'M').u8(1).u32(0).u32(0).u8(0).u32(1), Error::Truncated("a logical message"));
}

#[test]
fn a_relation_message_decodes() {
    let wire = Wire::of(b'R').u32(7).str("public").str("doc").u8(b'f').u16(2);
    let wire = wire.u8(1).str("id").u32(23).u32(u32::MAX).u8(0).str("body").u32(25).u32(u32::MAX);
    let Ok(Message::Relation(relation)) = decode(&wire.0) else { panic!() };
    assert_eq!(relation.to_string(), "public.doc");
    assert_eq!(relation.replica_identity, ReplicaIdentity::Full);
    let columns: Vec<_> = relation.columns.iter().map(|c| (c.name.as_str(), c.in_identity, c.type_oid)).collect();
    assert_eq!(columns, [("id", true, 23), ("body", false, 25)]);
}

#[test]
fn row_messages_decode() {
    let new = [Value::Text("é"), Value::Null, Value::Unchanged, Value::Text(""), Value::Bytes(b"\xE9")];
    let expected: Vec<_> = new.iter().map(|value| format!("{value:?}")).collect();

    let wire = Wire::of(b'I').u32(7).row(b'N', &new);
    let Ok(Message::Insert { relation: RelationId(7), new: row }) = decode(&wire.0) else { panic!() };
    assert_eq!(values(&row), expected);

    for old_tag in [None, Some(b'K'), Some(b'O')] {
        let wire = Wire::of(b'U').u32(7);
        let wire = if let Some(tag) = old_tag { wire.row(tag, &[Value::Text("old")]) } else { wire };
        let wire = wire.row(b'N', &new);
        let Ok(Message::Update { old, new: row, .. }) = decode(&wire.0) else { panic!() };
        assert_eq!(old.is_some(), old_tag.is_some());
        assert_eq!(values(&row), expected);
    }

    let wire = Wire::of(b'D').u32(7).row(b'K', &[Value::Text("1"), Value::Null]);
    let Ok(Message::Delete { old, .. }) = decode(&wire.0) else { panic!() };
    assert_eq!(old.len(), 2);
}

#[test]
fn other_messages_decode() {
    let wire = Wire::of(b'T').u32(2).u8(1).u32(7).u32(8);
    assert_eq!(decode(&wire.0), Ok(Message::Truncate { relations: vec![RelationId(7), RelationId(8)] }));
    let wire = Wire::of(b'Y').u32(7).str("public").str("mood");
    assert_eq!(decode(&wire.0), Ok(Message::Type));
    let wire = Wire::of(b'O').u32(0).u32(9).str("elsewhere");
    assert_eq!(decode(&wire.0), Ok(Message::Origin));
}

#[test]
fn malformed_messages_are_refused() {
    let check = |wire: Wire, expected: Error| assert_eq!(decode(&wire.0), Err(expected));
    check(Wire::default(), Error::Truncated("a message type"));
    check(Wire::of(b'S'), Error::UnknownType(b'S'));
    check(Wire::of(b'I').u32(7).row(b'X', &[]), Error::UnknownTag { what: "the row of an INSERT", tag: b'X' });
    check(Wire::of(b'I').u32(7).row(b'N', &[]).u8(0), Error::Trailing('I', 1));
    check(Wire::of(b'T').u32(u32::MAX).u8(0), Error::Negative("relation count"));
    check(Wire::of(b'T').u32(1 << 30).u8(0), Error::Truncated("a relation id"));
    check(Wire::of(b'I').u32(7).u8(b'N').u16(1).u8(b't').u32(u32::MAX), Error::Negative("value length"));
    check(Wire::of(b'O').u32(0).u32(9).u8(0xFF).u8(0), Error::NotUtf8("an origin's name"));
    check(
        Wire::of(b'I').u32(7).u8(b'N').u16(1).u8(b'b'),
        Error::UnknownTag { what: "a column value (is the binary format on?)", tag: b'b' },
    );
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
        let _ = (decode(&bytes), boundary(&bytes));
    }

    /// Bytes that begin like a real message get further into the decoder.
    #[test]
    fn damaged_messages_never_panic(
        kind in proptest::sample::select(b"BCMRYOIUDT".to_vec()),
        bytes in proptest::collection::vec(prop_oneof![any::<u8>(), Just(0), Just(b'N'), Just(b't'), Just(b'K')], 0..128),
    ) {
        let mut message = vec![kind];
        message.extend(bytes);
        let _ = boundary(&message);
        if let Ok(Message::Insert { new, .. }) = decode(&message) {
            prop_assert_eq!(new.values().count(), new.len());
        }
    }

    #[test]
    fn rows_round_trip(texts in proptest::collection::vec(proptest::option::of(".*"), 0..20)) {
        let sent: Vec<_> = texts.iter().map(|t| t.as_deref().map_or(Value::Null, Value::Text)).collect();
        let wire = Wire::of(b'I').u32(7).row(b'N', &sent);
        let Ok(Message::Insert { new, .. }) = decode(&wire.0) else { panic!() };
        prop_assert_eq!(new.values().collect::<Vec<_>>(), sent);
    }
}
