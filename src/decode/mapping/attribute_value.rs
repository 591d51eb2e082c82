//! Converts attribute values from and to Permify's JSON form,
//! `{"@type": "type.googleapis.com/base.v1.BooleanValue", "data": true}`.

use crate::model::change::{AttributeValue, TYPE_URL_PREFIX};
use serde::Deserialize;
use serde_json::Value as Json;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Form<'a> {
    #[serde(rename = "@type", borrow)]
    kind: std::borrow::Cow<'a, str>,
    /// Absent if the value is the default of its type, as in protobuf's JSON mapping.
    data: Option<Json>,
}

/// What is wrong with the form of a value. The message never has its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The text is not JSON.
    #[error("the value is not JSON (line {line}, column {column})")]
    Json {
        /// Counted from 1.
        line: usize,
        /// Counted from 1.
        column: usize,
    },
    /// It is JSON of another form.
    #[error("the value is not an object of just '@type' and 'data'")]
    Form,
    /// The name of a type is no user data, but it may be anything, and long: it is not repeated.
    #[error("the value's '@type' is none of base.v1's eight value messages")]
    Type,
    /// `data` is not of this type.
    #[error("the value's 'data' does not fit its '@type' {0}")]
    Data(&'static str),
}

/// Reads one value.
///
/// # Errors
/// Where the value has not Permify's form.
pub fn parse(json: &str) -> Result<AttributeValue, Error> {
    let form: Form<'_> = serde_json::from_str(json).map_err(|error| match error.classify() {
        serde_json::error::Category::Data => Error::Form,
        _ => Error::Json { line: error.line(), column: error.column() },
    })?;
    let name = form.kind.strip_prefix(TYPE_URL_PREFIX).unwrap_or_default();
    let data = form.data.unwrap_or(Json::Null);
    let (name, value) = match name {
        "StringValue" => ("StringValue", or_default(data, string).map(AttributeValue::String)),
        "IntegerValue" => ("IntegerValue", or_default(data, integer).map(AttributeValue::Integer)),
        "DoubleValue" => ("DoubleValue", or_default(data, double).map(AttributeValue::Double)),
        "BooleanValue" => ("BooleanValue", or_default(data, boolean).map(AttributeValue::Boolean)),
        "StringArrayValue" => ("StringArrayValue", array(data, string).map(AttributeValue::StringArray)),
        "IntegerArrayValue" => ("IntegerArrayValue", array(data, integer).map(AttributeValue::IntegerArray)),
        "DoubleArrayValue" => ("DoubleArrayValue", array(data, double).map(AttributeValue::DoubleArray)),
        "BooleanArrayValue" => ("BooleanArrayValue", array(data, boolean).map(AttributeValue::BooleanArray)),
        _ => return Err(Error::Type),
    };
    value.ok_or(Error::Data(name))
}

/// Writes a value.
pub fn write(value: &AttributeValue) -> String {
    use AttributeValue as V;
    let data = match value {
        V::String(text) => Json::from(text.as_str()),
        V::Integer(number) => Json::from(*number),
        V::Double(number) => from_double(*number),
        V::Boolean(truth) => Json::from(*truth),
        V::StringArray(texts) => Json::from(texts.as_slice()),
        V::IntegerArray(numbers) => Json::from(numbers.as_slice()),
        V::DoubleArray(numbers) => numbers.iter().copied().map(from_double).collect(),
        V::BooleanArray(truths) => Json::from(truths.as_slice()),
    };
    serde_json::json!({ "@type": format!("{TYPE_URL_PREFIX}{}", value.message_name()), "data": data }).to_string()
}

/// JSON has no numbers for infinities and NaN. Protobuf's JSON mapping writes their names.
fn from_double(number: f64) -> Json {
    match number {
        number if number.is_nan() => Json::from("NaN"),
        f64::INFINITY => Json::from("Infinity"),
        f64::NEG_INFINITY => Json::from("-Infinity"),
        number => Json::from(number),
    }
}

fn or_default<T: Default>(data: Json, read: fn(Json) -> Option<T>) -> Option<T> {
    if data.is_null() { Some(T::default()) } else { read(data) }
}

fn array<T>(data: Json, read: fn(Json) -> Option<T>) -> Option<Vec<T>> {
    match data {
        Json::Null => Some(Vec::new()),
        Json::Array(items) => items.into_iter().map(read).collect(),
        _ => None,
    }
}

