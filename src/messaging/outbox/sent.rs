//! What of an outbox is known to be on the log, by the transactions that wrote it. Reads only, under no lease.

use std::collections::HashSet;

use diesel::prelude::*;
use diesel::sql_types::Array;
use diesel_async::RunQueryDsl;

use crate::db::types::{Xid, Xid8};
use crate::db::{Conn, DbError, sql};

#[derive(QueryableByName)]
struct Sent {
    #[diesel(sql_type = Xid8)]
    xid: Xid,
}

/// Those of `xids`, all of them committed, of which every row is on the log. A look in progress does not count yet. An id that this
/// cluster has not come to is another's, from before a dump and restore: what it left unsent was stamped anew, so it counts as
/// sent.
pub async fn sent(conn: &mut Conn, xids: &[Xid]) -> Result<HashSet<Xid>, DbError> {
    if xids.is_empty() {
        return Ok(HashSet::new());
    }
    let rows: Vec<Sent> = sql("with cursor as materialized (
             select snapshot::pg_snapshot as sent, pg_snapshot_xmax(pg_current_snapshot()) as here from outbox_cursor where name = 'outbox'
         )
         select asked.xid from unnest($1) as asked (xid), cursor
          where pg_visible_in_snapshot(asked.xid, cursor.sent) or asked.xid >= cursor.here")
    .bind::<Array<Xid8>, _>(xids)
    .load(conn)
    .await?;
    Ok(rows.into_iter().map(|row| row.xid).collect())
}
