//! What an owner does beside the log: tries again what is parked, and does what operators asked for, in batches of their own that are
//! fenced like any other (S12). A queue is replayed from its head on, in log order (S8).

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use diesel::sql_types::{Array, BigInt, Integer, Text};
use diesel_async::RunQueryDsl;
use futures::FutureExt;

use crate::db::{Conn, DbError, sql};

use super::super::dead_letter::{self, Fate, Keys, Row, Stored};
use super::delivery::Received;
use super::handler::Handler;
use super::inbox::Upkeep;
use super::isolate::{Outcome, isolate};
use super::offsets::{Fence, Move, Owned};
use super::postgres::{Limits, PgInbox};
use super::queue::{Line, Queues};
use super::traced;

/// How often letters are counted for the gauges, at most.
const COUNT_INTERVAL: Duration = Duration::from_secs(5);
const STATES: [&str; 3] = ["dead", "parked", "waiting"];

/// When the gauges were last brought up to date.
#[derive(Debug, Default)]
pub struct Gauges {
    counted: Option<Instant>,
    of: Vec<i32>,
    changed: bool,
}

impl Gauges {
    pub fn changed(&mut self) {
        self.changed = true;
    }

    /// Whether to count now.
    fn is_due(&mut self, partitions: &[i32]) -> bool {
        if self.of != partitions {
            (self.of, self.changed) = (partitions.to_vec(), true);
        }
        let due = self.changed && self.counted.is_none_or(|at| at.elapsed() >= COUNT_INTERVAL);
        if due {
            (self.counted, self.changed) = (Some(Instant::now()), false);
        }
        due
    }
}

/// What one step did.
#[derive(Debug, Default)]
struct Done {
    discarded: Vec<Row>,
    tried: Vec<(Stored, Fate)>,
}

impl<H: Handler> PgInbox<H> {
    pub(super) async fn step(&self, owned: &[Owned]) -> Result<Upkeep, DbError> {
        if owned.is_empty() {
            return Ok(Upkeep::default());
        }
        let partitions: Vec<i32> = owned.iter().map(|one| one.partition).collect();
        let mut conn = self.db.get().await?;
        let pending = dead_letter::pending(&mut conn, &self.topic, &partitions, self.limits.followers_max).await?;
        let waits = !pending.is_empty();
        if self.gauges.lock().unwrap_or_else(PoisonError::into_inner).is_due(&partitions) {
            gauge(&mut conn, &self.topic, &partitions).await?;
        }
        drop(conn);
        let full = pending.iter().filter(|one| one.full).map(|one| one.partition).collect();
        let is_due = |one: &&Owned| pending.iter().any(|found| found.due && found.partition == one.partition);
        let due: Vec<Owned> = owned.iter().filter(is_due).cloned().collect();
        if due.is_empty() {
            return Ok(Upkeep { again: false, waits, full });
        }
        let (topic, handler, lease, limits) = (self.topic.clone(), self.handler.clone(), self.lease, self.limits);
        let of = due.clone();
        let applying = SystemTime::now();
        let done = self.db.transaction(move |conn| {
            let (topic, handler, due) = (topic.clone(), handler.clone(), of.clone());
            async move { work(conn, &topic, &*handler, &due, lease, limits).await }.boxed()
        });
        // Before its fate is known: what is parked may be another by now.
        self.look_again(due.iter().map(|one| one.partition));
        let done = done.await?;
        let applied = done.tried.iter().filter(|(_, fate)| matches!(fate, Fate::Applied)).map(|(letter, _)| &letter.delivery);
        let applied = applied.filter_map(|delivery| {
            let event = self.handler.decode(delivery).ok()?;
            Some(Received { event, delivery: delivery.clone() })
        });
        self.handler.tell(&applied.collect::<Vec<_>>());
        self.handler.committed(due.len());
        self.gauges.lock().unwrap_or_else(PoisonError::into_inner).changed();
        tell(&self.topic, &done);
        for (letter, _) in done.tried.iter().filter(|(_, fate)| matches!(fate, Fate::Applied)) {
            if self.tracer.wants(&letter.delivery.trace) {
                let key = letter.keys.as_ref().map(|keys| keys.business.clone());
                traced::record(self.tracer, &letter.delivery, key, done.tried.len(), applying, None);
            }
        }
        Ok(Upkeep { again: !(done.discarded.is_empty() && done.tried.is_empty()), waits, full })
    }
}

