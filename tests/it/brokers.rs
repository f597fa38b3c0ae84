//! Kafka as it is to be run: three brokers, three copies, acknowledged by two. Its leader killed under load, then two of three.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use shopd::db::Db;

use crate::audit::{audit, brief, said};
use crate::support::books::{assert_balanced, connect, count};
use crate::support::brokers::{Brokers, NODES};
use crate::support::inside::{REQUESTS, RESULTS, until};
use crate::support::load::Load;
use crate::support::postgres;
use crate::support::shop::{Client, Four};

const USERS: [&str; 8] = ["ann", "bob", "cid", "dan", "eve", "fay", "gus", "hal"];
/// From the death of a leader until everything that was accepted meanwhile is final.
const FINAL_WITHIN: Duration = Duration::from_secs(30);

/// How long a leader is known (`messaging/log/kafka/leaders.rs`).
const LEADERS_AGE_MAX: Duration = Duration::from_secs(30);

async fn waiting(orders: &Db) -> i64 {
    count(orders, "select count(*) as n from orders where status = 'New'").await
}

async fn all_in_sync(brokers: &Brokers) {
    until("three copies of everything", async || {
        for topic in [REQUESTS, RESULTS] {
            let partitions = brokers.partitions(topic).await.unwrap_or_default();
            if partitions.is_empty() || partitions.values().any(|one| one.in_sync.len() < NODES as usize || one.leader < 1) {
                return false;
            }
        }
        true
    })
    .await;
}

/// Who leads most partitions of the requests: the one whose death is felt most.
async fn busiest(brokers: &Brokers) -> i32 {
    let partitions = brokers.partitions(REQUESTS).await.expect("the topic");
    let leads = |node: i32| partitions.values().filter(|one| one.leader == node).count();
    (1..=NODES).max_by_key(|node| leads(*node)).expect("three")
}

/// Whether the relay says that it is in this trouble.
async fn incident(relay: &Client, what: &str) -> bool {
    let metrics = relay.get("/metrics").await.expect(200).text;
    let line = metrics.lines().find(|line| line.starts_with("shopd_incident") && line.contains(&format!("what=\"{what}\"")));
    line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).is_some_and(|value| value > 0.0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_three_brokers_a_leader_killed_under_load_loses_nothing_and_with_one_left_orders_wait() {
    let brokers = Brokers::new().await;
    let (orders_url, payments_url) = (postgres::database("orders").await, postgres::database("payments").await);
    let shop = Four::start(&brokers.bootstrap, &orders_url, &payments_url, "").await;
    let (orders, payments) = (connect(&orders_url), connect(&payments_url));
    let relay = Client::new(shop.relay.address("relay").await);
    for user in USERS {
        shop.client.account(user, "1000").await;
    }
    // As many copies as the broker's default says: shopd asks for that.
    all_in_sync(&brokers).await;
    let partitions = brokers.partitions(REQUESTS).await.expect("the topic");

    // A leader dies under load and comes back.
    let load = Load::start(&shop.client, 8, &USERS, "0.5");
    load.place(150).await;
    let leader = busiest(&brokers).await;
    let killed = Instant::now();
    let (accepted_before, ()) = (load.accepted(), brokers.kill(leader).await);
    load.place(300).await;
    let accepted_without = load.accepted() - accepted_before;
    until("others lead, and everything ends without the dead one", async || waiting(&orders).await == 0).await;
    let final_after = killed.elapsed();
    assert!(final_after < FINAL_WITHIN, "{final_after:?}");
    until("no partition counts on the dead one", async || {
        let now = brokers.partitions(REQUESTS).await.unwrap_or_default();
        !now.is_empty() && now.values().all(|one| one.leader != leader && !one.in_sync.contains(&leader))
    })
    .await;
    brokers.start(leader).await;
    all_in_sync(&brokers).await;
    load.place(50).await;
    until("all end", async || waiting(&orders).await == 0).await;
    println!(
        "leader {leader} of {} killed under load: {accepted_without} orders accepted without it, all final {final_after:.1?} after its death",
        partitions.values().filter(|one| one.leader == leader).count()
    );

    // Two of three die: one copy is too few to acknowledge anything (or to agree on who leads).
    let first = busiest(&brokers).await;
    let second = (1..=NODES).find(|node| *node != first).expect("three");
    brokers.kill(first).await;
    brokers.kill(second).await;
    let since = Instant::now();
    load.place(100).await;
    assert!(since.elapsed() < Duration::from_secs(15), "accepted as ever: {:?}", since.elapsed());
    until("the relay says that it cannot publish", async || incident(&relay, "publishing").await).await;
    let stuck = waiting(&orders).await;
    assert!(stuck >= 80, "{stuck} of 100 orders wait");
    brokers.start(first).await;
    let usable = Instant::now();
    until("two are enough", async || waiting(&orders).await == 0).await;
    let final_after = usable.elapsed();
    assert!(final_after < FINAL_WITHIN, "{final_after:?}");
    println!(
        "{stuck} of 100 orders waited while one broker of three was left, all final {final_after:.1?} after a second one was usable"
    );

    // The first one that everybody would ask falls silent: the others lead what it led, and whoever looks for them finds them.
    brokers.start(second).await;
    all_in_sync(&brokers).await;
    brokers.pause(1).await;
    let since = Instant::now();
    load.place(50).await;
    until("the others are enough", async || waiting(&orders).await == 0).await;
    let final_after = since.elapsed();
    assert!(final_after < FINAL_WITHIN, "{final_after:?}");
    // What is known of leaders is asked again.
    tokio::time::sleep(LEADERS_AGE_MAX).await;
    let since = Instant::now();
    load.place(50).await;
    until("the others are found", async || waiting(&orders).await == 0).await;
    let found_after = since.elapsed();
    assert!(found_after < FINAL_WITHIN, "{found_after:?}");
    brokers.resume(1).await;
    println!("with the first of three silent, 50 orders were final after {final_after:.1?}, and 50 more after {found_after:.1?}");
    let done = load.stop().await;
    until("all end", async || waiting(&orders).await == 0).await;
    assert_balanced(&orders, &payments).await;
    let finished = count(&orders, "select count(*) as n from orders where status = 'Finished'").await;
    assert_eq!(finished, done.accepted.len() as i64, "everything accepted was paid, nothing else is there");
    let output = audit(&["--json"], &shop.env).await;
    let (offenders, summary) = said(&output);
    assert_eq!(offenders, BTreeSet::new(), "{summary}");
    println!(
        "{} orders accepted, {finished} finished, {} tries refused or unanswered, slowest acknowledgement {:.1?}; audit: {}",
        done.accepted.len(),
        done.refused,
        done.slowest,
        brief(&summary)
    );
}
