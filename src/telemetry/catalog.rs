//! Every metric that a role exposes: the one table. docs/METRICS.md, the buckets, the dashboard and the alerts are held against it by tests.

/// One family of series.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    /// Their values are bounded: by the code, the configuration, its names' addresses or the number of partitions, never by what
    /// clients send.
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Counter,
    Gauge,
    /// With the buckets' upper bounds.
    Histogram(&'static [f64]),
}

const SECONDS: Kind = Kind::Histogram(&[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]);
const ROWS: Kind = Kind::Histogram(&[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0]);

const fn metric(name: &'static str, kind: Kind, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { name, kind, labels, help }
}

use Kind::{Counter, Gauge};

pub const METRICS: &[Metric] = &[
    metric("shopd_build_info", Gauge, &["version"], "1, with the version that runs"),
    metric("shopd_http_requests_total", Counter, &["role", "method", "route", "status"], "HTTP requests answered"),
    metric("shopd_http_request_duration_seconds", SECONDS, &["role", "method", "route"], "From a request's head to its answer's"),
    metric(
        "shopd_failures_total",
        Counter,
        &["what"],
        "Failures of work that is tried again: a database, the broker or a peer is away",
    ),
    metric(
        "shopd_incidents_ongoing",
        Gauge,
        &["what"],
        "Kinds of work that fail at the moment, each from its first failure to its next success",
    ),
    metric("shopd_db_pool_connections", Gauge, &["role", "database", "pool", "state"], "Connections of a pool: `busy` or `idle`"),
    metric("shopd_db_pool_connections_max", Gauge, &["role", "database", "pool"], "The pool's limit"),
    metric("shopd_db_pool_waiting", Gauge, &["role", "database", "pool"], "Requests that wait for a connection"),
    metric("shopd_group_commit_requests", ROWS, &["of"], "Requests that were committed together"),
    metric(
        "shopd_outbox_rows",
        Gauge,
        &["outbox"],
        "Messages that are not known to be on the log, looked at each 5 s; at most 100 000 are counted",
    ),
    metric("shopd_outbox_oldest_row_age_seconds", Gauge, &["outbox"], "How long the oldest of them has waited; 0 where none waits"),
    metric("shopd_relay_rows_total", Counter, &["outbox"], "Messages of the outbox that the log acknowledged"),
    metric("shopd_relay_page_rows", ROWS, &["outbox"], "Messages that were read and published together"),
    metric(
        "shopd_relay_publish_duration_seconds",
        SECONDS,
        &["outbox"],
        "From looking at the outbox to the acknowledgement of the page",
    ),
    metric(
        "shopd_relay_lease_epoch",
        Gauge,
        &["outbox"],
        "The epoch under which this process relays the outbox; 0 where it stands by",
    ),
    metric(
        "shopd_relay_topics_made_total",
        Counter,
        &["topic"],
        "Topics that the log did not know any more and that were made anew",
    ),
    metric("shopd_consumer_records_total", Counter, &["topic"], "Records applied"),
    metric("shopd_consumer_batch_records", ROWS, &["topic"], "Records applied in one transaction"),
    metric(
        "shopd_consumer_batch_duration_seconds",
        SECONDS,
        &["topic"],
        "From a batch's beginning to its commit, with what was tried again",
    ),
    metric(
        "shopd_consumer_lag_records",
        Gauge,
        &["topic", "partition"],
        "Offsets from what is committed to the log's end, of this process's partitions",
    ),
    metric(
        "shopd_consumer_lease_epoch",
        Gauge,
        &["topic", "partition"],
        "The epoch under which this process owns the partition; 0 where it is another's",
    ),
    metric("shopd_consumer_offset_resets_total", Counter, &["topic"], "Times an offset was not on the log any more"),
    metric(
        "shopd_consumer_partitions_stopped",
        Gauge,
        &["topic"],
        "Partitions that stand still because too many records wait behind parked ones",
    ),
    metric(
        "shopd_dead_letters",
        Gauge,
        &["topic", "state"],
        "Letters kept of this process's partitions: `dead`, `parked` or `waiting`",
    ),
    metric("shopd_dead_letters_total", Counter, &["topic", "state"], "Records that became letters"),
    metric("shopd_dead_letters_applied_total", Counter, &["topic"], "Letters that were applied after all"),
    metric("shopd_dead_letters_discarded_total", Counter, &["topic"], "Letters that an operator discarded"),
    metric(
        "shopd_dead_letter_copies_dropped_total",
        Counter,
        &[],
        "Copies for the topic of dead letters that the log refused; the letters are kept",
    ),
    metric("shopd_orders_reasked_total", Counter, &[], "Payments asked for again because no result came"),
    metric("shopd_orders_without_result", Gauge, &[], "Orders that wait for a result for longer than `orders.sweep_after_ms`"),
    metric("shopd_orders_results_without_effect_total", Counter, &[], "Results of orders that had ended, or that orders never had"),
    metric(
        "shopd_trace_spans_total",
        Counter,
        &["state"],
        "Spans `recorded`; of these `sent` to the collector, or `failed` to be; what is in neither was dropped, or is on its way",
    ),
    metric("shopd_orders_awaited", Gauge, &[], "Orders whose end a request waits for (`Prefer: wait`)"),
    metric("shopd_live_streams", Gauge, &[], "Streams of events that clients hold open"),
    metric("shopd_live_dropped_total", Counter, &["reason"], "Streams that were ended because their client was too slow"),
    metric(
        "shopd_gateway_breaker_open",
        Gauge,
        &["service", "replica"],
        "1 where the replica's breaker is open, 0.5 where it is tried again, else 0",
    ),
    metric("shopd_gateway_replica_ejected", Gauge, &["service", "replica"], "1 where the replica is asked last for a while"),
    metric("shopd_gateway_ejections_total", Counter, &["replica"], "Times a replica began to be asked last"),
    metric("shopd_gateway_retries_total", Counter, &[], "Requests that were sent to another replica again"),
    metric("shopd_gateway_retries_refused_total", Counter, &[], "Requests that were not, because too many are"),
    metric("shopd_gateway_rate_limited_total", Counter, &["route"], "Requests refused by a rate limit"),
    metric("shopd_gateway_shed_total", Counter, &["service"], "Requests refused because too many were under way"),
    metric("shopd_gateway_batch_requests", ROWS, &[], "Requests that went to a service as one"),
    metric("shopd_gateway_sockets", Gauge, &[], "WebSockets that clients hold open"),
    // Under the names that every Prometheus client uses for them.
    metric("process_cpu_seconds_total", Counter, &[], "CPU time of this process, user and system"),
    metric("process_open_fds", Gauge, &[], "Open file descriptors"),
    metric("process_max_fds", Gauge, &[], "Their limit"),
    metric("process_resident_memory_bytes", Gauge, &[], "Resident memory"),
    metric("process_virtual_memory_bytes", Gauge, &[], "Virtual memory"),
    metric("process_virtual_memory_max_bytes", Gauge, &[], "Its limit"),
    metric("process_start_time_seconds", Gauge, &[], "When it was started, since the epoch"),
    metric("process_threads", Gauge, &[], "Threads"),
];