/// Everything under the fence: nobody else applies anything of these partitions.
async fn work<H: Handler>(
    conn: &mut Conn,
    topic: &Arc<str>,
    handler: &H,
    due: &[Owned],
    lease: Duration,
    limits: Limits,
) -> Result<Done, DbError> {
    fence(conn, topic, due, lease).await?;
    let partitions: Vec<i32> = due.iter().map(|one| one.partition).collect();
    let discarded = dead_letter::discarded(conn, topic, &partitions).await?;
    let mut lines: HashSet<Line> = discarded.iter().filter_map(line_of).collect();
    if !discarded.is_empty() {
        // What is left of their queues comes in the next step.
        dead_letter::settle(conn, topic, &Vec::from_iter(lines)).await?;
        return Ok(Done { discarded, tried: Vec::new() });
    }

    let rows = dead_letter::due(conn, topic, &partitions).await?;
    lines.extend(rows.iter().filter(|row| row.state == "parked").filter_map(line_of));
    let followers = dead_letter::followers(conn, topic, &Vec::from_iter(lines.clone())).await?;
    // Locked from here on. What an operator discarded since the look above is not applied.
    let is_discarded = |row: &Row| row.requested.as_deref() == Some("discard");
    let (discarded, rows): (Vec<Row>, Vec<Row>) = rows.into_iter().chain(followers).partition(is_discarded);
    dead_letter::forget(conn, topic, &discarded.iter().map(|row| (row.partition, row.log_offset)).collect::<Vec<_>>()).await?;
    // Heads before those that wait behind them.
    let (dead, rows): (Vec<Row>, Vec<Row>) = rows.into_iter().partition(|row| row.state == "dead");
    let (mut received, mut stored, mut undecoded) = (Vec::new(), Vec::new(), Vec::new());
    // From one on that could be read once and no longer can.
    let mut held: HashSet<Line> = HashSet::new();
    for row in rows.into_iter().chain(dead) {
        let delivery = row.delivery(topic);
        let decoded = handler.decode(&delivery);
        let keys = decoded.as_ref().map_or_else(|_| row.keys(), |event| Some(handler.keys(event)));
        let line = keys.as_ref().map(|keys| (row.partition, keys.ordering.clone()));
        let is_dead = row.state == "dead";
        // A dead one comes when its key's queue is at rest: who is in it is known then.
        if line.as_ref().is_some_and(|line| held.contains(line) || is_dead && lines.contains(line)) {
            continue;
        }
        let letter = Stored { delivery, attempts: row.attempts, undecodable: row.undecodable, is_dead, keys };
        match decoded {
            Ok(event) => {
                received.push(Received { event, delivery: letter.delivery.clone() });
                stored.push(letter);
            }
            Err(poison) => {
                held.extend(line);
                // One that waits is tried as its queue's head, once it is: a queue has one.
                if row.state != "waiting" {
                    let retry_in = limits.retry_in(letter.attempts + 1).filter(|_| !is_dead);
                    undecoded.push((letter, Fate::Failed { reason: poison.0, retry_in }));
                }
            }
        }
    }
    let mut queues = join_queues(conn, topic, &stored).await?;
    let outcomes = isolate(conn, handler, &received, &mut queues, usize::MAX).await?;
    let mut tried: Vec<(Stored, Fate)> =
        stored.into_iter().zip(outcomes).map(|(letter, outcome)| fate(letter, outcome, limits)).collect();
    tried.extend(undecoded);
    lines.extend(tried.iter().filter_map(|(letter, _)| {
        let keys = letter.keys.as_ref()?;
        Some((letter.delivery.position.partition, keys.ordering.clone()))
    }));
    dead_letter::record(conn, topic, &tried).await?;
    dead_letter::settle(conn, topic, &Vec::from_iter(lines)).await?;
    Ok(Done { discarded, tried })
}

fn fate(letter: Stored, outcome: Outcome, limits: Limits) -> (Stored, Fate) {
    let fate = match outcome {
        Outcome::Applied => Fate::Applied,
        Outcome::Failed(reason) => Fate::Failed { reason, retry_in: limits.retry_in(letter.attempts + 1) },
        Outcome::Waits | Outcome::Beyond => Fate::Behind,
        // Of those that wait already each business key is there once; another one asks for nothing more.
        Outcome::Repeat if letter.is_dead => Fate::Repeat,
        Outcome::Repeat => Fate::Behind,
    };
    (letter, fate)
}

