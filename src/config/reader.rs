//! Takes the keys out of the sources one by one, and remembers what did not fit.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::document::{self, Leaves};
use super::effective::{Effective, Setting};
use super::environment::OTHER_VARIABLES;
use super::error::{Error, Problem};
use super::given::{Allowed, Given};
use super::origin::{Name, Origin, VARIABLE_PREFIX, flag, variable};
use super::spelling::nearest;
use crate::yaml::{Section, Value};

/// All sources, less the keys that were already read.
pub(super) struct Reader {
    path: PathBuf,
    file: Leaves,
    /// By the names of the variables.
    environment: BTreeMap<String, String>,
    /// By dotted keys.
    overrides: BTreeMap<String, String>,
    /// The keys that exist, with the origin of the value in force.
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
        let (file, problems) = path.map(document::read).unwrap_or_default();
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

    /// The value of `key` from the source that wins; `default` where no source has it, or where it is not valid.
    ///
    /// Each key is read once, and keys of one section one after the other.
    pub(super) fn get<T: Setting>(
        &mut self,
        key: &'static str,
        default: T,
        parse: impl Fn(&Given<'_>) -> Result<T, Allowed>,
    ) -> T {
        let (value, origin) = match self.take(key) {
            None => (default, Origin::Default),
            Some((given, origin)) => {
                let given = Given::from(&given);
                let value = parse(&given).unwrap_or_else(|allowed| {
                    let found = match given {
                        Given::List(_) | Given::Section(_) | Given::Other(_) => given.to_string(),
                        _ if T::SECRET => "not valid".to_owned(),
                        given => given.to_string(),
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

    /// Whether any source has `key`, which was read before.
    pub(super) fn is_explicit(&self, key: &str) -> bool {
        self.known.get(key).is_some_and(|origin| *origin != Origin::Default)
    }

    /// Does not print `key`.
    pub(super) fn omit(&mut self, key: &str) {
        self.effective.remove(key);
    }

    /// Reports that `keys` do not go together, unless one of them was already reported as invalid.
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

    /// Reports what was never asked for, and everything else.
    pub(super) fn finish(mut self) -> Result<Effective, Error> {
        self.report_rest_of_file();
        self.report_rest_of_environment();
        self.report_rest_of_overrides();
        Error::check(self.problems)?;
        Ok(self.effective)
    }

    /// Removes `key` from every source and returns it from the last one.
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
        // A mistyped section is reported once and not again for each key below it.
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
                // `server:` with all its keys commented out.
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
