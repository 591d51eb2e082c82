//! A delivered change is already visible to SELECT.
//!
//! PostgreSQL streams a commit before it is visible: for a moment, or for as long as it waits for a synchronous standby.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::{Stream, changes};
use crate::support::wait::{eventually, within};
use fastrand::Rng;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Semaphore;

/// A standby that does not exist. Only sessions that ask for it wait for it.
pub(super) const MISSING_STANDBY: [(&str, &str); 2] =
    [("synchronous_standby_names", "missing"), ("synchronous_commit", "local")];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_delivered_change_can_be_read() {
    const CASES: u64 = 20_000;
    /// The number of concurrent changes: enough to keep the writers busy, and few enough that every check happens immediately.
    const UNDER_WAY: usize = 16;

    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut stream = server.watch("t1", "").await;
    let room = Arc::new(Semaphore::new(UNDER_WAY));
    let number = Arc::new(AtomicU64::new(0));
    let writers: Vec<_> = (0..8)
        .map(|_| {
            let (uri, room, number) = (postgres.uri(), room.clone(), number.clone());
            tokio::spawn(async move {
                let sql = Sql::connect(&uri).await;
                while let Ok(permit) = room.acquire().await {
                    permit.forget();
                    let n = number.fetch_add(1, Ordering::Relaxed);
                    if n >= CASES {
                        return;
                    }
                    sql.insert("t1", &format!("d{n}")).await;
                }
            })
        })
        .collect();

    let reader = postgres.sql().await;
    // By the whole key, which is faster than the writers, so that every check happens immediately.
    let statement = "SELECT EXISTS (SELECT FROM tuplewatch.relation_tuples WHERE (tenant_id, entity_type, entity_id, relation, \
                     subject_type, subject_id, subject_relation) = ('t1', 'document', $1, 'viewer', 'user', 'u', ''))";
    let statement = reader.prepare(statement).await.unwrap();
    let mut seen = BTreeSet::new();
    while seen.len() < usize::try_from(CASES).unwrap() {
        let message = stream.next().await;
        for id in message.changes.iter().map(id) {
            let is_there: bool = reader.query_one(&statement, &[&id]).await.unwrap().get(0);
            assert!(is_there, "{id} was seen and is not readable");
            assert!(seen.insert(id.to_owned()), "{id} came twice");
            room.add_permits(1);
        }
    }
    for writer in writers {
        writer.await.unwrap();
    }
}

/// The id in the text of [`Change::viewer`].
fn id(change: &Change) -> &str {
    change.fact.strip_prefix("document:").and_then(|rest| rest.split_once('#')).unwrap().0
}

/// A commit that waits for the standby.
pub(super) struct Waiting {
    commit: tokio::task::JoinHandle<()>,
}

impl Waiting {
    /// Returns when the commit waits: its record is in the WAL, and it is not visible.
    pub(super) async fn insert(postgres: &Postgres, admin: &Sql, tenant: &str, id: &str) -> Self {
        let sql = postgres.sql().await;
        sql.run("SET synchronous_commit = on; SET application_name = 'waiting'").await;
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        let commit = tokio::spawn(async move { sql.insert(&tenant, &id).await });
        eventually("the commit waits for the standby", async || Self::is_waiting(admin).await).await;
        Self { commit }
    }

    async fn is_waiting(admin: &Sql) -> bool {
        admin
            .is_true(
                "EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'waiting' AND wait_event = 'SyncRep')",
            )
            .await
    }

    pub(super) async fn release(self, admin: &Sql) {
        assert!(Self::is_waiting(admin).await, "it still waits");
        // ALTER SYSTEM cannot run in a transaction, so not in one batch.
        admin.run("ALTER SYSTEM SET synchronous_standby_names = ''").await;
        admin.run("SELECT pg_reload_conf()").await;
        within("the commit continues", self.commit).await.unwrap();
    }
}

/// Waits until tuplewatch has stored everything that is in the WAL now.
async fn received_everything(admin: &Sql) {
    let lsn = admin.value("SELECT pg_current_wal_flush_lsn()").await;
    let condition = format!(
        "EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = 'tuplewatch' AND confirmed_flush_lsn >= '{lsn}')"
    );
    eventually("the slot is acknowledged", async || admin.is_true(&condition).await).await;
}

/// Waits until tuplewatch has queried visibility several times.
async fn looked_again(admin: &Sql) {
    let statement = "SELECT coalesce(max(query_start), 'epoch')::text FROM pg_stat_activity \
                     WHERE application_name LIKE 'tuplewatch%' AND query = 'SELECT pg_current_snapshot()::text'";
    for _ in 0..3 {
        let before = admin.value(statement).await;
        eventually("visibility is queried", async || admin.value(statement).await > before).await;
    }
}

#[tokio::test]
async fn a_commit_that_waits_for_a_standby_is_not_delivered() {
    let postgres = Postgres::with(&MISSING_STANDBY).await;
    let server = Server::serve(&postgres, &[]).await;
    let admin = postgres.sql().await;
    let mut stream = server.watch("t1", "").await;
    admin.insert("t1", "before").await;
    stream.expect(Change::create(Change::viewer("before"))).await;

    let waiting = Waiting::insert(&postgres, &admin, "t1", "waiting").await;
    // It commits after the waiting one, and is visible before it.
    admin.insert("t1", "after").await;
    received_everything(&admin).await;
    looked_again(&admin).await;
    stream.expect_silence().await;

    // A start now reads a state without the waiting change, and gets it later. It does not get the changes that it could read.
    let mut late = server.watch("t1", "").await;
    let state = admin.facts("t1").await;
    assert_eq!(state, BTreeSet::from([Change::viewer("before"), Change::viewer("after")]));
    late.expect_silence().await;

    waiting.release(&admin).await;
    stream.expect(Change::create(Change::viewer("waiting"))).await;
    stream.expect(Change::create(Change::viewer("after"))).await;
    admin.insert("t1", "last").await;
    late.expect(Change::create(Change::viewer("waiting"))).await;
    late.expect(Change::create(Change::viewer("last"))).await;
}

