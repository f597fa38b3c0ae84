//! Many streams that have nothing to say, through one gateway to one orders process: what they cost, and that they hold nobody up.
//!
//! `SHOPD_TEST_STREAMS=9000 cargo test --test it streams::idle -- --nocapture` opens so many.

use std::time::{Duration, Instant, SystemTime};

use futures::{StreamExt, stream};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use shopd::db::{self, Schema};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::hostile::wire::read_until;
use crate::live::client::Events;
use crate::support::books::connect;
use crate::support::postgres;
use crate::support::shop::{Client, Process, poll};

const ORDERS: usize = 200;
const OPENED_AT_ONCE: usize = 32;
/// 300 MB for 10 000 streams, in either process.
const KIB_PER_STREAM_MAX: u64 = 30;
/// What a process may have grown by for reasons of its own.
const GROWN_KIB_MAX: u64 = 24 * 1024;
/// Less than the interval of heartbeats, 20 s.
const LEFT_MAX: Duration = Duration::from_secs(10);
/// For nine of ten: a stall of the machine makes a few late.
const EVENT_P90_MAX: Duration = Duration::from_secs(1);

fn streams() -> usize {
    std::env::var("SHOPD_TEST_STREAMS").ok().and_then(|streams| streams.parse().ok()).unwrap_or(1_000)
}

/// One process of each, and a client of the gateway.
struct Stand {
    orders: Process,
    gateway: Process,
    client: Client,
}

impl Stand {
    async fn start() -> Self {
        let set = |name: &str, value: String| (format!("SHOPD__{name}"), value);
        let database = postgres::database("orders").await;
        db::migrate(&connect(&database), &[Schema::Orders]).await.expect("a schema");
        let env = vec![
            set("ORDERS__DATABASE_URL", database),
            // Nobody listens there: orders are accepted all the same.
            set("KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1".into()),
        ];
        let orders = Process::start(&["orders"], &env);
        let url = orders.address("orders").await;
        let front = [set("GATEWAY__ORDERS_URLS", url.clone()), set("GATEWAY__PAYMENTS_URLS", url)];
        let gateway = Process::start(&["gateway"], &[env, front.to_vec()].concat());
        let client = Client::new(gateway.address("gateway").await);
        client.ready().await;
        Self { orders, gateway, client }
    }
}

fn resident_kib(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).expect("a process");
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
    kib.expect("its memory")
}

async fn open(base: &str, user: &str) -> TcpStream {
    open_at(base, &format!("/api/OrdersProxy/events?userId={user}"), "HTTP/1.1").await
}

async fn open_at(base: &str, path: &str, version: &str) -> TcpStream {
    let host = base.trim_start_matches("http://");
    let mut stream = TcpStream::connect(host).await.expect("a connection");
    stream.write_all(format!("GET {path} {version}\r\nHost: {host}\r\n\r\n").as_bytes()).await.expect("sent");
    let begun = read_until(&mut stream, "retry: 1000\n\n").await;
    assert!(begun.contains(" 200 "), "{path}: {begun}");
    stream
}

