//! Everything that is tortured: a broker, a database server for each service, two replicas of every role.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use diesel_async::SimpleAsyncConnection;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use shopd::config::{Config, DatabaseConfig, KafkaConfig, Secret};
use shopd::db::{Conn, Db};
use shopd::embedded::{self, Server};
use shopd::messaging::log::{KafkaLog, Log};
use tokio::sync::Mutex;

use super::plan::sweeps;
use super::replica::{Replica, Role, shopd};
use super::support::kafka::Broker;
use super::support::postgres;
use super::support::shop::{Client, poll};

pub const REQUESTS: &str = "order-payment-requests";
pub const RESULTS: &str = "payment-status-updates";
pub const REPLICAS: usize = 2;
pub const ROLES: [Role; 4] = [Role::Gateway, Role::Orders, Role::Payments, Role::Relay];
/// Until everything is ready again after the last fault.
const READY_WITHIN: Duration = Duration::from_secs(60);
const COMMAND_WITHIN: Duration = Duration::from_secs(120);

/// A database server of one's own, that may be ended at any moment.
pub struct Postgres {
    pub server: Server,
    pub dir: PathBuf,
}

impl Postgres {
    async fn start() -> Self {
        let dir = postgres::own_dir();
        let mut options = postgres::options(&dir);
        // Processes are killed here, the machine is not: what the system was handed is safe. What a commit has acknowledged
        // must have been handed over.
        for (name, value) in &mut options.settings {
            if name == "synchronous_commit" || name == "full_page_writes" {
                *value = "on".into();
            }
        }
        let server = embedded::start(&options).await.expect("a database server");
        Self { server, dir }
    }
}

/// What outlives a round.
pub struct Stores {
    pub broker: Mutex<Broker>,
    pub orders: Mutex<Postgres>,
    pub payments: Mutex<Postgres>,
}

impl Stores {
    pub async fn start() -> Self {
        let (broker, orders, payments) = tokio::join!(Broker::new(), Postgres::start(), Postgres::start());
        Self { broker: Mutex::new(broker), orders: Mutex::new(orders), payments: Mutex::new(payments) }
    }
}

pub struct Cluster {
    pub replicas: Vec<Mutex<Replica>>,
    pub env: Vec<(String, String)>,
    pub kafka: KafkaConfig,
    pub orders: Db,
    pub payments: Db,
    pub orders_url: String,
    pub payments_url: String,
    /// Of consumers and relays.
    pub lease: Duration,
    pub gateways: Vec<String>,
    pub direct_orders: Vec<String>,
    pub direct_payments: Vec<String>,
}

