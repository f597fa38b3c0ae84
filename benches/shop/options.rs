//! What a run measures and for how long: the environment's say over the defaults.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Result;

/// The parts, in the order in which they run.
pub const PARTS: [&str; 10] = ["payments", "flow", "intake", "steady", "latency", "relay", "gateway", "rest", "size", "bloat"];
/// What becomes of it in time.
const GROWTH: [&str; 2] = ["size", "bloat"];

/// Numbers that may be overridden; a run with one of them is a trial.
const OVERRIDES: [&str; 6] = ["BACKLOG", "ORDERS", "SECONDS", "ROUNDS", "RATE", "SIZES"];

#[derive(Clone, Debug)]
pub struct Options {
    pub quick: bool,
    /// Figures of a short run or a trial do not replace the published ones.
    pub published: bool,
    pub parts: Vec<&'static str>,
    backlog: Option<usize>,
    orders: Option<usize>,
    seconds: Option<u64>,
    rounds: Option<usize>,
    pub rate: Option<u64>,
    /// The steady state a second time, with the host's settings that docs/OPERATIONS.md recommends; they are put back.
    pub tune_host: bool,
    pub sizes: Option<Vec<u64>>,
}

impl Options {
    pub fn read() -> Result<Self> {
        let quick = variable("QUICK").is_some_and(|quick| quick != "0");
        let trial = quick || OVERRIDES.iter().any(|name| variable(name).is_some());
        let published = if trial { variable("PUBLISH").is_some_and(|publish| publish != "0") } else { true };
        let parts = match variable("PARTS") {
            // A short run has no time for what shows only in a long one.
            None => PARTS.into_iter().filter(|part| !quick || !GROWTH.contains(part)).collect(),
            // Nothing is measured; the page is written anew from what was.
            Some(names) if names == "page" => Vec::new(),
            Some(names) => {
                let part = |name: &str| PARTS.iter().copied().find(|part| *part == name.trim());
                let unknown = |name: &str| format!("PARTS: there is no part {name}; there are {}", PARTS.join(", "));
                names.split(',').map(|name| part(name).ok_or_else(|| unknown(name))).collect::<std::result::Result<_, _>>()?
            }
        };
        let sizes = match variable("SIZES") {
            None => None,
            Some(text) => Some(text.split(',').map(|size| number("SIZES", size)).collect::<Result<_>>()?),
        };
        Ok(Self {
            quick,
            published,
            parts,
            backlog: parsed("BACKLOG")?.map(|n| n as usize),
            orders: parsed("ORDERS")?.map(|n| n as usize),
            seconds: parsed("SECONDS")?,
            rounds: parsed("ROUNDS")?.map(|n| n as usize),
            rate: parsed("RATE")?,
            tune_host: variable("TUNE_HOST").is_some_and(|tune| tune != "0"),
            sizes,
        })
    }

    /// Requests that wait on Kafka.
    pub fn backlog(&self, quick: usize, full: usize) -> usize {
        self.backlog.unwrap_or(if self.quick { quick } else { full })
    }

    /// Orders that wait in the outbox.
    pub fn orders(&self, quick: usize, full: usize) -> usize {
        self.orders.unwrap_or(if self.quick { quick } else { full })
    }

    /// How long one measurement of a rate takes.
    pub fn time(&self, quick: u64, full: u64) -> Duration {
        Duration::from_secs(self.seconds.unwrap_or(if self.quick { quick } else { full }))
    }

    /// How often a measurement is repeated.
    pub fn rounds(&self, quick: usize, full: usize) -> usize {
        self.rounds.unwrap_or(if self.quick { quick } else { full })
    }

    pub fn has(&self, part: &str) -> bool {
        self.parts.contains(&part)
    }

    /// Where the page, the plots and the JSON go.
    pub fn output(&self) -> Output {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        if self.published {
            let docs = root.join("docs");
            Output { page: docs.join("BENCHMARKS.md"), folder: docs.join("benchmarks"), plots_at: "benchmarks/" }
        } else {
            // Beside the folder that cargo gives to tests and benchmarks, wherever the target folder is.
            let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("benchmarks");
            Output { page: folder.join("BENCHMARKS.md"), folder, plots_at: "" }
        }
    }
}

#[derive(Clone, Debug)]
pub struct Output {
    pub page: PathBuf,
    /// Of the plots and the JSON.
    pub folder: PathBuf,
    /// The folder, from the page.
    pub plots_at: &'static str,
}

impl Output {
    pub fn json(&self) -> PathBuf {
        self.folder.join("benchmarks.json")
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn number(name: &str, text: &str) -> Result<u64> {
    text.trim().replace('_', "").parse().map_err(|_| format!("{name}: {text:?} is not a number").into())
}

fn parsed(name: &str) -> Result<Option<u64>> {
    variable(name).map(|text| number(name, &text)).transpose()
}
