//! Arguments, environment and targets of benchmarks.

use super::postgres::Postgres;

/// Whether this flag was given.
pub(crate) fn has_flag(flag: &str) -> bool {
    std::env::args().any(|arg| arg == flag)
}

/// The value after this flag.
pub(crate) fn option(flag: &str) -> Option<String> {
    std::env::args().skip_while(|arg| arg != flag).nth(1)
}

/// The number after this flag.
pub(crate) fn number(flag: &str) -> Option<u64> {
    option(flag).map(|value| value.parse().unwrap_or_else(|_| panic!("{flag} is followed by a number")))
}

/// `--rounds N`; by default five, or one with `--quick`.
pub(crate) fn rounds() -> usize {
    let default = if has_flag("--quick") { 1 } else { 5 };
    number("--rounds").map_or(default, |rounds| rounds as usize)
}

/// "PostgreSQL 17.2, 2 cores".
pub(crate) fn place(postgres: &Postgres) -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("PostgreSQL {}, {cores} cores", postgres.installation().version())
}

/// A line for a figure that should be large.
pub(crate) fn at_least(what: &str, value: f64, limit: f64, unit: &str) -> String {
    line(what, value, '≥', limit, unit, value >= limit)
}

/// A line for a figure that should be small.
pub(crate) fn at_most(what: &str, value: f64, limit: f64, unit: &str) -> String {
    line(what, value, '≤', limit, unit, value <= limit)
}

fn line(what: &str, value: f64, relation: char, limit: f64, unit: &str, is_reached: bool) -> String {
    let verdict = if is_reached { "ok" } else { "MISSED" };
    format!("target {what:<58} {value:>7.2}{unit} ({relation} {limit}{unit}) {verdict}")
}
