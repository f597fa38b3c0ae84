//! What everything in a run shares: the seed's random numbers, the virtual clock, the history, and the first violation.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::Notify;
use tokio::time::Instant;

/// Each can be switched off, to see that the simulation would notice its loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// The unique index over debits and decisions by order id.
    UniqueDebit,
    /// A request whose order is decided is answered, not decided.
    KnownDecisions,
    /// A recorded decision is never written over.
    FinalDecision,
    /// A batch commits only where its offsets stand where it began.
    OffsetCompare,
    /// A batch commits only under the epoch of its lease.
    LeaseEpoch,
    /// The outbox cursor knows which transactions were open.
    CursorSnapshot,
    /// What a look has learnt dies with the server.
    CursorSession,
    /// The cursor moves only after the log's acknowledgement. The guard is the relay's order of steps; it is switched off by a log that
    /// says at once that everything is there, which comes to the same.
    AckBeforeCursor,
    /// A final status is never written over.
    OrderStatus,
    /// An idempotency key's answer is kept with its effect.
    IdempotencyRow,
    /// A result keeps its event id.
    ResultEventId,
    /// Orders without a result are asked for again.
    Sweeper,
    /// A record that cannot be read is put aside.
    DeadLetter,
    /// Who alone has lost the way to the log gives up what others can go on with.
    CutOff,
}

/// One line of the history. Holds no random id, so that the same seed gives the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    pub at_ms: u64,
    pub who: u32,
    pub what: &'static str,
    pub n: [i64; 3],
}

struct State {
    rng: SmallRng,
    events: Vec<Event>,
    violation: Option<String>,
}

struct Shared {
    began: Instant,
    off: Vec<Guard>,
    state: Mutex<State>,
    failed: Notify,
}

#[derive(Clone)]
pub struct World(Arc<Shared>);

impl World {
    pub fn new(seed: u64, off: &[Guard]) -> Self {
        let state = State { rng: SmallRng::seed_from_u64(seed), events: Vec::with_capacity(4_096), violation: None };
        Self(Arc::new(Shared { began: Instant::now(), off: off.to_vec(), state: Mutex::new(state), failed: Notify::new() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn holds(&self, guard: Guard) -> bool {
        !self.0.off.contains(&guard)
    }

    pub fn now_ms(&self) -> u64 {
        self.0.began.elapsed().as_millis() as u64
    }

    pub async fn until(&self, at_ms: u64) {
        tokio::time::sleep_until(self.0.began + Duration::from_millis(at_ms)).await;
    }

    pub fn pick(&self, range: std::ops::Range<u64>) -> u64 {
        self.state().rng.random_range(range)
    }

    pub fn chance(&self, in_thousand: u64) -> bool {
        self.pick(0..1_000) < in_thousand
    }

    pub fn tell(&self, who: u32, what: &'static str, n: [i64; 3]) {
        let at_ms = self.now_ms();
        self.state().events.push(Event { at_ms, who, what, n });
    }

    /// The first one counts.
    pub fn violated(&self, what: impl FnOnce() -> String) {
        let mut state = self.state();
        if state.violation.is_none() {
            state.violation = Some(what());
            drop(state);
            self.0.failed.notify_one();
        }
    }

    pub fn check(&self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.violated(what);
        }
    }

    pub fn violation(&self) -> Option<String> {
        self.state().violation.clone()
    }

    pub async fn failed(&self) {
        self.0.failed.notified().await;
    }

    pub fn history(&self) -> Vec<Event> {
        std::mem::take(&mut self.state().events)
    }

    /// What a message takes through the network; mostly nothing that shows in milliseconds.
    pub async fn network(&self) {
        let ms = match self.pick(0..100) {
            0..60 => return,
            60..97 => self.pick(1..5),
            _ => self.pick(5..120),
        };
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
}

/// FNV-1a over the whole history.
pub fn fingerprint(history: &[Event]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut eat = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for event in history {
        eat(&event.at_ms.to_le_bytes());
        eat(&event.who.to_le_bytes());
        eat(event.what.as_bytes());
        event.n.iter().for_each(|n| eat(&n.to_le_bytes()));
    }
    hash
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Life {
    Running,
    Frozen,
    Dead,
}

/// A process as the outside sees it: it can be frozen and killed at any call that leaves it.
///
/// A dead one is one whose calls never return: its tasks hang until the run ends, and nothing of it reaches anybody.
#[derive(Clone)]
pub struct Process(Arc<ProcessState>);

struct ProcessState {
    number: u32,
    name: String,
    life: Mutex<Life>,
    /// Freezes the process for so many milliseconds where it is at its most awkward.
    trap_ms: Mutex<Option<u64>>,
    changed: Notify,
    /// The broker is there for everybody but this one.
    off_the_log: AtomicBool,
}

impl Process {
    pub fn new(number: u32, name: String) -> Self {
        Self(Arc::new(ProcessState {
            number,
            name,
            life: Mutex::new(Life::Running),
            trap_ms: Mutex::new(None),
            changed: Notify::new(),
            off_the_log: AtomicBool::new(false),
        }))
    }

    pub fn number(&self) -> u32 {
        self.0.number
    }

    pub fn name(&self) -> &str {
        &self.0.name
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.0.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next time that it is within a transaction, or has appended and not yet said so, it freezes.
    pub fn set_trap(&self, for_ms: Option<u64>) {
        *self.0.trap_ms.lock().unwrap_or_else(PoisonError::into_inner) = for_ms;
    }

    /// Here is such a place.
    pub fn trap(&self, world: &World) {
        let taken = self.0.trap_ms.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(for_ms) = taken else { return };
        world.tell(self.number(), "process frozen in the middle", [for_ms as i64, 0, 0]);
        self.freeze();
        let process = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(for_ms)).await;
            process.thaw();
        });
    }

    pub fn set_off_the_log(&self, off: bool) {
        self.0.off_the_log.store(off, Ordering::Relaxed);
    }

    pub fn is_off_the_log(&self) -> bool {
        self.0.off_the_log.load(Ordering::Relaxed)
    }

    pub fn freeze(&self) {
        let mut life = self.life();
        if *life == Life::Running {
            *life = Life::Frozen;
        }
    }

    pub fn thaw(&self) {
        let mut life = self.life();
        if *life == Life::Frozen {
            *life = Life::Running;
        }
        drop(life);
        self.0.changed.notify_waiters();
    }

    pub fn kill(&self) {
        *self.life() = Life::Dead;
    }

    pub fn is_dead(&self) -> bool {
        *self.life() == Life::Dead
    }

    /// Passed at every call that leaves the process, on the way out and on the way back.
    pub async fn gate(&self) {
        loop {
            let changed = self.0.changed.notified();
            let life = *self.life();
            match life {
                Life::Running => return,
                Life::Frozen => changed.await,
                Life::Dead => std::future::pending().await,
            }
        }
    }
}
