//! What the original system breaks, each as a test of its own: on real Kafka, with the real processes.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use diesel_async::SimpleAsyncConnection;
use shopd::messaging::log::{KafkaLog, Log, Record};
use uuid::Uuid;

use crate::scenario::place;
use crate::support::books::{self, assert_balanced, count, facts};
use crate::support::inside::until;
use crate::support::shop::{Four, PATIENCE, poll};
use crate::support::{kafka, postgres};

pub const REQUESTS: &str = "order-payment-requests";
pub const RESULTS: &str = "payment-status-updates";

pub struct Promise {
    pub shop: Four,
    pub log: KafkaLog,
    pub orders: shopd::db::Db,
    pub payments: shopd::db::Db,
}

pub async fn promise() -> Promise {
    let (orders, payments) = (postgres::database("orders").await, postgres::database("payments").await);
    let bootstrap = kafka::shared().await;
    let shop = Four::start(&bootstrap, &orders, &payments, &kafka::prefix()).await;
    let mut config = kafka::config(&bootstrap);
    config.topic_prefix = shop.prefix().to_owned();
    Promise { log: KafkaLog::new(&config), orders: books::connect(&orders), payments: books::connect(&payments), shop }
}

impl Promise {
    /// A record of another producer's.
    pub async fn forge(&self, topic: &str, key: &str, value: String, headers: &[(&'static str, String)]) {
        let headers = headers.iter().map(|(name, value)| (Cow::Borrowed(*name), Bytes::from(value.clone()))).collect();
        let (key, value) = (Some(Bytes::from(key.to_owned())), Some(Bytes::from(value)));
        let record = Record { topic: Arc::from(topic), key, value, headers, timestamp: Utc::now() };
        self.log.append(vec![record]).await.expect("acknowledged");
    }

    /// Another producer's record with a time of its own choosing.
    async fn forge_at(&self, topic: &str, value: String, timestamp: DateTime<Utc>) {
        let (key, value) = (Some(Bytes::from_static(b"ann")), Some(Bytes::from(value)));
        let record = Record { topic: Arc::from(topic), key, value, headers: Vec::new(), timestamp };
        self.log.append(vec![record]).await.expect("acknowledged");
    }

    /// How many records came onto a topic.
    async fn end(&self, topic: &str) -> i64 {
        let mut end = 0;
        for partition in 0..self.log.partitions(topic).await.unwrap() {
            end += self.log.bounds(topic, partition).await.unwrap().1;
        }
        end
    }

    /// Waits until everything on both topics is consumed.
    pub async fn consumed(&self) {
        for (topic, db) in [(REQUESTS, &self.payments), (RESULTS, &self.orders)] {
            let since = std::time::Instant::now();
            loop {
                let end = self.end(topic).await;
                if count(db, "select coalesce(sum(next_offset), 0)::bigint as n from consumer_offset").await == end {
                    break;
                }
                assert!(since.elapsed() < PATIENCE, "{topic} is not consumed");
                poll().await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn money_is_conserved_while_deposits_and_payments_race() {
    let p = promise().await;
    p.shop.client.account("racer", "100").await;
    let calls = (0..60).map(|i| {
        let client = p.shop.client.clone();
        tokio::spawn(async move {
            if i % 2 == 0 {
                client.post("/api/PaymentsProxy/racer/deposit", "0.1").await.expect(200);
                None
            } else {
                Some(place(&client, "racer", "7.03").await)
            }
        })
    });
    let placed: Vec<_> = futures::future::join_all(calls).await.into_iter().filter_map(Result::unwrap).collect();
    let mut paid = 0;
    for id in placed {
        paid += i64::from(p.shop.client.ended(&id).await["status"] == "Finished");
    }
    let left = 10_000 + 30 * 10 - paid * 703;
    assert_eq!(count(&p.payments, "select balance as n from account").await, left);
    assert!(left < 703, "as many were paid as the money allowed");
    assert_balanced(&p.orders, &p.payments).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_delivered_again_under_any_event_id_or_none_debits_once_and_is_answered_again() {
    let p = promise().await;
    p.shop.client.account("ann", "100").await;
    let id = place(&p.shop.client, "ann", "30").await;
    p.shop.client.ended(&id).await;
    let late = place(&p.shop.client, "ann", "1000").await;
    p.shop.client.ended(&late).await;
    p.shop.client.post("/api/PaymentsProxy/ann/deposit", "5000").await.expect(200);
    let request = |order: &str, user: &str, amount: &str| {
        format!(
            r#"{{"OrderId":"{order}","UserId":"{user}","Amount":{amount},"Description":null,"Timestamp":"2025-06-12T10:11:12.1234567Z"}}"#
        )
    };
    // The orders' own results.
    let mut answered = 2;
    for event_id in [Some(Uuid::new_v4()), Some(Uuid::new_v4()), None] {
        let headers: Vec<_> = event_id.iter().map(|id| ("ce_id", id.to_string())).collect();
        for (key, value) in [
            ("ann", request(&id, "ann", "30.00")),
            // Another amount, another user, another partition: the first decision stands.
            ("other-key", request(&id, "ann", "31")),
            // Decided while there was no money: a deposit afterwards changes nothing (S7).
            ("ann", request(&late, "ann", "1000")),
            ("ann", serde_json::to_string(&request(&id, "ann", "30.00")).unwrap()),
        ] {
            p.forge(REQUESTS, key, value, &headers).await;
            // One after the other: an order's repeats that are in one batch are answered together.
            answered += 1;
            until("a repeat is answered", async || p.end(RESULTS).await >= answered).await;
        }
    }
    p.consumed().await;
    assert_eq!(p.shop.client.balance("ann").await, "5070");
    assert_eq!(count(&p.payments, "select count(*) as n from transfer where order_id is not null").await, 1);
    assert_balanced(&p.orders, &p.payments).await;
    // Every repeat's answer carries the event id of the first.
    let mut ids = std::collections::HashMap::<Bytes, std::collections::HashSet<Vec<u8>>>::new();
    let mut results = 0;
    for partition in 0..p.log.partitions(RESULTS).await.unwrap() {
        let (mut from, end) = (0, p.log.bounds(RESULTS, partition).await.unwrap().1);
        while from < end {
            let fetched = p.log.fetch(RESULTS, partition, from, 1_000_000).await.unwrap();
            from = fetched.next_offset;
            for record in fetched.records {
                results += 1;
                ids.entry(record.key.clone().unwrap()).or_default().insert(record.headers.get("ce_id").unwrap().to_vec());
            }
        }
    }
    assert!(results >= answered, "{results} results");
    assert_eq!(ids.len(), 2);
    assert!(ids.values().all(|ids| ids.len() == 1), "{ids:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_or_contradicting_result_never_overwrites_a_final_status() {
    let p = promise().await;
    p.shop.client.account("ann", "100").await;
    let (paid, refused) = (place(&p.shop.client, "ann", "30").await, place(&p.shop.client, "ann", "300").await);
    let before = (p.shop.client.ended(&paid).await, p.shop.client.ended(&refused).await);
    let unknown = Uuid::new_v4();
    for (order, status) in [
        (&paid, "3"),
        (&paid, "\"Cancelled\""),
        (&paid, "\"New\""),
        (&paid, "1"),
        (&refused, "2"),
        (&refused, "\"Finished\""),
        (&unknown.to_string(), "2"),
    ] {
        p.forge(RESULTS, order, format!(r#"{{"OrderId":"{order}","Status":{status}}}"#), &[]).await;
    }
    p.consumed().await;
    assert_eq!((p.shop.client.ended(&paid).await, p.shop.client.ended(&refused).await), before);
    assert_balanced(&p.orders, &p.payments).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_accepted_order_has_its_request_in_the_same_commit() {
    let mut p = promise().await;
    p.shop.client.account("ann", "1000").await;
    // Nothing is published while the relay is dead, and orders dies in the middle of accepting.
    p.shop.relay.kill().await;
    let calls: Vec<_> = (0..200)
        .map(|_| {
            let client = p.shop.client.clone();
            let body = format!(r#"{{"orderId":"{}","userId":"ann","amount":1}}"#, Uuid::new_v4());
            tokio::spawn(async move { client.send("POST", "/api/OrdersProxy", &[], Some(&body)).await.map(|a| a.status) })
        })
        .collect();
    let since = std::time::Instant::now();
    while count(&p.orders, "select count(*) as n from orders").await < 20 {
        assert!(since.elapsed() < PATIENCE);
        tokio::task::yield_now().await;
    }
    p.shop.crash("orders").await;
    let accepted = futures::future::join_all(calls).await.into_iter().filter(|status| matches!(status, Ok(Ok(201)))).count();
    // Of one moment: what the old process had begun may still be committed.
    let both = "select (select count(*) from orders) || ' ' ||
                       (select count(*) from orders o join outbox_message m on m.payload like ('%' || o.id || '%')::bytea) as fact";
    let both = facts(&p.orders, both).await.remove(0);
    let (stored, requested) = both.split_once(' ').expect("two numbers");
    assert_eq!(requested, stored);
    assert!(stored.parse::<usize>().expect("a number") >= accepted, "{stored} stored, {accepted} accepted");
    p.shop.crash("relay").await;
    let since = std::time::Instant::now();
    while count(&p.orders, "select count(*) as n from orders where status <> 'Finished'").await > 0 {
        assert!(since.elapsed() < PATIENCE, "{}", p.shop.relay.log());
        poll().await;
    }
    assert_balanced(&p.orders, &p.payments).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neither_consumer_loses_a_message_when_it_dies_in_the_middle() {
    const AT_ONCE: usize = 75;
    let new = "select count(*) as n from orders where status = 'New'";
    let in_hand = "select count(*) as n from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'
                                                                and application_name in ('shopd-orders', 'shopd-payments')";
    let given_up = "select count(pg_terminate_backend(pid)) as n from pg_stat_activity
                     where datname = current_database() and wait_event_type = 'Lock'
                       and application_name in ('shopd-orders', 'shopd-payments')";
    let mut p = promise().await;
    p.shop.client.account("ann", "100000").await;
    let mut accepted = 0;
    for (role, hold, done) in [
        ("payments", "begin; lock table payment in share mode", "select count(*) as n from payment"),
        ("orders", "begin; lock table order_event in share mode", "select count(*) as n from orders where status <> 'New'"),
    ] {
        let db = if role == "payments" { p.payments.clone() } else { p.orders.clone() };
        accepted += futures::future::join_all((0..AT_ONCE).map(|_| place(&p.shop.client, "ann", "1"))).await.len() as i64;
        until("the first ones have ended", async || count(&p.orders, new).await == 0).await;
        // The others it takes in hand, and what it does with them waits for this.
        let mut holder = db.dedicated().await.unwrap();
        holder.batch_execute(hold).await.unwrap();
        accepted += futures::future::join_all((0..AT_ONCE).map(|_| place(&p.shop.client, "ann", "1"))).await.len() as i64;
        until("a batch in hand", async || count(&db, in_hand).await > 0).await;
        let done = count(&db, done).await;
        assert!(0 < done && done < accepted, "{role}: {done} of {accepted}");
        let process = if role == "payments" { &mut p.shop.payments } else { &mut p.shop.orders };
        process.kill().await;
        // What the server had been asked for and had not done ends as well: nothing of it comes about after the process is gone.
        count(&db, given_up).await;
        until("nothing in hand", async || count(&db, in_hand).await == 0).await;
        holder.batch_execute("rollback").await.unwrap();
        p.shop.crash(role).await;
        until("all have ended", async || count(&p.orders, new).await == 0).await;
    }
    assert_eq!(count(&p.orders, "select count(*) as n from orders where status = 'Finished'").await, accepted);
    assert_eq!(count(&p.payments, "select count(*) as n from transfer where order_id is not null").await, accepted);
    assert_balanced(&p.orders, &p.payments).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_cannot_be_read_is_a_dead_letter_and_holds_nobody_up() {
    let p = promise().await;
    p.shop.client.account("ann", "100").await;
    for bad in ["", "{", "[]", r#"{"OrderId":"x"}"#, "\u{0}\u{1}"] {
        p.forge(REQUESTS, "ann", bad.into(), &[("odd\u{0}", "\u{0}".into())]).await;
        p.forge(RESULTS, "ann", bad.into(), &[]).await;
    }
    let id = place(&p.shop.client, "ann", "30").await;
    assert_eq!(p.shop.client.ended(&id).await["status"], "Finished");
    p.consumed().await;
    assert_eq!(count(&p.payments, "select count(*) as n from dead_letter").await, 5);
    assert_eq!(count(&p.orders, "select count(*) as n from dead_letter").await, 5);
    assert_balanced(&p.orders, &p.payments).await;
}

/// The broker takes any time in the past; Postgres's times begin in 4713 BC.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_with_a_time_that_the_database_cannot_hold_is_processed_and_holds_nobody_up() {
    let p = promise().await;
    p.shop.client.account("ann", "100").await;
    let ended = place(&p.shop.client, "ann", "10").await;
    p.shop.client.ended(&ended).await;
    let forged = Uuid::new_v4();
    for millis in [-700_000_000_000_000, -1] {
        let long_ago = DateTime::from_timestamp_millis(millis).unwrap();
        p.forge_at(REQUESTS, format!(r#"{{"OrderId":"{forged}","UserId":"ann","Amount":5}}"#), long_ago).await;
        p.forge_at(REQUESTS, "{".into(), long_ago).await;
        p.forge_at(RESULTS, format!(r#"{{"OrderId":"{ended}","Status":3}}"#), long_ago).await;
    }
    let id = place(&p.shop.client, "ann", "30").await;
    assert_eq!(p.shop.client.ended(&id).await["status"], "Finished");
    p.consumed().await;
    assert_eq!(p.shop.client.balance("ann").await, "55");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_trace_and_one_request_id_run_from_the_request_to_the_result() {
    let p = promise().await;
    p.shop.client.account("ann", "100").await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let headers = [("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), ("X-Request-Id", "request-7")];
    let placed = p.shop.client.send("POST", "/api/OrdersProxy", &headers, Some(r#"{"userId":"ann","amount":1}"#)).await.unwrap();
    let id = placed.expect(201).json()["id"].as_str().unwrap().to_owned();
    p.shop.client.ended(&id).await;
    for topic in [REQUESTS, RESULTS] {
        let mut found = 0;
        for partition in 0..p.log.partitions(topic).await.unwrap() {
            for record in p.log.fetch(topic, partition, 0, 1_000_000).await.unwrap().records {
                found += 1;
                let header = |name: &str| String::from_utf8(record.headers.get(name).unwrap().to_vec()).unwrap();
                assert_eq!(&header("traceparent")[3..35], trace);
                assert_eq!(header("x-request-id"), "request-7");
                assert_eq!(header("ce_specversion"), "1.0");
                for name in ["ce_id", "ce_type", "ce_source", "ce_time"] {
                    assert!(!header(name).is_empty());
                }
            }
        }
        assert_eq!(found, 1, "{topic}");
    }
    let traced = "select count(*) as n from payment where traceparent like '%4bf92f3577b34da6a3ce929d0e0e4736%' and source = '/shopd/orders' and log_offset = 0";
    assert_eq!(count(&p.payments, traced).await, 1);
}
