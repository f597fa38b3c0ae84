//! How many requests may be under way at a service, and how long others wait their turn: load is shed by the time it waits, before
//! everybody's latency collapses.
//!
//! A queue that empties now and then is a burst, and may take `queue_time_max`. One that has not been empty for a while is standing:
//! waiting in it helps nobody, so it is kept as short as a few milliseconds (controlled delay, CoDel's idea as servers use it).
//! Each service has its own: one that hangs takes nothing from the other.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit};

/// A queue that was not empty for so long is standing.
const STANDING_AFTER: Duration = Duration::from_millis(100);
/// How long one may wait in it.
const STANDING_WAIT: Duration = Duration::from_millis(20);

pub struct Admission {
    permits: Semaphore,
    queue_time_max: Duration,
    began: Instant,
    /// When somebody last found no queue, milliseconds since `began`.
    empty_at_ms: AtomicU64,
}

/// It waited its time out; nothing of it was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more is asked than can be answered")]
pub struct Shed;

impl Admission {
    pub fn new(in_flight_max: usize, queue_time_max: Duration) -> Self {
        let permits = Semaphore::new(in_flight_max.min(Semaphore::MAX_PERMITS));
        Self { permits, queue_time_max, began: Instant::now(), empty_at_ms: AtomicU64::new(0) }
    }

    /// A place, until dropped.
    pub async fn enter(&self) -> Result<SemaphorePermit<'_>, Shed> {
        if let Ok(permit) = self.permits.try_acquire() {
            self.empty_at_ms.store(self.now_ms(), Ordering::Relaxed);
            return Ok(permit);
        }
        let not_empty_ms = self.now_ms().saturating_sub(self.empty_at_ms.load(Ordering::Relaxed));
        match tokio::time::timeout(wait_max(Duration::from_millis(not_empty_ms), self.queue_time_max), self.permits.acquire()).await
        {
            // It is never closed.
            Ok(permit) => permit.map_err(|_| Shed),
            Err(_) => Err(Shed),
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

fn wait_max(not_empty: Duration, queue_time_max: Duration) -> Duration {
    if not_empty >= STANDING_AFTER { STANDING_WAIT.min(queue_time_max) } else { queue_time_max }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_millis(500);

    #[test]
    fn a_burst_may_wait_and_a_standing_queue_may_not() {
        assert_eq!(wait_max(Duration::ZERO, MAX), MAX);
        assert_eq!(wait_max(STANDING_AFTER, MAX), STANDING_WAIT);
        assert_eq!(wait_max(STANDING_AFTER, Duration::from_millis(5)), Duration::from_millis(5));
    }

    #[tokio::test]
    async fn a_place_that_becomes_free_goes_to_who_waits_and_one_that_does_not_sheds_them() {
        let admission = Admission::new(1, Duration::from_millis(50));
        let first = admission.enter().await.unwrap();
        assert_eq!(admission.enter().await.unwrap_err(), Shed);
        let (second, ()) = tokio::join!(admission.enter(), async { drop(first) });
        assert!(second.is_ok());
    }
}
