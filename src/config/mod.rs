//! Every setting: built-in defaults, `default.toml`, a profile, the environment, the later over the earlier; validated at start.
//!
//! Owns the settings' names, limits and defaults (`settings.rs` is the one table of them; docs/SETTINGS.md is compared with it).
//! Reads the files in `--config DIR` and those that `SHOPD__…_FILE` variables name; writes nothing. May import
//! [`crate::tls`], to read the files of certificates that are named in it.

mod edge;
mod kafka;
mod kinds;
mod layers;
mod load;
mod mistakes;
mod postgres;
mod require;
mod settings;
#[cfg(test)]
mod tests;

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

pub use load::{Sources, load};
pub use mistakes::Mistakes;
pub use postgres::{PostgresTarget, PostgresTls};
pub use settings::{SETTINGS, Setting, table};

/// What a process is for. It decides two things about its settings: the default of `*.listen` and which of them it cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    Gateway,
    Orders,
    Payments,
    Relay,
    /// Every role in one process.
    All,
    Migrate,
    Audit,
    Dlq,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Orders => "orders",
            Self::Payments => "payments",
            Self::Relay => "relay",
            Self::All => "all",
            Self::Migrate => "migrate",
            Self::Audit => "audit",
            Self::Dlq => "dlq",
        }
    }
}

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
    pub sweep: SweepConfig,
    pub relay: RelayConfig,
    pub kafka: KafkaConfig,
    pub log: LogConfig,
    pub database: DatabaseConfig,
    pub consumer: ConsumerConfig,
    pub http: HttpConfig,
    pub shutdown: ShutdownConfig,
    pub telemetry: TelemetryConfig,
    /// What `all` keeps, absolute; empty where no default could be found (no `XDG_DATA_HOME`, no `HOME`, not root).
    pub data_dir: PathBuf,
    /// `--data-dir` was given: `migrate`, `audit` and `dlq` then work on what `all` keeps there.
    pub data_dir_given: bool,
}

#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// Port 0 picks one.
    pub listen: SocketAddr,
    /// Base URLs of the replicas, `http://host:port` without a trailing slash; at least one, each once.
    pub orders_urls: Vec<String>,
    /// As `orders_urls`.
    pub payments_urls: Vec<String>,
    /// From a request's arrival to its answer, other replicas included; past it the answer is 504.
    pub upstream_timeout: Duration,
    /// Requests to the services under way at once; further ones wait their turn.
    pub in_flight_max: usize,
    /// How long one may wait its turn while that is a burst; longer, or where the queue does not empty any more, it is shed.
    pub queue_time_max: Duration,
    /// Each route once; empty: none.
    pub rate_limits: Vec<RateLimit>,
    /// Whose `X-Forwarded-For` says who the client is.
    pub trusted_proxies: Vec<IpNet>,
    /// Web pages that may ask, `*` for all; empty: none but our own.
    pub cors_origins: Vec<String>,
}

/// How often one client may ask for one route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// `POST /api/OrdersProxy`, or `*` for each route that has no limit of its own.
    pub route: String,
    /// Requests in one `window`; so many may come at once.
    pub count: NonZeroU32,
    pub window: Duration,
}

/// Orders and payments have the same settings.
#[derive(Clone, Debug)]
pub struct ServiceConfig {
    /// Port 0 picks one.
    pub listen: SocketAddr,
    /// `postgres://user:password@host:port/name`, readable by [`PostgresTarget`] and with a database name.
    pub database_url: Option<Secret>,
}

/// Asking again for orders without a result.
#[derive(Clone, Debug)]
pub struct SweepConfig {
    /// An order without a result after this is asked for again.
    pub after: Duration,
    /// Of all replicas together.
    pub asks_per_second_max: u32,
}

#[derive(Clone, Debug)]
pub struct RelayConfig {
    /// Port 0 picks one.
    pub listen: SocketAddr,
    /// Messages of the outbox published at once, about: a row of several is never cut.
    pub batch_rows_max: i64,
    /// Published messages that may lie in a busy outbox before whole segments are dropped; a quiet one is emptied at once.
    pub published_rows_max: usize,
    /// The safety net under the wake-up signal.
    pub poll_interval: Duration,
    /// How long an outbox stays with a relay that says nothing.
    pub lease: Duration,
}

#[derive(Clone, Debug)]
pub struct KafkaConfig {
    /// `host:port`; empty: none configured.
    pub bootstrap_servers: Vec<String>,
    /// For topics that are created, 1..=1000.
    pub partitions: i32,
    /// Put before every topic's name, for several shops on one cluster.
    pub topic_prefix: String,
    /// Bound on one request to the broker.
    pub request_timeout: Duration,
    /// How long a fetch may wait at the broker for a first record.
    pub fetch_wait: Duration,
    /// Cap on one produced batch, in bytes; below the broker's `message.max.bytes`.
    pub batch_bytes_max: usize,
    pub security_protocol: SecurityProtocol,
    /// Certificates of the authorities that brokers' certificates are signed by; `None`: those that the system trusts.
    pub ssl_ca_file: Option<PathBuf>,
    /// With the next one, or neither.
    pub ssl_certificate_file: Option<PathBuf>,
    pub ssl_key_file: Option<PathBuf>,
    /// Of no meaning without SASL.
    pub sasl_mechanism: SaslMechanism,
    pub sasl_username: Option<String>,
    pub sasl_password: Option<Secret>,
}