/// A change in the change log need not be visible either.
#[tokio::test]
async fn a_restarted_node_does_not_deliver_a_commit_that_waits() {
    let postgres = Postgres::with(&MISSING_STANDBY).await;
    let mut server = Server::serve(&postgres, &[]).await;
    let admin = postgres.sql().await;
    let mut stream = server.watch("t1", "").await;
    admin.insert("t1", "before").await;
    let token = stream.expect(Change::create(Change::viewer("before"))).await.token;

    let waiting = Waiting::insert(&postgres, &admin, "t1", "waiting").await;
    come_back(&mut server, &admin).await;
    let mut resumed = server.watch("t1", &token).await;
    admin.insert("t1", "after").await;
    received_everything(&admin).await;
    resumed.expect_silence().await;
    waiting.release(&admin).await;
    resumed.expect(Change::create(Change::viewer("waiting"))).await;
    resumed.expect(Change::create(Change::viewer("after"))).await;
}

/// A start then reads a state without the waiting change.
#[tokio::test]
async fn a_stream_started_after_a_restart_gets_a_commit_that_waited() {
    let postgres = Postgres::with(&MISSING_STANDBY).await;
    let mut server = Server::serve(&postgres, &[]).await;
    let admin = postgres.sql().await;
    admin.insert("t1", "before").await;

    let waiting = Waiting::insert(&postgres, &admin, "t1", "waiting").await;
    come_back(&mut server, &admin).await;
    let mut stream = server.watch("t1", "").await;
    assert_eq!(admin.facts("t1").await, BTreeSet::from([Change::viewer("before")]));
    waiting.release(&admin).await;
    admin.insert("t1", "after").await;
    stream.expect(Change::create(Change::viewer("waiting"))).await;
    stream.expect(Change::create(Change::viewer("after"))).await;
}

/// Kills and restarts the server, with everything so far in the change log.
async fn come_back(server: &mut Server, admin: &Sql) {
    received_everything(admin).await;
    server.kill_and_restart().await;
}

#[tokio::test]
async fn before_visible_delivers_a_commit_that_waits() {
    let postgres = Postgres::with(&MISSING_STANDBY).await;
    let server = Server::serve(&postgres, &[("--service-watch-before-visible", "true")]).await;
    let admin = postgres.sql().await;
    let mut stream = server.watch("t1", "").await;

    let waiting = Waiting::insert(&postgres, &admin, "t1", "waiting").await;
    stream.expect(Change::create(Change::viewer("waiting"))).await;
    assert!(admin.facts("t1").await.is_empty());
    // It was delivered already, and a start now must still get it, because it cannot be read.
    let mut late = server.watch("t1", "").await;
    late.expect(Change::create(Change::viewer("waiting"))).await;
    waiting.release(&admin).await;
}

/// Subscribe, read the state, apply the stream: the result must be the state of the table.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_after_subscribing_plus_the_stream_is_the_table() {
    const PHASES: usize = 5;
    const OBSERVERS: usize = 30;

    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    for phase in 0..PHASES {
        // One tenant for each phase, so that its state stays small.
        let tenant = format!("phase{phase}");
        sql.run(&format!("INSERT INTO tuplewatch.tenants (id, name) VALUES ('{tenant}', '')")).await;
        let is_over = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> =
            (0..8).map(|n| tokio::spawn(churn(postgres.uri(), tenant.clone(), n, is_over.clone()))).collect();
        let channel = server.channel().await;
        let mut observers = Vec::new();
        for _ in 0..OBSERVERS {
            // At different moments of the phase.
            tokio::time::sleep(Duration::from_millis(fastrand::u64(0..20))).await;
            let stream = within("headers", Stream::open_on(channel.clone(), &tenant, "")).await.unwrap();
            let state = sql.facts(&tenant).await;
            observers.push(tokio::spawn(follow(stream, state)));
        }
        is_over.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.await.unwrap();
        }
        sql.insert(&tenant, "end").await;
        let rows = sql.facts(&tenant).await;
        for (n, observer) in observers.into_iter().enumerate() {
            let state = within("the end of the phase", observer).await.unwrap();
            let missing: Vec<_> = rows.difference(&state).collect();
            let surplus: Vec<_> = state.difference(&rows).collect();
            assert!(missing.is_empty() && surplus.is_empty(), "{phase}.{n}: missing {missing:?}, surplus {surplus:?}");
        }
    }
}

/// Inserts, and now and then deletes what it inserted.
async fn churn(uri: String, tenant: String, writer: usize, is_over: Arc<AtomicBool>) {
    let sql = Sql::connect(&uri).await;
    let mut random = Rng::new();
    let mut n = 0;
    while !is_over.load(Ordering::Relaxed) {
        sql.insert(&tenant, &format!("{writer}.{n}")).await;
        if random.u8(..3) == 0 {
            let id = format!("{writer}.{}", random.usize(..=n));
            sql.run(&format!("DELETE FROM tuplewatch.relation_tuples WHERE tenant_id = 't1' AND entity_id = '{id}'"))
                .await;
        }
        n += 1;
    }
}

/// The state after applying the stream to the read state, up to the end. The read may already contain some changes of the stream.
async fn follow(mut stream: Stream, mut state: BTreeSet<String>) -> BTreeSet<String> {
    let messages = stream.up_to(&Change::create(Change::viewer("end"))).await;
    for change in changes(&messages) {
        change.apply(&mut state);
    }
    state
}
