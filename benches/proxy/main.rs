//! `make bench-proxy`: what the gateway costs a request beside nginx and HAProxy, each in front of the same upstream, in turns.
//!
//! Starts everything itself, on the loopback. CPU is that of a proxy's processes over a fixed number of requests; the load and the
//! upstream run in this process and count for nobody. Writes docs/PROXY_BENCHMARKS.md and its figures as JSON.
//! `QUICK=1` is a short run, `ONLY=shopd,nginx` measures these alone; neither writes a document. A proxy that is not installed is named
//! and left out.

mod contenders;
mod load;
#[path = "../shop/machine.rs"]
mod machine;
mod report;
mod upstream;

use std::time::Duration;

use contenders::{Contender, Started};
use load::{Ask, Load};
use report::{Figures, Sample, Series};

/// Keep-alive connections of the CPU figures and of the latency under load.
const CONNECTIONS: usize = 64;
/// Connections of the latency that a client of a quiet system sees.
const CONNECTIONS_QUIET: usize = 2;
/// Worker threads of every proxy; our own default.
const WORKERS: usize = 2;
/// The name of the way without a proxy.
const DIRECT: &str = "direct";

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// How much is measured.
#[derive(Clone, Copy)]
struct Plan {
    rounds: usize,
    /// At 64 connections, a round.
    requests: usize,
    /// At 2 connections, a round.
    requests_quiet: usize,
}

const PLAN: Plan = Plan { rounds: 7, requests: 20_000, requests_quiet: 3_000 };
const PLAN_QUICK: Plan = Plan { rounds: 3, requests: 8_000, requests_quiet: 1_000 };

fn main() -> Result<()> {
    // `cargo test` runs bench targets too, to see that they work; that is not the time to measure.
    if std::env::args().any(|arg| arg == "--test") || !std::env::args().any(|arg| arg == "--bench") {
        println!("proxy: run it by `make bench-proxy`");
        return Ok(());
    }
    let quick = std::env::var_os("QUICK").is_some_and(|quick| quick != "0");
    let only = std::env::var("ONLY").ok();
    let plan = if quick { PLAN_QUICK } else { PLAN };
    let (upstream, load) = (upstream::start()?, Load::new()?);
    let dir = tempfile::Builder::new().prefix("shopd-proxy-").tempdir()?;

    let (mut proxies, mut missing) = (Vec::new(), Vec::new());
    for contender in Contender::ALL {
        if only.as_ref().is_some_and(|only| !only.split(',').any(|name| name == contender.name())) {
            continue;
        }
        match contender.start(dir.path(), upstream, &load)? {
            Some(started) => proxies.push(started),
            None => missing.push(contender.name()),
        }
    }
    for name in &missing {
        eprintln!("bench: {name} is not installed; its column is left out");
    }
    let figures = measure(plan, upstream.to_string(), &load, proxies)?;
    report::write(&figures, &missing, only.is_none() && !quick)
}

fn measure(plan: Plan, upstream: String, load: &Load, proxies: Vec<Started>) -> Result<Figures> {
    for proxy in &proxies {
        ready(load, proxy)?;
    }
    let mut figures = Figures::new(plan, proxies.iter().map(Started::version).collect());
    for round in 0..plan.rounds {
        eprintln!("bench: round {} of {}", round + 1, plan.rounds);
        for ask in [Ask::Get, Ask::Post] {
            for (connections, requests) in [(CONNECTIONS, plan.requests), (CONNECTIONS_QUIET, plan.requests_quiet)] {
                let series = |name| Series { name, ask, connections };
                let direct = load.run(&upstream, ask.upstream(), connections, requests)?;
                figures.add(series(DIRECT), Sample::of(direct, requests, Duration::ZERO));
                // Each is the first now and then: what the one before leaves behind meets all of them.
                for proxy in proxies.iter().cycle().skip(round % proxies.len().max(1)).take(proxies.len()) {
                    let before = machine::cpu_of_tree(proxy.pid());
                    let ran = load.run(&proxy.address, ask.public(), connections, requests)?;
                    let cpu = machine::cpu_of_tree(proxy.pid()).saturating_sub(before);
                    figures.add(series(proxy.name), Sample::of(ran, requests, cpu));
                }
            }
        }
    }
    figures.resident = proxies.iter().map(|proxy| (proxy.name, proxy.resident_bytes())).collect();
    Ok(figures)
}

/// Answers, connections and caches warm.
fn ready(load: &Load, proxy: &Started) -> Result<()> {
    for ask in [Ask::Get, Ask::Post] {
        load.run(&proxy.address, ask.public(), CONNECTIONS, CONNECTIONS * 30)
            .map_err(|error| format!("{}: {error}", proxy.name))?;
    }
    Ok(())
}
