//! Who listens to what: bounded queues by order and by user. A stream leaves by being dropped.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, mpsc, oneshot};
use uuid::Uuid;

use super::event::{Event, Reason, Update};
use super::store::{Boundary, Row};
use crate::user_id::UserId;

/// Events that wait for a stream's client at most. An order has two.
const ORDER_QUEUE_MAX: usize = 8;
const USER_QUEUE_MAX: usize = 1_024;
/// Streams that wait for their beginning at most.
const WAITING_MAX: usize = 20_000;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Topic {
    Order(Uuid),
    User(UserId),
}

/// A stream at its beginning: what is behind `boundary` comes through `updates`.
pub struct Attached {
    pub boundary: Arc<Boundary>,
    /// Of an order: all its events up to the boundary.
    pub events: Vec<Row>,
    pub updates: Subscription,
}

/// A stream's end of its queue; dropped, it is no longer listening.
pub struct Subscription {
    pub queue: mpsc::Receiver<Update>,
    token: u64,
    topic: Topic,
    shared: Arc<Shared>,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.shared.lock().remove(&self.topic, self.token);
    }
}

/// Between the streams and the one reader.
#[derive(Default)]
pub struct Shared {
    registry: Mutex<Registry>,
    /// Somebody waits.
    pub work: Notify,
}

#[derive(Default)]
struct Registry {
    by_order: HashMap<Uuid, Vec<Listening>>,
    by_user: HashMap<UserId, Vec<Listening>>,
    waiting: Vec<Waiting>,
    listening: usize,
    next_token: u64,
    stopped: bool,
}

struct Listening {
    token: u64,
    queue: mpsc::Sender<Update>,
}

pub struct Waiting {
    pub topic: Topic,
    attached: oneshot::Sender<Attached>,
}

/// Why nobody may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    Stopping,
    TooMany,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Registry> {
        // What panicked under the lock would have left at worst a stream without its queue.
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn wait(&self, topic: Topic) -> Result<oneshot::Receiver<Attached>, Refused> {
        let (attached, waiting) = oneshot::channel();
        {
            let mut registry = self.lock();
            if registry.stopped {
                return Err(Refused::Stopping);
            }
            if registry.waiting.len() >= WAITING_MAX {
                return Err(Refused::TooMany);
            }
            registry.waiting.push(Waiting { topic, attached });
        }
        self.work.notify_one();
        Ok(waiting)
    }

    /// Whether anybody listens, or waits to.
    pub fn is_busy(&self) -> bool {
        let registry = self.lock();
        registry.listening > 0 || !registry.waiting.is_empty()
    }

    pub fn is_listened_to(&self) -> bool {
        self.lock().listening > 0
    }

    pub fn is_awaited(&self) -> bool {
        self.waiting() > 0
    }

    pub fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    /// The first `count` of those who wait, who came before all others.
    pub fn take_waiting(&self, count: usize) -> Vec<Waiting> {
        let mut registry = self.lock();
        let count = count.min(registry.waiting.len());
        let mut waiting: Vec<Waiting> = registry.waiting.drain(..count).collect();
        drop(registry);
        // Clients that went away meanwhile.
        waiting.retain(|one| !one.attached.is_closed());
        waiting
    }

    /// Begins the streams of those who wait: from now on they listen.
    pub fn attach(self: &Arc<Self>, waiting: Vec<Waiting>) -> Vec<Begun> {
        let mut registry = self.lock();
        waiting
            .into_iter()
            .map(|Waiting { topic, attached }| {
                let bound = if matches!(topic, Topic::Order(_)) { ORDER_QUEUE_MAX } else { USER_QUEUE_MAX };
                // One place more, for the word that it ends.
                let (to, queue) = mpsc::channel(bound + 1);
                let token = registry.add(&topic, to);
                Begun { updates: Subscription { queue, token, topic, shared: self.clone() }, attached }
            })
            .collect()
    }

    pub fn wants(&self, order: Uuid, user: &UserId) -> bool {
        let registry = self.lock();
        registry.by_order.contains_key(&order) || registry.by_user.contains_key(user)
    }

    /// Hands an event to those who listen; a queue that is full is ended.
    pub fn deliver(&self, event: &Arc<Event>, user: &UserId) {
        let mut registry = self.lock();
        let Registry { by_order, by_user, listening, .. } = &mut *registry;
        deliver(by_order, &event.order_id, event, listening);
        deliver(by_user, user, event, listening);
        gauge(registry.listening);
    }

    /// Ends every stream; with [`Reason::Stopping`] there are no more.
    pub fn end(&self, reason: Reason) {
        let mut registry = self.lock();
        let by_order = std::mem::take(&mut registry.by_order).into_values().flatten();
        let by_user = std::mem::take(&mut registry.by_user).into_values().flatten();
        for one in by_order.chain(by_user) {
            let _ = one.queue.try_send(Update::Ended(reason));
        }
        registry.listening = 0;
        if reason == Reason::Stopping {
            registry.stopped = true;
            // Who waits hears of it by their end of the channel.
            registry.waiting.clear();
        }
        gauge(0);
    }
}

