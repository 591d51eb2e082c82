//! The services Data and Tenancy, called through their generated clients.

use super::server::Server;
use super::wait::within;
use prost::Message;
use prost_types::Any;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt;
use tuplewatch::api::grpc::proto::data_client::DataClient;
use tuplewatch::api::grpc::proto::tenancy_client::TenancyClient;
use tuplewatch::api::grpc::proto::{
    Attribute, AttributeFilter, AttributeReadRequest, AttributeReadRequestMetadata, AttributeReadResponse,
    DataDeleteRequest, DataWriteRequest, Entity, EntityFilter, RelationshipReadRequest,
    RelationshipReadRequestMetadata, RelationshipReadResponse, Subject, SubjectFilter, Tenant, TenantCreateRequest,
    TenantDeleteRequest, TenantListRequest, Tuple, TupleFilter,
};

/// Both services of one server. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) data: DataClient<Channel>,
    pub(crate) tenancy: TenancyClient<Channel>,
}

impl Api {
    pub(crate) async fn of(server: &Server) -> Self {
        let channel = server.channel().await;
        Self { data: DataClient::new(channel.clone()), tenancy: TenancyClient::new(channel) }
    }

    pub(crate) async fn try_write(&mut self, tenant: &str, tuples: &[&str]) -> Result<String, Status> {
        self.try_write_all(tenant, tuples.iter().map(|text| tuple(text)).collect(), vec![]).await
    }

    pub(crate) async fn try_write_all(
        &mut self,
        tenant: &str,
        tuples: Vec<Tuple>,
        attributes: Vec<Attribute>,
    ) -> Result<String, Status> {
        let request = DataWriteRequest { tenant_id: tenant.into(), metadata: None, tuples, attributes };
        Ok(within("a write", self.data.write(request)).await?.into_inner().snap_token)
    }

    /// Writes tuples, given as text. Returns the token of the state right after the write.
    pub(crate) async fn write(&mut self, tenant: &str, tuples: &[&str]) -> String {
        self.try_write(tenant, tuples).await.unwrap_or_else(|status| panic!("a write: {status:?}"))
    }

    pub(crate) async fn write_attributes(&mut self, tenant: &str, attributes: Vec<Attribute>) -> String {
        let written = self.try_write_all(tenant, vec![], attributes).await;
        written.unwrap_or_else(|status| panic!("a write: {status:?}"))
    }

    pub(crate) async fn try_delete(
        &mut self,
        tenant: &str,
        tuples: TupleFilter,
        attributes: AttributeFilter,
    ) -> Result<String, Status> {
        let (tuple_filter, attribute_filter) = (Some(tuples), Some(attributes));
        let request = DataDeleteRequest { tenant_id: tenant.into(), tuple_filter, attribute_filter };
        Ok(within("a delete", self.data.delete(request)).await?.into_inner().snap_token)
    }

    pub(crate) async fn try_read(
        &mut self,
        request: RelationshipReadRequest,
    ) -> Result<RelationshipReadResponse, Status> {
        Ok(within("a read", self.data.read_relationships(request)).await?.into_inner())
    }

    /// All tuples that match the filter, as texts, read in pages of this size.
    pub(crate) async fn read(&mut self, tenant: &str, filter: TupleFilter, page_size: u32) -> Vec<String> {
        let mut texts = Vec::new();
        let mut request = read_request(tenant, filter);
        request.page_size = page_size;
        loop {
            let page = self.try_read(request.clone()).await.unwrap_or_else(|status| panic!("a read: {status:?}"));
            texts.extend(page.tuples.iter().map(text));
            if page.continuous_token.is_empty() {
                return texts;
            }
            request.continuous_token = page.continuous_token;
        }
    }

    pub(crate) async fn try_read_attributes(
        &mut self,
        request: AttributeReadRequest,
    ) -> Result<AttributeReadResponse, Status> {
        Ok(within("a read", self.data.read_attributes(request)).await?.into_inner())
    }

    pub(crate) async fn create_tenant(&mut self, id: &str) -> Result<Tenant, Status> {
        let request = TenantCreateRequest { id: id.into(), name: format!("the name of {id}") };
        Ok(within("a tenant", self.tenancy.create(request)).await?.into_inner().tenant.expect("a tenant"))
    }

    pub(crate) async fn delete_tenant(&mut self, id: &str) -> Result<String, Status> {
        let request = TenantDeleteRequest { id: id.into() };
        Ok(within("a deletion", self.tenancy.delete(request)).await?.into_inner().tenant_id)
    }

