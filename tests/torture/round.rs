//! One round: a fresh shop, a load, faults, and then the question what is there.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use diesel::sql_types::BigInt;
use diesel_async::RunQueryDsl;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use shopd::db::{Db, sql};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::clients::{self, Load};
use super::cluster::{Cluster, Stores};
use super::forger::{self, Forged};
use super::history::History;
use super::model::{self, Checked};
use super::nemesis::{Done, Nemesis};
use super::plan::plan;
use super::support::shop::poll;

/// Until every order is final and everything is published and read.
const QUIET_WITHIN: Duration = Duration::from_secs(120);
const CLIENTS: u64 = 14;

/// What makes a round what it is.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    pub seed: u64,
    /// How long faults are made.
    pub length: Duration,
    /// From one fault to the next, on average.
    pub gap: Duration,
    /// What a client waits between two calls, on average.
    pub think: Duration,
}

#[derive(Default)]
pub struct Outcome {
    pub violations: Vec<String>,
    pub faults: Vec<Done>,
    pub forged: Forged,
    pub checked: Checked,
    pub calls: usize,
    /// Exit statuses of the audits during faults.
    pub audits: Vec<i32>,
    /// From the end of the last fault.
    pub ready_after: Duration,
    pub quiet_after: Duration,
    pub took: Duration,
}

pub async fn round(stores: &Arc<Stores>, setting: Setting, dir: &Path) -> Outcome {
    let since = Instant::now();
    let mut outcome = Outcome::default();
    let cluster = Arc::new(Cluster::start(stores, setting.seed, dir).await);
    let mut rng = StdRng::seed_from_u64(setting.seed ^ 0x0c11e175);
    let mut history = History::default();
    let load = Load::new(&cluster, &mut rng);
    load.begin(&mut history.calls).await;
    let load = Arc::new(load);

    let mut running = JoinSet::new();
    for _ in 0..CLIENTS {
        running.spawn(clients::run(load.clone(), rng.random(), setting.think));
    }
    let forging = tokio::spawn(forger::run(cluster.kafka.clone(), load.clone(), rng.random()));
    let auditing = tokio::spawn(audits(cluster.clone(), setting.length));
    let nemesis = Arc::new(Nemesis::new(stores.clone(), cluster.clone(), setting.length));
    nemesis.clone().run(plan(setting.seed, setting.length, setting.gap, cluster.lease)).await;
    let healed = Instant::now();
    let ready = cluster.ready().await;
    outcome.ready_after = healed.elapsed();
    load.stop.store(true, Ordering::Relaxed);
    for calls in running.join_all().await {
        history.calls.extend(calls);
    }
    outcome.calls = history.calls.len();
    (outcome.faults, outcome.violations) = nemesis.report();
    outcome.violations.extend(ready.err());
    match forging.await {
        Ok(forged) => outcome.forged = forged,
        Err(error) => outcome.violations.push(format!("harness: the forger broke down: {error}")),
    }
    history.foreign = outcome.forged.debits.clone();
    match auditing.await {
        Ok((statuses, wrong)) => {
            outcome.audits = statuses;
            outcome.violations.extend(wrong);
        }
        Err(error) => outcome.violations.push(format!("harness: the audits broke down: {error}")),
    }

    match quiet(&cluster).await {
        Ok(()) => outcome.quiet_after = healed.elapsed(),
        Err(wrong) => outcome.violations.push(wrong),
    }
    match clients::end(&load).await {
        Ok(end) => {
            let verdict = model::check(&history, &end);
            outcome.checked = verdict.checked;
            outcome.violations.extend(verdict.violations);
        }
        Err(wrong) => outcome.violations.push(format!("the end cannot be read: {wrong}")),
    }
    let (code, said) = cluster.command(&["audit", "--json"]).await;
    if code != Some(0) {
        outcome.violations.push(format!("the audit at the end exits {code:?}: {said}"));
    }
    outcome.violations.extend(panics(dir));
    if !outcome.violations.is_empty() {
        history.calls.sort_by_key(|call| call.begun);
        let calls: Vec<String> = history.calls.iter().map(ToString::to_string).collect();
        // For whoever looks into it; the violations are told anyway.
        let _ = std::fs::write(dir.join("history.txt"), calls.join("\n"));
    }
    drop((load, nemesis));
    match Arc::try_unwrap(cluster) {
        Ok(cluster) if outcome.violations.is_empty() => cluster.remove(stores).await,
        _ => {}
    }
    outcome.took = since.elapsed();
    outcome
}

