//! Writes and reads the tables of the preset `tuples` with SQL, for `base.v1.Data` and `base.v1.Tenancy`.
//!
//! The store belongs to the preset, as `sql/` does. Besides `mapping` it is the only module that knows the preset's
//! tables. It is one writer among many: applications write the same tables with their own SQL at the same time.
//!
//! ```text
//!  Batch, filters ──▶ one transaction ──▶ snap_token() ──▶ token of the state right after the write
//!                      │ a connection of the pool, to the primary of the session
//!                      └ deadlocks and serialization failures are retried a bounded number of times
//! ```
//!
//! # Invariants
//!
//! - Each call writes one transaction, and takes its token inside the transaction, so Watch continues right after the write.
//! - Rows are inserted in the order of the primary key, so two calls never deadlock with each other.
//! - **Nothing is written for a tenant that is being deleted.** Writers share an advisory lock of the tenant, and its
//!   deletion takes the lock exclusively. There is no foreign key (see `sql/0001_tables.sql`), so a row that is written
//!   after the deletion would reappear with the next tenant of that name. An advisory lock costs no WAL.
//! - Facts are read as they are streamed: from an ordinary table without the tables that inherit from it
//!   (`tenants::Tables`).
//!
//! Errors never contain values, which are user data.

mod batch;
mod filter;
mod page;
mod pool;
mod tenants;

pub(crate) use batch::Batch;
pub(crate) use filter::{AttributeFilter, TupleFilter};
pub(crate) use page::{Key, Page, ParseKeyError};
pub(crate) use tenants::Tenant;

use crate::decode::mapping::{AttributeValueError, parse_attribute_value};
use crate::model::change::{Attribute, TenantId, Tuple};
use crate::postgres::connection::SqlError;
use crate::postgres::primary::{self, PrimaryConnector};
use filter::{Query, text};
use pool::Pool;
use std::time::Duration;
use tenants::Tables;
use tokio_postgres::error::{DbError, SqlState};
use tokio_postgres::{Client, IsolationLevel, Transaction};

/// The most attempts of a call that collides with other transactions.
const ATTEMPTS_MAX: u32 = 10;
/// The longest pause between two attempts. The first pauses are much shorter.
const PAUSE_MAX: Duration = Duration::from_millis(200);
/// The longest call, including all attempts. It exceeds [`pool::STATEMENT_MAX`], after which PostgreSQL ends a
/// statement.
const CALL_MAX: Duration = Duration::from_secs(40);
/// The longest deletion of a tenant, whose duration depends on the number of its rows.
const TENANT_DELETION_MAX: Duration = Duration::from_secs(15 * 60);

/// The reason why the store failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The tenant is not in the table of tenants.
    #[error("tenant '{0}' does not exist: create it first")]
    UnknownTenant(TenantId),
    /// The tenant exists already.
    #[error("tenant '{0}' exists already")]
    TenantExists(TenantId),
    /// Every attempt collided with another transaction.
    #[error("the transaction collided with others {ATTEMPTS_MAX} times and was rolled back: try again")]
    Collisions,
    /// All connections stayed busy for the longest permitted wait.
    #[error("all connections to PostgreSQL are busy (database.max_connections): try again later")]
    Busy,
    /// There is no connection, or no answer in time. A write may have been committed, and may be repeated.
    #[error("PostgreSQL cannot be asked at the moment, try again: {0}")]
    Unreachable(#[source] Unreachable),
    /// The data violate a constraint that somebody added, or have letters that the database's encoding lacks.
    #[error("the database does not accept these data: {0}")]
    Unfit(#[source] SqlError),
    /// PostgreSQL refused the statement.
    #[error("PostgreSQL refused: {0}")]
    Refused(#[source] SqlError),
    /// The role lacks a privilege.
    #[error(
        "PostgreSQL refused: {0}. Grant tuplewatch's role SELECT, INSERT, UPDATE and DELETE on the tables of schema tuplewatch, or \
         have applications write them with SQL"
    )]
    NoPrivilege(#[source] SqlError),
    /// A policy applies to the role.
    #[error(
        "PostgreSQL refused: {0}. Row level security applies to tuplewatch's role: ALTER ROLE ... BYPASSRLS, or \
         ALTER TABLE ... DISABLE ROW LEVEL SECURITY"
    )]
    RowSecurity(#[source] SqlError),
    /// A stored row has an unexpected form.
    #[error("a row cannot be read: {0}")]
    Unreadable(#[from] Unreadable),
}

/// Why PostgreSQL cannot be asked at the moment. Callers get the text: it names no host and no role.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unreachable {
    /// No connection.
    #[error(transparent)]
    Connect(primary::Error),
    /// The connection broke, or PostgreSQL cannot run the statement now.
    #[error(transparent)]
    Sql(SqlError),
    /// No answer within this time.
    #[error("no answer within {} s", .0.as_secs())]
    Late(Duration),
    /// The pool did not finish a connection in time, or is closed.
    #[error("no connection came into use in time")]
    NoConnection,
    /// There are no connections any more.
    #[error("tuplewatch is shutting down")]
    Stopping,
}

