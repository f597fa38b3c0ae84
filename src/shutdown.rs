//! One stop signal for every task of a process: the first asks all to drain, each within its own bound; a second ends it at once.
//!
//! May import nothing of ours.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::{CancellationToken, DropGuard};

/// A handle on the process's one stop; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    stop: CancellationToken,
    last_acts: LastActs,
}

#[derive(Clone, Default)]
struct LastActs(Arc<Mutex<Vec<LastAct>>>);

type LastAct = Box<dyn Fn() + Send>;

impl fmt::Debug for LastActs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LastActs")
    }
}

impl Shutdown {
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks everyone to drain. Idempotent.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    pub fn is_stopping(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Resolves when stopping begins, at once if it has begun.
    pub async fn stopped(&self) {
        self.stop.cancelled().await;
    }

    /// Stops with the guard, however that is dropped.
    pub fn at_drop(&self) -> DropGuard {
        self.stop.clone().drop_guard()
    }

    /// Done once waiting for the drain is over, right before the process ends by force: what must not be left behind even then. It may
    /// not wait for anything.
    pub fn before_force(&self, act: impl Fn() + Send + 'static) {
        self.last_acts.0.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(act));
    }

    fn forced(&self) {
        self.last_acts.0.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|act| act());
    }
}

/// SIGINT and SIGTERM, from the moment they are caught.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

/// Why a process ends before it has drained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forced {
    /// A second signal, by its number.
    SecondSignal(u8),
    /// Draining took longer than it may.
    TimedOut,
}

impl Forced {
    /// The exit status: 128 and the signal's number, as a shell has it, else 1.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::SecondSignal(number) => 128 + number,
            Self::TimedOut => 1,
        }
    }
}

impl Signals {
    /// Catches the signals; before this call they end the process. Needs a runtime.
    ///
    /// # Errors
    ///
    /// When the system refuses a handler.
    pub fn catch() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Stops `shutdown` at the first signal. Resolves only when waiting for the drain is over: `timeout` after stopping began,
    /// whoever began it, or at the next signal.
    pub async fn force(mut self, shutdown: Shutdown, timeout: Duration) -> Forced {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        tokio::select! {
            (_, name) = self.next() => {
                tracing::info!(signal = name, timeout_ms, "stopping: what is in flight is finished; a second signal ends it at once");
                shutdown.stop();
            }
            () = shutdown.stopped() => {}
        }
        let forced = tokio::select! {
            (number, name) = self.next() => {
                tracing::warn!(signal = name, "a second signal: ending at once");
                Forced::SecondSignal(number)
            }
            () = tokio::time::sleep(timeout) => {
                tracing::error!(timeout_ms, "not everything has drained within shutdown.timeout_ms: ending all the same");
                Forced::TimedOut
            }
        };
        shutdown.forced();
        forced
    }

    async fn next(&mut self) -> (u8, &'static str) {
        tokio::select! {
            _ = self.interrupt.recv() => (2, "SIGINT"),
            _ = self.terminate.recv() => (15, "SIGTERM"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stop_reaches_every_clone_and_those_who_ask_later() {
        let stop = Shutdown::new();
        let task = tokio::spawn({
            let stop = stop.clone();
            async move { stop.stopped().await }
        });
        assert!(!stop.is_stopping());
        stop.stop();
        stop.stop();
        task.await.unwrap();
        stop.stopped().await;
        assert!(stop.is_stopping());
    }

    #[tokio::test]
    async fn a_drain_that_takes_too_long_is_given_up() {
        let stop = Shutdown::new();
        stop.stop();
        let (acted, act) = std::sync::mpsc::channel();
        stop.before_force(move || acted.send(()).unwrap());
        let forced = Signals::catch().unwrap().force(stop, Duration::from_millis(1)).await;
        assert_eq!(forced, Forced::TimedOut);
        act.try_recv().expect("what must not be left behind is seen to");
        assert_eq!(forced.exit_code(), 1);
        assert_eq!((Forced::SecondSignal(2).exit_code(), Forced::SecondSignal(15).exit_code()), (130, 143));
    }
}
