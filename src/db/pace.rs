//! How far apart batches begin that wait for nobody: what comes alone is done at once, what comes in a stream is done together.
//!
//! Each transaction costs the server the same few hundred microseconds, whether it is for one row or for fifty. One that began with the
//! first row that came would be followed by as many as there is time for, each for a handful.

use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// So long after a batch that was not for a few, more of the stream is expected. Longer than notifications of a stream are apart: what
/// comes between two of them is looked for by who heard the first.
const STREAM_LINGER: Duration = Duration::from_millis(100);

/// Which batch is worth waiting for. Pure but for the times it is given.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// So many are alone or nearly so. There must be fewer in the interval at a rate at which nobody should wait: or one late batch would make
    /// the next one large enough to be followed by a rest again.
    few: usize,
    /// A batch of so many is large: as many are on their way again.
    large: usize,
    /// How long the next one waits for most of those.
    gather_max: Duration,
    /// After a smaller one that was not for a few: from its beginning to the next one's, at least.
    interval: Duration,
    /// Whether there is a rest after each one, also for a single row, as long as it took and no longer than the interval.
    halves: bool,
    last: Option<Last>,
    /// When the last one ended that was not for a few.
    streamed: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Last {
    count: usize,
    began: Instant,
    ended: Instant,
}

impl Pace {
    pub const fn new(few: usize, large: usize, gather_max: Duration, interval: Duration) -> Self {
        Self { few, large, gather_max, interval, halves: false, last: None, streamed: None }
    }

    /// Works for half of the time at most, where batches are not large: a stage that has worked for three milliseconds finds the next row
    /// there, and would go on without an end, each time for one.
    pub const fn half_of_the_time(self) -> Self {
        Self { halves: true, ..self }
    }

    /// The batch that begins now is done with so many as soon as they are there, and with as many as there are at this time. That is now
    /// after a few, or after a silence: who comes alone waits for nobody.
    pub fn next(&self, now: Instant) -> (usize, Instant) {
        let Some(Last { count, began, ended }) = self.last else { return (1, now) };
        // Most of them: not all come again.
        if count >= self.large {
            return (count * 3 / 4, now + self.gather_max);
        }
        let spaced = if count > self.few { began + self.interval } else { now };
        let rested = if self.halves { ended + (ended - began).min(self.interval) } else { now };
        let due = spaced.max(rested);
        if due > now { (self.large, due) } else { (1, now) }
    }

    /// Waits until the next one may begin that waits for nobody in particular.
    pub async fn rest(&self) {
        let now = Instant::now();
        let (_, due) = self.next(now);
        // A timer that is due already may still take a millisecond or two.
        if due > now {
            sleep_until(due).await;
        }
    }

    /// Until it is time to look again after a look that began at `began`: when that is worth it in a stream, else when `wake` says so.
    pub async fn told(&self, wake: &Notify, began: Instant) {
        match self.looks_again(began, Instant::now()) {
            Some(due) => sleep_until(due).await,
            None => wake.notified().await,
        }
    }

    /// There was one for so many, in this time.
    pub fn done(&mut self, count: usize, began: Instant, ended: Instant) {
        self.last = Some(Last { count, began, ended });
        if count > self.few {
            self.streamed = Some(ended);
        }
    }

