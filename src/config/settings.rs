//! The one table of settings: key, field, kind, meaning. Everything else (loading, the names of variables, docs/SETTINGS.md) follows it.

use super::edge::{Networks, Origins, RateLimits};
use super::kafka::{Mechanism, Name, Password, PemFile, Protocol};
use super::kinds::{Brokers, Collector, Count, DatabaseUrl, Kind, Listen, Millis, Raw, Replicas, TopicPrefix};
use super::{Config, Role};

/// A setting as operators know it.
pub struct Setting {
    /// `section.key`, as in TOML.
    pub key: &'static str,
    /// Ends with its unit where it has one.
    pub meaning: &'static str,
    pub(super) limits: fn() -> String,
    pub(super) set: fn(&mut Config, &Raw) -> Result<(), String>,
    pub(super) show: fn(&Config) -> String,
}

impl Setting {
    /// The environment variable: `SHOPD__SECTION__KEY`.
    pub fn variable(&self) -> String {
        format!("SHOPD__{}", self.key.replace('.', "__").to_uppercase())
    }
}

macro_rules! settings {
    ($($key:literal => $section:ident . $field:ident, $kind:expr, $meaning:literal;)+) => {
        /// Every setting there is.
        pub static SETTINGS: &[Setting] = &[$(Setting {
            key: $key,
            meaning: $meaning,
            limits: || limits_of(&$kind, |config: &Config| &config.$section.$field),
            set: |config, raw| {
                config.$section.$field = $kind.parse(raw)?;
                Ok(())
            },
            show: |config| $kind.show(&config.$section.$field),
        }),+];
    };
}

/// `_field` only tells which type the kind is meant for.
fn limits_of<T>(kind: &impl Kind<T>, _field: fn(&Config) -> &T) -> String {
    kind.limits()
}

const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;

