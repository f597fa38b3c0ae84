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
use crate::support::shop::{Client, Process};

const ORDERS: usize = 200;
const OPENED_AT_ONCE: usize = 32;
/// 300 MB for 10 000 streams, in either process.
const KIB_PER_STREAM_MAX: u64 = 30;
/// What a process may have grown by for reasons of its own.
const GROWN_KIB_MAX: u64 = 24 * 1024;
/// For nine of ten: a stall of the machine makes a few late.
const EVENT_P90_MAX: Duration = Duration::from_secs(1);

fn streams() -> usize {
    std::env::var("SHOPD_TEST_STREAMS").ok().and_then(|streams| streams.parse().ok()).unwrap_or(1_000)
}

fn resident_kib(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).expect("a process");
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
    kib.expect("its memory")
}

async fn open(base: &str, user: &str) -> TcpStream {
    let host = base.trim_start_matches("http://");
    let mut stream = TcpStream::connect(host).await.expect("a connection");
    let head = format!("GET /api/OrdersProxy/events?userId={user} HTTP/1.1\r\nHost: {host}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.expect("sent");
    let begun = read_until(&mut stream, "retry: 1000\n\n").await;
    assert!(begun.starts_with("HTTP/1.1 200 "), "{user}: {begun}");
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
