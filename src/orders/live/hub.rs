//! The one reader of `order_change` in a process: looks by the rule of [`super::position`], and hands what is new to who listens.
//!
//! It works while somebody listens; else it asks nothing. A stream begins at the boundary between two looks, so it misses nothing and
//! gets nothing twice, and one look serves all who came before it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use uuid::Uuid;

use super::CHANNEL;
use super::event::{Event, Reason};
use super::position::{Position, Seen};
use super::registry::{Begun, Shared, Topic};
use super::store::{self, Boundary, Row};
use crate::db::{Conn, Db, DbError, Listener, Pace, Snapshot};
use crate::shutdown::Shutdown;
use crate::telemetry::Incident;

/// What is committed is looked for so often, whether anybody says so or not.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Between the beginnings of two looks: what comes together is read together.
const LOOK_GAP: Duration = Duration::from_millis(2);
/// The same where several come at a time.
const PACE: Pace = Pace::new(2, usize::MAX, Duration::ZERO, Duration::from_millis(6)).half_of_the_time();
/// How long the session stays when nobody listens any more.
const LINGER: Duration = Duration::from_secs(10);
const RETRY_AFTER: Duration = Duration::from_millis(250);
const PAGE_ROWS_MAX: i64 = 1_000;
/// Orders whose beginnings are read in one statement.
const ORDERS_MAX: usize = 1_000;

#[derive(Clone)]
pub struct Hub {
    pub shared: Arc<Shared>,
    pub db: Db,
    /// Commits of this process.
    pub wake: Arc<Notify>,
    /// Other processes write, too, and say so on the channel.
    pub listens: bool,
}

/// The snapshot of a look.
struct Current {
    text: String,
    open: Vec<u64>,
}

/// Whose events are read.
enum Of {
    Transactions(Vec<u64>),
    Younger,
}

impl Hub {
    /// Runs until `stop`, then ends every stream. A defect costs those who listen their streams, and nobody else.
    pub async fn supervise(self, stop: Shutdown) {
        while !stop.is_stopping() {
            let ended = tokio::spawn(self.clone().run(stop.clone())).await;
            if ended.is_err() {
                tracing::error!("the reader of the orders' events ended; it begins anew");
                self.shared.end(Reason::Interrupted);
                sleep(RETRY_AFTER).await;
            }
        }
        self.shared.end(Reason::Stopping);
    }

    async fn run(self, stop: Shutdown) {
        let mut incident = Incident::new("reading the orders' events");
        let mut stands: Option<Boundary> = None;
        loop {
            if !self.shared.is_busy() {
                stands = None;
                tokio::select! {
                    () = self.shared.work.notified() => {}
                    () = stop.stopped() => return,
                }
                continue;
            }
            let ended = tokio::select! {
                ended = self.session(&mut stands, &mut incident) => ended,
                () = stop.stopped() => return,
            };
            if let Err(error) = ended {
                incident.failed(&error);
                tokio::select! {
                    () = sleep(RETRY_AFTER) => {}
                    () = stop.stopped() => return,
                }
            }
        }
    }

    /// Looks over one session until nobody has listened for a while. Where it breaks, `stands` tells how far everybody is: that is
    /// made of events alone, so it holds in the next session, too, also after a crash of the server.
    async fn session(&self, stands: &mut Option<Boundary>, incident: &mut Incident) -> Result<(), DbError> {
        let mut conn = self.db.dedicated().await?;
        store::in_order(&mut conn).await?;
        let _listener = self.listens.then(|| {
            let stop = Shutdown::new();
            Listener::start(self.db.clone(), CHANNEL, self.wake.clone(), stop.clone());
            stop.at_drop()
        });
        // Kept until there is another: where this fails everybody still stands there.
        let mut boundary = self.begin(&mut conn, stands.clone()).await?;
        let (mut last, mut pace) = (String::new(), PACE);
        loop {
            let began = Instant::now();
            // Who comes during the look may know of what was committed behind its snapshot: the next one is theirs.
            let waited = self.shared.waiting();
            if self.shared.is_listened_to() {
                let looked = self.look(&mut conn, &mut boundary, &mut last).await;
                *stands = Some(boundary.clone());
                pace.done(looked?, began, Instant::now());
            } else {
                // Nobody waits for what was written meanwhile.
                boundary = store::beginning(&mut conn).await?.0;
            }
            // Before anybody is told of it: where that fails half-way some stand there.
            *stands = Some(boundary.clone());
            self.attach(&mut conn, &boundary, waited).await?;
            incident.recovered();
            self.pause(began, &pace).await;
            if !self.shared.is_busy() && timeout(LINGER, self.shared.work.notified()).await.is_err() {
                return Ok(());
            }
        }
    }

    async fn pause(&self, began: Instant, pace: &Pace) {
        if !self.shared.is_awaited() {
            tokio::select! {
                () = pace.told(&self.wake, began) => {}
                () = self.shared.work.notified() => {}
                () = sleep(POLL_INTERVAL) => {}
            }
        }
        pace.rest().await;
        sleep_until(began + LOOK_GAP).await;
    }

