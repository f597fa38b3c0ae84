//! The step on a database: one sweep in one transaction, by one replica at a time.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use futures::FutureExt;
use uuid::Uuid;

use crate::contracts::{ORDER_PAYMENT_REQUESTS, PaymentRequested};
use crate::db::types::Xid;
use crate::db::{Conn, Db, DbError, Notifier};
use crate::messaging::{Message, outbox};
use crate::money::Amount;
use crate::orders::SOURCE;
use crate::user_id::UserId;

use super::rules::{self, Act, Due, PageOutcome, Passed, SweepRules, Walked};
use super::store::{self, Asked, Saved};
use super::{Sweep, Swept};

/// Orders on a page of the walk, and pages of one sweep; together what a transaction may take, far below its timeouts.
const PAGE_ORDERS_MAX: i64 = 5_000;
const PAGES_MAX: usize = 20;
/// Due orders that one sweep looks at, and others of `order_retry` that it looks at for having ended.
const DUE_MAX: i64 = 2_000;
const CHECKED_MAX: i64 = 2_000;
/// Waiting orders are counted up to this.
const COUNT_MAX: i64 = 100_000;

/// Sweeps one database's orders; any number of replicas may.
pub struct Sweeper {
    db: Db,
    notifier: Notifier,
    rules: SweepRules,
}

impl Sweeper {
    /// `notifier` is told when requests wait in the outbox.
    pub fn new(db: Db, notifier: Notifier, rules: SweepRules) -> Self {
        Self { db, notifier, rules }
    }
}

impl Sweep for Sweeper {
    async fn sweep(&self) -> Result<Swept, DbError> {
        let turn = store::turn(&mut *self.db.get().await?).await?;
        let waiting = turn.waiting.unsigned_abs();
        if let Ok(due_in_ms @ 1..) = u64::try_from(turn.due_in_ms) {
            // Another replica's doing, or our own before a restart; whatever a clock did, no longer than our own interval.
            let next = Duration::from_millis(due_in_ms).min(self.rules.interval());
            return Ok(Swept { waiting, next, ..Swept::default() });
        }
        let rules = self.rules.clone();
        let swept = self
            .db
            .transaction::<_, DbError, _>(move |conn| {
                let rules = rules.clone();
                async move { sweep(conn, &rules).await }.boxed()
            })
            .await?;
        let asked = swept.map_or(0, |swept| swept.asked as usize);
        if asked > 0 {
            self.notifier.committed(asked);
        }
        Ok(swept.unwrap_or(Swept { waiting, next: self.rules.busy_interval(), ..Swept::default() }))
    }
}

/// `None` where another replica is at it.
async fn sweep(conn: &mut Conn, rules: &SweepRules) -> Result<Option<Swept>, DbError> {
    let Some(claimed) = store::claim(conn).await? else { return Ok(None) };
    let sure = rules::sure(claimed.now, rules);
    let mut walked = Walked { to: claimed.swept_to, id: claimed.swept_id }.min(sure);
    let mut swept = Swept::default();
    let later = |wait: Duration| claimed.now + TimeDelta::from_std(wait).unwrap_or(TimeDelta::MAX);
    let interval = |more: bool| if more { rules.busy_interval() } else { rules.interval() };
    let (mut more, mut next_walk_at) = (false, None);
    if claimed.walk_is_due {
        let (reached, complete) = walk(conn, walked, claimed.now, rules, &mut swept).await?;
        walked = reached.min(sure);
        more = !complete;
        // What may still be committed is looked at again then, but not each time that there is more to ask for.
        next_walk_at = Some(later(interval(more)));
    }
    more |= ask(conn, claimed.now, rules, &mut swept).await?;
    let checked_to = check(conn, claimed.checked_to, &mut swept).await?;
    swept.next = interval(more);
    let saved = Saved { walked, checked_to, next_walk_at, next_sweep_at: later(swept.next) };
    swept.waiting = store::save(conn, &saved, COUNT_MAX).await?.unsigned_abs();
    Ok(Some(swept))
}

/// Looks at orders by creation time and remembers those that wait; where it came to, and whether that is all for now.
async fn walk(
    conn: &mut Conn,
    from: Walked,
    now: DateTime<Utc>,
    rules: &SweepRules,
    swept: &mut Swept,
) -> Result<(Walked, bool), DbError> {
    let until = rules::walk_until(now, rules);
    // Where a page is the last one, whatever is committed before `until` was looked at.
    let end = Walked { to: until, id: Uuid::nil() };
    let mut at = from;
    for _ in 0..PAGES_MAX {
        let rows = store::walk(conn, at, until, PAGE_ORDERS_MAX).await?;
        let total = rows.last().map_or(0, |row| row.total);
        let xids: HashSet<Xid> = rows.iter().filter(|row| row.waits).filter_map(|row| row.xid).collect();
        let sent = outbox::sent(conn, &xids.into_iter().collect::<Vec<_>>()).await?;
        let passed: Vec<Passed> = rows
            .iter()
            .map(|row| Passed {
                at: Walked { to: row.created_at, id: row.id },
                // An order without its event breaks a promise of ours; it is asked for all the same.
                waits: row.waits.then(|| row.xid.is_none_or(|xid| sent.contains(&xid))),
            })
            .collect();
        let PageOutcome { found, reached, held } = rules::page(&passed);
        swept.found += store::remember(conn, &found, now).await? as u64;
        swept.looked += total.unsigned_abs();
        at = reached.unwrap_or(at);
        if held {
            return Ok((at, true));
        }
        if total < PAGE_ORDERS_MAX {
            return Ok((at.max(end), true));
        }
    }
    Ok((at, false))
}

