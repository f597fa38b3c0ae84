//! The small sequential model: what every history must agree with, whatever broke meanwhile. Pure.

use std::collections::{BTreeSet, HashMap};

use uuid::Uuid;

use super::history::{Account, Answer, Asked, Call, End, Fields, History, Micros, Order, Outcome};

/// Violations named at most, of each promise.
const NAMED_MAX: usize = 20;

/// What was looked at, so that a check of nothing does not pass for a check.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checked {
    pub orders: usize,
    pub finished: usize,
    pub deposits: usize,
    pub indefinite: usize,
    pub reads: usize,
    pub ledger: usize,
    pub conflicts: usize,
    /// Keys used again for another body, and refused.
    pub mismatches: usize,
    pub foreign: usize,
}

#[derive(Default)]
pub struct Verdict {
    pub violations: Vec<String>,
    pub checked: Checked,
}

impl Verdict {
    fn wrong(&mut self, promise: &str, what: String) {
        if self.violations.iter().filter(|v| v.starts_with(promise)).count() < NAMED_MAX {
            self.violations.push(format!("{promise}: {what}"));
        }
    }
}

pub fn check(history: &History, end: &End) -> Verdict {
    let mut verdict = Verdict::default();
    answers(history, &mut verdict);
    accounts(history, end, &mut verdict);
    orders(history, end, &mut verdict);
    ledgers(history, end, &mut verdict);
    deposits(history, end, &mut verdict);
    balances(history, end, &mut verdict);
    reasons(history, end, &mut verdict);
    verdict
}

/// No answer but those that the contract knows for what was asked.
fn answers(history: &History, verdict: &mut Verdict) {
    for call in &history.calls {
        let Outcome::Answered(answer) = &call.outcome else {
            verdict.checked.indefinite += usize::from(matches!(call.outcome, Outcome::Indefinite(_)));
            continue;
        };
        let known = match (&call.asked, answer.status, answer.code.as_str()) {
            (Asked::Place { .. }, 200 | 201, _) => !answer.orders.is_empty(),
            (Asked::Place { .. }, 409, "order_conflict") => true,
            (Asked::Get { .. }, 200, _) => answer.orders.len() == 1,
            (Asked::Get { .. }, 404, "order_not_found") => true,
            (Asked::List { .. }, 200, code) => code.is_empty(),
            (Asked::Open { .. }, 200, _) | (Asked::Open { .. }, 409, "account_exists") => true,
            (Asked::Deposit { .. } | Asked::Balance { .. }, 200, _) => answer.balance.is_some(),
            (Asked::Deposit { .. } | Asked::Balance { .. }, 404, "account_not_found") => true,
            (Asked::Deposit { key: Some(_), .. }, 422, "idempotency_mismatch") => true,
            _ => false,
        };
        verdict.checked.mismatches += usize::from(answer.status == 422);
        if !known {
            verdict.wrong("contract", format!("{:?} was answered {} {}", call.asked, answer.status, answer.code));
        }
    }
}

/// A user has the account that was opened, and it was opened once (S10).
fn accounts(history: &History, end: &End, verdict: &mut Verdict) {
    let mut opened: HashMap<&str, usize> = HashMap::new();
    for call in &history.calls {
        let (Asked::Open { user }, Some(answer)) = (&call.asked, call.answer()) else { continue };
        *opened.entry(user).or_default() += usize::from(answer.status == 200 && !answer.replayed);
    }
    for (user, times) in opened {
        if times > 1 {
            verdict.wrong("S10", format!("{user}'s account was opened {times} times"));
        }
        if !end.accounts.contains_key(user) {
            verdict.wrong("S10", format!("{user}'s account is not there, and opening it was answered"));
        }
    }
}

/// From when to when somebody looked at an order, and what was shown.
type Sight<'a> = (Micros, Micros, Option<&'a Order>);

