//! One run: the plan's acts at their times, then peace, then what must be true.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use chrono::DateTime;
use shopd::contracts::{Outcome, PaymentRequested, PaymentStatusUpdated};
use shopd::db::DbError;
use shopd::messaging::log::Record;
use shopd::money::Amount;
use shopd::user_id::UserId;
use uuid::Uuid;

use crate::checks;
use crate::cluster::{Cluster, Role, TOPICS};
use crate::kafka::{Kafka, Luck, POISON};
use crate::plan::{Act, FAULTS_END_MS, Plan, USERS};
use crate::postgres::{Fate, Key, Postgres};
use crate::service::{Deposited, Place, Placed, deposit};
use crate::tables::AccountRow;
use crate::world::{Event, Guard, Process, World, fingerprint};

/// After the last fault everything is final within this (L1).
const PEACE_MS: u64 = 90_000;
const LOOK: Duration = Duration::from_millis(500);
/// What a client does.
const PATIENCE: Duration = Duration::from_secs(3);
const TRIES: u64 = 12;

/// What a client knows of its call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    Placed(Placed),
    Deposited(Deposited),
    /// It may have happened or not.
    Nothing,
}

/// Every client's call, by its place in the plan.
pub type Calls = Arc<Mutex<BTreeMap<usize, (Act, Option<Heard>)>>>;

pub struct Ran {
    pub violation: Option<String>,
    pub history: Vec<Event>,
}

impl Ran {
    pub fn fingerprint(&self) -> u64 {
        fingerprint(&self.history)
    }
}

pub fn user(number: u64) -> String {
    format!("user-{number}")
}

/// Runs a plan with some guards switched off.
pub fn run(plan: &Plan, off: &[Guard]) -> Ran {
    // The real back-offs take their jitter from here.
    fastrand::seed(plan.noise);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime without any driver but time");
    runtime.block_on(async {
        let world = World::new(plan.noise, off);
        let checked = {
            let world = world.clone();
            async move { play(plan, &world).await }
        };
        tokio::select! {
            biased;
            () = world.failed() => {}
            () = checked => {}
        }
        Ran { violation: world.violation(), history: world.history() }
    })
}

