//! Wake-ups between processes: LISTEN on one side, and on the other a NOTIFY outside every write transaction.
//!
//! NOTIFY inside a write transaction takes a lock that all commits of the server share (measured at 0.42x the throughput), so
//! the notifier sends its own, the first at once and then at most one per [`GAP`], or [`PACE`] in a stream.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use diesel::sql_types::{Array, Text};
use diesel_async::{RunQueryDsl, SimpleAsyncConnection};
use futures::StreamExt;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use crate::shutdown::Shutdown;
use crate::telemetry::Incident;

use super::error::DbError;
use super::pace::Pace;
use super::pool::{Conn, Db};
use super::sql::sql;

const GAP: Duration = Duration::from_millis(2);
/// A notification costs the server as much as what it is about, and each of its listeners a wake-up; the relay, who hears of a stream, looks
/// no more often than so, either.
const PACE: Pace = Pace::new(3, usize::MAX, Duration::ZERO, Duration::from_millis(10));
const RECONNECT_AFTER: Duration = Duration::from_millis(500);

/// Hears a channel; its [`Notify`] is signalled for every notification of others' and after every reconnection. What was sent over the same
/// [`Db`] it was told directly.
pub struct Listener;

impl Listener {
    /// Runs until `stop`, reconnecting for ever.
    pub fn start(db: Db, channel: &'static str, wake: Arc<Notify>, stop: Shutdown) {
        let runtime = db.runtime().clone();
        runtime.spawn(async move {
            let mut incident = Incident::new("listening for notifications");
            while !stop.is_stopping() {
                let ended = tokio::select! {
                    ended = listen(&db, channel, &wake, &mut incident) => ended,
                    () = stop.stopped() => return,
                };
                incident.failed(&ended);
                tokio::select! {
                    () = sleep(RECONNECT_AFTER) => {}
                    () = stop.stopped() => return,
                }
            }
        });
    }
}

/// Returns why listening ended.
async fn listen(db: &Db, channel: &str, wake: &Notify, incident: &mut Incident) -> String {
    let mut conn = match db.dedicated().await {
        Ok(conn) => conn,
        Err(error) => return error.to_string(),
    };
    if let Err(error) = conn.batch_execute(&format!("listen {channel}")).await {
        return error.to_string();
    }
    incident.recovered();
    // What was committed while nobody listened is looked for now.
    wake.notify_one();
    let mut notifications = std::pin::pin!(conn.notifications_stream());
    while let Some(Ok(notification)) = notifications.next().await {
        if notification.payload != db.sender() {
            wake.notify_one();
        }
    }
    "the connection was closed".into()
}

/// Tells other processes that something was committed; cheap to clone.
#[derive(Clone)]
pub struct Notifier {
    pending: Arc<Pending>,
    /// Wake the same process without the database between.
    local: Arc<[Arc<Notify>]>,
}

/// What other processes have not heard of.
#[derive(Default)]
struct Pending {
    rows: AtomicUsize,
    signal: Notify,
}

impl Notifier {
    /// Each channel with who is signalled directly; other processes hear of all of them in one round trip.
    pub fn start(db: Db, channels: &[(&'static str, Arc<Notify>)], stop: Shutdown) -> Self {
        let pending = Arc::new(Pending::default());
        let those = pending.clone();
        let runtime = db.runtime().clone();
        let names: Vec<&'static str> = channels.iter().map(|(channel, _)| *channel).collect();
        runtime.spawn(async move {
            let mut pace = PACE;
            loop {
                tokio::select! {
                    () = those.signal.notified() => {}
                    () = stop.stopped() => return,
                }
                let (rows, began) = (those.rows.swap(0, Ordering::Relaxed), Instant::now());
                pace.done(rows, began, began);
                // A lost notification costs a listener its poll interval, no more; the next commit sends another.
                if let Ok(mut conn) = db.get().await {
                    let _ = notify(&mut conn, &names, db.sender()).await;
                }
                sleep(GAP).await;
                pace.rest().await;
            }
        });
        Self { pending, local: channels.iter().map(|(_, local)| local.clone()).collect() }
    }

    /// Wakes only this process.
    pub fn local(local: impl IntoIterator<Item = Arc<Notify>>) -> Self {
        Self { pending: Arc::default(), local: local.into_iter().collect() }
    }

    /// Call after a commit, with the number of rows that others look for.
    pub fn committed(&self, rows: usize) {
        self.local.iter().for_each(|local| local.notify_one());
        self.pending.rows.fetch_add(rows, Ordering::Relaxed);
        self.pending.signal.notify_one();
    }
}

/// A notification is a transaction with a commit of its own: nobody has to wait for the disk for it.
async fn notify(conn: &mut Conn, channels: &[&str], sender: &str) -> Result<(), DbError> {
    sql("select set_config('synchronous_commit', 'off', true), pg_notify(channel, $2) from unnest($1) channel")
        .bind::<Array<Text>, _>(channels)
        .bind::<Text, _>(sender)
        .execute(conn)
        .await?;
    Ok(())
}
