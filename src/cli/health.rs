//! `tuplewatch health`: asks a running server for its health, for container health checks and for scripts.
//!
//! It answers one of two questions. *Serving*: does the server deliver changes, so that a subscriber receives a change
//! that is written now? While PostgreSQL is down it does not, and recovers by itself. *Alive*: does the process answer
//! at all? A restart can only repair a process that does not, so a supervisor should ask this question.

use super::connection::ConnectionArgs;
use super::failure::{Failure, is_local};
use super::{examples, say};
use crate::api::grpc::health::REASON;
use anyhow::{anyhow, bail};
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

#[derive(Debug, clap::Args)]
#[command(after_help = examples::HEALTH)]
pub(super) struct HealthArgs {
    /// Ask for one service, such as base.v1.Watch, instead of the whole server
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    service: String,
    /// Ask only whether the process answers. While PostgreSQL is down, it is alive and not serving
    #[arg(long, conflicts_with = "service")]
    alive: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

/// The limit for the whole check. It is below the limits of container platforms, so that the check itself reports the
/// timeout.
const ANSWER_MAX: Duration = Duration::from_secs(3);

/// Prints the state of the server. Fails if the server is not serving, or not alive.
pub(super) async fn run(args: &HealthArgs) -> anyhow::Result<()> {
    let server = &args.connection.server;
    let answer = tokio::time::timeout(ANSWER_MAX, ask(args)).await;
    let answer = answer.map_err(|_| anyhow!("{server} does not answer within {} s", ANSWER_MAX.as_secs()))??;
    match answer {
        // A refusal also proves that tuplewatch answers. Other statuses may come from a proxy.
        Ok(_) if args.alive => say("alive"),
        Err(status) if args.alive && is_own(status.code()) => say("alive"),
        Ok((ServingStatus::Serving, _)) => say("SERVING"),
        Ok((status, reason)) => bail!("{server} is {}: {reason}", status.as_str_name()),
        Err(status) if status.code() == Code::NotFound => {
            bail!("{server} knows no service '{}', or is shutting down", args.service)
        }
        Err(status) => bail!("{server} does not report its health: {}", Failure::of_status(&status).text()),
    }
    Ok(())
}

/// Whether tuplewatch answers a health check with this code.
const fn is_own(code: Code) -> bool {
    matches!(code, Code::NotFound | Code::Unauthenticated | Code::PermissionDenied | Code::ResourceExhausted)
}

/// Asks the server. Returns its status with the reason for not serving, or its refusal.
///
/// # Errors
/// There is no answer.
async fn ask(args: &HealthArgs) -> anyhow::Result<Result<(ServingStatus, String), Status>> {
    let server = &args.connection.server;
    let unreachable = |failure: Failure| anyhow!("cannot reach {server}: {}", failure.text());
    let channel = args.connection.connector()?.connect().await;
    let channel: Channel = channel.map_err(|error| unreachable(Failure::of_connection(&error)))?;
    let mut request = Request::new(HealthCheckRequest { service: args.service.clone() });
    if let Some(authorization) = args.connection.authorization()? {
        request.metadata_mut().insert("authorization", authorization);
    }
    match HealthClient::new(channel).check(request).await {
        Ok(response) => {
            let reason = response.metadata().get(REASON).and_then(|reason| reason.to_str().ok());
            let reason = reason.unwrap_or("the process runs, but gives no reason").to_owned();
            Ok(Ok((response.into_inner().status(), reason)))
        }
        Err(status) if is_local(&status) => Err(unreachable(Failure::of_status(&status))),
        Err(status) => Ok(Err(status)),
    }
}
