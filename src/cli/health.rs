//! `tuplewatch health`: asks a running server how it is. For the health checks of containers, and for scripts.
//!
//! Two questions, which are easily taken for one. *Serving*: are changes delivered, so that a subscriber gets what is written now?
//! While PostgreSQL is down they are not, and are again by themselves. *Alive*: does the process answer at all? That alone is what a
//! restart could repair, so that alone is for whoever restarts.

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
    /// Ask for one service, such as base.v1.Watch, instead of the server as a whole
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    service: String,
    /// Ask only whether the process answers, whatever it says. While PostgreSQL is down it is alive, and not serving
    #[arg(long, conflicts_with = "service")]
    alive: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

/// For all of it. Below what container platforms give a check, so that the answer is ours.
const ANSWER_MAX: Duration = Duration::from_secs(3);

/// Prints what the server is; an error where it is not what was asked for.
pub(super) async fn run(args: &HealthArgs) -> anyhow::Result<()> {
    let server = &args.connection.server;
    let answer = tokio::time::timeout(ANSWER_MAX, ask(args)).await;
    let answer = answer.map_err(|_| anyhow!("{server} does not answer within {} s", ANSWER_MAX.as_secs()))??;
    match answer {
        // Also one that does not let us in, or asks for patience. Whatever else answers is something in between.
        Ok(_) if args.alive => say("alive"),
        Err(status) if args.alive && is_own(status.code()) => say("alive"),
        Ok((ServingStatus::Serving, _)) => say("SERVING"),
        Ok((status, reason)) => bail!("{server} is {}: {reason}", status.as_str_name()),
        Err(status) if status.code() == Code::NotFound => {
            bail!("{server} knows no service '{}', or is shutting down", args.service)
        }
        Err(status) => bail!("{server} does not say how it is: {}", Failure::of_status(&status).text()),
    }
    Ok(())
}

/// Whether a server of ours answers a health check like this.
const fn is_own(code: Code) -> bool {
    matches!(code, Code::NotFound | Code::Unauthenticated | Code::PermissionDenied | Code::ResourceExhausted)
}

/// What the server answers, be it a refusal: its status, and why it is not serving.
///
/// # Errors
/// Where there is no answer.
async fn ask(args: &HealthArgs) -> anyhow::Result<Result<(ServingStatus, String), Status>> {
    let server = &args.connection.server;
    let unreachable = |failure: Failure| anyhow!("cannot reach {server}: {}", failure.text());
    let channel = args.connection.way()?.connect().await;
    let channel: Channel = channel.map_err(|error| unreachable(Failure::of_connection(&error)))?;
    let mut request = Request::new(HealthCheckRequest { service: args.service.clone() });
    if let Some(authorization) = args.connection.authorization()? {
        request.metadata_mut().insert("authorization", authorization);
    }
    match HealthClient::new(channel).check(request).await {
        Ok(response) => {
            let reason = response.metadata().get(REASON).and_then(|reason| reason.to_str().ok());
            let reason = reason.unwrap_or("the process runs, and does not say what is in the way").to_owned();
            Ok(Ok((response.into_inner().status(), reason)))
        }
        Err(status) if is_local(&status) => Err(unreachable(Failure::of_status(&status))),
        Err(status) => Ok(Err(status)),
    }
}
