//! Keys are kept for a time, then deleted, in bounded steps. Any number of processes may do so at once.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::store;
use crate::db::{Db, DbError};
use crate::shutdown::Shutdown;
use crate::telemetry::Incident;

/// Rows of one statement at most.
const PRUNED_ROWS_MAX: i64 = 1_000;
const INTERVAL_MIN: Duration = Duration::from_millis(100);
const INTERVAL_MAX: Duration = Duration::from_secs(60);

/// The step: one statement, at most a thousand keys older than `retention`, by the database's clock and by `now`; returns how many it deleted.
/// There may be more.
///
/// # Errors
/// As the statement's.
pub async fn prune(db: &Db, now: DateTime<Utc>, retention: Duration) -> Result<u64, DbError> {
    // Its setting is bounded far below what would not fit.
    let age_ms = i64::try_from(retention.as_millis()).unwrap_or(i64::MAX);
    store::delete_older(db, now, age_ms, PRUNED_ROWS_MAX).await
}

/// The loop: deletes what is older than `retention`, and a tenth of that later, at most a minute, looks again.
pub async fn keep_pruned(db: Db, retention: Duration, stop: Shutdown) {
    let interval = (retention / 10).clamp(INTERVAL_MIN, INTERVAL_MAX);
    let mut incident = Incident::new("pruning idempotency keys");
    let mut wait = interval;
    loop {
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.stopped() => return,
        }
        wait = match prune(&db, Utc::now(), retention).await {
            Ok(deleted) => {
                incident.recovered();
                // While there is more, at once.
                if deleted < PRUNED_ROWS_MAX.unsigned_abs() { interval } else { Duration::ZERO }
            }
            Err(error) => {
                incident.failed(&error);
                interval
            }
        };
    }
}