/// What a row has instead of the values that it should have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unreadable {
    /// Columns that a tuple, an attribute or a tenant does not have.
    #[error("{0} of other columns")]
    Columns(&'static str),
    /// An attribute's value of another form.
    #[error(transparent)]
    Value(#[from] AttributeValueError),
}

impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        let error = SqlError::from(error);
        let Some(refusal) = error.refusal() else { return Self::Unreachable(Unreachable::Sql(error)) };
        let code = refusal.code().code();
        match *refusal.code() {
            SqlState::T_R_SERIALIZATION_FAILURE | SqlState::T_R_DEADLOCK_DETECTED | SqlState::LOCK_NOT_AVAILABLE => {
                Self::Collisions
            }
            // The statement took longer than it may; or the server has just been made a standby.
            SqlState::QUERY_CANCELED | SqlState::READ_ONLY_SQL_TRANSACTION => {
                Self::Unreachable(Unreachable::Sql(error))
            }
            // The server is shutting down; or it is short of disk, memory or connections.
            _ if code.starts_with("57P") || code.starts_with("53") => Self::Unreachable(Unreachable::Sql(error)),
            SqlState::INSUFFICIENT_PRIVILEGE if is_of_row_security(refusal) => Self::RowSecurity(error),
            SqlState::INSUFFICIENT_PRIVILEGE => Self::NoPrivilege(error),
            // Data exceptions, and violations of constraints.
            _ if code.starts_with("22") || code.starts_with("23") => Self::Unfit(error),
            _ => Self::Refused(error),
        }
    }
}

/// Decided by the routine that raised the error, because the message is in the server's language.
fn is_of_row_security(refusal: &DbError) -> bool {
    matches!(refusal.routine(), Some("check_enable_rls" | "ExecWithCheckOptions"))
}

impl From<primary::Error> for Error {
    fn from(error: primary::Error) -> Self {
        Self::Unreachable(Unreachable::Connect(error))
    }
}

/// Writes and reads facts and tenants; see the module. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    pool: Pool,
}

impl Store {
    /// Creates a store on the session's primary, with at most `connections_max` connections.
    pub(crate) fn new(connector: PrimaryConnector, connections_max: usize) -> Self {
        Self { pool: Pool::new(connector, connections_max) }
    }

    /// Inserts new tuples, and sets attributes to their values. Returns the snap token of the state right after the
    /// write.
    ///
    /// # Errors
    /// See [`Error`].
    pub(crate) async fn write(&self, tenant: &TenantId, batch: &Batch<'_>) -> Result<String, Error> {
        persistently(CALL_MAX, || async {
            let mut connection = self.pool.get().await?;
            let transaction = begin(&mut connection).await?;
            tenants::share(&transaction, tenant).await?;
            batch.insert(&transaction, tenant).await?;
            finish(transaction).await
        })
        .await
    }

    /// Deletes the facts that the filters select; a missing filter selects none. Returns the snap token of the state
    /// right after the deletion.
    ///
    /// # Errors
    /// See [`Error`].
    pub(crate) async fn delete(
        &self,
        tenant: &TenantId,
        tuples: Option<&TupleFilter<'_>>,
        attributes: Option<&AttributeFilter<'_>>,
    ) -> Result<String, Error> {
        persistently(CALL_MAX, || async {
            let mut connection = self.pool.get().await?;
            let transaction = begin(&mut connection).await?;
            let tables = tenants::share(&transaction, tenant).await?;
            let name = tenant.as_str();
            if let Some(filter) = tuples {
                let query = filter.query(&format!("DELETE FROM {}", tables.tuples), &name);
                transaction.execute_typed(query.sql(), query.parameters()).await?;
            }
            if let Some(filter) = attributes {
                let query = filter.query(&format!("DELETE FROM {}", tables.attributes), &name);
                transaction.execute_typed(query.sql(), query.parameters()).await?;
            }
            finish(transaction).await
        })
        .await
    }

