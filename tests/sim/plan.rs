//! What happens in a run: an explicit list of timed acts, made from a seed, and shorter when a failure is made small.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    Place {
        order: u64,
        user: u64,
        amount: i64,
    },
    Deposit {
        key: u64,
        user: u64,
        amount: i64,
    },
    /// SIGKILL, and a new process in its place later.
    Kill {
        process: usize,
        for_ms: u64,
    },
    /// SIGSTOP, SIGCONT.
    Freeze {
        process: usize,
        for_ms: u64,
    },
    /// SIGSTOP within a transaction, or between an append and its cursor.
    FreezeInside {
        process: usize,
        for_ms: u64,
    },
    /// SIGTERM, and a new process in its place later.
    Stop {
        process: usize,
        for_ms: u64,
    },
    /// This process alone does not reach the broker; until it is replaced or for so long, and where its role has others also until the end.
    LogLost {
        process: usize,
        for_ms: Option<u64>,
    },
    DatabaseCrash {
        database: usize,
        for_ms: u64,
    },
    CommitAnswersLost {
        database: usize,
        times: u64,
    },
    CommitsRefused {
        database: usize,
        times: u64,
    },
    CommitsSlow {
        database: usize,
        times: u64,
        ms: u64,
    },
    /// A notification that brings no row.
    Wake {
        database: usize,
    },
    /// Somebody's transaction stays open, and is rolled back.
    HoldOpen {
        database: usize,
        for_ms: u64,
    },
    BrokerAway {
        for_ms: u64,
    },
    AcksLost {
        times: u64,
    },
    AppendsTwice {
        times: u64,
    },
    AppendsLate {
        times: u64,
        ms: u64,
    },
    /// Retention takes everything that is there.
    Expire {
        topic: usize,
    },
    /// The topic is deleted, and made anew at once or by whoever misses it.
    Wipe {
        topic: usize,
        made_anew: bool,
    },
    /// An operator sets a consumer's offsets to 0.
    Replay {
        database: usize,
    },
    /// Another producer asks for the payment of an order, under a user of its choice.
    ForgeRequest {
        order: u64,
        user: u64,
        amount: i64,
    },
    /// Another producer ends an order.
    ForgeResult {
        order: u64,
        finished: bool,
    },
    /// A record that nobody can read.
    Poison {
        topic: usize,
        key: u64,
    },
}

#[derive(Clone, Debug)]
pub struct Plan {
    /// Of everything that is not in the list: latencies, what a crash forgets, who is asked.
    pub noise: u64,
    pub partitions: usize,
    /// Replicas of orders, payments and relay.
    pub replicas: [usize; 3],
    /// By milliseconds since the start.
    pub acts: Vec<(u64, Act)>,
}

/// Users with an account; one more has none.
pub const USERS: u64 = 4;
/// From here on nothing fails any more.
pub const FAULTS_END_MS: u64 = 20_000;

impl Plan {
    pub fn of(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let replicas = [rng.random_range(1..=3), rng.random_range(1..=3), rng.random_range(1..=2)];
        let (partitions, noise) = (rng.random_range(1..=3), rng.random());
        let processes = replicas.iter().sum();
        let mut acts = Vec::new();
        for user in 0..USERS {
            acts.push((rng.random_range(0..500), Act::Deposit { key: 1_000 + user, user, amount: rng.random_range(100..3_000) }));
        }
        let orders = rng.random_range(4..24);
        for order in 1..=orders {
            let (user, amount) = (rng.random_range(0..=USERS), rng.random_range(1..800));
            acts.push((rng.random_range(0..FAULTS_END_MS), Act::Place { order, user, amount }));
            if rng.random_bool(0.2) {
                // The same order once more, now and then with another amount.
                let amount = if rng.random_bool(0.3) { amount + 1 } else { amount };
                acts.push((rng.random_range(0..FAULTS_END_MS), Act::Place { order, user, amount }));
            }
        }
        for key in 1..rng.random_range(2..10) {
            let (user, amount) = (rng.random_range(0..=USERS), rng.random_range(1..500));
            acts.push((rng.random_range(0..FAULTS_END_MS), Act::Deposit { key, user, amount }));
            if rng.random_bool(0.4) {
                let amount = if rng.random_bool(0.3) { amount + 1 } else { amount };
                acts.push((rng.random_range(0..FAULTS_END_MS), Act::Deposit { key, user, amount }));
            }
        }
        for _ in 0..rng.random_range(0..16) {
            acts.push((rng.random_range(200..FAULTS_END_MS), fault(&mut rng, processes, orders)));
        }
        match rng.random_range(0..6) {
            0 => two_producers(&mut rng, &mut acts),
            1 => quick_crashes(&mut rng, &mut acts, orders),
            2 => cut_off_for_good(&mut rng, &mut acts, replicas),
            _ => {}
        }
        acts.sort_by_key(|(at, _)| *at);
        Self { noise, partitions, replicas, acts }
    }
}

