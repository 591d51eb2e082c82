//! The validation of requests of Data and Tenancy. Ids and names have Permify's forms ([`crate::api::permify_names`]). A
//! subject's relation may also be empty, or `...`, which means the same.
//!
//! A status lists all invalid fields at once, and never their contents. Filters may contain any text: a text of another
//! form matches nothing.

use super::proto;
use super::{fact, status};
use crate::api::encode::base_v1;
use crate::api::permify_names::{ID, NAME, is_id, is_name};
use crate::model::change::{AttributeValue, TenantId, Tuple};
use crate::store::{AttributeFilter, Batch, Key, TupleFilter};
use std::fmt::Arguments;
use tonic::Status;
use tonic_types::FieldViolation;

/// The most violations in a status. The status travels in headers, which some clients limit to 8 KiB.
const VIOLATIONS_MAX: usize = 10;
/// The largest value of an attribute. It must fit into one message of Watch, and gRPC clients refuse messages above 4
/// MiB.
const VALUE_BYTES_MAX: usize = (4 << 20) - (4 << 10);
/// The longest name of a tenant. Names are for people.
const TENANT_NAME_BYTES_MAX: usize = 512;
/// The rows of a page, if the request does not say.
const PAGE_SIZE_DEFAULT: usize = 50;
/// The most rows of a page. Only some versions of Permify refuse larger pages; here such a page ends early.
const PAGE_SIZE_MAX: usize = 1_000;

const REQUIRED: &str = "is required";
const NO_NUL: &str = "must not contain a NUL character";

/// The text by which Permify denotes a subject without a relation.
const NO_RELATION: &str = "...";

fn without_dots(relation: &str) -> &str {
    if relation == NO_RELATION { "" } else { relation }
}

/// Collects violations.
#[derive(Default)]
struct Violations(Vec<FieldViolation>);

impl Violations {
    fn unless(&mut self, holds: bool, field: Arguments<'_>, description: &str) {
        if !holds && self.0.len() < VIOLATIONS_MAX {
            self.0.push(FieldViolation::new(field.to_string(), description));
        }
    }

    fn finish(self) -> Result<(), Status> {
        if self.0.is_empty() { Ok(()) } else { Err(status::invalid(self.0)) }
    }
}

fn check(holds: bool, field: &str, description: &str) -> Result<(), Status> {
    let mut violations = Violations::default();
    violations.unless(holds, format_args!("{field}"), description);
    violations.finish()
}

/// Checks the tenant of a request.
pub(super) fn tenant(field: &str, id: &str) -> Result<TenantId, Status> {
    check(is_id(id), field, ID)?;
    TenantId::new(id).map_err(|error| status::invalid(vec![FieldViolation::new(field, error.to_string())]))
}

/// Checks the name of a new tenant.
pub(super) fn tenant_name(name: &str) -> Result<(), Status> {
    check(!name.contains('\0'), "name", NO_NUL)?;
    check(
        name.len() <= TENANT_NAME_BYTES_MAX,
        "name",
        &format!("must not have more than {TENANT_NAME_BYTES_MAX} bytes"),
    )
}

/// Checks and converts the rows of a write.
pub(super) fn batch<'a>(
    tuples: &'a [proto::Tuple],
    attributes: &'a [proto::Attribute],
    rows_max: usize,
) -> Result<Batch<'a>, Status> {
    let mut batch = Batch::default();
    let mut violations = Violations::default();
    for (n, tuple) in tuples.iter().enumerate() {
        if let Some(tuple) = check_tuple(n, tuple, &mut violations) {
            batch.put_tuple(tuple);
        }
    }
    for (n, attribute) in attributes.iter().enumerate() {
        put_attribute(n, attribute, &mut batch, &mut violations);
    }
    violations.finish()?;
    let themselves = |tuple: &proto::Tuple| match (&tuple.entity, &tuple.subject) {
        (Some(entity), Some(subject)) => {
            entity.r#type == subject.r#type && entity.id == subject.id && tuple.relation == subject.relation
        }
        _ => false,
    };
    if let Some(n) = tuples.iter().position(themselves) {
        return Err(status::entity_is_subject(format!("tuples[{n}]")));
    }
    if batch.len() > rows_max {
        return Err(status::too_much_data(batch.len(), rows_max));
    }
    Ok(batch)
}

/// The older method for tuples only requires at least one.
pub(super) fn require_tuples(tuples: &[proto::Tuple]) -> Result<(), Status> {
    check(!tuples.is_empty(), "tuples", "must have at least one tuple")
}