fn string(data: Json) -> Option<String> {
    if let Json::String(text) = data { Some(text) } else { None }
}

fn boolean(data: Json) -> Option<bool> {
    data.as_bool()
}

/// A whole number, also if it is written with a fraction of zero: `jsonb` keeps `1.0`.
fn integer(data: Json) -> Option<i32> {
    if let Some(whole) = data.as_i64() {
        return i32::try_from(whole).ok();
    }
    let number = data.as_f64()?;
    let in_range = number.fract() == 0.0 && number >= f64::from(i32::MIN) && number <= f64::from(i32::MAX);
    #[expect(clippy::cast_possible_truncation, reason = "checked to be whole and in range")]
    in_range.then_some(number as i32)
}

fn double(data: Json) -> Option<f64> {
    match data {
        Json::Number(number) => number.as_f64(),
        Json::String(text) => match text.as_str() {
            "NaN" => Some(f64::NAN),
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(kind: &str, data: &str) -> Result<AttributeValue, Error> {
        parse(&format!(r#"{{"@type": "{TYPE_URL_PREFIX}{kind}", "data": {data}}}"#))
    }

    #[test]
    fn all_types_of_values_are_parsed() {
        use AttributeValue as V;
        let check = |kind: &str, data: &str, expected: V| assert_eq!(of(kind, data), Ok(expected));
        check("StringValue", r#""é""#, V::String("é".into()));
        check("IntegerValue", "-7", V::Integer(-7));
        check("IntegerValue", "7.0", V::Integer(7));
        check("DoubleValue", "2", V::Double(2.0));
        check("DoubleValue", r#""-Infinity""#, V::Double(f64::NEG_INFINITY));
        check("BooleanValue", "true", V::Boolean(true));
        check("StringArrayValue", r#"["a", ""]"#, V::StringArray(vec!["a".into(), String::new()]));
        check("IntegerArrayValue", "[1, 2]", V::IntegerArray(vec![1, 2]));
        check("DoubleArrayValue", "[]", V::DoubleArray(vec![]));
        check("BooleanArrayValue", "[false]", V::BooleanArray(vec![false]));
        assert_eq!(write(&V::Boolean(true)), r#"{"@type":"type.googleapis.com/base.v1.BooleanValue","data":true}"#);
        let default = format!(r#"{{"@type": "{TYPE_URL_PREFIX}BooleanValue"}}"#);
        assert_eq!(parse(&default), Ok(V::Boolean(false)));
    }

    proptest! {
        #[test]
        fn written_values_read_back(
            text in ".*", number in any::<i32>(), double in any::<f64>(), truth in any::<bool>(), n in 0usize..4
        ) {
            use AttributeValue as V;
            for value in [
                V::String(text.clone()), V::Integer(number), V::Double(double), V::Boolean(truth),
                V::StringArray(vec![text; n]), V::IntegerArray(vec![number; n]),
                V::DoubleArray(vec![double; n]), V::BooleanArray(vec![truth; n]),
            ] {
                prop_assert_eq!(parse(&write(&value)), Ok(value));
            }
        }
    }

    #[test]
    fn non_finite_numbers_read_back() {
        let numbers = vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
        let read = parse(&write(&AttributeValue::DoubleArray(numbers)));
        let Ok(AttributeValue::DoubleArray(read)) = read else { panic!("{read:?}") };
        assert!(read[0].is_nan() && read[1..] == [f64::INFINITY, f64::NEG_INFINITY]);
    }

    #[test]
    fn malformed_values_are_refused() {
        for (kind, data) in [
            ("IntegerValue", "1.5"),
            ("IntegerValue", "2147483648"),
            ("IntegerValue", r#""1""#),
            ("DoubleValue", r#""nan""#),
            ("BooleanValue", "1"),
            ("StringArrayValue", "[1]"),
            ("StringArrayValue", r#""a""#),
            ("OtherValue", "1"),
            ("DoubleValue", "1e999"),
        ] {
            assert!(of(kind, data).is_err(), "{kind} {data}");
        }
        for json in
            ["", "1", "[]", "{}", r#"{"data": 1}"#, r#"{"@type": 1}"#, r#"{"@type": "x", "data": 1, "more": 2}"#]
        {
            assert!(parse(json).is_err(), "{json}");
        }
        assert!(parse(&"[".repeat(100_000)).is_err());
    }
}
