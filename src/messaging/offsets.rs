//! Where consumers go on, and who owns a partition: `consumer_offset`, one row a topic and partition, in the consumer's own
//! database. Leases go by the server's clock; the epoch fences whoever lost one (S12).

use std::collections::HashMap;
use std::time::Duration;

use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Bool, Integer, Text};
use diesel_async::RunQueryDsl;

use crate::db::{Conn, Db, DbError, sql};

/// A partition of ours.
#[derive(Clone, Debug, PartialEq, Eq, QueryableByName)]
pub struct Owned {
    #[diesel(sql_type = Integer)]
    pub partition: i32,
    #[diesel(sql_type = BigInt)]
    pub next_offset: i64,
    #[diesel(sql_type = BigInt)]
    pub epoch: i64,
}

/// One partition's step within a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    pub partition: i32,
    pub from: i64,
    pub to: i64,
    pub epoch: i64,
}

/// Which partitions a process may take beside those that are free or expired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    Free,
    /// Also what is left over under its own name, from before.
    FreeAndOwn,
}

/// How far every partition of `topic` is consumed, by its number.
pub async fn next_offsets(conn: &mut Conn, topic: &str) -> Result<HashMap<i32, i64>, DbError> {
    let rows: Vec<Owned> =
        sql("select partition, next_offset, epoch from consumer_offset where topic = $1").bind::<Text, _>(topic).load(conn).await?;
    Ok(rows.into_iter().map(|row| (row.partition, row.next_offset)).collect())
}

/// Makes a row for every partition that has none.
pub async fn ensure(db: &Db, topic: &str, partitions: i32) -> Result<(), DbError> {
    let mut conn = db.get().await?;
    sql("insert into consumer_offset (topic, partition) select $1, generate_series(0, $2 - 1) on conflict do nothing")
        .bind::<Text, _>(topic)
        .bind::<Integer, _>(partitions)
        .execute(&mut conn)
        .await?;
    Ok(())
}

/// Takes partitions, each under a new epoch; one that another transaction holds is left for the next time.
pub async fn acquire(db: &Db, topic: &str, owner: &str, take: Take, lease: Duration) -> Result<Vec<Owned>, DbError> {
    let mut conn = db.get().await?;
    let owned = sql("update consumer_offset c
                        set owner = $2, epoch = epoch + 1, lease_until = clock_timestamp() + $3 * interval '1 millisecond'
                       from (select partition from consumer_offset
                              where topic = $1 and case when owner = $2 then $4
                                                        else owner is null or lease_until < clock_timestamp() end
                              order by partition for update skip locked) free
                      where c.topic = $1 and c.partition = free.partition
                  returning c.partition, c.next_offset, c.epoch")
    .bind::<Text, _>(topic)
    .bind::<Text, _>(owner)
    .bind::<BigInt, _>(lease.as_millis() as i64)
    .bind::<Bool, _>(take == Take::FreeAndOwn)
    .load(&mut conn)
    .await?;
    Ok(owned)
}

/// Renews the leases of `owner`, also those that expired and nobody took; returns the partitions that are still its own.
pub async fn renew(db: &Db, topic: &str, owner: &str, lease: Duration) -> Result<Vec<Owned>, DbError> {
    let mut conn = db.get().await?;
    let owned = sql("update consumer_offset
                        set lease_until = clock_timestamp() + $3 * interval '1 millisecond'
                      where topic = $1 and owner = $2
                  returning partition, next_offset, epoch")
    .bind::<Text, _>(topic)
    .bind::<Text, _>(owner)
    .bind::<BigInt, _>(lease.as_millis() as i64)
    .load(&mut conn)
    .await?;
    Ok(owned)
}

/// Gives every partition back, so that another replica takes them at once.
pub async fn release(db: &Db, topic: &str, owner: &str) -> Result<(), DbError> {
    let mut conn = db.get().await?;
    sql("update consumer_offset set owner = null, lease_until = '-infinity' where topic = $1 and owner = $2")
        .bind::<Text, _>(topic)
        .bind::<Text, _>(owner)
        .execute(&mut conn)
        .await?;
    Ok(())
}

/// Moves the offsets of a batch in its own transaction, and renews their leases with them.
///
/// # Errors
/// [`DbError::Fenced`] where one did not stand where the batch began, or the epoch is another's; nothing commits then.
pub async fn advance(mut conn: &Conn, topic: &str, moves: &[Move], lease: Duration) -> Result<(), DbError> {
    sql("select advance_offsets($1, $2, $3, $4, $5, $6)")
        .bind::<Text, _>(topic)
        .bind::<Array<Integer>, _>(moves.iter().map(|m| m.partition).collect::<Vec<_>>())
        .bind::<Array<BigInt>, _>(moves.iter().map(|m| m.from).collect::<Vec<_>>())
        .bind::<Array<BigInt>, _>(moves.iter().map(|m| m.to).collect::<Vec<_>>())
        .bind::<Array<BigInt>, _>(moves.iter().map(|m| m.epoch).collect::<Vec<_>>())
        .bind::<BigInt, _>(lease.as_millis() as i64)
        .execute(&mut conn)
        .await?;
    Ok(())
}
