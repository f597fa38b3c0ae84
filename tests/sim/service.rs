//! What takes requests in: models of the intake and the deposits. The group commit is the real one.

use chrono::DateTime;
use futures::FutureExt;
use shopd::contracts::{ORDER_PAYMENT_REQUESTS, PaymentRequested};
use shopd::db::{DbError, GroupCommit};
use shopd::messaging::Message;
use shopd::money::Amount;
use shopd::orders::OrderStatus;
use shopd::user_id::UserId;
use tokio::runtime::Handle;
use uuid::Uuid;

use crate::effects::{post, short};
use crate::postgres::{Key, Postgres, Tx};
use crate::tables::{KeptAnswer, OrderRow, TransferRow};
use crate::world::{Guard, Process};

pub const ORDERS_SOURCE: &str = "/shopd/orders";

#[derive(Clone, Debug)]
pub struct Place {
    pub order: Uuid,
    pub user: String,
    pub amount: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    Accepted,
    Conflict,
}

pub type Intake = GroupCommit<Place, Result<Placed, DbError>>;

pub fn intake(db: Postgres, process: Process) -> Intake {
    GroupCommit::start(&Handle::current(), "orders", move |requests: Vec<Place>| {
        let (db, process) = (db.clone(), process.clone());
        async move {
            match place_together(&db, &process, &requests).await {
                Ok(answers) => answers.into_iter().map(Ok).collect(),
                Err(error) => requests.iter().map(|_| Err(error.clone())).collect(),
            }
        }
        .boxed()
    })
}

pub fn request(order: Uuid, user: &str, amount: i64) -> Message {
    let event = PaymentRequested {
        order_id: order,
        user_id: UserId::new(user).expect("a user of the plan's"),
        amount: Amount::from_minor(amount).expect("an amount of the plan's"),
        description: None,
        timestamp: DateTime::UNIX_EPOCH,
    };
    Message {
        event_id: Uuid::now_v7(),
        topic: ORDER_PAYMENT_REQUESTS,
        key: user.into(),
        payload: event.encode(),
        kind: PaymentRequested::TYPE,
        source: ORDERS_SOURCE,
        traceparent: String::new(),
        request_id: String::new(),
        created_at: DateTime::UNIX_EPOCH,
    }
}

/// One statement: the orders that are not there yet, each with its request (S6); the others are answered by what is there.
async fn place_together(db: &Postgres, process: &Process, requests: &[Place]) -> Result<Vec<Placed>, DbError> {
    let mut tx = db.begin(process).await?;
    let placed = insert(&mut tx, requests).await;
    tx.answer(placed).await?;
    tx.commit().await?;
    db.notify();
    db.statement(process, |state| {
        let answer = |request: &Place| match state.tables.orders.get(&request.order) {
            Some(row) if row.user == request.user && row.amount == request.amount => Placed::Accepted,
            _ => Placed::Conflict,
        };
        Ok(requests.iter().map(answer).collect())
    })
    .await
}

async fn insert(tx: &mut Tx, requests: &[Place]) -> Result<(), DbError> {
    let mut firsts: Vec<&Place> = Vec::new();
    for request in requests {
        if !firsts.iter().any(|first| first.order == request.order) {
            firsts.push(request);
        }
    }
    let mut by_id: Vec<Uuid> = firsts.iter().map(|first| first.order).collect();
    by_id.sort_unstable();
    for order in by_id {
        tx.lock(Key::Order(order.as_u128())).await?;
    }
    let created_ms = tx.db.world.now_ms();
    for Place { order, user, amount } in firsts.into_iter().cloned() {
        if tx.db.state().tables.orders.contains_key(&order) {
            continue;
        }
        let asked = tx.append(vec![request(order, &user, amount)])?;
        tx.db.world.tell(0, "order accepted; xid, id", [short(order), asked.0 as i64, asked.1]);
        let row = OrderRow { user, amount, status: OrderStatus::New, ended_by: None, created_ms, xid: asked.0 };
        tx.write(move |tables| {
            tables.orders.insert(order, row);
        });
    }
    Ok(())
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Deposited {
    /// With the balance afterwards.
    Done(i64),
    Mismatch,
    NoAccount,
}

/// One transaction: the key's row and the effect, or neither.
pub async fn deposit(db: &Postgres, process: &Process, key: u64, user: &str, amount: i64) -> Result<Deposited, DbError> {
    let mut tx = db.begin(process).await?;
    // Found by trying, never by waiting on the index.
    if db.state().is_locked(&Key::Answer(key)) {
        tx.abort();
        return Err(DbError::Unavailable("the key is in progress".into()));
    }
    let prepared = prepare(&mut tx, key, user).await;
    let (kept, balance) = tx.answer(prepared).await?;
    if let Some(kept) = kept {
        tx.abort();
        let same = kept.user == user && kept.amount == amount;
        return Ok(if same { Deposited::Done(kept.balance) } else { Deposited::Mismatch });
    }
    let Some(balance) = balance else {
        tx.abort();
        return Ok(Deposited::NoAccount);
    };
    tx.arrive().await?;
    let after = balance + amount;
    let written = tx.xid().map(drop);
    tx.answer(written).await?;
    let (world, user) = (db.world.clone(), user.to_owned());
    tx.write(move |tables| {
        world.tell(0, "deposit; key, amount", [key as i64, amount, after]);
        tables.answers.insert(key, KeptAnswer { user: user.clone(), amount, balance: after });
        post(&world, tables, TransferRow { user, amount, order: None, balance_after: after, key: Some(key) });
    });
    tx.commit().await?;
    Ok(Deposited::Done(after))
}

async fn prepare(tx: &mut Tx, key: u64, user: &str) -> Result<(Option<KeptAnswer>, Option<i64>), DbError> {
    tx.lock(Key::Answer(key)).await?;
    let kept = tx.db.state().tables.answers.get(&key).cloned();
    if kept.is_some() && tx.db.world.holds(Guard::IdempotencyRow) {
        return Ok((kept, None));
    }
    tx.lock(Key::Account(user.to_owned())).await?;
    let balance = tx.db.state().tables.accounts.get(user).map(|account| account.balance);
    Ok((None, balance))
}
