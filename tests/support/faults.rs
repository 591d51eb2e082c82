//! A node, its PostgreSQL and the connection between them, with random faults of each.

use super::oracle::Load;
use super::postgres::Postgres;
use super::proxy::Proxy;
use super::server::Server;
use super::sql::Sql;
use super::wait::{PATIENCE, eventually};
use super::writer::TENANTS;
use fastrand::Rng;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tonic::transport::Endpoint;
use tuplewatch::dev_postgres::StopMode;
use tuplewatch::model::lsn::Lsn;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// SIGKILL of tuplewatch.
    Kill,
    /// SIGTERM of tuplewatch.
    Terminate,
    /// An immediate stop of PostgreSQL.
    Crash,
    /// A fast stop of PostgreSQL.
    Restart,
    /// [`Fault::Kill`] while PostgreSQL is down after [`Fault::Crash`].
    CrashBoth,
    /// All connections between tuplewatch and PostgreSQL are reset.
    Cut,
    /// For a while nothing passes between tuplewatch and PostgreSQL, and neither side notices a closed connection.
    Silence,
    /// The disk of the change log is full for a while.
    FullDisk,
    /// SIGKILL of one of two nodes, which serve one database behind one address.
    KillOneOfTwo,
    /// A table or an operation is not published for a while, and a transaction that wrote in that time stays open for longer.
    Unpublish,
    /// A standby of PostgreSQL is promoted. The scenarios with a standby inflict it themselves.
    Failover,
}

impl Fault {
    /// Whether subscribers lose their streams.
    pub(crate) const fn ends_tuplewatch(self) -> bool {
        matches!(self, Self::Kill | Self::Terminate | Self::CrashBoth | Self::KillOneOfTwo)
    }

    /// Whether writers lose their connections.
    pub(crate) const fn ends_postgres(self) -> bool {
        matches!(self, Self::Crash | Self::Restart | Self::CrashBoth | Self::Failover)
    }

    /// Whether it lasts for a while, during which other faults may happen.
    const fn lasts(self) -> bool {
        matches!(self, Self::Silence | Self::FullDisk | Self::Unpublish)
    }
}

/// The number of times each fault happened.
#[derive(Default)]
pub(crate) struct Tally(BTreeMap<Fault, usize>);

impl Tally {
    fn count(&mut self, fault: Fault) {
        *self.0.entry(fault).or_default() += 1;
    }

    pub(crate) fn of(&self, fault: Fault) -> usize {
        self.0.get(&fault).copied().unwrap_or_default()
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (fault, count) in &other.0 {
            *self.0.entry(*fault).or_default() += count;
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts: Vec<String> = self.0.iter().map(|(fault, count)| format!("{count} {fault:?}")).collect();
        f.write_str(&if counts.is_empty() { "none".to_owned() } else { counts.join(", ") })
    }
}

pub(crate) struct World {
    pub(crate) postgres: Postgres,
    pub(crate) server: Server,
    /// Another node on the same database, and the load balancer in front of both.
    twin: Option<(Server, Proxy)>,
    random: Rng,
    /// Between tuplewatch and PostgreSQL.
    line: Option<Proxy>,
    disk: Option<Disk>,
    /// The number of times that [`Fault::Unpublish`] happened.
    unpublished: u64,
}

impl World {
    /// A cluster and a node that serves it, prepared for these faults.
    pub(crate) async fn start(faults: &[Fault], settings: &[(&str, &str)], flags: &[(&str, &str)], seed: u64) -> Self {
        let postgres = Postgres::with(settings).await;
        let mut uri = postgres.uri();
        let mut line = None;
        if faults.iter().any(|fault| matches!(fault, Fault::Cut | Fault::Silence)) {
            let proxy = line.insert(Proxy::to_postgres(&uri).await);
            uri = proxy.uri(&uri);
        }
        let disk = faults.contains(&Fault::FullDisk).then(Disk::new);
        let mut flags = flags.to_vec();
        let reserve = disk.as_ref().map(|disk| disk.reserve_bytes.to_string());
        flags.extend(reserve.as_ref().map(|reserve| ("--changelog-disk-reserve", reserve.as_str())));
        let mut server = Server::prepare_slot(&uri, "tuplewatch", &flags).await;
        if let Some(disk) = &disk {
            server.keep_log_in(tempfile::tempdir_in(disk.directory.path()).unwrap());
        }
        server.start().await;
        server.serving().await;
        let mut twin = None;
        if faults.contains(&Fault::KillOneOfTwo) {
            let mut other = Server::prepare_slot(&uri, "tuplewatch_twin", &flags).await;
            other.start().await;
            other.serving().await;
            let balancer = Proxy::among(&[server.address(), other.address()]).await;
            twin = Some((other, balancer));
        }
        Self { postgres, server, twin, random: Rng::with_seed(seed.wrapping_add(1000)), line, disk, unpublished: 0 }
    }

