//! At rest: what each role and `all` use while nobody asks for anything, how fast they are there, and how big they are.

use std::fmt::Write;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::super::figures::{Spread, Target};
use super::super::load::{self, Load};
use super::super::report::Section;
use super::super::rig::{Cpu, ROLES, Shop, all_in_one};
use super::super::{Bench, Result, machine, settle, step};
use super::SPREAD;
use super::intake::{self, THROUGH_GATEWAY};

const STARTS: usize = 5;
const CONNECTIONS: usize = 64;
/// What a start leaves behind is done by then.
const SETTLED: Duration = Duration::from_secs(3);
/// Far more than the accounts take.
const LOAD_BOUND: Duration = Duration::from_secs(60);
const MIB: f64 = 1024.0 * 1024.0;

#[derive(Debug, Serialize, Deserialize)]
pub struct Figures {
    idle_seconds: f64,
    roles: Vec<Resting>,
    all: Resting,
    /// Milliseconds of CPU a second that the idle roles, or `all`, make their database server and their broker use.
    servers_ms: f64,
    all_server_ms: f64,
    /// Milliseconds.
    all_ready: Spread,
    binary_bytes: u64,
}

/// A process.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Resting {
    name: String,
    /// Milliseconds of CPU a second.
    idle_ms: f64,
    idle_bytes: u64,
    /// Its most while and after orders came in as fast as they are taken.
    loaded_bytes: u64,
    /// From the process's start, milliseconds.
    listening: Spread,
}

pub async fn measure(bench: &Bench) -> Result<Figures> {
    let (idle, loaded) = (bench.options.time(4, 30), bench.options.time(2, 15));
    let mut shop = Shop::open(&bench.servers, &ROLES).await?;
    let mut roles: Vec<Resting> = ROLES.map(|name| Resting { name: name.into(), ..Resting::default() }).into();

    step("rest: starts");
    for resting in &mut roles {
        for _ in 0..STARTS {
            let name = ROLES.into_iter().find(|name| *name == resting.name).ok_or("a role")?;
            shop.stop(name).await?;
            let started = shop.start(name).await?;
            resting.listening.each.push(started.listening_after.as_secs_f64() * 1e3);
            started.ready().await?;
        }
    }
    step("rest: four idle roles");
    settle(SETTLED).await;
    let (cpu, since) = (shop.cpu(), Instant::now());
    settle(idle).await;
    let (used, seconds) = (shop.cpu().since(&cpu), since.elapsed().as_secs_f64());
    let ms = |name: &str| used.get(name).map_or(0.0, |used| used.as_secs_f64() * 1e3 / seconds);
    let servers_ms = ms("postgres") + ms("kafka");
    let pids = shop.pids();
    let pid = |name: &str| pids.iter().find(|(role, _)| *role == name).map_or(0, |(_, pid)| *pid);
    for resting in &mut roles {
        resting.idle_ms = ms(&resting.name);
        resting.idle_bytes = machine::resident(pid(&resting.name));
    }
    step("rest: after orders came in through the gateway");
    shop.accounts(SPREAD).await?;
    intake::accepted(&shop, THROUGH_GATEWAY, CONNECTIONS, loaded).await?;
    shop.all_final().await?;
    for resting in &mut roles {
        resting.loaded_bytes = machine::memory(pid(&resting.name), "VmHWM:");
    }
    shop.close().await?;

    let (all, all_ready, all_server_ms) = all(idle, loaded).await?;
    let binary_bytes = std::fs::metadata(machine::program())?.len();
    Ok(Figures { idle_seconds: seconds, roles, all, servers_ms, all_server_ms, all_ready, binary_bytes })
}

/// Accounts, and orders as fast as they are taken.
async fn place(gateway: &str, time: Duration) -> Result<()> {
    let open: load::Requests = (0..SPREAD).map(|n| load::post(&format!("/api/PaymentsProxy/u{n}"), "", "")).collect();
    let deposit = |n| load::post(&format!("/api/PaymentsProxy/u{n}/deposit"), "", "1000000");
    for requests in [open, (0..SPREAD).map(deposit).collect()] {
        Load::counted(gateway, requests, CONNECTIONS, SPREAD, LOAD_BOUND).run_accepted().await?;
    }
    Load::closed(gateway, load::orders("/api/OrdersProxy", "", SPREAD), CONNECTIONS, time).run_accepted().await?;
    settle(SETTLED).await;
    Ok(())
}