    /// The ids of all tenants, read in pages of this size.
    pub(crate) async fn tenants(&mut self, page_size: u32) -> Vec<String> {
        let mut ids = Vec::new();
        let mut request = TenantListRequest { page_size, continuous_token: String::new() };
        loop {
            let page = within("a list", self.tenancy.list(request.clone())).await.unwrap().into_inner();
            ids.extend(page.tenants.into_iter().map(|tenant| tenant.id));
            if page.continuous_token.is_empty() {
                return ids;
            }
            request.continuous_token = page.continuous_token;
        }
    }
}

/// The tuple of a text like `document:1#viewer@user:ada` or `document:1#viewer@group:ops#member`.
pub(crate) fn tuple(text: &str) -> Tuple {
    let (left, right) = text.split_once('@').unwrap();
    let (entity, relation) = left.split_once('#').unwrap();
    let (subject, subject_relation) = right.split_once('#').unwrap_or((right, ""));
    let (entity_type, entity_id) = entity.split_once(':').unwrap();
    let (subject_type, subject_id) = subject.split_once(':').unwrap();
    Tuple {
        entity: Some(Entity { r#type: entity_type.into(), id: entity_id.into() }),
        relation: relation.into(),
        subject: Some(Subject {
            r#type: subject_type.into(),
            id: subject_id.into(),
            relation: subject_relation.into(),
        }),
    }
}

/// The text of a tuple.
pub(crate) fn text(tuple: &Tuple) -> String {
    let (entity, subject) = (tuple.entity.as_ref().unwrap(), tuple.subject.as_ref().unwrap());
    let relation = if subject.relation.is_empty() { String::new() } else { format!("#{}", subject.relation) };
    format!("{}:{}#{}@{}:{}{relation}", entity.r#type, entity.id, tuple.relation, subject.r#type, subject.id)
}

/// `document:{id}${name}`, with a message of this name as the value.
pub(crate) fn attribute<M: Message>(id: &str, name: &str, kind: &str, value: &M) -> Attribute {
    Attribute {
        entity: Some(Entity { r#type: "document".into(), id: id.into() }),
        attribute: name.into(),
        value: Some(Any { type_url: format!("type.googleapis.com/base.v1.{kind}"), value: value.encode_to_vec() }),
    }
}

pub(crate) fn entities(kind: &str, ids: &[&str]) -> Option<EntityFilter> {
    Some(EntityFilter { r#type: kind.into(), ids: ids.iter().map(ToString::to_string).collect() })
}

pub(crate) fn subjects(kind: &str, ids: &[&str], relation: &str) -> Option<SubjectFilter> {
    let ids = ids.iter().map(ToString::to_string).collect();
    Some(SubjectFilter { r#type: kind.into(), ids, relation: relation.into() })
}

pub(crate) fn read_request(tenant: &str, filter: TupleFilter) -> RelationshipReadRequest {
    RelationshipReadRequest { tenant_id: tenant.into(), filter: Some(filter), ..Default::default() }
}

/// A read of all tuples that is at least as fresh as the token.
pub(crate) fn fresh(tenant: &str, snap_token: &str) -> RelationshipReadRequest {
    let metadata = Some(RelationshipReadRequestMetadata { snap_token: snap_token.into() });
    RelationshipReadRequest { metadata, ..read_request(tenant, TupleFilter::default()) }
}

pub(crate) fn attribute_read(tenant: &str, filter: AttributeFilter, snap_token: &str) -> AttributeReadRequest {
    let metadata = Some(AttributeReadRequestMetadata { snap_token: snap_token.into() });
    AttributeReadRequest { tenant_id: tenant.into(), metadata, filter: Some(filter), ..Default::default() }
}

/// Code and message of a refusal, which must also have a localized message.
pub(crate) fn refusal<T: std::fmt::Debug>(result: Result<T, Status>) -> (Code, String) {
    let status = result.expect_err("a refusal");
    let words = status.get_details_localized_message().map(|words| words.message).unwrap_or_default();
    assert!(!words.is_empty(), "{status:?}");
    (status.code(), status.message().to_owned())
}

/// The fields that a refusal names.
pub(crate) fn fields<T: std::fmt::Debug>(result: Result<T, Status>) -> Vec<String> {
    let status = result.expect_err("a refusal");
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "ERROR_CODE_VALIDATION"));
    let request = status.get_details_bad_request().expect("violations");
    request.field_violations.into_iter().map(|violation| violation.field).collect()
}
