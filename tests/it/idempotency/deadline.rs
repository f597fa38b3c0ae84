//! What the gateway no longer waits for: it is answered in time though the database hangs, and nothing of it is left half done.

use std::time::{Duration, Instant};

use diesel_async::SimpleAsyncConnection;
use futures::future::join_all;
use shopd::db::Schema;
use uuid::Uuid;

use super::{DEPOSITS, PATIENT, Service};
use crate::support::books::count;
use crate::support::shop::{Answer, Client, PATIENCE, poll};

const DEPOSIT: &str = "/api/Account/ann/deposit";
const ORDER: &str = r#"{"userId":"ann","amount":1}"#;
/// What the gateway waits: long enough for a busy machine to begin what was asked. The database hangs for longer, and would itself give up
/// after half a minute (`PATIENT`).
const LEFT_MS: &str = "2000";
/// The same where nothing has to begin.
const HARDLY_LEFT_MS: &str = "300";
const IN_TIME: Duration = Duration::from_secs(10);

async fn tried(client: &Client, method: &str, path: &str, stamp: Uuid, left: Option<&str>, body: Option<&str>) -> Answer {
    let stamp = stamp.to_string();
    let mut headers = vec![("X-Shopd-Stamp", stamp.as_str()), ("Idempotency-Key", &stamp)];
    headers.extend(left.map(|left| ("X-Shopd-Deadline-Ms", left)));
    client.send(method, path, &headers, body).await.expect("an answer")
}

#[track_caller]
fn assert_late(answer: &Answer, asked: Instant) {
    assert!(asked.elapsed() < IN_TIME, "{:?}", asked.elapsed());
    assert_eq!((answer.status, answer.code().as_str()), (503, "unavailable"), "{answer:?}");
    assert_eq!(answer.headers["content-type"], "application/problem+json");
    assert!(!answer.text.contains("deadline"), "the cause is for the log");
}

