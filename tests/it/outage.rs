//! What is away comes back, and nobody has to help.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use shopd::db::Db;
use shopd::embedded;

use crate::scenario::place;
use crate::support::books::{assert_balanced, connect, count};
use crate::support::kafka::Broker;
use crate::support::shop::{Client, Four, PATIENCE, Process, poll};
use crate::support::{kafka, postgres};

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
        if killed {
            broker.kill().await
        } else {
            broker.pause().await
        }
        let since = Instant::now();
        let mut placed = Vec::new();
        while since.elapsed() < outage() {
            let accepted = Instant::now();
            placed.push(place(&shop.client, "ann", "0.5").await);
            shop.client.post("/api/PaymentsProxy/ann/deposit", "0.5").await.expect(200);
            assert!(accepted.elapsed() < Duration::from_secs(10), "accepted as ever");
            tokio::time::sleep(Duration::from_millis(200)).await; // a client's pace, no poll
        }
        shop.client.ready().await;
        for (name, role) in [("orders", &shop.orders), ("payments", &shop.payments)] {
            let (client, mut took) = (Client::new(role.address(name).await), Vec::new());
            for _ in 0..3 {
                let asked = Instant::now();
                let health = client.get("/health/ready").await.expect(200).json();
                assert_eq!((&health["status"], &health["missing"]), (&json!("ready"), &json!(["broker"])), "{name}");
                took.push(asked.elapsed());
            }
            // A probe that waits for a second must not take it for dead, and gives up after the third.
            assert!(took.iter().any(|took| *took < Duration::from_millis(900)), "{took:?}");
        }
        if killed {
            broker.start().await
        } else {
            broker.resume().await
        }
        let back = Instant::now();
        for id in &placed {
            assert_eq!(shop.client.ended(id).await["status"], "Finished");
        }
        assert!(back.elapsed() < FINAL_WITHIN, "final after {:?}", back.elapsed());
        eprintln!(
            "killed: {killed}; {} orders placed in {:?} without Kafka, all final {:?} after its return",
            placed.len(),
            outage(),
            back.elapsed()
        );
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
    let relay = Process::start(&["relay"], &env);
    let client = Client::new(relay.address("relay").await);
    client.get("/health/live").await.expect(200);
    let since = Instant::now();
    loop {
        let missing = client.get("/health/ready").await.expect(503).text;
        if ["orders schema", "payments schema", "broker"].iter().all(|what| missing.contains(what)) {
            break;
        }
        // On a busy machine it may not have looked at all of them yet.
        assert!(since.elapsed() < PATIENCE, "not all are named: {missing}");
        poll().await;
    }
    let migrating = tokio::spawn({
        let env = env.clone();
        async move {
            let mut migrate = Process::start(&["migrate"], &env);
            assert!(migrate.ended().await.success(), "{}", migrate.log());
        }
    });
    broker.start().await;
    migrating.await.unwrap();
    client.ready().await;
    assert!(relay.log().contains("\"waiting\"") || relay.log().contains("waiting"), "{}", relay.log());
}

/// Transactions of both databases so far, those of the one who asks among them.
async fn transactions(databases: &[Db; 2]) -> i64 {
    let mut sum = 0;
    for db in databases {
        sum += count(db, "select xact_commit + xact_rollback as n from pg_stat_database where datname = current_database()").await;
    }
    sum
}

/// L4; what idle leases, looks and long polls cost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_shop_asks_its_databases_a_few_times_a_second_and_takes_hardly_any_cpu() {
    let (orders, payments) = (postgres::database("orders").await, postgres::database("payments").await);
    let prefix = format!("idle{}", kafka::prefix());
    let shop = Four::start(&kafka::shared().await, &orders, &payments, &prefix).await;
    shop.client.account("ann", "1").await;
    let first = place(&shop.client, "ann", "0.5").await;
    shop.client.ended(&first).await;
    let roles = [("gateway", &shop.gateway), ("orders", &shop.orders), ("payments", &shop.payments), ("relay", &shop.relay)];
    let databases = [connect(&orders), connect(&payments)];
    // A session that has nothing more to do tells the server after ten seconds what it did.
    tokio::time::sleep(Duration::from_secs(12)).await; // until what came before is counted
    let (since, asked, used) = (Instant::now(), transactions(&databases).await, roles.map(|(_, process)| cpu(process)));
    tokio::time::sleep(outage().max(Duration::from_secs(10))).await; // the idle time itself
    let seconds = since.elapsed().as_secs_f64();
    for ((role, process), before) in roles.iter().zip(used) {
        let percent = 100.0 * (cpu(process) - before).as_secs_f64() / seconds;
        eprintln!("| {role} | idle | {percent:.2} % of a core |");
        assert!(percent < 2.0, "{role} is busy with nothing: {percent:.2} %");
    }
    let rate = (transactions(&databases).await - asked) as f64 / seconds;
    eprintln!("| both databases | idle | {rate:.1} transactions a second |");
    assert!(rate < 30.0, "{rate:.1} transactions a second");
}

