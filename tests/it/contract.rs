//! Sentences of the contract that only a running system can keep, at the services' own ports and through the gateway.

use std::path::Path;
use std::time::{Duration, Instant};

use futures::future::join_all;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use uuid::Uuid;

use crate::support::postgres;
use crate::support::shop::{All, Client, Process};

/// Below the time after which a server would stop waiting for a body.
const AT_ONCE: Duration = Duration::from_secs(8);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_identities_and_crowds_are_treated_alike_at_both_ports() {
    let mut shop = All::start(postgres::own_dir()).await;
    let (orders, payments) = (Client::new(shop.orders.clone()), Client::new(shop.payments.clone()));
    for (client, orders_path, accounts) in
        [(&shop.client, "/api/OrdersProxy", "/api/PaymentsProxy"), (&payments, "", "/api/Account"), (&orders, "/api/Orders", "")]
    {
        if !accounts.is_empty() {
            a_body_that_is_too_large_is_refused_before_it_comes(client, &format!("{accounts}/crowd/deposit")).await;
            a_body_that_nobody_reads_keeps_the_rules(client, accounts).await;
            of_many_who_open_one_account_one_succeeds(client, accounts).await;
        }
        if !orders_path.is_empty() {
            a_body_that_is_too_large_is_refused_before_it_comes(client, orders_path).await;
            of_many_orders_with_one_id_one_is_new(client, orders_path).await;
        }
    }
    shop.process.signal(Signal::SIGTERM);
    assert!(shop.process.ended().await.success());
    let log = shop.process.log();
    assert!(!log.contains("not given back"), "{log}");
}

