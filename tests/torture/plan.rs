//! What will be broken, when, and for how long: all of it from the seed. Pure.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use super::cluster::{REPLICAS, REQUESTS, RESULTS};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    Orders,
    Payments,
}

#[derive(Clone, Debug)]
pub enum Fault {
    /// SIGKILL, and again after a while. `replica` counts through all roles.
    Kill {
        replica: usize,
    },
    /// SIGSTOP for longer than a lease, then SIGCONT.
    Freeze {
        replica: usize,
    },
    /// SIGTERM, and again after a while.
    Stop {
        replica: usize,
    },
    BrokerKill,
    BrokerPause,
    /// What a topic holds is removed, read or not, as by its retention.
    RecordsLost {
        topic: &'static str,
    },
    /// SIGQUIT to the server, which ends without a word, and again at once.
    PostgresRestart {
        services: Vec<Service>,
    },
    /// SIGKILL to the server.
    PostgresKill {
        service: Service,
    },
    /// SIGSTOP to all of the server's processes, then SIGCONT: connections stay open and nothing answers.
    PostgresFreeze {
        service: Service,
    },
    SessionsEnded {
        service: Service,
    },
    /// A transaction that has written, open in another database of the server.
    TransactionHeld {
        service: Service,
    },
    /// An account's row.
    RowLocked,
    /// A replica with fault points.
    Points {
        replica: usize,
        points: String,
        kind: &'static str,
    },
}

impl Fault {
    /// Whom it is done to, where that is a replica.
    pub fn replica(&self) -> Option<usize> {
        match self {
            Self::Kill { replica } | Self::Freeze { replica } | Self::Stop { replica } | Self::Points { replica, .. } => {
                Some(*replica)
            }
            _ => None,
        }
    }

    pub fn kind(&self) -> &'static str {
        match self {
            Self::Kill { .. } => "replica killed",
            Self::Freeze { .. } => "replica frozen beyond its lease",
            Self::Stop { .. } => "replica stopped cleanly",
            Self::BrokerKill => "broker killed",
            Self::BrokerPause => "broker paused",
            Self::RecordsLost { .. } => "records lost by retention",
            Self::PostgresRestart { .. } => "postgres immediate restart",
            Self::PostgresKill { .. } => "postgres killed",
            Self::PostgresFreeze { .. } => "postgres frozen",
            Self::SessionsEnded { .. } => "sessions terminated",
            Self::TransactionHeld { .. } => "transaction held elsewhere",
            Self::RowLocked => "account row locked",
            Self::Points { kind, .. } => kind,
        }
    }
}

/// One fault of a round.
#[derive(Clone, Debug)]
pub struct Step {
    pub at: Duration,
    pub fault: Fault,
    pub lasts: Duration,
}

/// Where a fault point may be set, in roles that come there, and how often it then comes.
const SERVICE_POINTS: [(&str, u32); 14] = [
    ("db.before_commit", 15),
    ("db.after_commit", 15),
    ("group.before_commit", 10),
    ("group.after_commit", 10),
    ("log.before_fetch", 20),
    ("log.after_fetch", 20),
    ("consumer.before_commit", 20),
    ("consumer.after_commit", 20),
    ("lease.before_heartbeat", 40),
    ("lease.after_heartbeat", 40),
    ("lease.before_acquire", 40),
    ("lease.after_acquire", 40),
    ("lease.before_release", 40),
    ("lease.after_release", 40),
];
const RELAY_POINTS: [(&str, u32); 10] = [
    ("relay.before_append", 20),
    ("relay.after_append", 25),
    ("relay.after_cursor", 20),
    ("log.before_produce", 20),
    ("log.after_produce", 25),
    ("outbox.before_acquire", 40),
    ("outbox.after_acquire", 40),
    ("outbox.before_save", 20),
    ("outbox.after_save", 20),
    ("outbox.before_purge", 40),
];
/// The first replicas of the roles, as `cluster::ROLES` has them.
const ORDERS: usize = REPLICAS;
const RELAYS: usize = 3 * REPLICAS;
const ALL: usize = 4 * REPLICAS;

/// Whether the sweeper works in this round. It heals what the log lost, and just so it would heal what we lost: in every other round
/// nothing is lost but by a mistake of ours, and nobody asks again.
pub fn sweeps(seed: u64) -> bool {
    (seed / 4).is_multiple_of(2)
}

