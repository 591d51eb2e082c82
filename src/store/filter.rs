//! Which rows: filters, and statements with conditions.
//!
//! A statement has just the conditions that are asked for, and its parameters are known when it is planned, so that a filter
//! by entity uses the primary key.

use tokio_postgres::types::{ToSql, Type};

/// A parameter with its type.
pub(super) type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

pub(super) fn text<'a>(value: &'a &'a str) -> Parameter<'a> {
    (value, Type::TEXT)
}

/// Picks tuples: what is empty picks all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are the words of the model")]
pub struct TupleFilter<'a> {
    pub entity_type: &'a str,
    pub entity_ids: &'a [String],
    pub relation: &'a str,
    pub subject_type: &'a str,
    pub subject_ids: &'a [String],
    /// With `Some("")` the direct subjects.
    pub subject_relation: Option<&'a str>,
}

/// Picks attributes: what is empty picks all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are the words of the model")]
pub struct AttributeFilter<'a> {
    pub entity_type: &'a str,
    pub entity_ids: &'a [String],
    pub attributes: &'a [String],
}

impl TupleFilter<'_> {
    /// Whether it picks all there is.
    pub fn is_empty(&self) -> bool {
        *self == TupleFilter::default()
    }

    /// `verb` with the conditions of the filter.
    pub(super) fn query<'q>(&'q self, verb: &str, tenant: &'q &'q str) -> Query<'q> {
        let mut query = Query::of_tenant(verb, tenant);
        query.and_equal("entity_type", &self.entity_type);
        query.and_one_of("entity_id", &self.entity_ids);
        query.and_equal("relation", &self.relation);
        query.and_equal("subject_type", &self.subject_type);
        query.and_one_of("subject_id", &self.subject_ids);
        if let Some(relation) = &self.subject_relation {
            let place = query.bind(text(relation));
            query.push(&format!(" AND subject_relation = {place}"));
        }
        query
    }
}

impl AttributeFilter<'_> {
    /// Whether it picks all there is.
    pub fn is_empty(&self) -> bool {
        *self == AttributeFilter::default()
    }

    /// `verb` with the conditions of the filter.
    pub(super) fn query<'q>(&'q self, verb: &str, tenant: &'q &'q str) -> Query<'q> {
        let mut query = Query::of_tenant(verb, tenant);
        query.and_equal("entity_type", &self.entity_type);
        query.and_one_of("entity_id", &self.entity_ids);
        query.and_one_of("attribute", &self.attributes);
        query
    }
}

/// A statement and its parameters.
pub(super) struct Query<'q> {
    sql: String,
    parameters: Vec<Parameter<'q>>,
}

impl<'q> Query<'q> {
    pub(super) fn new(sql: &str) -> Self {
        Self { sql: sql.to_owned(), parameters: Vec::new() }
    }

    fn of_tenant(verb: &str, tenant: &'q &'q str) -> Self {
        let mut query = Self::new(verb);
        let place = query.bind(text(tenant));
        query.push(&format!(" WHERE tenant_id = {place}"));
        query
    }

    /// Takes a parameter; `$1`, `$2`, …
    pub(super) fn bind(&mut self, parameter: Parameter<'q>) -> String {
        self.parameters.push(parameter);
        format!("${}", self.parameters.len())
    }

    pub(super) fn push(&mut self, sql: &str) {
        self.sql.push_str(sql);
    }

    fn and_equal(&mut self, column: &str, value: &'q &'q str) {
        if !value.is_empty() {
            let place = self.bind(text(value));
            self.push(&format!(" AND {column} = {place}"));
        }
    }

    fn and_one_of(&mut self, column: &str, values: &'q &'q [String]) {
        if !values.is_empty() {
            let place = self.bind((values, Type::TEXT_ARRAY));
            self.push(&format!(" AND {column} = ANY({place})"));
        }
    }

    pub(super) fn sql(&self) -> &str {
        &self.sql
    }

    pub(super) fn parameters(&self) -> &[Parameter<'q>] {
        &self.parameters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_has_exactly_the_requested_conditions() {
        let tenant = "t";
        let check = |query: Query<'_>, expected: &str| {
            assert_eq!(query.sql(), expected);
            assert_eq!(query.parameters().len(), expected.matches('$').count());
        };
        check(TupleFilter::default().query("DELETE FROM x", &tenant), "DELETE FROM x WHERE tenant_id = $1");
        let ids = ["1".to_owned(), "2".to_owned()];
        let filter = TupleFilter { entity_ids: &ids, subject_relation: Some(""), ..TupleFilter::default() };
        check(
            filter.query("SELECT", &tenant),
            "SELECT WHERE tenant_id = $1 AND entity_id = ANY($2) AND subject_relation = $3",
        );
        let filter = AttributeFilter { entity_type: "a", entity_ids: &ids, attributes: &ids };
        check(
            filter.query("SELECT", &tenant),
            "SELECT WHERE tenant_id = $1 AND entity_type = $2 AND entity_id = ANY($3) AND attribute = ANY($4)",
        );
    }
}
