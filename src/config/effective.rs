//! The configuration in force, printed in a form that people can read and compare, and that loads again.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::choice::Choice;
use super::database_uri::DatabaseUri;
use super::host::Host;
use super::origin::Origin;
use super::quantity::{ByteSize, format_duration};
use crate::yaml;

/// The values in force with their origins. `Display` writes YAML and redacts secrets.
#[derive(Clone, Debug, Default)]
pub(crate) struct Effective {
    lines: Vec<Line>,
}

#[derive(Clone, Debug)]
struct Line {
    key: &'static str,
    /// The value in YAML.
    value: String,
    origin: Origin,
}

impl Effective {
    /// Every key in the order of the document, with its value in YAML and secrets redacted.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.lines.iter().map(|line| (line.key, line.value.as_str()))
    }

    /// Whether no source sets `key`.
    pub(crate) fn is_default(&self, key: &str) -> bool {
        self.lines.iter().any(|line| line.key == key && line.origin == Origin::Default)
    }

    pub(super) fn push(&mut self, key: &'static str, value: String, origin: Origin) {
        self.lines.push(Line { key, value, origin });
    }

    pub(super) fn remove(&mut self, key: &str) {
        self.lines.retain(|line| line.key != key);
    }
}

impl fmt::Display for Effective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut open: Vec<&str> = Vec::new();
        for Line { key, value, origin } in &self.lines {
            let mut sections: Vec<&str> = key.split('.').collect();
            let Some(last) = sections.pop() else { continue };
            let shared = open.iter().zip(&sections).take_while(|(left, right)| left == right).count();
            for (depth, section) in sections.iter().enumerate().skip(shared) {
                writeln!(f, "{:indent$}{section}:", "", indent = 2 * depth)?;
            }
            let indent = 2 * sections.len();
            writeln!(f, "{:indent$}{last}: {value} # {origin}", "")?;
            open = sections;
        }
        Ok(())
    }
}

/// The value of a key.
pub(super) trait Setting {
    /// Whether to keep the value out of error messages.
    const SECRET: bool = false;

    fn to_yaml(&self) -> String;
}

/// Types that YAML reads back without quotes.
macro_rules! plain_settings {
    ($($type:ty),+) => {
        $(impl Setting for $type {
            fn to_yaml(&self) -> String {
                self.to_string()
            }
        })+
    };
}

plain_settings!(bool, u16, u32, usize, ByteSize);

impl Setting for Duration {
    fn to_yaml(&self) -> String {
        format_duration(*self)
    }
}

impl Setting for String {
    fn to_yaml(&self) -> String {
        yaml_string(self)
    }
}

impl Setting for Host {
    fn to_yaml(&self) -> String {
        yaml_string(self.as_str())
    }
}

impl Setting for PathBuf {
    fn to_yaml(&self) -> String {
        yaml_string(&self.to_string_lossy())
    }
}

impl Setting for Option<PathBuf> {
    fn to_yaml(&self) -> String {
        self.clone().unwrap_or_default().to_yaml()
    }
}

impl<T: Setting> Setting for Vec<T> {
    const SECRET: bool = T::SECRET;

    fn to_yaml(&self) -> String {
        let items: Vec<String> = self.iter().map(T::to_yaml).collect();
        format!("[{}]", items.join(", "))
    }
}

impl Setting for Option<DatabaseUri> {
    const SECRET: bool = true;

    fn to_yaml(&self) -> String {
        yaml_string(&self.as_ref().map_or_else(String::new, DatabaseUri::to_string))
    }
}

impl<T: Choice> Setting for T {
    fn to_yaml(&self) -> String {
        yaml_string(&self.to_string())
    }
}

/// Writes `text` as a YAML string: bare if it reads back as the same string, else in double quotes.
pub(super) fn yaml_string(text: &str) -> String {
    let has_plain_letters = text.chars().all(|c| c.is_ascii_alphanumeric() || "._/:+-".contains(c));
    let reads_back = || {
        let table = yaml::parse(&format!("key: {text}")).ok()?;
        Some(matches!(table.get("key")?, yaml::Value::Text(read) if read == text))
    };
    if has_plain_letters && reads_back() == Some(true) {
        return text.to_owned();
    }
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_read_back_as_they_were() {
        for (text, yaml) in [
            ("info", "info"),
            ("0.0.0.0", "0.0.0.0"),
            ("./data", "./data"),
            ("", "\"\""),
            ("123", "\"123\""),
            ("1e3", "\"1e3\""),
            ("true", "\"true\""),
            ("null", "\"null\""),
            ("-", "\"-\""),
            ("::", "\"::\""),
            ("a b", "\"a b\""),
            ("a\n\"\\\u{7}é", "\"a\\u000a\\\"\\\\\\u0007é\""),
            ("\u{85}", "\"\\u0085\""),
            ("#a", "\"#a\""),
        ] {
            let written = yaml_string(text);
            let table = yaml::parse(&format!("key: {written} # x")).unwrap();
            assert_eq!(table["key"], yaml::Value::Text(text.into()), "{written}");
            if text != "::" {
                assert_eq!(written, yaml);
            }
            // The same strings as items of a list.
            let texts = vec![text.to_owned(), "https://a.example:8443".to_owned()];
            let table = yaml::parse(&format!("key: {} # x", texts.to_yaml())).unwrap();
            assert_eq!(table["key"], yaml::Value::List(texts.into_iter().map(yaml::Value::Text).collect()));
        }
    }
}
