//! Steady state: what the whole flow holds through the gateway, and latencies at parts of that, from an open loop.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::figures::{Latency, Rate, Rates, Target, number};
use super::super::load::{self, Load, Pace, Stream};
use super::super::plot::{Plot, Scale};
use super::super::report::Section;
use super::super::rig::{Progress, ROLES, Shop};
use super::super::{Bench, Result, step};
use super::SPREAD;
use super::disk::Disk;
use super::host::{self, Tuned};
use super::queues::{Queues, Waiting, growth};

const PATH: &str = "/api/OrdersProxy";
const CONNECTIONS_CLOSED: usize = 64;
/// Enough that no request waits for a free connection, also not while the system stands still for a tenth of a second: it would wait for others
/// then, as no client of a shop does, and the loop would not be open. With 128 of them, at 5 600 orders/s, a pause of 100 ms became one of 170.
const CONNECTIONS_OPEN: usize = 1024;
/// Orders whose end is waited for, a second, and their connections.
const WAITS_PER_SECOND: f64 = 40.0;
const CONNECTIONS_WAITING: usize = 64;
/// Long enough for the host to write back what is dirty, once or twice.
const MOST_TIME: Duration = Duration::from_secs(60);
const WARM: Duration = Duration::from_secs(1);
const WARM_OPEN: Duration = Duration::from_secs(20);
/// Queues may be longer at the end by what comes in this time.
const GROWTH_ALLOWED: Duration = Duration::from_millis(100);

#[derive(Debug, Serialize, Deserialize)]
pub struct Figures {
    /// Orders a second, accepted and paid.
    most: f64,
    most_cost: Rate,
    steady: Run,
    queues: Vec<Waiting>,
    /// From the row of the order's beginning to that of its end, in milliseconds: p50, p99.
    rows: (f64, f64),
    curve: Vec<Run>,
    /// At half once more, on a host with the settings that docs/OPERATIONS.md recommends.
    #[serde(default)]
    tuned: Option<Run>,
    /// Those, `setting=value` each.
    #[serde(default)]
    tuned_by: Vec<String>,
    /// After so many seconds the host writes back what is dirty ([`host::written_back_after`]).
    #[serde(default)]
    written_back_after: Option<f64>,
}

/// An open loop at one rate.
#[derive(Debug, Serialize, Deserialize)]
pub struct Run {
    /// Of the most.
    share: f64,
    seconds: f64,
    per_second: f64,
    refused: u64,
    pub post: Latency,
    pub finished: Latency,
    /// A page written and synced beside it.
    disk: Latency,
    pub cost: Rate,
}

pub async fn measure(bench: &Bench) -> Result<Figures> {
    let quick = bench.options.quick;
    let shop = Shop::open(&bench.servers, &ROLES).await?;
    shop.accounts(SPREAD).await?;
    let (most, most_cost) = match bench.options.rate {
        // A trial of that rate alone.
        Some(rate) => (rate as f64 * 2.0, Rate::default()),
        None => {
            step("steady: what the whole flow holds through the gateway");
            most(&shop, bench.options.time(3, MOST_TIME.as_secs()).min(MOST_TIME)).await?
        }
    };

    let time = bench.options.time(6, 300);
    // A broker compiles what it does often, and so much is new to it: small requests, many of them. Its compiler is at it for minutes, so
    // the long run comes last.
    open_loop(bench, &shop, most, 0.5, WARM_OPEN.min(time)).await?;
    let shares: &[f64] = match bench.options.rate {
        Some(_) => &[],
        None if quick => &[0.1, 0.5, 0.9],
        None => &[0.1, 0.25, 0.5, 0.75, 0.9],
    };
    let mut curve = Vec::new();
    for share in shares {
        step(&format!("steady: {:.0} % of that", share * 100.0));
        let time = Duration::from_secs(if quick { 2 } else { 20 }).min(time);
        curve.push(open_loop(bench, &shop, most, *share, time).await?.0);
    }

    step(&format!("steady: half of {most:.0} orders/s, for {} s", time.as_secs()));
    let since: std::time::SystemTime = std::time::SystemTime::now();
    let (steady, queues) = open_loop(bench, &shop, most, 0.5, time).await?;
    let client = bench.servers.connect(&shop.orders_database()).await?;
    let row = client
        .query_one(
            "select percentile_cont(0.5) within group (order by ms), percentile_cont(0.99) within group (order by ms)
               from (select (extract(epoch from e.at - o.created_at) * 1000)::float8 as ms
                       from orders o join order_event e on e.order_id = o.id and e.status = 'Finished'
                      where o.created_at >= $1) t",
            &[&since],
        )
        .await?;
    let rows = (row.try_get(0)?, row.try_get(1)?);
    let (tuned, tuned_by) = match bench.options.tune_host {
        true => {
            let (mut host, kafka) = (Tuned::begin(bench.servers.dir(), &shop.cpu())?, &bench.servers.kafka);
            // Where the kernel writes back all the time, a broker that does as well is in its way.
            kafka.leave_flushes_to_the_kernel(true).await?;
            host.settings.push("the broker's log.flush.interval.ms as Kafka has it".into());
            step(&format!("steady: the same with {}, for {} s", host.settings.join(", "), time.as_secs()));
            // What is dirty already is not part of it.
            open_loop(bench, &shop, most, 0.5, Duration::from_secs(5).min(time)).await?;
            let run = open_loop(bench, &shop, most, 0.5, time).await?.0;
            kafka.leave_flushes_to_the_kernel(false).await?;
            (Some(run), host.settings.clone())
        }
        false => (None, Vec::new()),
    };
    shop.all_final().await?;
    shop.close().await?;
    Ok(Figures { most, most_cost, steady, queues, rows, curve, tuned, tuned_by, written_back_after: host::written_back_after() })
}