/// Every accepted order is there as it was accepted, ended once, and nobody was told otherwise (S5, S6, S11, L1).
fn orders(history: &History, end: &End, verdict: &mut Verdict) {
    let mut placed: HashMap<Uuid, Vec<(&Call, &Fields)>> = HashMap::new();
    let mut sights: HashMap<Uuid, Vec<Sight<'_>>> = HashMap::new();
    for call in &history.calls {
        match &call.asked {
            Asked::Place { id, fields } => placed.entry(*id).or_default().push((call, fields)),
            Asked::Get { id } if call.answer().is_some_and(|answer| answer.status == 404) => {
                sights.entry(*id).or_default().push((call.begun, call.ended, None));
            }
            _ => {}
        }
        for order in call.answer().into_iter().flat_map(|answer| &answer.orders) {
            sights.entry(order.id).or_default().push((call.begun, call.ended, Some(order)));
        }
    }
    for id in end.orders.keys().filter(|id| !placed.contains_key(id)) {
        verdict.wrong("S6", format!("order {id} is there and nobody placed it"));
    }
    for (id, calls) in &placed {
        let Some(order) = end.orders.get(id) else {
            for (call, _) in calls.iter().filter(|(call, _)| call.answer().is_some()) {
                verdict.wrong("S6", format!("order {id} is not there, and placing it was answered {:?}", call.answer()));
            }
            continue;
        };
        verdict.checked.orders += 1;
        verdict.checked.finished += usize::from(order.status == "Finished");
        if !order.is_final() {
            verdict.wrong("L1", format!("order {id} is {}", order.status));
        }
        if !calls.iter().any(|(_, fields)| **fields == order.fields) {
            verdict.wrong("S6", format!("order {id} is there as {:?}, which nobody placed", order.fields));
        }
        let mut fresh = 0;
        for (call, fields) in calls {
            let Some(answer) = call.answer() else { continue };
            fresh += usize::from(answer.status == 201 && !answer.replayed);
            let same = **fields == order.fields;
            if same != (answer.status != 409) {
                verdict.wrong(
                    "S11",
                    format!("order {id} is there as {:?}; placing {fields:?} was answered {}", order.fields, answer.status),
                );
            }
            verdict.checked.conflicts += usize::from(answer.status == 409);
        }
        if fresh > 1 {
            verdict.wrong("S11", format!("order {id} was answered as new {fresh} times"));
        }
    }
    for (id, sights) in &sights {
        seen(*id, sights, placed.get(id).map_or(&[][..], Vec::as_slice), end, verdict);
    }
}

