//! The statements over `orders` and `order_event`: one named function each.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Binary, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::contracts::{Envelope, ORDER_PAYMENT_REQUESTS, PaymentRequested};
use crate::db::{Conn, DbError, sql};
use crate::http::idempotency::Keyed;
use crate::messaging::Position;
use crate::messaging::outbox::in_segment;
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

#[derive(Queryable, Selectable)]
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

/// Writes the orders that are not there yet, each with its event and its payment request, in one statement (S6); returns the
/// ids of those written. The rows of `orders` go in by id, so that two writers never wait in a circle; the requests go in as
/// they came, so that one user's are published in that order.
pub async fn insert(conn: &mut Conn, placements: &[&Placement]) -> Result<Vec<Uuid>, DbError> {
    fn column<'p, T>(placements: &[&'p Placement], field: impl Fn(&'p Placement) -> T) -> Vec<T> {
        placements.iter().map(|placement| field(placement)).collect()
    }
    let payloads = column(placements, |p| {
        let (order, timestamp) = (&p.order, p.at);
        PaymentRequested {
            order_id: order.id,
            user_id: order.user_id.clone(),
            amount: order.amount,
            description: order.description.clone(),
            timestamp,
        }
        .encode()
    });
    let rows: Vec<IdRow> = sql(in_segment!(
        "with given as (
             select unnest($1) as id, unnest($2) as user_id, unnest($3) as amount, unnest($4) as description, unnest($5) as at,
                    unnest($6) as traceparent, unnest($7) as request_id, unnest($8) as event_id, unnest($9) as payload,
                    unnest($13) as stamp, generate_series(1, cardinality($1)) as n
         ), accepted as (
             insert into orders (id, user_id, amount, description, created_at, updated_at, traceparent, stamp)
             select id, user_id, amount, description, at, at, traceparent, stamp from given order by id
             on conflict (id) do nothing
             returning id
         ), event as (
             insert into order_event (order_id, status, at, traceparent)
             select id, 'New', at, traceparent from given join accepted using (id) order by id
         ), message as (
             insert into ",
        " (event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at)
             select event_id, $10, user_id, payload, $11, $12, traceparent, request_id, at
               from given join accepted using (id) order by n
         )
         select id from accepted"
    ))
    .bind::<Array<SqlUuid>, _>(column(placements, |p| p.order.id))
    .bind::<Array<Text>, _>(column(placements, |p| p.order.user_id.as_str()))
    .bind::<Array<BigInt>, _>(column(placements, |p| p.order.amount.minor()))
    .bind::<Array<Nullable<Text>>, _>(column(placements, |p| p.order.description.as_deref()))
    .bind::<Array<Timestamptz>, _>(column(placements, |p| p.at))
    .bind::<Array<Text>, _>(column(placements, |p| p.origin.trace.traceparent()))
    .bind::<Array<Text>, _>(column(placements, |p| p.origin.request_id.as_str()))
    .bind::<Array<SqlUuid>, _>(column(placements, |_| Uuid::now_v7()))
    .bind::<Array<Binary>, _>(payloads)
    .bind::<Text, _>(ORDER_PAYMENT_REQUESTS)
    .bind::<Text, _>(PaymentRequested::TYPE)
    .bind::<Text, _>(SOURCE)
    .bind::<Array<Nullable<SqlUuid>>, _>(column(placements, |p| p.origin.stamp))
    .load(conn)
    .await?;
    Ok(rows.into_iter().map(|row| row.id).collect())
}

/// The orders with these ids, in no order.
pub async fn find(conn: &mut Conn, ids: &[Uuid]) -> Result<Vec<Order>, DbError> {
    let rows: Vec<OrderRow> = orders::table.filter(orders::id.eq_any(ids)).select(OrderRow::as_select()).load(conn).await?;
    rows.into_iter().map(Order::try_from).collect()
}

/// The orders with these ids, each with the stamp of the request that placed it; in no order.
pub async fn find_stamped(conn: &mut Conn, ids: &[Uuid]) -> Result<Vec<(Order, Option<Uuid>)>, DbError> {
    let rows: Vec<(OrderRow, Option<Uuid>)> =
        orders::table.filter(orders::id.eq_any(ids)).select((OrderRow::as_select(), orders::stamp)).load(conn).await?;
    rows.into_iter().map(|(row, stamp)| Ok((Order::try_from(row)?, stamp))).collect()
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

/// Ends the orders that have not ended (S5), each with its event; returns how many.
pub async fn end(conn: &mut Conn, endings: &[Ending]) -> Result<usize, DbError> {
    fn column<'e, T>(endings: &'e [Ending], field: impl Fn(&'e Ending) -> T) -> Vec<T> {
        endings.iter().map(field).collect()
    }
    let ended = sql("with ending as (
             select unnest($1) as order_id, unnest($2) as status, unnest($3) as failure_reason, unnest($4) as event_id,
                    unnest($5) as source, unnest($6) as sent_at, unnest($7) as partition, unnest($8) as log_offset,
                    unnest($9) as published_at, unnest($10) as received_at, unnest($11) as traceparent
         ), ended as (
             update orders o
                set status = e.status, failure_reason = e.failure_reason, updated_at = greatest(o.created_at, clock_timestamp())
               from ending e
              where o.id = e.order_id and o.status in ('New', 'Processing')
          returning o.updated_at, e.*
         )
         insert into order_event (order_id, status, failure_reason, at, event_id, source, topic, partition, log_offset, sent_at,
                                  published_at, received_at, traceparent)
         select order_id, status, failure_reason, updated_at, event_id, source, $12, partition, log_offset, sent_at, published_at,
                received_at, traceparent
           from ended order by order_id")
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
    .execute(conn)
    .await?;
    Ok(ended)
}
