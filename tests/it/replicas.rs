//! Two replicas of each service behind one gateway, under load, and one of them killed, frozen or stopped: no client request fails,
//! nothing is done twice, and nobody sees an answer that only a repeat of the gateway's caused. Real processes, Kafka and Postgres.
//!
//! `SHOPD_TEST_REPLICA_ROUNDS=10 cargo test --test it replicas -- --nocapture` says what it counted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use shopd::db::Db;
use shopd::shutdown::Shutdown;
use uuid::Uuid;

use crate::support::books::{assert_balanced, connect, facts};
use crate::support::inside::until;
use crate::support::shop::{Client, ENDS_WHO_IS_FROZEN, Four, Process};
use crate::support::{kafka, postgres};

const CLIENTS: usize = 8;
/// Requests answered between two strikes, at least.
const BETWEEN: usize = 300;
/// How long a frozen replica stays so.
const FROZEN: Duration = Duration::from_secs(3);
/// No request takes longer, frozen replica or not.
const SLOWEST: Duration = Duration::from_secs(12);

fn rounds() -> usize {
    std::env::var("SHOPD_TEST_REPLICA_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1)
}

/// What the clients saw.
#[derive(Default)]
struct Seen {
    answered: AtomicUsize,
    slowest_ms: AtomicU64,
}

/// One client: opens an account, then deposits and orders without an id and without a key, asks after them, and counts what it was told.
async fn shop_on(client: Client, user: String, seen: Arc<Seen>, stop: Shutdown) -> (String, usize, usize) {
    let (mut orders, mut deposits) = (0, 0);
    let ask = async |method: &str, path: &str, body: Option<&str>, status: u16| {
        let began = Instant::now();
        let answer = client.send(method, path, &[], body).await.unwrap_or_else(|error| panic!("{method} {path}: {error:?}"));
        let answer = answer.expect(status);
        assert!(!answer.headers.contains_key("idempotent-replayed"), "only the gateway repeated it: {answer:?}");
        seen.slowest_ms.fetch_max(began.elapsed().as_millis() as u64, Ordering::Relaxed);
        seen.answered.fetch_add(1, Ordering::Relaxed);
        answer
    };
    ask("POST", &format!("/api/PaymentsProxy/{user}"), None, 200).await;
    while !stop.is_stopping() {
        ask("POST", &format!("/api/PaymentsProxy/{user}/deposit"), Some("2"), 200).await;
        deposits += 1;
        let body = format!(r#"{{"userId":"{user}","amount":0.5,"description":"a book"}}"#);
        let order = ask("POST", "/api/OrdersProxy", Some(&body), 201).await;
        assert_eq!(order.json()["status"], "New");
        let named = format!(r#"{{"orderId":"{}","userId":"{user}","amount":0.25}}"#, Uuid::now_v7());
        ask("POST", "/api/OrdersProxy", Some(&named), 201).await;
        orders += 2;
        ask("GET", &order.headers["location"], None, 200).await;
        ask("GET", &format!("/api/PaymentsProxy/{user}/balance"), None, 200).await;
        ask("GET", &format!("/api/users/{user}/summary"), None, 200).await;
    }
    (user, orders, deposits)
}

struct Stand {
    shop: Four,
    /// The second replica of each service.
    seconds: BTreeMap<&'static str, Process>,
    gateway: Process,
    client: Client,
    orders_db: Db,
    payments_db: Db,
}

impl Stand {
    async fn start() -> Self {
        let urls = [postgres::database("orders").await, postgres::database("payments").await];
        let shop = Four::start_with(&kafka::shared().await, &urls[0], &urls[1], &kafka::prefix(), &ENDS_WHO_IS_FROZEN).await;
        let mut seconds = BTreeMap::new();
        let mut env = shop.env.clone();
        for role in ["orders", "payments"] {
            let second = Process::start(&[role], &shop.env);
            let address = second.address(role).await;
            let key = format!("SHOPD__GATEWAY__{}_URLS", role.to_uppercase());
            let urls = env.iter_mut().find(|(name, _)| *name == key).expect("a setting");
            urls.1 = format!("{},{address}", urls.1);
            Client::new(address).ready().await;
            seconds.insert(role, second);
        }
        let gateway = Process::start(&["gateway"], &env);
        let client = Client::new(gateway.address("gateway").await);
        client.ready().await;
        let [orders_db, payments_db] = [0, 1].map(|at| connect(&urls[at]));
        Self { shop, seconds, gateway, client, orders_db, payments_db }
    }

    /// SIGKILL, and the same again at the same address.
    async fn crash_and_restart(&mut self, role: &'static str) {
        let second = self.seconds.get_mut(role).expect("a replica");
        let address = second.address(role).await;
        second.kill().await;
        self.restart(role, &address).await;
    }

    /// SIGTERM, and the same again: a rolling restart.
    async fn stop_and_restart(&mut self, role: &'static str) {
        let second = self.seconds.get_mut(role).expect("a replica");
        let address = second.address(role).await;
        second.signal(Signal::SIGTERM);
        let status = second.ended().await;
        assert!(status.success(), "{role} ended badly: {status:?}\n{}", second.log());
        self.restart(role, &address).await;
    }

    async fn restart(&mut self, role: &'static str, address: &str) {
        let mut env = self.shop.env.clone();
        env.push((format!("SHOPD__{}__LISTEN", role.to_uppercase()), address.trim_start_matches("http://").to_owned()));
        let again = Process::start(&[role], &env);
        Client::new(again.address(role).await).ready().await;
        self.seconds.insert(role, again);
    }

    async fn freeze(&self, role: &'static str) {
        let second = &self.seconds[role];
        second.signal(Signal::SIGSTOP);
        tokio::time::sleep(FROZEN).await; // how long it stays frozen
        second.signal(Signal::SIGCONT);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_killed_stopped_or_frozen_costs_no_request_and_doubles_nothing() {
    let mut stand = Stand::start().await;
    let (seen, stop) = (Arc::new(Seen::default()), Shutdown::new());
    let clients: Vec<_> =
        (0..CLIENTS).map(|n| tokio::spawn(shop_on(stand.client.clone(), format!("u{n}"), seen.clone(), stop.clone()))).collect();
    let mut strikes = 0;
    let went_on = async |strikes: usize| {
        let from = seen.answered.load(Ordering::Relaxed);
        let gone = || clients.iter().any(tokio::task::JoinHandle::is_finished);
        until(&format!("the clients go on after strike {strikes}"), async || {
            gone() || seen.answered.load(Ordering::Relaxed) >= from + BETWEEN
        })
        .await;
    };
    went_on(0).await;
    for _ in 0..rounds() {
        for role in ["orders", "payments"] {
            stand.crash_and_restart(role).await;
            went_on(strikes + 1).await;
            stand.stop_and_restart(role).await;
            went_on(strikes + 2).await;
            stand.freeze(role).await;
            went_on(strikes + 3).await;
            strikes += 3;
        }
    }
    stop.stop();
    let mut told = BTreeMap::new();
    for client in clients {
        let (user, orders, deposits) = client.await.unwrap_or_else(|error| panic!("{error}\n{}", stand.gateway.log()));
        told.insert(user, (orders, deposits));
    }
    let (answered, slowest_ms) = (seen.answered.load(Ordering::Relaxed), seen.slowest_ms.load(Ordering::Relaxed));
    println!("{strikes} strikes, {answered} requests, none failed; the slowest took {slowest_ms} ms");
    assert!(Duration::from_millis(slowest_ms) < SLOWEST, "{slowest_ms} ms");

    // What the clients were told is what there is, each effect once.
    let of = |user: &str, n: usize| format!("{user} {n}");
    let orders = facts(&stand.orders_db, "select user_id || ' ' || count(*) as fact from orders group by user_id order by 1").await;
    assert_eq!(orders, told.iter().map(|(user, (orders, _))| of(user, *orders)).collect::<Vec<_>>());
    let deposits = facts(
        &stand.payments_db,
        "select a.user_id || ' ' || count(*) as fact from transfer t join account a on a.id = t.account_id
          where t.order_id is null group by a.user_id order by 1",
    )
    .await;
    assert_eq!(deposits, told.iter().map(|(user, (_, deposits))| of(user, *deposits)).collect::<Vec<_>>());
    until("every order ends", async || {
        crate::support::books::count(&stand.orders_db, "select count(*) as n from orders where status = 'New'").await == 0
    })
    .await;
    assert_balanced(&stand.orders_db, &stand.payments_db).await;
}
