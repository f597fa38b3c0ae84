//! The server's process: seen through its pid file, told to stop, watched until it ends.

use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::watch;

/// How soon the end of a process that is not our child is noticed.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// What the server says of itself in `postmaster.pid`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PidFile {
    pub pid: i32,
    pub port: u16,
    pub socket_dir: String,
    /// `starting`, `ready`, `standby` or `stopping`.
    pub status: String,
}

impl PidFile {
    /// `None` where there is none, or it is not whole yet.
    pub fn read(pgdata: &Path) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(pgdata.join("postmaster.pid")).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let pid: i32 = lines.first()?.parse().ok()?;
        let line = |index: usize| lines.get(index).copied().unwrap_or_default();
        // Negative: a server in single-user mode, which serves nobody.
        let port = line(3).parse().unwrap_or_default();
        (pid > 0).then(|| Self { pid, port, socket_dir: line(4).into(), status: line(7).into() })
    }

    pub fn is_ready(&self) -> bool {
        matches!(self.status.as_str(), "ready" | "standby") && self.port > 0 && !self.socket_dir.is_empty()
    }
}

/// Whether `pid` runs and is the server of `pgdata`, and not a stranger who got the number of a dead one.
pub(super) fn serves(pid: i32, pgdata: &Path) -> bool {
    if !exists(pid) {
        return false;
    }
    // A server's working directory is its data directory.
    match std::fs::read_link(format!("/proc/{pid}/cwd")) {
        Ok(cwd) => cwd == pgdata,
        // Root without the right to look into others' processes: anyone may read the command line, which has `-D pgdata`.
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|argument| argument == pgdata.as_os_str().as_encoded_bytes())
        }
        Err(_) if Path::new("/proc/self").exists() => false,
        Err(_) => {
            let line = Command::new("ps").args(["-ww", "-o", "command=", "-p", &pid.to_string()]).output();
            line.is_ok_and(|line| String::from_utf8_lossy(&line.stdout).contains(&*pgdata.to_string_lossy()))
        }
    }
}

/// Whether any process works in `pgdata`: the server, or children that a killed one left. Only as far as /proc shows them.
pub(super) fn is_inhabited(pgdata: &Path) -> bool {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(|entry| std::fs::read_link(entry.path().join("cwd")).ok()).any(|cwd| cwd == pgdata)
}

/// Whether the number is taken by any process.
pub(super) fn exists(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH)
}

#[derive(Clone, Debug)]
pub(super) struct Process {
    pub pid: i32,
    /// `None`: not our child, so its end must be looked for.
    ended: Option<watch::Receiver<bool>>,
}

impl Process {
    /// A thread waits for the child, so that it is reaped at once under any runtime, or none.
    pub fn spawned(mut child: Child) -> std::io::Result<Self> {
        let (tell, ended) = watch::channel(false);
        let pid = child.id().cast_signed();
        std::thread::Builder::new().name("postgres-wait".into()).stack_size(64 << 10).spawn(move || {
            // It can only fail where the child is gone already.
            let _ = child.wait();
            // Nobody listens: nobody minds.
            let _ = tell.send(true);
        })?;
        Ok(Self { pid, ended: Some(ended) })
    }

    pub fn adopted(pid: i32) -> Self {
        Self { pid, ended: None }
    }

    pub fn is_running(&self, pgdata: &Path) -> bool {
        match &self.ended {
            Some(ended) => !*ended.borrow(),
            None => serves(self.pid, pgdata),
        }
    }

    /// Resolves when it has ended. Safe to drop and call again.
    pub async fn ended(&self, pgdata: &Path) {
        match &self.ended {
            // An error is the thread's end, which is the child's.
            Some(ended) => drop(ended.clone().wait_for(|ended| *ended).await),
            None => {
                while serves(self.pid, pgdata) {
                    tokio::time::sleep(POLL_INTERVAL).await;
                }
            }
        }
    }

    pub fn signal(&self, signal: Signal, pgdata: &Path) {
        if self.is_running(pgdata) {
            // It may end in between, which is what the signal wants.
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_is_read_whole_or_not_at_all() {
        let text = "4711\n/data/postgres\n1763839200\n5432\n/tmp/shopd-1\n\n  1234   5\nready   \n";
        let expected = PidFile { pid: 4711, port: 5432, socket_dir: "/tmp/shopd-1".into(), status: "ready".into() };
        assert_eq!(PidFile::parse(text), Some(expected));
        assert!(!PidFile::parse("4711\n/data/postgres\n").unwrap().is_ready());
        assert_eq!(PidFile::parse(""), None);
        assert_eq!(PidFile::parse("-4711\n/data\n"), None);
    }
}
