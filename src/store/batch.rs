//! The facts that one call writes.

use super::{Error, text};
use crate::decode::mapping::write_attribute_value;
use crate::model::change::{AttributeValue, TenantId, Tuple};
use std::collections::{BTreeMap, BTreeSet};
use tokio_postgres::Transaction;
use tokio_postgres::types::{ToSql, Type};

/// Tuples and attributes in the order of the primary keys, without duplicates. If an attribute comes twice, its first
/// value counts, as in Permify.
#[derive(Debug, Default)]
pub(crate) struct Batch<'a> {
    tuples: BTreeSet<Tuple<'a>>,
    /// Keyed by entity type, entity id and attribute.
    attributes: BTreeMap<[&'a str; 3], AttributeValue>,
}

impl<'a> Batch<'a> {
    pub(crate) fn put_tuple(&mut self, tuple: Tuple<'a>) {
        self.tuples.insert(tuple);
    }

    /// Adds an attribute, unless the batch has a value for it.
    pub(crate) fn put_attribute(
        &mut self,
        entity_type: &'a str,
        entity_id: &'a str,
        attribute: &'a str,
        value: AttributeValue,
    ) {
        self.attributes.entry([entity_type, entity_id, attribute]).or_insert(value);
    }

    pub(crate) fn len(&self) -> usize {
        self.tuples.len() + self.attributes.len()
    }

    pub(super) async fn insert(&self, transaction: &Transaction<'_>, tenant: &TenantId) -> Result<(), Error> {
        self.insert_tuples(transaction, tenant).await?;
        self.insert_attributes(transaction, tenant).await
    }

    async fn insert_tuples(&self, transaction: &Transaction<'_>, tenant: &TenantId) -> Result<(), Error> {
        const INSERT: &str = "
            INSERT INTO tuplewatch.relation_tuples
                   (tenant_id, entity_type, entity_id, relation, subject_type, subject_id, subject_relation)
            SELECT $1, * FROM unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[])
                ON CONFLICT DO NOTHING";
        if self.tuples.is_empty() {
            return Ok(());
        }
        let columns: [fn(&Tuple<'a>) -> &'a str; 6] = [
            |tuple| tuple.entity_type,
            |tuple| tuple.entity_id,
            |tuple| tuple.relation,
            |tuple| tuple.subject_type,
            |tuple| tuple.subject_id,
            |tuple| tuple.subject_relation,
        ];
        let columns = columns.map(|column| self.tuples.iter().map(column).collect::<Vec<_>>());
        insert_columns(transaction, INSERT, tenant, &columns).await
    }

    /// Inserts or updates the attributes. One that already has the value stays untouched, so that no change is
    /// streamed.
    async fn insert_attributes(&self, transaction: &Transaction<'_>, tenant: &TenantId) -> Result<(), Error> {
        const INSERT: &str = "
            INSERT INTO tuplewatch.attributes AS present (tenant_id, entity_type, entity_id, attribute, value)
            SELECT $1, entity_type, entity_id, attribute, value::jsonb
              FROM unnest($2::text[], $3::text[], $4::text[], $5::text[]) AS new (entity_type, entity_id, attribute, value)
                ON CONFLICT (tenant_id, entity_type, entity_id, attribute)
                DO UPDATE SET value = EXCLUDED.value WHERE present.value <> EXCLUDED.value";
        if self.attributes.is_empty() {
            return Ok(());
        }
        let json: Vec<String> = self.attributes.values().map(write_attribute_value).collect();
        let mut columns: [Vec<&str>; 4] = Default::default();
        let [entity_types, entity_ids, names, values] = &mut columns;
        for ([entity_type, entity_id, name], json) in self.attributes.keys().zip(&json) {
            entity_types.push(entity_type);
            entity_ids.push(entity_id);
            names.push(name);
            values.push(json);
        }
        insert_columns(transaction, INSERT, tenant, &columns).await
    }
}

async fn insert_columns(
    transaction: &Transaction<'_>,
    statement: &str,
    tenant: &TenantId,
    columns: &[Vec<&str>],
) -> Result<(), Error> {
    let tenant = tenant.as_str();
    let columns = columns.iter().map(|column| (column as &(dyn ToSql + Sync), Type::TEXT_ARRAY));
    let parameters: Vec<_> = std::iter::once(text(&tenant)).chain(columns).collect();
    transaction.execute_typed(statement, &parameters).await?;
    Ok(())
}
