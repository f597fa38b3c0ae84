//! Live orders: streams of an order's or a user's changes, fed by one reader a process.
//!
//! Owns nothing; reads `order_change` and `orders`. `position.rs` is the rule: what a client has seen, and an event's id. `hub.rs` is the
//! reader, `registry.rs` who listens, `store.rs` the statements, `event.rs` what is sent.

mod event;
mod hub;
mod position;
mod registry;
mod store;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::stream::{self, BoxStream, Stream, StreamExt};
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;
use uuid::Uuid;

use super::order::Order;
use crate::db::{Db, DbError};
use crate::shutdown::Shutdown;
use crate::user_id::UserId;

pub use event::{Event, Reason, Update};
pub use position::{NoEventId, Seen};
use registry::{Attached, Refused, Shared, Subscription, Topic};
use store::{Boundary, By, Row};

/// The channel on which other processes hear of new events.
pub const CHANNEL: &str = "shopd_order_event";

/// Of a user's orders the state of so many, the latest, begins a stream.
pub const STATES_MAX: i64 = 1_000;
/// What a stream that is resumed missed is read in pages of so many events.
const MISSED_ROWS_MAX: i64 = 500;
/// Beginnings of users' streams that are read at once; the pool has other work.
const READS_MAX: usize = 4;
/// How long a stream may take to begin: a client that waits for it is answered 503 within ten seconds.
const BEGIN_WITHIN: Duration = Duration::from_secs(9);

/// The façade; cheap to clone.
#[derive(Clone)]
pub struct Live {
    shared: Arc<Shared>,
    reads: Arc<Semaphore>,
    start: Arc<Start>,
}

/// The reader starts with the first stream.
struct Start {
    started: AtomicBool,
    db: Db,
    wake: Arc<Notify>,
    listens: bool,
    stop: Shutdown,
}

/// What an order's stream begins with.
pub enum OrderStream {
    /// No order has this id.
    Unknown,
    /// The client has seen the order's end.
    Over,
    Updates(Updates),
}

/// Ends after the final state of an order, or with [`Update::Ended`].
pub type Updates = BoxStream<'static, Update>;

impl Live {
    /// Streams of the orders in `db` until `stop`. `wake` is signalled by commits of this process; `listens`: other processes write,
    /// too, and say so on [`CHANNEL`].
    pub fn new(db: Db, wake: Arc<Notify>, listens: bool, stop: Shutdown) -> Self {
        let start = Start { started: AtomicBool::new(false), db, wake, listens, stop };
        Self { shared: Arc::default(), reads: Arc::new(Semaphore::new(READS_MAX)), start: Arc::new(start) }
    }

    /// The order's state, then its changes until it ends; after `seen` only what is not in it.
    pub async fn order(&self, id: Uuid, seen: Option<Seen>) -> Result<OrderStream, DbError> {
        let Attached { boundary, mut events, updates } = self.attach(Topic::Order(id)).await?;
        let is_the_end = |row: &Row| row.order.as_ref().is_some_and(|order| order.status.is_final());
        events.sort_by_key(|row| (is_the_end(row), row.position));
        let Some(current) = events.last().cloned() else { return Ok(OrderStream::Unknown) };
        let due = match seen.filter(|seen| seen.is_within(&boundary.seen)) {
            Some(seen) if is_the_end(&current) && seen.contains(current.position) => return Ok(OrderStream::Over),
            Some(seen) => missed(events, seen, &boundary).0,
            None => update(current.order, &boundary.seen.up_to(current.position)).into_iter().collect(),
        };
        let updates = stream::iter(due).chain(live(updates)).boxed();
        Ok(OrderStream::Updates(Until { updates: Some(updates), is_last: is_final }.boxed()))
    }

    /// The states of the user's latest orders, then every change of any; after `seen` every change that is not in it.
    pub async fn user(&self, user: UserId, seen: Option<Seen>) -> Result<Updates, DbError> {
        let begun = async {
            let Attached { boundary, updates, .. } = self.attach(Topic::User(user.clone())).await?;
            let seen = seen.filter(|seen| seen.is_within(&boundary.seen));
            Ok::<_, DbError>(match seen {
                Some(seen) => {
                    let catching_up = CatchingUp { live: self.clone(), user, boundary, seen: Some(seen), after: None, by: None };
                    let missed = stream::unfold(catching_up, |state| state.page()).flat_map(stream::iter);
                    missed.boxed().chain(live(updates)).boxed()
                }
                None => {
                    let rows = {
                        let _permit = self.reads.acquire().await.map_err(|_| stopping())?;
                        store::states_of_user(&mut *self.start.db.get().await?, &user, &boundary, STATES_MAX).await?
                    };
                    let event = |row: Row| update(row.order, &boundary.seen.up_to(row.position));
                    let states: Vec<Update> = rows.into_iter().filter_map(event).collect();
                    stream::iter(states).chain(live(updates)).boxed()
                }
            })
        };
        let updates = timeout(BEGIN_WITHIN, begun).await.map_err(|_| late())??;
        Ok(Until { updates: Some(updates), is_last: is_end }.boxed())
    }