    /// The address for subscribers.
    pub(crate) fn endpoint(&self) -> Endpoint {
        match &self.twin {
            Some((_, balancer)) => Endpoint::from_shared(format!("http://{}", balancer.address())).unwrap(),
            None => self.server.endpoint(),
        }
    }

    /// Inflicts random faults of these, one after the other, for the duration `lasting` and until each has happened `least` times. Every
    /// fault is over at the end.
    pub(crate) async fn disturb(
        &mut self,
        faults: &[Fault],
        load: &Load<'_>,
        lasting: Duration,
        least: usize,
    ) -> Tally {
        let mut tally = Tally::default();
        let began = Instant::now();
        while began.elapsed() < lasting || faults.iter().any(|fault| tally.of(*fault) < least) {
            assert!(began.elapsed() < lasting + 3 * PATIENCE, "the faults took too long: {tally}");
            load.progresses().await;
            self.moment(200..1200).await;
            match self.random.choice(faults).copied() {
                Some(fault) if fault.lasts() => self.inflict_lasting(fault, faults, load, &mut tally).await,
                Some(fault) => self.inflict(fault, &mut tally).await,
                None => {}
            }
        }
        tally
    }

    async fn inflict(&mut self, fault: Fault, tally: &mut Tally) {
        tally.count(fault);
        match fault {
            Fault::Kill => {
                self.server.kill_9().await;
                self.server.start().await;
            }
            Fault::Terminate => {
                self.server.terminate().await;
                assert!(self.server.ended().await.success(), "a stop that was asked for is no failure");
                self.server.start().await;
            }
            Fault::Crash => {
                self.postgres.stop(StopMode::Immediate).await;
                self.postgres.start_again().await;
            }
            Fault::Restart => {
                self.postgres.stop(StopMode::Fast).await;
                self.postgres.start_again().await;
            }
            Fault::CrashBoth => {
                self.postgres.stop(StopMode::Immediate).await;
                self.server.kill_9().await;
                self.postgres.start_again().await;
                self.server.start().await;
            }
            Fault::KillOneOfTwo => {
                let is_first = self.random.bool();
                let away = Duration::from_millis(self.random.u64(0..1_500));
                let (twin, _) = self.twin.as_mut().expect("made where it is needed");
                let server = if is_first { &mut self.server } else { twin };
                server.kill_9().await;
                tokio::time::sleep(away).await;
                server.start().await;
                // One of the two serves at any time.
                server.serving().await;
            }
            Fault::Cut => self.line().cut(),
            Fault::Silence | Fault::FullDisk | Fault::Unpublish => unreachable!("{fault:?} lasts"),
            Fault::Failover => unreachable!("the scenario's own"),
        }
    }

    /// Inflicts a fault that lasts. In half of all cases another of `faults` happens during it.
    async fn inflict_lasting(&mut self, fault: Fault, faults: &[Fault], load: &Load<'_>, tally: &mut Tally) {
        tally.count(fault);
        // A cut would end the silence.
        let others: Vec<Fault> =
            faults.iter().copied().filter(|other| !other.lasts() && *other != Fault::Cut).collect();
        let other = self.random.choice(others).filter(|_| self.random.bool());
        let mut unpublished = None;
        match fault {
            Fault::Silence => {
                self.line().silence();
                // Mostly short; now and then longer than the timeouts of both sides.
                let for_ms = if self.random.u8(..4) == 0 { 21_000..25_000 } else { 100..4_000 };
                self.moment(for_ms).await;
            }
            Fault::Unpublish => {
                unpublished = Some(self.unpublish().await);
                // The gap is not noticed yet, waits for the writer, or was reported as open.
                self.moment(0..12_000).await;
            }
            _ => {
                load.allow_dropped_history();
                let times = |server: &Server| server.times_logged("the disk of the change log is full");
                let times_before = times(&self.server);
                self.disk().fill();
                eventually("the full disk is noticed", async || times(&self.server) > times_before).await;
                self.moment(0..3_000).await;
            }
        }
        if let Some(other) = other {
            self.inflict(other, tally).await;
            self.moment(0..3_000).await;
        }
        match unpublished {
            Some(unpublished) => self.end_gap(unpublished).await,
            None if fault == Fault::Silence => self.line().restore(),
            None => self.disk().free(),
        }
    }

