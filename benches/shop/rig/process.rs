//! A role as a process of the release binary.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::super::load::Client;
use super::super::{Result, machine};

/// A start, a readiness, a drain: nothing here takes so long.
const PATIENCE: Duration = Duration::from_secs(60);
/// An audit of ten million orders.
const COMMAND_PATIENCE: Duration = Duration::from_secs(1_800);

pub type Environment = Vec<(String, String)>;

pub struct Role {
    child: Child,
    pub pid: u32,
    pub address: String,
    /// From the process's start until it said where it listens.
    pub listening_after: Duration,
}

impl Role {
    pub async fn start(env: &Environment, name: &str) -> Result<Self> {
        Self::listening(command(env, name), name).await
    }

    /// Starts it and waits for its address.
    async fn listening(mut command: Command, name: &str) -> Result<Self> {
        let since = Instant::now();
        let mut child = command.stderr(Stdio::piped()).spawn()?;
        let pid = child.id().ok_or_else(|| format!("{name} ended at once"))?;
        let mut lines = BufReader::new(child.stderr.take().ok_or("no pipe")?).lines();
        let mut said = Vec::new();
        let address = async {
            while let Some(line) = lines.next_line().await? {
                let entry: Value = serde_json::from_str(&line).unwrap_or_default();
                if entry["message"] == "listening" && entry["role"] == name {
                    return Ok(entry["address"].as_str().unwrap_or_default().to_owned());
                }
                said.push(line);
            }
            Err(format!("{name} does not listen: {}", said.join("\n")).into())
        };
        let address = timeout(PATIENCE, address).await.map_err(|_| format!("{name} does not listen within {PATIENCE:?}"));
        let address: Result<String> = address?;
        let (address, listening_after) = (address?, since.elapsed());
        // The pipe must not fill up. What is wrong under load is worth a line.
        let name = name.to_owned();
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                if line.contains("\"level\":\"ERROR\"") || line.contains("\"level\":\"WARN\"") {
                    eprintln!("bench: {name} says: {line}");
                }
            }
        });
        Ok(Self { child, pid, address, listening_after })
    }

    /// Until `/health/ready` says so.
    pub async fn ready(&self) -> Result<()> {
        let since = Instant::now();
        let mut client = Client::open(&self.address).await?;
        while client.get("/health/ready").await?.status != 200 {
            if since.elapsed() > PATIENCE {
                return Err(format!("{} is not ready within {PATIENCE:?}", self.address).into());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// SIGTERM, and waits for the end.
    pub async fn stop(mut self) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(self.pid.cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        let ended = timeout(PATIENCE, self.child.wait()).await.map_err(|_| format!("{} does not stop", self.address))?;
        if !ended?.success() {
            return Err(format!("{} did not stop cleanly", self.address).into());
        }
        Ok(())
    }
}

/// Every role in one process, on the embedded default in `data`.
pub async fn all_in_one(data: &Path) -> Result<Role> {
    let listen = |role: &str| (format!("SHOPD__{role}__LISTEN"), "127.0.0.1:0".to_owned());
    let mut all = command(&["GATEWAY", "ORDERS", "PAYMENTS", "RELAY"].map(listen).to_vec(), "all");
    all.arg("--data-dir").arg(data);
    Role::listening(all, "gateway").await
}

/// Runs a command that ends by itself; its standard output.
pub async fn run(env: &Environment, arguments: &[&str]) -> Result<String> {
    let (first, rest) = arguments.split_first().ok_or("no command")?;
    let mut command = command(env, first);
    command.args(rest).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = timeout(COMMAND_PATIENCE, command.output()).await.map_err(|_| format!("shopd {first} does not end"))??;
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        return Err(format!("shopd {first}: {}\n{said}{errors}", output.status).into());
    }
    Ok(said.into_owned())
}

/// In a session of its own, as whatever keeps a service running starts it: a kernel with `sched_autogroup_enabled` shares the cores between sessions,
/// and all roles and the load would have one share together.
fn command(env: &Environment, role: &str) -> Command {
    let mut command = Command::new("setsid");
    command.arg(machine::program()).args([role, "--log", "json"]).envs(env.iter().map(|(n, v)| (n, v)));
    command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
    command
}
