//! CPU time so far, by process.

use std::collections::BTreeMap;
use std::time::Duration;

/// Of each role, of Postgres with all its processes, of Kafka.
#[derive(Clone, Debug, Default)]
pub struct Cpu(BTreeMap<&'static str, (u32, Duration)>);

impl Cpu {
    pub fn add(&mut self, name: &'static str, pid: u32, used: Duration) {
        self.0.insert(name, (pid, used));
    }

    /// The process of that name; of Postgres the one that began the others.
    pub fn pid(&self, name: &str) -> Option<u32> {
        self.0.get(name).map(|(pid, _)| *pid)
    }

    /// What each used since `before`; a process that was started since, all of it.
    pub fn since(&self, before: &Self) -> BTreeMap<String, Duration> {
        let used = |name: &str, pid: u32, now: Duration| match before.0.get(name) {
            Some((was, then)) if *was == pid => now.saturating_sub(*then),
            _ => now,
        };
        self.0.iter().map(|(name, (pid, now))| ((*name).to_owned(), used(name, *pid, *now))).collect()
    }
}
