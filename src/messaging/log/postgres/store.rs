//! The statements on `shopd_log`, one function each.

use diesel::prelude::QueryableByName;
use diesel::result::QueryResult;
use diesel::sql_types::{Array, BigInt, Binary, Double, Integer, Nullable, Text, Timestamptz};
use diesel_async::RunQueryDsl;

use chrono::{DateTime, Utc};

use crate::db::{Conn, sql};

/// A partition by its topic's id and its number.
pub(super) type Place = (i32, i32);

#[derive(Debug, Clone, Copy, QueryableByName)]
pub(super) struct Topic {
    #[diesel(sql_type = Integer)]
    pub id: i32,
    #[diesel(sql_type = Integer)]
    pub partitions: i32,
}

#[derive(Debug, Clone, Copy, QueryableByName)]
pub(super) struct End {
    #[diesel(sql_type = Integer)]
    pub topic_id: i32,
    #[diesel(sql_type = Integer)]
    pub partition: i32,
    #[diesel(sql_type = BigInt)]
    pub next_offset: i64,
}

#[derive(Debug, Clone, Copy, QueryableByName)]
pub(super) struct Bounds {
    #[diesel(sql_type = BigInt)]
    pub start_offset: i64,
    #[diesel(sql_type = BigInt)]
    pub next_offset: i64,
}

/// A partition's bounds, and one of its records if there is any.
#[derive(Debug, QueryableByName)]
pub(super) struct Row {
    #[diesel(sql_type = BigInt)]
    pub start_offset: i64,
    #[diesel(sql_type = BigInt)]
    pub next_offset: i64,
    #[diesel(sql_type = Nullable<BigInt>)]
    pub offset: Option<i64>,
    #[diesel(sql_type = Nullable<Binary>)]
    pub key: Option<Vec<u8>>,
    #[diesel(sql_type = Nullable<Binary>)]
    pub value: Option<Vec<u8>>,
    #[diesel(sql_type = Nullable<Binary>)]
    pub headers: Option<Vec<u8>>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub timestamp: Option<DateTime<Utc>>,
}

/// Records to insert, a column a field; all of one length.
#[derive(Debug, Clone, Default)]
pub(super) struct Columns {
    pub topic_ids: Vec<i32>,
    pub partitions: Vec<i32>,
    pub offsets: Vec<i64>,
    pub keys: Vec<Option<Vec<u8>>>,
    pub values: Vec<Option<Vec<u8>>>,
    pub headers: Vec<Vec<u8>>,
    pub timestamps: Vec<DateTime<Utc>>,
}

/// `names` in ascending order, so that two processes that create the same wait for each other in one order.
pub(super) async fn create_topics(conn: &mut Conn, names: &[&str], partitions: i32) -> QueryResult<usize> {
    sql("with made as (
             insert into shopd_log.topic (name, partitions) select unnest($1), $2
             on conflict (name) do nothing returning id, partitions)
         insert into shopd_log.partition (topic_id, partition) select id, generate_series(0, partitions - 1) from made")
    .bind::<Array<Text>, _>(names)
    .bind::<Integer, _>(partitions)
    .execute(conn)
    .await
}

pub(super) async fn topic(conn: &mut Conn, name: &str) -> QueryResult<Option<Topic>> {
    let topics: Vec<Topic> =
        sql("select id, partitions from shopd_log.topic where name = $1").bind::<Text, _>(name).load(conn).await?;
    Ok(topics.into_iter().next())
}

