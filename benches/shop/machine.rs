//! What the machine is, and what processes use of it.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// The program that is measured: the one that is shipped, where `make bench` has put it aside, else the one that Cargo built for the benchmark, with
/// what only tests use and without a profile.
pub fn program() -> PathBuf {
    std::env::var_os("SHOPD").map_or_else(|| env!("CARGO_BIN_EXE_shopd").into(), PathBuf::from)
}

/// User and system time of a process, and of every child of it that was waited for.
pub fn cpu(pid: u32) -> Duration {
    cpu_alone(pid) + cpu_of_gone_children(pid)
}

/// User and system time of a process alone, threads that have ended included, to the nanosecond.
pub fn cpu_alone(pid: u32) -> Duration {
    let clock = nix::time::clock_getcpuclockid(nix::unistd::Pid::from_raw(pid.cast_signed()));
    clock.and_then(nix::time::ClockId::now).map(Duration::from).unwrap_or_default()
}

fn cpu_of_gone_children(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after = stat.rsplit(") ").next().unwrap_or_default();
    let ticks: u64 = after.split(' ').skip(13).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    // USER_HZ is 100 on every Linux that user space sees.
    Duration::from_millis(ticks * 10)
}

/// Of a process and everything it started.
pub fn cpu_of_tree(root: u32) -> Duration {
    tree(root).into_iter().map(cpu).sum()
}

pub fn tree(root: u32) -> Vec<u32> {
    let mut found = vec![root];
    let parents: Vec<(u32, u32)> = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            let parent = stat.rsplit(") ").next()?.split(' ').nth(1)?.parse().ok()?;
            Some((pid, parent))
        })
        .collect();
    let mut at = 0;
    while at < found.len() {
        let of = found[at];
        found.extend(parents.iter().filter(|(_, parent)| *parent == of).map(|(pid, _)| *pid));
        at += 1;
    }
    found
}

/// Resident memory in bytes.
pub fn resident(pid: u32) -> u64 {
    memory(pid, "VmRSS:")
}

/// A line of a process's memory, in bytes; 0 where it is gone.
pub fn memory(pid: u32, line_name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status.lines().find_map(|line| line.strip_prefix(line_name)?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}

/// One line about the machine.
pub fn describe() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("unknown CPU", |(_, name)| name);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory =
        memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    // What follows the dash is its builder's.
    let kernel = kernel.trim().split('-').next().unwrap_or_default();
    format!("{cores} cores ({model}), {} GiB, Linux {kernel}", memory.unwrap_or_default().div_ceil(1024 * 1024))
}

/// Short, and marked where the tree differs from it in more than what benchmarks write; `unknown` outside a repository.
pub fn commit() -> String {
    let git = |arguments: &[&str]| {
        let said = Command::new("git").args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output().ok()?;
        said.status.success().then(|| String::from_utf8_lossy(&said.stdout).trim().to_owned())
    };
    let Some(short) = git(&["rev-parse", "--short=10", "HEAD"]) else { return "unknown".into() };
    let written = [":(exclude)docs/BENCHMARKS.md", ":(exclude)docs/benchmarks", ":(exclude)docs/PROXY_BENCHMARKS.md"];
    let changed = git(&[&["status", "--porcelain", "--untracked-files=no", "--", "."][..], &written].concat());
    if changed.is_some_and(|changed| changed.is_empty()) { short } else { format!("{short}-dirty") }
}
