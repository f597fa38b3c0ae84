//! The consumer: fetches the partitions it owns, and applies what it has in one transaction a batch, over all of them.
//!
//! A batch's effect, its dead letters and its offsets commit together, so a record is applied exactly once however often it
//! is read. What fails for a while is tried again with back-off for ever; a lost lease drops everything that was fetched.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use futures::FutureExt;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::config::ConsumerConfig;
use crate::contracts::Envelope;
use crate::db::{Conn, Db, DbError};
use crate::shutdown::Shutdown;
use crate::telemetry::{Incident, SharedIncident};

use super::dead_letter::{self, Poison};
use super::delivery::{Delivery, Position, Received};
use super::fetcher::{Fetched, backoff, count, fetch, pause};
use super::log::{SharedLog, StoredRecord};
use super::offsets::{self, Move, Owned, Take};

/// What another replica gave back is taken at the next one, so with the default lease within 750 ms.
const HEARTBEATS_A_LEASE: u32 = 4;
/// How often the topic is asked for its number of partitions while it is not there.
const TOPIC_RETRY: Duration = Duration::from_millis(500);

/// The last time that is kept as it is.
const TIME_MAX: DateTime<Utc> = match DateTime::from_timestamp_millis(253_402_300_799_999) {
    Some(end_of_9999) => end_of_9999,
    None => DateTime::<Utc>::MAX_UTC,
};

/// What a service does with a topic.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    type Event: Clone + Send + Sync + 'static;

    /// Pure. A record that is refused here is a dead letter at once and holds nobody up.
    fn decode(&self, delivery: &Delivery) -> Result<Self::Event, Poison>;

    /// Applies a batch, in log order within each partition, in the transaction that moves the offsets. Must bear the same
    /// record twice.
    async fn apply(&self, conn: &mut Conn, batch: &[Received<Self::Event>]) -> Result<(), DbError>;

    /// After the commit.
    fn committed(&self) {}
}

/// One process's consumer of one topic.
pub struct Consumer<H> {
    db: Db,
    log: SharedLog,
    topic: Arc<str>,
    owner: String,
    config: ConsumerConfig,
    handler: Arc<H>,
}

/// Decoded and ready: all that one transaction does. Kept until it commits or the lease is lost.
struct Batch<E> {
    moves: Vec<Move>,
    received: Vec<Received<E>>,
    poisoned: Vec<(Delivery, Poison)>,
}

enum Ended {
    Stopping,
    LostLease,
}

impl<H: Handler> Consumer<H> {
    /// `owner` names this process among its replicas.
    pub fn new(db: Db, log: SharedLog, topic: &str, owner: String, config: ConsumerConfig, handler: H) -> Self {
        Self { db, log, topic: topic.into(), owner, config, handler: Arc::new(handler) }
    }

    /// Runs until `stop`; finishes the batch in hand and gives its partitions back.
    pub async fn run(self, stop: Shutdown) {
        let mut incident = Incident::new("consuming");
        while !stop.is_stopping() {
            match self.claim(&stop).await {
                Ok(owned) => {
                    incident.recovered();
                    if let Ended::Stopping = self.consume(owned, &stop).await {
                        break;
                    }
                }
                Err(cause) => incident.failed(&format_args!("{}: {cause}", self.topic)),
            }
            pause(TOPIC_RETRY, &stop).await;
        }
        if let Err(error) = offsets::release(&self.db, &self.topic, &self.owner).await {
            tracing::info!(topic = %self.topic, %error, "leases not given back; they expire by themselves");
        }
    }

    async fn claim(&self, stop: &Shutdown) -> Result<Vec<Owned>, String> {
        let partitions = tokio::select! {
            partitions = self.log.partitions(&self.topic) => partitions.map_err(|error| error.to_string())?,
            () = stop.stopped() => return Ok(Vec::new()),
        };
        offsets::ensure(&self.db, &self.topic, partitions).await.map_err(|error| error.to_string())?;
        self.acquire(Take::FreeAndOwn).await.map_err(|error| error.to_string())
    }

    async fn acquire(&self, take: Take) -> Result<Vec<Owned>, DbError> {
        offsets::acquire(&self.db, &self.topic, &self.owner, take, self.config.lease).await
    }

