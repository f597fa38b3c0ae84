//! The limits: what each case may cost, as it is committed in `limits.txt`, and the comparison with what it does cost.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::callgrind::Cost;

/// How far above its limit a case may come, in per cent: hash maps begin with a random seed, and a compiler may inline otherwise.
pub const TOLERANCE_PERCENT: u64 = 5;

/// By the case's name.
pub type Limits = BTreeMap<String, Cost>;

/// What the comparison of one case came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    Within,
    /// So much cheaper that the limit guards nothing any more; no failure.
    Cheaper {
        limit: Cost,
    },
    Exceeded {
        limit: Cost,
    },
    /// A case without a limit.
    Unlimited,
    /// A limit without a case.
    Gone,
}

impl Finding {
    /// Whether the gate is closed by it.
    pub fn fails(&self) -> bool {
        matches!(self, Self::Exceeded { .. } | Self::Unlimited | Self::Gone)
    }
}

/// The finding on every case and every limit, by name.
pub fn compare(limits: &Limits, measured: &Limits) -> BTreeMap<String, Finding> {
    let gone = limits.keys().filter(|name| !measured.contains_key(*name)).map(|name| (name.clone(), Finding::Gone));
    let judged = measured.iter().map(|(name, cost)| (name.clone(), judge(limits.get(name), *cost)));
    judged.chain(gone).collect()
}

/// Instructions have a tolerance; allocations are the same in every run and have none.
fn judge(limit: Option<&Cost>, cost: Cost) -> Finding {
    let Some(&limit) = limit else { return Finding::Unlimited };
    let part = |percent: u64| limit.instructions.saturating_mul(percent) / 100;
    if cost.instructions > part(100 + TOLERANCE_PERCENT) || cost.allocations > limit.allocations {
        Finding::Exceeded { limit }
    } else if cost.instructions < part(100 - TOLERANCE_PERCENT) || cost.allocations < limit.allocations {
        Finding::Cheaper { limit }
    } else {
        Finding::Within
    }
}

/// Reads lines of `name instructions allocations`; a line that begins with `#` says something to people.
pub fn read(text: &str) -> Result<Limits, String> {
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    let limit = |line: &str| {
        let mut words = line.split_whitespace();
        let number = |words: &mut dyn Iterator<Item = &'_ str>| words.next()?.parse().ok();
        let name = words.next()?.to_owned();
        let cost = Cost { instructions: number(&mut words)?, allocations: number(&mut words)? };
        words.next().is_none().then_some((name, cost))
    };
    lines.map(|line| limit(line).ok_or_else(|| format!("no limit: {line:?}"))).collect()
}

/// The file's text.
pub fn write(limits: &Limits) -> String {
    let mut text = String::from(
        "# What each case of the pure core may cost in one run: instructions of our own, and allocations.\n\
         # Written by `make gate ACCEPT=1`; say in the commit why it may cost more. docs/PERFORMANCE.md tells how it is measured.\n",
    );
    for (name, cost) in limits {
        // Cannot fail: into memory.
        let _ = writeln!(text, "{name:<20} {:>10} {:>6}", cost.instructions, cost.allocations);
    }
    text
}
