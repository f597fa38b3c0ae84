-- Who shares a topic's partitions: every replica of a consumer, with the time until which it counts. The number of those that count
-- says how many partitions are each one's fair share; whose a partition is, says `consumer_offset` alone.
create table consumer_member (
    topic      text        not null,
    owner      text        not null,
    seen_until timestamptz not null,
    primary key (topic, owner)
) with (fillfactor = 20);
