//! Fault points: named places where a test may make a process wait, fail, repeat itself or die. Only with the cargo feature
//! `faults`; without it neither a point nor its name is compiled in. May import nothing of ours.
//!
//! `FAILPOINTS` says at the start of a process what happens where, in the form of the crate `fail`:
//! `relay.after_append=1%return(crash);log.produce=5%return(duplicate)`. What stands in `return(…)`:
//!
//! | action | at | does |
//! |---|---|---|
//! | `delay:MS` | [`POINTS`] | waits so many milliseconds, without holding a thread |
//! | `error` | [`POINTS`] | fails there; before an effect it does not happen |
//! | `drop_ack` | [`POINTS`] after an effect | the same, after it: it happened, and whoever asked hears that it did not |
//! | `crash` | [`POINTS`] | SIGKILL to itself: nothing is unwound, nothing is flushed |
//! | `duplicate` | [`REPEATS`] | the effect happens twice |

/// Where a process may be made to wait, fail or die.
pub const POINTS: [&str; 24] = [
    "db.before_commit",
    "db.after_commit",
    "group.before_commit",
    "group.after_commit",
    "relay.before_append",
    "relay.after_append",
    "relay.after_cursor",
    "log.before_produce",
    "log.after_produce",
    "log.before_fetch",
    "log.after_fetch",
    "outbox.before_acquire",
    "outbox.after_acquire",
    "outbox.before_save",
    "outbox.after_save",
    "outbox.before_purge",
    "consumer.before_commit",
    "consumer.after_commit",
    "lease.before_heartbeat",
    "lease.after_heartbeat",
    "lease.before_acquire",
    "lease.after_acquire",
    "lease.before_release",
    "lease.after_release",
];
/// What may happen twice.
pub const REPEATS: [&str; 1] = ["log.produce"];

/// A failure that a fault point made; without the feature there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Injected {
    #[cfg(feature = "faults")]
    #[error("a fault was injected at {0}")]
    At(&'static str),
}

/// `point!("name")?`: what was asked to happen here happens. A `Result<(), Injected>`.
macro_rules! point {
    ($name:literal) => {{
        #[cfg(feature = "faults")]
        {
            $crate::faults::at($name).await
        }
        #[cfg(not(feature = "faults"))]
        {
            Ok::<(), $crate::faults::Injected>(())
        }
    }};
}

/// `if repeat!("name")`: the caller should do it twice.
macro_rules! repeat {
    ($name:literal) => {{
        #[cfg(feature = "faults")]
        {
            $crate::faults::is_asked($name, $crate::faults::Action::Duplicate)
        }
        #[cfg(not(feature = "faults"))]
        {
            false
        }
    }};
}

pub(crate) use {point, repeat};

#[cfg(feature = "faults")]
pub use injected::{Action, at, begin, is_asked};

#[cfg(feature = "faults")]
mod injected {
    use std::time::Duration;

    use super::{Injected, POINTS, REPEATS};

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Action {
        Delay(Duration),
        Error,
        Crash,
        Duplicate,
    }

    impl Action {
        fn parse(text: &str) -> Option<Self> {
            match text {
                "error" | "drop_ack" => Some(Self::Error),
                "crash" => Some(Self::Crash),
                "duplicate" => Some(Self::Duplicate),
                _ => Some(Self::Delay(Duration::from_millis(text.strip_prefix("delay:")?.parse().ok()?))),
            }
        }

        /// Where it means something.
        fn places(self) -> &'static [&'static str] {
            match self {
                Self::Delay(_) | Self::Error | Self::Crash => &POINTS,
                Self::Duplicate => &REPEATS,
            }
        }
    }

    /// Sets up what `failpoints` (the variable's value) asks for.
    ///
    /// # Errors
    /// Names a point that does not exist, or an action that means nothing there: a fault that never comes would prove anything.
    pub fn begin(failpoints: &str) -> Result<(), String> {
        for entry in failpoints.split(';').map(str::trim).filter(|entry| !entry.is_empty()) {
            let bad = |why: &str| format!("FAILPOINTS: {entry}: {why}");
            let (name, terms) = entry.split_once('=').ok_or_else(|| bad("NAME=ACTION was expected"))?;
            let actions = terms.split("->").map(|term| {
                let asked = term.split_once("return(").and_then(|(_, rest)| Action::parse(rest.strip_suffix(')')?));
                asked.ok_or_else(|| bad("return(delay:MS | error | drop_ack | crash | duplicate) was expected"))
            });
            for action in actions {
                if !action?.places().contains(&name) {
                    return Err(bad("there is no such place for that"));
                }
            }
            fail::cfg(name, terms).map_err(|why| bad(&why))?;
        }
        Ok(())
    }

    /// A delay, a failure or the end, where one was asked for.
    pub async fn at(name: &'static str) -> Result<(), Injected> {
        match asked(name) {
            Some(Action::Delay(time)) => tokio::time::sleep(time).await,
            Some(Action::Error) => return Err(Injected::At(name)),
            Some(Action::Crash) => crash(name),
            Some(Action::Duplicate) | None => {}
        }
        Ok(())
    }

    pub fn is_asked(name: &'static str, action: Action) -> bool {
        asked(name) == Some(action)
    }

    fn asked(name: &str) -> Option<Action> {
        fail::fail_point!(name, |text: Option<String>| Action::parse(&text.unwrap_or_default()));
        None
    }

    fn crash(name: &str) -> ! {
        tracing::warn!(point = name, "killing myself, as asked");
        // It cannot fail: a process may always signal itself.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
        std::process::abort()
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use std::time::Instant;

        #[test]
        fn a_fault_that_could_never_come_is_refused() {
            assert_eq!(begin(""), Ok(()));
            for wrong in [
                "db.before_comit=return(error)",
                "db.before_commit",
                "db.before_commit=return(duplicate)",
                "log.produce=return(crash)",
                "db.before_commit=panic",
                "db.before_commit=return(delay:soon)",
                "db.before_commit=often%return(error)",
                "db.before_commit=return(error)->return(duplicate)",
            ] {
                assert!(begin(wrong).is_err(), "{wrong}");
            }
        }

        #[tokio::test]
        async fn each_action_does_what_it_says_and_a_count_ends_it() {
            begin("relay.after_cursor=1*return(error)->1*return(delay:60); log.produce=1*return(duplicate)").unwrap();
            assert_eq!(at("relay.after_cursor").await, Err(Injected::At("relay.after_cursor")));
            let since = Instant::now();
            assert_eq!(at("relay.after_cursor").await, Ok(()));
            assert!(since.elapsed() >= Duration::from_millis(60));
            assert_eq!(at("relay.after_cursor").await, Ok(()));
            assert!(crate::faults::repeat!("log.produce"));
            assert!(!crate::faults::repeat!("log.produce"));
        }

        #[tokio::test]
        async fn a_delay_holds_no_thread() {
            fail::cfg("of_the_test.delay", "return(delay:200)").unwrap();
            let since = Instant::now();
            let all = futures::future::join_all((0..50).map(|_| at("of_the_test.delay"))).await;
            assert!(all.iter().all(Result::is_ok) && since.elapsed() < Duration::from_secs(2));
        }
    }
}
