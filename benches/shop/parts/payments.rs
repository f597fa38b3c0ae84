//! Payments: from a backlog of requests on Kafka to decisions committed, with their results in the outbox.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::super::figures::{Rate, Rates, Spread, Target, Turns, number};
use super::super::report::Section;
use super::super::rig::{Progress, Shop};
use super::super::{Bench, Result, step};
use super::{SPREAD, bare, named};

const CASES: [(&str, usize); 3] =
    [("pay_batch_1000_c1", SPREAD), ("pay_batch_hot_1000_c1", 1), ("pay_batch_1000_c1", LIMITS_SPREAD)];
/// Accounts of the limit: fewer of its payments share one than of ours over [`SPREAD`].
const LIMITS_SPREAD: usize = 10_000;

#[derive(Debug, Serialize, Deserialize)]
pub struct Figures {
    backlog: usize,
    series: Vec<Series>,
}

/// Over so many accounts.
#[derive(Debug, Serialize, Deserialize)]
struct Series {
    accounts: usize,
    /// From the first commit to the last.
    turns: Turns,
    /// From the process's start.
    whole: Spread,
    /// The same statements driven bare.
    bare: Rates,
}

/// One backlog.
pub struct Decided {
    pub steady: f64,
    pub whole: f64,
    pub rate: Rate,
}

pub async fn measure(bench: &Bench) -> Result<Figures> {
    let (backlog, rounds) = (bench.options.backlog(10_000, 200_000), bench.options.rounds(1, 3));
    let series = |(case, accounts): (&str, usize)| Series {
        accounts,
        turns: Turns::new(case),
        whole: Spread::default(),
        bare: Rates::default(),
    };
    // A short run has the two that there are targets for.
    let cases = if bench.options.quick { &CASES[..2] } else { &CASES[..] };
    let mut figures = Figures { backlog, series: cases.iter().copied().map(series).collect() };
    limits(bench, &mut figures).await?;
    for round in 0..rounds {
        step(&format!("payments: round {} of {rounds}, a backlog of {backlog}, its statements bare, the limits", round + 1));
        for series in &mut figures.series {
            let decided = decisions(bench, backlog, series.accounts, round == 0).await?;
            series.turns.ours.0.push(Rate { per_second: decided.steady, ..decided.rate });
            series.whole.each.push(decided.whole);
            series.bare.0.push(bare::decisions(bench, backlog, series.accounts).await?);
        }
        limits(bench, &mut figures).await?;
    }
    Ok(figures)
}

async fn limits(bench: &Bench, figures: &mut Figures) -> Result<()> {
    let limits = bench.limits.measure(&[CASES[0].0, CASES[1].0]).await?;
    for series in &mut figures.series {
        series.turns.limit.each.extend(limits.get(&series.turns.limit_name));
    }
    Ok(())
}

/// Lets `backlog` requests come to lie on Kafka while payments is stopped, then starts it, with the relay stopped. `to_the_end`: lets
/// the relay have the results afterwards, and looks that each order ends by its own.
async fn decisions(bench: &Bench, backlog: usize, accounts: usize, to_the_end: bool) -> Result<Decided> {
    let mut shop = Shop::open(&bench.servers, &["orders", "payments", "relay"]).await?;
    shop.accounts(accounts).await?;
    let decided = backlog_decided(bench, &mut shop, backlog, accounts).await?;
    if to_the_end {
        shop.start("relay").await?;
        shop.all_final().await?;
        let paid = shop.ask(&shop.payments_database(), "select count(*) from payment where status = 'Finished'").await?;
        if paid != backlog as i64 {
            return Err(format!("of {backlog} orders {paid} were paid").into());
        }
    }
    shop.close().await?;
    Ok(decided)
}

/// In a shop whose payments and relay run, and run again or not afterwards as they were left: payments runs, the relay does not.
pub async fn backlog_decided(bench: &Bench, shop: &mut Shop<'_>, backlog: usize, accounts: usize) -> Result<Decided> {
    let count = backlog as i64;
    shop.stop("payments").await?;
    let before = shop.requests_published().read().await?;
    shop.place(backlog, accounts).await?;
    Progress::begin().until(&shop.requests_published(), before, count).await?;
    shop.stop("relay").await?;
    waiting_decided(bench, shop, backlog).await
}

