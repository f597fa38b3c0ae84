//! Batches of a few, each written with its offsets in one statement: where something has moved that it was decided over, nothing is.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel_async::SimpleAsyncConnection;
use shopd::contracts::{Envelope, PaymentRequested};
use shopd::db::{DbError, Notifier};
use shopd::messaging::consumer::{Fence, Move};
use shopd::messaging::{Delivery, Handler, Position, Received};
use shopd::money::Amount;
use shopd::payments::{Known, OnOrder, Payments};
use shopd::trace::TraceContext;
use shopd::user_id::UserId;
use uuid::Uuid;

use crate::support::books::{count, facts};
use crate::support::inside::{Inside, REQUESTS, done, until};

const EPOCH: i64 = 7;
const LEDGER_DIFFERS: &str = "select count(*) as n from account a
    where a.balance <> (select sum(case when to_account = a.id then amount else -amount end) from transfer where account_id = a.id)";

/// Payments' database where ann has an account and one partition is owned, and a handler that has seen nothing.
struct Stage {
    shop: Inside,
    handler: OnOrder,
    known: Known,
}

/// Payments of these orders, of so many minor units each.
fn requests(orders: &[(u128, i64)], from: i64) -> Vec<Received<PaymentRequested>> {
    let request = |(&(order, minor), offset): (&(u128, i64), i64)| Received {
        event: PaymentRequested {
            order_id: Uuid::from_u128(order),
            user_id: UserId::new("ann").unwrap(),
            amount: Amount::from_minor(minor).unwrap(),
            description: None,
            timestamp: DateTime::UNIX_EPOCH,
        },
        delivery: Delivery {
            position: Position { topic: REQUESTS.into(), partition: 0, offset },
            key: None,
            value: None,
            headers: Default::default(),
            envelope: Envelope::default(),
            trace: TraceContext::new_root(),
            published_at: Utc::now(),
            received_at: Utc::now(),
        },
    };
    orders.iter().zip(from..).map(request).collect()
}

impl Stage {
    async fn new(minor: i64) -> Self {
        let shop = Inside::on_postgres().await;
        shop.account("ann", minor).await;
        let owned = format!("insert into consumer_offset (topic, partition, owner, epoch) values ('{REQUESTS}', 0, 'me', {EPOCH})");
        shop.payments.get().await.unwrap().batch_execute(&owned).await.unwrap();
        let known = Known::default();
        Self { handler: OnOrder::new(Notifier::local([]), known.clone()), known, shop }
    }

    /// Of another process, which tells this one nothing.
    async fn deposit_elsewhere(&self, minor: i64) {
        let payments = Payments::new(self.shop.payments.clone());
        done(payments.deposit(UserId::new("ann").unwrap(), Amount::from_minor(minor).unwrap(), None).await).unwrap();
    }

    async fn apply_as(&self, epoch: i64, orders: &[(u128, i64)]) -> Result<bool, DbError> {
        let from = count(&self.shop.payments, "select next_offset as n from consumer_offset").await;
        let moves = [Move { partition: 0, from, to: from + orders.len() as i64, epoch }];
        let fence = Fence { topic: REQUESTS, moves: &moves, lease: Duration::from_secs(10) };
        let conn = self.shop.payments.get().await.unwrap();
        self.handler.apply_at_once(&conn, &fence, &requests(orders, from)).await
    }

    async fn apply(&self, orders: &[(u128, i64)]) -> Result<bool, DbError> {
        self.apply_as(EPOCH, orders).await
    }

