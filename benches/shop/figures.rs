//! What a measurement comes to: medians with their spread, rates with what they cost, latencies, and a target beside what was measured.
//! Everything here is kept in the JSON and read back from it for the page.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::rig::Cpu;

/// One figure, measured several times.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Spread {
    pub each: Vec<f64>,
}

impl Spread {
    pub fn of(each: impl IntoIterator<Item = f64>) -> Self {
        Self { each: each.into_iter().collect() }
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.each.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }

    /// Not a number where nothing was measured: that meets no target.
    pub fn median(&self) -> f64 {
        let sorted = self.sorted();
        match sorted.len() {
            0 => f64::NAN,
            even if even % 2 == 0 => f64::midpoint(sorted[even / 2 - 1], sorted[even / 2]),
            odd => sorted[odd / 2],
        }
    }

    /// `median (least..greatest)`; the median alone where it was measured once.
    pub fn show(&self, decimals: usize) -> String {
        let sorted = self.sorted();
        let number = |value: f64| number(value, decimals);
        match sorted.as_slice() {
            [] => "-".into(),
            [one] => number(*one),
            [least, .., greatest] => format!("{} ({}..{})", number(self.median()), number(*least), number(*greatest)),
        }
    }
}

/// With thousands set apart.
pub fn number(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let digits = whole.trim_start_matches('-');
    let mut grouped = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) && digits.len() > 4 {
            grouped.push(' ');
        }
        grouped.push(digit);
    }
    format!("{}{grouped}{rest}", if value < 0.0 { "-" } else { "" })
}

/// Microseconds of CPU of one operation, by process.
pub type Cost = BTreeMap<String, f64>;

/// How much was done a second, once.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Rate {
    pub per_second: f64,
    pub cpu_us: Cost,
    /// Of the load itself, which shares the cores.
    #[serde(default)]
    pub load_us: f64,
}

impl Rate {
    pub fn new(per_second: f64, count: f64, before: &Cpu, after: &Cpu) -> Self {
        let cpu_us = after.since(before).into_iter().map(|(name, used)| (name, used.as_secs_f64() * 1e6 / count));
        Self { per_second, cpu_us: cpu_us.collect(), load_us: 0.0 }
    }

    pub fn loaded(mut self, cpu: Duration, count: f64) -> Self {
        self.load_us = cpu.as_secs_f64() * 1e6 / count;
        self
    }
}

/// The same rate, measured several times.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rates(pub Vec<Rate>);

impl Rates {
    pub fn per_second(&self) -> Spread {
        Spread::of(self.0.iter().map(|rate| rate.per_second))
    }

    /// Of these processes together; of all where none is named.
    pub fn cpu_us(&self, of: &[&str]) -> Spread {
        let is_of = |name: &String| of.is_empty() || of.contains(&name.as_str());
        let sum = |rate: &Rate| rate.cpu_us.iter().filter(|(name, _)| is_of(name)).map(|(_, us)| us).sum();
        Spread::of(self.0.iter().map(sum))
    }

    pub fn load_us(&self) -> Spread {
        Spread::of(self.0.iter().map(|rate| rate.load_us))
    }

    /// The median of each process, those that count.
    pub fn by_process(&self) -> String {
        let mut names: Vec<&str> = self.0.iter().flat_map(|rate| rate.cpu_us.keys()).map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        let costs = names.into_iter().map(|name| (name, self.cpu_us(&[name]).median())).filter(|(_, us)| *us >= 0.05);
        costs.map(|(name, us)| format!("{name} {us:.1}")).collect::<Vec<_>>().join(", ")
    }
}

/// Milliseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Latency {
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
    pub samples: u64,
}

