//! `setup` creates the objects that tuplewatch needs in PostgreSQL, and `teardown` removes those that have a cost.
//!
//! A [`Setup`] describes the desired state. Its plan lists only the missing steps, so a second run has nothing to do.
//! The order of the steps is fixed: tables, replica identities, publication, slot. Identities precede the publication,
//! because PostgreSQL refuses UPDATE and DELETE on a published table without one. The slot comes last, because it reads
//! the WAL from its own creation on. A publication that is younger than the slot does not exist yet at that point of
//! the WAL: an error on 14 to 17, silently no changes on 18.
//!
//! Existing objects that merely differ, such as a publication with a row filter, are left alone:
//! [`crate::postgres::requirements`] reports them.
//!
//! # All or nothing
//!
//! `obstacles` first looks for all obstacles that can be seen in advance, and reports them together. Then one
//! transaction runs all definitions. The slot cannot be part of it, because PostgreSQL creates no slot in a transaction
//! that has written. If its creation fails (another process took the last free slot, or the user interrupted the wait),
//! the other objects stay. They have no cost, and another run creates the slot.
//!
//! # Adding a table while the slot is read
//!
//! PostgreSQL decides for each change whether the table was published when the change was written. Changes that a
//! transaction made before the table was added are not sent, even if the transaction commits later and its later
//! changes are sent. So the table is locked against writers until it is published: no transaction has changes on both
//! sides. Tables that are already published are not locked.
//!
//! # Failure and recovery
//!
//! After an interrupted run, another run does the rest. Two concurrent runs wait for each other, with an advisory lock
//! that ends with its session. The transaction gives up after 5 s of waiting for a lock, because every later writer
//! would queue behind it.

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
use obstacles::{Obstacles, Rights, check_unused, check_version};
use step::{Kind, LOCK_TIMEOUT_SECONDS, begin};

pub(crate) use crate::postgres::slot::{Waiting, create_slot};
pub(crate) use step::{Script, Step};

/// The files with the tables of the preset `tuples`: version, name and text. Each file adds its own row to
/// `tuplewatch.schema_version`.
const FILES: [(i32, &str, &str); 2] = [
    (1, "0001_tables.sql", include_str!("../../sql/0001_tables.sql")),
    (2, "0002_snap_token.sql", include_str!("../../sql/0002_snap_token.sql")),
];
/// The key of the advisory lock: "tuplewat" in ASCII, so that other programs hardly use it by chance.
const LOCK: i64 = 0x7475_706C_6577_6174;
/// The interval between two attempts to get the advisory lock.
const LOCK_RETRY: Duration = Duration::from_secs(1);

/// The desired state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup<'a> {
    /// Lists the tables to watch.
    pub mapping: &'a Mapping,
    pub slot: &'a str,
    pub publication: &'a str,
    /// Whether to create the tables of the preset `tuples`.
    pub apply_schema: bool,
    /// Whether to drop an existing slot and create a new one. All subscribers lose the changes in between.
    pub recreate_slot: bool,
    /// Whether standbys keep a copy of a new slot, if PostgreSQL can (from 17 on).
    pub failover: bool,
    /// Writes the commands in messages.
    pub commands: &'a CommandLine,
}

/// The progress of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event<'a> {
    /// This step begins.
    Step(&'a Step),
    /// The creation of the slot waits for other transactions. Repeated every few seconds.
    Waiting(&'a Waiting),
    /// Another setup or teardown runs in this database. Reported once.
    Locked,
}

/// The receiver of [`Event`]s.
pub(crate) type OnEvent<'a> = &'a mut (dyn FnMut(Event<'_>) + Send);

/// The reason why a run did nothing, or not everything, with the remedy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("PostgreSQL could not be asked: {0}")]
    Sql(#[source] SqlError),

    #[error("{}", all(.0))]
    InTheWay(Vec<Diagnostic>),

    #[error("could not {step}, and nothing was changed: {}", locked_by(.transactions))]
    Locked { step: String, transactions: Vec<String> },

    #[error("could not {step}, and nothing was changed: {source}{}", remedy(.source))]
    Definition { step: String, source: SqlError },

    /// The only error after which earlier steps stay done.
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
    /// Lists the missing steps in their order. Changes nothing.
    ///
    /// # Errors
    /// Lists all obstacles.
    pub(crate) async fn plan(&self, client: &Client) -> Result<Vec<Step>, Error> {
        if let Some(diagnostic) = check_version(client).await? {
            return Err(Error::InTheWay(vec![diagnostic]));
        }
        let catalog = Catalog::read(client, self.publication, self.mapping).await?;
        let slot = Slot::read(client, self.slot).await?;
        let mut steps = self.plan_schema(client, &catalog).await?;
        let obstacles =
            Obstacles { setup: self, catalog: &catalog, slot: slot.as_ref(), applies_schema: !steps.is_empty() };
        let mut report = Report::default();
        obstacles.check(client, &mut report).await?;
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

    /// Runs the missing steps, and returns them. The creation of the slot may wait for other transactions without
    /// limit; see [`create_slot`].
    ///
    /// # Errors
    /// Names the obstacles, or the step that failed.
    pub(crate) async fn apply(&self, connection: &Connection, on_event: OnEvent<'_>) -> Result<Vec<Step>, Error> {
        lock(&connection.client, on_event).await?;
        let done = async {
            let steps = self.plan(&connection.client).await?;
            carry_out(connection, &steps, self.slot, on_event).await?;
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
        // Applying a file again restores a table that was dropped since, and changes nothing else.
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
                steps.push(Step::new(format!("make old rows of {name} complete in the WAL"), sql, kind));
            }
        }
        steps
    }

    /// `is_read`: an existing slot continues to be read.
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
            let explanation = format!("make publication {} publish all operations", self.publication);
            steps.push(Step::new(explanation, sql, Kind::Definition));
        }
        let missing: Vec<&Table> = catalog.tables.iter().filter(|table| !table.is_published(publication)).collect();
        if missing.is_empty() {
            return steps;
        }
        let tables = list(&missing).join(", ");
        if is_read {
            let sql = format!("LOCK TABLE {tables} IN SHARE ROW EXCLUSIVE MODE;");
            let explanation = "lock out writers of the new tables, whose transactions would be sent in part";
            steps.push(Step::new(explanation, sql, Kind::Addition(Watched::of(missing.iter().copied()))));
        }
        let sql = format!("ALTER PUBLICATION {name} ADD TABLE {tables};");
        let kind = Kind::Addition(Watched::of(missing.iter().copied()));
        steps.push(Step::new(format!("add tables to publication {}", self.publication), sql, kind));
        steps
    }
}

/// The versions of the applied files. `None`: only the owner of the table may read it, and nobody else could apply
/// them.
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

/// The settings to change if the publication publishes too little.
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

/// The objects to remove. The tables stay, with their rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Teardown<'a> {
    pub slot: &'a str,
    pub publication: &'a str,
}

