//! The program accepts the commands in the documents.

use super::process::tuplewatch;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The subcommands in the code of the README and of `docs/`, with their flags.
fn commands() -> BTreeMap<String, BTreeSet<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = vec![root.join("README.md")];
    paths.extend(std::fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path()));
    let mut commands: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for path in paths {
        let text = std::fs::read_to_string(path).unwrap();
        // Code blocks and code spans.
        for code in text.replace("```", "`").split('`').skip(1).step_by(2) {
            for line in code.lines().map(str::trim) {
                // A command through cargo may follow one that installs packages.
                let through_cargo = line.split_once("cargo run --release -- ").map(|(_, rest)| rest);
                let line = through_cargo.or(line.strip_prefix("tuplewatch ")).unwrap_or_default();
                let mut words = line.split('#').next().unwrap().split_whitespace();
                let Some(subcommand) = words.next().filter(|word| word.chars().all(|c| c.is_ascii_lowercase())) else {
                    continue;
                };
                let flags = words.filter(|word| word.starts_with("--") && *word != "--");
                let flags = flags.map(|flag| flag.trim_end_matches(['.', ',']).to_owned());
                commands.entry(subcommand.to_owned()).or_default().extend(flags);
            }
        }
    }
    commands
}

#[tokio::test]
async fn commands_in_the_documents_are_valid() {
    let commands = commands();
    assert!(commands.len() > 5, "{commands:?}");
    for (subcommand, flags) in commands {
        let help = tuplewatch(&[&subcommand, "--help"]).await.succeeded();
        for flag in flags {
            assert!(help.split([' ', '\n', ',']).any(|word| word == flag), "tuplewatch {subcommand} has no {flag}");
        }
    }
}
