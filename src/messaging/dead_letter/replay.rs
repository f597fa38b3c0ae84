//! What an owner does with the letters of its partitions: tries again what is due, and what operators asked for. Every function here
//! belongs into a transaction that holds the partitions' offsets.

use std::time::Duration;

use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Bool, Integer, Nullable, Text};
use diesel_async::RunQueryDsl;

use crate::db::{Conn, DbError, sql};
use crate::messaging::consumer::Delivery;

use super::keep::{Keys, WAITING, send_copies};
use super::{Row, reason_text, row_columns};

/// Letters of one step: of heads and dead ones, of those discarded.
const ROWS_MAX: i64 = 200;
/// Of followers.
const FOLLOWERS_MAX: i64 = 500;
/// Bytes of values that one step loads of each.
const BYTES_MAX: i64 = 4 * 1024 * 1024;

/// What a step over a partition finds.
#[derive(Clone, Debug, QueryableByName)]
pub struct Pending {
    #[diesel(sql_type = Integer)]
    pub partition: i32,
    /// Something is due, or asked for.
    #[diesel(sql_type = Bool)]
    pub due: bool,
    /// A key's queue holds as many as it may.
    #[diesel(sql_type = Bool)]
    pub full: bool,
}

/// Which of these partitions have something to do, now or later, or a queue of `followers_max`. The only one to be asked outside a
/// transaction.
pub async fn pending(conn: &mut Conn, topic: &str, partitions: &[i32], followers_max: i32) -> Result<Vec<Pending>, DbError> {
    let pending = sql("select p.partition,
                exists (select from dead_letter d
                         where d.topic = $1 and d.partition = p.partition
                           and (d.requested is not null or d.next_attempt_at is not null)
                           and (d.requested = 'discard' or d.next_attempt_at <= clock_timestamp()
                                or (d.requested = 'redrive' and d.state in ('parked', 'dead')))) as due,
                exists (select from dead_letter d
                         where d.topic = $1 and d.partition = p.partition and d.state = 'parked' and d.followers >= $3) as full
           from unnest($2) as p (partition)
          where exists (select from dead_letter d
                         where d.topic = $1 and d.partition = p.partition and (d.requested is not null or d.next_attempt_at is not null))
             or exists (select from dead_letter d where d.topic = $1 and d.partition = p.partition and d.state = 'parked')")
    .bind::<Text, _>(topic)
    .bind::<Array<Integer>, _>(partitions)
    .bind::<Integer, _>(followers_max)
    .load(conn)
    .await?;
    Ok(pending)
}

/// Takes out what operators discarded, some of it.
pub async fn discarded(mut conn: &Conn, topic: &str, partitions: &[i32]) -> Result<Vec<Row>, DbError> {
    let rows: Vec<Row> = sql(concat!(
        "select ",
        row_columns!(),
        " from (select d.*, sum(coalesce(octet_length(d.value), 0)) over (order by d.partition, d.log_offset) as bytes
                  from (select d.* from dead_letter d
                         where d.topic = $1 and d.partition = any($2)
                           and (d.requested is not null or d.next_attempt_at is not null) and d.requested = 'discard'
                         order by d.partition, d.log_offset limit $3) d) d
          where d.bytes <= $4 or d.bytes = coalesce(octet_length(d.value), 0)"
    ))
    .bind::<Text, _>(topic)
    .bind::<Array<Integer>, _>(partitions)
    .bind::<BigInt, _>(ROWS_MAX)
    .bind::<BigInt, _>(BYTES_MAX)
    .load(&mut conn)
    .await?;
    forget(conn, topic, &rows.iter().map(|row| (row.partition, row.log_offset)).collect::<Vec<_>>()).await?;
    Ok(rows)
}

/// Heads that are due or redriven, and dead ones that are redriven, some of them, locked: a discard that comes later finds them gone.
pub async fn due(mut conn: &Conn, topic: &str, partitions: &[i32]) -> Result<Vec<Row>, DbError> {
    let rows = sql(concat!(
        "select ",
        row_columns!(),
        " from (select d.*, sum(coalesce(octet_length(d.value), 0)) over (order by d.partition, d.log_offset) as bytes
                  from (select d.* from dead_letter d
                         where d.topic = $1 and d.partition = any($2)
                           and (d.requested is not null or d.next_attempt_at is not null)
                           and d.state in ('parked', 'dead')
                           and (d.requested = 'redrive' or d.next_attempt_at <= clock_timestamp())
                         order by d.partition, d.log_offset limit $3 for update) d) d
          where d.bytes <= $4 or d.bytes = coalesce(octet_length(d.value), 0)
          order by d.partition, d.log_offset"
    ))
    .bind::<Text, _>(topic)
    .bind::<Array<Integer>, _>(partitions)
    .bind::<BigInt, _>(ROWS_MAX)
    .bind::<BigInt, _>(BYTES_MAX)
    .load(&mut conn)
    .await?;
    Ok(rows)
}