/// Locks the partitions that are appended to, in one order everywhere, and says where each goes on.
pub(super) async fn lock(conn: &mut Conn, topic_ids: &[i32], partitions: &[i32]) -> QueryResult<Vec<End>> {
    sql("select p.topic_id, p.partition, p.next_offset from shopd_log.partition p
          where (p.topic_id, p.partition) in (select unnest($1), unnest($2))
          order by p.topic_id, p.partition for update")
    .bind::<Array<Integer>, _>(topic_ids)
    .bind::<Array<Integer>, _>(partitions)
    .load(conn)
    .await
}

/// Inserts the records, and moves the locked partitions to their new ends.
pub(super) async fn insert(conn: &mut Conn, ends: &[End], columns: &Columns) -> QueryResult<usize> {
    let topic_ids: Vec<i32> = ends.iter().map(|end| end.topic_id).collect();
    let partitions: Vec<i32> = ends.iter().map(|end| end.partition).collect();
    let next_offsets: Vec<i64> = ends.iter().map(|end| end.next_offset).collect();
    sql("with moved as (
             update shopd_log.partition p set next_offset = m.next_offset
               from (select unnest($1) topic_id, unnest($2) partition, unnest($3) next_offset) m
              where p.topic_id = m.topic_id and p.partition = m.partition)
         insert into shopd_log.record (topic_id, partition, \"offset\", key, value, headers, timestamp)
         select unnest($4), unnest($5), unnest($6), unnest($7), unnest($8), unnest($9), unnest($10)")
    .bind::<Array<Integer>, _>(topic_ids)
    .bind::<Array<Integer>, _>(partitions)
    .bind::<Array<BigInt>, _>(next_offsets)
    .bind::<Array<Integer>, _>(&columns.topic_ids)
    .bind::<Array<Integer>, _>(&columns.partitions)
    .bind::<Array<BigInt>, _>(&columns.offsets)
    .bind::<Array<Nullable<Binary>>, _>(&columns.keys)
    .bind::<Array<Nullable<Binary>>, _>(&columns.values)
    .bind::<Array<Binary>, _>(&columns.headers)
    .bind::<Array<Timestamptz>, _>(&columns.timestamps)
    .execute(conn)
    .await
}

/// Bounds and records in one snapshot: from `from` on, while those before are less than `bytes_max`.
pub(super) async fn read(conn: &mut Conn, place: Place, from: i64, rows_max: i64, bytes_max: i64) -> QueryResult<Vec<Row>> {
    sql("select p.start_offset, p.next_offset, r.\"offset\", r.key, r.value, r.headers, r.timestamp
           from shopd_log.partition p
           left join lateral (
                select * from (
                    select page.*, sum(octet_length(coalesce(value, '')) + octet_length(coalesce(key, '')) + octet_length(headers) + 50)
                                   over (order by page.\"offset\") as bytes
                      from (select * from shopd_log.record
                             where topic_id = $1 and partition = $2 and \"offset\" >= $3 and \"offset\" < p.next_offset
                             order by \"offset\" limit $4) page) sized
                 where bytes <= $5 or \"offset\" = $3) r on $3 >= p.start_offset
          where p.topic_id = $1 and p.partition = $2
          order by r.\"offset\"")
    .bind::<Integer, _>(place.0)
    .bind::<Integer, _>(place.1)
    .bind::<BigInt, _>(from)
    .bind::<BigInt, _>(rows_max)
    .bind::<BigInt, _>(bytes_max)
    .load(conn)
    .await
}

pub(super) async fn bounds(conn: &mut Conn, place: Place) -> QueryResult<Option<Bounds>> {
    let bounds: Vec<Bounds> =
        sql("select start_offset, next_offset from shopd_log.partition where topic_id = $1 and partition = $2")
            .bind::<Integer, _>(place.0)
            .bind::<Integer, _>(place.1)
            .load(conn)
            .await?;
    Ok(bounds.into_iter().next())
}

/// Every partition's end.
pub(super) async fn ends(conn: &mut Conn) -> QueryResult<Vec<End>> {
    sql("select topic_id, partition, next_offset from shopd_log.partition").load(conn).await
}

/// Moves a partition's start up to `offset`; 0 where it is there already or `offset` is beyond the end.
pub(super) async fn move_start(conn: &mut Conn, place: Place, offset: i64) -> QueryResult<usize> {
    sql("update shopd_log.partition set start_offset = $3
          where topic_id = $1 and partition = $2 and start_offset < $3 and $3 <= next_offset")
    .bind::<Integer, _>(place.0)
    .bind::<Integer, _>(place.1)
    .bind::<BigInt, _>(offset)
    .execute(conn)
    .await
}

/// Every partition, with the offset up to which its records are older than `age_seconds`, looking at `rows_max` at most.
/// As `next_offset` comes what its start is to be.
pub(super) async fn old(conn: &mut Conn, age_seconds: f64, rows_max: i64) -> QueryResult<Vec<End>> {
    sql("select p.topic_id, p.partition,
                coalesce((select page.\"offset\"
                            from (select r.\"offset\", r.appended_at from shopd_log.record r
                                   where r.topic_id = p.topic_id and r.partition = p.partition and r.\"offset\" >= p.start_offset
                                   order by r.\"offset\" limit $2) page
                           where page.appended_at >= now() - $1 * interval '1 second'
                           order by page.\"offset\" limit 1),
                         least(p.start_offset + $2, p.next_offset)) as next_offset
           from shopd_log.partition p")
    .bind::<Double, _>(age_seconds)
    .bind::<BigInt, _>(rows_max)
    .load(conn)
    .await
}

/// Deletes at most `rows_max` records that lie before their partition's start. Readers do not see those any more, and the
/// partition itself is not locked.
pub(super) async fn sweep(conn: &mut Conn, place: Place, rows_max: i64) -> QueryResult<usize> {
    sql("delete from shopd_log.record
          where topic_id = $1 and partition = $2
            and \"offset\" < (select start_offset from shopd_log.partition where topic_id = $1 and partition = $2)
            and \"offset\" < $3 + (select min(\"offset\") from shopd_log.record where topic_id = $1 and partition = $2)")
    .bind::<Integer, _>(place.0)
    .bind::<Integer, _>(place.1)
    .bind::<BigInt, _>(rows_max)
    .execute(conn)
    .await
}

/// Tells every process that listens; outside of any transaction that writes. Its own commit waits for no disk.
pub(super) async fn notify(conn: &mut Conn, channel: &str, payload: &str) -> QueryResult<usize> {
    sql("select set_config('synchronous_commit', 'off', true), pg_notify($1, $2)")
        .bind::<Text, _>(channel)
        .bind::<Text, _>(payload)
        .execute(conn)
        .await
}
