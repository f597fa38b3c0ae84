//! The sweeper: an order without a result after a while is asked for again, so what the log lost heals without hands.
//!
//! A walk over all orders by creation time, a little behind the present, finds those that wait although their request is on the log,
//! and keeps them in `order_retry` until they end. Each is asked for under a new event id, with back-off, under one cap for all
//! replicas, and never while its last request is unsent. Payments answers a repeat with what it decided.
//!
//! [`rules`] decides, [`Sweeper`] is the step on a database, [`run`] only waits between steps. No index on the status: ending an order
//! stays a heap-only update. Owns `sweep_cursor` and `order_retry`.

pub mod rules;
mod step;
mod store;

use std::time::{Duration, Instant};

use crate::db::DbError;
use crate::shutdown::Shutdown;
use crate::telemetry::Incident;

pub use rules::SweepRules;
pub use step::Sweeper;

/// How long after a failure it is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// One sweep.
pub trait Sweep: Send + Sync {
    /// Sweeps once, or finds that it is not time. Idempotent; may be dropped at any await.
    fn sweep(&self) -> impl Future<Output = Result<Swept, DbError>> + Send;
}

/// What a sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Orders that the walk came by.
    pub looked: u64,
    /// Of these, without a result and not known before.
    pub found: u64,
    /// Asked for again.
    pub asked: u64,
    /// Forgotten: they have ended.
    pub ended: u64,
    /// Without a result, now; counted up to 100 000.
    pub waiting: u64,
    /// Until the next one.
    pub next: Duration,
}

/// Sweeps until `stop`.
pub async fn run(step: impl Sweep, stop: Shutdown) {
    let mut failing = Incident::new("sweeping the orders");
    let mut told = Told::default();
    while !stop.is_stopping() {
        let swept = tokio::select! {
            biased;
            swept = step.sweep() => swept,
            () = stop.stopped() => return,
        };
        let next = match swept {
            Ok(swept) => {
                failing.recovered();
                metrics::counter!("shopd_orders_reasked_total").increment(swept.asked);
                metrics::gauge!("shopd_orders_without_result").set(u32::try_from(swept.waiting).unwrap_or(u32::MAX));
                told.tell(&swept);
                swept.next
            }
            Err(error) => {
                failing.failed(&error);
                RETRY
            }
        };
        tokio::select! {
            biased;
            () = tokio::time::sleep(next) => {}
            () = stop.stopped() => {}
        }
    }
}

/// What the log was told: an incident lasts from the first order that is asked for again until none waits.
#[derive(Default)]
struct Told {
    since: Option<Instant>,
    asked: u64,
}

impl Told {
    fn tell(&mut self, swept: &Swept) {
        let Swept { asked, waiting, .. } = *swept;
        self.asked += asked;
        match self.since {
            None if asked > 0 => {
                self.since = Some(Instant::now());
                tracing::warn!(
                    asked,
                    waiting,
                    "orders without a result are asked for again; requests or results were lost, or are late"
                );
            }
            Some(since) if waiting == 0 => {
                let lasted_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
                tracing::info!(asked = self.asked, lasted_ms, "every order that was asked for again has its result");
                *self = Self::default();
            }
            Some(_) if asked > 0 => tracing::info!(asked, waiting, "orders without a result are asked for again"),
            _ => {}
        }
    }
}
