//! The relay: from an outbox to the log, in order, at least once. Owns no table; may import messaging and db.
//!
//! [`publish::publish_batch`] is the step; [`Relay::run`] only chooses between step, wake-up, timer and stop.

mod publish;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::config::RelayConfig;
use crate::db::{Db, DbError, Listener};
use crate::messaging::log::SharedLog;
use crate::messaging::outbox::{self, Purged, Reader};
use crate::shutdown::Shutdown;
use crate::telemetry::Incident;

pub use publish::{RelayError, Step, publish_batch};

/// How often a standby asks for the outbox, and a relay whose database is away tries again.
const RETRY: Duration = Duration::from_millis(500);
/// Published rows that may lie in a busy outbox before they are dropped in pieces.
const UNPURGED_ROWS_MAX: usize = 50_000;

/// Publishes one database's outbox.
pub struct Relay {
    pub db: Db,
    pub log: SharedLog,
    /// Whose outbox, for logs and metrics: `orders` or `payments`.
    pub name: &'static str,
    /// Names this process among its replicas.
    pub owner: String,
    pub config: RelayConfig,
    /// Signalled by writers in the same process.
    pub wake: Arc<Notify>,
}

impl Relay {
    /// Runs until `stop`; finishes the page in hand and gives the outbox back. Where another relay has it, stands by.
    pub async fn run(self, stop: Shutdown) {
        Listener::start(self.db.clone(), outbox::CHANNEL, self.wake.clone(), stop.clone());
        let mut incident = Incident::new("relaying");
        while !stop.is_stopping() {
            match Reader::acquire(&self.db, &self.owner, self.config.lease).await {
                Ok(Some(mut reader)) => {
                    incident.recovered();
                    tracing::info!(outbox = self.name, "relaying");
                    if let Err(error) = self.serve(&mut reader, &stop).await {
                        incident.failed(&format_args!("{}: {error}", self.name));
                    }
                    if let Err(error) = reader.release().await {
                        tracing::info!(outbox = self.name, %error, "lease not given back; it expires by itself");
                    }
                }
                Ok(None) => {}
                Err(error) => incident.failed(&format_args!("{}: {error}", self.name)),
            }
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                () = stop.stopped() => {}
            }
        }
    }

    /// Publishes until stopped, or until the outbox is another relay's, or its database fails.
    async fn serve(&self, reader: &mut Reader, stop: &Shutdown) -> Result<(), DbError> {
        let mut unpurged = 0;
        let mut renewed = Instant::now();
        // A short lease is renewed in time however long the poll interval is.
        let idle_max = self.config.poll_interval.min(reader.heartbeat() * 2);
        loop {
            if stop.is_stopping() {
                return Ok(());
            }
            match publish_batch(reader, self.log.as_ref(), self.config.batch_rows_max, stop).await? {
                Step::Published(rows) => {
                    renewed = Instant::now();
                    unpurged += rows;
                    metrics::counter!("shopd_relay_rows_total", "outbox" => self.name).increment(rows as u64);
                    if unpurged < UNPURGED_ROWS_MAX {
                        continue;
                    }
                }
                Step::Interrupted => continue,
                Step::Idle => {
                    // By the time since the last renewal, not by a silence: wake-ups may come without an end and bring no row.
                    tokio::select! {
                        biased;
                        () = stop.stopped() => return Ok(()),
                        () = tokio::time::sleep_until(renewed + idle_max) => {}
                        () = self.wake.notified() => continue,
                    }
                    reader.renew().await?;
                    renewed = Instant::now();
                }
            }
            // Quiet for a poll interval, or busy for long.
            if unpurged > 0 {
                unpurged = match reader.purge(UNPURGED_ROWS_MAX as i64).await? {
                    Purged::All => 0,
                    Purged::Rows(rows) => unpurged.saturating_sub(rows.max(1)),
                };
            }
        }
    }
}
