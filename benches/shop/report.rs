//! The JSON, part by part, and the page and the plots that are made from it.
//!
//! A run measures some parts and leaves the others as they were, each with when, how and on which commit it was measured.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use chrono::Utc;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::figures::Target;
use super::options::{Options, Output, PARTS};
use super::parts;
use super::plot::Plot;
use super::{Result, machine};

/// All that was measured.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Book {
    pub parts: BTreeMap<String, Entry>,
}

/// One part, as it was measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Entry {
    /// RFC 3339, UTC.
    measured_at: String,
    commit: String,
    machine: String,
    /// Postgres' version and the broker's; runs of before say the first alone.
    #[serde(alias = "postgres")]
    servers: String,
    /// A short run: worth a look, no more.
    quick: bool,
    took_seconds: u64,
    figures: Value,
}

/// A part's section of the page.
#[derive(Debug, Default)]
pub struct Section {
    pub title: &'static str,
    pub targets: Vec<Target>,
    pub text: String,
    pub plots: Vec<Plot>,
}

impl Book {
    /// What earlier runs left there; empty where none did.
    pub fn read(output: &Output) -> Result<Self> {
        match std::fs::read(output.json()) {
            Ok(text) => {
                serde_json::from_slice(&text).map_err(|error| format!("{}: {error}; remove it", output.json().display()).into())
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error.into()),
        }
    }

    pub fn put(&mut self, part: &str, options: &Options, servers: &str, took: Duration, figures: Value) {
        let entry = Entry {
            measured_at: Utc::now().format("%Y-%m-%dT%H:%M:%SZ").to_string(),
            commit: machine::commit(),
            machine: machine::describe(),
            servers: servers.to_owned(),
            quick: options.quick,
            took_seconds: took.as_secs(),
            figures,
        };
        self.parts.insert(part.to_owned(), entry);
    }

    /// The JSON, a line a part.
    pub fn save(&self, output: &Output) -> Result<()> {
        std::fs::create_dir_all(&output.folder)?;
        let part =
            |(name, entry): (&String, &Entry)| Ok(format!("{}:{}", serde_json::to_string(name)?, serde_json::to_string(entry)?));
        let parts = self.parts.iter().map(part).collect::<Result<Vec<_>>>()?;
        Ok(std::fs::write(output.json(), format!("{{\"parts\":{{\n{}\n}}}}\n", parts.join(",\n")))?)
    }

    /// The JSON, the plots and the page.
    pub fn write(&self, output: &Output) -> Result<()> {
        self.save(output)?;
        let mut sections = Vec::new();
        for part in PARTS {
            if let Some(entry) = self.parts.get(part) {
                let section = section(part, &entry.figures).map_err(|error| format!("{part}: {error}; measure it again"))?;
                for plot in &section.plots {
                    plot.draw(&output.folder)?;
                }
                sections.push((part, entry, section));
            }
        }
        let page = page(output, &sections)?;
        println!("{page}");
        std::fs::write(&output.page, page)?;
        eprintln!("bench: written to {}", output.page.display());
        Ok(())
    }
}

fn section(part: &str, figures: &Value) -> Result<Section> {
    fn read<T: DeserializeOwned>(figures: &Value) -> Result<T> {
        Ok(serde_json::from_value(figures.clone())?)
    }
    match part {
        "payments" => read::<parts::payments::Figures>(figures)?.section(),
        "flow" => read::<parts::flow::Figures>(figures)?.section(),
        "intake" => read::<parts::intake::Figures>(figures)?.section(),
        "steady" => read::<parts::steady::Figures>(figures)?.section(),
        "latency" => read::<parts::latency::Figures>(figures)?.section(),
        "relay" => read::<parts::relay::Figures>(figures)?.section(),
        "gateway" => read::<parts::gateway::Figures>(figures)?.section(),
        "rest" => read::<parts::rest::Figures>(figures)?.section(),
        "size" => read::<parts::size::Figures>(figures)?.section(),
        "bloat" => read::<parts::bloat::Figures>(figures)?.section(),
        other => Err(format!("there is no part {other}").into()),
    }
}

/// Of prose on the page.
const LINE: usize = 132;

const HEAD: &str = "# Benchmarks

Written by `make bench` from `benchmarks.json`. Release build; the load, the four roles as processes, Postgres and Apache Kafka, one node,
share the cores of one machine, over its loopback. Postgres has the settings of `benches/limits/postgres_limits.py`, `fsync` and
`synchronous_commit` on; the roles reach it through its socket, the limits through TCP. The roles have their default settings but one: no order
is asked for again within ten minutes, because orders wait here for a role that is stopped on purpose. Every measurement has fresh databases and
topics, on servers that have been warmed up; files of the write-ahead log are there to be used again, on ours and on those of the limits,
as where a server has run for a while. The broker has the threads and the memory that docs/OPERATIONS.md recommends for this machine, and flushes its
records every 5 s, as it recommends for a host with its own settings; in parts of before 2026-12-01T03:15 it left that to the kernel, and before 2026-11-30T15:00 it had half of the memory.

A figure of one run is worth little on a shared machine. Its ratio to what the same run measured beside it, by turns, is worth more, and so
is CPU time, which is that of the processes' own clocks. Figures are medians, with the least and the greatest where they were measured more than
once. Latencies under load come from an open loop: they are counted from when a request was due, not from when it was sent.
";

fn page(output: &Output, sections: &[(&str, &Entry, Section)]) -> Result<String> {
    let mut page = String::from(HEAD);
    writeln!(page, "\n## Targets\n\n| figure | target | measured | met |\n|---|---|---|---|")?;
    for target in sections.iter().flat_map(|(_, _, section)| &section.targets) {
        writeln!(page, "{target}")?;
    }
    for (part, entry, section) in sections {
        writeln!(page, "\n## {}\n", section.title)?;
        let quick = if entry.quick { " A short run." } else { "" };
        let Entry { measured_at, commit, machine, servers, took_seconds, .. } = entry;
        writeln!(
            page,
            "`make bench PARTS={part}`, {measured_at}, commit {commit}, {took_seconds} s; {machine}, {servers}.{quick}\n"
        )?;
        page.push_str(wrapped(&section.text).trim_end());
        page.push('\n');
        for plot in &section.plots {
            writeln!(page, "\n![{}]({}{}.svg)", plot.title, output.plots_at, plot.name)?;
        }
    }
    Ok(page)
}

/// Prose in lines of a readable length; tables as they are.
fn wrapped(text: &str) -> String {
    let mut lines = Vec::new();
    for line in text.lines() {
        if line.starts_with('|') || line.len() <= LINE {
            lines.push(line.to_owned());
            continue;
        }
        let mut short = String::new();
        for word in line.split(' ') {
            if !short.is_empty() && short.len() + 1 + word.len() > LINE {
                lines.push(std::mem::take(&mut short));
            }
            if !short.is_empty() {
                short.push(' ');
            }
            short.push_str(word);
        }
        lines.push(short);
    }
    lines.join("\n")
}
