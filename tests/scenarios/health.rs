//! Health means delivery (hazard 50). A node that cannot release changes or start streams reports that everywhere, with the reason, and
//! becomes ready by itself when it can.

mod probes;

use super::visibility::{MISSING_STANDBY, Waiting};
use crate::support::api::Api;
use crate::support::change::Change;
use crate::support::crowd::Crowd;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::{metadata, reason};
use crate::support::wait::{eventually, within};
use std::path::PathBuf;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tuplewatch::dev_postgres::StopMode;

/// A role with the privileges that `serve` needs, to which limits apply.
const FEEDER: &str = "CREATE ROLE feeder LOGIN REPLICATION;
    GRANT USAGE ON SCHEMA tuplewatch TO feeder;
    GRANT SELECT ON ALL TABLES IN SCHEMA tuplewatch TO feeder;
    GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA tuplewatch TO feeder";

/// Ends all connections of the role, its replication connection too.
const END_THEIRS: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'feeder'";

/// A node that logs on as `feeder`, prepared and not started.
async fn prepare(postgres: &Postgres) -> Server {
    let mut server = Server::prepare(postgres, &[]).await;
    postgres.sql().await.run(FEEDER).await;
    server.point_to(&postgres.uri().replace("postgres@", "feeder@"));
    server
}

/// The same, streaming.
async fn serve(postgres: &Postgres) -> Server {
    let mut server = prepare(postgres).await;
    server.start().await;
    server.ready().await;
    server
}

/// SQL connections of the node that have logged on.
async fn connections(admin: &Sql) -> usize {
    let count = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND usename = 'feeder'";
    admin.value(count).await.parse().unwrap()
}

#[tokio::test]
async fn one_connection_is_enough_to_deliver() {
    let mut postgres = Postgres::start().await;
    let mut server = prepare(&postgres).await;
    let admin = postgres.sql().await;
    admin.run("ALTER ROLE feeder CONNECTION LIMIT 1").await;
    server.start().await;
    server.ready().await;
    // The start names the limit, and the statement that raises it.
    server.until_logged("connections of role feeder: may have 1 at a time").await;
    server.until_logged("ALTER ROLE \\\"feeder\\\" CONNECTION LIMIT 12").await;

    let (_, mut stream, _) = server.first_delivered(&postgres, "first").await;
    assert_eq!(connections(&admin).await, 1);
    eventually("the slot's monitor looks too", async || {
        server.scrape().await.find("tuplewatch_server_lsn_bytes", &[]).is_some()
    })
    .await;
    // Another part may take the connection first, and the session still gets it.
    drop(admin);
    postgres.stop(StopMode::Fast).await;
    postgres.start_again().await;
    server.ready().await;
    let admin = postgres.sql().await;
    admin.insert("t1", "second").await;
    stream.expect(Change::created("second")).await;
    let mut late = server.watch("t1", "").await;

    // A lock that delays starts of streams delays nothing else on the shared connection.
    let holder = postgres.sql().await;
    holder.run("BEGIN; LOCK TABLE tuplewatch.tenants IN ACCESS EXCLUSIVE MODE").await;
    server.not_ready("no_starts", "the table of tenants is locked").await;
    admin.insert("t1", "third").await;
    stream.expect(Change::created("third")).await;
    late.expect(Change::created("third")).await;
    holder.run("ROLLBACK").await;
    server.ready().await;
    assert_eq!(connections(&admin).await, 1);
}

