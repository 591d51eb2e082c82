//! Parsers for configuration values: each turns a raw value from a source into a valid one, or describes the values
//! that its key takes.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::choice::Choice;
use super::database_uri::DatabaseUri;
use super::host::Host;
use super::quantity::{ByteSize, format_duration, parse_duration};
use crate::yaml;

/// A value as a source wrote it, before validation.
pub(super) enum RawValue<'a> {
    /// A text. Every value from the environment and from flags is one.
    Text(&'a str),
    Integer(i64),
    Boolean(bool),
    /// From a file only: other sources write a list as a text with commas.
    List(&'a [yaml::Value]),
    /// From a file only.
    Section(&'a yaml::Section),
    /// A value that no key takes, described in words.
    Other(&'static str),
}

/// A description of the values that a key takes. It continues "must be".
pub(super) type Allowed = String;

impl<'a> From<&'a yaml::Value> for RawValue<'a> {
    fn from(value: &'a yaml::Value) -> Self {
        match value {
            yaml::Value::Text(text) => Self::Text(text),
            yaml::Value::Integer(number) => Self::Integer(*number),
            yaml::Value::Boolean(value) => Self::Boolean(*value),
            yaml::Value::Fraction(_) => Self::Other("a fraction"),
            yaml::Value::Null => Self::Other("empty"),
            yaml::Value::List(items) => Self::List(items),
            yaml::Value::Section(section) => Self::Section(section),
        }
    }
}

impl fmt::Display for RawValue<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Enough characters to recognize the value in an error message.
        const SHOWN_MAX: usize = 60;
        match self {
            Self::Text(text) => {
                let shown: String = text.chars().take(SHOWN_MAX).collect();
                let more = if shown.len() < text.len() { "…" } else { "" };
                write!(f, "{shown:?}{more}")
            }
            Self::Integer(number) => write!(f, "{number}"),
            Self::Boolean(value) => write!(f, "{value}"),
            Self::List(_) => f.write_str("a list"),
            Self::Section(_) => f.write_str("a section"),
            Self::Other(words) => f.write_str(words),
        }
    }
}

/// `true` or `false`.
pub(super) fn boolean(raw: &RawValue<'_>) -> Result<bool, Allowed> {
    match raw {
        RawValue::Boolean(value) => Some(*value),
        RawValue::Text(text) => text.parse().ok(),
        _ => None,
    }
    .ok_or_else(|| "true or false".to_owned())
}

/// A whole number in `range`.
pub(super) fn whole<T: TryFrom<u64>>(range: RangeInclusive<u64>) -> impl Fn(&RawValue<'_>) -> Result<T, Allowed> {
    move |raw| {
        match raw {
            RawValue::Integer(number) => u64::try_from(*number).ok(),
            RawValue::Text(text) => text.parse().ok(),
            _ => None,
        }
        .filter(|number| range.contains(number))
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| format!("a whole number from {} to {}", range.start(), range.end()))
    }
}

/// A number of bytes in `range`.
pub(super) fn size(range: RangeInclusive<ByteSize>) -> impl Fn(&RawValue<'_>) -> Result<ByteSize, Allowed> {
    move |raw| {
        match raw {
            RawValue::Integer(number) => u64::try_from(*number).ok().map(ByteSize::bytes),
            RawValue::Text(text) => ByteSize::parse(text),
            _ => None,
        }
        .filter(|size| range.contains(size))
        .ok_or_else(|| {
            format!("a size such as 512KiB, 10GB or a number of bytes, from {} to {}", range.start(), range.end())
        })
    }
}

/// A duration in `range`.
pub(super) fn duration(range: RangeInclusive<Duration>) -> impl Fn(&RawValue<'_>) -> Result<Duration, Allowed> {
    move |raw| {
        match raw {
            RawValue::Text(text) => parse_duration(text),
            _ => None,
        }
        .filter(|duration| range.contains(duration))
        .ok_or_else(|| {
            format!(
                "a duration with its unit such as 500ms, 10s or 1m30s, from {} to {}",
                format_duration(*range.start()),
                format_duration(*range.end())
            )
        })
    }
}

/// One of the words of `T`.
pub(super) fn choice<T: Choice>(raw: &RawValue<'_>) -> Result<T, Allowed> {
    let found = match raw {
        RawValue::Text(text) => T::ALL.iter().find(|choice| choice.to_string() == *text),
        _ => None,
    };
    found.copied().ok_or_else(|| {
        let words: Vec<String> = T::ALL.iter().map(ToString::to_string).collect();
        match words.as_slice() {
            [word] => word.clone(),
            _ => format!("one of {}", words.join(", ")),
        }
    })
}

