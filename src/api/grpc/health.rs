//! `grpc.health.v1`. A node that is NOT_SERVING gives the reason in the metadata of its answer.
//!
//! All services depend on the same stream from PostgreSQL, so they share one health.

use futures_util::Stream;
use futures_util::stream;
use std::fmt;
use std::pin::Pin;
use tokio::sync::watch;
use tonic::metadata::AsciiMetadataValue;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

/// The metadata key of the reason.
pub(crate) const REASON: &str = "tuplewatch-reason";

/// The names that it knows: the empty name of the whole server, and its services.
const SERVICES: [&str; 4] = ["", "base.v1.Watch", "base.v1.Data", "base.v1.Tenancy"];

/// The health service. `readiness` holds the reason, in ASCII, why nothing is delivered, or `None` while the node
/// delivers. A watching client receives a message at each change of the status, and its stream ends when the sender is
/// dropped.
pub(crate) fn service<R: Reason>(readiness: watch::Receiver<Option<R>>) -> Server<R> {
    Server::new(HealthService { readiness })
}

/// The server of the service.
pub(crate) type Server<R> = HealthServer<HealthService<R>>;

/// The reason why nothing is delivered.
pub(crate) trait Reason: fmt::Display + Send + Sync + 'static {}

impl<R: fmt::Display + Send + Sync + 'static> Reason for R {}

/// The health service, see [`service`].
#[derive(Debug)]
pub(crate) struct HealthService<R> {
    readiness: watch::Receiver<Option<R>>,
}

impl<R: Reason> HealthService<R> {
    fn require(request: &Request<HealthCheckRequest>) -> Result<(), Status> {
        let service = request.get_ref().service.as_str();
        if SERVICES.contains(&service) { Ok(()) } else { Err(Status::not_found("there is no such service")) }
    }

    fn answer<T>(&self, body: T) -> Response<T> {
        let reason = self.readiness.borrow().as_ref().map(ToString::to_string);
        let mut response = Response::new(body);
        if let Some(reason) = reason.and_then(|reason| AsciiMetadataValue::try_from(reason).ok()) {
            response.metadata_mut().insert(REASON, reason);
        }
        response
    }
}

fn status<R>(obstacle: Option<&R>) -> HealthCheckResponse {
    let status = if obstacle.is_none() { ServingStatus::Serving } else { ServingStatus::NotServing };
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl<R: Reason> Health for HealthService<R> {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        Self::require(&request)?;
        let status = status(self.readiness.borrow().as_ref());
        Ok(self.answer(status))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Self::require(&request)?;
        let changes = stream::unfold((self.readiness.clone(), None), |(mut readiness, sent)| async move {
            loop {
                let now = status(readiness.borrow_and_update().as_ref());
                // A changed reason does not change the status.
                if sent != Some(now.status) {
                    return Some((Ok(now), (readiness, Some(now.status))));
                }
                readiness.changed().await.ok()?;
            }
        });
        Ok(self.answer(Box::pin(changes) as Self::WatchStream))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt as _;

    fn ask(service: &str) -> Request<HealthCheckRequest> {
        Request::new(HealthCheckRequest { service: service.to_owned() })
    }

    #[tokio::test]
    async fn every_service_has_the_same_health_with_its_reason() {
        let (judgement, readiness) = watch::channel(Some("the disk is full"));
        let health = HealthService { readiness };
        for service in SERVICES {
            let answer = health.check(ask(service)).await.unwrap();
            assert_eq!(answer.metadata().get(REASON).unwrap(), "the disk is full");
            assert_eq!(answer.get_ref().status(), ServingStatus::NotServing);
        }
        judgement.send_replace(None);
        let answer = health.check(ask("base.v1.Data")).await.unwrap();
        assert!(answer.metadata().get(REASON).is_none());
        assert_eq!(answer.get_ref().status(), ServingStatus::Serving);
        assert_eq!(health.check(ask("nobody")).await.unwrap_err().code(), tonic::Code::NotFound);
    }

    #[tokio::test]
    async fn a_watch_follows_the_status_and_ends_with_the_server() {
        let (judgement, readiness) = watch::channel(Some("one reason"));
        let health = HealthService { readiness };
        let mut changes = health.watch(ask("")).await.unwrap().into_inner();
        assert_eq!(changes.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
        judgement.send_replace(Some("another reason"));
        judgement.send_replace(None);
        assert_eq!(changes.next().await.unwrap().unwrap().status(), ServingStatus::Serving);
        judgement.send_replace(Some("stopping"));
        drop(judgement);
        assert_eq!(changes.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
        assert!(changes.next().await.is_none());
        assert_eq!(health.watch(ask("nobody")).await.err().unwrap().code(), tonic::Code::NotFound);
    }
}
