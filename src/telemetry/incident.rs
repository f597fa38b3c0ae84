//! One warning an incident. A loop that may fail again and again holds an [`Incident`] and reports to it, so that a broker that is away for
//! an hour is one warning and a few lines, not a hundred thousand.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::millis;

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

/// Counted as long as it lasts, also where whoever reports to it ends first.
#[derive(Debug)]
struct Ongoing {
    what: &'static str,
    began: Instant,
    said: Instant,
    failures: u64,
    causes: Vec<String>,
}

impl Ongoing {
    fn begin(what: &'static str, now: Instant) -> Self {
        metrics::gauge!("shopd_incidents_ongoing", "what" => what).increment(1);
        Self { what, began: now, said: now, failures: 0, causes: Vec::new() }
    }
}

impl Drop for Ongoing {
    fn drop(&mut self) {
        metrics::gauge!("shopd_incidents_ongoing", "what" => self.what).decrement(1);
    }
}

impl Incident {
    /// `what` names the work in the log: `"publishing the orders outbox"`.
    pub fn new(what: &'static str) -> Self {
        Self { what, state: None }
    }

    /// Logs a failure as [`Self::fail`] decides. The cause's text tells causes apart, so it should not hold counters or times.
    pub fn failed(&mut self, cause: &dyn fmt::Display) {
        metrics::counter!("shopd_failures_total", "what" => self.what).increment(1);
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
        let ongoing = self.state.get_or_insert_with(|| Ongoing::begin(self.what, now));
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

/// One of them, from the beginning of its work to its end: what it failed at is nobody's trouble any more then.
#[derive(Debug)]
pub struct Worker {
    shared: SharedIncident,
    who: i32,
}

impl Worker {
    pub fn failed(&self, cause: &dyn fmt::Display) {
        self.shared.failed(self.who, cause);
    }

    pub fn recovered(&self) {
        self.shared.recovered(self.who);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let mut shared = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.1.remove(&self.who) && shared.1.is_empty() {
            // It ended; nothing says that it would have succeeded.
            let _ = shared.0.succeed(Instant::now());
        }
    }
}

impl SharedIncident {
    pub fn new(what: &'static str) -> Self {
        Self(Arc::new(Mutex::new((Incident::new(what), HashSet::new()))))
    }

    pub fn worker(&self, who: i32) -> Worker {
        Worker { shared: self.clone(), who }
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
    fn an_incident_counts_while_it_lasts_also_where_whoever_reports_to_it_ends_first() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            let ongoing = |value: &str| {
                let line = format!("shopd_incidents_ongoing{{what=\"publishing\"}} {value}\n");
                assert!(handle.render().contains(&line), "{line}{}", handle.render());
            };
            let mut one = Incident::new("publishing");
            let mut other = Incident::new("publishing");
            (0..3).for_each(|_| one.failed(&"away"));
            other.failed(&"away");
            ongoing("2");
            one.recovered();
            ongoing("1");
            drop(other);
            ongoing("0");
            assert!(handle.render().contains("shopd_failures_total{what=\"publishing\"} 4\n"), "{}", handle.render());
        });
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

    /// A partition that failed and went to another replica would be an incident of this one's for ever.
    #[test]
    fn who_ends_while_it_fails_takes_its_part_of_the_incident_along() {
        let shared = SharedIncident::new("fetching");
        let (first, second) = (shared.worker(0), shared.worker(1));
        first.failed(&"away");
        second.failed(&"away");
        drop(first);
        assert!(shared.is_ongoing());
        drop(second);
        assert!(!shared.is_ongoing());
    }

    #[test]
    fn causes_without_end_do_not_become_warnings_without_end() {
        let now = Instant::now();
        let mut incident = Incident::new("publishing");
        let warnings = (0..1_000).filter(|n| incident.fail(&format!("cause {n}"), now) == Say::Warning).count();
        assert_eq!(warnings, CAUSES_MAX);
    }
}
