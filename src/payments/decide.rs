//! The rule: what a batch of payment requests means for the accounts. Pure; no async, no SQL.

use std::collections::{HashMap, HashSet};

use foldhash::fast::RandomState;
use uuid::{Builder, Uuid};

use crate::contracts::PaymentRequested;
use crate::user_id::UserId;

/// A locked account, whose balance moves as the batch is decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    pub id: i64,
    /// Minor units.
    pub balance: i64,
}

/// Hashed fast: clients choose the names, but know no seed, and what they could make collide is one batch.
pub type Accounts = HashMap<UserId, Held, RandomState>;

/// Orders of a batch.
pub type Orders = HashSet<Uuid, RandomState>;

/// What was decided on one order, for ever (S7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Paid,
    InsufficientFunds,
    AccountNotFound,
}

impl Verdict {
    /// The event id of the result that says so: always the same for one order and one verdict. A database that was restored to an earlier
    /// moment decides anew what is still on the log, and its results are then repeats of those that others have (S14), not new events.
    ///
    /// Mixed one to one before the six bits of UUID version 8 are set, so ids that differ little make no equal ones.
    pub fn result_event_id(self, order_id: Uuid) -> Uuid {
        // Never to be changed: results on the log and in backups bear what comes of them.
        let salt: u128 = match self {
            Self::Paid => 0x5f1d_36f1_02a5_94c3_8e2b_07d9_61f4_ba71,
            Self::InsufficientFunds => 0xc3a9_5c8d_fe60_1b27_79d4_e813_2d8f_4605,
            Self::AccountNotFound => 0x28e7_9b40_b35f_cd16_f261_4a9c_d70b_83ef,
        };
        let mut mixed = order_id.as_u128() ^ salt;
        for odd in [0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835, 0xc2b2_ae3d_27d4_eb4f_1656_67b1_9e37_79f9] {
            mixed = (mixed ^ (mixed >> 61)).wrapping_mul(odd);
        }
        Builder::from_custom_bytes((mixed ^ (mixed >> 64)).to_be_bytes()).into_uuid()
    }
}

/// One new decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Which request of the batch it decides.
    pub index: usize,
    pub verdict: Verdict,
    /// Of a paid order: the account and its balance afterwards, in minor units.
    pub debit: Option<Debit>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Debit {
    pub account_id: i64,
    pub balance_after: i64,
}

