//! Torture: the whole shop on real Kafka and Postgres, two replicas of each role, clients that write down what they are told,
//! and everything broken at random, by a seed. Afterwards what is there must agree with what was said (`model`), and
//! `shopd audit` must find nothing.
//!
//! Without variables it runs the rounds of `seeds.txt`, as a test. `make torture` sets `TORTURE_MINUTES`: then round after round
//! of a new seed until the time is up. `TORTURE_SEED` is the first seed; `TORTURE_SECONDS` how long each round breaks things;
//! `TORTURE_FAULTS=1` prints every fault, `TORTURE_GO_ON=1` goes on after a violation; `TORTURE_SHOPD` is another program to torture.

mod clients;
mod cluster;
mod forger;
mod history;
mod model;
mod nemesis;
mod plan;
mod replica;
mod report;
mod round;
#[path = "../it/support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster::Stores;
use round::{Outcome, Setting, round};

const SEEDS: &str = include_str!("seeds.txt");
const ROUND_SECONDS: u64 = 45;
/// The broker's log grows with each round, and so does what it looks through after a crash.
const ROUNDS_WITH_ONE_STORE: usize = 25;

fn main() -> ExitCode {
    // What cargo's own harness understands: a filter by name, and `--list`.
    let filters: Vec<String> = std::env::args().skip(1).collect();
    if filters.iter().any(|arg| arg == "--list") {
        println!("torture: test");
        return ExitCode::SUCCESS;
    }
    let names: Vec<_> = filters.iter().filter(|arg| !arg.starts_with('-')).collect();
    if !names.is_empty() && !names.iter().any(|name| "torture".contains(name.as_str())) {
        return ExitCode::SUCCESS;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        tokio::select! {
            code = run() => code,
            _ = tokio::signal::ctrl_c() => ExitCode::FAILURE,
        }
    })
}

async fn run() -> ExitCode {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .filter(|text| !text.is_empty())
            .map(|text| text.parse::<u64>().unwrap_or_else(|_| panic!("{name} is a whole number, not {text}")))
    };
    assert!(replica::knows_fault_points(), "{} was built without the feature faults", replica::shopd());
    let (minutes, seed, seconds) = (number("TORTURE_MINUTES"), number("TORTURE_SEED"), number("TORTURE_SECONDS"));
    let long = |seed| setting(seed, seconds.unwrap_or(ROUND_SECONDS));
    let given: Box<dyn Iterator<Item = Setting>> = match (minutes, seed) {
        (None, None) => Box::new(seeds()),
        (None, Some(seed)) => Box::new(std::iter::once(long(seed))),
        (Some(_), Some(seed)) => Box::new((seed..).map(long)),
        (Some(_), None) => Box::new(std::iter::repeat_with(move || long(u64::from(rand::random::<u32>())))),
    };
    let until = minutes.map(|minutes| Instant::now() + Duration::from_secs(60 * minutes));
    let every_fault = std::env::var("TORTURE_FAULTS").is_ok();
    let mut sum = report::Sum::default();
    let mut stores: Option<Arc<Stores>> = None;
    for setting in given {
        if until.is_some_and(|until| Instant::now() > until) {
            break;
        }
        if sum.rounds % ROUNDS_WITH_ONE_STORE == 0 {
            stop(stores.take()).await;
        }
        if stores.is_none() {
            stores = Some(Arc::new(Stores::start().await));
        }
        let Some(shared) = &stores else { continue };
        println!("seed {} begins", setting.seed);
        let dir = directory(setting.seed);
        let outcome = round(shared, setting, &dir).await;
        report::print(&setting, &outcome, every_fault);
        sum.add(&setting, &outcome);
        if outcome.violations.is_empty() {
            let _ = std::fs::remove_dir_all(&dir);
        } else {
            let kept = keep(&setting, &outcome, stores.take(), &dir).await;
            println!("logs and data are kept in {}; again: make torture SEED={}", kept.display(), setting.seed);
            if until.is_none_or(|_| std::env::var("TORTURE_GO_ON").is_err()) {
                break;
            }
        }
    }
    stop(stores).await;
    sum.print();
    let missing = sum.missing();
    if !missing.is_empty() {
        println!("FAILED: a check of nothing: no {}", missing.join(", no "));
    }
    if !sum.failed.is_empty() {
        println!("FAILED: seeds {:?}", sum.failed);
    }
    if missing.is_empty() && sum.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn setting(seed: u64, seconds: u64) -> Setting {
    // Some rounds break one thing after the other, some many at once.
    let gap = [500, 1_000, 1_500, 2_500][usize::try_from(seed % 4).unwrap_or_default()];
    Setting { seed, length: Duration::from_secs(seconds), gap: Duration::from_millis(gap), think: Duration::from_millis(35) }
}

fn seeds() -> impl Iterator<Item = Setting> {
    let lines = SEEDS.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines.map(|line| {
        let mut words = line.split_whitespace().map(|word| word.parse().expect("SEED SECONDS"));
        let mut word = || words.next().expect("SEED SECONDS");
        setting(word(), word())
    })
}

async fn stop(stores: Option<Arc<Stores>>) {
    let Some(stores) = stores.and_then(Arc::into_inner) else { return };
    for postgres in [stores.orders, stores.payments] {
        let _ = postgres.into_inner().server.stop(Duration::from_secs(20)).await;
    }
}

/// A round's own directory: the processes' logs, and the place where they run. Once this process has ended, they are ended too.
fn directory(seed: u64) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("shopd-torture-{}-{seed}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    let script = r#"
        while kill -0 "$1" 2>/dev/null && [ -d "$2" ]; do sleep 0.5; done
        for process in /proc/[0-9]*; do
            if [ "$(readlink "$process/cwd")" = "$2" ]; then kill -KILL "${process#/proc/}"; fi
        done 2>/dev/null
        rm -rf "$2"
    "#;
    let mut command = Command::new("sh");
    command.args(["-c", script, "watch"]).arg(std::process::id().to_string()).arg(&dir);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    drop(command.spawn().expect("sh"));
    dir
}

/// Stops the stores and puts what they hold where nobody cleans up.
async fn keep(setting: &Setting, outcome: &Outcome, stores: Option<Arc<Stores>>, dir: &Path) -> PathBuf {
    let kept = std::env::temp_dir().join(format!("shopd-torture-kept-{}-{}", setting.seed, std::process::id()));
    std::fs::create_dir_all(&kept).expect("a directory");
    let mut report = format!("{setting:?}\n");
    outcome.faults.iter().for_each(|fault| report.push_str(&format!("{fault:?}\n")));
    outcome.violations.iter().for_each(|violation| report.push_str(&format!("{violation}\n")));
    let _ = std::fs::write(kept.join("report.txt"), report);
    let _ = std::fs::rename(dir, kept.join("logs"));
    if let Some(stores) = stores.and_then(Arc::into_inner) {
        for (name, postgres) in [("orders", stores.orders), ("payments", stores.payments)] {
            let postgres = postgres.into_inner();
            let _ = postgres.server.stop(Duration::from_secs(20)).await;
            let _ = std::fs::rename(&postgres.dir, kept.join(name));
        }
        let broker = stores.broker.into_inner();
        broker.stop().await;
        let copied = Command::new("cp").arg("-r").arg(broker.dir()).arg(kept.join("kafka")).status();
        if !copied.is_ok_and(|status| status.success()) {
            println!("the broker's data could not be kept");
        }
    }
    kept
}
