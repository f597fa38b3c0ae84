//! No table beside the facts grows without bound (L3): under an unbroken load, what is done with is dropped as fast as it comes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use diesel_async::SimpleAsyncConnection;
use shopd::db::Db;
use uuid::Uuid;

use crate::support::books::{assert_balanced, connect, count};
use crate::support::inside::{Inside, REQUESTS, RESULTS, until};
use crate::support::postgres;
use crate::support::shop::{Client, PATIENCE, Process, poll};

/// How long an answer and a record of the log are kept here.
const RETENTION_MS: usize = 1_000;
const CLIENTS: usize = 16;

/// Rows of what is pruned, by table; of the outboxes the messages, because a row holds several.
async fn rows(orders: &Db, payments: &Db) -> [(&'static str, i64); 6] {
    let keys = "select count(*) as n from idempotency_key";
    let outbox = "select count(*) as n from outbox_message";
    [
        ("orders' keys", count(orders, keys).await),
        ("payments' keys", count(payments, keys).await),
        ("orders' outbox", count(orders, outbox).await),
        ("payments' outbox", count(payments, outbox).await),
        ("the log", count(orders, "select count(*) as n from shopd_log.record").await),
        ("orders asked for again", count(orders, "select count(*) as n from order_retry").await),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_an_unbroken_load_what_is_done_with_is_dropped_as_fast_as_it_comes() {
    let (orders_url, payments_url) = (postgres::database("orders").await, postgres::database("payments").await);
    let retention = RETENTION_MS.to_string();
    let env: Vec<(String, String)> = [
        ("SHOPD__ORDERS__DATABASE_URL", orders_url.as_str()),
        ("SHOPD__PAYMENTS__DATABASE_URL", &payments_url),
        ("SHOPD__HTTP__IDEMPOTENCY_RETENTION_MS", &retention),
        ("SHOPD__LOG__RETENTION_MS", &retention),
        ("SHOPD__RELAY__PUBLISHED_ROWS_MAX", "20"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec();
    let all = Process::start(&["all"], &env);
    let client = Client::new(all.address("gateway").await);
    for role in ["gateway", "orders", "payments"] {
        Client::new(all.address(role).await).ready().await;
    }
    let (orders, payments) = (connect(&orders_url), connect(&payments_url));
    client.account("ann", "1000000").await;

    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let load: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (client, stop, done) = (client.clone(), stop.clone(), done.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let key = [("Idempotency-Key", &*Uuid::new_v4().to_string())];
                    let (path, body) = ("/api/OrdersProxy", r#"{"userId":"ann","amount":1}"#);
                    client.send("POST", path, &key, Some(body)).await.unwrap().expect(201);
                    client.send("POST", "/api/PaymentsProxy/ann/deposit", &key, Some("1")).await.unwrap().expect(200);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();

    // In the second half of the load nothing may hold more than a few seconds' worth of it.
    let (begun, mut most) = (Instant::now(), [0; 6]);
    while begun.elapsed() < Duration::from_secs(10) {
        tokio::time::sleep(Duration::from_millis(250)).await;
        if begun.elapsed() > Duration::from_secs(5) {
            for (most, (_, now)) in most.iter_mut().zip(rows(&orders, &payments).await) {
                *most = now.max(*most);
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    for client in load {
        client.await.unwrap();
    }
    let asked = done.load(Ordering::Relaxed);
    let a_second = asked as f64 / begun.elapsed().as_secs_f64();
    let names = rows(&orders, &payments).await.map(|(name, _)| name);
    println!("{asked} orders and deposits, {a_second:.0} a second; at most {:?}", names.iter().zip(most).collect::<Vec<_>>());
    // Two records an order; retention, a tenth of it until the next look, and a machine that is busy. The outboxes are emptied segment by
    // segment: one that waits until it is quiet holds all that was ever written here, ten seconds' worth.
    for (name, most) in names.iter().zip(most) {
        assert!((most as f64) < a_second * 2.0 * 4.0, "{name} grew to {most} rows at {a_second:.0} a second");
    }

    // And afterwards nothing is left.
    let since = Instant::now();
    while rows(&orders, &payments).await.iter().any(|(_, rows)| *rows > 0) {
        assert!(since.elapsed() < PATIENCE, "{:?}", rows(&orders, &payments).await);
        poll().await;
    }
    assert_balanced(&orders, &payments).await;
}

/// Each attempt takes a segment from its writers for a moment: while a transaction keeps its rows, a relay must not do so with every page.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outbox_that_cannot_be_emptied_yet_is_not_locked_with_every_page() {
    let mut shop = Inside::on_postgres().await;
    (shop.config.relay.batch_rows_max, shop.config.relay.published_rows_max) = (1, 1);
    let mut conn = shop.orders.dedicated().await.unwrap();
    conn.batch_execute(
        "alter function purge_outbox_segment rename to really_purge_outbox_segment;
         create table purge (at timestamptz);
         create function purge_outbox_segment(of_epoch bigint, published pg_snapshot, of_segment int) returns boolean language plpgsql as $$
         begin
             insert into purge values (clock_timestamp());
             return really_purge_outbox_segment(of_epoch, published, of_segment);
         end $$;",
    )
    .await
    .unwrap();
    conn.batch_execute(
        "begin; set local idle_in_transaction_session_timeout = 0;
         lock table only outbox_1, only outbox_2, only outbox_3, only outbox_4 in row exclusive mode;",
    )
    .await
    .unwrap();
    shop.place("ann", 200).await;
    let (relay, began) = (shop.relay("orders"), Instant::now());
    shop.until_on_the_log(REQUESTS, 200).await;
    // Not while the one segment that holds rows is being filled.
    until("a purge", async || count(&shop.orders, "select count(*) as n from purge").await > 0).await;
    let looks = began.elapsed().as_secs() + 1;
    let purges = count(&shop.orders, "select count(*) as n from purge").await;
    // Of four segments each time.
    assert!((1..=4 * (2 + 2 * looks as i64)).contains(&purges), "{purges} in {looks} s");
    conn.batch_execute("rollback").await.unwrap();
    until("an empty outbox", async || count(&shop.orders, "select count(*) as n from outbox").await == 0).await;
    relay.stop().await;
}

/// Ends so many `orders`, and counts those whose row was written within its page, and the batches in which they ended.
async fn heap_only_of(orders: i64, before: Option<&str>) -> (i64, i64) {
    let shop = Inside::on_postgres().await;
    if let Some(statement) = before {
        shop.orders.dedicated().await.unwrap().batch_execute(statement).await.unwrap();
    }
    shop.account("ann", orders * 100).await;
    shop.place("ann", orders as usize).await;
    let (relay, payments, results) = (shop.relay("orders"), shop.payments(), shop.relay("payments"));
    shop.until_on_the_log(RESULTS, orders).await;
    // What has come first waits, and the rest comes meanwhile.
    let mut conn = shop.orders.dedicated().await.unwrap();
    conn.batch_execute("begin; lock table orders in exclusive mode").await.unwrap();
    let applied = shop.orders();
    let waiting = "select count(*) as n from pg_locks where not granted and relation = 'orders'::regclass
                    and database = (select oid from pg_database where datname = current_database())";
    until("a batch", async || count(&shop.orders, waiting).await > 0).await;
    conn.batch_execute("rollback").await.unwrap();
    shop.until_healed().await;
    for part in [relay, payments, results, applied] {
        part.stop().await;
    }
    // The sessions tell their statistics a little later.
    let updates = "select n_tup_upd as n from pg_stat_user_tables where relname = 'orders'";
    until("statistics", async || count(&shop.orders, updates).await >= orders).await;
    assert_eq!(count(&shop.orders, updates).await, orders, "one update an order");
    let heap_only = count(&shop.orders, "select n_tup_hot_upd as n from pg_stat_user_tables where relname = 'orders'").await;
    (heap_only, count(&shop.orders, "select count(distinct xmin::text) as n from orders").await)
}

/// All orders of a page end together, before the old rows can be pruned: each new one needs a place beside its old one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ending_an_order_is_a_heap_only_update_even_for_all_orders_of_a_page_at_once() {
    const ORDERS: i64 = 300;
    // On a busy machine they come in pieces, and old rows are pruned between small batches.
    const BATCHES_MAX: i64 = 2;
    const TRIES: usize = 10;
    let together = async |before| {
        for _ in 0..TRIES {
            let (heap_only, batches) = heap_only_of(ORDERS, before).await;
            if batches <= BATCHES_MAX {
                return heap_only;
            }
        }
        panic!("{ORDERS} orders never ended in {BATCHES_MAX} batches");
    };
    assert_eq!(together(None).await, ORDERS);
    let narrow = together(Some("alter table orders set (fillfactor = 85)")).await;
    assert!(narrow < ORDERS * 3 / 4, "with nearly full pages {narrow} of {ORDERS}: then this shows nothing");
}
