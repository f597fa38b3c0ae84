//! A consumer's database behind the consumer's own seam: offsets, leases, and the one transaction of a batch.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chrono::DateTime;
use shopd::contracts::{PaymentRequested, PaymentStatusUpdated};
use shopd::db::DbError;
use shopd::messaging::consumer::{Batch, Inbox, Owned, Standing};
use shopd::messaging::{Delivery, Poison, Received};
use shopd::orders::rules::{Ending, settle};
use shopd::payments::rules::{Accounts, Decided, Effects, Held, effects};
use shopd::user_id::UserId;
use uuid::Uuid;

use crate::kafka::LANDED;
use crate::postgres::{Key, Postgres, Tx};
use crate::tables::{OffsetRow, PaymentRow, Tables, TransferRow};
use crate::world::{Guard, Process, World};

/// As the real transaction does after losing a race.
const ATTEMPTS_MAX: usize = 3;

/// What a service does with a batch, in the batch's transaction.
#[async_trait]
pub trait Effect: Send + Sync + 'static {
    type Event: Clone + Send + Sync + 'static;

    fn decode(value: &[u8]) -> Result<Self::Event, Poison>;

    async fn apply(tx: &mut Tx, batch: &[Received<Self::Event>]) -> Result<(), DbError>;
}

/// One replica's view of its consumer's database.
pub struct ProcessInbox<E> {
    pub db: Postgres,
    pub process: Process,
    pub lease: Duration,
    pub effect: std::marker::PhantomData<E>,
}

#[async_trait]
impl<E: Effect> Inbox for ProcessInbox<E> {
    type Event = E::Event;

    fn decode(&self, delivery: &Delivery) -> Result<E::Event, Poison> {
        E::decode(delivery.value.as_deref().unwrap_or_default())
    }

    async fn ensure(&self, partitions: i32) -> Result<(), DbError> {
        self.db
            .statement(&self.process, |state| {
                for partition in 0..partitions {
                    state.tables.offsets.entry(partition).or_default();
                }
                Ok(())
            })
            .await
    }

    async fn heartbeat(&self) -> Result<Standing, DbError> {
        let now = self.db.world.now_ms();
        let (me, until) = (self.process.name(), now + self.lease.as_millis() as u64);
        self.db
            .statement(&self.process, |state| {
                state.tables.members.insert(me.to_owned(), until);
                let mut owned = Vec::new();
                let locked: Vec<i32> = state.tables.offsets.keys().copied().filter(|n| state.is_locked(&Key::Offset(*n))).collect();
                for (partition, row) in &mut state.tables.offsets {
                    if row.owner.as_deref() != Some(me) {
                        continue;
                    }
                    owned.push(Owned { partition: *partition, next_offset: row.next_offset, epoch: row.epoch });
                    if !locked.contains(partition) {
                        row.lease_until_ms = until;
                    }
                }
                let count = |which: &dyn Fn(&str) -> bool| {
                    state.tables.members.iter().filter(|(name, until)| **until >= now && which(name)).count()
                };
                let standing = Standing { owned, members: count(&|name| name != me) + 1, rank: count(&|name| name < me) };
                state.autocommit();
                Ok(standing)
            })
            .await
    }

    async fn acquire(&self, partitions: i32, at_most: usize) -> Result<Vec<Owned>, DbError> {
        let now = self.db.world.now_ms();
        let me = self.process.name();
        let acquired = self
            .db
            .statement(&self.process, |state| {
                let free = |partition: &i32, row: &OffsetRow| {
                    *partition < partitions
                        && (row.owner.is_none() || row.lease_until_ms < now)
                        && !state.is_locked(&Key::Offset(*partition))
                };
                let free: Vec<i32> =
                    state.tables.offsets.iter().filter(|(n, row)| free(n, row)).map(|(n, _)| *n).take(at_most).collect();
                let mut owned = Vec::new();
                for partition in free {
                    let row = state.tables.offsets.entry(partition).or_default();
                    row.owner = Some(me.to_owned());
                    row.epoch += 1;
                    row.lease_until_ms = now + self.lease.as_millis() as u64;
                    owned.push(Owned { partition, next_offset: row.next_offset, epoch: row.epoch });
                }
                state.autocommit();
                Ok(owned)
            })
            .await?;
        for one in &acquired {
            self.db.world.tell(self.process.number(), "partition acquired", [i64::from(one.partition), one.next_offset, one.epoch]);
        }
        Ok(acquired)
    }

