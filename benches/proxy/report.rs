//! docs/PROXY_BENCHMARKS.md and the same figures as JSON.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::load::{Ask, Ran};
use super::{CONNECTIONS, CONNECTIONS_QUIET, DIRECT, Plan, Result, WORKERS, machine};

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Series {
    pub name: &'static str,
    pub ask: Ask,
    pub connections: usize,
}

/// One round of a series.
pub struct Sample {
    pub cpu_us: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub per_second: f64,
}

impl Sample {
    pub fn of(ran: Ran, requests: usize, cpu: Duration) -> Self {
        let mut micros: Vec<f64> = ran.latencies.iter().map(|latency| latency.as_secs_f64() * 1e6).collect();
        micros.sort_by(f64::total_cmp);
        let at = |q: f64| micros.get(((micros.len().max(1) - 1) as f64 * q).round() as usize).copied().unwrap_or_default();
        let cpu_us = cpu.as_secs_f64() * 1e6 / requests as f64;
        Self { cpu_us, p50_us: at(0.5), p99_us: at(0.99), per_second: requests as f64 / ran.elapsed.as_secs_f64() }
    }
}

pub struct Figures {
    plan: Plan,
    measured_at: String,
    commit: String,
    proxies: Vec<(&'static str, String)>,
    samples: BTreeMap<Series, Vec<Sample>>,
    pub resident: Vec<(&'static str, u64)>,
}

/// Median, least and greatest.
struct Spread(f64, f64, f64);

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let at = |n: usize| values.get(n).copied().unwrap_or_default();
        Self(at(values.len() / 2), at(0), at(values.len().saturating_sub(1)))
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.0} ({:.0}..{:.0})", self.0, self.1, self.2)
    }
}

