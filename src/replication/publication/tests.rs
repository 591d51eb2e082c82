//! Against real PostgreSQL.

use super::super::test_postgres::{Database, one_table, tuples};
use super::*;

const TABLE: &str = "CREATE TABLE t (tenant text, id text, owner text, other text, PRIMARY KEY (tenant, id, owner));
                     CREATE PUBLICATION feed FOR TABLE t";

/// A database with something published, and what was seen of it last.
struct Watched {
    database: Database,
    mapping: Mapping,
    last: Published,
}

impl Watched {
    async fn new(mapping: Mapping, sql: &str) -> Self {
        let database = Database::new().await;
        database.execute(sql).await;
        let last = fingerprint(&database.connection.client, "feed", &mapping).await.unwrap();
        Self { database, mapping, last }
    }

    async fn after(&mut self, sql: &str) -> (Published, Published) {
        for statement in sql.split(';') {
            self.database.execute(statement).await;
        }
        let now = fingerprint(&self.database.connection.client, "feed", &self.mapping).await.unwrap();
        assert!(now.lsn >= self.last.lsn);
        (std::mem::replace(&mut self.last, now.clone()), now)
    }

    async fn unchanged_by(&mut self, sql: &str) {
        let (before, after) = self.after(sql).await;
        assert_eq!(before.fingerprint, after.fingerprint, "{sql}");
        assert_eq!(difference(before.fingerprint.as_deref(), after.fingerprint.as_deref()), "nothing differs");
    }

    async fn changed_by(&mut self, sql: &str, expected: &str) {
        let (before, after) = self.after(sql).await;
        assert_ne!(before.fingerprint, after.fingerprint, "{sql}");
        let difference = difference(before.fingerprint.as_deref(), after.fingerprint.as_deref());
        assert_eq!(difference, expected, "{sql}");
    }
}

#[tokio::test]
async fn what_does_not_matter() {
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
    ] {
        watched.unchanged_by(sql).await;
    }
}

#[tokio::test]
async fn what_matters() {
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

#[tokio::test]
async fn partitions() {
    let sql = "CREATE TABLE root (tenant text, id text, owner text, PRIMARY KEY (tenant, id, owner)) PARTITION BY LIST (tenant);
               CREATE TABLE middle PARTITION OF root FOR VALUES IN ('t1', 't2') PARTITION BY LIST (tenant);
               CREATE TABLE leaf PARTITION OF middle FOR VALUES IN ('t1');
               CREATE PUBLICATION feed FOR TABLE root WITH (publish_via_partition_root = true)";
    let mut watched = Watched::new(one_table("public.root"), sql).await;
    watched.unchanged_by("INSERT INTO root VALUES ('t1', '1', '2'); VACUUM leaf; VACUUM FULL pg_inherits").await;
    // Nothing in the catalogs tells the two from each other.
    let storage = "the storage of a partition (TRUNCATE, or a rewrite) of table public.root changed";
    watched.changed_by("TRUNCATE leaf", storage).await;
    watched.changed_by("VACUUM FULL leaf", storage).await;
    let partitions = "the set of partitions of table public.root changed";
    watched.changed_by("CREATE TABLE leaf2 PARTITION OF middle FOR VALUES IN ('t2')", partitions).await;
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

    // Seen from the leaf, which is in the publication by its root.
    let leaf = one_table("public.leaf");
    let before = fingerprint(&watched.database.connection.client, "feed", &leaf).await.unwrap();
    watched.database.execute("ALTER PUBLICATION feed DROP TABLE root").await;
    let after = fingerprint(&watched.database.connection.client, "feed", &leaf).await.unwrap();
    let sentence = difference(before.fingerprint.as_deref(), after.fingerprint.as_deref());
    assert_eq!(sentence, "table public.leaf was taken out of the publication");
}

/// Every 10 s is cheap: some 10 ms, with the preset's tables.
#[tokio::test]
async fn is_cheap_and_complete() {
    let database = Database::new().await;
    let client = &database.connection.client;
    let mapping = tuples();
    assert_eq!(fingerprint(client, "feed", &mapping).await.unwrap().fingerprint, None);
    database.execute("CREATE PUBLICATION feed").await;
    let empty = fingerprint(client, "feed", &mapping).await.unwrap().fingerprint.unwrap();
    assert!(empty.contains("tuplewatch.attributes\toid\tnone\n"), "{empty}");
    database.execute(include_str!("../../../sql/0001_tables.sql")).await;
    database.execute("ALTER PUBLICATION feed ADD TABLE tuplewatch.relation_tuples, tuplewatch.attributes").await;
    let full = fingerprint(client, "feed", &mapping).await.unwrap();
    let started = std::time::Instant::now();
    for _ in 0..20 {
        assert_eq!(fingerprint(client, "feed", &mapping).await.unwrap().fingerprint, full.fingerprint);
    }
    // A hundredth of the interval, on the slowest machine.
    assert!(started.elapsed() / 20 < std::time::Duration::from_millis(100));
}