/// Audits while things break: what is on its way is no offence. They may find that they cannot check. Where neither could, more follow until
/// one can, which is when nothing is broken any more at the latest.
async fn audits(cluster: Arc<Cluster>, length: Duration) -> (Vec<i32>, Vec<String>) {
    let (mut statuses, mut wrong) = (Vec::<i32>::new(), Vec::new());
    let since = Instant::now();
    let mut pauses = [length.mul_f64(0.35), length.mul_f64(0.3)].into_iter();
    loop {
        match pauses.next() {
            Some(pause) => sleep(pause).await,
            None if !statuses.contains(&0) && wrong.is_empty() && since.elapsed() < length + QUIET_WITHIN => poll().await,
            None => return (statuses, wrong),
        }
        let (code, said) = cluster.command(&["audit", "--json"]).await;
        match code {
            Some(code @ (0 | 2)) => statuses.push(code),
            _ => wrong.push(format!("an audit during faults exits {code:?}: {said}")),
        }
    }
}

/// Waits until every order has ended, the outboxes are empty, and everything on the log is read.
async fn quiet(cluster: &Cluster) -> Result<(), String> {
    let since = Instant::now();
    loop {
        let last = match unfinished(cluster).await {
            Ok(None) => return Ok(()),
            Ok(Some(what)) => what,
            Err(error) => error,
        };
        if since.elapsed() > QUIET_WITHIN {
            return Err(format!("L1: not quiet {QUIET_WITHIN:?} after the last fault: {last}"));
        }
        poll().await;
    }
}

async fn unfinished(cluster: &Cluster) -> Result<Option<String>, String> {
    let (orders, payments) = (&cluster.orders, &cluster.payments);
    for (db, statement, what) in [
        (orders, "select count(*) as n from orders where status not in ('Finished', 'Cancelled')", "orders have not ended"),
        (orders, "select count(*) as n from outbox", "rows are in orders' outbox"),
        (payments, "select count(*) as n from outbox", "rows are in payments' outbox"),
    ] {
        let n = count(db, statement).await?;
        if n > 0 {
            return Ok(Some(format!("{n} {what}")));
        }
    }
    let read = "select coalesce(sum(next_offset), 0)::bigint as n from consumer_offset";
    let (requests, results) = cluster.log_ends().await?;
    for (db, end, what) in [(payments, requests, "requests"), (orders, results, "results")] {
        let read = count(db, read).await?;
        if read != end {
            return Ok(Some(format!("{read} of {end} {what} are read")));
        }
    }
    Ok(None)
}

async fn count(db: &Db, statement: &'static str) -> Result<i64, String> {
    #[derive(diesel::QueryableByName)]
    struct Count {
        #[diesel(sql_type = BigInt)]
        n: i64,
    }
    let mut conn = db.get().await.map_err(|error| error.to_string())?;
    let counted = sql(statement).get_result::<Count>(&mut *conn).await;
    counted.map(|counted| counted.n).map_err(|error| error.to_string())
}

/// No process of ours may panic, whatever breaks.
fn panics(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
        let panicked = text.lines().filter(|line| line.contains("panicked at"));
        found.extend(panicked.take(3).map(|line| format!("{} panicked: {line}", entry.path().display())));
    }
    found
}
