//! Wake-ups between processes: LISTEN on one side, and on the other a NOTIFY outside every write transaction.
//!
//! NOTIFY inside a write transaction takes a lock that all commits of the server share (measured at 0.42x the throughput), so
//! the notifier sends its own, the first at once and then at most one per [`GAP`].

use std::sync::Arc;
use std::time::Duration;

use diesel_async::SimpleAsyncConnection;
use futures::StreamExt;
use tokio::sync::Notify;

use crate::shutdown::Shutdown;
use crate::telemetry::Incident;

use super::pool::Db;

const GAP: Duration = Duration::from_millis(2);
const RECONNECT_AFTER: Duration = Duration::from_millis(500);

/// Hears a channel; its [`Notify`] is signalled for every notification and after every reconnection.
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
                    () = tokio::time::sleep(RECONNECT_AFTER) => {}
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
    while let Some(Ok(_)) = notifications.next().await {
        wake.notify_one();
    }
    "the connection was closed".into()
}

/// Tells other processes that something was committed; cheap to clone.
#[derive(Clone)]
pub struct Notifier {
    pending: Arc<Notify>,
    /// Wake the same process without the database between.
    local: Arc<[Arc<Notify>]>,
}

impl Notifier {
    /// Each channel with who is signalled directly; other processes hear of all of them in one round trip.
    pub fn start(db: Db, channels: &[(&'static str, Arc<Notify>)], stop: Shutdown) -> Self {
        let pending = Arc::new(Notify::new());
        let signal = pending.clone();
        let runtime = db.runtime().clone();
        // A notification is a transaction with a commit of its own: nobody has to wait for the disk for it.
        let statement =
            channels.iter().fold("select set_config('synchronous_commit', 'off', true)".to_owned(), |all, (channel, _)| {
                all + &format!(", pg_notify('{channel}', '')")
            });
        runtime.spawn(async move {
            loop {
                tokio::select! {
                    () = signal.notified() => {}
                    () = stop.stopped() => return,
                }
                // A lost notification costs a listener its poll interval, no more; the next commit sends another.
                if let Ok(mut conn) = db.get().await {
                    let _ = conn.batch_execute(&statement).await;
                }
                tokio::time::sleep(GAP).await;
            }
        });
        Self { pending, local: channels.iter().map(|(_, local)| local.clone()).collect() }
    }

    /// Wakes only this process.
    pub fn local(local: impl IntoIterator<Item = Arc<Notify>>) -> Self {
        Self { pending: Arc::new(Notify::new()), local: local.into_iter().collect() }
    }

    /// Call after a commit.
    pub fn committed(&self) {
        self.local.iter().for_each(|local| local.notify_one());
        self.pending.notify_one();
    }
}
