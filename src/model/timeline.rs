//! The history that a position belongs to: the source (one database of one cluster) and its timelines.
//!
//! After a promotion or a point-in-time recovery PostgreSQL continues on a new timeline, which branches off at a
//! *switch LSN*. WAL that the old timeline wrote past that LSN is no longer part of the history. Two clones can both be
//! on "timeline 2", so a timeline is identified by its id *and* the LSN at which it begins.

use crate::model::lsn::Lsn;
use sha2::{Digest, Sha256};
use std::fmt;

/// One database of one PostgreSQL cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// `system_identifier` of `pg_control_system()`, given at initdb and shared by all physical copies.
    pub system_identifier: u64,
    /// The oid of the database.
    pub database_oid: u32,
}

/// The id of a [`Source`] in tokens: the first bytes of a hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceId(pub [u8; 8]);

/// The id of a [`Timeline`] in tokens: the first bytes of a hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TimelineId(pub [u8; 8]);

impl Source {
    /// The id in tokens. `tuplewatch.snap_token()` computes the same bytes in SQL.
    pub fn id(self) -> SourceId {
        let mut hasher = Sha256::new();
        hasher.update(self.system_identifier.to_be_bytes());
        hasher.update(self.database_oid.to_be_bytes());
        SourceId(prefix(hasher))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "system {} database {}", self.system_identifier, self.database_oid)
    }
}

/// One timeline: PostgreSQL's number for it, and the LSN at which it branched off its parent (`0/0` for the first).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeline {
    /// PostgreSQL's number for it: 1 for a cluster that was never promoted or recovered.
    pub number: u32,
    /// The switch LSN: the first position that this timeline wrote itself.
    pub begin: Lsn,
}

impl Timeline {
    /// The id in tokens.
    pub fn id(self) -> TimelineId {
        let mut hasher = Sha256::new();
        hasher.update(self.number.to_be_bytes());
        hasher.update(self.begin.0.to_be_bytes());
        TimelineId(prefix(hasher))
    }
}

fn prefix(hasher: Sha256) -> [u8; 8] {
    let digest: [u8; 32] = hasher.finalize().into();
    let [a, b, c, d, e, f, g, h, ..] = digest;
    [a, b, c, d, e, f, g, h]
}

/// The timelines that lead to the server's current one, oldest first. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    ancestors: Vec<Timeline>,
    current: Timeline,
}

/// The text is not a timeline history file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("timeline history of timeline {timeline} has a line that is not 'parent LSN reason': '{line}'")]
pub struct ParseHistoryError {
    timeline: u32,
    line: String,
}

impl History {
    /// The history of a server on timeline 1, which has no history file.
    pub const fn first() -> Self {
        Self { ancestors: Vec::new(), current: Timeline { number: 1, begin: Lsn::ZERO } }
    }

