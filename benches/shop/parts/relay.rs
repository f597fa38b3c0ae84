//! The relay: outbox rows to acknowledged records, a backlog of them, and one by one.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use shopd::contracts::{ORDER_PAYMENT_REQUESTS, PaymentRequested};
use shopd::messaging::log::{KafkaLog, Log};
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::super::figures::{Latency, Rate, Rates, Spread, Target};
use super::super::load;
use super::super::report::Section;
use super::super::rig::{Progress, Shop};
use super::super::{Bench, Result, step};
use super::SPREAD;
use super::intake::AT_ORDERS;

/// Whose CPU a row is said to cost.
pub const COUNTED: [&str; 2] = ["relay", "postgres"];
const SINGLY_PER_SECOND: u64 = 200;
const FETCH_BYTES_MAX: i32 = 256 * 1024;
const TRIPS: usize = 200;
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Serialize, Deserialize)]
pub struct Figures {
    rows: usize,
    /// From the first acknowledged record to the last.
    steady: Rates,
    /// From the process's start.
    whole: Spread,
    /// From a POST's answer to the record at a waiting reader; below 0 where the record was there first.
    from_answer: Latency,
    /// From when the POST was due; runs of before counted from its sending.
    #[serde(default)]
    from_due: Option<Latency>,
    #[serde(default)]
    from_sending: Option<Latency>,
    /// A small GET and its answer, p50, milliseconds.
    trip: f64,
}

pub async fn measure(bench: &Bench) -> Result<Figures> {
    let (rows, rounds) = (bench.options.orders(20_000, 200_000), bench.options.rounds(1, 3));
    let (mut steady, mut whole) = (Rates::default(), Spread::default());
    for round in 0..rounds {
        step(&format!("relay: round {} of {rounds}, {rows} rows", round + 1));
        let mut shop = Shop::open(&bench.servers, &["orders"]).await?;
        let (rate, from_start) = backlog_relayed(bench, &mut shop, load::orders(AT_ORDERS.path, "", SPREAD), rows).await?;
        steady.0.push(rate);
        whole.each.push(from_start);
        shop.close().await?;
    }
    step("relay: orders one by one, 200 a second");
    let (from_answer, from_due, trip) = singly(bench, bench.options.time(5, 20)).await?;
    Ok(Figures { rows, steady, whole, from_answer, from_due: Some(from_due), from_sending: None, trip })
}

/// In a shop whose relay does not run: lets so many orders come to lie in the outbox, then starts it. Rows a second from the first acknowledged
/// record to the last, and from the process's start.
pub async fn backlog_relayed(bench: &Bench, shop: &mut Shop<'_>, requests: load::Requests, rows: usize) -> Result<(Rate, f64)> {
    shop.send(requests, rows).await?;
    bench.servers.checkpoint().await?;
    let from = shop.requests_published().read().await?;
    let (cpu, begun) = (shop.cpu(), Progress::begin());
    shop.start("relay").await?;
    let progress = begun.until(&shop.requests_published(), from, rows as i64).await?;
    Ok((Rate::new(progress.steady(), rows as f64, &cpu, &shop.cpu()), progress.whole()))
}

/// When the request of an order arrived at a waiting reader.
type Arrivals = Arc<Mutex<HashMap<Uuid, Instant>>>;

