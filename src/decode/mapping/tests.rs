use super::*;
use crate::decode::pgoutput::{Column, Message, RelationId, ReplicaIdentity, decode};
use crate::model::change::{AttributeValue, Fact, Operation};

/// A table with these columns. Columns with a `*` are in the replica identity.
fn relation(name: &str, columns: &[&str]) -> Relation {
    Relation {
        id: RelationId(1),
        schema: "tuplewatch".into(),
        name: name.into(),
        replica_identity: ReplicaIdentity::Default,
        columns: columns
            .iter()
            .map(|column| Column {
                name: column.trim_end_matches('*').into(),
                in_identity: column.ends_with('*'),
                type_oid: 25,
            })
            .collect(),
    }
}

const TUPLE_COLUMNS: [&str; 7] =
    ["tenant_id*", "entity_type*", "entity_id*", "relation*", "subject_type*", "subject_id*", "subject_relation*"];

fn spec(yaml: &str) -> Spec {
    crate::yaml::from_str(yaml).unwrap()
}

fn preset() -> Mapping {
    Mapping::new(spec(TUPLES_PRESET)).unwrap()
}

/// A row as words: `-` means NULL, `~` an unchanged TOASTed value, `?` and `??` bytes that are not UTF-8.
fn wire(rows: &[(u8, &str)], kind: u8) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0, 1];
    for (tag, row) in rows {
        let words: Vec<_> = row.split(' ').collect();
        bytes.push(*tag);
        bytes.extend((words.len() as u16).to_be_bytes());
        for word in words {
            match word {
                "-" => bytes.push(b'n'),
                "~" => bytes.push(b'u'),
                word => {
                    let word: &[u8] = match word {
                        "''" => b"",
                        "?" => b"\xE9",
                        "??" => b"\xFF",
                        word => word.as_bytes(),
                    };
                    bytes.push(b't');
                    bytes.extend((word.len() as u32).to_be_bytes());
                    bytes.extend(word);
                }
            }
        }
    }
    bytes
}

/// The outcomes of a row message, one line for each step.
fn says(plan: &Plan, bytes: &[u8]) -> Vec<String> {
    let mut lines = Vec::new();
    let mut visit = |step: u64, outcome: Outcome<'_>| {
        lines.push(match outcome {
            Outcome::Change { tenant, operation, fact } => {
                let sign = if operation == Operation::Create { '+' } else { '-' };
                match fact {
                    Fact::Tuple(t) => format!(
                        "{step}{sign} {tenant} {}:{}#{}@{}:{}#{}",
                        t.entity_type, t.entity_id, t.relation, t.subject_type, t.subject_id, t.subject_relation
                    ),
                    Fact::Attribute(a) => {
                        format!("{step}{sign} {tenant} {}:{}${} {:?}", a.entity_type, a.entity_id, a.attribute, a.value)
                    }
                }
            }
            Outcome::Transaction { tenant } => format!("{step}= {tenant}"),
            Outcome::Undecodable(Undecodable { tenant, detail }) => format!("{step}! {tenant:?} {detail}"),
        });
    };
    match decode(bytes).unwrap() {
        Message::Insert { new, .. } => plan.insert(new, &mut visit),
        Message::Update { old, new, .. } => plan.update(old, new, &mut visit),
        Message::Delete { old, .. } => plan.delete(old, &mut visit),
        other => panic!("{other:?}"),
    }
    lines
}

fn check(plan: &Plan, kind: u8, rows: &[(u8, &str)], expected: &[&str]) {
    assert_eq!(says(plan, &wire(rows, kind)), expected);
}

#[test]
fn rows_become_changes_of_tuples() {
    let plan = preset().plan(&relation("relation_tuples", &TUPLE_COLUMNS)).unwrap();
    let (a, b) = ("t1 doc 1 viewer user 7 ''", "t1 doc 1 viewer user 8 member");
    check(&plan, b'I', &[(b'N', a)], &["2+ t1 doc:1#viewer@user:7#"]);
    check(&plan, b'D', &[(b'K', b)], &["1- t1 doc:1#viewer@user:8#member"]);
    check(&plan, b'U', &[(b'K', a), (b'N', b)], &["1- t1 doc:1#viewer@user:7#", "2+ t1 doc:1#viewer@user:8#member"]);
    check(&plan, b'U', &[(b'O', a), (b'N', a)], &[]);
    check(&plan, b'U', &[(b'N', a)], &[]);
    // A row that moves to another tenant is deleted from one and created for the other.
    check(
        &plan,
        b'U',
        &[(b'K', a), (b'N', "t2 doc 1 viewer user 7 ''")],
        &["1- t1 doc:1#viewer@user:7#", "2+ t2 doc:1#viewer@user:7#"],
    );
}

