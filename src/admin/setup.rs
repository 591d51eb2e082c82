//! `setup` makes in PostgreSQL what tuplewatch needs, and `teardown` takes away what would cost something.
//!
//! A [`Setup`] is what is wanted; its plan lists only what is missing, so that a second run has nothing to do. The order is
//! fixed: tables, replica identities, publication, slot. Identities come before the publication, because PostgreSQL refuses
//! UPDATE and DELETE on a published table without one. The slot comes last, because it reads the WAL from its own
//! creation on, and a publication that is younger than the slot does not exist yet in the WAL that is read first (an error on
//! 14 to 17, silently nothing on 18).
//!
//! What is there and only different, such as a row filter, is left alone: [`crate::postgres::requirements`] reports it.
//!
//! # All or nothing
//!
//! Whatever can be seen to be in the way is looked for first (`obstacles`), and said all at once. Then all definitions are one
//! transaction. The slot cannot be part of it: PostgreSQL makes none in a transaction that has written. If it fails for a
//! reason that could not be seen before (somebody else took the last one, or nobody wanted to wait any longer), the rest is
//! there, costs nothing, and another run makes the slot.
//!
//! # A table that is added while a slot is read
//!
//! PostgreSQL decides for each change whether the table was published when it was made. What a transaction wrote before the table
//! was added is not sent, even if it commits after, with others of its rows. So the table is locked against writers until
//! it is published: no transaction has rows on both sides. Tables that are published already are not locked.
//!
//! # Failure and recovery
//!
//! A run that was broken off is repaired by another. Two runs at once wait for each other (an advisory lock of the session,
//! which goes with it). The transaction gives up after 5 s of waiting for a lock: while it waits behind a long transaction, all
//! who come after it wait too.

mod obstacles;
mod step;

use std::fmt::Write as _;
use std::time::Duration;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use crate::decode::mapping::Mapping;
use crate::model::diagnostic::{CommandLine, Diagnostic, Report, Severity};
use crate::postgres::catalog::{Catalog, Publication, Table, identifier};
use crate::postgres::connection::{Connection, SqlError};
use crate::postgres::requirements::{ALL_OPERATIONS, creation, foreign_slot};
use crate::postgres::slot::{Slot, can_fail_over};
use crate::postgres::transactions::{self, NAMED_MAX, Transaction, Watched};
use obstacles::{Look, Rights, check_unused, check_version};
use step::{Kind, LOCK_TIMEOUT_SECONDS, begin};

pub use crate::postgres::slot::{Waiting, create_slot};
pub use step::{Script, Step};

/// The tables of the preset `tuples`: version, name and text of each file. Each adds its own row to
/// `tuplewatch.schema_version`.
const FILES: [(i32, &str, &str); 2] = [
    (1, "0001_tables.sql", include_str!("../../sql/0001_tables.sql")),
    (2, "0002_snap_token.sql", include_str!("../../sql/0002_snap_token.sql")),
];
/// Of the advisory lock: "tuplewat" in ASCII, so that nobody has it by chance.
const LOCK: i64 = 0x7475_706C_6577_6174;
/// Between two tries to get it.
const LOCK_RETRY: Duration = Duration::from_secs(1);

/// What shall be there.
#[derive(Clone, Copy, Debug)]
pub struct Setup<'a> {
    /// Names the tables.
    pub mapping: &'a Mapping,
    /// Name of the slot.
    pub slot: &'a str,
    /// Name of the publication.
    pub publication: &'a str,
    /// Whether to create tuplewatch's own tables: for the preset `tuples`.
    pub apply_schema: bool,
    /// Drop the slot if it is there, and make a new one. What changed in between is lost to all subscribers.
    pub recreate_slot: bool,
    /// Whether standbys are to keep a copy of a new slot, where PostgreSQL can (17).
    pub failover: bool,
    /// How messages write commands.
    pub commands: &'a CommandLine,
}

