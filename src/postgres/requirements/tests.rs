//! Tests that break each requirement in a real PostgreSQL, and check that it is reported and that its fix repairs it.

use super::*;
use crate::admin::setup::{Event, Setup, Teardown};
use crate::dev_postgres::StopMode;
use crate::model::diagnostic::Severity;
use crate::postgres::connection::Connection;
use crate::postgres::slot::AckDelay;
use crate::postgres::test_postgres::{Database, Place, cluster, connect, one_table, plain, tuples};

fn silent(_: Event<'_>) {}

fn expectation<'a>(mapping: &'a Mapping, slot: &'a str) -> Expectation<'a> {
    let ack_delay = AckDelay::default();
    Expectation { mapping, slot, publication: "feed", slot_expected: true, ack_delay, commands: plain() }
}

async fn errors(client: &Client, expected: &Expectation<'_>) -> Vec<Diagnostic> {
    let diagnostics = check(client, expected).await.unwrap();
    diagnostics.into_iter().filter(|diagnostic| diagnostic.severity == Severity::Error).collect()
}

/// A database that meets a mapping's requirements, and a role with only REPLICATION and SELECT.
struct Ready {
    database: Database,
    poor: Connection,
    mapping: Mapping,
}

impl Ready {
    async fn new(mapping: Mapping, sql: &str) -> Self {
        let database = Database::new().await;
        database.execute(sql).await;
        let is_preset = mapping.tenants().is_some();
        let setup = Setup {
            mapping: &mapping,
            slot: &database.name,
            publication: "feed",
            apply_schema: is_preset,
            recreate_slot: false,
            failover: true,
            commands: plain(),
        };
        setup.apply(&database.connection, &mut silent).await.unwrap();
        let schema = if is_preset { "tuplewatch" } else { "public" };
        let role = format!("r{}", database.name);
        let sql = format!(
            "CREATE ROLE {role} LOGIN REPLICATION; GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {role};
             REVOKE ALL ON SCHEMA {schema} FROM PUBLIC; GRANT USAGE ON SCHEMA {schema} TO {role}"
        );
        database.execute(&sql).await;
        let poor = database.connect_as(&role).await;
        let ready = Self { database, poor, mapping };
        assert_eq!(ready.errors().await, []);
        ready
    }

    async fn errors(&self) -> Vec<Diagnostic> {
        errors(&self.poor.client, &expectation(&self.mapping, &self.database.name)).await
    }

    /// `{role}` and `{slot}` stand for the names of this test.
    async fn heals(&self, damage: &str, subject: &str, what: &str) {
        let names = |text: &str| {
            text.replace("{role}", &format!("r{}", self.database.name)).replace("{slot}", &self.database.name)
        };
        for statement in names(damage).split(';') {
            self.database.execute(statement).await;
        }
        let found = self.errors().await;
        let [diagnostic] = found.as_slice() else { panic!("{damage}: {found:#?}") };
        assert_eq!(diagnostic.subject, names(subject), "{damage}");
        assert!(diagnostic.what.contains(&names(what)), "{damage}: {diagnostic}");
        self.database.execute(diagnostic.fix.as_deref().unwrap()).await;
        assert_eq!(self.errors().await, [], "{damage}, then {diagnostic}");
    }

    async fn away(self) {
        let teardown = Teardown { slot: &self.database.name, publication: "feed" };
        teardown.apply(&self.database.connection, &mut silent).await.unwrap();
    }
}

#[tokio::test]
async fn an_empty_database_lacks_everything() {
    let database = Database::new().await;
    let mapping = tuples();
    let found = errors(&database.connection.client, &expectation(&mapping, &database.name)).await;
    let subjects: Vec<&str> = found.iter().map(|diagnostic| diagnostic.subject.as_str()).collect();
    let slot = format!("replication slot {}", database.name);
    let expected = [
        "table tuplewatch.relation_tuples",
        "table tuplewatch.attributes",
        "table tuplewatch.tenants",
        "publication feed",
        &slot,
    ];
    assert_eq!(subjects, expected, "{found:#?}");
    assert!(found.iter().all(|diagnostic| diagnostic.fix.is_some()));
    let text = found.first().unwrap().to_string();
    assert!(text.starts_with("error    table tuplewatch.relation_tuples: does not exist\n         fix: "), "{text}");
}

#[tokio::test]
async fn each_damage_to_the_preset_is_found() {
    let ready = Ready::new(tuples(), "").await;
    let tuples = "table tuplewatch.relation_tuples";
    let attributes = "table tuplewatch.attributes";
    for (damage, subject, what) in [
        (
            "ALTER PUBLICATION feed SET (publish = 'insert, delete')",
            "publication feed",
            "does not publish update, truncate",
        ),
        ("ALTER PUBLICATION feed DROP TABLE tuplewatch.attributes", attributes, "is not in publication feed"),
        ("ALTER TABLE tuplewatch.attributes REPLICA IDENTITY DEFAULT", attributes, "old rows lack column value"),
        ("ALTER TABLE tuplewatch.relation_tuples REPLICA IDENTITY NOTHING", tuples, "old rows lack column"),
        ("REVOKE SELECT ON tuplewatch.attributes FROM {role}", attributes, "no SELECT"),
        ("REVOKE SELECT ON tuplewatch.tenants FROM {role}", "table tuplewatch.tenants", "no SELECT"),
        ("ALTER ROLE {role} NOREPLICATION", "role {role}", "no REPLICATION"),
        (
            "ALTER TABLE tuplewatch.attributes ENABLE ROW LEVEL SECURITY",
            attributes,
            "row level security applies to role {role}",
        ),
        ("ALTER ROLE {role} NOBYPASSRLS", attributes, "row level security applies"),
        (
            "ALTER ROLE {role} NOBYPASSRLS; ALTER TABLE tuplewatch.attributes DISABLE ROW LEVEL SECURITY; \
             ALTER TABLE tuplewatch.tenants ENABLE ROW LEVEL SECURITY; ALTER TABLE tuplewatch.tenants FORCE ROW LEVEL SECURITY",
            "table tuplewatch.tenants",
            "row level security applies",
        ),
    ] {
        ready.heals(damage, subject, what).await;
    }
    ready.database.execute("DROP PUBLICATION feed").await;
    let found = ready.errors().await;
    let [diagnostic] = found.as_slice() else { panic!("{found:#?}") };
    assert_eq!((diagnostic.subject.as_str(), diagnostic.what.as_str()), ("publication feed", "does not exist"));
    assert!(diagnostic.fix.as_deref().unwrap().starts_with("tuplewatch setup --recreate-slot"), "{diagnostic}");
    let mapping = crate::postgres::test_postgres::tuples();
    let setup = Setup {
        mapping: &mapping,
        slot: &ready.database.name,
        publication: "feed",
        apply_schema: true,
        recreate_slot: true,
        failover: true,
        commands: plain(),
    };
    setup.apply(&ready.database.connection, &mut silent).await.unwrap();
    assert_eq!(ready.errors().await, []);
    ready.database.execute(&format!("SELECT pg_drop_replication_slot('{}')", ready.database.name)).await;
    let found = ready.errors().await;
    let [diagnostic] = found.as_slice() else { panic!("{found:#?}") };
    assert!(diagnostic.fix.as_deref().unwrap().starts_with("tuplewatch setup --recreate-slot"), "{diagnostic}");
    setup.apply(&ready.database.connection, &mut silent).await.unwrap();
    assert_eq!(ready.errors().await, []);
    if ready.database.major().await >= 15 {
        let filter = "ALTER PUBLICATION feed SET TABLE tuplewatch.attributes, tuplewatch.relation_tuples WHERE (tenant_id <> 'x')";
        ready.heals(filter, tuples, "row filter").await;
        let list =
            "ALTER PUBLICATION feed SET TABLE tuplewatch.attributes, tuplewatch.relation_tuples (tenant_id, relation)";
        ready.heals(list, tuples, "column entity_id is not in the column list").await;
        ready.database.execute("ALTER PUBLICATION feed SET TABLES IN SCHEMA tuplewatch").await;
        assert_eq!(ready.errors().await, []);
    }
    ready.database.execute("DROP PUBLICATION feed; CREATE PUBLICATION feed FOR ALL TABLES").await;
    assert_eq!(ready.errors().await, []);

    ready.database.execute("ALTER TABLE tuplewatch.attributes RENAME COLUMN value TO val").await;
    let found = ready.errors().await;
    let [diagnostic] = found.as_slice() else { panic!("{found:#?}") };
    assert!(diagnostic.what.contains("has no column value"), "{diagnostic}");
    let sql =
        "REVOKE USAGE ON SCHEMA tuplewatch FROM PUBLIC; ALTER TABLE tuplewatch.attributes RENAME COLUMN val TO value";
    ready.database.execute(&format!("{sql}; REVOKE USAGE ON SCHEMA tuplewatch FROM r{}", ready.database.name)).await;
    let found = ready.errors().await;
    assert_eq!(found.len(), 3, "{found:#?}");
    ready.database.execute(found.first().and_then(|diagnostic| diagnostic.fix.as_deref()).unwrap()).await;
    assert_eq!(ready.errors().await, []);
    ready.away().await;
}

#[tokio::test]
async fn partitions_indexes_and_generated_columns_are_checked() {
    let sql = "CREATE TABLE root (tenant text, id text, owner text, more text, PRIMARY KEY (tenant, id, owner)) PARTITION BY LIST (tenant);
               CREATE TABLE leaf PARTITION OF root FOR VALUES IN ('t1')";
    let root = Ready::new(one_table("public.root"), sql).await;
    root.heals(
        "ALTER PUBLICATION feed SET (publish_via_partition_root = false)",
        "table public.root",
        "is partitioned",
    )
    .await;
    root.heals("ALTER TABLE leaf REPLICA IDENTITY NOTHING", "table public.leaf", "old rows lack column").await;

    let leaf = one_table("public.leaf");
    let expected = expectation(&leaf, &root.database.name);
    let found = errors(&root.poor.client, &expected).await;
    let [diagnostic] = found.as_slice() else { panic!("{found:#?}") };
    assert!(diagnostic.what.contains("published as those of the root"), "{diagnostic}");
    root.database.execute(diagnostic.fix.as_deref().unwrap()).await;
    assert_eq!(errors(&root.poor.client, &expected).await, []);
    root.away().await;

    // The INCLUDE columns of an index are not in the identity, nor is a deferrable key.
    let sql =
        "CREATE TABLE t (tenant text NOT NULL, id text NOT NULL, owner text NOT NULL, PRIMARY KEY (tenant, id, owner))";
    let table = Ready::new(one_table("public.t"), sql).await;
    let damage =
        "CREATE UNIQUE INDEX u ON t (tenant, id) INCLUDE (owner); ALTER TABLE t REPLICA IDENTITY USING INDEX u";
    table.heals(damage, "table public.t", "old rows lack column owner").await;
    let damage = "ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t REPLICA IDENTITY DEFAULT; \
                  ALTER TABLE t ADD PRIMARY KEY (tenant, id, owner) DEFERRABLE";
    table.heals(damage, "table public.t", "old rows lack column").await;
    let damage = "ALTER PUBLICATION feed DROP TABLE t; ALTER TABLE t SET UNLOGGED; DROP PUBLICATION feed; \
                  CREATE PUBLICATION feed FOR ALL TABLES";
    table.heals(damage, "table public.t", "is not logged").await;
    // Everything is published, except this column.
    let generated = |kind: &str| {
        let column = format!("owner text GENERATED ALWAYS AS (id || '!') {kind}");
        format!("ALTER TABLE t DROP COLUMN owner; ALTER TABLE t ADD COLUMN {column}")
    };
    let what = "column owner is generated, and not published";
    let lasting = if table.database.major().await >= 18 {
        table.heals(&generated("STORED"), "table public.t", what).await;
        generated("VIRTUAL")
    } else {
        generated("STORED")
    };
    table.database.execute(&lasting).await;
    let found = table.errors().await;
    let [diagnostic] = found.as_slice() else { panic!("{found:#?}") };
    assert!(
        diagnostic.what == what && diagnostic.fix.as_deref().unwrap().starts_with("-- make it an ordinary"),
        "{diagnostic}"
    );
    table.away().await;
}

/// Policies apply to an owner only if they are forced.
#[tokio::test]
async fn row_level_security_of_an_owner_is_found() {
    let sql = "CREATE TABLE t (tenant text, id text, owner text, PRIMARY KEY (tenant, id, owner))";
    let ready = Ready::new(one_table("public.t"), sql).await;
    ready.database.execute(&format!("ALTER TABLE t OWNER TO r{}", ready.database.name)).await;
    ready
        .database
        .execute("ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY mine ON t USING (tenant = 'a')")
        .await;
    assert_eq!(ready.errors().await, []);
    ready.heals("ALTER TABLE t FORCE ROW LEVEL SECURITY", "table public.t", "row level security applies to role").await;
    ready.away().await;
}

#[tokio::test]
async fn inheriting_tables_are_found() {
    let sql = "CREATE TABLE parent (id text); \
               CREATE TABLE t (tenant text, owner text, PRIMARY KEY (tenant, id, owner)) INHERITS (parent)";
    // A parent of the mapped table does not matter.
    let ready = Ready::new(one_table("public.t"), sql).await;
    ready.heals("CREATE TABLE child () INHERITS (t)", "table public.t", "table public.child inherits from it").await;
    let damage = "ALTER TABLE child INHERIT t; CREATE TABLE grandchild () INHERITS (child); CREATE TEMP TABLE own () INHERITS (t)";
    ready.database.execute(damage).await;
    let found = ready.errors().await;
    let [child, grandchild] = found.as_slice() else { panic!("{found:#?}") };
    assert!(child.what.contains("public.child") && grandchild.what.contains("public.grandchild"), "{found:#?}");
    assert!(grandchild.fix.as_deref().unwrap().contains(r#"NO INHERIT "public"."child""#), "{grandchild}");
    ready.database.execute("ALTER TABLE grandchild NO INHERIT child; DROP TABLE own").await;

    let both = crate::postgres::test_postgres::mapping(
        r#"{"tables": [
            {"table": "public.t", "tenant": "tenant", "tuple": {"entity_type": {"constant": "d"}, "entity_id": "id",
             "relation": {"constant": "r"}, "subject_type": {"constant": "u"}, "subject_id": "owner"}},
            {"table": "public.child", "tenant": "tenant", "tuple": {"entity_type": {"constant": "d"}, "entity_id": "id",
             "relation": {"constant": "r"}, "subject_type": {"constant": "u"}, "subject_id": "owner"}}]}"#,
    );
    ready.database.execute("ALTER TABLE child REPLICA IDENTITY FULL; ALTER PUBLICATION feed SET TABLE t, child").await;
    ready.database.execute("GRANT SELECT ON child TO PUBLIC").await;
    assert_eq!(errors(&ready.poor.client, &expectation(&both, &ready.database.name)).await, []);
    ready.away().await;
}

/// Types that store an oid and are written as a name, at any place in a column's type.
#[tokio::test]
async fn types_written_as_names_are_refused() {
    let sql = "CREATE TABLE t (tenant text, id text, owner text, other regclass);
               CREATE DOMAIN named AS regclass; CREATE TYPE pair AS (a int, b named[]); CREATE TYPE oids AS RANGE (SUBTYPE = oid)";
    let ready = Ready::new(one_table("public.t"), sql).await;
    for (type_name, using, named) in [
        ("regclass", "NULL", "regclass"),
        ("named", "NULL", "regclass"),
        ("regrole[]", "NULL", "regrole"),
        ("pair[]", "NULL", "regclass"),
        ("aclitem", "NULL", "aclitem"),
        ("regprocedure", "NULL", "regprocedure"),
    ] {
        let damage = format!("ALTER TABLE t ALTER COLUMN owner TYPE {type_name} USING {using}");
        ready
            .heals(&damage, "table public.t", &format!("column owner holds {named}, which is written as a name"))
            .await;
    }
    ready.database.execute("ALTER TABLE t ALTER COLUMN owner TYPE oids USING NULL").await;
    assert_eq!(ready.errors().await, []);
    ready.away().await;
}

#[tokio::test]
async fn foreign_partitions_are_refused() {
    let sql = "CREATE TABLE root (tenant text, id text, owner text) PARTITION BY LIST (tenant);
               CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER elsewhere FOREIGN DATA WRAPPER nothing";
    let ready = Ready::new(one_table("public.root"), sql).await;
    ready.database.execute("CREATE FOREIGN TABLE far PARTITION OF root FOR VALUES IN ('far') SERVER elsewhere").await;
    let found = ready.errors().await;
    assert!(
        found
            .iter()
            .any(|diagnostic| diagnostic.subject == "table public.far" && diagnostic.what.contains("foreign table")),
        "{found:#?}"
    );
    ready.away().await;
}

#[tokio::test]
async fn unusable_slots_are_found() {
    let sql = "CREATE TABLE t (tenant text, id text, owner text, PRIMARY KEY (tenant, id, owner))";
    let ready = Ready::new(one_table("public.t"), sql).await;
    let other = Database::new().await;
    let slot = &ready.database.name;
    let drop_slot = format!("SELECT pg_drop_replication_slot('{slot}')");
    let in_two_phases = format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput', false, true)");
    for (database, create, what) in [
        (&other, format!("SELECT pg_create_physical_replication_slot('{slot}')"), "is a physical slot"),
        (&other, format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')"), "is for database"),
        (&ready.database, in_two_phases, "two-phase"),
    ] {
        ready.database.execute(&drop_slot).await;
        database.execute(&create).await;
        let found = ready.errors().await;
        let [diagnostic] = found.as_slice() else { panic!("{found:#?}") };
        assert!(diagnostic.what.contains(what) && diagnostic.fix.is_some(), "{diagnostic}");
    }
    // While there is no slot, there must be room for one, and a missing slot is not an error.
    ready.database.execute(&drop_slot).await;
    let expected = Expectation { slot_expected: false, ..expectation(&ready.mapping, slot) };
    let diagnostics = check(&ready.poor.client, &expected).await.unwrap();
    assert!(diagnostics.iter().any(|diagnostic| diagnostic.subject == "max_replication_slots"), "{diagnostics:#?}");
    assert!(diagnostics.iter().all(|diagnostic| diagnostic.severity != Severity::Error), "{diagnostics:#?}");
}

#[tokio::test]
async fn unsuitable_settings_are_found() {
    let place = Place::new();
    let settings = [
        ("wal_level", "replica"),
        ("track_commit_timestamp", "off"),
        ("max_slot_wal_keep_size", "-1"),
        ("max_replication_slots", "0"),
        ("max_wal_senders", "0"),
    ];
    let mut cluster = cluster(place.0.clone(), &settings).await;
    cluster.start().await.unwrap();
    let mapping = tuples();
    let expected = Expectation { slot_expected: false, ..expectation(&mapping, "s") };
    let admin = connect(&cluster.uri("postgres")).await;
    admin.client.batch_execute(include_str!("../../../sql/0001_tables.sql")).await.unwrap();
    let publication = "CREATE PUBLICATION feed FOR ALL TABLES; CREATE ROLE poor LOGIN REPLICATION;
                       GRANT SELECT ON ALL TABLES IN SCHEMA tuplewatch TO poor";
    admin.client.batch_execute(publication).await.unwrap();
    let uri = cluster.uri("postgres").replace("postgres@", "poor@");

    let poor = connect(&uri).await;
    let diagnostics = check(&poor.client, &expected).await.unwrap();
    let bad: Vec<&Diagnostic> = diagnostics.iter().filter(|diagnostic| diagnostic.severity != Severity::Ok).collect();
    let names = |diagnostics: &[&Diagnostic]| {
        diagnostics.iter().map(|diagnostic| diagnostic.subject.clone()).collect::<Vec<_>>()
    };
    let all =
        ["wal_level", "track_commit_timestamp", "max_slot_wal_keep_size", "max_replication_slots", "max_wal_senders"];
    assert_eq!(names(&bad), all, "{bad:#?}");
    for diagnostic in &bad {
        let fix = diagnostic.fix.as_deref().unwrap();
        // ALTER SYSTEM must run alone. The rest of the line is a comment.
        admin.client.batch_execute(fix).await.unwrap_or_else(|error| panic!("{fix}: {error:?}"));
        assert!(fix.contains("restart") != fix.contains("pg_reload_conf()"), "{fix}");
    }
    admin.client.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    // Each session applies the reload only when it is idle.
    let mut diagnostics = Vec::new();
    for _ in 0..100 {
        diagnostics = check(&poor.client, &expected).await.unwrap();
        if diagnostics.iter().any(|diagnostic| diagnostic.what.contains("waits for a restart")) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let wal_level = diagnostics.iter().find(|diagnostic| diagnostic.subject == "wal_level").unwrap();
    assert!(wal_level.what.contains("waits for a restart"), "{wal_level}");

    cluster.restart(StopMode::Fast).await.unwrap();
    let poor = connect(&uri).await;
    let diagnostics = check(&poor.client, &expected).await.unwrap();
    assert!(diagnostics.iter().all(|diagnostic| diagnostic.severity == Severity::Ok), "{diagnostics:#?}");
}

#[tokio::test]
async fn lost_slots_and_taken_walsenders_are_found() {
    let place = Place::new();
    let settings = [("max_slot_wal_keep_size", "1MB"), ("max_wal_senders", "1"), ("max_replication_slots", "1")];
    let mut cluster = cluster(place.0.clone(), &settings).await;
    cluster.start().await.unwrap();
    let admin = connect(&cluster.uri("postgres")).await;
    let sql = "CREATE TABLE t (tenant text, id text, owner text, PRIMARY KEY (tenant, id, owner));
               CREATE PUBLICATION feed FOR TABLE t";
    admin.client.batch_execute(sql).await.unwrap();
    let mapping = one_table("public.t");
    let slot = "SELECT pg_create_logical_replication_slot('s', 'pgoutput')";
    admin.client.batch_execute(slot).await.unwrap();
    assert_eq!(errors(&admin.client, &expectation(&mapping, "s")).await, []);

    let other = Expectation { slot_expected: false, ..expectation(&mapping, "another") };
    let found = errors(&admin.client, &other).await;
    assert_eq!(found.iter().map(|diagnostic| &*diagnostic.subject).collect::<Vec<_>>(), ["max_replication_slots"]);

    let mut replication = admin.endpoint().replicate("tests").await.unwrap();
    let found = errors(&admin.client, &expectation(&mapping, "s")).await;
    assert_eq!(found.iter().map(|diagnostic| &*diagnostic.subject).collect::<Vec<_>>(), ["max_wal_senders"]);
    let refused = admin.endpoint().replicate("tests").await.err().unwrap();
    assert!(!refused.is_definite() && refused.to_string().contains("max_wal_senders"), "{refused}");
    // Our own walsender does not count as an obstacle.
    replication.start("s", "feed").await.unwrap();
    assert_eq!(errors(&admin.client, &expectation(&mapping, "s")).await, []);
    drop(replication);

    let sql = "SELECT count(*) FROM pg_stat_replication";
    while admin.client.query_typed_one(sql, &[]).await.unwrap().get::<_, i64>(0) != 0 {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    for _ in 0..4 {
        for statement in ["INSERT INTO t VALUES (random(), random(), random())", "SELECT pg_switch_wal()", "CHECKPOINT"]
        {
            admin.client.batch_execute(statement).await.unwrap();
        }
    }
    let found = errors(&admin.client, &expectation(&mapping, "s")).await;
    let [diagnostic] = found.as_slice() else { panic!("{found:#?}") };
    assert!(
        diagnostic.what.contains("is lost") && diagnostic.fix.as_deref().unwrap().contains("--recreate-slot"),
        "{diagnostic}"
    );
    let setup = Setup {
        mapping: &mapping,
        slot: "s",
        publication: "feed",
        apply_schema: false,
        recreate_slot: true,
        failover: true,
        commands: plain(),
    };
    setup.apply(&admin, &mut silent).await.unwrap();
    assert_eq!(errors(&admin.client, &expectation(&mapping, "s")).await, []);
}
