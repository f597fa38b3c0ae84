//! Which outcome of a try is asked again, where, and after how long: pure.
//!
//! Every request may be repeated: a GET by itself, a POST under the `Idempotency-Key` that the gateway adds where the client sent
//! none. What no request could have caused yet (nobody listens) costs nothing to repeat; everything else is within a budget.

use std::time::Duration;

/// How one try ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// An answer to pass on.
    Answered,
    /// 503: the replica cannot do its work now.
    Unavailable,
    /// 409: the same request is running, under its key.
    InProgress,
    /// There was no connection, so nothing was sent.
    Refused,
    /// The connection broke, or what came was no HTTP: it may or may not have been done.
    Broken,
    /// No answer in time, or the replica misses its checks.
    Late,
}

/// What is known of a request when a try has ended.
#[derive(Clone, Copy, Debug)]
pub struct Tries {
    /// This one included.
    pub made: u32,
    /// There is a replica that was not tried.
    pub others: bool,
    /// Of those, one is well.
    pub others_well: bool,
    /// The gateway added the key, so nobody else can be running it.
    pub own_key: bool,
    /// Waits for a running one so far.
    pub waits: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It is what the client gets.
    Stop,
    /// Another replica; within the budget or not.
    Elsewhere { budgeted: bool },
    /// Any replica, after a while.
    After(Duration),
}

const WAIT_MIN: Duration = Duration::from_millis(10);
const WAIT_MAX: Duration = Duration::from_millis(200);

pub fn next(outcome: Outcome, tries: Tries) -> Next {
    match outcome {
        Outcome::Answered => Next::Stop,
        Outcome::Refused if tries.others => Next::Elsewhere { budgeted: false },
        Outcome::Broken | Outcome::Late if tries.others => Next::Elsewhere { budgeted: true },
        // Only where somebody is likely to do better.
        Outcome::Unavailable if tries.others_well => Next::Elsewhere { budgeted: true },
        // An earlier try of this very request is what runs; or the client's own, which then has its own answer.
        Outcome::InProgress if tries.own_key || tries.made > 1 => {
            Next::After((WAIT_MIN * 2u32.pow(tries.waits.min(8))).min(WAIT_MAX))
        }
        Outcome::Unavailable | Outcome::InProgress | Outcome::Refused | Outcome::Broken | Outcome::Late => Next::Stop,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Tries = Tries { made: 1, others: true, others_well: true, own_key: true, waits: 0 };
    const ALONE: Tries = Tries { others: false, others_well: false, ..FIRST };

    #[test]
    fn what_was_never_sent_is_asked_elsewhere_whatever_the_budget() {
        assert_eq!(next(Outcome::Refused, FIRST), Next::Elsewhere { budgeted: false });
        assert_eq!(next(Outcome::Refused, ALONE), Next::Stop);
    }

    #[test]
    fn what_may_have_been_done_is_asked_elsewhere_within_the_budget() {
        for outcome in [Outcome::Broken, Outcome::Late] {
            assert_eq!(next(outcome, FIRST), Next::Elsewhere { budgeted: true });
        }
        assert_eq!([Outcome::Late, Outcome::Broken].map(|outcome| next(outcome, ALONE)), [Next::Stop, Next::Stop]);
    }

    #[test]
    fn one_that_cannot_work_is_passed_over_for_one_that_is_well() {
        assert_eq!(next(Outcome::Unavailable, FIRST), Next::Elsewhere { budgeted: true });
        assert_eq!(next(Outcome::Unavailable, Tries { others_well: false, ..FIRST }), Next::Stop);
    }

    #[test]
    fn in_progress_is_waited_out_only_where_a_try_of_ours_may_be_what_runs() {
        let theirs = Tries { own_key: false, ..FIRST };
        assert_eq!(next(Outcome::InProgress, theirs), Next::Stop);
        assert_eq!(next(Outcome::InProgress, Tries { made: 2, ..theirs }), Next::After(WAIT_MIN));
        let waits = [0, 1, 4, 5, 9].map(|waits| next(Outcome::InProgress, Tries { waits, ..FIRST }));
        assert_eq!(waits, [10, 20, 160, 200, 200].map(|ms| Next::After(Duration::from_millis(ms))));
    }
}