/// What happens while steps are carried out.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// This one is next.
    Step(&'a Step),
    /// The slot waits for others; every few seconds.
    Waiting(&'a Waiting),
    /// Another setup or teardown is at work in this database; told once.
    Locked,
}

/// Who is told of [`Event`]s.
pub type Told<'a> = &'a mut (dyn FnMut(Event<'_>) + Send);

/// Why nothing, or not everything, was done; with what to do.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum Error {
    #[error("PostgreSQL could not be asked: {0}")]
    Sql(#[source] SqlError),

    #[error("{}", all(.0))]
    InTheWay(Vec<Diagnostic>),

    #[error("could not {step}, and nothing was changed: {}", locked_by(.transactions))]
    Locked { step: String, transactions: Vec<String> },

    #[error("could not {step}, and nothing was changed: {source}{}", remedy(.source))]
    Definition { step: String, source: SqlError },

    /// The only one that may leave something done.
    #[error("could not {step}: {source}{}. What was done before stays, and another run does the rest", remedy(.source))]
    Alone { step: String, source: SqlError },
}

impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Sql(error.into())
    }
}

fn all(diagnostics: &[Diagnostic]) -> String {
    let (things, are) = if diagnostics.len() == 1 { ("one thing", "is") } else { ("several things", "are") };
    let mut text = format!("nothing was changed, because {things} {are} in the way:");
    for diagnostic in diagnostics {
        let _ = write!(text, "\n{diagnostic}");
    }
    text
}

fn locked_by(transactions: &[String]) -> String {
    if transactions.is_empty() {
        return format!(
            "a transaction was using the table for {LOCK_TIMEOUT_SECONDS} s, and has just ended. Run this again"
        );
    }
    let mut text =
        format!("the table could not be locked within {LOCK_TIMEOUT_SECONDS} s. Run this again when these have ended:");
    for transaction in transactions {
        let _ = write!(text, "\n  {transaction}");
    }
    text
}

fn remedy(error: &SqlError) -> &'static str {
    if error.sqlstate() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) {
        ". Run it as the owner of the tables who may also create in the database and has REPLICATION, or as a superuser"
    } else {
        ""
    }
}

impl Setup<'_> {
    /// What is missing, in order. Changes nothing.
    ///
    /// # Errors
    /// With all that is in the way.
    pub async fn plan(&self, client: &Client) -> Result<Vec<Step>, Error> {
        if let Some(diagnostic) = check_version(client).await? {
            return Err(Error::InTheWay(vec![diagnostic]));
        }
        let catalog = Catalog::read(client, self.publication, self.mapping).await?;
        let slot = Slot::read(client, self.slot).await?;
        let mut steps = self.plan_schema(client, &catalog).await?;
        let look = Look { setup: self, catalog: &catalog, slot: slot.as_ref(), applies_schema: !steps.is_empty() };
        let mut report = Report::default();
        look.check(client, &mut report).await?;
        none_in_the_way(report)?;

        steps.extend(Self::plan_identities(&catalog));
        steps.extend(self.plan_publication(&catalog, slot.is_some() && !self.recreate_slot));
        match slot {
            Some(_) if !self.recreate_slot => steps.extend((!steps.is_empty()).then(Step::look_at_once)),
            found => {
                steps.extend(found.map(|_| Step::drop_slot(self.slot)));
                steps.push(Step::create_slot(self.slot, self.failover && can_fail_over(client).await?));
            }
        }
        Ok(steps)
    }

    /// Does what is missing, and returns it. The slot step may wait for others without limit; see
    /// [`create_slot`].
    ///
    /// # Errors
    /// With what is in the way, or the step that failed.
    pub async fn apply(&self, connection: &Connection, told: Told<'_>) -> Result<Vec<Step>, Error> {
        lock(&connection.client, told).await?;
        let done = async {
            let steps = self.plan(&connection.client).await?;
            carry_out(connection, &steps, self.slot, told).await?;
            Ok(steps)
        };
        let done = done.await;
        unlock(&connection.client).await;
        done
    }

    async fn plan_schema(&self, client: &Client, catalog: &Catalog) -> Result<Vec<Step>, Error> {
        if !self.apply_schema {
            return Ok(Vec::new());
        }
        // A table that was dropped since comes back: applying a file again changes nothing else.
        let is_whole = catalog.tables.iter().all(|table| table.oid.is_some() || table.other_kind.is_some());
        let applied = if is_whole { applied(client).await? } else { Some(Vec::new()) };
        let is_missing = |version: &i32| applied.as_ref().is_some_and(|applied| !applied.contains(version));
        let missing = FILES.iter().filter(|(version, ..)| is_missing(version));
        Ok(missing
            .map(|(_, name, sql)| Step::new(format!("apply {name}"), (*sql).to_owned(), Kind::Definition))
            .collect())
    }

    fn plan_identities(catalog: &Catalog) -> Vec<Step> {
        let mut steps = Vec::new();
        for table in &catalog.tables {
            for (relation, _) in table.unidentified() {
                let name = relation.name();
                let sql = format!("ALTER TABLE {} REPLICA IDENTITY FULL;", name.to_sql());
                let kind = Kind::Alteration(Watched::one(relation.oid, &name));
                steps.push(Step::new(format!("let old rows of {name} be complete"), sql, kind));
            }
        }
        steps
    }

    /// `is_read`: there is a slot, which goes on.
    fn plan_publication(&self, catalog: &Catalog, is_read: bool) -> Vec<Step> {
        let list = |tables: &[&Table]| tables.iter().map(|table| table.name().to_sql()).collect::<Vec<_>>();
        let Some(publication) = &catalog.publication else {
            let sql = creation(self.publication, &list(&catalog.tables.iter().collect::<Vec<_>>()));
            return vec![Step::new(format!("create publication {}", self.publication), sql, Kind::Definition)];
        };
        let name = identifier(self.publication);
        let mut steps = Vec::new();
        let settings = settings(publication, catalog);
        if !settings.is_empty() {
            let sql = format!("ALTER PUBLICATION {name} SET ({});", settings.join(", "));
            let explanation = format!("let publication {} publish everything", self.publication);
            steps.push(Step::new(explanation, sql, Kind::Definition));
        }
        let missing: Vec<&Table> = catalog.tables.iter().filter(|table| !table.is_published(publication)).collect();
        if missing.is_empty() {
            return steps;
        }
        let tables = list(&missing).join(", ");
        if is_read {
            let sql = format!("LOCK TABLE {tables} IN SHARE ROW EXCLUSIVE MODE;");
            let explanation = "keep writers out of the tables to be added, whose rows would be sent in part";
            steps.push(Step::new(explanation, sql, Kind::Addition(Watched::of(missing.iter().copied()))));
        }
        let sql = format!("ALTER PUBLICATION {name} ADD TABLE {tables};");
        let kind = Kind::Addition(Watched::of(missing.iter().copied()));
        steps.push(Step::new(format!("add tables to publication {}", self.publication), sql, kind));
        steps
    }
}