async fn a_body_that_is_too_large_is_refused_before_it_comes(client: &Client, path: &str) {
    let began = Instant::now();
    let mut stream = TcpStream::connect(client.base.trim_start_matches("http://")).await.unwrap();
    let head =
        format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 65537\r\n\r\n[").into_bytes();
    stream.write_all(&head).await.unwrap();
    let mut status = [0; 12];
    stream.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 413", "{path}");
    assert!(began.elapsed() < AT_ONCE, "{:?}", began.elapsed());
}

async fn a_body_that_nobody_reads_keeps_the_rules(client: &Client, accounts: &str) {
    let open = |name: &str| format!("{accounts}/{name}-{}", client.base.len());
    let encoded = client.send("POST", &open("encoded"), &[("content-encoding", "gzip")], Some("x")).await.unwrap();
    assert_eq!(encoded.expect(415).code(), "unsupported_media_type");
    let large = client.send("POST", &open("large"), &[], Some(&"x".repeat(65_537))).await.unwrap();
    assert_eq!(large.expect(413).code(), "payload_too_large");
    client
        .send("POST", &format!("{accounts}/{}", Uuid::new_v4()), &[("content-type", "text/plain")], Some("x"))
        .await
        .unwrap()
        .expect(200);
}

async fn of_many_who_open_one_account_one_succeeds(client: &Client, accounts: &str) {
    let account = format!("{accounts}/{}", Uuid::new_v4());
    let opened = join_all((0..64).map(|_| client.send("POST", &account, &[], None))).await;
    let mut statuses: Vec<_> = opened.into_iter().map(|answer| answer.unwrap().status).collect();
    statuses.sort_unstable();
    assert_eq!((statuses[0], &statuses[1..]), (200, &[409; 63][..]));
    let deposit = format!("{account}/deposit");
    for answer in join_all((0..64).map(|_| client.post(&deposit, "0.07"))).await {
        answer.expect(200);
    }
    assert!(client.get(&format!("{account}/balance")).await.text.ends_with(r#""balance":4.48}"#));
}

async fn of_many_orders_with_one_id_one_is_new(client: &Client, path: &str) {
    let body = format!(r#"{{"orderId":"{}","userId":"crowd","amount":1}}"#, Uuid::new_v4());
    let placed = join_all((0..64).map(|_| client.post(path, &body))).await;
    let fresh = placed.iter().filter(|answer| answer.status == 201).count();
    let replayed = placed.iter().filter(|answer| answer.status == 200 && answer.headers["idempotent-replayed"] == "true").count();
    assert_eq!((fresh, replayed), (1, 63));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_stops_answering_costs_a_bounded_wait_and_its_return_heals_all() {
    // The services' own bound of nine seconds is what ends the wait: neither the gateway nor the client has one that is near it.
    let (gateway_ms, client) = ("30000", Duration::from_secs(40));
    let mut shop = All::start_with(postgres::own_dir(), &[("SHOPD__GATEWAY__UPSTREAM_TIMEOUT_MS", gateway_ms)]).await;
    shop.client = Client::waiting(shop.client.base.clone(), client);
    shop.client.account("ann", "10").await;
    let server = Frozen::of(&shop.dir);
    let began = Instant::now();
    let order = r#"{"userId":"ann","amount":1}"#;
    let asked = [
        shop.client.send("POST", "/api/OrdersProxy", &[], Some(order)),
        shop.client.send("GET", "/api/OrdersProxy", &[], None),
        shop.client.send("POST", "/api/PaymentsProxy/ann/deposit", &[], Some("1")),
        shop.client.send("POST", "/api/PaymentsProxy/bob", &[], None),
        shop.client.send("GET", "/api/PaymentsProxy/ann/balance", &[], None),
        shop.client.send("GET", "/api/PaymentsProxy/ann/transactions", &[], None),
    ];
    for answer in join_all(asked).await {
        let answer = answer.unwrap().expect(503);
        assert_eq!((answer.code().as_str(), answer.headers["content-type"].as_str()), ("unavailable", "application/problem+json"));
        assert!(!answer.text.contains("connection"), "{answer:?}");
    }
    assert!(began.elapsed() < Duration::from_secs(18), "{:?}", began.elapsed());
    let orders = Client::new(shop.orders.clone());
    assert_eq!(orders.get("/health/ready").await.expect(503).json()["missing"][0], "database");
    drop(server);
    orders.ready().await;
    shop.client.post("/api/OrdersProxy", order).await.expect(201);
}

/// The embedded server's processes, all of them stopped until this is dropped.
struct Frozen(Vec<Pid>);

impl Frozen {
    fn of(dir: &Path) -> Self {
        let pid_file = std::fs::read_to_string(dir.join("postgres/postmaster.pid")).expect("a running server");
        let server: i32 = pid_file.lines().next().and_then(|line| line.parse().ok()).expect("its pid");
        kill(Pid::from_raw(server), Signal::SIGSTOP).expect("a process of ours");
        let children = std::fs::read_dir("/proc").expect("Linux").filter_map(|entry| {
            let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let parent: i32 = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
            (parent == server).then_some(pid)
        });
        let frozen: Vec<_> = children.chain([server]).map(Pid::from_raw).collect();
        for pid in &frozen {
            let _ = kill(*pid, Signal::SIGSTOP);
        }
        Self(frozen)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = kill(*pid, Signal::SIGCONT);
        }
    }
}

#[tokio::test]
async fn a_request_in_flight_has_the_time_to_end_and_an_end_without_it_is_not_clean() {
    // What is answered has long, what never is holds the test up for no longer than it must.
    for (answers_after, drain_ms) in [(Some(Duration::from_millis(2_000)), "20000"), (None, "4000")] {
        let service = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", service.local_addr().unwrap());
        let env = [
            ("SHOPD__GATEWAY__ORDERS_URLS", url.as_str()),
            ("SHOPD__GATEWAY__PAYMENTS_URLS", &url),
            ("SHOPD__GATEWAY__UPSTREAM_TIMEOUT_MS", "30000"),
            ("SHOPD__SHUTDOWN__TIMEOUT_MS", drain_ms),
        ];
        let mut gateway = Process::start(&["gateway"], &env.map(|(name, value)| (name.to_owned(), value.to_owned())));
        let client = Client::new(gateway.address("gateway").await);
        let asking = tokio::spawn(async move { client.send("GET", "/api/OrdersProxy", &[], None).await });
        let mut request = loop {
            // The gateway asks after our health, too.
            let (mut stream, _) = service.accept().await.unwrap();
            let mut head = vec![0; 4096];
            let read = stream.read(&mut head).await.unwrap();
            if head[..read].starts_with(b"GET /api/Orders ") {
                break stream;
            }
        };
        gateway.signal(Signal::SIGTERM);
        if let Some(after) = answers_after {
            tokio::time::sleep(after).await; // a slow service, no poll
            request.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]").await.unwrap();
            assert_eq!(asking.await.unwrap().unwrap().expect(200).text, "[]");
        }
        assert_eq!(gateway.ended().await.success(), answers_after.is_some(), "{}", gateway.log());
    }
}