    /// When to look again without being told, after a look that began at `began`: in a stream as often as it is worth it, because its
    /// writers say so less often (`db::listen`). `None` where no stream lasts at `now`.
    pub(super) fn looks_again(&self, began: Instant, now: Instant) -> Option<Instant> {
        let lasts = self.streamed.is_some_and(|ended| now < ended + STREAM_LINGER);
        lasts.then(|| (began + self.interval).max(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    proptest! {
        #[test]
        fn nobody_waits_longer_than_the_bounds_nor_after_a_silence(
            count in 0usize..200, took in 0u32..20, silence in 0u32..50, halves in any::<bool>(),
            few in 1usize..9, large in 10usize..100, gather in 0u32..5, interval in 0u32..9,
        ) {
            let mut pace = Pace::new(few, large, gather * MS, interval * MS);
            if halves {
                pace = pace.half_of_the_time();
            }
            let began = Instant::now();
            prop_assert_eq!(pace.next(began), (1, began));
            let ended = began + took * MS;
            pace.done(count, began, ended);
            let now = ended + silence * MS;
            let (enough, due) = pace.next(now);
            let wait = due.saturating_duration_since(now);
            prop_assert!(wait <= MS * gather.max(interval));
            prop_assert!(enough <= count.max(large));
            prop_assert!(count > few || halves || wait.is_zero());
            prop_assert!(count >= large || silence < interval || wait.is_zero());
            prop_assert!(!halves || count >= large || wait + silence * MS >= (took * MS).min(interval * MS));
        }
    }

    #[test]
    fn a_stream_of_small_batches_is_slowed_down_and_a_large_one_waits_for_most_of_its_kind() {
        let mut pace = Pace::new(3, 64, 2 * MS, 5 * MS);
        let began = Instant::now();
        pace.done(4, began, began + MS);
        assert_eq!(pace.next(began + 2 * MS), (64, began + 5 * MS));
        pace.done(100, began, began + 40 * MS);
        assert_eq!(pace.next(began + 41 * MS), (75, began + 43 * MS));
        pace.done(3, began, began + MS);
        assert_eq!(pace.next(began + MS), (1, began + MS));
    }

    #[test]
    fn whoever_works_half_of_the_time_rests_after_one_row_as_long_as_it_took_and_not_after_a_silence() {
        let mut pace = Pace::new(3, 64, 2 * MS, 5 * MS).half_of_the_time();
        let began = Instant::now();
        pace.done(1, began, began + 3 * MS);
        assert_eq!(pace.next(began + 4 * MS), (64, began + 6 * MS));
        assert_eq!(pace.next(began + 6 * MS), (1, began + 6 * MS));
        pace.done(1, began, began + 30 * MS);
        assert_eq!(pace.next(began + 31 * MS), (64, began + 35 * MS));
    }

    #[tokio::test(start_paused = true)]
    async fn who_sees_a_stream_looks_again_by_itself_and_after_it_only_when_told() {
        let (mut pace, wake) = (Pace::new(3, 64, Duration::ZERO, 10 * MS), Notify::new());
        let told = async |pace: &Pace, began| tokio::time::timeout(1_000 * MS, pace.told(&wake, began)).await.is_ok();
        let began = Instant::now();
        pace.done(3, began, began);
        assert!(!told(&pace, began).await, "what comes alone is told");
        wake.notify_one();
        assert!(told(&pace, began).await);

        let began = Instant::now();
        pace.done(4, began, began);
        let mut looks = 0;
        while began.elapsed() < STREAM_LINGER {
            let look = Instant::now();
            assert!(told(&pace, look).await);
            assert_eq!(look.elapsed(), 10 * MS);
            looks += 1;
            pace.done(0, look, look);
        }
        assert_eq!(looks, 10);
        assert!(!told(&pace, Instant::now()).await, "the stream has ended");
    }

    #[test]
    fn a_slow_stream_is_not_held_up_for_ever_by_one_late_batch() {
        // One each five milliseconds, two milliseconds of work; then a stall of thirty.
        let (mut pace, start) = (Pace::new(3, 64, Duration::ZERO, 10 * MS), Instant::now());
        let mut now = start;
        let mut done = 0;
        let mut waited = Vec::new();
        for batch in 0..100 {
            let arrived = |now: Instant| (now - start).as_millis() as usize / 5;
            while arrived(now) == done {
                now += MS;
            }
            let (_, due) = pace.next(now);
            waited.push(due.saturating_duration_since(now));
            now = now.max(due);
            let count = arrived(now) - done;
            done += count;
            let began = now;
            now += if batch == 10 { 30 * MS } else { 2 * MS };
            pace.done(count, began, now);
        }
        assert!(waited[12] > Duration::ZERO, "the one after the stall is large");
        assert!(waited[16..].iter().all(Duration::is_zero), "{waited:?}");
    }
}
