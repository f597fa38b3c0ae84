//! Whether this process reaches the log, as far as that matters to its neighbours: who alone has lost the way to it gives up what they can do
//! (ADR 17).

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::telemetry::Incident;

use super::log::Log;

/// For so long a process has lost its way, and another one has it, before anything changes hands: a broker that comes back to all is found
/// by each in its own time.
pub const CUT_OFF_AFTER: Duration = Duration::from_secs(10);
/// How often it is asked, at most.
pub const PROBE_INTERVAL: Duration = Duration::from_secs(2);

/// What the log's answers, or their absence, say of this process; one for all that use one log.
#[derive(Debug)]
pub struct Reach {
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    answers: Option<Answers>,
    /// A call failed, and what was heard before need not be so any more.
    in_doubt: bool,
    incident: Incident,
}

/// The same answer, time after time.
#[derive(Clone, Copy, Debug)]
struct Answers {
    reached: bool,
    first: Instant,
    last: Instant,
    /// Nobody asked for the last one: a call of somebody's succeeded.
    by_the_way: bool,
}

impl Known {
    fn answered(&mut self, reached: bool, by_the_way: bool) {
        let now = Instant::now();
        let before = self.answers.filter(|before| before.reached == reached && before.last.elapsed() < CUT_OFF_AFTER);
        let first = before.map_or(now, |before| before.first);
        self.answers = Some(Answers { reached, first, last: now, by_the_way });
        self.in_doubt = false;
    }

    /// How long the last answer is good for.
    fn is_due(&self) -> bool {
        self.answers.is_none_or(|Answers { last, by_the_way, .. }| {
            let good_for = if by_the_way && !self.in_doubt { CUT_OFF_AFTER } else { PROBE_INTERVAL };
            last.elapsed() >= good_for
        })
    }
}

fn incident() -> Incident {
    Incident::new("reaching the log")
}

impl Default for Reach {
    fn default() -> Self {
        Self { known: Mutex::new(Known { answers: None, in_doubt: false, incident: incident() }) }
    }
}

impl Reach {
    fn known(&self) -> MutexGuard<'_, Known> {
        // Nothing panics in the middle of a change of it.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the log, unless something was heard of it just now. May be dropped at any await, and says nothing then.
    pub async fn probe(&self, log: &dyn Log) {
        if !self.known().is_due() {
            return;
        }
        let answer = log.ping().await;
        let mut known = self.known();
        known.answered(answer.is_ok(), false);
        match &answer {
            Ok(()) => known.incident.recovered(),
            Err(error) => known.incident.failed(error),
        }
    }

    /// Asks again and again; never returns.
    pub async fn watch(&self, log: &dyn Log) {
        loop {
            self.probe(log).await;
            sleep(PROBE_INTERVAL).await;
        }
    }

    /// A call succeeded: the log is there, and nobody need ask.
    pub fn heard(&self) {
        let mut known = self.known();
        known.answered(true, true);
        known.incident.recovered();
    }

    /// A call failed, for whatever reason.
    pub fn doubted(&self) {
        self.known().in_doubt = true;
    }

    /// Nobody asks from here on: what is known is good for as long as it is, and an incident would have no end.
    pub fn rest(&self) {
        self.known().incident = incident();
    }

    /// As the last answer said; also where there was none.
    pub fn is_reached(&self) -> bool {
        self.known().answers.is_none_or(|answers| answers.reached)
    }

    /// All answers for [`CUT_OFF_AFTER`] were that it is there.
    pub fn is_sure(&self) -> bool {
        self.has_been(true)
    }

    /// No answer for [`CUT_OFF_AFTER`] was that it is there.
    pub fn is_cut_off(&self) -> bool {
        self.has_been(false)
    }

    fn has_been(&self, wanted: bool) -> bool {
        // Of what was heard a while ago nothing follows. One that is asked for each 2 s, and takes up to 1 s, is never so old.
        let answers = self.known().answers.filter(|answers| answers.last.elapsed() < CUT_OFF_AFTER);
        answers.is_some_and(|answers| answers.reached == wanted && answers.first.elapsed() >= CUT_OFF_AFTER)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn said(reach: &Reach) -> (bool, bool, bool) {
        (reach.is_reached(), reach.is_sure(), reach.is_cut_off())
    }

    fn answered(reach: &Reach, reached: bool) {
        reach.known().answered(reached, false);
    }

    #[tokio::test(start_paused = true)]
    async fn who_reaches_the_log_or_not_is_sure_of_it_after_a_while_of_the_same_answers() {
        let reach = Reach::default();
        assert_eq!(said(&reach), (true, false, false));
        for reached in [true, false, true] {
            answered(&reach, reached);
            for _ in 0..5 {
                assert_eq!(said(&reach), (reached, false, false));
                advance(CUT_OFF_AFTER / 5).await;
                answered(&reach, reached);
            }
            assert_eq!(said(&reach), (reached, reached, !reached));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_succeeds_ends_the_trouble_and_what_was_heard_before_counts_no_more() {
        let reach = Reach::default();
        answered(&reach, false);
        reach.known().incident.failed(&"away");
        advance(CUT_OFF_AFTER - Duration::from_millis(1)).await;
        reach.heard();
        assert!(!reach.known().incident.is_ongoing());
        answered(&reach, false);
        advance(Duration::from_millis(1)).await;
        assert_eq!(said(&reach), (false, false, false));
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_heard_is_asked_when_a_call_fails_or_after_a_while() {
        let reach = Reach::default();
        assert!(reach.known().is_due());
        reach.heard();
        advance(PROBE_INTERVAL).await;
        assert!(!reach.known().is_due());
        reach.doubted();
        assert!(reach.known().is_due());
        reach.heard();
        advance(CUT_OFF_AFTER).await;
        assert!(reach.known().is_due());
        answered(&reach, true);
        assert!(!reach.known().is_due());
        advance(PROBE_INTERVAL).await;
        assert!(reach.known().is_due());
    }

    #[tokio::test(start_paused = true)]
    async fn of_what_was_heard_a_while_ago_nothing_follows() {
        let reach = Reach::default();
        answered(&reach, false);
        advance(CUT_OFF_AFTER).await;
        assert_eq!(said(&reach), (false, false, false));
        answered(&reach, false);
        assert_eq!(said(&reach), (false, false, false), "it begins again");
    }
}
