//! `Prefer: wait`: who ends an order in the same process says so directly, another replica by the database, and a lost word costs a second.

use std::time::{Duration, Instant};

use shopd::orders::{ENDED_CHANNEL, OrderStatus};

use super::codes;
use super::replica::{Replica, Shop, finish, order, run};
use super::sessions::sessions;
use crate::support::books::count;
use crate::support::inside::{Inside, until};

const ORDERS: usize = 9;
/// A look each second finds a third of them in this time.
const AT_ONCE: Duration = Duration::from_millis(300);

/// The statement of a session that hears of orders that others ended.
const LISTENS: &str = "listen shopd_order_end";

/// Returns when replica `one` has looked for orders that others ended, from beginning to end since this was asked. In the database, for the
/// looks behind a word come a few milliseconds apart, and not for long.
const HAS_LOOKED: &str = r#"do $$ declare asked timestamptz := clock_timestamp(); begin
    while not exists (select from pg_stat_activity
                       where datname = current_database() and application_name = 'shopd-one' and query ~* '"status" = any'
                         and query_start > asked and state = 'idle') loop
        perform pg_sleep(0.001);
        perform pg_stat_clear_snapshot();
    end loop;
end $$"#;

/// One order after the other is waited for and ended by another hand, and `word` is given of it; how long each answer took from there on, the
/// median.
async fn answered_after(shop: &Shop, one: &Replica, first: usize, word: impl AsyncFn(&str)) -> Duration {
    let mut took = Vec::new();
    let mut hand = shop.conn().await;
    for n in first..first + ORDERS {
        let body = format!(r#"{{"orderId":"{}","userId":"u","amount":1}}"#, order(n));
        let headers = [("Prefer", "wait=20")];
        let (answer, ended) = tokio::join!(one.client.send("POST", "/api/Orders", &headers, Some(&body)), async {
            until("it is there", async || count(&shop.db, "select count(*) as n from orders where status = 'New'").await == 1)
                .await;
            run(&mut hand, &finish(n, n)).await;
            let ended = Instant::now();
            word(&order(n)).await;
            ended
        });
        took.push(ended.elapsed());
        let answer = answer.unwrap();
        assert_eq!((answer.status, answer.json()["status"].as_str()), (201, Some("Finished")));
    }
    took.sort();
    assert!(took[ORDERS - 1] < Duration::from_secs(5), "{took:?}");
    took[ORDERS / 2]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_prefers_to_wait_is_answered_with_the_orders_end() {
    let shop = Shop::new().await;
    let one = shop.replica("one").await;
    let post = async |headers: &[(&str, &str)], n| {
        let body = format!(r#"{{"orderId":"{}","userId":"u","amount":1,"description":"a book"}}"#, order(n));
        one.client.send("POST", "/api/Orders", headers, Some(&body)).await.unwrap()
    };
    let waits = ("Prefer", "wait=10");
    let only_waits = [waits];
    let asked = Instant::now();
    let (answer, ()) = tokio::join!(post(&only_waits, 1), async {
        until("it is there", async || count(&shop.db, "select count(*) as n from orders").await == 1).await;
        shop.run(&finish(1, 1)).await;
    });
    assert!(asked.elapsed() < Duration::from_secs(9), "no longer than needed");
    assert_eq!((answer.status, answer.json()["status"].as_str()), (201, Some("Finished")));
    assert_eq!(answer.headers["preference-applied"], "wait=10");
    assert_eq!(answer.headers["location"], format!("/api/Orders/{}", order(1)));

    // Replays: by id, and by key, whose stored answer is the order as it was.
    let again = post(&[waits], 1).await;
    assert_eq!((again.status, again.json()["status"].as_str()), (200, Some("Finished")));
    assert_eq!((&*again.headers["idempotent-replayed"], &*again.headers["preference-applied"]), ("true", "wait=10"));
    let keyed = post(&[("Idempotency-Key", "k")], 2).await;
    assert_eq!((keyed.status, keyed.json()["status"].as_str()), (201, Some("New")));
    assert!(!keyed.headers.contains_key("preference-applied"));
    shop.run(&finish(2, 2)).await;
    let replayed = post(&[("Idempotency-Key", "k"), waits], 2).await;
    assert_eq!((replayed.status, replayed.json()["status"].as_str()), (201, Some("Finished")));
    assert_eq!((&*replayed.headers["idempotent-replayed"], &*replayed.headers["preference-applied"]), ("true", "wait=10"));
    let plain = post(&[("Idempotency-Key", "k")], 2).await;
    assert_eq!(plain.json()["status"], "New", "what is stored stays as it was");

    let asked = Instant::now();
    let late = post(&[("Prefer", "wait=1")], 3).await;
    assert_eq!((late.status, late.json()["status"].as_str()), (201, Some("New")), "it did not end in time");
    assert!(asked.elapsed() >= Duration::from_secs(1));
    let other_fields = r#"{"userId":"v","amount":1}"#.replace("{", &format!(r#"{{"orderId":"{}","#, order(3)));
    let refused = one.client.send("POST", "/api/Orders", &[waits], Some(&other_fields)).await.unwrap();
    assert_eq!(codes(&refused), (409, "order_conflict".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_is_told_in_the_same_process_heard_of_from_another_and_found_where_nobody_says_so() {
    let shop = Shop::new().await;
    let one = shop.replica("one").await;
    let told = answered_after(&shop, &one, 1, async |id: &str| one.ends.tell([id.parse().unwrap()])).await;
    assert!(told < AT_ONCE, "{told:?}");

    let silent = answered_after(&shop, &one, 11, async |_: &str| {}).await;
    assert!(silent > AT_ONCE, "the others prove nothing: {silent:?}");

    let notify = format!("notify {ENDED_CHANNEL}");
    let heard = answered_after(&shop, &one, 21, async |_: &str| run(&mut shop.conn().await, &notify).await).await;
    assert!(heard < AT_ONCE, "{heard:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_consumer_tells_who_waits_in_its_process_that_it_has_ended_their_order() {
    let inside = Inside::on_postgres().await;
    inside.account("alice", 10_000).await;
    let parts = [inside.relay("orders"), inside.relay("payments"), inside.payments(), inside.orders()];
    let mut took = Vec::new();
    for _order in 0..ORDERS {
        let placed = Instant::now();
        let id = inside.place("alice", 1).await[0];
        let order = inside.ends.expect(id).unwrap().end(Duration::from_secs(20), false).await.unwrap().unwrap();
        assert_eq!(order.status, OrderStatus::Finished);
        took.push(placed.elapsed());
    }
    for part in parts {
        part.stop().await;
    }
    // Whom nobody tells waits for the look of the next second, one after the other.
    took.sort();
    assert!(took[ORDERS / 2] < 2 * AT_ONCE, "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ends_between_two_words_of_a_stream_is_looked_for_without_one() {
    let shop = Shop::new().await;
    let one = shop.replica("one").await;
    let mut hand = shop.conn().await;
    let body = |n| format!(r#"{{"orderId":"{}","userId":"u","amount":1}}"#, order(n));
    let notify = format!("notify {ENDED_CHANNEL}");
    let mut took = Vec::new();
    for n in 1..=ORDERS {
        let body = body(n);
        let headers = [("Prefer", "wait=20")];
        let (answer, ended) = tokio::join!(one.client.send("POST", "/api/Orders", &headers, Some(&body)), async {
            until("it is there", async || count(&shop.db, "select count(*) as n from orders where status = 'New'").await == 1)
                .await;
            until("it listens", async || sessions(&shop, "one", LISTENS).await.0 == 1).await;
            run(&mut hand, &notify).await;
            // Behind the look that the word causes, and before the next word of a stream, which does not come here.
            run(&mut hand, HAS_LOOKED).await;
            run(&mut hand, &finish(n, n)).await;
            Instant::now()
        });
        took.push(ended.elapsed());
        assert_eq!(answer.unwrap().json()["status"], "Finished");
    }
    took.sort();
    assert!(took[ORDERS / 2] < AT_ONCE, "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_nobody_waits_nobody_listens() {
    let shop = Shop::new().await;
    let one = shop.replica("unwaited").await;
    let listening = async || sessions(&shop, "unwaited", LISTENS).await.0;
    assert_eq!(one.client.post("/api/Orders", r#"{"userId":"u","amount":1}"#).await.status, 201);
    // It would be connected by then.
    tokio::time::sleep(AT_ONCE).await;
    assert_eq!(listening().await, 0);
    let waits = [("Prefer", "wait=2")];
    let body = r#"{"userId":"u","amount":1}"#;
    let (answer, ()) = tokio::join!(one.client.send("POST", "/api/Orders", &waits, Some(body)), async {
        until("it listens", async || listening().await == 1).await;
    });
    assert_eq!(answer.unwrap().json()["status"], "New");
    until("the session ends", async || listening().await == 0).await;
}
