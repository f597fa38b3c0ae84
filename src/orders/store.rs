//! The statements over `orders` and `order_event`: one named function each.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Binary, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::contracts::{Envelope, ORDER_PAYMENT_REQUESTS, PaymentRequested};
use crate::db::{Binds, Conn, DbError, Sql, sql};
use crate::http::idempotency::Keyed;
use crate::messaging::outbox::{Windows, in_segment};
use crate::messaging::{Fence, Position};
use crate::money::Amount;
use crate::user_id::UserId;

use super::order::{FailureReason, NewOrder, Order, OrderStatus};
use super::schema::orders;
use super::{ListOrders, OrderPage, OrderPosition, Origin, Placing, SOURCE};

/// A request on its way into the database.
#[derive(Clone, Debug)]
pub struct Placement {
    pub order: NewOrder,
    pub origin: Origin,
    /// When it was accepted.
    pub at: DateTime<Utc>,
    pub key: Option<Keyed<Placing>>,
}

/// An order ends, with where that was said.
#[derive(Clone, Debug)]
pub struct Ending {
    pub order_id: Uuid,
    /// Final.
    pub status: OrderStatus,
    pub failure_reason: Option<FailureReason>,
    pub position: Position,
    pub envelope: Envelope,
    pub published_at: DateTime<Utc>,
    pub received_at: DateTime<Utc>,
}

#[derive(Queryable, Selectable, QueryableByName)]
#[diesel(table_name = orders, check_for_backend(diesel::pg::Pg))]
struct OrderRow {
    id: Uuid,
    user_id: String,
    amount: i64,
    description: Option<String>,
    status: String,
    failure_reason: Option<String>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

impl TryFrom<OrderRow> for Order {
    type Error = DbError;

    fn try_from(row: OrderRow) -> Result<Self, DbError> {
        let odd = |what: &str| DbError::Defect(format!("order {}: {what} breaks its rule", row.id));
        let failure_reason =
            row.failure_reason.as_deref().map(|text| FailureReason::parse(text).ok_or_else(|| odd("failure_reason")));
        Ok(Self {
            id: row.id,
            status: OrderStatus::parse(&row.status).ok_or_else(|| odd("status"))?,
            failure_reason: failure_reason.transpose()?,
            amount: Amount::from_minor(row.amount).ok_or_else(|| odd("amount"))?,
            user_id: UserId::new(row.user_id.as_str()).map_err(|_| odd("user_id"))?,
            description: row.description,
            created_at: row.created_at,
            updated_at: row.updated_at,
        })
    }
}

#[derive(QueryableByName)]
struct IdRow {
    #[diesel(sql_type = SqlUuid)]
    id: Uuid,
}

/// Writes new orders, each with the position of its first event and with its payment request, in one statement (S6). The rows of `orders` go
/// in by id, so that two writers never wait in a circle, and the requests with them: those that are together here came together, and are in no order.
///
/// # Errors
/// [`DbError::Duplicate`] where one is there already; none is written then. [`insert_missing`] finds out which, and takes twice as long.
pub async fn insert(mut conn: &Conn, placements: &[&Placement]) -> Result<(), DbError> {
    let mut placements = placements.to_vec();
    placements.sort_unstable_by_key(|placement| placement.order.id);
    let (rows, messages) = (Rows::of(&placements), Messages::of(&placements));
    let windows = messages.windows(&rows);
    sql(in_segment!(
        "with accepted as (
             insert into orders (id, user_id, amount, description, created_at, updated_at, traceparent, stamp, accepted_xid, accepted_id)
             select unnest($1), unnest($2), unnest($3), unnest($4), unnest($5), unnest($5), unnest($6), unnest($7),
                    pg_current_xact_id(), nextval('order_event_id_seq')
         )
         insert into ",
        " (event_id, topic, key, event_type, source, traceparent, request_id, created_at,
           event_ids, keys, payloads, traceparents, request_ids, created_ats)
         select $8[f], $11, '', $12, $13, '', '', $5[f], $8[f:t], $2[f:t], $9[f:t], $6[f:t], $10[f:t], $5[f:t]
           from (select unnest($14) as f, unnest($15) as t) one"
    ))
    .bind::<Array<SqlUuid>, _>(rows.ids)
    .bind::<Array<Text>, _>(rows.users)
    .bind::<Array<BigInt>, _>(rows.amounts)
    .bind::<Array<Nullable<Text>>, _>(rows.descriptions)
    .bind::<Array<Timestamptz>, _>(rows.times)
    .bind::<Array<Text>, _>(rows.traceparents)
    .bind::<Array<Nullable<SqlUuid>>, _>(rows.stamps)
    .bind::<Array<SqlUuid>, _>(messages.event_ids)
    .bind::<Array<Binary>, _>(messages.payloads)
    .bind::<Array<Text>, _>(messages.request_ids)
    .bind::<Text, _>(ORDER_PAYMENT_REQUESTS)
    .bind::<Text, _>(PaymentRequested::TYPE)
    .bind::<Text, _>(SOURCE)
    .bind::<Array<Integer>, _>(windows.from)
    .bind::<Array<Integer>, _>(windows.to)
    .execute(&mut conn)
    .await?;
    Ok(())
}

