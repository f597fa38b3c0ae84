//! Requests that wait for their order's end (`Prefer: wait`). Who ends orders in this process tells them at once. What another replica ended is
//! looked for when that says so, and each second whatever is said.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use uuid::Uuid;

use super::order::Order;
use super::store;
use crate::db::{self, Db, DbError, Listener};
use crate::shutdown::Shutdown;
use crate::telemetry::Incident;

/// On which a replica says that it has ended orders.
pub const ENDED_CHANNEL: &str = "shopd_order_end";

/// Orders that are waited for at most.
const WAITING_MAX: usize = 20_000;
/// What may have ended elsewhere is looked for so often, whether anybody says so or not.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Between two looks, or as long as the last one took.
const LOOK_GAP: Duration = Duration::from_millis(2);
/// After a word it is looked for so often, for so long: in a stream the words are 50 ms apart.
const LOOK_INTERVAL: Duration = Duration::from_millis(6);
const LOOK_FOR: Duration = Duration::from_millis(60);
/// How long words are listened for when nobody waits any more.
const LINGER: Duration = Duration::from_secs(10);
/// How long a request leaves the database alone that could not be asked.
const RETRY_AFTER: Duration = Duration::from_millis(250);
/// Orders that are looked for in one statement.
const ORDERS_MAX: usize = 1_000;

/// The orders whose ends are waited for; cheap to clone.
#[derive(Clone)]
pub struct Ends(Arc<Shared>);

struct Shared {
    db: Db,
    /// Other processes end orders, too, and say so on [`ENDED_CHANNEL`].
    listens: bool,
    stop: Shutdown,
    waiting: Mutex<HashMap<Uuid, Waiting>>,
    started: AtomicBool,
    /// Somebody waits.
    work: Notify,
    gauge: metrics::Gauge,
}

impl Shared {
    fn count(&self, waiting: usize) {
        self.gauge.set(u32::try_from(waiting).unwrap_or(u32::MAX));
    }
}

struct Waiting {
    requests: usize,
    /// As it ended.
    ended: watch::Sender<Option<Order>>,
}

/// An order whose end is waited for; dropped, it no longer is.
pub struct Expected {
    pub id: Uuid,
    ends: Ends,
    ended: watch::Receiver<Option<Order>>,
}

impl Expected {
    /// The order once it has ended, or as it is after `within`; `None` where there is none. One that `is_new` was not there when it was first
    /// expected, so it need not be read.
    ///
    /// # Errors
    /// [`DbError::Unavailable`] where it cannot be read at the end of that time either.
    pub async fn end(mut self, within: Duration, is_new: bool) -> Result<Option<Order>, DbError> {
        let (ends, until) = (self.ends.clone(), Instant::now() + within);
        let mut look_at = if is_new { until } else { Instant::now() };
        loop {
            let look = async {
                sleep_until(look_at).await;
                ends.read(self.id).await
            };
            let found = tokio::select! {
                biased;
                // The sender is there as long as this is.
                Ok(order) = self.ended.wait_for(Option::is_some) => return Ok(order.clone()),
                () = ends.0.stop.stopped() => return ends.read(self.id).await,
                found = look => found,
            };
            look_at = match &found {
                _ if Instant::now() >= until => return found,
                Ok(Some(order)) if !order.status.is_final() => until,
                // It may be back in time.
                Err(DbError::Unavailable(_)) => until.min(Instant::now() + RETRY_AFTER),
                _ => return found,
            };
        }
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        let mut waiting = self.ends.waiting();
        let Entry::Occupied(mut those) = waiting.entry(self.id) else { return };
        those.get_mut().requests -= 1;
        if those.get().requests == 0 {
            those.remove();
            self.ends.0.count(waiting.len());
        }
    }
}

