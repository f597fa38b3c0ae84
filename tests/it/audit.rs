//! `shopd audit`: no false alarm beside a running shop, whatever cannot be checked is said, and many orders take no long time.

use std::collections::BTreeSet;
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::support::history::History;
use crate::support::postgres;
use crate::support::shop::{All, Process, poll};

mod by_hand;

/// How long one audit of a small shop may take.
const AUDIT_WAIT: Duration = Duration::from_secs(60);

pub async fn audit(arguments: &[&str], env: &[(String, String)]) -> Output {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_shopd"));
    command.arg("audit").args(arguments).envs(env.iter().map(|(name, value)| (name, value))).kill_on_drop(true);
    tokio::time::timeout(AUDIT_WAIT, command.output()).await.expect("an answer in time").expect("the program")
}

fn lines(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

/// (check, order or user), and the summary.
pub fn said(output: &Output) -> (BTreeSet<(String, String)>, Value) {
    let mut lines = lines(output);
    let summary = lines.pop().unwrap_or_else(|| panic!("{output:?}"))["summary"].take();
    let offender = |line: &Value| {
        let id = line.get("orderId").or(line.get("userId")).and_then(Value::as_str).expect("an id").to_owned();
        (line["check"].as_str().expect("a check").to_owned(), id)
    };
    (lines.iter().map(offender).collect(), summary)
}

/// A summary for people: what was counted, and the checks that found something.
pub fn brief(summary: &Value) -> String {
    let found: Vec<String> = summary["checks"]
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(_, n)| **n != 0)
        .map(|(check, n)| format!("{check} {n}"))
        .collect();
    let found = if found.is_empty() { "nothing offends".to_owned() } else { found.join(", ") };
    format!("{} orders, {} payments, {} records: {found}", summary["orders"], summary["payments"], summary["records"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_migrate_leaves_can_be_audited_though_nothing_has_run_yet() {
    let databases = [("SHOPD__ORDERS__DATABASE_URL", "orders"), ("SHOPD__PAYMENTS__DATABASE_URL", "payments")];
    let mut env = Vec::new();
    for (name, database) in databases {
        env.push((name.to_owned(), postgres::database(database).await));
    }
    let dir = postgres::own_dir();
    let kept = ["--data-dir", dir.to_str().expect("a path")];
    for (arguments, env) in [(&[][..], &env[..]), (&kept, &[])] {
        let mut migrate = Process::start(&[&["migrate"], arguments].concat(), env);
        assert!(migrate.ended().await.success(), "{}", migrate.log());
        let output = audit(&[&["--json"], arguments].concat(), env).await;
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let (offences, summary) = said(&output);
        assert_eq!((offences.len(), &summary["orders"], &summary["records"]), (0, &0.into(), &0.into()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shop_under_load_is_audited_again_and_again_without_a_false_alarm() {
    let mut shop = All::start(postgres::own_dir()).await;
    let users = ["ann", "bob", "cid", "dan"];
    for user in users {
        shop.client.account(user, "20").await;
    }
    let (stop, placed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let load: Vec<_> = (0..8)
        .map(|n| {
            let (client, stop, placed) = (shop.client.clone(), stop.clone(), placed.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    // Some users run out of money, and one has no account.
                    let user = users.get(n % 5).copied().unwrap_or("nobody");
                    let body = format!(r#"{{"userId":"{user}","amount":0.25}}"#);
                    client.post("/api/OrdersProxy", &body).await.expect(201);
                    placed.fetch_add(1, Ordering::Relaxed);
                    if n == 0 {
                        client.post("/api/PaymentsProxy/ann/deposit", "0.5").await.expect(200);
                    }
                }
            })
        })
        .collect();
    let data_dir = shop.dir.to_str().expect("a path").to_owned();
    let arguments = ["--json", "--data-dir", &data_dir];
    let (mut in_flight, mut meanwhile) = (0, 0);
    for _ in 0..6 {
        let before = placed.load(Ordering::Relaxed);
        let output = audit(&arguments, &[]).await;
        let (offenders, summary) = said(&output);
        assert_eq!(offenders, BTreeSet::new(), "{summary}");
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(summary["ok"], true);
        in_flight += summary["inFlight"].as_object().expect("counts").values().filter_map(Value::as_u64).sum::<u64>();
        meanwhile += placed.load(Ordering::Relaxed) - before;
    }
    stop.store(true, Ordering::Relaxed);
    for task in load {
        task.await.expect("the load");
    }
    let placed = placed.load(Ordering::Relaxed) as u64;
    // Most of it has ended by the time that a suspect is looked at once more; none of it is an alarm.
    assert!(placed > 100 && meanwhile > 20, "{placed} orders, {meanwhile} while it was audited, {in_flight} seen in flight");

    // What is not running any more is audited too; by then it has all ended, or waits as it was left.
    shop.process.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(shop.process.ended().await.success(), "{}", shop.process.log());
    let output = audit(&arguments, &[]).await;
    let (offenders, summary) = said(&output);
    assert_eq!((offenders, output.status.code()), (BTreeSet::new(), Some(0)), "{summary}");
    assert_eq!(summary["orders"].as_u64(), Some(placed));
    assert!(!shop.dir.join("postgres/postmaster.pid").exists(), "the server that it started is gone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_checked_ends_with_2_and_says_nothing_on_standard_output() {
    let nowhere = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
    let mut env = History::new(1).await.env();
    env[1].1 = format!("postgres://u@{nowhere}/payments");
    let output = audit(&["--json"], &env).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("payments"), "{output:?}");

    let empty = tempfile::tempdir().expect("a directory");
    let missing = empty.path().join("shop");
    let output = audit(&["--data-dir", missing.to_str().expect("a path")], &[]).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty() && !missing.exists());
    // An unmigrated database is none that could be checked.
    let (orders, payments) = (postgres::database("orders").await, postgres::database("payments").await);
    let env = [("SHOPD__ORDERS__DATABASE_URL".to_owned(), orders), ("SHOPD__PAYMENTS__DATABASE_URL".to_owned(), payments)];
    assert_eq!(audit(&[], &env).await.status.code(), Some(2));
}

/// `SHOPD_TEST_AUDIT_ORDERS=1000000` and `--nocapture` for the figure; that takes a minute and a gigabyte.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_orders_are_audited_within_five_seconds_and_a_minute_for_each_million() {
    let orders = std::env::var("SHOPD_TEST_AUDIT_ORDERS").ok().and_then(|orders| orders.parse().ok()).unwrap_or(30_000);
    let shop = History::new(orders).await;
    shop.fill_log(orders).await;
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_shopd"));
    command.args(["audit", "--json"]).envs(shop.env()).env("SHOPD_LOG", "shopd=debug").kill_on_drop(true);
    let child = command.stdout(std::process::Stdio::piped()).spawn().expect("the program");
    let status = format!("/proc/{}/status", child.id().expect("a process"));
    let (peak, watched) = (Arc::new(std::sync::Mutex::new(String::new())), Arc::new(AtomicBool::new(true)));
    let watch = tokio::spawn({
        let (peak, watched) = (peak.clone(), watched.clone());
        async move {
            while watched.load(Ordering::Relaxed) {
                if let Ok(text) = std::fs::read_to_string(&status)
                    && let Some(line) = text.lines().find(|line| line.starts_with("VmHWM"))
                {
                    *peak.lock().unwrap() = line.to_owned();
                }
                poll().await;
            }
        }
    });
    let output = child.wait_with_output().await.expect("an end");
    watched.store(false, Ordering::Relaxed);
    watch.await.expect("the watch");
    let (offenders, summary) = said(&output);
    assert_eq!((offenders, output.status.code()), (BTreeSet::new(), Some(0)), "{summary}");
    assert_eq!(summary["records"].as_u64(), Some(2 * orders as u64));
    let ms = summary["ms"].as_u64().expect("milliseconds");
    println!("{orders} orders in {ms} ms, {} orders a minute, {}", orders as u64 * 60_000 / ms, peak.lock().unwrap());
    // Starting and connecting aside, which a small number of orders does not pay for.
    assert!(ms < 5_000 + orders as u64 * 60 / 1_000, "{ms} ms");
}

/// What a broker that is away for long leaves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_requests_that_wait_are_no_offence() {
    let shop = History::new(1).await;
    shop.in_orders(
        "do $$ begin for i in 1..100 loop
             insert into orders (id, user_id, amount, created_at, updated_at, traceparent)
             select o(i * 1000 + k), 'w' || k, 5, t(1), t(1), '' from generate_series(1, 100) k;
             insert into order_event (order_id, status, at, traceparent)
             select o(i * 1000 + k), 'New', t(1), '' from generate_series(1, 100) k;
             insert into outbox (event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at)
             select gen_random_uuid(), 'order-payment-requests', 'w' || k,
                    convert_to('{\"OrderId\":\"' || o(i * 1000 + k) || '\",\"UserId\":\"w' || k || '\",\"Amount\":0.05}', 'UTF8'),
                    '', '', '', '', t(1) from generate_series(1, 100) k;
             commit;
         end loop; end $$",
    )
    .await;
    let (offenders, summary) = said(&audit(&["--json"], &shop.env()).await);
    assert_eq!((offenders, summary["inFlight"]["requestUnsent"].as_u64()), (BTreeSet::new(), Some(10_000)), "{summary}");
}
