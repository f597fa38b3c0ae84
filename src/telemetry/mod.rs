//! What a process says about itself: its logs and their levels, one warning an incident, the spans of traces, and the catalogue of its
//! metrics. May import cli (the log's format), config, shutdown and trace.

mod catalog;
mod incident;
mod levels;
mod observe;
mod spans;

use std::io::IsTerminal;
use std::time::Duration;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt, registry, reload};

use crate::cli::LogFormat;

pub use catalog::{Kind, METRICS, Metric};
pub use incident::{Incident, SharedIncident};
pub use levels::{Levels, LevelsError};
pub use observe::{look, observe};
pub use spans::{Span, SpansError, Tracer, Work, begin as begin_spans, end as end_spans, new_trace};

/// Why logging cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// A filter that cannot be read; a mistake of the user's.
    #[error(transparent)]
    Levels(#[from] LevelsError),
    #[error("logging cannot begin: {0}")]
    Taken(String),
}

/// Begins to log, once a process. `environment` looks up a variable: `SHOPD_LOG`, `SHOPD_LOG_FILE`, else `RUST_LOG`. What comes back
/// follows the file, where there is one.
///
/// # Errors
///
/// A filter that cannot be read, or a process that logs already.
pub fn begin(format: Option<LogFormat>, environment: impl Fn(&str) -> Option<String>) -> Result<Levels, TelemetryError> {
    let (filter, file) = levels::read(&environment)?;
    let terminal = std::io::stderr().is_terminal();
    let format = format.unwrap_or(if terminal { LogFormat::Pretty } else { LogFormat::Json });
    let colours = terminal && environment("NO_COLOR").is_none_or(|value| value.is_empty());
    // A closed standard error must not become a panic, which reporting the failed write there would be.
    let lines = fmt::layer().with_writer(std::io::stderr).log_internal_errors(false);
    let lines = match format {
        LogFormat::Pretty => lines.with_ansi(colours).boxed(),
        LogFormat::Json => lines.with_ansi(false).json().flatten_event(true).with_span_list(false).boxed(),
    };
    let (filter, levels) = match file {
        None => (filter.boxed(), Levels::Fixed),
        Some((path, text)) => {
            let (filter, handle) = reload::Layer::new(filter);
            (filter.boxed(), Levels::File { path, handle, text })
        }
    };
    registry().with(filter).with(lines).try_init().map_err(|error| TelemetryError::Taken(error.to_string()))?;
    std::panic::set_hook(Box::new(|panic| {
        let message = panic.payload_as_str().unwrap_or("(no message)");
        let at = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(at, message, "a task panicked");
    }));
    Ok(levels)
}

/// A time as a log's field: whole milliseconds, a number in JSON too (a `u128` would become a text).
pub fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
