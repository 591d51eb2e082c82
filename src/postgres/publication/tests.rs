//! Tests of the fingerprint against real PostgreSQL.

use super::*;
use crate::postgres::test_postgres::{Database, one_table, tuples};

const TABLE: &str = "CREATE TABLE t (tenant text, id text, owner text, other text, PRIMARY KEY (tenant, id, owner));
                     CREATE PUBLICATION feed FOR TABLE t";

/// A database with a publication, and its last fingerprint.
struct Watched {
    database: Database,
    mapping: Mapping,
    checks: Checks,
    last: Published,
}

impl Watched {
    async fn new(mapping: Mapping, sql: &str) -> Self {
        let database = Database::new().await;
        database.execute(sql).await;
        let checks = Checks::default();
        let last = checks.next(&database.connection.client, "feed", &mapping).await.unwrap();
        Self { database, mapping, checks, last }
    }

    async fn after(&mut self, sql: &str) -> (Published, Published) {
        for statement in sql.split(';') {
            self.database.execute(statement).await;
        }
        let client = &self.database.connection.client;
        let now = self.checks.next(client, "feed", &self.mapping).await.unwrap();
        assert!(now.lsn >= self.last.lsn);
        let whole = fingerprint(client, "feed", &self.mapping).await.unwrap();
        assert_eq!(now.fingerprint, whole.fingerprint, "the sum hides a change: {sql}");
        (std::mem::replace(&mut self.last, now.clone()), now)
    }

    async fn unchanged_by(&mut self, sql: &str) {
        let (before, after) = self.after(sql).await;
        let difference = difference(before.fingerprint.as_deref(), after.fingerprint.as_deref());
        assert_eq!(difference, "nothing differs", "{sql}");
        assert!(is_equivalent(&before.fingerprint.unwrap(), &after.fingerprint.unwrap()), "{sql}");
    }

    async fn changed_by(&mut self, sql: &str, expected: &str) {
        let (before, after) = self.after(sql).await;
        let is_harmless = before.fingerprint.as_ref().zip(after.fingerprint.as_ref());
        let is_harmless = is_harmless.is_some_and(|(before, after)| is_equivalent(before, after));
        assert!(!is_harmless, "{sql}");
        let difference = difference(before.fingerprint.as_deref(), after.fingerprint.as_deref());
        assert_eq!(difference, expected, "{sql}");
    }
}

#[tokio::test]
async fn harmless_changes_keep_the_fingerprint() {
    let mut watched = Watched::new(one_table("public.t"), TABLE).await;
    for sql in [
        "",
        "INSERT INTO t SELECT 't', n, n FROM generate_series(1, 1000) AS n; ANALYZE t; VACUUM t; VACUUM FULL t; REINDEX TABLE t",
        "ALTER TABLE t ADD COLUMN more int",
        "ALTER TABLE t DROP COLUMN more",
        "ALTER TABLE t ALTER COLUMN other TYPE varchar(10)",
        "ALTER TABLE t RENAME COLUMN other TO another",
        "CREATE INDEX ON t (another); GRANT SELECT ON t TO PUBLIC; COMMENT ON TABLE t IS 'x'",
        "CREATE TABLE unrelated (n int); ALTER PUBLICATION feed ADD TABLE unrelated; DROP TABLE unrelated",
        "CREATE PUBLICATION elsewhere FOR TABLE t",
        "VACUUM FULL pg_publication; VACUUM FULL pg_publication_rel; VACUUM FULL pg_inherits; VACUUM FULL pg_class",
        "VACUUM FREEZE pg_publication; VACUUM FREEZE pg_publication_rel",
        "SELECT pg_switch_wal(); CHECKPOINT",
        "TRUNCATE t",
        "CLUSTER t USING t_pkey",
        "ALTER TABLE t ALTER COLUMN owner SET STATISTICS 7",
        "ALTER TABLE t ALTER COLUMN owner SET DEFAULT 'x'; ALTER TABLE t ALTER COLUMN owner SET STORAGE EXTERNAL",
        "ALTER TABLE t ADD COLUMN random float DEFAULT random()",
        "ALTER TABLE t ALTER COLUMN another TYPE text USING upper(another)",
        "ALTER TABLE t ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE t FORCE ROW LEVEL SECURITY; CREATE POLICY none ON t USING (false)",
    ] {
        watched.unchanged_by(sql).await;
    }
}