/// As [`insert`], of those orders that are not there yet; returns the ids of those written.
pub async fn insert_missing(mut conn: &Conn, placements: &[&Placement]) -> Result<Vec<Uuid>, DbError> {
    let (rows, messages) = (Rows::of(placements), Messages::of(placements));
    let written: Vec<IdRow> = sql(in_segment!(
        "with given as (
             select unnest($1) as id, unnest($2) as user_id, unnest($3) as amount, unnest($4) as description, unnest($5) as at,
                    unnest($6) as traceparent, unnest($7) as stamp, unnest($8) as request_id, unnest($9) as event_id,
                    unnest($10) as payload, generate_series(1, cardinality($1)) as n
         ), accepted as (
             insert into orders (id, user_id, amount, description, created_at, updated_at, traceparent, stamp, accepted_xid, accepted_id)
             select id, user_id, amount, description, at, at, traceparent, stamp, pg_current_xact_id(), nextval('order_event_id_seq')
               from given order by id
             on conflict (id) do nothing
             returning id
         ), message as (
             insert into ",
        " (event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at)
             select event_id, $11, user_id, payload, $12, $13, traceparent, request_id, at
               from given join accepted using (id) order by n
         )
         select id from accepted"
    ))
    .bind::<Array<SqlUuid>, _>(rows.ids)
    .bind::<Array<Text>, _>(rows.users)
    .bind::<Array<BigInt>, _>(rows.amounts)
    .bind::<Array<Nullable<Text>>, _>(rows.descriptions)
    .bind::<Array<Timestamptz>, _>(rows.times)
    .bind::<Array<Text>, _>(rows.traceparents)
    .bind::<Array<Nullable<SqlUuid>>, _>(rows.stamps)
    .bind::<Array<Text>, _>(messages.request_ids)
    .bind::<Array<SqlUuid>, _>(messages.event_ids)
    .bind::<Array<Binary>, _>(messages.payloads)
    .bind::<Text, _>(ORDER_PAYMENT_REQUESTS)
    .bind::<Text, _>(PaymentRequested::TYPE)
    .bind::<Text, _>(SOURCE)
    .load(&mut conn)
    .await?;
    Ok(written.into_iter().map(|row| row.id).collect())
}

/// What `orders` is to hold, by column.
struct Rows<'p> {
    ids: Vec<Uuid>,
    users: Vec<&'p str>,
    amounts: Vec<i64>,
    descriptions: Vec<Option<&'p str>>,
    times: Vec<DateTime<Utc>>,
    traceparents: Vec<String>,
    stamps: Vec<Option<Uuid>>,
}

impl<'p> Rows<'p> {
    fn of(placements: &[&'p Placement]) -> Self {
        Self {
            ids: column(placements, |p| p.order.id),
            users: column(placements, |p| p.order.user_id.as_str()),
            amounts: column(placements, |p| p.order.amount.minor()),
            descriptions: column(placements, |p| p.order.description.as_deref()),
            times: column(placements, |p| p.at),
            traceparents: column(placements, |p| p.origin.trace.traceparent()),
            stamps: column(placements, |p| p.origin.stamp),
        }
    }
}

/// What the outbox is to hold beside that, by column; key, trace and time are the order's.
struct Messages<'p> {
    event_ids: Vec<Uuid>,
    payloads: Vec<Vec<u8>>,
    request_ids: Vec<&'p str>,
}

