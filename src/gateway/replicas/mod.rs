//! The replicas of one service: which one to ask next, and what is known of each.
//!
//! Of two that are well, chosen at random, the one with fewer requests under way is asked (the power of two choices), weighed by
//! its share while it comes back. With every replica ejected all are asked the same. Shared by every worker thread; owns the retry
//! budget. May import nothing of ours.

mod checks;
mod health;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use actix_web::http::uri::{Authority, InvalidUri};
use tokio::sync::Notify;
use tower::retry::budget::{Budget, TpsBudget};

pub use checks::{any_live, watch};
pub use health::Seen;
use health::{Health, MISSED_MAX};

/// Repeats are at most this part of the requests of the budget's window.
const BUDGET_PART: f32 = 0.2;
/// And these a second whatever the requests: a replica that dies takes what was under way with it all at once.
const BUDGET_PER_S_MIN: u32 = 100;
const BUDGET_WINDOW: Duration = Duration::from_secs(10);

static NEXT_ID: AtomicUsize = AtomicUsize::new(0);

pub struct Replicas {
    replicas: Vec<Replica>,
    budget: TpsBudget,
    began: Instant,
}

pub struct Replica {
    /// `http://host:port`
    base: String,
    /// Among all replicas of the process.
    pub id: usize,
    authority: Authority,
    in_flight: AtomicU32,
    health: Mutex<Health>,
    /// The health's lock need not be taken: there is nothing in it.
    is_settled: AtomicBool,
    /// It misses its checks: what is under way there should be asked elsewhere.
    died: Notify,
}

/// One request under way at a replica, until dropped.
pub struct Picked<'r> {
    pub index: usize,
    pub replica: &'r Replica,
}

