//! The relay: from an outbox to the log, in order, at least once. Owns no table; may import messaging and db.
//!
//! [`publish::publish_batch`] is the step; [`Relay::run`] only chooses between step, wake-up, timer and stop.

mod publish;
mod traced;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::config::RelayConfig;
use crate::contracts::TOPICS;
use crate::db::{Db, DbError, Pace};
use crate::messaging::Reach;
use crate::messaging::log::SharedLog;
use crate::messaging::outbox::{Purged, Reader, Source};
use crate::shutdown::Shutdown;
use crate::telemetry::Incident;

use publish::PAGE_LARGE;
pub use publish::{Copies, RelayError, Step, publish_batch};

/// How often a standby asks for the outbox, and a relay whose database is away tries again, when nothing wakes it.
const RETRY: Duration = Duration::from_millis(500);
/// Writers wake a standby too, without an end: it asks at most this often.
const RETRY_WOKEN: Duration = Duration::from_millis(100);

/// In a stream of pages the cursor is saved so often: a save costs the database as much as a page's look. A crash publishes again what was
/// published since, and consumers know repeats.
const SAVE_INTERVAL: Duration = Duration::from_millis(50);

/// Small pages that follow each other cost the database and the broker more than a rest between them costs anybody.
const PACE: Pace = Pace::new(2, PAGE_LARGE, Duration::ZERO, Duration::from_millis(6)).half_of_the_time();

/// Publishes one database's outbox.
pub struct Relay<S = Db> {
    pub db: S,
    pub log: SharedLog,
    /// One for all the relays of a process.
    pub reach: Arc<Reach>,
    /// Whose outbox, for logs and metrics: `orders` or `payments`.
    pub name: &'static str,
    /// Names this process among its replicas.
    pub owner: String,
    pub config: RelayConfig,
    /// Of a topic that has to be made anew.
    pub partitions: i32,
    /// Signalled by writers in the same process.
    pub wake: Arc<Notify>,
}

impl<S: Source> Relay<S> {
    /// Runs until `stop`; finishes the page in hand and gives the outbox back. Where another relay has it, stands by.
    pub async fn run(self, stop: Shutdown) {
        let mut incident = Incident::new("relaying");
        // From the beginning: the first one would go unnoticed by who watches for an increase.
        for topic in TOPICS {
            metrics::counter!("shopd_relay_topics_made_total", "topic" => topic).increment(0);
        }
        // A standby says so, too: else nobody would see that there are only standbys.
        let epoch = metrics::gauge!("shopd_relay_lease_epoch", "outbox" => self.name);
        epoch.set(0.0);
        // As long as another has the outbox. Who has it hears of rows over its own session.
        let mut standing_by = None;
        while !stop.is_stopping() {
            if standing_by.is_some() {
                tokio::select! {
                    biased;
                    () = stop.stopped() => break,
                    () = self.reach.probe(&*self.log) => {}
                }
            }
            match Reader::acquire(&self.db, &self.owner, self.config.lease, self.reach.is_sure(), &self.wake).await {
                Ok(Some(mut reader)) => {
                    standing_by = None;
                    // From here on it is asked only where a page waits for it.
                    self.reach.rest();
                    incident.recovered();
                    tracing::info!(outbox = self.name, "relaying");
                    epoch.set(reader.epoch() as f64);
                    if let Err(error) = self.serve(&mut reader, &stop).await {
                        incident.failed(&format_args!("{}: {error}", self.name));
                    }
                    epoch.set(0.0);
                    if let Err(error) = reader.release().await {
                        tracing::info!(outbox = self.name, %error, "lease not given back; it expires by itself");
                    }
                }
                Ok(None) => {
                    // Also who was robbed of it: that is how it should be.
                    incident.recovered();
                    standing_by.get_or_insert_with(|| {
                        let listening = Shutdown::new();
                        self.db.listen(self.wake.clone(), listening.clone());
                        listening.at_drop()
                    });
                }
                Err(error) => incident.failed(&format_args!("{}: {error}", self.name)),
            }
            let woken = async {
                tokio::join!(self.wake.notified(), tokio::time::sleep(RETRY_WOKEN));
            };
            tokio::select! {
                biased;
                () = tokio::time::sleep(RETRY) => {}
                // The outbox was given back, or somebody wrote and its relay may have died.
                () = woken => {}
                () = stop.stopped() => {}
            }
        }
    }

    /// Publishes until stopped, or until the outbox is another relay's, or its database fails.
    async fn serve(&self, reader: &mut Reader<S>, stop: &Shutdown) -> Result<(), DbError> {
        // What an earlier relay published may still lie there.
        let mut unpurged = 1;
        let mut renewed = Instant::now();
        let mut purge_from = renewed;
        let (mut pace, mut copies) = (PACE, Copies::default());
        let (page, took) = (
            metrics::histogram!("shopd_relay_page_rows", "outbox" => self.name),
            metrics::histogram!("shopd_relay_publish_duration_seconds", "outbox" => self.name),
        );
        // A short lease is renewed in time however long the poll interval is.
        let idle_max = self.config.poll_interval.min(reader.heartbeat() * 2);
        loop {
            if stop.is_stopping() {
                return Ok(());
            }
            let began = Instant::now();
            let (log, rows_max) = (self.log.as_ref(), self.config.batch_rows_max);
            let rows = match publish_batch(reader, log, rows_max, self.partitions, &self.reach, &mut copies, stop).await? {
                Step::Published(rows) => rows,
                Step::Interrupted => continue,
                Step::Idle => 0,
            };
            if rows > 0 {
                page.record(rows as f64);
                took.record(began.elapsed());
                pace.done(rows, began, Instant::now());
                if renewed.elapsed() >= SAVE_INTERVAL {
                    reader.save().await?;
                    renewed = Instant::now();
                }
                unpurged += rows;
                metrics::counter!("shopd_relay_rows_total", "outbox" => self.name).increment(rows as u64);
            }
            let quiet = !reader.has_more() && {
                pace.rest().await;
                let saved = reader.is_saved();
                // By the time since the last renewal, not by a silence: wake-ups may come without an end and bring no row.
                tokio::select! {
                    biased;
                    () = stop.stopped() => return Ok(()),
                    () = sleep_until(renewed + if saved { idle_max } else { SAVE_INTERVAL }) => {
                        reader.save().await?;
                        renewed = Instant::now();
                        saved
                    }
                    () = pace.told(&self.wake, began) => false,
                }
            };
            let busy_for_long = unpurged >= self.config.published_rows_max && Instant::now() >= purge_from;
            if (quiet && unpurged > 0) || busy_for_long {
                match reader.purge(quiet).await? {
                    Purged::All => unpurged = 0,
                    // What is left is dropped when as many have come again, or when the outbox is quiet.
                    Purged::Some => unpurged = 1,
                    // A transaction that stays open keeps them all: asking with every page would cost a look each time.
                    Purged::Nothing => purge_from = Instant::now() + idle_max,
                }
            }
        }
    }
}
