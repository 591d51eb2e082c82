//! Reads the YAML file into a flat list of dotted keys.
//!
//! The YAML parser recurses once for each level of nesting, and copies the target of each alias. So a small file could
//! overflow the stack, which aborts the process, or use up the memory. Three limits are checked before the text is
//! parsed. A real configuration stays far below them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::error::{ALIASES_MAX, FILE_BYTES_MAX, FileFault, INDENT_MAX, Problem};
use super::origin::{Name, Origin};
use crate::yaml::{self, Section, Value};

/// Dotted keys and their values. The only sections among the values are empty ones.
pub(super) type Leaves = BTreeMap<String, Value>;

/// Reads the file at `path`. Returns the readable keys together with the problems of the rest.
pub(super) fn read(path: &Path) -> (Leaves, Vec<Problem>) {
    let bytes = match read_bounded(path) {
        Ok(bytes) => bytes,
        Err(source) => {
            let path = path.to_owned();
            return (Leaves::new(), vec![Problem::Unreadable { path, source }]);
        }
    };
    match parse(&bytes) {
        Ok(table) => flatten(path, table),
        Err(fault) => {
            let path = path.to_owned();
            (Leaves::new(), vec![Problem::BadFile { path, fault }])
        }
    }
}

/// Parses a value from a flag or the environment that is written as in a file.
pub(super) fn parse_value(text: &str) -> Option<Value> {
    let mut table = parse(format!("value: {text}").as_bytes()).ok()?;
    let value = table.remove("value")?;
    table.is_empty().then_some(value)
}

/// Reads at most one byte more than the limit, so that an endless device or pipe does no harm.
fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(FILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn parse(bytes: &[u8]) -> Result<Section, FileFault> {
    if bytes.len() > FILE_BYTES_MAX {
        return Err(FileFault::TooLarge);
    }
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let valid = bytes.get(..error.valid_up_to()).unwrap_or_default();
        let line = valid.split(|byte| *byte == b'\n').count();
        FileFault::NotUnicode { line }
    })?;
    // Windows editors start a file with a byte order mark, which the parser would take for a part of the first key.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    check_bounds(text)?;
    if text.lines().all(is_blank) {
        return Ok(Section::new());
    }
    yaml::parse(text).map_err(|error| match error {
        yaml::Error::NotSections(_) => FileFault::NotSections,
        error => FileFault::Malformed(error),
    })
}

/// Whether the line sets nothing.
fn is_blank(line: &str) -> bool {
    let line = line.trim();
    line.is_empty() || line.starts_with('#') || line == "---" || line == "..."
}

fn check_bounds(text: &str) -> Result<(), FileFault> {
    let mut aliases = 0;
    // A carriage return alone ends a line in YAML, too. In `\r\n` it must not count as a second line.
    let text = text.replace("\r\n", "\n");
    for (line, content) in (1..).zip(text.split(['\r', '\n'])) {
        // Blanks, and the three indicators that open a block and can precede another one.
        let start = content.find(|c| !matches!(c, ' ' | '\t' | '-' | '?' | ':')).unwrap_or(content.len());
        if start > INDENT_MAX {
            return Err(FileFault::TooDeep { line });
        }
        if !content.trim_start().starts_with('#') {
            aliases += count_aliases(content);
        }
        if aliases > ALIASES_MAX {
            return Err(FileFault::TooManyAliases { line });
        }
    }
    Ok(())
}

/// Counts possible aliases: asterisks at the start of a word, also in quoted text.
fn count_aliases(line: &str) -> usize {
    let before = std::iter::once(' ').chain(line.chars());
    before
        .zip(line.chars())
        .filter(|(before, c)| *c == '*' && (before.is_whitespace() || "[{,:".contains(*before)))
        .count()
}

