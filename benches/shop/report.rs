//! docs/BENCHMARKS.md: the figures, each beside its limit, and the machine they were taken on.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use super::limits::Limits;
use super::rig::Cpu;
use super::{BACKLOG, CONNECTIONS, Result, SPREAD_ACCOUNTS, machine};

pub struct Figures {
    pub before: Limits,
    pub after: Limits,
    pub latency: Latency,
    pub rates: Rates,
    pub memory: Vec<(&'static str, u64)>,
    pub ready_after: Duration,
    /// Time to ready, resident bytes.
    pub all: (Duration, u64),
}

pub struct Rates {
    pub accepted: Rate,
    pub accepted_gateway: Rate,
    pub accepted_alone: Rate,
    pub decided: Vec<Rate>,
    pub decided_hot: Vec<Rate>,
    pub finished: Vec<Rate>,
    pub finished_hot: Vec<Rate>,
}

/// Milliseconds.
pub struct Latency {
    pub p50: f64,
    pub p99: f64,
    pub samples: usize,
}

impl Latency {
    pub fn of(mut millis: Vec<f64>) -> Self {
        millis.sort_by(f64::total_cmp);
        let at = |q: f64| millis[((millis.len() - 1) as f64 * q).round() as usize];
        Self { p50: at(0.5), p99: at(0.99), samples: millis.len() }
    }
}

#[derive(Clone)]
pub struct Rate {
    pub per_second: f64,
    /// Microseconds of CPU an order, by process.
    pub cpu_us: BTreeMap<&'static str, f64>,
}

impl Rate {
    pub fn of(count: usize, time: Duration, before: &Cpu, after: &Cpu) -> Self {
        let spent = |name: &str| after[name].saturating_sub(before.get(name).copied().unwrap_or_default());
        let cpu_us = after.keys().map(|name| (*name, spent(name).as_secs_f64() * 1e6 / count as f64)).collect();
        Self { per_second: count as f64 / time.as_secs_f64(), cpu_us }
    }

    fn cpu(&self) -> String {
        let parts: Vec<_> = self.cpu_us.iter().filter(|(_, us)| **us >= 0.5).map(|(name, us)| format!("{name} {us:.0}")).collect();
        format!("{:.0} ({})", self.cpu_us.values().sum::<f64>(), parts.join(", "))
    }
}

fn median(rates: &[Rate]) -> Rate {
    let mut sorted: Vec<Rate> = rates.to_vec();
    sorted.sort_by(|a, b| a.per_second.total_cmp(&b.per_second));
    sorted.swap_remove(sorted.len() / 2)
}

fn all(rates: &[Rate]) -> String {
    rates.iter().map(|rate| format!("{:.0}", rate.per_second)).collect::<Vec<_>>().join(", ")
}

/// One of the limits.
type Limit = fn(&Limits) -> f64;

pub fn write(figures: &Figures, quick: bool) -> Result<()> {
    let limit = |field: Limit| (field(&figures.before) + field(&figures.after)) / 2.0;
    let noise = |field: Limit| format!("{:.0} before, {:.0} after", field(&figures.before), field(&figures.after));
    let mut rows = String::new();
    let mut row = |what: String, rates: &[Rate], limit_name: &str, field: Limit| {
        let (rate, limit, noise) = (median(rates), limit(field), noise(field));
        let (each, ratio) = (all(rates), rate.per_second / limit);
        writeln!(
            rows,
            "| {what} | {:.0} | {each} | {} | `{limit_name}` {limit:.0} ({noise}) | {ratio:.2} |",
            rate.per_second,
            rate.cpu()
        )
    };
    let (cte, pay, hot): (Limit, Limit, Limit) = (|l| l.order_cte, |l| l.pay_batch, |l| l.pay_batch_hot);
    let (rates, one) = (&figures.rates, std::slice::from_ref);
    let connections = format!("{CONNECTIONS} connections");
    row(
        format!("orders accepted/s at the orders role, {connections}, nothing else going on"),
        one(&rates.accepted_alone),
        "order_cte_c64",
        cte,
    )?;
    row(
        format!("orders accepted/s at the orders role, {connections}, while they are paid"),
        one(&rates.accepted),
        "order_cte_c64",
        cte,
    )?;
    row(
        format!("orders accepted/s through the gateway, {connections}, while they are paid"),
        one(&rates.accepted_gateway),
        "order_cte_c64",
        cte,
    )?;
    row(
        format!("payments decided/s from a backlog of {BACKLOG} requests on Kafka over {SPREAD_ACCOUNTS} accounts"),
        &rates.decided,
        "pay_batch_1000_c1",
        pay,
    )?;
    row(
        format!("payments decided/s from a backlog of {BACKLOG} requests on Kafka on one account"),
        &rates.decided_hot,
        "pay_batch_hot_1000_c1",
        hot,
    )?;
    row(
        format!("orders finished/s, the whole flow, from a backlog of {BACKLOG} over {SPREAD_ACCOUNTS} accounts"),
        &rates.finished,
        "pay_batch_1000_c1",
        pay,
    )?;
    row(
        format!("orders finished/s, the whole flow, from a backlog of {BACKLOG} on one account"),
        &rates.finished_hot,
        "pay_batch_hot_1000_c1",
        hot,
    )?;
    let mib = |bytes: u64| bytes as f64 / 1024.0 / 1024.0;
    let memory: Vec<_> = figures.memory.iter().map(|(name, bytes)| format!("{name} {:.0} MiB", mib(*bytes))).collect();
    let binary = std::fs::metadata(env!("CARGO_BIN_EXE_shopd"))?.len();
    let text = format!(
        "# Benchmarks

Written by `make bench`{}. Release build, everything on one machine: {}, Postgres {}, Apache Kafka in one node, loopback.
The load generator, the four roles, Postgres and Kafka share the cores. A figure of one run is worth little on a shared
machine; its ratio to the limit, which the same run measures with `benches/limits/postgres_limits.py` before and after, is
worth more. CPU is that of the roles, Postgres and Kafka together.

| figure | median | each | CPU us an order | limit of bare Postgres | ratio |
|---|---|---|---|---|---|
{rows}
The time of `payments decided` runs from the start of the payments process: connecting, taking its partitions, fetching,
deciding, committing the decisions with their results in the outbox. The limit beside it does the same work on bare Postgres.
The time of `the whole flow` runs from the start of the relay process until the last order is final: outbox, Kafka, decision,
outbox, Kafka, status, with everything on the same cores. The limit beside it does only the decision's part of that.

| latency, one client on an idle system, on Kafka | |
|---|---|
| POST to `Finished`, p50 | {:.2} ms |
| POST to `Finished`, p99 | {:.2} ms |
| samples | {} |

| at rest | |
|---|---|
| `shopd all` on its embedded default, stopped to ready, warm | {} ms |
| four roles, started one after the other, until all are ready | {} ms |
| resident memory of each role after the intake | {} |
| resident memory of `shopd all`, idle, without its Postgres | {:.0} MiB |
| the stripped binary | {:.1} MiB |
",
        if quick { " (quick)" } else { "" },
        machine::describe(),
        figures.before.postgres,
        figures.latency.p50,
        figures.latency.p99,
        figures.latency.samples,
        figures.all.0.as_millis(),
        figures.ready_after.as_millis(),
        memory.join(", "),
        mib(figures.all.1),
        mib(binary),
    );
    println!("{text}");
    std::fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/BENCHMARKS.md"), text)?;
    Ok(())
}
