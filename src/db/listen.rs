//! Wake-ups between processes: LISTEN on one side, and on the other a NOTIFY outside every write transaction.
//!
//! NOTIFY inside a write transaction takes a lock that all commits of the server share (measured at 0.42x the throughput), so
//! the notifier sends its own, the first at once and then as far apart as [`Gap`] says: a notification costs the server as much as what it is
//! about, and each of its listeners a wake-up. Who hears of a stream looks by itself as long as it lasts ([`Pace::looks_again`]).

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use diesel_async::SimpleAsyncConnection;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};

use crate::shutdown::Shutdown;
use crate::telemetry::Incident;

use super::error::DbError;
use super::pool::{Conn, Db};

/// Between two notifications of what comes alone.
const GAP: Duration = Duration::from_millis(2);
/// Where a few come at a time: as far apart as those who hear them look.
const GAP_BUSY: Duration = Duration::from_millis(6);
/// In a stream.
const GAP_STREAM: Duration = Duration::from_millis(50);
/// It is one where in [`GAP_BUSY`] more come than so many.
const FEW: u32 = 2;
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
async fn listen(db: &Db, channel: &'static str, wake: &Arc<Notify>, incident: &mut Incident) -> String {
    let (own, woken) = (db.sender().to_owned(), wake.clone());
    let heard = move |payload: &str| {
        if payload != own {
            woken.notify_one();
        }
    };
    let listening = match db.listen(channel, heard).await {
        Ok(listening) => listening,
        Err(error) => return error.to_string(),
    };
    incident.recovered();
    // What was committed while nobody listened is looked for now.
    wake.notify_one();
    listening.ended().await;
    "the connection was closed".into()
}

/// Tells other processes that something was committed; cheap to clone.
#[derive(Clone)]
pub struct Notifier {
    pending: Arc<Pending>,
    /// Wake the same process without the database between.
    local: Arc<[Arc<Notify>]>,
    /// The statement that tells the others behind another one; empty where there are none.
    statement: Arc<str>,
}

/// What other processes have not heard of.
struct Pending {
    rows: AtomicUsize,
    signal: Notify,
    gap: Mutex<Gap>,
}

impl Pending {
    fn new() -> Self {
        Self { rows: AtomicUsize::new(0), signal: Notify::new(), gap: Mutex::new(Gap::from(Instant::now())) }
    }

