//! The inbox in Postgres: what a service does with a batch, in the transaction that moves the offsets.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use futures::FutureExt;
use rand::RngExt;
use tokio::sync::Notify;

use crate::config::ConsumerConfig;
use crate::db::{Conn, Db, DbError, Listener, Retry};
use crate::faults;
use crate::shutdown::Shutdown;
use crate::telemetry::Tracer;

use super::super::dead_letter::{self, Keep, Keys, Poison};
use super::batch::Batch;
use super::delivery::{Delivery, Position};
use super::handler::Handler;
use super::inbox::{Committed, Inbox, Upkeep};
use super::isolate::{Outcome, isolate, keeps_failing};
use super::offsets::{self, Fence, Move, Owned, Standing};
use super::queue::{Admission, Queues};
use super::traced;
use super::upkeep::Gauges;

/// How long a parked record waits for its second try; each further one is waited for twice as long.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(300);

/// A service's handler over its own database.
pub struct PgInbox<H> {
    pub(super) db: Db,
    pub(super) topic: Arc<str>,
    pub(super) owner: String,
    pub(super) lease: Duration,
    pub(super) limits: Limits,
    pub(super) handler: Arc<H>,
    pub(super) tracer: Tracer,
    /// Partitions of ours in which nothing is parked, with the epoch under which that is known: only their owner parks.
    clear: Mutex<HashMap<i32, i64>>,
    pub(super) gauges: Mutex<Gauges>,
    wake: Arc<Notify>,
    /// Ends the listening.
    stop: Shutdown,
}

/// Bounds on what is parked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub attempts_max: i32,
    pub followers_max: i32,
}

impl Limits {
    pub fn room(self) -> usize {
        usize::try_from(self.followers_max).unwrap_or_default()
    }

    /// Until the next try after so many; `None`: only an operator tries again.
    pub fn retry_in(self, attempts: i32) -> Option<Duration> {
        let doublings = u32::try_from(attempts - 1).unwrap_or_default().min(16);
        let delay = (RETRY_FIRST * (1 << doublings)).min(RETRY_MAX);
        (attempts < self.attempts_max).then(|| delay.mul_f64(rand::rng().random_range(0.75..1.25)))
    }
}

impl<H> Drop for PgInbox<H> {
    fn drop(&mut self) {
        self.stop.stop();
    }
}

impl<H: Handler> PgInbox<H> {
    pub fn new(db: Db, topic: &str, owner: String, config: &ConsumerConfig, handler: H) -> Self {
        let limits = Limits { attempts_max: config.park_attempts_max, followers_max: config.followers_max };
        let tracer = Tracer::of(db.role());
        let (wake, stop) = (Arc::new(Notify::new()), Shutdown::new());
        Listener::start(db.clone(), dead_letter::CHANNEL, wake.clone(), stop.clone());
        Self {
            db,
            topic: topic.into(),
            owner,
            lease: config.lease,
            limits,
            handler: Arc::new(handler),
            tracer,
            clear: Mutex::default(),
            gauges: Mutex::default(),
            wake,
            stop,
        }
    }

    fn clear(&self) -> MutexGuard<'_, HashMap<i32, i64>> {
        // A poisoned map is still a map: nothing panics in the middle of a change of it.
        self.clear.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is parked in these partitions is not known any more.
    pub(super) fn look_again(&self, partitions: impl Iterator<Item = i32>) {
        let mut clear = self.clear();
        for partition in partitions {
            clear.remove(&partition);
        }
    }

    /// Nothing is parked in its partitions.
    fn is_clear(&self, batch: &Batch<H::Event>) -> bool {
        let clear = self.clear();
        batch.moves.iter().all(|m| clear.get(&m.partition) == Some(&m.epoch))
    }

    /// Whether the batch was applied by one statement; `false` where nothing was done.
    async fn at_once(&self, batch: &Batch<H::Event>) -> Result<bool, DbError> {
        if batch.received.is_empty() || !batch.poisoned.is_empty() || !self.is_clear(batch) {
            return Ok(false);
        }
        let fence = Fence { topic: &self.topic, moves: &batch.moves, lease: self.lease };
        let conn = self.db.get().await?;
        // A record over which it panics is found where a transaction isolates it.
        let applied = AssertUnwindSafe(self.handler.apply_at_once(&conn, &fence, &batch.received)).catch_unwind().await;
        match applied {
            Ok(Err(error)) if keeps_failing(&error) || error.lost_a_race() => {
                tracing::debug!(topic = %self.topic, %error, "a batch goes by a transaction");
                Ok(false)
            }
            Ok(applied) => applied,
            Err(_) => Ok(false),
        }
    }

    async fn attempt(&self, batch: &Arc<Batch<H::Event>>, isolating: bool) -> Result<Written, DbError> {
        if isolating {
            // Also where the fate of its commit stays unknown.
            self.look_again(batch.moves.iter().map(|m| m.partition));
        }
        let looks = isolating || !self.is_clear(batch);
        let (topic, handler, batch, lease, limits) =
            (self.topic.clone(), self.handler.clone(), batch.clone(), self.lease, self.limits);
        let written = self.db.transaction(move |conn| {
            let (topic, handler, batch) = (topic.clone(), handler.clone(), batch.clone());
            async move {
                let how = How { looks, isolating, lease, limits };
                write(conn, &topic, &*handler, &batch, how).await
            }
            .boxed()
        });
        written.await
    }

