//! `tuplewatch watch`: prints a tenant's changes as they come, and resumes by itself.

use super::connection::ConnectionArgs;
use super::{say, say_error, stop_signal};
use crate::grpc::proto::data_change::{Operation, Type};
use crate::grpc::proto::watch_client::WatchClient;
use crate::grpc::proto::{self, DataChange, DataChanges, WatchRequest};
use crate::grpc::status::NEXT_SNAP_TOKEN;
use crate::snap_token::SnapToken;
use anyhow::anyhow;
use serde_json::{Value as Json, json};
use std::io::IsTerminal;
use std::time::Duration;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  tuplewatch watch --tenant t1\n  tuplewatch watch --tenant t1 --output json | jq ."
)]
pub(super) struct WatchArgs {
    /// Whose changes to print
    #[arg(long, short)]
    tenant: String,
    /// Start after this token instead of now
    #[arg(long, value_name = "TOKEN")]
    snap_token: Option<String>,
    #[command(flatten)]
    connection: ConnectionArgs,
    /// For people, or one JSON object a line
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Text,
    Json,
}

const WAIT_MIN: Duration = Duration::from_millis(100);
const WAIT_MAX: Duration = Duration::from_secs(5);
pub(super) async fn run(args: WatchArgs) -> anyhow::Result<()> {
    let endpoint = args.connection.endpoint()?;
    tokio::select! {
        ended = follow(&args, endpoint) => ended,
        () = stop_signal() => Ok(()),
    }
}

async fn follow(args: &WatchArgs, endpoint: Endpoint) -> anyhow::Result<()> {
    let mut token = args.snap_token.clone().unwrap_or_default();
    let mut wait = WAIT_MIN;
    let mut lost = false;
    loop {
        let authorization = args.connection.authorization()?;
        let status = match stream(args, &endpoint, authorization.clone(), &mut token, &mut wait, &mut lost).await {
            Ok(()) => Status::unavailable("the server ended the stream"),
            Err(status) => status,
        };
        match status.code() {
            // What passes: a server that restarts, a network that comes and goes.
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal | Code::ResourceExhausted => {
                if !lost {
                    say_error(&format!("{}: {}; reconnecting", args.connection.server, reason(&status)));
                }
                lost = true;
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(WAIT_MAX);
            }
            // Expired, and renewed in the meantime.
            Code::Unauthenticated if args.connection.authorization()? != authorization => lost = true,
            // A gap: said loudly, and gone on after it, as a person at a terminal would.
            Code::Aborted => {
                let details = status.get_error_details();
                let next = details.error_info().and_then(|info| info.metadata.get(NEXT_SNAP_TOKEN)).cloned();
                say_error(&format!("GAP: {}", status.message()));
                token = next.ok_or_else(|| anyhow!("the server gave no token to go on from"))?;
            }
            _ => return Err(anyhow!("{}", status.message()).context(format!("the server refused ({})", status.code()))),
        }
    }
}

/// The status with its causes, each said once.
fn reason(status: &Status) -> String {
    let mut parts = vec![status.message().to_owned()];
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let text = error.to_string();
        if !parts.contains(&text) {
            parts.push(text);
        }
        cause = error.source();
    }
    parts.join(": ")
}

async fn stream(
    args: &WatchArgs,
    endpoint: &Endpoint,
    authorization: Option<AsciiMetadataValue>,
    token: &mut String,
    wait: &mut Duration,
    lost: &mut bool,
) -> Result<(), Status> {
    let channel: Channel = endpoint.connect().await.map_err(|error| Status::from_error(Box::new(error)))?;
    let mut client = WatchClient::new(channel);
    let mut request = Request::new(WatchRequest { tenant_id: args.tenant.clone(), snap_token: token.clone() });
    if let Some(authorization) = authorization {
        request.metadata_mut().insert("authorization", authorization);
    }
    let mut responses = client.watch(request).await?.into_inner();
    if *lost {
        let how = if token.is_empty() { "from now on" } else { "after the last token" };
        say_error(&format!("connected again, resuming {how}"));
    }
    (*lost, *wait) = (false, WAIT_MIN);
    while let Some(response) = responses.message().await? {
        let changes = response.changes.unwrap_or_default();
        print(args.output, &changes);
        *token = changes.snap_token;
    }
    Ok(())
}

fn print(output: Output, changes: &DataChanges) {
    match output {
        Output::Json => {
            let list: Vec<Json> = changes.tuple_changes.iter().map(to_json).collect();
            say(&json!({ "changes": { "snap_token": changes.snap_token, "tuple_changes": list } }).to_string());
        }
        Output::Text => {
            let colour = std::io::stdout().is_terminal();
            let time = match changes.snap_token.parse() {
                Ok(SnapToken::Position { commit_time, .. }) => commit_time.to_string(),
                _ => String::new(),
            };
            for change in &changes.tuple_changes {
                say(&to_line(&time, change, colour));
            }
        }
    }
}

