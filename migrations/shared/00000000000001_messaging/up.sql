-- What messaging keeps in every service's own database.

-- Rows wait here for the relay. They are read by (xid, id) under a snapshot, never by id alone: an id is given before its
-- transaction commits, so a reader that only remembers the highest id loses the rows that commit late.
create table outbox (
    xid         xid8        not null default pg_current_xact_id(),
    id          bigint      generated always as identity,
    event_id    uuid        not null,
    topic       text        not null,
    key         text        not null,
    payload     bytea       not null,
    event_type  text        not null,
    source      text        not null,
    traceparent text        not null,
    request_id  text        not null,
    created_at  timestamptz not null,
    primary key (xid, id)
) with (autovacuum_vacuum_insert_scale_factor = 0.5);

-- How far the relay has come, and whose the outbox is. Everything visible in `snapshot` is on the log; `look` is the
-- snapshot being worked through, (after_xid, after_id) the last row of it that is there.
create table outbox_cursor (
    name              text        primary key,
    snapshot          text        not null default '3:3:',
    look              text,
    late              boolean     not null default true,
    after_xid         xid8        not null default '0',
    after_id          bigint      not null default 0,
    system_identifier text,
    owner             text,
    lease_until       timestamptz not null default '-infinity',
    epoch             bigint      not null default 0
) with (fillfactor = 20);
insert into outbox_cursor (name) values ('outbox');

-- Where a consumer goes on, and whose the partition is. The offset moves in the transaction that applies the records.
create table consumer_offset (
    topic       text        not null,
    partition   int         not null,
    next_offset bigint      not null default 0,
    owner       text,
    lease_until timestamptz not null default '-infinity',
    epoch       bigint      not null default 0,
    primary key (topic, partition)
) with (fillfactor = 20);

-- Moves offsets by compare-and-set and renews the leases with them. A partition that does not move raises an error, because
-- nobody would look at a row count before the commit: it is the fence that lets a worker without its lease commit nothing.
create function advance_offsets(of_topic text, partitions int[], old_offsets bigint[], new_offsets bigint[], epochs bigint[],
                                lease_ms bigint) returns void language plpgsql as $$
declare
    moved int;
begin
    -- Locked in one order, so that two workers never wait for each other in a circle.
    perform 1 from consumer_offset c where c.topic = of_topic and c.partition = any(partitions) order by c.partition for update;
    update consumer_offset c
       set next_offset = m.new_offset, lease_until = clock_timestamp() + lease_ms * interval '1 millisecond'
      from (select unnest(partitions) as partition, unnest(old_offsets) as old_offset, unnest(new_offsets) as new_offset,
                   unnest(epochs) as epoch) m
     where c.topic = of_topic and c.partition = m.partition and c.next_offset = m.old_offset and c.epoch = m.epoch;
    get diagnostics moved = row_count;
    if moved <> cardinality(partitions) then
        raise exception 'shopd_fenced: % of % partitions of % moved', moved, cardinality(partitions), of_topic;
    end if;
end $$;

-- Records that could not be applied, whole, with where they came from.
create table dead_letter (
    topic      text        not null,
    partition  int         not null,
    log_offset bigint      not null,
    key        bytea,
    value      bytea,
    headers    jsonb       not null,
    reason     text        not null,
    attempts   int         not null,
    at         timestamptz not null default clock_timestamp(),
    primary key (topic, partition, log_offset)
);
