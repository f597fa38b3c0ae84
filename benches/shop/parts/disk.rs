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
