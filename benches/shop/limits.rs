//! What bare Postgres does with this work: `benches/limits/postgres_limits.py`, in an environment of its own.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::Result;

/// Operations a second, medians.
#[derive(Clone, Debug)]
pub struct Limits {
    pub postgres: String,
    pub pay_batch: f64,
    pub pay_batch_hot: f64,
    pub order_cte: f64,
}

pub fn measure(quick: bool) -> Result<Limits> {
    let python = environment()?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/limits/postgres_limits.py");
    let (reps, seconds) = if quick { ("1", "1") } else { ("1", "2") };
    let output = Command::new(python).arg(script).args(["--reps", reps, "--secs", seconds]).output()?;
    if !output.status.success() {
        return Err(format!("the limits were not measured: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    let measured: Value = serde_json::from_slice(&output.stdout)?;
    let rate = |name: &str| measured["per_second"][name]["median"].as_f64().ok_or_else(|| format!("no {name}"));
    Ok(Limits {
        postgres: measured["pg"].as_str().unwrap_or_default().to_owned(),
        pay_batch: rate("pay_batch_1000_c1")?,
        pay_batch_hot: rate("pay_batch_hot_1000_c1")?,
        order_cte: rate("order_cte_c64")?,
    })
}

/// A virtual environment with what the script needs, made once.
fn environment() -> Result<std::path::PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench-python");
    let python = dir.join("bin/python3");
    let works = || Command::new(&python).args(["-c", "import psycopg, numpy"]).output().is_ok_and(|o| o.status.success());
    if !works() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&dir))?;
        run(Command::new(&python).args(["-m", "pip", "install", "-q", "psycopg[binary]", "numpy"]))?;
    }
    Ok(python)
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(())
}
