//! The statements over `account`, `transfer` and `payment`: one named function each.

use std::borrow::Cow;
use std::collections::HashMap;

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::contracts::PaymentRequested;
use crate::db::{Binds, Conn, DbError, Sql, sql};
use crate::messaging::Received;
use crate::money::Minor;
use crate::user_id::UserId;

use super::TransactionPage;
use super::account::{Account, Transaction, TransactionKind};
use super::decide::{Accounts, Held};
use super::known::Stood;
use super::schema::{account, payment, transfer};

/// The world that deposits come from, and the shop that payments go to; see the migration.
const WORLD: i64 = 0;
const SHOP: i64 = -1;

#[derive(QueryableByName)]
struct OpenedRow {
    #[diesel(sql_type = BigInt)]
    id: i64,
    #[diesel(sql_type = Text)]
    user_id: String,
}

/// Opens an account for each of these users who has none; the ids of those opened. Users go in sorted, so that two writers never
/// wait in a circle; those known are left out before, so that a refused request uses up no id.
pub async fn open(conn: &mut Conn, users: &[&str]) -> Result<HashMap<String, i64>, DbError> {
    let rows: Vec<OpenedRow> = sql("insert into account (user_id)
         select g.user_id from (select unnest($1) as user_id) g
          where (select a.id from account a where a.user_id = g.user_id) is null
          order by g.user_id
         on conflict do nothing
         returning id, user_id")
    .bind::<Array<Text>, _>(users)
    .load(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.user_id, row.id)).collect())
}

pub async fn find(conn: &mut Conn, user: &UserId) -> Result<Option<Account>, DbError> {
    let row: Option<(i64, i64)> = account::table
        .filter(account::user_id.eq(user.as_str()))
        .select((account::id, account::balance))
        .get_result(conn)
        .await
        .optional()?;
    Ok(row.map(|(id, balance)| Account { id, user_id: user.clone(), balance: Minor(balance) }))
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = transfer, check_for_backend(diesel::pg::Pg))]
struct TransferRow {
    id: i64,
    amount: i64,
    order_id: Option<Uuid>,
    balance_after: i64,
    created_at: DateTime<Utc>,
}

impl From<TransferRow> for Transaction {
    fn from(row: TransferRow) -> Self {
        let (kind, amount) = match row.order_id {
            Some(_) => (TransactionKind::Payment, -row.amount),
            None => (TransactionKind::Deposit, row.amount),
        };
        let (amount, balance_after) = (Minor(amount), Minor(row.balance_after));
        Self { id: row.id, kind, amount, balance_after, order_id: row.order_id, created_at: row.created_at }
    }
}

/// One page of an account's ledger, newest first.
pub async fn transactions(conn: &mut Conn, account: i64, limit: i64, before: Option<i64>) -> Result<TransactionPage, DbError> {
    let rows: Vec<TransferRow> = transfer::table
        .filter(transfer::account_id.eq(account))
        .filter(transfer::id.lt(before.unwrap_or(i64::MAX)))
        .order(transfer::id.desc())
        .limit(limit + 1)
        .select(TransferRow::as_select())
        .load(conn)
        .await?;
    let more = rows.len() as i64 > limit;
    let transactions: Vec<_> = rows.into_iter().take(limit as usize).map(Transaction::from).collect();
    let next = transactions.last().filter(|_| more).map(|last| last.id);
    Ok(TransactionPage { transactions, next })
}

#[derive(QueryableByName)]
struct HeldRow {
    #[diesel(sql_type = BigInt)]
    id: i64,
    #[diesel(sql_type = Text)]
    user_id: String,
    #[diesel(sql_type = BigInt)]
    balance: i64,
    #[diesel(sql_type = Timestamptz)]
    now: DateTime<Utc>,
}