/// Places orders one after the other and returns how long after its commit each was seen, at most: from its own time to ours.
async fn latencies(client: &Client, placed_before: usize) -> Vec<Duration> {
    let mut events = Events::open(&client.base, "/api/OrdersProxy/events?userId=probe", "").await;
    events.take(placed_before).await;
    let mut took = Vec::new();
    for _ in 0..ORDERS {
        client.post("/api/OrdersProxy", r#"{"userId":"probe","amount":1}"#).await.expect(201);
        let order = events.next().await.expect("its event").json();
        let now = SystemTime::now();
        let at = chrono::DateTime::parse_from_rfc3339(order["createdAt"].as_str().expect("a time")).expect("a time");
        took.push(now.duration_since(at.into()).unwrap_or_default());
    }
    took.sort();
    took
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_say_nothing_cost_little_and_hold_nobody_up() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let streams = streams();
    assert!(streams as u64 * 2 + 200 < hard, "{hard} files are not enough for {streams} streams: ulimit -n");
    let Stand { orders, gateway, client } = Stand::start().await;
    let quiet = latencies(&client, 0).await;
    let before = [&gateway, &orders].map(resident_kib);

    let began = Instant::now();
    let opening = (0..streams).map(|n| {
        let base = client.base.clone();
        async move { open(&base, &format!("idle-{n}")).await }
    });
    let open: Vec<TcpStream> = stream::iter(opening).buffer_unordered(OPENED_AT_ONCE).collect().await;
    let opened = began.elapsed();
    let during = [&gateway, &orders].map(resident_kib);
    let busy = latencies(&client, ORDERS).await;
    let after = [&gateway, &orders].map(resident_kib);
    assert_eq!(open.len(), streams);

    let of = |all: &[Duration], permille: usize| all[all.len() * permille / 1_000];
    println!("{streams} idle streams, opened in {opened:.1?}; of {ORDERS} orders, from an order's time to its event:");
    for (name, all) in [("without them", &quiet), ("with them", &busy)] {
        println!("  {name}: p50 {:.1?}, p99 {:.1?}, slowest {:.1?}", of(all, 500), of(all, 990), all[all.len() - 1]);
    }
    for (n, name) in ["gateway", "orders"].iter().enumerate() {
        let (before, during, after) = (before[n] / 1024, during[n] / 1024, after[n] / 1024);
        println!("  {name}: {before} MiB before, {during} MiB with them, {after} MiB at the end");
        assert!(
            after <= before + (streams as u64 * KIB_PER_STREAM_MAX + GROWN_KIB_MAX) / 1024,
            "{name}: {before} MiB, then {after} MiB"
        );
    }
    assert!(of(&busy, 900) < EVENT_P90_MAX, "{busy:?}");
}

/// Red where only a write that fails tells of it: that of the second heartbeat, after 40 s, and after it the service's own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_ends_at_the_gateway_and_at_the_service_as_soon_as_its_client_leaves() {
    const STREAMS: usize = 10;
    let Stand { orders, gateway, client } = Stand::start().await;
    let service = Client::new(orders.address("orders").await);
    let until = async |streams: usize| {
        let (since, expected) = (Instant::now(), format!("shopd_live_streams {streams}"));
        while !service.get("/metrics").await.text.lines().any(|line| line == expected) {
            assert!(since.elapsed() < LEFT_MAX, "not {expected} within {LEFT_MAX:?}");
            poll().await;
        }
    };
    let files =
        || [&gateway, &orders].map(|process| std::fs::read_dir(format!("/proc/{}/fd", process.pid())).expect("files").count());
    let rest = async |before: [usize; 2]| {
        let since = Instant::now();
        // Connections of requests are kept for a while.
        while files().iter().zip(before).any(|(now, before)| *now > before + STREAMS / 2) {
            assert!(since.elapsed() < LEFT_MAX, "{before:?} files, and now {:?}", files());
            poll().await;
        }
    };
    let probe = open(&client.base, "probe").await;
    until(1).await;
    let before = files();
    for closes in [false, true] {
        let mut open = Vec::new();
        for n in 0..STREAMS {
            open.push(open_at(&service.base, &format!("/api/Orders/events?userId=idle-{n}"), "HTTP/1.1").await);
            open.push(open_at(&client.base, &format!("/api/OrdersProxy/events?userId=idle-{n}"), "HTTP/1.1").await);
        }
        until(1 + 2 * STREAMS).await;
        if closes {
            drop(open);
        } else {
            // As much of a good-bye: nobody asks on a connection that it has closed to one side for what has no end.
            for stream in &mut open {
                stream.shutdown().await.unwrap();
            }
        }
        until(1).await;
        rest(before).await;
    }

    // Whoever asks for the head alone has no stream.
    for _ in 0..5 * STREAMS {
        let head = client.send("HEAD", "/api/OrdersProxy/events?userId=idle", &[], None).await.unwrap();
        assert_eq!(head.status, 200);
    }
    until(1).await;
    rest(before).await;

    // Its connection ends a stream to a client that knows no chunks, and nothing else: longer than a connection that closes is read from.
    let mut plain = open_at(&client.base, "/api/OrdersProxy/events?userId=old", "HTTP/1.0").await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    client.post("/api/OrdersProxy", r#"{"userId":"old","amount":1}"#).await.expect(201);
    assert!(read_until(&mut plain, "\n\n").await.contains("\"userId\":\"old\""));
    drop(probe);
}