    /// Applies batch after batch over what is owned.
    async fn consume(&self, owned: Vec<Owned>, stop: &Shutdown) -> Ended {
        let (to, mut fetched) = mpsc::channel(owned.len().max(1));
        let mut fetchers = JoinSet::new();
        let incident = SharedIncident::new("fetching");
        let mut epochs = HashMap::new();
        let start = |owned: Vec<Owned>, fetchers: &mut JoinSet<()>, epochs: &mut HashMap<i32, i64>| {
            for one in owned {
                epochs.insert(one.partition, one.epoch);
                fetchers.spawn(fetch(
                    self.log.clone(),
                    self.topic.clone(),
                    one.partition,
                    one.next_offset,
                    to.clone(),
                    incident.clone(),
                    stop.clone(),
                ));
            }
        };
        start(owned, &mut fetchers, &mut epochs);
        let mut heartbeat = tokio::time::interval(self.config.lease / HEARTBEATS_A_LEASE);
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut waiting = Vec::new();
        loop {
            tokio::select! {
                biased;
                () = stop.stopped() => return Ended::Stopping,
                _ = heartbeat.tick() => match self.keep_leases(&epochs).await {
                    Ok(Some(more)) => start(more, &mut fetchers, &mut epochs),
                    Ok(None) => return Ended::LostLease,
                    // The database is away: the next batch says so.
                    Err(error) => tracing::debug!(%error, topic = %self.topic, "leases not renewed"),
                },
                // None ends by itself: it has broken down, and its partition must not wait for a restart.
                Some(ended) = fetchers.join_next() => {
                    tracing::error!(topic = %self.topic, ?ended, "a fetcher ended; taking the partitions anew");
                    return Ended::LostLease;
                }
                first = fetched.recv() => {
                    let Some(first) = first else { return Ended::LostLease };
                    waiting.push(first);
                    let mut records = count(&waiting);
                    while records < self.config.batch_records_max && let Ok(more) = fetched.try_recv() {
                        waiting.push(more);
                        records = count(&waiting);
                    }
                    let batch = self.batch(waiting.drain(..), &epochs);
                    if let Some(ended) = self.apply_until_done(Arc::new(batch), stop).await {
                        return ended;
                    }
                }
            }
        }
    }

    /// `None` where a partition went to somebody else; else what was free and is ours now too.
    async fn keep_leases(&self, epochs: &HashMap<i32, i64>) -> Result<Option<Vec<Owned>>, DbError> {
        let kept = offsets::renew(&self.db, &self.topic, &self.owner, self.config.lease).await?;
        if kept.iter().filter(|one| epochs.get(&one.partition) == Some(&one.epoch)).count() < epochs.len() {
            return Ok(None);
        }
        self.acquire(Take::Free).await.map(Some)
    }

    fn batch(&self, fetched: impl Iterator<Item = Fetched>, epochs: &HashMap<i32, i64>) -> Batch<H::Event> {
        let mut batch = Batch { moves: Vec::new(), received: Vec::new(), poisoned: Vec::new() };
        let received_at = Utc::now();
        for one in fetched {
            let (partition, from, to, records) = match one {
                Fetched::Records { partition, from, records, next_offset } => (partition, from, next_offset, records),
                Fetched::Reset { partition, from, to } => {
                    tracing::error!(topic = %self.topic, partition, from, to, "the offset is not on the log; going on where the log begins");
                    metrics::counter!("shopd_consumer_offset_resets_total", "topic" => self.topic.to_string()).increment(1);
                    (partition, from, to, Vec::new())
                }
            };
            let Some(&epoch) = epochs.get(&partition) else { continue };
            match batch.moves.iter_mut().find(|m| m.partition == partition) {
                Some(earlier) => earlier.to = to,
                None => batch.moves.push(Move { partition, from, to, epoch }),
            }
            for record in records {
                let position = Position { topic: self.topic.clone(), partition, offset: record.offset };
                let envelope = Envelope::read(&record.headers);
                let StoredRecord { key, value, headers, timestamp, .. } = record;
                // Any producer's, and the broker checks little: the database's times do not reach as far.
                let published_at = timestamp.clamp(DateTime::UNIX_EPOCH, TIME_MAX);
                let delivery = Delivery { position, key, value, headers, envelope, published_at, received_at };
                match self.handler.decode(&delivery) {
                    Ok(event) => {
                        let Delivery { position, envelope, published_at, received_at, .. } = delivery;
                        batch.received.push(Received { event, position, envelope, published_at, received_at });
                    }
                    Err(poison) => batch.poisoned.push((delivery, poison)),
                }
            }
        }
        batch.moves.sort_by_key(|m| m.partition);
        batch
    }

    /// `None` when the batch is committed.
    async fn apply_until_done(&self, batch: Arc<Batch<H::Event>>, stop: &Shutdown) -> Option<Ended> {
        let mut incident = Incident::new("applying a batch");
        let mut backoff = backoff();
        loop {
            match self.apply(batch.clone()).await {
                Ok(()) => {
                    incident.recovered();
                    for (delivery, poison) in &batch.poisoned {
                        let Position { topic, partition, offset } = &delivery.position;
                        tracing::warn!(%topic, partition, offset, reason = %poison, "dead letter");
                        metrics::counter!("shopd_dead_letters_total", "topic" => topic.to_string()).increment(1);
                    }
                    metrics::counter!("shopd_consumer_records_total", "topic" => self.topic.to_string())
                        .increment(batch.received.len() as u64);
                    self.handler.committed();
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

    /// One transaction: offsets first (the fence, and the first of the locks), then the effect, then the dead letters.
    async fn apply(&self, batch: Arc<Batch<H::Event>>) -> Result<(), DbError> {
        let (topic, handler, lease) = (self.topic.clone(), self.handler.clone(), self.config.lease);
        self.db
            .transaction(move |conn| {
                let (topic, handler, batch) = (topic.clone(), handler.clone(), batch.clone());
                async move {
                    offsets::advance(conn, &topic, &batch.moves, lease).await?;
                    if !batch.received.is_empty() {
                        handler.apply(conn, &batch.received).await?;
                    }
                    let letters: Vec<_> = batch.poisoned.iter().map(|(delivery, poison)| (delivery, poison)).collect();
                    dead_letter::keep(conn, &letters).await
                }
                .boxed()
            })
            .await
    }
}