/// What was seen of one order, by anyone: it is there once that was said, its fields never change, its status moves forward only.
fn seen(id: Uuid, sights: &[Sight<'_>], placed: &[(&Call, &Fields)], end: &End, verdict: &mut Verdict) {
    verdict.checked.reads += sights.len();
    let accepted = |call: &Call| call.answer().is_some_and(|answer| matches!(answer.status, 200 | 201));
    let accepted = placed.iter().filter(|(call, _)| accepted(call)).map(|(call, _)| call.ended).min();
    let shown = sights.iter().filter(|(_, _, order)| order.is_some()).map(|(_, ended, _)| *ended).min();
    let there = accepted.into_iter().chain(shown).min();
    let ended = sights.iter().filter(|(_, _, order)| order.is_some_and(Order::is_final)).map(|(_, ended, _)| *ended).min();
    for (begun, _, order) in sights {
        let Some(order) = order else {
            if there.is_some_and(|there| there < *begun) {
                verdict.wrong("S6", format!("order {id} was not found after it had been shown or accepted"));
            }
            continue;
        };
        let Some(last) = end.orders.get(&id) else {
            verdict.wrong("S6", format!("order {id} was shown and is not there"));
            return;
        };
        if order.fields != last.fields {
            verdict.wrong("S5", format!("order {id} was shown as {:?} and is {:?}", order.fields, last.fields));
        }
        if order.is_final() && order.end() != last.end() {
            verdict.wrong("S5", format!("order {id} was shown as {} and is {}", order.end(), last.end()));
        }
        if !order.is_final() && ended.is_some_and(|ended| ended < *begun) {
            verdict.wrong("S5", format!("order {id} was shown as {} after it had been shown as {}", order.end(), last.end()));
        }
    }
}

/// Ledgers chain, never go below zero, and hold one debit for each finished order and each foreign one that was paid (S1..S4, S8).
fn ledgers(history: &History, end: &End, verdict: &mut Verdict) {
    let foreign: HashMap<Uuid, _> = history.foreign.iter().map(|debit| (debit.order, debit)).collect();
    let mut debits: HashMap<Uuid, usize> = HashMap::new();
    for (user, account) in &end.accounts {
        verdict.checked.ledger += account.ledger.len();
        let mut balance = 0;
        for entry in &account.ledger {
            balance += entry.amount;
            if entry.balance_after != balance {
                verdict.wrong(
                    "S8",
                    format!("{user}: entry {} leaves {}, by the entries before it {balance}", entry.id, entry.balance_after),
                );
            }
            if entry.balance_after < 0 {
                verdict.wrong("S2", format!("{user}: entry {} leaves {}", entry.id, entry.balance_after));
            }
            let Some(id) = entry.order else { continue };
            *debits.entry(id).or_default() += 1;
            let asked = match (end.orders.get(&id), foreign.get(&id)) {
                (Some(order), _) if order.status == "Finished" => Some((&order.fields.user, order.fields.amount)),
                (None, Some(debit)) => Some((&debit.user, debit.amount)),
                _ => None,
            };
            if asked != Some((user, -entry.amount)) {
                verdict.wrong("S4", format!("{user} was debited {} for {id}, asked {asked:?}", -entry.amount));
            }
        }
        if account.balance != balance {
            verdict.wrong("S1", format!("{user} has {}, by the ledger {balance}", account.balance));
        }
    }
    for (id, n) in debits.iter().filter(|(_, n)| **n > 1) {
        verdict.wrong("S3", format!("{id} was debited {n} times"));
    }
    for order in end.orders.values().filter(|order| order.status == "Finished" && !debits.contains_key(&order.id)) {
        verdict.wrong("S4", format!("order {} is finished and not debited", order.id));
    }
    verdict.checked.foreign += foreign.keys().filter(|id| debits.contains_key(id)).count();
}

/// An acknowledged deposit is there once, an indefinite one at most once, and none that nobody made (S9, S11).
fn deposits(history: &History, end: &End, verdict: &mut Verdict) {
    struct Made<'a> {
        user: &'a str,
        answers: Vec<&'a Answer>,
    }
    let mut made: HashMap<i64, Made<'_>> = HashMap::new();
    let mut keys: HashMap<&str, BTreeSet<i64>> = HashMap::new();
    for call in &history.calls {
        let Asked::Deposit { user, amount, key } = &call.asked else { continue };
        let one = made.entry(*amount).or_insert(Made { user, answers: Vec::new() });
        one.answers.extend(call.answer());
        if let Some(key) = key {
            keys.entry(key).or_default().insert(*amount);
        }
    }
    let mut applied: HashMap<i64, Vec<i64>> = HashMap::new();
    for (user, account) in &end.accounts {
        for entry in account.ledger.iter().filter(|entry| entry.order.is_none()) {
            applied.entry(entry.amount).or_default().push(entry.balance_after);
            if made.get(&entry.amount).is_none_or(|one| one.user != user) {
                verdict.wrong("S9", format!("{user} has a deposit of {} that nobody made", entry.amount));
            }
        }
    }
    for (amount, one) in &made {
        verdict.checked.deposits += 1;
        let there = applied.get(amount).map_or(&[][..], Vec::as_slice);
        if there.len() > 1 {
            verdict.wrong("S9", format!("the deposit of {amount} to {} is there {} times", one.user, there.len()));
        }
        let said: Vec<_> = one.answers.iter().filter(|answer| answer.status == 200).collect();
        if !said.is_empty() && there.is_empty() {
            verdict.wrong("S9", format!("the acknowledged deposit of {amount} to {} is not there", one.user));
        }
        if said.iter().filter(|answer| !answer.replayed).count() > 1 {
            verdict.wrong("S11", format!("the deposit of {amount} to {} was answered as new twice", one.user));
        }
        for answer in said {
            if !there.is_empty() && answer.balance != there.first().copied() {
                verdict
                    .wrong("S9", format!("the deposit of {amount} to {} left {there:?}, answered {:?}", one.user, answer.balance));
            }
        }
    }
    for (key, amounts) in keys {
        let there = amounts.iter().filter(|amount| applied.contains_key(amount)).count();
        if there > 1 {
            verdict.wrong("S11", format!("{there} deposits are there under the key {key}"));
        }
    }
}

