//! Asks a node on every interface whether it delivers, and checks that all give the same answer.

use crate::scenarios::cli::process::{Ran, tuplewatch};
use crate::support::server::Server;
use crate::support::wait::{eventually, within};
use reqwest::Method;
use serde_json::json;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// The services that `grpc.health.v1` knows.
const SERVICES: [&str; 4] = ["", "base.v1.Watch", "base.v1.Data", "base.v1.Tenancy"];

impl Server {
    /// Waits until it reports that it delivers.
    pub(crate) async fn ready(&self) {
        eventually("ready", async || self.readiness().await == (200, json!({"status": "READY"}))).await;
        for service in SERVICES {
            assert_eq!(self.health(service).await, Ok(ServingStatus::Serving), "{service}");
        }
        assert_eq!(self.probe().await.succeeded(), "SERVING\n");
        let scrape = self.scrape().await;
        assert_eq!(scrape.get("tuplewatch_ready", &[]), 1.0);
        assert_eq!(scrape.get("tuplewatch_not_ready", &[]), 0.0);
    }

    /// Waits until it reports that it does not deliver, with this text in the reason. `label` is the name of the reason in metrics.
    pub(crate) async fn not_ready(&self, label: &str, reason: &str) {
        let mut last = String::new();
        eventually(&format!("not ready: {reason}"), async || {
            let (status, body) = self.readiness().await;
            last = body["reason"].as_str().unwrap_or_default().to_owned();
            status == 503 && last.contains(reason)
        })
        .await;
        for service in SERVICES {
            assert_eq!(self.health(service).await, Ok(ServingStatus::NotServing), "{service}");
        }
        self.probe().await.failed(&["NOT_SERVING", reason]);
        let scrape = self.scrape().await;
        assert_eq!(scrape.get("tuplewatch_ready", &[]), 0.0);
        assert_eq!(scrape.get("tuplewatch_not_ready", &[("reason", label)]), 1.0, "{}", scrape.text);
        assert_eq!(scrape.get("tuplewatch_not_ready", &[]), 1.0, "one reason at a time");
        // It is still alive, and a reason reveals no secrets.
        assert_eq!(self.ask(Method::GET, "/healthz", "").await.0, 200);
        for secret in ["127.0.0.1", "feeder", "postgres@"] {
            assert!(!last.contains(secret), "{last}");
        }
    }

    async fn readiness(&self) -> (u16, serde_json::Value) {
        self.ask(Method::GET, "/readyz", "").await
    }

    /// `tuplewatch health`.
    async fn probe(&self) -> Ran {
        tuplewatch(&["health", "--server", &format!("http://{}", self.address())]).await
    }

    /// `grpc.health.v1.Health/Watch` of the whole server.
    pub(crate) async fn health_changes(&self) -> HealthChanges {
        let request = HealthCheckRequest { service: String::new() };
        let changes = HealthClient::new(self.channel().await).watch(request).await.unwrap();
        HealthChanges(changes.into_inner())
    }
}

/// The stream of `Health/Watch`.
pub(crate) struct HealthChanges(tonic::Streaming<tonic_health::pb::HealthCheckResponse>);

impl HealthChanges {
    pub(crate) async fn next(&mut self) -> ServingStatus {
        within("a change of health", self.0.message()).await.unwrap().expect("the stream stays open").status()
    }
}
