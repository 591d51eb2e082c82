//! Holds the dependency rules of ARCHITECTURE.md: reads every path that a module names, and says which it may.

#![expect(clippy::unwrap_used, reason = "a test that cannot read the sources fails where it is")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Rooms without tokio, I/O, clock or logging.
const PURE: [&str; 2] = ["model", "decode"];

/// What each room of `src` may use of the others.
const MAY_USE: [(&str, &[&str]); 20] = [
    ("model", &[]),
    ("decode", &["model"]),
    ("yaml", &[]),
    ("metrics", &[]),
    ("thread", &[]),
    ("config", &["model", "yaml"]),
    ("access", &["config"]),
    ("postgres", &["access", "decode", "model"]),
    ("changelog", &["decode", "metrics", "model"]),
    ("replication", &["changelog", "decode", "metrics", "model", "postgres"]),
    ("hub", &["changelog", "metrics", "model"]),
    ("store", &["decode", "model", "postgres"]),
    ("admin", &["decode", "model", "postgres"]),
    ("api", &["access", "config", "hub", "metrics", "model", "store", "thread"]),
    ("dev_postgres", &[]),
    (
        "app",
        &[
            "access",
            "admin",
            "api",
            "changelog",
            "config",
            "decode",
            "hub",
            "metrics",
            "model",
            "postgres",
            "replication",
            "store",
            "thread",
            "yaml",
        ],
    ),
    ("cli", &["access", "admin", "api", "app", "config", "decode", "dev_postgres", "model"]),
    ("simulation", &["api", "app", "changelog", "decode", "hub", "model", "postgres", "replication", "yaml"]),
    ("lib", &[]),
    ("main", &[]),
];

/// Crates that only some places may name: rooms, or files and folders in them.
const CONFINED: [(&str, &[&str]); 19] = [
    ("pgwire_replication", &["postgres"]),
    ("tokio_postgres", &["admin", "app/primary", "postgres", "replication/upstream/walsender", "store"]),
    ("deadpool", &["store"]),
    ("fjall", &["changelog/local"]),
    ("tonic", &["api/grpc", "api/http", "cli"]),
    ("axum", &["api/http"]),
    ("hyper", &["api/http"]),
    ("prost_reflect", &["api/http"]),
    ("jsonwebtoken", &["access/authn"]),
    ("hyper_util", &["access/authn", "api/http", "cli"]),
    ("governor", &["access"]),
    ("clap", &["cli"]),
    ("clap_complete", &["cli"]),
    ("anstyle", &["cli"]),
    ("anstream", &["cli"]),
    ("prometheus", &["metrics"]),
    ("anyhow", &["app", "cli"]),
    ("tracing_subscriber", &["cli"]),
    ("yaml_rust2", &["yaml"]),
];

/// What `api` may name only where a protocol is spoken.
const PROTOCOL_CRATES: [&str; 11] = [
    "axum",
    "h2",
    "http",
    "http_body",
    "hyper",
    "hyper_util",
    "prost",
    "tonic",
    "tonic_types",
    "tower_layer",
    "tower_service",
];
const PROTOCOLS: [&str; 3] = ["api/grpc", "api/http", "api/encode"];

/// What pure rooms may not name.
const IMPURE: [&str; 11] = [
    "tokio",
    "tracing",
    "std::fs",
    "std::net",
    "std::io",
    "std::env",
    "std::process",
    "std::thread",
    "Instant::now",
    "SystemTime::now",
    "fastrand",
];

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The path of a file's module, as `["hub", "window"]`.
fn module(root: &Path, path: &Path) -> Vec<String> {
    let path = path.strip_prefix(root).unwrap().with_extension("");
    path.components().map(|part| part.as_os_str().to_str().unwrap().to_owned()).collect()
}