#[tokio::test]
async fn harmful_changes_change_the_fingerprint() {
    let mut watched = Watched::new(one_table("public.t"), TABLE).await;
    let again = "table public.t was taken out of the publication and added again, or is in it in another way";
    let altered = "the publication publishes other operations";
    for (sql, expected) in [
        ("ALTER PUBLICATION feed DROP TABLE t; ALTER PUBLICATION feed ADD TABLE t", again),
        ("ALTER PUBLICATION feed DROP TABLE t", "table public.t was taken out of the publication"),
        ("ALTER PUBLICATION feed ADD TABLE t", "table public.t was added to the publication"),
        ("ALTER PUBLICATION feed SET (publish = 'insert')", altered),
        ("ALTER PUBLICATION feed SET (publish = 'insert, update, delete, truncate')", altered),
        (
            "ALTER PUBLICATION feed SET (publish_via_partition_root = true)",
            "publish_via_partition_root of the publication changed",
        ),
        ("ALTER TABLE t REPLICA IDENTITY FULL", "the replica identity of table public.t changed"),
        ("ALTER TABLE t REPLICA IDENTITY NOTHING", "the replica identity of table public.t changed"),
        ("ALTER TABLE t REPLICA IDENTITY DEFAULT", "the replica identity of table public.t changed"),
        (
            "CREATE UNIQUE INDEX u ON t (id); ALTER TABLE t REPLICA IDENTITY USING INDEX u",
            "the replica identity of table public.t changed",
        ),
        ("DROP INDEX u", "the replica identity of table public.t changed"),
        ("ALTER TABLE t ALTER COLUMN owner TYPE varchar(10)", "a mapped column of table public.t changed"),
        ("ALTER TABLE t RENAME COLUMN owner TO owns", "a mapped column of table public.t changed"),
        ("ALTER TABLE t RENAME TO elsewhere", "table public.t was created, dropped, renamed or replaced by another"),
        ("ALTER TABLE elsewhere RENAME TO t", "table public.t was created, dropped, renamed or replaced by another"),
        ("DROP PUBLICATION feed; CREATE PUBLICATION feed FOR TABLE t", "the publication was dropped and created again"),
        ("DROP PUBLICATION feed", "the publication was dropped"),
        ("CREATE PUBLICATION feed FOR ALL TABLES", "the publication was created"),
        ("ALTER TABLE t RENAME COLUMN owns TO owner", "a mapped column of table public.t changed"),
    ] {
        watched.changed_by(sql, expected).await;
    }
    if watched.database.major().await >= 15 {
        let member = "CREATE TABLE t2 (); DROP PUBLICATION feed; CREATE PUBLICATION feed FOR TABLE t, t2";
        watched.changed_by(member, "the publication was dropped and created again").await;
        watched.changed_by("ALTER PUBLICATION feed SET TABLE t WHERE (tenant <> 'x')", again).await;
        watched.changed_by("ALTER PUBLICATION feed SET TABLE t (tenant, id, owner)", again).await;
        watched.changed_by("ALTER PUBLICATION feed SET TABLES IN SCHEMA public", again).await;
        watched.changed_by("ALTER PUBLICATION feed DROP TABLES IN SCHEMA public; ALTER PUBLICATION feed ADD TABLES IN SCHEMA public", again).await;
    }
}

