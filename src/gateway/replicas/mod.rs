//! The replicas of one service: which one to ask next, and what is known of each.
//!
//! Of two that are well, chosen at random, the one with fewer requests under way is asked (the power of two choices), weighed by
//! its share while it comes back. With every replica ejected all are asked the same. Who they are is configured, and changes where a
//! name has several addresses ([`names`]). Shared by every worker thread; owns the retry budget. May import shutdown only.

mod checks;
mod health;
mod names;
mod replica;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use actix_web::http::uri::{Authority, InvalidUri};
use futures::future::join;
use tokio::sync::watch;
use tower::retry::budget::{Budget, TpsBudget};

pub use checks::any_live;
use health::MISSED_MAX;
pub use health::Seen;
pub use replica::{Picked, Replica, departures};

use crate::shutdown::Shutdown;

/// Repeats are at most this part of the requests of the budget's window.
const BUDGET_PART: f32 = 0.2;
/// And these a second whatever the requests: a replica that dies takes what was under way with it all at once.
const BUDGET_PER_S_MIN: u32 = 100;
const BUDGET_WINDOW: Duration = Duration::from_secs(10);

pub struct Replicas {
    /// The configured base URLs' hosts and ports.
    names: Vec<Authority>,
    known: watch::Sender<Vec<Arc<Replica>>>,
    /// Those whose gauges were set, by label: a gauge would stay for ever as a replica that is gone left it.
    shown: Mutex<Vec<String>>,
    budget: TpsBudget,
    began: Instant,
}

impl Replicas {
    /// `urls` are base URLs `http://host:port`; at least one.
    ///
    /// # Errors
    /// A URL that is none.
    pub fn new(urls: &[String]) -> Result<Self, InvalidUri> {
        let name = |url: &String| -> Result<Authority, InvalidUri> {
            let base = url.trim_end_matches('/');
            base.strip_prefix("http://").unwrap_or(base).parse()
        };
        let names: Vec<Authority> = urls.iter().map(name).collect::<Result<_, _>>()?;
        let named = |(index, name): (usize, &Authority)| Arc::new(Replica::named(index, name));
        Ok(Self {
            known: watch::Sender::new(names.iter().enumerate().map(named).collect()),
            names,
            shown: Mutex::default(),
            budget: TpsBudget::new(BUDGET_WINDOW, BUDGET_PER_S_MIN, BUDGET_PART),
            began: Instant::now(),
        })
    }

    /// Follows the names' addresses and asks every replica whether it is alive, until `stop`.
    pub async fn watch(&self, stop: &Shutdown) {
        join(names::follow(self, names::lookup, stop), checks::watch(self, stop)).await;
    }

    fn len(&self) -> usize {
        self.known.borrow().len()
    }

    /// The replica to ask next, beside those whose ids are in `tried`; `None` where they are all.
    pub fn pick(&self, tried: &[usize]) -> Option<Picked> {
        let now_ms = self.now_ms();
        let known = self.known.borrow();
        let untried = |replica: &Replica| !tried.contains(&replica.id());
        let picked = match choose(&known, |replica| untried(replica) && replica.is_well(now_ms), now_ms) {
            Some(replica) => replica,
            // Better a bad one than none: it may have come back.
            None => choose(&known, untried, now_ms)?,
        };
        Some(Picked::new(picked.clone()))
    }

    /// Whether there is another replica than those in `tried`.
    pub fn has_untried(&self, tried: &[usize]) -> bool {
        self.known.borrow().iter().any(|replica| !tried.contains(&replica.id()))
    }

    /// Whether another replica than those in `tried` is well.
    pub fn has_well(&self, tried: &[usize]) -> bool {
        let now_ms = self.now_ms();
        self.known.borrow().iter().any(|replica| !tried.contains(&replica.id()) && replica.is_well(now_ms))
    }

