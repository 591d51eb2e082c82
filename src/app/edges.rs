//! The listeners of gRPC and HTTP. They are bound before anything else starts, so that a port in use is reported at
//! once. They accept connections only when the services are ready.

use super::primary::SqlPrimary;
use crate::access::admission::Admission;
use crate::access::authn::{Authenticator, oidc};
use crate::access::connections;
use crate::api::grpc::data::DataService;
use crate::api::grpc::tenancy::TenancyService;
use crate::api::grpc::{self, Services};
use crate::api::http::{self, Gateway, Probes};
use crate::api::watch::{self, WatchService};
use crate::config::{self, Config, MappingSource, Preset, SnapTokenFormat};
use crate::hub::Hub;
use crate::model::snap_token;
use crate::postgres::primary::PrimaryConnector;
use crate::store::Store;
use anyhow::Context as _;
use std::sync::Arc;
use tokio::sync::watch::Receiver;

/// The listeners, and the admission of their requests.
pub(super) struct Edges {
    grpc: grpc::Listener,
    http: Option<(http::Listener, config::Http)>,
    admission: Admission,
    /// Refreshes the keys that verify tokens.
    issuer_keys: Option<oidc::Refresher>,
}

impl Edges {
    pub(super) async fn bind(config: &Config) -> anyhow::Result<Self> {
        let host = config.server.host.as_str();
        let grpc = grpc::Listener::bind(host, &config.server.grpc).await?;
        let http = match &config.server.http {
            Some(http) => Some((http::Listener::bind(host, http).await?, http.clone())),
            None => None,
        };
        let guards_grpc = config.server.grpc.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some());
        let credentials = config.authn.credentials.as_ref();
        if guards_grpc && http.is_some() && credentials.is_none() {
            tracing::warn!(
                "server.grpc.tls.client_ca guards gRPC alone, and HTTP is open to everybody: set authn, or \
                 server.http.enabled: false"
            );
        }
        let (authenticator, issuer_keys) = Authenticator::new(credentials).context("cannot check tokens")?;
        let admission = Admission::new(authenticator, config.authn.exempt, config.server.rate_limit);
        Ok(Self { grpc, http, admission, issuer_keys })
    }

    /// Serves until `stop` turns true and all streams have ended.
    pub(super) async fn serve(
        self,
        services: Services<SqlPrimary>,
        probes: impl Probes,
        health: grpc::health::Server<impl grpc::health::Reason>,
        streams_max: usize,
        stop: Receiver<bool>,
    ) -> anyhow::Result<()> {
        let Self { grpc, http, admission, issuer_keys } = self;
        if let Some((listener, _)) = &http {
            tracing::info!(address = %listener.address(), "HTTP is listening");
        }
        tracing::info!(address = %grpc.address(), "gRPC is listening");
        let connections_max = connections::limit(streams_max);
        let http = http.map(|(listener, config)| {
            (listener, Gateway::new(&config, &services, probes, admission.clone()), services.watch.clone())
        });
        let over_http = async {
            // A disabled HTTP server is not a part that could end.
            if let Some((listener, gateway, watch)) = http {
                http::serve(listener, gateway, watch, connections_max, stop.clone()).await?;
            }
            Ok(())
        };
        let over_grpc =
            async { Ok(grpc::serve(grpc, services, health, admission, connections_max, stop.clone()).await?) };
        let keys_stay_fresh = async {
            match issuer_keys {
                Some(refresher) => refresher.run().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            served = async { tokio::try_join!(over_grpc, over_http) } => served.map(drop),
            () = keys_stay_fresh => Ok(()),
        }
    }
}

/// Builds the services for both protocols.
pub(super) fn services(
    config: &Config,
    hub: &Hub,
    primary: SqlPrimary,
    primaries: PrimaryConnector,
    stop: Receiver<bool>,
) -> Services<SqlPrimary> {
    let watch = watch::Options {
        enabled: config.service.watch.enabled,
        subscribers_max: streams_max(config),
        resolve_timeout: config.service.watch.resolve_timeout,
        token_form: token_form(config),
        permify_tenants: matches!(config.mapping.source, MappingSource::Preset(_)),
    };
    let data = grpc::data::Options {
        rows_per_write_max: config.database.max_data_per_write,
        resolve_timeout: config.service.watch.resolve_timeout,
    };
    let store = has_store(config).then(|| Store::new(primaries, config.database.connections_for_store()));
    Services {
        watch: WatchService::new(hub.clone(), primary.clone(), watch, stop.clone()),
        data: Arc::new(DataService::new(store.clone(), hub.clone(), primary, data, stop)),
        tenancy: Arc::new(TenancyService::new(store)),
    }
}

/// Whether Data and Tenancy are available: they write only the tables of the preset `tuples`, because all other tables
/// belong to other programs.
pub(super) fn has_store(config: &Config) -> bool {
    config.mapping.source == MappingSource::Preset(Preset::Tuples)
}

/// The most streams at a time, over gRPC and HTTP together.
pub(super) fn streams_max(config: &Config) -> usize {
    usize::try_from(config.service.watch.subscribers_max).unwrap_or(usize::MAX)
}

/// The form of the tokens in messages.
fn token_form(config: &Config) -> snap_token::Form {
    match (config.snap_token.format, &config.mapping.source) {
        (SnapTokenFormat::Permify, _) | (SnapTokenFormat::Auto, MappingSource::Preset(Preset::Permify)) => {
            snap_token::Form::Permify
        }
        (SnapTokenFormat::Native | SnapTokenFormat::Auto, _) => snap_token::Form::Native,
    }
}
