//! Writers of random transactions.

use super::sql::Sql;
use fastrand::Rng;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// The tenants of the rows.
pub(crate) const TENANTS: [&str; 4] = ["t1", "t2", "t3", "t4"];

/// `TUPLEWATCH_SEED`, or a new one. It is printed, so that a failed test can be repeated.
pub(crate) fn seed() -> u64 {
    let seed = std::env::var("TUPLEWATCH_SEED").ok().map(|seed| seed.parse().expect("TUPLEWATCH_SEED is a number"));
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    eprintln!("to repeat the random choices: TUPLEWATCH_SEED={seed}");
    seed
}

/// Adds the tenants that are not in the table yet.
pub(crate) async fn add_tenants(sql: &Sql) {
    for tenant in TENANTS {
        sql.run(&format!("INSERT INTO tuplewatch.tenants (id, name) VALUES ('{tenant}', '') ON CONFLICT DO NOTHING"))
            .await;
    }
}

/// Running writers.
pub(crate) struct Writers {
    stop: Arc<AtomicBool>,
    committed: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

/// Optional behaviour of a writer.
#[derive(Clone, Copy, Default)]
pub(crate) struct Habits {
    /// Writes a transaction of some MiB of changes now and then.
    pub(crate) is_big: bool,
    /// Reconnects when PostgreSQL stops.
    pub(crate) is_patient: bool,
}

impl Writers {
    pub(crate) fn start(uri: &str, count: u64, seed: u64, habits: Habits) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let committed = Arc::new(AtomicU64::new(0));
        let tasks = (0..count)
            .map(|n| {
                let writer = Writer {
                    uri: uri.to_owned(),
                    random: Rng::with_seed(seed.wrapping_add(n)),
                    habits: Habits { is_big: habits.is_big && n == 0, ..habits },
                    stop: stop.clone(),
                    committed: committed.clone(),
                };
                tokio::spawn(writer.run())
            })
            .collect();
        Self { stop, committed, tasks }
    }

    /// Transactions that PostgreSQL has confirmed so far.
    pub(crate) fn committed(&self) -> u64 {
        self.committed.load(Ordering::Relaxed)
    }

    /// Waits for the end of their transactions. Returns how many were committed.
    pub(crate) async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        self.committed.load(Ordering::Relaxed)
    }
}

struct Writer {
    uri: String,
    random: Rng,
    habits: Habits,
    stop: Arc<AtomicBool>,
    committed: Arc<AtomicU64>,
}

/// The end of a transaction.
enum Ended {
    Committed,
    RolledBack,
    /// The outcome is unknown, and the connection is lost.
    Disconnected(tokio_postgres::Error),
}

