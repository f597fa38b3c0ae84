//! Does what the plan says, several faults at a time, and undoes each. Two faults never share a target.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use diesel_async::SimpleAsyncConnection;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shopd::messaging::log::{KafkaLog, Log};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::cluster::{Cluster, Postgres, Stores, session};
use super::plan::{Fault, Service, Step};
use super::replica::Replica;

/// A fault that was done.
#[derive(Clone, Debug)]
pub struct Done {
    /// Since the round's load began.
    pub at: Duration,
    pub took: Duration,
    pub kind: &'static str,
    pub what: String,
}

pub struct Nemesis {
    stores: Arc<Stores>,
    cluster: Arc<Cluster>,
    begun: Instant,
    length: Duration,
    done: Mutex<Vec<Done>>,
    violations: Mutex<Vec<String>>,
}

impl Nemesis {
    /// For `length` from now on.
    pub fn new(stores: Arc<Stores>, cluster: Arc<Cluster>, length: Duration) -> Self {
        Self { stores, cluster, begun: Instant::now(), length, done: Mutex::default(), violations: Mutex::default() }
    }

    /// Does every step at its time; returns when the last is undone. Then every replica runs without faults.
    pub async fn run(self: Arc<Self>, steps: Vec<Step>) {
        let mut running = JoinSet::new();
        for step in steps {
            sleep(step.at.saturating_sub(self.begun.elapsed())).await;
            let nemesis = self.clone();
            running.spawn(async move {
                // Where another fault held its target until the end, this one was not done.
                let Some((begun, what)) = nemesis.perform(&step).await else { return };
                let done = Done { at: begun, took: nemesis.begun.elapsed() - begun, kind: step.fault.kind(), what };
                nemesis.done.lock().expect("nobody panics with it").push(done);
            });
        }
        while let Some(ended) = running.join_next().await {
            if let Err(error) = ended {
                self.wrong(format!("harness: a fault broke down: {error}"));
            }
        }
        sleep(self.length.saturating_sub(self.begun.elapsed())).await;
        for replica in &self.cluster.replicas {
            let mut replica = replica.lock().await;
            if let Some(died) = replica.died() {
                self.wrong(died);
                replica.start("");
            }
        }
    }

    /// What was done, by time, and what must not have happened.
    pub fn report(&self) -> (Vec<Done>, Vec<String>) {
        let mut done = self.done.lock().expect("nobody panics with it").clone();
        done.sort_by_key(|done| done.at);
        (done, self.violations.lock().expect("nobody panics with it").clone())
    }

    fn wrong(&self, what: String) {
        self.violations.lock().expect("nobody panics with it").push(what);
    }

    /// When it was done, and on what; `None` where it was not.
    async fn perform(&self, step: &Step) -> Option<(Duration, String)> {
        if let Some(replica) = step.fault.replica() {
            let mut replica = self.cluster.replicas[replica].lock().await;
            let (begun, lasts) = self.turn(step)?;
            if let Some(died) = replica.died() {
                self.wrong(died);
                replica.start("");
            }
            return Some((begun, self.on_replica(&mut replica, &step.fault, lasts).await));
        }
        if let Fault::BrokerKill | Fault::BrokerPause = step.fault {
            let broker = self.stores.broker.lock().await;
            let (begun, lasts) = self.turn(step)?;
            if let Fault::BrokerKill = step.fault {
                broker.kill().await;
                sleep(lasts).await;
                broker.start().await;
            } else {
                broker.pause().await;
                sleep(lasts).await;
                broker.resume().await;
            }
            return Some((begun, String::new()));
        }
        let (mut begun, mut lasts) = self.turn(step)?;
        let what = match &step.fault {
            Fault::PostgresRestart { services } => {
                let end = |service| self.end_server(service, Signal::SIGQUIT);
                futures::future::join_all(services.iter().copied().map(end)).await;
                format!("{services:?}")
            }
            Fault::PostgresKill { service } => {
                self.end_server(*service, Signal::SIGKILL).await;
                format!("{service:?}")
            }
            Fault::PostgresFreeze { service } => {
                let postgres = self.postgres(*service).lock().await;
                (begun, lasts) = self.turn(step)?;
                let frozen = processes(&postgres.dir.join("postgres"));
                let sent = |signal| frozen.iter().filter(|pid| kill(**pid, signal).is_ok()).count();
                let count = sent(Signal::SIGSTOP);
                if count == 0 {
                    self.wrong(format!("harness: {service:?}'s database server has no processes"));
                }
                sleep(lasts).await;
                sent(Signal::SIGCONT);
                format!("{service:?}, {count} processes")
            }
            Fault::SessionsEnded { service } => {
                let some = "select pg_terminate_backend(pid) from pg_stat_activity
                             where application_name like 'shopd-%' and application_name <> 'shopd-torture' and random() < 0.5";
                self.in_session(self.url(*service), some, Duration::ZERO).await;
                format!("{service:?}")
            }
            Fault::RecordsLost { topic } => format!("{topic}, {} offsets", self.lose(topic).await?),
            Fault::TransactionHeld { service } => {
                let url = self.postgres(*service).lock().await.server.url("postgres").expose().to_owned();
                let held = "begin; create table if not exists held (n int); insert into held values (1)";
                self.in_session(&url, held, lasts).await;
                format!("{service:?}")
            }
            _ => {
                let locked = "begin; select 1 from account where user_id in ('u0', 'u1') for update";
                self.in_session(&self.cluster.payments_url, locked, lasts).await;
                "u0, u1".to_owned()
            }
        };
        Some((begun, what))
    }

