//! The processes: every role's real loops over the models, started, stopped, frozen and killed.

use std::collections::BTreeSet;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use shopd::config::{Config, ConsumerConfig, RelayConfig};
use shopd::contracts::{ORDER_PAYMENT_REQUESTS, PAYMENT_STATUS_UPDATES};
use shopd::messaging::log::SharedLog;
use shopd::messaging::{Consumer, Reach};
use shopd::orders::{SweepRules, run_sweeper};
use shopd::relay::Relay;
use shopd::shutdown::Shutdown;
use tokio::sync::Notify;

use crate::effects::{Ends, Pays};
use crate::inbox::{Effect, ProcessInbox};
use crate::kafka::{Kafka, ProcessLog};
use crate::outbox::ProcessOutbox;
use crate::plan::Plan;
use crate::postgres::Postgres;
use crate::service::{Intake, intake};
use crate::sweeper::ProcessSweeper;
use crate::world::{Process, World};

pub const TOPICS: [&str; 2] = [ORDER_PAYMENT_REQUESTS, PAYMENT_STATUS_UPDATES];

/// Quick, so that what the log lost heals within a run.
const SWEEP: SweepRules = SweepRules { after: Duration::from_secs(3), asks_per_second_max: 20 };
/// Longer than this a clean stop does not take before it ends by force.
const DRAIN: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Orders,
    Payments,
    Relay,
}

struct Slot {
    role: Role,
    process: Process,
    stop: Shutdown,
    intake: Option<Intake>,
}

pub struct Cluster {
    pub world: World,
    pub kafka: Kafka,
    /// Orders' and payments'.
    pub databases: [Postgres; 2],
    slots: Vec<Slot>,
    /// Slots whose processes do not reach the broker, whoever runs in them.
    cut_off_for_good: BTreeSet<usize>,
    started: u32,
    consumer: ConsumerConfig,
    relay: RelayConfig,
    partitions: i32,
}

impl Cluster {
    pub fn start(world: &World, plan: &Plan) -> Self {
        let kafka = Kafka::start(world.clone(), &TOPICS, plan.partitions);
        let databases = [1, 2].map(|number| Postgres::start(world.clone(), kafka.clone(), number));
        let config = Config::default();
        // Small, so that pages and batches end in the middle of things.
        let relay = RelayConfig { batch_rows_max: 3, ..config.relay };
        let consumer = ConsumerConfig { batch_records_max: 5, ..config.consumer };
        let mut cluster = Self {
            world: world.clone(),
            kafka,
            databases,
            slots: Vec::new(),
            cut_off_for_good: BTreeSet::new(),
            started: 0,
            consumer,
            relay,
            partitions: plan.partitions as i32,
        };
        for (role, replicas) in [Role::Orders, Role::Payments, Role::Relay].into_iter().zip(plan.replicas) {
            for _ in 0..replicas {
                let slot = cluster.process(role);
                cluster.slots.push(slot);
            }
        }
        cluster
    }

    fn process(&mut self, role: Role) -> Slot {
        self.started += 1;
        let process = Process::new(self.started, format!("{role:?}-{}", self.started));
        let stop = Shutdown::new();
        let mut slot = Slot { role, process: process.clone(), stop: stop.clone(), intake: None };
        self.world.tell(process.number(), "process starts", [role as i64, 0, 0]);
        let [orders, payments] = self.databases.clone();
        match role {
            Role::Orders => {
                slot.intake = Some(intake(orders.clone(), process.clone()));
                let sweeper = ProcessSweeper { db: orders.clone(), process: process.clone(), rules: SWEEP };
                tokio::spawn(run_sweeper(sweeper, stop.clone()));
                self.consume::<Ends>(orders, process, PAYMENT_STATUS_UPDATES, stop);
            }
            Role::Payments => self.consume::<Pays>(payments, process, ORDER_PAYMENT_REQUESTS, stop),
            Role::Relay => {
                let reach = Arc::new(Reach::default());
                for (db, name) in [(orders, "orders"), (payments, "payments")] {
                    let owner = format!("{}-{name}", process.name());
                    let relay = Relay {
                        db: ProcessOutbox { db, process: process.clone() },
                        log: self.log(&process),
                        reach: reach.clone(),
                        name,
                        owner,
                        config: self.relay.clone(),
                        partitions: self.partitions,
                        wake: Arc::new(Notify::new()),
                    };
                    tokio::spawn(relay.run(stop.clone()));
                }
            }
        }
        slot
    }

    fn log(&self, process: &Process) -> SharedLog {
        Arc::new(ProcessLog { kafka: self.kafka.clone(), process: process.clone() })
    }

    fn consume<E: Effect>(&self, db: Postgres, process: Process, topic: &str, stop: Shutdown) {
        let log = self.log(&process);
        let inbox = ProcessInbox::<E> { db, process, lease: self.consumer.lease, effect: PhantomData };
        tokio::spawn(Consumer::over(inbox, log, topic, self.consumer.clone()).run(stop));
    }

    pub fn kill(&mut self, slot: usize) {
        let process = self.slots[slot].process.clone();
        if process.is_dead() {
            return;
        }
        self.world.tell(process.number(), "process killed", [0; 3]);
        process.kill();
        self.databases.iter().for_each(|db| db.disconnected(&process));
    }

    pub fn freeze(&self, slot: usize) -> Process {
        let process = self.slots[slot].process.clone();
        self.world.tell(process.number(), "process frozen", [0; 3]);
        process.freeze();
        process
    }

    /// Between this process and the broker.
    pub fn set_off_the_log(&mut self, slot: usize, off: bool, for_good: bool) {
        let process = &self.slots[slot].process;
        self.world.tell(process.number(), "process off the log; or on it again", [i64::from(off), i64::from(for_good), 0]);
        if for_good {
            self.cut_off_for_good.insert(slot);
        }
        process.set_off_the_log(off || self.cut_off_for_good.contains(&slot));
    }

    pub fn trap(&self, slot: usize, for_ms: u64) {
        self.slots[slot].process.set_trap(Some(for_ms));
    }

    /// SIGTERM; by force later, as the one who runs it would.
    pub fn stop(&self, slot: usize) {
        let Slot { process, stop, .. } = &self.slots[slot];
        self.world.tell(process.number(), "process told to stop", [0; 3]);
        stop.stop();
        let (process, databases) = (process.clone(), self.databases.clone());
        tokio::spawn(async move {
            tokio::time::sleep(DRAIN).await;
            process.kill();
            databases.iter().for_each(|db| db.disconnected(&process));
        });
    }

    /// A new process in the place of one that was stopped or killed.
    pub fn restart(&mut self, slot: usize) {
        let old = &self.slots[slot];
        if old.process.is_dead() || old.stop.is_stopping() {
            self.slots[slot] = self.process(old.role);
            self.slots[slot].process.set_off_the_log(self.cut_off_for_good.contains(&slot));
        }
    }

    /// Whatever was done to the processes is over.
    pub fn heal(&mut self) {
        for slot in 0..self.slots.len() {
            self.slots[slot].process.set_trap(None);
            self.slots[slot].process.thaw();
            self.restart(slot);
        }
    }

    /// One that a client would be sent to; dead ones refuse at once.
    pub fn any(&self, role: Role) -> Option<(Process, Option<Intake>)> {
        let live = self.slots.iter().filter(|s| s.role == role && !s.process.is_dead() && !s.stop.is_stopping());
        let live: Vec<&Slot> = live.collect();
        let slot = live.get(self.world.pick(0..live.len().max(1) as u64) as usize)?;
        Some((slot.process.clone(), slot.intake.clone()))
    }
}