impl<'p> Messages<'p> {
    fn of(placements: &[&'p Placement]) -> Self {
        Self {
            event_ids: column(placements, |_| Uuid::now_v7()),
            payloads: column(placements, |p| payment_requested(p).encode()),
            request_ids: column(placements, |p| &*p.origin.request_id),
        }
    }

    fn windows(&self, rows: &Rows<'_>) -> Windows {
        let texts = rows.users.iter().zip(&self.payloads).zip(rows.traceparents.iter().zip(&self.request_ids));
        Windows::of(texts.map(|((key, payload), (trace, request))| key.len() + payload.len() + trace.len() + request.len()))
    }
}

fn payment_requested(placement: &Placement) -> PaymentRequested {
    let NewOrder { id, user_id, amount, description } = placement.order.clone();
    PaymentRequested { order_id: id, user_id, amount, description, timestamp: placement.at }
}

fn column<'p, T>(placements: &[&'p Placement], field: impl Fn(&'p Placement) -> T) -> Vec<T> {
    placements.iter().map(|placement| field(placement)).collect()
}

/// The orders with these ids, in no order.
pub async fn find(conn: &mut Conn, ids: &[Uuid]) -> Result<Vec<Order>, DbError> {
    let rows: Vec<OrderRow> = orders::table.filter(orders::id.eq_any(ids)).select(OrderRow::as_select()).load(conn).await?;
    rows.into_iter().map(Order::try_from).collect()
}

/// As [`find`], those that have ended. One that cannot be read holds up no other: whoever waits for it reads it by itself.
pub async fn find_ended(conn: &mut Conn, ids: &[Uuid]) -> Result<Vec<Order>, DbError> {
    let is_final = orders::status.eq_any([OrderStatus::Finished.as_str(), OrderStatus::Cancelled.as_str()]);
    let found = orders::table.filter(orders::id.eq_any(ids)).filter(is_final).select(OrderRow::as_select());
    let rows: Vec<OrderRow> = found.load(conn).await?;
    Ok(rows.into_iter().filter_map(|row| Order::try_from(row).ok()).collect())
}

/// An order, and the stamp of the request that placed it.
pub type Stamped = (Order, Option<Uuid>);

/// The orders with these ids, in no order. One that cannot be read is an error of its own.
pub async fn find_stamped(mut conn: &Conn, ids: &[Uuid]) -> Result<Vec<(Uuid, Result<Stamped, DbError>)>, DbError> {
    let rows: Vec<(OrderRow, Option<Uuid>)> =
        orders::table.filter(orders::id.eq_any(ids)).select((OrderRow::as_select(), orders::stamp)).load(&mut conn).await?;
    Ok(rows.into_iter().map(|(row, stamp)| (row.id, Order::try_from(row).map(|order| (order, stamp)))).collect())
}

/// One page, newest first.
pub async fn list(conn: &mut Conn, which: ListOrders) -> Result<OrderPage, DbError> {
    let mut query = orders::table.select(OrderRow::as_select()).into_boxed();
    if let Some(user) = &which.user_id {
        query = query.filter(orders::user_id.eq(user.as_str()));
    }
    if let Some(status) = which.status {
        query = query.filter(orders::status.eq(status.as_str()));
    }
    if let Some(OrderPosition { created_at, id }) = which.before {
        // The first condition lets the index start there; the second breaks ties.
        query = query.filter(orders::created_at.le(created_at)).filter(orders::created_at.lt(created_at).or(orders::id.lt(id)));
    }
    let order = (orders::created_at.desc(), orders::id.desc());
    let rows: Vec<OrderRow> = query.order(order).limit(which.limit + 1).load(conn).await?;
    let more = rows.len() as i64 > which.limit;
    let mut orders = rows.into_iter().map(Order::try_from).collect::<Result<Vec<_>, _>>()?;
    orders.truncate(which.limit as usize);
    let next = orders.last().filter(|_| more).map(|last| OrderPosition { created_at: last.created_at, id: last.id });
    Ok(OrderPage { orders, next })
}