impl Ends {
    /// Until `stop`, which answers all who wait.
    pub fn new(db: Db, listens: bool, stop: Shutdown) -> Self {
        let (waiting, started, work) = (Mutex::default(), AtomicBool::new(false), Notify::new());
        let gauge = metrics::gauge!("shopd_orders_awaited");
        Self(Arc::new(Shared { db, listens, stop, waiting, started, work, gauge }))
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<Uuid, Waiting>> {
        // A poisoned map is still a map: nothing panics in the middle of a change of it.
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These may have ended: those that are waited for are read at once, for all who wait.
    pub fn tell(&self, ids: impl IntoIterator<Item = Uuid>) {
        let ids = self.awaited(ids);
        if !ids.is_empty() {
            let ends = self.clone();
            self.0.db.runtime().spawn(async move {
                if let Err(error) = ends.look(&ids).await {
                    tracing::debug!(%error, "orders that have ended were not read; they are looked for each second");
                }
            });
        }
    }

    /// Somebody waits for one of these who was not answered.
    pub fn is_awaited(&self, ids: impl IntoIterator<Item = Uuid>) -> bool {
        !self.awaited(ids).is_empty()
    }

    fn awaited(&self, ids: impl IntoIterator<Item = Uuid>) -> Vec<Uuid> {
        let waiting = self.waiting();
        if waiting.is_empty() {
            return Vec::new();
        }
        let is_open = |id: &Uuid| waiting.get(id).is_some_and(|those| those.ended.borrow().is_none());
        ids.into_iter().filter(is_open).collect()
    }

    /// These have ended: for who waits for one of them.
    pub fn hand_out(&self, ended: impl IntoIterator<Item = Order>) {
        let waiting = self.waiting();
        for order in ended {
            if let Some(those) = waiting.get(&order.id) {
                those.ended.send_replace(Some(order));
            }
        }
    }

    /// Hands out those that have ended.
    async fn look(&self, ids: &[Uuid]) -> Result<(), DbError> {
        for some in ids.chunks(ORDERS_MAX) {
            self.hand_out(db::in_time(async { store::find_ended(&mut *self.0.db.get().await?, some).await }).await?);
        }
        Ok(())
    }

    async fn read(&self, id: Uuid) -> Result<Option<Order>, DbError> {
        db::in_time(async { Ok(store::find(&mut *self.0.db.get().await?, &[id]).await?.pop()) }).await
    }

    /// From now on the end of this order is waited for, whether it is there yet or not.
    ///
    /// # Errors
    /// [`DbError::Unavailable`] where too many wait.
    pub fn expect(&self, id: Uuid) -> Result<Expected, DbError> {
        let mut waiting = self.waiting();
        if waiting.len() >= WAITING_MAX && !waiting.contains_key(&id) {
            return Err(DbError::Unavailable("too many wait for their order's end".into()));
        }
        let those = waiting.entry(id).or_insert_with(|| Waiting { requests: 0, ended: watch::Sender::default() });
        those.requests += 1;
        let ended = those.ended.subscribe();
        self.0.count(waiting.len());
        drop(waiting);
        self.0.work.notify_one();
        if !self.0.started.swap(true, Ordering::Relaxed) {
            self.0.db.runtime().spawn(self.clone().supervise());
        }
        Ok(Expected { ends: self.clone(), id, ended })
    }

    async fn supervise(self) {
        while !self.0.stop.is_stopping() {
            let ends = self.clone();
            let looking = tokio::spawn(async move {
                tokio::select! {
                    () = ends.look_elsewhere() => {}
                    () = ends.0.stop.stopped() => {}
                }
            });
            if looking.await.is_err() {
                tracing::error!("who looks for orders that ended elsewhere ended; it begins anew");
                sleep(RETRY_AFTER).await;
            }
        }
    }

    /// Those that are waited for and have not been handed out.
    fn open(&self) -> Vec<Uuid> {
        let waiting = self.waiting();
        let open = waiting.iter().filter(|(_, those)| those.ended.borrow().is_none());
        open.map(|(id, _)| *id).collect()
    }

    /// Looks for what others ended, as long as somebody waits.
    async fn look_elsewhere(&self) {
        let mut incident = Incident::new("looking for the ends of orders that are waited for");
        loop {
            while self.waiting().is_empty() {
                self.0.work.notified().await;
            }
            let heard = Arc::new(Notify::new());
            let listening = Shutdown::new();
            let _ends_with_it = listening.at_drop();
            if self.0.listens {
                Listener::start(self.0.db.clone(), ENDED_CHANNEL, heard.clone(), listening);
            }
            let (mut looked, mut took, mut heard_at) = (Instant::now(), Duration::ZERO, None::<Instant>);
            loop {
                sleep_until(looked + LOOK_GAP.max(took)).await;
                let is_told = heard_at.is_some_and(|at| at.elapsed() < LOOK_FOR);
                tokio::select! {
                    () = heard.notified() => heard_at = Some(Instant::now()),
                    () = sleep_until(looked + if is_told { LOOK_INTERVAL } else { POLL_INTERVAL }) => {}
                }
                let ids = self.open();
                if ids.is_empty() {
                    if timeout(LINGER, self.0.work.notified()).await.is_err() {
                        break;
                    }
                    continue;
                }
                let began = Instant::now();
                match self.look(&ids).await {
                    Ok(()) => incident.recovered(),
                    Err(error) => {
                        incident.failed(&error);
                        sleep(RETRY_AFTER).await;
                    }
                }
                looked = Instant::now();
                took = looked - began;
            }
        }
    }
}
