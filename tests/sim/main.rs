//! A deterministic simulation: the real loops of consumers and relays and the real rules, over models of Postgres and Kafka, on one
//! thread and in virtual time. A seed makes a plan of orders, deposits and faults; the same seed gives the same history.
//!
//! `SEEDS=n cargo test --test sim` runs that many; `SEED=n` runs one and tells its history.

mod checks;
mod cluster;
mod controls;
mod effects;
mod inbox;
mod kafka;
mod outbox;
mod plan;
mod postgres;
mod run;
mod service;
mod sweeper;
mod tables;
mod world;

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use plan::Plan;
use run::run;
use world::{Event, Guard};

/// For as long as this where no number is given.
const BUDGET: Duration = Duration::from_secs(15);
/// In that time at least; a tenth of what a small machine makes.
const SEEDS_MIN: u64 = 200;
const SHRINK_TRIES: usize = 600;
const TAIL: usize = 60;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable} must be a number, not {text}")))
}

/// What an invariant's violation begins with: its number.
fn invariant(violation: &str) -> &str {
    violation.split(':').next().unwrap_or_default()
}

fn told(history: &[Event]) -> String {
    let mut text = String::new();
    for Event { at_ms, who, what, n } in history {
        // Into a string; it cannot fail.
        let _ = writeln!(text, "  {at_ms:>6} ms  process {who:>2}  {what} {n:?}");
    }
    text
}

/// The smallest plan that violates the same invariant, with the end of its history.
fn report(seed: u64, plan: &Plan, off: &[Guard], violation: &str) -> String {
    let same = |plan: &Plan| run(plan, off).violation.is_some_and(|found| invariant(&found) == invariant(violation));
    let small = plan::shrink(plan, SHRINK_TRIES, same);
    let ran = run(&small, off);
    let violation = ran.violation.unwrap_or_else(|| violation.to_owned());
    let mut text = format!(
        "seed {seed}: {violation}\n{} of {} acts remain, {:?} replicas, {} partitions, noise {}:\n",
        small.acts.len(),
        plan.acts.len(),
        small.replicas,
        small.partitions,
        small.noise
    );
    for (at, act) in &small.acts {
        let _ = writeln!(text, "  {at:>6} ms  {act:?}");
    }
    text + "the end of its history:\n" + &told(&ran.history[ran.history.len().saturating_sub(TAIL)..])
}

/// Runs seeds from `first` on, on every core, until one fails, `seeds` are done or the time is over.
fn search(first: u64, seeds: u64, budget: Duration, off: &[Guard]) -> (u64, Option<(u64, String)>) {
    let (next, found) = (AtomicU64::new(first), std::sync::Mutex::new(None::<(u64, String)>));
    let began = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while began.elapsed() < budget && found.lock().is_ok_and(|found| found.is_none()) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first.saturating_add(seeds) {
                        return;
                    }
                    if let Some(violation) = run(&Plan::of(seed), off).violation {
                        found.lock().expect("no holder of this lock panics").get_or_insert((seed, violation));
                    }
                }
            });
        }
    });
    let ran = next.into_inner().min(first.saturating_add(seeds)) - first;
    (ran, found.into_inner().expect("no holder of this lock panics"))
}

#[test]
fn no_seed_breaks_an_invariant() {
    if let Some(seed) = number("SEED") {
        let plan = Plan::of(seed);
        let ran = run(&plan, &[]);
        println!("{plan:#?}\n{}", told(&ran.history));
        assert!(ran.violation.is_none(), "{}", report(seed, &plan, &[], &ran.violation.unwrap_or_default()));
        return;
    }
    let (seeds, budget) = number("SEEDS").map_or((u64::MAX, BUDGET), |seeds| (seeds, Duration::MAX));
    let began = Instant::now();
    let (ran, found) = search(1, seeds, budget, &[]);
    println!("{ran} seeds in {:?}, {:.0} a minute", began.elapsed(), ran as f64 * 60.0 / began.elapsed().as_secs_f64());
    if let Some((seed, violation)) = found {
        panic!("{}", report(seed, &Plan::of(seed), &[], &violation));
    }
    assert!(ran >= seeds.clamp(1, SEEDS_MIN), "{ran} seeds only");
}

#[test]
fn the_same_seed_gives_the_same_history() {
    for seed in 1..=20 {
        let plan = Plan::of(seed);
        let (first, second) = (run(&plan, &[]), run(&plan, &[]));
        if first.fingerprint() != second.fingerprint() {
            let at = first.history.iter().zip(&second.history).position(|(a, b)| a != b).unwrap_or_default();
            let around = at.saturating_sub(5)..;
            let end = |h: &[Event]| told(&h[around.start..(at + 3).min(h.len())]);
            panic!("seed {seed} differs at {at}:\n{}\n{}", end(&first.history), end(&second.history));
        }
        assert!(first.history.len() > 50, "seed {seed} has hardly any history");
    }
}

/// Runs in which nothing happens would find nothing.
#[test]
fn the_seeds_bring_about_what_they_are_for() {
    let mut seen = std::collections::BTreeMap::<&str, u64>::new();
    // With what is told second: where that is whether it went well.
    let mut outcomes = std::collections::BTreeSet::<(&str, bool)>::new();
    for seed in 1..=200 {
        for event in run(&Plan::of(seed), &[]).history {
            *seen.entry(event.what).or_default() += 1;
            outcomes.insert((event.what, event.n[1] == 1));
        }
    }
    println!("{seen:#?}");
    for what in [
        "acknowledgement lost",
        "batch fenced",
        "cursor fenced",
        "dead letters",
        "decided by somebody else",
        "deposit; key, amount",
        "lock timeout",
        "offset out of range",
        "order accepted; xid, id",
        "order asked for again",
        "replica cut off from the log shares nothing",
        "result comes too late",
        "rows that committed late",
        "transaction ended for its silence",
    ] {
        assert!(seen.contains_key(what), "no seed brings about: {what}");
    }
    for outcome in [
        ("client heard", true),
        ("decided; paid", true),
        ("decided; paid", false),
        ("order ends; finished", true),
        ("order ends; finished", false),
    ] {
        assert!(outcomes.contains(&outcome), "no seed brings about: {outcome:?}");
    }
}

#[test]
fn different_seeds_give_different_histories() {
    let prints: std::collections::BTreeSet<u64> = (1..=20).map(|seed| run(&Plan::of(seed), &[]).fingerprint()).collect();
    assert_eq!(prints.len(), 20);
}
