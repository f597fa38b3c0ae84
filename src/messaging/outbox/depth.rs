//! How much waits in an outbox and since when, for the metrics. By the service that writes it, so that it is told also where no relay is.

use std::time::Duration;

use diesel::prelude::*;
use diesel::sql_types::{BigInt, Double};
use diesel_async::RunQueryDsl;

use crate::db::{Db, DbError, sql};
use crate::shutdown::Shutdown;
use crate::telemetry::Incident;

const INTERVAL: Duration = Duration::from_secs(5);
/// Beyond this the age says enough.
const ROWS_MAX: i64 = 100_000;

/// The messages that are not known to be on the log.
#[derive(Clone, Copy, Debug, PartialEq, QueryableByName)]
pub struct Depth {
    /// At most 100 000 are counted.
    #[diesel(sql_type = BigInt)]
    pub rows: i64,
    /// Of the oldest of those, in seconds; 0 where there is none.
    #[diesel(sql_type = Double)]
    pub oldest_age_s: f64,
}

/// Reads only, under no lease. A page that is on the log and not saved yet still counts.
pub async fn depth(db: &Db) -> Result<Depth, DbError> {
    let depth = sql("select count(*) as rows,
                            coalesce(greatest(extract(epoch from clock_timestamp() - min(waiting.created_at)), 0), 0)::float8 as oldest_age_s
                       from (select o.created_at
                               from (select snapshot::pg_snapshot as sent from outbox_cursor where name = 'outbox') c,
                                    lateral (select created_at from outbox_message
                                              where xid >= pg_snapshot_xmin(c.sent) and not pg_visible_in_snapshot(xid, c.sent)
                                              limit $1) o) waiting")
    .bind::<BigInt, _>(ROWS_MAX)
    .get_result(&mut *db.get().await?)
    .await?;
    Ok(depth)
}

/// Keeps the gauges of `outbox` up to date until `stop`.
pub async fn watch_depth(db: Db, outbox: &'static str, stop: Shutdown) {
    let (rows, age) = (
        metrics::gauge!("shopd_outbox_rows", "outbox" => outbox),
        metrics::gauge!("shopd_outbox_oldest_row_age_seconds", "outbox" => outbox),
    );
    let mut incident = Incident::new("measuring the outbox");
    loop {
        match depth(&db).await {
            Ok(depth) => {
                incident.recovered();
                rows.set(depth.rows as f64);
                age.set(depth.oldest_age_s);
            }
            Err(error) => incident.failed(&error),
        }
        tokio::select! {
            biased;
            () = stop.stopped() => return,
            () = tokio::time::sleep(INTERVAL) => {}
        }
    }
}
