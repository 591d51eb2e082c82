//! `base.v1.Data` over HTTP.

use super::call::{Call, answer};
use crate::api::grpc::proto::data_server::Data;
use axum::Router;
use axum::extract::State;
use axum::routing::post;
use std::sync::Arc;

pub(super) fn routes<D: Data>(data: Arc<D>) -> Router {
    type Service<D> = State<Arc<D>>;
    Router::new()
        .route(
            "/v1/tenants/{tenant_id}/data/write",
            post(async |State(data): Service<D>, Call(request)| answer(data.write(request).await)),
        )
        .route(
            "/v1/tenants/{tenant_id}/data/delete",
            post(async |State(data): Service<D>, Call(request)| answer(data.delete(request).await)),
        )
        .route(
            "/v1/tenants/{tenant_id}/data/relationships/read",
            post(async |State(data): Service<D>, Call(request)| answer(data.read_relationships(request).await)),
        )
        .route(
            "/v1/tenants/{tenant_id}/data/attributes/read",
            post(async |State(data): Service<D>, Call(request)| answer(data.read_attributes(request).await)),
        )
        .route(
            "/v1/tenants/{tenant_id}/data/run-bundle",
            post(async |State(data): Service<D>, Call(request)| answer(data.run_bundle(request).await)),
        )
        // The paths by which older clients write and delete.
        .route(
            "/v1/tenants/{tenant_id}/relationships/write",
            post(async |State(data): Service<D>, Call(request)| answer(data.write_relationships(request).await)),
        )
        .route(
            "/v1/tenants/{tenant_id}/relationships/delete",
            post(async |State(data): Service<D>, Call(request)| answer(data.delete_relationships(request).await)),
        )
        .with_state(data)
}
