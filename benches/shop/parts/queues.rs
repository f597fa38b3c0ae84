//! What waits on its way from accepted to final, while a load runs: by the counts of what has come how far.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::super::Result;
use super::super::rig::{Counter, Shop};

/// Records that wait, at a time. Counted one after the other, so a few less or more than there were.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Waiting {
    /// Seconds from the start.
    pub at: f64,
    /// Accepted, and not on Kafka: in orders' outbox.
    pub unsent_requests: u64,
    /// On Kafka, and not decided: payments' lag.
    pub unread_requests: u64,
    /// Decided, and not on Kafka: in payments' outbox.
    pub unsent_results: u64,
    /// On Kafka, and not applied: orders' lag.
    pub unread_results: u64,
}

impl Waiting {
    pub fn all(&self) -> u64 {
        self.unsent_requests + self.unread_requests + self.unsent_results + self.unread_results
    }
}

/// The stations of an order, each a counter with where it stood before.
pub struct Queues<'s> {
    stations: [(Counter<'s>, i64); 4],
    start: Instant,
}

impl<'s> Queues<'s> {
    /// Of a shop in which nothing waits.
    pub async fn of(shop: &'s Shop<'_>) -> Result<Self> {
        let counters = [shop.requests_published(), shop.decided().await?, shop.results_published(), shop.finished().await?];
        let mut stations = Vec::new();
        for counter in counters {
            let from = counter.read().await?;
            stations.push((counter, from));
        }
        let stations = stations.try_into().map_err(|_| "four stations")?;
        Ok(Self { stations, start: Instant::now() })
    }

    async fn look(&self, accepted: &AtomicU64) -> Result<Waiting> {
        // The later station first: what passes both meanwhile counts as waiting, so that nothing that waits is left out.
        let mut done = [0; 4];
        for (at, (counter, from)) in self.stations.iter().enumerate().rev() {
            done[at] = (counter.read().await? - from).max(0) as u64;
        }
        let accepted = accepted.load(Ordering::Relaxed);
        Ok(Waiting {
            at: self.start.elapsed().as_secs_f64(),
            unsent_requests: accepted.saturating_sub(done[0]),
            unread_requests: done[0].saturating_sub(done[1]),
            unsent_results: done[1].saturating_sub(done[2]),
            unread_results: done[2].saturating_sub(done[3]),
        })
    }

    /// Looks every `interval` until `work` is done.
    pub async fn watch<T>(
        &self,
        accepted: Arc<AtomicU64>,
        interval: Duration,
        work: impl Future<Output = Result<T>>,
    ) -> Result<(T, Vec<Waiting>)> {
        let mut work = std::pin::pin!(work);
        let mut seen = Vec::new();
        loop {
            tokio::select! {
                done = &mut work => return Ok((done?, seen)),
                () = tokio::time::sleep(interval) => seen.push(self.look(&accepted).await?),
            }
        }
    }

    /// Waits until `orders` have come to their end.
    pub async fn empty(&self, orders: u64) -> Result<()> {
        let (finished, from) = &self.stations[3];
        super::super::rig::Progress::begin().until(finished, *from, orders as i64).await?;
        Ok(())
    }
}

/// By how many records the queues were longer at the end: the mean of the last quarter over that of the second.
pub fn growth(seen: &[Waiting]) -> f64 {
    let quarter = seen.len() / 4;
    let mean = |some: &[Waiting]| some.iter().map(Waiting::all).sum::<u64>() as f64 / some.len().max(1) as f64;
    mean(&seen[quarter * 3..]) - mean(&seen[quarter..quarter * 2])
}