/// Another producer asks for every order at the same time, under another user, so in another partition.
fn two_producers(rng: &mut SmallRng, acts: &mut Vec<(u64, Act)>) {
    let placed: Vec<_> = acts
        .iter()
        .filter_map(|(at, act)| match act {
            Act::Place { order, user, amount } => Some((*at, *order, *user, *amount)),
            _ => None,
        })
        .collect();
    for (at, order, user, amount) in placed {
        let user = (user + rng.random_range(1..USERS)) % USERS;
        acts.push((at + rng.random_range(0..100), Act::ForgeRequest { order, user, amount }));
        acts.push((at, Act::CommitsSlow { database: 1, times: 2, ms: rng.random_range(20..200) }));
    }
}

/// Transactions that are rolled back leave ids of which a look learns and a crash does not, right before an order comes.
fn quick_crashes(rng: &mut SmallRng, acts: &mut Vec<(u64, Act)>, orders: u64) {
    for n in 0..rng.random_range(4..12) {
        let at = rng.random_range(1_000..FAULTS_END_MS - 1_000);
        for _ in 0..rng.random_range(1..8) {
            acts.push((at, Act::HoldOpen { database: 0, for_ms: 5 }));
        }
        acts.push((at + 8, Act::Wake { database: 0 }));
        acts.push((at + rng.random_range(12..30), Act::DatabaseCrash { database: 0, for_ms: 4 }));
        let (user, amount) = (rng.random_range(0..USERS), rng.random_range(1..200));
        acts.push((at + rng.random_range(30..50), Act::Place { order: orders + 1 + n, user, amount }));
    }
}

/// The first of each role that has others loses its way to the broker, and nobody mends that.
fn cut_off_for_good(rng: &mut SmallRng, acts: &mut Vec<(u64, Act)>, replicas: [usize; 3]) {
    let mut process = 0;
    for of_role in replicas {
        if of_role > 1 {
            acts.push((rng.random_range(500..FAULTS_END_MS), Act::LogLost { process, for_ms: None }));
        }
        process += of_role;
    }
}

fn fault(rng: &mut SmallRng, processes: usize, orders: u64) -> Act {
    let process = rng.random_range(0..processes);
    let for_ms = match rng.random_range(0..3) {
        0 => rng.random_range(10..300),
        1 => rng.random_range(300..2_500),
        _ => rng.random_range(2_000..9_000),
    };
    let (database, topic) = (rng.random_range(0..2), rng.random_range(0..2));
    let (times, order) = (rng.random_range(1..6), rng.random_range(1..=orders));
    match rng.random_range(0..100) {
        0..14 => Act::Kill { process, for_ms },
        14..20 => Act::Freeze { process, for_ms },
        20..30 => Act::FreezeInside { process, for_ms },
        30..36 => Act::Stop { process, for_ms },
        36..44 => Act::DatabaseCrash { database, for_ms },
        44..50 => Act::CommitAnswersLost { database, times },
        50..53 => Act::CommitsRefused { database, times },
        53..57 => Act::CommitsSlow { database, times, ms: for_ms },
        57..63 => Act::HoldOpen { database, for_ms },
        63..66 => Act::BrokerAway { for_ms },
        66..68 => Act::LogLost { process, for_ms: Some(for_ms) },
        68..73 => Act::AcksLost { times },
        73..76 => Act::AppendsTwice { times },
        76..80 => Act::AppendsLate { times, ms: for_ms },
        80..83 => Act::Expire { topic },
        83..86 => Act::Wipe { topic, made_anew: rng.random_bool(0.5) },
        86..89 => Act::Replay { database },
        89..94 => Act::ForgeRequest { order, user: rng.random_range(0..=USERS), amount: rng.random_range(1..800) },
        94..97 => Act::ForgeResult { order, finished: rng.random_bool(0.5) },
        _ => Act::Poison { topic, key: rng.random_range(0..USERS) },
    }
}

/// Removes acts for as long as `fails` says that what is left still fails, in at most `tries`.
pub fn shrink(plan: &Plan, mut tries: usize, mut fails: impl FnMut(&Plan) -> bool) -> Plan {
    let mut plan = plan.clone();
    let mut piece = plan.acts.len().div_ceil(2);
    while piece > 0 && tries > 0 {
        let mut from = 0;
        while from < plan.acts.len() && tries > 0 {
            let mut less = plan.clone();
            less.acts.drain(from..(from + piece).min(plan.acts.len()));
            // Another course of the same acts may fail where this one does not.
            let found = (0..3).map(|n| plan.noise.wrapping_add(n)).take(tries).find(|noise| {
                less.noise = *noise;
                tries = tries.saturating_sub(1);
                fails(&less)
            });
            match found {
                Some(noise) => plan = Plan { noise, ..less },
                None => from += piece,
            }
        }
        piece = if piece == 1 { 0 } else { piece.div_ceil(2) };
    }
    plan
}
