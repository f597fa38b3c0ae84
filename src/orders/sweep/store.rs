//! The statements over `sweep_cursor` and `order_retry`: one named function each.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Bool, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::db::types::{Xid, Xid8};
use crate::db::{Conn, DbError, sql};

use super::rules::Walked;

/// When the next sweep is due, as every replica sees it.
#[derive(Debug, QueryableByName)]
pub struct Turn {
    /// Milliseconds; 0 or less where it is due.
    #[diesel(sql_type = BigInt)]
    pub due_in_ms: i64,
    #[diesel(sql_type = BigInt)]
    pub waiting: i64,
}

/// The cursor of a sweep that is ours, locked until its transaction ends.
#[derive(Debug, QueryableByName)]
pub struct Claimed {
    #[diesel(sql_type = Timestamptz)]
    pub swept_to: DateTime<Utc>,
    #[diesel(sql_type = SqlUuid)]
    pub swept_id: Uuid,
    #[diesel(sql_type = SqlUuid)]
    pub checked_to: Uuid,
    #[diesel(sql_type = Bool)]
    pub walk_is_due: bool,
    /// The server's time.
    #[diesel(sql_type = Timestamptz)]
    pub now: DateTime<Utc>,
}

/// What a sweep leaves behind.
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    pub walked: Walked,
    pub checked_to: Uuid,
    pub next_walk_at: Option<DateTime<Utc>>,
    pub next_sweep_at: DateTime<Utc>,
}

/// An order that the walk came by.
#[derive(Debug, QueryableByName)]
pub struct PassedRow {
    #[diesel(sql_type = SqlUuid)]
    pub id: Uuid,
    #[diesel(sql_type = Timestamptz)]
    pub created_at: DateTime<Utc>,
    #[diesel(sql_type = Bool)]
    pub waits: bool,
    /// The transaction that accepted it.
    #[diesel(sql_type = Nullable<Xid8>)]
    pub xid: Option<Xid>,
    /// Orders on the page.
    #[diesel(sql_type = BigInt)]
    pub total: i64,
}

#[derive(Debug, QueryableByName)]
pub struct DueRow {
    #[diesel(sql_type = SqlUuid)]
    pub order_id: Uuid,
    #[diesel(sql_type = Integer)]
    pub asks: i32,
    #[diesel(sql_type = Nullable<Xid8>)]
    pub asked_xid: Option<Xid>,
    #[diesel(sql_type = Bool)]
    pub ended: bool,
}

#[derive(Debug, QueryableByName)]
pub struct RetryRow {
    #[diesel(sql_type = SqlUuid)]
    pub order_id: Uuid,
    #[diesel(sql_type = Bool)]
    pub ended: bool,
}

/// An order as its request says it.
#[derive(Debug, QueryableByName)]
pub struct Asked {
    #[diesel(sql_type = SqlUuid)]
    pub id: Uuid,
    #[diesel(sql_type = Text)]
    pub user_id: String,
    #[diesel(sql_type = BigInt)]
    pub amount: i64,
    #[diesel(sql_type = Nullable<Text>)]
    pub description: Option<String>,
    #[diesel(sql_type = Timestamptz)]
    pub created_at: DateTime<Utc>,
    #[diesel(sql_type = Text)]
    pub traceparent: String,
}

