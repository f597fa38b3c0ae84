//! What the gateway does that does not know whether it was heard: it tries the same request of a client again, elsewhere. No try has
//! an effect of its own, and the client sees no answer that only the second one caused.
//!
//! With `Key::is_of` or `own` of `place_order::answer_again` always false most of these see the replay that the client never asked for.

use futures::future::join_all;
use shopd::db::{self, Schema};
use uuid::Uuid;

use super::{DEPOSITS, KEYS, Service, replayed, send_head};
use crate::support::books::{connect, count};
use crate::support::postgres;
use crate::support::shop::{Answer, Client, PATIENCE, poll, raw_member};

const ORDERS: &str = "select count(*) as n from orders";
const OPEN: &str = "/api/Account/ann";
const DEPOSIT: &str = "/api/Account/ann/deposit";
const ORDER: &str = r#"{"userId":"ann","amount":12.5,"description":"кни\u0433а"}"#;

/// One try of the request `stamp`: under the client's own `key`, or under the stamp, as the gateway adds it.
async fn tried(client: &Client, path: &str, stamp: Uuid, key: Option<&str>, body: Option<&str>) -> Answer {
    let stamp = stamp.to_string();
    let headers = [("X-Shopd-Stamp", stamp.as_str()), ("Idempotency-Key", key.unwrap_or(&stamp))];
    client.send("POST", path, &headers, body).await.expect("an answer")
}

/// As the gateway asks: what is in progress elsewhere is waited out.
async fn tried_until_done(client: &Client, path: &str, stamp: Uuid, key: Option<&str>, body: Option<&str>) -> Answer {
    let since = std::time::Instant::now();
    loop {
        let answer = tried(client, path, stamp, key, body).await;
        if answer.status != 409 || answer.code() != "idempotency_in_progress" {
            return answer;
        }
        assert!(since.elapsed() < PATIENCE, "it stays in progress");
        poll().await;
    }
}

/// Byte for byte, but for what names the try and its time.
#[track_caller]
fn assert_same(first: &Answer, again: &Answer) {
    let headers = |answer: &Answer| {
        let mut headers = answer.headers.clone();
        headers.retain(|name, _| name != "x-request-id" && name != "date");
        headers
    };
    assert_eq!((first.status, &first.text, headers(first)), (again.status, &again.text, headers(again)));
}

async fn orders(replicas: usize) -> Service {
    Service::start("orders", Schema::Orders, replicas, &[]).await
}

