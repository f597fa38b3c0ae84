//! What is away comes back, and nobody has to help.

use std::time::{Duration, Instant};

use crate::scenario::place;
use crate::support::books::{assert_balanced, connect};
use crate::support::kafka::Broker;
use crate::support::postgres;
use crate::support::shop::Four;

/// Seconds that the broker is away; `SHOPD_TEST_OUTAGE_S=30` for a long look.
fn outage() -> Duration {
    let seconds = std::env::var("SHOPD_TEST_OUTAGE_S").ok().and_then(|s| s.parse().ok()).unwrap_or(6);
    Duration::from_secs(seconds)
}

/// After its return, beside what its backlog takes.
const FINAL_WITHIN: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_placed_while_kafka_is_killed_or_paused_are_accepted_and_end_after_its_return() {
    let broker = Broker::new().await;
    let (orders, payments) = (postgres::database("orders").await, postgres::database("payments").await);
    let shop = Four::start(&broker.bootstrap, &orders, &payments, "").await;
    shop.client.account("ann", "1000").await;
    for killed in [true, false] {
        if killed { broker.kill().await } else { broker.pause().await }
        let since = Instant::now();
        let mut placed = Vec::new();
        while since.elapsed() < outage() {
            let accepted = Instant::now();
            placed.push(place(&shop.client, "ann", "0.5").await);
            shop.client.post("/api/PaymentsProxy/ann/deposit", "0.5").await.expect(200);
            assert!(accepted.elapsed() < Duration::from_secs(5), "accepted as ever");
            tokio::time::sleep(Duration::from_millis(200)).await; // a client's pace, no poll
        }
        shop.client.ready().await;
        let orders = crate::support::shop::Client::new(shop.orders.address("orders").await);
        orders.get("/health/ready").await.expect(200);
        if killed { broker.start().await } else { broker.resume().await }
        let back = Instant::now();
        for id in &placed {
            assert_eq!(shop.client.ended(id).await["status"], "Finished");
        }
        assert!(back.elapsed() < FINAL_WITHIN, "final after {:?}", back.elapsed());
        eprintln!("killed: {killed}; {} orders placed in {:?} without Kafka, all final {:?} after its return", placed.len(), outage(), back.elapsed());
    }
    assert_balanced(&connect(&orders), &connect(&payments)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_starts_before_what_it_needs_says_so_and_becomes_ready_when_it_comes() {
    let broker = Broker::new().await;
    broker.kill().await;
    let (orders, payments) = (postgres::database("orders").await, postgres::database("payments").await);
    let env: Vec<(String, String)> = [
        ("SHOPD__KAFKA__BOOTSTRAP_SERVERS", broker.bootstrap.clone()),
        ("SHOPD__ORDERS__DATABASE_URL", orders.clone()),
        ("SHOPD__PAYMENTS__DATABASE_URL", payments.clone()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec();
    let relay = crate::support::shop::Process::start(&["relay"], &env);
    let client = crate::support::shop::Client::new(relay.address("relay").await);
    client.get("/health/live").await.expect(200);
    let missing = client.get("/health/ready").await.expect(503).text;
    for what in ["orders schema", "payments schema", "broker"] {
        assert!(missing.contains(what), "{what} is not named: {missing}");
    }
    let migrating = tokio::spawn({
        let env = env.clone();
        async move {
            let mut migrate = crate::support::shop::Process::start(&["migrate"], &env);
            assert!(migrate.ended().await.success(), "{}", migrate.log());
        }
    });
    broker.start().await;
    migrating.await.unwrap();
    client.ready().await;
    assert!(relay.log().contains("\"waiting\"") || relay.log().contains("waiting"), "{}", relay.log());
}
