//! Positions in the write-ahead log: LSNs, positions between changes, transaction ids and commit times.
//!
//! Two facts about PostgreSQL shape this module. First, a transaction has *two* LSNs: its **commit LSN**, where the
//! commit record starts (`final_lsn` of Begin, `lsn` of Commit), and its **end LSN** just past the record (`end_lsn` of
//! Commit). The end LSN of one transaction can equal the commit LSN of the next. Second, only commits are ordered: the
//! LSNs of rows in two transactions do not tell which transaction was first.

use std::fmt;
use std::str::FromStr;

/// A byte position in the write-ahead log.
///
/// Range: the whole of `u64`; `0/0` is PostgreSQL's "no position" (`InvalidXLogRecPtr`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// `0/0`, "no position".
    pub const ZERO: Self = Self(0);
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// The LSN at which the commit record of a transaction starts: `final_lsn` of pgoutput's Begin, `lsn` of Commit.
/// Transactions are ordered by their commit LSNs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CommitLsn(pub Lsn);

/// The LSN just past the commit record of a transaction: `end_lsn` of Commit. It can be the commit LSN of the next
/// transaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndLsn(pub Lsn);

impl fmt::Display for CommitLsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for EndLsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The text is not an LSN such as `16/B374D848`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an LSN: expected two hexadecimal numbers like 16/B374D848")]
pub struct ParseLsnError(String);

impl FromStr for Lsn {
    type Err = ParseLsnError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let half = |digits: &str| {
            let valid = (1..=8).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
            if valid { u64::from_str_radix(digits, 16).ok() } else { None }
        };
        text.split_once('/')
            .and_then(|(high, low)| Some(Self(half(high)? << 32 | half(low)?)))
            .ok_or_else(|| ParseLsnError(text.to_owned()))
    }
}

/// A position between two changes. It includes every transaction with a commit LSN below `lsn`, and the first `steps`
/// row steps of the transaction whose commit LSN *is* `lsn`.
///
/// The position after a whole transaction is its end LSN with zero steps. Row steps count pgoutput's row messages, two
/// for each (an UPDATE can be a delete and then a create), before mapping, tenants or filters. So they are the same on
/// every node, whatever its configuration. The derived order is the order of the stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// A commit LSN (with `steps`) or an end LSN (without).
    pub lsn: Lsn,
    /// The row steps of that transaction that the position includes.
    pub steps: u64,
}

impl Position {
    /// Before everything.
    pub const ZERO: Self = Self { lsn: Lsn::ZERO, steps: 0 };
    /// After everything.
    pub const MAX: Self = Self { lsn: Lsn(u64::MAX), steps: u64::MAX };

    /// After every transaction that committed below `lsn`. With an end LSN: after this whole transaction.
    pub const fn at(lsn: Lsn) -> Self {
        Self { lsn, steps: 0 }
    }

    /// The LSN up to which two histories must agree for the position to have the same meaning. Inside a transaction
    /// this includes the first byte of its commit record, which starts at the LSN.
    pub const fn extent(self) -> Lsn {
        if self.steps == 0 { self.lsn } else { Lsn(self.lsn.0.saturating_add(1)) }
    }

    /// After the whole transaction that ends here.
    pub const fn after(end: EndLsn) -> Self {
        Self::at(end.0)
    }

    /// Inside the transaction with this commit LSN, after `steps` of its row steps.
    pub const fn inside(commit: CommitLsn, steps: u64) -> Self {
        Self { lsn: commit.0, steps }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.steps == 0 { write!(f, "{}", self.lsn) } else { write!(f, "{}+{}", self.lsn, self.steps) }
    }
}

/// A 64-bit transaction id: PostgreSQL's `xid8`, the epoch in the upper half.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Xid8(pub u64);

impl Xid8 {
    /// The xid8 of `xid`. pgoutput carries only the low 32 bits. Every transaction in the stream is within 2^31 of any
    /// recent one, so the candidate nearest to `self` is the right one.
    pub const fn widen(self, xid: u32) -> Self {
        let low = (self.0 & 0xFFFF_FFFF) as u32;
        let distance = xid.wrapping_sub(low) as i32;
        Self(self.0.wrapping_add_signed(distance as i64))
    }
}

impl fmt::Display for Xid8 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The transactions that a statement of PostgreSQL can see: the value of `pg_current_snapshot()`, as
/// `xmin:xmax:xip,xip,…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Every transaction below has ended.
    xmin: Xid8,
    /// Every transaction at or above had not begun.
    xmax: Xid8,
    /// The transactions in between that were still running, sorted.
    running: Vec<Xid8>,
}

/// The text is not a `pg_snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a pg_snapshot (xmin:xmax:xip,…)")]
pub struct ParseSnapshotError(String);

impl Snapshot {
    /// Whether the effects of this *committed* transaction are visible in the snapshot (`pg_visible_in_snapshot`).
    pub fn sees(&self, xid: Xid8) -> bool {
        xid < self.xmin || (xid < self.xmax && self.running.binary_search(&xid).is_err())
    }

