//! One process of `shopd`, at an address that it keeps, started and ended as a fault wants it.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::support::shop::poll;

/// SIGTERM to the end of the process: `shutdown.timeout_ms` and what a busy machine adds.
const STOP_WITHIN: Duration = Duration::from_secs(15);

/// From the start of a process until it listens, on a machine that does much else.
const LISTENS_WITHIN: Duration = Duration::from_secs(10);

/// The program: cargo's own build, or another one that knows fault points.
pub fn shopd() -> String {
    std::env::var("TORTURE_SHOPD").unwrap_or_else(|_| env!("CARGO_BIN_EXE_shopd").to_owned())
}

/// That it knows fault points: without them half the faults would never come, and nobody would notice.
pub fn knows_fault_points() -> bool {
    let asked = Command::new(shopd()).arg("openapi").env("FAILPOINTS", "no.such.point=return(error)").output();
    asked.is_ok_and(|output| output.status.code() == Some(2))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    Gateway,
    Orders,
    Payments,
    Relay,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Orders => "orders",
            Self::Payments => "payments",
            Self::Relay => "relay",
        }
    }
}

pub struct Replica {
    pub name: String,
    pub address: String,
    role: Role,
    env: Vec<(String, String)>,
    log: PathBuf,
    child: Option<Child>,
    /// It may end by itself: it was asked to crash.
    mortal: bool,
}

impl Replica {
    /// Not started yet; `log` takes its standard error, of all its lives.
    pub fn new(role: Role, n: usize, port: u16, env: &[(String, String)], log: PathBuf) -> Self {
        let mut env = env.to_vec();
        env.push((format!("SHOPD__{}__LISTEN", role.as_str().to_uppercase()), format!("127.0.0.1:{port}")));
        let (name, address) = (format!("{}/{n}", role.as_str()), format!("http://127.0.0.1:{port}"));
        Self { name, address, role, env, log, child: None, mortal: false }
    }

    /// Starts it, with these fault points.
    pub fn start(&mut self, failpoints: &str) {
        assert!(self.child.is_none(), "{} runs", self.name);
        let log = File::options().create(true).append(true).open(&self.log).expect("a log");
        let mut command = Command::new(shopd());
        command.arg(self.role.as_str()).args(["--log", "json"]).envs(self.env.iter().map(|(name, value)| (name, value)));
        command.env("FAILPOINTS", failpoints).current_dir(self.log.parent().expect("a directory"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::from(log));
        self.child = Some(command.spawn().expect("shopd starts"));
        self.mortal = failpoints.contains("crash");
    }

    /// How it ended, where it has ended without being told to.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.child.as_mut()?.try_wait().expect("a child")?;
        self.child = None;
        Some(status)
    }

    /// An end that nobody asked for.
    pub fn died(&mut self) -> Option<String> {
        let mortal = self.mortal;
        self.ended().filter(|_| !mortal).map(|status| format!("{} ended by itself: {status}", self.name))
    }

    pub fn signal(&self, signal: Signal) {
        if let Some(child) = &self.child {
            // It may end in between, which the next look finds.
            let _ = kill(Pid::from_raw(child.id().cast_signed()), signal);
        }
    }

    /// SIGKILL, and its end.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM, and its clean end within the bound. A process that does not listen yet may not have asked for signals yet, and
    /// ends as any program does; it is waited for.
    pub async fn stop(&mut self) -> Result<(), String> {
        let begun = Instant::now();
        let listens = || std::net::TcpStream::connect(self.address.trim_start_matches("http://")).is_ok();
        while !listens() && begun.elapsed() < LISTENS_WITHIN {
            poll().await;
        }
        self.signal(Signal::SIGTERM);
        let since = Instant::now();
        while since.elapsed() < STOP_WITHIN {
            match self.child.as_mut().map(|child| child.try_wait().expect("a child")) {
                None => return Err(format!("{} does not run", self.name)),
                Some(Some(status)) => {
                    self.child = None;
                    let failed = || format!("{} ended after SIGTERM with {status}", self.name);
                    return if status.success() { Ok(()) } else { Err(failed()) };
                }
                Some(None) => poll().await,
            }
        }
        self.kill();
        Err(format!("{} did not end within {STOP_WITHIN:?} after SIGTERM", self.name))
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.kill();
    }
}
