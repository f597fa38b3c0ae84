//! What was on a topic once comes again: from offset 0, under new event ids, without headers, contradicting itself, about orders that
//! nobody knows. No balance and no status moves, and nothing is stuck.

use std::collections::BTreeMap;
use std::sync::Arc;

use diesel_async::RunQueryDsl;
use shopd::contracts::Headers;
use shopd::db::{Db, sql};
use shopd::messaging::log::{Log, Record, StoredRecord};
use uuid::Uuid;

use crate::promises::{Promise, REQUESTS, RESULTS, promise};
use crate::scenario::place;
use crate::support::books::{assert_balanced, count, facts};
use crate::support::shop::{PATIENCE, poll};

const ORDERS: usize = 120;

/// Everything that must not move. How far each reader is, what lies in the outbox and when it was looked at may.
async fn state(p: &Promise) -> BTreeMap<&'static str, Vec<String>> {
    let mut state = BTreeMap::new();
    for (db, table, statement) in [
        (&p.payments, "account", "select a::text as fact from account a order by id"),
        (&p.payments, "transfer", "select t::text as fact from transfer t order by account_id, id"),
        (&p.payments, "payment", "select p::text as fact from payment p order by order_id"),
        (&p.orders, "orders", "select o::text as fact from orders o order by id"),
        (&p.orders, "order_event", "select e::text as fact from order_event e order by order_id, status"),
    ] {
        state.insert(table, facts(db, statement).await);
    }
    state
}

async fn everything(p: &Promise, topic: &str) -> Vec<StoredRecord> {
    let mut all = Vec::new();
    for partition in 0..p.log.partitions(topic).await.unwrap() {
        let (mut at, end) = p.log.bounds(topic, partition).await.unwrap();
        while at < end {
            let fetched = p.log.fetch(topic, partition, at, 1_000_000).await.unwrap();
            all.extend(fetched.records);
            at = fetched.next_offset;
        }
    }
    all
}

/// The same payloads again, each with the headers that `headers` makes of its own.
async fn again(p: &Promise, topic: &str, records: &[StoredRecord], headers: impl Fn(&StoredRecord) -> Headers) {
    let record = |record: &StoredRecord| Record {
        topic: Arc::from(topic),
        key: record.key.clone(),
        value: record.value.clone(),
        headers: headers(record).iter().map(|(name, value)| (name.into_owned().into(), value.to_vec().into())).collect(),
        timestamp: chrono::Utc::now(),
    };
    p.log.append(records.iter().map(record).collect()).await.expect("acknowledged");
}

/// The readers begin at 0, as if their offsets had been lost; under a new epoch, as whoever moves an offset by hand must.
async fn rewind(db: &Db) {
    let mut conn = db.get().await.unwrap();
    sql("update consumer_offset set next_offset = 0, owner = null, epoch = epoch + 1").execute(&mut conn).await.unwrap();
}

async fn shop_with_a_past() -> Promise {
    let p = promise().await;
    for user in ["ann", "bob", "eve"] {
        p.shop.client.account(user, "200").await;
    }
    let users = ["ann", "bob", "eve", "nobody"];
    let placed: Vec<_> = (0..ORDERS)
        .map(|i| {
            let client = p.shop.client.clone();
            tokio::spawn(async move { place(&client, users[i % 4], ["1.5", "9.99", "42"][i % 3]).await })
        })
        .collect();
    for id in futures::future::join_all(placed).await {
        p.shop.client.ended(&id.unwrap()).await;
    }
    p.consumed().await;
    p
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_of_both_topics_under_any_ids_moves_no_balance_and_no_status_and_nothing_is_stuck() {
    let p = shop_with_a_past().await;
    let (requests, results) = (everything(&p, REQUESTS).await, everything(&p, RESULTS).await);
    assert!(requests.len() >= ORDERS && results.len() >= ORDERS);
    let before = state(&p).await;

    // From offset 0.
    rewind(&p.payments).await;
    rewind(&p.orders).await;
    p.consumed().await;
    assert_eq!(state(&p).await, before, "a replay from offset 0 moved something");

    // Under new event ids; then without any header.
    for with_id in [true, false] {
        let headers = |record: &StoredRecord| {
            if with_id { record.headers.with([("ce_id", Uuid::new_v4().to_string().as_bytes())]) } else { Headers::new() }
        };
        again(&p, REQUESTS, &requests, headers).await;
        again(&p, RESULTS, &results, headers).await;
        p.consumed().await;
        assert_eq!(state(&p).await, before, "payloads again, with ids of their own: {with_id}");
    }

    // Every finished order is cancelled by somebody, every cancelled one finished; and results of orders that never were.
    let ended = facts(&p.orders, "select id || ' ' || status as fact from orders order by 1").await;
    for line in &ended {
        let (id, status) = line.split_once(' ').unwrap();
        let other = if status == "Finished" { "3" } else { "2" };
        p.forge(RESULTS, id, format!(r#"{{"OrderId":"{id}","Status":{other}}}"#), &[]).await;
        let unknown = Uuid::new_v4();
        p.forge(RESULTS, &unknown.to_string(), format!(r#"{{"OrderId":"{unknown}","Status":2}}"#), &[]).await;
    }
    p.consumed().await;
    assert_eq!(state(&p).await, before, "a contradiction or an unknown order moved something");

    // Nothing is stuck, and nothing was put aside.
    p.shop.client.account("zoe", "10").await;
    let id = place(&p.shop.client, "zoe", "4").await;
    assert_eq!(p.shop.client.ended(&id).await["status"], "Finished");
    for db in [&p.payments, &p.orders] {
        assert_eq!(count(db, "select count(*) as n from dead_letter").await, 0);
    }
    assert_balanced(&p.orders, &p.payments).await;
}

/// The negative control: without payments' inbox, and the ledger's own rule behind it, the same replay charges again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_inbox_and_the_unique_debit_a_replay_charges_twice() {
    let p = shop_with_a_past().await;
    let before = count(&p.payments, "select count(*) as n from transfer where order_id is not null").await;
    let mut conn = p.payments.get().await.unwrap();
    for statement in ["drop index transfer_by_order", "drop trigger payment_is_immutable on payment", "delete from payment"] {
        sql(statement).execute(&mut conn).await.unwrap();
    }
    p.shop.client.post("/api/PaymentsProxy/ann/deposit", "1000").await.expect(200);
    rewind(&p.payments).await;
    let since = std::time::Instant::now();
    while count(&p.payments, "select count(*) as n from transfer where order_id is not null").await == before {
        assert!(since.elapsed() < PATIENCE, "the replay charged nobody twice: the test above cannot fail");
        poll().await;
    }
}