    async fn attach(&self, topic: Topic) -> Result<Attached, DbError> {
        let waiting = self.shared.wait(topic).map_err(|refused| match refused {
            Refused::Stopping => stopping(),
            Refused::TooMany => DbError::Unavailable("too many streams wait for their beginning".into()),
        })?;
        self.start();
        match timeout(BEGIN_WITHIN, waiting).await {
            Ok(attached) => attached.map_err(|_| stopping()),
            Err(_) => Err(late()),
        }
    }

    fn start(&self) {
        if self.start.started.swap(true, Ordering::Relaxed) {
            return;
        }
        let Start { db, wake, listens, stop, .. } = &*self.start;
        let hub = hub::Hub { shared: self.shared.clone(), db: db.clone(), wake: wake.clone(), listens: *listens };
        db.runtime().spawn(hub.supervise(stop.clone()));
    }
}

fn stopping() -> DbError {
    DbError::Unavailable("no streams begin any more".into())
}

fn late() -> DbError {
    DbError::Unavailable(format!("no stream began within {} ms", BEGIN_WITHIN.as_millis()))
}

/// The events of `rows` that `seen` does not hold, in the order in which they are due; and what is seen after them.
fn missed(rows: Vec<Row>, mut seen: Seen, boundary: &Boundary) -> (Vec<Update>, Seen) {
    let mut due: Vec<Row> = rows.into_iter().filter(|row| !seen.contains(row.position)).collect();
    due.sort_by_key(|row| (seen.round(row.position), row.position));
    let mut updates = Vec::with_capacity(due.len());
    for row in due {
        seen = seen.then(row.position, boundary.seen.open());
        updates.extend(update(row.order, &seen));
    }
    (updates, seen)
}

fn update(order: Option<Order>, seen: &Seen) -> Option<Update> {
    Some(Update::Event(Arc::new(Event::of(order?, seen)?)))
}

/// A user's stream on its way to the boundary where it was attached.
struct CatchingUp {
    live: Live,
    user: UserId,
    boundary: Arc<Boundary>,
    /// `None` once nothing is left.
    seen: Option<Seen>,
    /// The last event of the page before, with its round; both by what was seen at the beginning.
    after: Option<(Seen, u8, position::Position)>,
    /// The same for all pages; `None` before the first.
    by: Option<By>,
}

impl CatchingUp {
    /// The next page, and what is left.
    async fn page(mut self) -> Option<(Vec<Update>, Self)> {
        let seen = self.seen.take()?;
        match timeout(BEGIN_WITHIN, self.read(seen)).await {
            Ok(Ok(updates)) => Some((updates, self)),
            failed => {
                let cause = match failed {
                    Ok(Err(error)) => error.to_string(),
                    _ => late().to_string(),
                };
                tracing::info!(cause, "a stream broke off while it caught up");
                Some((vec![Update::Ended(Reason::Interrupted)], self))
            }
        }
    }

    async fn read(&mut self, seen: Seen) -> Result<Vec<Update>, DbError> {
        let from = self.after.as_ref().map_or(&seen, |(from, ..)| from).clone();
        let after = self.after.as_ref().map(|(_, round, position)| (*round, *position));
        let rows = {
            let _permit = self.live.reads.acquire().await.map_err(|_| stopping())?;
            let mut conn = self.live.start.db.get().await?;
            let by = match self.by {
                Some(by) => by,
                None => *self.by.insert(store::missed_by(&mut conn, &self.user, &from, &self.boundary).await?),
            };
            store::missed_by_user(&mut conn, by, (&self.user, &from, &self.boundary), after, MISSED_ROWS_MAX).await?
        };
        let full = rows.len() as i64 == MISSED_ROWS_MAX;
        let (mut seen, mut updates) = (seen, Vec::with_capacity(rows.len()));
        for row in rows {
            self.after = Some((from.clone(), from.round(row.position), row.position));
            seen = seen.then(row.position, self.boundary.seen.open());
            updates.extend(update(row.order, &seen));
        }
        self.seen = full.then_some(seen);
        Ok(updates)
    }
}

/// What comes through the queue; one whose other end is gone was interrupted.
fn live(updates: Subscription) -> impl Stream<Item = Update> + Send + 'static {
    stream::unfold(Some(updates), async |updates| {
        let mut updates = updates?;
        match updates.queue.recv().await {
            Some(update) => Some((update, Some(updates))),
            None => Some((Update::Ended(Reason::Interrupted), None)),
        }
    })
}

/// Ends behind its last update, without asking for another one, and lets go of what it listens to then.
struct Until {
    updates: Option<Updates>,
    is_last: fn(&Update) -> bool,
}

impl Stream for Until {
    type Item = Update;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Update>> {
        let Some(updates) = &mut self.updates else { return Poll::Ready(None) };
        let polled = updates.poll_next_unpin(cx);
        let over = match &polled {
            Poll::Ready(Some(update)) => (self.is_last)(update),
            Poll::Ready(None) => true,
            Poll::Pending => false,
        };
        if over {
            self.updates = None;
        }
        polled
    }
}

fn is_end(update: &Update) -> bool {
    matches!(update, Update::Ended(_))
}

/// Nothing comes after an order's end.
fn is_final(update: &Update) -> bool {
    match update {
        Update::Event(event) => event.is_final,
        Update::Ended(_) => true,
    }
}
