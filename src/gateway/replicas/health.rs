//! What is known of one replica from how it answered: a pure rule over a clock in milliseconds.
//!
//! Refused or late: it is asked last for a moment, or until a check finds it alive. Broken again and again: its breaker opens,
//! for longer each time it fails its trial. What comes back gets its share little by little.

/// How long a replica that refused is asked last; the contract allows one second.
pub const EJECTION_MS: u64 = 900;
/// Consecutive broken or late answers that open the breaker.
const FAILURES_MAX: u32 = 5;
/// How long the breaker stays open the first time, and at most.
const OPEN_MS: u64 = 900;
const OPEN_MS_MAX: u64 = 10_000;
/// Missed checks after which what is under way there is asked elsewhere: one alone may be a busy machine.
pub const MISSED_MAX: u32 = 2;
/// How long a replica that came back gets less than its share.
pub const SLOW_START_MS: u64 = 5_000;
/// Its share at the beginning, of 100.
const SHARE_MIN: u64 = 10;

/// What was seen of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Any whole answer.
    Answered,
    /// No connection.
    Refused,
    /// The connection ended, or what came was no HTTP.
    Broken,
    /// No answer in time.
    Late,
    CheckPassed,
    CheckMissed,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Asked last until then.
    ejected_until_ms: u64,
    /// A passed check ends the ejection; not where the breaker is open, because a check asks for life only.
    is_open: bool,
    failures: u32,
    opened: u32,
    missed: u32,
    /// When it came back.
    since_ms: Option<u64>,
}

impl Health {
    /// Of one that begins now, beside others that may be at work already.
    pub fn new_at(now_ms: u64) -> Self {
        Self { since_ms: Some(now_ms), ..Self::default() }
    }

    /// Takes note. True where what is under way at the replica should be asked elsewhere.
    pub fn see(&mut self, seen: Seen, now_ms: u64) -> bool {
        match seen {
            Seen::Answered => {
                if self.is_ejected(now_ms) || self.failures >= FAILURES_MAX || self.missed > 0 {
                    self.since_ms = Some(now_ms);
                }
                *self = Self { since_ms: self.since_ms, ..Self::default() };
            }
            Seen::Refused => self.eject(now_ms + EJECTION_MS),
            Seen::Broken => self.fail(now_ms),
            Seen::Late => {
                self.eject(now_ms + EJECTION_MS);
                self.fail(now_ms);
            }
            Seen::CheckPassed => {
                self.missed = 0;
                if !self.is_open && self.ejected_until_ms > 0 {
                    self.ejected_until_ms = 0;
                    self.since_ms = Some(now_ms);
                }
            }
            Seen::CheckMissed => {
                self.missed = self.missed.saturating_add(1);
                self.eject(now_ms + EJECTION_MS);
                // Each time anew: there may have been no other that was well.
                return self.missed >= MISSED_MAX;
            }
        }
        false
    }

    fn fail(&mut self, now_ms: u64) {
        self.failures = self.failures.saturating_add(1);
        if self.failures >= FAILURES_MAX {
            let open_ms = (OPEN_MS << self.opened.min(8)).min(OPEN_MS_MAX);
            // What fails while it is open anyway was under way before.
            if !(self.is_open && self.is_ejected(now_ms)) {
                self.opened = self.opened.saturating_add(1);
                self.eject(now_ms + open_ms);
            }
            self.is_open = true;
        }
    }

    fn eject(&mut self, until_ms: u64) {
        self.ejected_until_ms = self.ejected_until_ms.max(until_ms);
    }

    /// Checks that were missed since one passed.
    pub fn missed(&self) -> u32 {
        self.missed
    }

    pub fn is_ejected(&self, now_ms: u64) -> bool {
        self.ejected_until_ms > now_ms
    }

    /// The breaker was open and the time has come for one request to try.
    pub fn is_on_trial(&self, now_ms: u64) -> bool {
        self.is_open && !self.is_ejected(now_ms)
    }

    /// Of 100: what the replica should get, beside one that was always well.
    pub fn share(&self, now_ms: u64) -> u64 {
        let Some(since_ms) = self.since_ms else { return 100 };
        let age_ms = now_ms.saturating_sub(since_ms).min(SLOW_START_MS);
        SHARE_MIN + (100 - SHARE_MIN) * age_ms / SLOW_START_MS
    }

