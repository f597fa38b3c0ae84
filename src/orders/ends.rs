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

/// Requests that wait at most.
const WAITING_MAX: usize = 20_000;
/// What may have ended elsewhere is looked for so often, whether anybody says so or not.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
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
            tokio::select! {
                biased;
                // The sender is there as long as this is.
                Ok(order) = self.ended.wait_for(Option::is_some) => return Ok(order.clone()),
                () = ends.0.stop.stopped() => return ends.read(self.id).await,
                () = sleep_until(look_at) => {}
            }
            let found = ends.read(self.id).await;
            look_at = match &found {
                _ if Instant::now() >= until => return found,
                Ok(Some(order)) if !order.status.is_final() => until,
                Ok(_) => return found,
                // It may be back in time.
                Err(_) => until.min(Instant::now() + RETRY_AFTER),
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
        }
    }
}

impl Ends {
    /// Until `stop`, which answers all who wait.
    pub fn new(db: Db, listens: bool, stop: Shutdown) -> Self {
        let (waiting, started, work) = (Mutex::default(), AtomicBool::new(false), Notify::new());
        Self(Arc::new(Shared { db, listens, stop, waiting, started, work }))
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<Uuid, Waiting>> {
        // A poisoned map is still a map: nothing panics in the middle of a change of it.
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These may have ended: those that are waited for are read at once, for all who wait.
    pub fn tell(&self, ids: impl IntoIterator<Item = Uuid>) {
        let waiting = self.waiting();
        if waiting.is_empty() {
            return;
        }
        let ids: Vec<Uuid> = ids.into_iter().filter(|id| waiting.contains_key(id)).collect();
        drop(waiting);
        if !ids.is_empty() {
            let ends = self.clone();
            // Where the database cannot be asked, they are looked for later.
            self.0.db.runtime().spawn(async move { ends.look(&ids).await });
        }
    }

    /// Hands out those that have ended.
    async fn look(&self, ids: &[Uuid]) -> Result<(), DbError> {
        for some in ids.chunks(ORDERS_MAX) {
            let ended = db::in_time(async { store::find_ended(&mut *self.0.db.get().await?, some).await }).await?;
            let waiting = self.waiting();
            for order in ended {
                if let Some(those) = waiting.get(&order.id) {
                    those.ended.send_replace(Some(order));
                }
            }
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
        if waiting.len() >= WAITING_MAX {
            return Err(DbError::Unavailable("too many wait for their order's end".into()));
        }
        let those = waiting.entry(id).or_insert_with(|| Waiting { requests: 0, ended: watch::Sender::default() });
        those.requests += 1;
        let ended = those.ended.subscribe();
        drop(waiting);
        self.0.work.notify_one();
        if !self.0.started.swap(true, Ordering::Relaxed) {
            let ends = self.clone();
            self.0.db.runtime().spawn(async move {
                tokio::select! {
                    () = ends.look_elsewhere() => {}
                    () = ends.0.stop.stopped() => {}
                }
            });
        }
        Ok(Expected { ends: self.clone(), id, ended })
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
            let (mut looked, mut heard_at) = (Instant::now(), None::<Instant>);
            loop {
                let is_told = heard_at.is_some_and(|at| at.elapsed() < LOOK_FOR);
                tokio::select! {
                    () = heard.notified() => heard_at = Some(Instant::now()),
                    () = sleep_until(looked + if is_told { LOOK_INTERVAL } else { POLL_INTERVAL }) => {}
                }
                let ids: Vec<Uuid> = self.waiting().keys().copied().collect();
                if ids.is_empty() && timeout(LINGER, self.0.work.notified()).await.is_err() {
                    break;
                }
                looked = Instant::now();
                match self.look(&ids).await {
                    Ok(()) => incident.recovered(),
                    Err(error) => {
                        incident.failed(&error);
                        sleep(RETRY_AFTER).await;
                    }
                }
            }
        }
    }
}
