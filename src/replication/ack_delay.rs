//! Delays acknowledgements, so that the slot can send the last minutes again.
//!
//! A node that loses its change log begins a new one where its slot is. If everything was acknowledged, that is now, and every token is from
//! before the new log. If acknowledgements are some minutes late, PostgreSQL sends these minutes again, the node rebuilds its log from them,
//! and every subscriber resumes as if nothing had happened.
//!
//! The price: the primary keeps that much WAL, and the slot sends it again at each reconnect, where the receiver drops it. Delayed
//! acknowledgements always fall on transaction ends, because an LSN inside a commit record belongs to neither side.

use crate::model::lsn::Lsn;
use crate::postgres::slot::AckDelay;
use std::collections::VecDeque;
use tokio::time::Instant;

/// How closely age and size are kept: in parts of them.
const SAMPLES: u32 = 64;

/// Tells what the slot may be told. Belongs to a session, and outlives its connections.
#[derive(Debug, Default)]
pub(super) struct AckTracker {
    limit: AckDelay,
    /// What was durable when, at most twice [`SAMPLES`] and some; in order. The slot is only told of these, as anything between
    /// them may lie inside a commit record.
    samples: VecDeque<(Instant, Lsn)>,
    /// What the slot may be told, or was before this process.
    released: Lsn,
}

impl AckTracker {
    pub(super) fn new(limit: AckDelay) -> Self {
        Self { limit, ..Self::default() }
    }

    /// A slot that was told this much, and the ends of what the log has past it. How old those are is not known: their age
    /// counts from now.
    pub(super) fn resume(&mut self, confirmed: Lsn, recorded: impl Iterator<Item = Lsn>, now: Instant) {
        self.released = self.released.max(confirmed);
        if self.samples.is_empty() && !self.limit.age.is_zero() {
            recorded.for_each(|end| self.sample(end, now));
        }
    }

    /// What the slot may be told of what is durable.
    pub(super) fn release(&mut self, durable: Lsn, now: Instant) -> Lsn {
        let AckDelay { age, size_bytes } = self.limit;
        if age.is_zero() {
            return durable;
        }
        self.sample(durable, now);
        while let Some((at, lsn)) = self.samples.front()
            && *lsn <= durable
            && (now.duration_since(*at) >= age || durable.0.saturating_sub(self.released.0) > size_bytes)
        {
            self.released = self.released.max(*lsn);
            self.samples.pop_front();
        }
        self.released.min(durable)
    }

    /// Remembers it, where it is far enough from the last one.
    fn sample(&mut self, lsn: Lsn, now: Instant) {
        let AckDelay { age, size_bytes } = self.limit;
        let is_worth_it = self.samples.back().is_none_or(|(at, last)| {
            let grown = lsn.0.saturating_sub(last.0);
            grown > 0 && (now.duration_since(*at) >= age / SAMPLES || grown >= size_bytes / u64::from(SAMPLES))
        });
        if is_worth_it && lsn > self.released {
            self.samples.push_back((now, lsn));
        }
    }

    /// History was cut: what was durable is measured anew.
    pub(super) fn forget(&mut self) {
        *self = Self::new(self.limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn positions_are_acknowledged_by_age_or_by_size() {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        let start = Instant::now();
        let mut held = AckTracker::new(AckDelay { age: minutes(5), size_bytes: 1000 });
        held.resume(Lsn(90), [].into_iter(), start);
        // Minute, durable position, acknowledged position.
        for (minute, durable, told) in [
            (0, 100, 90),
            (1, 200, 90),
            (4, 300, 90),
            (5, 300, 100),
            (6, 300, 200),
            // 1,200 in a minute is more than may be held.
            (7, 1_500, 1_500),
            (8, 1_900, 1_500),
            (9, 2_300, 1_500),
            (10, 2_600, 1_900),
            // Nothing happens, and everything gets old.
            (20, 2_600, 2_600),
            (90, 2_600, 2_600),
            (90, 2_700, 2_600),
        ] {
            assert_eq!(held.release(Lsn(durable), start + minutes(minute)), Lsn(told), "minute {minute}");
        }
    }

    #[test]
    fn a_new_process_continues_the_delay() {
        let now = Instant::now();
        let mut held = AckTracker::new(AckDelay { age: Duration::from_secs(60), size_bytes: 1000 });
        held.resume(Lsn(100), (1..=90).map(|n| Lsn(100 + 10 * n)), now);
        assert_eq!(held.release(Lsn(1000), now), Lsn(100));
        let told = held.release(Lsn(1200), now);
        assert!(told >= Lsn(200) && told < Lsn(250), "as little as the size wants: {told}");
        // A connection that was lost changes nothing.
        held.resume(told, (1..=90).map(|n| Lsn(100 + 10 * n)), now);
        assert_eq!(held.release(Lsn(1200), now), told);
    }

    #[test]
    fn acknowledgement_is_bounded_durable_and_monotonic() {
        let mut held = AckTracker::new(AckDelay { age: Duration::from_secs(60), size_bytes: 10_000 });
        let mut now = Instant::now();
        let (mut durable, mut told) = (Lsn(0), Lsn(0));
        for _ in 0..10_000 {
            now += Duration::from_millis(fastrand::u64(..5_000));
            durable = Lsn(durable.0 + fastrand::u64(..5_000));
            let next = held.release(durable, now);
            assert!(told <= next && next <= durable && durable.0 - next.0 <= 10_000, "{told} {next} {durable}");
            assert!(held.samples.len() <= 3 * SAMPLES as usize);
            told = next;
        }
        held.forget();
        assert_eq!(held.release(Lsn(5), now), Lsn(0), "of another history");
    }

    #[test]
    fn acknowledgement_is_not_delayed_by_default() {
        let mut held = AckTracker::new(AckDelay::default());
        assert_eq!(held.release(Lsn(7), Instant::now()), Lsn(7));
    }
}