fn flatten(path: &Path, table: Section) -> (Leaves, Vec<Problem>) {
    let mut leaves = Leaves::new();
    let mut problems = Vec::new();
    let mut open = vec![(String::new(), table)];
    while let Some((parent, table)) = open.pop() {
        for (part, value) in table {
            let key = if parent.is_empty() { part.clone() } else { format!("{parent}.{part}") };
            // A key that contains a dot would look like a nested key, and could hide the value of that one.
            if part.contains('.') {
                let origin = Origin::File(path.to_owned());
                let name = Name { key, origin };
                problems.push(Problem::Dotted { name });
                continue;
            }
            match value {
                Value::Section(inner) if !inner.is_empty() => open.push((key, inner)),
                value => {
                    leaves.insert(key, value);
                }
            }
        }
    }
    // The loop above visits sections from the last to the first.
    problems.sort_by_cached_key(Problem::to_string);
    (leaves, problems)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(text: &str) -> Result<Vec<String>, String> {
        let table = parse(text.as_bytes()).map_err(|fault| fault.to_string())?;
        let (leaves, problems) = flatten(Path::new("f.yaml"), table);
        match problems.first() {
            Some(problem) => Err(problem.to_string()),
            None => Ok(leaves.into_keys().collect()),
        }
    }

    #[test]
    fn keys_are_flattened() {
        for (text, expected) in [
            ("", &[][..]),
            ("\u{feff}", &[]),
            ("---\n# nothing yet\n", &[]),
            ("\u{feff}a: 1", &["a"]),
            ("a: 1\r\nb:\r\n  c: 2\r\n", &["a", "b.c"]),
            ("a: {b: {c: 1, d: []}, e: {}}", &["a.b.c", "a.b.d", "a.e"]),
            ("a: &x {b: 1}\nc: *x", &["a.b", "c.b"]),
        ] {
            let expected = expected.iter().map(ToString::to_string).collect();
            assert_eq!(keys(text), Ok(expected), "{text:?}");
        }
    }

    #[test]
    fn malformed_files_are_refused_with_their_line() {
        for (text, expected) in [
            ("a: 1\nb: c: 2\n", "line 2"),
            ("a: 1\nb: 2\na: 3\n", "duplicated key in mapping at byte 13 line 3"),
            ("s:\n  a: 1\n  a: 2\n", "line 3"),
            ("a: 1\n---\nb: 1\n", "2 YAML documents"),
            ("- 1\n", "must hold sections"),
            ("postgres://u:secret@h\n", "must hold sections"),
            ("a.b: 1\n", "`a.b` in file f.yaml: keys are nested"),
            ("a:\n  b.c: 1\n", "`a.b.c` in file f.yaml: keys are nested"),
            ("a: *b\n", "line 1"),
        ] {
            let message = keys(text).unwrap_err();
            assert!(message.contains(expected), "{text:?}: {message}");
            assert!(!message.contains("secret"), "{message}");
        }
        let message = parse(b"a: 1\nb: \xff\n").unwrap_err().to_string();
        assert_eq!(message, "line 2: is not valid UTF-8");
    }

    #[test]
    fn nesting_does_not_overflow_the_stack() {
        let nested = 10_000;
        for open in ["- ", "? ", ": ", "- ? ", "-\t", "[", "{", "{a: ", "[? ", "[a: ", "!t [", "&a - "] {
            for start in ["", "a:\n  ", "a: ", "--- ", "\r"] {
                let text = format!("{start}{}", open.repeat(nested));
                assert!(keys(&text).is_err(), "{open:?} after {start:?}");
            }
        }
        for newline in ["\n", "\r", "\r\n"] {
            let steps = (0..300).map(|depth| format!("{}a:{newline}", " ".repeat(depth)));
            let message = keys(&steps.collect::<String>()).unwrap_err();
            assert_eq!(message, "line 66: indented by more than 64 columns");
        }
        // The deepest nesting within the limits, on the 2 MiB stack of a test.
        let blocks: String =
            (0..INDENT_MAX).map(|depth| " ".repeat(depth)).map(|indent| format!("{indent}a:\n{indent}-\n")).collect();
        for (open, close) in [("[", "]"), ("{a: ", "}"), ("[{a: ", "}]")] {
            let depth = 255 / close.len();
            let flow = format!("{}0{}", open.repeat(depth), close.repeat(depth));
            let text = format!("{blocks}{}{flow}", " ".repeat(INDENT_MAX));
            assert_eq!(keys(&text), Ok(vec!["a".to_owned()]), "{open:?}");
        }
    }

    #[test]
    fn size_and_aliases_are_bounded() {
        assert!(matches!(parse("#\n".repeat(FILE_BYTES_MAX).as_bytes()), Err(FileFault::TooLarge)));
        let mut text = "a0: &a0 [x]\n".to_owned();
        for level in 1..20 {
            let before = level - 1;
            text.push_str(&format!("a{level}: &a{level} [*a{before}, *a{before}]\n"));
        }
        assert_eq!(keys(&text).unwrap_err(), "line 4: more than 4 YAML aliases (`*name`)");
        let comments = "# * a\n  # * b\n".repeat(10);
        assert_eq!(keys(&comments), Ok(vec![]));
    }
}