/// Asks for those that are due; whether more of them are.
async fn ask(conn: &mut Conn, now: DateTime<Utc>, rules: &SweepRules, swept: &mut Swept) -> Result<bool, DbError> {
    let rows = store::due(conn, now, DUE_MAX).await?;
    let xids: Vec<Xid> = rows.iter().filter_map(|row| row.asked_xid).collect();
    let sent = outbox::sent(conn, &xids).await?;
    let due: Vec<Due> = rows
        .iter()
        .map(|row| Due {
            order_id: row.order_id,
            asks: row.asks.unsigned_abs(),
            ended: row.ended,
            sent: row.asked_xid.is_none_or(|xid| sent.contains(&xid)),
        })
        .collect();
    let acts = rules::act(&due, rules.asks_max());
    let of = |wanted: Act| due.iter().zip(&acts).filter(move |(_, act)| **act == wanted).map(|(one, _)| one);
    let ended: Vec<Uuid> = of(Act::Forget).map(|one| one.order_id).collect();
    swept.ended += store::forget(conn, &ended).await? as u64;
    let after =
        |one: &Due, asks: u32| (one.order_id, i64::try_from(rules.delay(one.order_id, asks).as_millis()).unwrap_or(i64::MAX));
    let held: Vec<_> = of(Act::Hold).map(|one| after(one, 1)).collect();
    store::postpone(conn, &held, false, now).await?;
    let asked: Vec<_> = of(Act::Ask).map(|one| after(one, one.asks.saturating_add(1))).collect();
    let ids: Vec<Uuid> = asked.iter().map(|(id, _)| *id).collect();
    let messages = requests(conn, &ids, now).await?;
    outbox::append(conn, &messages).await?;
    store::postpone(conn, &asked, true, now).await?;
    swept.asked += messages.len() as u64;
    Ok(acts.contains(&Act::Leave) || i64::try_from(rows.len()).unwrap_or(i64::MAX) >= DUE_MAX)
}

/// The orders' requests, as they were, each under a new event id.
async fn requests(conn: &mut Conn, ids: &[Uuid], now: DateTime<Utc>) -> Result<Vec<Message>, DbError> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let mut orders: HashMap<Uuid, Asked> = store::orders(conn, ids).await?.into_iter().map(|order| (order.id, order)).collect();
    let in_turn = ids.iter().filter_map(|id| orders.remove(id));
    // One that another hand wrote into the table, and that no request can say, must not keep all others from being asked for.
    let said = |order| request(order, now).inspect_err(|error| tracing::error!(%error, "an order cannot be asked for")).ok();
    Ok(in_turn.filter_map(said).collect())
}

fn request(order: Asked, now: DateTime<Utc>) -> Result<Message, DbError> {
    let odd = |what: &str| DbError::Defect(format!("order {}: {what} breaks its rule", order.id));
    let event = PaymentRequested {
        order_id: order.id,
        user_id: UserId::new(order.user_id.as_str()).map_err(|_| odd("user_id"))?,
        amount: Amount::from_minor(order.amount).ok_or_else(|| odd("amount"))?,
        description: order.description,
        timestamp: order.created_at,
    };
    Ok(Message {
        event_id: Uuid::now_v7(),
        topic: ORDER_PAYMENT_REQUESTS,
        key: order.user_id,
        payload: event.encode(),
        kind: PaymentRequested::TYPE,
        source: SOURCE,
        traceparent: order.traceparent,
        request_id: String::new(),
        created_at: now,
    })
}

/// Forgets those of the next page that have ended meanwhile; where to go on.
async fn check(conn: &mut Conn, from: Uuid, swept: &mut Swept) -> Result<Uuid, DbError> {
    let rows = store::check(conn, from, CHECKED_MAX).await?;
    let ended: Vec<Uuid> = rows.iter().filter(|row| row.ended).map(|row| row.order_id).collect();
    swept.ended += store::forget(conn, &ended).await? as u64;
    let is_last = i64::try_from(rows.len()).unwrap_or(i64::MAX) < CHECKED_MAX;
    Ok(rows.last().filter(|_| !is_last).map_or(Uuid::nil(), |row| row.order_id))
}
