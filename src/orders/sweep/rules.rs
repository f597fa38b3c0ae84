//! The rules of asking again: which orders, when, how often. Pure; times are the database server's.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

/// How much later than its own time an order may be committed and seen: what a request may wait for the database and for its group's
/// commit, and how far the clocks of replicas and of the server may be apart. An order that comes later than this and then loses its
/// request is asked for by nobody; the audit names it.
pub const LATE_MAX: Duration = Duration::from_secs(20);
/// Back-off grows to this.
pub const DELAY_MAX: Duration = Duration::from_secs(600);
/// Sweeps that have more to do follow each other after this, and no interval is longer than the other.
const INTERVAL_MIN: Duration = Duration::from_secs(1);
const INTERVAL_MAX: Duration = Duration::from_secs(10);

/// How an operator wants it.
#[derive(Clone, Debug)]
pub struct SweepRules {
    /// An order without a result after this is asked for again.
    pub after: Duration,
    /// Requests a second, of all replicas together.
    pub asks_per_second_max: u32,
}

impl SweepRules {
    /// Between two sweeps that find nothing to do.
    pub fn interval(&self) -> Duration {
        (self.after / 2).clamp(Duration::from_millis(50), INTERVAL_MAX)
    }

    /// Between two sweeps while there is more to do.
    pub fn busy_interval(&self) -> Duration {
        self.interval().min(INTERVAL_MIN)
    }

    /// What one sweep may ask for; sweeps are at least [`Self::busy_interval`] apart.
    pub fn asks_max(&self) -> usize {
        let asks = u128::from(self.asks_per_second_max) * self.busy_interval().as_millis() / 1_000;
        usize::try_from(asks).unwrap_or(usize::MAX).max(1)
    }

    /// How long after its `asks`th repeat an order is asked for the next time: `after`, doubled each time up to [`DELAY_MAX`] (but
    /// never below `after`), and up to a quarter more, by the order, so that those of one moment come apart.
    pub fn delay(&self, order: Uuid, asks: u32) -> Duration {
        let doubled = self.after.saturating_mul(2u32.saturating_pow(asks.saturating_sub(1)));
        let base = doubled.min(DELAY_MAX.max(self.after));
        base + base / 4 * scatter(order, asks) / 256
    }
}

/// 0..256, evenly, and always the same for the same repeat.
fn scatter(order: Uuid, asks: u32) -> u32 {
    let (high, low) = order.as_u64_pair();
    let mixed = (high ^ low.rotate_left(32) ^ u64::from(asks)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    u32::try_from(mixed >> 56).unwrap_or_default()
}

/// Where the walk over all orders stands: everything up to here, by (creation time, id), was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Walked {
    pub to: DateTime<Utc>,
    pub id: Uuid,
}

/// An order that the walk came by: every one that waits, and the last of the page whether it waits or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed {
    pub at: Walked,
    /// It has no result, and its first request is on the log or not.
    pub waits: Option<bool>,
}

/// What a page of the walk comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageOutcome {
    /// To be asked for.
    pub found: Vec<Uuid>,
    /// Where the walk stands now; `None` where it did not move.
    pub reached: Option<Walked>,
    /// The next order's request is still unsent: the relay or the log is behind, and so is everything younger.
    pub held: bool,
}

/// Takes the orders of a page, in the walk's order, up to the first whose request is still unsent. That one may yet have its result
/// without any help, and while the log is away its followers are like it: so an outage does not fill `order_retry`.
pub fn page(passed: &[Passed]) -> PageOutcome {
    let free = passed.iter().position(|order| order.waits == Some(false)).unwrap_or(passed.len());
    let found = passed[..free].iter().filter(|order| order.waits.is_some()).map(|order| order.at.id).collect();
    PageOutcome { found, reached: passed[..free].last().map(|order| order.at), held: free < passed.len() }
}

/// Orders younger than this are given their time.
pub fn walk_until(now: DateTime<Utc>, rules: &SweepRules) -> DateTime<Utc> {
    before(now, rules.after)
}

/// Up to here everything is committed; no walk begins later. An earlier walk did only where the server's clock went back since, and
/// what was accepted by the new clock must not be passed by unseen.
pub fn sure(now: DateTime<Utc>, rules: &SweepRules) -> Walked {
    Walked { to: before(now, rules.after + LATE_MAX), id: Uuid::nil() }
}

fn before(now: DateTime<Utc>, duration: Duration) -> DateTime<Utc> {
    let delta = TimeDelta::from_std(duration).unwrap_or(TimeDelta::MAX);
    now.checked_sub_signed(delta).unwrap_or(DateTime::UNIX_EPOCH)
}

/// An order whose time to be asked for has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Due {
    pub order_id: Uuid,
    /// So often it was asked for again.
    pub asks: u32,
    /// It has its result by now.
    pub ended: bool,
    /// All that was asked so far is on the log.
    pub sent: bool,
}

/// What is done about one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// It has ended.
    Forget,
    /// Its last request is not on the log; another would only lie beside it.
    Hold,
    Ask,
    /// The rate's cap is reached; it comes first in the next sweep.
    Leave,
}

