//! The replicas of one service: whose turn it is, and who is left out for a moment because it did not answer.
//!
//! Shared by every worker thread. May import nothing of ours.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a replica that refused is asked last; the contract allows one second.
pub const EJECTION: Duration = Duration::from_millis(900);

#[derive(Debug)]
pub struct Replicas {
    replicas: Vec<Replica>,
    turn: AtomicUsize,
    began: Instant,
}

#[derive(Debug)]
struct Replica {
    /// `http://host:port`
    base: String,
    /// Milliseconds since `began`.
    ejected_until: AtomicU64,
}

impl Replicas {
    /// `urls` are base URLs without a path; at least one.
    pub fn new(urls: &[String]) -> Self {
        let replica = |url: &String| Replica { base: url.trim_end_matches('/').to_owned(), ejected_until: AtomicU64::new(0) };
        Self { replicas: urls.iter().map(replica).collect(), turn: AtomicUsize::new(0), began: Instant::now() }
    }

    pub fn base(&self, index: usize) -> &str {
        &self.replicas[index].base
    }

    pub fn bases(&self) -> impl Iterator<Item = &str> {
        self.replicas.iter().map(|replica| replica.base.as_str())
    }

    /// In which order to ask: round robin, the ejected last. With every replica ejected they are all asked the same.
    pub fn order(&self, now: Instant) -> Vec<usize> {
        let count = self.replicas.len();
        let first = self.turn.fetch_add(1, Ordering::Relaxed);
        let now = self.millis(now);
        let mut order: Vec<usize> = (0..count).map(|n| first.wrapping_add(n) % count).collect();
        order.sort_by_key(|&index| self.replicas[index].ejected_until.load(Ordering::Relaxed) > now);
        order
    }

    pub fn eject(&self, index: usize, now: Instant) {
        self.replicas[index].ejected_until.store(self.millis(now + EJECTION), Ordering::Relaxed);
    }

    /// It answered.
    pub fn restore(&self, index: usize) {
        let until = &self.replicas[index].ejected_until;
        if until.load(Ordering::Relaxed) != 0 {
            until.store(0, Ordering::Relaxed);
        }
    }

    fn millis(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.began).as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Replicas {
        Replicas::new(&["http://a/".into(), "http://b".into(), "http://c".into()])
    }

    #[test]
    fn replicas_take_turns() {
        let (replicas, now) = (three(), Instant::now());
        assert_eq!(replicas.base(0), "http://a");
        assert_eq!([replicas.order(now), replicas.order(now), replicas.order(now)], [[0, 1, 2], [1, 2, 0], [2, 0, 1]]);
    }

    #[test]
    fn an_ejected_replica_is_asked_last_for_at_most_a_second() {
        let (replicas, now) = (three(), Instant::now());
        replicas.eject(0, now);
        assert_eq!(replicas.order(now), [1, 2, 0]);
        assert_eq!(replicas.order(now + EJECTION / 2), [1, 2, 0]);
        assert!(EJECTION <= Duration::from_secs(1));
        replicas.order(now);
        assert_eq!(replicas.order(now + EJECTION + Duration::from_millis(1)), [0, 1, 2]);
        replicas.eject(0, now);
        replicas.restore(0);
        replicas.order(now);
        replicas.order(now);
        assert_eq!(replicas.order(now), [0, 1, 2]);
    }

    #[test]
    fn with_every_replica_ejected_all_are_asked_the_same() {
        let (replicas, now) = (three(), Instant::now());
        (0..3).for_each(|index| replicas.eject(index, now));
        assert_eq!([replicas.order(now), replicas.order(now)], [[0, 1, 2], [1, 2, 0]]);
    }
}
