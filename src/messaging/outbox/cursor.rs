//! Where a reader stands between two snapshots, and the two queries that read on from there.

use diesel::sql_types::{Array, BigInt, Text};
use diesel_async::RunQueryDsl;

use crate::db::types::{Xid, Xid8};
use crate::db::{Conn, DbError, sql};

use super::Row;

/// How far an outbox was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Everything visible in it is on the log.
    pub snapshot: String,
    /// The look in progress.
    pub look: Option<Look>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    pub snapshot: String,
    /// Still among the rows of transactions that were open at the previous snapshot.
    pub late: bool,
    pub after: (Xid, i64),
}

pub async fn late_rows(conn: &mut Conn, old: &Snapshot, look: &Look, rows_max: i64) -> Result<Vec<Row>, DbError> {
    let rows = sql("select xid, id, event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at,
                           raw_key, headers::text as headers
                      from outbox
                     where xid = any($1) and (xid, id) > ($2, $3) and pg_visible_in_snapshot(xid, $4::pg_snapshot)
                     order by outbox.xid, outbox.id limit $5")
    .bind::<Array<Xid8>, _>(&old.open)
    .bind::<Xid8, _>(look.after.0)
    .bind::<BigInt, _>(look.after.1)
    .bind::<Text, _>(&look.snapshot)
    .bind::<BigInt, _>(rows_max)
    .load(conn)
    .await?;
    Ok(rows)
}

pub async fn fresh_rows(conn: &mut Conn, look: &Look, rows_max: i64) -> Result<Vec<Row>, DbError> {
    let rows = sql("select xid, id, event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at,
                           raw_key, headers::text as headers
                      from outbox
                     where (xid, id) > ($1, $2) and xid < pg_snapshot_xmax($3::pg_snapshot)
                       and pg_visible_in_snapshot(xid, $3::pg_snapshot)
                     order by outbox.xid, outbox.id limit $4")
    .bind::<Xid8, _>(look.after.0)
    .bind::<BigInt, _>(look.after.1)
    .bind::<Text, _>(&look.snapshot)
    .bind::<BigInt, _>(rows_max)
    .load(conn)
    .await?;
    Ok(rows)
}

/// The parts of a `pg_snapshot`'s text `xmin:xmax:open,open,...` that the cursor needs.
#[derive(Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub xmax: u64,
    /// Transactions that were open.
    pub open: Vec<Xid>,
}

impl Snapshot {
    pub fn parse(text: &str) -> Result<Self, DbError> {
        let odd = || DbError::Defect(format!("the outbox cursor holds no snapshot: {text:?}"));
        let mut parts = text.split(':');
        let (_, xmax, open) = (parts.next(), parts.next().ok_or_else(odd)?, parts.next().ok_or_else(odd)?);
        let xmax: u64 = xmax.parse().ok().filter(|xmax| *xmax > 0).ok_or_else(odd)?;
        let open = open.split(',').filter(|x| !x.is_empty()).map(|x| x.parse().map(Xid)).collect::<Result<_, _>>();
        Ok(Self { xmax, open: open.map_err(|_| odd())? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshots_text_is_read() {
        assert_eq!(Snapshot::parse("3:3:").unwrap(), Snapshot { xmax: 3, open: vec![] });
        assert_eq!(Snapshot::parse("10:20:10,14").unwrap(), Snapshot { xmax: 20, open: vec![Xid(10), Xid(14)] });
        for odd in ["", "1:2", "a:b:c", "0:0:", "1:2:x"] {
            assert!(Snapshot::parse(odd).is_err(), "{odd}");
        }
    }
}
