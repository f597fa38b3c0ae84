//! The host's settings that docs/OPERATIONS.md recommends for that of a database, for as long as it is measured with them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::stat::{major, minor, stat};

use super::super::Result;
use super::super::rig::Cpu;
use super::shares::Shares;

/// In hundredths of a second: how old a page is when it is written back, and how often the host looks for such.
const MEMORY: [(&str, &str); 2] = [("dirty_expire_centisecs", "100"), ("dirty_writeback_centisecs", "10")];
/// The size of one request to the disk, in KiB. A sync waits behind those that are on their way.
const REQUEST: (&str, &str) = ("max_sectors_kb", "128");
/// Mount options: whether the disk is told of each block that is given up, a segment of an outbox for instance, when that happens. A sync waits
/// behind that, too. (Not by `discard_max_bytes` of the disk's queue: some disks do not take back what it was.)
const TELL: &str = "discard";
const DO_NOT_TELL: &str = "nodiscard";

/// After how many seconds the host writes back what is dirty; nothing where it does not say so.
pub fn written_back_after() -> Option<f64> {
    let hundredths = fs::read_to_string(memory(MEMORY[0].0)).ok()?;
    Some(hundredths.trim().parse::<f64>().ok()? / 100.0)
}

/// The host as recommended, until this is dropped.
pub struct Tuned {
    /// What was there before, by file.
    before: Vec<(PathBuf, String)>,
    /// The file system that told the disk.
    telling: Option<PathBuf>,
    /// Dropped with this.
    shares: Option<Shares>,
    /// `setting=value`, or a mount option.
    pub settings: Vec<String>,
}

impl Tuned {
    /// For `running` services, and a server whose files are in `dir`. A file system without a disk of its own, in memory or over the network, has no queue to set.
    ///
    /// # Errors
    /// Where this process may not set one of them.
    pub fn begin(dir: &Path, running: &Cpu) -> Result<Self> {
        let mut tuned = Self { before: Vec::new(), telling: None, shares: Shares::give(running)?, settings: Vec::new() };
        if tuned.shares.is_some() {
            tuned.settings.push(Shares::says());
        }
        for (name, value) in MEMORY {
            tuned.set(memory(name), &format!("vm.{name}"), value)?;
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

fn memory(name: &str) -> PathBuf {
    Path::new("/proc/sys/vm").join(name)
}

/// The queue of the disk that `dir` is on; a partition has that of its disk.
fn queue(dir: &Path) -> Option<PathBuf> {
    let device = Path::new("/sys/dev/block").join(device(dir)?);
    ["queue", "../queue"].into_iter().map(|at| device.join(at)).find_map(|queue| queue.canonicalize().ok())
}

/// Where the file system of `dir` is mounted, if with [`TELL`].
fn telling(dir: &Path) -> Option<PathBuf> {
    let device = device(dir)?;
    mounts()
        .into_iter()
        .find(|mount| mount.device == device && mount.options.iter().any(|option| option == TELL))
        .map(|mount| mount.point)
}

/// A mounted file system.
pub struct Mount {
    /// `major:minor`.
    device: String,
    pub point: PathBuf,
    pub kind: String,
    /// Its own, not those of the mount point.
    pub options: Vec<String>,
}

/// All that this process sees.
pub fn mounts() -> Vec<Mount> {
    let listed = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    listed.lines().filter_map(mount).collect()
}

/// proc(5): number, parent, device, root, mount point, options, and behind ` - ` type, source and the file system's own options.
fn mount(line: &str) -> Option<Mount> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let (mount, filesystem): (Vec<&str>, Vec<&str>) = (mount.split(' ').collect(), filesystem.split(' ').collect());
    Some(Mount {
        device: (*mount.get(2)?).to_owned(),
        point: mount.get(4)?.into(),
        kind: (*filesystem.first()?).to_owned(),
        options: filesystem.get(2)?.split(',').map(str::to_owned).collect(),
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
