//! Intake: orders accepted a second, at the orders role and through the gateway, alone and while they are paid.

use std::fmt::Write;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::figures::{Rate, Rates, Spread, Target, Turns};
use super::super::load::{self, Load};
use super::super::plot::{Plot, Scale};
use super::super::report::Section;
use super::super::rig::{Cpu, ROLES, Shop};
use super::super::{Bench, Result, step};
use super::SPREAD;

const CASE: &str = "order_cte_c64";
const CONNECTIONS: usize = 64;
const CONNECTIONS_PLOTTED: [usize; 5] = [1, 4, 16, 64, 256];
/// Connections open, statements are prepared, files have grown.
const WARM: Duration = Duration::from_millis(500);

#[derive(Debug, Serialize, Deserialize)]
pub struct Figures {
    seconds: u64,
    /// By way: at the role, through the gateway.
    alone: Vec<Turns>,
    while_paid: Vec<Rates>,
    /// Deposits over [`CONNECTIONS`] at the payments role.
    #[serde(default)]
    deposits: Rates,
    /// By way: connections, accepted a second, p50 in milliseconds from the sending.
    curve: Vec<Vec<(usize, f64, f64)>>,
}

/// How an order comes in.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    pub role: &'static str,
    pub path: &'static str,
    shown: &'static str,
}

pub const AT_ORDERS: Way = Way { role: "orders", path: "/api/Orders", shown: "at the orders role" };
pub const THROUGH_GATEWAY: Way = Way { role: "gateway", path: "/api/OrdersProxy", shown: "through the gateway" };
const WAYS: [Way; 2] = [AT_ORDERS, THROUGH_GATEWAY];

pub async fn measure(bench: &Bench) -> Result<Figures> {
    let (time, rounds) = (bench.options.time(1, 5), bench.options.rounds(1, 5));
    let mut figures = Figures {
        seconds: time.as_secs(),
        alone: WAYS.map(|_| Turns::new(CASE)).into(),
        while_paid: WAYS.map(|_| Rates::default()).into(),
        deposits: Rates::default(),
        curve: vec![Vec::new(); WAYS.len()],
    };
    step("intake: the limit");
    let limit = limit(bench).await?;
    figures.alone.iter_mut().for_each(|turns| turns.limit.each.push(limit));
    for round in 0..rounds {
        step(&format!("intake: round {} of {rounds}, 64 connections, alone and while paid, then the limit", round + 1));
        for (at, way) in WAYS.into_iter().enumerate() {
            let mut shop = Shop::open(&bench.servers, &ROLES).await?;
            shop.accounts(SPREAD).await?;
            figures.while_paid[at].0.push(accepted(&shop, way, CONNECTIONS, time).await?.rate);
            shop.all_final().await?;
            shop.stop("relay").await?;
            bench.servers.checkpoint().await?;
            figures.alone[at].ours.0.push(accepted(&shop, way, CONNECTIONS, time).await?.rate);
            shop.close().await?;
        }
        let shop = Shop::open(&bench.servers, &["payments"]).await?;
        shop.accounts(SPREAD).await?;
        bench.servers.checkpoint().await?;
        figures.deposits.0.push(ran(&shop, "payments", &load::deposits(SPREAD), CONNECTIONS, time).await?.rate);
        shop.close().await?;
        let limit = self::limit(bench).await?;
        figures.alone.iter_mut().for_each(|turns| turns.limit.each.push(limit));
    }
    step("intake: against the number of connections");
    for (at, way) in WAYS.into_iter().enumerate() {
        let mut shop = Shop::open(&bench.servers, &ROLES).await?;
        shop.accounts(SPREAD).await?;
        shop.stop("relay").await?;
        for connections in CONNECTIONS_PLOTTED.into_iter().step_by(if bench.options.quick { 2 } else { 1 }) {
            let accepted = accepted(&shop, way, connections, time).await?;
            figures.curve[at].push((connections, accepted.rate.per_second, accepted.p50));
        }
        shop.close().await?;
    }
    Ok(figures)
}

async fn limit(bench: &Bench) -> Result<f64> {
    Ok(bench.limits.measure(&[CASE]).await?.get(CASE).copied().unwrap_or_default())
}

/// Orders accepted over some connections.
pub struct Accepted {
    pub rate: Rate,
    /// Of one, milliseconds, from the sending.
    p50: f64,
    /// With those that warmed it up.
    pub orders: u64,
}

pub async fn accepted(shop: &Shop<'_>, way: Way, connections: usize, time: Duration) -> Result<Accepted> {
    ran(shop, way.role, &load::orders(way.path, "", SPREAD), connections, time).await
}