/// A list of values that `item` parses. In the environment and in flags it is a text with commas.
pub(super) fn list<T>(
    item: impl Fn(&RawValue<'_>) -> Result<T, Allowed>,
) -> impl Fn(&RawValue<'_>) -> Result<Vec<T>, Allowed> {
    move |raw| {
        let items: Vec<RawValue<'_>> = match raw {
            RawValue::List(items) => items.iter().map(RawValue::from).collect(),
            RawValue::Text(text) if text.trim().is_empty() => Vec::new(),
            RawValue::Text(text) => text.split(',').map(|item| RawValue::Text(item.trim())).collect(),
            RawValue::Integer(_) | RawValue::Boolean(_) | RawValue::Section(_) | RawValue::Other(_) => {
                return Err("a list, as in [a, b], or a text with commas between the items".to_owned());
            }
        };
        let parsed = (1..).zip(&items).map(|(number, raw)| {
            item(raw).map_err(|allowed| format!("a list of which each item is {allowed}, and item {number} is not"))
        });
        parsed.collect()
    }
}

/// An address to listen on.
pub(super) fn host(raw: &RawValue<'_>) -> Result<Host, Allowed> {
    text(raw, "an IP address or a DNS name, without a port", Host::parse)
}

/// An origin as browsers send it in `Origin` (RFC 6454, section 6.2), or `*`.
pub(super) fn origin(raw: &RawValue<'_>) -> Result<String, Allowed> {
    text(raw, "an origin such as https://app.example.com (scheme, host and port only), or *", |text| {
        let is_authority = |rest: &str| {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-._:[]".contains(c);
            !rest.is_empty() && rest.chars().all(plain)
        };
        let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
        (text == "*" || host.is_some_and(is_authority)).then(|| text.to_owned())
    })
}

/// A path. The file need not exist.
pub(super) fn path(raw: &RawValue<'_>) -> Result<PathBuf, Allowed> {
    text(raw, "a path", |text| (!text.is_empty() && !text.contains('\0')).then(|| PathBuf::from(text)))
}

/// A path; an empty text means none.
pub(super) fn optional_path(raw: &RawValue<'_>) -> Result<Option<PathBuf>, Allowed> {
    match raw {
        RawValue::Text("") => Ok(None),
        _ => path(raw).map(Some),
    }
}

/// Any text; a blank one means none. The modules that connect check the URI.
pub(super) fn database_uri(raw: &RawValue<'_>) -> Result<Option<DatabaseUri>, Allowed> {
    text(raw, "a PostgreSQL URI", |text| Some((!text.trim().is_empty()).then(|| DatabaseUri::new(text))))
}

/// A name that PostgreSQL accepts for a slot (`ReplicationSlotValidateName`).
pub(super) fn slot(raw: &RawValue<'_>) -> Result<String, Allowed> {
    text(raw, "1 to 63 characters of a-z, 0-9 and _", |text| {
        let fits =
            (1..=63).contains(&text.len()) && text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'));
        fits.then(|| text.to_owned())
    })
}

/// A name that needs no escaping in the list of publications that `START_REPLICATION` takes.
pub(super) fn publication(raw: &RawValue<'_>) -> Result<String, Allowed> {
    let allowed = "1 to 63 bytes without commas, quotes or white space";
    text(raw, allowed, |text| {
        let fits = (1..=63).contains(&text.len())
            && !text.chars().any(|c| matches!(c, ',' | '"' | '\'') || c.is_whitespace() || c.is_control());
        fits.then(|| text.to_owned())
    })
}

/// The name of a schema, spelled as in the catalog.
pub(super) fn schema(raw: &RawValue<'_>) -> Result<String, Allowed> {
    let allowed = "the name of a schema, 1 to 63 bytes, not quoted";
    text(raw, allowed, |text| {
        let fits = (1..=63).contains(&text.len()) && !text.chars().any(|c| c == '"' || c.is_control());
        fits.then(|| text.to_owned())
    })
}

fn text<T>(raw: &RawValue<'_>, allowed: &str, parse: impl Fn(&str) -> Option<T>) -> Result<T, Allowed> {
    match raw {
        RawValue::Text(text) => parse(text).ok_or_else(|| allowed.to_owned()),
        // YAML reads `slot: 007` as the number 7, and the original text is lost.
        RawValue::Integer(_) | RawValue::Boolean(_) | RawValue::Other("a fraction") => {
            Err(format!("{allowed}; put it in quotes"))
        }
        RawValue::List(_) | RawValue::Section(_) | RawValue::Other(_) => Err(allowed.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_in_brackets_or_have_commas() {
        let numbers = list(whole::<u16>(0..=9));
        let wrong =
            |number| Err(format!("a list of which each item is a whole number from 0 to 9, and item {number} is not"));
        for (yaml, expected) in [
            ("[]", Ok(vec![])),
            ("[1]", Ok(vec![1])),
            ("\n- 1\n- '2'", Ok(vec![1, 2])),
            ("''", Ok(vec![])),
            ("' '", Ok(vec![])),
            ("'1, 2,3'", Ok(vec![1, 2, 3])),
            ("'1,'", wrong(2)),
            ("[1, 10]", wrong(2)),
            ("[[1]]", wrong(1)),
            ("1", Err("a list, as in [a, b], or a text with commas between the items".to_owned())),
        ] {
            let table = yaml::parse(&format!("key: {yaml}")).unwrap();
            assert_eq!(numbers(&RawValue::from(&table["key"])), expected, "{yaml}");
        }
    }
}