/// Types below the type of a column: of elements, of attributes, and the base types of domains and ranges.
#[tokio::test]
async fn changed_types_under_a_column_are_found() {
    let sql = "CREATE TYPE role AS ENUM ('viewer', 'editor');
               CREATE DOMAIN roles AS role[];
               CREATE TYPE pair AS (a int, b roles);
               CREATE TYPE levels AS RANGE (SUBTYPE = role);
               CREATE TYPE alone AS ENUM ('x');
               CREATE TABLE t (tenant levels, id numeric(10, 2), owner pair[], other alone);
               CREATE PUBLICATION feed FOR TABLE t";
    let mut watched = Watched::new(one_table("public.t"), sql).await;
    watched.unchanged_by("INSERT INTO t SELECT '[viewer,editor)', n + 0.25 FROM generate_series(1, 100) AS n").await;
    let label = "an enum label in column owner and an enum label in column tenant of table public.t changed";
    let composite = "the composite type in column owner of table public.t changed";
    let rewritten = "table public.t was rewritten and its column id altered, which may change values";
    for (sql, expected) in [
        ("ALTER TYPE role RENAME VALUE 'viewer' TO 'reader'", label),
        ("ALTER TYPE role RENAME VALUE 'reader' TO 'x'; ALTER TYPE role RENAME VALUE 'x' TO 'reader'", label),
        ("ALTER TYPE pair ADD ATTRIBUTE c int", composite),
        ("ALTER TYPE pair DROP ATTRIBUTE c", composite),
        ("ALTER TYPE pair ADD ATTRIBUTE c int; ALTER TYPE pair DROP ATTRIBUTE c", composite),
        ("ALTER TABLE t ALTER COLUMN id TYPE numeric(10, 1)", rewritten),
        ("ALTER TABLE t ALTER COLUMN id TYPE numeric(10, 1) USING id + 1", rewritten),
        ("BEGIN; ALTER TABLE t ALTER COLUMN id TYPE numeric(10, 1) USING -id; TRUNCATE t; COMMIT", rewritten),
        // A needless gap, because one check sees both changes.
        ("VACUUM FULL t; ALTER TABLE t ALTER COLUMN id SET STATISTICS 7", rewritten),
        ("ALTER TABLE t ALTER COLUMN id TYPE int; ALTER TABLE t ALTER COLUMN id TYPE numeric(10, 1)", rewritten),
        ("ALTER TABLE t ALTER COLUMN id TYPE int", "a mapped column of table public.t changed"),
    ] {
        watched.changed_by(sql, expected).await;
    }
    for sql in [
        "ALTER TYPE role ADD VALUE 'admin' BEFORE 'reader'; ALTER TYPE role ADD VALUE 'last'",
        "ALTER TYPE role RENAME TO roles_of_old; ALTER TYPE pair RENAME ATTRIBUTE a TO z",
        "ALTER TYPE alone RENAME VALUE 'x' TO 'y'",
        "ALTER DOMAIN roles SET DEFAULT '{}'",
        "ALTER TABLE t ALTER COLUMN other TYPE text USING 'z'",
        "VACUUM FULL t",
        "ALTER TABLE t ALTER COLUMN id SET NOT NULL",
        "VACUUM FULL t",
        "VACUUM FULL pg_attribute; VACUUM FULL pg_enum; VACUUM FULL pg_type; VACUUM FREEZE pg_attribute",
    ] {
        watched.unchanged_by(sql).await;
    }
    if watched.database.major().await >= 17 {
        watched
            .database
            .execute("ALTER TABLE t DROP COLUMN id, ADD COLUMN id text GENERATED ALWAYS AS ('a') STORED")
            .await;
        watched.after("").await;
        watched.changed_by("ALTER TABLE t ALTER COLUMN id SET EXPRESSION AS ('b')", rewritten).await;
    }
}

/// Without a rewrite, stored values and their texts stay the same.
#[tokio::test]
async fn wider_type_modifiers_keep_the_fingerprint() {
    let sql =
        "CREATE TABLE t (tenant varchar(10), id numeric(10, 2), owner text COLLATE \"C\", PRIMARY KEY (tenant, id));
               CREATE PUBLICATION feed FOR TABLE t";
    let mut watched = Watched::new(one_table("public.t"), sql).await;
    for sql in [
        "ALTER TABLE t ALTER COLUMN tenant TYPE varchar(20)",
        "ALTER TABLE t ALTER COLUMN tenant TYPE varchar",
        "ALTER TABLE t ALTER COLUMN id TYPE numeric(12, 2)",
        "ALTER TABLE t ALTER COLUMN owner TYPE text COLLATE \"POSIX\"",
    ] {
        watched.unchanged_by(sql).await;
    }
    watched
        .changed_by(
            "ALTER TABLE t ALTER COLUMN tenant TYPE varchar(3) USING left(tenant, 3)",
            "table public.t was rewritten and its column tenant altered, which may change values",
        )
        .await;
}

#[tokio::test]
async fn inheriting_tables_are_found() {
    let mut watched = Watched::new(one_table("public.t"), TABLE).await;
    let inherits = "the set of tables that inherit of table public.t changed";
    watched.changed_by("CREATE TABLE child () INHERITS (t)", inherits).await;
    watched.changed_by("CREATE TABLE grandchild () INHERITS (child)", inherits).await;
    watched.changed_by("DROP TABLE grandchild; ALTER TABLE child NO INHERIT t", inherits).await;
    // PostgreSQL remembers the child until it analyzes the table.
    watched.unchanged_by("ANALYZE t").await;
    let meanwhile = "another table inherited from table public.t for a while";
    watched.changed_by("ALTER TABLE child INHERIT t; ALTER TABLE child NO INHERIT t", meanwhile).await;
    watched.unchanged_by("CREATE TABLE parent (id text); ALTER TABLE t INHERIT parent").await;
}

