//! One shop: two databases, topics under a prefix, the four roles as processes.

use std::net::TcpListener;
use std::time::Duration;

use shopd::config::{Config, Secret};
use shopd::contracts::{ORDER_PAYMENT_REQUESTS, PAYMENT_STATUS_UPDATES};
use shopd::db::Db;
use shopd::messaging::log::KafkaLog;

use super::super::load::{self, Client, Load};
use super::super::{Result, machine};
use super::process::{self, Environment, Role};
use super::progress::{Counter, Progress};
use super::{Cpu, Servers};

/// In the order in which they are started.
pub const ROLES: [&str; 4] = ["orders", "payments", "relay", "gateway"];
/// Connections that fill a backlog; nothing is measured by them.
const FILLING: usize = 64;
const FILLING_TIME: Duration = Duration::from_secs(600);
/// Enough for every order of a run, in currency units.
const DEPOSIT: &str = "100000000";

pub struct Shop<'s> {
    servers: &'s Servers,
    number: u32,
    env: Environment,
    roles: Vec<(&'static str, Role)>,
    addresses: Vec<(&'static str, String)>,
    prefix: String,
    log: KafkaLog,
}

/// Below the range that the system hands out to clients: none of those has taken it when a role comes back.
fn free_port() -> Result<TcpListener> {
    let mut tries = std::iter::repeat_with(|| fastrand::u16(26_000..28_000)).take(100);
    let found = tries.find_map(|port| TcpListener::bind(("127.0.0.1", port)).ok());
    found.ok_or_else(|| "no free port from 26000 to 28000".into())
}

impl<'s> Shop<'s> {
    /// Fresh databases and topics, and these roles, ready.
    pub async fn open(servers: &'s Servers, roles: &[&'static str]) -> Result<Self> {
        let number = servers.next_shop();
        let (orders, payments, prefix) = (format!("orders_{number}"), format!("payments_{number}"), format!("bench{number}-"));
        let mut env: Environment = vec![
            ("SHOPD__KAFKA__BOOTSTRAP_SERVERS".into(), servers.kafka.address.clone()),
            ("SHOPD__KAFKA__TOPIC_PREFIX".into(), prefix.clone()),
            // Orders wait here because a role is stopped on purpose; asking again for them would be counted twice.
            ("SHOPD__ORDERS__SWEEP_AFTER_MS".into(), "600000".into()),
            ("SHOPD__ORDERS__DATABASE_URL".into(), servers.url(&orders)?),
            ("SHOPD__PAYMENTS__DATABASE_URL".into(), servers.url(&payments)?),
        ];
        // The gateway must find a role again that was stopped and started.
        let (mut addresses, mut held) = (Vec::new(), Vec::new());
        for role in ROLES {
            let free = free_port()?;
            let address = free.local_addr()?.to_string();
            held.push(free);
            env.push((format!("SHOPD__{}__LISTEN", role.to_uppercase()), address.clone()));
            if matches!(role, "orders" | "payments") {
                env.push((format!("SHOPD__GATEWAY__{}_URLS", role.to_uppercase()), format!("http://{address}")));
            }
            addresses.push((role, address));
        }
        drop(held);
        servers.create_database(&orders).await?;
        servers.create_database(&payments).await?;
        process::run(&env, &["migrate"]).await?;
        servers.checkpoint().await?;
        let log = servers.log(&prefix);
        let mut shop = Self { servers, number, env, roles: Vec::new(), addresses, prefix, log };
        shop.start_all(roles).await?;
        Ok(shop)
    }

    /// Returns when they are ready.
    pub async fn start_all(&mut self, roles: &[&'static str]) -> Result<()> {
        for role in roles {
            self.start(role).await?;
        }
        for (_, role) in &self.roles {
            role.ready().await?;
        }
        Ok(())
    }

    pub fn orders_database(&self) -> String {
        format!("orders_{}", self.number)
    }

    pub fn payments_database(&self) -> String {
        format!("payments_{}", self.number)
    }

    /// `host:port` of a role, whether it runs or not.
    pub fn address(&self, role: &str) -> &str {
        self.addresses.iter().find(|(name, _)| *name == role).map_or("", |(_, address)| address)
    }

    /// Another client of the same topics, with connections of its own.
    pub fn log_of_its_own(&self) -> KafkaLog {
        self.servers.log(&self.prefix)
    }

    /// Returns when it listens.
    pub async fn start(&mut self, role: &'static str) -> Result<&Role> {
        let started = Role::start(&self.env, role).await?;
        self.roles.push((role, started));
        Ok(&self.roles[self.roles.len() - 1].1)
    }

    pub async fn stop(&mut self, role: &str) -> Result<()> {
        let at = self.roles.iter().position(|(name, _)| *name == role).ok_or_else(|| format!("{role} does not run"))?;
        self.roles.remove(at).1.stop().await
    }

    pub fn pids(&self) -> Vec<(&'static str, u32)> {
        self.roles.iter().map(|(name, role)| (*name, role.pid)).collect()
    }

    /// CPU time so far, of each role, Postgres and Kafka.
    pub fn cpu(&self) -> Cpu {
        let mut cpu = self.servers.cpu();
        for (name, pid) in self.pids() {
            cpu.add(name, pid, machine::cpu(pid));
        }
        cpu
    }

    /// The users `u0..`, each with enough for everything; payments must run.
    pub async fn accounts(&self, count: usize) -> Result<()> {
        let open: load::Requests = (0..count).map(|n| load::post(&format!("/api/Account/u{n}"), "", "")).collect();
        let deposit = |n| load::post(&format!("/api/Account/u{n}/deposit"), "", DEPOSIT);
        for requests in [open, (0..count).map(deposit).collect()] {
            let connections = FILLING.min(count);
            Load::counted(self.address("payments"), requests, connections, count, FILLING_TIME).run_accepted().await?;
        }
        Ok(())
    }

    /// Accepts `count` orders over `accounts`.
    pub async fn place(&self, count: usize, accounts: usize) -> Result<load::Ran> {
        self.send(load::orders("/api/Orders", "", accounts), count).await
    }

    /// Sends `count` requests to the orders role, these by turns.
    pub async fn send(&self, requests: load::Requests, count: usize) -> Result<load::Ran> {
        Load::counted(self.address("orders"), requests, FILLING, count, FILLING_TIME).run_accepted().await
    }

    /// Requests on Kafka.
    pub fn requests_published(&self) -> Counter<'_> {
        Counter::log(&self.log, ORDER_PAYMENT_REQUESTS)
    }

    /// Results on Kafka.
    pub fn results_published(&self) -> Counter<'_> {
        Counter::log(&self.log, PAYMENT_STATUS_UPDATES)
    }

    /// Requests that payments has decided on.
    pub async fn decided(&self) -> Result<Counter<'static>> {
        Counter::consumed(self.servers.connect(&self.payments_database()).await?).await
    }

    /// Results that orders has applied.
    pub async fn finished(&self) -> Result<Counter<'static>> {
        Counter::consumed(self.servers.connect(&self.orders_database()).await?).await
    }

    /// Waits until every order has ended, and looks that it has.
    pub async fn all_final(&self) -> Result<()> {
        let client = self.servers.connect(&self.orders_database()).await?;
        let orders: i64 = client.query_one("select count(*) from orders", &[]).await?.try_get(0)?;
        // Those that were there before the first record, because somebody filled the tables, have ended.
        let asked = "select count(*) from orders where status in ('New', 'Processing')";
        let mut left = i64::MAX;
        let progress = Progress::begin();
        while left > 0 {
            left = client.query_one(asked, &[]).await?.try_get(0)?;
            progress.patience(&format!("of {orders} orders {left} have not ended"))?;
            if left > 0 {
                tokio::time::sleep(Duration::from_millis(50 + (left as u64 / 50).min(1_000))).await;
            }
        }
        Ok(())
    }

    /// One number that a statement over a database of the shop's answers.
    pub async fn ask(&self, database: &str, statement: &str) -> Result<i64> {
        Ok(self.servers.connect(database).await?.query_one(statement, &[]).await?.try_get(0)?)
    }

    /// What `shopd audit` says in a word, where all is true.
    pub async fn audit(&self) -> Result<serde_json::Value> {
        let said = process::run(&self.env, &["audit", "--json"]).await?;
        let last = said.lines().last().unwrap_or_default();
        Ok(serde_json::from_str::<serde_json::Value>(last)?["summary"].take())
    }

    pub async fn client(&self, role: &str) -> Result<Client> {
        Client::open(self.address(role)).await
    }

    /// A database over the library's own pool, for what the library does to it.
    pub fn batches_of_payments(&self) -> Result<Db> {
        let url = Secret::new(self.servers.url(&self.payments_database())?);
        Ok(Db::for_batches(&url, "bench", &Config::default().database)?)
    }

    /// Ends it, and drops what it kept.
    pub async fn close(mut self) -> Result<()> {
        while let Some((_, role)) = self.roles.pop() {
            role.stop().await?;
        }
        self.servers.delete_topics(&self.prefix).await?;
        self.servers.drop_database(&self.orders_database()).await?;
        self.servers.drop_database(&self.payments_database()).await
    }
}
