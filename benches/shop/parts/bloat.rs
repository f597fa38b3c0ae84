//! Bloat: a long run at a steady rate, and what levels off in it and what grows with the facts.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::super::figures::{Latency, Target, number};
use super::super::load::{self, Load, Pace, Stream};
use super::super::plot::{Plot, Scale};
use super::super::report::Section;
use super::super::rig::{Progress, ROLES, Shop};
use super::super::{Bench, Result, step};
use super::SPREAD;
use super::tables::{Table, Tables, look};

const CONNECTIONS: usize = 64;
const LOOKS: u32 = 60;
/// What is kept for ever, and so may grow: a row or two an order.
const FACTS: [&str; 4] = ["orders.orders", "orders.order_event", "payments.payment", "payments.transfer"];
/// Others may be so much bigger in the last third than in the second.
const GROWTH_MAX: f64 = 1.2;
/// And what is smaller than this is not looked at: a page more is much of it.
const SMALL_BYTES: u64 = 512 * 1024;

#[derive(Debug, Serialize, Deserialize)]
pub struct Figures {
    seconds: f64,
    per_second: f64,
    orders: u64,
    refused: u64,
    post: Latency,
    /// From its start, as it went.
    seen: Vec<Seen>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Seen {
    at: f64,
    orders: u64,
    tables: Tables,
}

pub async fn measure(bench: &Bench) -> Result<Figures> {
    let (time, per_second) = (bench.options.time(15, 1_200), bench.options.rate.unwrap_or(1_000) as f64);
    let shop = Shop::open(&bench.servers, &ROLES).await?;
    shop.accounts(SPREAD).await?;
    step(&format!("bloat: {per_second} orders/s for {} s", time.as_secs()));
    let requests = load::orders("/api/OrdersProxy", "", SPREAD);
    let streams = vec![Stream { requests, connections: CONNECTIONS, pace: Pace::Open { per_second } }];
    let load = Load { address: shop.address("gateway").to_owned(), streams, time, accepted: Arc::default() };
    let orders = bench.servers.connect(&shop.orders_database()).await?;
    let payments = bench.servers.connect(&shop.payments_database()).await?;
    let accepted = load.accepted.clone();
    let finished = shop.finished().await?;
    let from = finished.read().await?;
    let (begun, mut seen) = (Instant::now(), Vec::new());
    let mut running = std::pin::pin!(load.run());
    let ran = loop {
        let mut tables = Tables::new();
        look(&orders, "orders", &mut tables).await?;
        look(&payments, "payments", &mut tables).await?;
        let orders = accepted.load(std::sync::atomic::Ordering::Relaxed);
        seen.push(Seen { at: begun.elapsed().as_secs_f64(), orders, tables });
        tokio::select! {
            ran = &mut running => break ran?,
            () = tokio::time::sleep((time / LOOKS).max(Duration::from_secs(1))) => {}
        }
    };
    let [stream] = ran.streams.as_slice() else { return Err("one stream".into()) };
    Progress::begin().until(&finished, from, stream.accepted as i64).await?;
    shop.all_final().await?;
    drop((orders, payments));
    let (post, seconds) = (Latency::of(&stream.latency), ran.elapsed.as_secs_f64());
    let figures = Figures { seconds, per_second, orders: stream.accepted, refused: stream.refused, post, seen };
    shop.close().await?;
    Ok(figures)
}

impl Figures {
    fn tables(&self) -> BTreeMap<&str, Vec<(&Seen, Table)>> {
        let mut all: BTreeMap<&str, Vec<(&Seen, Table)>> = BTreeMap::new();
        for seen in &self.seen {
            for (name, table) in &seen.tables {
                all.entry(name).or_default().push((seen, *table));
            }
        }
        all
    }

