//! Messages in protobuf's JSON mapping, with the field names of the proto file.

use crate::api::grpc::proto::data_change::Type;
use crate::api::grpc::proto::{self, DataChange, DataChanges};
use serde_json::{Value as Json, json};

/// One message as one line.
pub(super) fn line(changes: &DataChanges) -> String {
    let list: Vec<Json> = changes.tuple_changes.iter().map(to_json).collect();
    format!("{}\n", json!({ "changes": { "snap_token": changes.snap_token, "tuple_changes": list } }))
}

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

pub(super) fn any_to_json(any: &prost_types::Any) -> Json {
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

/// JSON has no numbers for infinities and NaN. Protobuf's mapping writes their names.
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
    use super::super::lines::tests::{scores, viewer};
    use super::*;

    #[test]
    fn changes_are_json_objects() {
        let changes = DataChanges { snap_token: "token".into(), tuple_changes: vec![viewer(), scores()] };
        let line = line(&changes);
        let line: Json = serde_json::from_str(line.strip_suffix('\n').unwrap()).unwrap();
        assert_eq!(line["changes"]["snap_token"], "token");
        let [tuple, attribute] = &line["changes"]["tuple_changes"].as_array().unwrap()[..] else { panic!("{line}") };
        assert_eq!(tuple["tuple"]["subject"]["relation"], "member");
        assert_eq!(attribute["operation"], "OPERATION_CREATE");
        assert_eq!(attribute["attribute"]["value"]["data"], json!([1.5, "Infinity"]));
    }
}
