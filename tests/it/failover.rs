//! Two replicas of a role under load, and one of them killed, frozen or stopped: how soon its work moves again, and that a frozen one
//! commits nothing when it goes on. Real processes, Kafka and Postgres.
//!
//! `SHOPD_TEST_FAILOVER_ROUNDS=20 cargo test --test it failover -- --nocapture --test-threads 1` prints the table of docs/FAILOVER.md.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use diesel::sql_types::{BigInt, Text};
use diesel_async::{RunQueryDsl, SimpleAsyncConnection};
use nix::sys::signal::Signal;
use shopd::db::{Db, sql};
use shopd::shutdown::Shutdown;

use crate::support::books::{assert_balanced, connect, count};
use crate::support::shop::{Client, ENDS_WHO_IS_FROZEN, Four, PATIENCE, Process, poll};
use crate::support::{kafka, postgres};

/// Enough that every partition always has something.
const USERS: usize = 32;
const PARTITIONS: usize = 4;
const CLIENTS: usize = 4;

/// Whose partition it is, and where it stands.
const PARTITION: &str =
    "select topic || ' ' || partition as place, coalesce(owner, '') as owner, epoch, next_offset::text as at from consumer_offset";
const OUTBOX: &str = "select name as place, coalesce(owner, '') as owner, epoch, snapshot as at from outbox_cursor";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Sigkill,
    Sigstop,
    SigstopInsideATransaction,
    CleanStop,
}

impl Way {
    /// What the contract promises.
    fn within(self) -> Duration {
        if self == Self::CleanStop { Duration::from_secs(1) } else { Duration::from_secs(5) }
    }
}