/// The files of the preset that have been applied. None: only their owner sees that, and nobody else could apply them.
async fn applied(client: &Client) -> Result<Option<Vec<i32>>, tokio_postgres::Error> {
    let sql = "SELECT has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT'),
                      EXISTS (SELECT FROM pg_attribute WHERE attrelid = c.oid AND attname = 'version')
                 FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
                WHERE n.nspname = 'tuplewatch' AND c.relname = 'schema_version'";
    let Some(row) = client.query_typed_opt(sql, &[]).await? else { return Ok(Some(Vec::new())) };
    let (is_readable, has_versions): (bool, bool) = (row.try_get(0)?, row.try_get(1)?);
    if !is_readable {
        return Ok(None);
    }
    if !has_versions {
        return Ok(Some(Vec::new()));
    }
    let rows = client.query_typed("SELECT version::int4 FROM tuplewatch.schema_version", &[]).await?;
    rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>().map(Some)
}

/// What the publication has to be set to, where it publishes less.
fn settings(publication: &Publication, catalog: &Catalog) -> Vec<String> {
    let mut settings = Vec::new();
    if !(publication.insert && publication.update && publication.delete && publication.truncate) {
        settings.push(format!("publish = '{ALL_OPERATIONS}'"));
    }
    if !publication.via_root && catalog.tables.iter().any(Table::is_partitioned) {
        settings.push("publish_via_partition_root = true".to_owned());
    }
    settings
}

fn none_in_the_way(report: Report) -> Result<(), Error> {
    let mut diagnostics = report.into_diagnostics();
    diagnostics.retain(|diagnostic| diagnostic.severity == Severity::Error);
    if diagnostics.is_empty() { Ok(()) } else { Err(Error::InTheWay(diagnostics)) }
}

/// What shall no longer be there. The tables stay, with all that is in them.
#[derive(Clone, Copy, Debug)]
pub struct Teardown<'a> {
    /// Name of the slot.
    pub slot: &'a str,
    /// Name of the publication.
    pub publication: &'a str,
}

