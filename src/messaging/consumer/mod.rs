//! The consumer: fetches the partitions it owns, and applies what it has in one transaction a batch, over all of them.
//!
//! A batch's effect, its dead letters and its offsets commit together, so a record is applied exactly once however often it
//! is read. What fails for a while is tried again with back-off for ever; a lost lease drops everything that was fetched.
//!
//! A record that keeps failing is parked and its key's later ones wait; see [`super::dead_letter`]. Where too many wait the partition
//! stops, and goes on by itself when there is room.
//!
//! The loop here only chooses between stop, a new assignment, what waits beside the log, and the next batch. [`Inbox`] is the seam
//! to the database, [`keeper`] keeps the leases beside it, [`fetcher`] reads ahead, [`holding`] knows what is being read, [`gather`] puts the next
//! batch together.

mod batch;
mod delivery;
mod fetcher;
mod gather;
mod handler;
mod holding;
mod inbox;
mod isolate;
mod keeper;
mod offsets;
mod postgres;
mod queue;
mod traced;
mod upkeep;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout_at};

use crate::config::ConsumerConfig;
use crate::db::{Db, DbError, Pace};
use crate::shutdown::Shutdown;
use crate::telemetry::{Incident, SharedIncident};

use super::log::SharedLog;
use super::reach::Reach;

pub use batch::Batch;
pub use delivery::{Delivery, Position, Received};
pub use handler::Handler;
pub use inbox::{Committed, Inbox, Upkeep};
pub use keeper::share;
pub use offsets::{Fence, Move, Owned, Standing, next_offsets};
pub use postgres::PgInbox;

use fetcher::{Source, backoff, fetch, pause};
use gather::{Gathered, QUIET};
use holding::Holding;
use keeper::Keeper;

/// How often the topic is asked for its number of partitions while it is not there, and a consumer that lost its lease begins anew.
const RETRY: Duration = Duration::from_millis(500);
/// How often what waits beside the log is looked at when nobody asks for it; where nothing waits, and nothing else has changed, for what
/// might have come without a word.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(1);
const UPKEEP_INTERVAL_IDLE: Duration = Duration::from_secs(10);
/// Fetched pieces that wait for the batch in hand; a fetcher with more waits itself.
const FETCHES_WAITING_MAX: usize = 12;

/// A batch of so many takes longer to free than to hand to another thread.
const MANY: usize = 256;

/// After a large batch there is more on the log than is fetched at this moment. Small ones begin at once: a stream is paced where it is sent,
/// by the relay's pages, and a second pace behind that one only makes orders wait (docs/adr/0010).
const PACE: Pace = Pace::new(2, 64, Duration::from_millis(2), Duration::ZERO);

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

impl<H: Handler> Consumer<PgInbox<H>> {
    /// `owner` names this process among its replicas.
    pub fn new(db: Db, log: SharedLog, topic: &str, owner: String, config: ConsumerConfig, handler: H) -> Self {
        Self::over(PgInbox::new(db, topic, owner, &config, handler), log, topic, config)
    }
}

impl<I: Inbox> Consumer<I> {
    pub fn over(inbox: I, log: SharedLog, topic: &str, config: ConsumerConfig) -> Self {
        Self { inbox: Arc::new(inbox), log, topic: topic.into(), config }
    }

