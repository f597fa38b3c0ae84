//! `make bench`: what the release build does on this machine, beside what bare Postgres does with the same work in the same run.
//!
//! Starts everything itself: a Postgres server with the limits' own settings, Kafka, the roles as processes; loopback only. Each part
//! measures one thing and can run alone: `make bench PARTS=payments,relay`. What was measured is kept in
//! docs/benchmarks/benchmarks.json, part by part, and docs/BENCHMARKS.md and its plots are made from that. A short run (`QUICK=1`) and
//! one with other numbers (`BACKLOG`, `ORDERS`, `SECONDS`, `ROUNDS`, `RATE`, `SIZES`) write the same below the target folder instead,
//! unless `PUBLISH=1` says otherwise. With `RATE` the part `steady` tries that rate alone; with `TUNE_HOST=1` it is measured a second time
//! with the host's settings that docs/OPERATIONS.md recommends, which takes root and is undone afterwards.
//!
//! [`rig`] is what is measured, [`load`] what it is asked, [`figures`] what that comes to, [`report`] and [`plot`] how it is shown.

mod figures;
mod load;
mod machine;
mod options;
mod parts;
mod plot;
mod report;
mod rig;

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use options::Options;
use report::Book;
use rig::{Limits, Servers, Shop};

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;

/// What every part has.
pub struct Bench {
    options: Options,
    servers: Servers,
    limits: Limits,
}

fn main() -> Result<()> {
    // `cargo test` runs bench targets too, to see that they work; that is not the time to measure.
    if std::env::args().any(|arg| arg == "--test") || !std::env::args().any(|arg| arg == "--bench") {
        println!("shop: run it by `make bench`");
        return Ok(());
    }
    let options = Options::read()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let done = runtime.block_on(async {
        tokio::select! {
            done = bench(options) => done,
            // What was started ends with what holds it.
            stopped = stopped() => Err(stopped.map_or_else(Into::into, |()| "stopped by a signal".into())),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    done
}

async fn stopped() -> std::io::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        _ = terminate.recv() => Ok(()),
    }
}

/// Files of Postgres' write-ahead log, 16 MB each, that are there to be used again: all that `max_wal_size` allows.
const RECYCLED: u32 = 256;
const RECYCLED_QUICK: u32 = 96;

async fn bench(options: Options) -> Result<()> {
    let output = options.output();
    let mut book = Book::read(&output)?;
    if options.parts.is_empty() {
        return book.write(&output);
    }
    let limits = Limits::prepare(if options.quick { 2 } else { 3 }).await?;
    step("starting Postgres and Kafka");
    let recycled = if options.quick { RECYCLED_QUICK } else { RECYCLED };
    let bench = Bench { options, servers: Servers::start(recycled).await?, limits };
    let versions = bench.servers.versions().await?;
    warm(&bench).await?;
    let since = Instant::now();
    for part in options::PARTS.into_iter().filter(|part| bench.options.has(part)) {
        let began = Instant::now();
        let figures = measure(&bench, part).await.map_err(|error| format!("{part}: {error}"))?;
        let took = began.elapsed();
        step(&format!("{part} took {:.0} s", took.as_secs_f64()));
        // Written after each part: what a later one breaks does not take it away.
        book.put(part, &bench.options, &versions, took, figures);
        book.save(&output)?;
    }
    let Bench { servers, .. } = bench;
    servers.stop().await?;
    book.write(&output)?;
    step(&format!("{:.0} s in all", since.elapsed().as_secs_f64()));
    Ok(())
}

/// A broker that has just started compiles its code while it runs.
async fn warm(bench: &Bench) -> Result<()> {
    let shop = Shop::open(&bench.servers, &rig::ROLES).await?;
    shop.accounts(parts::SPREAD).await?;
    shop.place(bench.options.orders(5_000, 50_000).min(50_000), parts::SPREAD).await?;
    shop.all_final().await?;
    shop.close().await
}

async fn measure(bench: &Bench, part: &str) -> Result<Value> {
    fn value(figures: impl Serialize) -> Result<Value> {
        Ok(serde_json::to_value(figures)?)
    }
    match part {
        "payments" => value(parts::payments::measure(bench).await?),
        "flow" => value(parts::flow::measure(bench).await?),
        "intake" => value(parts::intake::measure(bench).await?),
        "steady" => value(parts::steady::measure(bench).await?),
        "latency" => value(parts::latency::measure(bench).await?),
        "relay" => value(parts::relay::measure(bench).await?),
        "gateway" => value(parts::gateway::measure()?),
        "rest" => value(parts::rest::measure(bench).await?),
        "size" => value(parts::size::measure(bench).await?),
        "bloat" => value(parts::bloat::measure(bench).await?),
        other => Err(format!("there is no part {other}").into()),
    }
}

/// Says what goes on.
fn step(what: &str) {
    eprintln!("bench: {what}");
}

/// Lets background work of what came before end.
async fn settle(time: Duration) {
    tokio::time::sleep(time).await;
}
