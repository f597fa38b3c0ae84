//! The step: one page of the outbox onto the log, then the cursor past it.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use bytes::Bytes;

use crate::contracts::Envelope;
use crate::db::DbError;
use crate::faults;
use crate::messaging::log::{Log, Record};
use crate::messaging::outbox::{Reader, Row};
use crate::shutdown::Shutdown;
use crate::telemetry::Incident;

/// The relay ends its turn for a reason of the database's; the log being away never ends it.
pub type RelayError = DbError;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// That many rows are on the log, and the cursor is past them.
    Published(usize),
    /// Nothing waits.
    Idle,
    /// Stopped while the log was away; the page will be published by whoever comes next.
    Interrupted,
}

/// Publishes one page. While the log is away it tries again with back-off, keeping its lease; the cursor moves only when every
/// row is acknowledged (S13), so a row may be there twice and never not at all.
pub async fn publish_batch(reader: &mut Reader, log: &dyn Log, rows_max: i64, stop: &Shutdown) -> Result<Step, RelayError> {
    let Some(mut page) = reader.page(rows_max).await? else { return Ok(Step::Idle) };
    let rows = page.rows.len();
    let mut unacknowledged: Vec<Record> = std::mem::take(&mut page.rows).into_iter().map(record).collect();
    let mut incident = Incident::new("publishing");
    let mut delays = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(20))
        .with_max_delay(Duration::from_secs(1))
        .with_jitter()
        .without_max_times()
        .build();
    faults::point!("relay.before_append")?;
    while let Err(error) = leased(reader, log.append(unacknowledged)).await? {
        incident.failed(&error);
        unacknowledged = error.unacknowledged;
        let delay = delays.next().unwrap_or(Duration::from_secs(1));
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = stop.stopped() => return Ok(Step::Interrupted),
        }
        // Fails where another relay has taken over meanwhile: it publishes these rows.
        reader.renew().await?;
    }
    incident.recovered();
    faults::point!("relay.after_append")?;
    reader.published(page).await?;
    faults::point!("relay.after_cursor")?;
    Ok(Step::Published(rows))
}

/// Awaits the log and keeps the lease meanwhile: a broker that hangs must not cost it.
async fn leased<T>(reader: &mut Reader, appended: impl Future<Output = T>) -> Result<T, RelayError> {
    let mut appended = std::pin::pin!(appended);
    loop {
        tokio::select! {
            biased;
            done = &mut appended => return Ok(done),
            () = tokio::time::sleep(reader.heartbeat()) => reader.renew().await?,
        }
    }
}

fn record(row: Row) -> Record {
    let headers = Envelope::headers(row.event_id, &row.event_type, &row.source, row.created_at, &row.traceparent, &row.request_id);
    Record {
        topic: Arc::from(row.topic),
        key: Bytes::from(row.key),
        value: Bytes::from(row.payload),
        headers: headers.into_iter().map(|(name, value)| (Cow::Borrowed(name), value)).collect(),
        timestamp: chrono::Utc::now(),
    }
}
