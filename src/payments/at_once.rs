//! A few requests, decided over what is seen and written in one statement where nothing of that has moved: two round trips, and no lock
//! is held between them. More of them, or what loses the race against a deposit, go by the transaction of [`super::on_order`].

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use diesel::sql_types::{Array, BigInt, Timestamptz};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::contracts::{ORDER_PAYMENT_REQUESTS, PaymentRequested};
use crate::db::{Conn, DbError, Notifier, sql};
use crate::messaging::{Fence, Received, outbox};

use super::on_order::{Effects, effects};
use super::store::{self, Stood};

/// Of more the server can write one piece while the next one is made.
const REQUESTS_MAX: usize = 64;

/// Decides a batch and commits it with its offsets; `false` where it is too large for that. Others are told behind the commit.
///
/// An account that is debited must stand as it was seen. One whose orders are all refused may get a deposit meanwhile: that is as if it came
/// after the decision.
///
/// # Errors
/// [`DbError::Fenced`] where the batch is another's by now, [`DbError::Unavailable`] where an account has moved, [`DbError::Duplicate`] where
/// an order was decided meanwhile; nothing is written then.
pub async fn apply(
    conn: &Conn,
    notifier: &Notifier,
    fence: &Fence<'_>,
    batch: &[Received<PaymentRequested>],
) -> Result<bool, DbError> {
    if batch.len() > REQUESTS_MAX {
        return Ok(false);
    }
    let orders: Vec<Uuid> = batch.iter().map(|request| request.event.order_id).collect();
    let users: HashSet<&str> = batch.iter().map(|request| request.event.user_id.as_str()).collect();
    let users: Vec<&str> = users.into_iter().collect();
    let (decided, seen) = tokio::join!(biased; store::decided(conn, &orders), store::look(conn, &users));
    let (decided, (mut accounts, at, stood)) = (decided?, seen?);
    let effects = effects(batch, &decided, &mut accounts, at);
    notifier.committing(conn, batch.len(), write(conn, fence, &stood, &effects, at)).await?;
    Ok(true)
}

/// The fence first, then the accounts in the order of their ids, as every writer of them does; the ledger's lines get their ids only when
/// those are locked.
async fn write(
    mut conn: &Conn,
    fence: &Fence<'_>,
    stood: &[Stood],
    effects: &Effects<'_>,
    at: DateTime<Utc>,
) -> Result<(), DbError> {
    let stood: HashMap<i64, &Stood> = stood.iter().map(|one| (one.id, one)).collect();
    let mut moved: Vec<_> = effects.moved.iter().filter_map(|held| Some((*stood.get(&held.id)?, held.balance))).collect();
    moved.sort_unstable_by_key(|(stood, _)| stood.id);
    let statement = sql(outbox::in_segment!(
        "with fence as materialized (select advance_offsets($39, $40, $41, $42, $43, $44)),
         moved as (
             update account a set balance = m.balance, updated_at = $34
               from fence, (select unnest($35) as id, unnest($36) as stood, unnest($37) as stood_at, unnest($38) as balance) m
              where a.id = any(array[m.id]) and a.balance = m.stood and a.updated_at = m.stood_at
          returning 1
         ), unchanged as materialized (
             select expect_unchanged((select count(*) from moved), cardinality($35)) from fence
         ), entry as (
             insert into transfer (account_id, from_account, to_account, amount, order_id, balance_after, created_at)
             select unnest($28), unnest($29), unnest($30), unnest($31), unnest($32), unnest($33), $34 from unchanged
         ), decision as (
             insert into payment (order_id, user_id, amount, status, failure_reason, result_event_id, event_id, source, topic,
                                  partition, log_offset, sent_at, published_at, received_at, traceparent, decided_at)
             select unnest($12), unnest($13), unnest($14), unnest($15), unnest($16), unnest($17), unnest($18), unnest($19), $20,
                    unnest($21), unnest($22), unnest($23), unnest($24), unnest($25), unnest($26), $27
               from unchanged
         )
         insert into ",
        " (event_id, topic, key, event_type, source, traceparent, request_id, created_at,
           event_ids, keys, payloads, traceparents, request_ids, created_ats)
         select $1[f], $2, '', $5, $6, '', '', $9[f], $1[f:t], $3[f:t], $4[f:t], $7[f:t], $8[f:t], $9[f:t]
           from unchanged, (select unnest($10) as f, unnest($11) as t) one"
    ));
    let statement = outbox::bind_alike(statement, &effects.messages);
    let statement = store::bind_payments(statement, &effects.records, ORDER_PAYMENT_REQUESTS, at);
    let statement = store::bind_entries(statement, &effects.entries, at)
        .bind::<Array<BigInt>, _>(moved.iter().map(|(stood, _)| stood.id).collect::<Vec<_>>())
        .bind::<Array<BigInt>, _>(moved.iter().map(|(stood, _)| stood.balance).collect::<Vec<_>>())
        .bind::<Array<Timestamptz>, _>(moved.iter().map(|(stood, _)| stood.updated_at).collect::<Vec<_>>())
        .bind::<Array<BigInt>, _>(moved.iter().map(|(_, balance)| *balance).collect::<Vec<_>>());
    fence.bind(statement).execute(&mut conn).await?;
    Ok(())
}