/// `shopd all` on its embedded default: warm starts, idle, and under load for `loaded`.
async fn all(idle: Duration, loaded: Duration) -> Result<(Resting, Spread, f64)> {
    step("rest: `shopd all`");
    let dir = tempfile::Builder::new().prefix("shopd-bench-").tempdir()?;
    let mut all = Resting { name: "all".into(), ..Resting::default() };
    let (mut ready, mut server_ms) = (Spread::default(), 0.0);
    // The first one makes everything; it is not warm.
    for round in 0..=STARTS {
        let since = Instant::now();
        let started = all_in_one(&dir.path().join("data")).await?;
        started.ready().await?;
        if round > 0 {
            ready.each.push(since.elapsed().as_secs_f64() * 1e3);
            all.listening.each.push(started.listening_after.as_secs_f64() * 1e3);
        }
        if round == STARTS {
            settle(SETTLED).await;
            let own = |pid| {
                let mut cpu = Cpu::default();
                cpu.add("all", pid, machine::cpu_alone(pid));
                cpu.add("tree", pid, machine::cpu_of_tree(pid));
                cpu
            };
            let (cpu, since) = (own(started.pid), Instant::now());
            settle(idle).await;
            let (used, seconds) = (own(started.pid).since(&cpu), since.elapsed().as_secs_f64());
            let ms = |name: &str| used.get(name).map_or(0.0, |used| used.as_secs_f64() * 1e3 / seconds);
            all.idle_ms = ms("all");
            server_ms = ms("tree") - ms("all");
            all.idle_bytes = machine::resident(started.pid);
            step("rest: orders come in at `shopd all`");
            place(&started.address, loaded).await?;
            all.loaded_bytes = machine::memory(started.pid, "VmHWM:");
        }
        started.stop().await?;
    }
    Ok((all, ready, server_ms))
}

impl Figures {
    pub fn section(&self) -> Result<Section> {
        let mut section = Section { title: "At rest", ..Section::default() };
        let text = &mut section.text;
        writeln!(
            text,
            "CPU and memory over {:.0} s in which nobody asks for anything, with Kafka and Postgres there. Under load: the most resident memory (`VmHWM`) that a role had while orders came in \
through the gateway over {CONNECTIONS} connections as fast as they were taken, until all were final. Listening: from the process's start until it says where it listens. `all` has its own Postgres, \
warm, which counts apart.\n",
            self.idle_seconds
        )?;
        writeln!(text, "| | idle CPU ms/s | resident MiB idle | under load | listening after ms |\n|---|---|---|---|---|")?;
        let mib = |bytes: u64| bytes as f64 / MIB;
        for resting in self.roles.iter().chain([&self.all]) {
            let Resting { name, idle_ms, idle_bytes, loaded_bytes, listening } = resting;
            let loaded = if *loaded_bytes > 0 { format!("{:.1}", mib(*loaded_bytes)) } else { "-".into() };
            writeln!(text, "| {name} | {idle_ms:.2} | {:.1} | {loaded} | {} |", mib(*idle_bytes), listening.show(0))?;
        }
        writeln!(
            text,
            "\nThe four idle roles make Postgres and Kafka use {:.1} ms/s together (what these use by themselves with it), `all` its own Postgres {:.1}. \
`all` is ready after {} ms. The binary has {:.1} MiB.",
            self.servers_ms,
            self.all_server_ms,
            self.all_ready.show(0),
            mib(self.binary_bytes)
        )?;
        let most = |of: fn(&Resting) -> f64| self.roles.iter().map(of).fold(0.0, f64::max);
        let idle = self.roles.iter().map(|resting| resting.idle_ms).sum::<f64>();
        let target = |figure: &str, bound, value: f64, decimals: usize, unit| {
            Target::at_most(figure, bound, value, format!("{value:.decimals$}"), unit)
        };
        let listening = self.roles.iter().map(|resting| resting.listening.median()).fold(0.0, f64::max);
        section.targets.extend([
            target("at rest, the largest idle role", 30.0, most(|resting| mib_of(resting.idle_bytes)), 1, " MiB"),
            target("the largest role under load", 80.0, most(|resting| mib_of(resting.loaded_bytes)), 1, " MiB"),
            target("at rest, CPU of all four roles", 5.0, idle, 2, " ms/s"),
            target("at rest, CPU of `all`", 5.0, self.all.idle_ms, 2, " ms/s"),
            target("at rest, `all` idle", 30.0, mib(self.all.idle_bytes), 1, " MiB"),
            target("start to listening, the slowest role", 100.0, listening, 0, " ms"),
            target("start to listening, `all`", 100.0, self.all.listening.median(), 0, " ms"),
            target("the stripped binary", 30.0, mib(self.binary_bytes), 1, " MiB"),
        ]);
        if self.all.loaded_bytes > 0 {
            section.targets.push(target("`all` under load", 80.0, mib(self.all.loaded_bytes), 1, " MiB"));
        }
        Ok(section)
    }
}

fn mib_of(bytes: u64) -> f64 {
    bytes as f64 / MIB
}
