//! Measuring for benchmarks: medians of rounds, and the CPU time of a process.

use std::time::Duration;

/// The median of several rounds, and their range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Summary {
    pub(crate) fn of(rounds: &[f64]) -> Self {
        let mut sorted = rounds.to_vec();
        sorted.sort_by(f64::total_cmp);
        Self { median: sorted[sorted.len() / 2], min: sorted[0], max: sorted[sorted.len() - 1] }
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { median, min, max } = self;
        match f.precision() {
            Some(precision) => write!(f, "{median:.precision$} ({min:.precision$} to {max:.precision$})"),
            None => write!(f, "{median} ({min} to {max})"),
        }
    }
}

/// The value below which `share` (0 to 1) of the values lie. Sorts them.
pub(crate) fn quantile(values: &mut [Duration], share: f64) -> Duration {
    values.sort_unstable();
    let last = values.len() - 1;
    values[((last as f64 * share).round() as usize).min(last)]
}

/// The CPU time of a process so far, user and system, in steps of 10 ms.
pub(crate) fn cpu_time(pid: u32) -> Duration {
    // proc(5): fields 14 and 15, counted after the name in parentheses, which may contain anything; 100 ticks a second on
    // every Linux.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let ticks: u64 = fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 10)
}