#[tokio::test]
async fn changed_partitions_are_found() {
    let sql = "CREATE TABLE root (tenant text, id text, owner text, PRIMARY KEY (tenant, id, owner)) PARTITION BY LIST (tenant);
               CREATE TABLE middle PARTITION OF root FOR VALUES IN ('t1', 't2', 't3') PARTITION BY LIST (tenant);
               CREATE TABLE leaf PARTITION OF middle FOR VALUES IN ('t1');
               CREATE PUBLICATION feed FOR TABLE root WITH (publish_via_partition_root = true)";
    let mut watched = Watched::new(one_table("public.root"), sql).await;
    watched.unchanged_by("INSERT INTO root VALUES ('t1', '1', '2'); VACUUM leaf; VACUUM FULL pg_inherits").await;
    // The catalogs do not distinguish the two.
    let storage = "the storage of a partition (TRUNCATE, or a rewrite) of table public.root changed";
    watched.changed_by("TRUNCATE leaf", storage).await;
    watched.changed_by("VACUUM FULL leaf", storage).await;
    watched.unchanged_by("CREATE TABLE leaf2 PARTITION OF middle FOR VALUES IN ('t2')").await;
    let partitions = "the set of partitions of table public.root changed";
    watched
        .changed_by(
            "ALTER TABLE middle DETACH PARTITION leaf2; ALTER TABLE middle ATTACH PARTITION leaf2 FOR VALUES IN ('t2')",
            partitions,
        )
        .await;
    watched.changed_by("DROP TABLE leaf2", partitions).await;
    watched
        .changed_by("ALTER TABLE leaf REPLICA IDENTITY FULL", "the replica identity of table public.root changed")
        .await;

    // Test with the leaf, which is in the publication through its root.
    let leaf = one_table("public.leaf");
    let before = fingerprint(&watched.database.connection.client, "feed", &leaf).await.unwrap();
    watched.database.execute("ALTER PUBLICATION feed DROP TABLE root").await;
    let after = fingerprint(&watched.database.connection.client, "feed", &leaf).await.unwrap();
    let sentence = difference(before.fingerprint.as_deref(), after.fingerprint.as_deref());
    assert_eq!(sentence, "table public.leaf was taken out of the publication");
}

