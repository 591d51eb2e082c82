//! Tenants: the rows of `tenants`, and the lock between those who write for one and who deletes it.

use super::filter::{Query, text};
use super::page::{self, Key, Page};
use super::{CALL_MAX, Error, Store, TENANT_DELETION_MAX, Unreadable, begin, persistently};
use crate::model::change::TenantId;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Transaction};

/// Tells our advisory locks from those of others: "tuple" in ASCII, as the seed of the hash. Two tenants of the same hash
/// would share a lock, which does no harm.
const LOCK: &str = "hashtextextended($1, x'7475706c65'::bigint)";

/// A tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// Its id.
    pub id: String,
    /// For people.
    pub name: String,
    /// In microseconds since 1970; `None` for PostgreSQL's infinities.
    pub created_at_micros: Option<i64>,
}

impl Store {
    /// Creates a tenant.
    ///
    /// # Errors
    /// [`Error::TenantExists`] and others.
    pub async fn create_tenant(&self, id: &TenantId, name: &str) -> Result<Tenant, Error> {
        let insert = format!(
            "INSERT INTO tuplewatch.tenants (id, name) VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING {COLUMNS}"
        );
        persistently(CALL_MAX, || async {
            let client = self.pool.get().await?;
            let inserted = client.query_typed_opt(&insert, &[text(&id.as_str()), text(&name)]).await?;
            let row = inserted.ok_or_else(|| Error::TenantExists(id.clone()))?;
            Ok(tenant(&[row.try_get(0)?, row.try_get(1)?, row.try_get(2)?])?)
        })
        .await
    }

    /// Deletes a tenant's rows and then the tenant, in one transaction: watchers see deletes.
    ///
    /// # Errors
    /// [`Error::UnknownTenant`] and others.
    pub async fn delete_tenant(&self, id: &TenantId) -> Result<(), Error> {
        let patience =
            format!("SET LOCAL statement_timeout = '{}s'; SET LOCAL lock_timeout = 0", TENANT_DELETION_MAX.as_secs());
        persistently(TENANT_DELETION_MAX, || async {
            let mut client = self.pool.get().await?;
            let transaction = begin(&mut client).await?;
            transaction.batch_execute(&patience).await?;
            let lock = format!("SELECT pg_advisory_xact_lock({LOCK})");
            let name = id.as_str();
            let parameters = &[text(&name)];
            transaction.execute_typed(&lock, parameters).await?;
            let tables = require(transaction.client(), id).await?;
            for table in [tables.tuples, tables.attributes] {
                let delete = format!("DELETE FROM {table} WHERE tenant_id = $1");
                transaction.execute_typed(&delete, parameters).await?;
            }
            transaction.execute_typed("DELETE FROM tuplewatch.tenants WHERE id = $1", parameters).await?;
            Ok(transaction.commit().await?)
        })
        .await
    }

    /// A page of the tenants, by id; only of these, if they are given.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn list_tenants(
        &self,
        only: Option<&[String]>,
        after: Option<&Key<1>>,
        page_size: usize,
    ) -> Result<Page<Tenant, 1>, Error> {
        let after = after.map(Key::columns);
        let mut query = Query::new(&format!("SELECT {COLUMNS} FROM tuplewatch.tenants WHERE true"));
        if let Some(only) = &only {
            let place = query.bind((only, Type::TEXT_ARRAY));
            query.push(&format!(" AND id = ANY({place})"));
        }
        page::narrow(&mut query, ["id"], after.as_ref(), page_size);
        persistently(CALL_MAX, || async {
            let client = self.pool.get().await?;
            page::read(&client, &query, page_size, &tenant).await
        })
        .await
    }
}

/// Its columns as texts. The creation time of an infinity is an empty one.
const COLUMNS: &str = "id, name, CASE WHEN isfinite(created_at) \
                       THEN trunc(extract(epoch FROM created_at) * 1000000)::text ELSE '' END";

fn tenant(row: &[&str]) -> Result<Tenant, Unreadable> {
    match *row {
        [id, name, created_at] => {
            Ok(Tenant { id: id.to_owned(), name: name.to_owned(), created_at_micros: created_at.parse().ok() })
        }
        _ => Err(Unreadable::Columns("a tenant")),
    }
}

/// Keeps the tenant from being deleted before the transaction ends; waits for a deletion that is under way.
pub(super) async fn share(transaction: &Transaction<'_>, id: &TenantId) -> Result<Tables, Error> {
    let lock = format!("SELECT pg_advisory_xact_lock_shared({LOCK})");
    transaction.execute_typed(&lock, &[text(&id.as_str())]).await?;
    // A statement of its own, which sees what the wait was for.
    require(transaction.client(), id).await
}

/// An error unless there is such a tenant. How to read its rows, asked along with it.
pub(super) async fn require(client: &Client, id: &TenantId) -> Result<Tables, Error> {
    let statement = "SELECT EXISTS (SELECT FROM tuplewatch.tenants WHERE id = $1),
                            (SELECT relkind = 'p' FROM pg_catalog.pg_class
                              WHERE oid = to_regclass('tuplewatch.relation_tuples')),
                            (SELECT relkind = 'p' FROM pg_catalog.pg_class WHERE oid = to_regclass('tuplewatch.attributes'))";
    let row = client.query_typed_one(statement, &[text(&id.as_str())]).await?;
    if !row.try_get::<_, bool>(0)? {
        return Err(Error::UnknownTenant(id.clone()));
    }
    Ok(Tables::new(row.try_get(1)?, row.try_get(2)?))
}

/// The tables of facts, as they stand behind FROM.
///
/// An ordinary table is read alone: rows of tables that inherit from it are in its SELECT, but never in its stream. A partitioned
/// one has its rows in its partitions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tables {
    pub(super) tuples: &'static str,
    pub(super) attributes: &'static str,
}

impl Tables {
    fn new(tuples_are_partitioned: Option<bool>, attributes_are_partitioned: Option<bool>) -> Self {
        let choose =
            |is_partitioned: Option<bool>, whole, only| if is_partitioned == Some(true) { whole } else { only };
        Self {
            tuples: choose(tuples_are_partitioned, "tuplewatch.relation_tuples", "ONLY tuplewatch.relation_tuples"),
            attributes: choose(attributes_are_partitioned, "tuplewatch.attributes", "ONLY tuplewatch.attributes"),
        }
    }
}
