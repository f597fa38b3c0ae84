//! How many requests come together, found out by waiting for more of them now and then. Pure but for the times it is given.
//!
//! Whoever was answered comes again, or others come whether anybody was answered or not. The first kind is waited for until all are
//! there, and a moment longer is a moment lost. Of the second kind there are more the longer one waits, and a commit for ten costs the server
//! little more than one for two. Both look the same until one waits for more than came the last time: none come, or some do.

use std::time::Duration;

use tokio::time::Instant;

/// From the beginning of one batch for several to that of the next, where fewer come than are waited for.
const INTERVAL: Duration = Duration::from_millis(4);
/// A commit for so many takes about as long as the interval: their answers are just being sent. The next batch waits for them a little.
const LARGE: usize = 8;
const GATHER_MAX: Duration = Duration::from_millis(1);
/// Of more than twice so many only one half is waited for: while it commits the answers of the other one go out and its next requests come in.
const HALVED: usize = 16;
/// Batches between two tries whether more come. One that finds none costs those who are there the interval.
const TRY_AFTER: u32 = 256;

/// See the module's documentation.
#[derive(Clone, Copy, Debug)]
pub struct Crowd {
    last: Option<(usize, Instant)>,
    /// So many come.
    size: usize,
    /// Batches until the next try.
    try_in: u32,
}

impl Crowd {
    pub const fn new() -> Self {
        Self { last: None, size: 2, try_in: TRY_AFTER }
    }

    /// The batch that begins now is done with so many as soon as they are there, and with as many as there are at this time. After one for a
    /// single request that is now: who comes alone waits for nobody.
    pub fn next(&self, now: Instant) -> (usize, Instant) {
        match self.last {
            Some((count, began)) if count > 1 => {
                let due = began + INTERVAL;
                let due = if count >= LARGE { due.max(now + GATHER_MAX) } else { due };
                let size = if self.try_in == 0 { self.size * 2 } else { self.size };
                (size.min(HALVED.max(size / 2)), due)
            }
            _ => (1, now),
        }
    }

    /// There was a batch for so many, which began then; `enough` were waited for.
    pub fn done(&mut self, count: usize, enough: usize, began: Instant) {
        self.last = Some((count, began));
        if enough <= 1 {
            return;
        }
        if count >= enough {
            // More do come; where that was a try, there may be still more.
            self.size = if self.try_in == 0 { self.size * 2 } else { self.size.max(count) };
            self.try_in = self.try_in.saturating_sub(1);
        } else {
            self.size = count.max(2).max(if count >= HALVED { self.size / 2 } else { 0 });
            self.try_in = TRY_AFTER;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const US: Duration = Duration::from_micros(1);

    /// Batches of a second, where a commit takes a millisecond, and `arrivals` tells how many are there at a time after the last
    /// answers, in microseconds, of so many that were answered.
    fn batches(mut waiting: impl FnMut(usize, u32) -> usize) -> Vec<(usize, u32)> {
        let (mut crowd, start) = (Crowd::new(), Instant::now());
        let (mut now, mut answered, mut done) = (start, 0, Vec::new());
        while now < start + Duration::from_secs(1) {
            let ended = now;
            let mut count = 0;
            while count == 0 {
                now += 50 * US;
                count = waiting(answered, (now - ended).as_micros() as u32);
            }
            let (enough, due) = crowd.next(now);
            while count < enough && now < due {
                now += 50 * US;
                count = waiting(answered, (now - ended).as_micros() as u32);
            }
            crowd.done(count, enough, now);
            done.push((count, (now - ended).as_micros() as u32));
            now += 1_000 * US;
            answered = count;
        }
        done
    }

    fn mean(numbers: impl Iterator<Item = usize>) -> f64 {
        let numbers: Vec<usize> = numbers.collect();
        numbers.iter().sum::<usize>() as f64 / numbers.len() as f64
    }

    #[test]
    fn clients_that_wait_for_their_answers_are_not_waited_for_longer_than_they_take() {
        for clients in [2, 4, 7] {
            // All are back 200 us after their answers.
            let done = batches(|_, after| if after >= 200 { clients } else { 0 });
            let waited = mean(done.iter().map(|(_, waited)| *waited as usize));
            assert!(done.iter().skip(5).all(|(count, _)| *count == clients), "{clients}: {done:?}");
            assert!(waited < 300.0, "{clients}: {waited} us");
        }
        let alone = batches(|_, after| usize::from(after >= 200));
        assert!(alone.iter().all(|(count, waited)| (*count, *waited) == (1, 200)));
    }

    #[test]
    fn requests_that_come_by_themselves_are_committed_together() {
        // Two thousand a second; two have come while the last commit went on.
        let mut left = 0.0;
        let mut at = 0;
        let mut count = 0;
        let done = batches(|_, after| {
            if after <= at {
                (left, count) = (left + 1_000.0 / 500.0, 0);
                at = 0;
            }
            left += f64::from(after - at) / 500.0;
            at = after;
            count += left as usize;
            left -= (left as usize) as f64;
            count
        });
        let late = &done[done.len() * 2 / 3..];
        assert!(mean(late.iter().map(|(count, _)| *count)) >= 6.0, "{late:?}");
        assert!(done.iter().all(|(_, waited)| *waited <= 4_050), "{done:?}");
    }

    proptest! {
        #[test]
        fn no_batch_is_waited_for_longer_than_the_bounds(counts in proptest::collection::vec((0usize..300, 0u32..9_000), 0..400)) {
            let (mut crowd, mut now) = (Crowd::new(), Instant::now());
            for (count, since) in counts {
                let (enough, due) = crowd.next(now);
                prop_assert!(enough >= 1);
                prop_assert!(due <= now + INTERVAL.max(GATHER_MAX));
                prop_assert!(enough == 1 || crowd.last.is_some_and(|(count, _)| count > 1));
                crowd.done(count, enough, now);
                now += since * US;
            }
        }
    }
}
