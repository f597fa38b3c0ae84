//! Size: the figures on full tables beside those on empty ones, by turns.

use std::fmt::Write;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::figures::{Latency, Rate, Rates, Spread, Target, number};
use super::super::load;
use super::super::plot::{Plot, Scale};
use super::super::report::Section;
use super::super::rig::{Progress, ROLES, Shop};
use super::super::{Bench, Result, step};
use super::SPREAD;
use super::depth::{self, Pages};
use super::fill::{Filling, USER_SHARE};
use super::intake::{self, AT_ORDERS};
use super::{flow, latency, payments, relay, steady};

const CONNECTIONS: usize = 64;
/// Within this of the figure on empty tables.
const WITHIN: f64 = 0.2;
const WARM: usize = 20;
/// Latencies follow the host's minute. So they are measured by turns so often in each round.
const TURNS: usize = 3;
const STEADY_PER_SECOND: f64 = 1_000.0;
/// From one user of the load over all accounts to the next, over the number of accounts: far from each other, each once (it is a prime).
const STRIDE: u64 = 618_031;

#[derive(Debug, Serialize, Deserialize)]
pub struct Figures {
    backlog: usize,
    orders: usize,
    sizes: Vec<Sized>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Sized {
    orders: u64,
    accounts: u64,
    fill_seconds: f64,
    database_bytes: u64,
    full: Measured,
    /// In the same rounds.
    empty: Measured,
    /// Decided in the full shop where the load is on all of its accounts.
    #[serde(default)]
    everywhere: Rates,
    pages: Vec<Pages>,
    /// What the audit said of it all in the end.
    audited: Value,
}

/// By round, and latencies by turn.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Measured {
    #[serde(default)]
    relayed: Rates,
    decided: Rates,
    finished: Rates,
    accepted: Rates,
    /// Of one client on an idle system, p50, milliseconds.
    latency: Spread,
    /// At [`STEADY_PER_SECOND`].
    #[serde(default)]
    steady: Rates,
    /// There, milliseconds.
    #[serde(default)]
    post: Tail,
    #[serde(default)]
    post_to_finished: Tail,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Tail {
    p50: Spread,
    p99: Spread,
}

pub async fn measure(bench: &Bench) -> Result<Figures> {
    let options = &bench.options;
    let default: &[u64] = if options.quick { &[50_000] } else { &[100_000, 1_000_000, 10_000_000] };
    let sizes = options.sizes.clone().unwrap_or_else(|| default.to_vec());
    let (backlog, orders) = (options.backlog(5_000, 100_000), options.orders(5_000, 100_000));
    let mut figures = Figures { backlog, orders, sizes: Vec::new() };
    for size in sizes {
        figures.sizes.push(sized(bench, size, backlog, orders).await?);
    }
    Ok(figures)
}

async fn sized(bench: &Bench, size: u64, backlog: usize, orders: usize) -> Result<Sized> {
    let (filling, rounds, since) = (Filling::of(size), bench.options.rounds(1, 3), Instant::now());
    let mut full = Shop::open(&bench.servers, &[]).await?;
    filling.fill(&bench.servers, &full).await?;
    let fill_seconds = since.elapsed().as_secs_f64();
    let bytes = "select (pg_database_size($1) + pg_database_size($2))::bigint";
    let client = bench.servers.connect("postgres").await?;
    let row = client.query_one(bytes, &[&full.orders_database(), &full.payments_database()]).await?;
    let database_bytes = row.try_get::<_, i64>(0)?.unsigned_abs();
    full.start_all(&ROLES).await?;

    let mut sized = Sized {
        orders: size,
        accounts: filling.accounts,
        fill_seconds,
        database_bytes,
        full: Measured::default(),
        empty: Measured::default(),
        everywhere: Rates::default(),
        pages: depth::measure(&mut full.client("gateway").await?, size, size / USER_SHARE).await?,
        audited: Value::Null,
    };
    for round in 0..rounds {
        step(&format!("size: {size} orders, round {} of {rounds}, empty and full", round + 1));
        let mut empty = Shop::open(&bench.servers, &ROLES).await?;
        empty.accounts(SPREAD).await?;
        sized.empty.rates(bench, &mut empty, backlog, orders).await?;
        for _ in 0..TURNS {
            sized.empty.latencies(bench, &empty).await?;
            sized.full.latencies(bench, &full).await?;
        }
        // Autovacuum is not at its fresh tables while the full ones are measured.
        empty.close().await?;
        sized.full.rates(bench, &mut full, backlog, orders).await?;
        let accounts = filling.accounts;
        let all = (0..backlog as u64).map(|n| n * STRIDE % accounts);
        let (_, decided) = waited(bench, &mut full, load::orders_of(AT_ORDERS.path, "", all), backlog).await?;
        sized.everywhere.0.push(decided);
    }
    step(&format!("size: the audit of {size} orders and what came after them"));
    sized.audited = full.audit().await?;
    full.close().await?;
    Ok(sized)
}

impl Measured {
    /// In a shop that runs and in which nothing waits; the same afterwards.
    async fn rates(&mut self, bench: &Bench, shop: &mut Shop<'_>, backlog: usize, orders: usize) -> Result<()> {
        let (relayed, decided) = waited(bench, shop, load::orders(AT_ORDERS.path, "", SPREAD), backlog).await?;
        self.relayed.0.push(relayed);
        self.decided.0.push(decided);

        let (_, flow) = flow::backlog_finished(bench, shop, orders, SPREAD).await?;
        self.finished.0.push(flow);

        // By the count of results: looking for what has not ended reads the whole table.
        let finished = shop.finished().await?;
        let from = finished.read().await?;
        shop.stop("relay").await?;
        let time = bench.options.time(1, 5).min(Duration::from_secs(5));
        let accepted = intake::accepted(shop, AT_ORDERS, CONNECTIONS, time).await?;
        self.accepted.0.push(accepted.rate);
        shop.start("relay").await?;
        Progress::begin().until(&finished, from, accepted.orders as i64).await?;
        Ok(())
    }

