create or replace function advance_offsets(of_topic text, partitions int[], old_offsets bigint[], new_offsets bigint[], epochs bigint[],
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
