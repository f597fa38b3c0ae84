//! Every setting, layered (`default.toml`, profile, environment, flags) and validated at start. May import nothing of ours.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// A secret text (a database URL with its password): `Debug` and `Display` never show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself; never log it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("<secret>")
    }
}

#[derive(Clone, Debug)]
pub struct Config {
    pub gateway: GatewayConfig,
    pub orders: ServiceConfig,
    pub payments: ServiceConfig,
    pub relay: RelayConfig,
    pub kafka: KafkaConfig,
    pub log: LogConfig,
    pub database: DatabaseConfig,
    pub consumer: ConsumerConfig,
    pub http: HttpConfig,
    pub shutdown: ShutdownConfig,
    /// What `all` keeps.
    pub data_dir: PathBuf,
}

#[derive(Clone, Debug)]
pub struct GatewayConfig {
    pub listen: SocketAddr,
    /// Base URLs of the replicas, `http://host:port`, no path.
    pub orders_urls: Vec<String>,
    pub payments_urls: Vec<String>,
    pub upstream_timeout: Duration,
}

/// Orders and payments have the same settings.
#[derive(Clone, Debug)]
pub struct ServiceConfig {
    pub listen: SocketAddr,
    pub database_url: Option<Secret>,
}

#[derive(Clone, Debug)]
pub struct RelayConfig {
    pub listen: SocketAddr,
    /// Outbox rows published at once.
    pub batch_rows_max: i64,
    /// The safety net under the wake-up signal.
    pub poll_interval: Duration,
    /// How long an outbox stays with a relay that says nothing.
    pub lease: Duration,
}

#[derive(Clone, Debug)]
pub struct KafkaConfig {
    /// `host:port`; empty: none configured.
    pub bootstrap_servers: Vec<String>,
    /// For topics that are created.
    pub partitions: i32,
    /// Put before every topic's name, for several shops on one cluster.
    pub topic_prefix: String,
    /// Bound on one request to the broker.
    pub request_timeout: Duration,
    /// How long a fetch may wait at the broker for a first record.
    pub fetch_wait: Duration,
    /// Cap on one produced batch; below the broker's `max.message.bytes`.
    pub batch_bytes_max: usize,
}

/// The log that `all` keeps in Postgres.
#[derive(Clone, Debug)]
pub struct LogConfig {
    pub retention: Duration,
}

#[derive(Clone, Debug)]
pub struct DatabaseConfig {
    /// Connections a process holds to one database at most.
    pub pool_size_max: usize,
    pub connect_timeout: Duration,
    pub statement_timeout: Duration,
    pub lock_timeout: Duration,
    pub idle_in_transaction_timeout: Duration,
}

#[derive(Clone, Debug)]
pub struct ConsumerConfig {
    /// Records in one transaction at most.
    pub batch_records_max: usize,
    /// How long a partition stays with a consumer that says nothing.
    pub lease: Duration,
}

#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// Worker threads of one server.
    pub workers: usize,
    /// How long a client may take to send its request's head.
    pub header_timeout: Duration,
    pub keep_alive: Duration,
    pub connections_max: usize,
}

#[derive(Clone, Debug)]
pub struct ShutdownConfig {
    pub timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        let any = |port| SocketAddr::from(([0, 0, 0, 0], port));
        Self {
            gateway: GatewayConfig {
                listen: any(8000),
                orders_urls: vec!["http://127.0.0.1:8082".into()],
                payments_urls: vec!["http://127.0.0.1:8080".into()],
                upstream_timeout: Duration::from_millis(10_000),
            },
            orders: ServiceConfig { listen: any(8082), database_url: None },
            payments: ServiceConfig { listen: any(8080), database_url: None },
            relay: RelayConfig {
                listen: any(8083),
                batch_rows_max: 2_000,
                poll_interval: Duration::from_millis(1_000),
                lease: Duration::from_millis(3_000),
            },
            kafka: KafkaConfig {
                bootstrap_servers: Vec::new(),
                partitions: 12,
                topic_prefix: String::new(),
                request_timeout: Duration::from_millis(5_000),
                fetch_wait: Duration::from_millis(5_000),
                batch_bytes_max: 900_000,
            },
            log: LogConfig { retention: Duration::from_secs(7 * 24 * 3600) },
            database: DatabaseConfig {
                pool_size_max: 8,
                connect_timeout: Duration::from_millis(5_000),
                statement_timeout: Duration::from_millis(8_000),
                lock_timeout: Duration::from_millis(2_000),
                idle_in_transaction_timeout: Duration::from_millis(2_000),
            },
            consumer: ConsumerConfig { batch_records_max: 1_000, lease: Duration::from_millis(3_000) },
            http: HttpConfig {
                workers: 2,
                header_timeout: Duration::from_millis(10_000),
                keep_alive: Duration::from_millis(75_000),
                connections_max: 20_000,
            },
            shutdown: ShutdownConfig { timeout: Duration::from_millis(10_000) },
            data_dir: PathBuf::from("/var/lib/shopd"),
        }
    }
}