    fn note(&self, batch: &Batch<H::Event>, written: &Written) {
        let mut clear = self.clear();
        for m in &batch.moves {
            if written.occupied.contains(&m.partition) {
                clear.remove(&m.partition);
            } else {
                clear.insert(m.partition, m.epoch);
            }
        }
        drop(clear);
        if written.letters.is_empty() {
            return;
        }
        self.gauges.lock().unwrap_or_else(PoisonError::into_inner).changed();
        // It is looked at each second from now on.
        self.wake.notify_one();
        for row in &written.displaced {
            dead_letter::tell_gone(row, "the topic was made anew, and another record has this letter's place");
        }
        for (state, Position { topic, partition, offset }, reason) in &written.letters {
            match *state {
                "waiting" => tracing::info!(%topic, partition, offset, "waits behind a parked record of its key"),
                "parked" => tracing::error!(%topic, partition, offset, reason, "parked; the later records of its key wait"),
                _ => tracing::warn!(%topic, partition, offset, reason, "dead letter"),
            }
            metrics::counter!("shopd_dead_letters_total", "topic" => topic.to_string(), "state" => *state).increment(1);
        }
    }
}

#[derive(Clone, Copy)]
struct How {
    /// Whether anything is parked is not known.
    looks: bool,
    /// A record of the batch keeps failing.
    isolating: bool,
    lease: Duration,
    limits: Limits,
}

/// What a batch's transaction wrote beside its effect.
#[derive(Default)]
pub(super) struct Written {
    /// Partitions in which something is parked.
    occupied: HashSet<i32>,
    /// State, place and reason.
    pub letters: Vec<(&'static str, Position, String)>,
    /// Letters of a topic that is no more.
    displaced: Vec<dead_letter::Row>,
    /// By partition: what lies from here on was left.
    pub stops: HashMap<i32, i64>,
}

/// Offsets first: the fence, and the first of the locks; then the effect, then the letters.
async fn write<H: Handler>(
    conn: &mut Conn,
    topic: &str,
    handler: &H,
    batch: &Batch<H::Event>,
    how: How,
) -> Result<Written, DbError> {
    let fence = Fence { topic, moves: &batch.moves, lease: how.lease };
    let keys: Vec<Keys> = if how.looks { batch.received.iter().map(|one| handler.keys(&one.event)).collect() } else { Vec::new() };
    let (mut queues, mut occupied) = (Queues::default(), HashSet::new());
    if how.looks {
        let partitions: Vec<i32> = batch.moves.iter().map(|m| m.partition).collect();
        let ordering: HashSet<&str> = keys.iter().map(|keys| keys.ordering.as_str()).collect();
        let ordering: Vec<&str> = ordering.into_iter().collect();
        let shared = &*conn;
        // One after the other on the server, without waiting between: what is found is found under the fence.
        let (fenced, heads) = tokio::join!(
            biased;
            fence.advance(shared),
            dead_letter::heads(shared, topic, &partitions, &ordering),
        );
        fenced?;
        for head in heads? {
            occupied.insert(head.partition);
            if let Some(key) = head.ordering_key {
                let room = how.limits.followers_max.saturating_sub(head.followers);
                queues.open((head.partition, key), usize::try_from(room).unwrap_or_default());
            }
        }
        let line = |at: usize| (batch.received[at].delivery.position.partition, keys[at].ordering.clone());
        let asked = (0..keys.len()).filter(|at| queues.is_parked(&line(*at)));
        let asked: Vec<(i32, Keys)> = asked.map(|at| (line(at).0, keys[at].clone())).collect();
        for member in dead_letter::members(conn, topic, &asked).await? {
            queues.member((member.partition, member.ordering_key), member.business_key);
        }
    }

    let outcomes = if how.isolating {
        isolate(conn, handler, &batch.received, &mut queues, how.limits.room()).await?
    } else if !how.looks {
        // In one round trip with what the effect begins with; where the fence holds, all of that fails with it.
        let shared = &*conn;
        let effect = async { if batch.received.is_empty() { Ok(()) } else { handler.apply(shared, &batch.received).await } };
        let (fenced, applied) = tokio::join!(biased; fence.advance(shared), effect);
        fenced.and(applied)?;
        Vec::new()
    } else if queues.is_empty() {
        if !batch.received.is_empty() {
            handler.apply(conn, &batch.received).await?;
        }
        Vec::new()
    } else {
        apply_the_others(conn, handler, batch, &keys, &mut queues).await?
    };

    let mut letters = Vec::new();
    for (index, (one, outcome)) in batch.received.iter().zip(&outcomes).enumerate() {
        let (delivery, keys) = (&one.delivery, || keys[index].clone());
        letters.extend(match outcome {
            Outcome::Failed(reason) => {
                occupied.insert(delivery.position.partition);
                Some(Keep::Parked { delivery, keys: keys(), reason: reason.clone(), retry_in: how.limits.retry_in(1) })
            }
            Outcome::Waits => Some(Keep::Waiting { delivery, keys: keys() }),
            Outcome::Applied | Outcome::Repeat | Outcome::Beyond => None,
        });
    }
    let passed = |delivery: &Delivery| queues.passes(delivery.position.partition, delivery.position.offset);
    let dead = batch.poisoned.iter().filter(|(delivery, _)| passed(delivery));
    letters.extend(dead.map(|(delivery, poison)| Keep::Dead { delivery, reason: poison.0.clone() }));
    let displaced = dead_letter::keep(conn, &letters).await?;

    let back: Vec<Move> = batch
        .moves
        .iter()
        .filter_map(|m| queues.stops().get(&m.partition).map(|stop| Move { from: m.to, to: *stop, ..m.clone() }))
        .collect();
    if !back.is_empty() {
        Fence { moves: &back, ..fence }.advance(conn).await?;
    }
    let letters =
        letters.iter().map(|letter| (letter.state(), letter.position().clone(), letter.reason().unwrap_or("").to_owned()));
    Ok(Written { occupied, letters: letters.collect(), displaced, stops: queues.stops().clone() })
}

/// Applies at once all that do not wait.
async fn apply_the_others<H: Handler>(
    conn: &mut Conn,
    handler: &H,
    batch: &Batch<H::Event>,
    keys: &[Keys],
    queues: &mut Queues,
) -> Result<Vec<Outcome>, DbError> {
    let mut some = Vec::new();
    let mut outcomes = Vec::with_capacity(keys.len());
    for (one, keys) in batch.received.iter().zip(keys) {
        let Position { partition, offset, .. } = one.delivery.position;
        outcomes.push(match queues.admit(&(partition, keys.ordering.clone()), &keys.business, offset) {
            Admission::Apply => {
                some.push(one.clone());
                Outcome::Applied
            }
            Admission::Wait => Outcome::Waits,
            Admission::Repeat => Outcome::Repeat,
            Admission::Beyond => Outcome::Beyond,
        });
    }
    if !some.is_empty() {
        handler.apply(conn, &some).await?;
    }
    Ok(outcomes)
}

#[async_trait]
impl<H: Handler> Inbox for PgInbox<H> {
    type Event = H::Event;

