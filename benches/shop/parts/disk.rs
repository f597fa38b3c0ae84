//! What the disk does by itself meanwhile: a file of our own beside the servers' is written and synced now and then. A commit waits for
//! the same disk, so no answer can be quicker than this when it stalls.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::super::Result;
use super::super::figures::Latency;

const EVERY: Duration = Duration::from_millis(100);
/// A page of the write-ahead log; they go round in a file of that many.
const PAGE: [u8; 8192] = [7; 8192];
const PAGES: u64 = 128;

pub struct Disk {
    /// Dropped to stop it.
    stop: mpsc::SyncSender<()>,
    probe: JoinHandle<std::io::Result<Vec<f64>>>,
}

impl Disk {
    /// Begins, in a file in `dir`.
    pub fn watch(dir: &Path) -> Result<Self> {
        let file = File::create(dir.join("synced"))?;
        for page in 0..PAGES {
            file.write_all_at(&PAGE, page * PAGE.len() as u64)?;
        }
        file.sync_all()?;
        let (stop, stopped) = mpsc::sync_channel::<()>(1);
        let probe = std::thread::spawn(move || {
            let mut millis = Vec::new();
            loop {
                let (began, page) = (Instant::now(), millis.len() as u64 % PAGES);
                file.write_all_at(&PAGE, page * PAGE.len() as u64)?;
                file.sync_data()?;
                millis.push(began.elapsed().as_secs_f64() * 1e3);
                if stopped.recv_timeout(EVERY) != Err(mpsc::RecvTimeoutError::Timeout) {
                    return Ok(millis);
                }
            }
        });
        Ok(Self { stop, probe })
    }

    /// How long each write took until it was on the disk.
    pub fn seen(self) -> Result<Latency> {
        drop(self.stop);
        let millis = self.probe.join().map_err(|_| "the disk's probe panicked")??;
        Ok(Latency::of_millis(millis))
    }
}

/// In hundredths of a second: how old a page is when it is written back, and how often the host looks for such.
const HOST: [(&str, &str); 2] = [("/proc/sys/vm/dirty_expire_centisecs", "100"), ("/proc/sys/vm/dirty_writeback_centisecs", "50")];

/// After how many seconds the host writes back what is dirty; nothing where it does not say so.
pub fn written_back_after() -> Option<f64> {
    let hundredths = std::fs::read_to_string(HOST[0].0).ok()?;
    Some(hundredths.trim().parse::<f64>().ok()? / 100.0)
}

/// The host writes a little all the time, as docs/OPERATIONS.md recommends for that of a database, until this is dropped.
pub struct WrittenBackSoon([String; 2]);

impl WrittenBackSoon {
    /// # Errors
    /// Where this process may not set it.
    pub fn begin() -> Result<Self> {
        let before = [std::fs::read_to_string(HOST[0].0)?, std::fs::read_to_string(HOST[1].0)?];
        let set = Self(before);
        for (file, value) in HOST {
            std::fs::write(file, value).map_err(|error| format!("TUNE_HOST: {file}: {error}"))?;
        }
        Ok(set)
    }
}

impl Drop for WrittenBackSoon {
    fn drop(&mut self) {
        for ((file, _), before) in HOST.iter().zip(&self.0) {
            if let Err(error) = std::fs::write(file, before) {
                eprintln!("bench: {file} was {} before and is not again: {error}", before.trim());
            }
        }
    }
}