/// One stream that listens, and does not know yet.
pub struct Begun {
    updates: Subscription,
    attached: oneshot::Sender<Attached>,
}

impl Begun {
    pub fn topic(&self) -> &Topic {
        &self.updates.topic
    }

    pub fn tell(self, boundary: Arc<Boundary>, events: Vec<Row>) {
        // A client that went away: its stream is dropped with it.
        let _ = self.attached.send(Attached { boundary, events, updates: self.updates });
    }
}

impl Registry {
    fn add(&mut self, topic: &Topic, queue: mpsc::Sender<Update>) -> u64 {
        self.next_token += 1;
        self.listening += 1;
        let one = Listening { token: self.next_token, queue };
        match topic {
            Topic::Order(id) => self.by_order.entry(*id).or_insert_with(|| Vec::with_capacity(1)).push(one),
            Topic::User(user) => self.by_user.entry(user.clone()).or_insert_with(|| Vec::with_capacity(1)).push(one),
        }
        gauge(self.listening);
        self.next_token
    }

    fn remove(&mut self, topic: &Topic, token: u64) {
        let removed = match topic {
            Topic::Order(id) => remove(&mut self.by_order, id, token),
            Topic::User(user) => remove(&mut self.by_user, user, token),
        };
        if removed {
            self.listening -= 1;
            gauge(self.listening);
        }
    }
}

fn gauge(listening: usize) {
    metrics::gauge!("shopd_live_streams").set(u32::try_from(listening).unwrap_or(u32::MAX));
}

fn remove<K: Hash + Eq>(all: &mut HashMap<K, Vec<Listening>>, key: &K, token: u64) -> bool {
    let Some(those) = all.get_mut(key) else { return false };
    let before = those.len();
    those.retain(|one| one.token != token);
    let removed = those.len() < before;
    if those.is_empty() {
        all.remove(key);
        // What a crowd needed is given back once it has gone.
        if all.capacity() > 1_024 && all.len() * 4 < all.capacity() {
            all.shrink_to(all.len() * 2);
        }
    }
    removed
}

fn deliver<K: Hash + Eq>(all: &mut HashMap<K, Vec<Listening>>, key: &K, event: &Arc<Event>, listening: &mut usize) {
    let Some(those) = all.get_mut(key) else { return };
    let before = those.len();
    those.retain(|one| {
        if one.queue.capacity() > 1 {
            return one.queue.try_send(Update::Event(event.clone())).is_ok();
        }
        let _ = one.queue.try_send(Update::Ended(Reason::SlowReader));
        metrics::counter!("shopd_live_dropped_total", "reason" => Reason::SlowReader.as_str()).increment(1);
        false
    });
    *listening -= before - those.len();
    if those.is_empty() {
        all.remove(key);
    }
}