    /// Nothing to remember: neither a failure nor a return that is not long ago.
    pub fn is_settled(&self, now_ms: u64) -> bool {
        let settled = Self { since_ms: self.since_ms, ..Self::default() };
        *self == settled && self.share(now_ms) == 100
    }

    /// For the metrics.
    pub fn breaker(&self, now_ms: u64) -> &'static str {
        match (self.is_open, self.is_ejected(now_ms)) {
            (false, _) => "closed",
            (true, true) => "open",
            (true, false) => "half_open",
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_refused_connection_ejects_for_at_most_a_second() {
        let mut health = Health::default();
        health.see(Seen::Refused, 1_000);
        assert!(health.is_ejected(1_000) && health.is_ejected(1_000 + EJECTION_MS - 1));
        assert!(!health.is_ejected(1_000 + EJECTION_MS));
        const { assert!(EJECTION_MS <= 1_000) };
    }

    #[test]
    fn a_check_that_finds_it_alive_ends_an_ejection_and_its_share_grows() {
        let mut health = Health::default();
        health.see(Seen::Refused, 0);
        health.see(Seen::CheckPassed, 300);
        assert!(!health.is_ejected(300));
        let shares = [300, 300 + SLOW_START_MS / 2, 300 + SLOW_START_MS].map(|at| health.share(at));
        assert_eq!(shares, [10, 55, 100]);
        assert!(!health.is_settled(300) && health.is_settled(300 + SLOW_START_MS));
    }

    #[test]
    fn missed_checks_eject_until_one_passes_and_from_the_second_on_each_gives_up_what_is_under_way() {
        let mut health = Health::default();
        assert!(!health.see(Seen::CheckMissed, 0));
        assert!(health.see(Seen::CheckMissed, 500));
        assert!(health.see(Seen::CheckMissed, 1_000));
        assert!(health.is_ejected(1_500));
        health.see(Seen::CheckPassed, 1_500);
        assert!(!health.is_ejected(1_500));
    }

    #[test]
    fn the_breaker_opens_after_failures_in_a_row_for_longer_each_time_and_a_check_does_not_close_it() {
        let mut health = Health::default();
        (0..4).for_each(|_| assert!(!health.see(Seen::Broken, 0)));
        assert!(!health.is_ejected(0));
        health.see(Seen::Broken, 0);
        assert_eq!((health.is_ejected(OPEN_MS - 1), health.breaker(0)), (true, "open"));
        health.see(Seen::CheckPassed, 10);
        assert!(health.is_ejected(10));
        // Others that were under way when it opened do not prolong it.
        (0..9).for_each(|_| assert!(!health.see(Seen::Broken, 10)));
        assert!(health.is_on_trial(OPEN_MS) && health.breaker(OPEN_MS) == "half_open");
        let mut now_ms = OPEN_MS;
        for open_ms in [1_800, 3_600, 7_200, OPEN_MS_MAX, OPEN_MS_MAX] {
            health.see(Seen::Broken, now_ms);
            assert!(health.is_ejected(now_ms + open_ms - 1) && health.is_on_trial(now_ms + open_ms));
            now_ms += open_ms;
        }
        health.see(Seen::Answered, now_ms);
        assert!(!health.is_ejected(now_ms) && !health.is_on_trial(now_ms) && health.share(now_ms) == 10);
        (0..4).for_each(|_| assert!(!health.see(Seen::Broken, now_ms)));
        assert!(!health.is_ejected(now_ms));
    }

    fn seen() -> impl Strategy<Value = Seen> {
        use Seen::*;
        prop_oneof![Just(Answered), Just(Refused), Just(Broken), Just(Late), Just(CheckPassed), Just(CheckMissed)]
    }

    proptest! {
        #[test]
        fn nothing_ejects_for_longer_than_the_bound_and_an_answer_always_brings_it_back(
            all in proptest::collection::vec((seen(), 0u64..2_000), 0..60)
        ) {
            let mut health = Health::default();
            let mut now_ms = 0;
            for (seen, later_ms) in all {
                now_ms += later_ms;
                health.see(seen, now_ms);
                prop_assert!(!health.is_ejected(now_ms + OPEN_MS_MAX));
                prop_assert!((SHARE_MIN..=100).contains(&health.share(now_ms)));
            }
            health.see(Seen::Answered, now_ms);
            prop_assert!(!health.is_ejected(now_ms) && !health.is_on_trial(now_ms));
            prop_assert!(health.is_settled(now_ms + SLOW_START_MS));
        }
    }
}
