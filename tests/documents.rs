//! The documents: links lead somewhere, every document is in the index, and what they quote of the program is there.

#![expect(clippy::unwrap_used, reason = "a test that cannot read the documents fails where it is")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Alert rules lead to these sections of the runbook.
const RUNBOOK: [&str; 9] = [
    "down",
    "not-ready",
    "the-slot-is-lost",
    "the-slot-does-not-move",
    "wal-piles-up",
    "lag",
    "the-disk-of-the-change-log",
    "a-gap-in-history",
    "slow-subscribers",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(directory: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, extension, found);
        } else if path.extension().is_some_and(|given| given == extension) {
            found.push(path);
        }
    }
}

/// All documents, with their text.
fn documents() -> BTreeMap<PathBuf, String> {
    let mut paths: Vec<PathBuf> =
        ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"].iter().map(|name| root().join(name)).collect();
    files(&root().join("docs"), "md", &mut paths);
    paths.into_iter().map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect()
}

/// Lines that are not code.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut in_code = false;
    text.lines().filter(move |line| {
        let is_fence = line.trim_start().starts_with("```");
        in_code ^= is_fence;
        !in_code && !is_fence
    })
}

/// The anchors of the headings, as GitHub makes them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = prose(text).filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    headings
        .map(|heading| {
            let kept = heading.to_lowercase();
            let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}

/// Targets of the links, without code spans.
fn links(text: &str) -> Vec<String> {
    let without_code: Vec<String> =
        prose(text).map(|line| line.split('`').step_by(2).collect::<Vec<_>>().join("")).collect();
    let text = without_code.join("\n");
    text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap().to_owned()).collect()
}

#[test]
fn every_link_has_a_target() {
    let documents = documents();
    let mut wrong = Vec::new();
    let mut count = 0;
    for (path, text) in &documents {
        for link in links(text).iter().filter(|link| !link.contains("://")) {
            count += 1;
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            let Ok(target) = target.canonicalize() else {
                wrong.push(format!("{}: {link} is not there", path.display()));
                continue;
            };
            let is_there = anchor.is_empty()
                || documents
                    .iter()
                    .any(|(path, text)| path.canonicalize().unwrap() == target && anchors(text).contains(anchor));
            if !is_there {
                wrong.push(format!("{}: {link} has no such heading", path.display()));
            }
        }
    }
    assert!(count > 20, "the links were not found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_document_is_in_the_index() {
    let index = std::fs::read_to_string(root().join("docs/README.md")).unwrap();
    let listed: BTreeSet<String> = links(&index).into_iter().filter(|link| !link.contains('/')).collect();
    let present = documents().into_keys().filter(|path| path.parent().unwrap() == root().join("docs"));
    let present = present.map(|path| path.file_name().unwrap().to_str().unwrap().to_owned());
    assert_eq!(listed, present.filter(|name| name != "README.md").collect());
}

#[test]
fn the_runbook_has_every_section_that_alerts_link_to() {
    let anchors = anchors(&std::fs::read_to_string(root().join("docs/operations.md")).unwrap());
    for anchor in RUNBOOK {
        assert!(anchors.contains(anchor), "docs/operations.md has no heading for #{anchor}");
    }
}

/// Every message of the table is one of the program's.
#[test]
fn the_runbook_quotes_lasting_errors_exactly() {
    let mut paths = Vec::new();
    files(&root().join("src"), "rs", &mut paths);
    let source: String = paths.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
    // Long messages are continued on the next line.
    let mut pieces = source.split("\\\n");
    let mut source = pieces.next().unwrap().to_owned();
    pieces.for_each(|piece| source.push_str(piece.trim_start()));

    let runbook = std::fs::read_to_string(root().join("docs/operations.md")).unwrap();
    let (_, section) = runbook.split_once("\n## Every lasting error\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows: Vec<&str> = section.lines().filter(|line| line.starts_with("| `")).collect();
    assert!(rows.len() > 20, "{rows:?}");
    for row in rows {
        let message = row.split(" | ").next().unwrap();
        for quoted in message.split('`').skip(1).step_by(2) {
            assert!(source.contains(quoted), "nothing in src/ says '{quoted}'");
        }
    }
}

/// Every test that the guarantees name exists.
#[test]
fn every_guarantee_names_existing_tests() {
    let text = std::fs::read_to_string(root().join("docs/guarantees.md")).unwrap();
    let sections: Vec<&str> = text.split("\n## ").skip(1).collect();
    assert!(sections.len() > 5);
    for section in sections {
        let (_, tests) = section.split_once("\nHeld by ").unwrap_or_else(|| panic!("nothing holds {section}"));
        for test in tests.split('`').skip(1).step_by(2) {
            let (module, name) = test.rsplit_once("::").unwrap_or_else(|| panic!("{test} is no path"));
            let path = module.replace("::", "/");
            let places = [format!("tests/scenarios/{path}.rs"), format!("src/{path}.rs")];
            let source = places.iter().find_map(|place| std::fs::read_to_string(root().join(place)).ok());
            let source = source.unwrap_or_else(|| panic!("there is no module {module}"));
            assert!(source.contains(&format!("fn {name}()")), "there is no test {test}");
        }
    }
}

/// The two commands that bring a bare machine to a running server and to passed tests.
#[test]
fn ci_runs_the_test_command_of_the_readme() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let first_screen = readme.split("\n## ").next().unwrap();
    let ci = std::fs::read_to_string(root().join(".ci/run")).unwrap();
    let command = |purpose: &str| {
        let begins = format!("./requirements {purpose} && ");
        let found = first_screen.lines().find(|line| line.starts_with(&begins));
        found.unwrap_or_else(|| panic!("the README does not begin with {begins}…"))
    };
    assert!(command("dev").ends_with(" dev"));
    let test = command("test");
    assert!(ci.lines().any(|line| line.starts_with(test)), ".ci/run does not run {test}");
    assert!(!ci.contains("apt-get"), "only ./requirements installs packages");
}
