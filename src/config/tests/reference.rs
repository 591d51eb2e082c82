//! `docs/configuration.md` describes every key as the program reads it.

use super::*;

/// A row of its tables.
struct Row {
    key: String,
    takes: String,
    default: String,
}

fn rows() -> Vec<Row> {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md")).unwrap();
    let cells = |line: &str| -> Vec<String> { line.split(" | ").map(str::to_owned).collect() };
    let bare = |cell: &str| cell.trim_start_matches("| ").trim_matches('`').to_owned();
    // Other tables have fewer columns.
    let rows = text.lines().filter(|line| line.starts_with("| `")).map(cells).filter(|row| row.len() > 3);
    rows.map(|row| Row { key: bare(&row[0]), takes: row[1].clone(), default: bare(&row[2]) }).collect()
}

#[test]
fn the_reference_has_every_key_with_its_default() {
    let config = Config::load(None, [], &[]).unwrap();
    let actual: Vec<String> = config.effective().entries().map(|(key, default)| format!("{key}: {default}")).collect();
    let written: Vec<String> = rows().iter().map(|row| format!("{}: {}", row.key, row.default)).collect();
    let lacks: Vec<&String> = actual.iter().filter(|line| !written.contains(line)).collect();
    let invents: Vec<&String> = written.iter().filter(|line| !actual.contains(line)).collect();
    assert!(lacks.is_empty() && invents.is_empty(), "docs/configuration.md lacks {lacks:#?} and invents {invents:#?}");
    assert_eq!(written, actual, "each once, and in the order of the document");
}

/// The accepted values of a key are named in the error about an invalid one.
#[test]
fn the_reference_has_every_range_and_word() {
    let mut checked = 0;
    for Row { key, takes, .. } in rows() {
        // Some take any text, which may then not go with the rest.
        let Err(error) = Config::load(None, [], &[(key.clone(), "?, !".to_owned())]) else { continue };
        let error = error.to_string();
        let Some((_, allowed)) = error.split_once(": must be ") else { continue };
        checked += 1;
        let wanted: Vec<String> = if let Some((_, range)) = allowed.rsplit_once(" from ") {
            vec![format!("from {range}")]
        } else if let Some(words) = allowed.strip_prefix("one of ") {
            words.split(", ").map(|word| format!("`{word}`")).collect()
        } else if allowed == "true or false" {
            vec!["`true`".to_owned(), "`false`".to_owned()]
        } else {
            continue;
        };
        for part in wanted {
            assert!(takes.contains(&part), "`{key}` takes {part}, and the reference says: {takes}");
        }
    }
    assert!(checked > 30, "{checked} keys were refused");
}