/// The queues that dead letters join that can be read now.
async fn join_queues(conn: &mut Conn, topic: &str, stored: &[Stored]) -> Result<Queues, DbError> {
    let mut queues = Queues::default();
    let new = stored.iter().filter(|letter| letter.is_dead);
    let asked: Vec<(i32, Keys)> =
        new.filter_map(|letter| Some((letter.delivery.position.partition, letter.keys.clone()?))).collect();
    if asked.is_empty() {
        return Ok(queues);
    }
    let partitions: HashSet<i32> = asked.iter().map(|(partition, _)| *partition).collect();
    let keys: Vec<&str> = asked.iter().map(|(_, keys)| keys.ordering.as_str()).collect();
    for head in dead_letter::heads(conn, topic, &Vec::from_iter(partitions), &keys).await? {
        if let Some(key) = head.ordering_key {
            queues.open((head.partition, key), usize::MAX);
        }
    }
    for member in dead_letter::members(conn, topic, &asked).await? {
        queues.member((member.partition, member.ordering_key), member.business_key);
    }
    Ok(queues)
}

/// Holds the partitions, as their owner, from here to the end of the transaction.
async fn fence(conn: &mut Conn, topic: &str, due: &[Owned], lease: Duration) -> Result<(), DbError> {
    let rows: Vec<Owned> = sql("select partition, next_offset, epoch from consumer_offset
                                 where topic = $1 and partition = any($2) order by partition for update")
    .bind::<Text, _>(topic)
    .bind::<Array<Integer>, _>(due.iter().map(|one| one.partition).collect::<Vec<_>>())
    .load(conn)
    .await?;
    let at: HashMap<i32, i64> = rows.into_iter().map(|row| (row.partition, row.next_offset)).collect();
    let still = |one: &Owned| {
        let at = at.get(&one.partition).copied().unwrap_or(one.next_offset);
        Move { partition: one.partition, from: at, to: at, epoch: one.epoch }
    };
    Fence { topic, moves: &due.iter().map(still).collect::<Vec<_>>(), lease }.advance(conn).await
}

fn line_of(row: &Row) -> Option<Line> {
    Some((row.partition, row.ordering_key.clone()?))
}

/// Says what was done; what is discarded is gone, so all of it is said.
fn tell(topic: &str, done: &Done) {
    for row in &done.discarded {
        dead_letter::tell_gone(row, "discarded, as an operator asked");
        metrics::counter!("shopd_dead_letters_discarded_total", "topic" => topic.to_owned()).increment(1);
    }
    for (letter, fate) in &done.tried {
        let (partition, offset) = (letter.delivery.position.partition, letter.delivery.position.offset);
        match fate {
            Fate::Applied => {
                tracing::info!(topic, partition, offset, attempts = letter.attempts, "a letter was applied");
                metrics::counter!("shopd_dead_letters_applied_total", "topic" => topic.to_owned()).increment(1);
            }
            Fate::Failed { reason, retry_in } => {
                let retry_ms = retry_in.map(crate::telemetry::millis);
                tracing::warn!(topic, partition, offset, attempts = letter.attempts + 1, reason, retry_ms, "a letter failed again");
            }
            Fate::Behind | Fate::Repeat => {}
        }
    }
}

async fn gauge(conn: &mut Conn, topic: &str, partitions: &[i32]) -> Result<(), DbError> {
    #[derive(diesel::QueryableByName)]
    struct Count {
        #[diesel(sql_type = Text)]
        state: String,
        #[diesel(sql_type = BigInt)]
        n: i64,
    }
    let counts: Vec<Count> =
        sql("select state, count(*) as n from dead_letter where topic = $1 and partition = any($2) group by state")
            .bind::<Text, _>(topic)
            .bind::<Array<Integer>, _>(partitions)
            .load(conn)
            .await?;
    for state in STATES {
        let n = counts.iter().find(|count| count.state == state).map_or(0, |count| count.n);
        metrics::gauge!("shopd_dead_letters", "topic" => topic.to_owned(), "state" => state).set(n as f64);
    }
    Ok(())
}
