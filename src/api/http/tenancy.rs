//! `base.v1.Tenancy` over HTTP.

use super::call::{Call, answer};
use crate::api::grpc::proto::tenancy_server::Tenancy;
use axum::Router;
use axum::extract::State;
use axum::routing::{delete, post};
use std::sync::Arc;

pub(super) fn routes<T: Tenancy>(tenancy: Arc<T>) -> Router {
    type Service<T> = State<Arc<T>>;
    Router::new()
        .route(
            "/v1/tenants/create",
            post(async |State(tenancy): Service<T>, Call(request)| answer(tenancy.create(request).await)),
        )
        .route(
            "/v1/tenants/list",
            post(async |State(tenancy): Service<T>, Call(request)| answer(tenancy.list(request).await)),
        )
        .route(
            "/v1/tenants/{id}",
            delete(async |State(tenancy): Service<T>, Call(request)| answer(tenancy.delete(request).await)),
        )
        .with_state(tenancy)
}