/// The users' accounts, locked until the transaction ends, and a time for what is written now: the server's, but not before
/// any of these accounts' last entry, so that a ledger's times never go backwards.
///
/// Locked in the order of their ids: two transactions over the same accounts meet at the first one and cannot wait for each
/// other in a circle.
///
/// By `id + 0`, in whose order no index is: by one that is, a plan made over a few accounts reads all of them (ADR 5).
pub async fn lock(mut conn: &Conn, users: &[&str]) -> Result<(Accounts, DateTime<Utc>), DbError> {
    let rows: Vec<HeldRow> = sql("select id, user_id, balance, greatest(updated_at, clock_timestamp()) as now
           from (select id, user_id, balance, updated_at from account where user_id = any($1) order by id + 0 for update) held")
    .bind::<Array<Text>, _>(users)
    .load(&mut conn)
    .await?;
    let now = rows.iter().map(|row| row.now).max().unwrap_or_else(Utc::now);
    let held = rows.into_iter().map(|row| Ok((user_id(row.id, row.user_id)?, Held { id: row.id, balance: row.balance })));
    Ok((held.collect::<Result<_, DbError>>()?, now))
}

/// How these users' accounts stand; they may move at any time.
pub async fn look(mut conn: &Conn, users: &[&str]) -> Result<Vec<(UserId, Stood)>, DbError> {
    let rows: Vec<(i64, String, i64, DateTime<Utc>)> = account::table
        .filter(account::user_id.eq_any(users))
        .select((account::id, account::user_id, account::balance, account::updated_at))
        .load(&mut conn)
        .await?;
    let stood = rows.into_iter().map(|(id, user, balance, updated_at)| Ok((user_id(id, user)?, Stood { id, balance, updated_at })));
    stood.collect()
}

fn user_id(account: i64, name: String) -> Result<UserId, DbError> {
    UserId::new(name).map_err(|error| DbError::Defect(format!("account {account}: {error}")))
}

/// A decision that was taken before.
#[derive(Clone, Debug)]
pub struct Decided {
    pub status: String,
    pub failure_reason: Option<String>,
    pub result_event_id: Uuid,
}

/// Which of these orders are decided.
pub async fn decided(mut conn: &Conn, orders: &[Uuid]) -> Result<HashMap<Uuid, Decided>, DbError> {
    let rows: Vec<(Uuid, String, Option<String>, Uuid)> = payment::table
        .filter(payment::order_id.eq_any(orders))
        .select((payment::order_id, payment::status, payment::failure_reason, payment::result_event_id))
        .load(&mut conn)
        .await?;
    let decided = rows
        .into_iter()
        .map(|(order, status, failure_reason, result_event_id)| (order, Decided { status, failure_reason, result_event_id }));
    Ok(decided.collect())
}

/// Writes the balances of accounts that moved; they must be locked.
pub async fn set_balances(mut conn: &Conn, moved: &[Held], at: DateTime<Utc>) -> Result<(), DbError> {
    if moved.is_empty() {
        return Ok(());
    }
    sql("update account a set balance = m.balance, updated_at = $3
           from (select unnest($1) as id, unnest($2) as balance) m where a.id = any(array[m.id])")
    .bind::<Array<BigInt>, _>(moved.iter().map(|m| m.id).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(moved.iter().map(|m| m.balance).collect::<Vec<_>>())
    .bind::<Timestamptz, _>(at)
    .execute(&mut conn)
    .await?;
    Ok(())
}

/// One line of the ledger: a deposit where it has no order, else a payment. Minor units.
#[derive(Clone, Debug)]
pub struct Entry {
    pub account_id: i64,
    pub amount: i64,
    pub order_id: Option<Uuid>,
    pub balance_after: i64,
}

/// Writes the lines in the order in which they happened.
pub async fn write_entries(mut conn: &Conn, entries: &[Entry], at: DateTime<Utc>) -> Result<(), DbError> {
    if entries.is_empty() {
        return Ok(());
    }
    let statement = sql("insert into transfer (account_id, from_account, to_account, amount, order_id, balance_after, created_at)
         select unnest($1), unnest($2), unnest($3), unnest($4), unnest($5), unnest($6), $7");
    bind_entries(statement, entries, at).execute(&mut conn).await?;
    Ok(())
}

/// The next seven binds: accounts, from, to, amounts, orders, balances, and the time.
pub(super) fn bind_entries<B: Binds + Send>(
    statement: Sql<B>,
    entries: &[Entry],
    at: DateTime<Utc>,
) -> Sql<impl Binds + Send + use<B>> {
    let from = |e: &Entry| if e.order_id.is_some() { e.account_id } else { WORLD };
    let to = |e: &Entry| if e.order_id.is_some() { SHOP } else { e.account_id };
    statement
        .bind::<Array<BigInt>, _>(entries.iter().map(|e| e.account_id).collect::<Vec<_>>())
        .bind::<Array<BigInt>, _>(entries.iter().map(from).collect::<Vec<_>>())
        .bind::<Array<BigInt>, _>(entries.iter().map(to).collect::<Vec<_>>())
        .bind::<Array<BigInt>, _>(entries.iter().map(|e| e.amount).collect::<Vec<_>>())
        .bind::<Array<Nullable<SqlUuid>>, _>(entries.iter().map(|e| e.order_id).collect::<Vec<_>>())
        .bind::<Array<BigInt>, _>(entries.iter().map(|e| e.balance_after).collect::<Vec<_>>())
        .bind::<Timestamptz, _>(at)
}

/// A decision with its request, as it is written.
pub struct Record<'r> {
    pub request: &'r Received<PaymentRequested>,
    pub status: &'static str,
    pub failure_reason: Option<&'static str>,
    pub result_event_id: Uuid,
}

impl Record<'_> {
    /// The request's event id; a record of another producer without our headers goes by its order id.
    pub fn event_id(&self) -> Cow<'_, str> {
        match &self.request.delivery.envelope.event_id {
            Some(id) => id.into(),
            None => self.request.event.order_id.to_string().into(),
        }
    }
}

/// Writes the decisions, by order id, with where their requests came from.
pub async fn write_payments(mut conn: &Conn, records: &[Record<'_>], topic: &str, at: DateTime<Utc>) -> Result<(), DbError> {
    let statement =
        sql("insert into payment (order_id, user_id, amount, status, failure_reason, result_event_id, event_id, source, topic,
                              partition, log_offset, sent_at, published_at, received_at, traceparent, decided_at)
         select unnest($1), unnest($2), unnest($3), unnest($4), unnest($5), unnest($6), unnest($7), unnest($8), $9,
                unnest($10), unnest($11), unnest($12), unnest($13), unnest($14), unnest($15), $16");
    bind_payments(statement, records, topic, at).execute(&mut conn).await?;
    Ok(())
}

/// The next sixteen binds: the columns of `payment` in the order in which [`write_payments`] names them, by order id. They are sorted here: the
/// server would make a copy of each row for that (0.25 of 2.1 us).
pub(super) fn bind_payments<'r, B: Binds + Send>(
    statement: Sql<B>,
    records: &'r [Record<'r>],
    topic: &'r str,
    at: DateTime<Utc>,
) -> Sql<impl Binds + Send + use<'r, B>> {
    fn column<'r, T>(records: &[&'r Record<'r>], field: impl Fn(&'r Record<'r>) -> T) -> Vec<T> {
        records.iter().copied().map(field).collect()
    }
    let mut records: Vec<&Record> = records.iter().collect();
    records.sort_unstable_by_key(|record| record.request.event.order_id);
    let records = &*records;
    statement
        .bind::<Array<SqlUuid>, _>(column(records, |r| r.request.event.order_id))
        .bind::<Array<Text>, _>(column(records, |r| r.request.event.user_id.as_str()))
        .bind::<Array<BigInt>, _>(column(records, |r| r.request.event.amount.minor()))
        .bind::<Array<Text>, _>(column(records, |r| r.status))
        .bind::<Array<Nullable<Text>>, _>(column(records, |r| r.failure_reason))
        .bind::<Array<SqlUuid>, _>(column(records, |r| r.result_event_id))
        .bind::<Array<Text>, _>(column(records, |r| r.event_id()))
        .bind::<Array<Nullable<Text>>, _>(column(records, |r| r.request.delivery.envelope.source.as_deref()))
        .bind::<Text, _>(topic)
        .bind::<Array<Integer>, _>(column(records, |r| r.request.delivery.position.partition))
        .bind::<Array<BigInt>, _>(column(records, |r| r.request.delivery.position.offset))
        .bind::<Array<Nullable<Timestamptz>>, _>(column(records, |r| r.request.delivery.envelope.time))
        .bind::<Array<Timestamptz>, _>(column(records, |r| r.request.delivery.published_at))
        .bind::<Array<Timestamptz>, _>(column(records, |r| r.request.delivery.received_at))
        .bind::<Array<Nullable<Text>>, _>(column(records, |r| r.request.delivery.envelope.trace.map(|trace| trace.traceparent())))
        .bind::<Timestamptz, _>(at)
}