fn to_line(time: &str, change: &DataChange, colour: bool) -> String {
    let (sign, code) = match change.operation() {
        Operation::Create => ("+", "32"),
        Operation::Delete => ("-", "31"),
        Operation::Unspecified => ("?", "33"),
    };
    let what = match &change.r#type {
        Some(Type::Tuple(tuple)) => {
            let subject = tuple.subject.clone().unwrap_or_default();
            let relation = if subject.relation.is_empty() { String::new() } else { format!("#{}", subject.relation) };
            format!("{}#{}@{}:{}{relation}", entity(tuple.entity.as_ref()), tuple.relation, subject.r#type, subject.id)
        }
        Some(Type::Attribute(attribute)) => {
            let value = attribute.value.as_ref().map_or(Json::Null, any_to_json);
            let data = value.get("data").unwrap_or(&Json::Null);
            format!("{}${} = {data}", entity(attribute.entity.as_ref()), attribute.attribute)
        }
        None => "an empty change".to_owned(),
    };
    if colour {
        format!("\x1b[2m{time}\x1b[0m \x1b[{code}m{sign} {what}\x1b[0m")
    } else {
        format!("{time} {sign} {what}")
    }
}

fn entity(entity: Option<&proto::Entity>) -> String {
    entity.map_or_else(String::new, |entity| format!("{}:{}", entity.r#type, entity.id))
}

/// As protobuf's JSON mapping has it, with the proto's field names.
fn to_json(change: &DataChange) -> Json {
    let operation = change.operation().as_str_name();
    let entity = |entity: Option<&proto::Entity>| {
        entity.map_or(Json::Null, |entity| json!({ "type": entity.r#type, "id": entity.id }))
    };
    match &change.r#type {
        Some(Type::Tuple(tuple)) => {
            let subject = tuple.subject.clone().unwrap_or_default();
            json!({ "operation": operation, "tuple": {
                "entity": entity(tuple.entity.as_ref()),
                "relation": tuple.relation,
                "subject": { "type": subject.r#type, "id": subject.id, "relation": subject.relation },
            }})
        }
        Some(Type::Attribute(attribute)) => json!({ "operation": operation, "attribute": {
            "entity": entity(attribute.entity.as_ref()),
            "attribute": attribute.attribute,
            "value": attribute.value.as_ref().map_or(Json::Null, any_to_json),
        }}),
        None => json!({ "operation": operation }),
    }
}

fn any_to_json(any: &prost_types::Any) -> Json {
    fn data<M: prost::Message + Default>(any: &prost_types::Any, read: impl FnOnce(M) -> Json) -> Json {
        M::decode(&*any.value).map_or(Json::Null, read)
    }
    let data = match any.type_url.rsplit('.').next().unwrap_or_default() {
        "StringValue" => data(any, |m: proto::StringValue| json!(m.data)),
        "IntegerValue" => data(any, |m: proto::IntegerValue| json!(m.data)),
        "DoubleValue" => data(any, |m: proto::DoubleValue| double(m.data)),
        "BooleanValue" => data(any, |m: proto::BooleanValue| json!(m.data)),
        "StringArrayValue" => data(any, |m: proto::StringArrayValue| json!(m.data)),
        "IntegerArrayValue" => data(any, |m: proto::IntegerArrayValue| json!(m.data)),
        "DoubleArrayValue" => data(any, |m: proto::DoubleArrayValue| m.data.into_iter().map(double).collect()),
        "BooleanArrayValue" => data(any, |m: proto::BooleanArrayValue| json!(m.data)),
        _ => Json::Null,
    };
    json!({ "@type": any.type_url, "data": data })
}

/// JSON has no numbers for these; protobuf's mapping writes their names.
fn double(value: f64) -> Json {
    if value.is_finite() {
        json!(value)
    } else if value.is_nan() {
        json!("NaN")
    } else if value > 0.0 {
        json!("Infinity")
    } else {
        json!("-Infinity")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Attribute, AttributeValue, Fact, Tuple, encode, encode_watch_response};
    use prost::Message as _;

    fn change(fact: &Fact<'_>) -> DataChange {
        let mut bytes = Vec::new();
        encode(crate::change::Operation::Create, fact, &mut bytes);
        let response = proto::WatchResponse::decode(&*encode_watch_response("t", &bytes)).unwrap();
        response.changes.unwrap().tuple_changes.remove(0)
    }

    #[test]
    fn lines() {
        let (entity_type, entity_id) = ("doc", "1");
        let tuple = Tuple {
            entity_type,
            entity_id,
            relation: "viewer",
            subject_type: "team",
            subject_id: "a",
            subject_relation: "member",
        };
        let tuple = change(&Fact::Tuple(tuple));
        assert_eq!(to_line("now", &tuple, false), "now + doc:1#viewer@team:a#member");
        assert_eq!(to_json(&tuple)["tuple"]["subject"]["relation"], "member");
        let value = AttributeValue::DoubleArray(vec![1.5, f64::INFINITY]);
        let attribute = change(&Fact::Attribute(Attribute { entity_type, entity_id, attribute: "scores", value }));
        assert_eq!(to_line("now", &attribute, false), r#"now + doc:1$scores = [1.5,"Infinity"]"#);
        assert_eq!(to_json(&attribute)["operation"], "OPERATION_CREATE");
    }
}
