//! What a consumer is reading: a fetcher for each of its partitions, except those that stopped.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use metrics::Gauge;
use tokio::task::{AbortHandle, JoinError, JoinSet};

use super::fetcher::Fetched;
use super::keeper::Assignment;
use super::offsets::{Move, Owned};

/// A partition of ours.
struct Held {
    epoch: i64,
    /// What comes next begins here.
    next: i64,
    /// The log's end, as far as it was seen.
    end: i64,
    /// `None` where it stopped.
    fetcher: Option<AbortHandle>,
    gauges: Gauges,
}

/// Of a partition, 0 as soon as it is not ours.
struct Gauges {
    lag: Gauge,
    epoch: Gauge,
}

impl Drop for Gauges {
    fn drop(&mut self) {
        self.lag.set(0.0);
        self.epoch.set(0.0);
    }
}

pub struct Holding {
    topic: Arc<str>,
    held: BTreeMap<i32, Held>,
    /// Given up for the fair share; a stale assignment that still names them starts nothing.
    shed: HashSet<(i32, i64)>,
    fetchers: JoinSet<()>,
}

impl Holding {
    pub fn of(topic: Arc<str>) -> Self {
        Self { topic, held: BTreeMap::new(), shed: HashSet::new(), fetchers: JoinSet::new() }
    }

    /// Ends what is another's, begins what is new, and returns what is above the fair share, already ended.
    pub fn follow<F>(&mut self, assignment: &Assignment, start: impl Fn(&Owned) -> F) -> Vec<i32>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let still =
            |partition: i32, epoch: i64| assignment.owned.iter().any(|one| one.partition == partition && one.epoch == epoch);
        self.held.retain(|partition, held| {
            let keep = still(*partition, held.epoch);
            if !keep {
                held.end();
            }
            keep
        });
        self.shed.retain(|(partition, epoch)| still(*partition, *epoch));
        for one in &assignment.owned {
            if !self.held.contains_key(&one.partition) && !self.shed.contains(&(one.partition, one.epoch)) {
                let fetcher = Some(self.fetchers.spawn(start(one)));
                let gauges = Gauges::new(&self.topic, one);
                let held = Held { epoch: one.epoch, next: one.next_offset, end: one.next_offset, fetcher, gauges };
                self.held.insert(one.partition, held);
            }
        }
        while self.held.len() > assignment.share
            && let Some((partition, mut held)) = self.held.pop_last()
        {
            held.end();
            self.shed.insert((partition, held.epoch));
        }
        // Not one that came back to us meanwhile, under a new epoch.
        self.shed.iter().map(|(partition, _)| *partition).filter(|partition| !self.held.contains_key(partition)).collect()
    }

    /// Whether this is what comes next of a partition of ours; it counts as taken then. Anything else was left by a fetcher that
    /// has ended.
    pub fn expects<E>(&mut self, one: &Fetched<E>) -> bool {
        let (from, to) = one.span();
        let held = self.held.get_mut(&one.partition());
        let held = held.filter(|held| held.fetcher.is_some() && held.epoch == one.epoch() && held.next == from);
        held.map(|held| {
            held.next = to;
            if let Fetched::Records { end_offset, .. } = one {
                held.end = *end_offset;
            }
        })
        .is_some()
    }

    /// Whether it is ours under this epoch and did not stop.
    pub fn reads(&self, partition: i32, epoch: i64) -> bool {
        self.held.get(&partition).is_some_and(|held| held.epoch == epoch && held.fetcher.is_some())
    }

    /// So far is committed.
    pub fn committed(&self, moves: &[Move]) {
        for Move { partition, to, .. } in moves {
            if let Some(held) = self.held.get(partition) {
                held.gauges.lag.set((held.end - to).max(0) as f64);
            }
        }
    }

    /// Reads no more of it.
    pub fn stop(&mut self, at: &Owned) {
        if let Some(held) = self.held.get_mut(&at.partition).filter(|held| held.epoch == at.epoch) {
            held.end();
            held.next = at.next_offset;
        }
    }

    /// Reads on where there is room again.
    pub fn resume<F>(&mut self, full: &BTreeSet<i32>, start: impl Fn(&Owned) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        for (partition, held) in &mut self.held {
            if held.fetcher.is_none() && !full.contains(partition) {
                let owned = Owned { partition: *partition, next_offset: held.next, epoch: held.epoch };
                tracing::info!(partition, next_offset = held.next, "there is room; the partition goes on");
                held.fetcher = Some(self.fetchers.spawn(start(&owned)));
            }
        }
    }

    /// How many stopped.
    pub fn stopped(&self) -> usize {
        self.held.values().filter(|held| held.fetcher.is_none()).count()
    }

    pub fn has_stopped(&self) -> bool {
        self.stopped() > 0
    }

    /// All that is held, also what stopped.
    pub fn owned(&self) -> Vec<Owned> {
        let owned = |(partition, held): (&i32, &Held)| Owned { partition: *partition, next_offset: held.next, epoch: held.epoch };
        self.held.iter().map(owned).collect()
    }

    /// Returns when one ended that was not told to: its partition must not wait for a restart.
    pub async fn fetcher_ended(&mut self) -> Result<(), JoinError> {
        loop {
            match self.fetchers.join_next().await {
                Some(ended) if ended.as_ref().is_err_and(JoinError::is_cancelled) => {}
                Some(ended) => return ended,
                None => std::future::pending().await,
            }
        }
    }
}

impl Gauges {
    fn new(topic: &str, of: &Owned) -> Self {
        let labels = [("topic", topic.to_owned()), ("partition", of.partition.to_string())];
        let epoch = metrics::gauge!("shopd_consumer_lease_epoch", &labels);
        epoch.set(of.epoch as f64);
        Self { lag: metrics::gauge!("shopd_consumer_lag_records", &labels), epoch }
    }
}

impl Held {
    fn end(&mut self) {
        if let Some(fetcher) = self.fetcher.take() {
            fetcher.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assignment(owned: &[(i32, i64)], share: usize) -> Assignment {
        let owned = owned.iter().map(|(partition, epoch)| Owned { partition: *partition, next_offset: 0, epoch: *epoch });
        Assignment { owned: owned.collect(), share }
    }

    #[tokio::test]
    async fn what_is_above_the_share_is_given_back_until_it_is_gone_and_never_what_came_back_under_a_new_epoch() {
        let mut holding = Holding::of("t".into());
        let mut follow = |owned: &[(i32, i64)], share| {
            let surplus = holding.follow(&assignment(owned, share), |_| std::future::pending());
            (surplus, holding.held.iter().map(|(partition, held)| (*partition, held.epoch)).collect::<Vec<_>>())
        };
        assert_eq!(follow(&[(0, 1), (1, 1)], 2), (vec![], vec![(0, 1), (1, 1)]));
        assert_eq!(follow(&[(0, 1), (1, 1)], 1), (vec![1], vec![(0, 1)]));
        // Not given back yet, or an assignment from before that: nothing of it is begun again.
        assert_eq!(follow(&[(0, 1), (1, 1)], 2), (vec![1], vec![(0, 1)]));
        // The heartbeat still saw it, and then it was free and taken again.
        assert_eq!(follow(&[(0, 1), (1, 1), (1, 2)], 2), (vec![], vec![(0, 1), (1, 2)]));
        assert_eq!(follow(&[(0, 1), (1, 2)], 2), (vec![], vec![(0, 1), (1, 2)]));
        // Another's now.
        assert_eq!(follow(&[(1, 2)], 2), (vec![], vec![(1, 2)]));
    }
}
