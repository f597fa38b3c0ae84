//! What the services do with a batch: real decoding and real rules, over model tables.

use std::collections::{BTreeSet, HashMap};

use async_trait::async_trait;
use chrono::DateTime;
use shopd::contracts::{PaymentRequested, PaymentStatusUpdated};
use shopd::db::DbError;
use shopd::messaging::{Poison, Received};
use shopd::orders::rules::{Ending, settle};
use shopd::payments::rules::{Accounts, Decided, Effects, Held, effects};
use shopd::user_id::UserId;
use uuid::Uuid;

use crate::inbox::Effect;
use crate::kafka::LANDED;
use crate::postgres::{Key, Postgres, Tx};
use crate::tables::{PaymentRow, Tables, TransferRow};
use crate::world::{Guard, World};

/// `payments`: real decisions over model tables.
pub struct Pays;

#[async_trait]
impl Effect for Pays {
    type Event = PaymentRequested;

    fn decode(value: &[u8]) -> Result<PaymentRequested, Poison> {
        PaymentRequested::decode(value).map_err(|error| Poison(error.to_string()))
    }

    async fn apply(tx: &mut Tx, batch: &[Received<PaymentRequested>]) -> Result<(), DbError> {
        tx.arrive().await?;
        let decided = decided(&tx.db, batch);
        let locked = lock_accounts(tx, batch).await;
        let mut accounts = tx.answer(locked).await?;
        let effects = effects(batch, &decided, &mut accounts, DateTime::UNIX_EPOCH);
        tx.arrive().await?;
        let written = write(tx, &effects).await;
        tx.answer(written).await
    }
}

fn decided(db: &Postgres, batch: &[Received<PaymentRequested>]) -> HashMap<Uuid, Decided> {
    let state = db.state();
    let known = |received: &Received<PaymentRequested>| {
        let order = received.event.order_id;
        let row = state.tables.payments.get(&order)?;
        let forgotten =
            !db.world.holds(Guard::KnownDecisions) || (!db.world.holds(Guard::FinalDecision) && row.status == "Cancelled");
        if forgotten {
            return None;
        }
        let result_event_id = if db.world.holds(Guard::ResultEventId) { row.result_event_id } else { Uuid::now_v7() };
        let (status, failure_reason) = (row.status.clone(), row.failure_reason.clone());
        Some((order, Decided { status, failure_reason, result_event_id }))
    };
    batch.iter().filter_map(known).collect()
}

async fn lock_accounts(tx: &mut Tx, batch: &[Received<PaymentRequested>]) -> Result<Accounts, DbError> {
    let users: BTreeSet<&str> = batch.iter().map(|received| received.event.user_id.as_str()).collect();
    let mut ids: Vec<(i64, &str)> = {
        let state = tx.db.state();
        users.iter().filter_map(|user| Some((state.tables.accounts.get(*user)?.id, *user))).collect()
    };
    ids.sort_unstable();
    let mut accounts = Accounts::default();
    for (id, user) in ids {
        tx.lock(Key::Account(user.to_owned())).await?;
        let balance = tx.db.state().tables.accounts[user].balance;
        accounts.insert(UserId::new(user).expect("a user of the plan's"), Held { id, balance });
    }
    Ok(accounts)
}

async fn write(tx: &mut Tx, effects: &Effects<'_>) -> Result<(), DbError> {
    let world = tx.db.world.clone();
    let mut orders: Vec<Uuid> = effects.records.iter().map(|record| record.request.event.order_id).collect();
    orders.sort_unstable();
    for order in orders {
        tx.lock(Key::Payment(order.as_u128())).await?;
        let taken = tx.db.state().tables.payments.contains_key(&order);
        if taken && world.holds(Guard::UniqueDebit) && world.holds(Guard::FinalDecision) {
            world.tell(0, "decided by somebody else", [short(order), 0, 0]);
            return Err(DbError::Duplicate("payment_pkey".into()));
        }
    }
    for record in &effects.records {
        let event = &record.request.event;
        let headers = &record.request.delivery.headers;
        let landed: i64 = headers.get(LANDED).and_then(|n| std::str::from_utf8(n).ok()?.parse().ok()).unwrap_or_default();
        let (order, user) = (event.order_id, event.user_id.as_str().to_owned());
        let row = PaymentRow {
            user: user.clone(),
            amount: event.amount.minor(),
            status: record.status.into(),
            failure_reason: record.failure_reason.map(String::from),
            result_event_id: record.result_event_id,
            source: record.request.delivery.envelope.source.clone(),
        };
        world.tell(0, "decided; paid", [short(order), i64::from(record.status == "Finished"), landed]);
        let world = world.clone();
        tx.write(move |tables| decision(&world, tables, order, row, landed));
    }
    for entry in effects.entries.clone() {
        let world = world.clone();
        let record = effects.records.iter().find(|record| Some(record.request.event.order_id) == entry.order_id);
        let user = record.map_or_else(String::new, |record| record.request.event.user_id.as_str().to_owned());
        tx.write(move |tables| {
            let order = entry.order_id;
            post(&world, tables, TransferRow { user, amount: -entry.amount, order, balance_after: entry.balance_after, key: None });
        });
    }
    let results: Vec<(Uuid, Uuid)> = effects.messages.iter().filter_map(|m| Some((m.key.parse().ok()?, m.event_id))).collect();
    tx.append(effects.messages.clone())?;
    tx.write(move |tables| {
        for (order, event) in results {
            let ids = tables.results.entry(order).or_default();
            ids.insert(event);
            world.check(ids.len() == 1, || format!("S14: order {}'s results carry {} event ids", short(order), ids.len()));
        }
    });
    Ok(())
}