    /// The same, and no process of it is stopped.
    async fn latencies(&mut self, bench: &Bench, shop: &Shop<'_>) -> Result<()> {
        let mut client = shop.client("gateway").await?;
        latency::finished(&mut client, WARM).await?;
        let millis = latency::finished(&mut client, if bench.options.quick { 50 } else { 200 }).await?;
        self.latency.each.push(Latency::of_millis(millis).p50);
        drop(client);
        let time = bench.options.time(1, 8).min(Duration::from_secs(8));
        let run = steady::at_rate(bench, shop, STEADY_PER_SECOND, time).await?;
        self.steady.0.push(run.cost);
        self.post.push(&run.post);
        self.post_to_finished.push(&run.finished);
        Ok(())
    }
}

impl Tail {
    fn push(&mut self, latency: &Latency) {
        self.p50.each.push(latency.p50);
        self.p99.each.push(latency.p99);
    }
}

/// What waits in the outbox is relayed while payments is stopped, and decided while the relay is; then it becomes final.
async fn waited(bench: &Bench, shop: &mut Shop<'_>, requests: load::Requests, count: usize) -> Result<(Rate, Rate)> {
    shop.stop("payments").await?;
    shop.stop("relay").await?;
    let (relayed, _) = relay::backlog_relayed(bench, shop, requests, count).await?;
    shop.stop("relay").await?;
    let decided = payments::waiting_decided(bench, shop, count).await?;
    let finished = shop.finished().await?;
    let from = finished.read().await?;
    shop.start("relay").await?;
    Progress::begin().until(&finished, from, count as i64).await?;
    Ok((relayed, Rate { per_second: decided.steady, ..decided.rate }))
}

impl Sized {
    /// Runs of before did not measure all of it.
    fn has(&self, of: Of) -> bool {
        !of(&self.full).each.is_empty()
    }