/// Decides `requests` in log order over `accounts`, whose balances move as it goes (S8).
///
/// A request for an order that is among `decided`, or came earlier in the batch, decides nothing (S3): its order's first
/// decision answers it, whatever its amount or user says now.
pub fn decide(accounts: &mut Accounts, decided: &Orders, requests: &[&PaymentRequested]) -> Vec<Decision> {
    let mut seen = Orders::with_capacity_and_hasher(requests.len(), RandomState::default());
    let mut decisions = Vec::with_capacity(requests.len());
    for (index, request) in requests.iter().enumerate() {
        if decided.contains(&request.order_id) || !seen.insert(request.order_id) {
            continue;
        }
        let (verdict, debit) = match accounts.get_mut(&request.user_id) {
            None => (Verdict::AccountNotFound, None),
            Some(account) if account.balance < request.amount.minor() => (Verdict::InsufficientFunds, None),
            Some(account) => {
                account.balance -= request.amount.minor();
                (Verdict::Paid, Some(Debit { account_id: account.id, balance_after: account.balance }))
            }
        };
        decisions.push(Decision { index, verdict, debit });
    }
    decisions
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::money::Amount;
    use chrono::DateTime;
    use proptest::prelude::*;

    fn request(order: u128, user: u8, amount: i64) -> PaymentRequested {
        PaymentRequested {
            order_id: Uuid::from_u128(order),
            user_id: UserId::new(format!("u{user}")).unwrap(),
            amount: Amount::from_minor(amount).unwrap(),
            description: None,
            timestamp: DateTime::UNIX_EPOCH,
        }
    }

    fn accounts(balances: &[i64]) -> Accounts {
        let held =
            |(i, balance): (usize, &i64)| (UserId::new(format!("u{i}")).unwrap(), Held { id: i as i64 + 1, balance: *balance });
        balances.iter().enumerate().map(held).collect()
    }

    #[test]
    fn requests_are_decided_in_log_order_until_the_money_is_gone() {
        let mut accounts = accounts(&[100]);
        let requests = [request(1, 0, 60), request(2, 0, 50), request(3, 0, 40), request(4, 9, 1)];
        let verdicts: Vec<_> =
            decide(&mut accounts, &Orders::default(), &requests.iter().collect::<Vec<_>>()).iter().map(|d| d.verdict).collect();
        assert_eq!(verdicts, [Verdict::Paid, Verdict::InsufficientFunds, Verdict::Paid, Verdict::AccountNotFound]);
        assert_eq!(accounts[&UserId::new("u0").unwrap()].balance, 0);
    }

    /// One request after the other, each over a map of its own: the model that the batch must agree with.
    fn one_by_one(balances: &mut HashMap<u8, i64>, done: &mut HashMap<u128, Verdict>, order: u128, user: u8, amount: i64) -> bool {
        if done.contains_key(&order) {
            return false;
        }
        let verdict = match balances.get_mut(&user) {
            None => Verdict::AccountNotFound,
            Some(balance) if *balance < amount => Verdict::InsufficientFunds,
            Some(balance) => {
                *balance -= amount;
                Verdict::Paid
            }
        };
        done.insert(order, verdict);
        true
    }

    #[test]
    fn a_results_event_id_is_its_orders_and_its_verdicts_own_for_ever() {
        let all = [Verdict::Paid, Verdict::InsufficientFunds, Verdict::AccountNotFound];
        // Whoever changes these makes new events of old results.
        let order = Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0001);
        let ids = all.map(|verdict| verdict.result_event_id(order).to_string());
        assert_eq!(
            ids,
            [
                "de284533-bd5c-8fe2-8a4f-5b36799ba06d",
                "6867000a-9b74-8718-bd49-98b9f6d705f3",
                "baca82ac-60f5-8b43-9954-08be648be424",
            ]
        );
        let mut seen = HashSet::new();
        for near in 0..50_000 {
            for verdict in all {
                let id = verdict.result_event_id(Uuid::from_u128(order.as_u128() + near));
                assert_eq!((id.get_version_num(), id.get_variant()), (8, uuid::Variant::RFC4122));
                assert!(seen.insert(id), "{id} twice");
            }
        }
    }

    proptest! {
        #[test]
        fn a_batch_decides_as_one_request_after_the_other_would(
            start in proptest::collection::vec(0i64..500, 3),
            asked in proptest::collection::vec((0u128..40, 0u8..4, 1i64..200), 0..80),
            cut in 0usize..80,
        ) {
            let requests: Vec<_> = asked.iter().map(|(o, u, a)| request(*o, *u, *a)).collect();
            let cut = cut.min(requests.len());
            let mut held = accounts(&start);
            let mut decided = Orders::default();
            let mut verdicts = HashMap::new();
            // Two batches, wherever they are cut, mean the same as the whole.
            for part in [&requests[..cut], &requests[cut..]] {
                let part: Vec<_> = part.iter().collect();
                for decision in decide(&mut held, &decided, &part) {
                    let order = part[decision.index].order_id;
                    prop_assert!(verdicts.insert(order.as_u128(), decision.verdict).is_none(), "decided twice");
                    prop_assert_eq!(decision.debit.is_some(), decision.verdict == Verdict::Paid);
                }
                decided.extend(part.iter().map(|r| r.order_id));
            }
            let mut balances: HashMap<u8, i64> = start.iter().enumerate().map(|(i, b)| (i as u8, *b)).collect();
            let mut done = HashMap::new();
            for (order, user, amount) in &asked {
                one_by_one(&mut balances, &mut done, *order, *user, *amount);
            }
            prop_assert_eq!(&verdicts, &done);
            for (user, balance) in balances {
                prop_assert!(balance >= 0);
                prop_assert_eq!(held[&UserId::new(format!("u{user}")).unwrap()].balance, balance);
            }
        }
    }
}