async fn play(plan: &Plan, world: &World) {
    let mut cluster = Cluster::start(world, plan);
    for number in 0..USERS {
        let account = AccountRow { id: number as i64 + 1, balance: 0 };
        cluster.databases[1].state().tables.accounts.insert(user(number), account);
    }
    let calls = Calls::default();
    let mut tasks = Vec::new();
    // What ends later: a restart, a thaw, a recovery.
    let mut later: BTreeMap<(u64, usize), Act> = BTreeMap::new();
    let mut frozen = BTreeMap::new();
    let mut next = 0;
    while next < plan.acts.len() || !later.is_empty() {
        let due = plan.acts.get(next).map(|(at, _)| *at);
        if let Some(((at, n), act)) = later.pop_first() {
            if due.is_none_or(|due| at <= due) {
                world.until(at.min(FAULTS_END_MS)).await;
                ends(&mut cluster, &act, n, &mut frozen);
                continue;
            }
            later.insert((at, n), act);
        }
        let (at, act) = &plan.acts[next];
        world.until(*at).await;
        match act {
            Act::Place { .. } | Act::Deposit { .. } => tasks.push(call(&cluster, &calls, next, act.clone())),
            fault => {
                if let Some(for_ms) = begins(&mut cluster, fault, next, &mut frozen) {
                    later.insert((at + for_ms, next), fault.clone());
                }
            }
        }
        next += 1;
    }
    world.until(FAULTS_END_MS).await;
    cluster.heal();
    cluster.kafka.calm();
    cluster.databases.iter().for_each(Postgres::calm);
    world.tell(0, "peace", [0; 3]);
    loop {
        if tasks.iter().all(tokio::task::JoinHandle::is_finished) && checks::is_quiet(&cluster) {
            return checks::at_the_end(&cluster, &calls);
        }
        if world.now_ms() > FAULTS_END_MS + PEACE_MS {
            return checks::too_late(&cluster);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Begins a fault; it ends after what is returned.
fn begins(cluster: &mut Cluster, act: &Act, n: usize, frozen: &mut BTreeMap<usize, Process>) -> Option<u64> {
    let (databases, kafka) = (&cluster.databases, &cluster.kafka);
    match *act {
        Act::Place { .. } | Act::Deposit { .. } => None,
        Act::Kill { process, for_ms } => {
            cluster.kill(process);
            Some(for_ms)
        }
        Act::Freeze { process, for_ms } => {
            frozen.insert(n, cluster.freeze(process));
            Some(for_ms)
        }
        Act::FreezeInside { process, for_ms } => {
            cluster.trap(process, for_ms);
            None
        }
        Act::Stop { process, for_ms } => {
            cluster.stop(process);
            Some(for_ms)
        }
        Act::LogLost { process, for_ms } => {
            cluster.set_off_the_log(process, true, for_ms.is_none());
            for_ms
        }
        Act::DatabaseCrash { database, for_ms } => {
            databases[database].crash();
            Some(for_ms)
        }
        Act::Wake { database } => {
            databases[database].notify();
            None
        }
        Act::BrokerAway { for_ms } => {
            kafka.set_up(false);
            Some(for_ms)
        }
        Act::CommitAnswersLost { database, times } => {
            databases[database].fate(Fate::AnswerLost, times);
            None
        }
        Act::CommitsRefused { database, times } => {
            databases[database].fate(Fate::Refused, times);
            None
        }
        Act::CommitsSlow { database, times, ms } => {
            databases[database].fate(Fate::Slow(ms), times);
            None
        }
        Act::HoldOpen { database, for_ms } => {
            databases[database].hold_open(for_ms);
            None
        }
        Act::AcksLost { times } => {
            kafka.luck(Luck::AckLost, times);
            None
        }
        Act::AppendsTwice { times } => {
            kafka.luck(Luck::Twice, times);
            None
        }
        Act::AppendsLate { times, ms } => {
            kafka.luck(Luck::Late(ms), times);
            None
        }
        Act::Expire { topic } => {
            kafka.expire(TOPICS[topic]);
            None
        }
        Act::Wipe { topic, made_anew } => {
            kafka.wipe(TOPICS[topic], made_anew);
            None
        }
        Act::Replay { database } => {
            tokio::spawn(replay(databases[database].clone(), kafka.clone(), TOPICS[1 - database]));
            None
        }
        Act::ForgeRequest { .. } | Act::ForgeResult { .. } | Act::Poison { .. } => {
            kafka.land(&[forged(act)]);
            None
        }
    }
}

/// An operator's statement waits for the rows like any other.
async fn replay(db: Postgres, kafka: Kafka, topic: &'static str) -> Result<(), DbError> {
    let mut tx = db.begin(&Process::new(0, "operator".into())).await?;
    let all: Vec<i32> = db.state().tables.offsets.keys().copied().collect();
    for partition in all {
        tx.lock(Key::Offset(partition)).await?;
    }
    tx.write(move |tables| {
        for row in tables.offsets.values_mut() {
            row.next_offset = 0;
            row.epoch += 1;
        }
        if kafka.was_wiped(topic) {
            // What the new topic held below the old offset was passed over; now it comes after what lies behind it (S8 is the log's order as it
            // was read).
            tables.decided_last.clear();
        }
    });
    tx.commit().await
}

fn ends(cluster: &mut Cluster, act: &Act, n: usize, frozen: &mut BTreeMap<usize, Process>) {
    match *act {
        Act::Kill { process, .. } | Act::Stop { process, .. } => cluster.restart(process),
        Act::Freeze { .. } => drop(frozen.remove(&n).map(|process| process.thaw())),
        Act::LogLost { process, .. } => cluster.set_off_the_log(process, false, false),
        Act::DatabaseCrash { database, .. } => cluster.databases[database].recover(),
        Act::BrokerAway { .. } => cluster.kafka.set_up(true),
        _ => {}
    }
}

/// A record of another producer's, without any of our headers.
fn forged(act: &Act) -> Record {
    let (topic, key, value) = match *act {
        Act::ForgeRequest { order, user: number, amount } => {
            let event = PaymentRequested {
                order_id: Uuid::from_u128(order.into()),
                user_id: UserId::new(user(number)).expect("short and visible"),
                amount: Amount::from_minor(amount).expect("positive"),
                description: None,
                timestamp: DateTime::UNIX_EPOCH,
            };
            (0, user(number), event.encode())
        }
        Act::ForgeResult { order, finished } => {
            let order_id = Uuid::from_u128(order.into());
            let outcome = if finished { Outcome::Finished } else { Outcome::Cancelled };
            (1, order_id.to_string(), PaymentStatusUpdated { order_id, outcome, failure_reason: None }.encode())
        }
        Act::Poison { topic, key } => (topic, user(key), POISON.to_vec()),
        _ => unreachable!("only these acts are records"),
    };
    Record {
        topic: TOPICS[topic].into(),
        key: Some(Bytes::from(key)),
        value: Some(Bytes::from(value)),
        headers: Vec::new(),
        timestamp: DateTime::UNIX_EPOCH,
    }
}

/// A client's call: the same again, at any replica, until it hears something or gives up.
fn call(cluster: &Cluster, calls: &Calls, n: usize, act: Act) -> tokio::task::JoinHandle<()> {
    let world = cluster.world.clone();
    let payments = cluster.databases[1].clone();
    let role = if matches!(act, Act::Place { .. }) { Role::Orders } else { Role::Payments };
    // A client keeps to the replicas that it was told of at first; those that ended do not answer it.
    let replicas: Vec<_> = (0..TRIES).map(|_| cluster.any(role)).collect();
    calls.lock().expect("no holder of this lock panics").insert(n, (act.clone(), None));
    let calls = calls.clone();
    tokio::spawn(async move {
        let mut heard = Heard::Nothing;
        for replica in replicas {
            let answered = tokio::time::timeout(PATIENCE, async {
                match (&act, replica?) {
                    (Act::Place { order, user: number, amount }, (_, Some(intake))) => {
                        let place = Place { order: Uuid::from_u128((*order).into()), user: user(*number), amount: *amount };
                        intake.submit(place).await.ok()?.ok().map(Heard::Placed)
                    }
                    (Act::Deposit { key, user: number, amount }, (process, _)) => {
                        deposit(&payments, &process, *key, &user(*number), *amount).await.ok().map(Heard::Deposited)
                    }
                    _ => None,
                }
            });
            if let Ok(Some(answer)) = answered.await {
                heard = answer;
                break;
            }
            tokio::time::sleep(Duration::from_millis(world.pick(100..1_500))).await;
        }
        world.tell(0, "client heard", [n as i64, i64::from(heard != Heard::Nothing), 0]);
        calls.lock().expect("no holder of this lock panics").insert(n, (act, Some(heard)));
    })
}