    fn gap(&self) -> MutexGuard<'_, Gap> {
        // It is whole at any time: nothing panics in the middle of a change of it.
        self.gap.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Notifier {
    /// Each channel with who is signalled directly; other processes hear of all of them in one round trip.
    pub fn start(db: Db, channels: &[(&'static str, Arc<Notify>)], stop: Shutdown) -> Self {
        let names = channels.iter().map(|(channel, _)| *channel);
        let (pending, text) = (Arc::new(Pending::new()), statement(names, db.sender()));
        // All that notify commit one after the other. Whoever uses a connection next must not wait for long where one of them stands still.
        let statement = format!("set local lock_timeout = '50ms'; {text}").into();
        let those = pending.clone();
        let runtime = db.runtime().clone();
        runtime.spawn(async move {
            loop {
                tokio::select! {
                    () = those.signal.notified() => {}
                    () = stop.stopped() => return,
                }
                let next = those.gap().next;
                if next > Instant::now() {
                    sleep_until(next).await;
                }
                let rows = those.rows.swap(0, Ordering::Relaxed);
                those.gap().told(rows, Instant::now());
                // A lost notification costs a listener its poll interval, no more; the next commit sends another.
                if let Ok(mut conn) = db.get().await {
                    let _ = conn.batch_execute(&text).await;
                }
            }
        });
        Self { pending, local: channels.iter().map(|(_, local)| local.clone()).collect(), statement }
    }

    /// Wakes only this process.
    pub fn local(local: impl IntoIterator<Item = Arc<Notify>>) -> Self {
        Self { pending: Arc::new(Pending::new()), local: local.into_iter().collect(), statement: "".into() }
    }

    /// Call after a commit, with the number of rows that others look for.
    pub fn committed(&self, rows: usize) {
        self.wake();
        self.pending.rows.fetch_add(rows, Ordering::Relaxed);
        self.pending.signal.notify_one();
    }

    /// This process.
    fn wake(&self) {
        self.local.iter().for_each(|local| local.notify_one());
    }

    /// Awaits `write`, one statement on `conn` that is a transaction by itself, and tells of its rows. Where nothing was told a moment ago
    /// that goes out behind it on the same connection: the server notifies as soon as it has committed, and not when this process has heard
    /// of that and has woken another session of it.
    ///
    /// # Errors
    /// Those of `write`; others may have been told of nothing then.
    pub async fn committing<T>(
        &self,
        mut conn: &Conn,
        rows: usize,
        write: impl Future<Output = Result<T, DbError>>,
    ) -> Result<T, DbError> {
        if !self.may_tell(rows) {
            let done = write.await?;
            self.committed(rows);
            return Ok(done);
        }
        let (mut write, mut telling) = (pin!(write), pin!(conn.batch_execute(&self.statement)));
        let (mut told, mut waits) = (false, 0);
        let done = poll_fn(|context| {
            // In this order: so they are sent where the statement is a prepared one.
            let done = write.as_mut().poll(context);
            waits += usize::from(done.is_pending());
            told = told || telling.as_mut().poll(context).is_ready();
            done
        })
        .await?;
        self.wake();
        // Who had to be prepared first has waited twice, and others were told before it: that is repeated, its rows are counted. Where there was
        // one wait all of it was sent before the telling, and what is behind it is not waited for.
        if told && waits > 1 {
            self.pending.signal.notify_one();
        }
        Ok(done)
    }

    /// Whether others may be told of so many rows now; counts them as told then.
    fn may_tell(&self, rows: usize) -> bool {
        let (mut gap, now) = (self.pending.gap(), Instant::now());
        // Whoever waits for the end of the gap tells of these as well.
        let may = !self.statement.is_empty() && gap.next <= now && self.pending.rows.load(Ordering::Relaxed) == 0;
        if may {
            gap.told(rows, now);
        }
        may
    }
}

/// A notification is a transaction with a commit of its own: nobody has to wait for the disk for it. Commands together are one, and need no
/// plan, as a query of `pg_notify` would.
fn statement<'c>(channels: impl Iterator<Item = &'c str>, sender: &str) -> String {
    let each = channels.map(|channel| format!("; notify {channel}, '{sender}'")).collect::<String>();
    format!("set local synchronous_commit = off{each}")
}

/// How long after a notification the next one may follow. By the rate of what they are about and not by its number: 200 a second come ten
/// at a time once the gap is long, and would never come alone again. Pure.
struct Gap {
    /// From here on the rows were counted.
    began: Instant,
    rows: usize,
    gap: Duration,
    /// When the next notification may follow.
    next: Instant,
}

impl Gap {
    fn from(now: Instant) -> Self {
        Self { began: now, rows: 0, gap: GAP, next: now }
    }

    /// There is a notification now, which is about so many rows.
    fn told(&mut self, rows: usize, now: Instant) {
        self.rows += rows;
        let counted = now - self.began;
        // In less time nothing can be said of a rate.
        if counted >= GAP_BUSY {
            let few = GAP_BUSY.as_secs_f64() * self.rows as f64 <= f64::from(FEW) * counted.as_secs_f64();
            let gap = match (few, self.gap < GAP_BUSY) {
                (true, _) => GAP,
                (false, true) => GAP_BUSY,
                (false, false) => GAP_STREAM,
            };
            *self = Self { began: now, rows: 0, gap, next: now };
        }
        self.next = now + self.gap;
    }
}

#[cfg(test)]
mod tests {
    use super::super::pace::Pace;
    use super::*;
    use proptest::prelude::*;

    /// Writes at these milliseconds, a notifier and one who hears it and looks: how many milliseconds each write waited to be looked for, in
    /// their order, and how many notifications there were.
    fn simulate(writes: &[u64]) -> (Vec<u64>, usize) {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let (mut waited, mut notifications) = (Vec::new(), 0);
        let (mut told, mut gap) = (0, Gap::from(start));
        let (mut pace, mut heard, mut looked) =
            (Pace::new(FEW as usize, usize::MAX, Duration::ZERO, GAP_BUSY), false, None::<Instant>);
        for ms in 0..writes.last().map_or(0, |last| last + 1_000) {
            let (now, written) = (at(ms), writes.partition_point(|write| *write <= ms));
            if written > told && now >= gap.next {
                gap.told(written - told, now);
                (told, heard) = (written, true);
                notifications += 1;
            }
            let again = looked.and_then(|looked| pace.looks_again(looked, now));
            if again.map_or(heard && pace.next(now).1 <= now, |again| again <= now) {
                let found = &writes[waited.len()..written];
                pace.done(found.len(), now, now);
                waited.extend(found.iter().map(|write| ms - write));
                (heard, looked) = (false, Some(now));
            }
        }
        assert_eq!(waited.len(), writes.len(), "some were never looked for");
        (waited, notifications)
    }

    proptest! {
        #[test]
        fn no_write_waits_longer_than_the_longest_gap_and_a_look_however_they_come(
            mut writes in prop::collection::vec(0u64..1_500, 1..600), bursts in prop::collection::vec((0u64..1_500, 1usize..60), 0..6),
        ) {
            writes.extend(bursts.iter().flat_map(|(at, count)| vec![*at; *count]));
            writes.sort_unstable();
            let (waited, notifications) = simulate(&writes);
            prop_assert!(waited.iter().all(|waited| *waited <= 60), "{:?}", waited.iter().max());
            prop_assert!(notifications <= writes.len());
        }

        #[test]
        fn nobody_waits_longer_at_the_end_of_a_stream_than_in_it(a_ms in 1u64..9, took in 200u64..900) {
            let writes: Vec<u64> = (0..took * a_ms).map(|n| n / a_ms).collect();
            let (waited, notifications) = simulate(&writes);
            prop_assert!(waited.iter().all(|waited| *waited <= 7), "{:?}", waited.iter().max());
            // Looks are ten times as many.
            prop_assert!(notifications as u64 <= took / 50 + 10, "{notifications} in {took} ms");
        }
    }

    #[test]
    fn what_comes_alone_is_told_at_once_also_after_a_stream_and_after_a_stall() {
        // 1 000 a second for a while; then 200 a second, with a stall of 40 ms whose eight come together.
        let stream = 0..300;
        let alone = (300..2_000).step_by(5).map(|ms| if (900..940).contains(&ms) { 940 } else { ms });
        let writes: Vec<u64> = stream.chain(alone).collect();
        let (waited, _) = simulate(&writes);
        let late = |from: u64| writes.iter().zip(&waited).filter(|(write, waited)| **write >= from && **waited > 2).count();
        // A linger and a gap later nobody waits any more.
        assert_eq!(late(1_100), 0);
        assert!(writes.iter().zip(&waited).any(|(write, waited)| *write < 300 && *waited > 2), "a stream is looked for together");
    }
}
