//! The rules over whole batches: what payments decides, and what orders makes of it.

use std::collections::{HashMap, HashSet};
use std::hint::black_box;

use chrono::DateTime;
use shopd::contracts::{Outcome, PaymentRequested, PaymentStatusUpdated};
use shopd::messaging::Received;
use shopd::orders::rules::settle;
use shopd::payments::rules::{Accounts, Decided, Held, Orders, decide, effects};
use shopd::user_id::UserId;
use uuid::Uuid;

use super::Case;
use super::wire::{Ids, received, request};

/// A full batch of the consumer's.
const BATCH: usize = 1_000;
/// No run of any length empties it.
const BALANCE: i64 = i64::MAX / 2;

pub fn cases() -> Vec<Case> {
    let orders = |requests: &[PaymentRequested]| every_second(requests).collect();
    let results = |requests: &[PaymentRequested]| every_second(requests).map(|order| (order, paid(order))).collect();
    vec![
        deciding("decide_spread", BATCH, |_| Orders::default()),
        deciding("decide_hot", 1, |_| Orders::default()),
        deciding("decide_repeats", BATCH, orders),
        applying("effects_spread", BATCH, |_| HashMap::new()),
        applying("effects_hot", 1, |_| HashMap::new()),
        applying("effects_repeats", BATCH, results),
        Case::new("settle", BATCH, settling),
    ]
}

fn deciding(name: &'static str, users: usize, decided: fn(&[PaymentRequested]) -> Orders) -> Case {
    Case::new(name, BATCH, move || {
        let requests = requests(users);
        let (decided, mut accounts) = (decided(&requests), accounts(&requests));
        move || {
            let requests: Vec<&PaymentRequested> = requests.iter().collect();
            drop(black_box(decide(&mut accounts, black_box(&decided), black_box(&requests))));
        }
    })
}

fn applying(name: &'static str, users: usize, decided: fn(&[PaymentRequested]) -> HashMap<Uuid, Decided>) -> Case {
    Case::new(name, BATCH, move || {
        let requests = requests(users);
        let (decided, mut accounts) = (decided(&requests), accounts(&requests));
        let batch: Vec<Received<PaymentRequested>> =
            requests.into_iter().enumerate().map(|(at, event)| received(event, at)).collect();
        move || drop(black_box(effects(black_box(&batch), black_box(&decided), &mut accounts, DateTime::UNIX_EPOCH)))
    })
}

fn settling() -> impl FnMut() {
    let mut ids = Ids::new();
    let result = |at: usize| {
        let (outcome, failure_reason) = match at % 4 {
            0 => (Outcome::Cancelled, Some("insufficient_funds".to_owned())),
            _ => (Outcome::Finished, None),
        };
        received(PaymentStatusUpdated { order_id: ids.next(), outcome, failure_reason }, at)
    };
    let batch: Vec<_> = (0..BATCH).map(result).collect();
    move || drop(black_box(settle(black_box(&batch))))
}

/// A batch over `users` accounts, by turns.
fn requests(users: usize) -> Vec<PaymentRequested> {
    let mut ids = Ids::new();
    (0..BATCH).map(|at| request(ids.next(), at % users)).collect()
}

/// The accounts of all but every 16th user.
fn accounts(requests: &[PaymentRequested]) -> Accounts {
    let users: HashSet<&UserId> = requests.iter().map(|request| &request.user_id).collect();
    let mut users: Vec<&UserId> = users.into_iter().collect();
    users.sort_unstable();
    let held = |(at, user): (usize, &UserId)| (at % 16 != 15).then(|| (user.clone(), Held { id: at as i64 + 1, balance: BALANCE }));
    users.into_iter().enumerate().filter_map(held).collect()
}

fn every_second(requests: &[PaymentRequested]) -> impl Iterator<Item = Uuid> {
    requests.iter().step_by(2).map(|request| request.order_id)
}

fn paid(order: Uuid) -> Decided {
    Decided { status: "Finished".into(), failure_reason: None, result_event_id: Uuid::from_u128(!order.as_u128()) }
}
