//! `setup` makes in PostgreSQL what tuplewatch needs, and `teardown` takes away what would cost something.
//!
//! A [`Setup`] is what is wanted; its plan lists only what is missing, so that a second run has nothing to do. The order is
//! fixed: tables, replica identities, publication, slot. Identities come before the publication, because PostgreSQL refuses
//! UPDATE and DELETE on a published table without one. The slot comes last, because it reads the WAL from its own
//! creation on, and a publication that is younger than the slot does not exist yet in the WAL that is read first (an error on
//! 14 to 17, silently nothing on 18).
//!
//! What is there and only different, such as a row filter, is left alone: [`super::requirements`] reports it.
//!
//! # Failure and recovery
//!
//! Every step is whole or not done, so a run that was broken off is repaired by another. Two runs at once wait for each
//! other (an advisory lock of the session, which goes with it). Steps that lock tables give up after 5 s: while
//! they wait behind a long transaction, all who come after them wait too.

use std::fmt;
use std::time::Duration;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, error::DbError};

use super::catalog::{Catalog, Publication, identifier, literal};
use super::connection::Connection;
use super::requirements::{ALL_OPERATIONS, creation};
use super::slot::{Slot, can_fail_over, creation as slot_creation};
use crate::mapping::{Mapping, TableName};

pub use super::slot::{Waiting, create_slot};

/// The tables of the preset `tuples`: version, name and text of each file. Each adds its own row to
/// `tuplewatch.schema_version`.
const FILES: [(i32, &str, &str); 2] = [
    (1, "0001_tables.sql", include_str!("../../sql/0001_tables.sql")),
    (2, "0002_snap_token.sql", include_str!("../../sql/0002_snap_token.sql")),
];
/// For a table's lock. Ordinary transactions are over by then, and writers can bear to wait as long.
const LOCK_TIMEOUT: &str = "5s";
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
}

/// Something to do, or done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What it does, as an order: "create publication …".
    pub explanation: String,
    /// How.
    pub sql: String,
    /// Whether it runs in a transaction. Slots do not take part in any.
    pub transactional: bool,
    /// The slot that it makes.
    makes: Option<NewSlot>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct NewSlot {
    failover: bool,
}

impl fmt::Display for Step {
    /// A comment and SQL, to be pasted into psql.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sql = self.sql.trim_end();
        if self.transactional {
            write!(f, "-- {}\nBEGIN;\n{sql}\nCOMMIT;", self.explanation)
        } else {
            write!(f, "-- {}\n{sql}", self.explanation)
        }
    }
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
    #[error("PostgreSQL could not be asked: {}", super::connection::describe(.0))]
    Sql(#[from] tokio_postgres::Error),

    #[error("could not {step}: {}{}", super::connection::describe(.source), remedy(.source))]
    Step { step: String, source: tokio_postgres::Error },

    #[error("the mapping watches {}, and there is no such table. Create it first, or correct the mapping (of the preset permify: mapping.schema)", list(.0))]
    MissingTables(Vec<TableName>),

    #[error(
        "replication slot {slot} is in use by process {pid} ({holder}). Stop what uses it (or, for a process that was forgotten: SELECT pg_terminate_backend({pid})), and try again"
    )]
    SlotActive { slot: String, pid: i32, holder: String },

    #[error(
        "replication slot {slot} is not tuplewatch's: it is {what}. It is left alone; choose another name in replication.slot"
    )]
    ForeignSlot { slot: String, what: String },

    #[error(
        "publication {publication} is missing, and replication slot {slot} is older than a new one would be: it could not be read with it. Run tuplewatch setup --recreate-slot; what has changed since the publication was dropped is lost, and subscribers are told"
    )]
    SlotBeforePublication { publication: String, slot: String },
}

fn list(tables: &[TableName]) -> String {
    tables.iter().map(TableName::to_string).collect::<Vec<_>>().join(", ")
}

fn remedy(error: &tokio_postgres::Error) -> &'static str {
    let Some(code) = error.as_db_error().map(DbError::code) else { return "" };
    if *code == SqlState::INSUFFICIENT_PRIVILEGE {
        ". Run setup as the owner of the tables who may also create in the database and has REPLICATION, or as a superuser"
    } else if *code == SqlState::LOCK_NOT_AVAILABLE {
        ". A long transaction is using the table: run setup again when it has ended"
    } else if *code == SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE || *code == SqlState::CONFIGURATION_LIMIT_EXCEEDED {
        ". tuplewatch serve checks this when it starts: it names the setting"
    } else {
        ""
    }
}

impl Step {
    fn new(explanation: String, sql: String) -> Self {
        Self { explanation, sql, transactional: true, makes: None }
    }

    fn drop_slot(slot: &str) -> Self {
        let sql = format!("SELECT pg_drop_replication_slot({});", literal(slot));
        Self { transactional: false, ..Self::new(format!("drop replication slot {slot}"), sql) }
    }