    /// Runs until `stop`; finishes the batch in hand and gives its partitions back.
    pub async fn run(self, stop: Shutdown) {
        let mut incident = Incident::new("consuming");
        let reach = Arc::new(Reach::default());
        // From the beginning: the first one would go unnoticed by who watches for an increase.
        metrics::counter!("shopd_consumer_offset_resets_total", "topic" => self.topic.to_string()).increment(0);
        while !stop.is_stopping() {
            match self.partitions(&stop).await {
                Ok(Some(partitions)) => {
                    incident.recovered();
                    let (inbox, log, topic) = (self.inbox.clone(), self.log.clone(), self.topic.clone());
                    let keeper = Keeper::start(inbox, log, reach.clone(), topic, partitions, self.config.lease);
                    let ended = self.consume(&keeper, &reach, &stop).await;
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
        // Letters need an owner, also those of partitions that are no more.
        let in_use = self.inbox.partitions_in_use().await.map_err(|error| error.to_string())?;
        let partitions = partitions.max(in_use);
        self.inbox.ensure(partitions).await.map_err(|error| error.to_string())?;
        Ok(Some(partitions))
    }

    /// Applies batch after batch over what is owned.
    async fn consume(&self, keeper: &Keeper, reach: &Arc<Reach>, stop: &Shutdown) -> Ended {
        let (to, mut fetched) = mpsc::channel(FETCHES_WAITING_MAX);
        let mut assignments = keeper.assignments();
        let mut holding = Holding::of(self.topic.clone());
        let incident = SharedIncident::new("fetching");
        let mut upkeep = Incident::new("looking after what is parked");
        let mut gathered = Gathered::new(self.topic.clone(), self.config.batch_records_max);
        let mut pace = PACE;
        let (together, took) = (
            metrics::histogram!("shopd_consumer_batch_records", "topic" => self.topic.to_string()),
            metrics::histogram!("shopd_consumer_batch_duration_seconds", "topic" => self.topic.to_string()),
        );
        let (mut look_after, mut looked, mut waits, mut assigned) = (false, None::<Instant>, true, Arc::default());
        loop {
            let start = |owned: &Owned| {
                let (log, inbox, topic, to) = (self.log.clone(), self.inbox.clone(), self.topic.clone(), to.clone());
                let source = Source { log, reach: reach.clone(), topic };
                fetch(source, inbox, owned.clone(), to, incident.clone(), stop.clone())
            };
            let mut applied = false;
            tokio::select! {
                biased;
                () = stop.stopped() => return Ended::Stopping,
                changed = assignments.changed() => {
                    if changed.is_err() {
                        tracing::error!(topic = %self.topic, "the lease keeper ended; taking the partitions anew");
                        return Ended::LostLease;
                    }
                    let assignment = assignments.borrow_and_update().clone();
                    let surplus = holding.follow(&assignment, start);
                    gathered.keep_ours(&holding);
                    if !surplus.is_empty() {
                        // Asked for again with the next assignment where it fails now.
                        if let Err(error) = self.inbox.release(Some(&surplus)).await {
                            tracing::debug!(%error, topic = %self.topic, "surplus partitions not given back");
                        }
                    }
                    let idle = !waits && assignment == assigned;
                    let interval = if idle { UPKEEP_INTERVAL_IDLE } else { UPKEEP_INTERVAL };
                    look_after |= looked.is_none_or(|at| at.elapsed() >= interval);
                    assigned = assignment;
                }
                ended = holding.fetcher_ended() => {
                    tracing::error!(topic = %self.topic, ?ended, "a fetcher ended; taking the partitions anew");
                    return Ended::LostLease;
                }
                () = self.inbox.woken() => {
                    look_after = true;
                    keeper.beat_now();
                }
                more = fetched.recv(), if gathered.is_empty() => {
                    let Some(more) = more else { return Ended::LostLease };
                    gathered.add(more, &mut holding);
                }
                () = std::future::ready(()), if !gathered.is_empty() => {
                    let (enough, due) = pace.next(Instant::now());
                    while !gathered.is_full() {
                        let more = match fetched.try_recv() {
                            Ok(more) => Some(more),
                            Err(_) if gathered.records() >= enough => None,
                            Err(_) => timeout_at(due, fetched.recv()).await.ok().flatten(),
                        };
                        let Some(more) = more else { break };
                        gathered.add(more, &mut holding);
                    }
                    let (began, records, batch) = (Instant::now(), gathered.records(), Arc::new(gathered.take()));
                    match gathered.meanwhile(self.apply_until_done(&batch, stop), &mut fetched, &mut holding).await {
                        Ok(stopped) => stopped.iter().for_each(|one| holding.stop(one)),
                        Err(ended) => return ended,
                    }
                    gathered.keep_ours(&holding);
                    together.record(records as f64);
                    took.record(began.elapsed());
                    holding.committed(&batch.moves);
                    dispose(batch);
                    pace.done(records, began, Instant::now());
                    applied = true;
                }
                () = std::future::ready(()), if look_after => {}
            }
            // Between two batches, and never for long: what is left comes after the next one.
            if look_after || (applied && holding.has_stopped()) {
                looked = Some(Instant::now());
                look_after = match self.inbox.maintain(&holding.owned()).await {
                    Ok(Upkeep { again, full, waits: still }) => {
                        upkeep.recovered();
                        waits = still;
                        holding.resume(&full, start);
                        metrics::gauge!("shopd_consumer_partitions_stopped", "topic" => self.topic.to_string())
                            .set(holding.stopped() as f64);
                        again
                    }
                    Err(DbError::Fenced(cause)) => {
                        tracing::warn!(topic = %self.topic, cause, "the lease is gone; nothing that is parked was tried");
                        return Ended::LostLease;
                    }
                    // With the next heartbeat.
                    Err(error) => {
                        upkeep.failed(&format_args!("{}: {error}", self.topic));
                        false
                    }
                };
            }
        }
    }

    /// Where partitions stopped, once the batch is committed.
    async fn apply_until_done(&self, batch: &Arc<Batch<I::Event>>, stop: &Shutdown) -> Result<Vec<Owned>, Ended> {
        let mut incident = Incident::new("applying a batch");
        let mut backoff = backoff();
        loop {
            match self.inbox.commit(batch).await {
                Ok(Committed { stopped }) => {
                    incident.recovered();
                    batch.committed(&self.topic);
                    for Owned { partition, next_offset, .. } in &stopped {
                        tracing::error!(topic = %self.topic, partition, next_offset, "too many records wait behind a parked one; the partition stops until there is room");
                    }
                    return Ok(stopped);
                }
                Err(DbError::Fenced(cause)) => {
                    tracing::warn!(topic = %self.topic, cause, "the lease is gone; nothing of the batch was committed");
                    return Err(Ended::LostLease);
                }
                Err(error) => incident.failed(&format_args!("{}: {error}", self.topic)),
            }
            pause(backoff.next().unwrap_or(Duration::from_secs(2)), stop).await;
            if stop.is_stopping() {
                return Err(Ended::Stopping);
            }
        }
    }
}

/// Thousands of records take a while to free, and the next batch is waited for.
fn dispose<E: Send + Sync + 'static>(batch: Arc<Batch<E>>) {
    if batch.received.len() >= MANY {
        tokio::spawn(async move {
            sleep(QUIET).await;
            spawn_blocking(move || drop(batch));
        });
    }
}