async fn payments_with_ann(replicas: usize) -> Service {
    let service = Service::payments(replicas).await;
    tried(&service.clients[0], OPEN, Uuid::now_v7(), None, None).await.expect(200);
    service
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_try_of_an_order_is_answered_as_the_first_though_the_order_has_ended_and_costs_no_row() {
    let service = orders(2).await;
    let (here, there) = (&service.clients[0], &service.clients[1]);
    let stamp = Uuid::now_v7();
    let first = tried(here, "/api/Orders", stamp, None, Some(ORDER)).await.expect(201);
    assert!(!replayed(&first));
    assert_eq!(first.json()["id"], stamp.to_string(), "the stamp is the id of an order without one");
    let named = Uuid::new_v4();
    let with_id = format!(r#"{{"orderId":"{named}","userId":"ann","amount":1}}"#);
    let (by_a, by_b) = (Uuid::now_v7(), Uuid::now_v7());
    let first_named = tried(here, "/api/Orders", by_a, None, Some(&with_id)).await.expect(201);
    assert_eq!(first_named.json()["id"], named.to_string());
    service
        .run("update orders set status = 'Cancelled', failure_reason = 'account_not_found', updated_at = clock_timestamp()")
        .await;

    for client in [here, there] {
        assert_same(&first, &tried(client, "/api/Orders", stamp, None, Some(ORDER)).await);
        assert_same(&first_named, &tried(client, "/api/Orders", by_a, None, Some(&with_id)).await);
        // Another request with the same id is told what has become of the order, in all its tries.
        let now = tried(client, "/api/Orders", by_b, None, Some(&with_id)).await.expect(200);
        assert_eq!((replayed(&now), &now.json()["status"]), (true, &"Cancelled".into()));
        assert_same(&now, &tried(client, "/api/Orders", by_b, None, Some(&with_id)).await);
        assert_same(&now, &client.post("/api/Orders", &with_id).await);
        let other = with_id.replace(":1}", ":2}");
        assert_eq!(tried(client, "/api/Orders", by_a, None, Some(&other)).await.expect(409).code(), "order_conflict");
    }
    assert_eq!((count(&service.db, ORDERS).await, count(&service.db, KEYS).await), (2, 0));

    // What the stamp is for: without it the second try is told that it is one.
    service.run("update orders set stamp = null").await;
    let told = tried(here, "/api/Orders", stamp, None, Some(ORDER)).await.expect(200);
    assert_eq!((replayed(&told), &told.json()["status"]), (true, &"Cancelled".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_try_under_the_clients_own_key_is_the_same_answer_and_the_clients_own_retry_a_replay() {
    let service = orders(2).await;
    let (stamp, key) = (Uuid::now_v7(), Some("k"));
    let first = tried(&service.clients[0], "/api/Orders", stamp, key, Some(ORDER)).await.expect(201);
    assert_ne!(first.json()["id"], stamp.to_string(), "the key is not the stamp");
    for client in &service.clients {
        assert_same(&first, &tried(client, "/api/Orders", stamp, key, Some(ORDER)).await);
        for headers in [
            vec![("Idempotency-Key", "k")],
            vec![("Idempotency-Key", "k"), ("X-Shopd-Stamp", "01890a5d-ac96-774b-bcce-b302099a8057")],
            vec![("Idempotency-Key", "k"), ("X-Shopd-Stamp", "garbage")],
            vec![("Idempotency-Key", "k"), ("X-Shopd-Stamp", &stamp.to_string()), ("X-Shopd-Stamp", "garbage")],
        ] {
            let again = client.send("POST", "/api/Orders", &headers, Some(ORDER)).await.unwrap().expect(201);
            assert!(replayed(&again) && again.text == first.text, "{headers:?}: {again:?}");
        }
        // Another body is refused whoever asks.
        tried(client, "/api/Orders", stamp, key, Some(r#"{"userId":"ann","amount":1}"#)).await.expect(422);
    }
    // An answer that was a replay when it was made stays one in its other tries.
    let named = format!(r#"{{"orderId":{},"userId":"ann","amount":12.5,"description":"книга"}}"#, raw_member(&first.text, "id"));
    let by_id = tried(&service.clients[0], "/api/Orders", Uuid::now_v7(), Some("other"), Some(&named)).await.expect(200);
    assert!(replayed(&by_id));
    assert_eq!((count(&service.db, ORDERS).await, count(&service.db, KEYS).await), (1, 2));

    // What the stored stamp is for.
    service.run("update idempotency_key set stamp = null").await;
    assert!(replayed(&tried(&service.clients[0], "/api/Orders", stamp, key, Some(ORDER)).await.expect(201)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stamp_that_is_none_is_ignored_and_its_key_is_a_clients() {
    let service = orders(1).await;
    for garbage in ["x", "3f2504e0-4f89-41d3-9a0c-0305e82c3301", "01890A5D-AC96-774B-BCCE-B302099A8057"] {
        let headers = [("X-Shopd-Stamp", garbage), ("Idempotency-Key", garbage)];
        let first = service.clients[0].send("POST", "/api/Orders", &headers, Some(ORDER)).await.unwrap().expect(201);
        assert_ne!(first.json()["id"], garbage.to_lowercase());
        assert!(replayed(&service.clients[0].send("POST", "/api/Orders", &headers, Some(ORDER)).await.unwrap().expect(201)));
    }
    assert_eq!((count(&service.db, ORDERS).await, count(&service.db, KEYS).await), (3, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_try_of_an_opening_or_a_deposit_happens_once_and_is_answered_as_the_first() {
    let service = Service::payments(2).await;
    let (here, there) = (&service.clients[0], &service.clients[1]);
    let (opening, early, deposit) = (Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7());
    let missing = tried(here, DEPOSIT, early, None, Some("1")).await.expect(404);
    let opened = tried(here, OPEN, opening, None, None).await.expect(200);
    let deposited = tried(here, DEPOSIT, deposit, None, Some("5")).await.expect(200);
    tried(here, DEPOSIT, Uuid::now_v7(), None, Some("2")).await.expect(200);
    for client in [here, there] {
        assert_same(&missing, &tried(client, DEPOSIT, early, None, Some("1")).await);
        assert_same(&opened, &tried(client, OPEN, opening, None, None).await);
        assert_same(&deposited, &tried(client, DEPOSIT, deposit, None, Some("5")).await);
        let second = Uuid::now_v7();
        let exists = tried(client, OPEN, second, None, None).await.expect(409);
        assert_eq!((exists.code().as_str(), replayed(&exists)), ("account_exists", false));
        assert_same(&exists, &tried(client, OPEN, second, None, None).await);
    }
    assert_eq!(raw_member(&deposited.text, "balance"), "5");
    assert_eq!(count(&service.db, DEPOSITS).await, 2);

    let own = tried(here, DEPOSIT, Uuid::now_v7(), Some("k"), Some("1")).await.expect(200);
    let again = tried(there, DEPOSIT, Uuid::now_v7(), Some("k"), Some("1")).await.expect(200);
    assert!(!replayed(&own) && replayed(&again), "the client asked twice, the gateway once each");
    assert_eq!(own.text, again.text);

    // What the stored stamp is for.
    service.run("update idempotency_key set stamp = null").await;
    assert!(replayed(&tried(here, DEPOSIT, deposit, None, Some("5")).await.expect(200)));
    assert_eq!(count(&service.db, DEPOSITS).await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_tries_at_once_at_two_replicas_are_one_order_and_one_answer() {
    let service = orders(2).await;
    let [here, there] = &service.clients[..] else { panic!("two replicas") };
    for round in 0..200 {
        let (stamp, id) = (Uuid::now_v7(), Uuid::new_v4());
        let with_id = format!(r#"{{"orderId":"{id}","userId":"ann","amount":1}}"#);
        let (key, body) = match round % 4 {
            0 | 1 => (None, ORDER),
            2 => (None, &*with_id),
            _ => (Some(stamp.simple().to_string()), ORDER),
        };
        let (a, b) = tokio::join!(
            tried_until_done(here, "/api/Orders", stamp, key.as_deref(), Some(body)),
            tried_until_done(there, "/api/Orders", stamp, key.as_deref(), Some(body))
        );
        assert_eq!(a.status, 201, "{a:?}");
        assert!(!replayed(&a));
        assert_same(&a, &b);
    }
    assert_eq!((count(&service.db, ORDERS).await, count(&service.db, KEYS).await), (200, 50));
    assert_eq!(count(&service.db, "select count(*) as n from order_change where xid is not null").await, 200);
    assert_eq!(count(&service.db, "select count(*) as n from outbox_message").await, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_tries_at_once_at_two_replicas_are_one_deposit_and_one_account_and_one_answer() {
    let service = payments_with_ann(2).await;
    let [here, there] = &service.clients[..] else { panic!("two replicas") };
    for round in 1..=200 {
        let (stamp, path) = (Uuid::now_v7(), format!("/api/Account/u{round}"));
        for (path, body) in [(path.as_str(), None), (DEPOSIT, Some("1"))] {
            let (a, b) =
                tokio::join!(tried_until_done(here, path, stamp, None, body), tried_until_done(there, path, stamp, None, body));
            assert_eq!(a.status, 200, "{a:?}");
            assert!(!replayed(&a));
            assert_same(&a, &b);
        }
        assert_eq!(count(&service.db, DEPOSITS).await, round);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tries_that_commit_together_are_answered_alike() {
    let (orders, payments) = (orders(1).await, payments_with_ann(1).await);
    for (service, path, body, status) in [(&orders, "/api/Orders", ORDER, 201), (&payments, DEPOSIT, "1", 200)] {
        for key in [None, Some("k")] {
            let stamp = Uuid::now_v7();
            let answers = join_all((0..50).map(|_| tried(&service.clients[0], path, stamp, key, Some(body)))).await;
            assert_eq!(answers[0].status, status, "{:?}", answers[0]);
            assert!(!replayed(&answers[0]));
            answers.iter().for_each(|answer| assert_same(&answers[0], answer));
        }
    }
    assert_eq!((count(&orders.db, ORDERS).await, count(&payments.db, DEPOSITS).await), (2, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_the_gateway_never_got_is_given_to_its_next_try_and_nobody_is_told_of_a_replay() {
    let (orders, payments) = (orders(1).await, payments_with_ann(1).await);
    for (service, path, body, status, done) in
        [(&orders, "/api/Orders", ORDER, 201, ORDERS), (&payments, DEPOSIT, "1", 200, DEPOSITS)]
    {
        let stamp = Uuid::now_v7();
        let head = format!("x-shopd-stamp: {stamp}\r\nidempotency-key: {stamp}\r\n");
        drop(send_head(&service.clients[0], path, head.as_bytes(), body).await);
        let since = std::time::Instant::now();
        while count(&service.db, done).await == 0 {
            assert!(since.elapsed() < PATIENCE, "what was sent is done");
            poll().await;
        }
        let again = tried_until_done(&service.clients[0], path, stamp, None, Some(body)).await.expect(status);
        assert!(!replayed(&again), "{again:?}");
        assert_same(&again, &tried(&service.clients[0], path, stamp, None, Some(body)).await);
        if status == 201 {
            assert_eq!(again.headers["location"], format!("/api/Orders/{stamp}"));
            assert_eq!((&again.json()["status"], &again.json()["createdAt"]), (&"New".into(), &again.json()["updatedAt"]));
        }
        assert_eq!(count(&service.db, done).await, 1);
    }
}

/// Replicas are replaced one by one: the version before this runs on this one's schema for a while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_statements_of_the_version_before_still_work_on_this_schema() {
    let db = connect(&postgres::database("orders").await);
    db::migrate(&db, &[Schema::Orders]).await.expect("a schema");
    let claimed = "select count(body) as n from claim_idempotency_keys(array['k'], array['POST /'], array[1::bigint])";
    assert_eq!(count(&db, claimed).await, 0);
    for (statement, written) in [
        (
            "with i as (insert into idempotency_key (key, scope, body_hash, status, headers, body)
          values ('k', 'POST /', '', 200, '[]', '') returning 1) select count(*) as n from i",
            1,
        ),
        (
            "with i as (insert into orders (id, user_id, amount, description, created_at, updated_at, traceparent)
          values (gen_random_uuid(), 'u', 1, null, now(), now(), '') returning 1) select count(*) as n from i",
            1,
        ),
    ] {
        assert_eq!(count(&db, statement).await, written);
    }
    assert_eq!(count(&db, claimed).await, 1);
}
