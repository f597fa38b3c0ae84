//! Keeps a consumer's leases while it works: three heartbeats a lease, one at once when another gave something back, and as many
//! partitions as are its fair share.
//!
//! It runs beside the loop, so a batch that takes long costs no lease. What it takes, the loop fetches; what is above the share
//! the loop gives back, because only the loop knows that nothing of it is being applied any more.
//!
//! Where there are neighbours it asks the log whether it is there: nothing is the share of a replica that alone has lost its way to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::telemetry::Incident;

use super::super::log::SharedLog;
use super::super::reach::{PROBE_INTERVAL, Reach};
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
    tasks: [JoinHandle<()>; 3],
}

/// What the tasks tell one another.
struct Known {
    /// Of the topic.
    partitions: AtomicI32,
    /// There are other replicas.
    neighbours: watch::Sender<bool>,
    /// As the last heartbeat learnt.
    cut_off: AtomicBool,
    reach: Arc<Reach>,
}

impl Known {
    /// What the heartbeat says. Who is cut off is sure first: a way that lets one call in ten through would take partitions back with each.
    fn reaches_log(&self) -> bool {
        if self.cut_off.load(Ordering::Relaxed) { self.reach.is_sure() } else { self.reach.is_reached() }
    }
}

impl Keeper {
    pub fn start<I: Inbox>(
        inbox: Arc<I>,
        log: SharedLog,
        reach: Arc<Reach>,
        topic: Arc<str>,
        partitions: i32,
        lease: Duration,
    ) -> Self {
        let (to, assignments) = watch::channel(Arc::new(Assignment::default()));
        let stop = CancellationToken::new();
        let (neighbours, cut_off) = (watch::Sender::new(false), AtomicBool::new(false));
        let known = Arc::new(Known { partitions: AtomicI32::new(partitions), neighbours, cut_off, reach });
        let early = Arc::new(Notify::new());
        let beside = |task: BoxFuture<'static, ()>| {
            let stop = stop.clone();
            tokio::spawn(async move {
                stop.run_until_cancelled(task).await;
            })
        };
        let counting = beside(count_partitions(inbox.clone(), log.clone(), topic.clone(), known.clone()).boxed());
        let probing = beside(probe(log, known.clone()).boxed());
        let every = lease / HEARTBEATS_A_LEASE;
        let beating = tokio::spawn(beat(inbox, topic, known, every, early.clone(), to, stop.clone()));
        Self { assignments, early, stop, tasks: [beating, counting, probing] }
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
    known: Arc<Known>,
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
        let partitions = known.partitions.load(Ordering::Relaxed);
        let kept = async {
            let standing = inbox.heartbeat(known.reaches_log()).await?;
            let neighbours = standing.others > 0;
            known.neighbours.send_if_modified(|before| std::mem::replace(before, neighbours) != neighbours);
            match (known.cut_off.swap(standing.cut_off, Ordering::Relaxed), standing.cut_off) {
                (false, true) => {
                    tracing::warn!(%topic, "this replica alone has lost its way to the log; others go on with its partitions");
                }
                (true, false) => tracing::info!(%topic, "this replica shares the partitions again"),
                _ => {}
            }
            let share = if standing.cut_off { 0 } else { share(partitions as usize, standing.members, standing.rank) };
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
async fn count_partitions<I: Inbox>(inbox: Arc<I>, log: SharedLog, topic: Arc<str>, known: Arc<Known>) {
    loop {
        tokio::time::sleep(PARTITIONS_INTERVAL).await;
        let Ok(now) = log.partitions(&topic).await else { continue };
        let before = known.partitions.load(Ordering::Relaxed);
        if now > before && inbox.ensure(now).await.is_ok() {
            tracing::info!(%topic, before, now, "the topic has more partitions");
            known.partitions.store(now, Ordering::Relaxed);
        }
    }
}

/// Only where it matters to somebody, and until it is over. Alone it wakes for nothing.
async fn probe(log: SharedLog, known: Arc<Known>) {
    let mut neighbours = known.neighbours.subscribe();
    loop {
        if known.reach.is_reached() && neighbours.wait_for(|there| *there).await.is_err() {
            return;
        }
        tokio::time::sleep(PROBE_INTERVAL).await;
        known.reach.probe(&*log).await;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::super::reach::CUT_OFF_AFTER;
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_is_cut_off_says_that_it_reaches_the_log_when_it_is_sure_of_it() {
        let (neighbours, cut_off) = (watch::Sender::new(true), AtomicBool::new(false));
        let known = Known { partitions: AtomicI32::new(3), neighbours, cut_off, reach: Arc::default() };
        known.reach.heard();
        assert!(known.reaches_log());
        known.cut_off.store(true, Ordering::Relaxed);
        known.reach.heard();
        assert!(!known.reaches_log(), "one call came through");
        for _ in 0..5 {
            tokio::time::advance(CUT_OFF_AFTER / 5).await;
            known.reach.heard();
        }
        assert!(known.reaches_log());
    }

    proptest! {
        #[test]
        fn fair_shares_add_up_and_differ_by_one_at_most(partitions in 0usize..100, members in 1usize..40) {
            let shares: Vec<usize> = (0..members).map(|rank| share(partitions, members, rank)).collect();
            prop_assert_eq!(shares.iter().sum::<usize>(), partitions);
            prop_assert!(shares[0] - shares[members - 1] <= 1);
        }
    }
}
