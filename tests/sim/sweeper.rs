//! The sweeper's step over the model: its rules and its loop are the real ones, the statements between are not.

use std::time::Duration;

use chrono::{DateTime, Utc};
use shopd::db::DbError;
use shopd::orders::sweep_rules::{self as rules, Act, Due, Passed, Walked};
use shopd::orders::{Sweep, SweepRules, Swept};
use uuid::Uuid;

use crate::effects::short;
use crate::postgres::{Key, Postgres, Tx};
use crate::service::request;
use crate::tables::{RetryRow, Snap, Tables};
use crate::world::{Guard, Process};

const PAGE: usize = 8;

pub struct ProcessSweeper {
    pub db: Postgres,
    pub process: Process,
    pub rules: SweepRules,
}

fn time(ms: u64) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(ms as i64).unwrap_or_default()
}

fn millis(duration: Duration) -> u64 {
    duration.as_millis() as u64
}

impl Sweep for ProcessSweeper {
    async fn sweep(&self) -> Result<Swept, DbError> {
        let mut tx = self.db.begin(&self.process).await?;
        let now = self.db.world.now_ms();
        let due = self.db.state().tables.sweep.next_sweep_ms;
        let busy = self.db.state().is_locked(&Key::Sweep);
        if now < due || busy || !self.db.world.holds(Guard::Sweeper) {
            let next = Duration::from_millis(due.saturating_sub(now)).clamp(self.rules.busy_interval(), self.rules.interval());
            return tx.answer(Ok(Swept { next, ..Swept::default() })).await;
        }
        let swept = self.sweep_there(&mut tx, now).await;
        let swept = tx.answer(swept).await?;
        tx.commit().await?;
        Ok(swept)
    }
}

/// What one sweep changes.
struct Sweeping {
    retries: std::collections::BTreeMap<Uuid, RetryRow>,
    walked: Walked,
    next_walk_ms: u64,
    asked: Vec<(Uuid, String, i64)>,
}

impl ProcessSweeper {
    async fn sweep_there(&self, tx: &mut Tx, now: u64) -> Result<Swept, DbError> {
        tx.lock(Key::Sweep).await?;
        let (mut sweeping, mut swept) = self.look(&self.db.state().tables, now);
        for (order, user, amount) in std::mem::take(&mut sweeping.asked) {
            let (xid, _) = tx.append(vec![request(order, &user, amount)])?;
            self.db.world.tell(self.process.number(), "order asked for again", [short(order), xid as i64, 0]);
            if let Some(retry) = sweeping.retries.get_mut(&order) {
                retry.asked_xid = Some(xid);
            }
            swept.asked += 1;
        }
        let next = millis(swept.next);
        tx.write(move |tables| {
            let row = &mut tables.sweep;
            (row.retries, row.walked, row.next_walk_ms) = (sweeping.retries, sweeping.walked, sweeping.next_walk_ms);
            row.next_sweep_ms = now + next;
        });
        Ok(swept)
    }

    fn look(&self, tables: &Tables, now: u64) -> (Sweeping, Swept) {
        let sent = Snap::parse(&tables.cursor.cursor.snapshot);
        let mut swept = Swept::default();
        let mut sweeping = Sweeping {
            retries: tables.sweep.retries.clone(),
            walked: tables.sweep.walked,
            next_walk_ms: tables.sweep.next_walk_ms,
            asked: Vec::new(),
        };
        let mut more = false;
        if sweeping.next_walk_ms <= now {
            more = walk(tables, &sent, time(now), &self.rules, &mut sweeping);
            sweeping.next_walk_ms = now + millis(if more { self.rules.busy_interval() } else { self.rules.interval() });
        }
        let ended = |order: &Uuid| tables.orders.get(order).is_none_or(|row| row.status.is_final());
        let mut due: Vec<(u64, Due)> = sweeping
            .retries
            .iter()
            .filter(|(_, retry)| retry.due_ms <= now)
            .map(|(order, retry)| {
                let sent = retry.asked_xid.is_none_or(|xid| sent.sees(xid));
                (retry.due_ms, Due { order_id: *order, asks: retry.asks, ended: ended(order), sent })
            })
            .collect();
        due.sort_by_key(|(at, one)| (*at, one.order_id));
        let due: Vec<Due> = due.into_iter().map(|(_, one)| one).collect();
        let acts = rules::act(&due, self.rules.asks_max());
        for (one, act) in due.iter().zip(&acts) {
            let Some(retry) = sweeping.retries.get_mut(&one.order_id) else { continue };
            match act {
                Act::Forget => drop(sweeping.retries.remove(&one.order_id)),
                Act::Hold => retry.due_ms = now + millis(self.rules.delay(one.order_id, 1)),
                Act::Ask => {
                    retry.asks += 1;
                    retry.due_ms = now + millis(self.rules.delay(one.order_id, retry.asks));
                    let row = &tables.orders[&one.order_id];
                    sweeping.asked.push((one.order_id, row.user.clone(), row.amount));
                }
                Act::Leave => more = true,
            }
        }
        sweeping.retries.retain(|order, _| !ended(order));
        swept.next = if more { self.rules.busy_interval() } else { self.rules.interval() };
        (sweeping, swept)
    }
}

/// Looks at one page of orders by creation time; whether there are more.
fn walk(tables: &Tables, sent: &Snap, now: DateTime<Utc>, rules: &SweepRules, sweeping: &mut Sweeping) -> bool {
    let sure = rules::sure(now, rules);
    let until = rules::walk_until(now, rules);
    let from = sweeping.walked.min(sure);
    let mut passed: Vec<Passed> = tables
        .orders
        .iter()
        .map(|(order, row)| {
            let waits = (!row.status.is_final()).then(|| sent.sees(row.xid));
            Passed { at: Walked { to: time(row.created_ms), id: *order }, waits }
        })
        .filter(|one| one.at > from && one.at.to <= until)
        .collect();
    passed.sort_by_key(|one| one.at);
    let full = passed.len() > PAGE;
    passed.truncate(PAGE);
    let outcome = rules::page(&passed);
    for order in outcome.found {
        sweeping.retries.entry(order).or_default();
    }
    let reached = outcome.reached.unwrap_or(from);
    let end = Walked { to: until, id: Uuid::nil() };
    let reached = if outcome.held || full { reached } else { reached.max(end) };
    sweeping.walked = reached.min(sure);
    full && !outcome.held
}
