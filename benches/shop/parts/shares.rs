//! Shares of the cores by service, as docs/OPERATIONS.md recommends them, for as long as it is measured with them.

use std::path::{Path, PathBuf};
use std::{fs, io, process};

use super::super::rig::Cpu;
use super::super::{Result, machine};
use super::host::mounts;

/// How much of the cores a service gets where several want them; a share of 1 is what the kernel gives a group by itself.
const SHARES: [(&str, u64); 6] = [("postgres", 8), ("kafka", 4), ("orders", 3), ("gateway", 2), ("payments", 2), ("relay", 1)];
/// A process may begin another one while the group's are listed.
const TRIES: usize = 100;

/// The kernel's controller of the cores (cgroups(7)), of the older version or the newer.
struct Controller {
    root: PathBuf,
    /// Of a group, and what stands there by itself.
    file: &'static str,
    one: u64,
    /// The group of this process, to which those it started belong.
    own: PathBuf,
}

impl Controller {
    /// Nothing where the kernel has none, or nobody has asked it for groups of the cores.
    fn find() -> Option<Self> {
        let found = mounts().into_iter().find_map(|mount| {
            let has = |file: &str| {
                fs::read_to_string(mount.point.join(file)).is_ok_and(|list| list.split_whitespace().any(|it| it == "cpu"))
            };
            match mount.kind.as_str() {
                "cgroup" if mount.options.iter().any(|option| option == "cpu") => Some((mount.point, "cpu.shares", 1024)),
                "cgroup2" if has("cgroup.subtree_control") => Some((mount.point, "cpu.weight", 100)),
                _ => None,
            }
        });
        let (root, file, one) = found?;
        let newer = file == "cpu.weight";
        // number:controllers:path, the newer version's without controllers.
        let own = fs::read_to_string("/proc/self/cgroup").ok()?.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            let mine = if newer { controllers.is_empty() } else { controllers.split(',').any(|it| it == "cpu") };
            mine.then(|| root.join(path.trim_start_matches('/')))
        })?;
        Some(Self { root, file, one, own })
    }
}

/// The services in groups of their own, until this is dropped.
pub struct Shares {
    controller: Controller,
    groups: Vec<PathBuf>,
}

impl Shares {
    /// For what runs. Nothing where the kernel has no such groups.
    ///
    /// # Errors
    /// Where this process may not make a group.
    pub fn give(running: &Cpu) -> Result<Option<Self>> {
        let Some(controller) = Controller::find() else { return Ok(None) };
        let mut shares = Self { controller, groups: Vec::new() };
        for (name, share) in SHARES {
            let group = shares.controller.root.join(format!("shopd-bench-{}-{name}", process::id()));
            let made = |error: io::Error| format!("TUNE_HOST: {}: {error}", group.display());
            fs::create_dir(&group).map_err(made)?;
            shares.groups.push(group.clone());
            fs::write(group.join(shares.controller.file), (share * shares.controller.one).to_string()).map_err(made)?;
            let pid = running.pid(name).ok_or_else(|| format!("TUNE_HOST: {name} does not run"))?;
            // This one first: what it begins from now on is in the group. Of the others one may have ended meanwhile.
            put(&group, pid).map_err(made)?;
            machine::tree(pid).into_iter().skip(1).for_each(|pid| drop(put(&group, pid)));
        }
        Ok(Some(shares))
    }

    /// In words.
    pub fn says() -> String {
        let each: Vec<String> = SHARES.iter().map(|(name, share)| format!("{name} {share}")).collect();
        format!("shares of the cores: {}", each.join(", "))
    }
}

impl Drop for Shares {
    fn drop(&mut self) {
        for group in &self.groups {
            let gone = (0..TRIES).any(|_| {
                let listed = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
                listed.lines().filter_map(|pid| pid.parse().ok()).for_each(|pid| drop(put(&self.controller.own, pid)));
                fs::remove_dir(group).is_ok()
            });
            if !gone {
                eprintln!("bench: the group {} is still there", group.display());
            }
        }
    }
}

/// With all its threads.
fn put(group: &Path, pid: u32) -> io::Result<()> {
    fs::write(group.join("cgroup.procs"), pid.to_string())
}