/// Otherwise earlier connections would keep the session out for ever.
#[tokio::test]
async fn other_connections_give_way_to_the_session() {
    let postgres = Postgres::start().await;
    let mut server = prepare(&postgres).await;
    let admin = postgres.sql().await;
    admin.run("GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA tuplewatch TO feeder").await;
    admin.run("ALTER ROLE feeder CONNECTION LIMIT 2").await;
    server.start().await;
    server.ready().await;
    let mut stream = server.watch("t1", "").await;
    // Snapshots or starts use the second connection until they have to share. Then Data takes it and keeps it.
    let mut api = Api::of(&server).await;
    let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'feeder' \
                  AND (backend_type = 'walsender' OR query NOT LIKE 'COMMIT%')";
    let has_pooled = "EXISTS (SELECT FROM pg_stat_activity WHERE usename = 'feeder' AND query LIKE 'COMMIT%')";
    eventually("Data has a connection", async || {
        admin.run(others).await;
        let _ = api.try_write("t1", &["document:d1#viewer@user:u"]).await;
        admin.is_true(has_pooled).await
    })
    .await;
    admin.run("ALTER ROLE feeder CONNECTION LIMIT 1").await;
    admin.run(others).await;
    eventually("Data's connection is closed", async || !admin.is_true(has_pooled).await).await;
    server.ready().await;
    assert_eq!(connections(&admin).await, 1);
    admin.insert("t1", "last").await;
    stream.up_to(&Change::created("last")).await;
}

#[tokio::test]
async fn an_exhausted_connection_limit_is_reported_until_it_is_raised() {
    let postgres = Postgres::with(&[("max_connections", "30")]).await;
    let server = serve(&postgres).await;
    let (admin, mut stream, _) = server.first_delivered(&postgres, "first").await;
    let mut watching = server.health_changes().await;
    assert_eq!(watching.next().await, ServingStatus::Serving);

    for (id, limited) in [("role", "ROLE feeder"), ("database", "DATABASE postgres")] {
        admin.run(&format!("ALTER {limited} CONNECTION LIMIT 0")).await;
        admin.run(END_THEIRS).await;
        server.not_ready("connection_limit", "PostgreSQL takes no more connections").await;
        assert_eq!(watching.next().await, ServingStatus::NotServing);
        admin.insert("t1", id).await;
        admin.run(&format!("ALTER {limited} CONNECTION LIMIT -1")).await;
        stream.expect(Change::created(id)).await;
        server.ready().await;
        assert_eq!(watching.next().await, ServingStatus::Serving);
    }

    // Another role and this test have every connection that the server has for ordinary roles. The crowd counts its own: what the
    // server counts includes connections of the node that are about to end, and lacks those that still log on.
    admin.run("CREATE ROLE crowd LOGIN").await;
    let uri = postgres.uri().replace("postgres@", "crowd@");
    let for_ordinary_roles =
        "SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int";
    let for_ordinary_roles: usize = admin.value(for_ordinary_roles).await.parse().unwrap();
    let mut crowd = Crowd::default();
    eventually("the crowd and this test have every connection", async || {
        admin.run(END_THEIRS).await;
        crowd.grow(&uri).await == for_ordinary_roles - 1
    })
    .await;
    server.not_ready("connection_limit", "PostgreSQL takes no more connections").await;
    admin.insert("t1", "crowded").await;
    crowd.leave();
    stream.expect(Change::created("crowded")).await;
    server.ready().await;
}

/// Suspends a process until it is dropped.
struct Suspended(u32);

impl Suspended {
    fn new(pid: u32) -> Self {
        Self::signal(pid, "-STOP");
        Self(pid)
    }

    fn signal(pid: u32, signal: &str) {
        let status = std::process::Command::new("kill").args([signal, &pid.to_string()]).status().unwrap();
        assert!(status.success() || signal == "-CONT", "{signal} {pid}");
    }
}

impl Drop for Suspended {
    fn drop(&mut self) {
        Self::signal(self.0, "-CONT");
    }
}

/// The process id of the postmaster, which accepts connections.
fn postmaster(postgres: &Postgres) -> u32 {
    let file = std::fs::read_to_string(postgres.pgdata().join("postmaster.pid")).unwrap();
    file.lines().next().unwrap().parse().unwrap()
}

/// Waits until exactly one backend, other than this one, answers visibility queries. Returns its process id. A terminated backend is still
/// shown for a moment.
async fn snapshot_backend(admin: &Sql, other_than: &str) -> String {
    let backends =
        "SELECT pid FROM pg_stat_activity WHERE usename = 'feeder' AND query = 'SELECT pg_current_snapshot()::text'";
    let mut found = Vec::new();
    eventually("one backend answers visibility queries", async || {
        found = admin.rows(backends).await.concat();
        found.len() == 1 && found[0] != other_than
    })
    .await;
    found.remove(0)
}