    /// Now, and how long a fault may last from now on; `None` where its time is over, because another held its target.
    fn turn(&self, step: &Step) -> Option<(Duration, Duration)> {
        let now = self.begun.elapsed();
        let left = self.length.checked_sub(now).filter(|left| !left.is_zero())?;
        Some((now, step.lasts.min(left)))
    }

    async fn on_replica(&self, replica: &mut Replica, fault: &Fault, lasts: Duration) -> String {
        match fault {
            Fault::Freeze { .. } => {
                replica.signal(Signal::SIGSTOP);
                sleep(lasts).await;
                replica.signal(Signal::SIGCONT);
                replica.name.clone()
            }
            Fault::Stop { .. } => {
                if let Err(wrong) = replica.stop().await {
                    self.wrong(wrong);
                }
                sleep(lasts).await;
                replica.start("");
                replica.name.clone()
            }
            Fault::Points { points, .. } => self.with_points(replica, points, lasts).await,
            _ => {
                replica.kill();
                sleep(lasts).await;
                replica.start("");
                replica.name.clone()
            }
        }
    }

    /// A replica killed and started with fault points, again whenever they end it; then killed and started without.
    async fn with_points(&self, replica: &mut Replica, points: &str, lasts: Duration) -> String {
        replica.kill();
        replica.start(points);
        let since = Instant::now();
        let mut crashes = 0;
        while since.elapsed() < lasts {
            sleep(Duration::from_millis(50)).await;
            if let Some(status) = replica.ended() {
                if !points.contains("crash") {
                    self.wrong(format!("{} ended by itself under {points}: {status}", replica.name));
                }
                crashes += 1;
                replica.start(points);
            }
        }
        replica.kill();
        replica.start("");
        format!("{} {points}, {crashes} crashes", replica.name)
    }

    /// How many offsets of a topic are no more; `None` where the broker is away.
    async fn lose(&self, topic: &str) -> Option<i64> {
        let log = KafkaLog::new(&self.cluster.kafka);
        let mut lost = 0;
        for partition in 0..log.partitions(topic).await.ok()? {
            let (start, end) = log.bounds(topic, partition).await.ok()?;
            log.delete_records_before(topic, partition, end).await.ok()?;
            lost += end - start;
        }
        Some(lost)
    }

    async fn end_server(&self, service: Service, signal: Signal) {
        let mut postgres = self.postgres(service).lock().await;
        // It may have ended already, which is what the signal wants.
        let _ = kill(Pid::from_raw(postgres.server.pid()), signal);
        postgres.server.exited().await;
        if let Err(error) = postgres.server.ensure_running().await {
            self.wrong(format!("harness: {service:?}'s database server does not start again: {error}"));
        }
    }

    /// A statement in a session of its own, which ends without a commit after `lasts`. The server may be away or go away meanwhile.
    async fn in_session(&self, url: &str, statement: &str, lasts: Duration) {
        if let Ok(mut conn) = session(url).await
            && conn.batch_execute(statement).await.is_ok()
        {
            sleep(lasts).await;
        }
    }

    fn url(&self, service: Service) -> &str {
        match service {
            Service::Orders => &self.cluster.orders_url,
            Service::Payments => &self.cluster.payments_url,
        }
    }

    fn postgres(&self, service: Service) -> &tokio::sync::Mutex<Postgres> {
        match service {
            Service::Orders => &self.stores.orders,
            Service::Payments => &self.stores.payments,
        }
    }
}

/// All of a database server's: each works in its data directory.
fn processes(pgdata: &Path) -> Vec<Pid> {
    let pgdata = pgdata.canonicalize().unwrap_or_default();
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let ours = all.filter(|entry| std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == pgdata));
    ours.filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(Pid::from_raw)).collect()
}