#[test]
fn columns_are_found_by_name() {
    let plan = preset().plan(&relation(
        "relation_tuples",
        &[
            "subject_id*",
            "note",
            "entity_id*",
            "tenant_id*",
            "relation*",
            "entity_type*",
            "subject_relation*",
            "subject_type*",
        ],
    ));
    check(&plan.unwrap(), b'I', &[(b'N', "7 x 1 t1 viewer doc - user")], &["2+ t1 doc:1#viewer@user:7#"]);
    assert!(preset().plan(&relation("other", &TUPLE_COLUMNS)).is_none());
}

#[test]
fn rows_become_changes_of_attributes() {
    let columns = ["tenant_id*", "entity_type*", "entity_id*", "attribute*", "value*"];
    let plan = preset().plan(&relation("attributes", &columns)).unwrap();
    let public = |data: &str| {
        format!("t1 doc 1 public {{\"@type\":\"type.googleapis.com/base.v1.BooleanValue\",\"data\":{data}}}")
    };
    let (on, off) = (public("true"), public("false"));
    let expected = |sign: &str, value: bool| format!("{sign} t1 doc:1$public {:?}", AttributeValue::Boolean(value));
    check(&plan, b'I', &[(b'N', &on)], &[&expected("2+", true)]);
    check(&plan, b'U', &[(b'O', &on), (b'N', &off)], &[&expected("1-", true), &expected("2+", false)]);
    // The value was TOASTed, and only the entity's id changed: the value comes from the old row.
    check(
        &plan,
        b'U',
        &[(b'O', &on), (b'N', "t1 doc 2 public ~")],
        &[&expected("1-", true), &expected("2+", true).replace("doc:1", "doc:2")],
    );
    check(
        &plan,
        b'I',
        &[(b'N', "t1 doc 1 public {}")],
        &["2! Some(\"t1\") the value is not an object of just '@type' and 'data'"],
    );
    check(
        &plan,
        b'U',
        &[(b'O', "t1 doc 1 public ~"), (b'N', "t1 doc 2 public ~")],
        &[
            "1! Some(\"t1\") value is a TOASTed value that was not sent (REPLICA IDENTITY FULL sends it)",
            "2! Some(\"t1\") value is a TOASTed value that was not sent (REPLICA IDENTITY FULL sends it)",
        ],
    );
}

#[test]
fn undecodable_rows() {
    let mapping = preset();
    let plan = mapping.plan(&relation("relation_tuples", &TUPLE_COLUMNS)).unwrap();
    check(&plan, b'I', &[(b'N', "t1 doc - viewer user 7 ''")], &["2! Some(\"t1\") entity_id is NULL"]);
    check(&plan, b'I', &[(b'N', "- doc 1 viewer user 7 ''")], &["2! None tenant is NULL"]);
    check(&plan, b'I', &[(b'N', "'' doc 1 viewer user 7 ''")], &["2! None the tenant is empty"]);

    let not_utf8 =
        "Some(\"t1\") entity_id is not UTF-8, and the database has no encoding to convert it from (SQL_ASCII)";
    let (one, other) = ("t1 doc ? viewer user 7 ''", "t1 doc ?? viewer user 7 ''");
    check(&plan, b'I', &[(b'N', one)], &[&format!("2! {not_utf8}")]);
    check(&plan, b'U', &[(b'K', one), (b'N', one)], &[]);
    check(&plan, b'U', &[(b'K', one), (b'N', other)], &[&format!("1! {not_utf8}"), &format!("2! {not_utf8}")]);

    let mut columns = TUPLE_COLUMNS;
    columns[3] = "relation";
    let plan = mapping.plan(&relation("relation_tuples", &columns)).unwrap();
    let row = "t1 doc 1 viewer user 7 ''";
    check(&plan, b'I', &[(b'N', row)], &["2+ t1 doc:1#viewer@user:7#"]);
    let lacks = "1! Some(\"t1\") DELETE without the old value of column relation: the replica identity lacks it \
                 (ALTER TABLE tuplewatch.relation_tuples REPLICA IDENTITY FULL)";
    check(&plan, b'D', &[(b'K', row)], &[lacks]);
    check(&plan, b'U', &[(b'N', row)], &[&lacks.replace("DELETE", "UPDATE")]);

    columns[3] = "renamed*";
    let plan = mapping.plan(&relation("relation_tuples", &columns)).unwrap();
    check(&plan, b'I', &[(b'N', row)], &["2! Some(\"t1\") relation cannot be read: the table has no column relation"]);
}