#[tokio::test]
async fn an_unanswered_visibility_query_makes_even_an_idle_node_unready() {
    let postgres = Postgres::start().await;
    let server = serve(&postgres).await;
    let (admin, mut stream, _) = server.first_delivered(&postgres, "first").await;
    for waits_with_something in [false, true] {
        let backend = snapshot_backend(&admin, "").await.parse().unwrap();
        // The suspended postmaster prevents a new connection in its place.
        let suspended = [Suspended::new(postmaster(&postgres)), Suspended::new(backend)];
        if waits_with_something {
            admin.insert("t1", "second").await;
        }
        server.not_ready("visibility_unknown", "PostgreSQL does not say which transactions are visible").await;
        let scrape = server.scrape().await;
        assert_eq!(scrape.get("tuplewatch_session_state", &[("state", "streaming")]), 1.0);
        assert_eq!(scrape.get("tuplewatch_oldest_waiting_seconds", &[]) > 0.0, waits_with_something);
        drop(suspended);
        server.ready().await;
    }
    stream.expect(Change::created("second")).await;
}

/// A restarted backend, or a slow answer, changes nothing.
#[tokio::test]
async fn one_failed_statement_does_not_make_a_node_unready() {
    let postgres = Postgres::start().await;
    let mut server = serve(&postgres).await;
    let (admin, mut stream, _) = server.first_delivered(&postgres, "first").await;
    let mut watching = server.health_changes().await;
    assert_eq!(watching.next().await, ServingStatus::Serving);
    let mut backend = String::new();
    for n in 0..3 {
        backend = snapshot_backend(&admin, &backend).await;
        admin.run(&format!("SELECT pg_terminate_backend({backend})")).await;
        let id = format!("after{n}");
        admin.insert("t1", &id).await;
        stream.expect(Change::created(&id)).await;
    }
    // This is the next change of its health.
    server.terminate().await;
    assert_eq!(watching.next().await, ServingStatus::NotServing);
    assert!(!server.has_logged("not ready"));
    assert_eq!(server.ended().await.code(), Some(0), "a watcher of the health does not delay the end");
}

#[tokio::test]
async fn an_unreadable_table_of_tenants_makes_a_node_unready() {
    let postgres = Postgres::start().await;
    let server = serve(&postgres).await;
    let (admin, mut stream, _) = server.first_delivered(&postgres, "first").await;

    admin.run("REVOKE SELECT ON tuplewatch.tenants FROM feeder").await;
    server.not_ready("no_starts", "the role lacks a privilege: tuplewatch doctor names it").await;
    let status = server.try_watch("t1", "").await.err().unwrap();
    assert_eq!(reason(&status), (Code::Unavailable, "POSTGRES_UNREACHABLE".into()));
    admin.insert("t1", "second").await;
    stream.expect(Change::created("second")).await;
    admin.run("GRANT SELECT ON tuplewatch.tenants TO feeder").await;
    server.ready().await;

    // A lock, for example of a migration.
    let holder = postgres.sql().await;
    holder.run("BEGIN; LOCK TABLE tuplewatch.tenants IN ACCESS EXCLUSIVE MODE").await;
    server.not_ready("no_starts", "look for an overload, and for locks").await;
    holder.run("ROLLBACK").await;
    server.ready().await;
    let mut late = server.watch("t1", "").await;
    admin.insert("t1", "third").await;
    late.expect(Change::created("third")).await;
}