    /// Reads a page of the tuples that the filter selects, in the order of the primary key. `make` converts each one.
    ///
    /// # Errors
    /// See [`Error`].
    pub(crate) async fn read_tuples<T>(
        &self,
        tenant: &TenantId,
        filter: &TupleFilter<'_>,
        after: Option<&Key<6>>,
        page_size: usize,
        make: fn(Tuple<'_>) -> T,
    ) -> Result<Page<T, 6>, Error> {
        let columns = ["entity_type", "entity_id", "relation", "subject_type", "subject_id", "subject_relation"];
        let (name, after) = (tenant.as_str(), after.map(Key::columns));
        let query = |tables: Tables| {
            let mut query = filter.query(&page::select(columns, "", tables.tuples), &name);
            page::narrow(&mut query, columns, after.as_ref(), page_size);
            query
        };
        let make = |row: &[&str]| match *row {
            [entity_type, entity_id, relation, subject_type, subject_id, subject_relation] => {
                Ok(make(Tuple { entity_type, entity_id, relation, subject_type, subject_id, subject_relation }))
            }
            _ => Err(Unreadable::Columns("a tuple")),
        };
        self.read_page(tenant, query, page_size, &make).await
    }

    /// Reads a page of the attributes that the filter selects, in the order of the primary key. `make` converts each
    /// one.
    ///
    /// # Errors
    /// See [`Error`].
    pub(crate) async fn read_attributes<T>(
        &self,
        tenant: &TenantId,
        filter: &AttributeFilter<'_>,
        after: Option<&Key<3>>,
        page_size: usize,
        make: fn(Attribute<'_>) -> T,
    ) -> Result<Page<T, 3>, Error> {
        let columns = ["entity_type", "entity_id", "attribute"];
        let (name, after) = (tenant.as_str(), after.map(Key::columns));
        let query = |tables: Tables| {
            let mut query = filter.query(&page::select(columns, ", value::text", tables.attributes), &name);
            page::narrow(&mut query, columns, after.as_ref(), page_size);
            query
        };
        let make = |row: &[&str]| match *row {
            [entity_type, entity_id, attribute, value] => {
                let value = parse_attribute_value(value)?;
                Ok(make(Attribute { entity_type, entity_id, attribute, value }))
            }
            _ => Err(Unreadable::Columns("an attribute")),
        };
        self.read_page(tenant, query, page_size, &make).await
    }

    async fn read_page<'q, T, const COLUMNS: usize>(
        &self,
        tenant: &TenantId,
        query: impl Fn(Tables) -> Query<'q>,
        page_size: usize,
        make: &(impl Fn(&[&str]) -> Result<T, Unreadable> + Sync),
    ) -> Result<Page<T, COLUMNS>, Error> {
        persistently(CALL_MAX, || async {
            let connection = self.pool.get().await?;
            let tables = tenants::require(&connection, tenant).await?;
            page::read(&connection, &query(tables), page_size, make).await
        })
        .await
    }
}

/// Begins a transaction. READ COMMITTED, whatever the default of the database is: each statement sees the transactions
/// that the statement before it waited for.
async fn begin(client: &mut Client) -> Result<Transaction<'_>, Error> {
    Ok(client.build_transaction().isolation_level(IsolationLevel::ReadCommitted).start().await?)
}

/// Commits, and returns the token of the transaction.
async fn finish(transaction: Transaction<'_>) -> Result<String, Error> {
    let row = transaction.query_typed_one("SELECT tuplewatch.snap_token()", &[]).await?;
    let token = row.try_get(0)?;
    transaction.commit().await?;
    Ok(token)
}

/// Repeats the attempt while it collides with other transactions.
async fn persistently<T, A: Future<Output = Result<T, Error>>>(
    longest: Duration,
    attempt: impl Fn() -> A,
) -> Result<T, Error> {
    let attempts = async {
        for n in 1..ATTEMPTS_MAX {
            match attempt().await {
                Err(Error::Collisions) => {}
                result => return result,
            }
            // Random pauses keep colliding calls from meeting again: up to 2 ms, 4 ms, 8 ms, …
            let pause = Duration::from_millis(1 << n).min(PAUSE_MAX);
            tokio::time::sleep(pause.mul_f64(fastrand::f64())).await;
        }
        attempt().await
    };
    let late = |_| Err(Error::Unreachable(Unreachable::Late(longest)));
    tokio::time::timeout(longest, attempts).await.unwrap_or_else(late)
}