/// When each deposit, by user and amount, was surely there: acknowledged. Its own time is from before its commit.
fn acknowledged(history: &History) -> HashMap<(&str, i64), Micros> {
    let mut surely: HashMap<(&str, i64), Micros> = HashMap::new();
    for call in &history.calls {
        if let (Asked::Deposit { user, amount, .. }, Some(answer)) = (&call.asked, call.answer())
            && answer.status == 200
        {
            let at = surely.entry((user, *amount)).or_insert(call.ended);
            *at = call.ended.min(*at);
        }
    }
    surely
}

/// A balance that was read was the account's at some moment of the reading, and no older than what had been acknowledged.
fn balances(history: &History, end: &End, verdict: &mut Verdict) {
    let surely = acknowledged(history);
    let mut known: HashMap<&str, Vec<(Micros, i64)>> = HashMap::new();
    for (user, account) in &end.accounts {
        let sure = account.ledger.iter().filter(|entry| entry.order.is_none());
        let sure = sure.filter_map(|entry| Some((*surely.get(&(user.as_str(), entry.amount))?, entry.id)));
        known.insert(user, sure.collect());
    }
    for call in &history.calls {
        let (Asked::Balance { user }, Some(answer)) = (&call.asked, call.answer()) else { continue };
        let Some(balance) = answer.balance else { continue };
        verdict.checked.reads += 1;
        let none = Account::default();
        let account = end.accounts.get(user).unwrap_or(&none);
        let acknowledged = known.get(user.as_str()).into_iter().flatten().filter(|(at, _)| *at < call.begun);
        let newest = acknowledged.map(|(_, id)| *id).max().unwrap_or(i64::MIN);
        let held = |entry: &super::history::Entry| entry.balance_after == balance && entry.id >= newest && entry.at <= call.ended;
        let empty = balance == 0 && newest == i64::MIN;
        if balance < 0 {
            verdict.wrong("S2", format!("{user} was shown a balance of {balance}"));
        } else if !empty && !account.ledger.iter().any(held) {
            verdict.wrong("S9", format!("{user} was shown a balance of {balance}, which was not the account's then"));
        }
    }
}

/// Cancelled for want of money or of an account: only where it was wanting at some moment after the order was placed. What it found may be the
/// account as the last deposit left it that had been acknowledged before, or as anything after that did.
fn reasons(history: &History, end: &End, verdict: &mut Verdict) {
    let surely = acknowledged(history);
    let mut begun: HashMap<Uuid, Micros> = HashMap::new();
    let mut opened: HashMap<&str, Micros> = HashMap::new();
    for call in &history.calls {
        match &call.asked {
            Asked::Place { id, .. } => {
                let first = begun.entry(*id).or_insert(call.begun);
                *first = call.begun.min(*first);
            }
            Asked::Open { user } if call.answer().is_some() => {
                let first = opened.entry(user).or_insert(call.ended);
                *first = call.ended.min(*first);
            }
            _ => {}
        }
    }
    for order in end.orders.values().filter(|order| order.status == "Cancelled") {
        let Some(begun) = begun.get(&order.id) else { continue };
        let user = order.fields.user.as_str();
        match order.reason.as_deref() {
            Some("account_not_found") => {
                if opened.get(user).is_some_and(|opened| opened < begun) {
                    verdict.wrong("S4", format!("order {} of {user} found no account, and there was one", order.id));
                }
            }
            Some("insufficient_funds") => {
                let none = Account::default();
                let ledger = &end.accounts.get(user).unwrap_or(&none).ledger;
                let was_there = |entry: &super::history::Entry| {
                    entry.order.is_none() && surely.get(&(user, entry.amount)).is_some_and(|at| at < begun)
                };
                let least = ledger.iter().rposition(was_there);
                let least = least.and_then(|before| ledger[before..].iter().map(|entry| entry.balance_after).min());
                if least.is_some_and(|least| least >= order.fields.amount) {
                    verdict.wrong("S4", format!("order {} of {user} found too little, and there always was enough", order.id));
                }
            }
            other => verdict.wrong("S4", format!("order {} was cancelled for {other:?}", order.id)),
        }
    }
}