    /// Goes on where the last session broke; on another server than that, everybody begins anew.
    async fn begin(&self, conn: &mut Conn, stands: Option<Boundary>) -> Result<Boundary, DbError> {
        let (now, xmax) = store::beginning(conn).await?;
        match stands {
            Some(stands) if stands.seen.below() <= xmax && now.legacy <= stands.legacy => Ok(stands),
            Some(_) => {
                self.shared.end(Reason::Interrupted);
                Ok(now)
            }
            None => Ok(now),
        }
    }

    /// Everything that is visible now and was not, to whoever listens; returns how many events that were. Where it fails half-way, `boundary` is
    /// where it came to.
    async fn look(&self, conn: &mut Conn, boundary: &mut Boundary, last: &mut String) -> Result<usize, DbError> {
        let (late, below) = (boundary.seen.open().to_vec(), boundary.seen.below());
        let (text, rows) = store::look(conn, &late, below, boundary.legacy, PAGE_ROWS_MAX).await?;
        if text == *last {
            return Ok(0);
        }
        let snapshot = Current { open: store::open(&Snapshot::parse(&text)?), text };
        let mut count = rows.len();
        match boundary.seen.at() {
            None if (count as i64) < PAGE_ROWS_MAX => self.hand_out(rows, boundary, &snapshot),
            // There may be more than was read; and only a look that broke off leaves a transaction delivered in part.
            at => {
                count = 0;
                if let Some(at) = at {
                    count += self.deliver(conn, boundary, &snapshot, Of::Transactions(vec![at.xid]), at).await?;
                }
                if !late.is_empty() {
                    count += self.deliver(conn, boundary, &snapshot, Of::Transactions(late), Position { xid: 0, id: 0 }).await?;
                }
                count += self.deliver(conn, boundary, &snapshot, Of::Younger, Position { xid: below - 1, id: i64::MAX }).await?;
            }
        }
        boundary.seen = Seen::all_up_to((below - 1).max(boundary.seen.below() - 1), &snapshot.open);
        *last = snapshot.text;
        Ok(count)
    }

    /// What the snapshot sees of these behind `after`, to whoever listens.
    async fn deliver(
        &self,
        conn: &mut Conn,
        boundary: &mut Boundary,
        snapshot: &Current,
        of: Of,
        mut after: Position,
    ) -> Result<usize, DbError> {
        let mut count = 0;
        loop {
            let (text, legacy) = (&snapshot.text, boundary.legacy);
            let rows = match &of {
                Of::Transactions(xids) => store::events_of(conn, xids, after, text, legacy, PAGE_ROWS_MAX).await?,
                Of::Younger => store::events_behind(conn, after, text, legacy, PAGE_ROWS_MAX).await?,
            };
            let full = rows.len() as i64 == PAGE_ROWS_MAX;
            after = rows.last().map_or(after, |row| row.position);
            count += rows.len();
            self.hand_out(rows, boundary, snapshot);
            if !full {
                return Ok(count);
            }
        }
    }

    /// Tells those who listen of these events, the next ones that are due.
    fn hand_out(&self, rows: Vec<Row>, boundary: &mut Boundary, snapshot: &Current) {
        for Row { position, order } in rows {
            boundary.seen = boundary.seen.then(position, &snapshot.open);
            let Some(order) = order.filter(|order| self.shared.wants(order.id, &order.user_id)) else { continue };
            let user = order.user_id.clone();
            if let Some(event) = Event::of(order, &boundary.seen) {
                self.shared.deliver(&Arc::new(event), &user);
            }
        }
    }

    /// Begins the streams of the first `count` who wait, at `boundary`.
    async fn attach(&self, conn: &mut Conn, boundary: &Boundary, count: usize) -> Result<(), DbError> {
        let waiting = self.shared.take_waiting(count);
        if waiting.is_empty() {
            return Ok(());
        }
        let boundary = Arc::new(boundary.clone());
        let (of_orders, of_users): (Vec<Begun>, Vec<Begun>) =
            self.shared.attach(waiting).into_iter().partition(|one| matches!(one.topic(), Topic::Order(_)));
        of_users.into_iter().for_each(|one| one.tell(boundary.clone(), Vec::new()));
        let mut of_orders = of_orders.into_iter();
        loop {
            let some: Vec<Begun> = of_orders.by_ref().take(ORDERS_MAX).collect();
            if some.is_empty() {
                return Ok(());
            }
            let id = |one: &Begun| if let Topic::Order(id) = one.topic() { Some(*id) } else { None };
            let ids: Vec<Uuid> = some.iter().filter_map(id).collect();
            let mut events: HashMap<Uuid, Vec<Row>> = HashMap::new();
            for row in store::events_of_orders(conn, &ids, &boundary).await? {
                if let Some(order) = &row.order {
                    events.entry(order.id).or_default().push(row);
                }
            }
            for one in some {
                let those = id(&one).and_then(|id| events.get(&id).cloned());
                one.tell(boundary.clone(), those.unwrap_or_default());
            }
        }
    }
}
