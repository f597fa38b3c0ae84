//! The host's settings that docs/OPERATIONS.md recommends for that of a database, for as long as it is measured with them.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor, stat};

use super::super::Result;

/// In hundredths of a second: how old a page is when it is written back, and how often the host looks for such.
const MEMORY: [(&str, &str); 2] = [("dirty_expire_centisecs", "100"), ("dirty_writeback_centisecs", "50")];
/// The size of one request to the disk, in KiB. A sync waits behind those that are on their way.
const REQUEST: (&str, &str) = ("max_sectors_kb", "128");

/// After how many seconds the host writes back what is dirty; nothing where it does not say so.
pub fn written_back_after() -> Option<f64> {
    let hundredths = fs::read_to_string(memory(MEMORY[0].0)).ok()?;
    Some(hundredths.trim().parse::<f64>().ok()? / 100.0)
}

/// The host as recommended, until this is dropped.
pub struct Tuned {
    /// What was there before, by file.
    before: Vec<(PathBuf, String)>,
    /// `setting=value`.
    pub settings: Vec<String>,
}

impl Tuned {
    /// For a server whose files are in `dir`. A file system without a disk of its own, in memory or over the network, has no queue to set.
    ///
    /// # Errors
    /// Where this process may not set one of them.
    pub fn begin(dir: &Path) -> Result<Self> {
        let mut tuned = Self { before: Vec::new(), settings: Vec::new() };
        for (name, value) in MEMORY {
            tuned.set(memory(name), &format!("vm.{name}"), value)?;
        }
        if let Some(queue) = queue(dir) {
            let (name, value) = REQUEST;
            tuned.set(queue.join(name), name, value)?;
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
    }
}

fn memory(name: &str) -> PathBuf {
    Path::new("/proc/sys/vm").join(name)
}

/// The queue of the disk that `dir` is on; a partition has that of its disk.
fn queue(dir: &Path) -> Option<PathBuf> {
    let device = stat(dir).ok()?.st_dev;
    let device = Path::new("/sys/dev/block").join(format!("{}:{}", major(device), minor(device)));
    ["queue", "../queue"].into_iter().map(|at| device.join(at)).find_map(|queue| queue.canonicalize().ok())
}
