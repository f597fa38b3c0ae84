//! Deposits: those that arrive together commit together, with the answers of those that have a key. `settle` is the rule, pure.

use std::collections::HashSet;
use std::sync::Arc;

use futures::FutureExt;

use crate::db::{Db, DbError, GroupCommit, each_for_itself};
use crate::http::idempotency::{self, Keyed, Plan, Settled};
use crate::money::{Amount, Minor};
use crate::user_id::UserId;

use super::Deposited;
use super::account::{Account, DepositError};
use super::decide::{Accounts, Held};
use super::known::Known;
use super::store::{self, Entry};

/// A deposit on its way into the database.
#[derive(Clone, Debug)]
pub struct Deposit {
    pub user: UserId,
    pub amount: Amount,
    pub key: Option<Keyed<Deposited>>,
}

pub type Deposits = GroupCommit<Deposit, Settled<Deposited>>;

/// Starts the committer of `db`'s deposits; what is `known` of their accounts is not true any more.
pub fn deposits(db: Db, known: Known) -> Deposits {
    let runtime = db.runtime().clone();
    GroupCommit::start(&runtime, "deposits", move |batch: Vec<Deposit>| {
        let (db, known) = (db.clone(), known.clone());
        async move {
            let users: Vec<UserId> = batch.iter().map(|deposit| deposit.user.clone()).collect();
            let settled = each_for_itself(batch, |batch| deposit_together(&db, batch)).await;
            known.forget(&users);
            settled.into_iter().map(|settled| settled.unwrap_or_else(Settled::from)).collect()
        }
        .boxed()
    })
}

async fn deposit_together(db: &Db, batch: Arc<Vec<Deposit>>) -> Result<Vec<Settled<Deposited>>, DbError> {
    db.transaction(move |conn| {
        let batch = batch.clone();
        async move {
            let conn = &*conn;
            let plan = Plan::claim(conn, batch.iter().map(|deposit| deposit.key.as_ref()).collect()).await?;
            let due = plan.due(&batch);
            if due.is_empty() {
                return Ok(plan.settle(Vec::new())?.0);
            }
            let users: HashSet<&str> = due.iter().map(|deposit| deposit.user.as_str()).collect();
            let (mut accounts, at) = store::lock(conn, &users.into_iter().collect::<Vec<_>>()).await?;
            let (results, entries) = settle(&mut accounts, &due);
            let (settled, answers) = plan.settle(results)?;
            if entries.is_empty() {
                idempotency::store(conn, answers).await?;
            } else {
                let moved: Vec<Held> = accounts.into_values().collect();
                // To their ends and in their order: of a transaction that failed the later ones say only that it did, not why.
                let (moved, written, stored) = tokio::join!(
                    store::set_balances(conn, &moved, at),
                    store::write_entries(conn, &entries, at),
                    idempotency::store(conn, answers)
                );
                moved.and(written).and(stored)?;
            }
            Ok(settled)
        }
        .boxed()
    })
    .await
}

/// Adds the deposits in the order in which they came; one that cannot be added fails alone.
fn settle(accounts: &mut Accounts, batch: &[&Deposit]) -> (Vec<Deposited>, Vec<Entry>) {
    let mut entries = Vec::with_capacity(batch.len());
    let add = |deposit: &&Deposit| {
        let account = accounts.get_mut(&deposit.user).ok_or(DepositError::NoAccount)?;
        let amount = deposit.amount.minor();
        account.balance = account.balance.checked_add(amount).ok_or(DepositError::BalanceTooLarge)?;
        entries.push(Entry { account_id: account.id, amount, order_id: None, balance_after: account.balance });
        Ok(Account { id: account.id, user_id: deposit.user.clone(), balance: Minor(account.balance) })
    };
    let answers = batch.iter().map(add).collect();
    (answers, entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn deposit(user: u8, amount: i64) -> Deposit {
        Deposit { user: UserId::new(format!("u{user}")).unwrap(), amount: Amount::from_minor(amount).unwrap(), key: None }
    }

    #[test]
    fn a_deposit_that_cannot_be_added_fails_alone() {
        let held = |id, balance| (UserId::new(format!("u{id}")).unwrap(), Held { id, balance });
        let mut accounts: Accounts = [held(1, i64::MAX - 5), held(2, 0)].into_iter().collect();
        let (answers, entries) = settle(&mut accounts, &[&deposit(1, 10), &deposit(9, 1), &deposit(2, 7), &deposit(1, 5)]);
        assert!(matches!(answers[0], Err(DepositError::BalanceTooLarge)));
        assert!(matches!(answers[1], Err(DepositError::NoAccount)));
        assert_eq!(answers[2].as_ref().unwrap().balance, Minor(7));
        assert_eq!(answers[3].as_ref().unwrap().balance, Minor(i64::MAX));
        assert_eq!(entries.len(), 2);
    }

    proptest! {
        #[test]
        fn every_line_carries_the_balance_that_follows_from_the_line_before(given in proptest::collection::vec((0u8..3, 1i64..1000), 0..50)) {
            let mut accounts: Accounts = (0..3u8).map(|i| (UserId::new(format!("u{i}")).unwrap(), Held { id: i64::from(i), balance: 0 })).collect();
            let batch: Vec<_> = given.iter().map(|(u, a)| deposit(*u, *a)).collect();
            let (answers, entries) = settle(&mut accounts, &batch.iter().collect::<Vec<_>>());
            // Each of them has an account, and its line says what its answer says.
            let added: Vec<&Account> = answers.iter().filter_map(|answer| answer.as_ref().ok()).collect();
            prop_assert_eq!((answers.len(), added.len(), entries.len()), (batch.len(), batch.len(), batch.len()));
            for (entry, account) in entries.iter().zip(added) {
                prop_assert_eq!((entry.account_id, Minor(entry.balance_after)), (account.id, account.balance));
            }
            for user in 0..3i64 {
                let mut balance = 0;
                for entry in entries.iter().filter(|e| e.account_id == user) {
                    balance += entry.amount;
                    prop_assert_eq!(entry.balance_after, balance);
                }
            }
        }
    }
}
