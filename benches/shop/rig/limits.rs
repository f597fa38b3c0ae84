//! What bare Postgres does with this work: `benches/limits/postgres_limits.py`, each time on a server of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::process::Command;

use super::super::Result;

const PATIENCE: Duration = Duration::from_secs(300);
/// Of the write-ahead log, to be used again ([`super::servers::Servers::start`]): more than a few seconds write.
const RECYCLED: u32 = 48;

/// Operations a second, by case.
pub type Measured = BTreeMap<String, f64>;

pub struct Limits {
    python: PathBuf,
    seconds: u64,
}

impl Limits {
    /// `seconds` a case. Makes a virtual environment with what the script needs, once.
    pub async fn prepare(seconds: u64) -> Result<Self> {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("bench-python");
        let python = dir.join("bin/python3");
        if run(Command::new(&python).args(["-c", "import psycopg, numpy"])).await.is_err() {
            run(Command::new("python3").args(["-m", "venv"]).arg(&dir)).await?;
            run(Command::new(&python).args(["-m", "pip", "install", "-q", "psycopg[binary]", "numpy"])).await?;
        }
        Ok(Self { python, seconds })
    }

    pub async fn measure(&self, cases: &[&str]) -> Result<Measured> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/limits/postgres_limits.py");
        let mut command = Command::new(&self.python);
        let (seconds, recycled) = (self.seconds.to_string(), RECYCLED.to_string());
        command.arg(script).args(["--reps", "1", "--secs", &seconds, "--only", &cases.join(","), "--recycled", &recycled]);
        let measured: Value = serde_json::from_slice(&run_to_its_end(&mut command).await?)?;
        let rate = |name: &&str| {
            let median = measured["per_second"][name]["median"].as_f64();
            median.map(|median| ((*name).to_owned(), median)).ok_or_else(|| format!("the limits have no {name}").into())
        };
        cases.iter().map(rate).collect()
    }
}

/// Told to end when this is dropped before it has: the script stops its server then, which it could not if it were killed.
struct Told(Option<Pid>);

impl Drop for Told {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            // It may have ended by itself.
            let _ = kill(pid, Signal::SIGTERM);
        }
    }
}

/// In a process group of its own: the terminal's Ctrl-C is ours to pass on.
async fn run_to_its_end(command: &mut Command) -> Result<Vec<u8>> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let child = command.spawn().map_err(|error| format!("{command:?}: {error}"))?;
    let mut told = Told(child.id().map(|id| Pid::from_raw(id.cast_signed())));
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.map_err(|_| format!("{command:?} does not end"))?;
    told.0 = None;
    said(command, output)
}

async fn run(command: &mut Command) -> Result<Vec<u8>> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output()).await.map_err(|_| format!("{command:?} does not end"))?;
    said(command, output)
}

fn said(command: &Command, output: std::io::Result<Output>) -> Result<Vec<u8>> {
    let output = output.map_err(|error| format!("{command:?}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(output.stdout)
}
