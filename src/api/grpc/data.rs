//! `base.v1.Data`: writes and reads of the `tuples` preset's tables.
//!
//! With any other mapping, every method returns UNIMPLEMENTED, because two engines must not write the same tables.

use super::proto::data_server::Data;
use super::{authorize, proto, status, validation};
use crate::api::watch;
use crate::hub::Hub;
use crate::hub::primary::Primary;
use crate::model::change::TenantId;
use crate::store::{Key, Page, Store};
use std::time::Duration;
use tokio::sync::watch::Receiver;
use tonic::{Request, Response, Status};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// The most tuples and attributes of one write.
    pub(crate) rows_per_write_max: usize,
    /// The longest wait of a read for its snap token.
    pub(crate) resolve_timeout: Duration,
}

pub(crate) struct DataService<P> {
    /// `None` if another engine writes the watched tables.
    store: Option<Store>,
    hub: Hub,
    primary: P,
    options: Options,
    /// Turns true when waiting calls must end.
    stop: Receiver<bool>,
}

impl<P: Primary> DataService<P> {
    /// A service on this store. Snap tokens are those of this hub, and `primary` resolves tokens that depend on
    /// PostgreSQL.
    pub(crate) const fn new(
        store: Option<Store>,
        hub: Hub,
        primary: P,
        options: Options,
        stop: Receiver<bool>,
    ) -> Self {
        Self { store, hub, primary, options, stop }
    }

    /// Returns the store and the tenant, if the caller may use the tenant.
    fn admit<T>(&self, request: &Request<T>, tenant: &str) -> Result<(&Store, TenantId), Status> {
        authorize(request, tenant)?;
        let store = self.store.as_ref().ok_or_else(status::not_our_store)?;
        Ok((store, validation::tenant("tenant_id", tenant)?))
    }

    /// Waits until a read sees the state of the token.
    async fn wait_until_readable(&self, tenant: &TenantId, token: &str) -> Result<(), Status> {
        let mut stop = self.stop.clone();
        let readable = tokio::select! {
            readable = self.hub.readable(&self.primary, tenant, token, self.options.resolve_timeout) => readable,
            _ = stop.wait_for(|stop| *stop) => return Err(watch::Error::ShuttingDown.into()),
        };
        readable.map_err(|error| watch::Error::of_start(error, None).into())
    }
}

/// The rows of a page, and its continuous token.
pub(super) fn parts<T, const COLUMNS: usize>(page: Page<T, COLUMNS>) -> (Vec<T>, String) {
    let next = page.next.as_ref().map(Key::to_string);
    (page.items, next.unwrap_or_default())
}

#[tonic::async_trait]
impl<P: Primary + 'static> Data for DataService<P> {
    async fn write(
        &self,
        request: Request<proto::DataWriteRequest>,
    ) -> Result<Response<proto::DataWriteResponse>, Status> {
        let asked = request.get_ref();
        let (store, tenant) = self.admit(&request, &asked.tenant_id)?;
        let batch = validation::batch(&asked.tuples, &asked.attributes, self.options.rows_per_write_max)?;
        let snap_token = store.write(&tenant, &batch).await.map_err(status::of_store)?;
        Ok(Response::new(proto::DataWriteResponse { snap_token }))
    }

    async fn write_relationships(
        &self,
        request: Request<proto::RelationshipWriteRequest>,
    ) -> Result<Response<proto::RelationshipWriteResponse>, Status> {
        let asked = request.get_ref();
        let (store, tenant) = self.admit(&request, &asked.tenant_id)?;
        validation::require_tuples(&asked.tuples)?;
        let batch = validation::batch(&asked.tuples, &[], self.options.rows_per_write_max)?;
        let snap_token = store.write(&tenant, &batch).await.map_err(status::of_store)?;
        Ok(Response::new(proto::RelationshipWriteResponse { snap_token }))
    }

    async fn read_relationships(
        &self,
        request: Request<proto::RelationshipReadRequest>,
    ) -> Result<Response<proto::RelationshipReadResponse>, Status> {
        let asked = request.get_ref();
        let (store, tenant) = self.admit(&request, &asked.tenant_id)?;
        let filter = validation::tuple_filter("filter", asked.filter.as_ref())?;
        let after = validation::continuous_token(&asked.continuous_token)?;
        let size = validation::page_size(asked.page_size);
        let token = asked.metadata.as_ref().map_or("", |metadata| &metadata.snap_token);
        self.wait_until_readable(&tenant, token).await?;
        let page = store.read_tuples(&tenant, &filter, after.as_ref(), size, |tuple| tuple.into()).await;
        let (tuples, continuous_token) = parts(page.map_err(status::of_store)?);
        Ok(Response::new(proto::RelationshipReadResponse { tuples, continuous_token }))
    }

    async fn read_attributes(
        &self,
        request: Request<proto::AttributeReadRequest>,
    ) -> Result<Response<proto::AttributeReadResponse>, Status> {
        let asked = request.get_ref();
        let (store, tenant) = self.admit(&request, &asked.tenant_id)?;
        let filter = validation::attribute_filter("filter", asked.filter.as_ref())?;
        let after = validation::continuous_token(&asked.continuous_token)?;
        let size = validation::page_size(asked.page_size);
        let token = asked.metadata.as_ref().map_or("", |metadata| &metadata.snap_token);
        self.wait_until_readable(&tenant, token).await?;
        let page = store.read_attributes(&tenant, &filter, after.as_ref(), size, |attribute| attribute.into()).await;
        let (attributes, continuous_token) = parts(page.map_err(status::of_store)?);
        Ok(Response::new(proto::AttributeReadResponse { attributes, continuous_token }))
    }

    async fn delete(
        &self,
        request: Request<proto::DataDeleteRequest>,
    ) -> Result<Response<proto::DataDeleteResponse>, Status> {
        let asked = request.get_ref();
        let (store, tenant) = self.admit(&request, &asked.tenant_id)?;
        let tuples = validation::tuple_filter("tuple_filter", asked.tuple_filter.as_ref())?;
        let attributes = validation::attribute_filter("attribute_filter", asked.attribute_filter.as_ref())?;
        // If only one of the filters is empty, the request concerns only the other kind of data.
        let tuples = Some(&tuples).filter(|filter| !filter.is_empty());
        let attributes = Some(&attributes).filter(|filter| !filter.is_empty());
        validation::require_filter(tuples.is_some() || attributes.is_some(), "tuple_filter")?;
        let snap_token = store.delete(&tenant, tuples, attributes).await.map_err(status::of_store)?;
        Ok(Response::new(proto::DataDeleteResponse { snap_token }))
    }

    async fn delete_relationships(
        &self,
        request: Request<proto::RelationshipDeleteRequest>,
    ) -> Result<Response<proto::RelationshipDeleteResponse>, Status> {
        let asked = request.get_ref();
        let (store, tenant) = self.admit(&request, &asked.tenant_id)?;
        let tuples = validation::tuple_filter("filter", asked.filter.as_ref())?;
        validation::require_filter(!tuples.is_empty(), "filter")?;
        let snap_token = store.delete(&tenant, Some(&tuples), None).await.map_err(status::of_store)?;
        Ok(Response::new(proto::RelationshipDeleteResponse { snap_token }))
    }

    async fn run_bundle(
        &self,
        request: Request<proto::BundleRunRequest>,
    ) -> Result<Response<proto::BundleRunResponse>, Status> {
        self.admit(&request, &request.get_ref().tenant_id)?;
        Err(status::no_bundles())
    }
}
