//! A connection to PostgreSQL.

use super::change::Change;
use super::wait::eventually;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

/// Fails the test if a statement fails, and reads all values as text.
pub(crate) struct Sql(Client);

impl std::ops::Deref for Sql {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.0
    }
}

impl Sql {
    pub(crate) async fn connect(uri: &str) -> Self {
        match Self::try_connect(uri).await {
            Ok(sql) => sql,
            Err(error) => panic!("cannot connect to {uri}: {error}"),
        }
    }

    pub(crate) async fn try_connect(uri: &str) -> Result<Self, tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::connect(uri, NoTls).await?;
        // Ends with the client or with the server. The next statement then fails.
        tokio::spawn(connection);
        Ok(Self(client))
    }

    pub(crate) async fn run(&self, statements: &str) {
        if let Err(error) = self.0.batch_execute(statements).await {
            panic!("{statements}: {error} {:?}", error.as_db_error());
        }
    }

    /// The rows of the last statement.
    pub(crate) async fn rows(&self, statement: &str) -> Vec<Vec<String>> {
        let messages = match self.0.simple_query(statement).await {
            Ok(messages) => messages,
            Err(error) => panic!("{statement}: {error} {:?}", error.as_db_error()),
        };
        let row = |message| match message {
            SimpleQueryMessage::Row(row) => {
                Some((0..row.len()).map(|n| row.get(n).unwrap_or_default().to_owned()).collect())
            }
            _ => None,
        };
        messages.into_iter().filter_map(row).collect()
    }

    /// The only value of the only row.
    pub(crate) async fn value(&self, statement: &str) -> String {
        let mut rows = self.rows(statement).await;
        assert_eq!(rows.len(), 1, "{statement}: {rows:?}");
        rows.remove(0).remove(0)
    }

    pub(crate) async fn is_true(&self, condition: &str) -> bool {
        self.value(&format!("SELECT ({condition})::text")).await == "true"
    }

    /// The end of the flushed WAL.
    pub(crate) async fn flushed(&self) -> String {
        self.value("SELECT pg_current_wal_flush_lsn()").await
    }

    /// Whether tuplewatch has acknowledged its slot up to this LSN.
    pub(crate) async fn confirmed_reaches(&self, lsn: &str) -> bool {
        self.slot_reaches("tuplewatch", lsn).await
    }

    async fn slot_reaches(&self, slot: &str, lsn: &str) -> bool {
        self.is_true(&format!(
            "(SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{slot}') >= '{lsn}'"
        ))
        .await
    }

    /// Waits until the change log has everything on disk that is committed by now, and every gap before it.
    ///
    /// A stream can deliver a change before the log has it on disk. A process that is killed in between reads the change from the slot
    /// again. So a test has to wait only if the slot cannot send it again, or if a gap must not be found again.
    pub(crate) async fn until_recorded(&self, slot: &str) {
        let lsn = self.flushed().await;
        eventually("everything committed is acknowledged", async || self.slot_reaches(slot, &lsn).await).await;
    }

    /// Asks for a check of the publication, and waits until that check has begun.
    pub(crate) async fn check_published(&self) {
        let last_check = "SELECT coalesce(max(query_start), 'epoch')::text FROM pg_stat_activity \
                           WHERE application_name LIKE 'tuplewatch%' AND query LIKE '-- whether it changed%' \
                             AND pid <> pg_backend_pid()";
        let before = self.value(last_check).await;
        self.run("SELECT pg_logical_emit_message(true, 'tuplewatch', 'check')").await;
        eventually("the publication is checked", async || self.value(last_check).await > before).await;
    }

    /// Process id and start time of the walsender of tuplewatch's slot, if any. They change with every reconnect.
    pub(crate) async fn walsender(&self) -> Option<(String, String)> {
        let statement = "SELECT pid, backend_start FROM pg_replication_slots JOIN pg_stat_activity ON pid = active_pid \
                         WHERE slot_name = 'tuplewatch'";
        let mut rows = self.rows(statement).await;
        rows.pop().map(|row| (row[0].clone(), row[1].clone()))
    }

    /// Waits until this many statements of tuplewatch wait for locks.
    pub(crate) async fn until_waiting(&self, count: u32) {
        let waits = "SELECT count(*) FROM pg_stat_activity \
                      WHERE wait_event_type = 'Lock' AND application_name LIKE 'tuplewatch%'";
        eventually("it waits for a lock", async || self.value(waits).await == count.to_string()).await;
    }

    /// The present facts of a tenant, from all its rows.
    pub(crate) async fn facts(&self, tenant: &str) -> BTreeSet<String> {
        let statement = format!(
            "SELECT entity_type, entity_id, relation, subject_type, subject_id, subject_relation, '' \
               FROM tuplewatch.relation_tuples WHERE tenant_id = '{tenant}' UNION ALL \
             SELECT entity_type, entity_id, '', '', '', attribute, value::text \
               FROM tuplewatch.attributes WHERE tenant_id = '{tenant}'"
        );
        let fact = |row: Vec<String>| {
            let [entity_type, entity_id, relation, subject_type, subject_id, last, value] =
                <[String; 7]>::try_from(row).unwrap();
            if value.is_empty() {
                Change::tuple(&entity_type, &entity_id, &relation, &subject_type, &subject_id, &last)
            } else {
                Change::attribute(&entity_type, &entity_id, &last, &value)
            }
        };
        let rows = self.rows(&statement).await;
        let count = rows.len();
        let facts: BTreeSet<String> = rows.into_iter().map(fact).collect();
        assert_eq!(facts.len(), count, "facts that differ have different texts");
        facts
    }

    /// Inserts one tuple `document:{id}#viewer@user:u`, in a transaction of its own.
    pub(crate) async fn insert(&self, tenant: &str, id: &str) {
        self.run(&format!(
            "INSERT INTO tuplewatch.relation_tuples \
                 (tenant_id, entity_type, entity_id, relation, subject_type, subject_id) \
             VALUES ('{tenant}', 'document', '{id}', 'viewer', 'user', 'u')"
        ))
        .await;
    }

    /// Inserts an attribute of about 2 kB for each of these numbers, in one transaction; [`Change::large_number`] reads them.
    /// The values are hexadecimal noise, so that compression saves little.
    pub(crate) async fn insert_large(&self, tenant: &str, numbers: RangeInclusive<u64>) {
        let (first, last) = numbers.into_inner();
        self.run(&format!(
            "INSERT INTO tuplewatch.attributes SELECT '{tenant}', 'large', n, 'noise', jsonb_build_object( \
                 '@type', 'type.googleapis.com/base.v1.StringValue', \
                 'data', (SELECT string_agg(md5(n || '.' || k), '') FROM generate_series(1, 60) k) \
             ) FROM generate_series({first}, {last}) n"
        ))
        .await;
    }
}