#[tokio::test]
async fn a_commit_that_waits_for_a_standby_makes_a_node_unready() {
    let postgres = Postgres::with(&MISSING_STANDBY).await;
    let server = Server::serve(&postgres, &[]).await;
    let (admin, mut stream, _) = server.first_delivered(&postgres, "first").await;
    let waiting = Waiting::insert(&postgres, &admin, "t1", "waiting").await;
    server.not_ready("not_visible", "its commit waits for a synchronous standby").await;
    assert!(server.scrape().await.get("tuplewatch_oldest_waiting_seconds", &[]) > 10.0);
    waiting.release(&admin).await;
    stream.expect(Change::created("waiting")).await;
    server.ready().await;
    assert_eq!(server.scrape().await.get("tuplewatch_oldest_waiting_seconds", &[]), 0.0);
}

/// The path to which the directory of a log is moved.
fn aside(server: &Server) -> PathBuf {
    server.changelog().with_extension("aside")
}

/// The contents of the old path afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Instead {
    Nothing,
    AnEmptyDirectory,
    ACopy,
}

#[tokio::test]
async fn a_moved_change_log_stops_acknowledgement_until_it_is_back() {
    let postgres = Postgres::start().await;
    let mut server = serve(&postgres).await;
    let (admin, mut stream, token) = server.first_delivered(&postgres, "first").await;
    let (log, aside) = (server.changelog(), aside(&server));
    for instead in [Instead::Nothing, Instead::AnEmptyDirectory, Instead::ACopy] {
        std::fs::rename(&log, &aside).unwrap();
        match instead {
            Instead::Nothing => {}
            Instead::AnEmptyDirectory => std::fs::create_dir(&log).unwrap(),
            Instead::ACopy => {
                let copied = std::process::Command::new("cp").arg("-a").arg(&aside).arg(&log).status();
                assert!(copied.unwrap().success());
            }
        }
        server.not_ready("log_gone", "the directory of the change log").await;
        let is_read = "(SELECT active FROM pg_replication_slots WHERE slot_name = 'tuplewatch')";
        eventually("the slot is released", async || !admin.is_true(is_read).await).await;
        let id = format!("{instead:?}");
        admin.insert("t1", &id).await;
        let lsn = admin.flushed().await;
        assert!(!admin.confirmed_reaches(&lsn).await);
        if instead != Instead::Nothing {
            std::fs::remove_dir_all(&log).unwrap();
        }
        std::fs::rename(&aside, &log).unwrap();
        stream.expect(Change::created(&id)).await;
        server.ready().await;
        eventually("it is acknowledged", async || admin.confirmed_reaches(&lsn).await).await;
    }
    // The next process has everything.
    server.kill_and_restart().await;
    let mut resumed = server.watch("t1", &token).await;
    for instead in [Instead::Nothing, Instead::AnEmptyDirectory, Instead::ACopy] {
        resumed.expect(Change::created(&format!("{instead:?}"))).await;
    }
}

#[tokio::test]
async fn a_deleted_change_log_stops_acknowledgement_and_delays_no_shutdown() {
    let postgres = Postgres::start().await;
    let mut server = serve(&postgres).await;
    let (admin, mut stream, token) = server.first_delivered(&postgres, "first").await;
    admin.insert("t1", "acknowledged").await;
    stream.expect(Change::created("acknowledged")).await;
    let lsn = admin.flushed().await;
    eventually("it is acknowledged", async || admin.confirmed_reaches(&lsn).await).await;
    std::fs::remove_dir_all(server.changelog().join("data")).unwrap();
    server.not_ready("log_gone", "restart tuplewatch to begin a new change log").await;
    admin.insert("t1", "second").await;
    let lsn = admin.flushed().await;
    assert!(!admin.confirmed_reaches(&lsn).await);
    server.terminate().await;
    within("the stream ends", stream.try_next()).await.unwrap_err();
    assert_eq!(server.ended().await.code(), Some(0));

    // A new log begins at the slot's position, and is complete from there on.
    std::fs::remove_dir_all(server.changelog()).unwrap();
    server.start().await;
    server.ready().await;
    let status = server.try_watch("t1", &token).await.err().unwrap();
    assert_eq!(reason(&status), (Code::OutOfRange, "SNAP_TOKEN_TOO_OLD".into()));
    let mut again = server.watch("t1", &metadata(&status, "earliest_snap_token")).await;
    again.expect(Change::created("second")).await;
}
