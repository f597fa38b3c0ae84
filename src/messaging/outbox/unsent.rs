//! What of an outbox is not known to be on the log yet; for audits. Reads only, under no lease.

use diesel::prelude::*;
use diesel::sql_types::{Array, Binary, Text};
use diesel_async::RunQueryDsl;

use crate::db::types::{Xid, Xid8};
use crate::db::{Conn, DbError, sql};

/// A message beyond the relay's cursor.
#[derive(Clone, Debug, QueryableByName)]
pub struct Unsent {
    #[diesel(sql_type = Text)]
    pub key: String,
    #[diesel(sql_type = Binary)]
    pub payload: Vec<u8>,
}

/// Messages of `topic` that these transactions wrote under these keys and that the relay has not moved past. Fast: by the primary key.
pub async fn unsent(conn: &mut Conn, topic: &str, xids: &[Xid], keys: &[&str]) -> Result<Vec<Unsent>, DbError> {
    let rows = sql("select o.key, o.payload from outbox_message o cross join outbox_cursor c
                     where c.name = 'outbox' and o.topic = $1 and o.xid = any($2) and o.key = any($3)
                       and not pg_visible_in_snapshot(o.xid, c.snapshot::pg_snapshot)
                       and not (c.look is not null and pg_visible_in_snapshot(o.xid, c.look::pg_snapshot)
                                and case when o.xid < pg_snapshot_xmax(c.snapshot::pg_snapshot)
                                         then not c.late or (o.xid, o.id) <= (c.after_xid, c.after_id)
                                         else not c.late and (o.xid, o.id) <= (c.after_xid, c.after_id) end)")
    .bind::<Text, _>(topic)
    .bind::<Array<Xid8>, _>(xids)
    .bind::<Array<Text>, _>(keys)
    .load(conn)
    .await?;
    Ok(rows)
}

/// The same whatever transaction wrote them: the whole outbox is read. Rows that came from another cluster were stamped anew, and
/// repeats of a result are written by later transactions.
pub async fn unsent_by_anyone(conn: &mut Conn, topic: &str, keys: &[&str]) -> Result<Vec<Unsent>, DbError> {
    let rows = sql("select o.key, o.payload from outbox_message o cross join outbox_cursor c
                     where c.name = 'outbox' and o.topic = $1 and o.key = any($2)
                       and not pg_visible_in_snapshot(o.xid, c.snapshot::pg_snapshot)")
    .bind::<Text, _>(topic)
    .bind::<Array<Text>, _>(keys)
    .load(conn)
    .await?;
    Ok(rows)
}
