//! The consumer: fetches the partitions it owns, and applies what it has in one transaction a batch, over all of them.
//!
//! A batch's effect, its dead letters and its offsets commit together, so a record is applied exactly once however often it
//! is read. What fails for a while is tried again with back-off for ever; a lost lease drops everything that was fetched.
//!
//! The loop here only chooses between stop, a new assignment and the next batch. [`Inbox`] is the seam to the database,
//! [`keeper`] keeps the leases beside it, [`fetcher`] reads ahead.

mod batch;
mod delivery;
mod fetcher;
mod inbox;
mod keeper;
mod offsets;
mod postgres;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

use crate::config::ConsumerConfig;
use crate::db::{Db, DbError};
use crate::shutdown::Shutdown;
use crate::telemetry::{Incident, SharedIncident};

use super::log::SharedLog;

pub use batch::Batch;
pub use delivery::{Delivery, Position, Received};
pub use inbox::Inbox;
pub use keeper::share;
pub use offsets::{Move, Owned, Standing, next_offsets};
pub use postgres::{Handler, PgInbox};

use fetcher::{Fetched, backoff, count, fetch, pause};
use keeper::{Assignment, Keeper};

/// How often the topic is asked for its number of partitions while it is not there, and a consumer that lost its lease begins anew.
const RETRY: Duration = Duration::from_millis(500);
/// Fetched pieces that wait for the batch in hand; a fetcher with more waits itself.
const FETCHES_WAITING_MAX: usize = 12;

/// One process's consumer of one topic.
pub struct Consumer<I> {
    inbox: Arc<I>,
    log: SharedLog,
    topic: Arc<str>,
    config: ConsumerConfig,
}

enum Ended {
    Stopping,
    LostLease,
}

/// A partition being fetched.
struct Held {
    epoch: i64,
    fetcher: AbortHandle,
}

impl<H: Handler> Consumer<PgInbox<H>> {
    /// `owner` names this process among its replicas.
    pub fn new(db: Db, log: SharedLog, topic: &str, owner: String, config: ConsumerConfig, handler: H) -> Self {
        Self::over(PgInbox::new(db, topic, owner, config.lease, handler), log, topic, config)
    }
}

impl<I: Inbox> Consumer<I> {
    pub fn over(inbox: I, log: SharedLog, topic: &str, config: ConsumerConfig) -> Self {
        Self { inbox: Arc::new(inbox), log, topic: topic.into(), config }
    }

    /// Runs until `stop`; finishes the batch in hand and gives its partitions back.
    pub async fn run(self, stop: Shutdown) {
        let mut incident = Incident::new("consuming");
        while !stop.is_stopping() {
            match self.partitions(&stop).await {
                Ok(Some(partitions)) => {
                    incident.recovered();
                    let keeper =
                        Keeper::start(self.inbox.clone(), self.log.clone(), self.topic.clone(), partitions, self.config.lease);
                    let ended = self.consume(&keeper, &stop).await;
                    keeper.stop().await;
                    if let Ended::Stopping = ended {
                        break;
                    }
                    // Taken anew, under new epochs: nothing of what is still on its way then counts.
                    if let Err(error) = self.inbox.release(None).await {
                        tracing::info!(topic = %self.topic, %error, "leases not given back");
                    }
                }
                Ok(None) => break,
                Err(cause) => incident.failed(&format_args!("{}: {cause}", self.topic)),
            }
            pause(RETRY, &stop).await;
        }
        if let Err(error) = self.inbox.leave().await {
            tracing::info!(topic = %self.topic, %error, "leases not given back; they expire by themselves");
        }
    }

    /// `None` when stopped.
    async fn partitions(&self, stop: &Shutdown) -> Result<Option<i32>, String> {
        let partitions = tokio::select! {
            biased;
            () = stop.stopped() => return Ok(None),
            partitions = self.log.partitions(&self.topic) => partitions.map_err(|error| error.to_string())?,
        };
        self.inbox.ensure(partitions).await.map_err(|error| error.to_string())?;
        Ok(Some(partitions))
    }