settings! {
    "gateway.listen" => gateway.listen, Listen, "where the gateway listens; port 0 picks one and logs it";
    "gateway.orders_urls" => gateway.orders_urls, Replicas, "replicas of orders";
    "gateway.payments_urls" => gateway.payments_urls, Replicas, "replicas of payments";
    "gateway.upstream_timeout_ms" => gateway.upstream_timeout, Millis(1..=HOUR_MS), "bound on one request to a service, other replicas included";
    "gateway.in_flight_max" => gateway.in_flight_max, Count(1..=100_000), "requests under way at once at each service, event streams and waits on purpose aside; further ones wait their turn";
    "gateway.queue_time_max_ms" => gateway.queue_time_max, Millis(1..=HOUR_MS), "how long one may wait its turn in a burst; in a queue that does not empty it is shed much sooner";
    "gateway.rate_limits" => gateway.rate_limits, RateLimits, "how often one client may ask for one route";
    "gateway.trusted_proxies" => gateway.trusted_proxies, Networks, "proxies in front, whose X-Forwarded-For says who the client is";
    "gateway.cors_origins" => gateway.cors_origins, Origins, "web pages of other origins that may use the API";
    "orders.listen" => orders.listen, Listen, "where orders listens; port 0 picks one and logs it";
    "orders.database_url" => orders.database_url, DatabaseUrl, "database of orders, Postgres 15 or later; a secret";
    "orders.sweep_after_ms" => sweep.after, Millis(100..=HOUR_MS), "an order without a result after this is asked for again";
    "orders.sweep_asks_per_second_max" => sweep.asks_per_second_max, Count(1..=100_000), "orders asked for again in a second, by all replicas together";
    "payments.listen" => payments.listen, Listen, "where payments listens; port 0 picks one and logs it";
    "payments.database_url" => payments.database_url, DatabaseUrl, "database of payments, another one than that of orders; a secret";
    "relay.listen" => relay.listen, Listen, "where the relay listens; port 0 picks one and logs it";
    "relay.batch_rows_max" => relay.batch_rows_max, Count(1..=100_000), "messages of the outbox published at once, about";
    "relay.published_rows_max" => relay.published_rows_max, Count(1..=10_000_000), "published messages that may lie in a busy outbox before they are dropped; a quiet one is emptied at once";
    "relay.poll_interval_ms" => relay.poll_interval, Millis(1..=HOUR_MS), "how often an outbox is looked at when nothing wakes the relay";
    "relay.lease_ms" => relay.lease, Millis(100..=HOUR_MS), "how long an outbox stays with a relay that says nothing";
    "kafka.bootstrap_servers" => kafka.bootstrap_servers, Brokers, "brokers to begin with";
    "kafka.partitions" => kafka.partitions, Count(1..=1_000), "partitions of the topics that shopd creates";
    "kafka.topic_prefix" => kafka.topic_prefix, TopicPrefix, "stands before every topic's name, for several shops on one cluster";
    "kafka.request_timeout_ms" => kafka.request_timeout, Millis(1..=HOUR_MS), "bound on one request to the broker";
    "kafka.fetch_wait_ms" => kafka.fetch_wait, Millis(1..=HOUR_MS), "how long a fetch may wait at the broker for a first record";
    "kafka.batch_bytes_max" => kafka.batch_bytes_max, Count(1_024..=104_857_600), "bytes of one produced batch; keep it below the broker's message.max.bytes (of a topic: max.message.bytes)";
    "kafka.security_protocol" => kafka.security_protocol, Protocol, "how the brokers are spoken to, by Kafka's own names";
    "kafka.ssl_ca_file" => kafka.ssl_ca_file, PemFile, "authorities that the brokers' certificates are signed by; without it those that the system trusts";
    "kafka.ssl_certificate_file" => kafka.ssl_certificate_file, PemFile, "certificate that shopd shows to brokers which ask for one, with those that lead to its authority";
    "kafka.ssl_key_file" => kafka.ssl_key_file, PemFile, "key of that certificate, not encrypted";
    "kafka.sasl_mechanism" => kafka.sasl_mechanism, Mechanism, "how the password is shown to the brokers";
    "kafka.sasl_username" => kafka.sasl_username, Name, "user at the brokers";
    "kafka.sasl_password" => kafka.sasl_password, Password, "the user's password; a secret";
    "log.retention_ms" => log.retention, Millis(1_000..=3_650 * DAY_MS), "how long the embedded log of `all` keeps a record";
    "database.pool_size_max" => database.pool_size_max, Count(2..=1_000), "connections of a process's general pool to one database; OPERATIONS counts all";
    "database.connect_timeout_ms" => database.connect_timeout, Millis(1..=HOUR_MS), "bound on making one connection";
    "database.statement_timeout_ms" => database.statement_timeout, Millis(1..=HOUR_MS), "bound on one statement";
    "database.lock_timeout_ms" => database.lock_timeout, Millis(1..=HOUR_MS), "bound on waiting for one lock";
    "database.idle_in_transaction_timeout_ms" => database.idle_in_transaction_timeout, Millis(1..=HOUR_MS), "after this silence the server ends a transaction, so that a frozen process holds nobody up";
    "consumer.batch_records_max" => consumer.batch_records_max, Count(1..=100_000), "records in one transaction";
    "consumer.lease_ms" => consumer.lease, Millis(100..=HOUR_MS), "how long a partition stays with a consumer that says nothing";
    "consumer.park_attempts_max" => consumer.park_attempts_max, Count(1..=1_000), "times that a record which keeps failing is tried before it waits for an operator";
    "consumer.followers_max" => consumer.followers_max, Count(1..=1_000_000), "records that wait behind a parked one of their key; at this bound its partition stops";
    "http.workers" => http.workers, Count(1..=512), "worker threads of one server";
    "http.header_timeout_ms" => http.header_timeout, Millis(1..=HOUR_MS), "how long a client may take to send its request's head";
    "http.keep_alive_ms" => http.keep_alive, Millis(1..=HOUR_MS), "how long an idle connection stays open";
    "http.connections_max" => http.connections_max, Count(1..=1_000_000), "connections of one server; further ones wait to be accepted";
    "http.idempotency_retention_ms" => http.idempotency_retention, Millis(1_000..=3_650 * DAY_MS), "how long an answer is kept under its Idempotency-Key";
    "shutdown.timeout_ms" => shutdown.timeout, Millis(1..=HOUR_MS), "from the first signal until everything has drained; past it the process ends with a failure";
    "telemetry.otlp_endpoint" => telemetry.otlp_endpoint, Collector, "collector that takes OTLP over HTTP, to which the spans of traces go; none: no span is recorded";
    "telemetry.trace_one_in" => telemetry.trace_one_in, Count(1..=1_000_000), "one in so many traces that begin here is recorded; a client's traceparent decides for its own";
}

/// The settings as a Markdown table, with their defaults; docs/SETTINGS.md holds exactly this.
pub fn table() -> String {
    let defaults = Config::defaults(Role::Gateway);
    let mut table = String::from("| key | variable | default | value | meaning |\n|---|---|---|---|---|\n");
    for setting in SETTINGS {
        let default = match (setting.show)(&defaults) {
            none if none.is_empty() => "none".to_owned(),
            some => format!("`{some}`"),
        };
        let (key, variable, limits, meaning) = (setting.key, setting.variable(), (setting.limits)(), setting.meaning);
        table.push_str(&format!("| `{key}` | `{variable}` | {default} | {limits} | {meaning} |\n"));
    }
    table
}