/// Code without comments and tests.
fn code(path: &Path) -> String {
    let tests = ["tests.rs", "changelog/reference.rs", "conformance.rs", "test_postgres.rs"];
    let is_test = tests.iter().any(|test| path.ends_with(test));
    if is_test {
        return String::new();
    }
    let text = std::fs::read_to_string(path).unwrap();
    let tests = ["#[cfg(test)]\nmod tests {", "#[cfg(test)]\npub(crate) mod tests {"];
    let text = tests.iter().find_map(|tests| text.split_once(tests)).map_or(text.as_str(), |(code, _)| code);
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// Whether `name`, a crate or a path of one, stands in the code as the beginning of a path.
fn names(code: &str, name: &str) -> bool {
    let wanted: Vec<&str> = name.split("::").collect();
    let start = wanted.first().unwrap();
    code.match_indices(start).any(|(at, _)| {
        let word = |c: char| c.is_alphanumeric() || c == '_';
        let before = code[..at].chars().next_back();
        let after = &code[at + start.len()..];
        if before.is_some_and(|c| word(c) || matches!(c, '"' | '.' | ':')) || after.starts_with(word) {
            return false;
        }
        let is_used = after.starts_with("::") || code[..at].ends_with("use ");
        let mut found = Vec::new();
        expand(&code[at..], Vec::new(), &mut found);
        is_used && found.iter().any(|path| path.iter().zip(&wanted).filter(|(a, b)| a == b).count() == wanted.len())
    })
}

/// The paths that begin with `crate::` or `super::`, also those in braces: `crate::{a::B, c}` is two.
fn paths(code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for start in ["crate::", "super::"] {
        for (at, _) in code.match_indices(start) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || matches!(c, '_' | '$' | ':')) {
                continue;
            }
            expand(&code[at..], Vec::new(), &mut found);
        }
    }
    found
}

/// Reads one path, or one for each part in braces, and returns what follows.
fn expand<'a>(mut code: &'a str, mut path: Vec<String>, found: &mut Vec<Vec<String>>) -> &'a str {
    loop {
        code = code.trim_start();
        if let Some(mut inner) = code.strip_prefix('{') {
            loop {
                inner = expand(inner, path.clone(), found).trim_start();
                match inner.strip_prefix(',') {
                    Some(next) if !next.trim_start().starts_with('}') => inner = next,
                    _ => break,
                }
            }
            let rest = inner.trim_start_matches(',').trim_start();
            return rest.strip_prefix('}').unwrap_or(rest);
        }
        let end = code.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(code.len());
        let (name, rest) = code.split_at(end);
        if name.is_empty() {
            // A glob, say.
            found.push(path);
            return rest.strip_prefix('*').unwrap_or(rest);
        }
        path.push(name.to_owned());
        match rest.strip_prefix("::") {
            Some(more) => code = more,
            None => {
                found.push(path);
                return rest;
            }
        }
    }
}

/// The module that a path leads to, seen from `own`: as deep as there are files.
fn resolve(own: &[String], path: &[String], modules: &BTreeSet<Vec<String>>) -> Vec<String> {
    let mut at = own.to_vec();
    for name in path {
        match name.as_str() {
            "crate" => at.clear(),
            "super" => drop(at.pop()),
            _ => {
                at.push(name.clone());
                if !modules.contains(&at) {
                    at.pop();
                    break;
                }
            }
        }
    }
    at
}

/// Every module, and the modules that it names.
fn dependencies(root: &Path) -> BTreeMap<Vec<String>, BTreeSet<Vec<String>>> {
    let mut files = Vec::new();
    sources(root, &mut files);
    assert!(files.len() > 20, "the sources were not found");
    let modules: BTreeSet<_> = files.iter().map(|file| module(root, file)).collect();
    let named = |file: &PathBuf| {
        let own = module(root, file);
        let named = paths(&code(file)).iter().map(|path| resolve(&own, path, &modules)).collect();
        (own, named)
    };
    files.iter().map(named).collect()
}

#[test]
fn modules_use_only_modules_below_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    for (own, named) in dependencies(&root) {
        let shown = own.join("::");
        let Some((_, may)) = MAY_USE.iter().find(|(room, _)| own[0] == *room) else {
            wrong.push(format!("{shown}: this room has no rule: give it one in tests/architecture.rs"));
            continue;
        };
        let rooms: BTreeSet<_> = named.iter().filter_map(|module| module.first()).collect();
        for used in rooms {
            if *used != own[0] && !may.contains(&used.as_str()) {
                wrong.push(format!("{shown} uses {used}"));
            }
        }
    }
    assert!(wrong.is_empty(), "dependency rules are broken:\n{}", wrong.join("\n"));
}

#[test]
fn each_crate_is_used_only_by_its_module() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    let mut wrong = Vec::new();
    for file in files {
        let (own, code) = (module(&root, &file).join("/"), code(&file));
        let is_in = |home: &str| own.strip_prefix(home).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        for (confined, homes) in CONFINED {
            if names(&code, confined) && !homes.iter().any(|home| is_in(home)) {
                wrong.push(format!("{own} names {confined}"));
            }
        }
        for protocol in PROTOCOL_CRATES {
            if is_in("api") && !PROTOCOLS.iter().any(|home| is_in(home)) && names(&code, protocol) {
                wrong.push(format!("{own} is of no protocol and names {protocol}"));
            }
        }
        for impure in IMPURE {
            if PURE.iter().any(|room| is_in(room)) && names(&code, impure) {
                wrong.push(format!("{own} is pure and names {impure}"));
            }
        }
    }
    assert!(wrong.is_empty(), "dependency rules are broken:\n{}", wrong.join("\n"));
}