/// In a shop whose payments and relay do not run: payments is started over the requests that lie on Kafka.
pub async fn waiting_decided(bench: &Bench, shop: &mut Shop<'_>, backlog: usize) -> Result<Decided> {
    let count = backlog as i64;
    bench.servers.checkpoint().await?;
    let decided = shop.decided().await?;
    let from = decided.read().await?;
    let (cpu, begun) = (shop.cpu(), Progress::begin());
    shop.start("payments").await?;
    let progress = begun.until(&decided, from, count).await?;
    let rate = Rate::new(progress.whole(), count as f64, &cpu, &shop.cpu());
    Ok(Decided { steady: progress.steady(), whole: progress.whole(), rate })
}

impl Figures {
    pub fn section(&self) -> Result<Section> {
        let mut section = Section { title: "Payments", ..Section::default() };
        let text = &mut section.text;
        let as_the_limit = self.series.iter().any(|series| series.accounts == LIMITS_SPREAD);
        writeln!(
            text,
            "{} requests lie on Kafka, in 12 partitions, payments is stopped. It is started; the rate `steady` is that from its first commit to its \
last, `whole` that from the process's start. Both take part in each round with the limit, which is measured before and after; the ratio is to the \
mean of the two. What is decided lies in the outbox then; in the first round the relay is started afterwards, and every order must end paid.\n\n\
`bare` is the same statements over our own schema: batches of the size that the consumer takes, made in memory over the same accounts and 12 \
partitions, are committed one after the other through the consumer's own inbox, on one connection, in a fresh database, with nothing else \
running. Only the commits are timed: reading, decoding and assembling is left out.\n\n\
`pay_batch_1000_c1` decides batches of 1 000 over {} accounts, so nearly each of its payments changes a row of its own; ours has 1 000 accounts, as the target was set, \
and batches of up to 4 000.{}\n",
            self.backlog,
            number(LIMITS_SPREAD as f64, 0),
            if as_the_limit { " The last line is over as many accounts as the limit has, for comparison." } else { "" }
        )?;
        writeln!(
            text,
            "| decisions/s | steady | whole | limit | steady/limit | whole/limit | bare | steady/bare |\n|---|---|---|---|---|---|---|---|"
        )?;
        for Series { accounts, turns, whole, bare } in &self.series {
            let steady = turns.ours.per_second();
            let over_bare = Spread::of(steady.each.iter().zip(&bare.0).map(|(ours, bare)| ours / bare.per_second));
            let (ratio, whole_ratio) = (turns.ratio(), turns.ratio_of(whole));
            writeln!(
                text,
                "| {} | {} | {} | `{}` {} | {} | {} | {} | {} |",
                named(*accounts),
                steady.show(0),
                whole.show(0),
                turns.limit_name,
                turns.limit.show(0),
                ratio.show(2),
                whole_ratio.show(2),
                bare.per_second().show(0),
                over_bare.show(2)
            )?;
            if *accounts == LIMITS_SPREAD {
                continue;
            }
            let figure = format!("payments, {}, steady", named(*accounts));
            let target = |name: String, bound, ratio: Spread| Target::median_at_least(name, bound, &ratio, 2, "");
            section.targets.push(target(format!("{figure}, over `{}`", turns.limit_name), 0.8, ratio));
            section.targets.push(target(format!("{figure}, over our own statements bare"), 0.95, over_bare));
        }
        writeln!(text, "\n| CPU us a decision | all | by process | bare: Postgres | bare: all |\n|---|---|---|---|---|")?;
        for Series { accounts, turns, bare, .. } in &self.series {
            let (all, by_process) = (turns.ours.cpu_us(&[]).show(1), turns.ours.by_process());
            let (server, whole) = (bare.cpu_us(&["postgres"]).show(1), bare.cpu_us(&[]).show(1));
            writeln!(text, "| {} | {all} | {by_process} | {server} | {whole} |", named(*accounts))?;
        }
        Ok(section)
    }
}
