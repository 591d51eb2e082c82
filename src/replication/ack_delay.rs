//! Delays acknowledgements, so that the slot can send the last minutes again.
//!
//! A node that loses its change log begins a new one at the position of its slot. If everything was acknowledged, that
//! position is the present, and all tokens are from before the new log. If acknowledgements are some minutes late,
//! PostgreSQL sends these minutes again, the node rebuilds its log from them, and every subscriber resumes as if
//! nothing had happened.
//!
//! The price: the primary keeps that much WAL, and the slot sends it again at each reconnect, where the receiver drops it. Delayed
//! acknowledgements always fall on transaction ends, because an LSN inside a commit record belongs to neither side.

use crate::model::lsn::Lsn;
use crate::postgres::slot::AckDelay;
use std::collections::VecDeque;
use tokio::time::Instant;

/// The samples within the age and the size of the delay. They determine how closely both are kept.
const SAMPLES: u32 = 64;

/// Decides up to which position WAL may be acknowledged. It belongs to a session, and outlives its connections.
#[derive(Debug, Default)]
pub(super) struct AckTracker {
    limit: AckDelay,
    /// Durable end LSNs and the times at which they became durable, in order; at most a little more than twice
    /// [`SAMPLES`]. Only these are acknowledged, because an LSN between them may lie inside a commit record.
    samples: VecDeque<(Instant, Lsn)>,
    /// The end LSN up to which WAL may be acknowledged, or was acknowledged before this process.
    released: Lsn,
}

impl AckTracker {
    pub(super) fn new(limit: AckDelay) -> Self {
        Self { limit, ..Self::default() }
    }

    /// Continues at the slot's `confirmed` position, with the later end LSNs in the log. Their age is unknown, and
    /// counts from now.
    pub(super) fn resume(&mut self, confirmed: Lsn, recorded: impl Iterator<Item = Lsn>, now: Instant) {
        self.released = self.released.max(confirmed);
        if self.samples.is_empty() && !self.limit.age.is_zero() {
            recorded.for_each(|end| self.sample(end, now));
        }
    }

    /// Returns the end LSN up to which WAL may be acknowledged, if everything up to `durable` is durable.
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

    /// Remembers an end LSN that is far enough from the last sample.
    fn sample(&mut self, lsn: Lsn, now: Instant) {
        let AckDelay { age, size_bytes } = self.limit;
        let is_far_enough = self.samples.back().is_none_or(|(at, last)| {
            let grown = lsn.0.saturating_sub(last.0);
            grown > 0 && (now.duration_since(*at) >= age / SAMPLES || grown >= size_bytes / u64::from(SAMPLES))
        });
        if is_far_enough && lsn > self.released {
            self.samples.push_back((now, lsn));
        }
    }

    /// Starts anew after history was cut.
    pub(super) fn forget(&mut self) {
        *self = Self::new(self.limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_slot_is_acknowledged_by_age_and_by_size() {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        let start = Instant::now();
        let mut tracker = AckTracker::new(AckDelay { age: minutes(5), size_bytes: 1000 });
        tracker.resume(Lsn(90), [].into_iter(), start);
        // Minute, durable LSN, acknowledged LSN.
        for (minute, durable, released) in [
            (0, 100, 90),
            (1, 200, 90),
            (4, 300, 90),
            (5, 300, 100),
            (6, 300, 200),
            // 1,200 bytes in a minute exceed the delay's size.
            (7, 1_500, 1_500),
            (8, 1_900, 1_500),
            (9, 2_300, 1_500),
            (10, 2_600, 1_900),
            // All samples exceed the delay's age while nothing happens.
            (20, 2_600, 2_600),
            (90, 2_600, 2_600),
            (90, 2_700, 2_600),
        ] {
            assert_eq!(tracker.release(Lsn(durable), start + minutes(minute)), Lsn(released), "minute {minute}");
        }
    }

    #[test]
    fn the_next_process_delays_the_same_acknowledgements() {
        let now = Instant::now();
        let mut tracker = AckTracker::new(AckDelay { age: Duration::from_secs(60), size_bytes: 1000 });
        tracker.resume(Lsn(100), (1..=90).map(|n| Lsn(100 + 10 * n)), now);
        assert_eq!(tracker.release(Lsn(1000), now), Lsn(100));
        let released = tracker.release(Lsn(1200), now);
        assert!(released >= Lsn(200) && released < Lsn(250), "as little as the size allows: {released}");
        // A lost connection changes nothing.
        tracker.resume(released, (1..=90).map(|n| Lsn(100 + 10 * n)), now);
        assert_eq!(tracker.release(Lsn(1200), now), released);
    }

    #[test]
    fn acknowledgement_is_bounded_durable_and_monotonic() {
        let mut tracker = AckTracker::new(AckDelay { age: Duration::from_secs(60), size_bytes: 10_000 });
        let mut now = Instant::now();
        let (mut durable, mut released) = (Lsn(0), Lsn(0));
        for _ in 0..10_000 {
            now += Duration::from_millis(fastrand::u64(..5_000));
            durable = Lsn(durable.0 + fastrand::u64(..5_000));
            let next = tracker.release(durable, now);
            assert!(released <= next && next <= durable && durable.0 - next.0 <= 10_000, "{released} {next} {durable}");
            assert!(tracker.samples.len() <= 3 * SAMPLES as usize);
            released = next;
        }
        tracker.forget();
        assert_eq!(tracker.release(Lsn(5), now), Lsn(0), "of another history");
    }

    #[test]
    fn nothing_is_delayed_by_default() {
        let mut tracker = AckTracker::new(AckDelay::default());
        assert_eq!(tracker.release(Lsn(7), Instant::now()), Lsn(7));
    }
}