    fn ratio(&self, of: impl Fn(&Measured) -> Spread) -> Spread {
        let (full, empty) = (of(&self.full), of(&self.empty));
        Spread::of(full.each.iter().zip(&empty.each).map(|(full, empty)| full / empty))
    }
}

type Of = fn(&Measured) -> Spread;

/// A rate and what one of it costs.
const RATES: [(&str, Of, Of); 4] = [
    ("relayed", |m| m.relayed.per_second(), |m| m.relayed.cpu_us(&relay::COUNTED)),
    ("decided", |m| m.decided.per_second(), |m| m.decided.cpu_us(&[])),
    ("finished", |m| m.finished.per_second(), |m| m.finished.cpu_us(&[])),
    ("accepted", |m| m.accepted.per_second(), |m| m.accepted.cpu_us(&[])),
];
/// What is the better the less it is: its name, its unit.
const TIMES: [(&str, &str, Of); 6] = [
    ("CPU of an order, steady", "us", |m| m.steady.cpu_us(&[])),
    ("POST to `Finished` p50", "ms", |m| m.latency.clone()),
    ("POST p50, steady", "ms", |m| m.post.p50.clone()),
    ("POST p99, steady", "ms", |m| m.post.p99.clone()),
    ("POST to `Finished` p50, steady", "ms", |m| m.post_to_finished.p50.clone()),
    ("POST to `Finished` p99, steady", "ms", |m| m.post_to_finished.p99.clone()),
];

impl Figures {
    pub fn section(&self) -> Result<Section> {
        let mut section = Section { title: "Size", ..Section::default() };
        let text = &mut section.text;
        writeln!(
            text,
            "Both databases are filled with paid orders, each with its events, its payment and its ledger entry, and a tenth as many accounts; the audit must find nothing in \
them and in what came after. The same is then measured on the full shop and on an empty one on the same servers, by turns: {} rows of the outbox relayed (the CPU is that of the relay and Postgres), \
then decided, {} orders from the outbox to final, orders accepted at the role over {CONNECTIONS} connections with the relay stopped; and, between the two shops' rates, {TURNS} times by turns, POST to `Finished` of one client, and \
`steady`, an open loop of {STEADY_PER_SECOND} orders/s through the gateway. The load is on 1 000 accounts.\n",
            self.backlog, self.orders
        )?;
        writeln!(
            text,
            "| orders in the tables | figure | full | empty | full/empty | CPU us: full | empty | full/empty |\n|---|---|---|---|---|---|---|---|"
        )?;
        for sized in &self.sizes {
            let orders = number(sized.orders as f64, 0);
            for (name, rate, cost) in RATES.into_iter().filter(|(_, rate, _)| sized.has(*rate)) {
                let (full, empty, ratio) = (rate(&sized.full), rate(&sized.empty), sized.ratio(rate));
                let (full_us, empty_us, ratio_us) = (cost(&sized.full), cost(&sized.empty), sized.ratio(cost));
                let cells = [full.show(0), empty.show(0), ratio.show(2), full_us.show(1), empty_us.show(1), ratio_us.show(2)];
                writeln!(text, "| {orders} | {name}/s | {} |", cells.join(" | "))?;
            }
            for (name, unit, of) in TIMES.into_iter().filter(|(.., of)| sized.has(*of)) {
                let cells = [of(&sized.full).show(2), of(&sized.empty).show(2), sized.ratio(of).show(2)];
                writeln!(text, "| {orders} | {name}, {unit} | {} | | | |", cells.join(" | "))?;
            }
        }
        let everywhere: Vec<&Sized> = self.sizes.iter().filter(|sized| !sized.everywhere.0.is_empty()).collect();
        if !everywhere.is_empty() {
            writeln!(
                text,
                "\nWhere the load is on all accounts of the full shop instead, far from each other, a batch has a row of the account for each of its payments, and not one for \
several; that is another load and has no target.\n\n| orders in the tables | accounts of the load | decided/s | over 1 000 accounts | CPU us | over 1 000 accounts |\n|---|---|---|---|---|---|"
            )?;
        }
        for sized in everywhere {
            let (orders, accounts) = (number(sized.orders as f64, 0), number(sized.accounts.min(self.backlog as u64) as f64, 0));
            let over = |all: &Spread, some: &Spread| Spread::of(all.each.iter().zip(&some.each).map(|(all, some)| all / some));
            let (rate, cost) = (sized.everywhere.per_second(), sized.everywhere.cpu_us(&[]));
            let (decided, decided_us) = (sized.full.decided.per_second(), sized.full.decided.cpu_us(&[]));
            let cells = [rate.show(0), over(&rate, &decided).show(2), cost.show(1), over(&cost, &decided_us).show(2)];
            writeln!(text, "| {orders} | {accounts} | {} |", cells.join(" | "))?;
        }
        writeln!(text, "\n| orders in the tables | accounts | filled in | databases | audit |\n|---|---|---|---|---|")?;
        for sized in &self.sizes {
            let gib = sized.database_bytes as f64 / 1024f64.powi(3);
            let (orders, accounts) = (number(sized.orders as f64, 0), number(sized.accounts as f64, 0));
            let audit =
                format!("{} offences in {} s", sized.audited["offences"], sized.audited["ms"].as_f64().unwrap_or_default() / 1e3);
            writeln!(text, "| {orders} | {accounts} | {:.0} s | {gib:.2} GiB | {audit} |", sized.fill_seconds)?;
        }
        writeln!(text, "\n| orders in the tables | pages of 20 | deep | p50 ms | p99 ms |\n|---|---|---|---|---|")?;
        for sized in &self.sizes {
            for pages in &sized.pages {
                for (depth, time) in &pages.depths {
                    let orders = number(sized.orders as f64, 0);
                    writeln!(
                        text,
                        "| {orders} | {} | {} | {:.2} | {:.2} |",
                        pages.name,
                        number(*depth as f64, 0),
                        time.p50,
                        time.p99
                    )?;
                }
            }
        }
        if let Some(largest) = self.sizes.iter().max_by_key(|sized| sized.orders) {
            let at = format!("with {} orders", number(largest.orders as f64, 0));
            for (name, rate, cost) in RATES.into_iter().filter(|(_, rate, _)| largest.has(*rate)) {
                let (ratio, ratio_us) = (largest.ratio(rate), largest.ratio(cost));
                let figure = format!("size, {name}/s {at} over empty");
                section.targets.push(Target::median_at_least(figure, 1.0 - WITHIN, &ratio, 2, ""));
                let figure = format!("size, CPU of one {name} {at} over empty");
                section.targets.push(Target::median_at_most(figure, 1.0 + WITHIN, &ratio_us, 2, ""));
            }
            // What is slowest in eight seconds differs by more than this from turn to turn.
            let steadier = |name: &str| !name.contains("p99");
            for (name, _, of) in TIMES.into_iter().filter(|(name, _, of)| steadier(name) && largest.has(*of)) {
                let (ratio, figure) = (largest.ratio(of), format!("size, {name} {at} over empty"));
                section.targets.push(Target::median_at_most(figure, 1.0 + WITHIN, &ratio, 2, ""));
            }
            for pages in &largest.pages {
                if let (Some(ratio), Some((depth, _))) = (pages.ratio(), pages.depths.last()) {
                    let figure = format!("size, page {} of {} over the first", number(*depth as f64, 0), pages.name);
                    section.targets.push(Target::median_at_most(figure, 1.0 + WITHIN, &ratio, 2, ""));
                }
            }
        }
        let line = |(name, _, cost): (&str, Of, Of)| {
            let empty = Spread::of(self.sizes.iter().flat_map(|sized| cost(&sized.empty).each));
            // A logarithm has no place for 0: empty tables stand at the left edge.
            let points = self.sizes.iter().map(|sized| (sized.orders as f64, cost(&sized.full).median()));
            (name.to_owned(), std::iter::once((10_000.0, empty.median())).chain(points).collect())
        };
        section.plots.push(Plot {
            name: "size".into(),
            title: "CPU of an order against orders in the tables (left: empty)".into(),
            x: ("orders in the tables".into(), Scale::Log),
            y: ("CPU us an order, all processes".into(), Scale::Linear),
            lines: RATES[1..].iter().copied().map(line).collect(),
        });
        Ok(section)
    }
}