/// The first that wait behind these heads, in log order and locked: of each key a beginning of its queue.
pub async fn followers(mut conn: &Conn, topic: &str, lines: &[(i32, String)]) -> Result<Vec<Row>, DbError> {
    if lines.is_empty() {
        return Ok(Vec::new());
    }
    let rows = sql(concat!(
        "select ",
        row_columns!(),
        " from (select d.*, sum(coalesce(octet_length(d.value), 0)) over (order by d.partition, d.log_offset) as bytes
                  from (select d.* from (select unnest($2) as partition, unnest($3) as ordering_key) line
                          cross join lateral (select w.* from dead_letter w
                                               where w.topic = $1 and w.partition = line.partition
                                                 and w.ordering_key = line.ordering_key and w.state = 'waiting'
                                               order by w.log_offset limit $4 for update) d
                         order by d.partition, d.log_offset limit $4) d) d
          where d.bytes <= $5
          order by d.partition, d.log_offset"
    ))
    .bind::<Text, _>(topic)
    .bind::<Array<Integer>, _>(lines.iter().map(|(partition, _)| *partition).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(lines.iter().map(|(_, key)| key.as_str()).collect::<Vec<_>>())
    .bind::<BigInt, _>(FOLLOWERS_MAX)
    .bind::<BigInt, _>(BYTES_MAX)
    .load(&mut conn)
    .await?;
    Ok(rows)
}

/// A letter that is being tried again.
#[derive(Clone, Debug)]
pub struct Stored {
    pub delivery: Delivery,
    pub attempts: i32,
    pub undecodable: bool,
    /// It has no place in a queue yet.
    pub is_dead: bool,
    /// `None` where it still cannot be decoded.
    pub keys: Option<Keys>,
}

/// What became of one.
#[derive(Clone, Debug)]
pub enum Fate {
    Applied,
    /// It failed again; a decoded one is its key's head then, tried again after `retry_in`.
    Failed {
        reason: String,
        retry_in: Option<Duration>,
    },
    /// One of its key failed before it, or waits.
    Behind,
    /// What it asks for waits already.
    Repeat,
}