fn decision(world: &World, tables: &mut Tables, order: Uuid, row: PaymentRow, landed: i64) {
    let user = row.user.clone();
    if let Some(before) = tables.payments.insert(order, row) {
        return world.violated(|| match before.status.as_str() {
            "Cancelled" => format!("S7: order {}'s decision is taken anew", short(order)),
            _ => format!("S3: order {} is decided twice", short(order)),
        });
    }
    let last = tables.decided_last.entry(user.clone()).or_default();
    world.check(landed > *last, || format!("S8: {user}'s request {landed} is decided after {last}"));
    *last = landed;
}

/// A line of the ledger, with the balance that it leaves.
pub fn post(world: &World, tables: &mut Tables, line: TransferRow) {
    if let Some(account) = tables.accounts.get_mut(&line.user) {
        let (user, follows) = (line.user.clone(), account.balance + line.amount);
        world.check(follows == line.balance_after, || {
            format!("S8: {user}'s balance {} does not follow from the line before", line.balance_after)
        });
        world.check(line.balance_after >= 0, || format!("S2: {user}'s balance is negative"));
        account.balance = line.balance_after;
    }
    match line.order {
        Some(order) => {
            tables.paid -= line.amount;
            let debits = tables.debits.entry(order).or_default();
            debits.push(line.clone());
            world.check(debits.len() == 1, || format!("S3: order {} is debited {} times", short(order), debits.len()));
        }
        None => tables.deposited += line.amount,
    }
    tables.transfers.push(line);
}

/// The number of an order of the plan's.
pub fn short(order: Uuid) -> i64 {
    order.as_u128() as i64
}

/// `orders`: the real choice of results over model tables.
pub struct Ends;

#[async_trait]
impl Effect for Ends {
    type Event = PaymentStatusUpdated;

    fn decode(value: &[u8]) -> Result<PaymentStatusUpdated, Poison> {
        PaymentStatusUpdated::decode(value).map_err(|error| Poison(error.to_string()))
    }

    async fn apply(tx: &mut Tx, batch: &[Received<PaymentStatusUpdated>]) -> Result<(), DbError> {
        let mut endings = settle(batch);
        endings.sort_by_key(|ending| ending.order_id);
        tx.arrive().await?;
        let ended = end(tx, endings).await;
        tx.answer(ended).await
    }
}

async fn end(tx: &mut Tx, endings: Vec<Ending>) -> Result<(), DbError> {
    for ending in endings {
        let order = ending.order_id;
        tx.lock(Key::Order(order.as_u128())).await?;
        let status = tx.db.state().tables.orders.get(&order).map(|row| row.status);
        let Some(status) = status else { continue };
        if status.is_final() {
            tx.db.world.tell(0, "result comes too late", [short(order), 0, 0]);
        }
        if status.is_final() && tx.db.world.holds(Guard::OrderStatus) {
            continue;
        }
        tx.xid()?;
        let world = tx.db.world.clone();
        tx.write(move |tables| {
            let Some(row) = tables.orders.get_mut(&order) else { return };
            let (from, to) = (row.status, ending.status);
            world.check(!from.is_final() || from == to, || format!("S5: order {} goes from {from:?} to {to:?}", short(order)));
            world.tell(0, "order ends; finished", [short(order), i64::from(to == shopd::orders::OrderStatus::Finished), 0]);
            row.status = to;
            row.ended_by = ending.envelope.source;
        });
    }
    Ok(())
}