fn check_tuple<'a>(n: usize, tuple: &'a proto::Tuple, violations: &mut Violations) -> Option<Tuple<'a>> {
    violations.unless(tuple.entity.is_some(), format_args!("tuples[{n}].entity"), REQUIRED);
    violations.unless(tuple.subject.is_some(), format_args!("tuples[{n}].subject"), REQUIRED);
    let (entity, subject) = (tuple.entity.as_ref()?, tuple.subject.as_ref()?);
    let subject_relation = without_dots(&subject.relation);
    violations.unless(is_name(&entity.r#type), format_args!("tuples[{n}].entity.type"), NAME);
    violations.unless(is_id(&entity.id), format_args!("tuples[{n}].entity.id"), ID);
    violations.unless(is_name(&tuple.relation), format_args!("tuples[{n}].relation"), NAME);
    violations.unless(is_name(&subject.r#type), format_args!("tuples[{n}].subject.type"), NAME);
    violations.unless(is_id(&subject.id), format_args!("tuples[{n}].subject.id"), ID);
    let is_relation = subject_relation.is_empty() || is_name(subject_relation);
    violations.unless(is_relation, format_args!("tuples[{n}].subject.relation"), NAME);
    Some(Tuple {
        entity_type: &entity.r#type,
        entity_id: &entity.id,
        relation: &tuple.relation,
        subject_type: &subject.r#type,
        subject_id: &subject.id,
        subject_relation,
    })
}

fn put_attribute<'a>(n: usize, attribute: &'a proto::Attribute, batch: &mut Batch<'a>, violations: &mut Violations) {
    violations.unless(is_name(&attribute.attribute), format_args!("attributes[{n}].attribute"), NAME);
    let Some(entity) = &attribute.entity else {
        return violations.unless(false, format_args!("attributes[{n}].entity"), REQUIRED);
    };
    violations.unless(is_name(&entity.r#type), format_args!("attributes[{n}].entity.type"), NAME);
    violations.unless(is_id(&entity.id), format_args!("attributes[{n}].entity.id"), ID);
    match attribute.value.as_ref().ok_or(REQUIRED).and_then(fact::value_of).and_then(storable) {
        Ok(value) => batch.put_attribute(&entity.r#type, &entity.id, &attribute.attribute, value),
        Err(description) => violations.unless(false, format_args!("attributes[{n}].value"), description),
    }
}

/// Checks that `jsonb` can store the value, and that one message can carry it.
fn storable(value: AttributeValue) -> Result<AttributeValue, &'static str> {
    let has_nul = match &value {
        AttributeValue::String(text) => text.contains('\0'),
        AttributeValue::StringArray(texts) => texts.iter().any(|text| text.contains('\0')),
        _ => false,
    };
    if has_nul {
        return Err(NO_NUL);
    }
    if base_v1::encode_data(&value).len() > VALUE_BYTES_MAX {
        return Err("is too large: one message of Watch must hold it, which is at most 4 MiB");
    }
    Ok(value)
}

/// Checks that PostgreSQL can represent the texts of a filter.
fn check_texts(field: &str, texts: [&str; 3], lists: [&[String]; 2]) -> Result<(), Status> {
    let lists = lists.into_iter().flatten().map(String::as_str);
    let has_nul = texts.into_iter().chain(lists).any(|text| text.contains('\0'));
    check(!has_nul, field, NO_NUL)
}

/// An absent field matches everything.
pub(super) fn tuple_filter<'a>(field: &str, filter: Option<&'a proto::TupleFilter>) -> Result<TupleFilter<'a>, Status> {
    let Some(filter) = filter else { return Ok(TupleFilter::default()) };
    let mut checked = TupleFilter { relation: &filter.relation, ..TupleFilter::default() };
    if let Some(entity) = &filter.entity {
        (checked.entity_type, checked.entity_ids) = (&entity.r#type, &entity.ids);
    }
    if let Some(subject) = &filter.subject {
        (checked.subject_type, checked.subject_ids) = (&subject.r#type, &subject.ids);
        checked.subject_relation = Some(&*subject.relation).filter(|relation| !relation.is_empty()).map(without_dots);
    }
    let subject_relation = checked.subject_relation.unwrap_or_default();
    check_texts(
        field,
        [checked.entity_type, checked.subject_type, subject_relation],
        [checked.entity_ids, checked.subject_ids],
    )?;
    check(!checked.relation.contains('\0'), field, NO_NUL)?;
    Ok(checked)
}

/// An absent field matches everything.
pub(super) fn attribute_filter<'a>(
    field: &str,
    filter: Option<&'a proto::AttributeFilter>,
) -> Result<AttributeFilter<'a>, Status> {
    let Some(filter) = filter else { return Ok(AttributeFilter::default()) };
    let mut checked = AttributeFilter { attributes: &filter.attributes, ..AttributeFilter::default() };
    if let Some(entity) = &filter.entity {
        (checked.entity_type, checked.entity_ids) = (&entity.r#type, &entity.ids);
    }
    check_texts(field, [checked.entity_type, "", ""], [checked.entity_ids, checked.attributes])?;
    Ok(checked)
}

/// A delete must have a filter. To delete all data of a tenant, delete the tenant.
pub(super) fn require_filter(is_there: bool, field: &str) -> Result<(), Status> {
    check(is_there, field, "must not be empty: an empty filter would match everything")
}

/// The number of rows of a page.
pub(super) fn page_size(asked: u32) -> usize {
    match usize::try_from(asked) {
        Ok(0) => PAGE_SIZE_DEFAULT,
        Ok(asked) => asked.min(PAGE_SIZE_MAX),
        Err(_) => PAGE_SIZE_MAX,
    }
}

/// Decodes the start of a page. `None` for the first page.
pub(super) fn continuous_token<const COLUMNS: usize>(token: &str) -> Result<Option<Key<COLUMNS>>, Status> {
    if token.is_empty() {
        return Ok(None);
    }
    token.parse().map(Some).map_err(status::bad_continuous_token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_violations_are_reported_at_once_up_to_a_bound() {
        use tonic_types::StatusExt as _;
        let tuple = proto::Tuple { entity: Some(proto::Entity::default()), ..Default::default() };
        let status = batch(&vec![tuple; 100], &[proto::Attribute::default()], 1).unwrap_err();
        assert_eq!(status.message(), "ERROR_CODE_VALIDATION");
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations.len(), VIOLATIONS_MAX);
        assert_eq!(violations[0].field, "tuples[0].subject");
    }

    #[test]
    fn page_sizes_are_bounded() {
        for (asked, expected) in [(0, 50), (1, 1), (100, 100), (u32::MAX, PAGE_SIZE_MAX)] {
            assert_eq!(page_size(asked), expected);
        }
    }
}