fn rounds() -> usize {
    std::env::var("SHOPD_TEST_FAILOVER_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1)
}

#[derive(Clone, diesel::QueryableByName)]
struct Place {
    #[diesel(sql_type = Text)]
    place: String,
    #[diesel(sql_type = Text)]
    owner: String,
    #[diesel(sql_type = BigInt)]
    epoch: i64,
    #[diesel(sql_type = Text)]
    at: String,
}

async fn places(db: &Db, table: &'static str) -> Vec<Place> {
    let mut conn = db.get().await.expect("a connection");
    sql(table).load(&mut *conn).await.expect(table)
}

fn is_of(owner: &str, process: &Process) -> bool {
    owner.contains(&format!(":{}:", process.pid()))
}

/// What a process held when it was struck, and has not moved under another's epoch since.
struct Lost {
    db: Db,
    table: &'static str,
    places: HashMap<String, Place>,
}

impl Lost {
    async fn by(process: &Process, db: &Db, table: &'static str) -> Self {
        let held = places(db, table).await.into_iter().filter(|one| is_of(&one.owner, process));
        Self { db: db.clone(), table, places: held.map(|one| (one.place.clone(), one)).collect() }
    }

    async fn is_over(&mut self) -> bool {
        for now in places(&self.db, self.table).await {
            let Some(old) = self.places.get_mut(&now.place) else { continue };
            if now.epoch == old.epoch {
                // What was committed before the strike came through.
                old.at = now.at;
            } else if now.at != old.at {
                self.places.remove(&now.place);
            }
        }
        self.places.is_empty()
    }
}

/// The time from `strike` until everything that was lost moves again.
async fn moved_again(lost: &mut [Lost], strike: Instant) -> Duration {
    assert!(lost.iter().any(|lost| !lost.places.is_empty()), "the one that is struck holds something");
    loop {
        let mut over = true;
        for one in &mut *lost {
            over &= one.is_over().await;
        }
        if over {
            return strike.elapsed();
        }
        assert!(strike.elapsed() < PATIENCE, "it does not move again");
        tokio::time::sleep(Duration::from_millis(5)).await; // a poll of what is measured
    }
}

struct Stand {
    shop: Four,
    orders: Db,
    payments: Db,
    accepted: Arc<AtomicUsize>,
    load: Vec<tokio::task::JoinHandle<()>>,
    stop: Shutdown,
}

impl Stand {
    async fn new(prefix: &str) -> Self {
        let (orders, payments) = (postgres::database("orders").await, postgres::database("payments").await);
        let prefix = format!("{prefix}{}", kafka::prefix());
        let shop = Four::start_with(&kafka::shared().await, &orders, &payments, &prefix, &ENDS_WHO_IS_FROZEN).await;
        for user in 0..USERS {
            shop.client.account(&format!("u{user}"), "1000000").await;
        }
        let (accepted, stop) = (Arc::new(AtomicUsize::new(0)), Shutdown::new());
        let client = |n: usize| tokio::spawn(place_orders(n, shop.client.clone(), accepted.clone(), stop.clone()));
        let load = (0..CLIENTS).map(client).collect();
        Self { orders: connect(&orders), payments: connect(&payments), shop, accepted, load, stop }
    }

    fn another(&self, role: &str) -> Process {
        Process::start(&[role], &self.shop.env)
    }

    /// Ends the load; every accepted order is there and has ended, and the books balance.
    async fn finish(self) {
        self.stop.stop();
        for task in self.load {
            task.await.expect("a client");
        }
        let since = Instant::now();
        while count(&self.orders, "select count(*) as n from orders where status = 'New'").await > 0 {
            assert!(since.elapsed() < PATIENCE, "orders do not end");
            poll().await;
        }
        let accepted = AtomicUsize::load(&self.accepted, Ordering::Relaxed);
        assert!(accepted > 50, "there was load: {accepted}");
        assert_eq!(count(&self.orders, "select count(*) as n from orders").await, accepted as i64);
        assert_balanced(&self.orders, &self.payments).await;
    }
}

async fn place_orders(n: usize, client: Client, accepted: Arc<AtomicUsize>, stop: Shutdown) {
    let mut user = n;
    while !stop.is_stopping() {
        user = (user + CLIENTS) % USERS;
        let body = format!(r#"{{"userId":"u{user}","amount":0.01}}"#);
        client.post("/api/OrdersProxy", &body).await.expect(201);
        accepted.fetch_add(1, Ordering::Relaxed);
        poll().await; // a client's pace
    }
}

/// Until each of the two has its half of the partitions, for a second: one that was fenced gives back all that it has once more.
async fn shared_evenly(db: &Db, replicas: [&Process; 2]) {
    let (since, mut even_since) = (Instant::now(), None);
    loop {
        let places = places(db, PARTITION).await;
        let held = replicas.map(|process| places.iter().filter(|one| is_of(&one.owner, process)).count());
        if held != [PARTITIONS / 2; 2] {
            even_since = None;
        } else if even_since.get_or_insert_with(Instant::now).elapsed() > Duration::from_secs(1) {
            return;
        }
        assert!(since.elapsed() < PATIENCE, "{held:?} partitions each:\n{}", replicas.map(Process::log).join("\n"));
        poll().await;
    }
}

/// Keeps `process` inside the transaction of a batch, freezes it there, and lets its locks be granted.
async fn freeze_inside_a_transaction(payments: &Db, process: &Process) -> Instant {
    let mut conn = payments.dedicated().await.unwrap();
    let owner = format!("%:{}:%", process.pid());
    // The accounts whose requests come to it.
    let locked = sql("with mine as (select distinct user_id from payment p join consumer_offset c using (topic, partition) where c.owner like $1)
                      select set_config('shopd_test.users', array_agg(user_id)::text, false) from mine");
    locked.bind::<Text, _>(owner).execute(&mut conn).await.unwrap();
    let begin = "begin; set local idle_in_transaction_session_timeout = 0;
                 select 1 from account where user_id = any(current_setting('shopd_test.users')::text[]) for update";
    conn.batch_execute(begin).await.unwrap();
    let since = Instant::now();
    while count(
        payments,
        "select count(*) as n from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
    )
    .await
        == 0
    {
        assert!(since.elapsed() < PATIENCE, "its batch comes to the locked accounts");
        tokio::time::sleep(Duration::from_millis(5)).await; // a poll
    }
    process.signal(Signal::SIGSTOP);
    let strike = Instant::now();
    conn.batch_execute("rollback").await.unwrap();
    strike
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_partitions_of_a_payments_replica_that_dies_freezes_or_stops_move_on_and_a_frozen_one_commits_nothing() {
    let stand = Stand::new("failover-payments").await;
    let mut replica = stand.another("payments");
    let mut times: BTreeMap<Way, Vec<Duration>> = BTreeMap::new();
    for _ in 0..rounds() {
        for way in [Way::Sigkill, Way::Sigstop, Way::SigstopInsideATransaction, Way::CleanStop] {
            shared_evenly(&stand.payments, [&stand.shop.payments, &replica]).await;
            let mut lost = [Lost::by(&replica, &stand.payments, PARTITION).await];
            let mut strike = Instant::now();
            match way {
                Way::Sigkill => replica.signal(Signal::SIGKILL),
                Way::Sigstop => replica.signal(Signal::SIGSTOP),
                Way::SigstopInsideATransaction => strike = freeze_inside_a_transaction(&stand.payments, &replica).await,
                Way::CleanStop => replica.signal(Signal::SIGTERM),
            }
            let time = moved_again(&mut lost, strike).await;
            times.entry(way).or_default().push(time);
            match way {
                Way::Sigkill => replica = stand.another("payments"),
                Way::CleanStop => {
                    assert!(replica.ended().await.success(), "{}", replica.log());
                    replica = stand.another("payments");
                }
                Way::Sigstop => replica.signal(Signal::SIGCONT),
                Way::SigstopInsideATransaction => {
                    replica.signal(Signal::SIGCONT);
                    // It still has the batch in hand, under its old epochs.
                    postgres::eventually("the fence", || replica.log().contains("nothing of the batch was committed")).await;
                }
            }
        }
    }
    report("payments' partitions", &times);
    drop(replica);
    stand.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_partitions_of_an_orders_replica_that_dies_freezes_or_stops_move_on() {
    let stand = Stand::new("failover-orders").await;
    let mut replica = stand.another("orders");
    let mut times: BTreeMap<Way, Vec<Duration>> = BTreeMap::new();
    for _ in 0..rounds() {
        for (way, signal) in [(Way::Sigkill, Signal::SIGKILL), (Way::Sigstop, Signal::SIGSTOP), (Way::CleanStop, Signal::SIGTERM)] {
            shared_evenly(&stand.orders, [&stand.shop.orders, &replica]).await;
            let mut lost = [Lost::by(&replica, &stand.orders, PARTITION).await];
            let strike = Instant::now();
            replica.signal(signal);
            times.entry(way).or_default().push(moved_again(&mut lost, strike).await);
            if way == Way::Sigstop {
                replica.signal(Signal::SIGCONT);
            } else {
                replica = stand.another("orders");
            }
        }
    }
    report("orders' partitions", &times);
    drop(replica);
    stand.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_outboxes_of_a_relay_that_dies_freezes_or_stops_move_on() {
    let mut stand = Stand::new("failover-relay").await;
    let mut standby = stand.another("relay");
    Client::new(standby.address("relay").await).ready().await;
    let mut times: BTreeMap<Way, Vec<Duration>> = BTreeMap::new();
    for _ in 0..rounds() {
        for (way, signal) in [(Way::Sigkill, Signal::SIGKILL), (Way::Sigstop, Signal::SIGSTOP), (Way::CleanStop, Signal::SIGTERM)] {
            // Who has the orders' outbox is struck; the other one may have payments'.
            let owner = places(&stand.orders, OUTBOX).await.remove(0).owner;
            if !is_of(&owner, &stand.shop.relay) {
                std::mem::swap(&mut stand.shop.relay, &mut standby);
            }
            let relay = &stand.shop.relay;
            let mut lost = [Lost::by(relay, &stand.orders, OUTBOX).await, Lost::by(relay, &stand.payments, OUTBOX).await];
            let strike = Instant::now();
            relay.signal(signal);
            times.entry(way).or_default().push(moved_again(&mut lost, strike).await);
            if way == Way::Sigstop {
                // It goes on where it was, and finds that the outbox is another's.
                relay.signal(Signal::SIGCONT);
                postgres::eventually("the fence", || relay.log().contains("another relay has the outbox")).await;
            } else {
                stand.shop.relay = stand.another("relay");
                Client::new(stand.shop.relay.address("relay").await).ready().await;
            }
        }
    }
    report("the relay's outboxes", &times);
    stand.finish().await;
}

fn report(what: &str, times: &BTreeMap<Way, Vec<Duration>>) {
    for (way, times) in times {
        let mut sorted = times.clone();
        sorted.sort();
        let (p50, max) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() - 1]);
        eprintln!("| {what} | {way:?} | {} rounds | p50 {} ms | max {} ms |", sorted.len(), p50.as_millis(), max.as_millis());
        assert!(max < way.within(), "{what}, {way:?}: {sorted:?}");
    }
}
