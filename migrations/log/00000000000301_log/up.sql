-- The embedded log, in a schema of its own so that it may share a database with a service's tables.
create schema shopd_log;

create table shopd_log.topic (
    id         int  generated always as identity primary key,
    name       text not null unique,
    partitions int  not null check (partitions > 0)
);

-- A partition holds the records start_offset <= offset < next_offset, without a hole. Whoever appends locks its row and
-- takes offsets from it in the same transaction: so offsets are given in the order of the commits, and a reader that has
-- seen an offset has seen all below it.
create table shopd_log.partition (
    topic_id     int    not null references shopd_log.topic (id),
    partition    int    not null,
    start_offset bigint not null default 0,
    next_offset  bigint not null default 0,
    primary key (topic_id, partition),
    check (0 <= start_offset and start_offset <= next_offset)
) with (fillfactor = 20);

create table shopd_log.record (
    topic_id    int         not null,
    partition   int         not null,
    "offset"    bigint      not null,
    key         bytea,
    value       bytea,
    -- Name and value by turns, each after its length in four bytes, the most significant first.
    headers     bytea       not null,
    -- The producer's.
    timestamp   timestamptz not null,
    -- By the server's clock: the retention goes by it, whatever a producer says.
    appended_at timestamptz not null default now(),
    primary key (topic_id, partition, "offset")
) with (autovacuum_vacuum_insert_scale_factor = 0.5);