/// The statement of [`end`], alone or with the fence of its batch before it, and with what it says of the orders that it ended.
macro_rules! end_statement {
    ($fence:literal, $from_fence:literal, $returning:literal, $event:literal, $found:literal) => {
        concat!(
            "with ",
            $fence,
            "ending as (
             select unnest($1) as order_id, unnest($2) as status, unnest($3) as failure_reason, unnest($4) as event_id,
                    unnest($5) as source, unnest($6) as sent_at, unnest($7) as partition, unnest($8) as log_offset,
                    unnest($9) as published_at, unnest($10) as received_at, unnest($11) as traceparent",
            $from_fence,
            "), ended as (
             update orders o
                set status = e.status, failure_reason = e.failure_reason, updated_at = greatest(o.created_at, clock_timestamp())
               from ending e
              where o.id = any(array[e.order_id]) and o.status in ('New', 'Processing')
          returning o.updated_at, e.*",
            $returning,
            ")",
            $event,
            " insert into order_event (order_id, status, failure_reason, at, event_id, source, topic, partition, log_offset, sent_at,
                                  published_at, received_at, traceparent)
         select order_id, status, failure_reason, updated_at, event_id, source, $12, partition, log_offset, sent_at, published_at,
                received_at, traceparent
           from ended",
            $found
        )
    };
}

/// A batch's fence before the rest: it comes first, and where it holds nothing is written.
macro_rules! fenced_end_statement {
    ($returning:literal, $event:literal, $found:literal) => {
        end_statement!(
            "fence as materialized (select advance_offsets($13, $14, $15, $16, $17, $18)), ",
            " from fence",
            $returning,
            $event,
            $found
        )
    };
}

/// Ends the orders that have not ended (S5), each with its event; returns how many.
pub async fn end(mut conn: &Conn, endings: &[Ending]) -> Result<usize, DbError> {
    Ok(with_columns(sql(end_statement!("", "", "", "", "")), endings).execute(&mut conn).await?)
}

/// As [`end`], and moves the batch's offsets: one statement, a transaction by itself.
pub async fn end_at_once(mut conn: &Conn, fence: &Fence<'_>, endings: &[Ending]) -> Result<usize, DbError> {
    Ok(fence.bind(with_columns(sql(fenced_end_statement!("", "", "")), endings)).execute(&mut conn).await?)
}

/// As [`end_at_once`], and returns the orders that it ended beside their number. One that cannot be read is left out: it has ended all the same.
pub async fn end_and_return(mut conn: &Conn, fence: &Fence<'_>, endings: &[Ending]) -> Result<(usize, Vec<Order>), DbError> {
    let statement = fenced_end_statement!(
        ", o.user_id, o.amount, o.description, o.created_at",
        ", event as (",
        ") select order_id as id, user_id, amount, description, status, failure_reason, created_at, updated_at from ended"
    );
    let rows: Vec<OrderRow> = fence.bind(with_columns(sql(statement), endings)).load(&mut conn).await?;
    Ok((rows.len(), rows.into_iter().filter_map(|row| Order::try_from(row).ok()).collect()))
}

/// The first twelve binds of [`end_statement`]. By order: two replicas never wait for each other in a circle, and pages are found again. Here,
/// because the server would make a copy of each row for that.
fn with_columns(statement: Sql, endings: &[Ending]) -> Sql<impl Binds + Send + use<'_>> {
    fn column<'e, T>(endings: &[&'e Ending], field: impl Fn(&'e Ending) -> T) -> Vec<T> {
        endings.iter().copied().map(field).collect()
    }
    let mut endings: Vec<&Ending> = endings.iter().collect();
    endings.sort_unstable_by_key(|ending| ending.order_id);
    let endings = &*endings;
    statement
        .bind::<Array<SqlUuid>, _>(column(endings, |e| e.order_id))
        .bind::<Array<Text>, _>(column(endings, |e| e.status.as_str()))
        .bind::<Array<Nullable<Text>>, _>(column(endings, |e| e.failure_reason.map(FailureReason::as_str)))
        .bind::<Array<Nullable<Text>>, _>(column(endings, |e| e.envelope.event_id.as_deref()))
        .bind::<Array<Nullable<Text>>, _>(column(endings, |e| e.envelope.source.as_deref()))
        .bind::<Array<Nullable<Timestamptz>>, _>(column(endings, |e| e.envelope.time))
        .bind::<Array<Integer>, _>(column(endings, |e| e.position.partition))
        .bind::<Array<BigInt>, _>(column(endings, |e| e.position.offset))
        .bind::<Array<Timestamptz>, _>(column(endings, |e| e.published_at))
        .bind::<Array<Timestamptz>, _>(column(endings, |e| e.received_at))
        .bind::<Array<Nullable<Text>>, _>(column(endings, |e| e.envelope.trace.map(|trace| trace.traceparent())))
        .bind::<Text, _>(crate::contracts::PAYMENT_STATUS_UPDATES)
}