/// Nothing holds a lock or an open transaction any more.
async fn until_quiet(service: &Service) {
    let open = "select count(*) as n from pg_stat_activity
                 where datname = current_database() and application_name like 'shopd-%' and application_name <> 'shopd-test'
                   and (state like 'idle in transaction%' or state = 'active')";
    let since = Instant::now();
    while count(&service.db, open).await > 0 {
        assert!(since.elapsed() < PATIENCE, "sessions stay in their transactions");
        poll().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deposit_whose_deadline_passes_is_answered_in_time_and_done_wholly_or_not_at_all() {
    let service = Service::start("payments", Schema::Payments, 2, &PATIENT).await;
    let (here, there) = (&service.clients[0], &service.clients[1]);
    tried(here, "POST", "/api/Account/ann", Uuid::now_v7(), Some("10000"), None).await.expect(200);
    let (begun, queued, elsewhere) = (Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7());
    let mut holder = service.holder("select 1 from account where user_id = 'ann' for update").await;
    let asked = Instant::now();
    let late = tried(here, "POST", DEPOSIT, begun, Some(LEFT_MS), Some("1")).await;
    assert_late(&late, asked);
    service.until_waiting(1).await;
    // Its transaction still waits for the account, in a task of its own; these wait behind it and are given up before they begin.
    let asked = Instant::now();
    for late in join_all((0..20).map(|_| tried(here, "POST", DEPOSIT, queued, Some(HARDLY_LEFT_MS), Some("10")))).await {
        assert_late(&late, asked);
    }
    let in_progress = tried(there, "POST", DEPOSIT, begun, Some("10000"), Some("1")).await.expect(409);
    assert_eq!(in_progress.code(), "idempotency_in_progress");
    assert_eq!(count(&service.db, DEPOSITS).await, 0);
    holder.batch_execute("commit").await.unwrap();
    until_quiet(&service).await;

    let balance = async |stamp, amount| {
        let answer = tried(there, "POST", DEPOSIT, stamp, Some("10000"), Some(amount)).await.expect(200);
        assert!(!answer.headers.contains_key("idempotent-replayed"), "its client has heard nothing yet: {answer:?}");
        answer.json()["balance"].as_i64().unwrap()
    };
    // The first was begun, so it was done; of the others nothing was.
    assert_eq!(count(&service.db, DEPOSITS).await, 1);
    assert_eq!((balance(begun, "1").await, balance(elsewhere, "100").await, balance(queued, "10").await), (1, 101, 111));
    assert_eq!(count(&service.db, DEPOSITS).await, 3);
    let log = service.processes[0].log();
    assert!(log.contains("no answer within the gateway's deadline"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_whose_deadline_passes_is_answered_in_time_and_its_next_try_as_the_first() {
    let service = Service::start("orders", Schema::Orders, 2, &PATIENT).await;
    let (here, there) = (&service.clients[0], &service.clients[1]);
    let mut holder = service.holder("lock table orders in share mode").await;
    let stamp = Uuid::now_v7();
    let asked = Instant::now();
    assert_late(&tried(here, "POST", "/api/Orders", stamp, Some(LEFT_MS), Some(ORDER)).await, asked);
    // The first try is still waiting when the second begins.
    let next = {
        let there = there.clone();
        tokio::spawn(async move { tried(&there, "POST", "/api/Orders", stamp, Some("10000"), Some(ORDER)).await })
    };
    service.until_waiting(2).await;
    holder.batch_execute("commit").await.unwrap();
    let next = next.await.unwrap().expect(201);
    assert!(!next.headers.contains_key("idempotent-replayed"), "{next:?}");
    until_quiet(&service).await;
    let events = "select count(*) as n from order_change where xid is not null";
    for facts in ["select count(*) as n from orders", events, "select count(*) as n from outbox"] {
        assert_eq!(count(&service.db, facts).await, 1, "{facts}");
    }
}

/// Red where a wait is as long as its client prefers: the gateway, which asks a second time when a part of it is over, hears of no order then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_that_is_waited_for_is_answered_before_its_deadline() {
    let service = Service::start("orders", Schema::Orders, 1, &PATIENT).await;
    let stamp = Uuid::now_v7().to_string();
    let headers =
        [("X-Shopd-Stamp", &*stamp), ("Idempotency-Key", &stamp), ("X-Shopd-Deadline-Ms", LEFT_MS), ("Prefer", "wait=30")];
    let asked = Instant::now();
    // Nobody pays for it.
    let answer = service.clients[0].send("POST", "/api/Orders", &headers, Some(ORDER)).await.expect("an answer").expect(201);
    assert_eq!(answer.json()["status"], "New");
    // It is waited for all the same.
    assert!((Duration::from_millis(1_000)..IN_TIME).contains(&asked.elapsed()), "{:?}", asked.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_whose_deadline_passes_give_back_sessions_that_work() {
    let payments = Service::start("payments", Schema::Payments, 1, &PATIENT).await;
    let orders = Service::start("orders", Schema::Orders, 1, &PATIENT).await;
    tried(&payments.clients[0], "POST", "/api/Account/ann", Uuid::now_v7(), None, None).await.expect(200);
    let order = tried(&orders.clients[0], "POST", "/api/Orders", Uuid::now_v7(), None, Some(ORDER)).await.expect(201);
    let item = format!("/api/Orders/{}", order.json()["id"].as_str().unwrap());
    for (service, table, paths) in [
        (&payments, "account", ["/api/Account/ann/balance", "/api/Account/ann/transactions"]),
        (&orders, "orders", [item.as_str(), "/api/Orders?userId=ann"]),
    ] {
        let client = &service.clients[0];
        let before = join_all(paths.map(|path| client.get(path))).await;
        let mut holder = service.holder(&format!("lock table {table} in access exclusive mode")).await;
        let asked = Instant::now();
        // More than the pool has sessions: most of them wait for one, or for its turn.
        let reads = (0..30).map(|n| tried(client, "GET", paths[n % 2], Uuid::now_v7(), Some(HARDLY_LEFT_MS), None));
        for late in join_all(reads).await {
            assert_late(&late, asked);
        }
        holder.batch_execute("commit").await.unwrap();
        for round in 0..20 {
            let after = join_all((0..20).map(|n| tried(client, "GET", paths[n % 2], Uuid::now_v7(), Some("10000"), None))).await;
            for (n, answer) in after.iter().enumerate() {
                assert_eq!((answer.status, &answer.text), (200, &before[n % 2].text), "round {round}");
            }
        }
        until_quiet(service).await;
    }
}