    fn create_slot(slot: &str, new: NewSlot) -> Self {
        let sql = format!("SELECT {};", slot_creation(&literal(slot), new.failover));
        Self { transactional: false, makes: Some(new), ..Self::new(format!("create replication slot {slot}"), sql) }
    }
}

impl Setup<'_> {
    /// What is missing, in order. Changes nothing.
    ///
    /// # Errors
    /// Where what is there is in the way.
    pub async fn plan(&self, client: &Client) -> Result<Vec<Step>, Error> {
        let mut steps = self.plan_schema(client).await?;
        let rest = self.plan_rest(client, !steps.is_empty()).await?;
        steps.extend(rest);
        Ok(steps)
    }

    /// Does what is missing, and returns it. The slot step may wait for others without limit; see
    /// [`create_slot`].
    ///
    /// # Errors
    /// With the step that failed. Those before it stay done.
    pub async fn apply(&self, connection: &Connection, told: Told<'_>) -> Result<Vec<Step>, Error> {
        lock(&connection.client, told).await?;
        let done = self.apply_locked(connection, told).await;
        unlock(&connection.client).await;
        done
    }

    async fn apply_locked(&self, connection: &Connection, told: Told<'_>) -> Result<Vec<Step>, Error> {
        let client = &connection.client;
        let mut done = Vec::new();
        for step in self.plan_schema(client).await? {
            carry_out(connection, &step, self.slot, told).await?;
            done.push(step);
        }
        // Planned now, because only now it can be seen what the tables are like.
        for step in self.plan_rest(client, false).await? {
            carry_out(connection, &step, self.slot, told).await?;
            done.push(step);
        }
        Ok(done)
    }

    async fn plan_schema(&self, client: &Client) -> Result<Vec<Step>, Error> {
        if !self.apply_schema {
            return Ok(Vec::new());
        }
        let sql = "SELECT to_regclass('tuplewatch.schema_version') IS NOT NULL";
        let is_there: bool = client.query_typed_one(sql, &[]).await?.try_get(0)?;
        let mut applied: Vec<i32> = Vec::new();
        if is_there {
            for row in client.query_typed("SELECT version FROM tuplewatch.schema_version", &[]).await? {
                applied.push(row.try_get(0)?);
            }
        }
        // A table that was dropped since comes back: applying a file again changes nothing else.
        let catalog = Catalog::read(client, self.publication, self.mapping).await?;
        if catalog.tables.iter().any(|table| table.oid.is_none()) {
            applied.clear();
        }
        let missing = FILES.iter().filter(|(version, ..)| !applied.contains(version));
        Ok(missing.map(|(_, name, sql)| Step::new(format!("apply {name}"), (*sql).to_owned())).collect())
    }

    /// Everything but the tables. `after_schema`: steps before these create tables that are not there yet.
    async fn plan_rest(&self, client: &Client, after_schema: bool) -> Result<Vec<Step>, Error> {
        let catalog = Catalog::read(client, self.publication, self.mapping).await?;
        let missing = catalog.tables.iter().filter(|table| table.oid.is_none());
        let missing: Vec<TableName> = missing.map(super::catalog::Table::name).collect();
        if !missing.is_empty() && !after_schema {
            return Err(Error::MissingTables(missing));
        }
        let mut steps = Self::plan_identities(&catalog);
        match &catalog.publication {
            Some(publication) => steps.extend(self.plan_changes(publication, &catalog)),
            None => {
                let tables: Vec<String> = catalog.tables.iter().map(|table| table.name().to_sql()).collect();
                let explanation = format!("create publication {}", self.publication);
                steps.push(Step::new(explanation, creation(self.publication, &tables)));
            }
        }
        steps.extend(self.plan_slot(client, catalog.publication.is_some()).await?);
        Ok(steps)
    }

    fn plan_identities(catalog: &Catalog) -> Vec<Step> {
        let mut steps = Vec::new();
        for table in &catalog.tables {
            for (relation, _) in table.unidentified() {
                let name = relation.name();
                let sql = format!("ALTER TABLE {} REPLICA IDENTITY FULL;", name.to_sql());
                steps.push(Step::new(format!("let old rows of {name} be complete"), sql));
            }
        }
        steps
    }

    fn plan_changes(&self, publication: &Publication, catalog: &Catalog) -> Vec<Step> {
        let name = identifier(self.publication);
        let mut steps = Vec::new();
        let mut settings = Vec::new();
        if !(publication.insert && publication.update && publication.delete && publication.truncate) {
            settings.push(format!("publish = '{ALL_OPERATIONS}'"));
        }
        if !publication.via_root && catalog.tables.iter().any(super::catalog::Table::is_partitioned) {
            settings.push("publish_via_partition_root = true".to_owned());
        }
        if !settings.is_empty() {
            let sql = format!("ALTER PUBLICATION {name} SET ({});", settings.join(", "));
            steps.push(Step::new(format!("let publication {} publish everything", self.publication), sql));
        }
        let missing = catalog.tables.iter().filter(|table| !table.is_published(publication));
        let missing: Vec<String> = missing.map(|table| table.name().to_sql()).collect();
        if !missing.is_empty() {
            let sql = format!("ALTER PUBLICATION {name} ADD TABLE {};", missing.join(", "));
            steps.push(Step::new(format!("add tables to publication {}", self.publication), sql));
        }
        steps
    }

    async fn plan_slot(&self, client: &Client, has_publication: bool) -> Result<Vec<Step>, Error> {
        let new = NewSlot { failover: self.failover && can_fail_over(client).await? };
        let Some(slot) = Slot::read(client, self.slot).await? else {
            return Ok(vec![Step::create_slot(self.slot, new)]);
        };
        refuse_foreign(client, self.slot, &slot).await?;
        if self.recreate_slot {
            refuse_active(client, self.slot, &slot).await?;
            return Ok(vec![Step::drop_slot(self.slot), Step::create_slot(self.slot, new)]);
        }
        if has_publication {
            return Ok(Vec::new());
        }
        Err(Error::SlotBeforePublication { publication: self.publication.to_owned(), slot: self.slot.to_owned() })
    }
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
    /// If the slot is in use, or somebody else's.
    pub async fn plan(&self, client: &Client) -> Result<Vec<Step>, Error> {
        let mut steps = Vec::new();
        if let Some(slot) = Slot::read(client, self.slot).await? {
            refuse_foreign(client, self.slot, &slot).await?;
            refuse_active(client, self.slot, &slot).await?;
            steps.push(Step::drop_slot(self.slot));
        }
        let sql = "SELECT EXISTS (SELECT FROM pg_publication WHERE pubname = $1)";
        if client.query_typed_one(sql, &[(&self.publication, Type::TEXT)]).await?.try_get(0)? {
            let sql = format!("DROP PUBLICATION {};", identifier(self.publication));
            steps.push(Step::new(format!("drop publication {}", self.publication), sql));
        }
        Ok(steps)
    }

    /// Removes it, and returns what was done.
    ///
    /// # Errors
    /// As [`Self::plan`], or with the step that failed.
    pub async fn apply(&self, connection: &Connection, told: Told<'_>) -> Result<Vec<Step>, Error> {
        lock(&connection.client, told).await?;
        let done = self.apply_locked(connection, told).await;
        unlock(&connection.client).await;
        done
    }

    async fn apply_locked(&self, connection: &Connection, told: Told<'_>) -> Result<Vec<Step>, Error> {
        let steps = self.plan(&connection.client).await?;
        for step in &steps {
            carry_out(connection, step, self.slot, told).await?;
        }
        Ok(steps)
    }
}