    /// Parses a history file (`TIMELINE_HISTORY` of the replication protocol): one line for each parent, `id TAB
    /// switch-LSN TAB reason`, oldest first. Blank lines and `#` comments are ignored.
    ///
    /// # Errors
    /// A line has another form.
    pub fn parse(timeline: u32, content: &str) -> Result<Self, ParseHistoryError> {
        let mut ancestors = Vec::new();
        let mut begin = Lsn::ZERO;
        for line in content.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let mut fields = line.split_whitespace();
            let parent = fields.next().and_then(|number| number.parse().ok());
            let switch = fields.next().and_then(|lsn| lsn.parse().ok());
            let (Some(number), Some(switch)) = (parent, switch) else {
                return Err(ParseHistoryError { timeline, line: line.to_owned() });
            };
            ancestors.push(Timeline { number, begin });
            begin = switch;
        }
        Ok(Self { ancestors, current: Timeline { number: timeline, begin } })
    }

    /// Builds a history from stored timelines, oldest first; `None` for an empty list.
    pub fn from_timelines(mut timelines: Vec<Timeline>) -> Option<Self> {
        let current = timelines.pop()?;
        Some(Self { ancestors: timelines, current })
    }

    /// All timelines, oldest first, ending with the current one.
    pub fn timelines(&self) -> impl Iterator<Item = Timeline> + '_ {
        self.ancestors.iter().copied().chain(std::iter::once(self.current))
    }

    /// The timeline that the server is writing now.
    pub const fn current(&self) -> Timeline {
        self.current
    }

    /// The timeline that wrote the WAL *before* `lsn`. At a switch LSN this is the older one, on which the position is
    /// valid too.
    pub fn writer_of(&self, lsn: Lsn) -> Timeline {
        self.timelines()
            .take_while(|timeline| timeline.begin < lsn)
            .last()
            .unwrap_or_else(|| self.ancestors.first().copied().unwrap_or(self.current))
    }

    /// Whether this history includes a position at `lsn` that this timeline wrote.
    pub fn holds(&self, timeline: TimelineId, lsn: Lsn) -> bool {
        let mut timelines = self.timelines().peekable();
        while let Some(candidate) = timelines.next() {
            if candidate.id() == timeline {
                return timelines.peek().is_none_or(|next| lsn <= next.begin);
            }
        }
        false
    }

    /// Whether the `recorded` history continues where this one ends. Then the node that recorded it has followed a
    /// promotion, and a server on this history was left behind.
    pub fn was_left_behind_by(&self, recorded: &Self) -> bool {
        let mut theirs = recorded.timelines();
        self.timelines().all(|our| theirs.next() == Some(our)) && theirs.next().is_some()
    }

    /// The LSN at which the `recorded` history leaves this one. Everything recorded past that LSN was abandoned. `None`
    /// if the recorded history ends on the current timeline.
    pub fn divergence_from(&self, recorded: &Self) -> Option<Lsn> {
        let mut ours = self.timelines();
        let mut theirs = recorded.timelines();
        loop {
            match (ours.next(), theirs.next()) {
                (Some(our), Some(their)) if our == their => {}
                (Some(our), Some(their)) => return Some(our.begin.min(their.begin)),
                (Some(our), None) => return Some(our.begin),
                (None, Some(their)) => return Some(their.begin),
                (None, None) => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(timeline: u32, content: &str) -> History {
        History::parse(timeline, content).unwrap()
    }

    #[test]
    fn history_files_are_parsed() {
        let read = history(3, "1\t0/3000000\tno recovery target specified\n\n2\t0/5000000\tbefore x\n");
        let timelines: Vec<_> = read.timelines().map(|timeline| (timeline.number, timeline.begin.0)).collect();
        assert_eq!(timelines, [(1, 0), (2, 0x300_0000), (3, 0x500_0000)]);
        assert_eq!(History::parse(1, ""), Ok(History::first()));
        assert!(History::parse(2, "one 0/1").is_err());
        assert!(History::parse(2, "1").is_err());
    }

    #[test]
    fn positions_lie_on_a_history_up_to_the_switch() {
        let now = history(2, "1 0/300 x");
        let first = Timeline { number: 1, begin: Lsn::ZERO };
        let second = Timeline { number: 2, begin: Lsn(0x300) };
        assert!(now.holds(first.id(), Lsn(0x300)));
        assert!(!now.holds(first.id(), Lsn(0x301)));
        assert!(now.holds(second.id(), Lsn(0x900)));
        // Another clone's timeline 2 is another timeline.
        assert!(!now.holds(Timeline { number: 2, begin: Lsn(0x200) }.id(), Lsn(0x250)));
        assert_eq!(now.writer_of(Lsn(0x300)), first);
        assert_eq!(now.writer_of(Lsn(0x301)), second);
        assert_eq!(now.writer_of(Lsn::ZERO), first);
    }

    #[test]
    fn a_history_left_behind_by_another_is_recognized() {
        let (one, two, three) = (History::first(), history(2, "1 0/300 x"), history(3, "1 0/300 x\n2 0/500 y"));
        let other_two = history(2, "1 0/200 x");
        assert!(one.was_left_behind_by(&two) && one.was_left_behind_by(&three) && two.was_left_behind_by(&three));
        for (ours, recorded) in [(&one, &one), (&two, &one), (&other_two, &two), (&other_two, &three)] {
            assert!(!ours.was_left_behind_by(recorded), "{ours:?} {recorded:?}");
        }
    }

    #[test]
    fn histories_diverge_at_the_first_differing_switch() {
        let check = |ours: &History, recorded: &History, expected: Option<u64>| {
            assert_eq!(ours.divergence_from(recorded), expected.map(Lsn));
        };
        let one = History::first();
        let two = history(2, "1 0/300 x");
        let other_two = history(2, "1 0/200 x");
        let three = history(3, "1 0/300 x\n2 0/500 y");
        check(&one, &one, None);
        check(&two, &one, Some(0x300));
        check(&three, &two, Some(0x500));
        check(&three, &one, Some(0x300));
        check(&other_two, &two, Some(0x200));
        // Back on an older timeline: a storage rollback.
        check(&one, &two, Some(0x300));
    }
}