impl Cluster {
    /// New databases and topics for `seed`, every replica started, ready.
    pub async fn start(stores: &Stores, seed: u64, dir: &Path) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ 0x5eed);
        let lease = Duration::from_millis([800, 1_000, 3_000][rng.random_range(0..3)]);
        let partitions = rng.random_range(2..=6);
        let name = format!("seed_{seed}");
        let (orders_url, payments_url) = (database(&stores.orders, &name).await, database(&stores.payments, &name).await);
        let bootstrap = stores.broker.lock().await.bootstrap.clone();
        let prefix = format!("{name}.");
        let ports: Vec<u16> = free_ports(ROLES.len() * REPLICAS);
        let urls = |role: usize| -> Vec<String> {
            ports[role * REPLICAS..][..REPLICAS].iter().map(|port| format!("http://127.0.0.1:{port}")).collect()
        };
        let (gateways, direct_orders, direct_payments) = (urls(0), urls(1), urls(2));
        let env: Vec<(String, String)> = [
            ("SHOPD__KAFKA__BOOTSTRAP_SERVERS", bootstrap.clone()),
            ("SHOPD__KAFKA__TOPIC_PREFIX", prefix.clone()),
            ("SHOPD__KAFKA__PARTITIONS", partitions.to_string()),
            ("SHOPD__KAFKA__REQUEST_TIMEOUT_MS", "3000".into()),
            ("SHOPD__ORDERS__DATABASE_URL", orders_url.clone()),
            ("SHOPD__PAYMENTS__DATABASE_URL", payments_url.clone()),
            ("SHOPD__CONSUMER__LEASE_MS", lease.as_millis().to_string()),
            ("SHOPD__RELAY__LEASE_MS", lease.as_millis().to_string()),
            ("SHOPD__GATEWAY__ORDERS_URLS", direct_orders.join(",")),
            ("SHOPD__GATEWAY__PAYMENTS_URLS", direct_payments.join(",")),
            ("SHOPD__ORDERS__SWEEP_AFTER_MS", if sweeps(seed) { "2000" } else { "3600000" }.into()),
            ("SHOPD__HTTP__WORKERS", "1".into()),
            ("RUST_BACKTRACE", "1".into()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec();
        let mut replicas = Vec::new();
        for (index, port) in ports.iter().enumerate() {
            let (role, n) = (ROLES[index / REPLICAS], index % REPLICAS);
            let log = dir.join(format!("{}-{n}.log", role.as_str()));
            replicas.push(Mutex::new(Replica::new(role, n, *port, &env, log)));
        }
        let kafka = KafkaConfig { bootstrap_servers: vec![bootstrap], topic_prefix: prefix, ..Config::default().kafka };
        let (orders, payments) = (connect(&orders_url), connect(&payments_url));
        let cluster = Self {
            replicas,
            env,
            kafka,
            orders,
            payments,
            orders_url,
            payments_url,
            lease,
            gateways,
            direct_orders,
            direct_payments,
        };
        let (code, said) = cluster.command(&["migrate"]).await;
        assert_eq!(code, Some(0), "{said}");
        for replica in &cluster.replicas {
            replica.lock().await.start("");
        }
        cluster.ready().await.expect("a fresh shop is ready");
        cluster
    }

    /// Runs `shopd ARGS` to its end; its exit status, and what it said.
    pub async fn command(&self, args: &[&str]) -> (Option<i32>, String) {
        let mut command = tokio::process::Command::new(shopd());
        command.args(args).args(["--log", "json"]).envs(self.env.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).kill_on_drop(true);
        match tokio::time::timeout(COMMAND_WITHIN, command.output()).await {
            Ok(output) => {
                let output = output.expect("shopd starts");
                let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).join("");
                (output.status.code(), said)
            }
            Err(_) => (None, format!("shopd {args:?} does not end within {COMMAND_WITHIN:?}")),
        }
    }

    /// Waits until every replica answers ready.
    pub async fn ready(&self) -> Result<(), String> {
        let since = Instant::now();
        for replica in &self.replicas {
            let (client, name) = {
                let replica = replica.lock().await;
                (Client::new(replica.address.clone()), replica.name.clone())
            };
            loop {
                let asked = tokio::time::timeout(Duration::from_secs(3), client.send("GET", "/health/ready", &[], None)).await;
                let last = match asked {
                    Ok(Ok(answer)) if answer.status == 200 => break,
                    Ok(Ok(answer)) => answer.text,
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => "no answer".into(),
                };
                if let Some(died) = replica.lock().await.died() {
                    return Err(died);
                }
                if since.elapsed() > READY_WITHIN {
                    return Err(format!("{name} is not ready {READY_WITHIN:?} after the last fault: {last}"));
                }
                poll().await;
            }
        }
        Ok(())
    }

    /// Removes what the round made in the stores.
    pub async fn remove(self, stores: &Stores) {
        for replica in &self.replicas {
            replica.lock().await.kill();
        }
        let name = self.kafka.topic_prefix.trim_end_matches('.');
        for postgres in [&stores.orders, &stores.payments] {
            let url = postgres.lock().await.server.url("postgres").expose().to_owned();
            let mut conn = session(&url).await.expect("a session");
            conn.batch_execute(&format!("drop database {name} with (force)")).await.expect("dropped");
        }
        let client = rskafka::client::ClientBuilder::new(self.kafka.bootstrap_servers.clone()).build().await.expect("a broker");
        let controller = client.controller_client().expect("a controller");
        for topic in client.list_topics().await.expect("topics").iter().filter(|t| t.name.starts_with(&self.kafka.topic_prefix)) {
            controller.delete_topic(&topic.name, 5_000).await.expect("deleted");
        }
    }

    /// How far the log goes, both topics' partitions added up.
    pub async fn log_ends(&self) -> Result<(i64, i64), String> {
        let log = KafkaLog::new(&self.kafka);
        let mut ends = [0, 0];
        for (topic, sum) in [REQUESTS, RESULTS].into_iter().zip(&mut ends) {
            for partition in 0..log.partitions(topic).await.map_err(|error| error.to_string())? {
                *sum += log.bounds(topic, partition).await.map_err(|error| error.to_string())?.1;
            }
        }
        Ok(ends.into())
    }
}

async fn database(postgres: &Mutex<Postgres>, name: &str) -> String {
    let postgres = postgres.lock().await;
    postgres.server.ensure_database(name).await.expect("a database");
    postgres.server.url(name).expose().to_owned()
}

fn limits() -> DatabaseConfig {
    let patient = Duration::from_secs(60);
    DatabaseConfig { idle_in_transaction_timeout: patient, statement_timeout: patient, ..Config::default().database }
}

pub fn connect(url: &str) -> Db {
    Db::new(&Secret::new(url), "torture", &limits()).expect("a database")
}

/// A session of its own.
pub async fn session(url: &str) -> Result<Conn, String> {
    connect(url).dedicated().await.map_err(|error| error.to_string())
}

/// Below the range that the system hands out to outgoing connections: a replica that is down must find its port free.
fn free_ports(count: usize) -> Vec<u16> {
    let begin = 23_000 + (std::process::id() % 600) as u16 * 10;
    let free: Vec<u16> =
        (begin..begin + 1_000).filter(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).take(count).collect();
    assert_eq!(free.len(), count, "free ports");
    free
}