/// A table that was created as a partition never contained rows under another name.
#[tokio::test]
async fn partitions_that_were_created_as_such_are_recognized() {
    // Toast tables, indexes and defaults each need separate commands.
    for columns in [
        "tenant text, id text DEFAULT 'x', owner text NOT NULL, PRIMARY KEY (tenant, id, owner)",
        "tenant text, id text, owner text",
        "tenant int, id int, owner int",
        "tenant int, id int DEFAULT 1, owner int, PRIMARY KEY (tenant, id)",
    ] {
        let sql = format!(
            "CREATE TABLE root ({columns}) PARTITION BY LIST (tenant);
             CREATE PUBLICATION feed FOR TABLE root WITH (publish_via_partition_root = true)"
        );
        let mut watched = Watched::new(one_table("public.root"), &sql).await;
        for sql in [
            "CREATE TABLE p1 PARTITION OF root FOR VALUES IN ('1')",
            "CREATE TABLE p2 PARTITION OF root FOR VALUES IN ('2'); CREATE TABLE p3 PARTITION OF root FOR VALUES IN ('3')",
            "CREATE TABLE rest PARTITION OF root DEFAULT",
            "CREATE TABLE p4 PARTITION OF root FOR VALUES IN ('4')",
            "BEGIN; CREATE TABLE p5 PARTITION OF root FOR VALUES IN ('5'); INSERT INTO root VALUES ('5', '1', '1'); COMMIT",
            "BEGIN; INSERT INTO root VALUES ('1', '2', '2'); SAVEPOINT s; \
             CREATE TABLE p6 PARTITION OF root FOR VALUES IN ('6'); RELEASE s; COMMIT",
            "CREATE TABLE level PARTITION OF root FOR VALUES IN ('7', '8') PARTITION BY LIST (tenant)",
            "CREATE TABLE p7 PARTITION OF level FOR VALUES IN ('7'); CREATE TABLE p8 PARTITION OF level FOR VALUES IN ('8')",
            "CREATE TABLE p9 PARTITION OF root (owner DEFAULT '1', CHECK (id <> '9')) FOR VALUES IN ('9'); \
             INSERT INTO root VALUES ('9', '1', '1'); ANALYZE p9; ALTER TABLE p9 ALTER COLUMN id SET STATISTICS 3",
            "CREATE TABLE gone PARTITION OF root FOR VALUES IN ('10'); DROP TABLE gone",
        ] {
            watched.unchanged_by(sql).await;
        }
        watched
            .database
            .execute(
                "CREATE FUNCTION rotate() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
            CREATE TABLE p11 PARTITION OF root FOR VALUES IN ('11'); INSERT INTO p11 VALUES ('11', '1', '1'); END $$",
            )
            .await;
        watched.unchanged_by("SELECT rotate()").await;

        let partitions = "the set of partitions of table public.root changed";
        let attach = |values: &str| format!("ALTER TABLE root ATTACH PARTITION other FOR VALUES IN ('{values}')");
        // The columns must match the root and its key: ALTER COLUMN uses separate commands.
        let not_null = match columns.contains("PRIMARY KEY") {
            true => {
                "ALTER TABLE other ALTER COLUMN tenant SET NOT NULL, ALTER COLUMN id SET NOT NULL, \
                     ALTER COLUMN owner SET NOT NULL; "
            }
            false => "",
        };
        for sql in [
            // In one transaction, with successive commands, like CREATE TABLE ... PARTITION OF.
            format!("BEGIN; CREATE TABLE other AS SELECT tenant, id, owner FROM root WHERE id = '0'; {not_null}{}; COMMIT", attach("20")),
            format!("BEGIN; CREATE TABLE other (LIKE root INCLUDING ALL); INSERT INTO other VALUES ('20', '1', '1'); {}; COMMIT", attach("20")),
            format!("CREATE TABLE other (LIKE root INCLUDING ALL); INSERT INTO other VALUES ('20', '1', '1'); {}", attach("20")),
            format!("CREATE TABLE other PARTITION OF root FOR VALUES IN ('20'); ALTER TABLE root DETACH PARTITION other; {}", attach("20")),
            format!("BEGIN; CREATE TABLE other PARTITION OF root FOR VALUES IN ('20'); ALTER TABLE root DETACH PARTITION other; \
                     INSERT INTO other VALUES ('20', '1', '1'); {}; COMMIT", attach("20")),
            "CREATE TABLE other PARTITION OF root FOR VALUES IN ('20'); INSERT INTO root VALUES ('20', '1', '1'); TRUNCATE other".to_owned(),
        ] {
            watched.changed_by(&sql, partitions).await;
            watched.changed_by("DROP TABLE other", partitions).await;
        }
        // A complete level with earlier rows.
        let level = "CREATE TABLE other (LIKE root INCLUDING ALL) PARTITION BY LIST (tenant); \
                     CREATE TABLE below PARTITION OF other FOR VALUES IN ('20'); INSERT INTO other VALUES ('20', '1', '1'); \
                     ALTER TABLE root ATTACH PARTITION other FOR VALUES IN ('20')";
        watched.changed_by(level, partitions).await;
    }
}

/// A check every few seconds is cheap: about 10 ms, with the preset's tables.
#[tokio::test]
async fn a_check_is_cheap_and_complete() {
    let database = Database::new().await;
    let client = &database.connection.client;
    let mapping = tuples();
    assert_eq!(fingerprint(client, "feed", &mapping).await.unwrap().fingerprint, None);
    database.execute("CREATE PUBLICATION feed").await;
    let empty = fingerprint(client, "feed", &mapping).await.unwrap().fingerprint.unwrap();
    assert!(empty.contains("tuplewatch.attributes\toid\tnone\n"), "{empty}");
    database.execute(include_str!("../../../sql/0001_tables.sql")).await;
    database.execute("ALTER PUBLICATION feed ADD TABLE tuplewatch.relation_tuples, tuplewatch.attributes").await;
    let checks = Checks::default();
    let full = checks.next(client, "feed", &mapping).await.unwrap();
    let started = std::time::Instant::now();
    for _ in 0..20 {
        assert_eq!(checks.next(client, "feed", &mapping).await.unwrap().fingerprint, full.fingerprint);
    }
    // A hundredth of the interval, even on a slow machine.
    assert!(started.elapsed() / 20 < std::time::Duration::from_millis(100));
}
