//! The whole flow: accepted orders that wait in the outbox, until all are final.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::super::figures::{Rate, Rates, Spread, Target};
use super::super::report::Section;
use super::super::rig::{Progress, Shop};
use super::super::{Bench, Result, step};
use super::{SPREAD, named};

const SERVICES: [&str; 3] = ["orders", "payments", "relay"];

#[derive(Debug, Serialize, Deserialize)]
pub struct Figures {
    orders: usize,
    series: Vec<Series>,
    /// What the audit said of the last shop.
    audited: serde_json::Value,
}

#[derive(Debug, Serialize, Deserialize)]
struct Series {
    accounts: usize,
    /// Orders accepted while the relay was stopped.
    accepted: Rates,
    /// Orders finished, from the relay's start.
    finished: Rates,
}

pub async fn measure(bench: &Bench) -> Result<Figures> {
    let (orders, rounds) = (bench.options.orders(20_000, 200_000), bench.options.rounds(1, 3));
    let series = |accounts| Series { accounts, accepted: Rates::default(), finished: Rates::default() };
    let mut figures = Figures { orders, series: vec![series(SPREAD), series(1)], audited: serde_json::Value::Null };
    for round in 0..rounds {
        step(&format!("flow: round {} of {rounds}, {orders} orders from accepted to final", round + 1));
        for series in &mut figures.series {
            let mut shop = Shop::open(&bench.servers, &SERVICES).await?;
            shop.accounts(series.accounts).await?;
            let (accepted, finished) = backlog_finished(bench, &mut shop, orders, series.accounts).await?;
            series.accepted.0.push(accepted);
            series.finished.0.push(finished);
            shop.all_final().await?;
            let paid = shop.ask(&shop.orders_database(), "select count(*) from orders where status = 'Finished'").await?;
            if paid != orders as i64 {
                return Err(format!("of {orders} orders {paid} are finished").into());
            }
            if round + 1 == rounds {
                figures.audited = shop.audit().await?;
            }
            shop.close().await?;
        }
    }
    Ok(figures)
}

/// In a shop that runs: accepts orders while the relay is stopped, then starts it. What was accepted a second, what was finished.
pub async fn backlog_finished(bench: &Bench, shop: &mut Shop<'_>, orders: usize, accounts: usize) -> Result<(Rate, Rate)> {
    let count = orders as f64;
    shop.stop("relay").await?;
    let cpu = shop.cpu();
    let ran = shop.place(orders, accounts).await?;
    let accepted = Rate::new(count / ran.elapsed.as_secs_f64(), count, &cpu, &shop.cpu()).loaded(ran.cpu, count);
    bench.servers.checkpoint().await?;
    let finished = shop.finished().await?;
    let from = finished.read().await?;
    let (cpu, begun) = (shop.cpu(), Progress::begin());
    shop.start("relay").await?;
    let progress = begun.until(&finished, from, orders as i64).await?;
    Ok((accepted, Rate::new(progress.whole(), count, &cpu, &shop.cpu())))
}

impl Figures {
    pub fn section(&self) -> Result<Section> {
        let mut section = Section { title: "The whole flow", ..Section::default() };
        let text = &mut section.text;
        writeln!(
            text,
            "{} orders are accepted while the relay is stopped. Then it is started; the time is from its process's start until the last order is final: \
outbox, Kafka, decision, outbox, Kafka, status. What it costs to accept them is beside it; accepted and paid at the same time, through the gateway, is the first figure of \
\"Steady state\". All of them must end `Finished`; the audit of the last shop must find nothing.\n",
            self.orders
        )?;
        writeln!(
            text,
            "| | finished/s | CPU us an order | by process | accepted/s before it | CPU us an order |\n|---|---|---|---|---|---|"
        )?;
        for Series { accounts, accepted, finished } in &self.series {
            writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} |",
                named(*accounts),
                finished.per_second().show(0),
                finished.cpu_us(&[]).show(1),
                finished.by_process(),
                accepted.per_second().show(0),
                accepted.cpu_us(&[]).show(1)
            )?;
            let (rate, cost, name) = (finished.per_second(), finished.cpu_us(&[]), named(*accounts));
            section.targets.push(Target::median_at_least(
                format!("whole flow, {name}, of what was accepted before"),
                10_000.0,
                &rate,
                0,
                " orders/s",
            ));
            section.targets.push(Target::median_at_most(
                format!("whole flow, {name}, of what was accepted before, CPU an order"),
                160.0,
                &cost,
                1,
                " us",
            ));
        }
        if let [spread, one] = self.series.as_slice() {
            let pairs = one.finished.0.iter().zip(&spread.finished.0);
            let ratio = Spread::of(pairs.map(|(one, spread)| one.per_second / spread.per_second));
            section.targets.push(Target::median_at_least("whole flow, one account over 1 000", 1.0, &ratio, 2, ""));
        }
        let said = |name: &str| self.audited[name].to_string();
        let (orders, records, offences) = (said("orders"), said("records"), said("offences"));
        writeln!(text, "\nThe audit: {orders} orders and {records} records on the log, {offences} offences, {} ms.", said("ms"))?;
        Ok(section)
    }
}