    pub fn section(&self) -> Result<Section> {
        let mut section = Section { title: "Bloat", ..Section::default() };
        let text = &mut section.text;
        writeln!(
            text,
            "{} orders/s through the gateway from an open loop for {:.0} s, all of them paid as they come: {} accepted, {} refused; POST p50 {:.2} ms, p99 {:.2}. Sizes are those of the tables with \
their indexes; the greatest of the second third of the run beside the greatest of the last. Dead rows and autovacuums are the server's statistics at the end.\n",
            number(self.per_second, 0),
            self.seconds,
            number(self.orders as f64, 0),
            self.refused,
            self.post.p50,
            self.post.p99
        )?;
        writeln!(
            text,
            "| table | MiB in the 2nd third | in the last | of it indexes | bytes an order | dead rows | updates, heap-only | autovacuums | |\n|---|---|---|---|---|---|---|---|---|"
        )?;
        let mut growing = Vec::new();
        for (name, seen) in self.tables() {
            let third = seen.len() / 3;
            let most = |some: &[(&Seen, Table)]| some.iter().map(|(_, table)| table.bytes()).max().unwrap_or_default();
            let (second, last) = (most(&seen[third..(third * 2).max(third)]), most(&seen[third * 2..]));
            let (Some((first, begin)), Some((end, table))) = (seen.first(), seen.last()) else { continue };
            let is_fact = FACTS.contains(&name);
            let levels_off = last <= SMALL_BYTES || (last as f64) <= second as f64 * GROWTH_MAX;
            if !is_fact && !levels_off {
                growing.push(name);
            }
            let orders = (end.orders - first.orders).max(1) as f64;
            let an_order = table.bytes().saturating_sub(begin.bytes()) as f64 / orders;
            let mib = |bytes: u64| format!("{:.2}", bytes as f64 / 1024.0 / 1024.0);
            let verdict = match (is_fact, levels_off) {
                (true, _) => "grows with the facts",
                (false, true) => "levels off",
                (false, false) => "**grows**",
            };
            let hot = if table.updated > 0 {
                format!("{:.0} %", table.updated_hot as f64 * 100.0 / table.updated as f64)
            } else {
                "-".into()
            };
            let an_order = if is_fact { format!("{an_order:.0}") } else { "-".into() };
            let cells = [mib(second), mib(last), mib(table.index_bytes), an_order, number(table.dead as f64, 0), hot];
            writeln!(text, "| `{name}` | {} | {} | {verdict} |", cells.join(" | "), table.autovacuums)?;
        }
        let shown = if growing.is_empty() { "0".to_owned() } else { format!("{} ({})", growing.len(), growing.join(", ")) };
        section.targets.push(Target::at_most(
            "bloat, tables that should level off and do not",
            0.0,
            growing.len() as f64,
            shown,
            "",
        ));
        // Tables level off where everything is refused, too.
        section.targets.push(Target::at_most("bloat, refused", 0.0, self.refused as f64, self.refused.to_string(), ""));
        let lines = |facts: bool| {
            let of = self.tables().into_iter().filter(move |(name, _)| FACTS.contains(name) == facts);
            let line = |(name, seen): (&str, Vec<(&Seen, Table)>)| {
                (
                    name.to_owned(),
                    seen.iter().map(|(seen, table)| (seen.at, table.bytes() as f64 / 1024.0 / 1024.0)).collect::<Vec<_>>(),
                )
            };
            let mut lines: Vec<_> = of.map(line).collect();
            let most = |line: &(String, Vec<(f64, f64)>)| line.1.iter().map(|point| point.1).fold(0.0, f64::max);
            lines.sort_by(|a, b| most(b).total_cmp(&most(a)));
            lines.truncate(8);
            lines
        };
        for (name, title, facts) in
            [("bloat-facts", "What grows with the facts", true), ("bloat-rest", "What should level off", false)]
        {
            section.plots.push(Plot {
                name: name.into(),
                title: title.into(),
                x: ("seconds".into(), Scale::Linear),
                y: ("MiB, table and indexes".into(), Scale::Linear),
                lines: lines(facts),
            });
        }
        Ok(section)
    }
}