    /// Offset, balance, decisions with what they were, debits, results.
    async fn books(&self) -> String {
        let books = "select concat_ws(' ', (select next_offset from consumer_offset), (select balance from account),
            (select string_agg(coalesce(failure_reason, 'paid'), ',' order by log_offset) from payment),
            (select count(*) from transfer where order_id is not null), (select count(*) from outbox_message)) as fact";
        facts(&self.shop.payments, books).await.remove(0)
    }

    fn knows(&self) -> bool {
        self.known.all([&UserId::new("ann").unwrap()]).is_some()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_few_are_decided_over_what_the_ones_before_left() {
    let stage = Stage::new(1_000).await;
    assert!(!stage.knows());
    assert!(stage.apply(&[(1, 300)]).await.unwrap());
    assert_eq!(stage.books().await, "1 700 paid 1 1");
    assert!(stage.knows());
    assert!(stage.apply(&[(2, 300), (3, 300)]).await.unwrap());
    // Of two that the rest does not do for, the second: the first one's money is gone. And an order that comes twice is decided once.
    assert!(stage.apply(&[(4, 100), (5, 100), (4, 100)]).await.unwrap());
    assert_eq!(stage.books().await, "6 0 paid,paid,paid,paid,insufficient_funds 4 5");
    assert_eq!(count(&stage.shop.payments, LEDGER_DIFFERS).await, 0);
    let chained = "select count(*) as n from (select balance_after, lag(balance_after) over (order by id) - amount as follows
                     from transfer) l where follows <> balance_after";
    assert_eq!(count(&stage.shop.payments, chained).await, 0);
    // All of one batch at one time, and the account's is its last entry's.
    let times = "select count(distinct t) as n from (select updated_at as t from account union all select max(created_at) from transfer
                   union all select decided_at from payment where log_offset in (3, 4)
                   union all select created_at from outbox_message where event_id in (select result_event_id from payment where log_offset >= 3)) x";
    assert_eq!(count(&stage.shop.payments, times).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_an_account_that_has_moved_meanwhile_nothing_is_written() {
    let stage = Stage::new(1_000).await;
    stage.apply(&[(1, 300)]).await.unwrap();
    stage.deposit_elsewhere(50).await;
    let before = stage.books().await;
    let lost = stage.apply(&[(2, 300)]).await;
    assert!(matches!(&lost, Err(DbError::Unavailable(text)) if text.contains("could not serialize")), "{lost:?}");
    assert_eq!(stage.books().await, before);
    // It was forgotten, so the next one looks.
    assert!(stage.apply(&[(2, 300)]).await.unwrap());
    assert_eq!(stage.books().await, "2 450 paid,paid 2 2");

    // Without the guard the same is written, and the books do not balance.
    stage.deposit_elsewhere(50).await;
    let unguarded =
        "create or replace function expect_unchanged(moved bigint, expected int) returns void language plpgsql as 'begin end'";
    stage.shop.payments.get().await.unwrap().batch_execute(unguarded).await.unwrap();
    assert!(stage.apply(&[(3, 300)]).await.unwrap());
    assert_eq!(count(&stage.shop.payments, LEDGER_DIFFERS).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_moves_while_the_statement_waits_for_it_is_seen_and_what_does_not_move_after_all_is_not() {
    let stage = Stage::new(1_000).await;
    stage.apply(&[(1, 300)]).await.unwrap();
    let mut other = stage.shop.payments.dedicated().await.unwrap();
    for (order, end, lost) in [(2, "rollback", false), (3, "commit", true)] {
        let before = stage.books().await;
        other.batch_execute("begin; update account set balance = balance + 1, updated_at = clock_timestamp()").await.unwrap();
        let orders = [(order, 100)];
        let (applied, ()) = tokio::join!(stage.apply(&orders), async {
            let waits =
                "select count(*) as n from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
            until("it waits", async || count(&stage.shop.payments, waits).await > 0).await;
            other.batch_execute(end).await.unwrap();
        });
        match applied {
            Err(DbError::Unavailable(text)) if lost => assert!(text.contains("could not serialize"), "{text}"),
            applied => assert!(applied.unwrap() && !lost),
        }
        let moved = stage.books().await != before;
        assert!(moved, "by the one or by the other");
        assert_eq!(count(&stage.shop.payments, "select count(*) as n from payment").await, 2, "and not by both");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_refused_for_what_was_seen_some_time_ago() {
    let stage = Stage::new(100).await;
    stage.apply(&[(1, 100)]).await.unwrap();
    stage.deposit_elsewhere(100).await;
    assert!(stage.knows(), "and what it knows is that there is nothing left");
    assert!(stage.apply(&[(2, 100)]).await.unwrap());
    assert_eq!(stage.books().await, "2 0 paid,paid 2 2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_a_lost_lease_or_for_an_order_that_is_decided_nothing_is_written() {
    let stage = Stage::new(1_000).await;
    stage.apply(&[(1, 300)]).await.unwrap();
    let before = stage.books().await;
    assert!(matches!(stage.apply_as(EPOCH - 1, &[(2, 300)]).await, Err(DbError::Fenced(_))));
    assert!(matches!(stage.apply(&[(2, 300), (1, 300)]).await, Err(DbError::Duplicate(_))));
    assert_eq!(stage.books().await, before);
    // More of them than are worth it are left to the transaction.
    let many: Vec<(u128, i64)> = (10..75).map(|order| (order, 1)).collect();
    assert!(!stage.apply(&many).await.unwrap());
    assert_eq!(stage.books().await, before);
}