/// Faults for a round of `length`, one beginning about every `gap`; `lease` is what a freeze must outlast.
pub fn plan(seed: u64, length: Duration, gap: Duration, lease: Duration) -> Vec<Step> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut steps = Vec::new();
    let mut deck: Vec<usize> = Vec::new();
    let mut at = Duration::from_millis(rng.random_range(500..1_500));
    while at < length {
        if deck.is_empty() {
            // Every kind comes once before any comes again.
            deck = vec![0, 0, 0, 1, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11, 11, 12, 12, 13, 14, 15];
            if sweeps(seed) {
                deck.extend([16, 16]);
            }
            deck.shuffle(&mut rng);
        }
        let (fault, millis) = fault(deck.pop().unwrap_or_default(), &mut rng, lease);
        let lasts = Duration::from_millis(millis).min(length.saturating_sub(at));
        steps.push(Step { at, fault, lasts });
        at += Duration::from_millis(rng.random_range(0..=2 * gap.as_millis() as u64));
    }
    steps
}

fn fault(kind: usize, rng: &mut StdRng, lease: Duration) -> (Fault, u64) {
    let lease = lease.as_millis() as u64;
    let service = if rng.random_bool(0.5) { Service::Orders } else { Service::Payments };
    match kind {
        0 => (Fault::Kill { replica: rng.random_range(0..ALL) }, rng.random_range(0..1_500)),
        1 => (Fault::Freeze { replica: rng.random_range(0..ALL) }, lease + rng.random_range(200..2_500)),
        2 => (Fault::Stop { replica: rng.random_range(0..ALL) }, rng.random_range(0..1_500)),
        3 => (Fault::BrokerKill, rng.random_range(0..1_500)),
        4 => (Fault::BrokerPause, rng.random_range(500..5_000)),
        5 => {
            let services = match rng.random_range(0..3) {
                0 => vec![Service::Orders],
                1 => vec![Service::Payments],
                _ => vec![Service::Orders, Service::Payments],
            };
            (Fault::PostgresRestart { services }, 0)
        }
        6 => (Fault::PostgresKill { service }, 0),
        7 => (Fault::SessionsEnded { service }, 0),
        8 => (Fault::TransactionHeld { service }, rng.random_range(1_500..6_000)),
        9 => (Fault::RowLocked, rng.random_range(300..3_000)),
        10 => (Fault::PostgresFreeze { service }, rng.random_range(500..5_000)),
        16 => (Fault::RecordsLost { topic: if rng.random_bool(0.5) { REQUESTS } else { RESULTS } }, 0),
        _ => (points(kind, rng, lease), rng.random_range(1_500..5_000)),
    }
}

fn points(kind: usize, rng: &mut StdRng, lease: u64) -> Fault {
    let relay = kind == 14 || rng.random_bool(0.5);
    let replica = if relay { rng.random_range(RELAYS..ALL) } else { rng.random_range(ORDERS..RELAYS) };
    let places: &[(&str, u32)] = if relay { &RELAY_POINTS } else { &SERVICE_POINTS };
    let (place, percent) = places[rng.random_range(0..places.len())];
    // One that comes on every way of the loop and kills each time would only show that a dead process does nothing.
    let set = |action: &str, percent: u32| format!("{place}={percent}%return({action})");
    let (points, kind) = match kind {
        11 => (set("crash", (percent / 5).max(1)), "crash at a fault point"),
        12 if place.contains("after") => (set("drop_ack", percent), "acknowledgement dropped"),
        12 => (set("error", percent), "error at a fault point"),
        13 => {
            // Now and then longer than a lease.
            let wait = if rng.random_bool(0.3) { lease + 500 } else { rng.random_range(20..400) };
            (set(&format!("delay:{wait}"), percent), "delay at a fault point")
        }
        14 => ("log.produce=50%return(duplicate)".to_owned(), "duplicate produce"),
        _ => (
            places.iter().map(|(place, _)| format!("{place}=3%return(error)")).collect::<Vec<_>>().join(";"),
            "error at a fault point",
        ),
    };
    Fault::Points { replica, points, kind }
}
