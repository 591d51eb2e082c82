//! `base.v1.Tenancy`: the tenants of the preset `tuples`. With any other mapping, every method returns UNIMPLEMENTED.

use super::data::parts;
use super::proto::tenancy_server::Tenancy;
use super::{authorize, proto, status, validation};
use crate::access::authn::Caller;
use crate::store::{Store, Tenant};
use tonic::{Request, Response, Status};

pub(crate) struct TenancyService {
    /// `None` if another engine writes the watched tables.
    store: Option<Store>,
}

impl TenancyService {
    pub(crate) const fn new(store: Option<Store>) -> Self {
        Self { store }
    }

    fn store(&self) -> Result<&Store, Status> {
        self.store.as_ref().ok_or_else(status::not_our_store)
    }
}

impl From<Tenant> for proto::Tenant {
    fn from(tenant: Tenant) -> Self {
        let created_at = tenant.created_at_micros.map(|micros| prost_types::Timestamp {
            seconds: micros.div_euclid(1_000_000),
            // The value is below 10^9.
            nanos: i32::try_from(micros.rem_euclid(1_000_000) * 1_000).unwrap_or_default(),
        });
        Self { id: tenant.id, name: tenant.name, created_at }
    }
}

#[tonic::async_trait]
impl Tenancy for TenancyService {
    async fn create(
        &self,
        request: Request<proto::TenantCreateRequest>,
    ) -> Result<Response<proto::TenantCreateResponse>, Status> {
        let asked = request.get_ref();
        authorize(&request, &asked.id)?;
        let store = self.store()?;
        let id = validation::tenant("id", &asked.id)?;
        validation::tenant_name(&asked.name)?;
        let tenant = store.create_tenant(&id, &asked.name).await.map_err(status::of_store)?;
        Ok(Response::new(proto::TenantCreateResponse { tenant: Some(tenant.into()) }))
    }

    async fn delete(
        &self,
        request: Request<proto::TenantDeleteRequest>,
    ) -> Result<Response<proto::TenantDeleteResponse>, Status> {
        let asked = request.get_ref();
        authorize(&request, &asked.id)?;
        let store = self.store()?;
        let id = validation::tenant("id", &asked.id)?;
        store.delete_tenant(&id).await.map_err(status::of_store)?;
        Ok(Response::new(proto::TenantDeleteResponse { tenant_id: asked.id.clone() }))
    }

    /// A caller that is restricted to some tenants sees only those.
    async fn list(
        &self,
        request: Request<proto::TenantListRequest>,
    ) -> Result<Response<proto::TenantListResponse>, Status> {
        let store = self.store()?;
        let asked = request.get_ref();
        let after = validation::continuous_token(&asked.continuous_token)?;
        let only: Option<Vec<String>> =
            request.extensions().get::<Caller>().and_then(Caller::tenants).map(|tenants| tenants.cloned().collect());
        let page = store.list_tenants(only.as_deref(), after.as_ref(), validation::page_size(asked.page_size)).await;
        let (tenants, continuous_token) = parts(page.map_err(status::of_store)?);
        let tenants = tenants.into_iter().map(Into::into).collect();
        Ok(Response::new(proto::TenantListResponse { tenants, continuous_token }))
    }
}