impl Latency {
    /// From microseconds.
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        let max = histogram.max() as f64 / 1e3;
        Self { p50: at(0.5), p99: at(0.99), p999: at(0.999), max, samples: histogram.len() }
    }

    pub fn of_millis(mut millis: Vec<f64>) -> Self {
        millis.sort_by(f64::total_cmp);
        let at = |q: f64| millis.get(((millis.len().max(1) - 1) as f64 * q).round() as usize).copied().unwrap_or_default();
        Self { p50: at(0.5), p99: at(0.99), p999: at(0.999), max: at(1.0), samples: millis.len() as u64 }
    }

    /// Cells of a table: p50, p99, p99.9, greatest, samples.
    pub fn cells(&self) -> String {
        let n = |value| number(value, 2);
        format!("{} | {} | {} | {} | {}", n(self.p50), n(self.p99), n(self.p999), n(self.max), self.samples)
    }
}

/// Ours beside a limit, measured by turns: limit, ours, limit, ours, limit.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Turns {
    pub limit_name: String,
    /// One more than ours.
    pub limit: Spread,
    pub ours: Rates,
}

impl Turns {
    pub fn new(limit_name: &str) -> Self {
        Self { limit_name: limit_name.to_owned(), ..Self::default() }
    }

    /// Each of ours over the mean of the limit before and after it.
    pub fn ratio(&self) -> Spread {
        self.ratio_of(&self.ours.per_second())
    }

    /// Figures of the same turns over the limit.
    pub fn ratio_of(&self, figures: &Spread) -> Spread {
        let around = self.limit.each.windows(2).map(|two| f64::midpoint(two[0], two[1]));
        Spread::of(figures.each.iter().zip(around).map(|(ours, limit)| ours / limit))
    }
}

/// Which side of its bound a figure must be on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    AtLeast,
    AtMost,
}

/// What was asked for, beside what was measured.
#[derive(Clone, Debug)]
pub struct Target {
    pub figure: String,
    pub side: Side,
    pub bound: f64,
    pub measured: f64,
    /// As it is written on the page.
    pub shown: String,
    pub unit: &'static str,
    /// Run by run, where there were several.
    runs: Vec<f64>,
}

impl Target {
    pub fn at_least(figure: impl Into<String>, bound: f64, measured: f64, shown: String, unit: &'static str) -> Self {
        Self { figure: figure.into(), side: Side::AtLeast, bound, measured, shown, unit, runs: Vec::new() }
    }

    pub fn at_most(figure: impl Into<String>, bound: f64, measured: f64, shown: String, unit: &'static str) -> Self {
        Self { figure: figure.into(), side: Side::AtMost, bound, measured, shown, unit, runs: Vec::new() }
    }

    /// Of the median of several runs: where they lie on both sides of the bound it says so.
    pub fn median_at_least(figure: impl Into<String>, bound: f64, of: &Spread, decimals: usize, unit: &'static str) -> Self {
        Self { runs: of.each.clone(), ..Self::at_least(figure, bound, of.median(), of.show(decimals), unit) }
    }

    pub fn median_at_most(figure: impl Into<String>, bound: f64, of: &Spread, decimals: usize, unit: &'static str) -> Self {
        Self { runs: of.each.clone(), ..Self::at_most(figure, bound, of.median(), of.show(decimals), unit) }
    }

    fn holds(&self, value: f64) -> bool {
        match self.side {
            Side::AtLeast => value >= self.bound,
            Side::AtMost => value <= self.bound,
        }
    }

    pub fn is_met(&self) -> bool {
        self.holds(self.measured)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = if self.side == Side::AtLeast { "at least" } else { "at most" };
        let bound = number(self.bound, if self.bound.fract() == 0.0 { 0 } else { 2 });
        let (unit, met) = (self.unit, if self.is_met() { "yes" } else { "**no**" });
        let (in_runs, runs) = (self.runs.iter().filter(|run| self.holds(**run)).count(), self.runs.len());
        let divided = if in_runs == 0 || in_runs == runs { String::new() } else { format!(", in {in_runs} of {runs} runs") };
        write!(f, "| {} | {side} {bound}{unit} | {}{unit} | {met}{divided} |", self.figure, self.shown)
    }
}
