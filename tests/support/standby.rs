//! A primary, a standby that streams from it, and a node that is configured with both.
//!
//! The standby is a copy of the stopped primary with its replication slots, which a base backup lacks. From PostgreSQL 17 on a standby
//! can also synchronize slots itself.

use super::postgres::Postgres;
use super::reference;
use super::server::Server;
use super::sql::Sql;
use super::wait::eventually;
use super::writer::add_tenants;
use tonic_health::pb::health_check_response::ServingStatus;
use tuplewatch::dev_postgres::StopMode;

pub(crate) struct Pair {
    pub(crate) primary: Postgres,
    pub(crate) standby: Postgres,
    pub(crate) server: Server,
}

/// The slot of the standby on the primary.
const PHYSICAL_SLOT: &str = "standby";

impl Pair {
    /// The slots of the standby stay at their positions from the copy.
    pub(crate) async fn start() -> Self {
        let mut primary = Postgres::start().await;
        drop(Server::prepare(&primary, &[]).await);
        let sql = primary.sql().await;
        add_tenants(&sql).await;
        reference::begin(&sql).await;
        drop(sql);
        primary.stop(StopMode::Fast).await;
        let mut standby = primary.copy().await;
        standby.stop_and_set(&[("primary_conninfo", &primary.uri())]).await;
        Self::serve(primary, standby).await
    }

    /// The standby synchronizes the slots, and the primary streams no change that the standby lacks.
    pub(crate) async fn start_with_failover_slots() -> Self {
        let mut primary = Postgres::since(17, &[]).await;
        drop(Server::prepare(&primary, &[]).await);
        let sql = primary.sql().await;
        add_tenants(&sql).await;
        reference::begin_with_failover(&sql).await;
        sql.run(&format!("SELECT pg_create_physical_replication_slot('{PHYSICAL_SLOT}', true)")).await;
        drop(sql);
        primary.stop(StopMode::Fast).await;
        let mut standby = primary.copy().await;
        let slots = standby.pgdata().join("pg_replslot");
        for slot in std::fs::read_dir(slots).unwrap() {
            std::fs::remove_dir_all(slot.unwrap().path()).unwrap();
        }
        standby
            .stop_and_set(&[
                ("primary_conninfo", &primary.uri()),
                ("primary_slot_name", PHYSICAL_SLOT),
                ("hot_standby_feedback", "on"),
                ("sync_replication_slots", "on"),
            ])
            .await;
        primary.stop_and_set(&[("synchronized_standby_slots", PHYSICAL_SLOT)]).await;
        let pair = Self::serve(primary, standby).await;
        let (primary, standby) = (pair.primary.sql().await, pair.standby.sql().await);
        let are_synced = "(SELECT count(*) FROM pg_replication_slots WHERE synced AND NOT temporary) = 2";
        eventually("the standby has copies of both slots", async || {
            // A copy becomes permanent once the slot has reached the standby's start.
            primary.run("SELECT pg_log_standby_snapshot()").await;
            primary.run("SELECT pg_replication_slot_advance('reference', pg_current_wal_lsn())").await;
            standby.is_true(are_synced).await
        })
        .await;
        pair
    }

    async fn serve(mut primary: Postgres, mut standby: Postgres) -> Self {
        standby.put_signal("standby.signal");
        primary.start_again().await;
        standby.start_again().await;
        let mut server = Server::prepare_slot(&uri(&primary, &standby), "tuplewatch", &[]).await;
        server.start().await;
        server.serving().await;
        Self { primary, standby, server }
    }

    /// Leads to the one that accepts writes.
    pub(crate) fn uri(&self) -> String {
        format!("{}?target_session_attrs=read-write", uri(&self.primary, &self.standby))
    }

    /// Waits until the standby has replayed everything from the primary.
    pub(crate) async fn in_step(&self) {
        let lsn = self.primary.sql().await.flushed().await;
        let sql = self.standby.sql().await;
        let condition = format!("pg_last_wal_replay_lsn() >= '{lsn}'");
        eventually("the standby has everything", async || sql.is_true(&condition).await).await;
    }

    /// Disconnects the standby from the primary.
    pub(crate) async fn separate(&self) {
        let sql = self.standby.sql().await;
        sql.run("ALTER SYSTEM SET primary_conninfo = ''").await;
        sql.run("SELECT pg_reload_conf()").await;
        let is_over = "NOT EXISTS (SELECT FROM pg_stat_wal_receiver)";
        eventually("the standby receives nothing", async || sql.is_true(is_over).await).await;
    }

    /// Stops the primary, and promotes the standby.
    pub(crate) async fn fail_over(&mut self, mode: StopMode) -> Sql {
        self.primary.stop(mode).await;
        let not_serving = Ok(ServingStatus::NotServing);
        eventually("health is NOT_SERVING", async || self.server.health("").await == not_serving).await;
        let sql = self.standby.sql().await;
        sql.run("SELECT pg_promote()").await;
        sql
    }
}

fn uri(primary: &Postgres, standby: &Postgres) -> String {
    let [first, second] = [primary.uri(), standby.uri()].map(|uri| port(&uri));
    format!("postgres://postgres@127.0.0.1:{first},127.0.0.1:{second}/postgres")
}

fn port(uri: &str) -> u16 {
    uri.parse::<tokio_postgres::Config>().unwrap().get_ports()[0]
}