    fn decode(&self, delivery: &Delivery) -> Result<H::Event, Poison> {
        self.handler.decode(delivery)
    }

    async fn ensure(&self, partitions: i32) -> Result<(), DbError> {
        offsets::ensure(&self.db, &self.topic, partitions).await
    }

    async fn partitions_in_use(&self) -> Result<i32, DbError> {
        dead_letter::partitions_in_use(&mut *self.db.get().await?, &self.topic).await
    }

    async fn heartbeat(&self, reaches_log: bool) -> Result<Standing, DbError> {
        faults::point!("lease.before_heartbeat")?;
        let standing = offsets::heartbeat(&self.db, &self.topic, &self.owner, self.lease, reaches_log).await?;
        faults::point!("lease.after_heartbeat")?;
        Ok(standing)
    }

    async fn acquire(&self, partitions: i32, at_most: usize) -> Result<Vec<Owned>, DbError> {
        faults::point!("lease.before_acquire")?;
        let owned = offsets::acquire(&self.db, &self.topic, &self.owner, self.lease, partitions, at_most).await?;
        faults::point!("lease.after_acquire")?;
        Ok(owned)
    }

    async fn release(&self, partitions: Option<&[i32]>) -> Result<(), DbError> {
        faults::point!("lease.before_release")?;
        offsets::release(&self.db, &self.topic, &self.owner, partitions).await?;
        faults::point!("lease.after_release")?;
        Ok(())
    }

    async fn leave(&self) -> Result<(), DbError> {
        offsets::leave(&self.db, &self.topic, &self.owner).await
    }

    async fn commit(&self, batch: &Arc<Batch<H::Event>>) -> Result<Committed, DbError> {
        faults::point!("consumer.before_commit")?;
        let applying = SystemTime::now();
        let at_once = self.at_once(batch).await?;
        let written = match if at_once { Ok(Written::default()) } else { self.attempt(batch, false).await } {
            Err(error) if keeps_failing(&error) && !batch.received.is_empty() => self.attempt(batch, true).await?,
            written => written?,
        };
        faults::point!("consumer.after_commit")?;
        self.note(batch, &written);
        self.handler.tell(&batch.received);
        if !at_once {
            self.handler.committed(batch.received.len());
        }
        traced::record_batch(self.tracer, &*self.handler, batch, &written, applying);
        let stopped = batch.moves.iter().filter_map(|m| {
            let next_offset = *written.stops.get(&m.partition)?;
            Some(Owned { partition: m.partition, next_offset, epoch: m.epoch })
        });
        Ok(Committed { stopped: stopped.collect() })
    }

    async fn maintain(&self, owned: &[Owned]) -> Result<Upkeep, DbError> {
        self.step(owned).await
    }

    async fn woken(&self) {
        self.wake.notified().await;
    }
}
