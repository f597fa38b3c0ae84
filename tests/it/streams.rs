//! Live streams while what serves them dies: two orders replicas and two gateways, killed one after the other under load, and clients
//! that come back behind their last event. Each sees every change of its orders exactly once. Real processes, Kafka and Postgres.
//!
//! `SHOPD_TEST_STREAM_ROUNDS=10 cargo test --test it streams -- --nocapture` says what it counted.

mod idle;
mod watch;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use nix::sys::signal::Signal;
use shopd::db::Db;
use shopd::shutdown::Shutdown;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::live::client::{Frame, WebSocket};
use crate::support::books::{assert_balanced, connect, count, facts};
use crate::support::inside::until;
use crate::support::shop::{Client, ENDS_WHO_IS_FROZEN, Four, PATIENCE, Process, poll};
use crate::support::{kafka, postgres};
use watch::{Resumes, Watch};

const USERS: usize = 40;
const LOADERS: usize = 4;
/// Of so many orders, one is watched by itself, too.
const WATCHED_ONE_IN: usize = 4;
/// Events that all clients together see between two strikes, at least.
const BETWEEN: usize = 400;
const SOCKETS: usize = 12;

fn rounds() -> usize {
    std::env::var("SHOPD_TEST_STREAM_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1)
}

fn user(n: usize) -> String {
    format!("u{n}")
}

struct Stand {
    shop: Four,
    second: Process,
    gateways: Vec<Process>,
    bases: [String; 2],
    env: Vec<(String, String)>,
    orders_db: Db,
    payments_db: Db,
}

impl Stand {
    async fn start() -> Self {
        let urls = [postgres::database("orders").await, postgres::database("payments").await];
        let shop = Four::start_with(&kafka::shared().await, &urls[0], &urls[1], &kafka::prefix(), &ENDS_WHO_IS_FROZEN).await;
        let second = Process::start(&["orders"], &shop.env);
        let address = second.address("orders").await;
        Client::new(address.clone()).ready().await;
        let mut env = shop.env.clone();
        let replicas = env.iter_mut().find(|(name, _)| name == "SHOPD__GATEWAY__ORDERS_URLS").expect("a setting");
        replicas.1 = format!("{},{address}", replicas.1);
        let gateways = vec![Process::start(&["gateway"], &env), Process::start(&["gateway"], &env)];
        let bases = [gateways[0].address("gateway").await, gateways[1].address("gateway").await];
        for base in &bases {
            Client::new(base.clone()).ready().await;
        }
        let [orders_db, payments_db] = [0, 1].map(|at| connect(&urls[at]));
        Self { shop, second, gateways, bases, env, orders_db, payments_db }
    }

    fn listening(&self, role: &str, address: &str) -> Vec<(String, String)> {
        let listen = address.trim_start_matches("http://").to_owned();
        self.env.iter().cloned().chain([(format!("SHOPD__{role}__LISTEN"), listen)]).collect()
    }

    /// SIGKILL, and the same again at the same address.
    async fn crash_orders(&mut self) {
        let address = self.second.address("orders").await;
        self.second.kill().await;
        self.second = Process::start(&["orders"], &self.listening("ORDERS", &address));
        Client::new(self.second.address("orders").await).ready().await;
    }

    async fn crash_gateway(&mut self, at: usize) {
        self.gateways[at].kill().await;
        self.gateways[at] = Process::start(&["gateway"], &self.listening("GATEWAY", &self.bases[at]));
        Client::new(self.gateways[at].address("gateway").await).ready().await;
    }

    /// Places an order under an id of its own until it is accepted, at one gateway after the other.
    async fn place(bases: &[String; 2], first: usize, user: &str, amount: &str) -> String {
        let (id, clients) = (Uuid::now_v7().to_string(), [0, 1].map(|at: usize| Client::new(bases[at].clone())));
        let body = format!(r#"{{"orderId":"{id}","userId":"{user}","amount":{amount}}}"#);
        let accepted = async {
            for at in first.. {
                match clients[at % 2].send("POST", "/api/OrdersProxy", &[], Some(&body)).await {
                    Ok(answer) if [200, 201].contains(&answer.status) => return,
                    // A gateway that was just killed.
                    _ => poll().await,
                }
            }
        };
        tokio::time::timeout(PATIENCE, accepted).await.expect("an order is accepted");
        id
    }

    /// All events of a user's orders but the first one's, as the database has them.
    async fn events(&self) -> Vec<(String, String)> {
        let statement = "select o.user_id || ' ' || e.order_id || ' ' || e.status as fact from order_change e
                           join orders o on o.id = e.order_id where o.description is distinct from 'the first' and e.xid is not null order by 1";
        let split = |fact: String| fact.split_once(' ').map(|(user, said)| (user.to_owned(), said.to_owned()));
        facts(&self.orders_db, statement).await.into_iter().filter_map(split).collect()
    }
}

/// Watches an order by itself, over a WebSocket: its messages, to a clean close.
async fn socket(base: &str, order: &str) -> Vec<String> {
    let mut socket = WebSocket::open(base, &format!("/api/OrdersProxy/{order}/ws")).await.expect("a socket");
    let mut told = Vec::new();
    loop {
        match socket.next().await {
            Frame::Text(text) => {
                let order: serde_json::Value = serde_json::from_str(&text).expect("JSON");
                told.push(order["status"].as_str().expect("a status").to_owned());
            }
            Frame::Close(1000, _) => return told,
            other => panic!("{other:?} after {told:?}"),
        }
    }
}

/// An answer may be so late after the order's end. A look each second alone is later in three of four.
const SOON: TimeDelta = TimeDelta::milliseconds(250);
/// So many orders each way: from the replica that accepts them to the one that ends them.
const WAITS_EACH_WAY: usize = 8;
const WAITS_MAX: usize = 200;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_at_one_replica_is_told_of_an_end_by_either() {
    let stand = Stand::start().await;
    Client::new(stand.bases[0].clone()).account(&user(0), "1000").await;
    let accepting = [stand.shop.orders.address("orders").await, stand.second.address("orders").await].map(Client::new);
    let places = "select count(distinct owner) as n from consumer_offset where topic like '%payment-status-updates'";
    until("both end orders", async || count(&stand.orders_db, places).await == 2).await;
    let ended_by =
        "select c.owner as fact from (select partition from order_event where status = 'Finished' order by id desc limit 1) e
           join consumer_offset c on c.partition = e.partition
          where c.topic like '%payment-status-updates' and c.owner is not null";
    let order = format!(r#"{{"userId":"{}","amount":1}}"#, user(0));
    let mut ways = BTreeMap::<(usize, String), Vec<TimeDelta>>::new();
    // Each accepts every other one; who ends it is as its id falls.
    for n in 0.. {
        if ways.len() == 4 && ways.values().all(|late| late.len() >= WAITS_EACH_WAY) {
            break;
        }
        assert!(n < WAITS_MAX, "two ways told directly, two between the replicas: {ways:?}");
        let waits = [("Prefer", "wait=20")];
        let answer = accepting[n % 2].send("POST", "/api/Orders", &waits, Some(&order)).await.unwrap().expect(201);
        let heard = Utc::now();
        assert_eq!(answer.json()["status"], "Finished");
        let ended = answer.json()["updatedAt"].as_str().unwrap().parse::<DateTime<Utc>>().unwrap();
        for owner in facts(&stand.orders_db, ended_by).await {
            ways.entry((n % 2, owner)).or_default().push(heard - ended);
        }
        tokio::time::sleep(Duration::from_millis(37 * (n % 7) as u64)).await;
    }
    // A stall of the machine makes one late, or two; where nobody says so three of four are.
    for (way, late) in &ways {
        let missed = late.iter().filter(|late| **late > SOON).count();
        assert!(missed <= late.len() / 4, "{way:?}: {late:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_comes_back_behind_its_last_event_sees_each_exactly_once_whatever_dies() {
    let mut stand = Stand::start().await;
    let (stop, placing) = (Shutdown::new(), Shutdown::new());
    let front = Client::new(stand.bases[0].clone());

    // Each has an account and an order, so that each stream begins with an event, whose id it can come back behind.
    let (mut watches, mut tasks) = (Vec::new(), JoinSet::new());
    for n in 0..USERS {
        front.account(&user(n), "1000").await;
        let first = format!(r#"{{"userId":"{}","amount":1,"description":"the first"}}"#, user(n));
        let waited = front.send("POST", "/api/OrdersProxy", &[("Prefer", "wait=30")], Some(&first)).await.unwrap().expect(201);
        assert_eq!(waited.json()["status"], "Finished");
        let watch = Watch::default();
        let path = format!("/api/OrdersProxy/events?userId={}", user(n));
        tasks.spawn(watch.clone().run(stand.bases.clone(), path, n, Resumes::BehindItsLast, stop.clone()));
        watches.push(watch);
    }
    let forgetful = Watch::default();
    let path = format!("/api/OrdersProxy/events?userId={}", user(0));
    tasks.spawn(forgetful.clone().run(stand.bases.clone(), path, 1, Resumes::Forgetful, stop.clone()));
    until("every stream has begun", async || watches.iter().chain([&forgetful]).all(|watch| watch.len() == 1)).await;

    let placed = Arc::new(AtomicUsize::new(0));
    let mut loaders = JoinSet::new();
    for loader in 0..LOADERS {
        let (bases, stop, placing, placed) = (stand.bases.clone(), stop.clone(), placing.clone(), placed.clone());
        loaders.spawn(async move {
            let mut items = Vec::new();
            for n in (loader..).step_by(LOADERS) {
                if placing.is_stopping() {
                    break;
                }
                // One in ten cannot be paid.
                let id = Stand::place(&bases, n, &user(n % USERS), if n % 10 == 3 { "5000" } else { "0.5" }).await;
                placed.fetch_add(1, Ordering::Relaxed);
                if (n / LOADERS).is_multiple_of(WATCHED_ONE_IN) {
                    let item = Watch::default();
                    let path = format!("/api/OrdersProxy/{id}/events");
                    let run = item.clone().run(bases.clone(), path, n, Resumes::BehindItsLast, stop.clone());
                    items.push((id, item, tokio::spawn(run)));
                }
            }
            items
        });
    }
    let went_on = async |what: &str| {
        let seen = || watches.iter().map(Watch::len).sum::<usize>();
        let from = seen();
        until(&format!("events go on after {what}"), async || seen() >= from + BETWEEN).await;
    };
    went_on("the beginning").await;

    let mut strikes = 0;
    for round in 0..rounds() {
        // Nothing is published while the relay stands still, so these orders are open when their replica dies.
        stand.shop.relay.signal(Signal::SIGSTOP);
        let mut sockets = JoinSet::new();
        for n in 0..SOCKETS {
            let id = Stand::place(&stand.bases, n, &user(n), "0.25").await;
            let base = stand.bases[n % 2].clone();
            sockets.spawn(async move { socket(&base, &id).await });
        }
        let open = async || {
            let metrics = [front.get("/metrics").await, Client::new(stand.bases[1].clone()).get("/metrics").await];
            let gauges = metrics.iter().flat_map(|answer| answer.text.lines());
            gauges.filter_map(|line| line.strip_prefix("shopd_gateway_sockets ")?.parse::<f64>().ok()).sum::<f64>()
        };
        until("the sockets are open", async || open().await >= SOCKETS as f64).await;
        stand.crash_orders().await;
        stand.shop.relay.signal(Signal::SIGCONT);
        while let Some(told) = sockets.join_next().await {
            assert_eq!(told.expect("a socket"), ["New", "Finished"]);
        }
        went_on("an orders replica died").await;
        stand.crash_gateway((round + 1) % 2).await;
        went_on("a gateway died").await;
        strikes += 2;
    }

    placing.stop();
    let mut items = Vec::new();
    while let Some(loader) = loaders.join_next().await {
        items.extend(loader.expect("a loader"));
    }
    until("every order ends", async || count(&stand.orders_db, "select count(*) as n from orders where status = 'New'").await == 0)
        .await;
    // What comes behind everything else: when that is seen, nothing else can be under way.
    for (n, watch) in watches.iter().enumerate() {
        let id = Stand::place(&stand.bases, n, &user(n), "0.5").await;
        let last = format!("{id} Finished");
        until(&format!("{} sees its last order", user(n)), async || watch.has(&last)).await;
    }
    let events = stand.events().await;
    for (n, watch) in watches.iter().enumerate() {
        let expected: Vec<&String> = events.iter().filter(|(whose, _)| *whose == user(n)).map(|(_, said)| said).collect();
        let said = watch.said();
        let first = said.iter().filter(|one| !expected.contains(one)).count();
        assert_eq!(first, 1, "{}: its first order, and nobody else's: {said:?}", user(n));
        assert_eq!(said.iter().filter(|one| expected.contains(one)).collect::<Vec<_>>(), expected, "{}", user(n));
        assert_eq!(watch.doubles(), 0, "{}", user(n));
    }
    assert!(forgetful.doubles() > 0, "the control: a client that resumes without its id sees events again");
    for (id, item, run) in &mut items {
        tokio::time::timeout(PATIENCE, run).await.unwrap_or_else(|_| panic!("{id} is over")).expect("a client");
        let said = item.said();
        let ends = said.iter().filter(|one| one.ends_with(" Finished") || one.ends_with(" Cancelled")).count();
        assert!(ends == 1 && said.len() <= 2 && item.doubles() == 0, "{id}: {said:?}");
    }
    stop.stop();
    while let Some(watch) = tasks.join_next().await {
        watch.expect("a client");
    }
    assert_balanced(&stand.orders_db, &stand.payments_db).await;
    println!(
        "{strikes} strikes, {} orders; {USERS} user streams, opened {} times, saw {} events, none missing, none twice; {} item streams, opened {} \
         times; {} sockets; who forgot its id saw {} of {} twice",
        placed.load(Ordering::Relaxed) + USERS * 2 + SOCKETS * rounds(),
        watches.iter().map(Watch::streams).sum::<usize>(),
        watches.iter().map(Watch::len).sum::<usize>(),
        items.len(),
        items.iter().map(|(_, item, _)| item.streams()).sum::<usize>(),
        SOCKETS * rounds(),
        forgetful.doubles(),
        forgetful.len(),
    );
    assert!(watches.iter().map(Watch::streams).sum::<usize>() > USERS, "streams were broken");
}