/// Orders a second that are accepted and paid: from a closed loop, from its start until the last is final.
async fn most(shop: &Shop<'_>, time: Duration) -> Result<(f64, Rate)> {
    let load = |time| Load::closed(shop.address("gateway"), load::orders(PATH, "", SPREAD), CONNECTIONS_CLOSED, time);
    load(WARM).run_accepted().await?;
    shop.all_final().await?;
    let finished = shop.finished().await?;
    let from = finished.read().await?;
    let (cpu, begun) = (shop.cpu(), Progress::begin());
    let ran = load(time).run_accepted().await?;
    let count = ran.accepted();
    let progress = begun.until(&finished, from, count as i64).await?;
    let rate = Rate::new(progress.whole(), count as f64, &cpu, &shop.cpu()).loaded(ran.cpu, count as f64);
    Ok((progress.whole(), rate))
}

/// An open loop at this rate, where it is not asked what part of the most that is.
pub async fn at_rate(bench: &Bench, shop: &Shop<'_>, per_second: f64, time: Duration) -> Result<Run> {
    Ok(open_loop(bench, shop, per_second, 1.0, time).await?.0)
}

async fn open_loop(bench: &Bench, shop: &Shop<'_>, most: f64, share: f64, time: Duration) -> Result<(Run, Vec<Waiting>)> {
    let per_second = most * share;
    let waits = WAITS_PER_SECOND.min(per_second / 2.0);
    let stream = |requests, connections, per_second| Stream { requests, connections, pace: Pace::Open { per_second } };
    let streams = vec![
        stream(load::orders(PATH, "", SPREAD), CONNECTIONS_OPEN, per_second - waits),
        stream(load::orders(PATH, "Prefer: wait=30\r\n", SPREAD), CONNECTIONS_WAITING, waits),
    ];
    let load = Load { address: shop.address("gateway").to_owned(), streams, time, accepted: Arc::default() };
    let queues = Queues::of(shop).await?;
    let (accepted, disk, cpu) = (load.accepted.clone(), Disk::watch(bench.servers.dir())?, shop.cpu());
    let (ran, seen) = queues.watch(accepted, Duration::from_secs(1).min(time / 10), load.run()).await?;
    let (after, disk) = (shop.cpu(), disk.seen()?);
    let [post, finished] = ran.streams.as_slice() else { return Err("two streams".into()) };
    let count = post.accepted + finished.accepted;
    queues.empty(count).await?;
    let cost = Rate::new(count as f64 / ran.elapsed.as_secs_f64(), count as f64, &cpu, &after).loaded(ran.cpu, count as f64);
    let run = Run {
        share,
        seconds: ran.elapsed.as_secs_f64(),
        per_second,
        refused: post.refused + finished.refused,
        post: Latency::of(&post.latency),
        finished: Latency::of(&finished.latency),
        disk,
        cost,
    };
    Ok((run, seen))
}

