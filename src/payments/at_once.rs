//! A few requests, decided over how their accounts stood when they were last seen, and written in one statement where they still do: one
//! round trip, and no lock is held before it. More of them, orders that are decided already, and what loses the race against a deposit
//! go by the transaction of [`super::on_order`].

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use diesel::QueryableByName;
use diesel::sql_types::{Array, BigInt, Timestamptz};
use diesel_async::RunQueryDsl;

use crate::contracts::{ORDER_PAYMENT_REQUESTS, PaymentRequested};
use crate::db::{Conn, DbError, Notifier, sql};
use crate::messaging::{Fence, Received, outbox};
use crate::user_id::UserId;

use super::decide::Held;
use super::known::{Known, Stood};
use super::on_order::{Effects, effects};
use super::store;

/// Of more the server can write one piece while the next one is made.
const REQUESTS_MAX: usize = 64;

/// Decides a batch and commits it with its offsets; `false` where it is too large for that. Others are told behind the commit.
///
/// An account that is debited must stand as it was seen. One whose orders are all refused may get a deposit meanwhile: that is as if it came
/// after the decision. But nothing is refused for what was seen some time ago.
///
/// # Errors
/// [`DbError::Fenced`] where the batch is another's by now, [`DbError::Unavailable`] where an account has moved, [`DbError::Duplicate`] where
/// an order is decided already; nothing is written then.
pub async fn apply(
    conn: &Conn,
    notifier: &Notifier,
    known: &Known,
    fence: &Fence<'_>,
    batch: &[Received<PaymentRequested>],
) -> Result<bool, DbError> {
    if batch.len() > REQUESTS_MAX {
        return Ok(false);
    }
    let users: HashSet<&UserId> = batch.iter().map(|request| &request.event.user_id).collect();
    let believed = known.all(users.iter().copied()).map(|seen| Plan::over(seen, batch)).filter(Plan::pays_all);
    let plan = match believed {
        Some(plan) => plan,
        None => {
            let names: Vec<&str> = users.iter().map(|user| user.as_str()).collect();
            Plan::over(store::look(conn, &names).await?, batch)
        }
    };
    match notifier.committing(conn, batch.len(), plan.write(conn, fence)).await {
        Ok(at) => known.learn(plan.outcome(at)),
        Err(error) => {
            known.forget(users);
            return Err(error);
        }
    }
    Ok(true)
}

/// What a batch comes to.
struct Plan<'b> {
    seen: HashMap<i64, (UserId, Stood)>,
    /// The last entry of any of these accounts is no younger.
    since: DateTime<Utc>,
    effects: Effects<'b>,
}

impl<'b> Plan<'b> {
    fn over(seen: Vec<(UserId, Stood)>, batch: &'b [Received<PaymentRequested>]) -> Self {
        let held = |(user, stood): &(UserId, Stood)| (user.clone(), Held { id: stood.id, balance: stood.balance });
        // Its own time it gets when it is written.
        let since = seen.iter().map(|(_, stood)| stood.updated_at).max().unwrap_or(DateTime::UNIX_EPOCH);
        let effects = effects(batch, &HashMap::new(), &mut seen.iter().map(held).collect(), since);
        Self { seen: seen.into_iter().map(|(user, stood)| (stood.id, (user, stood))).collect(), since, effects }
    }

    /// The accounts once it is written, at this time.
    fn outcome(&self, at: DateTime<Utc>) -> impl Iterator<Item = (UserId, Stood)> + '_ {
        let moved: HashMap<i64, i64> = self.effects.moved.iter().map(|held| (held.id, held.balance)).collect();
        self.seen.values().map(move |(user, stood)| {
            let moved = moved.get(&stood.id).map(|balance| Stood { id: stood.id, balance: *balance, updated_at: at });
            (user.clone(), moved.unwrap_or(*stood))
        })
    }

    /// The fence first, then the accounts in the order of their ids, as every writer of them does; the ledger's lines get their ids only when
    /// those are locked. Returns the time of all that was written: the server's, but not before any of these accounts' last entry; those that
    /// are bound with the decisions ($27) and the messages ($9) are not used.
    async fn write(&self, mut conn: &Conn, fence: &Fence<'_>) -> Result<DateTime<Utc>, DbError> {
        let Self { effects, since, .. } = self;
        let before = |held: &Held| self.seen.get(&held.id).map(|(_, stood)| (*stood, held.balance));
        let mut moved: Vec<(Stood, i64)> = effects.moved.iter().filter_map(before).collect();
        moved.sort_unstable_by_key(|(stood, _)| stood.id);
        let statement = sql(outbox::in_segment!(
            "with fence as materialized (
                 select advance_offsets($39, $40, $41, $42, $43, $44), greatest($34, clock_timestamp()) as at
             ), moved as (
                 update account a set balance = m.balance, updated_at = fence.at
                   from fence, (select unnest($35) as id, unnest($36) as stood, unnest($37) as stood_at, unnest($38) as balance) m
                  where a.id = any(array[m.id]) and a.balance = m.stood and a.updated_at = m.stood_at
              returning 1
             ), unchanged as materialized (
                 select expect_unchanged((select count(*) from moved), cardinality($35)), at from fence
             ), entry as (
                 insert into transfer (account_id, from_account, to_account, amount, order_id, balance_after, created_at)
                 select unnest($28), unnest($29), unnest($30), unnest($31), unnest($32), unnest($33), at from unchanged
             ), decision as (
                 insert into payment (order_id, user_id, amount, status, failure_reason, result_event_id, event_id, source, topic,
                                      partition, log_offset, sent_at, published_at, received_at, traceparent, decided_at)
                 select unnest($12), unnest($13), unnest($14), unnest($15), unnest($16), unnest($17), unnest($18), unnest($19), $20,
                        unnest($21), unnest($22), unnest($23), unnest($24), unnest($25), unnest($26), at
                   from unchanged
             )
             insert into ",
            " (event_id, topic, key, event_type, source, traceparent, request_id, created_at,
               event_ids, keys, payloads, traceparents, request_ids, created_ats)
             select $1[f], $2, '', $5, $6, '', '', at, $1[f:t], $3[f:t], $4[f:t], $7[f:t], $8[f:t],
                    array_fill(at, array[t - f + 1])
               from unchanged, (select unnest($10) as f, unnest($11) as t) one
             returning created_at"
        ));
        let statement = outbox::bind_alike(statement, &effects.messages);
        let statement = store::bind_payments(statement, &effects.records, ORDER_PAYMENT_REQUESTS, *since);
        let statement = store::bind_entries(statement, &effects.entries, *since)
            .bind::<Array<BigInt>, _>(moved.iter().map(|(stood, _)| stood.id).collect::<Vec<_>>())
            .bind::<Array<BigInt>, _>(moved.iter().map(|(stood, _)| stood.balance).collect::<Vec<_>>())
            .bind::<Array<Timestamptz>, _>(moved.iter().map(|(stood, _)| stood.updated_at).collect::<Vec<_>>())
            .bind::<Array<BigInt>, _>(moved.iter().map(|(_, balance)| *balance).collect::<Vec<_>>());
        let rows: Vec<WrittenRow> = fence.bind(statement).load(&mut conn).await?;
        rows.into_iter().next().map(|row| row.created_at).ok_or_else(|| DbError::Defect("a batch without a result".into()))
    }

    fn pays_all(&self) -> bool {
        self.effects.records.iter().all(|record| record.failure_reason.is_none())
    }
}

#[derive(QueryableByName)]
struct WrittenRow {
    #[diesel(sql_type = Timestamptz)]
    created_at: DateTime<Utc>,
}
