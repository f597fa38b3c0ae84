//! Who waits for which partition, and what wakes them: an append of this process at once, one of another process by a
//! notification, and a slow look at all partitions where a notification was lost.
//!
//! A notification says which partitions have which ends, so hearing one costs no query. It is sent after the commit, outside
//! of it: inside, NOTIFY makes all commits of the server take turns.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use super::store::{self, Place};
use crate::db::{Db, DbError};

const CHANNEL: &str = "shopd_log";
/// Between two notifications, which therefore tell of many appends under load.
const NOTIFY_GAP: Duration = Duration::from_millis(3);
const POLL_INTERVAL: Duration = Duration::from_millis(1_000);
const RECONNECT_AFTER: Duration = Duration::from_millis(500);
/// Partitions in one notification: at most 42 bytes each, of the 8 000 that Postgres allows.
const NOTIFIED_MAX: usize = 150;
const UNKNOWN: i64 = -1;

#[derive(Default)]
pub(super) struct Signals {
    /// The end of each partition, as far as it is known here.
    ends: Mutex<HashMap<Place, watch::Sender<i64>>>,
    /// What other processes have not been told yet.
    untold: Mutex<BTreeMap<Place, i64>>,
    tell: Notify,
    look: Notify,
    waiting: AtomicUsize,
    /// Somebody has begun to wait since the last look.
    waited: AtomicBool,
    /// The last look at all partitions went well, and somebody has been waiting ever since.
    fresh: AtomicBool,
}

/// Somebody waits, as long as it lives.
pub(super) struct Waiting<'s>(&'s Signals);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

// A poisoned map is still a map: nothing panics in the middle of a change of it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Signals {
    pub fn wait(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.waited.store(true, Ordering::SeqCst);
        Waiting(self)
    }

    /// Changes whenever the partition's end may have moved.
    pub fn end(&self, place: Place) -> watch::Receiver<i64> {
        lock(&self.ends).entry(place).or_insert_with(|| watch::Sender::new(UNKNOWN)).subscribe()
    }

    /// Whether an end that did not change is one to rely on; if not, it will be soon.
    pub fn is_fresh(&self) -> bool {
        let fresh = self.fresh.load(Ordering::SeqCst);
        if !fresh {
            self.look.notify_one();
        }
        fresh
    }

    /// The partition reaches up to `end` at least.
    pub fn saw(&self, place: Place, end: i64) {
        let raise = |known: &mut i64| {
            let raised = *known < end;
            *known = end.max(*known);
            raised
        };
        lock(&self.ends).entry(place).or_insert_with(|| watch::Sender::new(UNKNOWN)).send_if_modified(raise);
    }

    /// An append of this process has committed.
    pub fn committed(&self, place: Place, end: i64) {
        self.saw(place, end);
        lock(&self.untold).insert(place, end);
        self.tell.notify_one();
    }

    fn known(&self) -> HashMap<Place, i64> {
        lock(&self.ends).iter().map(|(place, end)| (*place, *end.borrow())).collect()
    }

    /// Looks at all partitions. An end goes back too where nobody moved it meanwhile: the log was made anew.
    async fn look(&self, db: &Db) -> Result<(), DbError> {
        let before = self.known();
        let ends = store::ends(&mut *db.get().await?).await?;
        for end in ends {
            let place = (end.topic_id, end.partition);
            self.saw(place, end.next_offset);
            let lower = |known: &mut i64| {
                let lowered = *known > end.next_offset && before.get(&place) == Some(known);
                if lowered {
                    *known = end.next_offset;
                }
                lowered
            };
            if let Some(known) = lock(&self.ends).get(&place) {
                known.send_if_modified(lower);
            }
        }
        Ok(())
    }

    /// Looks at all partitions now and then while somebody waits, and at once after something may have been missed.
    pub async fn keep_looking(self: Arc<Self>, db: Db) {
        loop {
            let somebody = self.waited.swap(false, Ordering::SeqCst) || self.waiting.load(Ordering::SeqCst) > 0;
            let looked = if somebody { self.look(&db).await } else { Ok(()) };
            self.fresh.store(somebody && looked.is_ok(), Ordering::SeqCst);
            if looked.is_err() {
                // Those who wait ask by themselves meanwhile; this must not ask for them all the faster.
                tokio::time::sleep(RECONNECT_AFTER).await;
            }
            let _ = tokio::time::timeout(POLL_INTERVAL, self.look.notified()).await;
        }
    }

    /// Hears other processes' notifications, reconnecting for ever.
    pub async fn keep_listening(self: Arc<Self>, db: Db) {
        loop {
            if let Err(error) = self.listen(&db).await {
                tracing::debug!(%error, "the log's notifications are not heard");
            }
            tokio::time::sleep(RECONNECT_AFTER).await;
        }
    }

    async fn listen(self: &Arc<Self>, db: &Db) -> Result<(), DbError> {
        let signals = self.clone();
        let heard = move |payload: &str| parse(payload).for_each(|(place, end)| signals.saw(place, end));
        let listening = db.listen(CHANNEL, heard).await?;
        // What was committed while nobody listened is looked for now.
        self.look.notify_one();
        listening.ended().await;
        Ok(())
    }

    /// Tells other processes of this one's appends.
    pub async fn keep_telling(self: Arc<Self>, db: Db) {
        loop {
            self.tell.notified().await;
            let untold = std::mem::take(&mut *lock(&self.untold));
            let untold: Vec<(Place, i64)> = untold.into_iter().collect();
            for some in untold.chunks(NOTIFIED_MAX) {
                // A lost notification costs the other processes their poll interval, no more.
                if let Ok(mut conn) = db.get().await
                    && let Err(error) = store::notify(&mut conn, CHANNEL, &payload(some)).await
                {
                    tracing::debug!(%error, "a notification of the log was lost");
                }
            }
            tokio::time::sleep(NOTIFY_GAP).await;
        }
    }
}

fn payload(ends: &[(Place, i64)]) -> String {
    let one = |((topic_id, partition), end): &(Place, i64)| format!("{topic_id}:{partition}:{end}");
    ends.iter().map(one).collect::<Vec<_>>().join(",")
}

/// What is no partition's end is left out.
fn parse(payload: &str) -> impl Iterator<Item = (Place, i64)> {
    payload.split(',').filter_map(|one| {
        let mut parts = one.split(':');
        let place = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        Some((place, parts.next()?.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notification_says_what_it_was_told_and_is_short_enough() {
        let ends: Vec<(Place, i64)> = (0..NOTIFIED_MAX as i32).map(|n| ((i32::MAX - n, i32::MAX), i64::MAX)).collect();
        let payload = payload(&ends);
        assert!(payload.len() < 8_000, "{}", payload.len());
        assert_eq!(parse(&payload).collect::<Vec<_>>(), ends);
        assert_eq!(parse("1:2:3,,x:1:2,7:8").collect::<Vec<_>>(), [((1, 2), 3)]);
    }

    #[test]
    fn an_end_that_was_seen_wakes_once() {
        let signals = Signals::default();
        let mut end = signals.end((1, 0));
        signals.saw((1, 0), 5);
        assert_eq!(*end.borrow_and_update(), 5);
        signals.saw((1, 0), 5);
        signals.saw((1, 0), 3);
        assert!(!end.has_changed().unwrap());
    }
}
