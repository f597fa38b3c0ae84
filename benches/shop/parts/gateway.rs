//! The gateway beside nginx: what `make bench-proxy` measured, if it has.

use std::fmt::Write;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::Result;
use super::super::figures::{Spread, Target};
use super::super::report::Section;

/// Of the CPU figures, and of the latency that a client of a quiet system sees.
const CONNECTIONS: u64 = 64;
const CONNECTIONS_QUIET: u64 = 2;
const REQUESTS: [&str; 2] = ["GET", "POST"];

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Figures {
    /// Nothing where it was not measured.
    requests: Vec<Request>,
    /// When, and on which commit.
    #[serde(default)]
    measured: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Request {
    name: String,
    shopd_us: Spread,
    nginx_us: Spread,
    /// Round by round.
    cpu_ratio: Spread,
    /// Over the way without a proxy, microseconds, 2 connections.
    added_p50: Spread,
    added_p50_nginx: Spread,
}

fn measured_at() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).with_file_name("proxy_benchmarks.json")
}

pub fn measure() -> Result<Figures> {
    let Ok(text) = std::fs::read(measured_at()) else { return Ok(Figures::default()) };
    let measured: Value = serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", measured_at().display()))?;
    let each = |proxy: &str, request: &str, connections: u64, figure: &str| -> Option<Vec<f64>> {
        let is_it = |series: &&Value| {
            series["proxy"] == proxy && series["request"] == request && series["connections"].as_u64() == Some(connections)
        };
        let found = measured["series"].as_array()?.iter().find(is_it)?;
        found[figure].as_array()?.iter().map(Value::as_f64).collect()
    };
    let request = |name: &&str| {
        let (shopd, nginx) = (each("shopd", name, CONNECTIONS, "cpu_us")?, each("nginx", name, CONNECTIONS, "cpu_us")?);
        let p50 = |proxy| each(proxy, name, CONNECTIONS_QUIET, "p50_us");
        let direct = p50("direct")?;
        let added = |through: Vec<f64>| Spread::of(through.iter().zip(&direct).map(|(through, direct)| through - direct));
        Some(Request {
            name: (*name).to_owned(),
            cpu_ratio: Spread::of(shopd.iter().zip(&nginx).map(|(shopd, nginx)| shopd / nginx)),
            shopd_us: Spread::of(shopd),
            nginx_us: Spread::of(nginx),
            added_p50: added(p50("shopd")?),
            added_p50_nginx: added(p50("nginx")?),
        })
    };
    // A trial replaces nothing.
    let is_whole = measured["whole"].as_bool() == Some(true);
    let requests = REQUESTS.iter().filter(|_| is_whole).filter_map(request).collect();
    let said = |name: &str| measured[name].as_str().unwrap_or("?").to_owned();
    Ok(Figures { requests, measured: format!("{}, commit {}", said("measured_at"), said("commit")) })
}

impl Figures {
    pub fn section(&self) -> Result<Section> {
        let mut section = Section { title: "The gateway beside nginx", ..Section::default() };
        let text = &mut section.text;
        if self.requests.is_empty() {
            writeln!(text, "Not measured here: `make bench-proxy`, with nginx installed, and then `make bench PARTS=gateway`.")?;
            for (name, bound) in [("CPU of a request over nginx's", 1.6), ("added p50 of a request over nginx's", 1.2)] {
                let nothing = Target::at_most(format!("gateway, {name}"), bound, f64::NAN, "not measured".into(), "");
                section.targets.push(nothing);
            }
            return Ok(section);
        }
        let when = if self.measured.is_empty() { String::new() } else { format!(" ({})", self.measured) };
        writeln!(text, "From `make bench-proxy`{when}; see [PROXY_BENCHMARKS.md](PROXY_BENCHMARKS.md) for how, and for more.\n")?;
        writeln!(text, "| | CPU us a request | nginx | ratio | added p50 us | nginx |\n|---|---|---|---|---|---|")?;
        for one in &self.requests {
            let cells = [
                one.shopd_us.show(1),
                one.nginx_us.show(1),
                one.cpu_ratio.show(2),
                one.added_p50.show(0),
                one.added_p50_nginx.show(0),
            ];
            writeln!(text, "| {} | {} |", one.name, cells.join(" | "))?;
            let cpu = format!("gateway, CPU of a {} over nginx's", one.name);
            section.targets.push(Target::median_at_most(cpu, 1.6, &one.cpu_ratio, 2, ""));
            let (added, nginx) = (one.added_p50.median(), one.added_p50_nginx.median());
            let (ratio, figure) = (added / nginx, format!("gateway, added p50 of a {} over nginx's", one.name));
            section.targets.push(Target::at_most(figure, 1.2, ratio, format!("{ratio:.2}"), ""));
        }
        Ok(section)
    }
}
