//! Logs gaps in the server's log: one line for each gap, with the reason, the table and the remedy, for operators.
//!
//! A line contains neither tenants nor values. Frequent gaps (of a program that writes undecodable rows, for example)
//! produce one line a minute for each reason and table, with the number of omitted lines.

use crate::changelog::Entry;
use crate::model::transaction::{Gap, GapReason};
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

/// The shortest time between two lines with the same table and reason.
const LINE_EVERY: Duration = Duration::from_secs(60);
/// The number of tables and reasons that are remembered. Beyond it, the memory starts anew.
const SUBJECTS_MAX: usize = 1_000;

/// The log lines of a session's gaps.
#[derive(Debug, Default)]
pub(super) struct GapLog {
    /// The time of the last line, and the number of gaps since then.
    lines: HashMap<(&'static str, String), (Instant, u64)>,
}

impl GapLog {
    /// Logs the gaps of an entry that has reached the log and the hub.
    pub(super) fn log(&mut self, entry: &Entry) {
        match entry {
            Entry::Transaction(transaction) => transaction.gaps.iter().for_each(|gap| self.log_gap(gap)),
            Entry::Gap(gap) => self.log_gap(gap),
            _ => {}
        }
    }

    fn log_gap(&mut self, gap: &Gap) {
        let Some(left_out) = self.is_due(&gap.reason) else { return };
        tracing::error!(
            reason = gap.reason.code(),
            from = %gap.from,
            to = %gap.to,
            tenants = if gap.tenant.is_some() { "one" } else { "all" },
            is_open = gap.is_open(),
            left_out,
            "a gap in the stream: {}. Its subscribers get a status, and have to read their state anew. {}",
            gap.reason,
            remedy(&gap.reason)
        );
    }

    /// Returns the number of lines omitted since the last one, if a line is due.
    fn is_due(&mut self, reason: &GapReason) -> Option<u64> {
        if self.lines.len() >= SUBJECTS_MAX {
            self.lines.clear();
        }
        let now = Instant::now();
        let subject = (reason.code(), reason.details().0.to_owned());
        // Gaps that a check finds are rare, and have no table.
        let (at, left_out) = match self.lines.get_mut(&subject) {
            Some(line) if !subject.1.is_empty() => line,
            _ => {
                self.lines.insert(subject, (now, 0));
                return Some(0);
            }
        };
        if now.duration_since(*at) < LINE_EVERY {
            *left_out += 1;
            return None;
        }
        *at = now;
        Some(std::mem::take(left_out))
    }
}

/// The remedy, for the operator.
const fn remedy(reason: &GapReason) -> &'static str {
    match reason {
        GapReason::Truncate { .. } => "No repair is needed. To remove rows without a gap, DELETE them",
        GapReason::Undecodable { .. } => {
            "Correct the rows, or the mapping; the transactions of that time show which program wrote them"
        }
        GapReason::SlotMoved => {
            "Find the program that dropped, recreated or advanced the slot: only this tuplewatch may use it"
        }
        GapReason::SchemaChanged { .. } => "If this change was not intended, run tuplewatch doctor",
        GapReason::MappingChanged => "No repair is needed if the mapping was changed on purpose",
        GapReason::TimelineDiverged => "No repair is needed after an intended failover",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_table_and_reason_gets_one_line_a_minute() {
        let mut log = GapLog::default();
        let truncated = |table: &str| GapReason::Truncate { table: table.into() };
        assert_eq!(log.is_due(&truncated("a")), Some(0));
        assert_eq!(log.is_due(&truncated("a")), None);
        assert_eq!(log.is_due(&truncated("b")), Some(0));
        let undecodable = GapReason::Undecodable { table: "a".into(), detail: "x".into() };
        assert_eq!(log.is_due(&undecodable), Some(0));
        assert_eq!(log.is_due(&truncated("a")), None);
        tokio::time::advance(LINE_EVERY).await;
        assert_eq!(log.is_due(&truncated("a")), Some(2));
        // Each of these gaps has a line, however soon it follows.
        assert_eq!(log.is_due(&GapReason::SlotMoved), Some(0));
        assert_eq!(log.is_due(&GapReason::SlotMoved), Some(0));
    }
}