impl Figures {
    pub fn section(&self) -> Result<Section> {
        let mut section = Section { title: "Steady state", ..Section::default() };
        let (steady, text) = (&self.steady, &mut section.text);
        writeln!(
            text,
            "What the whole flow holds is found by a closed loop of {CONNECTIONS_CLOSED} connections through the gateway: all that it accepts, over the time from its \
start until the last of it is final. Then an open loop of {CONNECTIONS_OPEN} connections asks for half of that. Of its orders {WAITS_PER_SECOND} a second carry `Prefer: wait=30`, over connections of \
their own; their answers, which come when the order is final, are POST-to-`Finished` as a client sees it. All latencies count from when the request was due. Queues are the differences of what was accepted, is on Kafka, is decided, and is applied. A page that is written and synced ten times a \
second beside all that shows when the disk itself stands still: a commit cannot be faster then.\n"
        )?;
        if let Some(seconds) = self.written_back_after {
            writeln!(
                text,
                "The host writes back what is dirty after {seconds} s (`vm.dirty_expire_centisecs`), all at once. A sync waits behind that; see \
[PERFORMANCE.md](PERFORMANCE.md), \"The disk\". With `TUNE_HOST=1` the long run is made a second time with the settings that \
[OPERATIONS.md](OPERATIONS.md) recommends for a host of a database.\n"
            )?;
        }
        if !self.tuned_by.is_empty() {
            writeln!(text, "Of the last run of the table the host was tuned by these: `{}`.\n", self.tuned_by.join("`, `"))?;
        }
        let rates_most = Rates(vec![self.most_cost.clone()]);
        let (most, cost, by) = (number(self.most, 0), rates_most.cpu_us(&[]).show(1), rates_most.by_process());
        writeln!(
            text,
            "The whole flow holds {most} orders/s through the gateway, at {cost} us of CPU an order ({by}; the load {:.1}).\n",
            rates_most.load_us().median()
        )?;
        writeln!(
            text,
            "| of that | orders/s | | p50 ms | p99 | p99.9 | greatest | samples | refused | CPU us an order |\n|---|---|---|---|---|---|---|---|---|---|"
        )?;
        let plain = std::iter::once(steady).chain(&self.curve).map(|run| (run, ""));
        for (run, how) in plain.chain(self.tuned.iter().map(|run| (run, ", host tuned"))) {
            let cost = Rates(vec![run.cost.clone()]).cpu_us(&[]).show(1);
            let (share, rate, seconds) = (run.share * 100.0, number(run.per_second, 0), run.seconds);
            writeln!(
                text,
                "| {share:.0} %, {seconds:.0} s{how} | {rate} | POST | {} | {} | {cost} |",
                run.post.cells(),
                run.refused
            )?;
            writeln!(text, "| | | POST to `Finished` | {} | | |", run.finished.cells())?;
            writeln!(text, "| | | a page to the disk | {} | | |", run.disk.cells())?;
        }
        let rates = Rates(vec![steady.cost.clone()]);
        writeln!(text, "\nOf an order's CPU at half, us: {}; the load {:.1}.", rates.by_process(), rates.load_us().median())?;
        let (p50, p99) = self.rows;
        writeln!(
            text,
            "\nOf every order at half, from the time in the row of its beginning to that of its end: p50 {p50:.2} ms, p99 {p99:.2} ms."
        )?;
        let longest = self.queues.iter().map(Waiting::all).max().unwrap_or_default();
        let (grown, allowed) = (growth(&self.queues), steady.per_second * GROWTH_ALLOWED.as_secs_f64());
        writeln!(
            text,
            "The queues together were never longer than {longest}; the last quarter's mean is {grown:.0} over the second quarter's."
        )?;

        let ms = |value: f64| (value, number(value, 2));
        if !self.most_cost.cpu_us.is_empty() {
            let (name, cost) = ("whole flow through the gateway, accepted and paid", rates_most.cpu_us(&[]));
            let holds = Target::at_least(name, 10_000.0, self.most, number(self.most, 0), " orders/s");
            let costs = Target::at_most(format!("{name}, CPU an order"), 160.0, cost.median(), cost.show(1), " us");
            section.targets.extend([holds, costs]);
        }
        // Half of more is more: the rate belongs to the figure.
        let at_half = format!("at half, {} orders/s", number(steady.per_second, 0));
        let most = |figure: &str, how: &str, bound, (value, shown)| {
            Target::at_most(format!("steady, {figure} p99 {at_half}{how}"), bound, value, shown, " ms")
        };
        for (run, how) in std::iter::once((steady, "")).chain(self.tuned.iter().map(|run| (run, ", host tuned"))) {
            section.targets.push(most("POST", how, 20.0, ms(run.post.p99)));
            section.targets.push(most("POST to `Finished`", how, 60.0, ms(run.finished.p99)));
        }
        let grown = Target::at_most("steady, queues longer at the end, orders", allowed.round(), grown, number(grown, 0), "");
        section.targets.push(grown);
        let refused: u64 = std::iter::once(steady).chain(&self.curve).chain(&self.tuned).map(|run| run.refused).sum();
        section.targets.push(Target::at_most("steady, refused in all its runs", 0.0, refused as f64, refused.to_string(), ""));

        let line =
            |name: &str, of: fn(&Run) -> f64| (name.to_owned(), self.curve.iter().map(|run| (run.per_second, of(run))).collect());
        section.plots.push(Plot {
            name: "latency".into(),
            title: "Latency against rate, through the gateway, open loop".into(),
            x: ("orders/s".into(), Scale::Linear),
            y: ("milliseconds".into(), Scale::Log),
            lines: vec![
                line("POST p50", |run| run.post.p50),
                line("POST p99", |run| run.post.p99),
                line("POST to Finished p50", |run| run.finished.p50),
                line("POST to Finished p99", |run| run.finished.p99),
            ],
        });
        let queue = |name: &str, of: fn(&Waiting) -> u64| {
            (name.to_owned(), self.queues.iter().map(|waiting| (waiting.at, of(waiting) as f64)).collect())
        };
        section.plots.push(Plot {
            name: "queues".into(),
            title: "What waits at half of the most".into(),
            x: ("seconds".into(), Scale::Linear),
            y: ("records".into(), Scale::Linear),
            lines: vec![
                queue("in orders' outbox", |waiting| waiting.unsent_requests),
                queue("requests not decided", |waiting| waiting.unread_requests),
                queue("in payments' outbox", |waiting| waiting.unsent_results),
                queue("results not applied", |waiting| waiting.unread_results),
            ],
        });
        Ok(section)
    }
}
