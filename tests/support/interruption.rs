//! Faults after which changes may be missing without a trace in the stream. Each must be noticed, must be reported to every
//! subscriber, and must be over once the remedy was applied.

use super::change::Change;
use super::postgres::Postgres;
use super::server::Server;
use super::sql::Sql;
use super::stream::{Stream, metadata, reason};
use super::wait::{eventually, within};
use std::time::{Duration, Instant};
use tonic::{Code, Status};
use tonic_health::pb::health_check_response::ServingStatus;

/// The limit in the guarantees for noticing a fault that the stream does not show.
const NOTICED_WITHIN: Duration = Duration::from_secs(10);

/// In statements and phrases, `$NAME` stands for the name of the case, which its publication, slot and tenant have too.
#[derive(Clone, Copy)]
pub(crate) struct Interruption {
    pub(crate) name: &'static str,
    /// The statements that cause it, run one by one. A row of the tenant that is written meanwhile may be lost.
    pub(crate) fault: &'static [&'static str],
    /// `ErrorInfo.reason` of each gap that subscribers get, in order.
    pub(crate) reasons: &'static [&'static str],
    /// Part of the message of the last gap.
    pub(crate) detail: &'static str,
    pub(crate) lasts: Option<Lasting>,
}

/// A fault that stops delivery until it is repaired.
#[derive(Clone, Copy)]
pub(crate) struct Lasting {
    /// The log names the problem and the remedy with these texts.
    pub(crate) messages: &'static [&'static str],
    pub(crate) remedy: Remedy,
}

#[derive(Clone, Copy)]
pub(crate) enum Remedy {
    Sql(&'static [&'static str]),
    Setup(&'static [&'static str]),
}

impl Interruption {
    /// A node with a publication of its own, so that several cases can share a cluster.
    pub(crate) async fn prepare(&self, postgres: &Postgres) -> Server {
        let server =
            Server::prepare_slot(&postgres.uri(), self.name, &[("--replication-publication", self.name)]).await;
        let name = self.name;
        postgres.sql().await.run(&format!("INSERT INTO tuplewatch.tenants (id, name) VALUES ('{name}', '')")).await;
        server
    }

    async fn run_all(&self, sql: &Sql, statements: &[&str]) {
        for statement in statements {
            sql.run(&statement.replace("$NAME", self.name)).await;
        }
    }

    /// Causes the fault and repairs it, and checks what subscribers get.
    pub(crate) async fn check(self, sql: Sql, mut server: Server) {
        let name = self.name;
        server.start().await;
        server.serving().await;
        let mut stream = server.watch(name, "").await;
        sql.insert(name, "before").await;
        let token = stream.expect(Change::created("before")).await.token;

        self.run_all(&sql, self.fault).await;
        let began = Instant::now();
        if let Some(lasting) = self.lasts {
            let not_serving = Ok(ServingStatus::NotServing);
            eventually(&format!("{name}: health is NOT_SERVING"), async || server.health("").await == not_serving)
                .await;
            assert!(began.elapsed() < NOTICED_WITHIN, "{name}: noticed after {:?}", began.elapsed());
            for message in lasting.messages {
                // After a retry or two: the stream may have failed before a check found the cause.
                eventually(&format!("{name}: the log contains '{message}'"), async || server.has_logged(message)).await;
            }
            assert_eq!(server.health("").await, not_serving, "{name}: it must last");
            match lasting.remedy {
                Remedy::Sql(statements) => self.run_all(&sql, statements).await,
                Remedy::Setup(further) => server.setup(further).await,
            }
        }
        let (_, status) = within(&format!("{name}: the live stream ends"), stream.ending()).await;
        if self.lasts.is_none() {
            assert!(began.elapsed() < NOTICED_WITHIN, "{name}: noticed after {:?}", began.elapsed());
        }
        let mut rest = self.after_gaps(&server, status).await;
        server.serving().await;
        sql.insert(name, "after").await;
        rest.expect(Change::created("after")).await;

        for process in 0..2 {
            let (_, status) = server.watch(name, &token).await.ending().await;
            self.after_gaps(&server, status).await.expect(Change::created("after")).await;
            if process == 0 {
                // A gap that is not on disk yet would be found again, and would then cover later changes too.
                sql.until_recorded(name).await;
                server.kill_and_restart().await;
            }
        }
        eprintln!("{name}: {:?}", began.elapsed());
    }

    /// The stream after the gaps. The first of them ended a stream with this status.
    async fn after_gaps(&self, server: &Server, mut status: Status) -> Stream {
        for (n, expected) in self.reasons.iter().enumerate() {
            assert_eq!(reason(&status), (Code::Aborted, (*expected).to_owned()), "{}: {}", self.name, status.message());
            let mut stream = server.watch(self.name, &metadata(&status, "next_snap_token")).await;
            if n + 1 == self.reasons.len() {
                let detail = self.detail.replace("$NAME", self.name);
                assert!(status.message().contains(&detail), "{}: {}", self.name, status.message());
                return stream;
            }
            let (messages, next) = stream.ending().await;
            assert!(messages.is_empty(), "{}: {messages:?}", self.name);
            status = next;
        }
        panic!("an interruption has a reason")
    }
}

/// Runs cases side by side, because they mostly wait.
pub(crate) async fn side_by_side(runs: Vec<(Interruption, Sql, Server)>) {
    let local = tokio::task::LocalSet::new();
    let runs: Vec<_> = runs.into_iter().map(|(case, sql, server)| local.spawn_local(case.check(sql, server))).collect();
    local
        .run_until(async {
            for run in runs {
                run.await.unwrap();
            }
        })
        .await;
}

/// The same with a cluster for each case, for cases that would disturb each other.
pub(crate) async fn each_on_a_cluster(cases: impl IntoIterator<Item = Interruption>) {
    let mut clusters = Vec::new();
    let mut runs = Vec::new();
    for case in cases {
        let postgres = Postgres::start().await;
        let server = case.prepare(&postgres).await;
        runs.push((case, postgres.sql().await, server));
        clusters.push(postgres);
    }
    side_by_side(runs).await;
}
