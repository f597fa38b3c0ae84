drop function purge_outbox_segment(bigint, pg_snapshot, int);
drop function filled_outbox_segments();
insert into outbox overriding system value
    select * from outbox_1 union all select * from outbox_2 union all select * from outbox_3 union all select * from outbox_4;
drop table outbox_1, outbox_2, outbox_3, outbox_4;