async fn ran(shop: &Shop<'_>, role: &str, requests: &load::Requests, connections: usize, time: Duration) -> Result<Accepted> {
    let load = |time| Load::closed(shop.address(role), requests.clone(), connections, time);
    let warm = load(WARM).run_accepted().await?.accepted();
    let cpu: Cpu = shop.cpu();
    let ran = load(time).run_accepted().await?;
    let count = ran.accepted() as f64;
    let rate = Rate::new(count / ran.elapsed.as_secs_f64(), count, &cpu, &shop.cpu()).loaded(ran.cpu, count);
    let p50 = ran.streams.first().map_or(0.0, |stream| stream.latency.value_at_quantile(0.5) as f64 / 1e3);
    Ok(Accepted { rate, p50, orders: warm + ran.accepted() })
}

impl Figures {
    pub fn section(&self) -> Result<Section> {
        let mut section = Section { title: "Intake", ..Section::default() };
        let text = &mut section.text;
        writeln!(
            text,
            "Orders over 1 000 accounts, without an id and without a key, from a closed loop for {} s a measurement: each connection sends its next order \
when the last is answered 201. `alone`: the relay is stopped. `while paid`: everything runs, and what is accepted is paid beside it. The load's own \
CPU is beside that of the processes; it shares the cores.\n",
            self.seconds
        )?;
        writeln!(text, "| accepted/s, 64 connections | alone | limit | alone/limit | while paid |\n|---|---|---|---|---|")?;
        for ((way, turns), paid) in WAYS.iter().zip(&self.alone).zip(&self.while_paid) {
            let (ours, limit, ratio, paid) = (turns.ours.per_second(), &turns.limit, turns.ratio(), paid.per_second());
            let cells = [ours.show(0), format!("`{CASE}` {}", limit.show(0)), ratio.show(2), paid.show(0)];
            writeln!(text, "| {} | {} |", way.shown, cells.join(" | "))?;
            let bound = if way.role == "orders" { 2.0 } else { 1.5 };
            let figure = format!("intake {}, 64 connections, over `{CASE}`", way.shown);
            section.targets.push(Target::median_at_least(figure, bound, &ratio, 2, ""));
        }
        writeln!(
            text,
            "\n| CPU us an order | alone | by process | the load | while paid | by process |\n|---|---|---|---|---|---|"
        )?;
        for ((way, turns), paid) in WAYS.iter().zip(&self.alone).zip(&self.while_paid) {
            let (ours, load) = (&turns.ours, turns.ours.load_us());
            let cells = [ours.cpu_us(&[]).show(1), ours.by_process(), load.show(1), paid.cpu_us(&[]).show(1), paid.by_process()];
            writeln!(text, "| {} | {} |", way.shown, cells.join(" | "))?;
        }
        if !self.deposits.0.is_empty() {
            let deposits = &self.deposits;
            writeln!(
                text,
                "\nDeposits over {CONNECTIONS} connections and 1 000 accounts, at the payments role: {}/s, at {} us of CPU each ({}).",
                deposits.per_second().show(0),
                deposits.cpu_us(&[]).show(1),
                deposits.by_process()
            )?;
        }
        writeln!(
            text,
            "\n| connections | {} |\n|---|{}",
            WAYS.map(|way| format!("accepted/s {} (p50)", way.shown)).join(" | "),
            "---|".repeat(2)
        )?;
        for connections in CONNECTIONS_PLOTTED {
            let cell = |curve: &Vec<(usize, f64, f64)>| {
                let measured = curve.iter().find(|(with, ..)| *with == connections);
                measured.map_or("-".into(), |(_, rate, p50)| format!("{} ({p50:.2} ms)", Spread::of([*rate]).show(0)))
            };
            writeln!(text, "| {connections} | {} |", self.curve.iter().map(cell).collect::<Vec<_>>().join(" | "))?;
        }
        let line = |(way, curve): (&Way, &Vec<(usize, f64, f64)>)| {
            (way.shown.to_owned(), curve.iter().map(|(connections, rate, _)| (*connections as f64, *rate)).collect())
        };
        section.plots.push(Plot {
            name: "intake".into(),
            title: "Orders accepted a second against connections, the relay stopped".into(),
            x: ("connections".into(), Scale::Log),
            y: ("orders accepted/s".into(), Scale::Linear),
            lines: WAYS.iter().zip(&self.curve).map(line).collect(),
        });
        Ok(section)
    }
}
