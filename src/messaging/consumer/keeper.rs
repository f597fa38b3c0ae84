//! Keeps a consumer's leases while it works: three heartbeats a lease, one at once when another gave something back, and as many
//! partitions as are its fair share.
//!
//! It runs beside the loop, so a batch that takes long costs no lease. What it takes, the loop fetches; what is above the share
//! the loop gives back, because only the loop knows that nothing of it is being applied any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::telemetry::Incident;

use super::super::log::SharedLog;
use super::inbox::Inbox;
use super::offsets::Owned;

/// A replica that dies is missed after a lease and one of these. What another gave back is taken at once, or within one where the word of it
/// was lost. Each costs an idle process a third of a millisecond of CPU.
const HEARTBEATS_A_LEASE: u32 = 3;
/// How often a topic is asked whether it has more partitions now.
const PARTITIONS_INTERVAL: Duration = Duration::from_secs(10);

/// What is this replica's now, and how much should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assignment {
    pub owned: Vec<Owned>,
    pub share: usize,
}

/// How many of `partitions` are the fair share of the replica with this rank (0 for the first) among `members`. The shares add up
/// to all partitions, and no two differ by more than one.
pub fn share(partitions: usize, members: usize, rank: usize) -> usize {
    let members = members.max(1);
    partitions / members + usize::from(rank < partitions % members)
}

pub struct Keeper {
    assignments: watch::Receiver<Arc<Assignment>>,
    /// Asks for a heartbeat before its time.
    early: Arc<Notify>,
    stop: CancellationToken,
    tasks: [JoinHandle<()>; 2],
}

impl Keeper {
    pub fn start<I: Inbox>(inbox: Arc<I>, log: SharedLog, topic: Arc<str>, partitions: i32, lease: Duration) -> Self {
        let (to, assignments) = watch::channel(Arc::new(Assignment::default()));
        let stop = CancellationToken::new();
        let (known, early) = (Arc::new(AtomicI32::new(partitions)), Arc::new(Notify::new()));
        let counting = tokio::spawn(count_partitions(inbox.clone(), log, topic.clone(), known.clone(), stop.clone()));
        let every = lease / HEARTBEATS_A_LEASE;
        let beating = tokio::spawn(beat(inbox, topic, known, every, early.clone(), to, stop.clone()));
        Self { assignments, early, stop, tasks: [beating, counting] }
    }

    pub fn assignments(&self) -> watch::Receiver<Arc<Assignment>> {
        self.assignments.clone()
    }

    /// The next heartbeat goes at once: another replica may have given something back.
    pub fn beat_now(&self) {
        self.early.notify_one();
    }

    /// Ends the heartbeat; the leases stay until they are given back or expire.
    pub async fn stop(self) {
        self.stop.cancel();
        for task in self.tasks {
            // One that broke down has ended, too.
            let _ = task.await;
        }
    }
}

async fn beat<I: Inbox>(
    inbox: Arc<I>,
    topic: Arc<str>,
    partitions: Arc<AtomicI32>,
    every: Duration,
    early: Arc<Notify>,
    to: watch::Sender<Arc<Assignment>>,
    stop: CancellationToken,
) {
    let mut incident = Incident::new("renewing leases");
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
            () = early.notified() => {}
        }
        let partitions = partitions.load(Ordering::Relaxed);
        let kept = async {
            let standing = inbox.heartbeat().await?;
            let share = share(partitions as usize, standing.members, standing.rank);
            let mut owned = standing.owned;
            if owned.len() < share {
                owned.extend(inbox.acquire(partitions, share - owned.len()).await?);
            }
            Ok(Assignment { owned, share })
        };
        match kept.await {
            // Also when nothing changed: what the loop could not give back it tries again.
            Ok(assignment) => {
                incident.recovered();
                drop(to.send(Arc::new(assignment)));
            }
            // A replica that owns nothing has no batch that would say so.
            Err::<_, crate::db::DbError>(error) => incident.failed(&format_args!("{topic}: {error}")),
        }
    }
}

/// Beside the heartbeat, which must not wait for a broker.
async fn count_partitions<I: Inbox>(
    inbox: Arc<I>,
    log: SharedLog,
    topic: Arc<str>,
    partitions: Arc<AtomicI32>,
    stop: CancellationToken,
) {
    let count = async {
        loop {
            tokio::time::sleep(PARTITIONS_INTERVAL).await;
            let Ok(now) = log.partitions(&topic).await else { continue };
            let before = partitions.load(Ordering::Relaxed);
            if now > before && inbox.ensure(now).await.is_ok() {
                tracing::info!(%topic, before, now, "the topic has more partitions");
                partitions.store(now, Ordering::Relaxed);
            }
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = count => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn fair_shares_add_up_and_differ_by_one_at_most(partitions in 0usize..100, members in 1usize..40) {
            let shares: Vec<usize> = (0..members).map(|rank| share(partitions, members, rank)).collect();
            prop_assert_eq!(shares.iter().sum::<usize>(), partitions);
            prop_assert!(shares[0] - shares[members - 1] <= 1);
        }
    }
}