impl Teardown<'_> {
    /// What there is to remove. Changes nothing.
    ///
    /// # Errors
    /// With all that is in the way: the slot is in use, or one of them is somebody else's.
    pub async fn plan(&self, client: &Client) -> Result<Vec<Step>, Error> {
        let rights = Rights::read(client, self.publication, &[]).await?;
        let mut report = Report::default();
        let slot = Slot::read(client, self.slot).await?;
        if let Some(slot) = &slot {
            report.extend(foreign_slot(slot, self.slot, &rights.database).into_iter().collect());
            check_unused(client, self.slot, slot, &mut report).await?;
        }
        rights.check_publication_owner("drop", &mut report);
        none_in_the_way(report)?;

        let mut steps: Vec<Step> = slot.map(|_| Step::drop_slot(self.slot)).into_iter().collect();
        let sql = "SELECT EXISTS (SELECT FROM pg_publication WHERE pubname = $1)";
        if client.query_typed_one(sql, &[(&self.publication, Type::TEXT)]).await?.try_get(0)? {
            let sql = format!("DROP PUBLICATION {};", identifier(self.publication));
            steps.push(Step::new(format!("drop publication {}", self.publication), sql, Kind::Definition));
        }
        Ok(steps)
    }

    /// Removes it, and returns what was done.
    ///
    /// # Errors
    /// As [`Self::plan`], or with the step that failed.
    pub async fn apply(&self, connection: &Connection, told: Told<'_>) -> Result<Vec<Step>, Error> {
        lock(&connection.client, told).await?;
        let done = async {
            let steps = self.plan(&connection.client).await?;
            carry_out(connection, &steps, self.slot, told).await?;
            Ok(steps)
        };
        let done = done.await;
        unlock(&connection.client).await;
        done
    }
}

async fn carry_out(connection: &Connection, steps: &[Step], slot: &str, told: Told<'_>) -> Result<(), Error> {
    for steps in steps.chunk_by(|one, next| one.is_transactional() && next.is_transactional()) {
        match steps {
            [step] if !step.is_transactional() => alone(connection, step, slot, told).await?,
            steps => define(&connection.client, steps, told).await?,
        }
    }
    Ok(())
}

/// What cannot be part of a transaction.
async fn alone(connection: &Connection, step: &Step, slot: &str, told: Told<'_>) -> Result<(), Error> {
    told(Event::Step(step));
    let done = if let Kind::Slot { failover } = step.kind {
        let mut waiting = |waiting: &Waiting| told(Event::Waiting(waiting));
        create_slot(connection, slot, failover, &mut waiting).await.map(drop)
    } else {
        connection.client.batch_execute(&step.sql).await
    };
    done.map_err(|error| Error::Alone { step: step.explanation.clone(), source: error.into() })
}

/// All in one transaction.
async fn define(client: &Client, steps: &[Step], told: Told<'_>) -> Result<(), Error> {
    client.batch_execute(&begin()).await?;
    for step in steps {
        told(Event::Step(step));
        if let Err(source) = client.batch_execute(&step.sql).await {
            return Err(undo(client, step, source).await);
        }
    }
    // Where the connection is lost here, nobody knows.
    let committed = client.batch_execute("COMMIT").await;
    let step = "be sure that the transaction was committed";
    committed.map_err(|error| Error::Alone { step: step.to_owned(), source: error.into() })
}

/// Rolls back, and says why: with the transactions for whose end the step would have had to wait.
async fn undo(client: &Client, step: &Step, source: tokio_postgres::Error) -> Error {
    let step_name = step.explanation.clone();
    // Where this fails the session has ended, and the transaction with it.
    let rolled_back = client.batch_execute("ROLLBACK").await;
    if source.code() != Some(&SqlState::LOCK_NOT_AVAILABLE) || rolled_back.is_err() {
        return Error::Definition { step: step_name, source: source.into() };
    }
    let open = match step.waits_for() {
        Some((tables, locks)) => transactions::open(client, tables, locks, None).await.unwrap_or_default(),
        None => Vec::new(),
    };
    let holders = open.iter().filter(|transaction| !transaction.tables.is_empty());
    Error::Locked { step: step_name, transactions: holders.take(NAMED_MAX).map(Transaction::to_string).collect() }
}

async fn lock(client: &Client, told: Told<'_>) -> Result<(), Error> {
    let mut is_told = false;
    loop {
        let row = client.query_typed_one("SELECT pg_try_advisory_lock($1)", &[(&LOCK, Type::INT8)]).await?;
        if row.try_get(0)? {
            return Ok(());
        }
        if !std::mem::replace(&mut is_told, true) {
            told(Event::Locked);
        }
        tokio::time::sleep(LOCK_RETRY).await;
    }
}

/// Where this fails the session has ended, and the lock with it.
async fn unlock(client: &Client) {
    if let Err(error) = client.query_typed_one("SELECT pg_advisory_unlock($1)", &[(&LOCK, Type::INT8)]).await {
        tracing::debug!(%error, "the lock goes with the session");
    }
}

#[cfg(test)]
mod tests;