impl Writer {
    async fn run(mut self) {
        while !self.is_stopped() {
            let sql = match Sql::try_connect(&self.uri).await {
                Ok(sql) => sql,
                Err(error) => {
                    assert!(self.habits.is_patient, "a writer cannot connect: {error}");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
            };
            while !self.is_stopped() {
                match self.transaction(&sql).await {
                    Ended::Committed => drop(self.committed.fetch_add(1, Ordering::Relaxed)),
                    Ended::RolledBack => {}
                    Ended::Disconnected(error) => {
                        assert!(self.habits.is_patient, "a writer was disconnected: {error}");
                        break;
                    }
                }
            }
        }
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    async fn transaction(&mut self, sql: &Sql) -> Ended {
        let mut statements = self.statements();
        let commits = self.random.u8(..10) > 0;
        let last = if commits { "COMMIT" } else { "ROLLBACK" };
        if self.random.bool() {
            // Statement by statement, so that others commit in between.
            statements.insert(0, "BEGIN".to_owned());
            statements.push(last.to_owned());
        } else {
            statements = vec![format!("BEGIN; {}; {last}", statements.join("; "))];
        }
        for statement in &statements {
            let Err(error) = sql.batch_execute(statement).await else { continue };
            match error.code().map(|code| code.code().to_owned()) {
                // A unique violation or a deadlock, which is normal for writers.
                Some(code) if ["23505", "40P01"].contains(&&*code) => {
                    return match sql.batch_execute("ROLLBACK").await {
                        Ok(()) => Ended::RolledBack,
                        Err(error) => Ended::Disconnected(error),
                    };
                }
                // Class 57: the server is stopping or starting.
                Some(code) if !code.starts_with("57") => panic!("{statement}: {error} {code}"),
                _ => return Ended::Disconnected(error),
            }
        }
        if commits { Ended::Committed } else { Ended::RolledBack }
    }

    fn statements(&mut self) -> Vec<String> {
        if self.habits.is_big && self.random.u8(..100) == 0 {
            return vec![self.big()];
        }
        let mut statements: Vec<String> = (0..self.random.usize(1..6)).map(|_| self.statement()).collect();
        if self.random.u8(..4) == 0 {
            let place = self.random.usize(..=statements.len());
            let end = if self.random.u8(..3) > 0 { "ROLLBACK TO SAVEPOINT s" } else { "RELEASE SAVEPOINT s" };
            let inner: Vec<String> = (0..self.random.usize(1..4)).map(|_| self.statement()).collect();
            let inside = ["SAVEPOINT s".to_owned()].into_iter().chain(inner).chain([end.to_owned()]);
            statements.splice(place..place, inside);
        }
        statements
    }

    fn statement(&mut self) -> String {
        match self.random.u8(..20) {
            0..7 => {
                let count = if self.random.u8(..4) == 0 { self.random.usize(2..30) } else { 1 };
                let rows: Vec<String> = (0..count).map(|_| self.tuple()).collect();
                let rows = rows.join(", ");
                format!("INSERT INTO tuplewatch.relation_tuples VALUES {rows} ON CONFLICT DO NOTHING")
            }
            7..10 => {
                let (tenant, entity, relation) = (self.tenant(), self.id(), self.relation());
                format!(
                    "DELETE FROM tuplewatch.relation_tuples WHERE tenant_id = '{tenant}' AND entity_type = 'document' \
                     AND entity_id = '{entity}' AND relation = '{relation}' AND subject_id < '{}'",
                    self.id()
                )
            }
            10..12 => {
                format!("UPDATE tuplewatch.relation_tuples SET subject_id = '{}' {}", self.id(), self.one_tuple())
            }
            // From one tenant to another.
            12 => format!("UPDATE tuplewatch.relation_tuples SET tenant_id = '{}' {}", self.tenant(), self.one_tuple()),
            // Changes nothing.
            13 => format!("UPDATE tuplewatch.relation_tuples SET subject_id = subject_id {}", self.one_tuple()),
            14..17 => format!(
                "INSERT INTO tuplewatch.attributes VALUES ('{}', 'document', '{}', '{}', '{}') \
                 ON CONFLICT (tenant_id, entity_type, entity_id, attribute) DO UPDATE SET value = EXCLUDED.value",
                self.tenant(),
                self.id(),
                self.relation(),
                self.value()
            ),
            // Changes nothing. A large value is then not even sent.
            17 => format!("UPDATE tuplewatch.attributes SET value = value {}", self.one_entity()),
            18 => format!("UPDATE tuplewatch.attributes SET attribute = '{}' {}", self.relation(), self.one_entity()),
            _ => format!("DELETE FROM tuplewatch.attributes {}", self.one_entity()),
        }
    }

    /// Inserts many rows of one tenant, or deletes them.
    fn big(&mut self) -> String {
        let tenant = self.tenant();
        let long = "x".repeat(100);
        if self.random.bool() {
            format!(
                "INSERT INTO tuplewatch.relation_tuples \
                 SELECT '{tenant}', 'big', '{long}' || n, 'viewer', 'user', '{long}', '' FROM generate_series(1, 25000) n \
                 ON CONFLICT DO NOTHING"
            )
        } else {
            format!("DELETE FROM tuplewatch.relation_tuples WHERE tenant_id = '{tenant}' AND entity_type = 'big'")
        }
    }

    fn tuple(&mut self) -> String {
        let (subject_type, subject_relation) = if self.random.u8(..4) == 0 { ("team", "member") } else { ("user", "") };
        let (tenant, entity, relation, subject) = (self.tenant(), self.id(), self.relation(), self.id());
        format!(
            "('{tenant}', 'document', '{entity}', '{relation}', '{subject_type}', '{subject}', '{subject_relation}')"
        )
    }

    fn one_tuple(&mut self) -> String {
        format!(
            "WHERE tenant_id = '{}' AND entity_type = 'document' AND entity_id = '{}' AND relation = '{}' \
             AND subject_type = 'user' AND subject_id = '{}'",
            self.tenant(),
            self.id(),
            self.relation(),
            self.id()
        )
    }

    fn one_entity(&mut self) -> String {
        format!("WHERE tenant_id = '{}' AND entity_type = 'document' AND entity_id = '{}'", self.tenant(), self.id())
    }

    fn value(&mut self) -> String {
        let (kind, data) = match self.random.u8(..5) {
            0 => ("BooleanValue", self.random.bool().to_string()),
            1 => ("IntegerValue", self.random.i32(-9..9).to_string()),
            2 => ("StringArrayValue", format!(r#"["{}", ""]"#, self.id())),
            // Large and incompressible, so that it is stored out of line.
            3 => ("StringValue", format!(r#""{}""#, (0..3000).map(|_| self.random.alphanumeric()).collect::<String>())),
            _ => ("StringValue", format!(r#""{}""#, self.id())),
        };
        format!(r#"{{"@type": "type.googleapis.com/base.v1.{kind}", "data": {data}}}"#)
    }

    fn tenant(&mut self) -> &'static str {
        TENANTS[self.random.usize(..TENANTS.len())]
    }

    /// Few values, so that transactions collide.
    fn id(&mut self) -> u8 {
        self.random.u8(10..40)
    }

    fn relation(&mut self) -> &'static str {
        if self.random.bool() { "viewer" } else { "editor" }
    }
}
