//! Takes the keys out of the sources one by one, and collects the problems.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::effective::{Effective, Setting};
use super::environment::OTHER_VARIABLES;
use super::error::{Error, Problem};
use super::origin::{Name, Origin, VARIABLE_PREFIX, flag, variable};
use super::parse::{Allowed, RawValue};
use super::spelling::nearest;
use super::yaml_file::{self, Leaves};
use crate::yaml::{Section, Value};

/// All sources, without the keys that were already read.
pub(super) struct Reader {
    path: PathBuf,
    file: Leaves,
    /// Keyed by the names of the variables.
    environment: BTreeMap<String, String>,
    /// Keyed by dotted keys.
    overrides: BTreeMap<String, String>,
    /// The keys that were read, with the origin of the value in force.
    known: BTreeMap<&'static str, Origin>,
    invalid: BTreeSet<&'static str>,
    problems: Vec<Problem>,
    effective: Effective,
}

impl Reader {
    pub(super) fn new(
        path: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
        overrides: &[(String, String)],
    ) -> Self {
        let (file, problems) = path.map(yaml_file::read).unwrap_or_default();
        let environment = environment
            .into_iter()
            .filter(|(name, _)| name.starts_with(VARIABLE_PREFIX) && !OTHER_VARIABLES.contains(&name.as_str()));
        Self {
            path: path.unwrap_or(Path::new("")).to_owned(),
            file,
            environment: environment.collect(),
            overrides: overrides.iter().cloned().collect(),
            known: BTreeMap::new(),
            invalid: BTreeSet::new(),
            problems,
            effective: Effective::default(),
        }
    }

    /// Reads `key` from the source that wins. Returns `default` if no source has the key, or if its value is invalid.
    ///
    /// Each key must be read once, and the keys of one section one after the other.
    pub(super) fn get<T: Setting>(
        &mut self,
        key: &'static str,
        default: T,
        parse: impl Fn(&RawValue<'_>) -> Result<T, Allowed>,
    ) -> T {
        let (value, origin) = match self.take(key) {
            None => (default, Origin::Default),
            Some((value, origin)) => {
                let raw = RawValue::from(&value);
                let value = parse(&raw).unwrap_or_else(|allowed| {
                    let found = match raw {
                        RawValue::List(_) | RawValue::Section(_) | RawValue::Other(_) => raw.to_string(),
                        _ if T::SECRET => "not valid".to_owned(),
                        raw => raw.to_string(),
                    };
                    let name = Name { key: key.to_owned(), origin: origin.clone() };
                    self.problems.push(Problem::Invalid { name, found, allowed });
                    self.invalid.insert(key);
                    default
                });
                (value, origin)
            }
        };
        self.effective.push(key, value.to_yaml(), origin.clone());
        let before = self.known.insert(key, origin);
        assert!(before.is_none(), "each key is read once");
        value
    }

    /// Whether any source sets `key`, which must have been read before.
    pub(super) fn is_explicit(&self, key: &str) -> bool {
        self.known.get(key).is_some_and(|origin| *origin != Origin::Default)
    }

    /// Leaves `key` out of the printed configuration.
    pub(super) fn omit(&mut self, key: &str) {
        self.effective.remove(key);
    }

    /// Reports that `keys` contradict each other, unless one of them is already reported as invalid.
    pub(super) fn refuse(&mut self, keys: &[&'static str], rule: &'static str) {
        if keys.iter().any(|key| self.invalid.contains(key)) {
            return;
        }
        let names = keys
            .iter()
            .map(|key| Name { key: (*key).to_owned(), origin: self.known.get(key).cloned().unwrap_or(Origin::Default) })
            .collect();
        self.problems.push(Problem::Contradiction { names, rule });
    }

    /// Reports the keys that were never read as unknown, and returns all problems.
    pub(super) fn finish(mut self) -> Result<Effective, Error> {
        self.report_rest_of_file();
        self.report_rest_of_environment();
        self.report_rest_of_overrides();
        Error::check(self.problems)?;
        Ok(self.effective)
    }

    /// Removes `key` from every source, and returns its value from the source that wins.
    fn take(&mut self, key: &str) -> Option<(Value, Origin)> {
        let below = format!("{key}.");
        let is_section = self.file.keys().any(|leaf| leaf.starts_with(&below));
        self.file.retain(|leaf, _| !leaf.starts_with(&below));
        let in_file = match self.file.remove(key) {
            None if is_section => Some(Value::Section(Section::new())),
            leaf => leaf,
        };
        let variable = variable(key);
        let in_environment = self.environment.remove(&variable);
        if let Some(text) = self.overrides.remove(key) {
            return Some((Value::Text(text), Origin::Flag(flag(key))));
        }
        if let Some(text) = in_environment {
            return Some((Value::Text(text), Origin::Environment(variable)));
        }
        Some((in_file?, Origin::File(self.path.clone())))
    }

    fn report_rest_of_file(&mut self) {
        let names: BTreeSet<&str> = self.known.keys().flat_map(|key| with_parents(key)).collect();
        // A mistyped section is reported once, not for each key below it.
        let mut reported = BTreeSet::new();
        for (leaf, value) in std::mem::take(&mut self.file) {
            let origin = Origin::File(self.path.clone());
            let unknown = with_parents(&leaf).find(|part| !names.contains(part));
            let problem = match unknown {
                Some(key) if !reported.insert(key.to_owned()) => continue,
                Some(key) => Problem::Unknown {
                    suggestion: nearest(key, names.iter().copied()).map(|name| format!("`{name}`")),
                    name: Name { key: key.to_owned(), origin },
                },
                // A section such as `server:` whose keys are all commented out.
                None if matches!(value, Value::Null | Value::Section(_)) => continue,
                None => Problem::SectionWithValue { name: Name { key: leaf, origin } },
            };
            self.problems.push(problem);
        }
    }

    fn report_rest_of_environment(&mut self) {
        let names: Vec<String> = self.known.keys().map(|key| variable(key)).collect();
        for (name, _) in std::mem::take(&mut self.environment) {
            let suggestion = nearest(&name, names.iter().map(String::as_str)).map(str::to_owned);
            let name = Name { key: name.clone(), origin: Origin::Environment(name) };
            self.problems.push(Problem::Unknown { name, suggestion });
        }
    }

    fn report_rest_of_overrides(&mut self) {
        for (key, _) in std::mem::take(&mut self.overrides) {
            let suggestion = nearest(&key, self.known.keys().copied()).map(flag);
            let name = Name { origin: Origin::Flag(flag(&key)), key };
            self.problems.push(Problem::Unknown { name, suggestion });
        }
    }
}

/// `a`, `a.b` and `a.b.c` for `a.b.c`.
fn with_parents(key: &str) -> impl Iterator<Item = &str> {
    let parents = key.match_indices('.').filter_map(|(dot, _)| key.get(..dot));
    parents.chain(std::iter::once(key))
}