/// CPU time that a process has used so far.
fn cpu(process: &Process) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid())).expect("a process");
    let fields: Vec<&str> = stat.rsplit_once(") ").expect("its name in parentheses").1.split(' ').collect();
    let ticks: u64 = [11, 12].iter().map(|field| fields[*field].parse::<u64>().expect("a number")).sum();
    // Linux tells it in hundredths of a second, whatever the kernel's own rate is.
    Duration::from_millis(ticks * 10)
}

/// `SHOPD_TEST_OUTAGE_S=60 cargo test --test it both_away -- --nocapture` for the figures of a minute.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_postgres_and_kafka_both_away_everyone_waits_quietly_and_then_every_order_ends() {
    let away = outage().max(Duration::from_secs(10));
    let broker = Broker::new().await;
    let mut server = embedded::start(&postgres::options(&postgres::own_dir())).await.expect("a database server");
    let mut urls = Vec::new();
    for name in ["orders", "payments"] {
        server.ensure_database(name).await.expect("a database");
        urls.push(server.url(name).expose().to_owned());
    }
    let shop = Four::start(&broker.bootstrap, &urls[0], &urls[1], "").await;
    shop.client.account("ann", "1000").await;
    let roles = [("gateway", &shop.gateway), ("orders", &shop.orders), ("payments", &shop.payments), ("relay", &shop.relay)];
    let mut ready = Vec::new();
    for (role, process) in roles {
        ready.push(Client::new(process.address(role).await));
    }
    // Accepted without the broker: they wait in the outbox, which then goes away as well.
    broker.kill().await;
    let mut placed = Vec::new();
    for _ in 0..50 {
        placed.push(place(&shop.client, "ann", "0.5").await);
    }
    kill(Pid::from_raw(server.pid()), Signal::SIGINT).expect("the server");
    server.exited().await;
    // What it costs to wait, once everyone knows.
    tokio::time::sleep(Duration::from_secs(2)).await; // until the last session's end is noticed
    let (since, before) = (Instant::now(), roles.map(|(_, process)| (cpu(process), process.log().lines().count())));
    tokio::time::sleep(away).await; // the outage itself
    for ((role, process), (cpu_before, lines_before)) in roles.iter().zip(before) {
        let percent = 100.0 * (cpu(process) - cpu_before).as_secs_f64() / since.elapsed().as_secs_f64();
        let lines = process.log().lines().count() - lines_before;
        eprintln!("| {role} | {percent:.2} % of a core | {lines} lines |");
        assert!(percent < 2.0, "{role} is busy with waiting: {percent:.2} %");
        // Repeats of a known cause are told each 30 s.
        let lines_max = 10 + 5 * away.as_secs() as usize / 30;
        assert!(lines <= lines_max, "{role} says too much:\n{}", process.log());
    }
    assert!(shop.client.send("GET", "/health/ready", &[], None).await.is_ok(), "the gateway answers");
    let back = Instant::now();
    let (_, restarted) = tokio::join!(broker.start(), server.ensure_running());
    assert!(restarted.expect("the server"), "it was away");
    let returned = Instant::now();
    for client in &ready {
        client.ready().await;
    }
    let all_ready = returned.elapsed();
    let mut ends = Vec::new();
    for id in &placed {
        assert_eq!(shop.client.ended(id).await["status"], "Finished");
        ends.push(returned.elapsed());
    }
    eprintln!(
        "away {:?}; both back after {:?}; then all ready in {all_ready:?}, first order final in {:?}, last of {} in {:?}",
        away,
        returned - back,
        ends[0],
        ends.len(),
        ends[ends.len() - 1]
    );
    assert!(ends[ends.len() - 1] < FINAL_WITHIN, "{ends:?}");
    assert_balanced(&connect(&urls[0]), &connect(&urls[1])).await;
    drop((roles, ready));
    drop(shop);
    server.stop(Duration::from_secs(10)).await.expect("a clean stop");
}
