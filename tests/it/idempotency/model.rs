//! Group commit with keys against a model that takes one request after the other.

use std::collections::HashMap;

use actix_web::http::StatusCode;
use diesel_async::SimpleAsyncConnection;
use futures::future::join_all;
use proptest::prelude::*;
use proptest::test_runner::{Config as Cases, TestCaseError};
use shopd::db::{self, Schema};
use shopd::http::Answer;
use shopd::http::idempotency::{Key, Keyed, REPLAYED, Settled};
use shopd::money::Amount;
use shopd::payments::{DepositError, OpenError, Payments};
use shopd::user_id::UserId;

use crate::support::books::connect;
use crate::support::postgres;

/// What is asked: a user, a key, and hundredths to deposit, or with 0 to open the account.
#[derive(Clone, Debug)]
struct Asked {
    user: u8,
    key: Option<u8>,
    amount: i64,
}

/// Status, body, whether it is a replay.
type Seen = (u16, String, bool);

fn round() -> impl Strategy<Value = Vec<Asked>> {
    let of = |amount: BoxedStrategy<i64>| {
        let asked = (0u8..3, proptest::option::of(0u8..3), amount);
        proptest::collection::vec(asked.prop_map(|(user, key, amount)| Asked { user, key, amount }), 1..25)
    };
    // A round is of one kind: each kind has a committer of its own, and two have no order.
    prop_oneof![1 => of(Just(0).boxed()), 3 => of((1i64..4).boxed())]
}

fn user(n: u8) -> UserId {
    UserId::new(format!("u{n}")).unwrap()
}

fn plain<E>(result: &Result<shopd::payments::Account, E>, status: impl Fn(&E) -> u16) -> (u16, String) {
    match result {
        Ok(account) => (200, account.balance.to_string()),
        Err(error) => (status(error), String::new()),
    }
}

fn opened(result: &Result<shopd::payments::Account, OpenError>) -> (u16, String) {
    plain(result, |error| if matches!(error, OpenError::Exists) { 409 } else { 503 })
}

fn deposited(result: &Result<shopd::payments::Account, DepositError>) -> (u16, String) {
    plain(result, |error| if matches!(error, DepositError::NoAccount) { 404 } else { 503 })
}

fn keyed<R: 'static>(asked: &Asked, plain: fn(&R) -> (u16, String)) -> Option<Keyed<R>> {
    let scope = format!("POST /{}/{}", asked.user, asked.amount == 0);
    let key = Key::new(scope, asked.key?.to_string(), asked.amount.to_string().as_bytes());
    Some(Keyed::new(key, move |result| {
        let (status, body) = plain(result);
        Answer { status: StatusCode::from_u16(status).unwrap(), headers: Vec::new(), body: Some(body.into()) }
    }))
}

fn seen<R>(settled: Settled<R>, plain: fn(&R) -> (u16, String)) -> Seen {
    match settled {
        Settled::Done(result) => {
            let (status, body) = plain(&result);
            (status, body, false)
        }
        Settled::Answered(answer) => {
            let body = String::from_utf8(answer.body.unwrap_or_default().to_vec()).unwrap();
            (answer.status.as_u16(), body, answer.headers.iter().any(|(name, _)| name == REPLAYED))
        }
        Settled::Mismatch => (422, String::new(), false),
        Settled::InProgress => (409, "in progress".into(), false),
    }
}

async fn ask(payments: &Payments, asked: &Asked) -> Seen {
    match Amount::from_minor(asked.amount) {
        Some(amount) => seen(payments.deposit(user(asked.user), amount, keyed(asked, deposited)).await, deposited),
        None => seen(payments.open_account(user(asked.user), keyed(asked, opened)).await, opened),
    }
}

/// A shop of one thread.
#[derive(Default)]
struct Model {
    balances: HashMap<u8, i64>,
    stored: HashMap<(u8, bool, u8), (i64, u16, String)>,
}

impl Model {
    fn ask(&mut self, asked: &Asked) -> Seen {
        let Some(key) = asked.key else {
            let (status, body) = self.apply(asked);
            return (status, body, false);
        };
        let key = (asked.user, asked.amount == 0, key);
        if let Some((amount, status, body)) = self.stored.get(&key) {
            return if *amount == asked.amount { (*status, body.clone(), true) } else { (422, String::new(), false) };
        }
        let (status, body) = self.apply(asked);
        self.stored.insert(key, (asked.amount, status, body.clone()));
        (status, body, false)
    }

    fn apply(&mut self, asked: &Asked) -> (u16, String) {
        use std::collections::hash_map::Entry;
        match (self.balances.entry(asked.user), asked.amount) {
            (Entry::Occupied(_), 0) => (409, String::new()),
            (Entry::Vacant(free), 0) => {
                free.insert(0);
                (200, "0".into())
            }
            (Entry::Vacant(_), _) => (404, String::new()),
            (Entry::Occupied(mut balance), amount) => {
                *balance.get_mut() += amount;
                (200, shopd::money::Minor(*balance.get()).to_string())
            }
        }
    }
}

#[test]
fn requests_that_commit_together_are_answered_as_if_they_came_one_after_the_other() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (db, payments) = runtime.block_on(async {
        let db = connect(&postgres::database("payments").await);
        db::migrate(&db, &[Schema::Payments]).await.expect("a schema");
        (db.clone(), Payments::new(db))
    });
    let cases = Cases { cases: 48, failure_persistence: None, ..Cases::default() };
    proptest!(cases, |(rounds in proptest::collection::vec(round(), 1..6))| {
        let mut model = Model::default();
        runtime.block_on(async {
            let clean = "truncate account, transfer, idempotency_key";
            db.dedicated().await.unwrap().batch_execute(clean).await.unwrap();
            // Somebody has an account from the beginning.
            let first = vec![Asked { user: 0, key: None, amount: 0 }];
            for round in std::iter::once(&first).chain(&rounds) {
                // They queue in the order in which they are first polled, and are cut into batches as it happens.
                let answers = join_all(round.iter().map(|asked| ask(&payments, asked))).await;
                let expected: Vec<Seen> = round.iter().map(|asked| model.ask(asked)).collect();
                prop_assert_eq!(answers, expected, "{:?}", round);
            }
            Ok::<_, TestCaseError>(())
        })?;
    });
}
