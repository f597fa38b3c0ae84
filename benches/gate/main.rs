//! `make gate`: what the pure core costs in instructions, held against the limits of `limits.txt`. Part of `make test`.
//!
//! Runs itself under callgrind, once a case and each in a process of its own, so that no case sees what another left behind.
//! `ACCEPT=1` writes what was measured as the new limits. Words after the command choose cases by name.
//!
//! No harness stands between: all that is needed of callgrind is one option (count while one function runs) and the sum of a file.

mod callgrind;
#[path = "../micro/cases/mod.rs"]
mod cases;
mod limits;

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use callgrind::Cost;
use limits::{Finding, Limits, TOLERANCE_PERCENT};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["measure", name] => measure(name, 1),
        ["measure", name, TWICE] => measure(name, 2),
        _ => gate(&words),
    }
}

/// Makes a measured case do its work twice.
const TWICE: &str = "twice";

/// Under callgrind: the case once to warm up what is made once a process or thread, and `times` to count.
fn measure(name: &str, times: usize) -> Result<()> {
    let mut run = cases::all().into_iter().find(|case| case.name == name).ok_or("no such case")?.make();
    run();
    measured(&mut || (0..times).for_each(|_| run()));
    Ok(())
}

/// Callgrind counts from here to its end; it finds the function by its name.
#[inline(never)]
fn measured(run: &mut dyn FnMut()) {
    run();
    // Keeps the call above from becoming a jump that leaves this function for good.
    std::hint::black_box(());
}

fn gate(chosen: &[String]) -> Result<()> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/gate/limits.txt");
    let accept = std::env::var_os("ACCEPT").is_some_and(|accept| !accept.is_empty() && accept != "0");
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        println!("gate: the limits are of x86-64 Linux, where instructions are counted; nothing is measured here");
        return Ok(());
    }
    let begun = Instant::now();
    let measured = measure_all(chosen)?;
    let mut limits = limits::read(&std::fs::read_to_string(&file).unwrap_or_default())?;
    if !chosen.is_empty() {
        limits.retain(|name, _| chosen.iter().any(|word| name.contains(word.as_str())));
    }
    let findings = limits::compare(&limits, &measured.iter().map(|m| (m.name.to_owned(), m.cost)).collect());
    println!("{:<20} {:>12} {:>12} {:>13} {:>12}", "case", "instructions", "limit", "an operation", "allocations");
    for m in &measured {
        let limit = limits.get(m.name).map_or("none".to_owned(), |limit| limit.instructions.to_string());
        let each = m.cost.instructions / m.operations as u64;
        let mark = if findings[m.name].fails() { " <--" } else { "" };
        println!("{:<20} {:>12} {limit:>12} {each:>13} {:>12}{mark}", m.name, m.cost.instructions, m.cost.allocations);
    }
    println!("gate: {} cases in {:.0} s", measured.len(), begun.elapsed().as_secs_f32());
    if accept {
        return self::accept(&file, &measured);
    }
    tell(&findings, &measured)?;
    must_be_able_to_fail(&limits, &measured)
}

/// The negative control of every run: a case that does its work twice must be found out.
fn must_be_able_to_fail(limits: &Limits, measured: &[Measured]) -> Result<()> {
    let Some(Measured { name, .. }) = measured.first() else { return Err("no case has such a name".into()) };
    let dir = tempfile::Builder::new().prefix("shopd-gate-").tempdir()?;
    let cost = callgrind::run(&std::env::current_exe()?, &["measure", name, TWICE], &dir.path().join(name))?;
    let limits: Limits = limits.get(*name).map(|limit| ((*name).to_owned(), *limit)).into_iter().collect();
    match limits::compare(&limits, &Limits::from([((*name).to_owned(), cost)])).get(*name) {
        Some(Finding::Exceeded { .. }) => Ok(()),
        other => Err(format!("{name} did its work twice, at {} instructions, and passed: {other:?}", cost.instructions).into()),
    }
}

struct Measured {
    name: &'static str,
    operations: usize,
    cost: Cost,
}

/// Every chosen case, two at a time.
fn measure_all(chosen: &[String]) -> Result<Vec<Measured>> {
    let program = std::env::current_exe()?;
    let dir = tempfile::Builder::new().prefix("shopd-gate-").tempdir()?;
    let mut cases = cases::all();
    cases.retain(|case| chosen.is_empty() || chosen.iter().any(|word| case.name.contains(word.as_str())));
    let cases: Vec<(&'static str, usize)> = cases.iter().map(|case| (case.name, case.operations)).collect();
    let next = Mutex::new(cases.iter());
    let worker = || {
        let mut done = Vec::new();
        loop {
            let case = next.lock().map_err(|_| "the other worker panicked")?.next();
            let Some(&(name, operations)) = case else { return Ok(done) };
            let out: PathBuf = dir.path().join(name);
            let cost = callgrind::run(&program, &["measure", name], &out).map_err(|error| error.to_string())?;
            done.push(Measured { name, operations, cost });
        }
    };
    let halves: std::result::Result<Vec<Vec<Measured>>, String> = std::thread::scope(|scope| {
        let workers = [scope.spawn(worker), scope.spawn(worker)];
        workers.into_iter().map(|worker| worker.join().map_err(|_| "a worker panicked".to_owned())?).collect()
    });
    let mut measured: Vec<Measured> = halves?.into_iter().flatten().collect();
    measured.sort_by_key(|m| cases.iter().position(|(name, _)| *name == m.name));
    Ok(measured)
}

/// Writes what was measured as the limits; those of cases that were not chosen stay.
fn accept(file: &Path, measured: &[Measured]) -> Result<()> {
    let known: Vec<&str> = cases::all().iter().map(|case| case.name).collect();
    let mut limits: Limits = limits::read(&std::fs::read_to_string(file).unwrap_or_default())?;
    limits.retain(|name, _| known.contains(&name.as_str()));
    limits.extend(measured.iter().map(|m| (m.name.to_owned(), m.cost)));
    std::fs::write(file, limits::write(&limits))?;
    println!("gate: wrote {}", file.display());
    Ok(())
}

/// Names everything that is to be done about the findings, and fails where the gate is closed.
fn tell(findings: &std::collections::BTreeMap<String, Finding>, measured: &[Measured]) -> Result<()> {
    let cost = |name: &str| measured.iter().find(|m| m.name == name).map(|m| m.cost);
    for (name, finding) in findings {
        match (finding, cost(name)) {
            (Finding::Exceeded { limit }, Some(cost)) => {
                let percent = (cost.instructions as f64 / limit.instructions as f64 - 1.0) * 100.0;
                println!(
                    "gate: {name} costs {} instructions ({percent:+.1} % over a limit of {}, {TOLERANCE_PERCENT} % are allowed) and \
                     {} allocations (limit {})",
                    cost.instructions, limit.instructions, cost.allocations, limit.allocations
                );
            }
            (Finding::Cheaper { limit }, Some(cost)) => println!(
                "gate: {name} costs less than its limit: {} of {} instructions, {} of {} allocations; accept that, so that it is kept",
                cost.instructions, limit.instructions, cost.allocations, limit.allocations
            ),
            (Finding::Unlimited, _) => println!("gate: {name} has no limit"),
            (Finding::Gone, _) => println!("gate: {name} has a limit and is no case"),
            _ => {}
        }
    }
    let failed = findings.values().filter(|finding| finding.fails()).count();
    if failed > 0 {
        let how = "make it cheap again, or accept it by `make gate ACCEPT=1` and commit benches/gate/limits.txt with the reason";
        return Err(format!("{failed} cases do not keep their limits: {how}").into());
    }
    Ok(())
}