    /// Takes note of how a replica answered; says so in the log where that changes what it is asked.
    pub fn see(&self, replica: &Replica, seen: Seen) {
        let now_ms = self.now_ms();
        let Some((before, after, is_dead)) = replica.see(seen, now_ms) else { return };
        let base = replica.base();
        match (before.is_ejected(now_ms), after.is_ejected(now_ms)) {
            (false, true) => {
                metrics::counter!("shopd_gateway_ejections_total", "replica" => base.to_owned()).increment(1);
                tracing::info!(replica = base, ?seen, breaker = after.breaker(now_ms), "a replica is asked last for a while");
            }
            (true, false) => tracing::info!(replica = base, "a replica is asked again"),
            _ => {}
        }
        if is_dead {
            if after.missed() == MISSED_MAX {
                tracing::info!(
                    replica = base,
                    checks = MISSED_MAX,
                    "a replica misses its checks; what is under way there is asked elsewhere"
                );
            }
            replica.give_up();
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
        let set = |base: &str, open: f64, is_ejected: bool| {
            let labels = [("service", service.to_owned()), ("replica", base.to_owned())];
            metrics::gauge!("shopd_gateway_breaker_open", &labels).set(open);
            metrics::gauge!("shopd_gateway_replica_ejected", &labels).set(f64::from(u8::from(is_ejected)));
        };
        let mut current = Vec::new();
        for replica in self.known.borrow().iter() {
            let health = replica.health();
            let open = match health.breaker(now_ms) {
                "open" => 1.0,
                "half_open" => 0.5,
                _ => 0.0,
            };
            set(replica.base(), open, health.is_ejected(now_ms));
            current.push(replica.base().to_owned());
        }
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        shown.iter().filter(|base| !current.contains(base)).for_each(|base| set(base, 0.0, false));
        *shown = current;
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Of those that fit.
fn choose(known: &[Arc<Replica>], fits: impl Fn(&Replica) -> bool, now_ms: u64) -> Option<&Arc<Replica>> {
    let candidates = || known.iter().filter(|replica| fits(replica));
    let count = candidates().count();
    if count <= 1 {
        return candidates().next();
    }
    let first = rand::random_range(0..count);
    let second = (first + rand::random_range(1..count)) % count;
    let (first, second) = (candidates().nth(first)?, candidates().nth(second)?);
    Some(if second.load(now_ms) < first.load(now_ms) { second } else { first })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> (Replicas, [Arc<Replica>; 3]) {
        let replicas = Replicas::new(&["http://a/".into(), "http://b:1".into(), "http://c".into()]).unwrap();
        let each = std::array::from_fn(|index| replicas.known.borrow()[index].clone());
        (replicas, each)
    }

    fn ids<const N: usize>(of: [&Replica; N]) -> [usize; N] {
        of.map(Replica::id)
    }

    #[test]
    fn of_two_the_one_with_less_to_do_is_asked() {
        let (replicas, each) = three();
        assert_eq!(each[0].base(), "http://a");
        let picked: Vec<_> = (0..300).map(|_| replicas.pick(&[]).unwrap()).collect();
        let counts = each.each_ref().map(|replica| replica.in_flight());
        assert!(counts.iter().all(|count| (95..=105).contains(count)), "{counts:?}");
        drop(picked);
        assert_eq!(each.map(|replica| replica.in_flight()), [0; 3]);
    }

    #[test]
    fn an_ejected_replica_is_asked_only_where_no_other_is_left() {
        let (replicas, [a, b, c]) = three();
        replicas.see(&b, Seen::Refused);
        assert!((0..100).all(|_| replicas.pick(&[]).unwrap().replica.id() != b.id()));
        let others = ids([&a, &c]);
        assert_eq!(replicas.pick(&others).unwrap().replica.id(), b.id());
        assert!(!replicas.has_well(&others) && replicas.has_untried(&others) && replicas.has_well(&[a.id()]));
        let all = ids([&a, &b, &c]);
        assert!(replicas.pick(&all).is_none() && !replicas.has_untried(&all));
        replicas.see(&b, Seen::Answered);
        assert!(replicas.has_well(&others));
    }

    #[test]
    fn with_every_replica_ejected_all_are_asked_the_same() {
        let (replicas, each) = three();
        each.iter().for_each(|replica| replicas.see(replica, Seen::Refused));
        let mut seen: Vec<usize> = (0..200).map(|_| replicas.pick(&[]).unwrap().replica.id()).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, each.map(|replica| replica.id()));
    }

    #[test]
    fn a_replica_that_came_back_gets_less_at_first() {
        let (replicas, [back, ..]) = three();
        replicas.see(&back, Seen::Refused);
        replicas.see(&back, Seen::CheckPassed);
        let _picked: Vec<_> = (0..100).map(|_| replicas.pick(&[]).unwrap()).collect();
        assert!((1..20).contains(&back.in_flight()), "{}", back.in_flight());
    }

    #[test]
    fn a_breaker_lets_one_request_try() {
        let (replicas, [broken, b, c]) = three();
        (0..5).for_each(|_| replicas.see(&broken, Seen::Broken));
        assert!(!broken.is_well(replicas.now_ms()));
        let later_ms = replicas.now_ms() + 2_000;
        assert!(broken.is_well(later_ms));
        let _trying = replicas.pick(&ids([&b, &c])).unwrap();
        assert!(!broken.is_well(later_ms));
    }

    #[test]
    fn repeats_are_a_part_of_the_requests() {
        let (replicas, _) = three();
        let reserve = (BUDGET_WINDOW.as_secs() as u32 * BUDGET_PER_S_MIN) as usize;
        let granted = |replicas: &Replicas| (0..10_000).take_while(|_| replicas.may_repeat()).count();
        assert!((reserve..=reserve + 10).contains(&granted(&replicas)));
        (0..1_000).for_each(|_| replicas.deposit());
        assert!((190..=210).contains(&granted(&replicas)));
    }
}
