//! Size: the figures on full tables beside those on empty ones, by turns.

use std::fmt::Write;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::figures::{Latency, Rate, Rates, Spread, Target, number};
use super::super::plot::{Plot, Scale};
use super::super::report::Section;
use super::super::rig::{Progress, ROLES, Shop};
use super::super::{Bench, Result, step};
use super::SPREAD;
use super::depth::{self, Pages};
use super::fill::{Filling, USER_SHARE};
use super::intake::{self, AT_ORDERS};
use super::{flow, latency, payments};

const CONNECTIONS: usize = 64;
/// Within this of the figure on empty tables.
const WITHIN: f64 = 0.2;
const WARM: usize = 20;

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
    pages: Vec<Pages>,
    /// What the audit said of it all in the end.
    audited: Value,
}

/// By round.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Measured {
    decided: Rates,
    finished: Rates,
    accepted: Rates,
    /// p50, milliseconds.
    latency: Spread,
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
        pages: depth::measure(&mut full.client("gateway").await?, size, size / USER_SHARE).await?,
        audited: Value::Null,
    };
    for round in 0..rounds {
        step(&format!("size: {size} orders, round {} of {rounds}, empty and full", round + 1));
        let mut empty = Shop::open(&bench.servers, &ROLES).await?;
        empty.accounts(SPREAD).await?;
        sized.empty.measure(bench, &mut empty, backlog, orders).await?;
        empty.close().await?;
        sized.full.measure(bench, &mut full, backlog, orders).await?;
    }
    step(&format!("size: the audit of {size} orders and what came after them"));
    sized.audited = full.audit().await?;
    full.close().await?;
    Ok(sized)
}

impl Measured {
    /// In a shop that runs and in which nothing waits; the same afterwards.
    async fn measure(&mut self, bench: &Bench, shop: &mut Shop<'_>, backlog: usize, orders: usize) -> Result<()> {
        let mut client = shop.client("gateway").await?;
        latency::finished(&mut client, WARM).await?;
        let millis = latency::finished(&mut client, if bench.options.quick { 50 } else { 200 }).await?;
        self.latency.each.push(Latency::of_millis(millis).p50);
        drop(client);

        let decided = payments::backlog_decided(bench, shop, backlog, SPREAD).await?;
        self.decided.0.push(Rate { per_second: decided.steady, ..decided.rate });
        // By the count of results: looking for what has not ended reads the whole table.
        let (finished, mut orders_done) = (shop.finished().await?, backlog as i64);
        let from = finished.read().await?;
        shop.start("relay").await?;
        Progress::begin().until(&finished, from, orders_done).await?;

        let (_, flow) = flow::backlog_finished(bench, shop, orders, SPREAD).await?;
        self.finished.0.push(flow);
        orders_done += orders as i64;

        shop.stop("relay").await?;
        let time = bench.options.time(1, 5).min(Duration::from_secs(5));
        let accepted = intake::accepted(shop, AT_ORDERS, CONNECTIONS, time).await?;
        self.accepted.0.push(accepted.rate);
        shop.start("relay").await?;
        Progress::begin().until(&finished, from, orders_done + accepted.orders as i64).await?;
        Ok(())
    }
}

impl Sized {
    fn ratio(&self, of: impl Fn(&Measured) -> Spread) -> Spread {
        let (full, empty) = (of(&self.full), of(&self.empty));
        Spread::of(full.each.iter().zip(&empty.each).map(|(full, empty)| full / empty))
    }
}

type Of = fn(&Measured) -> Spread;

impl Figures {
    pub fn section(&self) -> Result<Section> {
        let mut section = Section { title: "Size", ..Section::default() };
        let text = &mut section.text;
        writeln!(
            text,
            "Both databases are filled with paid orders, each with its events, its payment and its ledger entry, and a tenth as many accounts; the audit must find nothing in \
them and in what came after. The same is then measured on the full shop and on an empty one on the same servers, by turns: a backlog of {} requests decided, {} orders from the outbox to final, \
orders accepted at the role over {CONNECTIONS} connections with the relay stopped, and POST to `Finished` of one client. The load is on 1 000 accounts.\n",
            self.backlog, self.orders
        )?;
        let rates: [(&str, Of, Of); 3] = [
            ("decided", |m| m.decided.per_second(), |m| m.decided.cpu_us(&[])),
            ("finished", |m| m.finished.per_second(), |m| m.finished.cpu_us(&[])),
            ("accepted", |m| m.accepted.per_second(), |m| m.accepted.cpu_us(&[])),
        ];
        writeln!(
            text,
            "| orders in the tables | figure | full | empty | full/empty | CPU us: full | empty | full/empty |\n|---|---|---|---|---|---|---|---|"
        )?;
        for sized in &self.sizes {
            let orders = number(sized.orders as f64, 0);
            for (name, rate, cost) in rates {
                let (full, empty, ratio) = (rate(&sized.full), rate(&sized.empty), sized.ratio(rate));
                let (full_us, empty_us, ratio_us) = (cost(&sized.full), cost(&sized.empty), sized.ratio(cost));
                let cells = [full.show(0), empty.show(0), ratio.show(2), full_us.show(1), empty_us.show(1), ratio_us.show(2)];
                writeln!(text, "| {orders} | {name}/s | {} |", cells.join(" | "))?;
            }
            let p50: Of = |m| m.latency.clone();
            let cells = [p50(&sized.full).show(2), p50(&sized.empty).show(2), sized.ratio(p50).show(2)];
            writeln!(text, "| {orders} | POST to `Finished` p50 ms | {} | | | |", cells.join(" | "))?;
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
            for (name, rate, cost) in rates {
                let (ratio, ratio_us) = (largest.ratio(rate), largest.ratio(cost));
                let figure = format!("size, {name}/s {at} over empty");
                section.targets.push(Target::at_least(figure, 1.0 - WITHIN, ratio.median(), ratio.show(2), ""));
                let figure = format!("size, CPU of one {name} {at} over empty");
                section.targets.push(Target::at_most(figure, 1.0 + WITHIN, ratio_us.median(), ratio_us.show(2), ""));
            }
            let ratio = largest.ratio(|m| m.latency.clone());
            let figure = format!("size, POST to `Finished` p50 {at} over empty");
            section.targets.push(Target::at_most(figure, 1.0 + WITHIN, ratio.median(), ratio.show(2), ""));
            for pages in &largest.pages {
                if let (Some(ratio), Some((depth, _))) = (pages.ratio(), pages.depths.last()) {
                    let figure = format!("size, page {} of {} over the first", number(*depth as f64, 0), pages.name);
                    section.targets.push(Target::at_most(figure, 1.0 + WITHIN, ratio.median(), ratio.show(2), ""));
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
            lines: rates.into_iter().map(line).collect(),
        });
        Ok(section)
    }
}