    async fn release(&self, partitions: Option<&[i32]>) -> Result<(), DbError> {
        let mut tx = self.db.begin(&self.process).await?;
        let all: Vec<i32> = self.db.state().tables.offsets.keys().copied().collect();
        let which: BTreeSet<i32> = all.into_iter().filter(|n| partitions.is_none_or(|given| given.contains(n))).collect();
        let locked = lock_offsets(&mut tx, &which).await;
        tx.answer(locked).await?;
        let me = self.process.name().to_owned();
        tx.write(move |tables| {
            for (_, row) in tables.offsets.iter_mut().filter(|(n, row)| which.contains(n) && row.owner.as_ref() == Some(&me)) {
                row.owner = None;
                row.lease_until_ms = 0;
            }
        });
        tx.commit().await
    }

    async fn leave(&self) -> Result<(), DbError> {
        let me = self.process.name().to_owned();
        self.db
            .statement(&self.process, |state| {
                state.tables.members.remove(&me);
                Ok(())
            })
            .await?;
        self.release(None).await
    }

    async fn commit(&self, batch: &Arc<Batch<E::Event>>) -> Result<(), DbError> {
        let mut attempt = 1;
        loop {
            match self.commit_once(batch).await {
                Err(DbError::Duplicate(_)) if attempt < ATTEMPTS_MAX => attempt += 1,
                Ok(()) => {
                    let wake = self.db.listeners.lock().expect("no holder of this lock panics").clone();
                    wake.iter().for_each(|wake| wake.notify_one());
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }
}

async fn lock_offsets(tx: &mut Tx, partitions: &BTreeSet<i32>) -> Result<(), DbError> {
    for partition in partitions {
        tx.lock(Key::Offset(*partition)).await?;
    }
    Ok(())
}

impl<E: Effect> ProcessInbox<E> {
    async fn commit_once(&self, batch: &Arc<Batch<E::Event>>) -> Result<(), DbError> {
        let mut tx = self.db.begin(&self.process).await?;
        let advanced = self.advance(&mut tx, batch).await;
        tx.answer(advanced).await?;
        if !batch.received.is_empty() {
            E::apply(&mut tx, &batch.received).await?;
        }
        let letters: Vec<(i32, i64)> = batch.poisoned.iter().map(|(d, _)| (d.position.partition, d.position.offset)).collect();
        tx.write(move |tables| tables.letters.extend(letters));
        if !batch.poisoned.is_empty() {
            if !self.db.world.holds(Guard::DeadLetter) {
                return Err(DbError::Unavailable("a record cannot be read".into()));
            }
            self.db.world.tell(self.process.number(), "dead letters", [batch.poisoned.len() as i64, 0, 0]);
        }
        for one in &batch.moves {
            let records = batch.received.iter().filter(|r| r.delivery.position.partition == one.partition).count();
            self.db.world.tell(self.process.number(), "batch; from, to, records", [one.from, one.to, records as i64]);
        }
        tx.commit().await
    }

    /// `advance_offsets`, and beside it what the fence is for.
    async fn advance(&self, tx: &mut Tx, batch: &Batch<E::Event>) -> Result<(), DbError> {
        lock_offsets(tx, &batch.moves.iter().map(|one| one.partition).collect()).await?;
        let world = &self.db.world;
        let mut fenced = false;
        for one in &batch.moves {
            let (next_offset, epoch) =
                self.db.state().tables.offsets.get(&one.partition).map_or((0, 0), |row| (row.next_offset, row.epoch));
            fenced |= world.holds(Guard::OffsetCompare) && next_offset != one.from;
            fenced |= world.holds(Guard::LeaseEpoch) && epoch != one.epoch;
        }
        if fenced {
            world.tell(self.process.number(), "batch fenced", [0; 3]);
            return Err(DbError::Fenced("an offset did not move".into()));
        }
        let until = world.now_ms() + self.lease.as_millis() as u64;
        let (world, moves, me) = (world.clone(), batch.moves.clone(), self.process.name().to_owned());
        tx.write(move |tables| {
            for one in moves {
                let row = tables.offsets.entry(one.partition).or_default();
                let (partition, stands) = (one.partition, row.next_offset);
                world.check(row.epoch == one.epoch, || {
                    format!("S12: {me} commits partition {partition} under epoch {}, which is {}'s by now", one.epoch, row.epoch)
                });
                world.check(stands == one.from, || {
                    format!("S12: {me} applies partition {partition} from {} although {stands} is next", one.from)
                });
                row.next_offset = one.to;
                row.lease_until_ms = until;
            }
        });
        Ok(())
    }
}

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
    let mut accounts = Accounts::new();
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