/// Permify's own tables: rows are inserted and marked, and the order of the columns varies.
#[test]
fn the_permify_preset_maps_marked_rows() {
    let mapping = Mapping::new(spec(PERMIFY_PRESET).in_schema("Authz")).unwrap();
    assert_eq!(mapping.tenants().unwrap().table.to_string(), "Authz.tenants");
    assert!(mapping.tells_transactions() && !preset().tells_transactions());
    let plan = |name: &str, columns: &[&str]| {
        mapping.plan(&Relation { schema: "Authz".into(), ..relation(name, columns) }).unwrap()
    };
    let tuples = plan(
        "relation_tuples",
        &[
            "id*",
            "entity_type*",
            "entity_id*",
            "relation*",
            "subject_type*",
            "subject_id*",
            "subject_relation*",
            "created_tx_id*",
            "expired_tx_id*",
            "tenant_id*",
        ],
    );
    let row = |expired: &str| format!("5 doc 1 viewer user 7 '' 800 {expired} t1");
    let (live, old_live, marked) = (row("9223372036854775807"), row("0"), row("801"));
    let (create, delete) = ("2+ t1 doc:1#viewer@user:7#", "1- t1 doc:1#viewer@user:7#");
    check(&tuples, b'I', &[(b'N', &live)], &[create]);
    check(&tuples, b'U', &[(b'O', &live), (b'N', &marked)], &[delete]);
    check(&tuples, b'U', &[(b'O', &old_live), (b'N', &marked)], &[delete]);
    // The migration to the maximum, garbage collection, and the deletion of a tenant.
    check(&tuples, b'U', &[(b'O', &old_live), (b'N', &live)], &[]);
    check(&tuples, b'D', &[(b'O', &marked)], &[]);
    check(&tuples, b'D', &[(b'O', &live)], &[delete]);

    let transactions = plan("transactions", &["tenant_id", "id*", "snapshot", "timestamp"]);
    let transaction = "t1 800 800:801: now";
    check(&transactions, b'I', &[(b'N', transaction)], &["2= t1"]);
    check(&transactions, b'I', &[(b'N', "- 800 800:801: now")], &["2! None tenant is NULL"]);
    // Its old rows are not read, whatever its replica identity.
    check(&transactions, b'U', &[(b'N', transaction)], &[]);
    check(&transactions, b'D', &[(b'K', transaction)], &[]);
}

#[test]
fn custom_tables_are_mapped() {
    let mapping = Mapping::new(spec(
        r#"
        tables:
          - table: public.members
            tenant: { constant: acme }
            tuple:
              entity_type: { constant: team }
              entity_id: team_id
              relation: role
              subject_type: { constant: user }
              subject_id: { template: "u-{user_id}" }
            soft_delete: { column: removed_at, null_is_live: true }
        "#,
    ))
    .unwrap();
    let mut relation = relation("members", &["team_id*", "role*", "user_id*", "removed_at*"]);
    relation.schema = "public".into();
    let plan = mapping.plan(&relation).unwrap();
    let (live, marked) = ("9 owner 5 -", "9 owner 5 yesterday");
    let (create, delete) = ("2+ acme team:9#owner@user:u-5#", "1- acme team:9#owner@user:u-5#");
    check(&plan, b'I', &[(b'N', live)], &[create]);
    check(&plan, b'I', &[(b'N', marked)], &[]);
    check(&plan, b'U', &[(b'O', live), (b'N', marked)], &[delete]);
    check(&plan, b'U', &[(b'O', marked), (b'N', live)], &[create]);
    check(&plan, b'U', &[(b'O', marked), (b'N', "9 owner 6 today")], &[]);
    check(&plan, b'D', &[(b'O', marked)], &[]);
    check(&plan, b'D', &[(b'O', live)], &[delete]);
    assert_ne!(mapping.fingerprint(), preset().fingerprint());
}

#[test]
fn invalid_mappings_are_refused() {
    let tuple = "tuple: { entity_type: a, entity_id: a, relation: a, subject_type: a, subject_id: a }";
    let check = |yaml: &str, expected: &str| {
        assert_eq!(Mapping::new(spec(yaml)).unwrap_err().to_string(), expected);
    };
    check("tables: []", "the mapping names no table");
    check(
        "tables: [{ table: a.b, tenant: t }]",
        "table a.b of the mapping needs exactly one of 'tuple', 'attribute' and 'transaction: true'",
    );
    check(
        &format!("tables: [{{ table: a.b, tenant: t, {tuple} }}, {{ table: a.b, tenant: t, {tuple} }}]"),
        "the mapping names table a.b twice",
    );
    check(
        &format!("tables: [{{ table: a.b, tenant: {{ template: 'x{{' }}, {tuple} }}]"),
        "table a.b of the mapping has a malformed template 'x{': columns stand in braces, as in user:{id}",
    );
    check(
        &format!("tables: [{{ table: a.b, tenant: t, {tuple}, soft_delete: {{ column: c }} }}]"),
        "table a.b of the mapping has a soft_delete with neither 'live' values nor 'null_is_live'",
    );
}