async fn singly(bench: &Bench, time: Duration) -> Result<(Latency, Latency, f64)> {
    let shop = Shop::open(&bench.servers, &["orders", "relay"]).await?;
    let arrivals = Arrivals::default();
    let mut readers = Vec::new();
    let log = Arc::new(shop.log_of_its_own());
    for partition in 0..log.partitions(ORDER_PAYMENT_REQUESTS).await? {
        readers.push(read(log.clone(), partition, arrivals.clone()));
    }
    let mut client = shop.client("orders").await?;
    let mut trips = Vec::new();
    for _ in 0..TRIPS {
        let since = Instant::now();
        client.get("/health/live").await?.expect(200)?;
        trips.push(since.elapsed().as_secs_f64() * 1e3);
    }
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / SINGLY_PER_SECOND as u32);
    // What could not be sent in time is sent at once, and counted from when it was due.
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
    let mut sent = Vec::new();
    for n in 0..time.as_secs() as usize * SINGLY_PER_SECOND as usize {
        let due = ticks.tick().await.into_std();
        let id = Uuid::now_v7();
        let body = format!(r#"{{"orderId":"{id}","userId":"u{}","amount":0.01,"description":"a small book"}}"#, n % SPREAD);
        client.post("/api/Orders", "", &body).await?.expect(201)?;
        sent.push((id, due, Instant::now()));
    }
    let since = Instant::now();
    while arrivals.lock().unwrap_or_else(PoisonError::into_inner).len() < sent.len() {
        if since.elapsed() > PATIENCE {
            return Err(format!("not every request is on Kafka {PATIENCE:?} after the last order").into());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    readers.iter().for_each(JoinHandle::abort);
    let millis = |from: fn(&(Uuid, Instant, Instant)) -> Instant| {
        let arrivals = arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        let between = |to: Instant, from: Instant| match to.checked_duration_since(from) {
            Some(after) => after.as_secs_f64() * 1e3,
            None => -(from - to).as_secs_f64() * 1e3,
        };
        Latency::of_millis(sent.iter().filter_map(|one| Some(between(*arrivals.get(&one.0)?, from(one)))).collect())
    };
    let figures = (millis(|one| one.2), millis(|one| one.1), Latency::of_millis(trips).p50);
    shop.close().await?;
    Ok(figures)
}

/// Notes each request's arrival, for ever.
fn read(log: Arc<KafkaLog>, partition: i32, arrivals: Arrivals) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut from = 0;
        loop {
            match log.fetch(ORDER_PAYMENT_REQUESTS, partition, from, FETCH_BYTES_MAX).await {
                Ok(fetched) => {
                    let now = Instant::now();
                    from = fetched.next_offset;
                    let values = fetched.records.iter().filter_map(|record| record.value.as_deref());
                    let orders = values.filter_map(|value| PaymentRequested::decode(value).ok()).map(|request| request.order_id);
                    let mut arrivals = arrivals.lock().unwrap_or_else(PoisonError::into_inner);
                    orders.for_each(|order| {
                        arrivals.entry(order).or_insert(now);
                    });
                }
                Err(error) => eprintln!("bench: a reader of requests: {error}"),
            }
        }
    })
}

impl Figures {
    pub fn section(&self) -> Result<Section> {
        let mut section = Section { title: "The relay", ..Section::default() };
        let text = &mut section.text;
        writeln!(
            text,
            "{} orders are accepted while the relay is stopped; then it is started, with nothing else going on. `steady` is from the first acknowledged records to the \
last, `whole` from the process's start. The CPU of a row is that of the relay, its start with it, and of Postgres; Kafka's is beside it.\n\n\
Then one client posts {SINGLY_PER_SECOND} orders a second to the orders role, and readers wait at the topic's partitions. The time of the commit is not seen from outside: it lies between the \
time when the POST was due and its answer, and orders that come in a stream are committed some milliseconds apart. So the figure is the time from the answer to the reader's \
hand and, for the answer's own way, a whole small GET ({:.2} ms); it has the reader's fetch in it. An answer that is held back after its commit would make it smaller: the whole \
time since the POST was due, which has all of that in it, is the bound above.\n",
            self.rows, self.trip
        )?;
        let cost = self.steady.cpu_us(&COUNTED);
        writeln!(text, "| rows/s | steady | whole | CPU us a row, relay and Postgres | by process |\n|---|---|---|---|---|")?;
        let rates = self.steady.per_second();
        writeln!(
            text,
            "| {} rows | {} | {} | {} | {} |",
            self.rows,
            rates.show(0),
            self.whole.show(0),
            cost.show(2),
            self.steady.by_process()
        )?;
        writeln!(
            text,
            "\n| at {SINGLY_PER_SECOND} rows/s, ms | p50 | p99 | p99.9 | greatest | samples |\n|---|---|---|---|---|---|"
        )?;
        writeln!(text, "| from the POST's answer to a reader | {} |", self.from_answer.cells())?;
        for (from, latency) in [("when the POST was due", &self.from_due), ("the POST's sending", &self.from_sending)] {
            if let Some(latency) = latency {
                writeln!(text, "| from {from} to a reader | {} |", latency.cells())?;
            }
        }
        let p50 = self.from_answer.p50 + self.trip;
        let targets = [
            Target::median_at_most("relay, CPU a row in relay and Postgres", 8.0, &cost, 2, " us"),
            Target::median_at_least("relay", 60_000.0, &rates, 0, " rows/s"),
            Target::at_most("relay, commit to a reader p50 at 200 rows/s", 2.0, p50, format!("{p50:.2}"), " ms"),
        ];
        section.targets.extend(targets);
        Ok(section)
    }
}