/// How brokers are spoken to, by Kafka's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecurityProtocol {
    Plaintext,
    Ssl,
    SaslPlaintext,
    SaslSsl,
}

/// How a password is shown to a broker, by Kafka's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaslMechanism {
    Plain,
    ScramSha256,
    ScramSha512,
}

/// The log that `all` keeps in Postgres.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// Records older than this are removed.
    pub retention: Duration,
}

#[derive(Clone, Debug)]
pub struct DatabaseConfig {
    /// Connections a process holds to one database at most.
    pub pool_size_max: usize,
    /// Bound on making one connection.
    pub connect_timeout: Duration,
    /// Bound on one statement, kept by the server.
    pub statement_timeout: Duration,
    /// Bound on waiting for one lock, kept by the server; above the next one, so that who waits for a frozen process's lock gets it.
    pub lock_timeout: Duration,
    /// A transaction whose client says nothing for this long is ended by the server, so that a frozen process holds nobody up.
    pub idle_in_transaction_timeout: Duration,
}

#[derive(Clone, Debug)]
pub struct ConsumerConfig {
    /// Records in one transaction at most.
    pub batch_records_max: usize,
    /// How long a partition stays with a consumer that says nothing.
    pub lease: Duration,
    /// Times that a record which keeps failing is tried before it waits for an operator.
    pub park_attempts_max: i32,
    /// Records that wait behind a parked one of their key; at the bound the partition stops.
    pub followers_max: i32,
}

#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// Worker threads of one server.
    pub workers: usize,
    /// How long a client may take to send its request's head.
    pub header_timeout: Duration,
    /// How long an idle connection stays open.
    pub keep_alive: Duration,
    /// Connections of one server at most; others wait to be accepted.
    pub connections_max: usize,
    /// How long an answer is kept under its `Idempotency-Key`.
    pub idempotency_retention: Duration,
}

#[derive(Clone, Debug)]
pub struct ShutdownConfig {
    /// From the first signal until everything has drained; past it the process ends with a failure.
    pub timeout: Duration,
}

/// Where traces go.
#[derive(Clone, Debug)]
pub struct TelemetryConfig {
    /// `http://host:port` of a collector that takes OTLP over HTTP; empty: traces are passed on, and none is recorded.
    pub otlp_endpoint: String,
    /// Of so many traces that begin here, one is recorded; those that others began are as they say.
    pub trace_one_in: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self::defaults(Role::Gateway)
    }
}

impl Config {
    /// What holds where nothing is configured. `all` listens on the loopback only: one who tries shopd opens nothing to a network.
    pub fn defaults(role: Role) -> Self {
        let address = if role == Role::All { Ipv4Addr::LOCALHOST } else { Ipv4Addr::UNSPECIFIED };
        let any = |port| SocketAddr::from((address, port));
        Self {
            gateway: GatewayConfig {
                listen: any(8000),
                orders_urls: vec!["http://127.0.0.1:8082".into()],
                payments_urls: vec!["http://127.0.0.1:8080".into()],
                upstream_timeout: Duration::from_millis(10_000),
                in_flight_max: 1_024,
                queue_time_max: Duration::from_millis(500),
                rate_limits: Vec::new(),
                trusted_proxies: Vec::new(),
                cors_origins: Vec::new(),
            },
            orders: ServiceConfig { listen: any(8082), database_url: None },
            payments: ServiceConfig { listen: any(8080), database_url: None },
            sweep: SweepConfig { after: Duration::from_millis(20_000), asks_per_second_max: 200 },
            relay: RelayConfig {
                listen: any(8083),
                batch_rows_max: 2_000,
                published_rows_max: 10_000,
                poll_interval: Duration::from_millis(1_000),
                lease: Duration::from_millis(2_000),
            },
            kafka: KafkaConfig {
                bootstrap_servers: Vec::new(),
                partitions: 12,
                topic_prefix: String::new(),
                request_timeout: Duration::from_millis(5_000),
                fetch_wait: Duration::from_millis(5_000),
                batch_bytes_max: 900_000,
                security_protocol: SecurityProtocol::Plaintext,
                ssl_ca_file: None,
                ssl_certificate_file: None,
                ssl_key_file: None,
                sasl_mechanism: SaslMechanism::ScramSha512,
                sasl_username: None,
                sasl_password: None,
            },
            log: LogConfig { retention: Duration::from_secs(7 * 24 * 3600) },
            database: DatabaseConfig {
                pool_size_max: 8,
                connect_timeout: Duration::from_millis(5_000),
                statement_timeout: Duration::from_millis(8_000),
                lock_timeout: Duration::from_millis(2_500),
                idle_in_transaction_timeout: Duration::from_millis(2_000),
            },
            consumer: ConsumerConfig {
                batch_records_max: 4_000,
                lease: Duration::from_millis(2_000),
                park_attempts_max: 5,
                followers_max: 10_000,
            },
            http: HttpConfig {
                workers: 2,
                header_timeout: Duration::from_millis(10_000),
                keep_alive: Duration::from_millis(75_000),
                connections_max: 20_000,
                idempotency_retention: Duration::from_secs(7 * 24 * 3600),
            },
            shutdown: ShutdownConfig { timeout: Duration::from_millis(10_000) },
            telemetry: TelemetryConfig { otlp_endpoint: String::new(), trace_one_in: 1 },
            data_dir: PathBuf::from("/var/lib/shopd"),
            data_dir_given: false,
        }
    }
}
