//! The host's settings that docs/OPERATIONS.md recommends for that of a database, for as long as it is measured with them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::stat::{major, minor, stat};

use super::super::Result;

/// In hundredths of a second: how old a page is when it is written back, and how often the host looks for such.
const MEMORY: [(&str, &str); 2] = [("vm.dirty_expire_centisecs", "100"), ("vm.dirty_writeback_centisecs", "50")];
/// Whether each session is a group that gets as much of the cores as any other, however many threads want it; each of Postgres' processes is a
/// session. It is asked when a process begins, so what is measured must be started afterwards. Not every kernel has it.
const GROUPS: (&str, &str) = ("kernel.sched_autogroup_enabled", "0");
/// The size of one request to the disk, in KiB. A sync waits behind those that are on their way.
const REQUEST: (&str, &str) = ("max_sectors_kb", "128");
/// Mount options: whether the disk is told of each block that is given up, a segment of an outbox for instance, when that happens. A sync waits
/// behind that, too. (Not by `discard_max_bytes` of the disk's queue: some disks do not take back what it was.)
const TELL: &str = "discard";
const DO_NOT_TELL: &str = "nodiscard";

/// After how many seconds the host writes back what is dirty; nothing where it does not say so.
pub fn written_back_after() -> Option<f64> {
    let hundredths = fs::read_to_string(kernel(MEMORY[0].0)).ok()?;
    Some(hundredths.trim().parse::<f64>().ok()? / 100.0)
}

/// The host as recommended, until this is dropped.
pub struct Tuned {
    /// What was there before, by file.
    before: Vec<(PathBuf, String)>,
    /// The file system that told the disk.
    telling: Option<PathBuf>,
    /// `setting=value`, or a mount option.
    pub settings: Vec<String>,
}

impl Tuned {
    /// For a server whose files are in `dir`. A file system without a disk of its own, in memory or over the network, has no queue to set.
    ///
    /// # Errors
    /// Where this process may not set one of them.
    pub fn begin(dir: &Path) -> Result<Self> {
        let mut tuned = Self { before: Vec::new(), telling: None, settings: Vec::new() };
        let groups = Some(GROUPS).filter(|(name, _)| kernel(name).exists());
        for (name, value) in MEMORY.into_iter().chain(groups) {
            tuned.set(kernel(name), name, value)?;
        }
        if let Some(queue) = queue(dir) {
            let (name, value) = REQUEST;
            tuned.set(queue.join(name), name, value)?;
        }
        if let Some(mounted) = telling(dir) {
            remount(&mounted, DO_NOT_TELL)?;
            tuned.telling = Some(mounted);
            tuned.settings.push(DO_NOT_TELL.to_owned());
        }
        Ok(tuned)
    }

    fn set(&mut self, file: PathBuf, name: &str, value: &str) -> Result<()> {
        let before = fs::read_to_string(&file).map_err(|error| format!("TUNE_HOST: {}: {error}", file.display()))?;
        fs::write(&file, value).map_err(|error| format!("TUNE_HOST: {}: {error}", file.display()))?;
        self.before.push((file, before));
        self.settings.push(format!("{name}={value}"));
        Ok(())
    }
}

impl Drop for Tuned {
    fn drop(&mut self) {
        for (file, before) in &self.before {
            if let Err(error) = fs::write(file, before) {
                eprintln!("bench: {} was {} before and is not again: {error}", file.display(), before.trim());
            }
        }
        if let Some(Err(error)) = self.telling.as_ref().map(|mounted| remount(mounted, TELL)) {
            eprintln!("bench: was mounted with {TELL} before and is not again: {error}");
        }
    }
}

/// The file of what sysctl(8) calls `name`.
fn kernel(name: &str) -> PathBuf {
    Path::new("/proc/sys").join(name.replace('.', "/"))
}

/// The queue of the disk that `dir` is on; a partition has that of its disk.
fn queue(dir: &Path) -> Option<PathBuf> {
    let device = Path::new("/sys/dev/block").join(device(dir)?);
    ["queue", "../queue"].into_iter().map(|at| device.join(at)).find_map(|queue| queue.canonicalize().ok())
}

/// Where the file system of `dir` is mounted, if with [`TELL`].
fn telling(dir: &Path) -> Option<PathBuf> {
    let device = device(dir)?;
    // proc(5): number, parent, device, root, mount point, options, and behind ` - ` type, source and the file system's own options.
    fs::read_to_string("/proc/self/mountinfo").ok()?.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mount: Vec<&str> = mount.split(' ').collect();
        let tells = filesystem.split(' ').nth(2)?.split(',').any(|option| option == TELL);
        (tells && mount.get(2) == Some(&device.as_str())).then(|| mount.get(4).map(PathBuf::from))?
    })
}

fn remount(mounted: &Path, option: &str) -> Result<()> {
    let status = Command::new("mount").args(["-o", &format!("remount,{option}")]).arg(mounted).status()?;
    if status.success() {
        return Ok(());
    }
    Err(format!("TUNE_HOST: mount -o remount,{option} {}: {status}", mounted.display()).into())
}

/// The number of the device that `dir` is on, as `major:minor`.
fn device(dir: &Path) -> Option<String> {
    let device = stat(dir).ok()?.st_dev;
    Some(format!("{}:{}", major(device), minor(device)))
}