async fn refuse_foreign(client: &Client, name: &str, slot: &Slot) -> Result<(), Error> {
    let database: String = client.query_typed_one("SELECT current_database()::text", &[]).await?.try_get(0)?;
    let what = match (&slot.plugin, &slot.database) {
        (Some(plugin), _) if plugin != "pgoutput" => format!("for the plugin {plugin}"),
        (Some(_), Some(other)) if *other != database => format!("for database {other}"),
        (Some(_), _) => return Ok(()),
        (None, _) => "a physical one".to_owned(),
    };
    Err(Error::ForeignSlot { slot: name.to_owned(), what })
}

async fn refuse_active(client: &Client, name: &str, slot: &Slot) -> Result<(), Error> {
    let Some(pid) = slot.active_pid else { return Ok(()) };
    let sql = "SELECT concat_ws(', ', 'user ' || usename, NULLIF(application_name, ''), host(client_addr))
                 FROM pg_stat_activity WHERE pid = $1";
    let holder = client.query_typed_opt(sql, &[(&pid, Type::INT4)]).await?;
    let holder = holder.map(|row| row.try_get(0)).transpose()?.unwrap_or_else(|| "which is ending".to_owned());
    Err(Error::SlotActive { slot: name.to_owned(), pid, holder })
}

async fn carry_out(connection: &Connection, step: &Step, slot: &str, told: Told<'_>) -> Result<(), Error> {
    let client = &connection.client;
    told(Event::Step(step));
    let failed = |source| Error::Step { step: step.explanation.clone(), source };
    if let Some(new) = step.makes {
        let mut waiting = |waiting: &Waiting| told(Event::Waiting(waiting));
        create_slot(connection, slot, new.failover, &mut waiting).await.map_err(failed)?;
        return Ok(());
    }
    if !step.transactional {
        return client.batch_execute(&step.sql).await.map_err(failed);
    }
    let begin = format!("BEGIN; SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'");
    client.batch_execute(&begin).await.map_err(failed)?;
    let executed = client.batch_execute(&step.sql).await;
    let ended = client.batch_execute(if executed.is_ok() { "COMMIT" } else { "ROLLBACK" }).await;
    executed.and(ended).map_err(failed)
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
