//! Tenants: the rows of `tenants`, and the lock between the writers of a tenant and its deletion.

use super::filter::{Query, text};
use super::page::{self, Key, Page};
use super::{CALL_MAX, Error, Store, TENANT_DELETION_MAX, Unreadable, begin, persistently};
use crate::model::change::TenantId;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Transaction};

/// The key of a tenant's advisory lock. The seed of the hash, "tuple" in ASCII, separates it from locks of other
/// programs. Two tenants with equal hashes share a lock, which does no harm.
const LOCK: &str = "hashtextextended($1, x'7475706c65'::bigint)";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tenant {
    pub id: String,
    /// A name for people.
    pub name: String,
    /// In microseconds since 1970; `None` for PostgreSQL's infinities.
    pub created_at_micros: Option<i64>,
}

impl Store {
    /// Creates a tenant.
    ///
    /// # Errors
    /// [`Error::TenantExists`] and others.
    pub(crate) async fn create_tenant(&self, id: &TenantId, name: &str) -> Result<Tenant, Error> {
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

    /// Deletes all facts of a tenant and then the tenant, in one transaction. Subscribers receive the deletions.
    ///
    /// # Errors
    /// [`Error::UnknownTenant`] and others.
    pub(crate) async fn delete_tenant(&self, id: &TenantId) -> Result<(), Error> {
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

    /// Reads a page of the tenants, ordered by id. With `only`, a page of these.
    ///
    /// # Errors
    /// See [`Error`].
    pub(crate) async fn list_tenants(
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

/// The columns of a tenant as texts. An infinite creation time becomes an empty text.
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

/// Prevents the deletion of the tenant until the transaction ends. Waits for a deletion that is in progress.
pub(super) async fn share(transaction: &Transaction<'_>, id: &TenantId) -> Result<Tables, Error> {
    let lock = format!("SELECT pg_advisory_xact_lock_shared({LOCK})");
    transaction.execute_typed(&lock, &[text(&id.as_str())]).await?;
    // A separate statement, so that it sees the deletion that it waited for.
    require(transaction.client(), id).await
}

/// Fails unless the tenant exists. The same query finds out how to read the tables of facts.
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

/// The tables of facts as they are written behind FROM.
///
/// An ordinary table is read with ONLY, because its SELECT would include rows of tables that inherit from it, and its
/// stream does not. A partitioned table has its rows in its partitions.
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
