//! Holds the dependency rules of ARCHITECTURE.md: reads every path that a module names, and says which it may.

#![expect(clippy::unwrap_used, reason = "a test that cannot read the sources fails where it is")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Pure: no tokio, I/O, clock or logging.
const CORE: [&str; 9] =
    ["finding", "lsn", "timeline", "change", "transaction", "snap_token", "pgoutput", "mapping", "assembler"];

/// What each module may name of `crate`, beside itself.
fn allowed() -> BTreeMap<&'static str, Vec<&'static str>> {
    let core_and = |more: &[&'static str]| [&CORE[..], more].concat();
    BTreeMap::from([
        ("finding", vec![]),
        ("lsn", vec![]),
        ("timeline", vec!["lsn"]),
        ("change", vec![]),
        ("snap_token", vec!["lsn"]),
        ("transaction", vec!["change", "lsn", "snap_token"]),
        ("pgoutput", vec![]),
        ("mapping", vec!["change", "pgoutput"]),
        ("assembler", vec!["change", "lsn", "mapping", "pgoutput", "snap_token", "transaction"]),
        ("metrics", vec![]),
        ("changelog", core_and(&["metrics"])),
        ("hub", core_and(&["changelog", "metrics"])),
        ("replication", core_and(&["changelog", "metrics", "trust"])),
        ("store", core_and(&["replication"])),
        ("yaml", vec![]),
        ("config", vec!["finding", "yaml"]),
        ("telemetry", vec!["config"]),
        ("dev_postgres", vec![]),
        ("authn", vec!["config"]),
        ("admission", vec!["authn", "config"]),
        ("tls", vec!["config"]),
        ("trust", vec![]),
        ("connections", vec![]),
        ("thread", vec![]),
        (
            "grpc",
            core_and(&["hub", "store", "config", "authn", "admission", "tls", "connections", "thread", "metrics"]),
        ),
        ("http", vec!["hub", "config", "connections", "grpc", "admission", "tls", "metrics"]),
        (
            "app",
            core_and(&[
                "changelog",
                "hub",
                "replication",
                "store",
                "grpc",
                "http",
                "config",
                "authn",
                "admission",
                "connections",
                "thread",
                "metrics",
                "yaml",
            ]),
        ),
        ("cli", core_and(&["app", "replication", "grpc", "config", "telemetry", "dev_postgres", "trust"])),
        ("lib", vec![]),
        ("main", vec![]),
    ])
}

/// Crates that only some modules may name.
const CONFINED: [(&str, &[&str]); 20] = [
    ("pgwire_replication", &["replication"]),
    ("tokio_postgres", &["replication", "store", "app", "cli"]),
    ("deadpool", &["store"]),
    ("fjall", &["changelog"]),
    ("tonic", &["grpc", "http", "cli"]),
    ("axum", &["http"]),
    ("hyper", &["http"]),
    ("prost_reflect", &["http"]),
    ("jsonwebtoken", &["authn"]),
    ("hyper_util", &["authn", "cli", "http"]),
    ("governor", &["admission", "authn"]),
    ("clap", &["cli"]),
    ("clap_complete", &["cli"]),
    ("anstyle", &["cli"]),
    ("anstream", &["cli", "telemetry"]),
    ("prometheus", &["metrics"]),
    ("anyhow", &["app", "cli"]),
    ("tracing_subscriber", &["telemetry"]),
    ("yaml_rust2", &["yaml"]),
    ("libc", &["replication"]),
];

/// What the core may not name.
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

/// The top-level module that a file belongs to.
fn module(root: &Path, path: &Path) -> String {
    let first = path.strip_prefix(root).unwrap().components().next().unwrap();
    first.as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned()
}

/// Code without comments and tests.
fn code(path: &Path) -> String {
    let is_test = path
        .file_stem()
        .is_some_and(|stem| ["tests", "model", "conformance", "test_postgres"].iter().any(|name| stem == *name));
    if is_test {
        return String::new();
    }
    let text = std::fs::read_to_string(path).unwrap();
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// Whether `name` stands in the code as the beginning of a path.
fn names(code: &str, name: &str) -> bool {
    code.match_indices(name).any(|(at, _)| {
        let word = |c: char| c.is_alphanumeric() || c == '_';
        let before = code[..at].chars().next_back();
        let after = &code[at + name.len()..];
        let path_goes_on = after.starts_with("::") || name.contains("::") && !after.chars().next().is_some_and(word);
        !before.is_some_and(|c| word(c) || c == '"' || c == '.') && path_goes_on
    })
}

/// The modules named as `crate::module`, also in braces.
fn crate_modules(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        let list = rest.strip_prefix('{').map_or(rest, |inner| inner.split(';').next().unwrap());
        let first =
            |path: &str| path.trim().split(|c: char| !(c.is_alphanumeric() || c == '_')).next().unwrap().to_owned();
        if rest.starts_with('{') {
            found.extend(list.split(',').map(first));
        } else {
            found.insert(first(list));
        }
    }
    found
}

#[test]
fn modules_keep_to_their_layers() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    sources(&root, &mut paths);
    assert!(paths.len() > 20, "the sources were not found");
    let allowed = allowed();
    let mut wrong = Vec::new();
    for path in paths {
        let module = module(&root, &path);
        let code = code(&path);
        let shown = path.strip_prefix(&root).unwrap().display().to_string();
        let Some(may) = allowed.get(module.as_str()) else {
            wrong.push(format!("{shown}: module '{module}' is in no layer: give it one in tests/architecture.rs"));
            continue;
        };
        for used in crate_modules(&code) {
            if used != module && !may.contains(&used.as_str()) {
                wrong.push(format!("{shown} names crate::{used}"));
            }
        }
        for (confined, homes) in CONFINED {
            if names(&code, confined) && !homes.contains(&module.as_str()) {
                wrong.push(format!("{shown} names {confined}"));
            }
        }
        if CORE.contains(&module.as_str()) {
            for impure in IMPURE {
                if names(&code, impure) {
                    wrong.push(format!("{shown} is pure and names {impure}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "dependency rules are broken:\n{}", wrong.join("\n"));
}

/// The tables of the `tuples` preset are known to its mapping and to its store.
#[test]
fn tables_of_the_preset_are_named_where_they_belong() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    sources(&root, &mut paths);
    for path in paths {
        // What `dev` prints is an example for people to paste, and the pipeline test sends rows of its own.
        let is_home = ["mapping", "store"].contains(&module(&root, &path).as_str())
            || ["cli/dev.rs", "app/pipeline/server.rs"].iter().any(|example| path.ends_with(example));
        let code = code(&path);
        for table in ["relation_tuples", "tuplewatch.attributes", "tuplewatch.tenants"] {
            assert!(is_home || !code.contains(table), "{} names {table}", path.display());
        }
    }
}

/// Every hazard has a test, and every test that is named for one exists.
#[test]
fn every_hazard_is_held_by_a_test() {
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
            let places = [format!("tests/scenarios/{path}.rs"), format!("src/app/{path}.rs"), format!("src/{path}.rs")];
            let source = places.iter().find_map(|place| std::fs::read_to_string(root.join(place)).ok());
            let source = source.unwrap_or_else(|| panic!("hazard {number}: there is no module {module}"));
            assert!(source.contains(&format!("fn {name}()")), "hazard {number}: there is no test {test}");
        }
    }
    assert_eq!(numbers, (1..=64).collect::<Vec<_>>());
}

#[test]
fn the_reader_sees_what_it_should() {
    let code = "use crate::{hub::Hub, lsn};\nlet x = crate::config::load(); tokio::spawn(x); my_tokio; $crate::no";
    assert_eq!(crate_modules(code), ["config", "hub", "lsn"].map(String::from).into());
    assert!(names(code, "tokio"));
    assert!(!names("my_tokio::x tokios::x \"tokio::x fjall=error", "tokio"));
}
