//! Sizes and durations as people write them.

use std::fmt;
use std::time::Duration;

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(u64);

/// From the largest to the smallest; where two spellings are equally long, the earlier one is printed.
const SIZE_UNITS: &[(&str, u64)] = &[
    ("PiB", 1 << 50),
    ("PB", 1_000_000_000_000_000),
    ("TiB", 1 << 40),
    ("TB", 1_000_000_000_000),
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("KB", 1_000),
    ("B", 1),
];

/// From the largest to the smallest, in milliseconds.
const DURATION_UNITS: &[(&str, u64)] =
    &[("d", 24 * 60 * 60 * 1000), ("h", 60 * 60 * 1000), ("m", 60 * 1000), ("s", 1000), ("ms", 1)];

impl ByteSize {
    /// So many bytes.
    pub const fn bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    pub(super) const fn kib(count: u32) -> Self {
        Self((count as u64) << 10)
    }

    pub(super) const fn mib(count: u32) -> Self {
        Self((count as u64) << 20)
    }

    pub(super) const fn gib(count: u32) -> Self {
        Self((count as u64) << 30)
    }

    /// The size in bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The size in bytes, for lengths in memory; the largest `usize` where it is larger than that.
    pub fn to_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }

    /// Reads `512KiB`, `10GB`, `100B` or plain bytes. `None` for everything else, and for what exceeds 64 bits.
    pub fn parse(text: &str) -> Option<Self> {
        let (count, unit) = split_number(text)?;
        let unit_bytes = match unit.trim_start() {
            "" => 1,
            name => SIZE_UNITS.iter().find(|(unit, _)| *unit == name)?.1,
        };
        count.checked_mul(unit_bytes).map(Self)
    }
}

impl fmt::Display for ByteSize {
    /// The shortest exact form.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = SIZE_UNITS
            .iter()
            .filter(|(_, unit_bytes)| self.0 >= *unit_bytes && self.0.is_multiple_of(*unit_bytes))
            .map(|(unit, unit_bytes)| format!("{}{unit}", self.0 / unit_bytes))
            .min_by_key(String::len);
        f.write_str(exact.as_deref().unwrap_or("0B"))
    }
}

/// Reads `10s`, `1m30s` or `500ms`: whole numbers, each with its unit, from the largest unit to the smallest.
pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut units = DURATION_UNITS.iter();
    let mut total_ms = 0_u64;
    loop {
        let (count, tail) = split_number(rest)?;
        let unit_end = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (name, tail) = tail.split_at_checked(unit_end)?;
        // The iterator goes on where it stopped, so a unit that comes twice or too late is not found.
        let (_, unit_ms) = units.find(|(unit, _)| *unit == name)?;
        total_ms = total_ms.checked_add(count.checked_mul(*unit_ms)?)?;
        if tail.is_empty() {
            return Some(Duration::from_millis(total_ms));
        }
        rest = tail;
    }
}

/// Writes what [`parse_duration`] reads, in hours at most: a day is not 24 hours everywhere.
pub(super) fn format_duration(duration: Duration) -> String {
    let mut rest_ms = duration.as_millis();
    let mut text = String::new();
    for (unit, unit_ms) in DURATION_UNITS.iter().skip(1) {
        let unit_ms = u128::from(*unit_ms);
        if rest_ms >= unit_ms {
            text.push_str(&format!("{}{unit}", rest_ms / unit_ms));
            rest_ms %= unit_ms;
        }
    }
    if text.is_empty() { "0s".to_owned() } else { text }
}

/// Splits off the decimal digits at the start, of which there must be some.
fn split_number(text: &str) -> Option<(u64, &str)> {
    let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at_checked(digits_end)?;
    Some((digits.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_printed_in_their_shortest_form() {
        for (text, bytes, printed) in [
            ("0", 0, "0B"),
            ("100", 100, "100B"),
            ("1000", 1_000, "1KB"),
            ("1024", 1_024, "1KiB"),
            ("1536", 1_536, "1536B"),
            ("1KB", 1_000, "1KB"),
            ("512KiB", 512 << 10, "512KiB"),
            ("1024KiB", 1 << 20, "1MiB"),
            ("1MiB", 1 << 20, "1MiB"),
            ("10 GiB", 10 << 30, "10GiB"),
            ("1GB", 1_000_000_000, "1GB"),
            ("2000GB", 2_000_000_000_000, "2TB"),
            ("1024TiB", 1 << 50, "1PiB"),
            ("18446744073709551615", u64::MAX, "18446744073709551615B"),
        ] {
            let size = ByteSize::parse(text);
            assert_eq!(size, Some(ByteSize::bytes(bytes)), "{text:?}");
            let size_printed = size.map(|size| size.to_string());
            assert_eq!(size_printed.as_deref(), Some(printed), "{text:?}");
            assert_eq!(ByteSize::parse(printed), size, "{printed:?}");
        }
    }

    #[test]
    fn malformed_sizes_are_refused() {
        for text in [
            "",
            "MiB",
            "-1",
            "+1",
            "1.5GiB",
            "1e3",
            "1mib",
            "1Mi",
            "1M",
            " 1MiB",
            "1MiB ",
            "1MiB1",
            "18446744073709551616",
            "16384PiB",
            "1\u{660}",
            "0x10",
        ] {
            assert_eq!(ByteSize::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn durations_are_read_and_printed() {
        for (text, ms, printed) in [
            ("0s", 0, "0s"),
            ("500ms", 500, "500ms"),
            ("10s", 10_000, "10s"),
            ("90s", 90_000, "1m30s"),
            ("1m30s", 90_000, "1m30s"),
            ("24h", 86_400_000, "24h"),
            ("1d", 86_400_000, "24h"),
            ("1h1s1ms", 3_601_001, "1h1s1ms"),
        ] {
            let duration = parse_duration(text);
            assert_eq!(duration, Some(Duration::from_millis(ms)), "{text:?}");
            let duration_printed = duration.map(format_duration);
            assert_eq!(duration_printed.as_deref(), Some(printed), "{text:?}");
        }
    }

    #[test]
    fn malformed_durations_are_refused() {
        for text in [
            "",
            "10",
            "s",
            "-1s",
            "1.5s",
            "30s1m",
            "1s1s",
            "1s ",
            "1 s",
            "1s5",
            "1S",
            "1w",
            "1é2s",
            "18446744073709551615s",
        ] {
            assert_eq!(parse_duration(text), None, "{text:?}");
        }
    }
}