    /// Takes a table or an operation out of the publication for a while. Rows that are written meanwhile are not sent, whenever they
    /// commit.
    async fn unpublish(&mut self) -> Unpublished {
        const AWAY_AND_BACK: [(&str, &str); 3] = [
            ("DROP TABLE tuplewatch.relation_tuples", "ADD TABLE tuplewatch.relation_tuples"),
            ("SET (publish = 'delete')", "SET (publish = 'insert, update, delete, truncate')"),
            ("SET TABLE tuplewatch.attributes", "SET TABLE tuplewatch.relation_tuples, tuplewatch.attributes"),
        ];
        let (sql, writer) = (self.postgres.sql().await, self.postgres.sql().await);
        let (away, back) = AWAY_AND_BACK[self.random.usize(..AWAY_AND_BACK.len())];
        self.unpublished += 1;
        let insert = |kind: &str| {
            let row = |tenant| format!("('{tenant}', '{kind}', '{}', 'viewer', 'user', 'u')", self.unpublished);
            format!("INSERT INTO tuplewatch.relation_tuples VALUES {}", TENANTS.map(row).join(", "))
        };
        // The writer needs an earlier row. PostgreSQL applies a change of the publication inside a transaction that has already written.
        // For any other transaction the publication at its commit counts, and then no row is missing.
        writer.run(&format!("BEGIN; {}", insert("early"))).await;
        sql.run(&format!("ALTER PUBLICATION tuplewatch {away}")).await;
        writer.run(&insert(NOT_SENT)).await;
        // Mostly between two checks.
        self.moment(0..3_000).await;
        sql.run(&format!("ALTER PUBLICATION tuplewatch {back}")).await;
        Unpublished { writer, until: sql.flushed().await.parse().unwrap() }
    }

    /// Commits the rows that were not published, and waits until the gap has ended.
    async fn end_gap(&mut self, Unpublished { writer, until }: Unpublished) {
        // Every second time the gap is reported before the writer commits. A gap that does not wait for its writers would end too early.
        if self.unpublished % 2 == 1 {
            eventually("the gap is reported", async || self.server.last_gap() > until).await;
        }
        // PostgreSQL may have been stopped meanwhile, which ended the transaction.
        let _ = writer.batch_execute("COMMIT").await;
        let ended = async || self.server.closed_gaps().into_keys().any(|to| to > until);
        eventually("the gap has ended", ended).await;
        self.until_verified().await;
    }

    /// Waits until the publication is verified past everything that is committed by now. The next gap begins there or later, so it
    /// cannot hide a row that this gap has to cover.
    async fn until_verified(&self) {
        let sql = self.postgres.sql().await;
        // The second check confirms the first, which is verified then, and the third begins when the second has ended.
        for _ in ["first", "second", "third"] {
            sql.check_published().await;
            // A check counts only up to the received position.
            sql.until_recorded("tuplewatch").await;
        }
    }

    async fn moment(&mut self, ms: std::ops::Range<u64>) {
        tokio::time::sleep(Duration::from_millis(self.random.u64(ms))).await;
    }

    fn line(&self) -> &Proxy {
        self.line.as_ref().expect("made where it is needed")
    }

    fn disk(&self) -> &Disk {
        self.disk.as_ref().expect("made where it is needed")
    }
}

/// The entity type of rows that no stream gets, because they were written while their table was not published.
pub(crate) const NOT_SENT: &str = "late";

/// The state after [`Fault::Unpublish`].
struct Unpublished {
    /// Has an open transaction that wrote.
    writer: Sql,
    /// From here on everything is published again.
    until: Lsn,
}

/// A file system for the change log, with a reserve that leaves little of it to the log.
struct Disk {
    directory: TempDir,
    reserve_bytes: u64,
}

impl Disk {
    /// The space that the change log may use, several times its needs.
    const ROOM_BYTES: u64 = 1 << 30;

    /// In `TUPLEWATCH_DISK`, or in memory.
    fn new() -> Self {
        let parent = std::env::var_os("TUPLEWATCH_DISK").unwrap_or("/dev/shm".into());
        let directory = tempfile::tempdir_in(&parent).expect("a directory in TUPLEWATCH_DISK");
        let stat = rustix::fs::statvfs(directory.path()).unwrap();
        let free = stat.f_bavail * stat.f_frsize;
        assert!(free > 2 * Self::ROOM_BYTES, "only {free} bytes are free in {parent:?}; TUPLEWATCH_DISK names another");
        Self { directory, reserve_bytes: free - Self::ROOM_BYTES }
    }

    fn fill(&self) {
        let file = File::create(self.filler()).unwrap();
        let bytes = Self::ROOM_BYTES + (64 << 20);
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes).unwrap();
    }

    fn free(&self) {
        std::fs::remove_file(self.filler()).unwrap();
    }

    fn filler(&self) -> PathBuf {
        self.directory.path().join("filler")
    }
}
