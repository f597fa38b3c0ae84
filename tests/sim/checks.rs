//! What must be true once everything is quiet. What can be seen at once is checked where it happens.

use std::collections::BTreeMap;

use shopd::orders::OrderStatus;

use crate::cluster::{Cluster, TOPICS};
use crate::effects::short;
use crate::plan::Act;
use crate::run::{Calls, Heard, user};
use crate::service::{Deposited, ORDERS_SOURCE, Placed};
use crate::tables::passed;

/// Every order is final and every row of both outboxes is on the log.
pub fn is_quiet(cluster: &Cluster) -> bool {
    let [orders, payments] = &cluster.databases;
    let sent = |db: &crate::postgres::Postgres| {
        let state = db.state();
        let cursor = &state.tables.cursor.cursor;
        state.tables.outbox.keys().all(|position| passed(cursor, *position))
    };
    orders.state().tables.orders.values().all(|order| order.status.is_final()) && sent(orders) && sent(payments)
}

/// Not quiet in time: says what is not.
pub fn too_late(cluster: &Cluster) {
    let [orders, payments] = &cluster.databases;
    for (db, topic) in [(payments, TOPICS[0]), (orders, TOPICS[1])] {
        for (partition, row) in &db.state().tables.offsets {
            let stuck = cluster.kafka.is_poison(topic, *partition, row.next_offset);
            cluster.world.check(!stuck, || format!("L2: {topic}/{partition} stands at a record that nobody can read"));
        }
    }
    let waiting: Vec<i64> = {
        let state = orders.state();
        state.tables.orders.iter().filter(|(_, row)| !row.status.is_final()).map(|(order, _)| short(*order)).collect()
    };
    cluster.world.check(waiting.is_empty(), || {
        let decided: Vec<bool> =
            waiting.iter().map(|n| payments.state().tables.payments.keys().any(|order| short(*order) == *n)).collect();
        format!("L1: orders {waiting:?} are not final (decided: {decided:?})")
    });
    cluster.world.violated(|| "L1: rows of an outbox are not on the log".into());
}

pub fn at_the_end(cluster: &Cluster, calls: &Calls) {
    let world = &cluster.world;
    money(cluster);
    orders_and_debits(cluster);
    let [orders, payments] = &cluster.databases;
    for db in [orders, payments] {
        for ((xid, id), row) in &db.state().tables.outbox {
            let sent = cluster.kafka.has_had(&row.event_id.to_string());
            world.check(sent, || format!("S13: outbox row ({xid}, {id}) was never on the log"));
        }
    }
    let payments = payments.state();
    for order in payments.tables.payments.keys() {
        let results = payments.tables.results.get(order).map_or(0, std::collections::BTreeSet::len);
        world.check(results == 1, || format!("S14: order {} has {results} results", short(*order)));
    }
    let mut deposits: BTreeMap<u64, Vec<(u64, i64, Option<Heard>)>> = BTreeMap::new();
    for (act, heard) in calls.lock().expect("no holder of this lock panics").values() {
        match act {
            Act::Place { order, user: number, amount } => placed(cluster, *order, *number, *amount, heard.as_ref()),
            Act::Deposit { key, user, amount } => deposits.entry(*key).or_default().push((*user, *amount, heard.clone())),
            _ => {}
        }
    }
    for (key, asked) in deposits {
        let applied: Vec<_> = payments.tables.transfers.iter().filter(|line| line.key == Some(key)).collect();
        world.check(applied.len() <= 1, || format!("S9: the deposit under key {key} is applied {} times", applied.len()));
        let mut answers = Vec::new();
        for (number, amount, heard) in &asked {
            let Some(Heard::Deposited(answer)) = heard else { continue };
            let is_it = |line: &&&crate::tables::TransferRow| line.amount == *amount && line.user == user(*number);
            let there = applied.iter().find(is_it);
            match answer {
                Deposited::Done(balance) => {
                    world.check(there.is_some(), || format!("S9: the acknowledged deposit under key {key} is not there"));
                    let same = there.is_none_or(|line| line.balance_after == *balance);
                    world.check(same, || format!("S11: the deposit under key {key} is answered with another balance"));
                    answers.push(*amount);
                }
                Deposited::Mismatch => {
                    world.check(there.is_none(), || format!("S11: a mismatched deposit under key {key} has an effect"));
                }
                Deposited::NoAccount => {}
            }
        }
        answers.dedup();
        world.check(answers.len() <= 1, || format!("S11: two bodies were accepted under key {key}"));
    }
}

fn money(cluster: &Cluster) {
    let payments = cluster.databases[1].state();
    let balances: i64 = payments.tables.accounts.values().map(|account| account.balance).sum();
    let (deposited, paid) = (payments.tables.deposited, payments.tables.paid);
    cluster.world.check(deposited - paid == balances, || format!("S1: {deposited} deposited - {paid} paid is not {balances}"));
    let mut accounts: BTreeMap<&str, i64> = BTreeMap::new();
    for line in &payments.tables.transfers {
        *accounts.entry(&line.user).or_default() += line.amount;
    }
    for (user, account) in &payments.tables.accounts {
        let sum = accounts.get(user.as_str()).copied().unwrap_or_default();
        cluster.world.check(sum == account.balance, || format!("S1: {user}'s lines add up to {sum}, not {}", account.balance));
    }
}

/// Another producer's records can pay or end an order; what they did is left out, as the audit counts it apart.
fn orders_and_debits(cluster: &Cluster) {
    let (world, [orders, payments]) = (&cluster.world, &cluster.databases);
    let (orders, payments) = (orders.state(), payments.state());
    for (order, row) in &orders.tables.orders {
        let debits = payments.tables.debits.get(order).map_or(&[][..], Vec::as_slice);
        let payment = payments.tables.payments.get(order);
        let ours = row.ended_by.as_deref() == Some(shopd::payments::SOURCE)
            && payment.is_none_or(|payment| payment.source.as_deref() == Some(ORDERS_SOURCE));
        if !ours {
            continue;
        }
        let paid = debits.iter().filter(|debit| debit.amount == -row.amount && debit.user == row.user).count();
        let holds = match row.status {
            OrderStatus::Finished => debits.len() == 1 && paid == 1,
            _ => debits.is_empty(),
        };
        world.check(holds, || format!("S4: order {} is {:?} with debits {debits:?}", short(*order), row.status));
    }
    // Something that follows from S3 and S4, and would be seen first if a whole order vanished.
    for (order, payment) in &payments.tables.payments {
        let known = orders.tables.orders.contains_key(order) || payment.source.as_deref() != Some(ORDERS_SOURCE);
        world.check(known, || format!("S6: order {} has a request and is not there", short(*order)));
    }
}

fn placed(cluster: &Cluster, order: u64, number: u64, amount: i64, heard: Option<&Heard>) {
    let orders = cluster.databases[0].state();
    let row = orders.tables.orders.iter().find(|(id, _)| short(**id) == order as i64).map(|(_, row)| row);
    let same = row.is_some_and(|row| row.amount == amount && row.user == user(number));
    match heard {
        Some(Heard::Placed(Placed::Accepted)) => {
            cluster.world.check(same, || format!("S6: order {order} was accepted and is not there"));
        }
        Some(Heard::Placed(Placed::Conflict)) => {
            cluster.world.check(row.is_some() && !same, || format!("S11: order {order} was refused without a reason"));
        }
        _ => {}
    }
}
