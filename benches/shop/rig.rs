//! Everything that is measured: one Postgres server with two databases, Kafka, the four roles as processes.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use diesel::sql_types::BigInt;
use diesel_async::RunQueryDsl;
use serde_json::Value;
use shopd::config::{Config, Secret};
use shopd::contracts::ORDER_PAYMENT_REQUESTS;
use shopd::db::{Db, sql};
use shopd::embedded::{self, Options, Server};
use shopd::messaging::log::{KafkaLog, Log};
use uuid::Uuid;

use super::{Result, http, machine};

const PATIENCE: Duration = Duration::from_secs(120);

pub struct Rig {
    dir: tempfile::TempDir,
    postgres: Option<Server>,
    kafka_pid: u32,
    roles: Vec<(&'static str, Role)>,
    env: Vec<(String, String)>,
    orders: Db,
    payments: Db,
    kafka: String,
    pub orders_address: String,
    pub gateway_address: String,
    /// From the first role's start until all are ready.
    pub ready_after: Duration,
}

/// By process.
pub type Cpu = BTreeMap<&'static str, Duration>;

async fn ask(db: &Db, statement: &'static str) -> Result<i64> {
    #[derive(diesel::QueryableByName)]
    struct Count {
        #[diesel(sql_type = BigInt)]
        n: i64,
    }
    let mut conn = db.get().await?;
    Ok(sql(statement).get_result::<Count>(&mut *conn).await?.n)
}

struct Role {
    child: Child,
    address: String,
}

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Rig {
    pub async fn start() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("shopd-bench-").tempdir()?;
        let mut options = Options::new(dir.path().join("data"));
        // As the limits' own server.
        options.settings =
            [("shared_buffers", "512MB"), ("max_wal_size", "4GB"), ("checkpoint_timeout", "15min"), ("max_connections", "120")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .to_vec();
        let postgres = embedded::start(&options).await?;
        postgres.ensure_database("orders").await?;
        postgres.ensure_database("payments").await?;
        let kafka = kafka(dir.path(), "start")?;
        let kafka_pid = std::fs::read_to_string(dir.path().join("kafka/pid"))?.trim().parse()?;
        let url = |name: &str| postgres.url(name).expose().to_owned();
        let mut env: Vec<(String, String)> = [
            ("SHOPD__KAFKA__BOOTSTRAP_SERVERS", kafka.clone()),
            ("SHOPD__ORDERS__DATABASE_URL", url("orders")),
            ("SHOPD__PAYMENTS__DATABASE_URL", url("payments")),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec();
        for role in ["GATEWAY", "ORDERS", "PAYMENTS", "RELAY"] {
            env.push((format!("SHOPD__{role}__LISTEN"), "127.0.0.1:0".into()));
        }
        let migrated = command(&env, "migrate").stderr(Stdio::null()).status()?;
        if !migrated.success() {
            return Err("migrate failed".into());
        }
        let since = Instant::now();
        let mut roles: Vec<(&'static str, Role)> = Vec::new();
        for name in ["orders", "payments", "relay"] {
            roles.push((name, role(&env, name)?));
        }
        let address = |name: &str, roles: &[(&'static str, Role)]| {
            roles.iter().find(|(n, _)| *n == name).map(|(_, role)| role.address.clone()).unwrap_or_default()
        };
        env.push(("SHOPD__GATEWAY__ORDERS_URLS".into(), format!("http://{}", address("orders", &roles))));
        env.push(("SHOPD__GATEWAY__PAYMENTS_URLS".into(), format!("http://{}", address("payments", &roles))));
        roles.push(("gateway", role(&env, "gateway")?));
        for (_, role) in &roles {
            ready(&role.address).await?;
        }
        let ready_after = since.elapsed();
        let db = |name: &str| Db::new(&Secret::new(url(name)), "bench", &Config::default().database);
        let (orders, payments) = (db("orders")?, db("payments")?);
        let (orders_address, gateway_address) = (address("orders", &roles), address("gateway", &roles));
        Ok(Self {
            dir,
            postgres: Some(postgres),
            kafka_pid,
            roles,
            env,
            orders,
            payments,
            kafka,
            orders_address,
            gateway_address,
            ready_after,
        })
    }

    /// `u0..`, each with enough for everything.
    pub async fn accounts(&self, count: usize) -> Result<()> {
        let mut connection = http::Connection::open(&self.gateway_address).await?;
        for n in 0..count {
            for (path, body) in [(format!("/api/PaymentsProxy/u{n}"), ""), (format!("/api/PaymentsProxy/u{n}/deposit"), "1000000")]
            {
                let status = connection.post(&path, body).await?;
                if status != 200 {
                    return Err(format!("{path} was answered {status}").into());
                }
            }
        }
        Ok(())
    }

    /// Accepts `count` orders over `accounts`.
    pub async fn place(&self, count: usize, accounts: usize, connections: usize) -> Result<()> {
        let clients: Vec<_> = (0..connections)
            .map(|c| {
                let address = self.orders_address.clone();
                tokio::spawn(async move {
                    let mut connection = http::Connection::open(&address).await.map_err(|error| error.to_string())?;
                    for n in (c..count).step_by(connections) {
                        let body = format!(
                            r#"{{"orderId":"{}","userId":"u{}","amount":0.01,"description":"backlog"}}"#,
                            Uuid::now_v7(),
                            n % accounts
                        );
                        let status = connection.post("/api/Orders", &body).await.map_err(|error| error.to_string())?;
                        if status != 201 {
                            return Err(format!("an order was answered {status}"));
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        for client in clients {
            client.await??;
        }
        Ok(())
    }

    /// Waits until every order has ended, and looks that it has.
    pub async fn all_final(&self) -> Result<()> {
        self.finished(self.count().await?).await?;
        match ask(&self.orders, "select count(*) as n from orders where status = 'New'").await? {
            0 => Ok(()),
            left => Err(format!("{left} orders have not ended though every result was consumed").into()),
        }
    }

    /// Waits until that many results were applied. What is asked meanwhile costs next to nothing, however many orders there
    /// are: each has one result, so the consumer's offsets tell.
    pub async fn finished(&self, orders: i64) -> Result<()> {
        self.consumed("orders", &self.orders, orders).await
    }

    /// Waits until payments has decided on that many requests.
    pub async fn decided(&self, orders: i64) -> Result<()> {
        self.consumed("payments", &self.payments, orders).await
    }

    /// How many orders there are.
    pub async fn count(&self) -> Result<i64> {
        ask(&self.orders, "select count(*) as n from orders").await
    }

    /// Waits until everything in orders' outbox is on Kafka.
    pub async fn published(&self, count: i64) -> Result<()> {
        let mut config = Config::default().kafka;
        config.bootstrap_servers = vec![self.kafka.clone()];
        let log = KafkaLog::new(&config);
        let since = Instant::now();
        loop {
            let mut end = 0;
            for partition in 0..log.partitions(ORDER_PAYMENT_REQUESTS).await? {
                end += log.bounds(ORDER_PAYMENT_REQUESTS, partition).await?.1;
            }
            if end >= count {
                return Ok(());
            }
            if since.elapsed() > PATIENCE {
                return Err(format!("{end} of {count} requests are on Kafka").into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn consumed(&self, who: &str, db: &Db, records: i64) -> Result<()> {
        let since = Instant::now();
        while ask(db, "select coalesce(sum(next_offset), 0)::bigint as n from consumer_offset").await? < records {
            if since.elapsed() > PATIENCE {
                return Err(format!("{who} has not consumed {records} records within {PATIENCE:?}").into());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// SIGTERM, and waits for the end.
    pub async fn stop_role(&mut self, name: &str) -> Result<()> {
        let at = self.roles.iter().position(|(role, _)| *role == name).ok_or("no such role")?;
        let (_, mut role) = self.roles.remove(at);
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(role.child.id().cast_signed()), nix::sys::signal::Signal::SIGTERM)?;
        let since = Instant::now();
        while role.child.try_wait()?.is_none() {
            if since.elapsed() > PATIENCE {
                return Err(format!("{name} does not stop").into());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Starts a role that was stopped; the gateway does not hear of a new address, so it is none of what it asks.
    pub fn start_role(&mut self, name: &'static str) -> Result<()> {
        let started = role(&self.env, name)?;
        self.roles.push((name, started));
        Ok(())
    }

    /// User and system time so far: of each role, of Postgres with all its processes, of Kafka.
    pub fn cpu(&self) -> Cpu {
        let postgres = self.postgres.as_ref().map_or(0, Server::pid);
        let mut cpu: Cpu = self.roles.iter().map(|(name, role)| (*name, machine::cpu(role.child.id()))).collect();
        cpu.insert("postgres", machine::cpu_of_tree(postgres.cast_unsigned()));
        cpu.insert("kafka", machine::cpu(self.kafka_pid));
        cpu
    }

    pub fn resident_bytes(&self) -> Vec<(&'static str, u64)> {
        self.roles.iter().map(|(name, role)| (*name, machine::resident(role.child.id()))).collect()
    }

    pub async fn stop(mut self) -> Result<()> {
        self.roles.clear();
        kafka(self.dir.path(), "wipe")?;
        if let Some(postgres) = self.postgres.take() {
            postgres.stop(Duration::from_secs(20)).await?;
        }
        Ok(())
    }
}

/// `shopd all` on its embedded default: from the start of the process to ready, the data directory and caches warm; its
/// resident memory then.
pub async fn all_warm() -> Result<(Duration, u64)> {
    let dir = tempfile::Builder::new().prefix("shopd-bench-").tempdir()?;
    let data = dir.path().join("data");
    let mut times = Vec::new();
    let mut memory = 0;
    for _ in 0..4 {
        let env: Vec<_> = ["GATEWAY", "ORDERS", "PAYMENTS", "RELAY"]
            .map(|role| (format!("SHOPD__{role}__LISTEN"), "127.0.0.1:0".to_owned()))
            .to_vec();
        let since = Instant::now();
        let mut command = command(&env, "all");
        command.arg("--data-dir").arg(&data);
        let mut all = listening(command, "gateway")?;
        ready(&all.address).await?;
        times.push(since.elapsed());
        memory = machine::resident(all.child.id());
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(all.child.id().cast_signed()), nix::sys::signal::Signal::SIGTERM)?;
        all.child.wait()?;
    }
    // The first start made everything; it is not warm.
    times.remove(0);
    times.sort();
    Ok((times[times.len() / 2], memory))
}

fn command(env: &[(String, String)], role: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shopd"));
    command.arg(role).args(["--log", "json"]).envs(env.iter().map(|(n, v)| (n, v))).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn role(env: &[(String, String)], name: &'static str) -> Result<Role> {
    listening(command(env, name), name)
}

/// Starts it and waits for its address.
fn listening(mut command: Command, name: &str) -> Result<Role> {
    let mut child = command.stderr(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(child.stderr.take().ok_or("no pipe")?).lines();
    let mut said = Vec::new();
    while let Some(Ok(line)) = lines.next() {
        let entry: Value = serde_json::from_str(&line).unwrap_or_default();
        if entry["message"] == "listening" && entry["role"] == name {
            let address = entry["address"].as_str().unwrap_or_default().to_owned();
            // The pipe must not fill up.
            std::thread::spawn(move || lines.for_each(drop));
            return Ok(Role { child, address });
        }
        said.push(line);
    }
    Err(format!("{name} does not listen: {}", said.join("\n")).into())
}

async fn ready(address: &str) -> Result<()> {
    let since = Instant::now();
    let mut connection = http::Connection::open(address).await?;
    while !connection.get("/health/ready").await?.contains("\"ready\"") {
        if since.elapsed() > PATIENCE {
            return Err(format!("{address} is not ready").into());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// Runs `scripts/kafka/kafka VERB` for the rig's own broker; what it prints.
fn kafka(dir: &Path, verb: &str) -> Result<String> {
    let script: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/kafka/kafka");
    let mut command = Command::new(script);
    command.arg(verb).arg("--dir").arg(dir.join("kafka"));
    if verb == "start" {
        command.args(["--port", "0"]);
    }
    let output = command.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        return Err(format!("kafka {verb}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
