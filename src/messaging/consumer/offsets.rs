//! Where consumers go on, and who owns a partition: `consumer_offset`, one row a topic and partition, in the consumer's own
//! database. Leases go by the server's clock; the epoch fences whoever lost one (S12). `consumer_member` says among how many replicas
//! the partitions are shared.

use std::collections::HashMap;
use std::time::Duration;

use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Bool, Integer, Nullable, Text};
use diesel_async::RunQueryDsl;

use crate::db::{Bind, Conn, Db, DbError, Sql, sql};

use super::super::dead_letter::CHANNEL;
use super::super::reach::CUT_OFF_AFTER;

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

/// What one heartbeat learns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// This replica's partitions.
    pub owned: Vec<Owned>,
    /// Replicas of this consumer that share its partitions, this one among them unless it is cut off.
    pub members: usize,
    /// This one's place among them, 0 for the first.
    pub rank: usize,
    /// This one has lost its way to the log for a while, and another one has it: nothing is this one's share.
    pub cut_off: bool,
    /// Other replicas of this consumer, also those that are cut off.
    pub others: usize,
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

/// Takes up to `at_most` partitions that are free or another's and expired, each under a new epoch; one that another transaction
/// holds is left for the next time. What expired of `owner`'s own, [`heartbeat`] keeps.
pub async fn acquire(
    db: &Db,
    topic: &str,
    owner: &str,
    lease: Duration,
    partitions: i32,
    at_most: usize,
) -> Result<Vec<Owned>, DbError> {
    let mut conn = db.get().await?;
    let owned = sql("update consumer_offset c
                        set owner = $2, epoch = epoch + 1, lease_until = clock_timestamp() + $3 * interval '1 millisecond'
                       from (select partition from consumer_offset
                              where topic = $1 and partition < $4 and (owner is null or owner <> $2 and lease_until < clock_timestamp())
                              order by partition limit $5 for update skip locked) free
                      where c.topic = $1 and c.partition = free.partition
                  returning c.partition, c.next_offset, c.epoch")
    .bind::<Text, _>(topic)
    .bind::<Text, _>(owner)
    .bind::<BigInt, _>(lease.as_millis() as i64)
    .bind::<Integer, _>(partitions)
    .bind::<BigInt, _>(at_most as i64)
    .load(&mut conn)
    .await?;
    Ok(owned)
}

#[derive(QueryableByName)]
struct StandingRow {
    #[diesel(sql_type = Nullable<Integer>)]
    partition: Option<i32>,
    #[diesel(sql_type = Nullable<BigInt>)]
    next_offset: Option<i64>,
    #[diesel(sql_type = Nullable<BigInt>)]
    epoch: Option<i64>,
    #[diesel(sql_type = BigInt)]
    members: i64,
    #[diesel(sql_type = BigInt)]
    before: i64,
    #[diesel(sql_type = Bool)]
    cut_off: bool,
    #[diesel(sql_type = BigInt)]
    others: i64,
}

/// Counts `owner` among the topic's replicas for another lease, and renews its leases, also those that expired and nobody took. One
/// that its own batch holds just now is renewed by that batch. Nobody waits for a disk: what a crash of the server forgets, the next
/// heartbeat says again, and the epochs fence whoever lost a lease by it.
///
/// It says as well whether it reaches the log. Who does not for [`CUT_OFF_AFTER`] shares nothing as long as another one has reached it for as
/// long; where nobody does, everything stays as it is.
pub async fn heartbeat(db: &Db, topic: &str, owner: &str, lease: Duration, reaches_log: bool) -> Result<Standing, DbError> {
    let mut conn = db.get().await?;
    let rows: Vec<StandingRow> = sql("with me as (
             insert into consumer_member as m (topic, owner, seen_until, reaches_log, reaches_since)
             values ($1, $2, clock_timestamp() + $3 * interval '1 millisecond', $4, clock_timestamp())
             on conflict (topic, owner) do update set
                 seen_until = excluded.seen_until, reaches_log = excluded.reaches_log,
                 reaches_since = case when m.reaches_log = excluded.reaches_log then m.reaches_since else excluded.reaches_since end
             returning owner, reaches_log, reaches_since
         ), live as (
             select owner, reaches_log, reaches_since < clock_timestamp() - $5 * interval '1 millisecond' as for_long
               from (select owner, reaches_log, reaches_since from consumer_member
                      where topic = $1 and owner <> $2 and seen_until >= clock_timestamp()
                      union all select owner, reaches_log, reaches_since from me) m
         ), sharing as (
             select owner, not for_long or reaches_log or not (select bool_or(reaches_log and for_long) from live) as shares from live
         ), long_gone as (
             delete from consumer_member m
              where m.topic = $1 and m.owner in (select owner from consumer_member
                                                  where topic = $1 and owner <> $2 and seen_until < clock_timestamp() - interval '1 minute'
                                                    for update skip locked)
         ), renewed as (
             update consumer_offset c set lease_until = clock_timestamp() + $3 * interval '1 millisecond'
               from (select partition from consumer_offset where topic = $1 and owner = $2 order by partition for update skip locked) mine
              where c.topic = $1 and c.partition = mine.partition
         )
         select c.partition, c.next_offset, c.epoch, m.members, m.before, m.cut_off, m.others
           from (select count(*) filter (where shares) as members, count(*) filter (where shares and owner < $2) as before,
                        bool_or(owner = $2 and not shares) as cut_off, count(*) - 1 as others from sharing) m
          cross join set_config('synchronous_commit', 'off', true)
           left join consumer_offset c on c.topic = $1 and c.owner = $2")
    .bind::<Text, _>(topic)
    .bind::<Text, _>(owner)
    .bind::<BigInt, _>(lease.as_millis() as i64)
    .bind::<Bool, _>(reaches_log)
    .bind::<BigInt, _>(CUT_OFF_AFTER.as_millis() as i64)
    .load(&mut conn)
    .await?;
    // It has one row at least, and counts itself.
    let standing = rows.as_slice().first().map_or((1, 0, false, 0), |row| (row.members, row.before, row.cut_off, row.others));
    let (members, rank, cut_off, others) = standing;
    let owned = rows.into_iter().filter_map(|row| {
        let (partition, next_offset, epoch) = (row.partition?, row.next_offset?, row.epoch?);
        Some(Owned { partition, next_offset, epoch })
    });
    Ok(Standing { owned: owned.collect(), members: members as usize, rank: rank as usize, cut_off, others: others as usize })
}

/// Gives partitions back and tells the other replicas, so that another takes them at once; `None`: all of them.
pub async fn release(db: &Db, topic: &str, owner: &str, partitions: Option<&[i32]>) -> Result<(), DbError> {
    let mut conn = db.get().await?;
    sql("with freed as (update consumer_offset set owner = null, lease_until = '-infinity'
                         where topic = $1 and owner = $2 and ($3 is null or partition = any($3)) returning 1)
         select pg_notify($4, $5) from freed limit 1")
    .bind::<Text, _>(topic)
    .bind::<Text, _>(owner)
    .bind::<Nullable<Array<Integer>>, _>(partitions.map(<[i32]>::to_vec))
    .bind::<Text, _>(CHANNEL)
    .bind::<Text, _>(db.sender())
    .execute(&mut conn)
    .await?;
    Ok(())
}

/// Gives everything back, tells the other replicas, and no longer counts.
pub async fn leave(db: &Db, topic: &str, owner: &str) -> Result<(), DbError> {
    let mut conn = db.get().await?;
    sql("with me as (delete from consumer_member where topic = $1 and owner = $2),
              freed as (update consumer_offset set owner = null, lease_until = '-infinity' where topic = $1 and owner = $2 returning 1)
         select pg_notify($3, $4) from freed limit 1")
    .bind::<Text, _>(topic)
    .bind::<Text, _>(owner)
    .bind::<Text, _>(CHANNEL)
    .bind::<Text, _>(db.sender())
    .execute(&mut conn)
    .await?;
    Ok(())
}

/// Moves the offsets of a batch and renews their leases, in the transaction of its effect: nothing commits under a lease that is lost.
#[derive(Clone, Copy, Debug)]
pub struct Fence<'b> {
    pub topic: &'b str,
    pub moves: &'b [Move],
    pub lease: Duration,
}

/// What [`Fence::bind`] binds: topic, partitions, offsets before and after, epochs, and the lease in milliseconds.
pub type Fenced<'b, B> = (
    (
        (
            (((B, Bind<Text, &'b str>), Bind<Array<Integer>, Vec<i32>>), Bind<Array<BigInt>, Vec<i64>>),
            Bind<Array<BigInt>, Vec<i64>>,
        ),
        Bind<Array<BigInt>, Vec<i64>>,
    ),
    Bind<BigInt, i64>,
);

impl<'b> Fence<'b> {
    /// The next six binds, which are to be the arguments of `advance_offsets`.
    pub fn bind<B>(&self, statement: Sql<B>) -> Sql<Fenced<'b, B>> {
        let column = |field: fn(&Move) -> i64| self.moves.iter().map(field).collect::<Vec<_>>();
        statement
            .bind(self.topic)
            .bind(self.moves.iter().map(|m| m.partition).collect())
            .bind(column(|m| m.from))
            .bind(column(|m| m.to))
            .bind(column(|m| m.epoch))
            .bind(self.lease.as_millis() as i64)
    }

    /// By itself.
    ///
    /// # Errors
    /// [`DbError::Fenced`] where one did not stand where the batch began, or the epoch is another's; nothing commits then.
    pub async fn advance(&self, mut conn: &Conn) -> Result<(), DbError> {
        self.bind(sql("select advance_offsets($1, $2, $3, $4, $5, $6)")).execute(&mut conn).await?;
        Ok(())
    }
}
