//! What payments knows of an order's way: where its request came from, what it did to the balance, and that the result was written with it.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::sql_types::{BigInt, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::RunQueryDsl;
use serde_json::value::{RawValue, to_raw_value};
use uuid::Uuid;

use crate::db::{Conn, DbError, sql};
use crate::http::timeline::{Hop, HopName, Part};
use crate::money::Minor;
use crate::trace::TraceContext;

#[derive(QueryableByName)]
struct PaymentRow {
    #[diesel(sql_type = Nullable<Text>)]
    traceparent: Option<String>,
    #[diesel(sql_type = Text)]
    topic: String,
    #[diesel(sql_type = Integer)]
    partition: i32,
    #[diesel(sql_type = BigInt)]
    log_offset: i64,
    #[diesel(sql_type = Timestamptz)]
    published_at: DateTime<Utc>,
    #[diesel(sql_type = Timestamptz)]
    received_at: DateTime<Utc>,
    #[diesel(sql_type = Timestamptz)]
    decided_at: DateTime<Utc>,
    /// Of the debit, where there was one.
    #[diesel(sql_type = Nullable<BigInt>)]
    amount: Option<i64>,
    #[diesel(sql_type = Nullable<BigInt>)]
    balance_after: Option<i64>,
}

/// `None` where nothing is decided on the order.
pub async fn read(conn: &mut Conn, order: Uuid) -> Result<Option<Part>, DbError> {
    let row: Option<PaymentRow> =
        sql("select p.traceparent, p.topic, p.partition, p.log_offset, p.published_at, p.received_at, p.decided_at,
                t.amount, t.balance_after
           from payment p left join transfer t on t.order_id = p.order_id where p.order_id = $1")
        .bind::<SqlUuid, _>(order)
        .get_result(conn)
        .await
        .optional()?;
    row.map(|row| part(order, row)).transpose()
}

fn part(order_id: Uuid, row: PaymentRow) -> Result<Part, DbError> {
    let mut ledger = Hop::new(HopName::Ledger, row.decided_at);
    if let (Some(amount), Some(after)) = (row.amount, row.balance_after) {
        ledger.balance_before = Some(money(after + amount)?);
        ledger.balance_after = Some(money(after)?);
    }
    let trace = row.traceparent.as_deref().and_then(TraceContext::parse);
    Ok(Part {
        order_id,
        trace_id: trace.map(|trace| trace.trace_id()),
        hops: vec![
            Hop::new(HopName::Topic, row.published_at).on(row.topic, row.partition, row.log_offset),
            Hop::new(HopName::Inbox, row.received_at),
            ledger,
            Hop::new(HopName::Outbox, row.decided_at),
        ],
    })
}

/// As answers have it.
fn money(minor: i64) -> Result<Box<RawValue>, DbError> {
    to_raw_value(&Minor(minor)).map_err(|error| DbError::Defect(format!("an amount cannot be written: {error}")))
}
