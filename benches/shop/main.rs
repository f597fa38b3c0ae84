//! `make bench`: what the release build does on this machine, beside what bare Postgres does with the same work in the same run.
//!
//! Starts everything itself: a Postgres server with the limits' own settings, Kafka, the four roles. Writes docs/BENCHMARKS.md.

mod http;
mod limits;
mod machine;
mod report;
mod rig;

use std::time::{Duration, Instant};

use uuid::Uuid;

use report::{Figures, Latency, Rate, Rates};
use rig::Rig;

const CONNECTIONS: usize = 64;
const BACKLOG: usize = 20_000;
const SPREAD_ACCOUNTS: usize = 1_000;
const LATENCY_SAMPLES: usize = 300;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    // `cargo test` runs bench targets too, to see that they work; that is not the time to measure.
    if std::env::args().any(|arg| arg == "--test") || !std::env::args().any(|arg| arg == "--bench") {
        println!("shop: run it by `make bench`");
        return Ok(());
    }
    let quick = std::env::var_os("QUICK").is_some_and(|quick| quick != "0");
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(bench(quick))
}

async fn bench(quick: bool) -> Result<()> {
    let seconds = Duration::from_secs(if quick { 2 } else { 5 });
    step("what bare Postgres does (about a minute)");
    let before = limits::measure(quick)?;
    step("starting Postgres, Kafka and the four roles");
    let mut rig = Rig::start().await?;
    let ready_after = rig.ready_after;
    rig.accounts(SPREAD_ACCOUNTS).await?;

    step("latency of one order on an idle system");
    let latency = latency(&rig, if quick { 100 } else { LATENCY_SAMPLES }).await?;
    step("orders accepted, 64 connections, with all that follows going on");
    let accepted = intake(&rig, &rig.orders_address.clone(), "/api/Orders", seconds).await?;
    let accepted_gateway = intake(&rig, &rig.gateway_address.clone(), "/api/OrdersProxy", seconds).await?;
    rig.all_final().await?;
    let memory = rig.resident_bytes();
    step("orders accepted, 64 connections, nothing else");
    rig.stop_role("relay").await?;
    let accepted_alone = intake(&rig, &rig.orders_address.clone(), "/api/Orders", seconds).await?;
    rig.start_role("relay")?;
    rig.all_final().await?;

    let (mut decided, mut decided_hot, mut finished, mut finished_hot) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..if quick { 1 } else { 3 } {
        step("payments: a backlog of 20 000 requests on Kafka, over 1 000 accounts and on one");
        decided.push(decisions(&mut rig, SPREAD_ACCOUNTS).await?);
        decided_hot.push(decisions(&mut rig, 1).await?);
        step("the whole flow: a backlog of 20 000 orders, over 1 000 accounts and on one");
        finished.push(backlog(&mut rig, SPREAD_ACCOUNTS).await?);
        finished_hot.push(backlog(&mut rig, 1).await?);
    }
    rig.stop().await?;
    step("what bare Postgres does, once more");
    let after = limits::measure(quick)?;

    step("`shopd all` from stopped to ready, warm");
    let all = rig::all_warm().await?;
    let rates = Rates { accepted, accepted_gateway, accepted_alone, decided, decided_hot, finished, finished_hot };
    let figures = Figures { before, after, latency, rates, memory, ready_after, all };
    report::write(&figures, quick)?;
    Ok(())
}

/// POST to `Finished`, one client, nothing else going on.
async fn latency(rig: &Rig, samples: usize) -> Result<Latency> {
    let mut connection = http::Connection::open(&rig.gateway_address).await?;
    let mut millis = Vec::with_capacity(samples);
    for n in 0..samples + 20 {
        let id = Uuid::now_v7();
        let body = format!(r#"{{"orderId":"{id}","userId":"u{}","amount":0.01,"description":"latency"}}"#, n % SPREAD_ACCOUNTS);
        let path = format!("/api/OrdersProxy/{id}");
        let since = Instant::now();
        let status = connection.post("/api/OrdersProxy", &body).await?;
        if status != 201 {
            return Err(format!("an order was answered {status}").into());
        }
        while !connection.get(&path).await?.contains(r#""Finished""#) {
            if since.elapsed() > Duration::from_secs(10) {
                return Err("an order did not finish within 10 s".into());
            }
        }
        // The first ones prepare statements and open connections.
        if n >= 20 {
            millis.push(since.elapsed().as_secs_f64() * 1e3);
        }
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    Ok(Latency::of(millis))
}

/// Orders accepted a second, and the CPU that one took in the roles and the databases.
async fn intake(rig: &Rig, address: &str, path: &'static str, time: Duration) -> Result<Rate> {
    let cpu = rig.cpu();
    let since = Instant::now();
    let until = since + time;
    let clients: Vec<_> = (0..CONNECTIONS)
        .map(|n| {
            let address = address.to_owned();
            tokio::spawn(async move {
                let mut connection = http::Connection::open(&address).await.map_err(|error| error.to_string())?;
                let mut accepted = 0usize;
                while Instant::now() < until {
                    let user = (n * 7919 + accepted * 31) % SPREAD_ACCOUNTS;
                    let body = format!(r#"{{"userId":"u{user}","amount":0.01,"description":"intake"}}"#);
                    let status = connection.post(path, &body).await.map_err(|error| error.to_string())?;
                    if status != 201 {
                        return Err(format!("an order was answered {status}"));
                    }
                    accepted += 1;
                }
                Ok(accepted)
            })
        })
        .collect();
    let mut accepted = 0;
    for client in clients {
        accepted += client.await??;
    }
    Ok(Rate::of(accepted, since.elapsed(), &cpu, &rig.cpu()))
}

/// Lets 20 000 requests come to lie on Kafka while payments is stopped, then starts it: decisions committed a second, their
/// results in the outbox with them, from the role's start.
async fn decisions(rig: &mut Rig, accounts: usize) -> Result<Rate> {
    rig.stop_role("payments").await?;
    rig.place(BACKLOG, accounts, CONNECTIONS).await?;
    let orders = rig.count().await?;
    rig.published(orders).await?;
    // The results wait in payments' outbox meanwhile.
    rig.stop_role("relay").await?;
    let cpu = rig.cpu();
    let since = Instant::now();
    rig.start_role("payments")?;
    rig.decided(orders).await?;
    let rate = Rate::of(BACKLOG, since.elapsed(), &cpu, &rig.cpu());
    rig.start_role("relay")?;
    rig.all_final().await?;
    Ok(rate)
}

/// Accepts 20 000 orders while the relay is stopped, then starts it: orders finished a second until all are.
async fn backlog(rig: &mut Rig, accounts: usize) -> Result<Rate> {
    rig.stop_role("relay").await?;
    rig.place(BACKLOG, accounts, CONNECTIONS).await?;
    let orders = rig.count().await?;
    let cpu = rig.cpu();
    let since = Instant::now();
    rig.start_role("relay")?;
    rig.finished(orders).await?;
    let rate = Rate::of(BACKLOG, since.elapsed(), &cpu, &rig.cpu());
    rig.all_final().await?;
    Ok(rate)
}

fn step(what: &str) {
    eprintln!("bench: {what}");
}