    /// The first transaction id that was not assigned yet.
    pub const fn xmax(&self) -> Xid8 {
        self.xmax
    }

    /// The transactions below [`Self::xmax`] that were running, in ascending order.
    pub fn running(&self) -> &[Xid8] {
        &self.running
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.xmin, self.xmax)?;
        for (n, xid) in self.running.iter().enumerate() {
            write!(f, "{}{xid}", if n == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl FromStr for Snapshot {
    type Err = ParseSnapshotError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let mut parts = text.split(':');
            let xmin = parts.next()?.parse().ok()?;
            let xmax = parts.next()?.parse().ok()?;
            let list = parts.next()?;
            let running: Option<Vec<Xid8>> =
                list.split(',').filter(|xid| !xid.is_empty()).map(|xid| xid.parse().ok().map(Xid8)).collect();
            let mut running = running?;
            running.sort_unstable();
            parts.next().is_none().then_some(Self { xmin: Xid8(xmin), xmax: Xid8(xmax), running })
        };
        parse().ok_or_else(|| ParseSnapshotError(text.to_owned()))
    }
}

/// A commit timestamp: microseconds since 2000-01-01 00:00 UTC, PostgreSQL's own epoch.
///
/// For people, for lag and for look-up only. Commit timestamps can be equal or out of order, so nothing is ever ordered
/// by them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommitTime(pub i64);

/// Seconds from the Unix epoch to PostgreSQL's.
const POSTGRES_EPOCH_UNIX_SECONDS: i64 = 946_684_800;

impl CommitTime {
    /// The same instant in microseconds since 1970; saturates at the ends of `i64`.
    pub const fn unix_micros(self) -> i64 {
        self.0.saturating_add(POSTGRES_EPOCH_UNIX_SECONDS * 1_000_000)
    }

    /// The same instant for the standard library; before 1970 it is 1970.
    pub fn system_time(self) -> std::time::SystemTime {
        let micros = u64::try_from(self.unix_micros()).unwrap_or(0);
        std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_micros(micros)
    }
}

impl fmt::Display for CommitTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // humantime writes years up to 9999. A later time, which only a forged token has, is shown as a number.
        const LAST_MICROS: i64 = 253_402_300_799_000_000;
        if (0..=LAST_MICROS).contains(&self.unix_micros()) {
            humantime::format_rfc3339_micros(self.system_time()).fmt(f)
        } else {
            write!(f, "{} µs since 2000-01-01", self.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_lsn_is_written_as_postgresql_writes_it() {
        for (text, value) in [("0/0", 0), ("16/B374D848", 0x16_B374_D848), ("FFFFFFFF/FFFFFFFF", u64::MAX)] {
            assert_eq!(text.parse(), Ok(Lsn(value)));
            assert_eq!(Lsn(value).to_string(), text);
        }
        for bad in ["", "/", "1", "1/", "/1", "+1/2", "1/2/3", "1/100000000", "g/0", "-1/0"] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad}");
        }
    }

    #[test]
    fn positions_follow_the_stream() {
        let (commit, end) = (CommitLsn(Lsn(100)), EndLsn(Lsn(150)));
        let order = [
            Position::at(commit.0),
            Position::inside(commit, 1),
            Position::inside(commit, 7),
            Position::after(end),
            // The next transaction may commit exactly at the end LSN of this one.
            Position::inside(CommitLsn(end.0), 1),
        ];
        assert!(order.is_sorted());
    }

    #[test]
    fn an_xid_widens_to_the_nearest_full_id() {
        let check = |reference: u64, xid: u32, expected: u64| assert_eq!(Xid8(reference).widen(xid), Xid8(expected));
        check(1000, 999, 999);
        check(1000, 1001, 1001);
        check((1 << 32) + 5, u32::MAX, (1 << 32) - 1);
        check((1 << 32) - 5, 3, (1 << 32) + 3);
        check((7 << 32) + 0x8000_0000, 0x7FFF_FFFF, (7 << 32) + 0x7FFF_FFFF);
    }

    #[test]
    fn a_snapshot_sees_finished_transactions() {
        let snapshot: Snapshot = "10:20:12,15".parse().unwrap();
        for (xid, seen) in [(9, true), (10, true), (12, false), (13, true), (15, false), (19, true), (20, false)] {
            assert_eq!(snapshot.sees(Xid8(xid)), seen, "{xid}");
        }
        assert!("10:10:".parse::<Snapshot>().is_ok());
        for bad in ["", "1", "1:2", "a:2:", "1:2:3:4", "1:2:x"] {
            assert!(bad.parse::<Snapshot>().is_err(), "{bad}");
        }
    }

    #[test]
    fn commit_times_never_panic() {
        assert_eq!(CommitTime(0).to_string(), "2000-01-01T00:00:00.000000Z");
        for micros in [i64::MIN, i64::MAX, -1] {
            let _ = CommitTime(micros).to_string();
        }
    }
}