    /// Applies batch after batch over what is owned.
    async fn consume(&self, keeper: &Keeper, stop: &Shutdown) -> Ended {
        let (to, mut fetched) = mpsc::channel(FETCHES_WAITING_MAX);
        let mut assignments = keeper.assignments();
        let mut holding = Holding { held: BTreeMap::new(), shed: HashSet::new(), fetchers: JoinSet::new() };
        let incident = SharedIncident::new("fetching");
        let mut waiting = Vec::new();
        loop {
            tokio::select! {
                biased;
                () = stop.stopped() => return Ended::Stopping,
                changed = assignments.changed() => {
                    if changed.is_err() {
                        tracing::error!(topic = %self.topic, "the lease keeper ended; taking the partitions anew");
                        return Ended::LostLease;
                    }
                    let assignment = assignments.borrow_and_update().clone();
                    let start = |owned: &Owned| {
                        let (log, topic, to) = (self.log.clone(), self.topic.clone(), to.clone());
                        fetch(log, topic, owned.clone(), to, incident.clone(), stop.clone())
                    };
                    let surplus = holding.follow(&assignment, start);
                    if !surplus.is_empty() {
                        // Asked for again with the next assignment where it fails now.
                        if let Err(error) = self.inbox.release(Some(&surplus)).await {
                            tracing::debug!(%error, topic = %self.topic, "surplus partitions not given back");
                        }
                    }
                }
                Some(ended) = holding.fetchers.join_next() => {
                    // One that was told to end is cancelled. Any other has broken down, and its partition must not wait for a restart.
                    if !ended.as_ref().is_err_and(tokio::task::JoinError::is_cancelled) {
                        tracing::error!(topic = %self.topic, ?ended, "a fetcher ended; taking the partitions anew");
                        return Ended::LostLease;
                    }
                }
                first = fetched.recv() => {
                    let Some(first) = first else { return Ended::LostLease };
                    waiting.push(first);
                    let mut records = count(&waiting);
                    while records < self.config.batch_records_max && let Ok(more) = fetched.try_recv() {
                        records += count(std::slice::from_ref(&more));
                        waiting.push(more);
                    }
                    let ours = |one: &Fetched| holding.held.get(&one.partition()).is_some_and(|held| held.epoch == one.epoch());
                    let batch = Batch::assemble(&*self.inbox, &self.topic, waiting.drain(..).filter(ours));
                    if !batch.moves.is_empty() && let Some(ended) = self.apply_until_done(Arc::new(batch), stop).await {
                        return ended;
                    }
                }
            }
        }
    }

    /// `None` when the batch is committed.
    async fn apply_until_done(&self, batch: Arc<Batch<I::Event>>, stop: &Shutdown) -> Option<Ended> {
        let mut incident = Incident::new("applying a batch");
        let mut backoff = backoff();
        loop {
            match self.inbox.commit(&batch).await {
                Ok(()) => {
                    incident.recovered();
                    batch.committed(&self.topic);
                    return None;
                }
                Err(DbError::Fenced(cause)) => {
                    tracing::warn!(topic = %self.topic, cause, "the lease is gone; nothing of the batch was committed");
                    return Some(Ended::LostLease);
                }
                Err(error) => incident.failed(&format_args!("{}: {error}", self.topic)),
            }
            pause(backoff.next().unwrap_or(Duration::from_secs(2)), stop).await;
            if stop.is_stopping() {
                return Some(Ended::Stopping);
            }
        }
    }
}

/// What is being fetched.
struct Holding {
    held: BTreeMap<i32, Held>,
    /// Given up for the fair share; a stale assignment that still names them starts nothing.
    shed: HashSet<(i32, i64)>,
    fetchers: JoinSet<()>,
}

impl Holding {
    /// Ends what is another's, begins what is new, and returns what is above the fair share, already ended.
    fn follow<F>(&mut self, assignment: &Assignment, start: impl Fn(&Owned) -> F) -> Vec<i32>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let still =
            |partition: i32, epoch: i64| assignment.owned.iter().any(|one| one.partition == partition && one.epoch == epoch);
        self.held.retain(|partition, held| {
            let keep = still(*partition, held.epoch);
            if !keep {
                held.fetcher.abort();
            }
            keep
        });
        self.shed.retain(|(partition, epoch)| still(*partition, *epoch));
        for one in &assignment.owned {
            if !self.held.contains_key(&one.partition) && !self.shed.contains(&(one.partition, one.epoch)) {
                let fetcher = self.fetchers.spawn(start(one));
                self.held.insert(one.partition, Held { epoch: one.epoch, fetcher });
            }
        }
        while self.held.len() > assignment.share
            && let Some((partition, held)) = self.held.pop_last()
        {
            held.fetcher.abort();
            self.shed.insert((partition, held.epoch));
        }
        self.shed.iter().map(|(partition, _)| *partition).collect()
    }
}