/// Writes down what became of the letters.
pub async fn record(mut conn: &Conn, topic: &str, letters: &[(Stored, Fate)]) -> Result<(), DbError> {
    let place = |stored: &Stored| (stored.delivery.position.partition, stored.delivery.position.offset);
    let (mut gone, mut resolved, mut joining) = (Vec::new(), Vec::new(), Vec::new());
    let mut failed = Vec::new();
    for (stored, fate) in letters {
        match fate {
            Fate::Applied if stored.undecodable => resolved.push(place(stored)),
            Fate::Applied | Fate::Repeat => gone.push(place(stored)),
            Fate::Failed { reason, retry_in } => failed.push((stored, reason_text(reason), *retry_in)),
            Fate::Behind => joining.extend(stored.keys.as_ref().filter(|_| stored.is_dead).map(|keys| (place(stored), keys))),
        }
    }
    forget(conn, topic, &gone).await?;
    if !resolved.is_empty() {
        sql("update dead_letter set state = 'resolved', key = null, value = null, headers = '{}', reason = 'applied later',
                    ordering_key = null, business_key = null, requested = null, next_attempt_at = null
              where topic = $1 and (partition, log_offset) in (select unnest($2), unnest($3))")
        .bind::<Text, _>(topic)
        .bind::<Array<Integer>, _>(resolved.iter().map(|(partition, _)| *partition).collect::<Vec<_>>())
        .bind::<Array<BigInt>, _>(resolved.iter().map(|(_, offset)| *offset).collect::<Vec<_>>())
        .execute(&mut conn)
        .await?;
    }
    if !failed.is_empty() {
        // A try answers a redrive, and no discard that was asked for meanwhile.
        sql("update dead_letter d
                set state = case when f.ordering_key is null then 'dead' else 'parked' end, attempts = d.attempts + 1,
                    reason = f.reason, ordering_key = f.ordering_key, business_key = f.business_key,
                    requested = case when d.requested = 'discard' then d.requested end,
                    next_attempt_at = clock_timestamp() + f.retry_ms * interval '1 millisecond'
               from (select unnest($2) as partition, unnest($3) as log_offset, unnest($4) as reason, unnest($5) as ordering_key,
                            unnest($6) as business_key, unnest($7) as retry_ms) f
              where d.topic = $1 and d.partition = f.partition and d.log_offset = f.log_offset")
        .bind::<Text, _>(topic)
        .bind::<Array<Integer>, _>(failed.iter().map(|(s, ..)| s.delivery.position.partition).collect::<Vec<_>>())
        .bind::<Array<BigInt>, _>(failed.iter().map(|(s, ..)| s.delivery.position.offset).collect::<Vec<_>>())
        .bind::<Array<Text>, _>(failed.iter().map(|(_, reason, _)| reason.as_str()).collect::<Vec<_>>())
        .bind::<Array<Nullable<Text>>, _>(
            failed.iter().map(|(s, ..)| s.keys.as_ref().map(|k| k.ordering.as_str())).collect::<Vec<_>>(),
        )
        .bind::<Array<Nullable<Text>>, _>(
            failed.iter().map(|(s, ..)| s.keys.as_ref().map(|k| k.business.as_str())).collect::<Vec<_>>(),
        )
        .bind::<Array<Nullable<BigInt>>, _>(
            failed.iter().map(|(_, _, retry_in)| retry_in.map(|delay| delay.as_millis() as i64)).collect::<Vec<_>>(),
        )
        .execute(&mut conn)
        .await?;
    }
    if !joining.is_empty() {
        sql("update dead_letter d
                set state = 'waiting', reason = $6, ordering_key = f.ordering_key, business_key = f.business_key, requested = null,
                    next_attempt_at = null
               from (select unnest($2) as partition, unnest($3) as log_offset, unnest($4) as ordering_key, unnest($5) as business_key) f
              where d.topic = $1 and d.partition = f.partition and d.log_offset = f.log_offset")
        .bind::<Text, _>(topic)
        .bind::<Array<Integer>, _>(joining.iter().map(|(place, _)| place.0).collect::<Vec<_>>())
        .bind::<Array<BigInt>, _>(joining.iter().map(|(place, _)| place.1).collect::<Vec<_>>())
        .bind::<Array<Text>, _>(joining.iter().map(|(_, keys)| keys.ordering.as_str()).collect::<Vec<_>>())
        .bind::<Array<Text>, _>(joining.iter().map(|(_, keys)| keys.business.as_str()).collect::<Vec<_>>())
        .bind::<Text, _>(WAITING)
        .execute(&mut conn)
        .await?;
    }
    // One copy a record: of those that waited and were tried for the first time.
    let first = failed.iter().filter(|(stored, ..)| stored.attempts == 0);
    send_copies(conn, first.map(|(stored, reason, _)| (&stored.delivery, reason.as_str())), 1).await
}

/// Removes letters by partition and offset.
pub async fn forget(mut conn: &Conn, topic: &str, places: &[(i32, i64)]) -> Result<(), DbError> {
    if places.is_empty() {
        return Ok(());
    }
    sql("delete from dead_letter where topic = $1 and (partition, log_offset) in (select unnest($2), unnest($3))")
        .bind::<Text, _>(topic)
        .bind::<Array<Integer>, _>(places.iter().map(|(partition, _)| *partition).collect::<Vec<_>>())
        .bind::<Array<BigInt>, _>(places.iter().map(|(_, offset)| *offset).collect::<Vec<_>>())
        .execute(&mut conn)
        .await?;
    Ok(())
}

/// Puts these queues in order after letters of theirs came, went or failed: each has a head again, if need be the first that waits,
/// due now; and where the head is one that failed, what was asked of those behind it is answered.
pub async fn settle(mut conn: &Conn, topic: &str, lines: &[(i32, String)]) -> Result<(), DbError> {
    if lines.is_empty() {
        return Ok(());
    }
    let partitions: Vec<i32> = lines.iter().map(|(partition, _)| *partition).collect();
    let keys: Vec<&str> = lines.iter().map(|(_, key)| key.as_str()).collect();
    sql("update dead_letter d set state = 'parked', next_attempt_at = clock_timestamp()
           from (select distinct unnest($2) as partition, unnest($3) as ordering_key) line
          where d.topic = $1 and d.partition = line.partition and d.ordering_key = line.ordering_key and d.state = 'waiting'
            and not exists (select from dead_letter h
                             where h.topic = $1 and h.partition = line.partition and h.ordering_key = line.ordering_key
                               and h.state = 'parked')
            and d.log_offset = (select min(w.log_offset) from dead_letter w
                                 where w.topic = $1 and w.partition = line.partition and w.ordering_key = line.ordering_key
                                   and w.state = 'waiting')")
    .bind::<Text, _>(topic)
    .bind::<Array<Integer>, _>(&partitions)
    .bind::<Array<Text>, _>(&keys)
    .execute(&mut conn)
    .await?;
    sql("update dead_letter d
            set followers = (select count(*) from dead_letter w
                              where w.topic = $1 and w.partition = d.partition and w.ordering_key = d.ordering_key
                                and w.state = 'waiting')
           from (select distinct unnest($2) as partition, unnest($3) as ordering_key) line
          where d.topic = $1 and d.partition = line.partition and d.ordering_key = line.ordering_key and d.state = 'parked'")
    .bind::<Text, _>(topic)
    .bind::<Array<Integer>, _>(&partitions)
    .bind::<Array<Text>, _>(&keys)
    .execute(&mut conn)
    .await?;
    sql("update dead_letter d set requested = null
           from (select distinct unnest($2) as partition, unnest($3) as ordering_key) line
          where d.topic = $1 and d.partition = line.partition and d.ordering_key = line.ordering_key and d.state = 'waiting'
            and d.requested = 'redrive'
            and exists (select from dead_letter h
                         where h.topic = $1 and h.partition = line.partition and h.ordering_key = line.ordering_key
                           and h.state = 'parked' and h.attempts > 0 and h.requested is null)")
    .bind::<Text, _>(topic)
    .bind::<Array<Integer>, _>(&partitions)
    .bind::<Array<Text>, _>(&keys)
    .execute(&mut conn)
    .await?;
    Ok(())
}