/// Locks nothing: who only waits for his turn costs this one look. No interval is a minute long; what lies further ahead was written
/// before the server's clock went back.
pub async fn turn(conn: &mut Conn) -> Result<Turn, DbError> {
    let turn = sql("select case when next_sweep_at between clock_timestamp() and clock_timestamp() + interval '1 minute'
                           then ceil(extract(epoch from next_sweep_at - clock_timestamp()) * 1000)::bigint else 0 end as due_in_ms, waiting
                      from sweep_cursor where name = 'orders'")
    .get_result(conn)
    .await?;
    Ok(turn)
}

/// `None` where another replica sweeps, or has just done so. The transaction's other statements walk indexes in their order: a plan
/// made while a table was small must not read and sort all that has grown since.
pub async fn claim(conn: &mut Conn) -> Result<Option<Claimed>, DbError> {
    sql("set local enable_bitmapscan = off").execute(conn).await?;
    let claimed =
        sql("select swept_to, swept_id, checked_to, next_walk_at not between clock_timestamp() and clock_timestamp() + interval '1 minute' as walk_is_due, clock_timestamp() as now
                         from sweep_cursor
                        where name = 'orders' and next_sweep_at not between clock_timestamp() and clock_timestamp() + interval '1 minute'
                          for update skip locked")
        .get_result(conn)
        .await
        .optional()?;
    Ok(claimed)
}

/// `count_max`: what is counted of `order_retry` at most; returns that count.
pub async fn save(conn: &mut Conn, saved: &Saved, count_max: i64) -> Result<i64, DbError> {
    #[derive(QueryableByName)]
    struct Waiting {
        #[diesel(sql_type = BigInt)]
        waiting: i64,
    }
    let saved: Waiting = sql("update sweep_cursor
                                 set swept_to = $1, swept_id = $2, checked_to = $3, next_walk_at = coalesce($4, next_walk_at),
                                     next_sweep_at = $5, waiting = (select count(*) from (select from order_retry limit $6) counted)
                               where name = 'orders' returning waiting")
    .bind::<Timestamptz, _>(saved.walked.to)
    .bind::<SqlUuid, _>(saved.walked.id)
    .bind::<SqlUuid, _>(saved.checked_to)
    .bind::<Nullable<Timestamptz>, _>(saved.next_walk_at)
    .bind::<Timestamptz, _>(saved.next_sweep_at)
    .bind::<BigInt, _>(count_max)
    .get_result(conn)
    .await?;
    Ok(saved.waiting)
}

/// The next orders by creation time: those that wait, and the last.
pub async fn walk(conn: &mut Conn, from: Walked, until: DateTime<Utc>, orders_max: i64) -> Result<Vec<PassedRow>, DbError> {
    let rows = sql("select p.id, p.created_at, p.waits, coalesce(p.accepted_xid, e.xid) as xid, p.total
                      from (select id, created_at, accepted_xid, status in ('New', 'Processing') as waits,
                                   row_number() over (order by created_at, id) as n, count(*) over () as total
                              from (select id, created_at, accepted_xid, status from orders
                                     where (created_at, id) > ($1, $2) and created_at <= $3
                                     order by created_at, id limit $4) page) p
                      left join lateral (select xid from order_event
                                          where order_id = p.id and status = 'New' and p.waits and p.accepted_xid is null limit 1) e on true
                     where p.waits or p.n = p.total order by p.n")
    .bind::<Timestamptz, _>(from.to)
    .bind::<SqlUuid, _>(from.id)
    .bind::<Timestamptz, _>(until)
    .bind::<BigInt, _>(orders_max)
    .load(conn)
    .await?;
    Ok(rows)
}

/// Puts orders among those that are asked for again, due now; returns how many were not there.
pub async fn remember(conn: &mut Conn, orders: &[Uuid], now: DateTime<Utc>) -> Result<usize, DbError> {
    if orders.is_empty() {
        return Ok(0);
    }
    let remembered =
        sql("insert into order_retry (order_id, next_ask_at) select id, $2 from unnest($1) as o (id) order by id on conflict do nothing")
            .bind::<Array<SqlUuid>, _>(orders)
            .bind::<Timestamptz, _>(now)
            .execute(conn)
            .await?;
    Ok(remembered)
}

/// The orders whose time has come, the first first. Each is looked up by itself, so that no plan reads all orders.
pub async fn due(conn: &mut Conn, now: DateTime<Utc>, orders_max: i64) -> Result<Vec<DueRow>, DbError> {
    let rows = sql("select r.order_id, r.asks, r.asked_xid, coalesce(o.status not in ('New', 'Processing'), true) as ended
                      from (select order_id, asks, asked_xid, next_ask_at from order_retry
                             where next_ask_at <= $1 order by next_ask_at, order_id limit $2) r
                      left join lateral (select status from orders where id = r.order_id limit 1) o on true
                     order by r.next_ask_at, r.order_id")
    .bind::<Timestamptz, _>(now)
    .bind::<BigInt, _>(orders_max)
    .load(conn)
    .await?;
    Ok(rows)
}

/// The next of those that are waited for, by id, whenever they are due.
pub async fn check(conn: &mut Conn, from: Uuid, orders_max: i64) -> Result<Vec<RetryRow>, DbError> {
    let rows = sql("select r.order_id, coalesce(o.status not in ('New', 'Processing'), true) as ended
                      from (select order_id from order_retry where order_id > $1 order by order_id limit $2) r
                      left join lateral (select status from orders where id = r.order_id limit 1) o on true
                     order by r.order_id")
    .bind::<SqlUuid, _>(from)
    .bind::<BigInt, _>(orders_max)
    .load(conn)
    .await?;
    Ok(rows)
}

pub async fn forget(conn: &mut Conn, orders: &[Uuid]) -> Result<usize, DbError> {
    if orders.is_empty() {
        return Ok(0);
    }
    Ok(sql("delete from order_retry where order_id = any($1)").bind::<Array<SqlUuid>, _>(orders).execute(conn).await?)
}

/// What requests are made of, in no order.
pub async fn orders(conn: &mut Conn, ids: &[Uuid]) -> Result<Vec<Asked>, DbError> {
    let orders = sql("select o.id, o.user_id, o.amount, o.description, o.created_at, o.traceparent
                        from unnest($1) as asked (id)
                        join lateral (select * from orders where id = asked.id limit 1) o on true")
    .bind::<Array<SqlUuid>, _>(ids)
    .load(conn)
    .await?;
    Ok(orders)
}

/// Each is due again so many milliseconds after `now`; where they were `asked` for, it was in this transaction.
pub async fn postpone(conn: &mut Conn, orders: &[(Uuid, i64)], asked: bool, now: DateTime<Utc>) -> Result<(), DbError> {
    if orders.is_empty() {
        return Ok(());
    }
    sql("update order_retry r
            set next_ask_at = $3 + m.ms * interval '1 millisecond', asks = r.asks + $4::int,
                asked_xid = case when $4 then pg_current_xact_id() else r.asked_xid end
           from (select unnest($1) as id, unnest($2) as ms) m where r.order_id = any(array[m.id])")
    .bind::<Array<SqlUuid>, _>(orders.iter().map(|(id, _)| *id).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(orders.iter().map(|(_, ms)| *ms).collect::<Vec<_>>())
    .bind::<Timestamptz, _>(now)
    .bind::<Bool, _>(asked)
    .execute(conn)
    .await?;
    Ok(())
}