/// Of the modules of one parent, each with all that is inside it, no two need each other, directly or through others.
#[test]
fn no_two_modules_depend_on_each_other() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut siblings: BTreeMap<Vec<String>, BTreeSet<Vec<String>>> = BTreeMap::new();
    for (own, named) in dependencies(&root) {
        for other in named {
            let common = own.iter().zip(&other).take_while(|(a, b)| a == b).count();
            // Between a module and those inside it, anything goes.
            if let (Some(from), Some(to)) = (own.get(..=common), other.get(..=common)) {
                siblings.entry(from.to_vec()).or_default().insert(to.to_vec());
            }
        }
    }
    let mut cycles = Vec::new();
    for start in siblings.keys() {
        let (mut seen, mut waiting) = (BTreeSet::new(), vec![vec![start]]);
        while let Some(way) = waiting.pop() {
            for next in siblings.get(*way.last().unwrap()).into_iter().flatten() {
                let mut way = way.clone();
                way.push(next);
                if next == start {
                    cycles.push(way.iter().map(|module| module.join("::")).collect::<Vec<_>>().join(" → "));
                } else if seen.insert(next) {
                    waiting.push(way);
                }
            }
        }
    }
    assert!(cycles.is_empty(), "modules need each other:\n{}", cycles.join("\n"));
}

/// The tables of the `tuples` preset are known to its mapping and to its store.
#[test]
fn only_the_preset_and_the_store_name_preset_tables() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    sources(&root, &mut paths);
    for path in paths {
        // What `dev` prints is an example for people to paste, and the simulation sends rows of its own.
        let homes = ["decode/mapping", "store", "cli/dev", "simulation/server"];
        let is_home = homes.iter().any(|home| module(&root, &path).join("/").starts_with(home));
        let code = code(&path);
        for table in ["relation_tuples", "tuplewatch.attributes", "tuplewatch.tenants"] {
            assert!(is_home || !code.contains(table), "{} names {table}", path.display());
        }
    }
}

/// Every hazard has a test, and every test that is named for one exists.
#[test]
fn every_hazard_names_existing_tests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let table = std::fs::read_to_string(root.join("docs/hazards.md")).unwrap();
    let rows = table.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| ")?.split(" | ");
        let number: u32 = cells.next()?.parse().ok()?;
        let tests: Vec<&str> = cells.last()?.split('`').skip(1).step_by(2).collect();
        Some((number, tests))
    });
    let mut numbers = Vec::new();
    for (number, tests) in rows {
        numbers.push(number);
        assert!(!tests.is_empty(), "hazard {number} has no test");
        for test in tests {
            let (module, name) = test.rsplit_once("::").unwrap_or_else(|| panic!("{test} is no path"));
            let path = module.replace("::", "/");
            let places = [format!("tests/scenarios/{path}.rs"), format!("src/{path}.rs")];
            let source = places.iter().find_map(|place| std::fs::read_to_string(root.join(place)).ok());
            let source = source.unwrap_or_else(|| panic!("hazard {number}: there is no module {module}"));
            assert!(source.contains(&format!("fn {name}()")), "hazard {number}: there is no test {test}");
        }
    }
    assert_eq!(numbers, (1..=64).collect::<Vec<_>>());
}

#[test]
fn the_reader_finds_every_form_of_use() {
    let split = |path: &str| path.split("::").map(String::from).collect::<Vec<_>>();
    let code =
        "use crate::{hub::{self, Hub}, lsn};\nlet x = crate::config::load(); tokio::spawn(x); my_tokio; $crate::no";
    let expected = ["crate::hub::self", "crate::hub::Hub", "crate::lsn", "crate::config::load"];
    assert_eq!(paths(code), expected.map(split));
    assert_eq!(paths("use super::super::gap::*;"), [split("super::super::gap")]);
    let modules = ["hub", "hub::window", "lsn"].map(split).into();
    assert_eq!(resolve(&split("hub::window"), &split("super::Hub"), &modules), split("hub"));
    assert_eq!(resolve(&split("lsn"), &split("crate::hub::window::Next"), &modules), split("hub::window"));
    assert!(names(code, "tokio"));
    assert!(names("use std::{fmt, fs};", "std::fs") && names("use fjall as store;", "fjall"));
    assert!(!names("my_tokio::x tokios::x \"tokio::x fjall=error", "tokio"));
}