impl Teardown<'_> {
    /// Lists the steps. Changes nothing.
    ///
    /// # Errors
    /// Lists all obstacles: the slot is in use, or an object belongs to another role.
    pub(crate) async fn plan(&self, client: &Client) -> Result<Vec<Step>, Error> {
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

    /// Removes the objects, and returns the steps.
    ///
    /// # Errors
    /// Names the obstacles, or the step that failed.
    pub(crate) async fn apply(&self, connection: &Connection, on_event: OnEvent<'_>) -> Result<Vec<Step>, Error> {
        lock(&connection.client, on_event).await?;
        let done = async {
            let steps = self.plan(&connection.client).await?;
            carry_out(connection, &steps, self.slot, on_event).await?;
            Ok(steps)
        };
        let done = done.await;
        unlock(&connection.client).await;
        done
    }
}

async fn carry_out(connection: &Connection, steps: &[Step], slot: &str, on_event: OnEvent<'_>) -> Result<(), Error> {
    for steps in steps.chunk_by(|one, next| one.is_transactional() && next.is_transactional()) {
        match steps {
            [step] if !step.is_transactional() => alone(connection, step, slot, on_event).await?,
            steps => define(&connection.client, steps, on_event).await?,
        }
    }
    Ok(())
}

/// Runs a step that cannot be part of a transaction.
async fn alone(connection: &Connection, step: &Step, slot: &str, on_event: OnEvent<'_>) -> Result<(), Error> {
    on_event(Event::Step(step));
    let done = if let Kind::Slot { failover } = step.kind {
        let mut waiting = |waiting: &Waiting| on_event(Event::Waiting(waiting));
        create_slot(connection, slot, failover, &mut waiting).await.map(drop)
    } else {
        connection.client.batch_execute(&step.sql).await
    };
    done.map_err(|error| Error::Alone { step: step.explanation.clone(), source: error.into() })
}

/// Runs all steps in one transaction.
async fn define(client: &Client, steps: &[Step], on_event: OnEvent<'_>) -> Result<(), Error> {
    client.batch_execute(&begin()).await?;
    for step in steps {
        on_event(Event::Step(step));
        if let Err(source) = client.batch_execute(&step.sql).await {
            return Err(undo(client, step, source).await);
        }
    }
    // If the connection is lost during COMMIT, the outcome is unknown.
    let committed = client.batch_execute("COMMIT").await;
    let step = "be sure that the transaction was committed";
    committed.map_err(|error| Error::Alone { step: step.to_owned(), source: error.into() })
}

/// Rolls back, and returns the error with the transactions that the step waited for.
async fn undo(client: &Client, step: &Step, source: tokio_postgres::Error) -> Error {
    let step_name = step.explanation.clone();
    // If ROLLBACK fails, the session has ended, and the transaction with it.
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

async fn lock(client: &Client, on_event: OnEvent<'_>) -> Result<(), Error> {
    let mut is_reported = false;
    loop {
        let row = client.query_typed_one("SELECT pg_try_advisory_lock($1)", &[(&LOCK, Type::INT8)]).await?;
        if row.try_get(0)? {
            return Ok(());
        }
        if !std::mem::replace(&mut is_reported, true) {
            on_event(Event::Locked);
        }
        tokio::time::sleep(LOCK_RETRY).await;
    }
}

/// If this fails, the session has ended, and the lock with it.
async fn unlock(client: &Client) {
    if let Err(error) = client.query_typed_one("SELECT pg_advisory_unlock($1)", &[(&LOCK, Type::INT8)]).await {
        tracing::debug!(%error, "the lock goes with the session");
    }
}

#[cfg(test)]
mod tests;