impl Drop for Picked<'_> {
    fn drop(&mut self) {
        self.replica.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Replicas {
    /// `urls` are base URLs `http://host:port`; at least one.
    ///
    /// # Errors
    /// A URL that is none.
    pub fn new(urls: &[String]) -> Result<Self, InvalidUri> {
        let replica = |url: &String| -> Result<Replica, InvalidUri> {
            let base = url.trim_end_matches('/').to_owned();
            Ok(Replica {
                authority: base.strip_prefix("http://").unwrap_or(&base).parse()?,
                base,
                id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
                in_flight: AtomicU32::new(0),
                health: Mutex::default(),
                is_settled: AtomicBool::new(true),
                died: Notify::new(),
            })
        };
        Ok(Self {
            replicas: urls.iter().map(replica).collect::<Result<_, _>>()?,
            budget: TpsBudget::new(BUDGET_WINDOW, BUDGET_PER_S_MIN, BUDGET_PART),
            began: Instant::now(),
        })
    }

    pub fn len(&self) -> usize {
        self.replicas.len()
    }

    /// The replica to ask next, beside those in `tried`; `None` where they are all.
    pub fn pick(&self, tried: &[usize]) -> Option<Picked<'_>> {
        let now_ms = self.now_ms();
        let untried = |index: &usize| !tried.contains(index);
        let well = |index: &usize| untried(index) && self.replicas[*index].is_well(now_ms);
        let index = match self.choose(well, now_ms) {
            Some(index) => index,
            // Better a bad one than none: it may have come back.
            None => self.choose(untried, now_ms)?,
        };
        let replica = &self.replicas[index];
        replica.in_flight.fetch_add(1, Ordering::Relaxed);
        Some(Picked { index, replica })
    }

    fn choose(&self, fits: impl Fn(&usize) -> bool, now_ms: u64) -> Option<usize> {
        let candidates = || (0..self.replicas.len()).filter(&fits);
        let count = candidates().count();
        if count <= 1 {
            return candidates().next();
        }
        let first = rand::random_range(0..count);
        let second = (first + rand::random_range(1..count)) % count;
        let (first, second) = (candidates().nth(first)?, candidates().nth(second)?);
        let load = |index: usize| self.replicas[index].load(now_ms);
        Some(if load(second) < load(first) { second } else { first })
    }

    /// Whether another replica than those in `tried` is well.
    pub fn has_well(&self, tried: &[usize]) -> bool {
        let now_ms = self.now_ms();
        (0..self.replicas.len()).any(|index| !tried.contains(&index) && self.replicas[index].is_well(now_ms))
    }

    /// Takes note of how a replica answered; says so in the log where that changes what it is asked.
    pub fn see(&self, index: usize, seen: Seen) {
        let replica = &self.replicas[index];
        if matches!(seen, Seen::Answered | Seen::CheckPassed) && replica.is_settled.load(Ordering::Relaxed) {
            return;
        }
        let now_ms = self.now_ms();
        let (before, after, is_dead) = {
            let mut health = replica.health();
            let before = *health;
            let is_dead = health.see(seen, now_ms);
            replica.is_settled.store(health.is_settled(now_ms), Ordering::Relaxed);
            (before, *health, is_dead)
        };
        let base = replica.base.as_str();
        match (before.is_ejected(now_ms), after.is_ejected(now_ms)) {
            (false, true) => {
                metrics::counter!("shopd_gateway_ejections_total", "replica" => base.to_owned()).increment(1);
                tracing::info!(replica = base, ?seen, breaker = after.breaker(now_ms), "a replica is asked last for a while");
            }
            (true, false) => tracing::info!(replica = base, "a replica is asked again"),
            _ => {}
        }
        if is_dead {
            tracing::info!(
                replica = base,
                checks = MISSED_MAX,
                "a replica misses its checks; what is under way there is asked elsewhere"
            );
            replica.died.notify_waiters();
        }
    }

    /// Counts a request towards the budget.
    pub fn deposit(&self) {
        self.budget.deposit();
    }

    /// Whether one may be repeated: not where so many are that repeats would be what keeps the service down.
    pub fn may_repeat(&self) -> bool {
        self.budget.withdraw()
    }

    /// Sets the gauges of each replica; `service` names them.
    pub fn gauge(&self, service: &'static str) {
        let now_ms = self.now_ms();
        for replica in &self.replicas {
            let health = *replica.health();
            let open = match health.breaker(now_ms) {
                "open" => 1.0,
                "half_open" => 0.5,
                _ => 0.0,
            };
            let labels = [("service", service.to_owned()), ("replica", replica.base.clone())];
            metrics::gauge!("shopd_gateway_breaker_open", &labels).set(open);
            metrics::gauge!("shopd_gateway_replica_ejected", &labels).set(f64::from(u8::from(health.is_ejected(now_ms))));
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Replica {
    pub fn base(&self) -> &str {
        &self.base
    }

    /// `host:port`, for `Host`.
    pub fn authority(&self) -> &str {
        self.authority.as_str()
    }

    /// For connecting.
    pub fn address(&self) -> (&str, u16) {
        (self.authority.host().trim_matches(['[', ']']), self.authority.port_u16().unwrap_or(80))
    }

    /// Ends when the replica misses its checks.
    pub async fn died(&self) {
        self.died.notified().await;
    }

    fn health(&self) -> std::sync::MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_well(&self, now_ms: u64) -> bool {
        if self.is_settled.load(Ordering::Relaxed) {
            return true;
        }
        let health = *self.health();
        // One request at a time finds out whether the breaker can close.
        !(health.is_ejected(now_ms) || health.is_on_trial(now_ms) && self.in_flight.load(Ordering::Relaxed) > 0)
    }

    /// What one more request would make of it.
    fn load(&self, now_ms: u64) -> u64 {
        let share = if self.is_settled.load(Ordering::Relaxed) { 100 } else { self.health().share(now_ms) };
        (u64::from(self.in_flight.load(Ordering::Relaxed)) + 1) * 100 / share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Replicas {
        Replicas::new(&["http://a/".into(), "http://b:1".into(), "http://c".into()]).unwrap()
    }

    #[test]
    fn of_two_the_one_with_less_to_do_is_asked() {
        let replicas = three();
        assert_eq!(replicas.replicas[0].base(), "http://a");
        let mut counts = [0; 3];
        let picked: Vec<_> = (0..300).map(|_| replicas.pick(&[]).unwrap()).collect();
        picked.iter().for_each(|picked| counts[picked.index] += 1);
        assert!(counts.iter().all(|count| (95..=105).contains(count)), "{counts:?}");
        drop(picked);
        assert!(replicas.replicas.iter().all(|replica| replica.in_flight.load(Ordering::Relaxed) == 0));
    }

    #[test]
    fn an_ejected_replica_is_asked_only_where_no_other_is_left() {
        let replicas = three();
        replicas.see(1, Seen::Refused);
        assert!((0..100).all(|_| replicas.pick(&[]).unwrap().index != 1));
        assert_eq!(replicas.pick(&[0, 2]).unwrap().index, 1);
        assert!(!replicas.has_well(&[0, 2]) && replicas.has_well(&[0]));
        assert!(replicas.pick(&[0, 1, 2]).is_none());
        replicas.see(1, Seen::Answered);
        assert!(replicas.has_well(&[0, 2]));
    }

    #[test]
    fn with_every_replica_ejected_all_are_asked_the_same() {
        let replicas = three();
        (0..3).for_each(|index| replicas.see(index, Seen::Refused));
        let mut seen: Vec<usize> = (0..200).map(|_| replicas.pick(&[]).unwrap().index).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, [0, 1, 2]);
    }

    #[test]
    fn a_replica_that_came_back_gets_less_at_first() {
        let replicas = three();
        replicas.see(0, Seen::Refused);
        replicas.see(0, Seen::CheckPassed);
        let picked: Vec<_> = (0..100).map(|_| replicas.pick(&[]).unwrap()).collect();
        let count = picked.iter().filter(|picked| picked.index == 0).count();
        assert!((1..20).contains(&count), "{count}");
    }

    #[test]
    fn a_breaker_lets_one_request_try() {
        let replicas = three();
        (0..5).for_each(|_| replicas.see(0, Seen::Broken));
        assert!(!replicas.replicas[0].is_well(replicas.now_ms()));
        let later_ms = replicas.now_ms() + 2_000;
        assert!(replicas.replicas[0].is_well(later_ms));
        let _trying = replicas.pick(&[1, 2]).unwrap();
        assert!(!replicas.replicas[0].is_well(later_ms));
    }

    #[test]
    fn repeats_are_a_part_of_the_requests() {
        let replicas = three();
        let reserve = (BUDGET_WINDOW.as_secs() as u32 * BUDGET_PER_S_MIN) as usize;
        let granted = |replicas: &Replicas| (0..10_000).take_while(|_| replicas.may_repeat()).count();
        assert!((reserve..=reserve + 10).contains(&granted(&replicas)));
        (0..1_000).for_each(|_| replicas.deposit());
        assert!((190..=210).contains(&granted(&replicas)));
    }
}
