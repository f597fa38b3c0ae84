//! What orders knows of an order's way: it was accepted, its request was written with it, and once it ended, where its result came from.

use chrono::{DateTime, Utc};
use diesel::QueryableByName;
use diesel::sql_types::{BigInt, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use super::order::OrderStatus;
use crate::db::{Conn, DbError, sql};
use crate::http::timeline::{Hop, HopName, Part};
use crate::trace::TraceContext;

#[derive(QueryableByName)]
struct EventRow {
    #[diesel(sql_type = Text)]
    traceparent: String,
    #[diesel(sql_type = Text)]
    status: String,
    #[diesel(sql_type = Timestamptz)]
    at: DateTime<Utc>,
    #[diesel(sql_type = Nullable<Text>)]
    topic: Option<String>,
    #[diesel(sql_type = Nullable<Integer>)]
    partition: Option<i32>,
    #[diesel(sql_type = Nullable<BigInt>)]
    log_offset: Option<i64>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    published_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    received_at: Option<DateTime<Utc>>,
}

/// `None` where there is no such order.
pub async fn read(conn: &mut Conn, id: Uuid) -> Result<Option<Part>, DbError> {
    let rows: Vec<EventRow> =
        sql("select o.traceparent, e.status, e.at, e.topic, e.partition, e.log_offset, e.published_at, e.received_at
           from orders o
           join lateral (select 'New' as status, o.created_at as at, null as topic, null::int as partition, null::bigint as log_offset,
                                null::timestamptz as published_at, null::timestamptz as received_at
                          where o.accepted_xid is not null
                         union all
                         select status, at, topic, partition, log_offset, published_at, received_at
                           from order_event where order_id = o.id) e on true
          where o.id = $1
          order by e.status in ('Finished', 'Cancelled'), e.at")
        .bind::<SqlUuid, _>(id)
        .load(conn)
        .await?;
    let Some(first) = rows.as_slice().first() else { return Ok(None) };
    let trace_id = TraceContext::parse(&first.traceparent).map(|trace| trace.trace_id());
    Ok(Some(Part { order_id: id, trace_id, hops: rows.into_iter().flat_map(hops).collect() }))
}

/// Of one event; what a row does not hold is left out.
fn hops(event: EventRow) -> Vec<Hop> {
    let EventRow { status, at, topic, partition, log_offset, published_at, received_at, .. } = event;
    let last = match OrderStatus::parse(&status) {
        Some(OrderStatus::New) => return vec![Hop::new(HopName::Accepted, at), Hop::new(HopName::Outbox, at)],
        Some(OrderStatus::Finished) => HopName::Finished,
        Some(OrderStatus::Cancelled) => HopName::Cancelled,
        Some(OrderStatus::Processing) | None => return Vec::new(),
    };
    let record = topic.zip(partition).zip(log_offset).zip(published_at);
    let record = record.map(|(((topic, partition), offset), at)| Hop::new(HopName::Topic, at).on(topic, partition, offset));
    let received = received_at.map(|at| Hop::new(HopName::Inbox, at));
    record.into_iter().chain(received).chain([Hop::new(last, at)]).collect()
}