/// Decides in the order in which they are due, with `asks_max` asked for at most.
pub fn act(due: &[Due], asks_max: usize) -> Vec<Act> {
    let mut asked = 0;
    let act = |one: &Due| match one {
        Due { ended: true, .. } => Act::Forget,
        Due { sent: false, .. } => Act::Hold,
        _ if asked < asks_max => {
            asked += 1;
            Act::Ask
        }
        _ => Act::Leave,
    };
    due.iter().map(act).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rules(after_ms: u64, asks: u32) -> SweepRules {
        SweepRules { after: Duration::from_millis(after_ms), asks_per_second_max: asks }
    }

    fn at(seconds: i64, id: u128) -> Walked {
        Walked { to: DateTime::from_timestamp(seconds, 0).unwrap(), id: Uuid::from_u128(id) }
    }

    fn passed() -> impl Strategy<Value = Vec<Passed>> {
        let one = (0i64..50, 0u128..1_000, proptest::option::of(any::<bool>()));
        proptest::collection::vec(one, 0..40).prop_map(|mut orders| {
            orders.sort_unstable_by_key(|(at, id, _)| (*at, *id));
            orders.into_iter().map(|(seconds, id, waits)| Passed { at: at(seconds, id), waits }).collect()
        })
    }

    #[test]
    fn the_delay_doubles_to_ten_minutes() {
        let rules = rules(20_000, 1);
        let seconds: Vec<u64> = (1..=8).map(|asks| rules.delay(Uuid::nil(), asks).as_secs()).collect();
        let bases = [20, 40, 80, 160, 320, 600, 600, 600];
        for (delay, base) in seconds.iter().zip(bases) {
            assert!((base..=base * 5 / 4).contains(delay), "{seconds:?}");
        }
    }

    #[test]
    fn no_walk_begins_where_something_may_still_be_committed() {
        let (rules, now) = (rules(20_000, 1), at(1_000, 0).to);
        assert_eq!(walk_until(now, &rules), at(980, 0).to);
        assert_eq!(sure(now, &rules), at(960, 0));
        assert!(sure(DateTime::<Utc>::MIN_UTC, &rules) <= at(0, 0), "no time is too early for it");
    }

    proptest! {
        #[test]
        fn a_delay_is_bounded_whatever_was_asked_and_grows_with_the_asks(
            order in any::<u128>(), asks in any::<u32>(), after_ms in 1u64..=3_600_000,
        ) {
            let (rules, order) = (rules(after_ms, 1), Uuid::from_u128(order));
            let delay = rules.delay(order, asks);
            let top = DELAY_MAX.max(rules.after);
            prop_assert!(delay >= rules.after && delay <= top * 5 / 4, "{delay:?}");
            // By base, without what scatters them: twice as long is always longer.
            prop_assert!(rules.delay(order, asks.saturating_add(2)) >= delay.min(top));
            prop_assert_eq!(delay, rules.delay(order, asks));
        }

        #[test]
        fn orders_of_one_moment_come_apart(seed in any::<u64>()) {
            let rules = rules(20_000, 1);
            let ids = (0..64u64).map(|n| Uuid::from_u64_pair(seed, n.wrapping_mul(0x1234_5678_9abc_def1)));
            let delays: std::collections::HashSet<Duration> = ids.map(|id| rules.delay(id, 1)).collect();
            prop_assert!(delays.len() > 32, "{}", delays.len());
        }

        #[test]
        fn a_page_finds_what_waits_up_to_the_first_unsent_and_moves_no_further(orders in passed()) {
            let outcome = page(&orders);
            let unsent = orders.iter().position(|order| order.waits == Some(false));
            let taken = &orders[..unsent.unwrap_or(orders.len())];
            prop_assert_eq!(outcome.held, unsent.is_some());
            prop_assert_eq!(outcome.reached, taken.last().map(|order| order.at));
            let waiting: Vec<Uuid> = taken.iter().filter(|order| order.waits == Some(true)).map(|order| order.at.id).collect();
            prop_assert_eq!(outcome.found, waiting);
        }

        #[test]
        fn what_is_due_is_asked_for_once_it_is_sent_and_never_above_the_cap(
            due in proptest::collection::vec((any::<u128>(), any::<bool>(), any::<bool>()), 0..60), cap in 0usize..40,
        ) {
            let due: Vec<Due> = due.into_iter().map(|(id, ended, sent)| Due { order_id: Uuid::from_u128(id), asks: 0, ended, sent }).collect();
            let acts = act(&due, cap);
            prop_assert_eq!(acts.len(), due.len());
            let asked = acts.iter().filter(|act| **act == Act::Ask).count();
            prop_assert!(asked <= cap);
            for (one, act) in due.iter().zip(&acts) {
                prop_assert_eq!(*act == Act::Forget, one.ended);
                prop_assert_eq!(*act == Act::Hold, !one.ended && !one.sent);
                prop_assert!(*act != Act::Leave || asked == cap, "left although there was room");
            }
            // First due, first asked.
            let left = acts.iter().position(|act| *act == Act::Leave).unwrap_or(acts.len());
            prop_assert!(!acts[left..].contains(&Act::Ask));
        }

        #[test]
        fn no_more_is_asked_in_a_second_than_the_cap(after_ms in 100u64..=3_600_000, cap in 1u32..=100_000) {
            let rules = rules(after_ms, cap);
            let sweeps_a_second = 1_000 / rules.busy_interval().as_millis().max(1);
            let asked = u128::try_from(rules.asks_max()).unwrap() * sweeps_a_second;
            // One a sweep is always allowed, or a small cap would stop it altogether.
            prop_assert!(asked <= u128::from(cap).max(sweeps_a_second), "{asked}");
            prop_assert!(rules.interval() <= rules.after && rules.busy_interval() <= rules.interval());
        }
    }
}