impl Figures {
    pub fn new(plan: Plan, proxies: Vec<(&'static str, String)>) -> Self {
        let measured_at = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
        Self { plan, measured_at, commit: machine::commit(), proxies, samples: BTreeMap::new(), resident: Vec::new() }
    }

    pub fn add(&mut self, series: Series, sample: Sample) {
        self.samples.entry(series).or_default().push(sample);
    }

    fn each(&self, series: Series) -> &[Sample] {
        self.samples.get(&series).map(Vec::as_slice).unwrap_or_default()
    }

    fn cpu(&self, name: &'static str, ask: Ask) -> Spread {
        Spread::of(self.each(Series { name, ask, connections: CONNECTIONS }).iter().map(|sample| sample.cpu_us))
    }

    /// What a proxy adds to the direct way, round by round.
    fn added(&self, name: &'static str, ask: Ask, connections: usize, of: fn(&Sample) -> f64) -> Spread {
        let series = |name| Series { name, ask, connections };
        let pairs = self.each(series(name)).iter().zip(self.each(series(DIRECT)));
        Spread::of(pairs.map(|(through, direct)| of(through) - of(direct)))
    }

    /// The median over the rounds of our CPU over another's in the same round: what the neighbours on the machine do falls on both.
    fn ratio(&self, name: &'static str, to: &'static str, ask: Ask) -> Option<Spread> {
        let series = |name| Series { name, ask, connections: CONNECTIONS };
        let (ours, theirs) = (self.each(series(name)), self.each(series(to)));
        let ratios = || ours.iter().zip(theirs).map(|(ours, theirs)| ours.cpu_us / theirs.cpu_us);
        (name != to && ratios().count() > 0).then(|| Spread::of(ratios()))
    }

    fn table(&self) -> Result<String> {
        let mut text = String::from(
            "| CPU us a request, 64 connections | GET | POST | GET over nginx | POST over nginx |\n|---|---|---|---|---|\n",
        );
        for (name, _) in &self.proxies {
            let over = |ask| self.ratio(name, "nginx", ask).map_or("".into(), |Spread(m, a, b)| format!("{m:.2} ({a:.2}..{b:.2})"));
            writeln!(
                text,
                "| {name} | {} | {} | {} | {} |",
                self.cpu(name, Ask::Get),
                self.cpu(name, Ask::Post),
                over(Ask::Get),
                over(Ask::Post)
            )?;
        }
        for connections in [CONNECTIONS_QUIET, CONNECTIONS] {
            writeln!(
                text,
                "\n| added latency us, {connections} connections | GET p50 | GET p99 | POST p50 | POST p99 |\n|---|---|---|---|---|"
            )?;
            let direct =
                |ask, of: fn(&Sample) -> f64| Spread::of(self.each(Series { name: DIRECT, ask, connections }).iter().map(of));
            let row = |at: &dyn Fn(Ask, fn(&Sample) -> f64) -> Spread| {
                let cells = [Ask::Get, Ask::Post].map(|ask| format!("{} | {}", at(ask, |s| s.p50_us), at(ask, |s| s.p99_us)));
                cells.join(" | ")
            };
            writeln!(text, "| the upstream itself, whole | {} |", row(&direct))?;
            for (name, _) in &self.proxies {
                writeln!(text, "| {name} | {} |", row(&|ask, of| self.added(name, ask, connections, of)))?;
            }
        }
        writeln!(text, "\n| resident memory after it | |\n|---|---|")?;
        for (name, bytes) in &self.resident {
            writeln!(text, "| {name} | {:.1} MiB |", *bytes as f64 / 1024.0 / 1024.0)?;
        }
        Ok(text)
    }

    fn json(&self, whole: bool) -> serde_json::Value {
        let series = self.samples.iter().map(|(series, samples)| {
            let of = |of: fn(&Sample) -> f64| samples.iter().map(of).collect::<Vec<_>>();
            json!({
                "proxy": series.name, "request": series.ask.name(), "connections": series.connections,
                "cpu_us": of(|s| s.cpu_us), "p50_us": of(|s| s.p50_us), "p99_us": of(|s| s.p99_us), "per_second": of(|s| s.per_second),
            })
        });
        json!({
            "measured_at": self.measured_at,
            "commit": self.commit,
            // Neither a short run nor one of some proxies alone.
            "whole": whole,
            "machine": machine::describe(),
            "workers": WORKERS,
            "requests_a_round": self.plan.requests,
            "versions": self.proxies.iter().map(|(name, version)| (*name, version)).collect::<BTreeMap<_, _>>(),
            "resident_bytes": self.resident.iter().copied().collect::<BTreeMap<_, _>>(),
            "series": series.collect::<Vec<_>>(),
        })
    }
}

/// The table to standard output, the JSON under target/, and, where `document`, the page and its JSON in docs/.
pub fn write(figures: &Figures, missing: &[&str], document: bool) -> Result<()> {
    let table = figures.table()?;
    println!("{table}");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().ok_or("no target folder")?;
    let json = serde_json::to_string_pretty(&figures.json(document))?;
    std::fs::write(target.join("proxy_benchmarks.json"), &json)?;
    if !document {
        return Ok(());
    }
    let versions: Vec<_> = figures.proxies.iter().map(|(name, version)| format!("{name} {version}")).collect();
    let missing = if missing.is_empty() { String::new() } else { format!(" Not installed, so left out: {}.", missing.join(", ")) };
    let text = format!(
        "# The gateway beside nginx and HAProxy

Written by `make bench-proxy`, {}, commit {}. Release build. {}, each with {WORKERS} workers, in front of the same upstream, on the
loopback of one machine: {}.{missing}

Each of {} rounds asks one after the other {} times over {CONNECTIONS} keep-alive connections, then {} times over {CONNECTIONS_QUIET}:
`GET /api/OrdersProxy/{{id}}`, answered 200 with an order of 240 bytes, and `POST /api/OrdersProxy` with a body of 114 bytes, answered 201
with the same. Every proxy rewrites the prefix, writes the forwarding headers and `Via`, takes or makes a request id and returns it; the
gateway also continues the trace, counts and times each request, and keeps a request's deadline. CPU is user and system time of all
of a proxy's processes. Figures are the median over the rounds, with the least and the greatest; the load, the upstream and the proxies share
the cores, so times are worth less than their ratios.

{table}",
        figures.measured_at,
        figures.commit,
        versions.join(", "),
        machine::describe(),
        figures.plan.rounds,
        figures.plan.requests,
        figures.plan.requests_quiet,
    );
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    std::fs::write(docs.join("PROXY_BENCHMARKS.md"), text)?;
    std::fs::write(docs.join("benchmarks/proxy_benchmarks.json"), json)?;
    Ok(())
}
