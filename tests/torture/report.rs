//! What a run says: each round in a few lines, and the sum of them.

use std::collections::BTreeMap;
use std::time::Duration;

use super::model::Checked;
use super::round::{Outcome, Setting};

const VIOLATIONS_SHOWN_MAX: usize = 30;

#[derive(Default)]
pub struct Sum {
    pub rounds: usize,
    pub failed: Vec<u64>,
    faults: BTreeMap<&'static str, usize>,
    forged: BTreeMap<&'static str, usize>,
    checked: Checked,
    calls: usize,
    audits: [usize; 2],
    quiet_after: Vec<Duration>,
    ready_after: Vec<Duration>,
    took: Duration,
}

impl Sum {
    pub fn add(&mut self, setting: &Setting, outcome: &Outcome) {
        self.rounds += 1;
        if !outcome.violations.is_empty() {
            self.failed.push(setting.seed);
        }
        outcome.faults.iter().for_each(|fault| *self.faults.entry(fault.kind).or_default() += 1);
        outcome.forged.kinds.iter().for_each(|(kind, n)| *self.forged.entry(kind).or_default() += n);
        let (sum, one) = (&mut self.checked, &outcome.checked);
        sum.orders += one.orders;
        sum.finished += one.finished;
        sum.deposits += one.deposits;
        sum.indefinite += one.indefinite;
        sum.reads += one.reads;
        sum.ledger += one.ledger;
        sum.conflicts += one.conflicts;
        sum.foreign += one.foreign;
        sum.mismatches += one.mismatches;
        self.calls += outcome.calls;
        self.audits[0] += outcome.audits.iter().filter(|code| **code == 0).count();
        self.audits[1] += outcome.audits.iter().filter(|code| **code == 2).count();
        self.quiet_after.push(outcome.quiet_after);
        self.ready_after.push(outcome.ready_after);
        self.took += outcome.took;
    }

    /// Of what every run of the usual length has some and this one has none: where nothing was checked nothing is wrong.
    pub fn missing(&self) -> Vec<&'static str> {
        let sums = [
            ("rounds", self.rounds),
            ("orders", self.checked.orders),
            ("finished orders", self.checked.finished),
            ("deposits", self.checked.deposits),
            ("ledger entries", self.checked.ledger),
            ("reads", self.checked.reads),
            ("faults", self.faults.values().sum::<usize>()),
            ("forged records", self.forged.values().sum::<usize>()),
            ("true audits beside the load", self.audits[0]),
        ];
        sums.into_iter().filter(|(_, count)| *count == 0).map(|(what, _)| what).collect()
    }

    pub fn print(&self) {
        let faults: usize = self.faults.values().sum();
        let rate = self.checked.orders as f64 / self.took.as_secs_f64().max(1.0);
        println!("\n{} rounds in {:.0} s, {} failed", self.rounds, self.took.as_secs_f64(), self.failed.len());
        println!("  {} orders ({rate:.0}/s), {}", self.checked.orders, checked(&self.checked));
        println!("  {} calls, {} of them indefinite", self.calls, self.checked.indefinite);
        println!("  audits during faults: {} true, {} could not check", self.audits[0], self.audits[1]);
        println!("  ready after the last fault: {}; everything quiet: {}", spread(&self.ready_after), spread(&self.quiet_after));
        println!("  {faults} faults of {} kinds:", self.faults.len());
        self.faults.iter().for_each(|(kind, n)| println!("    {n:>6}  {kind}"));
        println!("  {} forged records:", self.forged.values().sum::<usize>());
        self.forged.iter().for_each(|(kind, n)| println!("    {n:>6}  {kind}"));
    }
}

fn checked(checked: &Checked) -> String {
    format!(
        "{} finished; {} deposits, {} ledger entries, {} foreign debits, {} reads, {} conflicts, {} reused keys checked",
        checked.finished, checked.deposits, checked.ledger, checked.foreign, checked.reads, checked.conflicts, checked.mismatches
    )
}

fn spread(times: &[Duration]) -> String {
    let mut times = times.to_vec();
    times.sort();
    let at = |n: usize| times.get(n).copied().unwrap_or_default().as_secs_f64();
    format!("median {:.1} s, at most {:.1} s", at(times.len() / 2), at(times.len().saturating_sub(1)))
}

/// One round; `every_fault` also those of a round where all is well.
pub fn print(setting: &Setting, outcome: &Outcome, every_fault: bool) {
    let Checked { orders, .. } = outcome.checked;
    println!(
        "seed {} for {} s: {orders} orders in {:.0} s, {}; {} faults; ready {:.1} s after the last, quiet {:.1} s; audits {:?}",
        setting.seed,
        setting.length.as_secs(),
        outcome.took.as_secs_f64(),
        checked(&outcome.checked),
        outcome.faults.len(),
        outcome.ready_after.as_secs_f64(),
        outcome.quiet_after.as_secs_f64(),
        outcome.audits,
    );
    if every_fault || !outcome.violations.is_empty() {
        for fault in &outcome.faults {
            let (at, took) = (fault.at.as_secs_f64(), fault.took.as_secs_f64());
            println!("  {at:>6.2} s  {} {} ({took:.2} s)", fault.kind, fault.what);
        }
    }
    if !outcome.violations.is_empty() {
        println!("VIOLATIONS of seed {}: {}", setting.seed, outcome.violations.len());
        outcome.violations.iter().take(VIOLATIONS_SHOWN_MAX).for_each(|violation| println!("  {violation}"));
    }
}
